"""Adapters in PEFT's format as they come from outside: their configuration, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from abliterate.errors import UsageError
from abliterate.files.bounded import MB, Kind

_CONFIG = Kind("the configuration of a LoRA adapter (with r and lora_alpha)", MB, UsageError)

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
