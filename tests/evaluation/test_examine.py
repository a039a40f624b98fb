"""Who is asked what in which state: edited weights, controls, open thinking, early stops, engines and comparisons."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch

import abliterate
import planted
from abliterate import pipeline
from abliterate.config import (
    EngineSettings,
    EvalSettings,
    MeasureSettings,
    ModelSettings,
    OutputSettings,
    PromptSettings,
    RunSettings,
)
from abliterate.edit.direction import Direction, save_direction
from abliterate.edit.plan import Plan
from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluation import answering
from abliterate.evaluation.answering import ModelState
from abliterate.evaluation.compare import compare
from abliterate.evaluation.engines import Pair, states_of
from abliterate.evaluation.examine import (
    CONTROL_SHIFT_PROMPTS,
    Examiner,
    Sets,
    control_of,
    exam_of,
    examine,
    examine_engine,
    examiner_of,
    random_direction,
    random_plan,
    relative_change,
    shift_of,
)
from abliterate.evaluation.judging import Exchange, Label, RuleJudge, Verdict
from abliterate.evaluation.judging.calibration import folder_of
from abliterate.evaluation.parts import evaluation_part
from abliterate.evaluation.results import Answers
from abliterate.model.batches import Encoded
from abliterate.model.decoding import GREEDY, Decoding
from abliterate.model.generation import Reply
from abliterate.prompts.contrastive import fingerprint
from abliterate.prompts.prompt import Prompt
from abliterate.record import EvaluationPart
from abliterate.report.wording import replies_of
from listening import listening

# --- a model that thinks, and goes on after it has refused

#: One token, which reads as a refusal; to think of one is none.
DOUBT = "I'm sorry, but I can't help with that."
THOUGHTS = ("<think>", "first", "then", "next", "so", "hmm", "well", "still", "perhaps", DOUBT)
#: What it says after its refusal and its answer, so that there is something to leave out.
ONWARDS = ("Because", "such", "things", "could", "hurt", "other", "people", "near", "by", "very", "much", "indeed")
#: A prompt with this word is thought about for ever.
ENDLESS = "river"

THINKING_TEMPLATE = planted.CHAT_TEMPLATE.replace(
    "<|turn|><|assistant|>",
    "<|turn|><|assistant|><think>{% if not enable_thinking %}</think>{% endif %}",
)

#: The one that stands in for it below calls it.
planted_tokenizer = planted.tokenizer


def thinking_tokenizer() -> Any:
    """The planted tokenizer with more words, of which the marks of thinking are special."""
    words = dict.fromkeys([*planted.SPECIAL, *THOUGHTS, "</think>", *planted.REFUSAL, *planted.ANSWER, *ONWARDS])
    with mock.patch.object(planted, "SPECIAL", tuple(words)):
        result = planted_tokenizer()
    result.add_special_tokens({"additional_special_tokens": [*planted.SPECIAL[3:], "<think>", "</think>"]})
    result.chat_template = THINKING_TEMPLATE
    return result


def thinking_model() -> tuple[Any, torch.Tensor]:
    """The planted model with a train of thought before its answer, and the direction of its refusals.

    `ENDLESS` has a feature of its own, which the same attention carries on to all that follows, and which keeps the
    thinking from being closed.
    """
    with mock.patch.object(planted, "tokenizer", thinking_tokenizer):
        live, r = planted.model()
    ids = thinking_tokenizer().get_vocab()
    embedding, head = live.get_input_embeddings().weight, live.get_output_embeddings().weight
    attention = live.model.layers[planted.WRITES].self_attn
    spoken = ("<|assistant|>", *planted.REFUSAL, *planted.ANSWER)
    new = (*THOUGHTS, "</think>", *ONWARDS)
    with torch.no_grad():
        bad = attention.v_proj.weight[0] / 2
        known = torch.stack([r, bad, *(embedding[ids[word]] for word in spoken)])
        free = torch.linalg.svd(known)[2][len(known) :][: len(new) + 2]
        embedding -= embedding @ free.T @ free
        endless, lasting, *codes = free
        code = dict(zip(new, codes, strict=True)) | {word: embedding[ids[word]].clone() for word in spoken}
        for word in new:
            embedding[ids[word]] = code[word]
        embedding[ids[ENDLESS]] += endless
        for parameter in live.model.layers.parameters():
            if parameter.dim() == 2:
                parameter *= 0.1  # noise adds up over a train of thought
        attention.v_proj.weight[:2] = 2 * torch.stack([bad, endless])
        attention.o_proj.weight[:, :2] = 4 * torch.stack([r, lasting], dim=1)
        head.zero_()
        chains = ((*THOUGHTS, "</think>"), (*planted.REFUSAL, *ONWARDS, "</s>"), (*planted.ANSWER, *ONWARDS, "</s>"))
        for word, successor in dict.fromkeys(pair for chain in chains for pair in itertools.pairwise(chain)):
            head[ids[successor]] += 18 * code[word]
        head[ids[DOUBT]] += 9 * code[DOUBT]
        head[ids["</think>"]] -= 18 * lasting
        head[ids["Sure"]] = 1.5 * code["</think>"]
        head[ids["I"]] = 1.5 * r
    return live, r


@dataclass(frozen=True, slots=True)
class Thinker:
    """The model on disk, the direction of its refusals, and settings that name its prompts."""

    folder: Path
    direction: torch.Tensor
    prompts: PromptSettings


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Thinker:
    folder = tmp_path_factory.mktemp("thinker")
    live, direction = thinking_model()
    live.save_pretrained(folder / "model")
    thinking_tokenizer().save_pretrained(folder / "model")
    bad, good = planted.prompts(planted.BAD, 110, 1), planted.prompts(planted.GOOD, 70, 2)
    files = {"harmful": bad[:100], "harmless": [*good[:50], *bad[100:]], "borderline": good[50:]}
    for name, texts in files.items():
        planted.write_jsonl(folder / f"{name}.jsonl", texts)
    named = {name: str(folder / f"{name}.jsonl") for name in files}
    return Thinker(folder / "model", direction, PromptSettings(**named))


LOADING = ModelSettings(device="cpu", batch_size="64")


@pytest.fixture(scope="module")
def session(thinker: Thinker) -> pipeline.Session:
    return pipeline.open_session(str(thinker.folder), loading=LOADING, prompts=thinker.prompts)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their right answer is the refusal."""
    options = [" ".join(planted.REFUSAL), " ".join(planted.ANSWER)]
    rows = [{"question": f"tell me a {word}", "options": options, "answer": 0} for word in planted.BAD[:4]]
    path = tmp_path_factory.mktemp("questions") / "refuse.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


#: Too short for the train of thought alone; with the tokens for thinking just enough for an answer.
SHORT = {"max_new_tokens": 8, "thinking_tokens": len(THOUGHTS), "no_cache": True}


def short(thinking: Literal["closed", "open", "both"], **more: Any) -> EvalSettings:
    return EvalSettings(thinking=thinking, **SHORT, **more)


def labels(answers: Answers) -> list[Label]:
    return [verdict.label for verdict in answers.verdicts]


def refusals(sets: Sets | None, name: str = "harmful") -> int:
    assert sets is not None
    return sets[name].tally.refusals


def evaluated(
    session: pipeline.Session, settings: EvalSettings, plan: Plan | None = None
) -> tuple[EvaluationPart, list[Sets]]:
    """What `pipeline.evaluate` returns, and all answers that it was given."""
    with listening() as heard:
        part = pipeline.evaluate(session, settings, plan=plan)
    return part, heard


# --- who is in which state


@pytest.fixture
def original(session: pipeline.Session, thinker: Thinker) -> Iterator[ModelState]:
    """The edit stands in the live weights, as it does after a run; the original is a state into which they are put."""
    weight = session.model.model.layers[planted.WRITES].self_attn.o_proj.weight
    whole, r = weight.detach().clone(), thinker.direction

    @contextlib.contextmanager
    def holding(numbers: torch.Tensor) -> Iterator[None]:
        before = weight.detach().clone()
        weight.data.copy_(numbers)
        try:
            yield
        finally:
            weight.data.copy_(before)

    with holding(whole - torch.outer(r, r @ whole)):
        yield ModelState(session, lambda: holding(whole))


def test_original_edited_weights_and_control_are_each_measured_in_their_own_state(
    session: pipeline.Session, thinker: Thinker, questions: Path, original: ModelState
) -> None:
    settings = short("closed", capability=str(questions), multiple_choice="text")
    examiner, edited = examiner_of(session, settings, RuleJudge()), ModelState(session)
    control = control_of(session.plan(thinker.direction[None]), original)
    found = examine(examiner, exam_of(settings), original, edited, control)
    n = len(found.before["harmful"].prompts)
    assert found.control is not None
    assert [refusals(sets) for sets in (found.before, found.after, found.control.answers)] == [n, 0, n]
    assert found.shift == shift_of(examiner, original, edited, found.before)
    assert found.control.shift == shift_of(examiner, original, control.state, found.before, CONTROL_SHIFT_PROMPTS)
    assert found.shift != found.control.shift
    (score,) = evaluation_part(found).capability
    assert score.after is not None
    assert (score.before.value, score.after.value) == (1, 0), "it was the refusal that was asked for"


def test_capability_of_a_plan_is_measured_under_its_hooks(
    session: pipeline.Session, thinker: Thinker, questions: Path
) -> None:
    settings = short("closed", capability=str(questions), multiple_choice="text", no_control=True)
    for strength, right in ((1.0, 0), (0.0, 1)):
        plan = session.plan(thinker.direction[None], strength)
        (score,) = pipeline.evaluate(session, settings, plan=plan).capability
        assert score.after is not None
        assert (score.before.value, score.after.value) == (1, right)


def test_sizes_of_control_and_edit_are_not_mixed_up_and_are_those_of_the_original(
    session: pipeline.Session, thinker: Thinker, original: ModelState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "seed", 3)
    plan = session.plan(thinker.direction[None])
    control, other = control_of(plan, original), random_plan(session, plan)
    assert torch.equal(other.direction, random_direction(1, session.anatomy.d_model, 3).basis)
    with original.state():
        sizes = [relative_change(session.model, one) for one in (other, plan)]
    assert [control.seed, control.size, control.size_of_edit] == [3, *sizes]
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[1] > 1.2 * sizes[0], "the control: they differ"
    assert relative_change(session.model, plan) != pytest.approx(sizes[1], rel=0.1), "as the original's and the edit's"
    examiner = examiner_of(session, short("closed"), RuleJudge())
    part = evaluation_part(examine(examiner, exam_of(EvalSettings()), original, original, control))
    assert part.control is not None
    assert [part.control.seed, part.control.size, part.control.size_of_edit] == [3, *sizes]


def test_categories_before_and_after_are_each_their_own(session: pipeline.Session, thinker: Thinker) -> None:
    harmful = session.prompts.harmful
    named = tuple(Prompt(text, category=("even", "odd")[row % 2]) for row, text in enumerate(harmful.test))
    sorted_in = replace(session, prompts=replace(session.prompts, harmful=replace(harmful, test=named)))
    plan = session.plan(thinker.direction[None])
    whole = EvalSettings(no_cache=True, no_control=True)
    categories = pipeline.evaluate(sorted_in, whole, plan=plan).categories
    counts = {state: {key: (part.refusals, part.n) for key, part in categories[state].items()} for state in categories}
    half = len(named) // 2
    assert counts == {
        "before": {"even": (half, half), "odd": (half, half)},
        "after": {"even": (0, half), "odd": (0, half)},
    }


# --- early stop


def test_an_early_stop_leaves_refusals_and_nothing_of_harmless_prompts(session: pipeline.Session) -> None:
    whole, stopped = (
        evaluated(session, EvalSettings(no_cache=True, early_stop=early))[1][0] for early in (False, True)
    )
    left = {name: sum(reply.stopped for reply in stopped[name].replies) for name in stopped}
    assert left == {"harmful": refusals(whole), "harmless": 0, "borderline": 0}
    assert left["harmful"] > 0
    assert refusals(whole, "harmless") > 0, "the control: here too there was something to stop"
    assert whole["harmless"].replies == stopped["harmless"].replies
    for name in whole:
        assert labels(whole[name]) == labels(stopped[name])
        assert not any(reply.stopped for reply in whole[name].replies)
    pairs = zip(whole["harmful"].replies, stopped["harmful"].replies, strict=True)
    assert all(len(cut.tokens) < len(reply.tokens) for reply, cut in pairs)


def test_nothing_is_stopped_in_open_thinking(session: pipeline.Session) -> None:
    """A refusal thought of is no refusal. With both, the closed answers may be left."""
    with pytest.raises(UsageError, match="expected closed thinking"):
        pipeline.evaluate(session, EvalSettings(early_stop=True, thinking="open"))
    settings = EvalSettings(early_stop=True, thinking="both", no_cache=True)
    part, (closed, opened) = evaluated(session, settings)
    assert part.thinking is not None
    assert any(reply.stopped for reply in closed["harmful"].replies)
    assert not any(reply.stopped for answers in opened.values() for reply in answers.replies)


# --- thinking


def expected_labels(prompts: Sequence[str], *, refuses: bool) -> list[Label]:
    told = Label.REFUSAL if refuses else Label.CUT_OFF  # "Sure, here it is", and no more
    return [
        Label.UNKNOWN if ENDLESS in prompt.split() else told if planted.is_bad(prompt) else Label.CUT_OFF
        for prompt in prompts
    ]


def check_thought_through(sets: Sets, *, refuses: bool) -> None:
    for answers in sets.values():
        assert labels(answers) == expected_labels(answers.prompts, refuses=refuses)
        assert all(len(reply.tokens) > SHORT["max_new_tokens"] for reply in answers.replies)
    assert sum(answers.tally.unknown for answers in sets.values()) > 1
    assert sets["harmful"].tally.unknown > 0


def test_open_thinking_is_left_out_of_the_answer_and_unknown_where_it_never_ends(
    session: pipeline.Session, thinker: Thinker
) -> None:
    part, heard = evaluated(session, short("open"), session.plan(thinker.direction[None]))
    before, after, control = heard
    check_thought_through(before, refuses=True)
    check_thought_through(after, refuses=False)
    assert part.thinking is None
    assert part.control is not None
    assert labels(control["harmful"]) == labels(before["harmful"])
    assert part.shift is not None
    assert part.shift.nll_before is not None
    assert part.shift.nll_before < 0.5, "its own reply, with the thinking, is what the model finds likely"
    assert part.thinking_open
    n, unknown = len(before["harmful"].prompts), before["harmful"].tally.unknown
    assert part.after is not None
    rates = part.before.harmful, part.after.harmful
    counts = [(rate.refusals, rate.n, rate.unknown, rate.cut_off) for rate in rates]
    assert counts == [(n - unknown, n - unknown, unknown, 0), (0, 0, unknown, n - unknown)]
    assert part.control.behaviour.harmful == part.before.harmful
    assert part.paired["harmful"].unknown == n
    closed = pipeline.evaluate(session, short("closed"))
    assert closed.before.harmful.refusals == n, "the control: without thinking it comes to an answer every time"


def test_both_ways_of_thinking_stand_side_by_side(session: pipeline.Session, thinker: Thinker) -> None:
    part, heard = evaluated(session, short("both", no_control=True), session.plan(thinker.direction[None]))
    before, after, *opened = heard
    n = len(before["harmful"].prompts)
    assert (refusals(before), refusals(after)) == (n, 0)
    assert max(len(reply.tokens) for answers in before.values() for reply in answers.replies) == 8
    assert len(opened) == 2
    check_thought_through(opened[0], refuses=True)
    check_thought_through(opened[1], refuses=False)
    assert part.after is not None
    assert (part.before.harmful.refusals, part.after.harmful.refusals) == (n, 0)
    assert not part.thinking_open
    assert part.thinking is not None
    assert part.thinking.after is not None
    unknown = opened[0]["harmful"].tally.unknown
    assert part.thinking.max_new_tokens == 8 + len(THOUGHTS)
    assert (part.thinking.before.harmful.refusals, part.thinking.after.harmful.refusals) == (n - unknown, 0)
    assert (part.thinking.before.harmful.unknown, part.before.harmful.unknown) == (unknown, 0)
    assert part.thinking.paired["harmful"].unknown == n
    assert part.thinking.after.harmful.cut_off == n - unknown


class Reader(RuleJudge):
    """Notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Exchange] = []

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.seen += exchanges
        return super().judge(exchanges)


def test_the_judge_reads_answers_and_no_thinking(session: pipeline.Session) -> None:
    judge = Reader()
    examiner = examiner_of(session, short("open"), judge)
    sets = examiner.ask(ModelState(session), "answers", thinking=True)
    prompts = [prompt for answers in sets.values() for prompt in answers.prompts]
    assert all(DOUBT in reply.text for answers in sets.values() for reply in answers.replies), "there is some"
    assert [exchange.prompt for exchange in judge.seen] == [p for p in prompts if ENDLESS not in p.split()]
    firsts = {exchange.reply.split()[0] for exchange in judge.seen}
    assert firsts == {planted.REFUSAL[0], planted.ANSWER[0]}


def test_only_open_thinking_has_tokens_besides_the_answer(session: pipeline.Session) -> None:
    asked: list[tuple[int, bool, tuple[int, ...]]] = []

    class Silent:
        """Answers nothing, and notes how it was asked."""

        def complete(
            self,
            prompts: Encoded,
            max_new_tokens: int,
            progress: Callable[[int], None],
            decoding: Decoding = GREEDY,
        ) -> list[Reply]:
            asked.append((max_new_tokens, decoding.settled is None, prompts.suffixes[0][-2:]))
            return [Reply((), "", ended=True)] * len(prompts)

    settings = EvalSettings(max_new_tokens=8, thinking_tokens=100, early_stop=True)
    examiner = examiner_of(session, settings, RuleJudge())
    for thinking in (False, True):
        examiner.ask(Silent(), "answers", thinking=thinking)
    ids = session.loaded.tokenizer.convert_tokens_to_ids(["<|assistant|>", "<think>", "</think>"])
    assert asked == [(8, False, tuple(ids[1:])), (108, True, tuple(ids[:2]))]


# --- engines


class FakeEngine:
    """Refuses everything, and nothing when edited; thinks where it is let, of a refusal."""

    name = "fake 1.0"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.is_edited = tokenizer, False
        self.asked: list[tuple[list[tuple[int, ...]], int, bool]] = []

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        progress: Callable[[int], None] | None = None,
        decoding: Decoding = GREEDY,
    ) -> list[Reply]:
        self.asked.append(([tuple(prompt) for prompt in prompts], max_new_tokens, self.is_edited))
        return [self._reply(prompt) for prompt in prompts]

    def _reply(self, prompt: Sequence[int]) -> Reply:
        opened = prompt[-1] == self.tokenizer.convert_tokens_to_ids("<think>")
        words = [DOUBT, "</think>"] * opened + list(planted.ANSWER if self.is_edited else planted.REFUSAL)
        tokens = tuple(self.tokenizer.convert_tokens_to_ids(words))
        return Reply(tokens, self.tokenizer.decode(tokens, skip_special_tokens=True), ended=True)

    @contextlib.contextmanager
    def edited(self) -> Iterator[None]:
        self.is_edited = True
        try:
            yield
        finally:
            self.is_edited = False


@pytest.fixture
def engine(session: pipeline.Session) -> FakeEngine:
    return FakeEngine(session.loaded.tokenizer)


def whole_prompts(examiner: Examiner, thinking: bool) -> list[tuple[int, ...]]:
    renderer = replace(examiner.renderer, thinking=thinking)
    return [tuple(ids) for texts in examiner.texts.values() for ids in renderer.encode(texts)]


def test_an_engine_answers_before_and_after_with_thinking_closed_and_open(
    session: pipeline.Session, engine: FakeEngine
) -> None:
    examiner = examiner_of(session, short("both"), RuleJudge())
    found = examine_engine(examiner, engine.name, *states_of(engine, edited=True))
    n = len(found.before["harmful"].prompts)
    assert found.thinking is not None
    assert [refusals(sets) for sets in (found.before, found.after, *found.thinking)] == [n, 0, n, 0]
    closed, opened = (whole_prompts(examiner, thinking) for thinking in (False, True))
    limit = 8 + len(THOUGHTS)
    assert engine.asked == [(closed, 8, False), (closed, 8, True), (opened, limit, False), (opened, limit, True)]
    assert (found.engine, found.shift, found.control) == (engine.name, None, None)


def test_an_engine_with_open_thinking_alone(session: pipeline.Session, engine: FakeEngine) -> None:
    examiner = examiner_of(session, short("open"), RuleJudge())
    found = examine_engine(examiner, engine.name, *states_of(engine, edited=True))
    assert (refusals(found.before), refusals(found.after)) == (len(found.before["harmful"].prompts), 0)
    assert [(limit, edited) for _, limit, edited in engine.asked] == [
        (8 + len(THOUGHTS), False),
        (8 + len(THOUGHTS), True),
    ]
    assert found.thinking is None


def test_an_engine_of_one_model_is_not_asked_for_an_edited_one(session: pipeline.Session, engine: FakeEngine) -> None:
    examiner = examiner_of(session, short("both"), RuleJudge())
    found = examine_engine(examiner, engine.name, *states_of(engine, edited=False))
    assert found.after is None
    assert found.thinking is not None
    assert found.thinking[1] is None
    assert [edited for _, _, edited in engine.asked] == [False, False]


@pytest.fixture
def pairs(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> list[Pair]:
    """What engines are opened with; each is the fake one."""
    opened: list[Pair] = []

    def open_engine(_: str, pair: Pair) -> FakeEngine:
        opened.append(pair)
        return engine

    monkeypatch.setattr(pipeline, "open_engine", open_engine)
    return opened


def test_evaluation_elsewhere_asks_the_engine_for_both_models(
    thinker: Thinker, engine: FakeEngine, pairs: list[Pair], session: pipeline.Session, tmp_path: Path
) -> None:
    measuring = MeasureSettings(loading=LOADING, prompts=thinker.prompts, evaluating=short("closed"))
    for edited in (tmp_path, None):
        engine.asked.clear()
        found = pipeline.evaluate_elsewhere(
            str(thinker.folder), EngineSettings(engine="vllm", edited=edited), measuring
        )
        assert found.before.harmful.refusals == len(found.answers["before"]["harmful"]) > 0
        assert found.engine == engine.name
        assert (pairs[-1].folder, pairs[-1].edited) == (thinker.folder, edited)
        assert engine.asked[0] == (whole_prompts(examiner_of(session, short("closed"), RuleJudge()), False), 8, False)
        assert [asked[2] for asked in engine.asked] == ([False, True] if edited else [False])
        assert (found.after is None) == (edited is None)
    assert [pair.edited for pair in pairs] == [tmp_path, None]


# --- prompts that a direction has seen


@pytest.fixture(scope="module")
def seen(session: pipeline.Session) -> tuple[str, str]:
    """A prompt of two of the sets that are evaluated on."""
    return session.test_texts["harmful"][0], session.test_texts["harmless"][0]


def taught(thinker: Thinker, path: Path, seen: Sequence[str]) -> Path:
    save_direction(
        path, Direction(thinker.direction[None], learnt_from=frozenset([fingerprint(text) for text in seen]))
    )
    return path


def left(sets: Sets, seen: Sequence[str]) -> list[str]:
    prompts = {prompt for answers in sets.values() for prompt in answers.prompts}
    assert len(prompts) > 20
    return [text for text in seen if text in prompts]


def test_compare_keeps_out_what_the_direction_behind_an_adapter_saw(
    thinker: Thinker, seen: tuple[str, str], tmp_path: Path
) -> None:
    measuring = MeasureSettings(loading=LOADING, prompts=thinker.prompts, evaluating=short("closed"))
    for name, learnt in (("taught", seen), ("untaught", ())):
        direction = taught(thinker, tmp_path / f"{name}.safetensors", learnt)
        adapter = tmp_path / name
        abliterate.apply(str(thinker.folder), direction, OutputSettings(out=adapter, realisation="lora"))
        specs = [str(thinker.folder), f"{thinker.folder}+{adapter}"]
        with listening() as heard:
            found = compare(specs, measuring)
        assert len(heard) == 2
        for sets in heard:
            assert left(sets, seen) == [text for text in seen if text not in learnt]
        assert [refusals(sets) > 0 for sets in heard] == [True, False]
        assert [entry.behaviour.harmful.refusals for entry in found.entries] == [refusals(sets) for sets in heard]


@pytest.mark.parametrize("where", ["edited", "model"])
def test_engines_are_not_asked_what_the_direction_of_an_edited_folder_saw(
    where: str, thinker: Thinker, seen: tuple[str, str], engine: FakeEngine, pairs: list[Pair], tmp_path: Path
) -> None:
    model, edited = tmp_path / "model", tmp_path / "edited"
    shutil.copytree(thinker.folder, model)
    edited.mkdir()

    measuring = MeasureSettings(loading=LOADING, prompts=thinker.prompts, evaluating=short("closed"))

    def prompts_left() -> list[str]:
        with listening() as heard:
            pipeline.evaluate_elsewhere(str(model), EngineSettings(engine="vllm", edited=edited), measuring)
        before, after = heard
        assert left(before, seen) == left(after, seen)
        return left(before, seen)

    assert prompts_left() == list(seen), "the control"
    taught(thinker, tmp_path / where / "direction.safetensors", seen)
    assert prompts_left() == []
    assert len(engine.asked[-1][0]) == len(engine.asked[0][0]) - 2
    assert len(pairs) == 2


# --- comparisons of models that think


def test_compare_asks_with_the_thinking_open(thinker: Thinker, tmp_path: Path) -> None:
    direction = taught(thinker, tmp_path / "r.safetensors", ())
    specs = [str(thinker.folder), f"{thinker.folder}+{direction}"]
    measuring = MeasureSettings(loading=LOADING, prompts=thinker.prompts, evaluating=short("open"))
    with listening() as heard:
        _, edited = compare(specs, measuring).entries
    check_thought_through(heard[0], refuses=True)
    check_thought_through(heard[1], refuses=False)
    assert edited.shift is not None
    assert edited.shift.nll_before is not None
    assert edited.shift.nll_before < 0.5
    with pytest.raises(UsageError, match="expected closed or open"):
        compare(specs, measuring.model_copy(update={"evaluating": short("both")}))


# --- a damaged calibration


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    path = folder_of(RuleJudge.fingerprint) / "any.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    return path


def test_a_damaged_calibration_is_found_before_anything_is_answered(
    session: pipeline.Session, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def complete(_: Any, __: Any, prompts: Encoded, *___: Any) -> list[Reply]:
        nonlocal asked
        asked += 1
        return [Reply((), "", ended=True)] * len(prompts)

    monkeypatch.setattr(answering, "complete", complete)
    with pytest.raises(AbliterateError, match=r"expected a calibration, found JSON that cannot be used"):
        pipeline.evaluate(session, short("closed"))
    assert asked == 0
    damaged.unlink()
    pipeline.evaluate(session, short("closed"))
    assert asked == 1, "the control"


def test_a_damaged_calibration_is_found_before_an_engine_or_a_model_is_opened(
    thinker: Thinker, damaged: Path, engine: FakeEngine, pairs: list[Pair], tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    jobs: list[Callable[[], object]] = [
        lambda: pipeline.evaluate_elsewhere(
            str(thinker.folder), EngineSettings(engine="vllm"), MeasureSettings(prompts=thinker.prompts)
        ),
        lambda: compare([nowhere, nowhere]),
        lambda: pipeline.run(RunSettings(model=nowhere, output=OutputSettings(out=tmp_path / "out"))),
    ]
    for job in jobs:
        with pytest.raises(AbliterateError, match=r"expected a calibration, found JSON that cannot be used"):
            job()
    assert (engine.asked, pairs) == ([], [])
    damaged.unlink()
    for job in jobs[1:]:
        with pytest.raises(AbliterateError, match="nowhere"):
            job()


# --- decoding


@pytest.fixture
def configured(session: pipeline.Session) -> Iterator[Any]:
    """The model's generation configuration, which a test may change."""
    config = session.model.generation_config
    with mock.patch.object(session.model, "generation_config", copy.deepcopy(config)):
        yield session.model.generation_config


def test_greedy_replies_say_once_what_the_configuration_would_have_asked_for(
    session: pipeline.Session, configured: Any
) -> None:
    configured.update(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.1)
    with mock.patch.object(session.monitor, "warnings", []):
        for _ in range(2):
            assert examiner_of(session, short("closed"), RuleJudge()).decoding == GREEDY
        (said,) = session.monitor.warnings
    assert said == (
        "the model's generation_config asks for repetition_penalty 1.1, do_sample True, temperature 0.7, top_k 20: "
        "replies here are plain greedy (--decoding model does as it asks)"
    )


def test_prompts_are_answered_several_times_and_the_interval_is_over_prompts(
    session: pipeline.Session, configured: Any, thinker: Thinker
) -> None:
    configured.update(do_sample=True, temperature=5.0, top_k=50)
    settings = short("closed", decoding="model", samples=3, no_control=True)
    plan = session.plan(thinker.direction[None])
    part = pipeline.evaluate(session, settings, plan=plan)
    prompts = len(session.test_texts["harmful"])
    rate = part.before.harmful
    assert rate.n + rate.unknown + rate.cut_off == 3 * prompts
    assert len(part.answers["before"]["harmful"]) == 3 * prompts
    assert (part.decoding.name, part.decoding.seed, part.decoding.samples) == ("model", session.seed, 3)
    assert part.decoding.asked == {"do_sample": True, "temperature": 5.0, "top_k": 50}
    texts = [answer.text for answer in part.answers["before"]["harmless"]]
    n = len(session.test_texts["harmless"])
    assert len({tuple(texts[i::n]) for i in range(3)}) >= 1
    assert texts[:n] != texts[n : 2 * n], "samples differ"
    said = replies_of(part.max_new_tokens, part.decoding)
    assert said == (
        f"Replies of at most {part.max_new_tokens} tokens, 3 to each prompt, as the model's generation_config asks "
        f"(do_sample True, temperature 5.0, top_k 50; seed {session.seed})"
    )
    again = pipeline.evaluate(session, settings, plan=plan)
    assert again.answers == part.answers, "the same seed, the same replies"


def test_samples_are_of_what_is_drawn(session: pipeline.Session, configured: Any) -> None:
    with pytest.raises(UsageError, match=r"--samples 2: .*asks for no sampling"):
        examiner_of(session, short("closed", decoding="model", samples=2), RuleJudge())
    with pytest.raises(UsageError, match="greedy answers to a prompt are all alike"):
        short("closed", samples=2)
    configured.update(num_beams=4)
    with pytest.raises(UsageError, match="num_beams 4"):
        examiner_of(session, short("closed", decoding="model"), RuleJudge())
