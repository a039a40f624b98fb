"""Starting at the first edited block changes nothing but how much is computed."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abliterate.edit.hooks import ablation, addition
from abliterate.edit.plan import Plan, Variant, make_plan
from abliterate.errors import ModelError
from abliterate.evaluation.first_tokens import for_each_first_token
from abliterate.model.anatomy import Anatomy, Writer, find_blocks, study
from abliterate.model.batches import (
    BatchSize,
    Encoded,
    SharedPrefix,
    can_share,
    hooked,
    last_logits,
    right_padded,
    share_prefix,
)
from abliterate.model.generation import complete
from abliterate.model.lower_layers import LowerLayers, lowest_block, usable
from families import BLOCKS, BY_NAME, D_MODEL, FAMILIES, VOCAB, Family, byte_tokenizer, randomise
from zoo import ENTRIES, Entry

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
shared_or_not = pytest.mark.parametrize("share", [True, False], ids=["shared prefix", "no sharing"])

PREFIX, LENGTHS = 5, (4, 1, 9, 4, 2, 13, 3)

#: Models of the zoo whose last block cannot be started at, with the reason.
UNUSABLE = {
    "gemma3n_text": "four streams side by side, rows not first; the last layers share keys with earlier ones",
    "glm_moe_dsa": "later layers look at the tokens that an earlier one chose",
    "hy_v4": "later layers look at the tokens that an earlier one chose",
    "hrm_text": "blocks are run several times",
    "inkling2_text": "later blocks take what earlier ones gave, beside the stream",
    "xlm": "its blocks are MLPs, and the stream passes beside them",
    "zaya": "a router hands its state on to the next block's",
}


@cache
def model_of(family: str) -> tuple[Any, Anatomy]:
    """A family's model and its anatomy, with gains that may take part in a backward pass."""
    model = BY_NAME[family].model()
    anatomy = study(model)
    gains = [w if w.gain is None else replace(w, gain=w.gain.clone()) for w in anatomy.writers]
    return model, replace(anatomy, writers=tuple(gains))


def ragged(share: bool = True, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> Encoded:
    """Random prompts with a shared prefix, followed by different first tokens."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, 256, (PREFIX,), generator=generator).tolist()
    tails = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    return share_prefix([[*shared, i, *tail] for i, tail in enumerate(tails)], share=share)


def plan_from(anatomy: Anatomy, first: int, seed: int, strength: float = 1.0) -> Plan:
    """A random direction out of the writers of blocks from `first` on."""
    direction = torch.randn(1, anatomy.d_model, generator=torch.Generator().manual_seed(seed))
    return make_plan(anatomy, direction / direction.norm(), variant=above(first, strength))


def above(first: int, strength: float = 1.0) -> Variant:
    def profile(writer: Writer) -> float | None:
        return strength if writer.block is not None and writer.block >= first else None

    return Variant(profile=profile)


def first_tokens(model: Any, prompts: Encoded, rows: int = 3, copies: int = 1) -> Tensor:
    """Logits [copies, n, vocab] in batches of at most `rows` prompts."""
    found = torch.full((copies, len(prompts), VOCAB), torch.nan)

    def look(chosen: list[int], logits: Tensor) -> None:
        found[:, chosen] = logits

    for_each_first_token(model, prompts, BatchSize(rows * copies), look, copies=copies)
    return found


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).abs().max() < tolerance)


@contextlib.contextmanager
def counted(model: Any, anatomy: Anatomy) -> Iterator[Counter[int]]:
    """How often something inside each block is run."""
    calls: Counter[int] = Counter()
    handles = []
    for index, name in enumerate(anatomy.blocks):
        inside = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear))
        handles.append(inside.register_forward_hook(lambda *_, index=index: calls.update([index])))
    with hooked(handles):
        yield calls


# --- the same logits


@each_family
@shared_or_not
@pytest.mark.parametrize("first", range(1, BLOCKS))
def test_every_trial_has_the_logits_of_whole_passes(family: Family, share: bool, first: int) -> None:
    model, anatomy = model_of(family.name)
    prompts = ragged(share)
    unedited = first_tokens(model, prompts)
    lower = LowerLayers(model, anatomy, first)
    for trial, rows in enumerate((3, 3, 7, 1)):  # the first one makes prompts known, others pad them differently
        plan = plan_from(anatomy, first, trial)
        with ablation(model, plan):
            expected = first_tokens(model, prompts, rows)
            with lower.skipping(prompts):
                computed = lower.computed
                found = first_tokens(model, prompts, rows)
        assert close(found, expected)
        assert not close(found, unedited, 1e-2)
        assert (lower.computed > computed) == (trial == 0)
    assert lower.replayed > 0


@each_family
@shared_or_not
def test_plans_side_by_side(family: Family, share: bool) -> None:
    model, anatomy = model_of(family.name)
    prompts = ragged(share)
    lower = LowerLayers(model, anatomy, 1)
    for trial in range(2):
        plans = [plan_from(anatomy, 1, seed) for seed in (trial, trial + 10, trial + 20)]
        with ablation(model, *plans):
            expected = first_tokens(model, prompts, copies=3)
            with lower.skipping(prompts):
                found = first_tokens(model, prompts, copies=3)
        assert close(found, expected)
        assert not close(found[0], found[1], 1e-2)
    with lower.skipping(prompts), ablation(model, plans[0]):  # states of one row serve one, too
        computed = lower.computed
        assert close(first_tokens(model, prompts)[0], expected[0])
        assert lower.computed == computed


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_gives_the_same_bits(name: str) -> None:
    model, anatomy = BY_NAME[name].model().bfloat16(), model_of(name)[1]
    prompts, lower = ragged(), LowerLayers(model, anatomy, 2)
    for seed in range(2):
        with ablation(model, plan_from(anatomy, 2, seed)):
            expected = first_tokens(model, prompts)
            with lower.skipping(prompts):
                assert torch.equal(first_tokens(model, prompts), expected)


@shared_or_not
def test_states_of_another_prompt_would_show(share: bool) -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(share), LowerLayers(model, anatomy, 1)
    with lower.skipping(prompts):
        expected = first_tokens(model, prompts)
        for key, state in lower._states.items():
            lower._states[key] = state.roll(1, dims=0)
        assert not close(first_tokens(model, prompts), expected, 1e-2)


def test_a_prefix_without_its_lower_keys_would_show() -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(), LowerLayers(model, anatomy, 2)
    with lower.skipping(prompts):
        first_tokens(model, prompts)
        more = ragged(lengths=(6, 6), seed=0).take([1])
    expected = first_tokens(model, more)
    with lower.skipping(more):
        assert close(first_tokens(model, more), expected)  # an unknown prompt behind a known prefix
        assert lower.replayed > 0
    (layers,) = lower._caches.values()
    layers[1].keys.zero_()
    del lower._states[next(key for key in lower._states if key[1] == more.suffixes[0])]
    with lower.skipping(more):
        assert not close(first_tokens(model, more), expected, 1e-3)


def test_steering_where_the_states_come_in() -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(), LowerLayers(model, anatomy, 1)
    vectors = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0))
    block = model.get_submodule(anatomy.blocks[1])
    with addition(block, vectors):
        expected = first_tokens(model, prompts, copies=2)
        with lower.skipping(prompts):
            found = [first_tokens(model, prompts, copies=2) for _ in range(2)]
    with lower.skipping(prompts), addition(block, vectors):
        found.append(first_tokens(model, prompts, copies=2))
    assert all(close(logits, expected) for logits in found)
    assert close(first_tokens(model, prompts), first_tokens(model, prompts, copies=2)[:1])


# --- padding


def test_prompts_that_end_in_repetitions_are_not_taken_for_padded_ones() -> None:
    model, anatomy = model_of("llama")
    prompts = Encoded((1, 2, 3), ((4, 5), (4, 5, 5, 5), (4, 5, 5, 5, 5, 5), (6, 7, 8, 9, 10, 11, 12, 13)))
    expected = torch.cat([last_logits(model, SharedPrefix(model, prompts.prefix), [s]) for s in prompts.suffixes])
    assert min(float((a - b).abs().max()) for i, a in enumerate(expected) for b in expected[:i]) > 1e-3
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        lower = LowerLayers(model, anatomy, 2)
        with lower.skipping(prompts):
            for rows in ([[row] for row in order], [order], [[order[0], order[3]]]):
                for batch in rows:
                    found = last_logits(model, SharedPrefix(model, prompts.prefix), prompts.take(batch).suffixes)
                    assert close(found, expected[batch])
        assert lower.replayed > 0


# --- what is run


@shared_or_not
def test_lower_blocks_are_run_once(share: bool) -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(share), LowerLayers(model, anatomy, 2)
    passes = 3 + share  # batches of three of seven prompts, and the prefix
    with counted(model, anatomy) as calls:
        for seed in range(5):
            with lower.skipping(prompts), ablation(model, plan_from(anatomy, 2, seed)):
                first_tokens(model, prompts)
        assert calls == {0: passes, 1: passes, 2: 5 * passes}
        assert (lower.computed, lower.replayed) == (passes, 4 * passes)
        first_tokens(model, prompts)
        assert calls == {0: 2 * passes, 1: 2 * passes, 2: 6 * passes}


def test_nothing_is_skipped_below_the_first_block() -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(), LowerLayers(model, anatomy, 0)
    plan = make_plan(anatomy, torch.eye(1, D_MODEL))
    with counted(model, anatomy) as calls, lower.skipping(prompts), ablation(model, plan):
        found = [first_tokens(model, prompts) for _ in range(2)]
    assert set(calls.values()) == {8}
    assert torch.equal(*found)
    assert lower.held_bytes == lower.replayed == 0


def test_what_is_not_one_of_the_prompts_is_run_whole() -> None:
    model, anatomy = model_of("llama")
    prompts, others, lower = ragged(), ragged(seed=1), LowerLayers(model, anatomy, 2)
    expected = first_tokens(model, others)
    ids, lengths = right_padded(prompts.suffixes, torch.device("cpu"))
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    with torch.inference_mode():
        masked = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    with lower.skipping(prompts), torch.inference_mode():
        first_tokens(model, prompts)
        held, replayed = lower.held_bytes, lower.replayed
        assert torch.equal(first_tokens(model, others), expected)
        assert torch.equal(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, masked)
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(states) == BLOCKS + 1
    assert (lower.held_bytes, lower.replayed) == (held, replayed)


def test_replies_are_the_same_inside() -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(), LowerLayers(model, anatomy, 2)
    tokenizer = byte_tokenizer()
    expected = complete(model, tokenizer, prompts, 6, BatchSize(3))
    with lower.skipping(prompts):
        first_tokens(model, prompts)
        assert complete(model, tokenizer, prompts, 6, BatchSize(3)) == expected


def test_going_on_from_a_pass_that_skipped_layers_is_an_error() -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged().take([0, 3]), LowerLayers(model, anatomy, 1)
    with torch.inference_mode(), lower.skipping(prompts):
        first_tokens(model, prompts)
        options = SharedPrefix(model, prompts.prefix).options(2)
        model(input_ids=torch.tensor(prompts.suffixes), **options)
    assert lower.replayed == 2
    with torch.inference_mode(), pytest.raises(RuntimeError, match="skipped lower layers"):
        model(input_ids=torch.tensor([[1], [2]]), **options)


# --- memory


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_memory_stays_below_the_limit(share: float) -> None:
    model, anatomy = model_of("llama")
    prompts, plenty = ragged(), LowerLayers(model, anatomy, 2)
    with plenty.skipping(prompts):
        expected = first_tokens(model, prompts, rows=1)
    tokens = sum(map(len, prompts.suffixes))
    keys = 2 * 2 * PREFIX * D_MODEL // 2  # two layers, keys and values, half as many heads for them
    assert plenty.held_bytes == 4 * ((tokens + PREFIX) * D_MODEL + keys)
    lower = LowerLayers(model, anatomy, 2, limit_bytes=round(share * plenty.held_bytes))
    for _ in range(2):
        with lower.skipping(prompts):
            assert close(first_tokens(model, prompts, rows=1), expected)
        assert lower.held_bytes <= lower.limit_bytes
    assert lower.replayed == {0.0: 0, 1.0: 8}.get(share, lower.replayed)
    if share == 0.5:
        assert 0 < lower.replayed < 8


# --- gradients


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon-old"])
@shared_or_not
def test_gradients_are_the_same(family: str, share: bool) -> None:
    model, anatomy = model_of(family)
    prompts, lower = ragged(share), LowerLayers(model, anatomy, 1)
    start = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(0))

    def gradient(rows: list[int]) -> Tensor:
        raw = start.clone().requires_grad_()
        with ablation(model, make_plan(anatomy, raw / raw.norm(), variant=above(1, 0.7))):
            shared = SharedPrefix(model, prompts.prefix, grad=True)
            loss = last_logits(model, shared, prompts.take(rows).suffixes).log_softmax(-1)[:, 7].sum()
        (found,) = torch.autograd.grad(loss, [raw])
        return found

    expected = gradient([0, 2, 5])
    assert float(expected.norm()) > 1e-3
    assert not close(gradient([1, 3, 4]), expected)
    with lower.skipping(prompts):
        computed = gradient([0, 2, 5])
        assert lower.replayed == 0
        again = gradient([5, 0, 2])
        assert lower.replayed == 1 + share
    assert close(computed, expected)
    assert close(again, expected)
    measured = LowerLayers(model, anatomy, 1)
    with measured.skipping(prompts):
        first_tokens(model, prompts)  # known from inference mode, then differentiated
        assert close(gradient([0, 2, 5]), expected)
        assert measured.replayed == 1 + share


def test_states_are_constants_also_where_weights_are_trained() -> None:
    model, anatomy = BY_NAME["llama"].model().requires_grad_(True), model_of("llama")[1]
    prompts, lower = ragged(), LowerLayers(model, anatomy, 1)
    with lower.skipping(prompts):
        for _ in range(2):
            last_logits(model, SharedPrefix(model, prompts.prefix, grad=True), prompts.suffixes).sum().backward()
    assert lower.replayed == 2
    kept = [*lower._states.values(), *(layer.keys for layers in lower._caches.values() for layer in layers)]
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in kept)


# --- the model as it was


def forwards(model: nn.Module) -> list[Any]:
    return [(name, vars(module).get("forward"), hooks(module)) for name, module in model.named_modules()]


def hooks(module: nn.Module) -> list[Any]:
    return [list(module._forward_hooks.values()), list(module._forward_pre_hooks.values())]


def test_the_model_is_restored() -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(), LowerLayers(model, anatomy, 2)
    before = forwards(model)
    with lower.skipping(prompts):
        first_tokens(model, prompts)
        first_tokens(model, prompts)
    assert forwards(model) == before
    with pytest.raises(KeyboardInterrupt), lower.skipping(prompts):
        raise KeyboardInterrupt
    assert forwards(model) == before


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored_when_a_pass_fails(kind: type[BaseException]) -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(), LowerLayers(model, anatomy, 2)
    expected, before = first_tokens(model, prompts), forwards(model)

    def fail(*_: Any) -> None:
        raise kind("out of order")

    def attempt() -> None:
        with lower.skipping(prompts):
            first_tokens(model, prompts)
            with hooked([model.get_submodule(anatomy.blocks[2]).register_forward_pre_hook(fail)]):
                first_tokens(model, prompts)

    with pytest.raises(kind):
        attempt()
    assert forwards(model) == before
    assert torch.equal(first_tokens(model, prompts), expected)


def test_a_failed_pass_leaves_no_trace_inside() -> None:
    model, anatomy = model_of("llama")
    prompts, lower = ragged(), LowerLayers(model, anatomy, 2)
    expected = first_tokens(model, prompts)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of order")

    with lower.skipping(prompts):
        for _ in range(2):  # while prompts are made known, and when they are
            with (
                hooked([model.get_submodule(anatomy.blocks[2]).register_forward_pre_hook(fail)]),
                pytest.raises(RuntimeError, match="out of order"),
            ):
                first_tokens(model, prompts)
            assert close(first_tokens(model, prompts), expected)


def test_a_forward_that_stands_in_a_block_is_put_back() -> None:
    model, anatomy = BY_NAME["llama"].model(), model_of("llama")[1]
    block = model.get_submodule(anatomy.blocks[0])
    whole = block.forward
    calls = []

    def offloaded(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return whole(*args, **kwargs)

    block.forward = offloaded
    prompts, lower = ragged(), LowerLayers(model, anatomy, 1)
    with lower.skipping(prompts):
        first_tokens(model, prompts)
        once = len(calls)
        first_tokens(model, prompts)
    assert len(calls) == once > 0
    assert block.forward is offloaded


# --- where it can be used


@each_family
@shared_or_not
def test_every_family_can_be_used(family: Family, share: bool) -> None:
    model, anatomy = model_of(family.name)
    assert all(usable(model, anatomy, first, ragged(share)) for first in range(BLOCKS + 1))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.cls}-{entry}")
def test_the_zoo_is_used_or_found_out(entry: Entry) -> None:
    model = entry.model()
    names, _ = find_blocks(model)
    prompts = ragged()
    sequences = [prompts.prefix + suffix for suffix in prompts.suffixes]
    try:
        prompts = share_prefix(sequences, share=can_share(model, sequences))
    except ModelError as error:
        pytest.skip(str(error))  # it is not measured at all
    anatomy = Anatomy(0, tuple(names), (), ())
    assert usable(model, anatomy, len(names) - 1, prompts) == (str(entry) not in UNUSABLE)


def test_layers_that_share_keys_are_found_out() -> None:
    entry = next(entry for entry in ENTRIES if str(entry) == "gemma4_text")
    config = entry.config()
    config.num_hidden_layers, config.num_kv_shared_layers, config.per_layer_config = 6, 2, {}
    config.layer_types = ["sliding_attention", "full_attention"] * 3
    torch.manual_seed(0)
    model = randomise(type(entry.model())(config)).eval().requires_grad_(False)
    anatomy = Anatomy(0, tuple(find_blocks(model)[0]), (), ())
    # Layers 4 and 5 look at the keys of 2 and 3.
    assert [usable(model, anatomy, first, ragged()) for first in range(1, 6)] == [True, True, False, False, False]


def test_a_state_beside_the_stream_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, anatomy = model_of("llama")
    assert usable(model, anatomy, 2, ragged())
    blocks = [model.get_submodule(name) for name in anatomy.blocks]
    told: list[Tensor] = []

    def tell(_: nn.Module, __: Any, output: Any) -> None:
        told[:] = [output]

    def listen(_: nn.Module, __: Any, output: Any) -> Any:
        return output + 0.1 * told[0][:, : output.shape[1]]

    handles = [blocks[1].mlp.register_forward_hook(tell), blocks[2].register_forward_hook(listen)]
    with hooked(handles):
        assert not usable(model, anatomy, 2, ragged())
        assert usable(model, anatomy, 1, ragged())


def test_trying_out_never_raises() -> None:
    model, anatomy = model_of("llama")
    assert not usable(model, Anatomy(D_MODEL, ("nowhere.0", "nowhere.1"), (), ()), 1, ragged())

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with hooked([model.register_forward_pre_hook(fail)]):
        assert not usable(model, anatomy, 1, ragged())
    assert usable(model, anatomy, 1, ragged())


def test_the_lowest_block_of_writers() -> None:
    _, anatomy = model_of("llama")
    by_block = {block: [w for w in anatomy.writers if w.block == block] for block in (None, 1, 2)}
    assert lowest_block([*by_block[2], *by_block[1]]) == 1
    assert lowest_block(anatomy.writers) == lowest_block([*by_block[2], *by_block[None]]) == lowest_block([]) == 0
