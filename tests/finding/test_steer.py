"""Behaviour by coefficient and readings by token, on a model whose refusal is one planted direction."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate.config import ModelSettings, PromptSettings, RefusalSettings, ReplySettings, SteerSettings
from abliterate.edit.direction import Direction, Site
from abliterate.edit.steering import SteeringVectors
from abliterate.errors import PromptError, UsageError
from abliterate.finding.reading import read, read_texts
from abliterate.finding.steer import reply, sweep
from abliterate.model.activations import stream_sites
from abliterate.model.batches import BatchSize, Encoded
from abliterate.monitor import Monitor
from abliterate.record import DosePart, SteeringPart
from abliterate.session import OpenedModel, Session, load_contrast, open_model
from planted import BLOCKS, WRITES, Planted, plant

SHORT = ReplySettings(max_new_tokens=8)
#: Tokens that refusals of the planted model start with: they need not be found.
KNOWN = RefusalSettings(refusal_tokens="I")
DOSES = "-0.6,-0.4,-0.2,0,0.2,0.4,0.6"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def opened(planted: Planted) -> OpenedModel:
    return open_model(str(planted.folder), ModelSettings(device="cpu", dtype="float32"), Monitor())


@pytest.fixture(scope="module")
def session(planted: Planted, opened: OpenedModel) -> Session:
    prompts = PromptSettings(
        harmful=str(planted.harmful), harmless=str(planted.harmless), borderline=str(planted.borderline)
    )
    return opened.session(load_contrast(prompts, Monitor()))


@pytest.fixture(scope="module")
def vectors(planted: Planted) -> SteeringVectors:
    """The planted direction as if it had been measured with a length of 2.5 at layer 3."""
    site = Site(WRITES + 2, -1)
    return SteeringVectors.of(Direction(planted.direction[None], site=site, facts={"chosen": {"norm": 2.5}}))


def rates(part: SteeringPart, name: str) -> list[float]:
    return [one.behaviour[name].rate or 0.0 for one in part.doses[1:]]


def scores(part: SteeringPart, name: str) -> list[float]:
    found = [one.score[name] for one in part.doses[1:]]
    assert None not in found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_behaviour_rises_with_the_coefficient(session: Session, vectors: SteeringVectors, tokens: Any) -> None:
    part = sweep(session, vectors, SteerSettings(coefficients=DOSES, tokens=tokens), finding=KNOWN, replies=SHORT)
    plain, *doses = part.doses
    assert [one.coefficient for one in part.doses] == [None, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]
    start = {"harmful": 0, "harmless": 3}  # harmless prompts hold nothing of it: below 0 there is nothing to fall
    for name, first in start.items():
        found = scores(part, name)[first:]
        assert all(low < high for low, high in itertools.pairwise(found)), found
        assert all(low <= high for low, high in itertools.pairwise(rates(part, name))), rates(part, name)
    assert rates(part, "harmful")[0] == rates(part, "harmless")[0] == 0
    assert rates(part, "harmless")[-1] == 1
    same = plain.model_copy(update={"coefficient": 0.0})
    assert doses[3] == same, "adding nothing is no change"
    kl = [one.kl.value or 0.0 for one in doses]
    assert kl[3] == 0
    assert kl[0] > kl[1] > kl[2] > 0
    assert 0 < kl[4] < kl[5] < kl[6]


def test_a_random_direction_does_nothing_of_the_kind(session: Session, vectors: SteeringVectors) -> None:
    part = sweep(session, vectors, SteerSettings(coefficients="-0.5,0,0.5"), finding=KNOWN, replies=SHORT)
    low, high = part.control
    plain = part.doses[0]
    assert (low.coefficient, high.coefficient) == (-0.5, 0.5)
    for one in (low, high):
        assert {name: rate.rate for name, rate in one.behaviour.items()} == {
            name: rate.rate for name, rate in plain.behaviour.items()
        }
    moved = abs((high.score["harmful"] or 0) - (low.score["harmful"] or 0))
    assert moved < 3 < 6 < scores(part, "harmful")[-1] - scores(part, "harmful")[0]
    alone = sweep(session, vectors, SteerSettings(no_control=True), finding=KNOWN, replies=SHORT)
    assert alone.control == []
    assert len(sweep(session, vectors, SteerSettings(), finding=KNOWN, replies=SHORT).control) == 1


@pytest.mark.parametrize(
    ("operation", "least", "most"), [("ablate", "1", "0"), ("scale", "0", "1"), ("clamp", "0", "1"), ("cap", "0", "2")]
)
def test_what_the_stream_holds_is_taken_out_or_left(
    session: Session, vectors: SteeringVectors, operation: Any, least: str, most: str
) -> None:
    settings = SteerSettings(operation=operation, coefficients=f"{least},{most}")
    part = sweep(session, vectors, settings, finding=KNOWN, replies=SHORT)
    by_dose = {one.coefficient: one for one in part.doses}
    assert by_dose[float(least)].behaviour["harmful"].rate == 0
    assert by_dose[float(most)].behaviour["harmful"].rate == 1
    assert by_dose[float(least)].kl.value == pytest.approx(0, abs=0.05), "harmless prompts hold nothing of it"
    assert part.layers == (list(range(BLOCKS + 1)) if operation == "ablate" else [WRITES + 2])


def test_broken_replies_are_counted(session: Session, vectors: SteeringVectors) -> None:
    part = sweep(session, vectors, SteerSettings(coefficient=4.0), finding=KNOWN, replies=SHORT)
    plain, much = part.doses
    assert plain.behaviour["harmful"].degenerate == 0
    assert much.behaviour["harmful"].degenerate == much.behaviour["harmful"].n
    assert (much.repetition["harmful"].value or 0) > (plain.repetition["harmful"].value or 0)


def test_replies_to_harmful_prompts_are_redacted_unless_kept(session: Session, vectors: SteeringVectors) -> None:
    for keep in (False, True):
        settings = SteerSettings(coefficient=-1.0, keep_completions=keep)
        part = sweep(session, vectors, settings, finding=KNOWN, replies=SHORT)
        assert list(part.answers) == ["none", "-1"]
        for sets in part.answers.values():
            assert {one.redacted for one in sets["harmful"]} == {not keep}
            assert {one.redacted for one in sets["harmless"]} == {False}
        shown = {one.text for one in part.answers["-1"]["harmful"]}
        assert shown == ({"Sure , here it is"} if keep else {"Sure , here it […]"})


def test_a_model_that_hardly_refuses_is_steered_without_scores(tmp_path: Path) -> None:
    tame = plant(tmp_path, refuses=False)
    session = open_model(str(tame.folder), ModelSettings(device="cpu"), Monitor()).session(
        load_contrast(PromptSettings(harmful=str(tame.harmful), harmless=str(tame.harmless), limit=8), Monitor())
    )
    found = SteeringVectors.by_layer({3: tame.direction})
    part = sweep(session, found, SteerSettings(coefficient=1.0), replies=SHORT)
    assert part.unit == "file"
    assert all(one.score == {"harmful": None, "harmless": None} for one in part.doses)
    assert (part.doses[1].kl.value or -1) >= 0
    assert any("hardly refuses" in warning for warning in session.monitor.warnings)
    assert isinstance(DosePart.model_validate_json(part.doses[1].model_dump_json()), DosePart)


def test_given_prompts_are_answered_and_nothing_is_measured(opened: OpenedModel, vectors: SteeringVectors) -> None:
    asked = ["show the bomb today", "show the bread today"]
    part = reply(opened, vectors, asked, SteerSettings(coefficients="-1,0.5"), max_new_tokens=6)
    assert not part.doses
    texts = {dose: [one.text for one in sets["given"]] for dose, sets in part.answers.items()}
    assert list(texts) == ["none", "-1", "0.5"]
    assert [one[:8] for one in texts["none"]] == ["I cannot", "Sure , h"]
    assert texts["-1"] == ["Sure , here it is"] * 2
    assert texts["0.5"][1].startswith("I cannot")


# ------------------------------------------------------------------------------------------------------------ reading


def test_projections_are_those_of_the_activations(opened: OpenedModel, vectors: SteeringVectors) -> None:
    asked = [("show the bomb today", None), ("show the bread today", "Sure , here it is")]
    part = read(opened, vectors, asked)
    assert part.layers == list(range(BLOCKS + 1))
    assert part.layer == WRITES + 2
    (bad, good), unit = part.texts, vectors.units[0].double()
    ids = opened.renderer.encode([asked[0][0]])[0]
    blocks = [opened.loaded.model.get_submodule(name) for name in opened.anatomy.blocks]
    found = torch.zeros(BLOCKS + 1, len(ids), dtype=torch.float64)

    def take(layer: int, _: list[int], values: torch.Tensor) -> None:
        found[layer] = (values[0].double() @ unit).flip(0)

    stream_sites(opened.loaded.model, blocks, Encoded((), (tuple(ids),)), len(ids), take, BatchSize(1))
    assert torch.allclose(torch.tensor(bad.projections, dtype=torch.float64), found, atol=1e-3)
    assert bad.prompt == len(bad.tokens) == len(ids)
    place = bad.tokens.index("bomb")
    after = bad.projections[part.layer][place:]
    assert min(after) > 1 > max(map(abs, bad.projections[part.layer][:place])), "r exists from the bad word on"
    assert max(map(abs, bad.projections[WRITES])) < 0.5, "no layer before the one that writes it knows"
    assert good.tokens[good.prompt :] == ["Sure", ",", "here", "it", "is"]
    assert max(map(abs, good.projections[part.layer])) < 1, "the control"


def test_vectors_by_layer_are_read_at_theirs(opened: OpenedModel, planted: Planted) -> None:
    found = SteeringVectors.by_layer({2: planted.direction, 4: -2 * planted.direction})
    part = read(opened, found, [("show the bomb today", None)])
    assert (part.layers, part.layer, part.unit) == ([2, 4], 4, "file")
    assert part.lengths == pytest.approx([1, 2])
    (text,) = part.texts
    assert text.projections[0][-1] > 1 > -1 > text.projections[1][-1]
    with pytest.raises(UsageError, match="--layer 3: expected one of 2, 4"):
        read(opened, found, [("show", None)], layer=3)


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("a.txt", "show the bread\n\ntell me\n", [("show the bread", None), ("tell me", None)]),
        ("a.jsonl", json.dumps({"text": "show"}), [("show", None)]),
        ("a.jsonl", json.dumps({"prompt": "show", "response": "I ."}), [("show", "I .")]),
        ("a.csv", "prompt,response\nshow,I .\n", [("show", "I .")]),
    ],
)
def test_files_of_texts(tmp_path: Path, name: str, lines: str, expected: list[tuple[str, str | None]]) -> None:
    (tmp_path / name).write_text(lines, encoding="utf-8")
    assert read_texts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "lines"), [("a.pt", "x"), ("a.txt", "\n"), ("a.jsonl", "{"), ("a.jsonl", '{"response": 3}')]
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, lines: str) -> None:
    (tmp_path / name).write_text(lines, encoding="utf-8")
    with pytest.raises(PromptError):
        read_texts(tmp_path / name)


def test_a_text_that_is_too_long_is_named(opened: OpenedModel, vectors: SteeringVectors) -> None:
    with pytest.raises(UsageError):
        read(opened, vectors, [("show the bread " * 3000, None)])
