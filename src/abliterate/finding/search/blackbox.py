"""Black-box search: Optuna proposes edits, few prompts sort out the hopeless, all of them score the rest.

What first tokens tell of objectives that need replies: `SURROGATES`. Replies themselves are generated later, for the
front of what is returned here.

Every trial draws from a seed of its own, made of the search's seed and the number of trials before it. So a search that
is killed and resumed proposes what it would have proposed undisturbed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from abliterate.config import SearchSettings
from abliterate.edit.direction import Direction
from abliterate.errors import CheckpointError, NumericalError, UsageError
from abliterate.evaluation.probe import Level
from abliterate.files.atomic import write_atomically
from abliterate.files.bounded import MB, Kind, check_plain
from abliterate.files.portable import NO_LINK, NO_WAIT, is_own, lock, open_file
from abliterate.finding.search.points import Point
from abliterate.finding.search.space import Space
from abliterate.monitor import ranks

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial

#: What is known of an edit at a level: objectives (and constrained ones) by name.
Measure = Callable[[Direction, Level], Mapping[str, float]]

#: What stands for an objective that only replies can tell.
SURROGATES: Mapping[str, str] = {
    "refusals": "refusal-score",
    "over-refusals": "over-refusal-score",
    **dict.fromkeys(("kl-reply", "nll", "degenerate", "length", "repetition"), "kl"),
}

#: Trials measured on all prompts before any is given up on few: the noise of few prompts is learnt from them.
WARM_UP = 8
#: A trial is given up when in every objective it is worse by this share …
WORSE = 0.25
#: … and by so many standard deviations of the difference of two trials on few prompts.
BEYOND = 2.0

_JOURNAL = Kind("the trials of a search", 512 * MB, todo="give another OUT, or delete it")
_STUDY = "search"


@dataclass(frozen=True, slots=True)
class Seen:
    """Objective values of an earlier trial on few prompts, and on all unless it was given up."""

    few: tuple[float, ...]
    all: tuple[float, ...] | None
    feasible: bool = True


@dataclass(frozen=True, slots=True)
class Journal:
    """A file that holds every step of a search at once. With `resume` the search that was begun there goes on.

    It must have been begun with the same space, settings and `facts` (the caller's: model, prompts); more trials may be
    asked for than then.
    """

    path: Path
    resume: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def trials_in(path: Path, *, resume: bool) -> Iterator[Journal]:
    """The trials of a search at `path`, where older ones are gone on with or removed.

    Of several processes the one that leads keeps them there; the others keep theirs for as long as the search lasts.
    """
    if ranks.leads():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
    before = ranks.agreed(_JOURNAL.text(path) if resume and ranks.leads() and ranks.count() > 1 else "")
    if ranks.leads():
        yield Journal(path, resume)
        return
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / path.name
        if resume:
            write_atomically(own, before)
        yield Journal(own, resume)


def optimise(
    measure: Measure,
    space: Space,
    settings: SearchSettings,
    *,
    seed: int,
    journal: Journal | None = None,
    seeds: Sequence[Mapping[str, Any]] = (),
    constraints: Mapping[str, float] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Point]:
    """Run `settings.trials` trials to make `first_token_objectives` small, and return them in order.

    A trial that gives no finite numbers counts, but is not among them.

    Each is measured at `Level.FEW`. One that is `hopeless` keeps these values, and its point says so by its level;
    all others are measured at `Level.ALL`. Samplers are told both alike: the means estimate the same, and a value of
    few prompts is only told where it is beaten by more than its noise, so it shows where not to look and nothing else.

    `constraints` are the most that values known at these levels may be. `seeds` are the parameters of the first trials
    (see `Space.encode`).

    Raises `UsageError` without Optuna, for a journal of another search or one in use, and for objectives that first
    tokens do not tell; `CheckpointError` for a damaged journal.
    """
    _require_optuna()
    names, limits = first_token_objectives(settings.objectives), dict(constraints or {})
    said = {
        "objectives": names,
        "constraints": limits,
        "sampler": _sampler_name(settings),
        "seed": seed,
        "refined": [settings.points, settings.steps, settings.keep_direction] if space.extra else [],
        **space.describe(),
        **({} if journal is None else journal.facts),
    }
    with _quiet(), _storage(journal) as storage:
        study = _study(storage, len(names), said, journal)
        progress(len(_done(study)))
        for number in range(len(_done(study)), settings.trials):
            study.sampler = _sampler(settings, seed, number)
            _run(study, measure, space, names, limits, seeds[number] if number < len(seeds) else None)
            progress(1)
        return list(_points(study, space))


def first_token_objectives(objectives: str) -> list[str]:
    """What stands for comma-separated objectives as long as there are no replies, each once."""
    names = (name.strip() for name in objectives.split(",") if name.strip())
    return list(dict.fromkeys(SURROGATES.get(name, name) for name in names))


def hopeless(few: Sequence[float], seen: Sequence[Seen]) -> bool:
    """Whether some feasible earlier trial beats these values on the same few prompts beyond doubt, in every objective.

    That is by `WORSE` of its value, and by `BEYOND` times √2 σ, where σ is how much the step from few prompts to all
    moves trials against each other (median absolute deviation, as σ of a normal distribution): what moves all alike
    changes no order. Nothing is hopeless before `WARM_UP` trials were measured on all prompts.
    """
    known = [(one.few, one.all) for one in seen if one.all is not None]
    if len(known) < WARM_UP:
        return False
    moved = [[after[i] - before[i] for before, after in known] for i in range(len(few))]
    noise = [BEYOND * math.sqrt(2) * _deviation(values) for values in moved]

    def beats(other: Sequence[float]) -> bool:
        return all(
            value > best + max(WORSE * abs(best), doubt) for value, best, doubt in zip(few, other, noise, strict=True)
        )

    return any(beats(one.few) for one in seen if one.feasible)


def _deviation(values: Sequence[float]) -> float:
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def _run(
    study: Study,
    measure: Measure,
    space: Space,
    names: Sequence[str],
    limits: Mapping[str, float],
    start: Mapping[str, Any] | None,
) -> None:
    """One trial. What it gives is in the journal before the sampler is told, as one attribute."""
    from optuna.trial import TrialState

    if start is not None and not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.enqueue_trial(dict(start))
    trial = study.ask()
    # Asked for before any parameter: NSGA-II counts a trial with given parameters to no generation otherwise.
    _ = trial.relative_params
    try:
        few, scores = _measure(measure, space.suggest(trial), names, _seen(study, names, limits))
    except NumericalError as error:
        trial.set_user_attr("broken", str(error))
        study.tell(trial, state=TrialState.FAIL)
        return
    trial.set_user_attr("few", few)
    if scores is not None:
        trial.set_user_attr("all", scores)
    values = few if scores is None else scores
    _constrain(trial, values, limits)
    study.tell(trial, [values[name] for name in names])


def _measure(
    measure: Measure, direction: Direction, names: Sequence[str], seen: Sequence[Seen]
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Values on few prompts, and on all unless these are hopeless."""
    few = _finite(measure(direction, Level.FEW), names)
    if hopeless([few[name] for name in names], seen):
        return few, None
    return few, _finite(measure(direction, Level.ALL), names)


def _finite(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    for name in names:
        if name not in values:
            raise UsageError(f"--objectives {name}: expected one that first tokens tell, found none of them does")
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise NumericalError(f"{bad[0]}: expected a finite number, found {values[bad[0]]}")
    return {name: float(value) for name, value in values.items()}


def _constrain(trial: OptunaTrial, values: Mapping[str, float], limits: Mapping[str, float]) -> None:
    for name, most in limits.items():
        if name in values:
            trial.set_constraint(name, values[name] - most)


def _done(study: Study) -> list[FrozenTrial]:
    """Finished trials in order. A trial that was killed is none."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.values is not None or "broken" in trial.user_attrs]


def _seen(study: Study, names: Sequence[str], limits: Mapping[str, float]) -> list[Seen]:
    def row(values: Mapping[str, float] | None) -> tuple[float, ...] | None:
        return None if values is None else tuple(values[name] for name in names)

    found = []
    for attributes in (trial.user_attrs for trial in _done(study)):
        few = attributes.get("few")
        if few is not None and (values := row(few)) is not None:
            feasible = all(few[name] <= most for name, most in limits.items() if name in few)
            found.append(Seen(values, row(attributes.get("all")), feasible))
    return found


def _points(study: Study, space: Space) -> Iterator[Point]:
    from optuna.trial import FixedTrial

    for number, trial in enumerate(_done(study), 1):
        if trial.values is None:
            continue
        scores, level = trial.user_attrs["few"], Level.FEW
        if "all" in trial.user_attrs:
            scores, level = trial.user_attrs["all"], Level.ALL
        yield Point(space.suggest(FixedTrial(trial.params)), f"trial {number}", scores, level)


def _sampler_name(settings: SearchSettings) -> str:
    return "random" if settings.method == "random" else settings.sampler


def _sampler(settings: SearchSettings, seed: int, number: int) -> BaseSampler:
    """The sampler of one trial: all that it knows is in the study, so each trial has a new one."""
    from optuna import samplers

    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    match _sampler_name(settings):
        case "random":
            return samplers.RandomSampler(seed=own)
        case "nsga2":  # at least five generations
            return samplers.NSGAIISampler(population_size=min(max(settings.trials // 5, 4), 50), seed=own)
    start = min(max(settings.trials // 4, 4), 10)
    return samplers.TPESampler(n_startup_trials=start, multivariate=True, constant_liar=False, seed=own)


def _study(storage: BaseStorage | None, objectives: int, said: Mapping[str, Any], journal: Journal | None) -> Study:
    """The study, new or as the journal has it. What was running when it was killed counts as failed."""
    import optuna
    from optuna.trial import TrialState

    study = optuna.create_study(
        storage=storage, study_name=_STUDY, directions=["minimize"] * objectives, load_if_exists=True
    )
    said = json.loads(json.dumps(said))
    if "said" not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr("said", said)
    begun_with = study.user_attrs.get("said") or {}
    if not isinstance(begun_with, dict):
        raise CheckpointError(f"'{journal and journal.path}': damaged, it does not say what was searched; delete it")
    _refuse_another(begun_with, said, journal)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _refuse_another(old: Mapping[str, Any], new: Mapping[str, Any], journal: Journal | None) -> None:
    for name in (*new, *old):
        if old.get(name) != new.get(name):
            path = journal and journal.path
            raise UsageError(
                f"--resume: expected the search that '{path}' was begun with, found {name} {new.get(name)} "
                f"instead of {old.get(name)}; give the same options, or another OUT"
            )


@contextlib.contextmanager
def _storage(journal: Journal | None) -> Iterator[BaseStorage | None]:
    """The journal as a storage; nothing (memory) without one. It is locked for as long as it is used."""
    if journal is None:
        yield None
        return
    path = journal.path
    if path.exists() and not journal.resume:
        raise UsageError(f"'{path}': a search was begun here; go on with --resume, or give another OUT")
    with _locked(path):
        _mend(path)
        yield _opened(path)


@contextlib.contextmanager
def _locked(journal: Path) -> Iterator[None]:
    """A lock that ends with the process, however that ends."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_file(journal, os.O_RDWR | os.O_CREAT | NO_LINK | NO_WAIT, 0o644)
    except OSError as error:
        raise CheckpointError(f"'{journal}': cannot be written ({error.strerror})") from error
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or not is_own(about) or about.st_nlink > 1:
            raise CheckpointError(f"'{journal}': expected a file of this user alone, found another; give another OUT")
        try:
            lock(descriptor)
        except BlockingIOError as error:
            raise UsageError(f"'{journal}': another search is writing it; wait for it, or give another OUT") from error
        yield
    finally:
        os.close(descriptor)


def _mend(journal: Path) -> None:
    """Cut off a last line that was being written when its process was killed; the next would be written behind it.

    Raises `CheckpointError` for any other line that is not JSON.
    """
    data = _JOURNAL.read(journal)
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            check_plain(entry, texts=False)  # Optuna's own reader goes no deeper than Python does
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or "op_code" not in entry:
            raise CheckpointError(f"'{journal}': damaged in line {number}; give another OUT, or delete it")
    if len(whole) < len(data):
        os.truncate(journal, len(whole))


def _opened(journal: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Held(JournalFileOpenLock):
        """The lock is held already, for longer. Optuna's own outlives a process that is killed."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    try:
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=Held(str(journal))))
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise CheckpointError(f"'{journal}': damaged, it cannot be replayed; give another OUT, or delete it") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Optuna says of itself."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UsageError("--method black-box: it needs an extra; pip install 'abliterate[search]'") from error
