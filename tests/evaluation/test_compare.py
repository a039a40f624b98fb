"""`abliterate compare`: several models and plans on the same prompts, as table, JSON and CSV."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

import abliterate
from abliterate.cli.compare import as_csv
from abliterate.config import EvalSettings, MeasureSettings, ModelSettings, OutputSettings, PromptSettings
from abliterate.edit.direction import Direction, save_direction
from abliterate.errors import UsageError
from abliterate.evaluation.compare import _learnt_from, compare, contender
from abliterate.evaluation.examine import Sets
from abliterate.record import ComparisonPart
from abliterate.report.tables.comparison import show_comparison
from listening import listening
from planted import Planted, plant


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison, and the answers of each of its entries."""

    part: ComparisonPart
    answers: list[Sets]

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.part.entries]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def docile(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Another tool's model, so to speak: the same tokenizer, other weights, no refusals."""
    return plant(tmp_path_factory.mktemp("docile"), refuses=False, seed=4)


@pytest.fixture(scope="module")
def direction(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "r.safetensors"
    save_direction(path, Direction(planted.direction[None]))
    return path


@pytest.fixture(scope="module")
def found(planted: Planted, docile: Planted, direction: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    made = tmp_path_factory.mktemp("made")
    model = str(planted.folder)
    abliterate.apply(model, direction, OutputSettings(out=made / "baked"))
    abliterate.apply(model, direction, OutputSettings(out=made / "adapter", realisation="lora"))
    plans = [f"{model}+{direction}", str(made / "baked"), f"{model}+{made / 'adapter'}"]
    specs = [model, *plans, str(docile.folder), f"{model}+random"]
    prompts = PromptSettings(
        harmful=str(planted.harmful), harmless=str(planted.harmless), borderline=str(planted.borderline)
    )
    loading = ModelSettings(device="cpu", batch_size="64")
    measuring = MeasureSettings(loading=loading, prompts=prompts, evaluating=EvalSettings(max_new_tokens=8))
    with listening() as heard:
        part = compare(specs, measuring)
    assert [entry.name for entry in part.entries] == specs
    assert len(heard) == len(specs)
    return Compared(part, heard)


def test_one_plan_in_three_forms_answers_alike_and_the_first_is_untouched(found: Compared) -> None:
    entries = found.part.entries
    first, hooked, baked, adapted, other, _ = entries
    assert first.shift is None
    assert first.behaviour.harmful.refusals == found.answers[0]["harmful"].tally.refusals == 24
    texts = [[reply.text for reply in answers["harmful"].replies] for answers in found.answers]
    for number, entry in enumerate((hooked, baked, adapted), 1):
        assert entry.shift is not None
        assert texts[number] == texts[1] != texts[0]
        assert entry.behaviour.harmful.refusals == found.answers[number]["harmful"].tally.refusals == 0
    kls = [entry.shift.kl_reply for entry in entries[1:] if entry.shift and entry.shift.kl_reply]
    assert kls[0] == pytest.approx(kls[1], abs=2e-7)
    assert kls[0] == pytest.approx(kls[2], abs=2e-7)
    assert kls[3] > 2 * kls[0], "the control: another model is farther away"
    assert other.behaviour.harmful.refusals == found.answers[4]["harmful"].tally.refusals == 0


def test_table_json_and_csv_say_the_same(found: Compared) -> None:
    said = found.part.model_dump(mode="json")
    assert said["reference"] == found.names[0]
    rows = list(csv.DictReader(io.StringIO(as_csv(found.part))))
    assert [row["name"] for row in rows] == found.names
    assert [int(row["harmful_refusals"]) for row in rows] == [24, 0, 0, 0, 0, 24]
    assert (rows[0]["kl_reply"], rows[0]["harmful_p"]) == ("", "")
    for row, entry in zip(rows[1:], said["entries"][1:], strict=True):
        assert float(row["kl_reply"]) == entry["shift"]["kl_reply"]
        assert float(row["harmful_p"]) == entry["paired"]["harmful"]["p"]
    assert [float(row["harmful_p"]) < 1e-6 for row in rows[1:]] == [True] * 4 + [False], "random is the control"
    screen = Console(width=200, file=io.StringIO())
    show_comparison(found.part, screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"harmful *\n +1 +24/24 +100 \[86, 100\].*\n +2 +0/24 .*< 0\.001", shown), shown
    assert f"{len(found.names)}  {found.names[-1]}\n" in shown


@pytest.mark.parametrize("wanted", ["nowhere.safetensors", "."])
def test_what_follows_a_plus_has_to_be_a_direction_or_an_adapter(planted: Planted, wanted: str) -> None:
    with pytest.raises(UsageError, match=r"expected MODEL, MODEL\+DIRECTION"):
        contender(f"{planted.folder}+{wanted}")


def test_a_folder_with_a_plus_in_its_name_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    folder.mkdir()
    assert contender(str(folder)).kind == "model"


def test_what_a_direction_or_an_adapter_was_learnt_from_is_left_out(planted: Planted, tmp_path: Path) -> None:
    model, r = str(planted.folder), planted.direction[None]
    save_direction(tmp_path / "r.safetensors", Direction(r, learnt_from=frozenset(["aa"])))
    abliterate.apply(model, tmp_path / "r.safetensors", OutputSettings(out=tmp_path / "lora", realisation="lora"))
    specs = [model, f"{model}+{tmp_path / 'r.safetensors'}", f"{model}+{tmp_path / 'lora'}"]
    assert [_learnt_from([contender(spec)]) for spec in specs] == [frozenset(), {"aa"}, {"aa"}]


def test_one_model_is_no_comparison(planted: Planted) -> None:
    with pytest.raises(UsageError, match="two or more"):
        compare([str(planted.folder)])
