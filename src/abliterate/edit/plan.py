"""The edit as data.

A plan says for every writer which subspace is taken out of what it writes, and by how much (see `algebra`). Hooks,
weights, a LoRA adapter and GGUF files are realisations of the same plan and must agree; one that cannot hold an edit
exactly refuses it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from abliterate.algebra import before_norm, orthonormal
from abliterate.config.natural import tensors
from abliterate.errors import NumericalError, UsageError
from abliterate.model.anatomy import Anatomy, Kind, Writer

#: Strength of the edit of each writer; None leaves it alone.
Profile = Callable[[Writer], float | None]


@dataclass(frozen=True, slots=True)
class Edit:
    """What is done to one writer, before its post-norm: y becomes y − s (y Rᵀ) L + offset.

    `basis` is L [k, d]. `reader` is R [k, d], None for R = L with orthonormal rows. `norm_preserving` gives every
    vector that an input feature writes (a column of a Linear, a row of an embedding) its old length back. `offset` [d]
    is added to what is written.
    """

    writer: Writer
    basis: Float[Tensor, "k d"]
    strength: float
    reader: Float[Tensor, "k d"] | None = None
    norm_preserving: bool = False
    offset: Float[Tensor, " d"] | None = None

    def __post_init__(self) -> None:
        """Lists and arrays of numbers become tensors. Raises `UsageError`, naming the field, for anything else."""
        tensors(self, {"basis": 2, "reader": 2, "offset": 1})

    @property
    def reads(self) -> Float[Tensor, "k d"]:
        """R."""
        return self.basis if self.reader is None else self.reader

    @property
    def stored_offset(self) -> Float[Tensor, " d"] | None:
        """The offset as it is added to the numbers of a bias or an embedding, which its module may multiply."""
        return None if self.offset is None else self.offset / self.writer.inner

    @property
    def changes(self) -> bool:
        """Whether the edit does anything."""
        return self.strength != 0 or self.offset is not None


@dataclass(frozen=True, slots=True)
class Plan:
    """All edits, the direction they realise, and the writers left alone with the reason why.

    `untie` gives the head its own copy of a tied embedding, so that the embedding can be edited.
    """

    edits: tuple[Edit, ...]
    direction: Float[Tensor, "k d"]
    strength: float
    left_alone: tuple[tuple[str, str], ...]
    untie: bool = False

    def __post_init__(self) -> None:
        """Lists become tuples or tensors. Raises `UsageError`, naming the field, for anything else."""
        tensors(self, {"direction": 2})
        if not isinstance(self.edits, list | tuple) or not all(isinstance(edit, Edit) for edit in self.edits):
            raise UsageError("Plan: edits: expected a list of Edit, found something else")
        object.__setattr__(self, "edits", tuple(self.edits))


@dataclass(frozen=True, slots=True)
class Variant:
    """How a direction becomes a plan.

    `profile` gives each writer its strength. `per_site` [L+1, k, d] replaces the direction for each target: a block
    l is edited with entry l + 1, the embedding with entry 0. `per_writer` gives L and R of single writers, by name and
    before their post-norms. `reader` [k, d] makes the edit oblique. `mean` [d] makes it affine: what is taken out is
    put back as in `mean`, x − s V Vᵀ (x − μ).
    """

    profile: Profile | None = None
    per_site: Float[Tensor, "sites k d"] | None = None
    per_writer: Mapping[str, tuple[Float[Tensor, "k d"], Float[Tensor, "k d"]]] = field(default_factory=dict)
    reader: Float[Tensor, "k d"] | None = None
    mean: Float[Tensor, " d"] | None = None
    norm_preserving: bool = False
    untie: bool = False


_TIED = "tied to the head: editing it would edit the head"
_BEHIND_TIED = "stands behind an embedding that is tied to the head and left alone"
_FIXED = "has no weights: it adds fixed vectors"
_NOT_CHOSEN = "not chosen"


def make_plan(
    anatomy: Anatomy, direction: Float[Tensor, "k d"], *, strength: float = 1.0, variant: Variant = Variant()
) -> Plan:
    """Take `direction` (orthonormal rows, unless the variant has a reader) out of every writer.

    Behind a post-norm the subspace is moved to the far side of the norm (see `algebra.before_norm`). An embedding
    tied to the head is left alone unless untied.

    Raises `UsageError` when the direction's width is not the model's, the strength not finite, or the variant does
    not fit the model.
    """
    for width in (direction.shape[1], *(left.shape[1] for left, _ in variant.per_writer.values())):
        if width != anatomy.d_model:
            raise UsageError(f"direction: expected vectors of the model's width {anatomy.d_model}, found {width}")
    _check_strength(strength)
    basis = orthonormal(direction.float()) if variant.reader is None else direction.float()
    edits: list[Edit] = []
    left_alone: list[tuple[str, str]] = []
    for writer in anatomy.writers:
        own = strength if variant.profile is None else variant.profile(writer)
        if (reason := _reason(writer, own, variant)) is not None:
            left_alone.append((writer.module, reason))
        elif own is not None:
            _check_strength(own)
            edits.append(_edit(writer, basis, own, variant))
    if variant.mean is not None and strength != 0:
        edits = _with_offset(edits, _towards(basis, variant) * strength)
    return Plan(tuple(edits), basis, strength, tuple(left_alone), variant.untie)


def compose(*plans: Plan) -> Plan:
    """One plan that does what plans do one after the other, each to what the one before it left.

    Where two edit a writer, (I − M₂)(I − M₁) = I − (M₁ + M₂ − M₂ M₁) with Mᵢ = sᵢ Lᵢᵀ Rᵢ is one oblique edit of
    strength 1: R is R₁ above R₂, and L is s₁ L₁ − s₁ s₂ (L₁ R₂ᵀ) L₂ above s₂ L₂. Orthogonal directions leave each other
    alone.

    Raises `UsageError` for no plans, and for edits that are no removal alone: norm-preserving or affine ones.
    """
    if not plans:
        raise UsageError("compose: expected plans, found none")
    edits: dict[str, Edit] = {}
    for plan in plans:
        for edit in plan.edits:
            if edit.norm_preserving or edit.offset is not None:
                raise UsageError(
                    f"compose: writer '{edit.writer.module}': expected edits that take something out and do no more, "
                    "found a norm-preserving or an affine one"
                )
            known = edits.get(edit.writer.name)
            edits[edit.writer.name] = edit if known is None else _after(known, edit)
    modules = {edit.writer.module for edit in edits.values()}
    alone = dict(pair for plan in plans for pair in plan.left_alone if pair[0] not in modules)
    strengths = {plan.strength for plan in plans}
    strength = strengths.pop() if len(strengths) == 1 else 1.0
    direction = torch.cat([plan.direction for plan in plans])
    return Plan(tuple(edits.values()), direction, strength, tuple(alone.items()), any(plan.untie for plan in plans))


def _after(first: Edit, second: Edit) -> Edit:
    left = first.strength * first.basis
    rest = left - second.strength * (left @ second.reads.T) @ second.basis
    basis = torch.cat([rest, second.strength * second.basis])
    return Edit(first.writer, basis, 1.0, torch.cat([first.reads, second.reads]))


def _check_strength(strength: float) -> None:
    try:
        fits = bool(-1e3 < strength < 1e3)
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise UsageError(f"strength: expected a finite number around 1, found {strength}")


def _reason(writer: Writer, strength: float | None, variant: Variant) -> str | None:
    if not writer.parameters:
        return _FIXED
    if writer.tied and not variant.untie:
        return _TIED if writer.weight is not None else _BEHIND_TIED
    return _NOT_CHOSEN if strength is None else None


def _edit(writer: Writer, basis: Float[Tensor, "k d"], strength: float, variant: Variant) -> Edit:
    keep = variant.norm_preserving and writer.weight is not None
    if (own := variant.per_writer.get(writer.name)) is not None:
        return Edit(writer, own[0], strength, own[1], keep)
    if variant.per_site is not None:
        site = 0 if writer.block is None else writer.block + 1
        try:
            basis = orthonormal(variant.per_site[site].float())
        except NumericalError as error:
            raise UsageError(f"{error} (for writer '{writer.module}', site {site})") from error
    reader = None if variant.reader is None else variant.reader.float()
    if writer.gain is not None:
        if reader is not None:
            raise UsageError(f"writer '{writer.module}': an oblique edit (LEACE) cannot be moved before its post-norm")
        gain = writer.gain.to(basis.device).clone()  # it was learnt in inference mode, which gradients do not take
        basis = before_norm(basis, gain, centred=writer.centred)
    return Edit(writer, basis, strength, reader, keep)


def _towards(basis: Float[Tensor, "k d"], variant: Variant) -> Float[Tensor, " d"]:
    """(μ Rᵀ) L: the part of the mean that is put back (Marshall et al. 2024, affine concept editing)."""
    mean = torch.zeros(basis.shape[1]) if variant.mean is None else variant.mean.float()
    return (mean @ (basis if variant.reader is None else variant.reader.float()).T) @ basis


def _with_offset(edits: list[Edit], offset: Float[Tensor, " d"]) -> list[Edit]:
    """Let one writer that every token passes add the constant.

    An embedding, or the bias of the norm behind it; else one of the first block, best with a bias to hold it.
    """
    plain = [
        edit
        for edit in edits
        if not edit.writer.post_norms and edit.writer.kind is not Kind.EXPERTS and edit.writer.multiplier is not None
    ]
    front = [edit for edit in plain if edit.writer.kind is Kind.EMBEDDING and _holds_constant(edit.writer)]
    blocks = [edit for edit in plain if edit.writer.block == 0]
    carriers = front + [edit for edit in blocks if _holds_constant(edit.writer)] + blocks
    if not carriers:
        raise UsageError(
            "affine: expected a writer without a post-norm in front or in the first block, found none among what is "
            "edited; see --untie, --layers, --components"
        )
    carrier = carriers[0]
    changed = replace(carrier, offset=offset / (carrier.writer.multiplier or 1.0))
    return [changed if edit is carrier else edit for edit in edits]


def _holds_constant(writer: Writer) -> bool:
    """Whether weights can add a constant: in a bias, or in every row of an embedding."""
    return writer.bias is not None or (writer.kind is Kind.EMBEDDING and writer.axis == 1)
