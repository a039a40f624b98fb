"""Where a model comes from (hub id, folder, .gguf file) and how it is loaded for measuring.

Whatever the source, the rest of the package sees a folder of safetensors: a hub repository is its snapshot in the
hub's own cache, a GGUF file is dequantised once into this package's cache.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abliterate.config import cache_folder
from abliterate.errors import AbliterateError, CheckpointError, ModelError, UsageError
from abliterate.files.atomic import write_atomically
from abliterate.files.bounded import MB, Kind
from abliterate.files.cache import digest
from abliterate.files.checkpoint import ADAPTER_CONFIG, staged
from abliterate.files.configuration import check_descriptions, read_config
from abliterate.files.local import reserved
from abliterate.files.storage import (
    check_codes_read,
    check_quantization,
    quantization_config,
    stored_numbers,
    without_quantization,
)
from abliterate.model._compat import (
    auto_class,
    computes_with_codes,
    division,
    generation_settings,
    quiet_transformers,
    without_adapter,
)
from abliterate.model.anatomy import find_blocks
from abliterate.model.completeness import check_report
from abliterate.model.configuration import build_skeleton, one_line, unreadable
from abliterate.model.gguf_source import dequantise as _dequantise
from abliterate.model.gguf_source import gguf_parts
from abliterate.model.hub import hub_id, no_hub_id, snapshot
from abliterate.model.offloaded import device_of, is_offloaded
from abliterate.model.on_disk import ModelOnDisk, adapter_base
from abliterate.model.placement import (
    QUANTISED,
    Needs,
    Placement,
    Room,
    needs_of,
    own_gpu,
    place_part,
    rooms,
)
from abliterate.model.placement import place as placed
from abliterate.model.read_ahead import read_ahead
from abliterate.model.tokenizer import read_tokenizer
from abliterate.monitor import ranks
from abliterate.texts import printable

#: Folders of weights that stay on disk: they go when the process ends.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
#: Of how GGUF files become folders: to be raised when that changes.
_CONVERSION = 2
_SEAL = Kind("the seal of a folder", MB)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A live model with its tokenizer, and the files both came from.

    Of a model that somebody else has loaded (`in_memory`), `files` are where it is written when files are needed: its
    numbers need not be those of any file.
    """

    model: Any  # transformers.PreTrainedModel; its class is imported only when a model is loaded
    tokenizer: Any
    files: ModelOnDisk
    in_memory: bool = False

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the input embedding."""
        return device_of(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are measured in."""
        dtypes: Iterator[torch.dtype] = (parameter.dtype for parameter in self.model.parameters())
        return next(dtype for dtype in dtypes if dtype.is_floating_point)

    @property
    def quantised(self) -> bool:
        """Whether live modules compute with codes: no copy of them in another dtype can be made."""
        return computes_with_codes(self.model)

    @property
    def partial(self) -> bool:
        """Whether this process has only a part of each weight, and other processes the others."""
        return ranks.lockstep()


def locate(
    spec: str, *, dtype: str = "auto", trust_remote_code: bool = False, revision: str | None = None
) -> ModelOnDisk:
    """Find MODEL on disk, fetching (hub) or dequantising (GGUF) it when needed.

    `revision` is a branch, tag or commit of the hub. Raises `ModelError` when the model cannot be had, `UsageError` for
    a revision of what is no hub id, `CheckpointError` when its files are damaged.
    """
    path = Path(os.path.expanduser(spec))
    if path.suffix.lower() == ".gguf" and (path.is_file() or hub_id(spec) is None):
        if not path.is_file():
            raise ModelError(f"model '{spec}': expected a GGUF file, found no such file")
        files = ModelOnDisk(spec, "gguf", _dequantised(path, dtype))
    elif path.is_dir():
        files = ModelOnDisk(spec, "folder", path, trust_remote_code)
    elif path.exists():
        raise ModelError(f"model '{spec}': expected a hub id, a folder or a .gguf file, found another file")
    elif (identifier := hub_id(spec)) is not None:
        folder = snapshot(identifier, trust_remote_code, revision)
        files = ModelOnDisk(identifier, "hub", folder, trust_remote_code)
    else:
        raise ModelError(printable(f"model '{spec}': {no_hub_id(spec)}"))
    if revision is not None and files.kind != "hub":
        raise UsageError(f"--revision {revision}: expected a hub id with it, found the {files.kind} {spec}")
    _check_model(files)
    _ = files.checkpoint, read_config(files.folder)  # damaged files are an error now and not later
    check_descriptions(files.folder)
    return files


def _check_model(files: ModelOnDisk) -> None:
    """Raise `ModelError` for a folder without a model."""
    if (files.folder / "config.json").is_file():
        return
    if (files.folder / ADAPTER_CONFIG).is_file():
        base = adapter_base(files.folder) or "its base"
        raise ModelError(
            f"model '{files.name}': expected a model, found only an adapter ({ADAPTER_CONFIG}) for {base}; give "
            f"{base}, or merge the adapter into it; `abliterate compare BASE BASE+{files.folder}` shows what it does"
        )
    raise ModelError(f"model '{files.name}': expected a folder with config.json, found none in it")


def load_tokenizer(files: ModelOnDisk) -> tuple[Any, Any]:
    """The tokenizer and the generation configuration of a model that is not loaded here.

    Raises `ModelError` when they cannot be read.
    """

    trust = files.trust_remote_code
    with _quiet_loading(everything=False):
        try:
            return read_tokenizer(files.folder, trust_remote_code=trust), generation_settings(files.folder)
        except AbliterateError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError …
            raise unreadable(files.name, "its tokenizer cannot be read", error) from error


def load(
    files: ModelOnDisk,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    limits: Mapping[Room, int] | None = None,
    offload: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> LoadedModel:
    """Load model and tokenizer for inference, in eval mode, from safetensors only.

    `dtype` auto is the stored one, except float16 on a CPU, which is slow there: bfloat16. `device` auto is the first
    GPU, else MPS, else the CPU; where that does not hold the model it is spread over GPUs and memory. `limits` are the
    most bytes of weights by device, `offload` is a folder: what fits nowhere stays on disk. FP8 and MXFP4 are
    dequantised to `dtype`; weights of other quantisations stay as their own library loads them. `quantization` (one
    of `storage.QUANTIZATIONS`) quantises a model while it is loaded, to measure on less memory. `say` is told before
    what the model needs and what is free. Of several processes each loads the whole model onto its own GPU, or, in
    `ranks.lockstep`, a part of it.

    Raises `UsageError`, naming the nearest setting that fits, for a model that does not.
    """

    storage = files.storage
    check_quantization(files.name, storage, quantization)
    device = _own_device(device)
    _check_device(device)
    found = rooms()
    wanted = _dtype(dtype, files.description.config, device, found)
    needs = _needs(files, wanted, quantization)
    quantised = quantization is not None or not storage.editable
    if ranks.lockstep():
        _check_divided(files, device, quantised or limits is not None or offload is not None)
        place = place_part(needs, found)
    else:
        place = placed(device, needs, found, limits=limits, folder=_folder(offload), quantised=quantised)
    if place.said:
        say(place.said)
    tokenizer, model, report = _read(files, wanted, place, quantization)
    check_codes_read(files.name, storage, model, report["unexpected_keys"])
    check_report(files.name, report, model)
    if is_offloaded(model):
        read_ahead(find_blocks(model)[1])
    return LoadedModel(model.eval().requires_grad_(False), tokenizer, files)


def _own_device(device: str) -> str:
    """The device of this process: of several each has its own GPU, and none may be named."""
    if ranks.count() == 1 or device in ("auto", "cpu", "mps"):
        return device
    if device != "cuda":
        raise UsageError(
            f"--device {device}: expected auto, cuda or cpu where {ranks.count()} processes have a device each"
        )
    return f"cuda:{own_gpu()}"


def _check_divided(files: ModelOnDisk, device: str, otherwise: bool) -> None:
    """Raise `UsageError` for what does not go with a model of which each process has a part."""
    if otherwise or files.storage.dequantised or files.description.skeleton is None:
        raise UsageError(
            "--parallel tensor: expected plain weights that stay where they are computed, found quantised or offloaded "
            "ones; give --parallel data"
        )
    if torch.cuda.is_available() and device == "cpu":
        raise UsageError("--parallel tensor: expected the GPUs that there are, found --device cpu; leave it out")


def _read(
    files: ModelOnDisk, dtype: torch.dtype, place: Placement, quantization: str | None
) -> tuple[Any, Any, dict[str, Any]]:
    """The tokenizer, the live model or this process's part of it, and transformers' report on its tensors."""
    with _quiet_loading(everything=not files.storage.editable):
        try:
            tokenizer = read_tokenizer(files.folder, trust_remote_code=files.trust_remote_code)
            if place.part:
                return tokenizer, *_read_part(files, dtype)
            return tokenizer, *_read_whole(files, dtype, place, quantization)
        except AbliterateError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError …
            raise unreadable(files.name, "it cannot be loaded", error) from error


def _read_part(files: ModelOnDisk, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The part of the model that this process has, and transformers' report."""
    options = division(files.description.skeleton, ranks.count())
    return _read_folder(files, {"dtype": dtype, "output_loading_info": True, **options})


def _read_whole(
    files: ModelOnDisk, dtype: torch.dtype, place: Placement, quantization: str | None
) -> tuple[Any, dict[str, Any]]:
    """The live model at `place`, and transformers' report on its tensors."""
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    in_place = place.spread or quantization is not None or not files.storage.editable
    if in_place:
        options |= place.options() if place.spread else {"device_map": {"": place.device}}
    if (method := quantization_config(files.storage, quantization, dtype)) is not None:
        options["quantization_config"] = method
    # What has no skeleton, and what may not all fit in memory, is left to transformers to find in the folder.
    listed = files.storage.dequantised or (files.description.skeleton is not None and not place.spread)
    model, report = (_read_listed if listed else _read_folder)(files, options)
    return model if in_place else model.to(place.device), report


def _read_listed(files: ModelOnDisk, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model that the checkpoint's own list of tensors makes up, codes as the numbers behind them: no other file
    that lies in the folder is looked at.
    """
    skeleton = files.description.skeleton
    config = without_quantization(files.description.config)
    if skeleton is None:
        skeleton = build_skeleton(files.name, config, trust_remote_code=files.trust_remote_code)
    numbers = stored_numbers(files.checkpoint, options["dtype"])
    model, report = type(skeleton).from_pretrained(None, config=config, state_dict=numbers, **options)
    model.config.name_or_path = str(files.folder)
    model.generation_config = generation_settings(files.folder)
    return model, report


def _read_folder(files: ModelOnDisk, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model as transformers finds it in the folder, without an adapter that may lie there too."""
    config = files.description.config
    config = without_quantization(config) if files.storage.editable else config
    options |= {"use_safetensors": True, "trust_remote_code": files.trust_remote_code}
    with without_adapter():
        found: tuple[Any, dict[str, Any]] = auto_class(config).from_pretrained(files.folder, config=config, **options)
    return found


def _check_device(device: str) -> None:
    if device in ("auto", "balanced"):
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: not usable on this machine ({one_line(error)})") from error


def _folder(offload: Path | None) -> Path | None:
    """A folder of this process's own below the one named, which goes when the process ends."""
    if offload is None:
        return None
    try:
        offload.mkdir(parents=True, exist_ok=True)
        own = tempfile.TemporaryDirectory(prefix="abliterate-", dir=offload)
    except OSError as error:
        raise UsageError(f"--offload {offload}: expected a folder that can be written ({error.strerror})") from error
    _FOLDERS.append(own)
    return Path(own.name)


def _needs(files: ModelOnDisk, dtype: torch.dtype, quantization: str | None) -> Needs:
    """What the model needs, from its configuration and shapes."""
    skeleton, config = files.description.skeleton, files.description.config
    if skeleton is None:
        weights = sum(info.nbytes for info in files.checkpoint.tensors.values())
    else:
        weights = dtype.itemsize * sum(parameter.numel() for parameter in skeleton.parameters())
    needs = needs_of(config, weights, dtype.itemsize)
    return needs if quantization is None else needs.times(QUANTISED[quantization])


def _dtype(dtype: str, config: Any, device: str, found: Mapping[Room, int]) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    stored: torch.dtype = config.dtype
    on_cpu = device == "cpu" or list(found) == ["cpu"]
    return torch.bfloat16 if stored == torch.float16 and on_cpu else stored


def _dequantised(path: Path, dtype: str) -> Path:
    """The safetensors folder a GGUF file is dequantised into, once per file and dtype."""
    stored = "bfloat16" if dtype == "auto" else dtype
    if stored not in DTYPES:
        raise UsageError(f"--dtype {dtype}: expected auto, {', '.join(DTYPES)}")
    key = digest(json.dumps([_CONVERSION, stored, [(str(part.resolve()), _state(part)) for part in gguf_parts(path)]]))
    folder = cache_folder() / "gguf" / f"{path.stem}-{key[:12]}"
    seal = folder.with_name(f"{folder.name}.json")
    if _is_sealed(folder, seal):
        return folder
    with reserved(folder, wait=True):
        if not _is_sealed(folder, seal):  # else another process has made it meanwhile
            with staged(folder, overwrite=True) as partial:
                _dequantise(path, partial, DTYPES[stored])
            write_atomically(seal, json.dumps(_states(folder)))
    return folder


def _is_sealed(folder: Path, seal: Path) -> bool:
    """Whether a cached folder holds what was written into it, untouched, and nothing else."""
    try:
        return bool(_SEAL.json(seal) == _states(folder))
    except (CheckpointError, OSError):
        return False


def _states(folder: Path) -> dict[str, list[int]]:
    return {path.name: _state(path) for path in sorted(folder.iterdir())}


def _state(path: Path) -> list[int]:
    """What changes when a file is replaced or written to, whatever its times are set to."""
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


@contextlib.contextmanager
def _quiet_loading(*, everything: bool) -> Iterator[None]:
    """Nothing on the user's screen while a model is loaded; with `everything`, not what other libraries print."""
    # They would warn of every cast in every pass, and of what was asked for.
    for name in ("bitsandbytes", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with quiet_transformers(), contextlib.ExitStack() as stack:
        if everything:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                stack.enter_context(redirect(io.StringIO()))
        yield
