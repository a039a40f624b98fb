"""What is taken from inside transformers and may change with any release: names of arguments, tables, private methods.

Nothing else in this package reaches there. Each has a contract test (tests/model/test_compat.py), which runs on the
oldest and on the newest release that pyproject.toml allows.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.errors import ModelError

#: Names under which models take the state to go on from: those of state-space models, of today's, and of older ones.
_CACHE_NAMES = ("cache_params", "cache", "past_key_values")


def cache_name(model: Any) -> str:
    """The argument by which the model takes the state to go on from (keys and values, recurrent states)."""
    taken = inspect.signature(type(model.base_model).forward).parameters
    return next((name for name in _CACHE_NAMES if name in taken), _CACHE_NAMES[-1])


def takes_positions(model: Any) -> bool:
    """Whether the model can be told the position of each token."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def computes_with_codes(model: Any) -> bool:
    """Whether live modules compute with quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def division(skeleton: Any, parts: int) -> dict[str, Any]:
    """What `from_pretrained` is told so that each of some processes gets a part of the model, by transformers' plan.

    Raises `ModelError` for a model without a plan, or whose heads cannot be dealt out evenly.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    name = type(skeleton).__name__
    if not skeleton.supports_tp_plan:
        raise ModelError(f"--parallel tensor: transformers has no plan to divide a {name}; give --parallel data")
    text = skeleton.config.get_text_config()
    heads = {one: getattr(text, one, None) for one in ("num_attention_heads", "num_key_value_heads")}
    if odd := [f"{one} {number}" for one, number in heads.items() if isinstance(number, int) and number % parts]:
        raise ModelError(f"--parallel tensor: expected heads that {parts} processes can share, found {', '.join(odd)}")
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def attention_kernel(model: Any) -> str | None:
    """The name of the implementation of attention in use."""
    found = getattr(model.config, "_attn_implementation", None)
    return None if found is None else str(found)


@dataclass(frozen=True, slots=True)
class LoadingTable:
    """How stored tensors become parameters when transformers loads a model: renamed, stacked, transposed."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str

    def parameter(self, tensor: str, known: dict[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """The parameter that a stored tensor goes into, and what is done to it, by the name of the operation.

        `known` are the model's parameters and buffers by name.
        """
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(tensor, self.renamings, self.converters, self.prefix, known)
        if name not in known:
            name, pattern = rename_source_key(tensor, [], [], self.prefix, known)
        by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        operations = [] if pattern is None else by_pattern[pattern].operations
        return name, {type(operation).__name__: operation for operation in operations}

    def renamed(self, name: str) -> str:
        """The name under which an adapter's tensor would be looked for."""
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(name, self.renamings, [])[0])


def loading_table(model: Any) -> LoadingTable:
    """The table that transformers loads checkpoints of this model by."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    return LoadingTable(renamings, converters, model.base_model_prefix)


def tied_names(model: Any) -> Mapping[str, str]:
    """Parameters that are another parameter of the model, by their names."""
    found: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return found


def is_head(model: Any, parameter: str) -> bool:
    """Whether a parameter is the head's weight too. Offloaded ones are told by their names: each has its own tensor."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    own = model.get_parameter(parameter)
    if weight is None or own.device.type != "meta":
        return weight is own
    tied = tied_names(model)
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    return any(parameter in (tied.get(f"{name}.weight"), f"{name}.weight") for name in heads)


def generation_settings(folder: Path) -> Any:
    """The generation configuration in a model's folder, or what its configuration says of it. No code is loaded."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts names of tensors with their numbers as numbers, which is the order in which experts are stacked."""
    return tuple(
        (0, int(part), "") if part.isdecimal() and len(part) < 20 else (1, 0, part) for part in name.split(".")
    )


def fuses_experts(model: Any) -> bool:
    """Whether experts of this model are fused on loading: then PEFT renames targets by their last part."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    conversions = get_checkpoint_conversion_mapping(model.config.model_type) or ()
    fused = [name for conversion in conversions for name in conversion.target_patterns]
    return any(name.endswith(("gate_up_proj", "down_proj")) for name in fused)


class _Named:
    """A model class that a configuration names, called like an auto class."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def from_config(self, config: Any, *, trust_remote_code: bool = False, **options: Any) -> Any:
        return self._kind._from_config(config, **options)

    def from_pretrained(self, *args: Any, trust_remote_code: bool = False, **options: Any) -> Any:
        return self._kind.from_pretrained(*args, **options)


def auto_class(config: Any) -> Any:
    """What makes the model of a configuration: the class of transformers that it names, else an auto class.

    The auto classes would make some models of images and text without their towers and under other names; an adapter
    for those would not fit the model as others load it.
    """
    import transformers

    library: Any = transformers
    named = getattr(library, (getattr(config, "architectures", None) or [""])[0], None)
    if named is not None and hasattr(named, "generate") and getattr(named, "config_class", None) is type(config):
        return _Named(named)
    pictures = type(config) in library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if pictures and type(config) not in library.MODEL_FOR_CAUSAL_LM_MAPPING:
        return library.AutoModelForImageTextToText
    return library.AutoModelForCausalLM


@contextlib.contextmanager
def without_adapter() -> Iterator[None]:
    """Inside, `from_pretrained` loads what it is told to: transformers would put an adapter that lies in the model's
    folder on the model, without a word.
    """
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    modules: tuple[Any, ...] = (peft, auto_factory)
    originals = [module.find_adapter_config_file for module in modules]
    for module in modules:
        module.find_adapter_config_file = lambda *_, **__: None
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.find_adapter_config_file = original


def loading_report(skeleton: Any, config: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers reports on loading `stored` (names and tensors on the meta device) as this kind of model.

    `missing_keys`, `unexpected_keys`, `mismatched_keys` (name, shape found, shape expected), as a live model is loaded
    with them, at no cost: everything stays on the meta device.
    """
    import torch

    _, report = type(skeleton).from_pretrained(
        None,
        config=config,
        state_dict=dict(stored),
        dtype=torch.float32,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    found: dict[str, Any] = report
    return found


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and advice of transformers on the user's screen while it loads."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def load_adapter(model: Any, folder: str) -> dict[str, Any]:
    """Put a PEFT adapter on the live model, and return transformers' report on its tensors.

    What PEFT and transformers warn each other of is not shown. Raises `ModelError` for an adapter that does not fit.
    """
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            report: dict[str, Any] = model.load_adapter(folder, ignore_mismatched_sizes=True).to_dict()
        except Exception as error:  # PEFT has errors of its own, and raises those of Python and torch
            reason = " ".join(str(error).split())[:240] or type(error).__name__
            raise ModelError(
                f"adapter '{folder}': it cannot be put on the model ({reason}); give its own base"
            ) from error
        return report


def has_adapter(model: Any) -> bool:
    """Whether an adapter was put on the live model: then it is not the one in its files."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def merge_adapter(model: Any) -> Any:
    """A model of transformers; of one that peft has wrapped, what is inside, with the adapter in the live weights."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") and hasattr(model, "peft_config") else model


def read_gguf(path: str | Path) -> Any:
    """A reader of the GGUF file `path`, which ends where the file does.

    That of the library goes on beyond: a list said to have 10¹⁸ items would be read until memory ends.

    Raises ValueError, KeyError and IndexError for what is no such file.
    """
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends before what it says it holds")
            return super()._get(offset, dtype, count, override_order)

    return Reader(path)


@contextlib.contextmanager
def one_gguf_parse() -> Iterator[None]:
    """Let transformers parse a GGUF file once: it builds a reader for tokenizer, configuration and weights each,
    and each spends seconds on the vocabulary. It also asks for the table of names once for every module.
    """
    import gguf

    library: Any = gguf
    originals = {name: getattr(library, name) for name in ("GGUFReader", "get_tensor_name_map")}
    readers = functools.cache(read_gguf)
    library.GGUFReader = lambda path: readers(str(path))
    library.get_tensor_name_map = functools.cache(originals["get_tensor_name_map"])
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(library, name, original)
