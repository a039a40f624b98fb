"""Write src/abliterate/api/options.py: the settings as keyword arguments that editors complete and mypy checks.

python scripts/python_options.py           # writes the file
python scripts/python_options.py --check   # exit code 1 when it is not as this would write it
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator

from abliterate import config
from abliterate.api.settings import keyword_of

FILE = Path(__file__).parents[1] / "src" / "abliterate" / "api" / "options.py"
HEAD = '''"""Keyword arguments of the public functions, one mapping for each class of settings.

Written by scripts/python_options.py. Defaults and limits are those of the settings in `abliterate.config`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch

    from abliterate.prompts import Behaviour

#: A file or folder.
Place = str | os.PathLike[str]
#: Prompts: a list of texts or conversations, or a SPEC (builtin, FILE[:column], id[:config]:split:column).
Prompts = str | os.PathLike[str] | Sequence[Any]
#: Several texts or numbers, or one text in which commas stand between them.
Several = str | int | Sequence[Any] | Mapping[str, float]
'''

#: The two sides of the contrast.
CONTRASTED = ("harmful", "harmless")

#: How a field may be given, by the function that reads it (see `config`).
_TAKEN = {
    "_as_text": "str | int | os.PathLike[str]",
    "_as_list": "Several",
    "_as_source": "Prompts",
    "_as_behaviour": "str | os.PathLike[str] | Mapping[str, Any] | Behaviour",
}
_TORCH = {"device": "str | torch.device", "dtype": "str | torch.dtype"}


def kinds() -> list[type[config._Settings]]:
    """All classes of settings whose fields are options, bases first."""
    found = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, config._Settings)]
    return [
        kind for kind in found if kind.__name__ not in ("_Settings", "ApplySettings", "MeasureSettings", "RunSettings")
    ]


def main() -> int:
    """Write or check the file."""
    text = HEAD + "".join(map(written, kinds()))
    if "--check" in sys.argv:
        return int(FILE.read_text(encoding="utf-8") != text)
    FILE.write_text(text, encoding="utf-8")
    return 0


def written(kind: type[config._Settings]) -> str:
    """One class; of prompts two, since the sets that are contrasted are parameters of their own at places."""
    bases = [named(base) for base in kind.__bases__ if base is not config._Settings] or ["TypedDict"]
    own = [name for name in vars(kind).get("__annotations__", {}) if name in kind.model_fields]
    if kind is config.FolderSettings:  # where a model goes is said in words of its own
        own.remove("out")
    if kind is not config.PromptSettings:
        return defined(kind, named(kind), bases, own)
    rest = [name for name in own if name not in CONTRASTED]
    return defined(kind, "OtherPromptOptions", bases, rest) + defined(
        kind, named(kind), ["OtherPromptOptions"], CONTRASTED
    )


def defined(kind: type[config._Settings], name: str, bases: Sequence[str], own: Sequence[str]) -> str:
    """A mapping with keys for some fields."""
    lines = [f"\n\nclass {name}({', '.join(bases)}, total=False):", f'    """{kind.__doc__}"""']
    hints = get_type_hints(kind, include_extras=True)
    for name in own:
        about = f"{kind.model_fields[name].description or ''}"
        lines += ["", *(f"    #: {line}" for line in textwrap.wrap(about, 110))]
        lines.append(f"    {keyword_of(name)}: {taken(name, hints[name])}")
    return "\n".join(lines) + "\n"


def named(kind: type) -> str:
    """The mapping that a class of settings becomes."""
    return kind.__name__.replace("Settings", "Options")


def taken(name: str, hint: Any) -> str:
    """What a field takes, as an annotation."""
    if name in _TORCH:
        return _TORCH[name]
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        inner = [taken(name, one) for one in get_args(hint) if one is not type(None)]
        return " | ".join([*inner, "None"])
    if origin is Annotated:
        first, *extra = get_args(hint)
        readers = [one.func.__name__ for one in extra if isinstance(one, BeforeValidator)]
        return next((_TAKEN[reader] for reader in readers if reader in _TAKEN), taken(name, first))
    if origin is Literal:
        return "Literal[" + ", ".join(f'"{one}"' for one in get_args(hint)) + "]"
    return "Place" if hint is Path else hint.__name__


if __name__ == "__main__":
    sys.exit(main())
