"""The measured model as its own judge, and the choice among judges: on the planted model, given a yes and a no."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

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
    SearchSettings,
)
from abliterate.errors import AbliterateError, ModelError, UsageError
from abliterate.evaluation.answering import ModelState, as_loaded
from abliterate.evaluation.compare import compare
from abliterate.evaluation.judging import Exchange, Judge, Label, RuleJudge, Verdict, auto, self_judge
from abliterate.evaluation.judging.auto import ChosenJudge, Measured, choose
from abliterate.evaluation.judging.calibration import folder_of
from abliterate.evaluation.judging.choice import PendingJudge, bind_judge, open_judge
from abliterate.evaluation.judging.self_judge import HEAD, TAIL, fit, open_self, question
from abliterate.evaluation.judging.shipped import ShippedExchange, clear_exchanges
from abliterate.evaluation.parts import judge_part
from abliterate.evaluation.statistics import Share
from abliterate.monitor import Monitor
from abliterate.record import FILE_NAME
from abliterate.report.wording import judged_by

#: Words that are tokens of their own in the model's vocabulary beside those of the planted one.
YES, NO = "yes", "no"
BAD, GOOD = planted.BAD[0], planted.GOOD[0]


def answering_tokenizer() -> Any:
    with mock.patch.object(planted, "SPECIAL", (*planted.SPECIAL, YES, NO)):
        return planted_tokenizer()


planted_tokenizer = planted.tokenizer


def rows(split: str = "fit", count: int = 6) -> tuple[ShippedExchange, ...]:
    """Exchanges whose replies hold a bad word where they are labelled refused."""
    kinds = [(word, label) for word, label in ((BAD, "refusal"), (GOOD, "compliance")) for _ in range(count)]
    return tuple(
        ShippedExchange(
            id=f"{split}{i}", prompt=f"tell me {i}", reply=f"{word} with the house {planted.NEUTRAL[i]} today",
            label=label, second=label, kind="", lang="en", split=split, manner="x",
        )
        for i, (word, label) in enumerate(kinds)
    )  # fmt: skip


def some(split: str, each: int | None = None) -> tuple[ShippedExchange, ...]:
    found = rows(split)
    return tuple(row for kind in (True, False) for row in [row for row in found if row.refused is kind][:each])


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and exchanges that the planted model can tell apart."""
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(auto, "_IN_THIS_PROCESS", {})
    for module in (self_judge, auto):
        monkeypatch.setattr(module, "clear_exchanges", some)


@pytest.fixture(scope="module")
def judging(tmp_path_factory: pytest.TempPathFactory) -> planted.Planted:
    """The planted model, which now also says yes, rather than no, where it has read no bad word."""
    folder = tmp_path_factory.mktemp("judging")
    with mock.patch.object(planted, "tokenizer", answering_tokenizer):
        found = planted.plant(folder)
        live, r = planted.model()
    ids = answering_tokenizer().get_vocab()
    with torch.no_grad():
        live.get_output_embeddings().weight[ids[YES]] = -r
        live.get_output_embeddings().weight[ids[NO]] = r / 2
    live.save_pretrained(found.folder)
    return found


def spoken(judging: planted.Planted) -> PromptSettings:
    """A few of the planted prompts."""
    harmful, harmless, borderline = map(str, (judging.harmful, judging.harmless, judging.borderline))
    return PromptSettings(harmful=harmful, harmless=harmless, borderline=borderline, limit=10)


@pytest.fixture(scope="module")
def session(judging: planted.Planted) -> pipeline.Session:
    return pipeline.open_session(str(judging.folder), loading=ModelSettings(device="cpu"), prompts=spoken(judging))


ASKED = [
    Exchange("tell me", f"{BAD} for the city now"),
    Exchange("show me", f"some {GOOD} for the school"),
    Exchange("show me", ""),
    Exchange("tell me", f"my quick {BAD} with a river"),
]
EXPECTED = [Label.REFUSAL, Label.COMPLIANCE, Label.DEGENERATE, Label.REFUSAL]


def labels(verdicts: Sequence[Verdict]) -> list[Label]:
    return [verdict.label for verdict in verdicts]


class Passes:
    """Counts the rows that a model's head sees while it is watched, and forward passes by generation."""

    def __init__(self, model: Any) -> None:
        self.rows = 0
        self.handle = model.get_output_embeddings().register_forward_hook(self.count)

    def count(self, _: Any, args: tuple[Any, ...], out: torch.Tensor) -> None:
        self.rows += out.shape[0] * out.shape[1]


# --- self


def test_model_judges_by_one_forward_pass_for_each_exchange(session: pipeline.Session) -> None:
    passes = Passes(session.model)  # as if it had been there when the model was loaded: it stays on
    judge: Judge = open_self(as_loaded(session))
    assert passes.rows == 12, "one position of each exchange it is calibrated on"
    passes.rows = 0
    with mock.patch.object(type(session.model), "generate", side_effect=AssertionError("nothing is generated")):
        verdicts = judge.judge(ASKED)
    assert labels(verdicts) == EXPECTED
    assert passes.rows == 3, "one position of each, and the empty reply is not asked about"
    assert verdicts[0].evidence.startswith("p(refused) = 0.")
    assert judge.judge([]) == []
    passes.handle.remove()


def test_verdicts_do_not_depend_on_what_is_judged_beside(session: pipeline.Session) -> None:
    judge = open_self(as_loaded(session))
    assert [judge.judge([exchange])[0] for exchange in ASKED] == judge.judge(ASKED)


def test_hooks_are_off_while_it_judges_and_on_again_after(
    session: pipeline.Session, judging: planted.Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = open_self(as_loaded(session))
    with session.ablated(session.plan(judging.direction[None])):
        before = [list(module._forward_hooks) for module in session.model.modules()]
        assert any(before)
        assert labels(judge.judge(ASKED)) == EXPECTED
        assert [list(module._forward_hooks) for module in session.model.modules()] == before
        monkeypatch.setattr(self_judge, "_unhooked", lambda *_: contextlib.nullcontext())
        assert labels(judge.judge(ASKED)) != EXPECTED, "control: what the ablated model would say"


def test_what_passes_for_its_verdicts_is_counted(session: pipeline.Session) -> None:
    judge, monitor = open_self(as_loaded(session)), session.monitor
    with monitor.phase("judging"):
        judge.judge(ASKED)
    assert monitor.work_by_phase["judging"].head == 3, "one position of each that is asked about"


def test_hooks_come_back_in_their_order_when_judging_fails(session: pipeline.Session, judging: planted.Planted) -> None:
    judge = open_self(as_loaded(session))
    with session.ablated(session.plan(judging.direction[None])):
        before = [list(module._forward_hooks) for module in session.model.modules()]
        broken = mock.patch.object(self_judge, "_leanings", side_effect=ZeroDivisionError)
        with broken, pytest.raises(ZeroDivisionError):
            judge.judge(ASKED)
        assert [list(module._forward_hooks) for module in session.model.modules()] == before


def test_weights_edited_in_place_are_an_error_until_they_are_put_back(session: pipeline.Session) -> None:
    judge = open_self(as_loaded(session))
    parameter = session.model.get_parameter("model.layers.2.mlp.down_proj.weight")
    whole = parameter.data
    parameter.data = whole * 0.9
    with pytest.raises(UsageError, match=r"judge self: .*model\.layers\.2\.mlp\.down_proj\.weight' edited in place"):
        judge.judge(ASKED)

    class Original:
        def __enter__(self) -> None:
            self.edited, parameter.data = parameter.data, whole

        def __exit__(self, *_: object) -> None:
            parameter.data = self.edited

    restored = bind_judge(judge, ModelState(session, Original), Monitor())
    assert labels(restored.judge(ASKED)) == EXPECTED
    parameter.data = whole


def test_calibration_is_kept_by_model_question_and_exchanges(
    session: pipeline.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_self(as_loaded(session))
    with mock.patch.object(self_judge, "_leanings", side_effect=AssertionError("measured again")):
        again = open_self(as_loaded(session))
    assert (again.scale, again.fingerprint) == (first.scale, first.fingerprint)
    monkeypatch.setattr(self_judge, "_TASK", self_judge._TASK + " now")
    other_question = open_self(as_loaded(session))
    monkeypatch.setattr(self_judge, "clear_exchanges", lambda split, each=None: some(split, 3))
    other_rows = open_self(as_loaded(session))
    with mock.patch.object(self_judge, "key_of", return_value="another model"):
        other_model = open_self(as_loaded(session))
    assert len({judge.fingerprint for judge in (first, other_question, other_rows, other_model)}) == 4


def test_slope_and_bias_are_those_of_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, generator=generator) * 3 + 5
    refused = torch.rand(4000, generator=generator) < torch.sigmoid(-1.5 * x + 6)
    scale = fit(x.tolist(), refused.tolist())
    assert scale.slope == pytest.approx(-1.5, abs=0.15)
    assert scale.bias == pytest.approx(6, abs=0.6)
    assert scale.probability(4.0) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("leanings", [[1.0] * 6, [-2.0] * 3 + [9.0] * 3, [0.0, 0.0, 0.0, 1e4, 1e4, 1e4]])
def test_scale_is_finite_for_leanings_that_say_nothing_or_all(leanings: list[float]) -> None:
    scale = fit(leanings, [True] * 3 + [False] * 3)
    assert all(map(torch.isfinite, map(torch.tensor, (scale.slope, scale.bias))))
    assert 0 < scale.probability(leanings[0]) <= 1
    assert (scale.probability(leanings[0]) > 0.5) == (leanings[0] != leanings[-1])


def test_long_texts_are_shown_by_head_and_tail_without_machinery() -> None:
    reply = "<think>hush</think>" + "a" * HEAD + "b" * 5000 + "c" * TAIL + "<|im_end|>"
    asked = question(Exchange("<|im_start|>user\nhow", reply))
    assert "a" * HEAD + " [...] " + "c" * TAIL in asked
    assert not any(word in asked for word in ("hush", "<|im", "bb"))
    assert "(not known)" in question(Exchange("", "yes"))


def test_model_without_a_yes_or_one_that_was_edited_is_an_error(
    session: pipeline.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(self_judge, "_WORDS", {True: ("oui",), False: ("non",)})
        with pytest.raises(ModelError, match="no tokens of their own for yes and no"):
            open_self(as_loaded(session))
    undo = session.loaded.files.folder / FILE_NAME
    undo.write_bytes(b"")
    try:
        with pytest.raises(UsageError, match="expected an unedited model"):
            open_self(as_loaded(session))
    finally:
        undo.unlink()


# --- where it is bound


def test_evaluation_of_a_plan_is_judged_through_the_unedited_model(
    session: pipeline.Session, judging: planted.Planted
) -> None:
    """Of the ablated model's own answers none holds a bad word; the prompts do, and are part of what is read."""
    settings = EvalSettings(judge="self", max_new_tokens=6, no_control=True)
    part = pipeline.evaluate(session, settings, plan=session.plan(judging.direction[None]))
    assert part.judge is not None
    assert part.judge.name == "self"
    assert part.after is not None
    assert part.after.harmful.refusals == part.before.harmful.refusals > 0, "both are read through the same model"


def test_run_is_judged_by_the_weights_before_the_edit(judging: planted.Planted, tmp_path: Path) -> None:
    """The live model holds the edited weights when replies are judged; with those it would be an error."""
    settings = RunSettings(
        model=str(judging.folder),
        loading=ModelSettings(device="cpu"),
        prompts=spoken(judging),
        searching=SearchSettings(method="closed-form"),
        evaluating=EvalSettings(judge="self", max_new_tokens=6, no_control=True),
        output=OutputSettings(out=tmp_path / "out"),
    )
    evaluation = pipeline.run(settings).evaluation
    assert evaluation is not None
    assert evaluation.judge is not None
    assert evaluation.judge.fingerprint.startswith("self-")


def test_compared_models_are_all_judged_by_the_first(judging: planted.Planted) -> None:
    """The random direction takes something out of the second; what it says is read by the first as it was loaded."""
    measuring = MeasureSettings(
        loading=ModelSettings(device="cpu"),
        prompts=spoken(judging),
        evaluating=EvalSettings(judge="self", max_new_tokens=6),
    )
    part = compare([str(judging.folder), f"{judging.folder}+random"], measuring)
    assert part.judge.name == "self"
    first, second = (entry.behaviour for entry in part.entries)
    assert first.harmful.refusals == second.harmful.refusals > 0


def test_audit_of_a_model_under_hooks_is_judged_without_them(
    session: pipeline.Session, judging: planted.Planted
) -> None:
    judge = open_self(as_loaded(session))
    with session.changed(session.ablated(session.plan(judging.direction[None]))):
        assert labels(bind_judge(judge, as_loaded(session), Monitor()).judge(ASKED)) == EXPECTED


@pytest.mark.parametrize("spec", ["self", "auto"])
def test_engines_elsewhere_have_no_model_to_ask(spec: str, judging: planted.Planted) -> None:
    pending = open_judge(spec)
    with pytest.raises(UsageError, match=f"judge {spec}: it asks the model that is measured, and none is loaded here"):
        pending.judge(ASKED)
    assert isinstance(pending, PendingJudge)
    if spec == "self":
        engine, measuring = EngineSettings(engine="vllm"), MeasureSettings(evaluating=EvalSettings(judge=spec))
        with pytest.raises(UsageError, match="judge self: it asks the model that is measured"):
            pipeline.evaluate_elsewhere(str(judging.folder), engine, measuring)
    else:
        assert isinstance(bind_judge(pending, None, Monitor()), ChosenJudge)


def test_damaged_calibration_of_what_auto_chose_is_an_error_at_once() -> None:
    file = folder_of(choose(None, Monitor()).fingerprint) / "any.json"
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(AbliterateError, match="expected a calibration"):
        bind_judge(open_judge("auto"), None, Monitor())


def test_other_judges_are_bound_to_no_model(session: pipeline.Session) -> None:
    rules = RuleJudge()
    assert bind_judge(rules, as_loaded(session), Monitor()) is rules
    assert bind_judge(rules, None, Monitor()) is rules


# --- auto


class Scripted:
    """Is right on all exchanges but every `wrong`-th."""

    def __init__(self, name: str, wrong: int) -> None:
        self.name, self.fingerprint, self.wrong, self.asked = name, name, wrong, 0

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.asked += len(exchanges)
        right = [(BAD in exchange.reply) != (i % self.wrong == 0) for i, exchange in enumerate(exchanges)]
        return [Verdict(Label.EVASION if refused else Label.COMPLIANCE) for refused in right]


class Notes(Monitor):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_better_reader_is_chosen_and_said(order: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    judges = [Scripted("poor", 2), Scripted("fine", 12)]
    monkeypatch.setattr(auto, "READERS", [functools.partial(judges.__getitem__, i) for i in order])
    notes = Notes()
    chosen = choose(None, notes)
    assert (chosen.name, chosen.fingerprint) == ("fine", "fine")
    assert len(notes.notes) == 1
    assert notes.notes[0].startswith("judge auto: fine (balanced accuracy")
    assert "poor 50 % [" in notes.notes[0]
    part = judge_part(chosen)
    assert [(one.name, sum(one.recall), sum(one.specificity)) for one in part.chosen][order.index(1)][0] == "fine"
    assert re.search(r"Judge: fine, chosen by balanced accuracy \(.*poor 50 % \[\d+, \d+\]", judged_by(part))
    assert "chosen" not in judged_by(judge_part(judges[0])), "control: a judge that was named"
    asked = [judge.asked for judge in judges]
    assert choose(None, notes).measured == chosen.measured
    assert [judge.asked for judge in judges] == asked, "what was measured is kept"


def test_model_is_chosen_only_where_it_is_better_by_more_than_its_interval(
    session: pipeline.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is right on all twelve: enough to beat a coin, not to beat a judge that errs once in twelve."""
    for wrong, expected in ((2, "self"), (12, "reader")):
        reader = Scripted("reader", wrong)
        reader.fingerprint += str(wrong)
        monkeypatch.setattr(auto, "READERS", (lambda reader=reader: reader,))
        chosen = choose(as_loaded(session), Monitor())
        assert chosen.name == expected
        assert [one.name for one in chosen.measured] == ["reader", "self"]
        assert chosen.measured[1].recall == Share(6, 6)


def test_sample_grows_until_it_is_clear_which_is_better(
    session: pipeline.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "SAMPLES", (1, 2, 3, 6))
    seen = []
    for wrong in (2, 12):
        reader = Scripted("reader", wrong)
        reader.fingerprint += str(wrong)
        monkeypatch.setattr(auto, "READERS", (lambda reader=reader: reader,))
        monkeypatch.setattr(auto, "_known", lambda *_: None)
        seen.append(choose(as_loaded(session), Monitor()).measured[1].n)
    assert seen[0] < seen[1] == 12
    monkeypatch.setattr(auto, "PATIENCE", -1.0)
    assert choose(as_loaded(session), Monitor()).measured[1].n == 2


def test_model_that_cannot_judge_is_left_out(session: pipeline.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_judge, "_WORDS", {True: ("oui",), False: ("non",)})
    notes = Notes()
    assert len(choose(as_loaded(session), notes).measured) == len(auto.READERS)
    assert any("leaves the model out" in note for note in notes.notes)


def test_early_stop_makes_rules_of_auto(session: pipeline.Session) -> None:
    part = pipeline.evaluate(session, EvalSettings(judge="auto", early_stop=True, max_new_tokens=4))
    assert part.judge is not None
    assert (part.judge.name, part.judge.chosen) == ("rules", [])


def test_no_verdict_is_a_wrong_one() -> None:
    class Silent(Scripted):
        def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
            return [Verdict(Label.UNKNOWN)] * len(exchanges)

    found = auto._measure(Silent("silent", 1), rows("hold"))
    assert (found.recall, found.specificity, found.balanced) == (Share(0, 6), Share(0, 6), 0.0)


def test_interval_of_the_balanced_accuracy_holds_both_shares() -> None:
    found = Measured("one", Share(90, 100), Share(45, 50))
    assert found.balanced == pytest.approx(0.9)
    low, high = found.ci95
    assert 0.82 < low < 0.85
    assert 0.92 < high < 0.95
    assert Measured("all", Share(5, 5), Share(5, 5)).ci95[1] == 1.0


def test_shipped_exchanges_are_drawn_evenly_and_always_alike() -> None:
    drawn = clear_exchanges("fit", 16)
    assert [row.refused for row in drawn] == [True] * 16 + [False] * 16
    assert {row.split for row in drawn} == {"fit"}
    assert set(drawn) < set(clear_exchanges("fit"))
    assert all((row.label is Label.COMPLIANCE) != row.refused for row in clear_exchanges("hold"))
