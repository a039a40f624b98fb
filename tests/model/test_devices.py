"""Every tensor is made on the device of what it meets.

The model is on "meta": tensors there have a shape and no numbers, and may meet those of another device as little as
those of a GPU. Whatever asks for numbers gets ones. What is computed is nothing; where it is, is tested. Torch for CPUs
can neither index nor differentiate fake tensors of a CUDA that is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from abliterate.config import EditSettings
from abliterate.edit.direction import Direction
from abliterate.edit.hooks import ablation, addition, additions, steered
from abliterate.edit.options import plan_for
from abliterate.edit.steering import Steering, Tokens
from abliterate.evaluation.first_tokens import first_tokens
from abliterate.evaluation.scores import kl_divergence, refusal_score
from abliterate.model.activations import MomentsFitter, stream_sites
from abliterate.model.anatomy import Anatomy, find_blocks, study
from abliterate.model.batches import BatchSize, Encoded, SharedPrefix, input_device, last_logits
from abliterate.model.decoding import Decoding
from abliterate.model.generation import _STEPS, _Steps, complete
from families import BLOCKS, COMMON, D_MODEL, byte_tokenizer

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_neox")
PROMPTS = Encoded((5, 6, 7), ((8, 9), (10, 11, 12), (13, 14, 15, 16)))
SIZE = BatchSize(2, 64)


#: What takes tensors of two devices on a GPU too; an index of Python may be on the CPU.
_MAY_MIX = ("copy_", "__getitem__", "__setitem__", "to", "type_as", "data", "__set__")


class _Elsewhere(TorchFunctionMode):
    """Raises where two devices meet, and gives ones where numbers are asked of a tensor that has none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        met = {one.device for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and one.dim()}
        if len(met) > 1 and getattr(func, "__name__", "") not in _MAY_MIX:
            raise RuntimeError(f"{func.__name__}: tensors of two devices, {met}")
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            ones = torch.ones(args[0].shape, dtype=args[0].dtype, device="cpu")
            if func is torch.Tensor.cpu:
                return ones
            if func is torch.Tensor.to and torch.device("cpu") in (
                *map(_device, args[1:]),
                *map(_device, kwargs.values()),
            ):
                return ones.to(*args[1:], **kwargs)
            if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__):
                return func(ones)
            if func is torch.equal:
                return True
        return func(*args, **kwargs)


def _device(value: Any) -> Any:
    """The device that an argument names, if it names one."""
    return torch.device(value) if value == "cpu" else value.device if isinstance(value, torch.Tensor) else value


def config_of(family: str) -> Any:
    kind: dict[str, dict[str, Any]] = {
        "gpt_neox": {"use_parallel_residual": True},
        "gemma2": {"head_dim": 16},
        "qwen3": {"head_dim": 16},
    }
    return AutoConfig.for_model(family, **COMMON | kind.get(family, {}), attn_implementation="eager")


@pytest.fixture(scope="module", params=FAMILIES)
def anatomy(request: pytest.FixtureRequest) -> tuple[str, Anatomy]:
    """Of a model with numbers, which has the same writers."""
    live = AutoModelForCausalLM.from_config(config_of(request.param)).eval()
    for parameter in live.parameters():
        parameter.data = parameter.data + 0.02 * torch.randn(parameter.shape)
    return request.param, study(live)


@pytest.fixture
def fake(anatomy: tuple[str, Anatomy]) -> Iterator[Any]:
    """The same model on a device where nothing else is."""
    with torch.device("meta"):
        live = AutoModelForCausalLM.from_config(config_of(anatomy[0])).eval().requires_grad_(False)
    _STEPS[live] = _Steps.PADDED  # whether caches work is found by numbers
    with _Elsewhere():
        yield live


def direction() -> torch.Tensor:
    return torch.nn.functional.normalize(torch.ones(1, D_MODEL), dim=1)


def blocks_of(model: Any) -> list[Any]:
    return find_blocks(model)[1]


def test_the_model_is_elsewhere_and_mixes_raise(fake: Any) -> None:
    assert input_device(fake).type == "meta"
    with pytest.raises(RuntimeError, match="device"):
        fake.get_output_embeddings()(torch.ones(1, D_MODEL, device="cpu"))
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device="meta") + torch.ones(3, device="cpu")


def test_capture(fake: Any) -> None:
    fitter = MomentsFitter(2, BLOCKS + 1, D_MODEL)
    assert stream_sites(fake, blocks_of(fake), PROMPTS, 2, fitter.update, SIZE) == 3

    def keep(_: list[int], logits: torch.Tensor) -> torch.Tensor:
        return refusal_score(logits, [3, 4]) > 0

    assert stream_sites(fake, blocks_of(fake), PROMPTS, 2, fitter.update, SIZE, keep=keep) == 3
    assert fitter.result().mean.device.type == "cpu"


@pytest.mark.parametrize("editing", [EditSettings(), EditSettings(strength=0.5), EditSettings(norm_preserving=True)])
def test_ablation(anatomy: tuple[str, Anatomy], request: pytest.FixtureRequest, editing: EditSettings) -> None:
    plan = plan_for(anatomy[1], Direction(direction()), editing)
    fake = request.getfixturevalue("fake")
    with ablation(fake, plan):
        found = last_logits(fake, SharedPrefix(fake, PROMPTS.prefix), PROMPTS.suffixes)
    assert found.device.type == "meta"


def test_several_ablations_and_additions_at_once(anatomy: tuple[str, Anatomy], request: pytest.FixtureRequest) -> None:
    plans = [plan_for(anatomy[1], Direction(direction()), EditSettings()) for _ in range(2)]
    fake = request.getfixturevalue("fake")
    with ablation(fake, *plans):
        last_logits(fake, SharedPrefix(fake, PROMPTS.prefix, 2), PROMPTS.suffixes * 2)
    with additions(blocks_of(fake), torch.ones(2, D_MODEL), [0, 2]):
        last_logits(fake, SharedPrefix(fake, PROMPTS.prefix, 2), PROMPTS.suffixes * 2)
    with addition(blocks_of(fake)[-1], torch.ones(1, D_MODEL), leaving=True):
        last_logits(fake, SharedPrefix(fake, ()), PROMPTS.suffixes)


@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_steering(fake: Any, tokens: Tokens) -> None:
    steering = Steering("scale", 2.0, tokens, (0, BLOCKS), direction().expand(2, -1), (1.0, 1.0))
    with steered(blocks_of(fake), steering):
        last_logits(fake, SharedPrefix(fake, PROMPTS.prefix), PROMPTS.suffixes)
        complete(fake, byte_tokenizer(), PROMPTS, 3, SIZE)


def test_scoring(fake: Any) -> None:
    found = first_tokens(fake, PROMPTS, [3, 4], SIZE, keep=torch.float32)
    assert found.logits.device.type == "cpu"
    logits = last_logits(fake, SharedPrefix(fake, PROMPTS.prefix), PROMPTS.suffixes)
    assert kl_divergence(logits, logits).device.type == "meta"


def test_a_gradient_step(anatomy: tuple[str, Anatomy], request: pytest.FixtureRequest) -> None:
    plan = plan_for(anatomy[1], Direction(direction()), EditSettings())
    fake = request.getfixturevalue("fake")
    scale = torch.ones(1, requires_grad=True, device="meta")
    edits = tuple(replace(edit, basis=edit.basis.to("meta") * scale) for edit in plan.edits)
    with ablation(fake, replace(plan, edits=edits)):
        shared = SharedPrefix(fake, PROMPTS.prefix, grad=True)
        logits = last_logits(fake, shared, PROMPTS.suffixes)
        base = torch.zeros(logits.shape).to(logits)
        (gradient,) = torch.autograd.grad(kl_divergence(base, logits).sum(), [scale])
    assert gradient.device.type == "meta"


@pytest.mark.parametrize("asked", [{}, {"repetition_penalty": 1.1, "do_sample": True, "top_k": 5}])
def test_generation(fake: Any, asked: dict[str, Any]) -> None:
    replies = complete(fake, byte_tokenizer(), PROMPTS, 3, SIZE, decoding=Decoding(asked))
    assert len(replies) == 3
