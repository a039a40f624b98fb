"""A judge by its name: `auto`, `rules`, `learnt`, `self`, `classifier:ID`, `llm:MODEL@URL`, or a preset."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from abliterate.errors import UsageError
from abliterate.evaluation.judging.auto import choose
from abliterate.evaluation.judging.base import Exchange, Judge, Label, ModelJudge, Verdict
from abliterate.evaluation.judging.calibration import own_calibrations
from abliterate.evaluation.judging.learnt import LearntJudge
from abliterate.evaluation.judging.led import led
from abliterate.evaluation.judging.rules import RuleJudge
from abliterate.evaluation.judging.scorers import scorer_of
from abliterate.monitor import Monitor
from abliterate.prompts.behaviour import Behaviour

if TYPE_CHECKING:
    from abliterate.evaluation.answering import ModelState

#: Classifiers of refusals on the hub whose input and labels are known.
PRESETS = {
    "minos": "classifier:NousResearch/Minos-v1?input=chat",
    "protectai": "classifier:ProtectAI/distilroberta-base-rejection-v1?input=reply",
}

_HARM = "it says whether a reply is harmful and not whether it refuses: every harmless answer would be a refusal"
_OF_HARM = dict.fromkeys(("harmbench", "llama-guard", "shieldgemma"), _HARM)


@dataclass(frozen=True, slots=True)
class PendingJudge:
    """`self` or `auto`, named before there is a model that could be asked; `bind_judge` makes the judge of it."""

    name: str

    @property
    def fingerprint(self) -> str:
        """That of no calibration."""
        return f"{self.name}, not bound to a model"

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Raises `UsageError`: there is nothing to ask."""
        raise self.refusal

    @property
    def refusal(self) -> UsageError:
        """What is said where no model is loaded."""
        return UsageError(
            f"judge {self.name}: it asks the model that is measured, and none is loaded here; give another --judge"
        )


def bind_judge(judge: Judge, state: ModelState | None, monitor: Monitor) -> Judge:
    """The judge that `self` or `auto` comes to with the model that is unedited in `state`; any other as it is.

    `state` is None where no model is loaded in this process. A judge that was bound before looks through the model in
    the state that is given now. Raises `UsageError` for `self` without a model, as `open_self` does, and
    `AbliterateError` where a calibration of the judge is damaged.
    """
    if isinstance(judge, PendingJudge):
        bound = choose(state, monitor) if judge.name == "auto" else _own(judge, state)
        own_calibrations(bound)  # a damaged one is an error now and not at the end
        return bound
    return judge.through(state) if isinstance(judge, ModelJudge) and state is not None else judge


def _own(judge: PendingJudge, state: ModelState | None) -> Judge:
    if state is None:
        raise judge.refusal
    from abliterate.evaluation.judging.self_judge import open_self

    return open_self(state)


@contextlib.contextmanager
def opening(spec: str | None, monitor: Monitor) -> Iterator[None]:
    """A phase for opening a judge that may have to be fetched; for any other nothing."""
    fetched = spec is not None and PRESETS.get(spec, spec).startswith("classifier:")
    with monitor.phase("open the judge") if fetched else contextlib.nullcontext():
        yield


def judge_of(behaviour: Behaviour, spec: str | None, *, device: str = "auto") -> Judge:
    """The judge that `spec` names, else that of the behaviour: whether a reply shows it.

    Raises what `open_judge` and `scorer_of` raise, and `UsageError` for a judge that can only tell refusals.
    """
    shows = behaviour.shows
    if spec is None and shows.judge is not None and "@http" in shows.judge:
        raise UsageError(
            f"behaviour {behaviour.name}: its file names a judge that is sent prompts and replies; give --judge "
            f"'{shows.judge}' where that is what you want"
        )
    spec = spec or shows.judge
    if spec is None:
        scorer = scorer_of(behaviour)
        assert scorer is not None  # the file names one or the other
        return scorer
    if shows.judge is None and not spec.startswith(("classifier:", "llm:")):
        raise UsageError(
            f"--judge {spec}: it tells refusals, and the behaviour is {behaviour.name}; leave it out, or give "
            "classifier:ID or llm:MODEL@URL"
        )
    if shows.rubric is not None or (shows.judge is None and spec.startswith("llm:")):
        return _asking(shows.rubric or f"Does the reply show this: {behaviour.description or behaviour.name}?", spec)
    return open_judge(spec, device=device)


def _asking(question: str, spec: str) -> Judge:
    from abliterate.evaluation.judging.llm import LlmJudge, rubric_of

    if not (match := re.fullmatch(r"llm:(.+?)@(https?://\S+)", spec)):
        raise UsageError(f"judge '{spec}': expected llm:MODEL@URL (http:// or https://)")
    model, url = match[1], match[2]
    return led(lambda: LlmJudge(model, url, rubric=rubric_of(question)))


def open_judge(spec: str, *, device: str = "auto", trust_remote_code: bool = False) -> Judge:
    """The judge that `spec` names, ready to judge.

    - `rules`: the built-in one, by phrases; `learnt`: the same, and a linear model where phrases find nothing.
    - `self` and `auto`: once `bind_judge` has given them a model.
    - `classifier:ID`: a sequence classifier of the hub or in a folder. `?input=reply` shows it the reply alone,
      `?input=chat` both in one text with role marks; `?refusal=LABEL_1` says what its labels mean, with any of
      refusal, partial, compliance, degenerate and unknown: `classifier:me/it?input=reply&refusal=LABEL_1`.
    - `llm:MODEL@URL`: a chat model behind an OpenAI-compatible URL, with the key in OPENAI_API_KEY. With
      `strongreject` instead of `llm` it is asked StrongREJECT's three questions.
    - `minos`, `protectai`: known classifiers (`PRESETS`).

    `device` and `trust_remote_code` are those of a classifier. Raises `UsageError` for any other name and for a
    judge whose extra is not installed, `ModelError` for a classifier that cannot be loaded.
    """
    kind, _, rest = PRESETS.get(spec, spec).partition(":")
    if why := _OF_HARM.get(spec.partition(":")[0].casefold()):
        raise UsageError(f"judge '{spec}': {why}; give another --judge")
    if spec == "rules":
        return RuleJudge()
    if spec == "learnt":
        return LearntJudge()
    if spec in ("self", "auto"):
        return PendingJudge(spec)
    if kind == "classifier" and rest:
        return led(lambda: _classifier(PRESETS.get(spec, spec), rest, device, trust_remote_code))
    if kind in ("llm", "strongreject") and (match := re.fullmatch(r"(.+?)@(https?://\S+)", rest)):
        from abliterate.evaluation.judging.llm import RUBRICS, LlmJudge

        model, url = match[1], match[2]
        return led(lambda: LlmJudge(model, url, rubric=RUBRICS[kind]))
    raise UsageError(
        f"judge '{spec}': expected auto, rules, learnt, self, {', '.join(PRESETS)}, classifier:ID, or llm:MODEL@URL or "
        "strongreject:MODEL@URL (http:// or https://)"
    )


def _classifier(spec: str, rest: str, device: str, trust_remote_code: bool) -> Judge:
    from abliterate.evaluation.judging.classifier import FORMS, ClassifierJudge

    model_id, _, query = rest.partition("?")
    try:
        options = parse_qs(query, strict_parsing=True) if query else {}
    except ValueError:
        raise UsageError(f"judge '{spec}': expected NAME=VALUE pairs joined by & after the ?") from None
    (form, *more) = options.pop("input", ["pair"])
    if more or form not in FORMS:
        raise UsageError(f"judge '{spec}': expected one input= of {', '.join(FORMS)}")
    if wrong := sorted(options.keys() - set(Label)):
        raise UsageError(f"judge '{spec}': expected input or one of {', '.join(Label)}, found '{wrong[0]}'")
    labels = {name: Label(meaning) for meaning, names in options.items() for name in names}
    return ClassifierJudge(model_id, form=form, labels=labels, device=device, trust_remote_code=trust_remote_code)
