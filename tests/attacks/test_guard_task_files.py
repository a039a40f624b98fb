"""Task files of strangers: nothing that they name runs before the user has said that it may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from abliterate.config import CapabilitySettings
from abliterate.errors import UsageError
from abliterate.evaluation.capability import check_task_files, lm_eval_tasks
from abliterate.evaluation.examine import exam_of
from commandline import abliterate
from families import BY_NAME, byte_tokenizer

#: What runs leaves a file behind.
EVIL = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
def f(*a, **k): return a[0] if a else "x"
class C: pass
"""

TASK: dict[str, Any] = {
    "task": "t",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": ["a", "b"],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = tmp_path / "tasks"
    place.mkdir()
    (place / "evil.py").write_text(EVIL)
    (place / "items.jsonl").write_text("".join(json.dumps({"q": f"{n}?"}) + "\n" for n in range(3)))
    return place


def written(folder: Path, text: str = "", name: str = "t.yaml", **changes: Any) -> Path:
    """A task file: JSON, which is YAML, with more YAML under it where that cannot be said in JSON."""
    keys = {key: value for key, value in (TASK | changes).items() if value is not None}
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()) + text)
    return path


def measured(spec: Path, **options: Any) -> list[Any]:
    model = BY_NAME["llama"].model(max_position_embeddings=1024)
    return lm_eval_tasks(model, byte_tokenizer(), [str(spec)], batch_size=4, **options)


NAMES_CODE = {
    "process_docs": "process_docs: !function evil.f\n",
    "doc_to_text": "doc_to_text: !function evil.f\n",
    "installed module": "process_results: !function os.system\n",
    "in a metric": "metric_list: [{metric: !function evil.f}]\n",
    "in an aggregation": "metric_list: [{metric: acc, aggregation: !function evil.f}]\n",
    "in a filter": "filter_list: [{name: n, filter: [{function: custom, filter_fn: !function evil.f}]}]\n",
    "class": "class: !function evil.C\n",
    "class without a tag": "class: evil.C\n",
    "custom data set": "custom_dataset: evil.f\n",
    "samples": "fewshot_config: {samples: !function evil.f}\n",
    "anchored": "metadata: &a !function evil.f\nprocess_docs: *a\n",
    "merged": "metadata: &a {process_docs: !function evil.f}\n<<: *a\n",
    "as a key": "metadata: {? !function evil.f : 1}\n",
    "escaped key": '"\\x63lass": evil.C\n',
    "python object": "metadata: !!python/object/apply:os.system [touch ran]\n",
    "python name": "metadata: !!python/name:os.system\n",
    "another tag": "metadata: !include evil.yaml\n",
    "data set script": "dataset_kwargs: {trust_remote_code: true, data_files: {test: items.jsonl}}\n",
    "generation": "generation_kwargs: {custom_generate: ./evil, until: [x]}\n",
    "pickles": "dataset_path: pandas\n",
    "prompts elsewhere": "use_prompt: 'evil.yaml:p'\n",
}


@pytest.mark.parametrize("text", NAMES_CODE.values(), ids=NAMES_CODE)
@pytest.mark.parametrize("whole", [False, True])
def test_a_task_that_names_code_is_refused_by_file(text: str, whole: bool, folder: Path) -> None:
    path = written(folder, text)
    before = path.read_text().count("\n") + 1 - text.count("\n")
    # Of a folder lm-eval takes only files that it can make something of.
    said = rf"{path}: line {before}.*--trust-task-code" + (r"|found none$" if whole and ": !" in text else "")
    for check in (check_task_files, lambda specs: exam_of(CapabilitySettings(tasks=",".join(specs)))):
        with pytest.raises(UsageError, match=said) as caught:
            check([str(folder if whole else path)])
        assert str(caught.value).isprintable()
    assert not (folder / "ran").exists()


def test_code_is_refused_before_a_model_is_looked_for_at_the_command_line(folder: Path) -> None:
    path = written(folder, NAMES_CODE["process_docs"])
    for command in (["eval", folder / "model"], ["run", folder / "model", "-o", folder / "out"]):
        abliterate(*command, "--tasks", path).failed(f"{path}: line ", "'!function evil.f'", "--trust-task-code")
        assert not (folder / "ran").exists()


def test_trusted_code_runs(folder: Path) -> None:
    path = written(folder, "process_docs: !function evil.f\n")
    with pytest.raises(UsageError, match="expected nothing that runs code"):
        measured(path)
    assert not (folder / "ran").exists()
    assert measured(path, trust_task_code=True)[0].task == "t"
    assert (folder / "ran").exists(), "the control: it would have run"


def test_what_is_included_is_read_too_and_lies_in_the_folder(folder: Path) -> None:
    written(folder, "process_docs: !function evil.f\n", name="base")
    with pytest.raises(UsageError, match=r"base: line \d+: expected nothing that runs code"):
        check_task_files([str(written(folder, include="base"))])
    with pytest.raises(UsageError, match=r"base: line \d+"):
        check_task_files(
            [str(written(folder, include=["sub/more"])), str(written(folder, name="sub/more", include="../base"))]
        )
    outside = written(folder.parent, name="outside.yaml")
    for reference in (str(outside), "../outside.yaml", "sub/../../outside.yaml"):
        with pytest.raises(UsageError, match=r"expected a file in .*, found one elsewhere"):
            check_task_files([str(written(folder, include=reference))])
    (folder / "link.yaml").symlink_to(outside)
    with pytest.raises(UsageError, match=r"expected a file in .*, found one elsewhere"):
        check_task_files([str(written(folder, include="link.yaml"))])
    written(folder, name="base", include="t.yaml")
    check_task_files([str(written(folder, include="base"))])  # in a ring: lm-eval's to refuse


def test_a_group_is_answerable_for_what_it_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from functools import partial

    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    group = folder / "g.yaml"
    written(folder, "process_docs: !function evil.f\n", name="bad.yaml", task="bad", tag="tagged")
    written(folder, name="good.yaml", task="good")
    (folder / "inner.yaml").write_text("group: inner\ntask: [bad]\n")
    for member in (
        "bad",
        "tagged",
        "inner",
        '"\\x62ad"',
        "{task: bad, num_fewshot: 1}",
        "{group: more, task: [inner]}",
    ):
        group.write_text(f"group: g\ntask: [good, {member}]\n")
        with pytest.raises(UsageError, match=r"bad.yaml: line \d+: expected nothing that runs code"):
            check_task_files([str(group)])
    group.write_text("group: g\ntask: [{task: x, doc_to_text: !function evil.f}]\n")
    with pytest.raises(UsageError, match=r"g.yaml: line 2: expected nothing that runs code"):
        check_task_files([str(group)])
    group.write_text("group: g\ntask: [good]\n")
    check_task_files([str(group)])  # what lies beside it and is not named does not matter


ESCAPES = (
    "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self._TemplateReference__context }}",
    "{{ (q|attr('__class__')).__base__ }}",
    "{{ '{0.__class__}'.format(q) }}",
    "{% for i in range(10**9) %}x{% endfor %}",
)


@pytest.mark.parametrize("template", ESCAPES)
@pytest.mark.parametrize("key", ["doc_to_text", "doc_to_choice", "gen_prefix"])
def test_templates_do_not_leave_their_sandbox(
    template: str, key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=r"cannot be (loaded|run)") as caught:
        measured(written(folder, **{key: template}))
    assert "\n" not in str(caught.value)
    assert not (folder / "ran").exists()


def test_a_template_may_be_what_templates_are(folder: Path) -> None:
    import lm_eval.utils

    before = lm_eval.utils.env
    text = "Q {{ q.split('?')[0] | upper | regex_replace('0', 'o') }}{% for x in range(3) %}{{ x }}{% endfor %}"
    assert len(measured(written(folder, doc_to_text=text))[0].values) == 3
    assert lm_eval.utils.env is before


@pytest.mark.parametrize(
    "metric", [{"metric": "./evil"}, {"metric": "someone/metric"}, {"metric": "acc", "hf_evaluate": True}]
)
def test_metrics_are_not_fetched_as_code(metric: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = written(folder, metric_list=[metric])
    with pytest.raises(UsageError, match=rf"{path}.*code from elsewhere.*--trust-task-code"):
        measured(path)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [" * 900 + "]" * 900, "at most 50 deep"),
        ("- " * 30000, "cannot be loaded"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)},' * 9}]\n" for i in range(9)),
            "at most 200000 values",
        ),
        ("a: &a [*a]\n", "at most 50 deep"),
        ("a: 'x" + "y" * 5_000_000 + "'\n", "more than the 4000000 bytes"),
        ("a: \x00\n", "a NUL character"),
        ("a: *unknown\n", "cannot be loaded"),
    ],
    ids=["deep", "deeper", "many aliases", "ring", "large", "nul", "alias"],
)
def test_files_that_are_made_to_cost_are_refused(text: str, said: str, folder: Path) -> None:
    (folder / "t.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        check_task_files([str(folder / "t.yaml")])
