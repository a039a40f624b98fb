"""On a CUDA device everything is as on a CPU. Where there is none these tests are skipped and say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate import pipeline
from abliterate.config import (
    EditSettings,
    EvalSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
    SearchSettings,
)
from abliterate.finding.search.gradient import descend, legs
from abliterate.model.generation import complete
from abliterate.record import Record
from planted import Planted, plant

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("cuda"))


def prompts(planted: Planted) -> PromptSettings:
    files = {name: str(getattr(planted, name)) for name in ("harmful", "harmless", "borderline")}
    return PromptSettings(limit=24, **files)


def found(planted: Planted, device: str, **loading: Any) -> dict[str, Any]:
    """Directions, the selected site, a step of the search and replies."""
    settings = ModelSettings(device=device, **{"dtype": "float32"} | loading)
    session = pipeline.open_session(str(planted.folder), loading=settings, prompts=prompts(planted))
    assert session.loaded.device.type == device
    findings = pipeline.find(session, FindSettings())
    chosen = pipeline.choose(session, findings, FindSettings(), force=True)
    (refined,) = descend(session, findings.ids, chosen.direction, EditSettings(), legs(1, 4))
    with session.ablated(session.plan(refined)):
        replies = complete(session.model, session.loaded.tokenizer, session.encoded["harmful", "test"], 6, session.size)
    best = chosen.selection.chosen
    assert refined.per_site is not None
    return {
        "raw": findings.candidates.raw,
        "site": (best.layer, best.position),
        "scores": torch.tensor([best.bypass, best.induce, best.kl]),
        "refined": refined.per_site,
        "replies": [reply.text for reply in replies],
    }


def test_what_is_found_is_what_a_cpu_finds(planted: Planted) -> None:
    here, there = found(planted, "cpu"), found(planted, DEVICE)
    assert (here["site"], here["replies"]) == (there["site"], there["replies"])
    for name in ("raw", "scores", "refined"):
        torch.testing.assert_close(there[name], here[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loading", [{"dtype": "bfloat16"}, {"quantization": "bnb-4bit"}])
def test_fewer_bits_find_the_planted_direction(planted: Planted, loading: dict[str, str]) -> None:
    if "quantization" in loading:
        pytest.importorskip("bitsandbytes", reason="needs the extra bnb")
    raw = found(planted, DEVICE, **loading)["raw"]
    best = torch.nn.functional.normalize(raw[0, -1], dim=0)
    assert float((best @ planted.direction).abs()) > 0.9


def test_a_run_writes_the_weights_that_a_cpu_writes(planted: Planted, tmp_path: Path) -> None:
    def run(device: str) -> Record:
        settings = RunSettings(
            model=str(planted.folder),
            loading=ModelSettings(device=device, dtype="float32"),
            prompts=prompts(planted),
            searching=SearchSettings(method="closed-form"),
            evaluating=EvalSettings(max_new_tokens=8),
            output=OutputSettings(out=tmp_path / device),
        )
        return pipeline.run(settings)

    there, here = run(DEVICE), run("cpu")
    assert there.model.device.startswith(DEVICE)
    assert there.evaluation is not None
    assert here.evaluation is not None
    assert there.evaluation.after == here.evaluation.after
    assert there.plan is not None
    assert here.plan is not None
    assert {edit.tensor for edit in there.plan.edits} == {edit.tensor for edit in here.plan.edits}
