"""Replies from vLLM in this process: one loaded model whose edit is a LoRA adapter, or two models one after the other.

vLLM pins its own torch, so it is no extra of this package: install both into an environment of their own. An adapter
leaves no doubt about what is compared, since both states compute with the same weights in memory. But vLLM holds less
than PEFT does: no biases, no stacked experts, and embeddings of some architectures only. What it cannot hold is refused
by name when the model is loaded, before the first reply, and what it has loaded is counted: nothing is dropped in
silence.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from abliterate.edit.adapters import read_adapter_config
from abliterate.errors import AbliterateError, UsageError
from abliterate.evaluation.engines.base import Progress, as_reply, check_prompts, in_a_line, nothing_edited, parameters
from abliterate.files.checkpoint import read_shard
from abliterate.model.decoding import GREEDY, Decoding
from abliterate.model.generation import Reply

#: Ranks that vLLM makes room for.
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: What the environment says unless it says something else. In one process an adapter that is refused is an ordinary
#: error, the memory of a model is free when it is let go, and what was loaded can be looked at without pickles.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}

#: Prompts handed over at once, and so how often progress is told. vLLM runs no more than that together by itself.
_CHUNK = 256

_WAY_OUT = "write an edited model with 'abliterate apply' and give its folder instead of the adapter"

#: What `SamplingParams` call settings of a generation_config.
_DECODING = {name: name for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")}
_DECODING |= {"min_new_tokens": "min_tokens"}

_SUFFIXES = (".lora_B.weight", ".lora_embedding_B")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in PEFT's format: its folder, its rank, and the modules that it changes."""

    folder: Path
    rank: int
    modules: frozenset[str]


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter in `folder`, None when a whole model lies there.

    Raises `UsageError` for a folder with neither, and for adapters that vLLM cannot hold, whatever the model: several
    that belong together, changes of biases, parameters that are no module of their own (stacked experts), ranks above
    512.
    """
    if not (folder / "adapter_config.json").is_file():
        _refuse_other(folder)
        return None
    config = read_adapter_config(folder)
    if config.lora_bias or config.bias != "none":
        raise UsageError(f"adapter '{folder}': vLLM cannot hold changes of biases; {_WAY_OUT}")
    if parameters := config.target_parameters:
        raise UsageError(f"adapter '{folder}': vLLM cannot hold changes of {_listed(parameters)}; {_WAY_OUT}")
    if config.r > _RANKS[-1]:
        raise UsageError(f"adapter '{folder}': expected a rank of at most {_RANKS[-1]}, found {config.r}; {_WAY_OUT}")
    read_shard(folder / "adapter_model.safetensors")  # refuses anything malformed before another library maps it
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        changed = [name for name in file.keys() if name.endswith(_SUFFIXES) and file.get_tensor(name).any()]  # noqa: SIM118
    modules = (name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in changed)
    return Adapter(folder, config.r, frozenset(modules))


def _refuse_other(folder: Path) -> None:
    """Raise for what is no single adapter and no model."""
    if parts := sorted(path.parent.name for path in folder.glob("*/adapter_config.json")):
        raise UsageError(
            f"adapter '{folder}': expected one adapter, found {_listed(parts)}: vLLM takes one; {_WAY_OUT}"
        )
    if not (folder / "config.json").is_file():
        raise UsageError(f"edited model '{folder}': expected an adapter_config.json or a config.json, found neither")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class VllmEngine:
    """vLLM on the model in `folder`. Models are loaded when first asked; one is in memory at a time.

    `edited` is the folder of a LoRA adapter for it, which is then switched on and off for each request, or of a whole
    edited model, which takes the place of the first when it is needed (and the first is loaded again afterwards).
    """

    def __init__(
        self, folder: Path, tokenizer: Any, ends: frozenset[int], *, edited: Path | None = None, **options: Any
    ) -> None:
        """`ends` are the ids that end a reply; `options` go to `vllm.LLM` (dtype, max_model_len, …).

        Raises `UsageError` when vLLM is not installed, or for an adapter that it cannot hold (see `read_adapter`).
        """
        self._folder, self._tokenizer, self._ends, self._options = folder, tokenizer, ends, options
        self._adapter = None if edited is None else read_adapter(edited)
        self._edited = edited
        self._vllm = _library()
        self._on = False
        self._loaded: tuple[Path, Any] | None = None

    @property
    def name(self) -> str:
        """With vLLM's version."""
        return f"vllm {self._vllm.__version__}"

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        progress: Progress | None = None,
        decoding: Decoding = GREEDY,
    ) -> list[Reply]:
        """Replies, in the order of `prompts` (token ids).

        Raises `UsageError` for what `decoding` asks and vLLM cannot do, and naming modules of the adapter that it
        cannot hold; `AbliterateError` with vLLM's own words when it cannot load the model or run the prompts.
        """
        check_prompts(prompts)
        if not prompts:
            return []
        llm = self._model(self._edited if self._on and self._adapter is None else self._folder)
        params = self._parameters(decoding, prompts, max_new_tokens)
        replies: list[Reply] = []
        for start in range(0, len(prompts), _CHUNK):
            chunk = [{"prompt_token_ids": list(prompt)} for prompt in prompts[start : start + _CHUNK]]
            replies += self._replies(llm, chunk, params[start : start + _CHUNK])
            if progress is not None:
                progress(len(chunk))
        return replies

    def _parameters(self, decoding: Decoding, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Any]:
        """How each prompt is answered. Nothing is taken from a model's own settings, and only our ids end a reply."""
        asked = parameters(decoding, self.name, _DECODING)
        fixed = {"stop_token_ids": sorted(self._ends), "ignore_eos": True, "detokenize": False}
        asked |= {"max_tokens": max_new_tokens, **fixed}
        if not decoding.samples:
            return [self._vllm.SamplingParams(**asked | {"temperature": 0.0})] * len(prompts)
        seeds = [decoding.seed_for(prompt) % 2**63 for prompt in prompts]
        return [self._vllm.SamplingParams(**{"temperature": 1.0, **asked, "seed": seed}) for seed in seeds]

    def _replies(self, llm: Any, prompts: list[Any], params: list[Any]) -> Iterator[Reply]:
        request = _request(self._adapter) if self._on and self._adapter is not None else None
        with self._said("run the prompts"):
            outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=request)
        for output in outputs:
            best = output.outputs[0]
            yield as_reply(self._tokenizer, best.token_ids, self._ends, ended=best.finish_reason == "stop")

    @contextlib.contextmanager
    def edited(self) -> Iterator[None]:
        """Replies are the edited model's, inside. Raises `UsageError` when none was given."""
        if self._edited is None:
            raise nothing_edited(self.name, "the folder of an adapter or of an edited model")
        before, self._on = self._on, True
        try:
            yield
        finally:
            self._on = before

    def close(self) -> None:
        """Let go of the loaded model's memory; it is loaded again when asked again."""
        self._loaded = None
        gc.collect()
        torch.cuda.empty_cache()

    def _model(self, folder: Path | None) -> Any:
        """The `vllm.LLM` of `folder`, with the adapter loaded and checked if there is one."""
        assert folder is not None  # see `edited`
        if self._loaded is None or self._loaded[0] != folder:
            self.close()
            options = {"disable_log_stats": True, "use_tqdm_on_load": False, **self._options}
            if self._adapter is not None:
                rank = next(size for size in _RANKS if size >= self._adapter.rank)
                options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
            with self._said(f"load '{folder}'"):
                llm = self._vllm.LLM(model=str(folder), **options)
            if self._adapter is not None:
                _put_on(llm, self._adapter)
            self._loaded = folder, llm
        return self._loaded[1]

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """Turn vLLM's own errors into one line."""
        try:
            yield
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise AbliterateError(f"{self.name} cannot {what}: {in_a_line(error)}") from error


def _library() -> Any:
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UsageError(
            f"engine vllm: cannot be imported ({in_a_line(error)}); install vllm beside abliterate in an environment "
            "of their own, or use 'transformers' or a server"
        ) from error


def _request(adapter: Adapter) -> Any:
    return importlib.import_module("vllm.lora.request").LoRARequest("edited", 1, str(adapter.folder))


def _put_on(llm: Any, adapter: Adapter) -> None:
    """Load the adapter, and make sure that all of it has arrived.

    vLLM matches modules by the last part of their names, and passes over a module that it could not wrap.
    """
    try:
        llm.llm_engine.add_lora(_request(adapter))
    except (ValueError, RuntimeError) as error:
        able = {name.rpartition(".")[2] for name in llm.apply_model(_slices)[0]}
        refused = sorted(name for name in adapter.modules if name.rpartition(".")[2] not in able)
        what = _listed(refused) if refused else f"it: {in_a_line(error)}"
        raise UsageError(f"adapter '{adapter.folder}': vLLM cannot hold {what}; {_WAY_OUT}") from error
    held = llm.apply_model(_slices)[0]
    if sum(held.values()) != len(adapter.modules):
        missing = sorted(adapter.modules - {name for name, count in held.items() if count})
        raise UsageError(
            f"adapter '{adapter.folder}': expected {len(adapter.modules)} changed modules in vLLM, found "
            f"{sum(held.values())} (without {_listed(missing)}); {_WAY_OUT}"
        )


def _slices(model: Any) -> dict[str, int]:
    """How many maps the loaded adapter changes in every module of vLLM's `model` that can take one."""
    found = {}
    for name, module in model.named_modules():
        stacked = getattr(module, "lora_b_stacked", None)
        if stacked is not None:
            slices = stacked if isinstance(stacked, list | tuple) else [stacked]
            found[name] = sum(bool(part.any()) for part in slices)
    return found
