"""What passes through a model is counted where it is computed: shared prefixes once, padding too, exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from abliterate.evaluation.reply_cache import _has_hooks
from abliterate.model.anatomy import find_blocks, study
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, forward, last_logits
from abliterate.model.generation import complete
from abliterate.model.meter import count_passes, counting
from abliterate.monitor import Monitor, Work
from families import BLOCKS, BY_NAME, byte_tokenizer

PREFIX = (1, 2, 3, 4)
#: Suffixes of 2, 5 and 3 tokens: 15 with their padding.
PROMPTS = Encoded(PREFIX, ((5, 6), (5, 6, 7, 8, 9), (7, 8, 9)))
PADDED = 15


@pytest.fixture
def counted() -> Iterator[tuple[Any, Monitor]]:
    """A model whose passes are counted, and who counts."""
    model, monitor = BY_NAME["llama"].model(), Monitor()
    with counting(model, monitor):
        yield model, monitor


def total(monitor: Monitor) -> Work:
    found = monitor.work_by_phase.values()
    return Work(*(sum(getattr(work, name) for work in found) for name in ("forward", "backward", "head")))


def test_a_prefix_counts_once_and_padding_counts(counted: tuple[Any, Monitor]) -> None:
    model, monitor = counted
    shared = SharedPrefix(model, PREFIX)
    assert total(monitor) == Work(forward=BLOCKS * len(PREFIX))
    forward(model, shared, PROMPTS.suffixes)
    assert total(monitor) == Work(forward=BLOCKS * (len(PREFIX) + PADDED))
    last_logits(model, shared, PROMPTS.suffixes)
    assert total(monitor) == Work(forward=BLOCKS * (len(PREFIX) + 2 * PADDED), head=3)


def test_a_token_of_a_reply_counts_once_until_the_reply_ends(counted: tuple[Any, Monitor]) -> None:
    model, monitor = counted
    complete(model, byte_tokenizer(), PROMPTS, 1, BatchSize(8))  # tries out how replies can be made
    before = total(monitor)
    replies = complete(model, byte_tokenizer(), PROMPTS, 4, BatchSize(8))
    assert [(len(reply.tokens), reply.ended) for reply in replies] == [(4, False), (4, False), (2, True)]
    after = total(monitor)
    fed = 3 + 3 + 2  # whose reply has ended is fed no more, and nobody's last token is
    assert after.forward - before.forward == BLOCKS * (len(PREFIX) + PADDED + fed)
    assert after.head - before.head == 3 + fed


def test_what_passes_backwards_counts_from_the_block_that_is_differentiated_on(counted: tuple[Any, Monitor]) -> None:
    model, monitor = counted
    blocks = find_blocks(model)[1]
    added = torch.zeros(1, requires_grad=True)
    shared = SharedPrefix(model, (), grad=True)
    with torch.enable_grad():
        handle = blocks[1].register_forward_pre_hook(lambda _, args: (args[0] + added, *args[1:]))
        last_logits(model, shared, PROMPTS.suffixes).sum().backward()
        handle.remove()
    assert total(monitor) == Work(BLOCKS * PADDED, (BLOCKS - 1) * PADDED, 3)


def test_work_is_of_the_innermost_phase(counted: tuple[Any, Monitor]) -> None:
    model, monitor = counted
    with monitor.phase("outer"):
        SharedPrefix(model, PREFIX)
        with monitor.phase("inner"):
            SharedPrefix(model, PREFIX[:1])
    SharedPrefix(model, PREFIX[:2])
    found = {name: work.forward for name, work in monitor.work_by_phase.items()}
    assert found == {"outer": BLOCKS * 4, "inner": BLOCKS, "between phases": BLOCKS * 2}


def test_the_proof_of_a_block_counts_though_it_runs_on_copies(counted: tuple[Any, Monitor]) -> None:
    model, monitor = counted
    study(model)
    assert total(monitor).forward > BLOCKS * 8
    before = total(monitor).forward
    block = copy.deepcopy(find_blocks(model)[1][0])
    assert len(block._forward_hooks) == 1
    assert total(monitor).forward == before


def test_counting_is_no_change_of_the_model(counted: tuple[Any, Monitor]) -> None:
    model, _ = counted
    assert not _has_hooks(model), "its replies may be kept"
    model.lm_head.register_forward_hook(lambda *_: None)
    assert _has_hooks(model)


def test_outside_phases_nothing_is_left_on_the_model() -> None:
    model, monitor = BY_NAME["llama"].model(), Monitor()
    count_passes(model, monitor)
    SharedPrefix(model, PREFIX)
    for _ in range(2):
        with monitor.phase("outer"), monitor.phase("inner"):
            SharedPrefix(model, PREFIX[:1])
        assert not any(module._forward_hooks for module in model.modules())
    assert {name: work.forward for name, work in monitor.work_by_phase.items()} == {"inner": 2 * BLOCKS}
