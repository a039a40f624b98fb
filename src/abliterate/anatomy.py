"""Blocks, and every writer to the residual stream, named by convention and proved by residual accounting.

A table of names says which linear maps *may* write to the stream. Then the books are closed on a probe: for every
block, output − input must equal the sum of what its writers wrote, after post-norms and constant multipliers. A block
whose books do not close to 1e-3 has a writer nobody knows, and the run stops there. An architecture never seen before
whose books close needs no new code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from abliterate.errors import AnatomyError, CheckpointError, NumericalError
from abliterate.inference import body, hooked, input_device

#: A block's books must close to this, relative to what the block wrote (computed in float32).
TOLERANCE = 1e-3

_PROBE_ROWS, _PROBE_TOKENS = 2, 12


class Kind(StrEnum):
    """What part of the network a writer belongs to."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"


#: Last part of the module's name → the part it writes for, or None where the parent module decides.
WRITER_NAMES: dict[str, Kind | None] = {
    "o_proj": Kind.ATTENTION,
    "out_proj": Kind.ATTENTION,
    "wo": None,
    "dense": None,
    "c_proj": None,
    "down_proj": Kind.MLP,
    "dense_4h_to_h": Kind.MLP,
    "fc2": Kind.MLP,
    "fc_out": Kind.MLP,
    "w2": Kind.MLP,
}

#: Parts of class names of blocks that keep a state other than keys and values.
_STATEFUL_HINTS = (
    "mamba",
    "recurrent",
    "rwkv",
    "deltanet",
    "linearattention",
    "shortconv",
    "xlstm",
    "mlstm",
    "hybrid",
)


@dataclass(frozen=True, slots=True)
class Writer:
    """A linear map whose output is added to the residual stream.

    `axis` is the axis of its weight that runs over the stream (0: Linear [d, d_in]; 1: Conv1D [d_in, d] and
    embeddings [rows, d]). `gain` [d] is set when a norm x ↦ gain ⊙ x / rms(x) stands between the map and the
    stream, with `centred` when that norm subtracts the mean first. `tied` marks an embedding that is also the head.
    """

    module: str
    kind: Kind
    block: int | None
    axis: int
    bias: bool
    multiplier: float = 1.0
    post_norm: str | None = None
    gain: Float[Tensor, " d"] | None = None
    centred: bool = False
    tied: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names in the model of the tensors an edit of this writer changes."""
        weight = f"{self.module}.weight"
        return (weight, f"{self.module}.bias") if self.bias else (weight,)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """All writers of a model in stream order, and how well the books closed.

    `closure` holds one relative error for the embedding and one per block.
    """

    d_model: int
    blocks: tuple[str, ...]
    writers: tuple[Writer, ...]
    closure: tuple[float, ...]

    @property
    def layers(self) -> int:
        """Number of blocks L; sites are 0..L."""
        return len(self.blocks)


@dataclass(slots=True)
class _Observed:
    """One writer's output in a probe run and the norm that took it in, if any."""

    name: str
    module: nn.Module
    output: Tensor
    norm_name: str | None = None
    norm: nn.Module | None = None
    normed: Tensor | None = None

    @property
    def written(self) -> Tensor:
        return self.output if self.normed is None else self.normed


def study(model: Any, *, seed: int = 0) -> Anatomy:
    """Name every writer of a live `model` and prove that there is no other.

    Costs one short forward pass, and each block once more in float32.

    Raises `AnatomyError`, naming the block, for anything that is not fully understood.
    """
    _refuse_multimodal(model)
    names, blocks = find_blocks(model)
    _refuse_stateful(model, names, blocks)
    d_model = model.config.get_text_config().hidden_size
    calls, embedded, stream = _probe(model, blocks, seed)
    embeddings, first_error = _embedding_writers(model, names, embedded, stream, d_model)
    writers, closure = list(embeddings), [first_error]
    for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
        found, error = _block_writers(block, index, name, calls[index], d_model)
        writers += found
        closure.append(error)
    return Anatomy(d_model, tuple(names), tuple(writers), tuple(closure))


def find_blocks(model: Any) -> tuple[list[str], list[nn.Module]]:
    """The decoder's blocks in order, with their full names.

    Raises `AnatomyError` when no list of modules has as many entries as the configuration says layers.
    """
    expected = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == expected
    ]
    inner = [(name, module) for name, module in lists if not any(_within(name, other) for other, _ in lists)]
    if len(inner) != 1:
        found = ", ".join(name for name, _ in inner) or "none"
        raise AnatomyError(f"blocks: expected one list of {expected} modules in {type(model).__name__}, found {found}")
    name, module = inner[0]
    return [f"{name}.{i}" for i in range(len(module))], list(module)


def _within(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def _refuse_multimodal(model: Any) -> None:
    towers = [key for key in ("vision_config", "audio_config") if getattr(model.config, key, None) is not None]
    if towers:
        tower = next((n for n, _ in model.named_modules() if "vision" in n or "audio" in n), towers[0])
        raise AnatomyError(
            f"block '{tower}' of {type(model).__name__}: multimodal models are not supported yet; "
            "expected a text-only decoder"
        )


def _refuse_stateful(model: Any, names: Sequence[str], blocks: Sequence[nn.Module]) -> None:
    for name, block in zip(names, blocks, strict=True):
        for part, module in block.named_modules():
            kind = type(module).__name__
            if any(hint in kind.lower() for hint in _STATEFUL_HINTS):
                raise AnatomyError(
                    f"block {name} ({kind}{' at ' + part if part else ''}): state-space and linear-attention "
                    "blocks are not supported yet; expected attention with keys and values"
                )
    if getattr(model, "_is_stateful", False):
        raise AnatomyError(
            f"block {names[0]} ({type(blocks[0]).__name__}): keeps a recurrent state, which is not supported yet"
        )


@dataclass(slots=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _probe(
    model: Any, blocks: Sequence[nn.Module], seed: int
) -> tuple[list[_Call], list[_Observed], Float[Tensor, "b s d"]]:
    """Run random tokens; return each block's arguments, the embeddings' outputs, and the stream at site 0."""
    calls: list[_Call | None] = [None] * len(blocks)
    embedded: list[_Observed] = []
    handles = []
    for index, block in enumerate(blocks):

        def keep(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            calls[index] = _Call(args, dict(kwargs))

        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    inside = {id(module) for block in blocks for module in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module) not in inside:

            def seen(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                embedded.append(_Observed(name, module, output.detach()))

            handles.append(module.register_forward_hook(seen))
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (_PROBE_ROWS, _PROBE_TOKENS), generator=generator)
    with hooked(handles), torch.inference_mode():
        body(model)(input_ids=ids.to(input_device(model)), use_cache=False)
    done = [call for call in calls if call is not None]
    if len(done) != len(blocks):
        missing = next(i for i, call in enumerate(calls) if call is None)
        raise AnatomyError(f"block {missing} ({type(blocks[missing]).__name__}): was not called in a forward pass")
    return done, embedded, _stream_in(done[0])


def _stream_in(call: _Call) -> Tensor:
    hidden: Tensor = call.args[0] if call.args else call.kwargs["hidden_states"]
    return hidden


def stream_out(output: Any) -> Tensor:
    """The residual stream among what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


def _embedding_writers(
    model: Any, names: Sequence[str], embedded: list[_Observed], stream: Tensor, d_model: int
) -> tuple[list[Writer], float]:
    outputs = [_expand(seen.output, stream) for seen in embedded if seen.output.shape[-1] == d_model]
    kept = [seen for seen in embedded if seen.output.shape[-1] == d_model]
    # The stream at site 0 is a sum of stored numbers: it can be no more exact than their dtype.
    tolerance = max(TOLERANCE, 4 * torch.finfo(stream.dtype).eps)
    multipliers, error = _close_books(stream, outputs, tolerance)
    if error > tolerance:
        raise AnatomyError(
            f"embedding (input of block {names[0]}): the books do not close: relative error {error:.2g}, expected at "
            f"most {tolerance:.0e}; known writers: {', '.join(seen.name for seen in kept) or 'none'}"
        )
    head = model.get_output_embeddings()
    return [
        Writer(
            module=seen.name,
            kind=Kind.EMBEDDING,
            block=None,
            axis=1,
            bias=False,
            multiplier=multiplier,
            tied=head is not None and head.weight is seen.module.weight,
        )
        for seen, multiplier in zip(kept, multipliers, strict=True)
    ], error


def _expand(output: Tensor, stream: Tensor) -> Tensor:
    """Position embeddings may come as [s, d] or [1, s, d]."""
    return output.to(stream.device).expand_as(stream)


def _block_writers(block: nn.Module, index: int, name: str, call: _Call, d_model: int) -> tuple[list[Writer], float]:
    """Writers of one block, from a float32 copy of it run on the arguments it was called with."""
    twin = copy.deepcopy(block).float()
    candidates = list(_candidates(twin, d_model))
    observed, before, after = _observe(twin, candidates, call)
    if not bool(torch.isfinite(after).all()):
        raise NumericalError(f"block {name}: expected finite numbers, found NaN or infinity; is the model damaged?")
    observed = _writing(after - before, observed)
    multipliers, error = _close_books(after - before, [seen.written for seen in observed], TOLERANCE)
    suspects = _suspects(twin)
    if not error <= TOLERANCE or suspects:
        raise AnatomyError(_not_closed(name, block, error, [seen.name for seen in observed], suspects))
    writers = []
    for seen, multiplier in zip(observed, multipliers, strict=True):
        writer = Writer(
            module=f"{name}.{seen.name}",
            kind=_kind(seen.name),
            block=index,
            axis=0 if isinstance(seen.module, nn.Linear) else 1,
            bias=getattr(seen.module, "bias", None) is not None,
            multiplier=multiplier,
        )
        writers.append(_with_post_norm(writer, seen, name))
    return writers, error


def _writing(written: Float[Tensor, "b s d"], observed: list[_Observed]) -> list[_Observed]:
    """Leave out maps with a writer's name that only feed another map: the books close without them."""
    multipliers, error = _close_books(written, [seen.written for seen in observed], TOLERANCE)
    if error > TOLERANCE:
        return observed
    return [seen for seen, multiplier in zip(observed, multipliers, strict=True) if abs(multiplier) > TOLERANCE]


def _candidates(block: nn.Module, d_model: int) -> Iterator[tuple[str, nn.Module]]:
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if name.rpartition(".")[2] not in WRITER_NAMES or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if weight.shape[0 if isinstance(module, nn.Linear) else 1] == d_model:
            yield name, module


def _kind(name: str) -> Kind:
    parent, _, leaf = name.rpartition(".")
    known = WRITER_NAMES[leaf]
    return known if known is not None else (Kind.ATTENTION if "att" in parent.lower() else Kind.MLP)


def _observe(
    block: nn.Module, candidates: Sequence[tuple[str, nn.Module]], call: _Call
) -> tuple[list[_Observed], Tensor, Tensor]:
    """Run a float32 block; return what each writer wrote (with its post-norm) and the stream before and after."""
    observed: list[_Observed] = []
    handles = []
    for name, module in candidates:

        def seen(module: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
            observed.append(_Observed(name, module, output.detach().clone()))

        handles.append(module.register_forward_hook(seen))
    linear = {id(module) for _, module in candidates}
    for name, module in block.named_modules():
        if id(module) in linear or next(module.children(), None) is not None:
            continue

        def after(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            _note_norm(observed, name, module, args, output)

        handles.append(module.register_forward_hook(after))
    args = tuple(_to_float(value) for value in call.args)
    kwargs = {key: _to_float(value) for key, value in call.kwargs.items()}
    before = _stream_in(_Call(args, kwargs)).clone()
    with hooked(handles), torch.inference_mode():
        after_block = stream_out(block(*args, **kwargs))
    return observed, before, after_block


def _note_norm(observed: list[_Observed], name: str, module: nn.Module, args: Any, output: Any) -> None:
    """Remember a module that takes a writer's output as it is and gives something else of the same shape."""
    if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
        return
    for seen in observed:
        same_shape = args[0].shape == seen.output.shape == output.shape
        if same_shape and torch.equal(args[0], seen.output) and not torch.equal(output, seen.output):
            seen.norm_name, seen.norm, seen.normed = name, module, output.detach().clone()


def _to_float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_to_float(item) for item in value)
    return value


def _close_books(
    written: Float[Tensor, "b s d"], parts: Sequence[Tensor], tolerance: float
) -> tuple[list[float], float]:
    """Constant multipliers m with Σ m·part = written, and the relative error left.

    All ones when that closes; else the least-squares fit (residual and embedding multipliers are one number per
    writer: a handful of unknowns cannot close thousands of equations by chance).
    """
    if not parts:
        return [], 1.0
    if any(part.numel() != written.numel() for part in parts):  # some tokens only: routed
        return [1.0] * len(parts), float("inf")
    target = written.double().flatten().cpu()
    matrix = torch.stack([part.double().flatten().cpu() for part in parts], dim=1)
    ones = torch.ones(matrix.shape[1], dtype=torch.float64)
    if (error := _relative(target, matrix @ ones)) <= tolerance:
        return ones.tolist(), error
    fitted = torch.linalg.lstsq(matrix, target[:, None]).solution[:, 0]
    return fitted.tolist(), _relative(target, matrix @ fitted)


def _relative(target: Tensor, found: Tensor) -> float:
    return float((target - found).norm() / target.norm().clamp_min(1e-30))


def _suspects(block: nn.Module) -> list[str]:
    """Weights with an axis for experts: maps that no table entry can stand for."""
    return [name for name, weight in block.named_parameters() if weight.dim() == 3 and weight.shape[1] > 1]


def _not_closed(name: str, block: nn.Module, error: float, known: Sequence[str], suspects: Sequence[str]) -> str:
    what = f"block {name} ({type(block).__name__})"
    hint = f"; mixture-of-experts weights are not supported yet: {', '.join(suspects)}" if suspects else ""
    return (
        f"{what}: not every writer to the residual stream is known: relative error {error:.2g}, expected at most "
        f"{TOLERANCE:.0e}; known writers: {', '.join(known) or 'none'}{hint}"
    )


def _with_post_norm(writer: Writer, seen: _Observed, block: str) -> Writer:
    """Learn the gain of the norm after a writer, and check that it is a norm of the form we can undo."""
    if seen.norm is None or seen.normed is None:
        return writer
    where = f"block {block}: norm '{seen.norm_name}' ({type(seen.norm).__name__}) after '{seen.name}'"
    if getattr(seen.norm, "bias", None) is not None:
        raise AnatomyError(f"{where}: a post-norm with a bias is not supported yet; expected a norm without one")
    gain, centred = norm_gain(seen.norm, seen.output.shape[-1])
    gain = gain.to(seen.output)
    x = seen.output - seen.output.mean(-1, keepdim=True) if centred else seen.output
    cosine = torch.cosine_similarity(gain * x, seen.normed, dim=-1)
    if float(cosine.min()) < 1 - 1e-5:
        raise AnatomyError(f"{where}: expected gain * x / rms(x), found another function (cosine {cosine.min():.4f})")
    return replace(writer, post_norm=f"{block}.{seen.norm_name}", gain=gain.float().cpu(), centred=centred)


def norm_gain(norm: nn.Module, d_model: int) -> tuple[Float[Tensor, " d"], bool]:
    """The gain of a norm, up to a constant, and whether it takes the mean off first.

    Learnt from what the norm does to ±1, not from its class: some multiply by `weight`, some by 1 + `weight`.
    """
    device = next((parameter.device for parameter in norm.parameters()), None)  # some norms have no gain
    signs = torch.ones(2, d_model, device=device)
    signs[1, ::2] = -1  # (nearly) without a mean, so that a centring norm shows its gain too
    with torch.inference_mode():
        plain, alternating = norm(signs)
    centred = bool(plain.abs().max() < 1e-3 * alternating.abs().max())
    gain = alternating * signs[1] if centred else plain
    return gain.float().cpu(), centred


def names_on_disk(model: Any, parameters: Sequence[str], stored: Sequence[str]) -> dict[str, str]:
    """Map names of `parameters` in the model to names of tensors in its checkpoint.

    transformers renames on loading: its own table is read backwards, and the prefix of the body may be absent.

    Raises `CheckpointError` when a parameter has no tensor, or a tensor would be matched twice.
    """
    available = set(stored)
    prefix = model.base_model_prefix + "."
    mapping: dict[str, str] = {}
    for name in parameters:
        candidates = dict.fromkeys([name, _saved_name(model, name), name.removeprefix(prefix), prefix + name])
        found = [candidate for candidate in candidates if candidate in available]
        if len(found) != 1:
            raise CheckpointError(
                f"parameter '{name}': expected exactly one tensor in the checkpoint, found "
                f"{', '.join(found) if found else 'none'} (looked for {', '.join(candidates)})"
            )
        mapping[name] = found[0]
    if len(set(mapping.values())) != len(mapping):
        twice = next(t for t in mapping.values() if list(mapping.values()).count(t) > 1)
        raise CheckpointError(f"tensor '{twice}': expected one parameter to hold it, found several")
    return mapping


def _saved_name(model: Any, name: str) -> str:
    from transformers.core_model_loading import revert_weight_conversion

    saved = list(revert_weight_conversion(model, {name: torch.empty(0)}))
    return str(saved[0]) if len(saved) == 1 else name
