"""Task files of others: lm-eval runs code that they name, so without the user's word they may name none.

Files are read here as trees of YAML nodes, of which nothing is constructed. What lm-eval would make a function of, or
hand on to a library that runs code, is refused by file and line. Templates are text that comes with the files: lm-eval
renders them with all of Python at hand, here they are rendered in a sandbox. Metrics that it does not know it fetches
from the hub as code; that is refused too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2.sandbox import SandboxedEnvironment

from abliterate.errors import UsageError
from abliterate.files.bounded import MB, Kind

#: How a user says that code may be run.
FLAG = "--trust-task-code"

TASK_FILE = Kind("a task file of lm-eval", 4 * MB, UsageError)

#: No file of lm-eval's own has as many nodes (an alias counts each time it is used).
_MOST_NODES = 200_000

#: Nor are any nested as deeply.
_DEEPEST = 50

#: Keys whose values become functions or classes, or say that code may be fetched and run.
_CODE = frozenset({"class", "custom_dataset", "custom_generate", "filter_fn", "trust_remote_code"})

_STANDARD = "tag:yaml.org,2002:"
_PLAIN = frozenset(
    _STANDARD + name
    for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "binary", "set", "merge")
)

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one that lm-eval reads with, where there is a choice


def refuse_code(file: Path, root: Path) -> set[str]:
    """All texts in a task file and in what it includes.

    Raises `UsageError` for one that names code, lies outside the folder `root`, or cannot be read.
    """
    texts, waiting, seen = set[str](), [file], set[Path]()
    while waiting:
        path = waiting.pop()
        place = path.resolve()
        if place in seen:
            continue
        seen.add(place)
        if not place.is_relative_to(root.resolve()):
            raise _refused(path, f"expected a file in {root}, found one elsewhere")
        for key, node in _entries(path, _parsed(path)):
            _check(path, key, node)
            if isinstance(node, yaml.ScalarNode):
                texts.add(node.value)
                waiting += [place.parent / node.value] if key == "include" else []
    return texts


def refuse_code_of_group(file: Path, index: Mapping[str, Any], own: Path) -> None:
    """Raise `UsageError` where a group names code: in its file or in any that it reaches by name through `index`.

    `index` is lm-eval's: entries with `yaml_path` and `tags`, by name. Files in the folder `own` are lm-eval's.
    """
    waiting, seen = refuse_code(file, file.parent), set[str]()
    while waiting:
        name = waiting.pop()
        entry = index.get(name)
        if entry is None or name in seen:
            continue
        seen.add(name)
        waiting |= set(entry.tags)
        if entry.yaml_path is not None and not Path(entry.yaml_path).is_relative_to(own):
            waiting |= refuse_code(Path(entry.yaml_path), file.parent)


class CodeAsked(BaseException):
    """Code from the hub was about to be fetched. No Exception, since lm-eval goes on after any of those."""

    def named(self, who: str) -> UsageError:
        """What to raise in its place."""
        return UsageError(
            f"{who}: expected metrics of lm-eval's own, found '{self}', which is code from elsewhere; if you trust it, "
            f"give {FLAG}"
        )


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """lm-eval's templates in a sandbox while inside, and `CodeAsked` where it would fetch code from the hub."""
    import evaluate
    import lm_eval.utils

    plain = lm_eval.utils.env
    sandbox = SandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline)
    sandbox.filters |= plain.filters
    with _replaced(lm_eval.utils, "env", sandbox), _replaced(evaluate, "load", _fetched):
        yield


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _fetched(path: str, *_: Any, **__: Any) -> Any:
    raise CodeAsked(path)


def _parsed(path: Path) -> yaml.Node | None:
    """The tree of a file."""
    try:
        tree: yaml.Node | None = yaml.compose(TASK_FILE.text(path), _Loader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:200]
        raise UsageError(f"lm-eval task file {path}: cannot be loaded ({said}); see lm-eval's task guide") from error
    return tree


def _entries(path: Path, tree: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """Every node below `tree` with the key that it stands under. Those of a list stand under the list's."""
    waiting = [] if tree is None else [("", tree, 0)]
    count = 0
    while waiting:
        key, node, depth = waiting.pop()
        count += 1
        if count > _MOST_NODES or depth > _DEEPEST:
            most = f"at most {_MOST_NODES} values, nested at most {_DEEPEST} deep"
            raise UsageError(f"lm-eval task file {path}: expected {most}, found more")
        yield key, node
        if isinstance(node, yaml.MappingNode):
            waiting += [(str(name.value), value, depth + 1) for name, value in node.value]
            waiting += [("", name, depth + 1) for name, _ in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(key, item, depth + 1) for item in node.value]


def _check(path: Path, key: str, node: yaml.Node) -> None:
    """Raise for a node that is or names code."""
    value = node.value if isinstance(node, yaml.ScalarNode) else ""
    if node.tag not in _PLAIN:
        found = f"{node.tag.removeprefix(_STANDARD)} {value}"
    elif key in _CODE and value.lower() not in ("false", "null", "~"):
        found = f"'{key}'"
    elif key == "dataset_path" and value == "pandas":
        found = "the reader 'pandas', which unpickles"
    elif key == "use_prompt" and (value.startswith("promptsource:") or ".yaml" in value):
        found = f"prompts from elsewhere ({value})"
    else:
        return
    raise _refused(
        path, f"line {node.start_mark.line + 1}: expected nothing that runs code, found {found.strip()[:100]!r}"
    )


def _refused(path: Path, said: str) -> UsageError:
    return UsageError(f"lm-eval task file {path}: {said}; if you trust all that it names, give {FLAG}")
