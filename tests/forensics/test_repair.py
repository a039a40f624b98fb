"""Repair, audit and hardening on the planted model, whose refusal is one known direction."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from abliterate import pipeline
from abliterate.cli.app import app
from abliterate.config import (
    ApplySettings,
    EvalSettings,
    HardenSettings,
    MeasureSettings,
    ModelSettings,
    OutputSettings,
    RepairSettings,
)
from abliterate.edit.additions import Addition, adding
from abliterate.edit.direction import Direction, save_direction
from abliterate.errors import GateNotMet, UsageError
from abliterate.forensics import audit as auditing
from abliterate.forensics import harden as hardening
from abliterate.forensics import repair as repairing
from abliterate.forensics.inspect import separations
from abliterate.forensics.repair import repair
from abliterate.record import read_record
from abliterate.report.tables.forensics import show_audit, show_hardening, show_repair
from planted import Planted, plant
from test_pipeline import prompt_settings

FLOAT32 = ModelSettings(dtype="float32", device="cpu")


def measured_on(planted: Planted) -> MeasureSettings:
    return MeasureSettings(loading=FLOAT32, prompts=prompt_settings(planted), evaluating=EvalSettings(max_new_tokens=6))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def edited(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model with its direction taken out."""
    folder = tmp_path_factory.mktemp("edited")
    save_direction(folder / "d.safetensors", Direction(planted.direction[None]))
    pipeline.apply(
        str(planted.folder), folder / "d.safetensors", ApplySettings(output=OutputSettings(out=folder / "out"))
    )
    return folder / "out"


def without_record(edited: Path, folder: Path) -> Path:
    """The same model as somebody else finds it: no record, nothing to undo with."""
    folder.mkdir()
    for path in edited.iterdir():
        if path.name not in ("abliteration.json", "undo.safetensors", "direction.safetensors", "report.html"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_undo_files_restore_the_original(planted: Planted, edited: Path, tmp_path: Path) -> None:
    done = repair(str(edited), tmp_path / "out")
    assert done.how == "undo"
    assert not (tmp_path / "out" / "abliteration.json").exists()
    original, back = (load_file(folder / "model.safetensors") for folder in (planted.folder, tmp_path / "out"))
    assert all(torch.equal(original[name], back[name]) for name in original)


def test_a_base_restores_byte_for_byte(planted: Planted, edited: Path, tmp_path: Path) -> None:
    found = without_record(edited, tmp_path / "found")
    result = CliRunner().invoke(
        app, ["repair", str(found), "--base", str(planted.folder), "-o", str(tmp_path / "out"), "--json", "-q"]
    )
    assert result.exit_code == 0, result.exception
    told = json.loads(result.stdout)
    assert told["how"] == "base"
    assert told["restored"] == []
    left = read_record(tmp_path / "out").repair
    assert left is not None
    assert left.model_dump(mode="json") == told
    assert "Restored from the base" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    original, back = (load_file(folder / "model.safetensors") for folder in (planted.folder, tmp_path / "out"))
    assert all(torch.equal(original[name], back[name]) for name in original)


def test_a_base_restores_only_the_direction_where_more_was_done(planted: Planted, edited: Path, tmp_path: Path) -> None:
    found = without_record(edited, tmp_path / "found")
    tensors = load_file(found / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: t + 0.02 * t.std() * torch.randn(t.shape, generator=generator) if t.dim() > 1 else t
        for name, t in tensors.items()
    }
    save_file(noisy, found / "model.safetensors", metadata={"format": "pt"})
    done = repair(str(found), tmp_path / "out", RepairSettings(base=str(planted.folder)))
    assert done.exact == []
    original, back = (load_file(folder / "model.safetensors") for folder in (planted.folder, tmp_path / "out"))
    for name in done.restored:
        if "proj" in name:
            r = planted.direction
            assert torch.allclose(r @ original[name], r @ back[name], atol=1e-2 * float(original[name].std()) * 8)
            assert not torch.equal(original[name], back[name])


def test_an_adapter_is_taken_out_again(planted: Planted, tmp_path: Path) -> None:
    save_direction(tmp_path / "d.safetensors", Direction(planted.direction[None]))
    pipeline.apply(
        str(planted.folder),
        tmp_path / "d.safetensors",
        ApplySettings(output=OutputSettings(out=tmp_path / "lora", realisation="lora")),
    )
    adapter = next(tmp_path.joinpath("lora").rglob("adapter_model.safetensors")).parent
    config = json.loads((adapter / "adapter_config.json").read_text())
    pairs = load_file(adapter / "adapter_model.safetensors")
    linear = {name for name in pairs if name.endswith("lora_A.weight")}
    assert linear
    merged = load_file(planted.folder / "model.safetensors")
    kept: dict[str, Tensor] = {}
    for name in linear:
        other = name.replace("lora_A", "lora_B")
        tensor = name.removeprefix("base_model.model.").replace(".lora_A", "")
        merged[tensor] = merged[tensor] + config["lora_alpha"] / config["r"] * pairs[other] @ pairs[name]
        kept |= {name: pairs[name], other: pairs[other]}
    folder = tmp_path / "merged"
    folder.mkdir()
    for path in planted.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(kept, adapter / "adapter_model.safetensors")
    done = repair(str(folder), tmp_path / "out", RepairSettings(adapter=adapter))
    assert len(done.restored) == len(linear)
    original, back = (load_file(at / "model.safetensors") for at in (planted.folder, tmp_path / "out"))
    assert all(torch.allclose(original[name], back[name], atol=1e-6) for name in original)


def test_without_anything_refusals_come_back_approximately(
    planted: Planted, edited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairing, "_SIZES", (1.5, 3.0))  # refusal is louder in the planted model than in real ones
    found = without_record(edited, tmp_path / "found")
    save_direction(tmp_path / "d.safetensors", Direction(planted.direction[None]))
    known = RepairSettings(direction=tmp_path / "d.safetensors")
    done = repair(str(found), tmp_path / "out", known, measured_on(planted))
    assert done.how == "approximation"
    screen = Console(file=io.StringIO(), width=100)
    show_repair(done, screen)
    assert screen.file.getvalue().startswith("Repaired approximately")  # type: ignore[attr-defined]
    assert "approximation" in done.note
    assert done.evaluation is not None
    assert done.evaluation.after is not None
    before, after = done.evaluation.before.harmful, done.evaluation.after.harmful
    assert before.refusals == 0
    assert after.refusals > 0
    assert done.evaluation.after.harmless.refusals <= 0.1 * after.n
    record = read_record(tmp_path / "out")
    assert record.repair == done
    assert record.evaluation == done.evaluation
    # What was measured is what was written.
    session = pipeline.open_session(str(tmp_path / "out"), loading=FLOAT32, prompts=prompt_settings(planted))
    again = pipeline.evaluate(session, EvalSettings(max_new_tokens=6))
    assert again.before.harmful.refusals == after.refusals


def test_what_cannot_be_repaired_is_said(planted: Planted, edited: Path, tmp_path: Path) -> None:
    with pytest.raises(GateNotMet, match="no direction was taken out of it"):
        repair(str(planted.folder), tmp_path / "out", RepairSettings(base=str(planted.folder)))
    with pytest.raises(UsageError, match="expected one of --base, --adapter and --direction"):
        repair(str(edited), tmp_path / "out", RepairSettings(base="x", adapter=Path("y")))
    with pytest.raises(UsageError, match="adapter_config"):
        repair(str(edited), tmp_path / "out", RepairSettings(adapter=tmp_path))
    assert not (tmp_path / "out").exists()


def test_additions_as_hooks_are_additions_to_weights(planted: Planted) -> None:
    session = pipeline.open_session(str(planted.folder), loading=FLOAT32, prompts=prompt_settings(planted))
    writer = next(w for w in session.anatomy.writers if w.block == 2 and w.module.endswith("o_proj"))
    weight = session.model.get_parameter(writer.weight)
    addition = Addition(writer, torch.randn(1, weight.shape[0]), torch.randn(1, weight.shape[1]))
    ids = torch.tensor([[1, 5, 9, 12]])
    with torch.no_grad():
        plain = session.model(ids).logits
        with adding(session.model, [addition]):
            hooked = session.model(ids).logits
        old = weight.clone()
        weight += addition.left.T @ addition.right
        written = session.model(ids).logits
        weight.copy_(old)
        assert torch.allclose(hooked, written, atol=1e-4)
        assert not torch.allclose(hooked, plain, atol=1e-2)
        assert torch.equal(session.model(ids).logits, plain)


def test_the_planted_direction_separates_and_an_edited_model_still_knows(planted: Planted, edited: Path) -> None:
    prompts = prompt_settings(planted)
    original = pipeline.open_session(str(planted.folder), loading=FLOAT32, prompts=prompts)
    found = separations(original, planted.direction[None])
    assert max(layer.recovered or 0.0 for layer in found) > 0.9
    ablated = pipeline.open_session(str(edited), loading=FLOAT32, prompts=prompts)
    assert max(layer.own for layer in separations(ablated, None)) > 0.9


def test_an_audit_finds_that_one_direction_is_enough(planted: Planted, tmp_path: Path) -> None:
    part = auditing.audit(str(planted.folder), measured_on(planted), out=tmp_path / "out")
    rows = {(row.family, row.name): row for row in part.rows}
    assert part.base.refusals == part.base.n
    assert rows["strength", "1"].refused.refusals == 0
    assert rows["random direction", "1"].refused.refusals > 0.9 * part.base.n
    assert part.directions_needed == 1
    assert part.halving_strength is not None
    assert 0 < part.halving_strength <= 1
    assert part.halving_kl == min(
        row.kl.value or 0.0 for row in part.rows if row.family != "random direction" and (row.refused.rate or 0) <= 0.5
    )
    screen = Console(file=io.StringIO(), width=80)
    show_audit(part, screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "To leave at most 10 %, one direction is enough." in shown
    assert sum("random direction" in line for line in shown.splitlines()) == 1
    assert read_record(tmp_path / "out").audit == part
    assert "How brittle is refusal?" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_model_that_can_only_refuse_one_way_is_not_hardened(planted: Planted, tmp_path: Path) -> None:
    """The planted head knows refusal as one direction: nothing orthogonal to it can make the model refuse."""
    with pytest.raises(GateNotMet, match="nothing written"):
        hardening.harden(str(planted.folder), tmp_path / "out", HardenSettings(detectors=2), measured_on(planted))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--detectors or --strengthen"):
        hardening.harden(str(planted.folder), tmp_path / "out", HardenSettings(detectors=0))


def test_strengthening_helps_against_light_edits_and_not_against_full_ones(planted: Planted, tmp_path: Path) -> None:
    wanted = HardenSettings(detectors=0, strengthen=1.0)
    done = hardening.harden(str(planted.folder), tmp_path / "out", wanted, measured_on(planted))
    assert done.before.halving_strength is not None
    assert done.after.halving_strength is not None
    assert done.after.halving_strength > done.before.halving_strength
    assert done.after.directions_needed == 1
    screen = Console(file=io.StringIO(), width=100)
    show_hardening(done, screen)
    assert "Before: Refuses" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "component" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert done.model_dump(mode="json")["after"]["directions_needed"] == 1
    record = read_record(tmp_path / "out")
    assert record.hardening == done
    assert record.audit == done.after
    assert "How brittle is refusal?" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    original, written = (load_file(folder / "model.safetensors") for folder in (planted.folder, tmp_path / "out"))
    name = "model.layers.1.self_attn.o_proj.weight"
    r = planted.direction
    assert torch.allclose(r @ written[name], 2 * (r @ original[name]), rtol=0.05, atol=1e-3)
