"""What people have at hand, given to the public functions: it works, or is named in an error of this package."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isclass, isfunction, signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import abliterate as ab
from abliterate.config.natural import natural
from abliterate.edit.plan import Edit
from abliterate.errors import UsageError
from abliterate.model.anatomy import Anatomy, Kind, Writer
from records import full_record

D = 4
UNIT = [1.0, 0.0, 0.0, 0.0]
WRITER = Writer("mlp", Kind.MLP, 0, "mlp.weight", 0, None)


def anatomy() -> Anatomy:
    return Anatomy(D, ("block",), (WRITER,), (0.0, 0.0))


VECTORS: dict[str, Any] = {
    "list": UNIT,
    "whole numbers": [1, 0, 0, 0],
    "tuple": tuple(UNIT),
    "rows": [UNIT],
    "array": np.array(UNIT),
    "array of rows": np.array([UNIT], dtype=np.float32),
    "vector": torch.tensor(UNIT),
    "whole tensor": torch.tensor([1, 0, 0, 0]),
    "half": torch.tensor([UNIT], dtype=torch.bfloat16),
}
NO_VECTORS: dict[str, Any] = {
    "None": None,
    "text": "abc",
    "number": 1.0,
    "mapping": {"a": 1},
    "texts": ["a", "b"],
    "ragged": [[1.0], [1.0, 2.0]],
    "complex": torch.tensor([1j]),
    "cube": torch.ones(1, 1, 1),
    "object": object(),
}


@pytest.mark.parametrize("what", VECTORS)
def test_vectors_of_any_kind_are_directions(what: str, tmp_path: Path) -> None:
    direction = ab.Direction(VECTORS[what])
    assert direction.basis.tolist() == [UNIT]
    assert direction.basis.is_floating_point()
    ab.save_direction(str(tmp_path / "d.safetensors"), VECTORS[what])  # type: ignore[arg-type]
    assert ab.load_direction(str(tmp_path / "d.safetensors")).basis.tolist() == [UNIT]  # type: ignore[arg-type]
    assert Edit(WRITER, VECTORS[what], 1).basis.shape == (1, D)
    assert ab.Plan([Edit(WRITER, VECTORS[what], 1)], VECTORS[what], 1, ()).direction.shape == (1, D)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", NO_VECTORS)
def test_what_is_no_vector_is_named(what: str, tmp_path: Path) -> None:
    for make in (ab.Direction, lambda value: Edit(WRITER, value, 1.0), lambda value: ab.Plan((), value, 1.0, ())):
        with pytest.raises(UsageError, match=r"^(Direction: basis|Edit: basis|Plan: direction): expected numbers"):
            make(NO_VECTORS[what])
    with pytest.raises(UsageError):
        ab.save_direction(tmp_path / "d.safetensors", NO_VECTORS[what])


def test_other_fields_of_a_direction_are_made_or_named() -> None:
    made = ab.Direction(UNIT, reader=UNIT, mean=[1, 2, 3, 4], site=(1, -1), learnt_from=["ab"])  # type: ignore[arg-type]
    assert made.site == ab.Site(1, -1)
    assert made.learnt_from == {"ab"}
    assert made.reader is not None
    for field, value in (("reader", [1.0]), ("mean", "a"), ("site", 5), ("site", (1, "a")), ("per_site", 5)):
        with pytest.raises(UsageError, match=f"^Direction: {field}"):
            ab.Direction(UNIT, **{field: value})  # type: ignore[arg-type]


SETTINGS: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = [
    (ab.ModelSettings, {"dtype": torch.float32}, {"dtype": "float32"}),
    (ab.ModelSettings, {"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
    (ab.ModelSettings, {"device": torch.device("cpu")}, {"device": "cpu"}),
    (ab.ModelSettings, {"batch_size": 8}, {"batch_size": "8"}),
    (ab.ModelSettings, {"chat_template": Path("x.jinja")}, {"chat_template": "x.jinja"}),
    (ab.PromptSettings, {"harmful": Path("x.jsonl")}, {"harmful": "x.jsonl"}),
    (ab.EditSettings, {"layers": 3}, {"layers": "3"}),
    (ab.EditSettings, {"layers": range(2, 4)}, {"layers": "2,3"}),
    (ab.EditSettings, {"components": ["mlp", "attention"]}, {"components": "mlp,attention"}),
    (ab.EditSettings, {"strengths": {"mlp": 1, "attention@0-2": 0.5}}, {"strengths": "mlp=1,attention@0-2=0.5"}),
    (ab.EditSettings, {"strength": 1}, {"strength": 1.0}),
    (ab.SearchSettings, {"pick": 3}, {"pick": "3"}),
    (ab.SearchSettings, {"objectives": ["refusals", "kl"]}, {"objectives": "refusals,kl"}),
    (ab.EvalSettings, {"capability": [Path("a.csv"), "b.csv"]}, {"capability": "a.csv,b.csv"}),
    (ab.OutputSettings, {"out": "x"}, {"out": Path("x")}),
    (ab.RunSettings, {"model": Path("m")}, {"model": "m"}),
    (ab.RunSettings, {"model": "m", "editing": {"strength": 2}}, {"model": "m"}),
]


@pytest.mark.parametrize(("kind", "given", "found"), SETTINGS)
def test_settings_take_natural_types(kind: Callable[..., Any], given: dict[str, Any], found: dict[str, Any]) -> None:
    made = kind(**given)
    for name, value in found.items():
        assert getattr(made, name) == value


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (ab.ModelSettings, {"dtype": torch.int8}),
        (ab.ModelSettings, {"dtype": 16}),
        (ab.ModelSettings, {"device": None}),
        (ab.ModelSettings, {"batch_size": 1.5}),
        (ab.ModelSettings, {"batch_size": True}),
        (ab.ModelSettings, {"surprise": 1}),
        (ab.PromptSettings, {"seed": 10**30}),
        (ab.PromptSettings, {"seed": -1}),
        (ab.PromptSettings, {"harmful": []}),
        (ab.PromptSettings, {"harmful": {"a": 1}}),
        (ab.PromptSettings, {"harmful": "\udcff"}),
        (ab.EditSettings, {"strength": float("nan")}),
        (ab.EditSettings, {"strength": None}),
        (ab.EditSettings, {"layers": object()}),
        (ab.OutputSettings, {"out": 5}),
        (ab.RunSettings, {"model": None}),
        (ab.RunSettings, {"model": "m", "editing": 5}),
    ],
)
def test_settings_name_the_field_that_is_wrong(kind: type, given: dict[str, Any]) -> None:
    *_, field = given
    with pytest.raises(UsageError, match=r"^[A-Za-z]+Settings[.a-z_]*: ") as caught:
        kind(**given)
    assert field in str(caught.value) or field == "editing"  # settings within settings name themselves


#: Values that fit no parameter.
STRANGE = (object(), 5, b"x", {1, 2}, SimpleNamespace())
FUNCTIONS = sorted(name for name in ab.__all__ if isfunction(getattr(ab, name)))


def _begun(function: Callable[..., Any], arguments: list[Any]) -> None:
    """Called; a context is entered."""
    result = function(*arguments)
    if hasattr(result, "__enter__"):
        result.__enter__()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_names_what_it_cannot_take(name: str) -> None:
    """Each parameter that has a type of its own is given something else, the others what only stands for it."""
    function = getattr(ab, name)
    first = next(iter(signature(function).parameters))
    for value in STRANGE:
        arguments = [value] * sum(
            parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            for parameter in signature(function).parameters.values()
        )
        with pytest.raises(ab.AbliterateError) as caught:
            _begun(function, arguments or [value])
        assert str(caught.value).startswith(f"{name}: ") or first in ("model",), caught.value


def test_paths_may_be_texts(tmp_path: Path) -> None:
    (tmp_path / "abliteration.json").write_text(full_record().model_dump_json())
    assert ab.read_record(str(tmp_path)) == ab.read_record(tmp_path)  # type: ignore[arg-type]
    for call in (
        lambda: ab.undo(str(tmp_path / "none")),
        lambda: ab.verify_files(str(tmp_path / "none")),
        lambda: ab.load_direction(str(tmp_path / "none")),  # type: ignore[arg-type]
        lambda: ab.apply(tmp_path / "m", str(tmp_path / "d"), {"out": str(tmp_path / "o")}),  # type: ignore[arg-type]
        lambda: ab.open_session(tmp_path / "none"),  # type: ignore[arg-type]
        lambda: ab.run({"model": str(tmp_path / "none"), "output": {"out": tmp_path / "o"}}),  # type: ignore[arg-type]
    ):
        with pytest.raises(ab.AbliterateError, match=r"none|found no"):
            call()


def test_plans_are_made_of_lists_and_whole_numbers() -> None:
    vector = torch.nn.functional.normalize(torch.ones(D), dim=0)
    for direction in (vector, vector.tolist(), vector.numpy(), vector[None]):
        plan = ab.make_plan(anatomy(), direction, strength=1)  # type: ignore[arg-type]
        assert torch.allclose(plan.edits[0].basis, vector[None])
        assert ab.plan_for(anatomy(), direction).edits[0].strength == 1  # type: ignore[arg-type]
    for strength in ("1", None, [1.0], float("nan"), 10**6):
        with pytest.raises(UsageError, match="strength"):
            ab.make_plan(anatomy(), vector[None], strength=strength)  # type: ignore[arg-type]


def test_functions_that_fit_are_called_as_they_are() -> None:
    """The control: nothing of an ordinary call is changed, and what a function raises itself comes through."""

    def twice(path: Path, times: int = 2, *, site: ab.Site | None = None) -> tuple[Any, ...]:
        """Documented."""
        return path, times, site

    called = natural(twice)
    assert called.__doc__ == "Documented."
    assert called(Path("a")) == (Path("a"), 2, None)
    assert called("a", np.int64(3), site=(1, -1)) == (Path("a"), 3, ab.Site(1, -1))
    for wrong in ((5,), ("a", "2"), ("a", 1.5), ("a", True)):
        with pytest.raises(UsageError, match=r"^twice: (path|times): expected"):
            called(*wrong)
    with pytest.raises(TypeError):
        called()
    assert all(isclass(getattr(ab, name)) or name in FUNCTIONS for name in ab.__all__)
