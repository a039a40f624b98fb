"""How many questions a live model gets right: a letter by its probability, a number by greedy generation.

A model that an edit leaves able scores as before; hooks that are active now are measured with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from abliterate.errors import UsageError
from abliterate.evaluation.capability.arithmetic import final_number
from abliterate.evaluation.capability.choosing import WAYS, Way, encode
from abliterate.evaluation.capability.tasks import Choice, Problem, Task
from abliterate.evaluation.statistics import Estimate, mcnemar, paired_difference, wilson
from abliterate.model.batches import BatchSize
from abliterate.model.generation import complete
from abliterate.prompts.rendering import ChatRenderer


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a model answered to each item of a task, and which answers are right.

    `answers` are letters or numbers, "" where no number was found. `digest` is that of the task, `way` says how it was
    asked ("letter", "text", "number"), and `chance` is the accuracy of guessing.
    """

    name: str
    digest: str
    way: str
    answers: tuple[str, ...]
    correct: tuple[bool, ...]
    chance: float

    @property
    def accuracy(self) -> Estimate:
        """Share of right answers, with a 95 % Wilson interval."""
        right, n = sum(self.correct), len(self.correct)
        return Estimate(right / n, wilson(right, n))

    @property
    def above_chance(self) -> bool:
        """Whether accuracy is surely more than chance; a model that only guesses has nothing to lose by an edit."""
        return self.accuracy.ci95[0] > self.chance


@dataclass(frozen=True, slots=True)
class Change:
    """Results on the same items before and after.

    `lost` were right before only, `gained` after only. `difference` is after − before as a share of all items, with
    a 95 % interval for paired shares; `p` is McNemar's exact two-sided test of "as many lost as gained".
    """

    name: str
    n: int
    before: int
    after: int
    lost: int
    gained: int
    difference: Estimate
    p: float


def check(
    model: Any,
    renderer: ChatRenderer,
    tasks: Sequence[Task],
    size: BatchSize,
    progress: Callable[[int], None] | None = None,
    *,
    way: Way = "letter",
    max_new_tokens: int = 384,
) -> list[TaskResult]:
    """Ask all `tasks`, zero-shot through the chat template, in the state in which the model is now.

    `way` says how multiple choice is asked: see `choosing`. Arithmetic is generated greedily, at most
    `max_new_tokens` tokens; a reply that is cut off before it names its answer is wrong. `progress` is told how many
    more items are done.
    """
    results = []
    for task in tasks:
        choices = [item for item in task.items if isinstance(item, Choice)]
        problems = [item for item in task.items if isinstance(item, Problem)]
        if choices:
            chosen = WAYS[way](model, renderer, choices, size, progress)
            answers = tuple(ascii_uppercase[index] for index in chosen)
            correct = tuple(index == item.answer for index, item in zip(chosen, choices, strict=True))
            chance = fmean(1 / len(item.options) for item in choices)
            results.append(TaskResult(task.name, task.digest, way, answers, correct, chance))
        else:
            numbers = _numbers(model, renderer, problems, size, progress, max_new_tokens)
            answers = tuple("" if number is None else str(number) for number in numbers)
            correct = tuple(n == Decimal(item.answer) for n, item in zip(numbers, problems, strict=True))
            results.append(TaskResult(task.name, task.digest, "number", answers, correct, 0.0))
    return results


def change(before: TaskResult, after: TaskResult) -> Change:
    """Compare two results item by item.

    Raises `UsageError` when they are not of the same items. Source of the interval: R. G. Newcombe, Stat. Med. 17
    (1998) 2635-2650; of the test: Q. McNemar, Psychometrika 12 (1947) 153-157.
    """
    if (before.digest, before.way) != (after.digest, after.way):
        raise UsageError(
            f"tasks '{before.name}' and '{after.name}': expected results on the same items before and after, found "
            "others; check both with the same files, limit, seed and way"
        )
    pairs = list(zip(before.correct, after.correct, strict=True))
    both, lost = pairs.count((True, True)), pairs.count((True, False))
    gained, neither = pairs.count((False, True)), pairs.count((False, False))
    return Change(
        name=before.name,
        n=len(pairs),
        before=both + lost,
        after=both + gained,
        lost=lost,
        gained=gained,
        difference=paired_difference(both, lost, gained, neither),
        p=mcnemar(lost, gained),
    )


def _numbers(
    model: Any,
    renderer: ChatRenderer,
    items: Sequence[Problem],
    size: BatchSize,
    progress: Callable[[int], None] | None,
    max_new_tokens: int,
) -> list[Decimal | None]:
    ending = "\n\nWork it out step by step and end with a line 'Answer: ' and the number alone."
    encoded = encode(model, renderer.encode([item.question + ending for item in items]))
    replies = complete(model, renderer.tokenizer, encoded, max_new_tokens, size, progress)
    return [final_number(reply.text, ended=reply.ended) for reply in replies]
