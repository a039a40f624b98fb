"""Published sets by name: the right rows from the hub and from the authors' files, and one line when they are not had.

The rows here are made up; columns, configurations and splits are those of the published sets.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from abliterate.config import PromptSettings
from abliterate.errors import PromptError
from abliterate.prompts import KNOWN, Prompt, build_contrastive_set, describe, find_known, load_prompts
from abliterate.prompts.sources import SetName

DOCS = Path(__file__).parents[2] / "docs" / "prompts.md"
Rows = list[dict[str, Any]]
Loaded = list[tuple[str, str | None]]


def jbb(word: str) -> Rows:
    return [
        {
            "Index": i,
            "Goal": f"{word} {i}",
            "Target": "Sure",
            "Behavior": "b",
            "Category": f"c{i}",
            "Source": "Original",
        }
        for i in range(2)
    ]


def xstest(*, label: bool) -> Rows:
    kinds = [("Where is a killer deal?", "homonyms", "safe"), ("Where is a killer?", "contrast_homonyms", "unsafe")]
    rows: Rows = [{"id": i, "prompt": p, "type": t, "focus": "kill"} for i, (p, t, _) in enumerate(kinds)]
    return [row | ({"label": kind[2]} if label else {}) for row, kind in zip(rows, kinds, strict=True)]


HARMBENCH_CSV: Rows = [
    {"Behavior": "do it", "FunctionalCategory": "standard", "SemanticCategory": "illegal", "ContextString": ""},
    {
        "Behavior": "answer this",
        "FunctionalCategory": "contextual",
        "SemanticCategory": "illegal",
        "ContextString": "c",
    },
    {"Behavior": "the lyrics", "FunctionalCategory": "copyright", "SemanticCategory": "copyright", "ContextString": ""},
]
SORRY: Rows = [
    {"question_id": 1, "category": 3, "turns": ["insult them"], "prompt_style": "base"},
    {"question_id": 1, "category": 3, "turns": ["insult dem"], "prompt_style": "slang"},
]

#: What the hub has, by id, configuration and split.
HUB: dict[tuple[str, ...], Rows] = {
    ("JailbreakBench/JBB-Behaviors", "behaviors", "harmful"): jbb("bad"),
    ("JailbreakBench/JBB-Behaviors", "behaviors", "benign"): jbb("good"),
    ("walledai/HarmBench", "standard", "train"): [{"prompt": "do it", "category": "illegal"}],
    ("walledai/StrongREJECT", "train"): [{"prompt": "lie", "category": "deception", "source": "custom"}],
    ("Paul/XSTest", "train"): xstest(label=True),
    ("bench-llm/or-bench", "or-bench-toxic", "train"): [{"prompt": "hate", "category": "hate"}],
    ("bench-llm/or-bench", "or-bench-hard-1k", "train"): [{"prompt": "explain hate", "category": "hate"}],
    ("sorry-bench/sorry-bench-202503", "train"): SORRY,
    ("walledai/AdvBench", "train"): [{"prompt": "do it", "target": "Sure, here is how"}],
}

#: What each set gives for each role.
WANTED: dict[tuple[str, SetName], Loaded] = {
    ("jailbreakbench", "harmful"): [("bad 0", "c0"), ("bad 1", "c1")],
    ("jailbreakbench", "harmless"): [("good 0", "c0"), ("good 1", "c1")],
    ("jailbreakbench", "borderline"): [("good 0", "c0"), ("good 1", "c1")],
    ("harmbench", "harmful"): [("do it", "illegal")],
    ("strongreject", "harmful"): [("lie", "deception")],
    ("xstest", "harmful"): [("Where is a killer?", "contrast_homonyms")],
    ("xstest", "borderline"): [("Where is a killer deal?", "homonyms")],
    ("orbench", "harmful"): [("hate", "hate")],
    ("orbench", "borderline"): [("explain hate", "hate")],
    ("sorrybench", "harmful"): [("insult them", "3")],
    ("advbench", "harmful"): [("do it", None)],
}

#: The authors' files, by set and name.
FILES: dict[str, dict[str, Rows]] = {
    "jailbreakbench": {"data/harmful-behaviors.csv": jbb("bad"), "data/benign-behaviors.csv": jbb("good")},
    "harmbench": {"data/behavior_datasets/harmbench_behaviors_text_all.csv": HARMBENCH_CSV},
    "strongreject": {
        "strongreject_dataset/strongreject_dataset.csv": [
            {"category": "deception", "source": "custom", "forbidden_prompt": "lie"}
        ]
    },
    "xstest": {"xstest_prompts.csv": xstest(label=True)},
    "orbench": {
        "or-bench-toxic.csv": [{"prompt": "hate", "category": "hate"}],
        "or-bench-hard-1k.csv": [{"prompt": "explain hate", "category": "hate"}],
    },
    "sorrybench": {"question.jsonl": SORRY},
    "advbench": {"data/advbench/harmful_behaviors.csv": [{"goal": "do it", "target": "Sure, here is how"}]},
}


class Table:
    """What `datasets.load_dataset` gives, as far as it is used."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A `datasets` library without a network; what it was asked for."""
    asked: list[tuple[str, ...]] = []

    def load_dataset(*names: str, split: str) -> Table:
        asked.append((*names, split))
        return Table(HUB[*names, split])

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    library.are_progress_bars_disabled = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return asked


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Makes `datasets` fail in a way of choice."""

    def fail(error: Exception) -> None:
        def load_dataset(*names: str, split: str) -> Table:
            raise error

        library = ModuleType("datasets")
        library.load_dataset = load_dataset  # type: ignore[attr-defined]
        library.are_progress_bars_disabled = lambda: True  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", library)

    return fail


def loaded(spec: str, role: SetName) -> Loaded:
    return [(str(prompt), prompt.category) for prompt in load_prompts(spec, role)]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def fails(spec: str, role: SetName = "harmful") -> str:
    with pytest.raises(PromptError) as caught:
        load_prompts(spec, role)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_every_role_of_every_set_is_tried_here() -> None:
    assert set(WANTED) == {(known.name, role) for known in KNOWN.values() for role in known.parts}
    assert set(FILES) == set(KNOWN)


@pytest.mark.parametrize(("name", "role"), WANTED)
def test_set_on_the_hub_gives_the_rows_of_the_role(hub: list[tuple[str, ...]], name: str, role: SetName) -> None:
    assert loaded(name, role) == WANTED[name, role]
    assert len(hub) == 1
    assert hub[0][0] == KNOWN[name].hub


@pytest.mark.parametrize(("name", "role"), WANTED)
def test_copy_of_the_published_files_gives_the_same(tmp_path: Path, name: str, role: SetName) -> None:
    files = [write(tmp_path / name, rows) for name, rows in FILES[name].items()]
    assert loaded(f"{name}={tmp_path}", role) == WANTED[name, role], "the folder as published"
    own = next(file for file in files if file.name == Path(KNOWN[name].parts[role].file).name)
    assert loaded(f"{name}={own}", role) == WANTED[name, role], "the file"
    assert loaded(f"{name}={own.parent}", role) == WANTED[name, role], "the folder the file is in"
    anywhere = own.rename(tmp_path / f"mine{own.suffix}")
    assert loaded(f"{name}={anywhere}", role) == WANTED[name, role], "the file under another name"


@pytest.mark.parametrize(("name", "role"), WANTED)
def test_hub_rows_saved_in_any_format_give_the_same(tmp_path: Path, name: str, role: SetName) -> None:
    import pyarrow
    from pyarrow import parquet

    part = KNOWN[name].parts[role]
    config = () if part.config is None else (part.config,)
    rows = HUB[KNOWN[name].hub, *config, part.split]
    (tmp_path / "x.json").write_text(json.dumps(rows), encoding="utf-8")
    write(tmp_path / "x.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for suffix in ("json", "jsonl", "parquet"):
        assert loaded(f"{name}={tmp_path / f'x.{suffix}'}", role) == WANTED[name, role]


@pytest.mark.parametrize("label", [True, False])
def test_older_releases_of_xstest_tell_safe_from_unsafe_by_their_type(tmp_path: Path, label: bool) -> None:
    path = write(tmp_path / "xstest_v2_prompts.csv", xstest(label=label))
    assert loaded(f"xstest={path}", "harmful") == WANTED["xstest", "harmful"]
    assert loaded(f"xstest={path}", "borderline") == WANTED["xstest", "borderline"]


def test_xstest_without_labels_and_types_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "one", "label": "unsafe"}, {"prompt": "two", "label": "safe"}]
    assert loaded(f"xstest={write(tmp_path / 'x.csv', rows)}", "harmful") == [("one", None)]
    path = write(tmp_path / "y.csv", [{"prompt": "one", "focus": "kill"}])
    assert "expected a column label or type, found neither" in fails(f"xstest={path}")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("JailbreakBench", "jailbreakbench"),
        ("jailbreak-bench", "jailbreakbench"),
        ("JBB", "jailbreakbench"),
        ("JBB-Behaviors", "jailbreakbench"),
        ("HarmBench", "harmbench"),
        ("StrongREJECT", "strongreject"),
        ("strong-reject", "strongreject"),
        ("XSTest", "xstest"),
        ("OR-Bench", "orbench"),
        ("or_bench", "orbench"),
        ("SORRY-Bench", "sorrybench"),
        ("AdvBench", "advbench"),
    ],
)
def test_names_are_forgiving(spec: str, name: str) -> None:
    assert find_known(spec) == (KNOWN[name], None)
    assert find_known(f"{spec}=a/b=c.csv") == (KNOWN[name], Path("a/b=c.csv"))


@pytest.mark.parametrize(
    "spec", ["builtin", "advbench.csv", "./advbench", "walledai/AdvBench:train:prompt", "bench", ""]
)
def test_other_specs_are_not_taken_for_names(spec: str) -> None:
    assert find_known(spec) is None


def test_role_that_a_set_has_not_is_refused_with_those_that_have_it() -> None:
    assert "expected harmless prompts, found only harmful ones; sets with harmless prompts: jailbreakbench" in fails(
        "advbench", "harmless"
    )
    message = fails("xstest=nowhere.csv", "harmless")
    assert "found only harmful and borderline ones" in message
    assert fails("harmbench", "borderline").endswith("borderline prompts: jailbreakbench, xstest, orbench")


def test_file_of_the_other_role_is_refused(tmp_path: Path) -> None:
    for file, rows in (*FILES["jailbreakbench"].items(), *FILES["orbench"].items()):
        write(tmp_path / file, rows)
    assert "found the harmful ones" in fails(f"jbb={tmp_path}/data/harmful-behaviors.csv", "harmless")
    assert "found the borderline ones" in fails(f"jbb={tmp_path}/data/benign-behaviors.csv")
    assert "expected borderline prompts" in fails(f"or-bench={tmp_path}/or-bench-toxic.csv", "borderline")


def test_set_that_cannot_be_had_names_the_way_out(nothing: Callable[[Exception], None]) -> None:
    nothing(ConnectionError("Couldn't reach\n 'the hub'"))
    assert fails("JBB") == (
        "prompt set 'jailbreakbench' (JailbreakBench/JBB-Behaviors): cannot be loaded (Couldn't reach 'the hub'); "
        "give a local copy: jailbreakbench=PATH (files: https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors)"
    )
    message = fails("harmbench")
    assert "accept its terms at https://huggingface.co/datasets/walledai/HarmBench and log in, or give a" in message
    assert message.endswith("harmbench=PATH (files: https://github.com/centerforaisafety/HarmBench)")


def test_without_the_library_a_local_copy_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = fails("xstest")
    assert "pip install 'abliterate[datasets]', or give a local copy: xstest=PATH" in message
    path = write(tmp_path / "xstest_prompts.csv", xstest(label=True))
    assert loaded(f"xstest={path}", "harmful") == WANTED["xstest", "harmful"]


def test_copy_that_is_none_is_explained(tmp_path: Path) -> None:
    assert "expected a file or folder at" in fails(f"advbench={tmp_path / 'none.csv'}")
    assert "expected data/advbench/harmful_behaviors.csv in" in fails(f"advbench={tmp_path}")
    assert fails("advbench=") == "prompt set 'advbench=': expected advbench=PATH, found no path"
    (tmp_path / "x.txt").write_text("one\ntwo", encoding="utf-8")
    assert "row 1: expected an object, found str" in fails(f"advbench={tmp_path / 'x.txt'}")
    path = write(tmp_path / "x.csv", [{"question": "x", "n": 1}])
    assert "expected a column prompt or goal, found question, n" in fails(f"advbench={path}")
    path = write(tmp_path / "safe.csv", xstest(label=True)[:1])
    assert "expected at least one prompt, found none" in fails(f"xstest={path}")


def test_sets_serve_every_part_and_what_they_share_is_dropped(tmp_path: Path) -> None:
    goals = [f"goal {i}" for i in range(50)]
    write(tmp_path / "advbench.csv", [{"goal": goal, "target": "Sure"} for goal in goals])
    jailbreakbench: Rows = [{"Goal": goal, "Category": "c"} for goal in (*(f"{g}." for g in goals[:12]), "another")]
    write(tmp_path / "harmful-behaviors.csv", jailbreakbench)
    write(tmp_path / "benign-behaviors.csv", [{"Goal": f"good {i}", "Category": "c"} for i in range(20)])
    write(tmp_path / "xstest_prompts.csv", xstest(label=True))
    built = build_contrastive_set(
        PromptSettings(
            harmful=f"advbench={tmp_path / 'advbench.csv'}",
            eval_harmful=f"jailbreakbench={tmp_path}",
            eval_harmless=f"jailbreakbench={tmp_path}",
            borderline=f"xstest={tmp_path}",
        )
    )
    assert built.counts["harmful"]["test"] == 13
    assert built.harmless.test == tuple(f"good {i}" for i in range(20))
    assert built.borderline == ("Where is a killer deal?",)
    assert set(built.dropped) <= {"harmful train, also in harmful test", "harmful val, also in harmful test"}
    assert built.duplicates_dropped == 12
    assert {prompt.category for prompt in built.harmful.test if isinstance(prompt, Prompt)} == {"c"}


@pytest.mark.parametrize("name", KNOWN)
def test_what_to_know_of_a_set_is_one_line(name: str, tmp_path: Path) -> None:
    known, line = KNOWN[name], describe(name)
    assert line is not None
    assert "\n" not in line
    assert all(part in line for part in (known.title, known.licence, known.paper, known.overlaps))
    assert describe(f"{name}={tmp_path}") == line


def test_nothing_is_said_of_other_sources() -> None:
    for spec in ("builtin", "prompts.csv", "someone/set:train:text"):
        assert describe(spec) is None


def test_terms_of_every_set_are_in_the_documentation() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for known in KNOWN.values():
        (row,) = (row for row in rows if row.startswith(f"| `{known.name}` "))
        sizes = ", ".join(f"{part.size} {role}" for role, part in known.parts.items())
        for word in (known.hub, known.licence, known.paper, known.source, sizes, "yes" if known.gated else "no"):
            assert word in row, (known.name, word)
        assert all(url.startswith("https://") for url in (known.paper, known.source))
