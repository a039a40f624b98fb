"""How often a judge is right: labelled replies → a table of errors, kept by judge, model and set of prompts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from abliterate.config import cache_folder
from abliterate.errors import AbliterateError, CheckpointError, UsageError
from abliterate.evaluation.judging.base import Judge, Label, Verdict
from abliterate.evaluation.judging.drift import Profile, bin_of
from abliterate.evaluation.judging.labelled import Labelled, read_labelled, source_hash
from abliterate.evaluation.statistics import Estimate, Share, rogan_gladen
from abliterate.files.atomic import write_atomically
from abliterate.files.bounded import MB, Kind
from abliterate.record import CalibrationPart, finite

#: Which set of prompts replies answer; "" for a mixture.
SetName = Literal["harmful", "harmless", "borderline", ""]

_Count = Annotated[int, Field(ge=0, lt=2**53, strict=True)]

#: What a calibration says of how often a judge is right, each with an interval.
FIGURES = ("accuracy", "precision", "recall", "specificity")

_BUILTIN = "calibrations.json"
_STORED = Kind("a calibration", MB, AbliterateError, "delete it and calibrate again")


class Calibration(BaseModel):
    """What a judge called replies that people have labelled.

    Two-way figures count a partial refusal as refused, degenerate text and compliance as not. A reply left without
    a verdict (`unknown`) is wrong in `accuracy` and has no part in the other figures, which speak of judged replies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    judge: str = Field(description="How a user names the judge.")
    fingerprint: str = Field(description="The state of the judge that was calibrated.")
    source: str = Field(description="Name of the file of labelled replies.")
    source_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    model: str = Field("", description="Whose replies they are; empty of several models or unknown ones.")
    prompts: SetName = Field("", description="Which set of prompts they answer; empty of a mixture.")
    two_way: bool = Field(description="The labels say refused or not, no more.")
    confusion: dict[Label, dict[Label, _Count]] = Field(
        description="Replies by true label, then by what the judge called them."
    )
    profile: Profile = Field(description="What the replies look like, to compare others with.")

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if Label.UNKNOWN in self.confusion:
            raise ValueError("no reply is truly unknown")
        if not self.n:
            raise ValueError("expected at least one labelled reply")
        return self

    @property
    def n(self) -> int:
        """Labelled replies."""
        return self._count((True, False), (True, False, None))

    @property
    def unknown(self) -> int:
        """Replies that the judge gave no verdict on."""
        return self._count((True, False), (None,))

    @property
    def accuracy(self) -> Share:
        """Right among all, two-way."""
        return Share(self._count((True,), (True,)) + self._count((False,), (False,)), self.n)

    @property
    def precision(self) -> Share:
        """Refusals among what was called one."""
        return Share(self._count((True,), (True,)), self._count((True, False), (True,)))

    @property
    def recall(self) -> Share:
        """Called a refusal among the refusals that were judged: the sensitivity."""
        return Share(self._count((True,), (True,)), self._count((True,), (True, False)))

    @property
    def specificity(self) -> Share:
        """Called none among the replies that are none and were judged."""
        return Share(self._count((False,), (False,)), self._count((False,), (True, False)))

    def corrected(self, refusals: float, n: float, widening: float = 0.0) -> Estimate | None:
        """The true rate behind `refusals` called among `n` (effective) judged replies; None where nobody can say.

        It holds where the judge errs as often as on the labelled replies. About a share `widening` of the replies the
        judge may be wrong throughout: both ends of the interval move out by so much.
        """
        found = rogan_gladen(refusals, n, self.recall, self.specificity)
        if found is None or not widening:
            return found
        low, high = found.ci95
        return Estimate(found.value, (max(0.0, low - widening), min(1.0, high + widening)))

    def _count(self, true: Sequence[bool], called: Sequence[bool | None]) -> int:
        rows = [row for label, row in self.confusion.items() if _refused(label) in true]
        return sum(k for row in rows for label, k in row.items() if _refused(label) in called)


def _refused(label: Label) -> bool | None:
    verdict = Verdict(label)
    return verdict.refused if verdict.given else None


def compare(
    judge: Judge,
    labelled: Labelled,
    verdicts: Sequence[Verdict],
    source: Path,
    *,
    model: str = "",
    prompts: SetName = "",
) -> Calibration:
    """The calibration that follows from the verdicts of `judge`, one for each labelled reply (else ValueError).

    `source` is the file that the labelled replies came from, `model` whose replies to which set of `prompts` they are.
    """
    confusion: dict[Label, dict[Label, int]] = {
        label: dict.fromkeys(Label, 0) for label in Label if label in labelled.labels
    }
    for label, verdict in zip(labelled.labels, verdicts, strict=True):
        confusion[label][verdict.label] += 1
    return Calibration(
        judge=judge.name,
        fingerprint=judge.fingerprint,
        source=source.name,
        source_sha256=source_hash(source),
        model=model,
        prompts=prompts,
        two_way=labelled.two_way,
        confusion=confusion,
        profile=_profile(labelled, verdicts),
    )


def _profile(labelled: Labelled, verdicts: Sequence[Verdict]) -> Profile:
    bins: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for label, verdict, exchange in zip(labelled.labels, verdicts, labelled.exchanges, strict=True):
        truth = _refused(label)
        if truth is not None and verdict.given:
            bins[truth][bin_of(verdict, exchange.reply)] += 1
    return Profile(refused=dict(bins[True]), answered=dict(bins[False]))


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: a hub id and a folder are the same by their last part, whatever the case."""
    return _short(one) == _short(other)


def _short(model: str) -> str:
    return model.rstrip("/\\").replace("\\", "/").rpartition("/")[2].casefold().removesuffix(".gguf")


def folder_of(fingerprint: str) -> Path:
    """Where the calibrations of a judge in this state are kept."""
    return cache_folder() / "judges" / hashlib.sha256(fingerprint.encode()).hexdigest()


def place(calibration: Calibration) -> Path:
    """The file of a calibration: one for each judge in its state, model, and set of prompts."""
    key = f"{_short(calibration.model)}\n{calibration.prompts}"
    return folder_of(calibration.fingerprint) / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def store(calibration: Calibration) -> Path:
    """Keep a calibration, in place of an earlier one of the same judge, model and set of prompts.

    The file is whole or not there at all. Raises AbliterateError where it cannot be written.
    """
    path = place(calibration)
    try:
        write_atomically(path, calibration.model_dump_json(indent=1) + "\n", private=True)
    except CheckpointError as error:
        raise AbliterateError(f"calibration {error}; set ABLITERATE_CACHE to a folder that can be") from error
    return path


def calibrate(judge: Judge, path: Path, model: str | None, prompts: str | None) -> CalibrationPart:
    """Measure a judge on the labelled replies of a file (see `of_whom` for the others), and keep the result."""
    model, of = of_whom(model, prompts)
    labelled = read_labelled(path)
    result = compare(judge, labelled, judge.judge(labelled.exchanges), path, model=model, prompts=of)
    return calibration_part(result, store(result))


def of_whom(model: str | None, prompts: str | None) -> tuple[str, SetName]:
    """The model and the set of prompts that a calibration is for; "" where that is not said."""
    if prompts not in (None, "harmful", "harmless", "borderline"):
        raise UsageError(f"--set {prompts[:60]}: expected harmful, harmless or borderline")
    if prompts is not None and model is None:
        raise UsageError("--set: expected --model with it")
    return model or "", cast("SetName", prompts or "")


def calibration_part(calibration: Calibration, stored: Path | None = None) -> CalibrationPart:
    """The calibration as it is printed; `stored` is the file it was written to."""
    shares: dict[str, Share] = {name: getattr(calibration, name) for name in FIGURES}
    figures: dict[str, Any] = {}
    for name, share in shares.items():
        figures |= {name: finite(share.value), f"{name}_ci95": share.ci95}
    return CalibrationPart(
        **calibration.model_dump(mode="json", exclude={"profile"}),
        **figures,
        n=calibration.n,
        unknown=calibration.unknown,
        counts={name: (share.k, share.n) for name, share in shares.items()},
        stored=None if stored is None else str(stored),
    )


def read(path: Path, fingerprint: str) -> Calibration:
    """A stored calibration. Raises AbliterateError when the file is damaged or of another judge or state."""
    found = _STORED.model(path, Calibration)
    if found.fingerprint != fingerprint:
        raise AbliterateError(
            f"calibration {path}: expected one of '{fingerprint}', found '{found.fingerprint}'; delete it and "
            "calibrate again"
        )
    return found


def own_calibrations(judge: Judge) -> list[Calibration]:
    """The user's own calibrations of a judge in its present state. Raises AbliterateError when one is damaged."""
    folder = folder_of(judge.fingerprint)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [read(folder / name, judge.fingerprint) for name in names if name.endswith(".json")]


def builtin_calibrations(judge: Judge) -> list[Calibration]:
    """The calibrations of a judge in its present state that come with the package."""
    return [found for found in _builtin() if found.fingerprint == judge.fingerprint]


def _builtin() -> list[Calibration]:
    text = resources.files("abliterate.evaluation.judging").joinpath(_BUILTIN).read_bytes()
    return TypeAdapter(list[Calibration]).validate_json(text)
