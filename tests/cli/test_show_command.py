"""`show` prints a record from its file alone, at any width."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from abliterate.cli.app import app
from abliterate.record import (
    AnatomyPart,
    BehaviourPart,
    ControlPart,
    EstimatePart,
    EvaluationPart,
    ModelPart,
    PairedPart,
    PlanPart,
    RatePart,
    Record,
    ResidualPart,
    SelectionPart,
    ShiftPart,
    SitePart,
    write_record,
)
from abliterate.report.tables.evaluation import show_evaluation
from abliterate.report.tables.record import show_record


def site(layer: int, bypass: float, kl: float = 0.0517) -> SitePart:
    scores = {"induce": 1.25, "norm": 3.0, "dprime": 4.0, "auroc": 0.99}
    return SitePart(layer=layer, position=-2, bypass=bypass, kl=kl, prompts=80, **scores)


def edit(block: int, ratio: float) -> ResidualPart:
    name = f"model.layers.{block}.self_attn.o_proj"
    numbers = {"before": 2.0, "after": 2.0 * ratio, "ratio": ratio, "change": 0.0123}
    return ResidualPart(
        tensor=f"{name}.weight", writer=name, kind="attention", dtype="BF16", shape=[64, 64], rounding=0.0, **numbers
    )


def rates(refused: int, degenerate: int = 0) -> BehaviourPart:
    part = RatePart(refusals=refused, degenerate=degenerate, n=100, rate=refused / 100, ci95=(0.4567, 0.6789))
    return BehaviourPart(harmful=part, harmless=part, borderline=part)


def estimate(value: float) -> EstimatePart:
    return EstimatePart(value=value, ci95=(value - 0.1111, value + 0.1111))


def record(*, warning: str = "the head is tied") -> Record:
    pair = PairedPart(both=2, before_only=52, after_only=0, neither=46, unknown=0, p=1e-9, change=estimate(-0.52))
    shift = ShiftPart(
        kl_first_token=0.014,
        kl_first_token_ci95=(0.009, 0.019),
        kl_reply=0.002,
        kl_reply_ci95=(0.002, 0.003),
        nll_before=0.485,
        nll_after=0.49,
        nll_change=estimate(0.005),
        prompts=64,
        tokens=1234,
    )
    evaluation = EvaluationPart(
        max_new_tokens=64,
        before=rates(54),
        after=rates(2),
        shift=shift,
        answers={},
        paired=dict.fromkeys(("harmful", "harmless", "borderline"), pair),
        categories={"before": {"disinformation": rates(54).harmful}, "after": {"disinformation": rates(2).harmful}},
        paired_categories={"disinformation": pair},
    )
    selection = SelectionPart(
        chosen=site(19, -3.3125),
        met_rule=True,
        control=ControlPart(bypass=0.5, induce=-2.66, kl=0.0246, norm=3.0),
        harmful=0.78,
        harmless=-2.46,
        max_kl=0.1,
        min_induce=0.0,
        max_depth=0.8,
        trained_on={"harmful": 320, "harmless": 320},
        candidates=[site(layer, -0.125 * layer) for layer in range(1, 19)]
        + [site(19, -3.3125), site(20, -4.0625, 0.5)],
    )
    plan = PlanPart(strength=1.0, rank=1, edits=[edit(block, 0.0101 * block) for block in range(1, 25)], left_alone={})
    model = ModelPart(
        name="some/[bold]model[/bold]",
        kind="folder",
        architecture="LlamaForCausalLM",
        layers=24,
        d_model=896,
        dtype="bfloat16",
        device="cpu",
        source_sha256={"model.safetensors": "ab" * 32},
    )
    return Record(
        created="2026-01-02T03:04:05+00:00",
        versions={"torch": "2.13.0"},
        settings={"prompts": {"seed": 7}},
        model=model,
        anatomy=AnatomyPart(writers=49, worst_closure=2e-3, tolerance=1e-2),
        selection=selection,
        plan=plan,
        evaluation=evaluation,
        warnings=[warning],
        timings_s={"load model": 4.6},
    )


def shown(width: int) -> str:
    text = io.StringIO()
    show_record(record(), Console(file=text, width=width))
    return text.getvalue()


def test_the_best_sites_and_the_largest_rests_are_shown_in_order() -> None:
    text = shown(80)
    sites = re.findall(r"^ ([→ ]) +(\d+) +-2 +(-[\d.]+)", text, re.MULTILINE)
    assert sites == [
        (" ", "20", "-4.06"),
        ("→", "19", "-3.31"),
        (" ", "18", "-2.25"),
        (" ", "17", "-2.12"),
        (" ", "16", "-2.00"),
    ]
    rests = re.findall(r"layers\.(\d+)\.self_attn\.o_proj\.weight +([\d.]+) %", text)
    assert rests == [(str(block), f"{1.01 * block:.2f}") for block in (24, 23, 22, 21, 20)]
    assert "of 20" in text
    assert "of 24" in text


def test_text_of_the_record_is_not_markup_and_warnings_are_shown() -> None:
    text = shown(80)
    assert "some/[bold]model[/bold]" in text
    assert "warning: the head is tied" in text
    assert re.search(r"seed +7 *\n", text)
    assert "ab" * 6 + "…" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_no_number_is_broken_or_cut_at_any_width(width: int) -> None:
    text = shown(width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "…" not in text.replace("ab" * 6 + "…", "")
    for row in (r"54/100.* 54 \[46, 68\]", r"0\.014 \[0\.009, 0\.019\]", r"-3\.31 +│? +1\.25 +│? +0\.052"):
        assert re.search(row, text), (row, text)
    assert re.search(r"disinformation +54/100", text)
    wide = re.search(r"disinformation +54/100 = 54 % \[46, 68\]", text)
    assert bool(wide) == (width >= 80), "the control: what is dropped where it has no room"
    assert ("median" in text) == (width >= 80)


def test_what_is_counted_beside_refusals_goes_before_their_interval() -> None:
    def table(width: int) -> str:
        text = io.StringIO()
        part = record().evaluation
        assert part is not None
        categories = {when: {"disinformation": rates(54, 1).harmful} for when in ("before", "after")}
        show_evaluation(part.model_copy(update={"categories": categories}), Console(file=text, width=width))
        return text.getvalue()

    assert "54/100 = 54 % [46, 68] (1 degenerate)" in table(120)
    assert re.search(r"disinformation +54/100 = 54 % \[46, 68\]  54/100 = 54 % \[46, 68\]", table(80))


def test_the_command_prints_tables_or_json_and_one_line_where_there_is_no_record(tmp_path: Path) -> None:
    write_record(record(), tmp_path)
    runner = CliRunner()
    tables = runner.invoke(app, ["show", str(tmp_path)], env={"COLUMNS": "80"})
    assert (tables.exit_code, tables.stderr) == (0, "")
    assert tables.stdout == shown(80)
    assert Record.model_validate_json(runner.invoke(app, ["show", str(tmp_path), "--json"]).stdout) == record()
    missing = runner.invoke(app, ["show", str(tmp_path / "nothing")])
    assert missing.stdout == ""
    assert "expected the record of a run, found none" in str(missing.exception)
