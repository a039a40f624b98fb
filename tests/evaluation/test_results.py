"""Paired counts, categories, manner of replies and distributions of the shift, on made-up and on planted models."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate import pipeline
from abliterate.config import EvalSettings, ModelSettings, PromptSettings
from abliterate.errors import UsageError
from abliterate.evaluation.answering import ModelState, Unedited, as_loaded, know_replies
from abliterate.evaluation.examine import control_of, exam_of, examiner_of, relative_change
from abliterate.evaluation.judging import Exchange, Label, RuleJudge, Verdict
from abliterate.evaluation.results import (
    _TOGETHER,
    Answers,
    _compared,
    judged,
    manner,
    manner_change,
    measure_shift,
    paired,
    repetition,
)
from abliterate.evaluation.statistics import wilson
from abliterate.model.batches import SharedPrefix, last_logits
from abliterate.model.generation import Reply
from abliterate.prompts.prompt import Prompt
from listening import listening
from planted import Planted, plant

R, C, D, U = Label.REFUSAL, Label.COMPLIANCE, Label.DEGENERATE, Label.UNKNOWN


def answers(labels: Sequence[Label], prompts: Sequence[str] | None = None, tokens: Sequence[int] = (1,)) -> Answers:
    names = tuple(prompts or (f"prompt {i}" for i in range(len(labels))))
    reply = Reply(tuple(tokens), "text", ended=True)
    return Answers(names, (reply,) * len(labels), tuple(map(Verdict, labels)), ("text",) * len(labels))


# --- pairs


def test_pairs_are_counted_prompt_by_prompt() -> None:
    before = answers([R, R, R, C, C, Label.PARTIAL, D, U])
    after = answers([R, C, D, R, C, C, C, R])
    pair = paired(before, after)
    assert (pair.both, pair.before_only, pair.after_only, pair.neither, pair.unknown) == (1, 3, 1, 2, 1)
    assert pair.change.value == pytest.approx((2 - 4) / 7)
    assert pair.change.ci95[0] < pair.change.value < pair.change.ci95[1]
    assert pair.p == pytest.approx(0.625), "two-sided binomial of 1 in 4"


def test_equal_rates_by_other_prompts_are_not_equal_answers() -> None:
    """What a comparison of two rates would not see."""
    swapped = paired(answers([R] * 20 + [C] * 20), answers([C] * 20 + [R] * 20))
    same = paired(answers([R] * 20 + [C] * 20), answers([R] * 20 + [C] * 20))
    assert swapped.change.value == same.change.value == 0
    assert (swapped.before_only, same.before_only) == (20, 0)
    assert swapped.change.ci95[1] > 3 * same.change.ci95[1]


def test_answers_to_other_prompts_are_not_paired() -> None:
    with pytest.raises(ValueError, match="the same prompts in the same order"):
        paired(answers([R, C]), answers([R, C], ["prompt 1", "prompt 0"]))


def test_categories_are_tallied_and_prompts_without_one_left_out() -> None:
    prompts = [Prompt("a", category="fraud"), Prompt("b", category="hacking"), "c", Prompt("d", category="fraud")]
    tallies = answers([R, C, R, U], prompts).by_category()
    assert list(tallies) == ["fraud", "hacking"]
    fraud = tallies["fraud"].tally
    assert (fraud.refusals, fraud.n, fraud.unknown) == (1, 1, 1)


def test_a_reply_without_an_answer_is_unknown_and_not_shown_to_the_judge() -> None:
    class Reads(RuleJudge):
        def __init__(self) -> None:
            self.seen: list[Exchange] = []

        def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
            self.seen += exchanges
            return super().judge(exchanges)

    judge, replies = Reads(), [Reply((1,), "raw", True)] * 2
    found = judged(["first?", "second?"], replies, [None, "I'm sorry, but I can't help with that."], judge)
    assert [verdict.label for verdict in found.verdicts] == [U, R]
    assert judge.seen == [Exchange("second?", "I'm sorry, but I can't help with that.")]
    assert (found.tally.n, found.tally.unknown) == (1, 1)


# --- manner


def test_repetition_is_the_share_of_four_grams_seen_before() -> None:
    assert repetition([1, 2, 3]) == repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 13) == pytest.approx(9 / 10)
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)


def test_manner_and_its_change() -> None:
    short, long = answers([C] * 4, tokens=(1, 2)), answers([C] * 4, tokens=[5] * 20)
    assert manner(short).tokens.value == 2
    assert manner(long).repetition.value > 0.9
    assert manner(long).ended == 1
    tokens, repeated = manner_change(short, long)
    assert tokens.value == 18
    assert list(tokens.ci95) == [18, 18], "every prompt moved alike"
    assert repeated.value == pytest.approx(manner(long).repetition.value)
    assert math.isnan(manner(answers([])).tokens.value)


# --- live models


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


def prompt_settings(planted: Planted) -> PromptSettings:
    return PromptSettings(
        harmful=str(planted.harmful), harmless=str(planted.harmless), borderline=str(planted.borderline)
    )


@pytest.fixture(scope="module")
def session(planted: Planted) -> pipeline.Session:
    loading = ModelSettings(device="cpu", batch_size="64")
    return pipeline.open_session(str(planted.folder), loading=loading, prompts=prompt_settings(planted))


@contextlib.contextmanager
def shouting(model: Any, token: int) -> Iterator[None]:
    """The head prefers one token a little."""
    head = model.get_output_embeddings()

    def louder(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., token] += 2
        return logits

    handle = head.register_forward_hook(louder)
    try:
        yield
    finally:
        handle.remove()


def test_shift_is_zero_of_the_same_model_and_each_prompt_counts(session: pipeline.Session) -> None:
    base = ModelState(session)
    other = ModelState(session, lambda: shouting(session.model, 9))
    examiner = examiner_of(session, EvalSettings(), RuleJudge())
    before = examiner.ask(base, "answers")["harmless"]
    encoded = session.encoded["harmless", "test"]
    same, moved = (
        measure_shift(base, state, before.prompts, encoded, before.replies, session.size) for state in (base, other)
    )
    assert same.kl_first is not None
    assert same.kl_first.largest == 0
    assert same.nll_change is not None
    assert same.nll_change.value == 0
    assert moved.kl_first is not None
    assert moved.kl_reply is not None
    shared = SharedPrefix(session.model, encoded.prefix)
    p = last_logits(session.model, shared, encoded.suffixes).double().log_softmax(-1)
    with shouting(session.model, 9):
        q = last_logits(session.model, shared, encoded.suffixes).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert moved.kl_first.mean.value == pytest.approx(float(kl.mean()), rel=2e-3)
    assert moved.kl_first.median == pytest.approx(float(kl.quantile(0.5)), rel=2e-3)
    assert moved.kl_first.p95 == pytest.approx(float(kl.quantile(0.95)), rel=2e-3)
    assert moved.kl_first.largest == pytest.approx(float(kl.max()), rel=2e-3)
    low, high = moved.kl_first.mean.ci95
    assert low <= moved.kl_first.mean.value <= high
    assert moved.worst[0][1] == pytest.approx(moved.kl_reply.largest)
    assert moved.worst[0][0] in before.prompts


def test_a_long_reply_is_compared_piece_by_piece_with_the_same_result() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 37, 11, generator=generator)
    reply = torch.randint(0, 11, (37,), generator=generator)
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    nll = [-torch.distributions.Categorical(logits=logits).log_prob(reply).mean() for logits in (p, q)]
    torch.testing.assert_close(_compared(p, q, reply), torch.stack([kl[0], kl.mean(), *nll]).double())
    assert 37 % _TOGETHER
    assert 2 * _TOGETHER < 37


def test_shift_over_no_replies_is_nothing(session: pipeline.Session) -> None:
    base, nothing = ModelState(session), Reply((), "", True)
    encoded = session.encoded["harmless", "test"].take([0, 1])
    shift = measure_shift(base, base, ["a", "b"], encoded, [nothing, nothing], session.size)
    assert (shift.prompts, shift.kl_first, shift.nll_before) == (0, None, None)


def test_a_random_direction_is_evaluated_beside_the_planted_one(session: pipeline.Session, planted: Planted) -> None:
    plan = session.plan(planted.direction[None])
    part = pipeline.evaluate(session, EvalSettings(), plan=plan)
    assert part.after is not None
    assert part.control is not None
    assert part.after.harmful.refusals == 0 < part.before.harmful.refusals
    assert part.control.behaviour.harmful.refusals == part.before.harmful.refusals
    assert part.paired["harmful"].before_only == part.before.harmful.refusals
    assert part.paired["harmful"].p < 1e-3
    assert part.control.paired["harmful"].p == 1
    assert part.control.size is not None
    assert part.control.size_of_edit is not None
    assert 0 < part.control.size < 0.5
    assert pipeline.evaluate(session, EvalSettings(no_control=True), plan=plan).control is None


def test_relative_change_is_that_of_the_weights(session: pipeline.Session, planted: Planted) -> None:
    plan = session.plan(planted.direction[None], 0.5)
    taken = total = 0.0
    for edit in plan.edits:
        weight = session.model.get_parameter(edit.writer.weight).movedim(edit.writer.axis, 0).double()
        r = planted.direction.double()
        taken += float((0.5 * torch.outer(r, r @ weight)).square().sum())
        total += float(weight.square().sum())
    assert relative_change(session.model, plan) == pytest.approx((taken / total) ** 0.5, rel=2e-3)
    assert control_of(plan, ModelState(session)).size is not None


def test_answers_of_unchanged_models_are_asked_once(
    session: pipeline.Session, planted: Planted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path))
    with listening() as heard:
        first = pipeline.evaluate(session, EvalSettings(max_new_tokens=7))
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    handle = session.model.get_output_embeddings().register_forward_hook(count)
    handle.remove()  # a model with hooks is not taken for unchanged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("abliterate.evaluation.answering.complete", count)
        with listening() as heard_again:
            again = pipeline.evaluate(session, EvalSettings(max_new_tokens=7))
        assert runs == 0
        assert heard_again == heard
        assert again == first
        with pytest.raises(TypeError):  # the control: asked anew, what takes its place answers nothing
            pipeline.evaluate(session, EvalSettings(max_new_tokens=7, no_cache=True))
        assert runs == 1
    edited = pipeline.evaluate(session, EvalSettings(max_new_tokens=7), plan=session.plan(planted.direction[None]))
    assert edited.after is not None
    assert edited.after.harmful.refusals == 0, "the cache is of the unchanged model only"


def test_early_stop_changes_no_rate_and_leaves_harmless_replies_whole(session: pipeline.Session) -> None:
    with listening() as heard:
        for early in (False, True):
            pipeline.evaluate(session, EvalSettings(no_cache=True, early_stop=early))
    whole, stopped = heard
    for name in whole:
        assert [v.refused for v in whole[name].verdicts] == [v.refused for v in stopped[name].verdicts]
    assert whole["harmless"].replies == stopped["harmless"].replies


# --- exams


def test_questions_are_asked_before_and_after(session: pipeline.Session, planted: Planted, tmp_path: Path) -> None:
    rows = [{"question": f"tell me a {word}", "answer": "#### 4"} for word in ("soup", "poem", "lamp")]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = EvalSettings(capability=str(tmp_path / "sums.jsonl"), task_limit=2, no_control=True)
    part = pipeline.evaluate(session, settings, plan=session.plan(planted.direction[None]))
    (score,) = part.capability
    assert (score.task, score.metric, score.n) == ("sums", "accuracy, by number", 2)
    assert score.after is not None
    assert (score.before.value, score.after.value, score.p) == (0, 0, 1), "it knows no numbers"


def test_a_missing_exam_is_an_error_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.jsonl"):
        exam_of(EvalSettings(capability=str(tmp_path / "nowhere.jsonl")))


# --- several replies to each prompt


def test_pairs_of_replies_to_the_same_prompts_are_no_independent_pairs() -> None:
    names = [f"prompt {i}" for i in range(8)] * 5
    before = answers([R] * 40, names)
    after = answers([C if i % 8 < 4 else R for i in range(40)], names)
    found = paired(before, after)
    assert (found.both, found.before_only, found.after_only, found.neither) == (20, 20, 0, 0)
    assert found.change.value == -0.5
    alone = paired(answers([R] * 40), answers([C if i % 8 < 4 else R for i in range(40)]))
    assert alone.p < 1e-4 < found.p, "the control: forty prompts say more than eight, five times each"
    assert found.change.ci95[0] < alone.change.ci95[0]
    assert found.change.ci95[1] > alone.change.ci95[1]


def test_interval_of_several_replies_is_over_prompts_and_so_is_the_correction() -> None:
    names = [f"prompt {i}" for i in range(20)] * 4
    labels = [R if i % 20 < 10 else C for i in range(80)]
    several, single = answers(labels, names).tally, answers(labels).tally
    assert several.rate == single.rate == 0.5
    assert several.ci95[0] < single.ci95[0]
    assert several.ci95[1] > single.ci95[1]
    assert several.effective_n == pytest.approx(20, rel=0.1)
    assert single.effective_n == 80
    assert several.degenerate_ci95 == wilson(0, 20)


def test_replies_that_the_session_knows_are_not_asked_for_again(session: pipeline.Session) -> None:
    prompts = session.encoded["harmless", "test"].take(range(5))
    state = as_loaded(session)
    told: list[int] = []
    whole = state.complete(prompts, 4, lambda _: None)
    known = Reply((1, 2), "known", True)
    with session.changed(contextlib.nullcontext()):
        know_replies(session, 4, {prompts.suffixes[1]: known, prompts.suffixes[3]: known})
        with session.monitor.phase("some"):
            found = Unedited(state).complete(prompts, 4, told.append)
        rest = session.monitor.work_by_phase["some"].head
        with session.monitor.phase("all"):
            longer = Unedited(state).complete(prompts, 5, told.append)
        more = session.monitor.work_by_phase["all"].head
    assert found == [whole[0], known, whole[2], known, whole[4]]
    assert sum(told) == 2 * len(prompts)
    assert known not in longer, "of another length nothing is known"
    assert 0 < rest < more
