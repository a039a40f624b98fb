"""The algebra of an edit: what is removed is gone, nothing else is, and weights and activations say the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.algebra import before_norm, orthonormal, project_out, remove_from_outputs, remove_from_weight
from abliterate.errors import NumericalError

algebra = settings(deadline=None, max_examples=40, derandomize=True)

strengths = st.floats(-2, 2, width=32).map(lambda s: round(s, 3))

#: A weight [d, n] and an orthonormal basis [k, d].
Problem = tuple[Tensor, Tensor]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """k < d."""
    d = draw(st.integers(2, 24))
    n = draw(st.integers(1, 40))
    k = draw(st.integers(1, min(4, d - 1)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = 10.0 ** draw(st.integers(-3, 3))
    weight = scale * torch.randn(d, n, generator=generator)
    return weight, orthonormal(torch.randn(k, d, generator=generator))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oblique(basis: Tensor, seed: int) -> Tensor:
    """A reader R with R Lᵀ = 1, as LEACE has: what is read is what is taken out, but not at right angles."""
    across = drawn(*basis.shape, seed=seed)
    reader: Tensor = basis + across - (across @ basis.T) @ basis
    return reader


def near(found: Tensor, expected: Tensor, size: float | Tensor | None = None) -> bool:
    """Equal to float32's exactness, relative to `size` (by default that of `expected`)."""
    scale = float(expected.norm() if size is None else size)
    return float((found - expected).norm()) <= 1e-5 * max(scale, 1e-30)


# --- removal


@algebra
@given(problems())
def test_full_removal_leaves_nothing_and_does_nothing_twice(problem: Problem) -> None:
    weight, basis = problem
    once = remove_from_weight(weight, basis, 1.0, 0)
    assert (basis @ once).norm() <= 1e-5 * weight.norm()
    assert near(remove_from_weight(once, basis, 1.0, 0), once, weight.norm())
    x = weight.T
    outputs = remove_from_outputs(x, basis[None], 1.0)
    assert (outputs @ basis.T).norm() <= 1e-5 * x.norm()
    assert near(remove_from_outputs(outputs, basis[None], 1.0), outputs, x.norm())


@algebra
@given(problems())
def test_what_is_at_right_angles_stays(problem: Problem) -> None:
    weight, basis = problem
    rest = weight - basis.T @ (basis @ weight)
    assert near(remove_from_weight(rest, basis, 1.0, 0), rest, weight.norm())
    assert near(remove_from_outputs(rest.T, basis[None], 1.0), rest.T, weight.norm())


@algebra
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_strength_zero_is_the_identity_bit_for_bit(problem: Problem, dtype: torch.dtype) -> None:
    weight, basis = problem[0].to(dtype), problem[1]
    stack = torch.stack([weight, -weight])
    for found, expected in (
        (remove_from_weight(weight, basis, 0.0, 0), weight),
        (remove_from_weight(weight.T, basis, 0.0, 1), weight.T),
        (remove_from_weight(stack, basis, 0.0, 1), stack),
        (remove_from_outputs(weight.T, basis[None], 0.0), weight.T),
    ):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


@algebra
@given(problems(), strengths, st.integers(0, 100))
def test_only_the_span_of_the_basis_counts(problem: Problem, strength: float, seed: int) -> None:
    weight, basis = problem
    expected = remove_from_weight(weight, basis, strength, 0)
    k = len(basis)
    signs = torch.randint(0, 2, (k, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    rotation = orthonormal(drawn(k, k, seed=seed))
    for other in (basis * signs, rotation @ basis):
        assert near(remove_from_weight(weight, other, strength, 0), expected, weight.norm())


@algebra
@given(problems())
def test_rank_falls_by_the_dimension_of_the_subspace(problem: Problem) -> None:
    weight, basis = problem
    d, k = weight.shape[0], len(basis)
    square = torch.eye(d) + 0.1 * torch.tanh(weight @ weight.T)  # full rank whatever was drawn
    singular = torch.linalg.svdvals(remove_from_weight(square, basis, 1.0, 0))
    if float(torch.linalg.svdvals(square)[-1]) > 0.01:
        assert int((singular > 1e-4).sum()) == d - k


@algebra
@given(problems(), st.floats(-1, 0.75))
def test_partial_removal_can_be_undone(problem: Problem, strength: float) -> None:
    weight, basis = problem
    edited = remove_from_weight(weight, basis, strength, 0)
    assert near(remove_from_weight(edited, basis, -strength / (1 - strength), 0), weight)


# --- axes


@algebra
@given(problems(), strengths)
def test_axis_one_is_axis_zero_transposed(problem: Problem, strength: float) -> None:
    weight, basis = problem
    along = remove_from_weight(weight, basis, strength, 0)
    across = remove_from_weight(weight.T.contiguous(), basis, strength, 1)
    assert near(across.T, along, weight.norm())


@algebra
@given(problems(), strengths, st.integers(1, 4), st.booleans())
def test_every_expert_of_a_stack_is_edited_like_one_alone(
    problem: Problem, strength: float, experts: int, is_oblique: bool
) -> None:
    weight, basis = problem
    reader = oblique(basis, 3) if is_oblique else None
    stack = torch.stack([weight * (i + 1) + i for i in range(experts)])
    along = remove_from_weight(stack, basis, strength, 1, reader)
    across = remove_from_weight(stack.mT.contiguous(), basis, strength, 2, reader)
    assert along.shape == stack.shape
    assert across.shape == stack.mT.shape
    for i, expert in enumerate(stack):
        expected = remove_from_weight(expert, basis, strength, 0, reader)
        size = expert.norm() * (1 if reader is None else 1 + reader.norm())
        assert near(along[i], expected, size)
        assert near(across[i].T, expected, size)


def test_stack_with_all_axes_alike_is_edited_along_the_one_named() -> None:
    d = 6
    stack, basis = drawn(d, d, d, seed=0), orthonormal(drawn(1, d, seed=1))
    for axis in range(3):
        edited = remove_from_weight(stack, basis, 1.0, axis)
        left = [float((edited.movedim(other, -1) @ basis[0]).norm()) for other in range(3)]
        assert left[axis] < 1e-5
        assert min(left[:axis] + left[axis + 1 :]) > 1  # control: the wrong sides still hold it


@algebra
@given(problems(), strengths)
def test_bias_is_a_weight_with_one_axis(problem: Problem, strength: float) -> None:
    weight, basis = problem
    bias = weight[:, 0]
    found = remove_from_weight(bias, basis, strength, -1)
    assert near(found, remove_from_weight(weight[:, :1], basis, strength, 0)[:, 0], bias.norm())


# --- weights and activations


@algebra
@given(problems(), strengths, st.booleans())
def test_outputs_of_an_edited_map_are_edited_outputs(problem: Problem, strength: float, is_oblique: bool) -> None:
    weight, basis = problem
    reader = oblique(basis, 5) if is_oblique else None
    x = drawn(5, weight.shape[1], seed=1)
    outputs = x @ weight.T
    found = x @ remove_from_weight(weight, basis, strength, 0, reader).T
    expected = remove_from_outputs(outputs, basis[None], strength, None if reader is None else reader[None])
    size = 1 if reader is None else 1 + reader.norm()
    assert (found - expected).norm() <= size * (1e-4 * outputs.norm() + 1e-5 * weight.norm() * x.norm())


@algebra
@given(problems(), strengths, st.integers(1, 4))
def test_parts_of_a_batch_have_their_own_basis_and_reader(problem: Problem, strength: float, parts: int) -> None:
    weight, basis = problem
    bases = torch.stack([basis, *(orthonormal(drawn(*basis.shape, seed=10 + i)) for i in range(parts - 1))])
    readers = torch.stack([oblique(own, 20 + i) for i, own in enumerate(bases)])
    x = drawn(2 * parts, 3, weight.shape[0], seed=2)
    for reader in (None, readers):
        found = remove_from_outputs(x, bases, strength, reader)
        assert found.shape == x.shape
        for i, (part, rows) in enumerate(zip(found.chunk(parts), x.chunk(parts), strict=True)):
            own = None if reader is None else reader[i : i + 1]
            alone = remove_from_outputs(rows, bases[i : i + 1], strength, own)
            assert near(part, alone, x.norm() * (1 if reader is None else readers.norm()))


# --- oblique


@algebra
@given(problems(), strengths)
def test_reader_equal_to_the_basis_changes_nothing(problem: Problem, strength: float) -> None:
    weight, basis = problem
    expected = remove_from_weight(weight, basis, strength, 0)
    assert torch.equal(remove_from_weight(weight, basis, strength, 0, basis), expected)
    outputs = remove_from_outputs(weight.T, basis[None], strength)
    assert torch.equal(remove_from_outputs(weight.T, basis[None], strength, basis[None]), outputs)


@algebra
@given(problems(), st.integers(0, 100))
def test_oblique_removal_is_a_projection_whose_reader_reads_nothing_after(problem: Problem, seed: int) -> None:
    weight, basis = problem
    reader = oblique(basis, seed)
    once = remove_from_weight(weight, basis, 1.0, 0, reader)
    size = weight.norm() * (1 + reader.norm()) ** 2
    assert (reader @ once).norm() <= 1e-5 * size
    assert near(remove_from_weight(once, basis, 1.0, 0, reader), once, size)
    moved = weight - once
    assert near(basis.T @ (basis @ moved), moved, size)  # only along L was anything changed


def test_oblique_removal_is_another_one() -> None:
    weight, basis = drawn(12, 9, seed=0), orthonormal(drawn(2, 12, seed=1))
    found = remove_from_weight(weight, basis, 1.0, 0, oblique(basis, 2))
    straight = remove_from_weight(weight, basis, 1.0, 0)
    assert (found - straight).norm() > 0.1 * weight.norm()
    assert (basis @ found).norm() > 0.1  # R is what it no longer answers to, not L


# --- norms behind a writer


@pytest.mark.parametrize("centred", [False, True], ids=["rms norm", "layer norm"])
def test_direction_is_absent_behind_a_norm(centred: bool) -> None:
    d = 48
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, d, generator=generator) + 0.3
    gain = 1 + 0.5 * torch.randn(d, generator=generator)
    basis = orthonormal(drawn(2, d, seed=1000))

    def norm(x: Tensor) -> Tensor:
        if centred:
            return torch.nn.functional.layer_norm(x, (d,), gain)
        return torch.nn.functional.rms_norm(x, (d,), gain)

    def share(y: Tensor) -> float:
        """Largest |V y| / |y| over tokens."""
        return float(((y @ basis.T).norm(dim=-1) / y.norm(dim=-1)).max())

    edited = remove_from_outputs(x, before_norm(basis, gain, centred=centred)[None], 1.0)
    assert share(norm(edited)) < 1e-5
    naive = remove_from_outputs(x, basis[None], 1.0)
    assert share(norm(naive)) > 0.05  # control: before the norm it is another direction


def test_gain_without_size_does_not_matter() -> None:
    basis, gain = orthonormal(drawn(2, 16, seed=0)), 1 + 0.5 * drawn(16, seed=1)
    found = before_norm(basis, gain, centred=True)
    assert near(before_norm(basis, 7.5 * gain, centred=True), found)


# --- bases


@algebra
@given(st.integers(1, 12), st.integers(0, 1000), st.integers(-6, 6))
def test_orthonormal_rows_span_the_same_and_the_first_keeps_its_sign(d: int, seed: int, power: int) -> None:
    k = 1 + seed % d
    rows = drawn(k, d, seed=seed).double() * 10.0 ** (power / 3)
    basis = orthonormal(rows)
    torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close((rows @ basis.T) @ basis, rows, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(basis[0], rows[0] / rows[0].norm(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(1, 4),
        torch.tensor([[1.0, torch.nan, 0.0, 0.0]]),
        torch.tensor([[torch.inf, 0.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]]),
        torch.eye(4)[[0, 1, 2, 3, 0]],
    ],
    ids=["zero", "nan", "infinity", "dependent", "more than the width"],
)
def test_rows_that_are_no_basis_are_refused(rows: Tensor) -> None:
    with pytest.raises(NumericalError, match="direction: expected"):
        orthonormal(rows)


def test_mean_is_projected_out_also_of_a_nearly_parallel_direction() -> None:
    mean = drawn(3, 64, seed=0)
    r = 1e4 * mean + drawn(3, 64, seed=1)
    left = project_out(r, mean)
    assert float(((left * mean).sum(-1) / left.norm(dim=-1) / mean.norm(dim=-1)).abs().max()) < 1e-6
    torch.testing.assert_close(project_out(left, mean), left, rtol=1e-5, atol=1e-5)
    zero = torch.zeros_like(mean)
    assert torch.equal(project_out(r, zero), r)
