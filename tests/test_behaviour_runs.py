"""Other behaviours than refusal through the whole of the pipeline, on a tiny model in which all is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import abliterate
from abliterate import pipeline
from abliterate.config import (
    EditSettings,
    EvalSettings,
    FindSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    ReplySettings,
    RunSettings,
    SearchSettings,
)
from abliterate.edit.direction import Direction
from abliterate.errors import GateNotMet, UsageError
from abliterate.evaluation.judging.choice import judge_of
from abliterate.evaluation.probe import Level, Probe
from abliterate.finding.replies import own_replies
from abliterate.finding.search import gradient
from abliterate.record import Record, read_record
from planted import BAD, D_MODEL, GOOD, WRITES, Planted, plant, prompts

PHRASES = {"phrases": ["cannot help"], "tokens": 6}
CLOSED = SearchSettings(method="closed-form")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


def stalling(planted: Planted, **changes: Any) -> dict[str, Any]:
    """Refusal under another name, found by what replies show."""
    return {
        "name": "stalling",
        "shown": "stalled",
        "more": {"prompts": str(planted.harmful), "name": "tricky"},
        "less": {"prompts": str(planted.harmless), "name": "plain"},
        "shows": PHRASES,
        **changes,
    }


def run(planted: Planted, behaviour: dict[str, Any], out: Path | None, **changes: Any) -> Record:
    settings = RunSettings(
        model=str(planted.folder),
        loading=ModelSettings(device="cpu", batch_size="64"),
        prompts=PromptSettings(behaviour=behaviour),
        evaluating=EvalSettings(max_new_tokens=8, no_cache=True),
        output=None if out is None else OutputSettings(out=out),
        **{"searching": SearchSettings(), **changes},
    )
    return abliterate.run(settings)


@pytest.fixture(scope="module")
def done(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Record:
    return run(planted, stalling(planted), tmp_path_factory.mktemp("run") / "out")


def test_a_behaviour_that_first_tokens_do_not_tell_is_found_and_taken_out(planted: Planted, done: Record) -> None:
    assert done.selection is not None
    assert done.evaluation is not None
    assert done.evaluation.after is not None
    assert not done.refusal_tokens
    chosen = done.selection.chosen
    assert done.selection.by == "replies"
    assert chosen.layer > WRITES
    assert (chosen.bypass, chosen.induce) == (0.0, 1.0)
    assert done.selection.control.bypass == 1.0
    before, after = done.evaluation.before.harmful, done.evaluation.after.harmful
    assert before.refusals >= 0.9 * before.n
    assert after.refusals == 0
    direction = abliterate.load_direction(Path(str(done.output)) / "direction.safetensors")
    assert abs(float(direction.basis[0] @ planted.direction)) > 0.9


def test_record_tables_and_report_speak_of_the_behaviour(done: Record) -> None:
    out = Path(str(done.output))
    assert done.prompts is not None
    assert done.prompts.behaviour is not None
    assert done.prompts.behaviour.name == "stalling"
    assert read_record(out) == done
    page, card, shown = (out / "report.html").read_text(), (out / "README.md").read_text(), str(done)
    page = page[: page.index('id="settings"')]  # where fields of settings are named as they are
    for text in (page, card, shown):
        assert "stalled" in text
        assert "tricky" in text
        for word in ("harmful", "refus", "Refus", "uncensored"):
            said = [text[max(0, at - 60) : at + 40] for at in range(len(text)) if text.startswith(word, at)]
            assert not [one for one in said if not any(name in one for name in _NAMES)]


#: Where the words may stand: names of files, of colours and of fields, and the title of the paper.
_NAMES = (
    "harmful.jsonl",
    "harmless.jsonl",
    "replies-harm",
    "colour",
    "harmful:",
    '"harmful"',
    '"harmless"',
    "Refusal in Language Models",
)


def test_directions_can_be_read_over_replies(planted: Planted) -> None:
    session = pipeline.open_session(
        str(planted.folder),
        loading=ModelSettings(device="cpu"),
        prompts=PromptSettings(behaviour=stalling(planted, read={"at": "reply", "tokens": 4})),
    )
    findings = pipeline.find(session, FindSettings())
    assert findings.candidates.positions == [-1]
    assert float(findings.separation.auroc.max()) > 0.95
    with pytest.raises(UsageError, match="read at replies"):
        pipeline.open_session(str(planted.folder), prompts=session_prompts(planted), positions=2)


def session_prompts(planted: Planted) -> PromptSettings:
    return PromptSettings(behaviour=stalling(planted, read={"at": "reply"}))


def test_pairs_are_found_by_what_is_put_around_them(planted: Planted, tmp_path: Path) -> None:
    pairs = {
        "name": "stalling",
        "more": {"prompts": prompts(GOOD, 120, 5), "prefix": "bomb "},
        "less": {"prefix": "soup "},
        "others": {"prompts": prompts(GOOD, 40, 6)},
        "test": {"prompts": prompts(BAD, 40, 7)},
        "shows": PHRASES,
    }
    done = run(planted, pairs, tmp_path / "out", searching=CLOSED)
    assert done.evaluation is not None
    assert done.evaluation.after is not None
    assert done.evaluation.before.harmful.rate == 1.0
    assert done.evaluation.after.harmful.rate == 0.0
    assert done.evaluation.after.harmless.rate == 0.0


def test_whole_replies_guide_the_gradient(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """No instruction makes this model answer a prompt with a bad word, so its replies under one are put in by hand."""
    asked = prompts(BAD, 120, 5)
    pairs = {
        "name": "stalling",
        "more": {"prompts": asked, "prefix": "please "},
        "less": {"prefix": "now "},
        "others": {"prompts": prompts(GOOD, 40, 6)},
        "shows": PHRASES,
    }
    session = pipeline.open_session(
        str(planted.folder), loading=ModelSettings(device="cpu"), prompts=PromptSettings(behaviour=pairs)
    )
    stalls = own_replies(session, session.encoded["harmful", "train"], 6)
    (answer,) = own_replies(session, session.encoded["harmless", "test"].take([0]), 6)
    taught = iter([stalls, [answer] * len(stalls)])
    monkeypatch.setattr(gradient, "own_replies", lambda *_: next(taught))
    start = Direction(torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(0)))
    (found,) = gradient.descend(session, [], start, EditSettings(), gradient.legs(1, 40, weights=(1e-3, 1e-3)))
    probe = Probe(session, [], "plain val", judge_of(session.prompts.behaviour, None), ReplySettings(max_new_tokens=6))
    base = probe.measure(None, Level.REPLIES).replies
    after = probe.measure(session.plan(found), Level.REPLIES).replies
    assert base is not None
    assert after is not None
    assert base["harmful"].tally.rate == 1.0
    assert after["harmful"].tally.rate < 0.2
    assert after["harmless"].tally.rate == 0.0


def test_first_tokens_that_tell_are_found_and_searched(planted: Planted, tmp_path: Path) -> None:
    shows = {"phrases": ["cannot help"], "first_tokens": True}
    done = run(planted, stalling(planted, shows=shows), tmp_path / "out")
    assert [token.text for token in done.refusal_tokens] == ["I"]
    assert done.search is not None
    assert done.search.method == "gradient"


def test_what_is_to_stay_limits_the_search(planted: Planted, tmp_path: Path) -> None:
    kept = prompts(BAD, 100, 9)
    fields = stalling(planted, keep={"prompts": kept, "name": "kept"}, shows={**PHRASES, "first_tokens": True})
    done = run(planted, fields, tmp_path / "out")
    assert done.search is not None
    assert done.search.limits["lost"] == pytest.approx(0.02)
    assert done.search.point is not None
    assert done.search.point.scores["lost"] == 0.0
    assert done.search.point.held_out is not None
    assert done.evaluation is not None
    assert done.evaluation.after is not None
    stays = done.evaluation.after.borderline
    assert done.search.point.held_out["lost"] == pytest.approx(1 - stays.refusals / stays.n)
    # It is the same direction that is to go and to stay, so that it cannot go.
    assert done.search.point.scores["refusals"] == done.search.base["refusals"]


def test_a_model_that_does_not_show_it_ends_the_run(planted: Planted, tmp_path: Path) -> None:
    fields = stalling(planted, shows={"phrases": ["certainly"], "tokens": 6})
    with pytest.raises(GateNotMet, match="hardly shows the behaviour stalling"):
        run(planted, fields, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_search_by_first_tokens_says_that_there_are_none(planted: Planted, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="guided by first tokens"):
        run(planted, stalling(planted), tmp_path / "out", searching=SearchSettings(method="gradient"))


def test_verify_tells_by_replies(planted: Planted, done: Record) -> None:
    direction = abliterate.load_direction(Path(str(done.output)) / "direction.safetensors")
    session = pipeline.open_session(
        str(planted.folder),
        loading=ModelSettings(device="cpu"),
        prompts=PromptSettings(behaviour=stalling(planted)),
        learnt_from=direction.learnt_from,
    )
    part = pipeline.verify(session, direction, replies=ReplySettings(max_new_tokens=8))
    assert part.verified
    assert part.bypass is None
    assert "stalled" in str(part)


def test_verbs_take_a_behaviour(planted: Planted) -> None:
    model = abliterate.load(str(planted.folder), device="cpu")
    found = model.find(behaviour=stalling(planted))
    assert found.selection.by == "replies"
    with torch.no_grad():
        assert abs(float(found.direction.basis[0] @ planted.direction)) > 0.9


def two_directions(planted: Planted) -> tuple[Direction, Direction]:
    """The planted one, and one that is neither it nor orthogonal to it."""
    other = planted.direction + torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3)) / 8
    return Direction(planted.direction[None]), Direction(other[None] / other.norm())


def test_composed_plans_do_what_they_do_one_after_the_other(planted: Planted, tmp_path: Path) -> None:
    first, second = two_directions(planted)
    once = abliterate.apply(planted.folder, first, out=tmp_path / "once")
    abliterate.apply(str(once.output), second, out=tmp_path / "twice", strength=0.5)
    abliterate.apply(planted.folder, first, out=tmp_path / "both", also=[(second, 0.5)])
    one_by_one, together = (load_file(tmp_path / name / "model.safetensors") for name in ("twice", "both"))
    assert one_by_one.keys() == together.keys()
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, one_by_one[name], rtol=0, atol=1e-5)


def test_composed_plans_are_the_same_as_hooks_and_as_an_adapter(planted: Planted, tmp_path: Path) -> None:
    first, second = two_directions(planted)
    model = abliterate.load(str(planted.folder), device="cpu")
    plan = abliterate.compose(model.plan(first), model.plan(second, strength=0.5))
    abliterate.apply(planted.folder, first, out=tmp_path / "both", also=[(second, 0.5)])
    written = abliterate.load(str(tmp_path / "both"), device="cpu")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        with model.ablate(plan):
            hooked = model.hf_model(input_ids=ids).logits
        torch.testing.assert_close(written.hf_model(input_ids=ids).logits, hooked, rtol=0, atol=1e-4)


def test_orthogonal_directions_leave_each_other_alone(planted: Planted) -> None:
    model = abliterate.load(str(planted.folder), device="cpu")
    first = Direction(planted.direction[None])
    rest = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(4))
    rest -= (rest @ planted.direction) * planted.direction
    second = Direction(rest[None] / rest.norm())
    both = abliterate.compose(model.plan(first), model.plan(second))
    swapped = abliterate.compose(model.plan(second), model.plan(first))
    vector = torch.randn(D_MODEL)
    for one, other in zip(both.edits, swapped.edits, strict=True):
        results = [vector - (vector @ edit.reads.T) @ edit.basis for edit in (one, other)]
        torch.testing.assert_close(*results)


def test_only_removals_compose(planted: Planted) -> None:
    model = abliterate.load(str(planted.folder), device="cpu")
    first, second = two_directions(planted)
    with pytest.raises(UsageError, match="norm-preserving"):
        abliterate.compose(model.plan(first), model.plan(second, norm_preserving=True))
    with pytest.raises(UsageError, match="expected plans"):
        abliterate.compose()
