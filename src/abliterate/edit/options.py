"""From a direction file and settings to a plan: which writers, how strong, and which variant of the edit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import INDEPENDENT, check_finite, project_out
from abliterate.config import EditSettings, as_natural
from abliterate.edit.direction import Direction, PerWriter, Recipe
from abliterate.edit.plan import Plan, Profile, Variant, make_plan
from abliterate.errors import NumericalError, UsageError
from abliterate.model.anatomy import Anatomy, Kind, Writer

_Test = Callable[[Writer], bool]


def plan_for(
    anatomy: Anatomy, direction: Direction, editing: EditSettings = EditSettings(), *, strength: float | None = None
) -> Plan:
    """The plan that `editing` makes of a direction, by its recipe where it has one.

    Raises `UsageError` for a specification that cannot be read or chooses nothing, and for a variant that needs
    means the direction file does not hold.
    """
    strength = editing.strength if strength is None else strength
    recipe = direction.recipe
    biprojected = editing.biprojected or (recipe is not None and recipe.biprojected)
    if editing.affine and biprojected:
        raise UsageError("--affine --biprojected: expected one of them, found both")
    own = {} if direction.per_writer is None else _per_writer(direction.per_writer, anatomy)
    if own and (editing.affine or biprojected):
        option = "--affine" if editing.affine else "--biprojected"
        raise UsageError(f"{option}: expected one direction for all writers, found own edits of {len(own)} of them")
    variant = Variant(
        profile=profile(editing, strength, anatomy, recipe),
        per_site=_biprojected(direction, anatomy) if biprojected else _own(direction, anatomy),
        per_writer=own,
        reader=direction.reader,
        mean=_mean(direction) if editing.affine else None,
        norm_preserving=editing.norm_preserving or (recipe is not None and recipe.norm_preserving),
        untie=editing.untie or (recipe is not None and recipe.untie),
    )
    plan = make_plan(anatomy, direction.basis, strength=strength, variant=variant)
    if not plan.edits:
        raise UsageError("plan: expected at least one writer to edit, found none; see --layers, --components, --untie")
    return plan


def by_recipe(anatomy: Anatomy, direction: Direction, editing: EditSettings) -> Direction:
    """The direction with a recipe of what `editing` would do with it; it needs no settings then."""
    plan = plan_for(anatomy, direction, editing)
    strengths = {edit.writer.name: edit.strength for edit in plan.edits}
    return replace(direction, recipe=Recipe(strengths, editing.norm_preserving, editing.biprojected, plan.untie))


def caveat(plan: Plan, editing: EditSettings) -> str | None:
    """Why an affine edit does not leave the stream with just the mean along the direction, where it does not."""
    if not editing.affine:
        return None
    strengths = {edit.strength for edit in plan.edits}
    alone = [name for name, _ in plan.left_alone]
    if not alone and strengths == {plan.strength}:
        return None
    what = f"{alone[0]} is left alone" if alone else "strengths differ"
    return f"--affine: {what}, so what is put back comes on top of what is left of the direction"


def _own(direction: Direction, anatomy: Anatomy) -> Float[Tensor, "sites k d"] | None:
    """Other directions for what is written at each site, where the direction has them."""
    found = direction.per_site
    if found is not None and len(found) != anatomy.layers + 1:
        raise UsageError(
            f"direction: expected one for each of the model's {anatomy.layers + 1} sites, found {len(found)}"
        )
    return found


def _per_writer(own: PerWriter, anatomy: Anatomy) -> dict[str, tuple[Float[Tensor, "k d"], Float[Tensor, "k d"]]]:
    """What is taken out of single writers, by name. Raises `UsageError` for another model's."""
    if foreign := set(own.names) - {writer.name for writer in anatomy.writers}:
        raise UsageError(f"direction: it has an edit of '{min(foreign)}', expected a writer of this model")
    return own.by_name()


def _biprojected(direction: Direction, anatomy: Anatomy) -> Float[Tensor, "sites 1 d"]:
    """The direction with its component along the harmless mean of each target layer taken out."""
    candidates, (_, position) = _measured(direction, "--biprojected")
    if len(direction.basis) != 1:
        raise UsageError(f"--biprojected: expected one direction, found {len(direction.basis)}")
    if direction.reader is not None:
        raise UsageError("--biprojected: expected a direction that is removed as it is read, found one of LEACE")
    means = candidates.harmless_mean[-1 - position]
    if len(means) != anatomy.layers + 1:
        raise UsageError(
            f"--biprojected: expected means at the model's {anatomy.layers + 1} sites, found {len(means)} in the file"
        )
    return biprojected(direction.basis[0], means)[:, None]


def _mean(direction: Direction) -> Float[Tensor, " d"]:
    """The harmless mean of the site that the direction comes from."""
    if direction.mean is not None:
        return direction.mean
    candidates, (layer, position) = _measured(direction, "--affine")
    mean: Tensor = candidates.harmless_mean[-1 - position, layer]
    return mean


def _measured(direction: Direction, option: str):  # type: ignore[no-untyped-def]
    site = direction.site
    if direction.candidates is None or site is None:
        raise UsageError(f"{option}: expected a direction file with 'harmless_mean' and a chosen site; see `find`")
    return direction.candidates, site


def profile(editing: EditSettings, strength: float, anatomy: Anatomy, recipe: Recipe | None = None) -> Profile:
    """The strength of every writer: `layers` and `components` choose, `strengths` sets single ones.

    A `recipe` has its own strength for each, of which `strength` is then the multiple.

    Raises `UsageError` for a specification that cannot be read, or a strength for writers that there are not.
    """
    layers = anatomy.layers
    if recipe is not None and (foreign := set(recipe.strengths) - {writer.name for writer in anatomy.writers}):
        raise UsageError(f"direction: its recipe names '{min(foreign)}', expected a writer of this model")
    tests = [] if editing.components is None else [_of_kinds(editing.components)]
    if editing.layers is not None:
        within = _in_layers(editing.layers, "--layers", layers)
        in_front = Kind.EMBEDDING.value in (editing.components or "")  # belongs to no block: only if asked for
        tests.append(lambda writer: within(writer) or (in_front and writer.block is None))
    rules = [_rule(text, anatomy) for text in (editing.strengths or "").split(",") if text.strip()]

    def strength_of(writer: Writer) -> float | None:
        for test, value in reversed(rules):  # the last one that fits
            if test(writer):
                return value
        if not all(test(writer) for test in tests):
            return None
        if recipe is None:
            return strength
        own = recipe.strengths.get(writer.name)
        return None if own is None else strength * own

    return strength_of


def _of_kinds(text: str) -> _Test:
    names = {name.strip() for name in text.split(",")}
    kinds = {kind.value for kind in Kind}
    if unknown := sorted(names - kinds):
        raise UsageError(f"--components {unknown[0]}: expected one of {', '.join(sorted(kinds))}")
    return lambda writer: writer.kind.value in names


def _in_layers(text: str, option: str, layers: int) -> _Test:
    wanted = layer_numbers(text, option, layers, "blocks")
    return lambda writer: writer.block in wanted


def layer_numbers(text: str, option: str, count: int, noun: str) -> set[int]:
    """Numbers below `count` of blocks or layers (`noun`), as in `8-20,22,30-`.

    Raises `UsageError`, naming the option, for anything else.
    """
    wanted: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        start, end = as_natural(first or "0"), as_natural((last or str(count - 1)) if dash else first)
        if start is None or end is None or not start <= end < count:
            raise UsageError(f"{option} {text}: expected {noun} 0 to {count - 1}, as in 2-5, found '{part}'")
        wanted |= set(range(start, end + 1))
    return wanted


def _rule(text: str, anatomy: Anatomy) -> tuple[_Test, float]:
    """`mlp@10-20+22=0.5`, `attention=0.8`, `@0-5=0`, `*.o_proj=1.2`: what, where and how strong."""
    selector, equals, value = text.strip().partition("=")
    name, at, where = selector.partition("@")
    try:
        strength = float(value)
    except ValueError:
        equals = ""
        strength = 0.0
    if not equals or not selector:
        raise UsageError(f"--strengths {text}: expected WHAT[@LAYERS]=STRENGTH, as in mlp@10-20=0.5")
    within = _in_layers(where.replace("+", ","), "--strengths", anatomy.layers) if at else None
    kinds = {kind.value for kind in Kind}

    def test(writer: Writer) -> bool:
        named = not name or (writer.kind.value == name if name in kinds else fnmatchcase(writer.module, name))
        return named and (within is None or within(writer))

    if not any(test(writer) for writer in anatomy.writers):
        example = anatomy.writers[-1]
        raise UsageError(
            f"--strengths {text.strip()}: expected writers such as {example.kind} or {example.module}, found none"
        )
    return test, strength


def unit(row: Float[Tensor, " d"]) -> Float[Tensor, "1 d"]:
    """A vector as a basis of one row."""
    return torch.nn.functional.normalize(row, dim=0)[None]


def biprojected(r: Float[Tensor, " d"], harmless_mean: Float[Tensor, "sites d"]) -> Float[Tensor, "sites d"]:
    """One unit direction per layer that is edited: r without its component along that layer's harmless mean μ.

    r̂_l along r - (r·μ̂_l) μ̂_l, where r was measured at one layer and is removed at all (Lai 2025, "biprojected
    abliteration"). Where μ_l is zero r̂_l is r / ‖r‖.

    Raises `NumericalError` when a number is not finite or nothing remains of r, naming the layer.
    """
    check_finite("biprojected direction", r, harmless_mean)
    rest = project_out(r.double().expand_as(harmless_mean), harmless_mean.double())
    norms = rest.norm(dim=-1, keepdim=True)
    gone = (norms[:, 0] <= INDEPENDENT * r.double().norm()).nonzero().flatten().tolist()
    if gone:
        raise NumericalError(
            f"biprojected direction: expected more of r than its part along the harmless mean, found r parallel to it "
            f"(or zero) at layer {gone[0]}; leave that layer out or use the direction as it is"
        )
    directions: Tensor = (rest / norms).to(r.dtype)
    return directions
