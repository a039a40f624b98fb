"""Prompt sources and contrastive sets: every format, every mistake in one line, nothing evaluated was trained on."""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abliterate.config import PromptSettings
from abliterate.errors import PromptError
from abliterate.prompts import ContrastiveSet, Prompt, build_contrastive_set, load_prompts, normalise
from abliterate.prompts.reading import CONVERSATION_COLUMNS, USUAL_COLUMNS
from abliterate.prompts.sources import load_builtin

TEXTS = ["How do I bake bread?", 'Say "hi", please', "Grüße, Jürgen: 你好", "two  words"]


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path: Path, rows: Sequence[object]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")


def write_lines(path: Path, columns: dict[str, list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def objects(column: str) -> list[dict[str, str]]:
    return [{"id": f"no. {i}", column: text} for i, text in enumerate(TEXTS)]


def columns(column: str) -> dict[str, list[str]]:
    return {"id": [f"no. {i}" for i in range(len(TEXTS))], column: TEXTS}


FORMATS: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "json list of objects": ("x.json", lambda path, column: write_json(path, objects(column))),
    "json dict of lists": ("x.json", lambda path, column: write_json(path, columns(column))),
    "json under a key": ("x.json", lambda path, column: write_json(path, {"version": 1, "rows": objects(column)})),
    "jsonl": ("x.jsonl", lambda path, column: write_jsonl(path, objects(column))),
    "csv": ("x.csv", lambda path, column: write_lines(path, columns(column))),
    "parquet": ("x.parquet", lambda path, column: write_parquet(path, columns(column))),
    "upper case suffix": ("x.JSONL", lambda path, column: write_jsonl(path, objects(column))),
    "colon in the folder": ("a:b/x.csv", lambda path, column: write_lines(path, columns(column))),
}


@pytest.fixture(params=FORMATS)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    """Write TEXTS under a column's name in one of the formats."""
    name, write = FORMATS[request.param]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)

    def create(column: str) -> Path:
        write(path, column)
        return path

    return create


@pytest.mark.parametrize("column", USUAL_COLUMNS)
def test_usual_column_is_found_by_itself(written: Callable[[str], Path], column: str) -> None:
    assert load_prompts(str(written(column))) == TEXTS


def test_any_column_can_be_named(written: Callable[[str], Path]) -> None:
    path = written("my column")
    assert load_prompts(f"{path}:my column") == TEXTS


def test_unusual_column_must_be_named_and_the_error_names_what_there_is(written: Callable[[str], Path]) -> None:
    message = fails(str(written("whatever")))
    assert "which " in message
    assert "id, whatever" in message
    assert "FILE:column" in message


def test_wrong_column_names_those_found(written: Callable[[str], Path]) -> None:
    path = written("whatever")
    message = fails(f"{path}:nope")
    assert "nope" in message or "which list?" in message
    assert "id, whatever" in message


def fails(spec: str) -> str:
    """The message of the error, which must be one line with something in it."""
    with pytest.raises(PromptError) as caught:
        load_prompts(spec)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


def test_lists_of_texts_and_plain_text_need_no_column(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", TEXTS)
    write_jsonl(tmp_path / "x.jsonl", TEXTS)
    (tmp_path / "x.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    write_json(tmp_path / "one.json", {"whatever": TEXTS})
    write_lines(tmp_path / "one.csv", {"whatever": TEXTS})
    for name in ("x.json", "x.jsonl", "x.txt", "one.json", "one.csv"):
        assert load_prompts(str(tmp_path / name)) == TEXTS, name


def test_one_file_may_hold_several_sets_as_lists(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"harmful": ["a", "b", "c"], "harmless": ["d"]})
    assert load_prompts(f"{tmp_path / 'x.json'}:harmful") == ["a", "b", "c"]
    assert load_prompts(f"{tmp_path / 'x.json'}:harmless") == ["d"]


def test_blank_prompts_are_dropped_and_edges_trimmed(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("  one \n\n \t\ntwo\n", encoding="utf-8")
    write_lines(tmp_path / "x.csv", {"text": ["one", "", "  ", " two"]})
    write_parquet(tmp_path / "x.parquet", {"text": ["one", None, "two"]})
    for name in ("x.txt", "x.csv", "x.parquet"):
        assert load_prompts(str(tmp_path / name)) == ["one", "two"], name


def test_byte_order_mark_of_windows_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    for name, text in (("x.txt", "one"), ("x.csv", "text\none"), ("x.jsonl", '{"text": "one"}'), ("x.json", '["one"]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_prompts(str(tmp_path / name)) == ["one"], name


def test_line_separators_inside_a_prompt_do_not_break_jsonl(tmp_path: Path) -> None:
    texts = ["one\u2028two", "three\x85four", "five\nsix"]
    write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    assert load_prompts(str(tmp_path / "x.jsonl")) == texts


def test_csv_prompts_may_hold_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    texts = ['a, b and "c"', "line\nbreak"]
    write_lines(tmp_path / "x.csv", {"text": texts, "n": ["1", "2"]})
    assert load_prompts(str(tmp_path / "x.csv")) == texts


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("x.json", "", "JSON that cannot be used"),
        ("x.jsonl", "", "expected at least one prompt, found none"),
        ("x.csv", "", "expected at least one prompt, found none"),
        ("x.csv", "text\n", "expected at least one prompt, found none"),
        ("x.txt", " \n\n", "expected at least one prompt, found none"),
        ("x.json", "[]", "expected at least one prompt, found none"),
        ("x.json", '{"text": []}', "expected at least one prompt, found none"),
        ("x.json", '["a", ', "JSON that cannot be used"),
        ("x.json", "[" * 100_000, "nested too deeply"),
        ("x.json", '"text"', "expected a JSON list of texts or objects, found str"),
        ("x.json", '{"a": 1}', "expected a JSON list of texts or objects, found an object"),
        ("x.json", "[1, 2]", "row 1: expected an object, found int"),
        ("x.json", '["a", null]', "row 1: expected an object, found str"),
        ("x.json", '{"text": ["a", 2]}', "row 2: column 'text': expected text or a list of {role, content}, found int"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "line 2, which is not JSON"),
        ("x.jsonl", '{"text": "a"}\n{"goal": "b"}', "row 2 has no column 'text'; found goal"),
        ("x.jsonl", '{"text": ["a", "b"]}', "column 'text': message 1: expected {role, content}, found a text"),
        (
            "x.jsonl",
            '{"text": {"a": "b"}}',
            "column 'text': expected text or a list of {role, content}, found an object",
        ),
        ("x.csv", "a,b\n1,2\n", "which column? found a, b"),
        ("x.csv", "text\na\n".encode("utf-16"), "found UTF-16; save it as UTF-8"),
        ("x.parquet", "PAR1 no", "not a readable Parquet file"),
        ("x.xlsx", "zip", "expected one of .json, .jsonl, .csv, .tsv, .txt, .parquet, found '.xlsx'"),
        ("x", "text", "found 'no suffix'"),
        ("x\nbreak.json", "[", "JSON that cannot be used"),
    ],
)
def test_unusable_file_is_explained_in_one_line(tmp_path: Path, name: str, content: str | bytes, part: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(PromptError) as caught:
        load_prompts(str(path))
    assert part in str(caught.value)
    if "\n" not in name:  # the command line folds what file names hold
        assert str(caught.value).isprintable()


def test_text_that_is_not_utf_8_is_explained(tmp_path: Path) -> None:
    for name in ("x.txt", "x.csv", "x.jsonl"):
        (tmp_path / name).write_bytes("text\nGrüße".encode("latin-1"))
        assert "a byte that is not UTF-8" in fails(str(tmp_path / name))


def test_numbers_in_a_parquet_column_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", {"text": [1, 2]})
    assert "column 'text': expected text or a list of {role, content}, found int" in fails(str(tmp_path / "x.parquet"))


def test_missing_files_and_folders_are_explained(tmp_path: Path) -> None:
    assert "found no such file" in fails(str(tmp_path / "none.jsonl"))
    assert "found no such file" in fails(f"{tmp_path / 'none.csv'}:text")
    assert "found a folder" in fails(str(tmp_path))
    assert "no such file; expected 'builtin', FILE[:column]" in fails("buildin")
    assert "or one of jailbreakbench, harmbench" in fails("buildin")


def test_missing_parquet_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'abliterate[parquet]'" in fails(str(tmp_path / "x.parquet"))


# --- hub datasets


class Rows(list[dict[str, object]]):
    """What `datasets.load_dataset` gives, as far as it is used."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A `datasets` library without a network that remembers what it was asked for."""
    seen = SimpleNamespace(asked=[], error=None)

    def load_dataset(*names: str, split: str) -> Rows:
        seen.asked.append((*names, split))
        if seen.error:
            raise seen.error
        return Rows({"goal": text, "n": i} for i, text in enumerate(TEXTS))

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    library.are_progress_bars_disabled = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    return seen


def test_hub_spec_names_set_config_split_and_column(hub: SimpleNamespace) -> None:
    assert load_prompts("owner/set:train:goal") == TEXTS
    assert load_prompts("owner/set:small:test:goal") == TEXTS
    assert hub.asked == [("owner/set", "train"), ("owner/set", "small", "test")]


def test_hub_column_that_is_not_there_or_no_text_is_refused(hub: SimpleNamespace) -> None:
    assert "no column 'text'; found goal, n" in fails("owner/set:train:text")
    assert "column 'n': expected text or a list of {role, content}, found int" in fails("owner/set:train:n")


def test_hub_category_comes_along(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows({"goal": text, "n": i, "Category": f"kind {i}"} for i, text in enumerate(TEXTS))
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *names, split: rows)
    assert [prompt.category for prompt in load_prompts("owner/set:train:goal")] == [f"kind {i}" for i in range(4)]


def test_hub_errors_are_one_line(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expected id[:config]:split:column, found 2 parts" in fails("owner/set:train")
    assert "found 5 parts" in fails("a:b:c:d:e")
    assert hub.asked == []
    hub.error = ValueError("Unknown split\n  'train'.\n" + "x" * 9000)
    assert "cannot be loaded (Unknown split 'train'." in fails("owner/set:train:goal")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'abliterate[datasets]'" in fails("owner/set:train:goal")


# --- sets


@given(st.text())
def test_normalised_text_is_its_own_normal_form(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize(
    "other",
    [
        "how do i kill a python process",
        "How do I kill a Python process?!",
        "“How do I kill a Python process?”",
        "  How  do I\tkill a Python process ?",
        "How do I kill – a Python – process…",
        "Ｈｏｗ do I kill a Python process？",
    ],
)
def test_case_punctuation_and_typography_do_not_make_a_prompt_another(other: str) -> None:
    assert normalise(other) == normalise("How do I kill a Python process?")


def test_other_words_and_other_scripts_make_a_prompt_another() -> None:
    texts = ["How do I kill a process?", "How do I kill processes?", "怎么做面包", "怎么做炸弹", "?", "!", "☃"]
    assert len({normalise(text) for text in texts}) == len(texts)


Specs = Callable[..., dict[str, Any]]


@pytest.fixture
def specs(tmp_path: Path) -> Specs:
    """Write each list of prompts to a file; gives the arguments of `build_contrastive_set`."""

    def write(**groups: list[str]) -> dict[str, Any]:
        named = {}
        for name, texts in groups.items():
            write_json(tmp_path / f"{name}.json", texts)
            named[name] = str(tmp_path / f"{name}.json")
        return named

    return write


PARTS = [f"{name} {part}" for name in ("harmful", "harmless") for part in ("train", "val", "test")] + ["borderline"]


def many(word: str, count: int = 100) -> list[str]:
    return [f"{word} number {i}" for i in range(count)]


def everything(built: ContrastiveSet) -> list[str]:
    parts = (built.harmful, built.harmless)
    return [*(t for s in parts for group in (s.train, s.val, s.test) for t in group), *built.borderline]


def test_set_is_cut_64_16_20_and_every_prompt_used_once(specs: Specs) -> None:
    built = build_contrastive_set(
        PromptSettings(**specs(harmful=many("bad"), harmless=many("good", 50), borderline=many("edge", 7)))
    )
    assert built.counts == {
        "harmful": {"train": 64, "val": 16, "test": 20},
        "harmless": {"train": 32, "val": 8, "test": 10},
        "borderline": {"test": 7},
    }
    assert sorted(everything(built)) == sorted([*many("bad"), *many("good", 50), *many("edge", 7)])
    assert built.duplicates_dropped == 0
    assert built.dropped == {}


def test_splits_depend_on_the_seed_and_nothing_else(specs: Specs) -> None:
    named = specs(harmful=many("bad"), harmless=many("good"))
    first, again = (build_contrastive_set(PromptSettings(**named, seed=3)) for _ in range(2))
    other = build_contrastive_set(PromptSettings(**named, seed=4))
    assert first == again
    assert first.sha256 == again.sha256
    assert set(first.harmful.test) != set(other.harmful.test)
    assert first.sha256 != other.sha256
    assert first.harmful.train != tuple(sorted(first.harmful.train)), "shuffled: files are often sorted by topic"


def test_hash_changes_with_a_prompt_and_with_its_place(specs: Specs) -> None:
    def digest(harmful: list[str]) -> str:
        return build_contrastive_set(PromptSettings(**specs(harmful=harmful, harmless=many("good")))).sha256

    texts = many("bad")
    changed = [*texts[:-1], texts[-1] + "!"]
    assert len({digest(texts), digest(changed), digest(texts[:-1])}) == 3


def test_same_prompt_in_both_sets_stays_in_the_evaluated_part(specs: Specs) -> None:
    shared = many("shared", 40)
    named = specs(
        harmful=[*many("bad"), *(text.upper() for text in shared)],
        harmless=[*many("good"), *(f"“{text}?”" for text in shared)],
        borderline=[shared[0].title(), "edge"],
    )
    built = build_contrastive_set(PromptSettings(**named))
    forms = [normalise(text) for text in everything(built)]
    assert len(forms) == len(set(forms)) == 100 + 100 + 40 + 1
    assert built.duplicates_dropped == sum(built.dropped.values()) == 41
    assert set(built.dropped) <= {f"{a}, also in {b}" for a in PARTS for b in PARTS if a != b}
    alone = build_contrastive_set(
        PromptSettings(**specs(harmful=[*many("bad"), *(t.upper() for t in shared)], harmless=many("good")))
    )
    assert built.harmful.test == alone.harmful.test, "the test split is claimed first, and harmful before harmless"


def test_prompt_of_the_evaluation_file_is_never_trained_on(specs: Specs) -> None:
    evaluated = ["Bad Number 3?", "bad number 4!", "a new one"]
    named = specs(harmful=many("bad"), harmless=many("good"), eval_harmful=evaluated)
    built = build_contrastive_set(PromptSettings(**named))
    assert built.harmful.test == tuple(evaluated)
    learnt = {normalise(text) for text in (*built.harmful.train, *built.harmful.val)}
    assert not learnt & set(map(normalise, evaluated))
    assert len(learnt) == 98
    assert (len(built.harmful.train), len(built.harmful.val)) in [(84 - i, 14 + i) for i in range(3)]
    assert built.duplicates_dropped == 2
    assert set(built.dropped) <= {"harmful train, also in harmful test", "harmful val, also in harmful test"}
    assert built.sources["eval_harmful"] == named["eval_harmful"]
    assert built.sources["eval_harmless"] == built.sources["harmless"] == named["harmless"]


def test_dropped_prompts_are_counted_by_where_else_they_are(specs: Specs) -> None:
    evaluated = ["a", "a?", "bad number 1", "b"]
    named = specs(harmful=many("bad"), harmless=[*many("good"), "B!"], eval_harmful=evaluated, borderline=["A", "edge"])
    built = build_contrastive_set(PromptSettings(**named))
    assert built.dropped["harmful test, twice"] == 1
    assert built.dropped["borderline, also in harmful test"] == 1
    assert sum(count for name, count in built.dropped.items() if name.startswith("harmful ")) == 2
    assert sum(count for name, count in built.dropped.items() if name.startswith("harmless ")) == 1
    assert built.duplicates_dropped == 4
    assert "bad number 1" in many("bad")
    assert not set(map(normalise, built.harmful.train)) & set(map(normalise, evaluated))


def test_repeated_prompts_count_once(specs: Specs) -> None:
    built = build_contrastive_set(PromptSettings(**specs(harmful=many("bad") * 3, harmless=many("good"))))
    assert built.counts["harmful"] == {"train": 64, "val": 16, "test": 20}


def test_limit_caps_every_split(specs: Specs) -> None:
    named = specs(harmful=many("bad"), harmless=many("good"))
    built = build_contrastive_set(PromptSettings(**named, limit=5))
    assert {count for parts in built.counts.values() for count in parts.values()} == {5}
    whole = build_contrastive_set(PromptSettings(**named))
    assert built.harmful.train == whole.harmful.train[:5]


def test_set_that_is_too_small_or_all_duplicates_is_refused(specs: Specs) -> None:
    with pytest.raises(PromptError, match="harmful prompts: expected some in the test split"):
        build_contrastive_set(PromptSettings(**specs(harmful=["only one"], harmless=many("good"))))
    with pytest.raises(PromptError, match=r"harmless prompts: .* found none after dropping duplicates"):
        build_contrastive_set(
            PromptSettings(**specs(harmful=many("good"), harmless=many("bad"), eval_harmful=many("bad")))
        )


def test_builtin_set_needs_no_file_and_keeps_its_own_splits() -> None:
    built = build_contrastive_set()
    assert built.counts["harmful"] == built.counts["harmless"] == {"train": 320, "val": 80, "test": 100}
    assert built.harmful.test == tuple(load_builtin("harmful")["test"])
    assert build_contrastive_set(PromptSettings(seed=5)) == built
    assert len(everything(built)) == len({normalise(text) for text in everything(built)})


def test_builtin_test_prompts_can_evaluate_directions_from_a_file(specs: Specs) -> None:
    built = build_contrastive_set(
        PromptSettings(**specs(harmful=many("bad"), harmless=many("good")), eval_harmful="builtin")
    )
    assert built.harmful.test == tuple(load_builtin("harmful")["test"])
    assert built.harmless.test != tuple(load_builtin("harmless")["test"])


# --- categories


@pytest.mark.parametrize("name", ["category", "Category", "SemanticCategory", "risk_category", "type"])
def test_category_of_each_prompt_is_kept_in_every_format(tmp_path: Path, name: str) -> None:
    kinds = [f"kind {i % 2}" for i in range(len(TEXTS))]
    table = {"id": list("abcd"), "prompt": TEXTS, name: kinds}
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    write_json(tmp_path / "rows.json", rows)
    write_json(tmp_path / "lists.json", table)
    write_jsonl(tmp_path / "x.jsonl", rows)
    write_lines(tmp_path / "x.csv", table)
    write_parquet(tmp_path / "x.parquet", table)
    for path in sorted(tmp_path.iterdir()):
        prompts = load_prompts(str(path))
        assert prompts == TEXTS, path
        assert [prompt.category for prompt in prompts] == kinds, path
        assert [prompt.messages for prompt in prompts] == [(("user", text),) for text in TEXTS], path


def test_without_a_category_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwo", encoding="utf-8")
    write_jsonl(tmp_path / "x.jsonl", [{"text": "one", "category": " "}, {"text": "two", "category": ["a", "b"]}])
    write_jsonl(tmp_path / "n.jsonl", [{"text": "one", "category": 7}, {"text": "two", "category": True}])
    for name, kinds in (("x.txt", [None, None]), ("x.jsonl", [None, None]), ("n.jsonl", ["7", None])):
        assert [prompt.category for prompt in load_prompts(str(tmp_path / name))] == kinds, name


def test_most_telling_category_column_is_taken(tmp_path: Path) -> None:
    row = {"Behavior": "x", "prompt": "one", "FunctionalCategory": "standard", "SemanticCategory": "illegal"}
    write_jsonl(tmp_path / "x.jsonl", [row])
    assert load_prompts(str(tmp_path / "x.jsonl"))[0].category == "illegal"


def test_blank_prompts_take_their_category_with_them(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.csv", {"text": ["", "b", " ", "d"], "category": ["1", "2", "3", "4"]})
    assert [(p, p.category) for p in load_prompts(str(tmp_path / "x.csv"))] == [("b", "2"), ("d", "4")]


def test_builtin_prompts_have_categories_and_sets_keep_them() -> None:
    built = build_contrastive_set()
    groups = [getattr(s, part) for s in (built.harmful, built.harmless) for part in ("train", "val", "test")]
    for group in (*groups, built.borderline):
        assert all(isinstance(prompt, Prompt) and prompt.category for prompt in group)
        assert len({prompt.category for prompt in group}) > 5


# --- conversations

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is lye?"},
    {"role": "assistant", "content": "A strong base."},
    {"role": "user", "content": "How is it made?"},
]


@pytest.mark.parametrize("column", CONVERSATION_COLUMNS)
def test_conversations_are_read_with_roles_and_system_message(tmp_path: Path, column: str) -> None:
    rows = [{"id": i, "category": "chemistry", column: talk} for i, talk in enumerate((TALK, TALK[1:]))]
    write_jsonl(tmp_path / "x.jsonl", rows)
    write_parquet(tmp_path / "x.parquet", {key: [row[key] for row in rows] for key in ("id", "category", column)})
    for name in ("x.jsonl", "x.parquet"):
        first, second = load_prompts(str(tmp_path / name))
        assert first.messages == tuple((message["role"], message["content"]) for message in TALK)
        assert second.messages == first.messages[1:]
        assert first.category == "chemistry"
        assert first == "[system]\nBe brief.\n\n" + second


def test_everything_said_makes_a_conversation_what_it_is() -> None:
    said = (("user", "Hello"), ("assistant", "Hi"), ("user", "How is it made?"))
    talk = Prompt.conversation(said, "a")
    others = [
        Prompt("How is it made?"),
        Prompt.conversation((("user", "Hello"), ("assistant", "Good day"), ("user", "How is it made?"))),
        Prompt.conversation((("user", "Hello"), ("user", "Hi"), ("user", "How is it made?"))),
        Prompt.conversation((("system", "Hello"), *said[1:])),
        Prompt.conversation(said[::2]),
    ]
    assert talk == Prompt.conversation(said, "another category")
    assert hash(talk) == hash(Prompt.conversation(said))
    assert len({normalise(prompt) for prompt in (talk, *others)}) == len({talk, *others}) == 6
    assert Prompt.conversation((("user", "Hello"),)) == Prompt("Hello") == "Hello"


def test_prompt_is_a_string_whose_methods_give_strings() -> None:
    prompt = Prompt("Hello", "greeting")
    assert isinstance(prompt, str)
    assert (prompt.category, prompt.messages) == ("greeting", (("user", "Hello"),))
    assert type(prompt.upper()) is type(prompt + "!") is str


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (TALK[2:3], "expected a message of the user, found only replies of the assistant"),
        (TALK[:1], "expected the last message to be the user's, found system"),
        (TALK[1:3] + TALK[:2], "message 3: expected the system's message first"),
        ([{"role": "tool", "content": "x"}], "message 1: expected a role of system, user, assistant, found 'tool'"),
        ([{"role": "user", "content": " "}], "message 1: expected text from the user, found none"),
        ([{"role": "user"}], "message 1: expected {role, content}, found dict"),
        ([{"from": "human"}], "message 1: expected {role, content}, found dict"),
        ([{"from": "observation", "value": "x"}], "message 1: expected a role of system, user, assistant, found 'obs"),
        ([{"role": "user", "content": 3}], "message 1: expected {role, content}, found dict"),
        (["first", "second"], "message 1: expected {role, content}, found a text"),
        ([1], "message 1: expected {role, content}, found int"),
        ([["user", "x"]], "message 1: expected {role, content}, found list"),
        ({"role": "user", "content": "x"}, "expected text or a list of {role, content}, found an object"),
    ],
)
def test_conversation_that_is_none_is_explained_in_one_line(tmp_path: Path, value: object, part: str) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}, {"messages": value}])
    message = fails(str(tmp_path / "x.jsonl"))
    assert "row 2: column 'messages': " in message
    assert part in message


SAID = [{"from": "human", "value": "What is lye?"}, {"from": "gpt", "value": "A strong base."}]


@pytest.mark.parametrize(
    ("value", "expected", "answered"),
    [
        (SAID[:1], ["What is lye?"], False),
        (SAID, ["What is lye?"], True),
        ([*SAID, *SAID], ["What is lye?", "A strong base.", "What is lye?"], True),
        ([{"from": "system", "value": "Be brief."}, *SAID], ["Be brief.", "What is lye?"], True),
        (TALK[:3], ["Be brief.", "What is lye?"], True),
        ([*TALK[:3], TALK[2]], ["Be brief.", "What is lye?"], True),
        ([*TALK[:2], {"role": "assistant", "content": None, "tool_calls": []}], ["Be brief.", "What is lye?"], True),
        ([{"role": "user", "content": [{"type": "text", "text": " one"}]}], ["one"], False),
        ([{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}], ["one\ntwo"], False),
        ([{"type": "text", "text": "one"}], ["one"], False),
    ],
)
def test_replies_at_the_end_are_left_out_of_any_form_of_conversation(
    tmp_path: Path, value: object, expected: list[str], answered: bool
) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"conversations": value}])
    (prompt,) = load_prompts(str(tmp_path / "x.jsonl"))
    assert [content for _, content in prompt.messages] == expected
    assert prompt.answered is answered


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "text", "text": None}, "'text'"),
        ({"text": "one"}, "'None'"),
        ("one", "'str'"),
    ],
)
def test_parts_that_are_no_text_are_refused_by_row(tmp_path: Path, part: object, found: str) -> None:
    content = [{"type": "text", "text": "one"}, part]
    write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}, {"messages": [{"role": "user", "content": content}]}])
    message = fails(str(tmp_path / "x.jsonl"))
    assert f"row 2: column 'messages': message 1: part 2: expected {{type: text, text}}, found {found}" in message


def test_replies_left_out_are_counted(specs: Specs, tmp_path: Path) -> None:
    named = specs(harmful=many("bad"), harmless=many("good"))
    write_jsonl(
        tmp_path / "x.jsonl", [{"conversations": [{"from": "human", "value": f"{n}"}, SAID[1]]} for n in range(50)]
    )
    settings = PromptSettings(harmful=str(tmp_path / "x.jsonl"), harmless=named["harmless"])
    assert build_contrastive_set(settings).answered == 50
    assert build_contrastive_set(PromptSettings(**named)).answered == 0


@pytest.mark.parametrize("text", ["\ud83d alone", "behind \ude00", "\udc80"])
@pytest.mark.parametrize("where", ["text", "messages", "parts", "category"])
def test_half_a_character_is_refused_by_row(tmp_path: Path, text: str, where: str) -> None:
    content: object = [{"type": "text", "text": text}] if where == "parts" else text
    row: dict[str, object] = {"messages": [TALK[0], {"role": "user", "content": content}]}
    if where in ("text", "category"):
        row = {"text": "one", where: text}
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(one) for one in (row | {}, row)), encoding="utf-8")
    message = fails(str(tmp_path / "x.jsonl"))
    assert "row 1: column" in message
    assert "found half of a character" in message


# --- delimited text


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_delimiter_is_found(tmp_path: Path, mark: str, suffix: str) -> None:
    if suffix == ".tsv" and mark != "\t":
        return
    lines = ["text;x,y".replace(";", mark).replace(",y", ""), *(f"no. {n}{mark}kind" for n in range(3))]
    path = tmp_path / f"x{suffix}"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load_prompts(str(path)) == ["no. 0", "no. 1", "no. 2"]


def test_semicolons_may_hold_commas_and_commas_semicolons(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text, or so;kind\nwell, now;a\none, two, three;b\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("text,kind;s\nwell; now,a\none,b\n", encoding="utf-8")
    assert load_prompts(f"{tmp_path / 'a.csv'}:text, or so") == ["well, now", "one, two, three"]
    assert load_prompts(str(tmp_path / "b.csv")) == ["well; now", "one"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (
            "text,kind\na,b\nwell, now,b\n",
            "row 2 (line 3): expected 2 fields (text, kind), found 3; put a text with a comma",
        ),
        (
            "text;kind\na;b\nwell; now;b\n",
            "row 2 (line 3): expected 2 fields (text, kind), found 3; put a text with a semi",
        ),
        ("text\nwell, now\n", "row 1 (line 2): expected 1 field (text), found 2"),
        ("text,kind\n\na,b\nc\n", "row 2 (line 4): expected 2 fields (text, kind), found 1; add the missing comma"),
        ('text,kind\n"a\nb",c\n"d,e\nf,g\n', "row 2 (line 4): expected a double quote that closes the field"),
        ('text,kind\n"a" b,c\n', "row 1 (line 2): expected a double quote that closes"),
        ('text,kind\na,b\n"c,d\ne,f\ng,"h"\n', "row 2 (line 3): expected a double quote that closes"),
        ("text,text\na,b\n", "expected every column once, found 'text' twice"),
    ],
)
def test_row_that_does_not_fit_its_header_is_refused(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "x.csv").write_text(content, encoding="utf-8")
    assert part in fails(str(tmp_path / "x.csv"))


# --- slices and files of a dataset


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("[:2]", ["0", "1"]),
        ("[8:]", ["8", "9"]),
        ("[-2:]", ["8", "9"]),
        ("[:20%]", ["0", "1"]),
        ("[10%:24%]", ["1"]),
        ("[3:5]", ["3", "4"]),
        ("[:]", [str(n) for n in range(10)]),
    ],
)
@pytest.mark.parametrize("form", ["{file}{cut}", "{file}{cut}:text", "{file}:text{cut}", "{file}:train{cut}:text"])
def test_rows_of_a_file_are_cut(tmp_path: Path, cut: str, expected: list[str], form: str) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": str(n)} for n in range(10)])
    assert load_prompts(form.format(file=tmp_path / "x.jsonl", cut=cut)) == expected


def test_brackets_that_are_no_slice_are_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x[1].jsonl", [{"text": "a", "b[0]": "b"}])
    assert load_prompts(str(tmp_path / "x[1].jsonl")) == ["a"]
    assert load_prompts(f"{tmp_path / 'x[1].jsonl'}:b[0]") == ["b"]
    assert "found no such file" in fails(f"{tmp_path / 'none.jsonl'}[:3]:text")
    assert "expected one slice of rows, found two" in fails(f"{tmp_path / 'x[1].jsonl'}[:3]:text[:2]")


def test_slices_and_files_go_to_the_hub_as_they_are(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(*names: str, **options: str) -> Rows:
        asked.append((*names, options))
        return Rows({"text": text, "goal": "x"} for text in TEXTS)

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset)
    files = {"data_files": "data/*.parquet"}
    for spec, wanted in {
        "owner/set:train[:400]:text": ("owner/set", {"split": "train[:400]"}),
        "owner/set:small:train[10%:20%]:text": ("owner/set", "small", {"split": "train[10%:20%]"}),
        "owner/set:train[:5]+test[5:]:text": ("owner/set", {"split": "train[:5]+test[5:]"}),
        "owner/set/data/*.parquet": ("owner/set", {"split": "train", **files}),
        "owner/set/data/*.parquet:text": ("owner/set", {"split": "train", **files}),
        "owner/set/data/*.parquet[:400]:text": ("owner/set", {"split": "train[:400]", **files}),
        "owner/set/data/*.parquet:train[:9%]:text": ("owner/set", {"split": "train[:9%]", **files}),
        "hf://datasets/owner/set/data/*.parquet": ("owner/set", {"split": "train", **files}),
        "https://huggingface.co/datasets/owner/set/resolve/main/a.jsonl": (
            "owner/set",
            {"split": "train", "data_files": "a.jsonl"},
        ),
        "https://huggingface.co/datasets/owner/set:train:text": ("owner/set", {"split": "train"}),
    }.items():
        assert load_prompts(spec) == TEXTS, spec
        assert asked.pop() == wanted


def test_missing_files_are_not_taken_for_files_of_the_hub(hub: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with contextlib.chdir(tmp_path):
        for spec in ("a/b/c.jsonl", "./x/y/c.jsonl", "c.jsonl", f"{tmp_path}/x/y/c.jsonl:text"):
            assert "found no such file" in fails(spec)
    assert hub.asked == []


def test_turns_with_one_text_are_an_instruction_and_empty_ones_none(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"turns": [" one "]}, {"turns": []}, {"turns": None}])
    assert load_prompts(str(tmp_path / "x.jsonl")) == ["one"]


def test_conversations_go_through_a_set_whole(specs: Specs) -> None:
    talks = [[{"role": "user", "content": f"no. {i}"}, *TALK[2:]] for i in range(50)]
    named = specs(harmful=many("bad"), harmless=many("good"))
    write_jsonl(Path(named["harmful"]).with_suffix(".jsonl"), [{"messages": talk} for talk in talks])
    built = build_contrastive_set(
        PromptSettings(harmful=str(Path(named["harmful"]).with_suffix(".jsonl")), harmless=named["harmless"])
    )
    assert all(isinstance(prompt, Prompt) and len(prompt.messages) == 3 for prompt in built.harmful.train)
    assert built.counts["harmful"] == {"train": 32, "val": 8, "test": 10}
