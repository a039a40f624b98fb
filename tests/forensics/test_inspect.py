"""Inspection of checkpoints whose history is known: synthetic writers, edited in every way that it knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from abliterate import record as rec
from abliterate.cli.app import app
from abliterate.config import InspectSettings
from abliterate.errors import CheckpointError
from abliterate.forensics import difference
from abliterate.forensics import single as lone
from abliterate.forensics.inspect import _notched, recover
from abliterate.forensics.notches import Notch, Notches, directions_of, notches_along
from abliterate.forensics.reading import InspectedModel, open_inspected
from abliterate.forensics.spectra import dips, gram, levelled, lowest
from abliterate.forensics.verdict import NOTCHED, Evidence, judge, judge_difference
from abliterate.model.anatomy import Kind
from abliterate.monitor import Monitor
from abliterate.prompts.prompt import Prompt
from abliterate.report.wording import explained

D, WIDE, BLOCKS = 128, 512, 8
Weights = dict[str, Tensor]


def weights(seed: int = 0) -> Weights:
    """Writers whose coordinates are written unequally, as trained ones are."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(D, 1, generator=generator) + 0.3
    found = {}
    for block in range(BLOCKS):
        for name, size in (("self_attn.o_proj", D), ("mlp.down_proj", WIDE)):
            own = lengths * (0.4 + torch.rand(D, 1, generator=generator))
            found[f"model.layers.{block}.{name}.weight"] = own * torch.randn(D, size, generator=generator)
    return found


def rows(count: int, seed: int = 9) -> Tensor:
    columns: Tensor = torch.linalg.qr(torch.randn(D, count, generator=torch.Generator().manual_seed(seed)))[0]
    return columns.T.contiguous()


def out_of(matrix: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    return matrix - strength * basis.T @ (basis @ matrix)


def rows_renormalised(matrix: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    lengths = matrix.norm(dim=1, keepdim=True)
    even = out_of(matrix / lengths, basis, strength)
    renormalised: Tensor = even / even.norm(dim=1, keepdim=True) * lengths
    return renormalised


def columns_kept(matrix: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    edited = out_of(matrix, basis, strength)
    kept: Tensor = edited * (matrix.norm(dim=0) / edited.norm(dim=0))
    return kept


def subject(
    folder: Path, found: Weights, *, name: str = "model", dtype: torch.dtype = torch.bfloat16
) -> InspectedModel:
    path = folder / f"{name}.safetensors"
    save_file({key: value.to(dtype).contiguous() for key, value in found.items()}, path)
    return open_inspected(str(path))


def block_of(name: str) -> int:
    return int(name.split(".")[2])


def test_the_small_end_of_a_spectrum_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 900, generator=generator)
    planted = torch.linalg.qr(torch.randn(300, 2, generator=generator))[0].T
    square = gram(out_of(matrix, planted, 0.9))
    low = lowest(square)
    assert torch.allclose(low.values[:4], torch.linalg.eigvalsh(square.double())[:4], rtol=2e-2)
    dip = dips(low)
    assert len(dip.basis) == 2
    assert float((planted.double() @ dip.basis.T).norm(dim=1).min()) > 0.99


def test_a_dead_coordinate_is_no_direction() -> None:
    matrix = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    matrix[7] *= 1e-3
    assert dips(lowest(gram(matrix))).depth < 0.5
    assert dips(lowest(levelled(gram(matrix))[0])).depth < 0.5


EDITS: dict[str, tuple[Callable[[str, Tensor], Tensor], int, str]] = {
    "plain": (lambda _, m: out_of(m, rows(1)), 1, "one direction, at full strength"),
    "columns kept": (lambda _, m: columns_kept(m, rows(1)), 1, "one direction, at full strength"),
    "three": (lambda _, m: out_of(m, rows(3)), 3, "3 directions, at full strength"),
    "partly": (lambda _, m: out_of(m, rows(1), 0.7), 1, "one direction, at a strength of about 0.7"),
    "attention": (
        lambda n, m: out_of(m, rows(1)) if "attn" in n else m,
        1,
        "one direction, in attention only, at full strength",
    ),
    "range": (
        lambda n, m: out_of(m, rows(1)) if 2 <= block_of(n) < 6 else m,
        1,
        "one direction, in blocks 2 to 5, at full strength",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_lone_checkpoint_tells_what_was_taken_out(name: str, tmp_path: Path) -> None:
    edit, count, variant = EDITS[name]
    trace = lone.inspect(subject(tmp_path, {key: edit(key, value) for key, value in weights().items()}))
    assert trace.verdict.word == "altered"
    assert trace.variant is not None
    assert trace.variant.startswith(variant)
    assert len(trace.directions) == count
    assert not trace.per_layer
    assert float((rows(count) @ trace.directions.T).norm(dim=1).min()) > (0.9 if name == "partly" else 0.99)
    if name == "range":
        assert trace.layers == (2, 3, 4, 5)
    if name == "attention":
        assert {unit.kind for unit in trace.edited} == {Kind.ATTENTION}


@pytest.mark.parametrize("by_rows", [False, True])
def test_directions_of_their_own_are_found_layer_by_layer(by_rows: bool, tmp_path: Path) -> None:
    start, end = rows(2)

    def own(name: str) -> Tensor:
        turn = torch.tensor(0.2 * block_of(name))
        turned: Tensor = (turn.cos() * start + turn.sin() * end)[None]
        return turned

    how = rows_renormalised if by_rows else out_of
    trace = lone.inspect(subject(tmp_path, {name: how(m, own(name)) for name, m in weights().items()}))
    assert trace.verdict.word == "altered"
    assert trace.per_layer
    assert trace.row_levelled is by_rows
    expected = torch.cat([own(f"model.layers.{block}.x") for block in range(BLOCKS)])
    assert float((trace.directions * expected).sum(1).abs().min()) > 0.98


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["as it was made", "rounded to 8 bits", "half of it zero"])
def test_nothing_is_found_where_nothing_was_done(kind: str, seed: int, tmp_path: Path) -> None:
    found = weights(seed)
    if kind == "rounded to 8 bits":
        found = {name: (m / m.abs().amax() * 127).round() for name, m in found.items()}
    if kind == "half of it zero":
        found = {name: m * (m.abs() > m.abs().median()) for name, m in found.items()}
    trace = lone.inspect(subject(tmp_path, found))
    assert trace.verdict.word == "no trace"
    assert trace.verdict.probability < 0.3
    assert len(trace.directions) == 0


def test_a_light_edit_leaves_no_trace_by_itself_and_is_seen_beside_the_base(tmp_path: Path) -> None:
    edited = {name: out_of(m, rows(1), 0.2) for name, m in weights().items()}
    mine, base = subject(tmp_path, edited, name="edited"), subject(tmp_path, weights(), name="base")
    assert lone.inspect(mine).verdict.word == "no trace"
    found = difference.compare(mine, base)
    assert found.verdict == "ablation"
    assert found.strength == pytest.approx(0.2, abs=0.01)
    assert float((rows(1) @ found.directions.T).norm()) > 0.999


BESIDE: dict[str, tuple[Callable[[str, Tensor], Tensor], str, str | None]] = {
    "nothing": (lambda _, m: m, "identical", None),
    "plain": (lambda _, m: out_of(m, rows(1)), "ablation", "one direction, strength 1.00"),
    "strengthened": (lambda _, m: out_of(m, rows(1), -0.5), "ablation", "one direction, strength -0.50"),
    "two": (lambda _, m: out_of(m, rows(2), 0.8), "ablation", "2 directions, strength 0.80"),
    "columns kept": (
        lambda _, m: columns_kept(m, rows(1), 0.9),
        "ablation",
        "one direction, columns keep their lengths, strength 0.90",
    ),
    "rows kept": (
        lambda _, m: rows_renormalised(m, rows(1)),
        "ablation",
        "one direction, taken out of rows of one length, rows keep their lengths, strength",
    ),
    "noise": (
        lambda n, m: m + 0.05 * torch.randn(m.shape, generator=torch.Generator().manual_seed(len(n) + block_of(n))),
        "re-quantisation",
        None,
    ),
    "adapter": (
        lambda n, m: (
            m
            + 0.02
            * torch.randn(D, 4, generator=torch.Generator().manual_seed(block_of(n)))
            @ torch.randn(4, m.shape[1], generator=torch.Generator().manual_seed(90 + block_of(n)))
        ),
        "low-rank update",
        None,
    ),
    "another": (lambda n, m: weights(7)[n], "another model", None),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_difference_tells_an_ablation_from_what_else_is_done(name: str, tmp_path: Path) -> None:
    edit, verdict, variant = BESIDE[name]
    edited = {key: edit(key, value) for key, value in weights().items()}
    mine = subject(tmp_path, edited, name="edited", dtype=torch.float32)
    found = difference.compare(mine, subject(tmp_path, weights(), name="base", dtype=torch.float32))
    assert found.verdict == verdict
    assert (found.variant or "").startswith(variant or "")
    assert (found.variant is None) is (variant is None)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_oblique_edits_of_writers_are_not_cleared_by_the_base(elsewhere: bool, tmp_path: Path) -> None:
    """They look as an adapter does, and may take refusal out; a change of what writes nothing tells the adapter."""
    generator = torch.Generator().manual_seed(4)

    def oblique(matrix: Tensor) -> Tensor:
        left, reader = (torch.randn(1, D, generator=generator) / D**0.5 for _ in range(2))
        taken: Tensor = 0.5 * left.T @ (reader @ matrix)
        return matrix - taken

    base = weights() | {"model.layers.0.self_attn.q_proj.weight": torch.randn(64, D, generator=generator)}
    edited = {name: m if "q_proj" in name else oblique(m) for name, m in base.items()}
    if elsewhere:
        edited["model.layers.0.self_attn.q_proj.weight"] = base["model.layers.0.self_attn.q_proj.weight"] + 0.01
    subject(tmp_path, base, name="base", dtype=torch.float32)
    subject(tmp_path, edited, name="edited", dtype=torch.float32)
    asked = InspectSettings(base=str(tmp_path / "base.safetensors"))
    found = recover(str(tmp_path / "edited.safetensors"), asked)[0]
    assert found.kind == "low-rank update"
    assert (found.verdict, found.decided) == (("no ablation", True) if elsewhere else ("inconclusive", False))


def test_an_ablation_is_seen_under_four_bits_and_other_tensors_are_counted(tmp_path: Path) -> None:
    def rounded(matrix: Tensor) -> Tensor:
        groups = matrix.reshape(-1, 32)
        step = groups.abs().amax(1, keepdim=True) / 7
        return ((groups / step).round() * step).reshape(matrix.shape)

    base = weights() | {"model.layers.0.self_attn.q_proj.weight": torch.randn(64, D), "gone.weight": torch.ones(2, 2)}
    edited = {
        name: rounded(out_of(m, rows(1))) if "_proj" in name and "q_" not in name else m for name, m in base.items()
    }
    edited["model.layers.0.self_attn.q_proj.weight"] = 2 * base["model.layers.0.self_attn.q_proj.weight"]
    edited["new.weight"] = edited.pop("gone.weight")
    found = difference.compare(subject(tmp_path, edited, name="edited"), subject(tmp_path, base, name="base"))
    assert found.verdict == "ablation"
    assert found.also == (
        "1 tensors that write nothing to the stream differ",
        "every writer also differs in other ways (a re-quantisation or a fine-tune)",
    )
    assert (found.missing, found.added) == (("gone.weight",), ("new.weight",))
    assert found.others == {"model.layers.0.self_attn.q_proj.weight": pytest.approx(1.0)}
    assert found.strength == pytest.approx(1.0, abs=0.05)


def test_models_that_share_nothing_are_one_clear_error(tmp_path: Path) -> None:
    other = {name.replace("layers", "blocks"): m for name, m in weights().items()}
    with pytest.raises(CheckpointError, match="found no writer in both"):
        difference.compare(subject(tmp_path, other, name="other"), subject(tmp_path, weights()))
    wide = {name: torch.randn(D, m.shape[1] + 1) for name, m in weights().items()}
    with pytest.raises(CheckpointError, match="expected shape"):
        difference.compare(subject(tmp_path, wide, name="wide"), subject(tmp_path, weights()))


def test_files_without_writers_and_broken_ones_are_one_clear_error(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(4, 4)}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="found none of 1"):
        open_inspected(str(tmp_path / "none.safetensors"))
    found = weights()
    found["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="expected finite numbers"):
        lone.inspect(subject(tmp_path, found))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut"):
        open_inspected(str(tmp_path / "cut.safetensors"))


def test_probabilities_rise_with_the_evidence_and_say_what_they_were_fitted_on() -> None:
    chances = [judge(Evidence(depth, 0.6)).probability for depth in (0.0, 0.4, 0.8, 1.6, 6.0)]
    assert chances == sorted(chances)
    assert chances[0] < 0.3
    assert chances[-1] > 0.99
    assert 0 < judge_difference(ablation=False) < 0.5 < judge_difference(ablation=True) < 1


def test_the_command_exits_with_3_and_gives_what_pipelines_need(tmp_path: Path) -> None:
    subject(tmp_path, {name: out_of(m, rows(1)) for name, m in weights().items()}, name="edited")
    subject(tmp_path, weights(), name="base")
    edited, base, saved = (str(tmp_path / f"{name}.safetensors") for name in ("edited", "base", "found"))
    result = CliRunner().invoke(app, ["inspect", edited, "--json", "-q", "--save", saved, "-o", str(tmp_path / "out")])
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    assert told["verdict"] == "altered"
    assert told["probability"] > 0.9
    assert told["directions"] == saved
    assert told["layers"] == list(range(BLOCKS))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Was a direction taken out?" in page
    result = CliRunner().invoke(app, ["inspect", base, "-q"])
    assert result.exit_code == 4
    assert result.stdout.startswith("No trace found of a direction taken out; that is no proof that none was.")
    assert "--base" in result.stdout
    result = CliRunner().invoke(app, ["inspect", base, "--base", base, "-q"])
    assert result.exit_code == 0
    assert result.stdout.startswith("Identical to ")
    result = CliRunner().invoke(app, ["inspect", edited, "--base", base, "-q"], env={"COLUMNS": "60"})
    assert result.exit_code == 3
    assert result.stdout.startswith("Altered: one direction, strength 1.00")


def test_a_lone_checkpoint_is_cleared_only_of_what_would_have_been_seen_in_it(tmp_path: Path) -> None:
    mine = str(subject(tmp_path, weights()).checkpoint.shards[0].path)
    told = {}
    for strength in (None, 0.3, 0.9):
        given = [] if strength is None else ["--rule-out", str(strength)]
        result = CliRunner().invoke(app, ["inspect", mine, "-q", "--json", *given])
        told[strength] = json.loads(result.stdout)
        assert result.exit_code == (0 if strength == 0.9 else 4)
    power = told[None]["power"]
    assert 0.3 < power["strength"] < 0.9
    assert power["seen"]["1"] == power["planted"] == 10
    assert [told[strength]["decided"] for strength in told] == [False, False, True]
    assert "none of them by a search" in told[None]["calibrated_on"]
    result = CliRunner().invoke(app, ["inspect", mine, "--base", mine, "--rule-out", "0.9"])
    assert "--rule-out: does nothing beside a --base" in str(result.exception)


@pytest.mark.parametrize("seed", range(3))
def test_what_would_have_been_seen_is_what_is_seen(seed: int, tmp_path: Path) -> None:
    """The edit made for real, with a direction of its own."""
    trace = lone.inspect(subject(tmp_path, weights(seed)), with_power=True)
    assert trace.power is not None
    assert trace.power.strength is not None
    basis = rows(1, seed=40 + seed)
    for strength, expected in ((trace.power.strength + 0.1, "altered"), (0.2, "no trace")):
        edited = {name: out_of(m, basis, strength) for name, m in weights(seed).items()}
        assert lone.inspect(subject(tmp_path, edited)).verdict.word == expected


@pytest.mark.parametrize("value", [0.0, 3e38])
def test_writers_in_which_nothing_would_be_seen_are_never_cleared(value: float, tmp_path: Path) -> None:
    found = {name: torch.full_like(m, value) for name, m in weights().items()}
    trace = lone.inspect(subject(tmp_path, found), with_power=True)
    assert trace.verdict.word != "no trace" or (trace.power is not None and trace.power.strength is None)


def test_another_model_as_the_base_decides_nothing(tmp_path: Path) -> None:
    mine, other = (subject(tmp_path, weights(seed), name=f"m{seed}").checkpoint.shards[0].path for seed in (0, 7))
    result = CliRunner().invoke(app, ["inspect", str(mine), "--base", str(other), "-q"])
    assert result.exit_code == 4
    assert result.stdout.startswith("Inconclusive: ")
    assert "is another model" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("along", "strength", "seen"), [("own", 0.0, False), ("own", 0.3, True), ("another", 0.3, False)]
)
def test_a_light_edit_shows_along_the_own_direction(along: str, strength: float, seen: bool, tmp_path: Path) -> None:
    """Where the tensors alone show nothing."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(13, BLOCKS + 1, D, generator=generator), dim=-1)
    edited = {
        name: out_of(m, directions[0 if along == "own" else 5, block_of(name) + 1][None], strength)
        for name, m in weights().items()
    }
    mine = subject(tmp_path, edited)
    assert lone.inspect(mine).verdict.word == "no trace"
    found = notches_along(directions, mine)
    assert found is not None
    assert (found.depth >= NOTCHED) is seen
    assert (max(found.others) >= NOTCHED) is (along == "another")
    if seen:
        assert len([notch for notch in found.writers if notch.edited]) > BLOCKS
        assert all(0.3 < notch.share < 0.8 for notch in found.writers if notch.edited)


def test_the_directions_of_refusal_and_of_categories_are_differences_of_means() -> None:
    texts = {name: [Prompt(f"{name} {i}", f"{i % 5}") for i in range(60)] for name in ("harmful", "harmless")}
    values = {name: torch.randn(60, 1, 4, generator=torch.Generator().manual_seed(len(name))) for name in texts}

    def stream(name: str, update: Callable[..., None], _: object) -> None:
        for layer in range(3):
            for rows in (list(range(20)), list(range(20, 60))):
                update(layer, rows, (layer + 1) * values[name][rows])

    session: Any = SimpleNamespace(
        anatomy=SimpleNamespace(layers=2, d_model=4),
        encoded={(name, "train"): name for name in texts},
        prompts=SimpleNamespace(**{name: SimpleNamespace(train=tuple(texts[name])) for name in texts}),
        stream=stream,
        monitor=Monitor(),
    )
    found = directions_of(session)
    assert found is not None
    assert found.shape == (11, 3, 4)
    means = {name: value[:, 0] for name, value in values.items()}
    own = torch.nn.functional.normalize(means["harmful"].mean(0) - means["harmless"].mean(0), dim=0)
    assert torch.allclose(found[0], own.expand(3, 4), atol=1e-5)
    first = torch.arange(60) % 5 == 0
    one = torch.nn.functional.normalize(means["harmful"][first].mean(0) - means["harmful"][~first].mean(0), dim=0)
    assert torch.allclose(found[1], one.expand(3, 4), atol=1e-5)
    session.prompts.harmless = SimpleNamespace(train=tuple(f"{i}" for i in range(60)))
    assert directions_of(session) is None, "too few categories"


def test_notches_decide_what_the_tensors_leave_open() -> None:
    place = SimpleNamespace(block=2, kind=Kind.MLP, info=SimpleNamespace(name="w"))
    part = rec.InspectionPart(model="m", verdict="no trace", probability=0.1, proved=True, writers=20)

    def told(depth: float) -> rec.InspectionPart:
        writers: Any = (Notch(place, -9.0, 0.25), Notch(place, 0.1, 1.0))  # type: ignore[arg-type]
        return part.model_copy(update=_notched(part, Notches(depth, (2.0, 3.0), writers)))

    assert told(4.0).verdict == "no trace"
    assert not told(4.0).decided
    found = told(7.0)
    assert (found.verdict, found.decided, found.layers) == ("altered", True, [2])
    assert [(unit.edited, unit.strength) for unit in found.units] == [(True, 0.5), (False, 0.0)]
    assert 0.9 < found.probability < 1
    assert any("7.0 standard deviations" in line for line in explained(found))


def test_records_of_earlier_versions_are_read_with_the_words_of_now() -> None:
    for base, word in ((None, "no trace"), ("b", "no ablation")):
        old = {"model": "m", "base": base, "verdict": "unaltered", "probability": 0.1, "proved": True, "writers": 2}
        assert rec.InspectionPart.model_validate(old).verdict == word


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "x"], "--reference: does nothing without --activations"),
        (["--save", "x.txt"], "expected a name that ends in .safetensors"),
        (["--limit", "3"], "--limit: does nothing in inspect without --activations or --behavioural"),
        (["--behavioural"], "expected a whole model to run, found a single file"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    subject(tmp_path, weights())
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "model.safetensors"), *options])
    assert message in str(result.exception)
