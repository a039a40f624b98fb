"""The anatomy of a checkpoint that is not loaded: names from a skeleton, the proof from a narrow copy.

A skeleton on torch's meta device has every name and shape and no numbers. Residual accounting needs numbers: it is
done on a copy of the same class with the same layers, narrow inside (MLPs, heads, experts, vocabulary) and as wide as
the model on the stream, whose large tensors share memory. What writes there writes in the model, since both are built
by the same code; that they have the same parameters is checked. Gains of post-norms are read from the files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from abliterate.errors import AbliterateError, AnatomyError, ModelError
from abliterate.files.checkpoint import Checkpoint, open_tensor
from abliterate.files.formats import layout
from abliterate.files.storage import without_quantization
from abliterate.model._compat import auto_class, quiet_transformers
from abliterate.model.anatomy import TOLERANCE, Anatomy, Writer, names_on_disk, norms_gain, study

_SMALL = 64
_EXPERTS = 16
#: Tensors with more numbers than this share memory with all of their shape.
_SHARED = 1 << 18

_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "shared_expert_intermediate_size")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: How many experts a token has: fewer cannot be chosen from.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def study_files(
    name: str,
    checkpoint: Checkpoint,
    *,
    trust_remote_code: bool = False,
    max_leak: float = TOLERANCE,
    config: Any = None,
) -> tuple[Anatomy, Any]:
    """Every writer of the model in a checkpoint's folder, and its skeleton on the meta device. Errors call it `name`.

    `config` is its configuration where that is read already.

    Raises `AnatomyError` when a writer is not known, `ModelError` when the configuration makes no model.
    """
    config = _config(name, checkpoint.folder, trust_remote_code) if config is None else without_quantization(config)
    auto = auto_class(config)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with quiet_transformers():
            with torch.device("meta"):
                skeleton = auto.from_config(config, **options)
            small = _small_copy(auto, config, skeleton, options)
    except AbliterateError:
        raise
    except Exception as error:  # configurations are checked by many hands in many ways
        reason = " ".join(str(error).split())[:240]
        raise ModelError(f"model '{name}': cannot be built from its configuration ({reason})") from error
    proof = study(small, max_leak=max_leak)
    writers = [
        whole
        for writer in map(_without_learnt_factor, proof.writers)
        for whole in _in_skeleton(_with_gain(writer, small, skeleton, checkpoint), small, skeleton)
    ]
    return Anatomy(proof.d_model, proof.blocks, tuple(writers), proof.closure), skeleton


def _without_learnt_factor(writer: Writer) -> Writer:
    """A block's factor other than 1 may be a learnt gate, and that of the narrow copy is not the model's."""
    known = writer.block is None or writer.multiplier == 1.0
    return writer if known else replace(writer, multiplier=None)


def _config(name: str, folder: Path, trust_remote_code: bool) -> Any:
    """The configuration without a word about quantisation: a skeleton has no numbers to be quantised."""
    import transformers

    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except Exception as error:  # configurations are checked by many hands in many ways
            reason = " ".join(str(error).split())[:240]
            raise ModelError(f"model '{name}': its configuration cannot be used ({reason})") from error
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def _small_copy(auto: Any, config: Any, skeleton: Any, options: Mapping[str, Any]) -> Any:
    """A live narrow copy; a wide one where the class cannot be built narrow."""
    for shrunk in (_with_fewer_heads, _narrow, _with_small_vocabulary):
        try:
            with torch.random.fork_rng(devices=[]), _SharedMemory():
                torch.manual_seed(0)
                small = _disturbed(auto.from_config(shrunk(config), dtype=torch.float32, **options).eval())
            if _patterns(small) == _patterns(skeleton):
                study_can_run = small(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
                del study_can_run
                return small
        except Exception:  # sizes that do not go together
            continue
    raise AnatomyError(f"{type(skeleton).__name__}: no small copy could be built for residual accounting")


def _disturbed(model: Any) -> Any:
    """Constant tensors drawn anew: a map or gate that starts at zero writes nothing and would not be found."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


class _SharedMemory(TorchFunctionMode):
    """While a model is built, large tensors of one shape share memory, filled once."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[Any, Tensor] = {}
        self._storages: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Give a shared tensor for a large empty one, and leave it alone when it is initialised."""
        kwargs = kwargs or {}
        if func is torch.empty:
            shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], Sequence) else tuple(args)
            if all(isinstance(n, int) for n in shape) and len(shape) > 1 and torch.Size(shape).numel() > _SHARED:
                return self._shared(shape)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.startswith("_") and args and isinstance(args[0], Tensor):
            tensor = args[0]
            if tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self._storages:
                return tensor
        return func(*args, **kwargs)

    def _shared(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._made:
            self._made[shape] = torch.randn(shape) * 0.02
            self._storages.add(self._made[shape].untyped_storage().data_ptr())
        return self._made[shape].view(shape)


def _narrow(config: Any) -> Any:
    """The configuration of a copy that costs little and has the same kinds of modules."""
    small = _with_small_vocabulary(config)
    for part in (small, small.get_text_config()):
        chosen = [value for name in _CHOSEN if isinstance(value := getattr(part, name, None), int)]
        for name, value in list(vars(part).items()):
            if any(name.endswith(width) for width in _WIDTHS) and value:
                setattr(part, name, [_SMALL] * len(value) if isinstance(value, list | tuple) else _SMALL)
            elif name in _COUNTS and isinstance(value, int):
                setattr(part, name, min(value, max([_EXPERTS, *chosen])))
    return small


def _with_fewer_heads(config: Any) -> Any:
    """The same with few heads of the size they have."""
    small = _narrow(config)
    for part in (small, small.get_text_config()):
        heads, keys, width = (
            getattr(part, name, None) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")
        )
        if isinstance(heads, int) and isinstance(keys, int) and isinstance(width, int) and keys and heads % keys == 0:
            few = min(keys, 2)
            if not isinstance(getattr(part, "head_dim", None), int):
                part.head_dim = width // heads
            part.num_attention_heads, part.num_key_value_heads = few * (heads // keys), few
    return small


def _with_small_vocabulary(config: Any) -> Any:
    small = copy.deepcopy(config)
    for part in (small, small.get_text_config()):
        for name, value in list(vars(part).items()):
            if name.endswith("_token_id") and value is not None:
                setattr(part, name, [v % _SMALL for v in value] if isinstance(value, list) else value % _SMALL)
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, _SMALL)
    return small


def _patterns(model: Any) -> set[str]:
    return {_pattern(name) for name, _ in model.named_parameters(remove_duplicate=False)}


def _pattern(name: str) -> str:
    """The name with the numbers of experts left open, and those of blocks kept."""
    head, dot, rest = _split(name)
    return head + dot + re.sub(r"(?<=\.)\d+(?=\.)", "*", rest)


def _split(name: str) -> tuple[str, str, str]:
    """The name up to and with the number of the block, and the rest."""
    match = re.match(r"(.*?\.\d+)(\.)(.*)", name)
    return (match[1], match[2], match[3]) if match else (name, "", "")


def _in_skeleton(writer: Writer, small: Any, skeleton: Any) -> Iterator[Writer]:
    """The same writer in the whole model; of experts in a list that the copy has cut short, all of the list."""
    named = writer.weight or writer.bias or ""
    cut = _cut_short(named, small, skeleton)
    if cut is None:
        head = skeleton.get_output_embeddings()
        weight = None if writer.weight is None else skeleton.get_parameter(writer.weight)
        yield replace(writer, tied=writer.tied or (weight is not None and head is not None and head.weight is weight))
    elif named.startswith(f"{cut}.0."):
        for expert in range(len(skeleton.get_submodule(cut))):
            yield _renumbered(writer, cut, expert)


def _cut_short(named: str, small: Any, skeleton: Any) -> str | None:
    """The list a parameter stands in that is shorter in the copy."""
    for match in re.finditer(r"\.\d+(?=\.|$)", named):
        name = named[: match.start()]
        if _length(small, name) != _length(skeleton, name):
            return name
    return None


def _length(model: Any, name: str) -> int:
    module = model.get_submodule(name)
    return len(list(module.children())) + len(list(module.parameters(recurse=False)))


def _renumbered(writer: Writer, cut: str, expert: int) -> Writer:
    """What is said of entry 0 of a list, said of another."""

    def moved(name: str | None) -> str | None:
        return None if name is None else re.sub(rf"^{re.escape(cut)}\.0(?=\.|$)", f"{cut}.{expert}", name)

    return replace(writer, module=moved(writer.module) or "", weight=moved(writer.weight), bias=moved(writer.bias))


def _with_gain(writer: Writer, small: Any, skeleton: Any, checkpoint: Checkpoint) -> Writer:
    """Put the stored numbers of the post-norms into the small copy's norms and ask them for their gain."""
    if not writer.post_norms:
        return writer
    for name in writer.post_norms:
        norm: nn.Module = small.get_submodule(name)
        for own, parameter in norm.named_parameters(recurse=False):
            full = f"{name}.{own}"
            (place,) = names_on_disk(skeleton, {full: 0}, checkpoint.tensors)[full]
            info = checkpoint.tensors[place.tensor]
            with open_tensor(info) as reader:
                stored = layout(checkpoint, info).decode(reader.read(0, info.nbytes), 0)
            parameter.data.copy_(stored.reshape(parameter.shape))
    gain, centred = norms_gain(small, writer.post_norms, checkpoint_width(writer, skeleton))
    return replace(writer, gain=gain, centred=centred)


def checkpoint_width(writer: Writer, skeleton: Any) -> int:
    """The width of the stream, from the writer's own tensor."""
    parameter = skeleton.get_parameter(writer.weight or writer.bias)
    return int(parameter.shape[writer.axis])


__all__ = ["names_on_disk", "study_files"]
