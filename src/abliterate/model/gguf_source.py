"""A GGUF file, or all parts of one that was split, as a folder of safetensors."""

from __future__ import annotations

import contextlib
import io
import math
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from abliterate.errors import AbliterateError, CheckpointError, ModelError
from abliterate.model._compat import one_gguf_parse, quiet_transformers
from abliterate.model.completeness import check_report
from abliterate.model.configuration import build_skeleton, check_counts, unreadable
from abliterate.model.on_disk import ModelOnDisk

#: How the parts of a split file are named: NAME-00001-of-00003.gguf.
_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)

#: Numbers that a model may lack without being asked how many it has: they cost nothing, and are named one by one.
_FEW_NUMBERS = 10_000_000


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """The file, or where its name is that of a part all parts in order.

    Raises `ModelError`, naming them, when some are not there.
    """
    if (named := _PART.fullmatch(path.stem)) is None:
        return (path,)
    count = int(named["count"])
    if not 1 <= int(named["number"]) <= count:
        raise ModelError(f"model '{path}': expected a part of 1 to {count}, found number {int(named['number'])}")
    names = (f"{named['name']}-{number:05d}-of-{count:05d}{path.suffix}" for number in range(1, count + 1))
    parts = tuple(path.with_name(name) for name in names)
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(
            f"model '{path}': it is split into {count} files, and {len(missing)} of them are not beside it, "
            f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}; download all parts"
        )
    return parts


def dequantise(path: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file, with all its parts, into the folder `target` as safetensors with a tokenizer.

    It is read in a folder of its own: nothing that lies beside it is looked at, no code above all.

    Raises `ModelError` for what cannot be read, `CheckpointError` when tensors are not there.
    """
    try:
        # The bar of the GGUF reader knows no switch.
        quiet = contextlib.redirect_stderr(io.StringIO())
        alone = tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-")
        with quiet_transformers(), one_gguf_parse(), quiet, alone as folder:
            file = Path(folder, "model.gguf")
            readers = _put(path, gguf_parts(path), file)
            _check_described(path, readers, file)
            model = _convert(path, file, target, dtype)
            _check_used(path, readers, model)
    except ImportError as error:
        raise ModelError(f"model '{path}': reading GGUF needs an extra; pip install 'abliterate[gguf]'") from error
    except AbliterateError:
        raise
    except Exception as error:  # a damaged file shows as any error of numpy, gguf or transformers
        raise unreadable(str(path), "it cannot be dequantised", error) from error


def _convert(path: Path, file: Path, target: Path, dtype: torch.dtype) -> Any:
    """Write the folder `target`; the live model that was written."""
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    auto: Any = transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(
        file.parent,
        dtype=dtype,
        quantization_config=transformers.GgufConfig(dequantize=True),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    check_report(str(path), report, model)
    model.config._name_or_path = ""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    for written in target.glob("*.safetensors"):  # safetensors makes them unreadable to others
        written.chmod((target / "config.json").stat().st_mode)
    _ = ModelOnDisk(str(path), "gguf", target).description  # what was written is asked the same as any folder
    return model


def _check_described(path: Path, readers: Sequence[Any], file: Path) -> None:
    """Raise `CheckpointError` for settings of a larger model than the file holds numbers for: transformers takes those
    of a model of 7 billion for settings that are not there, and would draw at random all that it does not find.
    """
    import transformers

    stored = [tensor.shape.tolist() for reader in readers for tensor in reader.tensors]
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    check_counts(str(path), config.to_dict(), stored)
    needed = sum(parameter.numel() for parameter in build_skeleton(str(path), config).parameters())
    held = sum(math.prod(shape) for shape in stored)
    if needed > _FEW_NUMBERS + 2 * held:  # a head that is not stored is the embedding once more
        raise CheckpointError(
            f"model '{path}': expected {needed:,} numbers, as its settings say, found {held:,}; download it again"
        )


def _check_used(path: Path, readers: Sequence[Any], model: Any) -> None:
    """Raise `CheckpointError` for tensors of blocks that went into no parameter, which transformers does not report."""
    stored = {tensor.name: int(tensor.n_elements) for reader in readers for tensor in reader.tensors}
    held = {value.data_ptr(): value.numel() for value in model.state_dict().values()}
    if sum(stored.values()) == sum(held.values()):
        return
    architecture = str(readers[0].fields["general.architecture"].contents())
    further = {name.split(".")[1] for name in stored if ".nextn." in name}  # blocks that predict further tokens
    blocks = [name for name in stored if name.startswith("blk.") and name.split(".")[1] not in further]
    unused = [name for name in _unknown(blocks, architecture, model) if "rope" not in name]
    if unused:
        raise CheckpointError(
            f"model '{path}': {len(unused)} tensors of its blocks are unknown to its configuration and would be left "
            f"out, {', '.join(unused[:3])}{' …' if len(unused) > 3 else ''}; download or convert it again"
        )


def _unknown(stored: Sequence[str], architecture: str, model: Any) -> list[str]:
    """Those of the tensors that no parameter of the model is called; experts are stacked under other names."""
    import gguf

    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in architectures:
        return []
    table = gguf.get_tensor_name_map(architectures[architecture], model.config.get_text_config().num_hidden_layers)
    known = {table.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
    bare = {name.rpartition(".")[0] for name in known if name is not None}
    blocks = {name.split(".")[1] for name in known if name is not None and name.startswith("blk.")}
    rest = [name for name in stored if name not in known]
    if None not in known:
        return rest
    return [name for name in rest if name.split(".")[1] not in blocks or name.rpartition(".")[0] in bare]


def _put(path: Path, parts: Sequence[Path], file: Path) -> list[Any]:
    """Make `file` the whole of a GGUF file: a link to the only part, or all parts in one. Readers of the parts.

    Raises `ModelError` for parts that do not belong together, or that are not all of them.
    """
    import gguf

    if len(parts) == 1:
        file.symlink_to(parts[0].resolve())
    readers = [gguf.GGUFReader(part) for part in (parts if len(parts) > 1 else (file,))]
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True), start=1):
        found, count = (_number(reader, "split.no") or 0) + 1, _number(reader, "split.count") or 1
        if (found, count) != (number, len(parts)):
            raise ModelError(
                f"model '{path}': expected {part.name} to be part {number} of {len(parts)}, found part {found} of "
                f"{count} (split.count); download all parts of one file, named NAME-00001-of-{count:05d}.gguf"
            )
    _check_tensors(path, readers)
    if len(parts) > 1:
        _join(readers, file)
    return readers


def _number(reader: Any, key: str) -> int | None:
    field = reader.fields.get(key)
    return None if field is None else int(field.contents())


def _check_tensors(path: Path, readers: Sequence[Any]) -> None:
    """No tensor twice, as many as the parts say, and no more blocks than there are tensors for."""
    names = Counter(tensor.name for reader in readers for tensor in reader.tensors)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise CheckpointError(f"model '{path}': {len(twice)} tensors are stored twice, {', '.join(twice[:3])}")
    expected = _number(readers[0], "split.tensors.count")
    if expected not in (None, len(names)):
        raise CheckpointError(f"model '{path}': expected {expected} tensors (split.tensors.count), found {len(names)}")
    for key in readers[0].fields:
        if key.endswith(".block_count") and (_number(readers[0], key) or 0) > len(names):
            raise CheckpointError(
                f"model '{path}': expected at most one block for each of its {len(names)} tensors, found "
                f"{_number(readers[0], key)} ({key}); download it again"
            )


def _join(readers: Sequence[Any], file: Path) -> None:
    """The settings of the first part and the tensors of all, with the bytes that they have."""
    import gguf

    first = readers[0]
    writer = gguf.GGUFWriter(file, first.fields["general.architecture"].contents())
    for key, field in first.fields.items():
        if not key.startswith(("GGUF.", "split.")) and key != "general.architecture":
            inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for reader in readers:
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
