"""Every causal language model of transformers is edited alike by hooks and by weights, or is refused for a reason."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from abliterate.algebra import orthonormal
from abliterate.edit.hooks import ablation
from abliterate.edit.plan import make_plan
from abliterate.model.anatomy import study
from abliterate.model.batches import body
from zoo import ENTRIES, UNBUILT, Entry, every_kind
from zoo_sizes import KINDS, LAYERS
from zoo_verdicts import CANNOT_RUN, WHY, Cells, cells, examine, figures, read_table, run

TABLE = Path(__file__).parents[2] / "docs" / "supported-models.md"


@pytest.fixture(scope="module")
def stored() -> Mapping[tuple[str, str], Cells]:
    """The table in the documentation."""
    return read_table(TABLE.read_text(encoding="utf-8").splitlines())


# --- the zoo itself


def test_every_class_is_there_or_has_a_reason() -> None:
    there = {(entry.model_type, entry.cls) for entry in ENTRIES}
    known = {pair for pair in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if pair[0] not in UNBUILT}
    assert known <= there
    assert set(UNBUILT) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {cls for _, cls in there} <= set(dir(transformers))


def test_kinds_are_kept_in_order() -> None:
    assert every_kind("aab") == ["a", "b", "b"]
    assert every_kind("abcdd") == ["a", "b", "c", "d"]
    assert every_kind("a") == ["a"] * LAYERS


# --- what holds for it


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.cls}-{entry}")
def test_a_model_of_the_zoo(entry: Entry, stored: Mapping[tuple[str, str], Cells], tmp_path: Path) -> None:
    """All that is asked of one model in one test, so that it is examined once."""
    if WHY.get(str(entry)) != CANNOT_RUN:
        check_tiny_model(entry)
    check_layers(entry)
    verdict = examine(entry, tmp_path)
    if str(entry) in WHY:
        assert verdict.reason is not None, "every writer is known after all"
        assert "block" in verdict.reason, "it says where"
    else:
        assert verdict.reason is None
        assert verdict.agrees, f"hooks and weights: logits differ by {verdict.difference:.2g}"
        assert verdict.moved > 1e-3, "the control: the plan does do something"
        assert verdict.complete or verdict.fixed, f"{verdict.left:.2g} of the direction is left in the stream"
    assert stored[entry.cls, str(entry)] == cells(entry, verdict), "docs/supported-models.md says otherwise"
    shutil.rmtree(tmp_path)  # two hundred checkpoints are not worth keeping


def check_tiny_model(entry: Entry) -> None:
    """It is small and runs on tokens."""
    model = entry.model()
    assert type(model).__name__ == entry.cls
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        body(model)(input_ids=ids, use_cache=False)
        logits = model(input_ids=ids, use_cache=False).logits
    assert logits.shape[:2] == ids.shape
    assert bool(torch.isfinite(logits).all())
    assert 0.01 < float(logits.abs().max()) < 1000


def check_layers(entry: Entry) -> None:
    """Every kind of layer of the default configuration occurs."""
    default = AutoConfig.for_model(entry.model_type)
    default = default.get_text_config(decoder=True)
    tiny = entry.config().get_text_config(decoder=True)
    for name in KINDS:
        if getattr(default, name, None):
            assert set(getattr(default, name)) <= set(getattr(tiny, name)), name


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba2", "falcon_h1"])
def test_a_forgotten_writer_shows(name: str) -> None:
    model = next(entry for entry in ENTRIES if str(entry) == name).model()
    anatomy = study(model)
    generator = torch.Generator().manual_seed(1000)
    direction = orthonormal(torch.randn(1, anatomy.d_model, generator=generator))
    ids = torch.randint(4, 250, (2, 12), generator=generator)
    plan = make_plan(anatomy, direction)
    _, before = run(model, anatomy, ids, direction)
    with ablation(model, replace(plan, edits=plan.edits[:-1])):
        _, left = run(model, anatomy, ids, direction)
    assert left[-1] > 0.01 * before[-1]


# --- the table in the documentation


def test_stored_table_has_no_other_rows(stored: Mapping[tuple[str, str], Cells]) -> None:
    assert set(stored) == {(entry.cls, str(entry)) for entry in ENTRIES}


def test_stored_figures_are_those_of_the_table() -> None:
    """Which is the one of fresh verdicts, as tested above."""
    text = TABLE.read_text(encoding="utf-8")
    stored = read_table(text.splitlines())
    assert "\n".join(figures(stored)) in text
    worse = {**stored, ("LlamaForCausalLM", "llama"): ("yes", "no", "", "")}
    assert "  - 1: hooks and weights differ" in figures(worse)
    assert "\n".join(figures(worse)) not in text


def test_figures_add_up() -> None:
    lines = figures(read_table(TABLE.read_text(encoding="utf-8").splitlines()))
    counts = [int(found[1]) for line in lines if (found := re.match(r"- (\d+)", line))]
    reasons = [int(found[1]) for line in lines if (found := re.match(r"  - (\d+): ", line))]
    classes, built, agreeing, others, unbuilt = counts
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    assert (classes, built) == (len(known), len(known & {entry.cls for entry in ENTRIES}))
    assert (agreeing + others, built + unbuilt) == (built, classes)
    assert sum(reasons) == others
