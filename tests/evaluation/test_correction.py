"""Which calibration corrects a rate, whether the replies at hand look like its own, and what is said of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from abliterate.evaluation.judging import Exchange, Label, RuleJudge, Verdict
from abliterate.evaluation.judging.calibration import Calibration, SetName, store
from abliterate.evaluation.judging.correction import choose_calibration
from abliterate.evaluation.judging.drift import Profile, bin_of, bins_of, distance, drift
from abliterate.evaluation.parts import behaviour_part, corrections_of, judge_part
from abliterate.evaluation.results import Answers
from abliterate.model.generation import Reply
from abliterate.prompts import load_behaviour
from abliterate.report.wording import drifted, judged_by

SETS = ("harmful", "harmless", "borderline")
SHORT, LONG = "I made it.", "This is how it is made: " + "stir it once more. " * 40
SORRY = "I'm sorry, but I can't help with that."
SERMON = "It is never right to do that to anybody. " * 2


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_CACHE", str(tmp_path / "cache"))


class Scripted:
    name, fingerprint = "scripted", "scripted-1"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        raise NotImplementedError


def calibration(
    refused: Mapping[str, int],
    answered: Mapping[str, int],
    model: str = "",
    prompts: SetName = "",
    source: str = "x.csv",
) -> Calibration:
    hits = sum(k for name, k in refused.items() if not name.startswith("answer"))
    right = sum(k for name, k in answered.items() if name.startswith("answer"))
    return Calibration(
        judge="scripted",
        fingerprint="scripted-1",
        source=source,
        source_sha256="ab" * 32,
        model=model,
        prompts=prompts,
        two_way=True,
        confusion={
            Label.REFUSAL: {Label.REFUSAL: hits, Label.COMPLIANCE: sum(refused.values()) - hits},
            Label.COMPLIANCE: {Label.REFUSAL: sum(answered.values()) - right, Label.COMPLIANCE: right},
        },
        profile=Profile(refused=dict(refused), answered=dict(answered)),
    )


REFUSED = {"refusal": 80, "evasion, longer": 20, "answer, longer": 10}
ANSWERED = {"answer, longer": 70, "answer, under 200 characters": 30, "evasion, longer": 5}


# --- drift


def test_bins_say_what_was_called_and_how_long_answers_are() -> None:
    refusal, answer = Verdict(Label.REFUSAL), Verdict(Label.COMPLIANCE)
    assert bin_of(refusal, SORRY) == bin_of(refusal, SORRY * 20) == "refusal"
    assert len({bin_of(answer, "word " * count) for count in (2, 30, 80, 200)}) == 4
    assert bin_of(answer, "对不起，我不能帮助你。") == "answer, other script"
    assert bin_of(Verdict(Label.PARTIAL), LONG) == bin_of(Verdict(Label.EVASION), LONG) == "evasion, longer"
    silent = [Verdict(Label.UNKNOWN), Verdict(Label.CUT_OFF)]
    assert bins_of(silent, ["x", "y"]) == Counter(), "control: no verdict, no bin"


def drawn(profile: Profile, mixture: float, n: int, seed: int) -> Counter[str]:
    rng = np.random.default_rng(seed)
    found = Counter[str]()
    for counts, share in ((profile.refused, mixture), (profile.answered, 1 - mixture)):
        values = np.array(list(counts.values()), dtype=float)
        found.update(dict(zip(counts, rng.multinomial(round(n * share), values / values.sum()).tolist(), strict=True)))
    return found


@pytest.mark.parametrize("mixture", [0.0, 0.05, 0.5, 1.0])
def test_another_rate_of_refusals_is_no_drift(mixture: float) -> None:
    profile = Profile(refused=REFUSED, answered=ANSWERED)
    found = [drift(profile, drawn(profile, mixture, 100, seed), seed=seed) for seed in range(20)]
    assert all(one is not None for one in found)
    assert sum(one.p < 0.05 for one in found if one) <= 3
    assert all(one.widening == 0 for one in found if one and one.p >= 0.05)


def test_replies_of_another_kind_are_drift_and_the_interval_is_wider() -> None:
    known = calibration(REFUSED, ANSWERED)
    bins = drawn(known.profile, 0.5, 70, 1) + Counter({"answer, under 80 characters": 30})
    found = drift(known.profile, bins)
    assert found is not None
    assert found.p < 0.01
    assert found.unexplained == pytest.approx(0.3, abs=0.1)
    assert 0.15 < found.widening < found.unexplained
    plain, wide = known.corrected(30, 100), known.corrected(30, 100, found.widening)
    assert plain is not None
    assert wide is not None
    assert wide.value == plain.value
    assert wide.ci95[0] == pytest.approx(max(0, plain.ci95[0] - found.widening))
    assert wide.ci95[1] == pytest.approx(plain.ci95[1] + found.widening)


def test_few_replies_prove_no_drift_and_none_have_none() -> None:
    profile = Profile(refused=REFUSED, answered=ANSWERED)
    few = drift(profile, {"answer, under 80 characters": 1, "answer, longer": 3})
    assert few is not None
    assert few.widening == 0
    assert drift(profile, {}) is None
    assert distance(profile, {}) == 1.0
    assert distance(profile, {"broken": 5}) == pytest.approx(1)
    assert distance(profile, REFUSED) == pytest.approx(0)


# --- the choice


def test_own_calibration_of_the_model_and_set_is_taken_and_no_other_models() -> None:
    of: list[tuple[str, SetName]] = [("org/one", "harmful"), ("org/one", ""), ("org/two", "harmful"), ("org/two", "")]
    for model, prompts in of:
        store(calibration(REFUSED, ANSWERED, model, prompts, f"{model} {prompts}".strip()))
    judge = Scripted()

    def chosen(model: str, prompts: str) -> tuple[str, str]:
        found = choose_calibration(judge, model, prompts, {"refusal": 3})
        assert found is not None
        return found.calibration.source, found.why

    assert chosen("/models/One", "harmful") == (
        "org/one harmful",
        "your own, of this model's replies to harmful prompts",
    )
    assert chosen("org/one", "borderline") == ("org/one", "your own, of this model's replies")
    assert chosen("org/two", "harmful")[0] == "org/two harmful"
    assert chosen("org/three", "harmful")[1] == "the nearest of 4"


def test_of_other_models_the_nearest_is_taken() -> None:
    store(calibration(REFUSED, ANSWERED, "a", "harmful", "long"))
    store(calibration({"refusal": 50}, {"answer, under 80 characters": 50}, "b", "harmful", "short"))
    store(calibration({"refusal": 50}, {}, "c", "harmful", "refusals only"))
    for bins, expected in ((REFUSED, "long"), ({"answer, under 80 characters": 9, "refusal": 1}, "short")):
        found = choose_calibration(Scripted(), "d", "harmful", bins)
        assert found is not None
        assert (found.calibration.source, found.why) == (expected, "the nearest of 2")
    assert choose_calibration(RuleJudge(), "d", "harmful", REFUSED) is not None, "the package's own"


def test_a_calibration_of_one_model_does_not_replace_the_builtin_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    builtin = calibration(REFUSED, ANSWERED, source="builtin")
    monkeypatch.setattr("abliterate.evaluation.judging.calibration._builtin", lambda: [builtin])
    alone = choose_calibration(Scripted(), "m", "harmful", REFUSED)
    assert alone is not None
    assert (alone.calibration.source, alone.why) == ("builtin", "the only one there is")
    store(calibration({"refusal": 5, "broken": 5}, {"broken": 9}, "other", "", "mine"))
    found = choose_calibration(Scripted(), "m", "harmful", REFUSED)
    assert found is not None
    assert found.calibration.source == "builtin"


# --- in the record


def answers(verdict: Label, text: str, n: int = 40) -> Answers:
    prompts = tuple(f"prompt {i}" for i in range(n))
    return Answers(prompts, (Reply((1,), text, ended=True),) * n, (Verdict(verdict),) * n, (text,) * n)


def test_record_says_what_corrects_which_rate_and_what_is_unlike() -> None:
    answered = {"answer, longer": 100, "evasion, longer": 5}
    store(calibration(REFUSED, answered, "m", "harmful", "harmful.csv"))
    store(calibration(REFUSED, answered, "m", "", "any.csv"))
    before = {name: answers(Label.COMPLIANCE, LONG) for name in SETS}
    after = {**before, "borderline": answers(Label.COMPLIANCE, SHORT)}
    judge = Scripted()
    corrections = corrections_of(judge, "m", [before, after], load_behaviour("refusal"))
    part = judge_part(judge, corrections)
    assert [(one.rates, one.labels) for one in part.calibrations] == [
        (["harmful"], "harmful.csv"),
        (["harmless", "borderline"], "any.csv"),
    ]
    first, second = behaviour_part(before, corrections), behaviour_part(after, corrections)
    assert second.harmless == first.harmless
    assert second.borderline.drift is not None
    assert second.borderline.drift.unexplained == pytest.approx(1)
    assert second.borderline.corrected is not None
    assert (second.borderline.corrected.ci95[1] or 0) > 0.9
    said = drifted([("before", first, {}), ("after", second, {})])
    assert "borderline after (100 %, p 0.001: ±" in said
    assert "harmless after" not in said
    text = judged_by(part)
    assert (
        "harmful: finds 100/110 = 91 % of refusals, clears 100/105 = 95 % of other replies (harmful.csv; your own"
        in text
    )
    assert "harmless, borderline: finds" in text


def test_nothing_known_is_said_and_corrects_nothing() -> None:
    sets = {name: answers(Label.REFUSAL, SORRY) for name in SETS}
    judge = Scripted()
    corrections = corrections_of(judge, "m", [sets], load_behaviour("refusal"))
    assert corrections == {}
    part = behaviour_part(sets, corrections)
    assert part.harmful.corrected is None
    assert part.harmful.drift is None
    assert drifted([("", part, {})]) == ""
    assert "error rates are not known" in judged_by(judge_part(judge, corrections))
