"""Files for llama.cpp: a plan's low-rank change as a LoRA adapter, and vectors to add as a control vector.

**LoRA.** For a weight W [d, n] with factors A [k, n] and B [d, k] llama.cpp computes W x + c (alpha / k) B (A x), where
c is the scale that the user gives (`--lora FILE` is c = 1). The token embedding is looked up instead of multiplied, so
its A is stored turned around, [vocabulary, k]. Experts have A [E, k, n] and B [E, d, k]. At c = 1 the change is B A,
on top of whatever numbers the base model's file holds: on a quantised file what its rounding leaves of a direction
stays. There is no place for the change of a bias, an adapter on an embedding that is the head as well aborts llama.cpp,
and some of its model graphs do not look for adapters: all of this is refused by name.

**Control vectors.** `direction.N` is added to the residual stream where it leaves block N, at every token. Our layer l
is where the stream enters block l, so N = l − 1; the last, l = L, is N = L − 1. llama.cpp has no place for N = 0, and
so none for our layers 0 and 1.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.edit.lora import LowRank
from abliterate.edit.plan import Plan
from abliterate.edit.weights.tensors import TensorEdit, tensor_edits
from abliterate.errors import CheckpointError, ModelError, NumericalError, UsageError
from abliterate.files.atomic import replacing
from abliterate.files.bounded import open_regular
from abliterate.files.checkpoint import Checkpoint
from abliterate.files.checkpoint.reading import open_tensor
from abliterate.model._compat import read_gguf
from abliterate.model.anatomy import Kind, Stored
from abliterate.record import ResidualPart
from abliterate.texts import printable

#: Bytes of a GGUF file before its first entry: magic, version, two counts.
_HEADER = 24

#: How that entry starts: length of the key, key, and 8 for a string.
_FIRST_ENTRY = struct.pack("<Q20sI", 20, b"general.architecture", 8)

#: llama.cpp's name for what transformers calls `model_type`, where they differ by more than `_` and `-`.
_ARCHITECTURES = {
    "bamba": "granitehybrid",
    "cohere": "command-r",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "falcon_mamba": "mamba",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "glm": "chatglm",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "gpt_bigcode": "starcoder",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "internlm3": "llama",
    "llama4_text": "llama4",
    "mimo_v2_flash": "mimo2",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo3": "olmo2",
    "phi": "phi2",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_5_text": "qwen35",
    "solar_open": "glm4moe",
}

#: Where a LoRA would load and do something else than B A: architecture → end of the GGUF tensor name, and why.
_UNADAPTED = "llama.cpp applies no adapter to it"
_CONVERTED = "llama.cpp's converter changes this weight"
_LORA_REFUSED = {
    "falcon-h1": ("", f"{_CONVERTED}: it multiplies the model's constants into it"),
    "jais": ("", f"{_CONVERTED}: it multiplies the model's constants into it"),
    "kimi-linear": ("attn_output.weight", _UNADAPTED),
    "plamo": ("attn_output.weight", f"{_CONVERTED}: it reorders its columns"),
    "qwen35": ("ssm_out.weight", f"{_CONVERTED}: it reorders its columns"),
    "qwen35moe": ("ssm_out.weight", f"{_CONVERTED}: it reorders its columns"),
}

#: Graphs without the addition, or (gemma3n) with a stream that is not one vector per token.
_NO_CONTROL_VECTORS = ("gemma3n", "plamo2")


def architecture_of(model_type: str) -> str:
    """llama.cpp's name of the architecture that a transformers configuration calls `model_type`.

    Raises `UsageError` when it is not known to the installed `gguf` package.
    """
    known = {_plain(name): name for name in _library().MODEL_ARCH_NAMES.values()}
    name = known.get(_plain(_ARCHITECTURES.get(model_type, model_type)))
    if name is None:
        raise UsageError(
            f"model type '{model_type}': expected one that llama.cpp has, found none of that name in the gguf package; "
            "give the model as a .gguf file, or apply to weights"
        )
    return str(name)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "")


def stored_architecture(path: Path) -> str:
    """`general.architecture` of a GGUF file. Raises `CheckpointError` when there is none."""
    try:
        return _first_value(path) or str(read_gguf(path).fields["general.architecture"].contents())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: expected a GGUF file that names its architecture, found none") from error


def _first_value(path: Path) -> str | None:
    """The architecture where it is the first entry, as all known writers have it: the others, with the vocabulary
    among them, take seconds to read.
    """
    with open(open_regular(path), "rb") as file:
        head = file.read(256)
    start = _HEADER + len(_FIRST_ENTRY)
    if head[:4] != b"GGUF" or head[_HEADER:start] != _FIRST_ENTRY:
        return None
    length = int.from_bytes(head[start : start + 8], "little")
    return head[start + 8 : start + 8 + length].decode()


def write_gguf_lora(path: Path, factors: Sequence[LowRank], *, architecture: str, layers: int, tied: bool) -> None:
    """Write the low-rank change of a model with `layers` blocks as a llama.cpp LoRA adapter, in float32.

    `architecture` is llama.cpp's name, `tied` says whether the head shares the embedding's weight. The file is written
    whole or not at all. alpha is the largest rank, so that a change of one rank is stored as it is.

    Raises `UsageError`, before anything is written, for a change that this format cannot hold exactly.
    """
    if not factors:
        raise UsageError("GGUF LoRA: expected at least one weight to change, found none")
    named = _named(factors, architecture, layers, tied)
    alpha = max(factor.rank for factor in factors)
    with _written(path, architecture) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        for name, factor in named.items():
            a = factor.a.mT if factor.kind is Kind.EMBEDDING else factor.a
            writer.add_tensor(f"{name}.lora_a", _numbers(factor.parameter, a))
            writer.add_tensor(f"{name}.lora_b", _numbers(factor.parameter, factor.b * (factor.rank / alpha)))


def write_control_vector(
    path: Path, vectors: Mapping[int, Float[Tensor, " d"]], *, architecture: str, layers: int
) -> None:
    """Write vectors to add to the residual stream, by our layer (2 … `layers`), as a llama.cpp control vector.

    They are added at every token with the scale that the user gives (`--control-vector FILE` is 1). The file is written
    whole or not at all. Layer l is stored as `direction.(l − 1)`; see the module's docstring.

    Raises `UsageError`, before anything is written, for a layer where llama.cpp adds nothing.
    """
    if architecture in _NO_CONTROL_VECTORS:
        raise UsageError(f"control vector: llama.cpp applies none to models of architecture '{architecture}'")
    if not vectors:
        raise UsageError("control vector: expected at least one vector, found none")
    for layer, vector in vectors.items():
        if not 2 <= layer <= layers:
            raise UsageError(
                f"control vector: llama.cpp can add to layers 2 to {layers} of this model, found layer {layer}; "
                "choose a direction of another layer"
            )
        if vector.dim() != 1:
            raise UsageError(f"control vector: expected one vector for layer {layer}, found shape {list(vector.shape)}")
    with _written(path, "controlvector") as writer:
        writer.add_string("controlvector.model_hint", architecture)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer - 1}", _numbers(f"layer {layer}", vector))


def residuals_in(
    path: Path, edited: Checkpoint, plan: Plan, names: Mapping[str, tuple[Stored, ...]], found: Sequence[ResidualPart]
) -> tuple[ResidualPart, ...]:
    """What is left of the direction in the numbers that a GGUF file stores, for tensors that it holds as they are.

    `edited` is the checkpoint that it was converted from, after `plan`; `found` is what was left there. Tensors that
    llama.cpp's converter merges or changes are left out.

    Raises `CheckpointError` for a file that cannot be read.
    """
    architecture = stored_architecture(path)
    known = {part.tensor: part for part in found}
    end, _ = _LORA_REFUSED.get(architecture, (None, None))
    residuals = []
    try:
        stored = {tensor.name: tensor for tensor in read_gguf(path).tensors}
        table = _tensor_names(architecture, sum(name.endswith(".attn_norm.weight") for name in stored) or len(stored))
        for task in tensor_edits(edited, plan, names):
            name = _tensor_name(table, task.stored.tensor)
            tensor = stored.get(name or "")
            if tensor is None or tuple(tensor.shape.tolist()[::-1]) != task.grid.layout.shape:
                continue
            if end is None or not tensor.name.endswith(end):
                residuals.append(_residual(known[task.info.name], task, tensor))
    except (ValueError, KeyError, IndexError) as error:  # of numpy and gguf, for what is damaged
        raise CheckpointError(f"{path}: expected the edited tensors in it, found others ({error})") from error
    return tuple(residuals)


def _residual(part: ResidualPart, task: TensorEdit, tensor: Any) -> ResidualPart:
    """The residual of one tensor, block by block: its numbers in the file beside those in the checkpoint."""
    library, grid, reads = _library(), task.grid, task.edit.reads.to(task.grid.dtype)
    data = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
    (buffer,) = grid.buffers(1)
    after = rounding = size = 0.0
    with open_tensor(task.info) as reader:
        for matrix in range(grid.matrices):
            left = torch.zeros(len(reads), grid.columns, dtype=grid.dtype)
            for block in grid.blocks(matrix):
                rows = library.quants.dequantize(data[block.first : block.first + block.count], tensor.tensor_type)
                new = torch.from_numpy(rows.astype(np.float32, copy=True)).to(grid.dtype)
                old = grid.numbers(grid.read(reader, block), block, buffer)
                rounding += float((new - old).square().sum())
                size += float(old.square().sum())
                if grid.in_rows:
                    after += float((new @ reads.T).square().sum())
                else:
                    left += reads[:, block.rows] @ new
            after += float(left.square().sum())
    return part.model_copy(
        update={
            "format": tensor.tensor_type.name,
            "after": after**0.5,
            "ratio": after**0.5 / part.before if part.before else 0.0,
            "rounding": (rounding / size) ** 0.5 if size else 0.0,
        }
    )


def read_control_vector(path: Path) -> dict[int, Float[Tensor, " d"]]:
    """The vectors of a control vector file (of this package, repeng or llama.cpp), by our layer: where they are added.

    `Model.add` takes them as they are.

    Raises `UsageError` for a file that is no control vector, `CheckpointError` for one that is damaged.
    """
    path = Path(path)
    _library()  # or say that it is missing
    if not path.is_file():
        raise UsageError(f"control vector '{path}': expected a .gguf file, found none")
    try:
        reader = read_gguf(path)
        kind = str(reader.fields["general.architecture"].contents())
        vectors = {one.name: np.asarray(one.data) for one in reader.tensors}
    except Exception as error:  # a damaged file shows as any error of numpy or gguf
        raise CheckpointError(f"control vector '{path}': expected a GGUF file, found one that is damaged") from error
    names = {name: re.fullmatch(r"direction\.(\d{1,5})", name) for name in vectors}
    if kind != "controlvector" or not vectors or not all(names.values()):
        held = ", ".join(map(printable, [kind, *vectors][:4]))
        raise UsageError(f"control vector '{path}': expected tensors 'direction.N' alone, found {held}")
    forms = {(vector.shape, vector.dtype.kind) for vector in vectors.values()}
    if len(forms) > 1 or min(forms)[1] != "f" or len(min(forms)[0]) != 1:  # quantised ones are bytes
        raise CheckpointError(f"control vector '{path}': expected vectors of floats of one width, found {forms}")
    layers = {int(match[1]) + 1: vectors[name] for name, match in names.items() if match is not None}
    read = {layer: torch.from_numpy(layers[layer].astype(np.float32)) for layer in sorted(layers)}
    if not all(bool(vector.isfinite().all()) for vector in read.values()):
        raise NumericalError(f"control vector '{path}': expected finite numbers, found NaN or infinity")
    return read


def _named(factors: Sequence[LowRank], architecture: str, layers: int, tied: bool) -> dict[str, LowRank]:
    """The factors by the name of their tensor in a GGUF file; refuses what a LoRA cannot hold."""
    names = _tensor_names(architecture, layers)
    named: dict[str, LowRank] = {}
    for factor in factors:
        name = _tensor_name(names, factor.parameter)
        if reason := _refusal(factor, name, architecture, tied):
            raise UsageError(f"GGUF LoRA: {factor.parameter}: {reason}; apply to weights and convert those instead")
        if name is None or name in named:
            raise UsageError(f"GGUF LoRA: {factor.parameter}: expected one change of a weight, found another")
        named[name] = factor
    return named


def _tensor_name(names: Any, parameter: str) -> str | None:
    """Experts have no `.weight` in transformers, and the text part of a larger model has a name of its own."""
    plain = parameter.replace("language_model.", "")
    found = names.get_name(parameter, try_suffixes=(".weight",)) or names.get_name(plain, try_suffixes=(".weight",))
    return None if found is None else str(found).removesuffix(".weight") + ".weight"


def _refusal(factor: LowRank, name: str | None, architecture: str, tied: bool) -> str | None:
    """Why llama.cpp could not apply this factor exactly, or None."""
    if name is None:
        return f"a GGUF file of architecture '{architecture}' has no tensor for it"
    if factor.bias is not None and bool(factor.bias.any()):
        return "its bias changes too, and a llama.cpp LoRA holds no biases"
    if tied and factor.kind is Kind.EMBEDDING:
        return "it is the head as well, and llama.cpp cannot change one without the other"
    if factor.kind is Kind.EMBEDDING and name != "token_embd.weight":
        return _UNADAPTED
    if (factor.a.dim() == 3) != name.endswith("_exps.weight"):
        return f"expected [experts, rank, n] only where '{name}' holds experts, found {list(factor.a.shape)}"
    end, reason = _LORA_REFUSED.get(architecture, (None, None))
    return reason if end is not None and name.endswith(end) else None


def _tensor_names(architecture: str, layers: int) -> Any:
    gguf = _library()
    for known, name in gguf.MODEL_ARCH_NAMES.items():
        if name == architecture:
            return gguf.get_tensor_name_map(known, layers)
    raise UsageError(f"GGUF LoRA: architecture '{architecture}' is not known to the gguf package; upgrade it")


def _numbers(what: str, tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(f"{what}: expected finite numbers, found NaN or infinity")
    numbers: np.ndarray[Any, np.dtype[np.float32]] = tensor.detach().float().cpu().contiguous().numpy()
    return numbers


@contextlib.contextmanager
def _written(path: Path, architecture: str) -> Iterator[Any]:
    """A GGUF writer whose file appears at `path`, flushed and in one step, when the body is done."""
    gguf = _library()
    with replacing(path) as draft:
        writer = gguf.GGUFWriter(draft, architecture)
        try:
            yield writer
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def require_library() -> None:
    """Raise `ModelError` where the library that reads and writes GGUF is not installed."""
    _library()


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModelError("GGUF files need an extra; pip install 'abliterate[gguf]'") from error
    return gguf
