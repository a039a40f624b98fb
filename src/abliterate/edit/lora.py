"""A plan as a LoRA adapter in PEFT's format: the same edit beside the weights, to be switched on and off.

W' = W − s Lᵀ (R W) is W plus a matrix of rank k, so nothing is lost by writing it as two thin ones:

===============  ======================================
a [k, n]         R W, how much of it each input writes
b [d, k]         −s Lᵀ
ΔW = b a         −s Lᵀ R W
Δbias [d]        −s (bias Rᵀ) L + offset
===============  ======================================

PEFT (https://github.com/huggingface/peft) holds ΔW in one of three ways: `lora_A` and `lora_B` of a linear module,
`lora_embedding_A` and `lora_embedding_B` of an embedding, or a wrapped parameter (`target_parameters`) for whatever is
no module of its own. A bias belongs to the whole adapter (`lora_bias`) and goes with linear modules only: a plan for
writers with and without biases becomes two adapters, which are loaded together.
"""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from abliterate.edit.plan import Edit, Plan
from abliterate.edit.weights import removed_rows
from abliterate.errors import UsageError
from abliterate.files.atomic import write_atomically
from abliterate.files.checkpoint import Checkpoint
from abliterate.model._compat import fuses_experts, loading_table
from abliterate.model.anatomy import Kind, Stored
from abliterate.model.offloaded import value_of
from abliterate.model.weights import numbers

#: Folders of the two adapters that a plan becomes when some of its writers have a bias and some have none.
PLAIN, BIASED = "plain", "biased"

#: Names by which PEFT takes a linear module for a part of fused experts, in models whose experts are fused.
_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})

#: Model types whose fused kernels may use the weight of `out_proj` past the module: PEFT refuses to hold that one.
_READ_PAST_THE_MODULE = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})

_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one parameter as b @ a, in float32, and the change of the bias that goes with it.

    In the orientation [d, n] ΔW = b @ a, with `a` [k, n] or [E, k, n] for fused experts and `b` [d, k] or [E, d, k].
    For an embedding n is its number of rows and ΔE = (b @ a).T. The biases [E, d] of fused experts are a matrix too
    and have an entry of their own; `bias` [d] is the change of an ordinary one. `axis` is the axis of the parameter
    in memory that runs over the stream.
    """

    parameter: str
    module: str
    kind: Kind
    block: int | None
    axis: int
    a: Float[Tensor, "*experts k n"]
    b: Float[Tensor, "*experts d k"]
    bias: Float[Tensor, " d"] | None = None

    @property
    def rank(self) -> int:
        """The number k of rows of `a`."""
        return self.a.shape[-2]

    def delta(self) -> Float[Tensor, "*experts rows columns"]:
        """The change of the parameter, laid out as the parameter is in memory."""
        change = self.b @ self.a
        return change.mT if self.axis == change.dim() - 1 else change


# ---------------------------------------------------------------------------------------------- factors of a plan


def refuse_for_lora(plan: Plan) -> None:
    """Raise `UsageError` naming the writers whose edit is not of low rank; reads nothing."""
    refused: dict[str, list[str]] = defaultdict(list)
    for edit in _edits(plan):
        if (reason := _not_low_rank(edit)) is not None:
            refused[reason].append(edit.writer.module)
    if refused:
        reasons = "; ".join(f"{reason} ({_listed(names)})" for reason, names in refused.items())
        raise UsageError(f"a LoRA adapter cannot hold this edit: {reasons}; write edited weights instead")


def _edits(plan: Plan) -> Iterator[Edit]:
    return (edit for edit in plan.edits if edit.changes)


def _not_low_rank(edit: Edit) -> str | None:
    if edit.norm_preserving:
        return "norm-preserving scales a whole weight, expected a change of low rank"
    if edit.writer.weight is None:
        return "expected a map with a weight, found none"
    if edit.offset is not None and edit.writer.bias is None and edit.writer.kind is not Kind.EMBEDDING:
        return "an offset needs a bias, found none"
    if edit.strength == 0 and edit.writer.bias is not None:
        return "expected a change of the weight, found only an offset"
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def low_rank(source: Checkpoint, plan: Plan, names: Mapping[str, tuple[Stored, ...]]) -> list[LowRank]:
    """The plan's factors from the files of `source`, which are streamed; `names` is from `anatomy.names_on_disk`.

    Raises `UsageError` for a plan that is not of low rank, `CheckpointError` for tensors that do not fit it.
    """
    refuse_for_lora(plan)
    parts: dict[str, dict[int | None, Tensor]] = defaultdict(dict)
    for _, stored, removed in removed_rows(source, plan, names):
        stream_last = removed.dim() > 1 and stored.axis == removed.dim() - 1
        parts[stored.parameter][stored.expert] = removed.mT if stream_last else removed
    rows = {name: _together(found) for name, found in parts.items()}
    return [factor for edit in _edits(plan) for factor in _factors(edit, rows)]


def _together(parts: Mapping[int | None, Tensor]) -> Tensor:
    """R W of one parameter, [k], [k, n] or [E, k, n], from experts that are stored one by one or from the whole."""
    if None in parts:
        return parts[None]
    ordered = [parts[expert] for expert in range(len(parts))]
    return torch.stack(ordered, dim=-1 if ordered[0].dim() == 1 else 0)


def low_rank_live(model: Any, plan: Plan) -> list[LowRank]:
    """The plan's factors from what a live `model` computes with, however its weights are stored.

    Raises `UsageError` for a plan that is not of low rank and for packed numbers of experts, `ModelError` for a module
    that does not say how many inputs it takes.
    """
    refuse_for_lora(plan)
    factors: list[LowRank] = []
    for edit in _edits(plan):
        weights = {name: _effective(model, edit, name) for name in edit.writer.parameters}
        rows = {name: (edit.reads.float().to(weight.device) @ weight).cpu() for name, weight in weights.items()}
        factors += _factors(edit, rows)
    return factors


def _effective(model: Any, edit: Edit, name: str) -> Tensor:
    """A parameter in float32 as [d, n], [E, d, n] or [d]."""
    writer = edit.writer
    module = model.get_submodule(writer.module)
    if name == f"{writer.module}.weight" and getattr(module, "weight", torch.empty(0)).dim() < 3:
        return numbers(module)
    parameter = value_of(model, name)
    if parameter.dtype not in _PLAIN_DTYPES:
        raise UsageError(
            f"parameter '{name}': expected plain numbers, found {parameter.dtype}; load the model dequantised"
        )
    stream_last = parameter.dim() > 1 and (name == writer.bias or writer.axis == parameter.dim() - 1)
    return (parameter.mT if stream_last else parameter).float()


def _factors(edit: Edit, rows: Mapping[str, Tensor]) -> Iterator[LowRank]:
    """The factors of one edit, from R W and R bias."""
    weight, bias = edit.writer.weight, edit.writer.bias
    assert weight is not None  # see `refuse_for_lora`
    fused_bias = bias is not None and rows[bias].dim() == 2
    change = None
    if bias is not None and not fused_bias:
        change = -edit.strength * rows[bias].float() @ edit.basis.float()
        change = change if edit.stored_offset is None else change + edit.stored_offset
    yield _factor(edit, weight, edit.writer.axis, rows[weight], None if bias else edit.stored_offset, change)
    if bias is not None and fused_bias:
        yield _factor(edit, bias, 1, rows[bias], edit.stored_offset)


def _factor(
    edit: Edit, parameter: str, axis: int, rows: Tensor, offset: Tensor | None, bias: Tensor | None = None
) -> LowRank:
    a, b = rows.float(), -edit.strength * edit.basis.float().T
    if offset is not None:  # added to every vector: one more row of ones
        a = torch.cat([a, torch.ones_like(a[:1])])
        b = torch.cat([b, offset.float()[:, None]], dim=1)
    if a.dim() == 3:
        b = b.expand(len(a), *b.shape)
    writer = edit.writer
    return LowRank(parameter, writer.module, writer.kind, writer.block, axis, a, b, bias)


# ------------------------------------------------------------------------------------------------- PEFT's format


class _Held(Enum):
    """How PEFT holds a change."""

    LINEAR = auto()
    EMBEDDING = auto()
    PARAMETER = auto()


def write_peft(folder: Path, factors: Sequence[LowRank], *, model: Any, base_model: str) -> tuple[Path, ...]:
    """Write `factors` as `adapter_config.json` and `adapter_model.safetensors`; returns the folders of the adapters.

    That is `folder` itself, or its subfolders `plain` and `biased`, which belong together, when only some of the
    writers have a bias. Loaded by `peft.PeftModel.from_pretrained` and by `model.load_adapter` of transformers.
    `model` tells which modules hold the parameters (a skeleton on the meta device is enough), `base_model` is the id
    or folder of the model that the adapter is for. All ranks are padded with zeros to the same r, and lora_alpha = r:
    the scale is 1 also for readers that know only one rank. The same input gives the same bytes.

    Raises `UsageError`, before anything is written, when there are no factors, or naming a writer that PEFT cannot
    hold exactly.
    """
    if not factors:
        raise UsageError("LoRA adapter: expected at least one edit, found a plan without any")
    biased = [factor for factor in factors if factor.bias is not None]
    plain = [factor for factor in factors if factor.bias is None]
    groups = {folder: factors} if not (biased and plain) else {folder / PLAIN: plain, folder / BIASED: biased}
    adapters = {path: _adapter(model, group, base_model) for path, group in groups.items()}
    for path, (config, tensors) in adapters.items():
        write_atomically(path / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        write_atomically(path / "adapter_config.json", text + "\n")
    return tuple(adapters)


def _adapter(model: Any, factors: Sequence[LowRank], base_model: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of one adapter."""
    held = {factor.parameter: _how_held(model, factor) for factor in factors}
    rank = max(factor.rank for factor in factors)
    conv = [f.module for f in factors if held[f.parameter] is _Held.LINEAR and f.axis == 1]
    modules = [f.module for f in factors if held[f.parameter] is not _Held.PARAMETER]
    parameters = [f.parameter for f in factors if held[f.parameter] is _Held.PARAMETER]
    _refuse_ambiguous(modules, [name for name, _ in model.named_modules()])
    _refuse_ambiguous(parameters, [name for name, _ in model.named_parameters()])
    _refuse_renamed(model, [factor.module for factor in factors])
    if conv and parameters:
        raise UsageError(f"writer '{conv[0]}': PEFT cannot hold it in one adapter with '{parameters[0]}'")
    tensors: dict[str, Tensor] = {}
    for factor in factors:
        tensors |= _tensors(model, _padded(factor, rank), held[factor.parameter], parameters)
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": bool(conv),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_bias": any(factor.bias is not None for factor in factors),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return config, tensors


def _how_held(model: Any, factor: LowRank) -> _Held:
    module = model.get_submodule(factor.module)
    leaf = factor.module.rpartition(".")[2]
    held = _Held.PARAMETER
    if leaf == "out_proj" and model.config.model_type in _READ_PAST_THE_MODULE:
        raise UsageError(f"writer '{factor.module}': PEFT holds no '{leaf}' of {model.config.model_type} models")
    if factor.parameter == f"{factor.module}.weight":
        if isinstance(module, nn.Embedding):
            held = _Held.EMBEDDING if _looks_up_its_input(module) else _Held.PARAMETER
        elif not (leaf in _TAKEN_FOR_EXPERTS and fuses_experts(model)):
            held = _Held.LINEAR
    if factor.bias is not None and held is not _Held.LINEAR:
        raise UsageError(f"writer '{factor.module}': PEFT holds a change of a bias for linear modules only")
    if held is _Held.PARAMETER and not _reads_itself(model, factor.parameter):
        raise UsageError(
            f"writer '{factor.module}': PEFT cannot add to '{factor.parameter}', which others use directly"
        )
    if held is _Held.PARAMETER and model.get_parameter(factor.parameter).dtype not in _PLAIN_DTYPES:
        raise UsageError(f"writer '{factor.module}': PEFT cannot add to the packed numbers of '{factor.parameter}'")
    return held


def _looks_up_its_input(module: nn.Embedding) -> bool:
    """Whether an embedding gives the rows that its argument names; some compute positions from a mask first."""
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def _reads_itself(model: Any, parameter: str) -> bool:
    """Whether the module that holds a parameter uses it: PEFT adds to it only while that module is called."""
    owner, _, leaf = parameter.rpartition(".")
    forwards = [vars(cls)["forward"] for cls in type(model.get_submodule(owner)).__mro__ if "forward" in vars(cls)]
    return any(leaf in inspect.unwrap(forward).__code__.co_names for forward in forwards)


def _refuse_renamed(model: Any, modules: Sequence[str]) -> None:
    """Loaders rename an adapter's tensors as a checkpoint's, and leave out what then fits no module."""
    table = loading_table(model)
    for module in modules:
        name = f"base_model.model.{module}.weight"
        found = table.renamed(name)
        if not name.endswith(found):  # a prefix that it takes off is put on again
            raise UsageError(f"writer '{module}': transformers would load its adapter under another name, '{found}'")


def _refuse_ambiguous(targets: Sequence[str], names: Sequence[str]) -> None:
    """PEFT takes a target for every name that ends with it."""
    endings = tuple(f".{target}" for target in targets)
    for name in names:
        if name.endswith(endings) and name not in targets:
            raise UsageError(f"writer names: '{name}' ends like one of the writers, so PEFT would change it too")


def _padded(factor: LowRank, rank: int) -> LowRank:
    """The same change with `rank` rows in `a`."""
    missing = rank - factor.rank
    a = nn.functional.pad(factor.a, (0, 0, 0, missing))
    b = nn.functional.pad(factor.b, (0, missing))
    return replace(factor, a=a.float(), b=b.float())


def _tensors(model: Any, factor: LowRank, held: _Held, parameters: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of one change, by their names in an adapter's file."""
    name = f"base_model.model.{factor.module}"
    if held is _Held.EMBEDDING:
        found = {f"{name}.lora_embedding_A": factor.a, f"{name}.lora_embedding_B": factor.b}
    elif held is _Held.LINEAR:
        found = {f"{name}.lora_A.weight": factor.a, f"{name}.lora_B.weight": factor.b}
        if factor.bias is not None:
            found[f"{name}.lora_B.bias"] = factor.bias.float()
    else:
        owner, _, leaf = factor.parameter.rpartition(".")
        module = model.get_submodule(owner)
        a, b = _as_wrapped(factor, transposed=getattr(module, "is_transposed", False))
        # Wrappers of several parameters of one module are nested in the order in which it registers them.
        targets = [other for other, _ in module.named_parameters(recurse=False) if f"{owner}.{other}" in parameters]
        name = f"base_model.model.{owner}{'.base_layer' * (len(targets) - 1 - targets.index(leaf))}"
        found = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return {key: tensor.contiguous() for key, tensor in found.items()}


def _as_wrapped(factor: LowRank, *, transposed: bool) -> tuple[Float[Tensor, "rE in"], Float[Tensor, "out rE"]]:
    """`lora_A` and `lora_B` of a wrapped parameter [s, t] or [E, s, t].

    PEFT adds B A for every expert, which is [s, t], or its transpose where the module says `is_transposed`. Experts
    are the slow axis of the ranks in A and the fast one in B.
    """
    if factor.axis == factor.a.dim() - 1:
        left, right = factor.a.mT, factor.b.mT
    else:
        left, right = factor.b, factor.a
    if left.dim() == 2:
        return right, left
    if transposed:
        left, right = right.mT, left.mT
    return right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)
