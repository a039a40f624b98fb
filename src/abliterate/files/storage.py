"""How the weights of a checkpoint are stored, and quantised ones read as numbers.

What counts is the bytes: a checkpoint whose tensors are numbers (F64 to BF16), FP8 or MXFP4 codes with their scales
beside them can be edited in place, whatever its configuration calls the method (`formats` knows how). Other methods
fit scales, zero points and orderings to the very weights that they store; an edit rounded back to their grid would be
lost or distorted.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.errors import CheckpointError, ModelError, UsageError
from abliterate.files.checkpoint import Checkpoint, TensorInfo, open_tensor
from abliterate.files.configuration import read_config
from abliterate.files.formats import PLAIN, Layout, layout

#: Ways to quantise a model while it is loaded: NF4 with doubly quantised scales, and LLM.int8, of bitsandbytes.
QUANTIZATIONS = ("bnb-4bit", "bnb-8bit")

#: Method → modules that reading it needs, and how they are had.
_LIBRARIES: dict[str, tuple[tuple[str, ...], str]] = {
    "bitsandbytes": (("bitsandbytes", "accelerate"), "pip install 'abliterate[bnb]'"),
    "compressed-tensors": (("compressed_tensors", "accelerate"), "pip install compressed-tensors accelerate"),
    "gptq": (("gptqmodel", "optimum", "accelerate"), "pip install gptqmodel optimum accelerate"),
    "awq": (("gptqmodel", "accelerate"), "pip install gptqmodel accelerate"),
}

#: Last parts of names of tensors without which codes are not the numbers they stand for.
_SCALES = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *("weight_packed", "qweight", "qzeros", "scales", "absmax", "SCB"),
)

#: Methods whose tensors decide; None is a checkpoint that names no method.
_BY_BYTES = (None, "fp8", "fbgemm_fp8", "modelopt", "mxfp4", "compressed-tensors")
#: What is known of methods that transformers does not read.
_FITTED = {
    "MLX": "of MLX: bits and group_size without a quant_method",
    "unknown": "a quantization_config without a quant_method",
}
#: Last parts of names that hold weights, where no configuration says that a tensor is a code.
_WEIGHTS = ("weight", "qweight", "weight_packed")
#: Whole numbers that count or point are not weights.
_COUNTS = ("I64", "U64", "BOOL")


@dataclass(frozen=True, slots=True)
class Storage:
    """How the weights are stored: `method` is "plain" or the quantisation's name, `why` says why they are `editable`.

    Weights that are quantised and editable are loaded dequantised, and edited on disk under the scales in force.
    """

    method: str
    editable: bool
    why: str

    @property
    def dequantised(self) -> bool:
        """Whether this package turns the stored codes into numbers when the model is loaded."""
        return self.editable and self.method != "plain"


PLAIN_STORAGE = Storage("plain", True, "the numbers themselves are stored")


def how_stored(checkpoint: Checkpoint) -> Storage:
    """Classify the weights from config.json and the headers of the files; no weight is read.

    Raises `CheckpointError` when config.json cannot be read.
    """
    config = _quantisation(checkpoint)
    method = _method(config)
    if method not in _BY_BYTES:
        return _fitted(method or "unknown", _FITTED.get(method or "", "scales, zero points or codebooks"))
    if method == "compressed-tensors" and (what := _more_than_codes(config)):
        return _fitted(method, what)
    codes = _codes(checkpoint)
    scales = _scales(codes)
    for info in checkpoint.tensors.values():
        if info.name not in scales and codes.get(info.name) is None and _is_weight(info, method):
            return _fitted(method or "unknown", f"tensor '{info.name}' is {info.dtype} {list(info.shape)}")
    if not codes:
        return PLAIN_STORAGE
    found = "mxfp4" if all(how and how.format == "MXFP4" for how in codes.values()) else "fp8"
    return Storage(method or found, True, "codes with plain scales: dequantised, edited, rounded under the same scales")


def _fitted(method: str, what: str) -> Storage:
    return Storage(
        method, False, f"codes on a grid fitted to these weights ({what}), where an edit would be lost or distorted"
    )


def configuration(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of a checkpoint.

    Raises `CheckpointError` when it cannot be read.
    """
    return read_config(checkpoint.folder)


def _quantisation(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The part of config.json that says how weights are quantised; empty when nothing does."""
    config = configuration(checkpoint)
    for part in (config, config.get("text_config")):
        for key in ("quantization_config", "quantization"):  # MLX writes the second, or both
            if isinstance(part, dict) and isinstance(found := part.get(key), dict):
                return found
    return {}


def _method(config: Mapping[str, Any]) -> str | None:
    if config.get("load_in_4bit") or config.get("load_in_8bit"):
        return "bitsandbytes"
    if method := config.get("quant_method"):
        return str(method)
    return "MLX" if {"bits", "group_size"} <= config.keys() else ("unknown" if config else None)


def _more_than_codes(config: Mapping[str, Any]) -> str | None:
    """What compressed-tensors does to weights besides scaling them, if anything."""
    sparsity = config.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        return "zeros left out"
    return "rotated weights" if config.get("transform_config") else None


def _codes(checkpoint: Checkpoint) -> dict[str, Layout | None]:
    """Every tensor that looks like FP8 or MXFP4 codes, with how they are numbers, or None where they are not."""
    found: dict[str, Layout | None] = {}
    for info in checkpoint.tensors.values():
        if info.dtype == "F8_E4M3" or _is_mxfp4(info):
            try:
                found[info.name] = layout(checkpoint, info)
            except CheckpointError:
                found[info.name] = None
    return found


def _scales(codes: Mapping[str, Layout | None]) -> set[str]:
    return {how.scales.name for how in codes.values() if how is not None and how.scales is not None}


def _is_mxfp4(info: TensorInfo) -> bool:
    return info.dtype == "U8" and info.name.endswith("_blocks")


def _is_weight(info: TensorInfo, method: str | None) -> bool:
    """Whether a tensor holds weights in a form that is not known; without a method, small integers may be masks."""
    if info.dtype in PLAIN or info.dtype in _COUNTS:
        return False
    named = info.name.rpartition(".")[2] in _WEIGHTS
    return named or (method is not None and len(info.shape) > 1) or info.dtype.startswith("F")


def stored_shapes(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What `stored_numbers` gives as tensors on the meta device: every name and shape, and no numbers."""
    codes = _codes(checkpoint)
    scales = _scales(codes)
    shapes: dict[str, Tensor] = {}
    for info in checkpoint.tensors.values():
        how = codes.get(info.name)
        if how is not None:
            packed = how.format == "MXFP4"
            shape = (*how.shape[:-2], how.shape[-1], how.shape[-2]) if packed else how.shape
            shapes[info.name.removesuffix("_blocks")] = torch.empty(shape, device="meta")
        elif info.name not in scales:
            shapes[info.name] = torch.empty(info.shape, dtype=PLAIN.get(info.dtype, torch.int64), device="meta")
    return shapes


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of the numbers of a checkpoint are stored in; of codes alone that of their companions."""
    held: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype in PLAIN:
            held[info.dtype] = held.get(info.dtype, 0) + info.nbytes
    return PLAIN[max(held, key=held.__getitem__)] if held else torch.float32


class StoredNumbers:
    """A stored tensor of codes that becomes numbers when it is indexed, as a slice of safetensors does."""

    def __init__(self, info: TensorInfo, how: Layout, dtype: torch.dtype) -> None:
        """`how` is the layout of `info`; numbers are rounded to `dtype`."""
        self._info, self._layout, self._dtype = info, how, dtype

    def __getitem__(self, index: Any) -> Tensor:
        """The numbers at `index`. MXFP4 is stored [.., d, n] for parameters that are [.., n, d] in memory."""
        how, rows = self._layout, self._layout.shape[-2] if len(self._layout.shape) > 1 else 1
        turned = how.format == "MXFP4"
        numbers = torch.empty(how.rows // rows, *(how.columns, rows)[:: 1 if turned else -1], dtype=self._dtype)
        with open_tensor(self._info) as reader:  # matrix by matrix: all experts in float32 may not fit in memory
            for i, matrix in enumerate(numbers):
                data = reader.read(i * rows * how.row_bytes, rows * how.row_bytes)
                found = how.decode(data, i * rows)
                matrix.copy_(found.mT if turned else found)
        shape = (*how.shape[:-2], how.columns, rows) if turned else how.shape
        selected: Tensor = numbers.view(shape)[index]
        return selected


def stored_numbers(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The state dict that an unquantised checkpoint of the same model would hold, read only when indexed.

    Codes become numbers in `dtype`, their scales are left out, and the rest are slices of the files.
    """
    from safetensors import safe_open

    codes = _codes(checkpoint)
    scales = _scales(codes)
    numbers: dict[str, Any] = {}
    for shard in checkpoint.shards:
        stored = safe_open(shard.path, framework="pt")
        for info in shard.tensors.values():
            if (how := codes.get(info.name)) is not None:
                numbers[info.name.removesuffix("_blocks")] = StoredNumbers(info, how, dtype)
            elif info.name not in scales:
                numbers[info.name] = stored.get_slice(info.name)
    return numbers


def without_quantization(config: Any) -> Any:
    """A copy of a transformers configuration that builds the model's ordinary, unquantised modules."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def quantization_config(storage: Storage, quantization: str | None, dtype: torch.dtype) -> Any:
    """transformers' settings for quantising while loading, or for reading what is quantised; None: as it is."""
    import transformers

    config: Any = transformers.BitsAndBytesConfig
    if quantization == "bnb-8bit":
        return config(load_in_8bit=True)
    if quantization == "bnb-4bit":
        return config(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if storage.method == "compressed-tensors" and not storage.editable:
        config = transformers.CompressedTensorsConfig
        return config(dequantize=True)  # otherwise scales are left out, and nobody is told
    return None


def check_quantization(name: str, storage: Storage, quantization: str | None) -> None:
    """Refuse what cannot be asked of model `name`, and say which library is missing before anything is read.

    Raises `UsageError` for an unknown `quantization` or one of a model that is quantised already, `ModelError` for
    a library that is not installed and for weights that none can read.
    """
    if storage.method in _FITTED and not storage.editable:
        raise ModelError(
            f"model '{name}': expected weights that transformers reads, found {storage.why}; give the checkpoint that "
            "they were made from, in full precision"
        )
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise UsageError(f"--quantization {quantization}: expected {' or '.join(QUANTIZATIONS)}")
    if quantization is not None and not storage.editable:
        raise UsageError(
            f"--quantization {quantization}: model '{name}' is already quantised ({storage.method}); "
            "leave --quantization out"
        )
    method = storage.method if quantization is None else "bitsandbytes"
    modules, install = _LIBRARIES.get("" if quantization is None and storage.editable else method, ((), ""))
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ModelError(f"model '{name}': {method} needs {', '.join(missing)}; {install}")


def check_codes_read(name: str, storage: Storage, model: Any, left_over: Iterable[str]) -> None:
    """Raise `ModelError` when transformers read codes of model `name` and left their scales unread.

    It does so, without an error, for methods and layouts that it does not know; the weights are then far off.
    """
    modules = {module for module, _ in model.named_modules()}
    unread = [tensor for tensor in sorted(left_over) if tensor.rpartition(".")[2] in _SCALES]
    if unread := [tensor for tensor in unread if tensor.rpartition(".")[0] in modules]:
        raise ModelError(
            f"model '{name}': transformers does not read all of its quantised weights ({storage.method}), "
            f"{', '.join(unread[:3])} are left over; give the full-precision checkpoint"
        )
