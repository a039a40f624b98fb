"""Where a model comes from (hub id, folder, .gguf file) and how it is loaded for measuring.

Whatever the source, the rest of the package sees a folder of safetensors: a hub repository is its snapshot in the
hub's own cache, a GGUF file is dequantised once into this package's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from abliterate.config import cache_folder
from abliterate.errors import AbliterateError, CheckpointError, ModelError, UsageError
from abliterate.files.checkpoint import staged
from abliterate.files.configuration import check_descriptions, read_config
from abliterate.files.local import reserved
from abliterate.files.storage import (
    check_codes_read,
    check_quantization,
    quantization_config,
    stored_numbers,
    without_quantization,
)
from abliterate.model._compat import auto_class, computes_with_codes, one_gguf_parse, quiet_transformers
from abliterate.model.on_disk import ModelOnDisk
from abliterate.model.tokenizer import read_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: What a snapshot of the hub needs to hold: never pickles, never other frameworks' weights.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.md", "LICENSE*"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A live model with its tokenizer, and the files both came from."""

    model: Any  # transformers.PreTrainedModel; its class is imported only when a model is loaded
    tokenizer: Any
    files: ModelOnDisk

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embedding."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return next(embedding.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are measured in."""
        dtypes: Iterator[torch.dtype] = (parameter.dtype for parameter in self.model.parameters())
        return next(dtype for dtype in dtypes if dtype.is_floating_point)

    @property
    def quantised(self) -> bool:
        """Whether live modules compute with codes: no copy of them in another dtype can be made."""
        return computes_with_codes(self.model)


def locate(spec: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> ModelOnDisk:
    """Find MODEL on disk, fetching (hub) or dequantising (GGUF) it when needed.

    Raises `ModelError` when it cannot be had, `CheckpointError` when its files are damaged.
    """
    path = Path(os.path.expanduser(spec))
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model '{spec}': expected a GGUF file, found no such file")
        files = ModelOnDisk(spec, "gguf", _dequantised(path, dtype))
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model '{spec}': expected a folder with config.json, found none in it")
        files = ModelOnDisk(spec, "folder", path, trust_remote_code)
    elif path.exists():
        raise ModelError(f"model '{spec}': expected a hub id, a folder or a .gguf file, found another file")
    elif spec.count("/") == 1 and not spec.startswith((".", "/", "~")):
        files = ModelOnDisk(spec, "hub", _snapshot(spec, trust_remote_code), trust_remote_code)
    else:
        raise ModelError(f"model '{spec}': no such folder or file, and not a hub id (owner/name)")
    _ = files.checkpoint, read_config(files.folder)  # damaged files are an error now and not later
    check_descriptions(files.folder)
    return files


def load_tokenizer(files: ModelOnDisk) -> tuple[Any, Any]:
    """The tokenizer and the generation configuration of a model that is not loaded here.

    Raises `ModelError` when they cannot be read.
    """
    import transformers

    trust = files.trust_remote_code
    with _quiet_loading(everything=False):
        try:
            tokenizer = read_tokenizer(files.folder, trust_remote_code=trust)
            if (files.folder / "generation_config.json").is_file():
                return tokenizer, transformers.GenerationConfig.from_pretrained(files.folder)
            config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=trust)
            return tokenizer, transformers.GenerationConfig.from_model_config(config)
        except AbliterateError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError …
            raise ModelError(f"model '{files.name}': its tokenizer cannot be read ({_one_line(error)})") from error


def load(
    files: ModelOnDisk, *, dtype: str = "auto", device: str = "auto", quantization: str | None = None
) -> LoadedModel:
    """Load model and tokenizer for inference, in eval mode, from safetensors only.

    `dtype` auto is the stored one, except float16 on a CPU, which is slow there: bfloat16. `device` auto is CUDA
    (all GPUs when there are several and accelerate is installed), else MPS, else the CPU. FP8 and MXFP4 are
    dequantised to `dtype`; weights of other quantisations stay as their own library loads them. `quantization` (one
    of `storage.QUANTIZATIONS`) quantises a model while it is loaded, to measure on less memory.
    """
    import transformers

    storage, trust = files.storage, files.trust_remote_code
    check_quantization(files.name, storage, quantization)
    place = _device(device)
    with _quiet_loading(everything=not storage.editable):
        try:
            config = transformers.AutoConfig.from_pretrained(files.folder, trust_remote_code=trust)
            wanted = _dtype(dtype, config, place)
            tokenizer = read_tokenizer(files.folder, trust_remote_code=trust)
            model, report = _read(files, config, wanted, place, quantization)
        except AbliterateError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError …
            raise ModelError(f"model '{files.name}': cannot be loaded ({_one_line(error)})") from error
    _check_complete(files, report)
    check_codes_read(files.name, storage, model, report["unexpected_keys"])
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, files)


def _read(
    files: ModelOnDisk, config: Any, dtype: torch.dtype, place: str, quantization: str | None
) -> tuple[Any, dict[str, Any]]:
    """The live model at `place`, and transformers' report on its tensors."""
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    in_place = place == "auto" or quantization is not None or not files.storage.editable
    if in_place:
        options["device_map"] = place if place == "auto" else {"": place}
    if (method := quantization_config(files.storage, quantization, dtype)) is not None:
        options["quantization_config"] = method
    config = without_quantization(config) if files.storage.editable else config
    if files.storage.dequantised:
        model, report = _read_dequantised(files, config, options)
    else:
        options |= {"use_safetensors": True, "trust_remote_code": files.trust_remote_code}
        model, report = auto_class(config).from_pretrained(files.folder, config=config, **options)
    return model if in_place else model.to(place), report


def _read_dequantised(files: ModelOnDisk, config: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model that the numbers behind the stored codes make up, as if they had been stored."""
    import transformers

    with torch.device("meta"):
        skeleton = auto_class(config).from_config(config, trust_remote_code=files.trust_remote_code)
    numbers = stored_numbers(files.checkpoint, options["dtype"])
    model, report = type(skeleton).from_pretrained(None, config=skeleton.config, state_dict=numbers, **options)
    if (files.folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(files.folder)
    return model, report


def _check_complete(files: ModelOnDisk, report: dict[str, Any]) -> None:
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"model '{files.name}': {len(missing)} tensors that its configuration asks for are not in its files, "
            f"{', '.join(missing[:3])}; download the model again"
        )


def _device(device: str) -> str:
    if device != "auto":
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"--device {device}: not usable on this machine ({_one_line(error)})") from error
        return device
    if torch.cuda.is_available():
        several = torch.cuda.device_count() > 1 and importlib.util.find_spec("accelerate") is not None
        return "auto" if several else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(dtype: str, config: Any, place: str) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    stored = getattr(config, "dtype", None) or torch.float32
    if isinstance(stored, str):
        stored = DTYPES.get(stored, torch.float32)
    return torch.bfloat16 if stored == torch.float16 and place == "cpu" else stored


def _snapshot(identifier: str, trust_remote_code: bool) -> Path:
    import huggingface_hub

    patterns = [*_HUB_PATTERNS, "*.py"] if trust_remote_code else _HUB_PATTERNS
    try:
        return Path(huggingface_hub.snapshot_download(identifier, allow_patterns=patterns))
    except Exception as error:  # network, authentication and cache errors of several libraries
        raise ModelError(
            f"model '{identifier}': not a folder here and cannot be fetched from the hub ({_one_line(error)})"
        ) from error


def _dequantised(path: Path, dtype: str) -> Path:
    """The safetensors folder a GGUF file is dequantised into, once per file and dtype."""
    stored = "bfloat16" if dtype == "auto" else dtype
    if stored not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}")
    stat = path.resolve().stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stored}"
    folder = cache_folder() / "gguf" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    with reserved(folder, wait=True):
        if not (folder / "config.json").is_file():  # else another process has made it meanwhile
            with staged(folder, overwrite=True) as partial:
                _dequantise(path, partial, DTYPES[stored])
    return folder


def _dequantise(path: Path, target: Path, dtype: torch.dtype) -> None:
    import transformers

    try:
        # The bar of the GGUF reader knows no switch.
        with quiet_transformers(), one_gguf_parse(), contextlib.redirect_stderr(io.StringIO()):
            options = {"gguf_file": path.name}
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=dtype,
                quantization_config=transformers.GgufConfig(dequantize=True),
                **options,
            )
            model.config._name_or_path = ""
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            for file in target.glob("*.safetensors"):  # safetensors makes them unreadable to others
                file.chmod((target / "config.json").stat().st_mode)
    except ImportError as error:
        raise ModelError(f"model '{path}': reading GGUF needs an extra; pip install 'abliterate[gguf]'") from error
    except AbliterateError:
        raise
    except Exception as error:  # a damaged file shows as any error of numpy, gguf or transformers
        raise ModelError(f"model '{path}': cannot be dequantised ({_one_line(error)})") from error


@contextlib.contextmanager
def _quiet_loading(*, everything: bool) -> Iterator[None]:
    """Nothing on the user's screen while a model is loaded; with `everything`, not what other libraries print."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would warn of every cast in every pass
    with quiet_transformers(), contextlib.ExitStack() as stack:
        if everything:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                stack.enter_context(redirect(io.StringIO()))
        yield


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
