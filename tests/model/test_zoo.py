"""Every causal language model of transformers: what closes is edited alike by hooks and weights, or is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from zoo_verdicts import WHY, Verdict, cells, examine, figures, read_table, run

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"

each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.cls}-{entry}")


@pytest.fixture(scope="module")
def verdict_of() -> Callable[[Entry], Verdict]:
    """A function from an entry to its verdict, found once."""

    @cache
    def found(index: int) -> Verdict:
        with TemporaryDirectory() as folder:  # two hundred checkpoints are not worth keeping
            return examine(ENTRIES[index], Path(folder))

    return lambda entry: found(ENTRIES.index(entry))


# --- the zoo itself


def test_every_class_is_there_or_has_a_reason() -> None:
    there = {(entry.model_type, entry.cls) for entry in ENTRIES}
    known = {pair for pair in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if pair[0] not in UNBUILT}
    assert known <= there
    assert set(UNBUILT) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {cls for _, cls in there} <= set(dir(transformers))


@each_entry
def test_a_tiny_model_runs_on_tokens(entry: Entry) -> None:
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


@each_entry
def test_every_kind_of_layer_of_the_default_configuration_occurs(entry: Entry) -> None:
    default = AutoConfig.for_model(entry.model_type)
    default = default.get_text_config(decoder=True)
    tiny = entry.config().get_text_config(decoder=True)
    for name in KINDS:
        if getattr(default, name, None):
            assert set(getattr(default, name)) <= set(getattr(tiny, name)), name


def test_kinds_are_kept_in_order() -> None:
    assert every_kind("aab") == ["a", "b", "b"]
    assert every_kind("abcdd") == ["a", "b", "c", "d"]
    assert every_kind("a") == ["a"] * LAYERS


# --- what holds for it


@each_entry
def test_books_close_unless_there_is_a_reason(entry: Entry, verdict_of: Any) -> None:
    verdict = verdict_of(entry)
    if str(entry) in WHY:
        assert verdict.reason is not None
        assert "block" in verdict.reason
    else:
        assert verdict.reason is None


@each_entry
def test_hooks_and_weights_are_the_same_function(entry: Entry, verdict_of: Any) -> None:
    verdict = verdict_of(entry)
    if verdict.reason is None:
        assert verdict.agrees, f"logits differ by {verdict.difference:.2g}"
        assert verdict.moved > 1e-3  # the control: the plan does do something


@each_entry
def test_nothing_of_the_direction_is_left_in_the_stream(entry: Entry, verdict_of: Any) -> None:
    verdict = verdict_of(entry)
    if verdict.reason is None:
        assert verdict.complete or verdict.fixed, f"{verdict.left:.2g} is left"


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


@each_entry
def test_stored_table_says_what_holds(entry: Entry, verdict_of: Any) -> None:
    stored = read_table(TABLE.read_text(encoding="utf-8").splitlines())
    assert stored[entry.cls, str(entry)] == cells(entry, verdict_of(entry))


def test_stored_table_has_no_other_rows() -> None:
    stored = read_table(TABLE.read_text(encoding="utf-8").splitlines())
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
