"""How many questions a live model gets right: a letter by its probability, a number by greedy generation.

A model that an edit leaves able scores as before; hooks that are active now are measured with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from string import ascii_uppercase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.capability.arithmetic import final_number
from abliterate.capability.tasks import Choice, Problem, Task
from abliterate.errors import ModelError, UsageError
from abliterate.generation import complete
from abliterate.inference import BatchSize, Encoded, SharedPrefix, can_share, in_batches, last_logits, share_prefix
from abliterate.prompts.rendering import ChatRenderer
from abliterate.statistics import Estimate, mcnemar, paired_difference, wilson

#: How tokenizers spell a letter at the start of a word.
_SPELLINGS = ("{}", " {}", "▁{}", "Ġ{}")


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a model answered to each item of a task, and which answers are right.

    `answers` are letters or numbers, "" where no number was found. `digest` is that of the task.
    """

    name: str
    digest: str
    answers: tuple[str, ...]
    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> Estimate:
        """Share of right answers, with a 95 % Wilson interval."""
        right, n = sum(self.correct), len(self.correct)
        return Estimate(right / n, wilson(right, n))


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
    tokenizer: Any,
    renderer: ChatRenderer,
    tasks: Sequence[Task],
    size: BatchSize,
    progress: Callable[[int], None] | None = None,
    max_new_tokens: int = 256,
) -> list[TaskResult]:
    """Ask all `tasks`, zero-shot through the chat template, in the state in which the model is now.

    Multiple choice takes one forward pass a question: the letter with the largest next-token probability counts.
    Arithmetic is generated greedily, at most `max_new_tokens` tokens; a reply that is cut off before it names its
    answer is wrong. `progress` is told how many items are done.
    """
    results = []
    for task in tasks:
        encoded = _encode(model, renderer, [_prompt(item) for item in task.items])
        choices = [item for item in task.items if isinstance(item, Choice)]
        problems = [item for item in task.items if isinstance(item, Problem)]
        if choices:
            chosen = _choose(model, tokenizer, encoded, choices, size, progress)
            answers = tuple(ascii_uppercase[index] for index in chosen)
            correct = tuple(index == item.answer for index, item in zip(chosen, choices, strict=True))
        else:
            replies = complete(model, tokenizer, encoded, max_new_tokens, size, progress)
            numbers = [final_number(reply.text, ended=reply.ended) for reply in replies]
            answers = tuple("" if number is None else str(number) for number in numbers)
            correct = tuple(n == Decimal(item.answer) for n, item in zip(numbers, problems, strict=True))
        results.append(TaskResult(task.name, task.digest, answers, correct))
    return results


def change(before: TaskResult, after: TaskResult) -> Change:
    """Compare two results item by item.

    Raises `UsageError` when they are not of the same items. Source of the interval: R. G. Newcombe, Stat. Med. 17
    (1998) 2635-2650; of the test: Q. McNemar, Psychometrika 12 (1947) 153-157.
    """
    if before.digest != after.digest:
        raise UsageError(
            f"tasks '{before.name}' and '{after.name}': expected results on the same items before and after, found "
            "others; check both with the same files, limit and seed"
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


def _prompt(item: Choice | Problem) -> str:
    if isinstance(item, Problem):
        return f"{item.question}\n\nWork it out step by step and end with a line 'Answer: ' and the number alone."
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(ascii_uppercase, item.options, strict=False))
    return f"{item.question}\n\n{options}\n\nReply with the letter of the right option only."


def _encode(model: Any, renderer: ChatRenderer, prompts: Sequence[str]) -> Encoded:
    sequences = renderer.encode(prompts)
    return share_prefix(sequences, share=can_share(model, sequences))


def _choose(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    items: Sequence[Choice],
    size: BatchSize,
    progress: Callable[[int], None] | None,
) -> list[int]:
    """The likeliest of each question's letters, as an index."""
    tokens = letter_tokens(tokenizer, max(len(item.options) for item in items))
    shared = SharedPrefix(model, encoded.prefix)
    chosen = [0] * len(items)

    def work(rows: list[int]) -> None:
        logits = last_logits(model, shared, [encoded.suffixes[row] for row in rows])
        scores = _letter_scores(logits, tokens)
        for row, own in zip(rows, scores, strict=True):
            chosen[row] = int(own[: len(items[row].options)].argmax())

    in_batches([len(suffix) for suffix in encoded.suffixes], size, work, done=progress)
    return chosen


def _letter_scores(logits: Float[Tensor, "b vocab"], tokens: Sequence[Sequence[int]]) -> Float[Tensor, "b letters"]:
    """Log-probability of each letter, up to a constant: its spellings together."""
    return torch.stack([logits[:, list(ids)].logsumexp(-1) for ids in tokens], dim=1)


def letter_tokens(tokenizer: Any, count: int) -> list[tuple[int, ...]]:
    """Ids of the tokens that are A, B, C, …, with or without a space in front.

    Raises `ModelError` when the tokenizer has none for a letter.
    """
    found = []
    for letter in ascii_uppercase[:count]:
        spelled = [form.format(letter) for form in _SPELLINGS]
        ids = {tokenizer.convert_tokens_to_ids(text) for text in spelled}
        ids |= {own[0] for text in spelled[:2] if len(own := tokenizer.encode(text, add_special_tokens=False)) == 1}
        kept = tuple(sorted(i for i in ids if i is not None and tokenizer.decode([i]).strip() == letter))
        if not kept:
            raise ModelError(
                f"tokenizer: expected a token '{letter}' to answer multiple choice with, found none; "
                "leave the multiple-choice tasks out"
            )
        found.append(kept)
    return found
