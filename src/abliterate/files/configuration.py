"""A model's configuration (config.json), as far as this package reads it itself."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from abliterate.files.bounded import MB, Kind, named
from abliterate.files.checkpoint.reading import CONFIG

#: What counts or measures a part of a model: nothing that is built has more of anything.
Size = Annotated[int, Field(ge=0, lt=2**31, strict=True)]


DESCRIPTION = Kind("a file of a model", 1000 * MB, todo="download it again")
_DESCRIPTIONS = (".json", ".jinja", ".model", ".tiktoken", ".txt")


class Configuration(BaseModel):
    """The fields that this package, or what it builds on, takes for granted; all others are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    architectures: list[str] | None = None
    model_type: str | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | list[Size] | None = None
    max_position_embeddings: Size | None = None
    num_attention_heads: Size | list[Size] | None = None
    num_hidden_layers: Size | None = None
    num_key_value_heads: Size | list[Size | None] | None = None
    vocab_size: Size | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


def check_descriptions(folder: Path) -> None:
    """Raise `CheckpointError` for a file beside config.json that a tokenizer or template might be read from, and that
    no reader could get to the end of.
    """
    for path in folder.iterdir():
        if path.suffix in _DESCRIPTIONS and not path.is_dir():
            DESCRIPTION.opened(path).close()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json in a folder.

    Raises `CheckpointError` when it cannot be read, or a field is of another type than models have.
    """
    path = folder / "config.json"
    data = CONFIG.read(path)
    if data.startswith(codecs.BOM_UTF8):  # transformers would say that it is no JSON
        raise CONFIG.refused(path, "a byte order mark at its beginning; save it without")
    config = CONFIG.parsed(path, data)
    if not isinstance(config, dict):
        raise CONFIG.refused(path, named(config))
    for part in (config, config.get("text_config")):
        if part is not None:
            CONFIG.checked(path, part, Configuration)
    return config
