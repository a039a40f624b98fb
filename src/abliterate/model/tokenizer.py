"""The tokenizer of a model's folder, with the chat template wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from abliterate.errors import ModelError
from abliterate.files.bounded import MB, Kind

#: Where processors kept the template before it had a file of its own; tokenizers do not look there.
_OLD = "chat_template.json"
_KIND = Kind("a chat template", 10 * MB, ModelError, todo="give --chat-template FILE")


class _OldTemplate(BaseModel):
    chat_template: str | dict[str, str]


def read_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of `folder`. Raises what transformers raises, and `ModelError` for a template that is none."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not getattr(tokenizer, "chat_template", None) and (folder / _OLD).is_file():
        tokenizer.chat_template = _KIND.model(folder / _OLD, _OldTemplate).chat_template
    return tokenizer
