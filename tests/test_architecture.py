"""What holds the package together: imports point one way, torch stays out of what must be light, no pickles."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import abliterate
from abliterate import errors

SOURCE = Path(abliterate.__file__).parent
DOCS = SOURCE.parents[1] / "docs" / "architecture.md"

#: Rooms may import from those above them only.
ORDER = (
    "_version",
    "texts",
    "errors",
    "config",
    "monitor",
    "files",
    "algebra",
    "record",
    "prompts",
    "model",
    "edit",
    "session",
    "evaluation",
    "finding",
    "report",
    "pipeline",
    "forensics",
    "lab",
    "cli",
    "api",
)


def modules() -> Iterator[tuple[str, Path]]:
    """Name within the package, top part first, and file of every module."""
    for path in sorted(SOURCE.rglob("*.py")):
        yield ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"), path


@functools.cache
def tree(path: Path) -> ast.Module:
    """A module's source, parsed once."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes(path: Path) -> Sequence[ast.AST]:
    """All of it."""
    return tuple(ast.walk(tree(path)))


@functools.cache
def imports(path: Path, *, typing: bool = False) -> Sequence[tuple[str, bool]]:
    """Every module imported, with whether that happens when the module is imported (not in a function)."""

    def walk(node: ast.AST, now: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing:
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, now) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module, now
            yield from ((f"{node.module}.{alias.name}", now) for alias in node.names)
        inside = now and not isinstance(node, ast.FunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return tuple(walk(tree(path), True))


#: Lines of the longest function; parameters of most functions at most, and how many functions have more.
LONGEST, PARAMETERS, WITH_MORE = 45, 7, 8


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function and method, named by its module."""
    for name, path in modules():
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{node.name}", node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Those that have a name, without the object itself."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_functions_stay_short() -> None:
    lines = [((node.end_lineno or 0) - node.lineno + 1, name) for name, node in functions()]
    assert [(count, name) for count, name in lines if count > LONGEST] == []


def test_few_functions_take_many_parameters() -> None:
    """Most of them are commands and verbs, whose parameters are their users' options."""
    many = [name for name, node in functions() if len(parameters(node)) > PARAMETERS]
    assert len(many) <= WITH_MORE, many


def test_every_module_has_its_place_in_the_order() -> None:
    found = {name.partition(".")[0] for name, _ in modules()} - {"__init__", "__main__"}
    assert found == set(ORDER)


def between_rooms() -> Iterator[tuple[str, str, str]]:
    """Each module, its room, and every other room that it imports from."""
    for name, path in modules():
        room = name.partition(".")[0]
        for imported, _ in imports(path, typing=True) if room in ORDER else ():
            package, _, rest = imported.partition(".")
            other = rest.partition(".")[0]
            if package == "abliterate" and other in ORDER and other != room:
                yield name, room, other


def test_imports_point_only_upwards() -> None:
    wrong = {name: other for name, room, other in between_rooms() if ORDER.index(other) > ORDER.index(room)}
    assert wrong == {}


#: Rooms, those that stand on one another (the longest chain of imports), and pairs of which one imports the other.
ROOMS, LEVELS, ARROWS = 20, 13, 150


def levels(arrows: Mapping[str, set[str]]) -> dict[str, int]:
    """How many rooms stand on one another up to each, itself among them; `arrows` say what a room imports."""
    found: dict[str, int] = {}
    for room in ORDER:  # what a room imports stands before it
        found[room] = 1 + max((found[other] for other in arrows.get(room, ())), default=0)
    return found


def test_the_house_stays_low() -> None:
    arrows: dict[str, set[str]] = {}
    for _, room, other in between_rooms():
        arrows.setdefault(room, set()).add(other)
    assert len(ORDER) <= ROOMS
    assert max(levels(arrows).values()) <= LEVELS, levels(arrows)
    assert sum(map(len, arrows.values())) <= ARROWS
    assert "cli" not in arrows["api"], "two faces: neither is built on the other"
    assert levels({"config": {"errors"}, "files": {"config", "texts"}})["files"] == 3


def test_order_is_the_one_in_the_documentation() -> None:
    listed = re.findall(r"^    ([a-z_]+)  +\S", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(listed) == ORDER


def test_no_module_imports_itself_through_others() -> None:
    named = dict(modules())
    below = {
        name: {
            other for target, _ in imports(path, typing=True) if (other := _module(target, named)) not in (None, name)
        }
        for name, path in named.items()
        if not path.name.startswith("__")
    }
    for name in below:
        reached, waiting = set[str | None](), set(below[name])
        while waiting:
            reached |= waiting
            waiting = set().union(*(below.get(other or "", set()) for other in waiting)) - reached
        assert name not in reached, f"{name} is imported by what it imports"


def _module(target: str, named: dict[str, Path]) -> str | None:
    """The module of this package that an import names, directly or by what it takes from it; no package's face."""
    name = target.removeprefix("abliterate.")
    known = name if name in named else name.rpartition(".")[0]
    return known if known in named and named[known].name != "__init__.py" and target.startswith("abliterate.") else None


@pytest.mark.parametrize(
    "module",
    [
        *("errors", "config", "prompts", "files.checkpoint", "record"),
        *("evaluation.judging", "report.wording", "report.card", "report.html", "cli"),
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, abliterate.{module}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"


def test_the_program_starts_without_making_validators_of_settings() -> None:
    code = (
        "import abliterate.cli; from abliterate import config as c; "
        "print([n for n, k in vars(c).items() if n.endswith('Settings') and k.__pydantic_complete__])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize(
    ("before", "given", "found"),
    [
        ("", {}, "3000"),
        ("", {"OMP_NUM_THREADS": "2"}, "3000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ("torch, ", {}, "None"),
    ],
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(before: str, given: dict[str, str], found: str) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = f"import {before}abliterate, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env={**own, **given}).strip() == found


def test_every_public_name_resolves_and_is_listed() -> None:
    assert abliterate.__all__ == sorted(set(abliterate.__all__))
    assert dir(abliterate) == abliterate.__all__
    for name in abliterate.__all__:
        value = getattr(abliterate, name)
        assert value.__module__.startswith("abliterate."), name
        assert value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = abliterate.nothing


def test_type_checkers_see_the_same_public_names() -> None:
    (block,) = (node for node in tree(SOURCE / "__init__.py").body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(abliterate.__all__)


def calls(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_library_does_not_print_and_loads_no_pickle() -> None:
    forbidden = {"torch.load", "eval", "exec", "os.system", "torch.hub.load", "np.load", "numpy.load"}
    for name, path in modules():
        used = set(calls(path))
        assert not used & forbidden, name
        assert "print" not in used or name == "cli.app", name
        imported = {imported.partition(".")[0] for imported, _ in imports(path)}
        assert not imported & {"pickle", "dill", "joblib", "shelve", "marshal"}, name


#: What opens a file by its path or maps it, and what gives a descriptor of a file that was looked at before.
_OPENING = {
    *(
        "open",
        "open_file",
        "fdopen",
        "read_text",
        "read_bytes",
        "safe_open",
        "GGUFReader",
        "memmap",
        "mmap",
        "fromfile",
        "from_file",
    ),
    *("from_file", "load_file", "read_table", "read_csv", "loadtxt", "DictReader", "reader"),
}
_LOOKED_AT = {"open_regular", "open_source", "new_file"}

#: The only modules that open files themselves; all others ask `files.bounded` or `files.checkpoint`.
OPENS = {
    "files.bounded": "what all others ask",
    "files.portable": "what opens for the others, on every system",
    "files.atomic": "new files of our own",
    "files.checkpoint.growing": "what was written a moment ago",
    "files.checkpoint.journal": "to write on, not through links",
    "files.checkpoint.staging": "the seal of a staging folder, not through links",
    "files.local": "the key and locks in the cache, not through links",
    "finding.search.blackbox": "a lock, on a regular file of this user alone",
    "files.storage": "safetensors that were checked",
    "edit.direction": "safetensors that were checked",
    "evaluation.engines.vllm": "safetensors that were checked",
    "forensics.repair": "safetensors that were checked",
    "model.gguf_source": "GGUF files that are regular",
    "prompts.delimited": "texts that were read",
    "texts.terminal": "standard streams",
    "lab.serving": "a browser",
    "lab.ui": "the page's style, of this package",
    "model.placement": "/proc",
    "model.read_ahead": "safetensors that were checked",
    "monitor": "/proc",
    "prompts.watched": "/proc",
}
#: Modules that parse JSON themselves: of this package's own files and processes, and of Optuna.
PARSES = {"monitor.ranks", "files.bounded", "finding.search.blackbox", "forensics.verdict", "prompts.sources"}


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def test_files_from_outside_are_opened_in_one_place() -> None:
    opening, parsing = set(), set()
    for name, path in modules():
        for node in nodes(path):
            if not isinstance(node, ast.Call):
                continue
            first = _called(node.args[0]) if node.args else ""
            last = _called(node).rpartition(".")[2]
            of_package = "files(" in ast.unparse(node.func)
            if last in _OPENING and first not in _LOOKED_AT and not of_package:
                opening.add(name)
            if _called(node) in ("json.loads", "json.load") and first != "json.dumps":
                parsing.add(name)
    assert opening == OPENS.keys()
    assert parsing == PARSES


def test_foreign_code_is_never_trusted_by_default() -> None:
    for name, path in modules():
        for node in nodes(path):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value), name
    assert abliterate.ModelSettings().trust_remote_code is False


def test_errors_are_one_tree_drawn_in_its_docstring() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in classes if issubclass(kind, errors.AbliterateError)]
    assert kinds == classes
    assert {kind.exit_code for kind in kinds} == {1, 2, 3}
    assert errors.__doc__ is not None
    drawn = {}
    for line in errors.__doc__.splitlines():
        if match := re.search(r"^((?:│|├──|└──|\s)*)([A-Z][A-Za-z]+(?:Error|Met))\b", line):
            drawn[match[2]] = len(match[1]) // 4
    depths = {kind.__name__: len(kind.__mro__) - len(errors.AbliterateError.__mro__) + 1 for kind in kinds}
    assert drawn == depths


def test_settings_describe_every_option() -> None:
    for name in ("ModelSettings", "PromptSettings", "FindSettings", "EvalSettings", "OutputSettings"):
        for field, info in getattr(abliterate, name).model_fields.items():
            assert info.description, f"{name}.{field}"
            assert info.description.endswith((".", "…")), f"{name}.{field}"
