"""Adapters in PEFT's format as they come from outside: their configuration, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from abliterate.errors import UsageError
from abliterate.files.bounded import MB, Kind, short

_CONFIG = Kind("the configuration of a LoRA adapter (with r and lora_alpha)", MB, UsageError)

#: What PEFT takes where lora_alpha is not given, and the largest that makes sense.
_ALPHA, _MOST_ALPHA = 8.0, 1e6
#: A name, or the end of one. Anything else is a regular expression, which a file from outside should not bring.
_NAME = re.compile(r"\^?[\w-]+(\\?\.[\w-]+)*")

Rank = Annotated[int, Field(ge=1, le=2**16, strict=True)]


class AdapterConfig(BaseModel):
    """What adapter_config.json says, as far as anything here depends on it; the rest is kept as it is."""

    model_config = ConfigDict(extra="allow", frozen=True)

    r: Rank
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of the adapter in a folder.

    Raises `UsageError` when it cannot be read or is no LoRA adapter's.
    """
    return _CONFIG.model(folder / "adapter_config.json", AdapterConfig)


#: Options that change nothing of what an adapter adds to the weights it names.
_INERT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode"),
        *(
            "layers_pattern",
            "layers_to_transform",
            "lora_dropout",
            "megatron_core",
            "peft_version",
            "qalora_group_size",
        ),
        *("revision", "runtime_config", "target_modules", "task_type"),
    }
)
#: How A and B may have begun without anything being taken out of the weights themselves.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def refuse_other_changes(config: AdapterConfig, path: Path) -> None:
    """Raise `UsageError`, naming the option, for an adapter that changes weights otherwise than by adding B A.

    An option that is not known here is refused when it is set: what it changes is not known either.
    """
    known = ("use_dora", "lora_bias", "target_parameters", "modules_to_save")
    found: dict[str, object] = {name: getattr(config, name) for name in known} | dict(config.model_extra or {})
    found["bias"] = None if config.bias == "none" else config.bias
    if str(found.pop("peft_type", "LORA")).upper() != "LORA":
        raise UsageError(f"{path}: expected a LoRA adapter, found another kind; use --base")
    start = found.pop("init_lora_weights", True)
    if not any(start is one or start == one for one in _STARTS):
        found["init_lora_weights"] = start
    for name, value in found.items():
        if name not in _INERT and value not in (None, False, "", [], {}):
            raise UsageError(
                f"{path}: expected only options that add B A to weights, found {short(name)} {short(value)}; use --base"
            )


def scale_of(config: AdapterConfig, module: str, rank: int, path: Path) -> float:
    """The factor of B A of one module, whose A has `rank` rows: lora_alpha over r, either by its own pattern.

    Raises `UsageError` for patterns that are more than the end of a module's name, and where r is not `rank`.
    """
    expected = _of_pattern(config.rank_pattern, module, config.r, path)
    if rank != expected:
        raise UsageError(f"{path}: expected rank {rank} for '{module}' as its tensors have, found {expected:g}")
    alpha = _of_pattern(config.alpha_pattern, module, _ALPHA if config.lora_alpha is None else config.lora_alpha, path)
    if not 0 < alpha <= _MOST_ALPHA:
        raise UsageError(f"{path}: expected an alpha from 0 to {_MOST_ALPHA:g} for '{module}', found {alpha}")
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _of_pattern(patterns: Mapping[str, float] | None, module: str, default: float, path: Path) -> float:
    """The value of the pattern that a module's name is or ends with.

    PEFT takes the first one, in an order that saving may change: several that say different things are refused.
    """
    for pattern in patterns or {}:
        if not _NAME.fullmatch(pattern):
            raise UsageError(f"{path}: expected patterns that are names of modules, found {short(pattern)}; use --base")
    found = {value for pattern, value in (patterns or {}).items() if _fits(pattern, module)}
    if len(found) > 1:
        raise UsageError(f"{path}: expected one value for '{module}' among the patterns, found several; use --base")
    return found.pop() if found else default


def _fits(pattern: str, module: str) -> bool:
    name = pattern.removeprefix("^").replace("\\.", ".")
    return module == name or (not pattern.startswith("^") and module.endswith(f".{name}"))
