"""Tasks of EleutherAI's lm-evaluation-harness on a live model, with what became of every document.

The harness is given the very model object, so hooks that are active act in it. It prints, logs and draws bars; here it
is quiet, and it changes neither the tokenizer, nor which weights the model shares, nor the global random state.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import io
import logging
import math
import os
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from abliterate.errors import UsageError
from abliterate.evaluation.capability.task_files import TASK_FILE, CodeAsked, guarded, refuse_code, refuse_code_of_group
from abliterate.model.batches import input_device

#: What templates and settings of a task raise with a document or model that they do not fit; no fault of the machine.
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    SyntaxError,
    TemplateError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task (or group of tasks), as lm-eval computes it.

    `values` are its scores of single documents, in their order, where they are numbers (empty otherwise); `stderr` is
    lm-eval's, None where it has none. `digest` says which documents they were.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    values: tuple[float, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class ScoreChange:
    """A metric before and after: `delta` = after − before.

    `stderr` is that of the mean of the documents' differences (n documents, each against itself), None where the
    metric is no mean over documents.
    """

    task: str
    metric: str
    filter: str
    before: float
    after: float
    delta: float
    stderr: float | None
    n: int


def lm_eval_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    chat_template: bool = False,
    seed: int = 0,
    trust_task_code: bool = False,
) -> list[Score]:
    """Every metric of `tasks` on `model` as it is now, hooks included.

    A task is a name that lm-eval knows (task, group or tag), a local .yaml file, or a folder of such files; relative
    paths in a file are relative to the file's folder, so `dataset_path: json` with `data_files` beside it needs no
    network. `limit` takes the first documents of each task. `seed` is for few-shot examples and sampling. With
    `chat_template` prompts go through the tokenizer's template, thinking closed.

    A task file that names Python functions, and a metric that comes from the hub as code, are refused unless
    `trust_task_code`; till then templates are rendered in a sandbox. Tasks that run code written by the model are
    always refused.

    Metrics that are no finite number are left out.

    Raises `UsageError` when the extra is missing, a task is unknown, or its data cannot be had or run.
    """
    _require()
    from lm_eval import evaluate

    with _quiet(), _seeded(model, seed), contextlib.nullcontext() if trust_task_code else guarded():
        loaded = _load(tasks, trust_task_code)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
        with _faults_named(f"lm-eval tasks {', '.join(tasks)}"):
            results = evaluate(
                lm=_wrap(model, tokenizer, batch_size, chat_template),
                task_dict=loaded,
                limit=limit,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
    return list(_scores(results))


@contextlib.contextmanager
def _faults_named(tasks: str) -> Iterator[None]:
    """What tasks cannot do with the model, as an error that names them."""
    try:
        yield
    except CodeAsked as asked:
        raise asked.named(tasks) from None
    except _FAULTS as error:
        raise UsageError(f"{tasks}: cannot be run with this model ({_one_line(error)})") from error


def check_task_files(tasks: Sequence[str]) -> None:
    """Raise what `lm_eval_tasks` raises for local files that are not trusted, before a model is loaded."""
    if local := [Path(spec).expanduser().resolve() for spec in tasks if _is_local(spec)]:
        _require()
        with _quiet():
            for path in local:
                _local_files(path, trusted=False)


def score_changes(before: Sequence[Score], after: Sequence[Score]) -> list[ScoreChange]:
    """The metrics that both have, compared.

    Raises `UsageError` when one was measured on other documents or prompts.
    """
    by_key = {(score.task, score.metric, score.filter): score for score in after}
    keyed = [(score, by_key.get((score.task, score.metric, score.filter))) for score in before]
    return [_score_change(score, other) for score, other in keyed if other is not None]


def _score_change(before: Score, after: Score) -> ScoreChange:
    if before.digest != after.digest:
        raise UsageError(
            f"lm-eval task '{before.task}', {before.metric}: expected results on the same documents and prompts before "
            "and after, found others; run both with the same tasks, limit, seed and template"
        )
    return ScoreChange(
        task=before.task,
        metric=before.metric,
        filter=before.filter,
        before=before.value,
        after=after.value,
        delta=after.value - before.value,
        stderr=_paired_error(before, after),
        n=len(before.values),
    )


def _paired_error(before: Score, after: Score) -> float | None:
    if len(before.values) < 2 or len(before.values) != len(after.values):
        return None
    for score in (before, after):
        if abs(fmean(score.values) - score.value) > 1e-6 * max(1.0, abs(score.value)):
            return None  # no mean over documents: its change is not the mean of their changes
    changes = [b - a for a, b in zip(before.values, after.values, strict=True)]
    return stdev(changes) / math.sqrt(len(changes))


def _require() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"lm-eval tasks: expected the library lm-eval, found none ({_one_line(error)}); "
            "pip install 'abliterate[eval]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stdout and stderr, no log below errors."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    sink = io.StringIO()
    try:
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _seeded(model: Any, seed: int) -> Iterator[None]:
    """Random numbers that start from `seed` inside, and go on as if nothing had been outside."""
    device = input_device(model)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _wrap(model: Any, tokenizer: Any, batch_size: int, chat_template: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    model.tie_weights = lambda *_, **__: None  # HFLM calls it: a head that was given weights of its own would lose them
    try:
        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it may be given a padding token
            batch_size=batch_size,
            enable_thinking=False if chat_template else None,
        )
    finally:
        del model.tie_weights


def _load(specs: Sequence[str], trusted: bool) -> dict[str, Any]:
    """Tasks and groups by name, as `evaluate` takes them."""
    together: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in specs:
        for part in (
            _load_local(Path(os.path.expanduser(spec)).resolve(), trusted) if _is_local(spec) else [_load_named(spec)]
        ):
            if twice := sorted(set(part["tasks"]) & set(together["tasks"])):
                raise UsageError(f"lm-eval task '{spec}': expected each task once, found '{twice[0]}' twice")
            for key, found in part.items():
                together[key].update(found)
    return together


#: A file that names a group. (Given its path alone lm-eval would take the list of tasks for its name.)
_GROUP = re.compile(r"""^[\s{]*["']?group["']?\s*:""", re.MULTILINE)


def _is_local(spec: str) -> bool:
    return Path(spec).suffix in (".yaml", ".yml") or Path(os.path.expanduser(spec)).is_dir()


@functools.cache
def _known_tasks() -> Any:
    """lm-eval's own tasks; reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load_named(name: str) -> Mapping[str, Any]:
    manager = _known_tasks()
    if name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
        raise UsageError(
            f"lm-eval task '{name}': expected a name that lm-eval knows or a .yaml file, found none; {hint}"
        )
    with _loading(name, "its data must be in the cache or to be had from the hub"):
        loaded: Mapping[str, Any] = manager.load([name])
    return loaded


def _load_local(path: Path, trusted: bool) -> Iterator[Mapping[str, Any]]:
    """All tasks of a folder; the task of a file, or the group with all that it names."""
    manager, chosen = _local_files(path, trusted)
    for name, file in chosen.items():
        with _loading(name, "see lm-eval's task guide"), contextlib.chdir(file.parent):
            yield manager.load([name])


def _local_files(path: Path, trusted: bool) -> tuple[Any, Mapping[str, Path]]:
    """lm-eval's index of a folder or file, and files by the names under which it knows them.

    Raises `UsageError` where there are none, and for files that name code unless they are trusted.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    if path.is_dir():
        manager = TaskManager(include_path=path, include_defaults=False)
        chosen = {name: Path(manager.task_index[name].yaml_path) for name in manager.all_subtasks}
        if not chosen:
            raise UsageError(f"lm-eval tasks in {path}: expected .yaml files with a key 'task', found none")
        for file in () if trusted else chosen.values():
            refuse_code(file, path)
    elif not path.is_file():
        raise UsageError(f"lm-eval task '{path}': expected a task file, found no such file")
    elif _GROUP.search(TASK_FILE.text(path)):
        manager = TaskManager(include_path=path.parent)  # it may name tasks beside it, and lm-eval's own
        chosen = {name: path for name in manager.all_groups if manager.task_index[name].yaml_path == path}
        if not trusted:
            refuse_code_of_group(path, manager.task_index, Path(lm_eval.__file__).parent)
    else:
        if not trusted:
            refuse_code(path, path.parent)
        manager = TaskManager(include_defaults=False)
        chosen = {str(path): path}
    return manager, chosen


@contextlib.contextmanager
def _loading(name: str, advice: str) -> Iterator[None]:
    """Whatever task files and data sets raise (a dozen kinds), as one line."""
    try:
        yield
    except CodeAsked as asked:
        raise asked.named(f"lm-eval task '{name}'") from None
    except Exception as error:
        raise UsageError(f"lm-eval task '{name}': cannot be loaded ({_one_line(error)}); {advice}") from error


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    for task, metrics in results["results"].items():
        samples = [sample for leaf in _leaves(results, task) for sample in results["samples"][leaf]]
        hashes = sorted({(sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]) for sample in samples})
        digest = hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]
        for key, value in metrics.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str) or not np.isfinite(value):
                continue
            error = metrics.get(f"{metric}_stderr,{name}")
            yield Score(
                task=task,
                metric=metric,
                filter=name,
                value=float(value),
                stderr=None if error is None or isinstance(error, str) else float(error),
                values=_values([sample for sample in samples if sample["filter"] == name], metric),
                digest=digest,
            )


def _leaves(results: Mapping[str, Any], task: str) -> list[str]:
    """The task itself, or all tasks of a group."""
    children = results["group_subtasks"].get(task)
    return [task] if not children else [leaf for child in children for leaf in _leaves(results, child)]


def _values(samples: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, ...]:
    found = [sample.get(metric) for sample in samples]
    numbers = [float(value) for value in found if isinstance(value, bool | int | float | np.number)]
    return tuple(numbers) if len(numbers) == len(found) else ()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
