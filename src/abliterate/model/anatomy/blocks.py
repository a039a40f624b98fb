"""Blocks, and what each is called with in a probe of random tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.errors import AnatomyError
from abliterate.model.batches import body, hooked, input_device

PROBE_ROWS, PROBE_TOKENS = 2, 12


@dataclass(slots=True)
class Call:
    """The arguments a block was called with, and the stream it gave back."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: Tensor | None = None

    @property
    def stream(self) -> Float[Tensor, "*b s d"]:
        """The residual stream among the arguments."""
        value = self.args[0] if self.args else self.kwargs.get("hidden_states")
        if not isinstance(value, Tensor):
            raise AnatomyError("blocks: expected the residual stream as first argument or as 'hidden_states'")
        return value

    def floated(self, device: torch.device) -> Call:
        """The same in float32 on a device."""
        args = tuple(to_float(value, device) for value in self.args)
        return Call(args, {name: to_float(value, device) for name, value in self.kwargs.items()})

    def with_stream(self, stream: Tensor) -> Call:
        """The same with another stream."""
        if self.args:
            return Call((stream, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": stream})


def to_float(value: Any, device: torch.device) -> Any:
    """Tensors inside `value` on a device, in float32 where they are floats."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(to_float(item, device) for item in value) if type(value) in (tuple, list) else value
    if isinstance(value, Mapping) and type(value) is dict:
        return {key: to_float(item, device) for key, item in value.items()}
    return value


def stream_out(output: Any) -> Tensor:
    """The residual stream among what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


#: Parts of names of modules that look at something other than text.
_TOWERS = ("vision", "visual", "image", "audio", "speech")


def find_blocks(model: Any) -> tuple[list[str], list[nn.Module]]:
    """The text decoder's blocks in order, with their full names.

    Of the outermost lists of modules, without towers for images and sound, the one with the most parameters among
    those as long as the configuration says; if there is none of that length, of all.

    Raises `AnatomyError` when there is no list of modules.
    """
    config = model.config.get_text_config(decoder=True)
    wanted = {getattr(config, name, None) for name in ("num_hidden_layers", "decoder_layers", "num_decoder_layers")}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(word in name for word in _TOWERS) and len(module)
    ]
    decoders = [item for item in lists if "decoder." in item[0]]  # beside an encoder
    lists = decoders or lists
    lists = [item for item in lists if len(item[1]) in wanted] or lists
    outer = [(name, module) for name, module in lists if not any(_within(name, other) for other, _ in lists)]
    if not outer:
        raise AnatomyError(f"blocks: expected a list of modules in {type(model).__name__}, found none")
    name, module = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [f"{name}.{i}" for i in range(len(module))], list(module)


def _within(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def probe_ids(model: Any, seed: int) -> Tensor:
    """Random token ids [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (PROBE_ROWS, PROBE_TOKENS), generator=generator).to(input_device(model))


def probe(model: Any, blocks: list[nn.Module], ids: Tensor) -> list[Call]:
    """Run random tokens; return what each block was called with and gave back."""
    calls: list[Call | None] = [None] * len(blocks)
    handles = []
    for index, block in enumerate(blocks):

        def keep(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            if calls[index] is None:
                calls[index] = Call(args, dict(kwargs))

        def seen(_: nn.Module, __: Any, output: Any, index: int = index) -> None:
            call = calls[index]
            if call is not None and call.given is None:
                call.given = stream_out(output).detach()

        handles += [block.register_forward_pre_hook(keep, with_kwargs=True), block.register_forward_hook(seen)]
    try:
        with hooked(handles), torch.inference_mode():
            body(model)(input_ids=ids, use_cache=False)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise AnatomyError(
            f"the blocks of {type(model).__name__} cannot be studied: expected a forward pass on token ids, found that "
            f"transformers {transformers.__version__} cannot run it ({type(error).__name__}: {error})"
        ) from error
    done = [call for call in calls if call is not None]
    if len(done) != len(blocks):
        missing = next(i for i, call in enumerate(calls) if call is None)
        raise AnatomyError(f"block {missing} ({type(blocks[missing]).__name__}): was not called in a forward pass")
    return done


def check_between(names: list[str], calls: list[Call], tolerance: float) -> None:
    """Nothing may be written to the stream between two blocks: only a number for each token may scale it."""
    for name, before, after in zip(names[1:], calls, calls[1:], strict=False):
        if before.given is None or before.given.shape != after.stream.shape:
            raise AnatomyError(f"block {name}: expected the stream that the block before it gave, found another shape")
        given, taken = before.given.cpu().double(), after.stream.cpu().double()
        scale = (given * taken).sum(-1, keepdim=True) / given.square().sum(-1, keepdim=True).clamp_min(1e-30)
        error = float((taken - scale * given).norm() / taken.norm().clamp_min(1e-30))
        if error > max(tolerance, 4 * torch.finfo(after.stream.dtype).eps):
            raise AnatomyError(
                f"block {name}: something is written to the residual stream between it and the block before it: "
                f"relative error {error:.2g}, expected at most {tolerance:.0e}"
            )
