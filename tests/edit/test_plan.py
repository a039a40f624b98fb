"""From settings and a direction to a plan: which writers, how strong, and who holds the constant of an affine edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abliterate.algebra import orthonormal
from abliterate.config import EditSettings
from abliterate.edit.direction import Candidates, Direction, PerWriter, Site
from abliterate.edit.options import plan_for
from abliterate.edit.plan import Edit, Plan, Variant, make_plan
from abliterate.errors import NumericalError, UsageError
from abliterate.model.anatomy import Anatomy, Kind, Writer

D, LAYERS = 12, 4
SITE = Site(layer=2, position=-1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EMBEDDING = Writer("wte", Kind.EMBEDDING, None, "wte.weight", 1, None)
POSITIONS = replace(EMBEDDING, module="wpe", weight="wpe.weight")
#: What another width is brought to the stream's by, and a norm behind all embeddings with its bias.
PROJECTION = replace(EMBEDDING, module="project_in", weight="project_in.weight", axis=0)
NORM_BIAS = Writer("norm", Kind.EMBEDDING, None, None, 0, "norm.bias")


def block(index: int, *, biased: bool = False) -> tuple[Writer, Writer]:
    attention, mlp = (f"h.{index}.{name}" for name in ("attn.o_proj", "mlp.down_proj"))
    return (
        Writer(attention, Kind.ATTENTION, index, f"{attention}.weight", 0, f"{attention}.bias" if biased else None),
        Writer(mlp, Kind.MLP, index, f"{mlp}.weight", 0, f"{mlp}.bias" if biased else None),
    )


def behind_norm(writer: Writer) -> Writer:
    return replace(writer, post_norms=(f"{writer.module}.norm",), gain=torch.linspace(0.5, 2, D))


def anatomy(*writers: Writer) -> Anatomy:
    return Anatomy(D, tuple(f"h.{i}" for i in range(LAYERS)), writers, ())


BLOCKS = tuple(writer for index in range(LAYERS) for writer in block(index))
LLAMA = anatomy(EMBEDDING, *BLOCKS)
TIED = anatomy(replace(EMBEDDING, tied=True), *BLOCKS)


def direction(k: int = 1, *, sites: int = LAYERS + 1) -> Direction:
    candidates = Candidates(random(2, sites, D, seed=1), random(2, sites, D, seed=2))
    return Direction(orthonormal(random(k, D)), candidates, site=SITE)


def strengths(plan: Plan) -> dict[str, float]:
    return {edit.writer.module: edit.strength for edit in plan.edits}


def refusal(found: Anatomy = LLAMA, made_of: Direction | None = None, **settings: object) -> str:
    with pytest.raises(UsageError) as caught:
        plan_for(found, made_of or direction(), EditSettings.model_validate(settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which writers, and how strong


def test_every_writer_is_edited_at_the_strength_asked_for() -> None:
    assert strengths(plan_for(LLAMA, direction())) == dict.fromkeys([w.module for w in LLAMA.writers], 1.0)
    assert set(strengths(plan_for(LLAMA, direction(), EditSettings(strength=-0.5))).values()) == {-0.5}
    assert set(strengths(plan_for(LLAMA, direction(), EditSettings(strength=-0.5), strength=0.3)).values()) == {0.3}


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("0", {0}),
        ("1-2", {1, 2}),
        ("-1", {0, 1}),
        ("2-", {2, 3}),
        ("-", {0, 1, 2, 3}),
        ("0, 2-3", {0, 2, 3}),
        ("3,3", {3}),
    ],
)
def test_layers(layers: str, blocks: set[int]) -> None:
    plan = plan_for(LLAMA, direction(), EditSettings(layers=layers))
    assert {edit.writer.block for edit in plan.edits} == blocks
    assert len(plan.edits) == 2 * len(blocks)
    assert dict(plan.left_alone)["wte"] == "not chosen"
    assert len(plan.edits) + len(plan.left_alone) == len(LLAMA.writers)


def test_layer_1_is_not_layer_11() -> None:
    deep = Anatomy(D, ("h",) * 12, tuple(writer for index in range(12) for writer in block(index)), ())
    for settings in (EditSettings(layers="1"), EditSettings(strength=0, strengths="*.1.*=1")):
        plan = plan_for(deep, direction(), settings)
        assert {edit.writer.block for edit in plan.edits if edit.changes} == {1}


@pytest.mark.parametrize(
    ("components", "layers", "expected"),
    [
        ("mlp", None, [f"h.{i}.mlp.down_proj" for i in range(LAYERS)]),
        ("mlp", "1", ["h.1.mlp.down_proj"]),
        ("embedding", None, ["wte"]),
        ("embedding, attention", "3", ["wte", "h.3.attn.o_proj"]),
        ("experts,mlp", "2", ["h.2.mlp.down_proj"]),
    ],
)
def test_components(components: str, layers: str | None, expected: list[str]) -> None:
    plan = plan_for(LLAMA, direction(), EditSettings(components=components, layers=layers))
    assert list(strengths(plan)) == expected


RULES: Mapping[str, dict[str, float]] = {
    "mlp=0.5": {f"h.{i}.mlp.down_proj": 0.5 for i in range(LAYERS)},
    "mlp@1-2=0.5": {"h.1.mlp.down_proj": 0.5, "h.2.mlp.down_proj": 0.5},
    "mlp@0+2-3=-0.5": {f"h.{i}.mlp.down_proj": -0.5 for i in (0, 2, 3)},
    "@1=0.25": {"h.1.attn.o_proj": 0.25, "h.1.mlp.down_proj": 0.25},
    "*.o_proj=0": {f"h.{i}.attn.o_proj": 0.0 for i in range(LAYERS)},
    "*.o_proj@3=2": {"h.3.attn.o_proj": 2.0},
    "h.2.*=0.1,": {"h.2.attn.o_proj": 0.1, "h.2.mlp.down_proj": 0.1},
    " wte = 0.1": {"wte": 0.1},
    # The last rule that fits decides, whichever is narrower.
    "@1=0.25, *.1.mlp*=0.75": {"h.1.attn.o_proj": 0.25, "h.1.mlp.down_proj": 0.75},
    "*.1.mlp*=0.75, @1=0.25": {"h.1.attn.o_proj": 0.25, "h.1.mlp.down_proj": 0.25},
    "attention=0.2,attention=0.3": {f"h.{i}.attn.o_proj": 0.3 for i in range(LAYERS)},
}


@pytest.mark.parametrize("rules", RULES)
def test_strengths_of_single_writers(rules: str) -> None:
    found = strengths(plan_for(LLAMA, direction(), EditSettings(strengths=rules.replace(" = ", "="))))
    assert found == {writer.module: 1.0 for writer in LLAMA.writers} | RULES[rules]


def test_strengths_add_to_what_layers_and_components_choose() -> None:
    settings = EditSettings(layers="1", components="mlp", strengths="*.3.attn*=0.5,@1=0.25")
    assert strengths(plan_for(LLAMA, direction(), settings)) == {
        "h.1.attn.o_proj": 0.25,
        "h.1.mlp.down_proj": 0.25,
        "h.3.attn.o_proj": 0.5,
    }


@pytest.mark.parametrize("layers", ["4", "1-4", "2-1", "a", "1-b", "1--2", "1,,2", "-1-2", "1.5", "²", "0x1"])
def test_layers_that_cannot_be_read_are_refused(layers: str) -> None:
    assert f"--layers {layers}: expected blocks 0 to 3" in refusal(layers=layers)
    assert "--strengths" in refusal(strengths=f"mlp@{layers.replace(',', '+')}=1")


@pytest.mark.parametrize(
    "rule",
    ["mlp", "=1", "mlp=", "mlp=strong", "mlp=1=2", "mlp@=1", "mlp@1", "lstm=1", "*.q_proj=1", "h.1=1", "MLP=1"],
)
def test_strengths_that_cannot_be_read_or_fit_nothing_are_refused(rule: str) -> None:
    assert "--strengths" in refusal(strengths=rule)
    assert "--strengths" in refusal(strengths=f"attention=0.5,{rule}")


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e9", "-1000"])
def test_strengths_that_are_not_around_one_are_refused(number: str) -> None:
    assert "expected a finite number around 1" in refusal(strengths=f"mlp={number}")
    assert "EditSettings.strength: input should be" in refusal(strength=float(number))


def test_components_that_there_are_not_are_refused() -> None:
    assert "--components lstm: expected one of attention, embedding" in refusal(components="mlp,lstm")
    assert "expected at least one writer" in refusal(components="experts")
    assert "see --layers, --components, --untie" in refusal(TIED, components="embedding")


def test_writers_left_alone_are_said_with_the_reason() -> None:
    fixed = Writer("sinusoids", Kind.EMBEDDING, None, None, 1, None)
    plan = plan_for(anatomy(*TIED.writers[:1], fixed, *BLOCKS), direction(), EditSettings(components="mlp,embedding"))
    reasons = dict(plan.left_alone)
    assert reasons["wte"] == "tied to the head: editing it would edit the head"
    assert reasons["sinusoids"] == "has no weights: it adds fixed vectors"
    assert reasons["h.0.attn.o_proj"] == "not chosen"
    assert [edit.writer.kind for edit in plan.edits] == [Kind.MLP] * LAYERS
    untied = plan_for(TIED, direction(), EditSettings(untie=True))
    assert untied.untie
    assert (untied.edits[0].writer.module, untied.left_alone) == ("wte", ())


@pytest.mark.parametrize("settings", [{}, {"norm_preserving": True}, {"affine": True}, {"biprojected": True}])
def test_strength_zero_does_nothing(settings: dict[str, bool]) -> None:
    plan = plan_for(LLAMA, direction(), EditSettings.model_validate({"strength": 0, **settings}))
    assert len(plan.edits) == len(LLAMA.writers)
    assert not any(edit.changes for edit in plan.edits)


def test_direction_of_another_width_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected vectors of the model's width 12, found 11"):
        make_plan(LLAMA, random(1, D - 1))


# --- bases


def test_bases_are_orthonormal_and_span_the_direction() -> None:
    rows = random(3, D, seed=4)
    plan = make_plan(LLAMA, rows)
    for edit in plan.edits:
        assert edit.reader is None
        assert torch.allclose(edit.basis @ edit.basis.T, torch.eye(3), atol=1e-6)
        assert torch.allclose(rows @ edit.basis.T @ edit.basis, rows, atol=1e-5)


def test_biprojected_bases_hold_nothing_of_the_harmless_mean_of_their_layer() -> None:
    made_of = direction()
    plan = plan_for(LLAMA, made_of, EditSettings(biprojected=True))
    assert made_of.candidates is not None
    means = made_of.candidates.harmless_mean[0]
    for edit in plan.edits:
        site = 0 if edit.writer.block is None else edit.writer.block + 1
        mean, r = means[site], made_of.basis[0]
        assert edit.basis.shape == (1, D)
        assert float(edit.basis.norm()) == pytest.approx(1, abs=1e-6)
        assert abs(float(edit.basis[0] @ mean)) < 1e-5 * float(mean.norm())
        rest = r - (r @ mean) / (mean @ mean) * mean
        assert torch.allclose(edit.basis[0], rest / rest.norm(), atol=1e-5)
    assert float((plan.direction @ means.T).abs().min()) > 1e-2, "the control: the direction itself holds some of each"


def test_biprojected_uses_the_means_of_the_position_that_was_chosen() -> None:
    made_of = direction()
    other = replace(made_of, site=Site(layer=2, position=-2))
    first, second = (plan_for(LLAMA, d, EditSettings(biprojected=True)) for d in (made_of, other))
    assert made_of.candidates is not None
    assert abs(float(second.edits[1].basis[0] @ made_of.candidates.harmless_mean[1, 1])) < 1e-5
    assert not torch.allclose(first.edits[1].basis, second.edits[1].basis, atol=1e-2)


def test_behind_a_norm_the_subspace_of_each_layer_is_moved() -> None:
    norms = anatomy(EMBEDDING, *map(behind_norm, BLOCKS))
    made_of = direction()
    plain, moved = (plan_for(found, made_of, EditSettings(biprojected=True)) for found in (LLAMA, norms))
    for before, behind in zip(plain.edits[1:], moved.edits[1:], strict=True):
        assert behind.writer.gain is not None
        expected = before.basis * behind.writer.gain
        assert torch.allclose(behind.basis, expected / expected.norm(), atol=1e-6)


@pytest.mark.parametrize(
    ("made_of", "said"),
    [
        (Direction(orthonormal(random(1, D))), "expected a direction file with 'harmless_mean' and a chosen site"),
        (replace(direction(), site=None), "expected a direction file with 'harmless_mean' and a chosen site"),
        (direction(k=2), "expected one direction, found 2"),
        (direction(sites=LAYERS), "expected means at the model's 5 sites, found 4"),
        (replace(direction(), reader=random(1, D)), "found one of LEACE"),
    ],
)
def test_what_cannot_be_biprojected_is_refused(made_of: Direction, said: str) -> None:
    assert said in refusal(made_of=made_of, biprojected=True)


def test_direction_along_the_mean_of_a_layer_is_refused() -> None:
    made_of = direction()
    assert made_of.candidates is not None
    along = replace(made_of, basis=orthonormal(made_of.candidates.harmless_mean[0, 3:4]))
    with pytest.raises(NumericalError, match="at layer 3"):
        plan_for(LLAMA, along, EditSettings(biprojected=True))


def test_norms_are_kept_of_maps_only() -> None:
    plan = plan_for(anatomy(EMBEDDING, NORM_BIAS, *BLOCKS), direction(), EditSettings(norm_preserving=True))
    assert {edit.writer.module for edit in plan.edits if not edit.norm_preserving} == {"norm"}


def test_oblique_edits_keep_their_rows_and_are_refused_before_a_norm() -> None:
    made_of = Direction(3 * random(1, D), reader=random(1, D, seed=8))
    for edit in plan_for(LLAMA, made_of).edits:
        assert torch.equal(edit.basis, made_of.basis)
        assert torch.equal(edit.reads, random(1, D, seed=8))
    norms = anatomy(EMBEDDING, *BLOCKS[:2], *map(behind_norm, BLOCKS[2:]))
    assert "writer 'h.1.attn.o_proj': an oblique edit (LEACE)" in refusal(norms, made_of)
    assert plan_for(norms, made_of, EditSettings(layers="0")).edits


def test_writers_own_edits_come_before_all_else_and_before_a_norm() -> None:
    norms = anatomy(EMBEDDING, *map(behind_norm, BLOCKS))
    name = norms.writers[2].name
    own = PerWriter((name,), random(1, 2, D, seed=3), random(1, 2, D, seed=4))
    edits = {edit.writer.name: edit for edit in plan_for(norms, replace(direction(), per_writer=own)).edits}
    assert torch.equal(edits[name].basis, own.basis[0])
    assert torch.equal(edits[name].reads, own.reader[0])
    others = {edit.writer.name: edit for edit in plan_for(norms, direction()).edits}
    assert all(torch.equal(edit.basis, others[other].basis) for other, edit in edits.items() if other != name)


@pytest.mark.parametrize(
    ("own", "settings", "said"),
    [
        (PerWriter(("h.9.x",), random(1, 1, D), random(1, 1, D)), {}, "'h.9.x', expected a writer of this model"),
        (PerWriter((LLAMA.writers[1].name,), random(1, 1, 8), random(1, 1, 8)), {}, "width 12, found 8"),
        (
            PerWriter((LLAMA.writers[1].name,), random(1, 1, D), random(1, 1, D)),
            {"biprojected": True},
            "own edits of 1",
        ),
        (PerWriter((LLAMA.writers[1].name,), random(1, 1, D), random(1, 1, D)), {"affine": True}, "own edits of 1"),
    ],
)
def test_writers_own_edits_that_do_not_fit_are_refused(own: PerWriter, settings: dict[str, bool], said: str) -> None:
    assert said in refusal(LLAMA, replace(direction(), per_writer=own), **settings)


# --- the constant of an affine edit


def carrier(plan: Plan) -> Edit:
    (found,) = [edit for edit in plan.edits if edit.offset is not None]
    return found


def affine(*writers: Writer, **settings: object) -> Edit:
    return carrier(plan_for(anatomy(*writers), direction(), EditSettings.model_validate({"affine": True, **settings})))


def test_the_mean_is_that_of_the_chosen_site_unless_the_file_says_another() -> None:
    made_of = direction(k=2)
    assert made_of.candidates is not None
    v, mean = made_of.basis, made_of.candidates.harmless_mean[0, 2]
    offset = carrier(plan_for(LLAMA, made_of, EditSettings(affine=True, strength=0.5))).offset
    assert offset is not None
    assert torch.allclose(offset, 0.5 * mean @ v.T @ v, atol=1e-6)
    other = replace(made_of, mean=random(D, seed=9))
    offset = carrier(plan_for(LLAMA, other, EditSettings(affine=True))).offset
    assert offset is not None
    assert torch.allclose(offset, random(D, seed=9) @ v.T @ v, atol=1e-6)
    assert "--affine: expected a direction file" in refusal(made_of=Direction(v), affine=True)


def test_of_an_oblique_edit_the_constant_is_read_by_the_reader() -> None:
    made_of = Direction(random(1, D), reader=random(1, D, seed=8), mean=random(D, seed=9))
    offset = carrier(plan_for(LLAMA, made_of, EditSettings(affine=True))).offset
    assert offset is not None
    assert made_of.mean is not None
    assert made_of.reader is not None
    assert torch.allclose(offset, (made_of.reader @ made_of.mean) * made_of.basis[0], atol=1e-6)


FIRST, SECOND = block(0), block(0, biased=True)
EXPERTS = Writer("h.0.experts", Kind.EXPERTS, 0, "h.0.experts.down_proj", 1, "h.0.experts.down_proj_bias")
TIED_EMBEDDING = replace(EMBEDDING, tied=True)


@pytest.mark.parametrize(
    ("writers", "expected"),
    [
        ((EMBEDDING, POSITIONS, *BLOCKS), "wte"),
        ((TIED_EMBEDDING, POSITIONS, *BLOCKS), "wpe"),
        ((behind_norm(EMBEDDING), NORM_BIAS, *SECOND), "norm"),
        ((behind_norm(EMBEDDING), *SECOND), "h.0.attn.o_proj"),
        ((PROJECTION, POSITIONS, *BLOCKS), "wpe"),
        ((PROJECTION, *SECOND), "h.0.attn.o_proj"),
        ((TIED_EMBEDDING, FIRST[0], SECOND[1], *BLOCKS[2:]), "h.0.mlp.down_proj"),
        ((TIED_EMBEDDING, *BLOCKS), "h.0.attn.o_proj"),
        ((TIED_EMBEDDING, EXPERTS, *FIRST[:1]), "h.0.attn.o_proj"),
        ((TIED_EMBEDDING, behind_norm(SECOND[0]), FIRST[1]), "h.0.mlp.down_proj"),
    ],
)
def test_who_holds_the_constant(writers: tuple[Writer, ...], expected: str) -> None:
    assert affine(*writers).writer.module == expected


def test_only_what_is_edited_holds_the_constant() -> None:
    assert affine(EMBEDDING, *BLOCKS, layers="0-1").writer.module == "h.0.attn.o_proj"
    assert affine(EMBEDDING, *BLOCKS, components="mlp").writer.module == "h.0.mlp.down_proj"
    assert affine(TIED_EMBEDDING, *BLOCKS, untie=True).writer.module == "wte"
    assert "affine: expected a writer without a post-norm" in refusal(affine=True, layers="1-2")
    assert "see --untie, --layers" in refusal(affine=True, layers="1-", components="mlp")
    norms = anatomy(TIED_EMBEDDING, *map(behind_norm, BLOCKS))
    assert "see --untie" in refusal(norms, affine=True)
    assert "affine" in refusal(anatomy(TIED_EMBEDDING, EXPERTS, *BLOCKS[2:]), affine=True)


def test_the_constant_is_what_reaches_the_stream() -> None:
    """Outside the module the embedding is multiplied by 6, inside by 4."""
    plain = affine(EMBEDDING, *BLOCKS)
    scaled = affine(replace(EMBEDDING, multiplier=6.0, inner=4.0), *BLOCKS)
    assert plain.offset is not None
    assert plain.stored_offset is not None
    assert scaled.offset is not None
    assert scaled.stored_offset is not None
    assert torch.equal(plain.stored_offset, plain.offset)
    assert torch.allclose(6 * scaled.offset, plain.offset)
    assert torch.allclose(4 * scaled.stored_offset, scaled.offset)


def test_variant_without_a_mean_adds_nothing() -> None:
    plan = make_plan(LLAMA, random(2, D), variant=Variant(norm_preserving=True))
    assert all(edit.offset is None and edit.norm_preserving for edit in plan.edits)
