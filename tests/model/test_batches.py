"""Sharing prefixes, padding and batching change nothing: results equal those of one plain forward pass per prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abliterate.errors import ModelError, NumericalError
from abliterate.model._compat import cache_name
from abliterate.model.activations import MomentsFitter, ProjectionFitter, stream_sites
from abliterate.model.anatomy import find_blocks, stream_out
from abliterate.model.batches import (
    BatchSize,
    Encoded,
    SharedPrefix,
    auto_batch_size,
    can_share,
    forward,
    hooked,
    in_batches,
    is_out_of_memory,
    last_logits,
    logits_at,
    share_prefix,
)
from abliterate.model.decoding import Decoding
from abliterate.model.generation import complete, end_tokens
from families import BLOCKS, BY_NAME, D_MODEL, FAMILIES, VOCAB, WINDOW, Family, byte_tokenizer

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)

#: Prompts that share PREFIX tokens and go on for so many more; the longest are past every sliding window.
PREFIX = 5
LENGTHS = (4, 1, 9, 4, 2, 13, 3)
POSITIONS = 2


@cache
def model_of(family: str) -> Any:
    return BY_NAME[family].model()


def ragged(lengths: Sequence[int] = LENGTHS, prefix: int = PREFIX, seed: int = 0) -> list[list[int]]:
    """Random prompts with a shared prefix, followed by different first tokens."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, 256, (prefix,), generator=generator).tolist()
    tails = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    return [[*shared, i, *tail] for i, tail in enumerate(tails)]


@cache
def plain(family: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Last logits [n, vocab] and sites [n, k, L+1, d] from one forward pass per prompt, without cache or padding."""
    model = model_of(family)
    _, blocks = find_blocks(model)
    logits, sites = [], []
    for prompt in ragged():
        seen: list[Tensor] = []

        def before(_: nn.Module, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, __: Any, output: Any, seen: list[Tensor] = seen) -> None:
            seen.append(stream_out(output))

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
        handles.append(blocks[-1].register_forward_hook(after))
        with hooked(handles), torch.inference_mode():
            logits.append(model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1])
        layers = torch.stack([hidden[0, [-1, -2]] for hidden in seen], dim=1)
        sites.append(layers)
    return torch.stack(logits), torch.stack(sites)


def batch_sizes() -> list[int]:
    return [1, 3, len(LENGTHS)]


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-4)


# --- logits and activations


@pytest.mark.contract
@each_family
@pytest.mark.parametrize("share", [True, False], ids=["shared prefix", "no sharing"])
def test_last_logits_equal_plain_forward(family: Family, share: bool) -> None:
    model = model_of(family.name)
    prompts = share_prefix(ragged(), share=share)
    assert len(prompts.prefix) == (PREFIX if share else 0)
    expected, _ = plain(family.name)
    assert expected.std() > 0.2  # there is something to get wrong
    shared = SharedPrefix(model, prompts.prefix)
    for rows in batch_sizes():
        found = torch.empty_like(expected)

        def work(batch: list[int], found: Tensor = found) -> None:
            found[batch] = last_logits(model, shared, prompts.take(batch).suffixes)

        in_batches([len(s) for s in prompts.suffixes], BatchSize(rows), work)
        assert close(found, expected), f"{rows} rows: {(found - expected).abs().max()}"


@pytest.mark.contract
@each_family
@pytest.mark.parametrize("share", [True, False], ids=["shared prefix", "no sharing"])
def test_captured_activations_equal_plain_forward(family: Family, share: bool) -> None:
    model = model_of(family.name)
    prompts = share_prefix(ragged(), keep=POSITIONS, share=share)
    _, blocks = find_blocks(model)
    _, expected = plain(family.name)
    for rows in batch_sizes():
        fitter = MomentsFitter(POSITIONS, BLOCKS + 1, D_MODEL)
        assert stream_sites(model, blocks, prompts, POSITIONS, fitter.update, BatchSize(rows)) == len(LENGTHS)
        moments = fitter.result()
        assert moments.count == len(LENGTHS)
        assert close(moments.mean, expected.double().mean(0))
        assert close(moments.variance, expected.double().var(0))


@each_family
def test_each_prompt_gets_its_own_activations(family: Family) -> None:
    model = model_of(family.name)
    prompts = share_prefix(ragged(), keep=POSITIONS)
    _, blocks = find_blocks(model)
    _, expected = plain(family.name)
    found = torch.full_like(expected, torch.nan)

    def keep(layer: int, rows: list[int], values: Tensor) -> None:
        found[rows, :, layer] = values

    stream_sites(model, blocks, prompts, POSITIONS, keep, BatchSize(3))
    assert close(found, expected)


@each_family
def test_last_layer_is_the_last_blocks_output_and_not_its_norm(family: Family) -> None:
    model = model_of(family.name)
    prompts = share_prefix(ragged((6,)), share=False)
    _, blocks = find_blocks(model)
    fitter = MomentsFitter(1, BLOCKS + 1, D_MODEL)
    stream_sites(model, blocks, prompts, 1, fitter.update, BatchSize(1))
    found = fitter.result().mean[0]
    with torch.inference_mode():
        ids = torch.tensor([prompts.suffixes[0]])
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    for layer in range(BLOCKS):
        assert close(found[layer], states[layer][0, -1])
    assert not close(found[BLOCKS], states[BLOCKS][0, -1])  # transformers' last entry is after the final norm


def test_only_approved_prompts_are_fed() -> None:
    model = model_of("llama")
    prompts = share_prefix(ragged(), keep=POSITIONS)
    _, blocks = find_blocks(model)
    logits, expected = plain("llama")
    wanted = logits[:, 7] > logits[:, 7].median()
    fitter = MomentsFitter(POSITIONS, BLOCKS + 1, D_MODEL)
    fed = stream_sites(
        model,
        blocks,
        prompts,
        POSITIONS,
        fitter.update,
        BatchSize(2),
        keep=lambda _, seen: seen[:, 7] > logits[:, 7].median(),
    )
    assert fed == int(wanted.sum()) == 3
    assert close(fitter.result().mean, expected[wanted].double().mean(0))


def test_projections_are_coordinates_along_each_sites_unit() -> None:
    model = model_of("llama")
    prompts = share_prefix(ragged(), keep=POSITIONS)
    _, blocks = find_blocks(model)
    _, expected = plain("llama")
    units = torch.nn.functional.normalize(torch.randn(POSITIONS, BLOCKS + 1, D_MODEL), dim=-1)
    fitter = ProjectionFitter(units, len(prompts))
    stream_sites(model, blocks, prompts, POSITIONS, fitter.update, BatchSize(3))
    assert close(fitter.values, (expected * units).sum(-1).double())


@pytest.mark.parametrize("family", ["gemma2", "falcon-alibi", "opt"])
def test_logits_at_several_positions(family: str) -> None:
    model = model_of(family)
    prompts = share_prefix(ragged(), keep=POSITIONS)
    shared = SharedPrefix(model, prompts.prefix)
    found = logits_at(model, shared, prompts.suffixes, lambda lengths: torch.stack([lengths - 1, lengths - 2], dim=1))
    for row, prompt in enumerate(ragged()):
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        assert close(found[row, 0], expected[-1])
        assert close(found[row, 1], expected[-2])


def test_a_prefix_can_be_used_again_and_stays_as_it_is() -> None:
    model = model_of("gemma3")
    prompts = share_prefix(ragged())
    shared = SharedPrefix(model, prompts.prefix)
    first = last_logits(model, shared, prompts.suffixes)
    forward(model, shared, prompts.suffixes[:2])
    assert torch.equal(last_logits(model, shared, prompts.suffixes), first)


# --- splitting prompts


def test_sharing_leaves_each_prompt_its_last_tokens() -> None:
    prompts = share_prefix([[1, 2, 3, 4], [1, 2, 3]], keep=2)
    assert prompts == Encoded((1,), ((2, 3, 4), (2, 3)))
    assert share_prefix([[1, 2], [1, 2]]) == Encoded((1,), ((2,), (2,)))
    assert share_prefix([[1, 2], [3, 2]]).prefix == ()
    assert share_prefix([[1, 2], [1, 3]], share=False) == Encoded((), ((1, 2), (1, 3)))


def test_prompts_can_be_taken_and_joined() -> None:
    prompts = Encoded((1,), ((2,), (3,), (4,)))
    assert prompts.take([2, 0]).suffixes == ((4,), (2,))
    assert (prompts + prompts.take([1])).suffixes == ((2,), (3,), (4,), (3,))
    with pytest.raises(ValueError, match="prefix"):
        prompts + Encoded((2,), ((1,),))


# --- generation


#: So many tokens end a turn that some of the rows end early.
MANY_ENDS = list(range(0, VOCAB, 9))


def with_ends(model: Any, ends: Sequence[int] = MANY_ENDS) -> Any:
    model.generation_config.eos_token_id = list(ends)
    model.generation_config.pad_token_id = VOCAB - 1
    return model


def greedy(model: Any, tokenizer: Any, prompts: list[list[int]], count: int) -> list[tuple[tuple[int, ...], bool]]:
    """What transformers' own generate says, one prompt at a time."""
    ends = end_tokens(model, tokenizer)
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=sorted(ends),
            )
        tokens = out[0, len(prompt) :].tolist()
        kept = tuple(token for token in tokens if token not in ends)
        replies.append((kept, len(kept) < len(tokens)))
    return replies


@cache
def generated(family: str) -> list[tuple[tuple[int, ...], bool]]:
    """What transformers generates for each of the ragged prompts alone."""
    return greedy(with_ends(model_of(family)), byte_tokenizer(), ragged(), 8)


@pytest.mark.contract
@each_family
@pytest.mark.parametrize("rows", [2, len(LENGTHS)])
def test_completions_equal_generate(family: Family, rows: int) -> None:
    model, tokenizer = with_ends(model_of(family.name)), byte_tokenizer()
    prompts = ragged()
    replies = complete(model, tokenizer, share_prefix(prompts), 8, BatchSize(rows))
    assert [(reply.tokens, reply.ended) for reply in replies] == generated(family.name)
    assert len({reply.tokens for reply in replies}) > 1
    assert all(reply.text == tokenizer.decode(reply.tokens, skip_special_tokens=True) for reply in replies)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_some_rows_end_and_others_run_on(family: str) -> None:
    model, tokenizer = with_ends(BY_NAME[family].model(seed=1), MANY_ENDS), byte_tokenizer()
    prompts = ragged(tuple(range(1, 13)), prefix=3, seed=2)
    done: list[int] = []
    replies = complete(model, tokenizer, share_prefix(prompts), 10, BatchSize(12), done.append)
    assert [(reply.tokens, reply.ended) for reply in replies] == greedy(model, tokenizer, prompts, 10)
    assert 0 < sum(reply.ended for reply in replies) < len(replies)
    assert len({len(reply.tokens) for reply in replies}) > 2
    assert sum(done) == len(prompts)


def test_replies_do_not_depend_on_what_else_is_in_the_batch() -> None:
    model, tokenizer = with_ends(model_of("mistral")), byte_tokenizer()
    prompts = ragged()
    together = complete(model, tokenizer, share_prefix(prompts), 8, BatchSize(7))
    alone = [complete(model, tokenizer, share_prefix([prompt]), 8, BatchSize(1))[0] for prompt in prompts]
    assert together == alone


def test_ends_of_turn_are_those_of_the_model_and_the_tokenizer() -> None:
    model, tokenizer = with_ends(BY_NAME["llama"].model(), [7, 8]), byte_tokenizer()
    assert end_tokens(model, tokenizer) == {7, 8, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    model.generation_config.eos_token_id = 9
    assert 9 in end_tokens(model, tokenizer)
    model.generation_config.eos_token_id = None
    assert None not in end_tokens(model, tokenizer)


def test_one_token_at_most_is_one_token() -> None:
    logits, _ = plain("llama")
    tokens = logits.argmax(-1).tolist()
    never = next(token for token in range(VOCAB) if token not in tokens)
    model, tokenizer = with_ends(BY_NAME["llama"].model(), [never]), byte_tokenizer()
    assert not set(tokens) & end_tokens(model, tokenizer)
    replies = complete(model, tokenizer, share_prefix(ragged()), 1, BatchSize(4))
    assert [(*reply.tokens, reply.ended) for reply in replies] == [(token, False) for token in tokens]


def never(rows: Sequence[int], texts: Sequence[str]) -> list[bool]:
    return [False] * len(rows)


def leaving(settled: Callable[[Sequence[int]], list[bool]]) -> Decoding:
    return Decoding(settled=lambda rows, _: settled(rows))


@each_family
def test_settled_replies_are_left_and_the_others_are_not_changed(family: Family) -> None:
    model, tokenizer = with_ends(model_of(family.name)), byte_tokenizer()
    prompts = share_prefix(ragged())
    full = complete(model, tokenizer, prompts, 20, BatchSize(4))
    seen: list[tuple[int, str]] = []

    def odd(rows: Sequence[int], texts: Sequence[str]) -> list[bool]:
        seen.extend(zip(rows, texts, strict=True))
        return [row % 2 == 1 for row in rows]

    found = complete(model, tokenizer, prompts, 20, BatchSize(4), decoding=Decoding(settled=odd))
    shown: dict[int, list[str]] = {row: [text for r, text in seen if r == row] for row in range(len(found))}
    for row, (reply, whole) in enumerate(zip(found, full, strict=True)):
        length = len(whole.tokens) + whole.ended
        looks = [count for count in (8, 16) if count < length or (count == length and not whole.ended)]
        if row % 2 and looks:
            looks = looks[:1]
            assert reply.tokens == whole.tokens[:8]
            assert (reply.ended, reply.stopped) == (False, True)
        else:
            assert reply == whole
            assert not reply.stopped
        assert shown[row] == [tokenizer.decode(whole.tokens[:n], skip_special_tokens=True) for n in looks]


def test_to_be_asked_and_to_settle_none_changes_nothing() -> None:
    model, tokenizer = with_ends(model_of("llama")), byte_tokenizer()
    prompts = share_prefix(ragged())
    full = complete(model, tokenizer, prompts, 20, BatchSize(4))
    assert complete(model, tokenizer, prompts, 20, BatchSize(4), decoding=Decoding(settled=never)) == full


def test_at_the_limit_replies_are_cut_and_not_stopped() -> None:
    model, tokenizer = with_ends(BY_NAME["llama"].model(), []), byte_tokenizer()
    prompts = share_prefix(ragged())
    found = complete(model, tokenizer, prompts, 8, BatchSize(7), decoding=leaving(lambda rows: [True] * len(rows)))
    assert found == complete(model, tokenizer, prompts, 8, BatchSize(7))
    assert not any(reply.stopped for reply in found)


def test_some_replies_are_settled_and_others_end_before() -> None:
    """Or the test above proves nothing."""
    model, tokenizer = with_ends(BY_NAME["llama"].model(seed=1)), byte_tokenizer()
    prompts = share_prefix(ragged(tuple(range(1, 13)), prefix=3, seed=2))
    found = complete(
        model,
        tokenizer,
        prompts,
        20,
        BatchSize(12),
        decoding=leaving(lambda rows: [row > 5 for row in rows]),
    )
    assert {(reply.ended, reply.stopped) for reply in found} == {(True, False), (False, True), (False, False)}


def test_rows_that_are_settled_cost_nothing_more() -> None:
    model, tokenizer = with_ends(BY_NAME["llama"].model(), []), byte_tokenizer()
    rows: list[int] = []
    model.model.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    prompts = share_prefix(ragged((3,) * 6))
    complete(model, tokenizer, prompts, 1, BatchSize(6))  # tries out how to step
    rows.clear()
    complete(
        model,
        tokenizer,
        prompts,
        20,
        BatchSize(6),
        decoding=leaving(lambda rows: [row > 1 for row in rows]),
    )
    assert rows == [1, *[6] * 8, *[2] * 12]  # the prefix; until the first look; from then on
    rows.clear()
    complete(model, tokenizer, prompts, 20, BatchSize(6), decoding=leaving(lambda rows: [True] * len(rows)))
    assert rows == [1, *[6] * 8]


# --- batches


def failing(limit: int, done: list[list[int]], make: Callable[[], BaseException]) -> Callable[[list[int]], None]:
    """Work that runs out of memory on more than `limit` rows."""

    def work(rows: list[int]) -> None:
        if len(rows) > limit:
            raise make()
        done.append(rows)

    return work


ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory"),
    lambda: RuntimeError("not enough memory: you tried to allocate 8 bytes"),
    MemoryError,
]


@pytest.mark.parametrize("make", ERRORS)
def test_batches_are_halved_when_memory_runs_out_and_every_row_is_done_once(
    make: Callable[[], BaseException],
) -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    size = BatchSize(8)
    done: list[list[int]] = []
    steps: list[int] = []
    in_batches(lengths, size, failing(2, done, make), done=steps.append)
    assert sorted(row for rows in done for row in rows) == list(range(len(lengths)))
    assert max(map(len, done)) == 2
    assert (size.rows, size.halvings) == (2, 2)
    assert sum(steps) == len(lengths)


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    calls: list[list[int]] = []

    def work(rows: list[int]) -> None:
        calls.append(rows)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        in_batches([1] * 8, BatchSize(8), work)
    assert len(calls) == 1


def test_one_row_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(MemoryError):
        in_batches([1] * 4, BatchSize(4), failing(0, [], MemoryError))


def test_batches_hold_prompts_of_similar_length_and_few_tokens() -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    done: list[list[int]] = []
    in_batches(lengths, BatchSize(4, tokens=12), done.append)
    widths = [[lengths[row] for row in rows] for rows in done]
    assert [width for batch in widths for width in batch] == sorted(lengths)
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 12 for batch in widths)
    assert all(len(batch) <= 4 for batch in widths)


def test_equal_lengths_and_copies() -> None:
    done: list[list[int]] = []
    in_batches([2, 1, 2, 2, 1], BatchSize(8), done.append, equal_lengths=True)
    assert done == [[1, 4], [0, 2, 3]]
    done.clear()
    in_batches([1] * 6, BatchSize(8), done.append, copies=4)
    assert [len(rows) for rows in done] == [2, 2, 2]
    done.clear()
    in_batches([1] * 2, BatchSize(2), done.append, copies=4)
    assert [len(rows) for rows in done] == [1, 1]


def test_memory_running_out_in_the_middle_leaves_no_trace_in_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["llama"].model()
    prompts = share_prefix(ragged(), keep=POSITIONS)
    _, blocks = find_blocks(model)
    _, expected = plain("llama")
    run = type(blocks[-1]).forward

    def limited(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if block is blocks[-1] and len(hidden_states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(block, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(blocks[-1]), "forward", limited)
    size, fitter = BatchSize(7), MomentsFitter(POSITIONS, BLOCKS + 1, D_MODEL)
    assert stream_sites(model, blocks, prompts, POSITIONS, fitter.update, size) == len(LENGTHS)
    assert size.rows <= 2
    assert fitter.result().count == len(LENGTHS)
    assert close(fitter.result().mean, expected.double().mean(0))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batch_size_is_found_or_taken() -> None:
    model = model_of("llama")
    assert auto_batch_size(model).rows >= 1
    assert auto_batch_size(model, 5).rows == 5
    assert not is_out_of_memory(ValueError("no"))


@pytest.mark.parametrize("layer", [0, 1, BLOCKS])
def test_nan_stops_and_names_the_layer(layer: int) -> None:
    model = BY_NAME["llama"].model()
    _, blocks = find_blocks(model)
    broken = model.model.embed_tokens if layer == 0 else blocks[layer - 1]

    def spoil(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.full_like(output, torch.nan)

    broken.register_forward_hook(spoil)
    fitter = MomentsFitter(1, BLOCKS + 1, D_MODEL)
    with pytest.raises(NumericalError, match=rf"NaN or infinity at layer {layer} of prompt"):
        stream_sites(model, blocks, share_prefix(ragged()), 1, fitter.update, BatchSize(2))


def test_windows_are_shorter_than_the_prompts() -> None:
    assert max(map(len, ragged())) > 2 * WINDOW  # or the tests above prove nothing about windows


# --- whether prompts may share work is tried out


@pytest.mark.contract
@each_family
def test_causal_models_share_their_prefix(family: Family) -> None:
    assert can_share(model_of(family.name), ragged(), POSITIONS)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, NotImplementedError])
def test_model_whose_cache_cannot_be_copied_does_not_share(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error("states of this layer cannot be repeated")

    monkeypatch.setattr("transformers.DynamicCache.batch_repeat_interleave", fail)
    assert not can_share(model_of("llama"), ragged(), POSITIONS)
    monkeypatch.setattr("abliterate.model.batches.right_padded", fail)
    with pytest.raises(ModelError, match=r"cannot be run on several prompts \(states of this layer"):
        can_share(model_of("llama"), ragged(), POSITIONS)


def test_cache_that_is_ignored_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some models take keys and values under another name and say nothing: only the logits tell."""
    run, unused = SharedPrefix.options, cache_name(model_of("llama"))

    def without_cache(self: SharedPrefix, rows: int) -> dict[str, Any]:
        return {name: value for name, value in run(self, rows).items() if name != unused}

    monkeypatch.setattr(SharedPrefix, "options", without_cache)
    assert not can_share(model_of("llama"), ragged(), POSITIONS)


def test_model_that_looks_at_what_follows_is_refused() -> None:
    model = BY_NAME["llama"].model()
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: output + output.mean(1, keepdim=True))
    with pytest.raises(ModelError, match="a prompt's logits change with what stands behind it; expected a causal"):
        can_share(model, ragged(), POSITIONS)


def test_memory_running_out_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("abliterate.model.batches.right_padded", fail)
    with pytest.raises(torch.OutOfMemoryError):
        can_share(model_of("llama"), ragged(), POSITIONS)
