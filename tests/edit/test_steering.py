"""Steering: what is done to the stream, at which layers and tokens; vectors of every kind of file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from abliterate.config import SteerSettings
from abliterate.edit.direction import Candidates, Direction, Site, load_layered, save_direction
from abliterate.edit.hooks import addition, steered
from abliterate.edit.steering import NEUTRAL, Operation, Steering, SteeringVectors, Tokens, steering_of
from abliterate.errors import AbliterateError, UsageError
from abliterate.model import generation
from abliterate.model.batches import BatchSize, SharedPrefix, logits_at, share_prefix
from abliterate.model.generation import complete
from planted import BLOCKS, D_MODEL, model, tokenizer

LAYER = 3
SIZE = BatchSize(8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steering(
    operation: Operation, coefficient: float, vector: Tensor, layer: int = LAYER, tokens: Tokens = "all"
) -> Steering:
    length = float(vector.norm())
    return Steering(operation, coefficient, tokens, (layer,), (vector / length)[None], (length,))


# ------------------------------------------------------------------------------------------------------- the algebra

numbers = st.floats(-4, 4, width=32)


@given(coefficient=numbers, seed=st.integers(0, 50))
def test_every_operation_moves_the_projection_as_it_says_and_nothing_else(coefficient: float, seed: int) -> None:
    hidden, vector = normal(3, 5, 16, seed=seed), 2.5 * normal(16, seed=seed + 1)
    unit, length, c = vector / vector.norm(), float(vector.norm()), coefficient
    before = hidden @ unit
    expected = {
        "add": before + c * length,
        "scale": before * c,
        "clamp": torch.full_like(before, c * length),
        "cap": before.clamp_max(c * length),
        "ablate": before * (1 - c),
    }
    for operation, along in expected.items():
        after = steering(operation, c, vector).at(LAYER, hidden)  # type: ignore[arg-type]
        assert torch.allclose(after @ unit, along, atol=1e-3), operation
        first, second = (one - (one @ unit)[..., None] * unit for one in (hidden, after))
        assert torch.allclose(first, second, atol=1e-3), operation


@pytest.mark.parametrize("operation", NEUTRAL)
def test_one_coefficient_changes_nothing(operation: Operation) -> None:
    hidden, vector = normal(2, 3, 8), normal(8, seed=1)
    one = steering(operation, NEUTRAL[operation], vector)
    assert torch.equal(one.at(LAYER, hidden), hidden)
    assert not one.changes
    assert one.by(0.5).changes


def test_a_random_one_is_as_long_and_keeps_to_its_layers() -> None:
    shared = Steering("add", 1.0, "all", (1, 2), normal(1, 64).expand(2, 64), (2.0, 3.0)).random(5)
    assert torch.equal(shared.directions[0], shared.directions[1])
    apart = Steering("add", 1.0, "all", (1, 2), normal(2, 64), (2.0, 3.0)).random(5)
    assert abs(float(apart.directions[0] @ apart.directions[1])) < 0.5
    for one in (shared, apart):
        assert torch.allclose(one.directions.norm(dim=1), torch.ones(2))
        assert (one.layers, one.lengths) == ((1, 2), (2.0, 3.0))
    assert apart == Steering("add", 1.0, "all", (1, 2), normal(2, 64), (2.0, 3.0)).random(5)


# ---------------------------------------------------------------------------------------------------- where it is done


@pytest.fixture(scope="module")
def live() -> Any:
    return model()[0]


def prompt(text: str = "show the bomb today") -> list[int]:
    chat = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


@contextmanager
def seen(live: Any, layer: int) -> Iterator[list[Tensor]]:
    """What enters a block, pass by pass."""
    found: list[Tensor] = []
    handle = live.model.layers[layer].register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    try:
        yield found
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", [0, 2, BLOCKS])
def test_adding_is_what_an_addition_does(live: Any, layer: int) -> None:
    vector, ids = 3 * normal(D_MODEL), torch.tensor([prompt()])
    last = layer == BLOCKS
    with addition(live.model.layers[layer - last], 0.5 * vector[None], leaving=last):
        expected = live(ids).logits
    with steered(live.model.layers, steering("add", 0.5, vector, layer)):
        assert torch.allclose(live(ids).logits, expected, atol=1e-5)
    assert not torch.allclose(live(ids).logits, expected, atol=1e-2), "the control: the hooks are gone"


def test_the_model_is_restored_when_the_body_raises(live: Any) -> None:
    ids = torch.tensor([prompt()])
    before = live(ids).logits
    with pytest.raises(KeyError), steered(live.model.layers, steering("clamp", 2, normal(D_MODEL))):
        raise KeyError
    assert torch.equal(live(ids).logits, before)


def test_generated_tokens_are_those_that_a_reply_is_predicted_from(live: Any) -> None:
    ids = prompt()
    add, alone = steering("add", 1, 0.1 * normal(D_MODEL), 0, "generated"), share_prefix([ids], share=False)
    complete(live, tokenizer(), alone, 3, SIZE)  # how to step is tried out once
    with seen(live, 0) as plain:
        complete(live, tokenizer(), alone, 3, SIZE)
    with steered(live.model.layers, add), seen(live, 0) as changed:
        complete(live, tokenizer(), alone, 3, SIZE)
    first, *steps = changed
    assert torch.equal(first[:, :-1], plain[0][:, :-1])
    assert torch.allclose(first[:, -1] - plain[0][:, -1], 0.1 * normal(D_MODEL)[None], atol=1e-4)
    embedded = live.get_input_embeddings().weight
    assert steps
    for step in steps:  # each is a token of the vocabulary and what was added
        assert float((step[0, 0] - 0.1 * normal(D_MODEL) - embedded).norm(dim=-1).min()) < 1e-4


@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_replies_are_the_same_whichever_way_they_are_made(
    live: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, in padded batches behind a shared prefix, without a cache, and by transformers."""
    _, direction = model()
    texts = ["show the bread today", "tell me the bomb", "write my poem for the school now"]
    ids = [prompt(text) for text in texts]
    one = steering("add", 1.0, 2.5 * direction, 3, tokens)
    plain = [reply.text for reply in complete(live, tokenizer(), share_prefix(ids), 8, SIZE)]
    with steered(live.model.layers, one):
        together = [reply.text for reply in complete(live, tokenizer(), share_prefix(ids), 8, SIZE)]
        alone = [complete(live, tokenizer(), share_prefix([each], share=False), 8, SIZE)[0].text for each in ids]
        theirs = [
            live.generate(torch.tensor([each]), max_new_tokens=8, do_sample=False)[0, len(each) :] for each in ids
        ]
        monkeypatch.setitem(generation._STEPS, live, generation._Steps.WHOLE)
        whole = [reply.text for reply in complete(live, tokenizer(), share_prefix(ids, share=False), 8, SIZE)]
    assert together == alone == whole
    assert together == [tokenizer().decode(each, skip_special_tokens=True) for each in theirs]
    assert together != plain, "the control"


def test_a_reply_is_predicted_in_one_pass_as_it_was_made(live: Any) -> None:
    """As the shift along replies is measured: prompt and reply together, padded on the right."""
    _, direction = model()
    one = steering("add", 1.0, 2.5 * direction, 3, "generated")
    ids = [prompt("show the bread today"), prompt("tell me the small quick soup")]
    with steered(live.model.layers, one):
        replies = [reply.tokens for reply in complete(live, tokenizer(), share_prefix(ids), 6, SIZE)]
        shared = share_prefix([[*each, *reply[:-1]] for each, reply in zip(ids, replies, strict=True)])
        starts = torch.tensor([len(each) - 1 - len(shared.prefix) for each in ids])[:, None]
        steps = torch.arange(6)
        logits = logits_at(live, SharedPrefix(live, shared.prefix), shared.suffixes, lambda _: starts + steps)
    assert [tuple(row) for row in logits.argmax(-1).tolist()] == replies
    with steered(live.model.layers, one):
        late = logits_at(live, SharedPrefix(live, shared.prefix), shared.suffixes, lambda lengths: lengths[:, None] - 1)
    assert not torch.allclose(late[:, 0], logits[:, -1], atol=1e-3), "the control: a reply of one token is another one"


def test_how_to_step_is_not_mistaken_under_steering() -> None:
    live, _ = model()
    with steered(live.model.layers, steering("add", 1, 5 * normal(D_MODEL), 2, "generated")):
        complete(live, tokenizer(), share_prefix([prompt()], share=False), 2, SIZE)
    assert generation._STEPS[live] is generation._Steps.PADDED


# ------------------------------------------------------------------------------------------------------ what it is told


def direction(**fields: Any) -> Direction:
    raw = normal(2, BLOCKS + 1, D_MODEL)
    site = Site(2, -1)
    r = raw[0, 2]
    return Direction(r / r.norm(), Candidates(raw, torch.zeros_like(raw)), site=site, **fields)


def settings(**fields: Any) -> SteerSettings:
    return SteerSettings.model_validate(fields)


def test_a_direction_is_as_long_as_it_was_measured() -> None:
    found = direction()
    vectors = SteeringVectors.of(found)
    assert torch.allclose(vectors.vectors[0], found.difference_at((2, -1)), atol=1e-5)
    assert (vectors.layers, vectors.unit) == ((2,), "norm")
    said = Direction(found.basis, site=Site(2, -1), facts={"chosen": {"norm": 7.5}})
    assert SteeringVectors.of(said).lengths == pytest.approx([7.5])
    bare = SteeringVectors.of(Direction(3 * found.basis))
    assert (bare.layers, bare.unit) == ((), "absolute")
    assert bare.lengths == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ({}, (2,)),
        ({"operation": "clamp"}, (2,)),
        ({"operation": "ablate"}, tuple(range(BLOCKS + 1))),
        ({"layers": "0,3-"}, (0, 3, 4, 5)),
        ({"layers": [1, BLOCKS]}, (1, BLOCKS)),
    ],
)
def test_layers_are_the_directions_own_or_all_to_ablate(given: dict[str, Any], layers: tuple[int, ...]) -> None:
    found = steering_of(SteeringVectors.of(direction()), settings(**given), BLOCKS, D_MODEL)
    assert found.layers == layers
    assert len(found.directions) == len(found.lengths) == len(layers)


def test_vectors_by_layer_stay_at_their_layers() -> None:
    vectors = SteeringVectors.by_layer({4: 2 * normal(D_MODEL), 1: normal(D_MODEL), 3: torch.zeros(D_MODEL)})
    assert (vectors.layers, vectors.unit) == ((1, 4), "file")
    for operation in ("add", "ablate"):
        assert steering_of(vectors, settings(operation=operation), BLOCKS, D_MODEL).layers == (1, 4)
    with pytest.raises(UsageError, match=r"--layers 2: expected a layer that the file has a vector for \(1, 4\)"):
        steering_of(vectors, settings(layers="2"), BLOCKS, D_MODEL)


@pytest.mark.parametrize(
    ("vectors", "given", "said"),
    [
        (Direction(normal(1, D_MODEL)), {}, "--layers: expected the layers to add at"),
        (Direction(normal(1, D_MODEL)), {"layers": "6"}, "expected layers 0 to 5"),
        (Direction(normal(2, D_MODEL)), {}, "expected one to steer along, found 2"),
        (Direction(normal(1, D_MODEL), reader=normal(1, D_MODEL)), {}, "LEACE"),
        (Direction(normal(1, 8), site=Site(1, -1)), {}, f"width {D_MODEL}, found 8"),
        ({9: normal(D_MODEL)}, {}, "layers up to the model's 5, found 9"),
        ({1: normal(D_MODEL), 2: normal(8)}, {}, "one width"),
        ({1: torch.full((D_MODEL,), torch.nan)}, {}, "finite"),
        ({-1: normal(D_MODEL)}, {}, "from 0 on"),
        ({}, {}, "at least one layer"),
        ({1: "x"}, {}, "expected numbers"),
    ],
)
def test_what_cannot_be_steered_along_is_named(vectors: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        steering_of(SteeringVectors.natural(vectors), settings(**given), BLOCKS, D_MODEL)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"coefficients": "1,x"}, "numbers with commas"),
        ({"coefficients": "1,nan"}, "numbers between"),
        ({"coefficients": "0,1e9"}, "numbers between"),
        ({"coefficients": range(99)}, "at most 50"),
        ({"coefficients": [1], "coefficient": 2}, "no --coefficient beside it"),
        ({"coefficient": 1e5}, "less than"),
        ({"operation": "multiply"}, "'add', 'scale'"),
        ({"tokens": "some"}, "'all' or 'generated'"),
    ],
)
def test_settings_that_mean_nothing_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings(**given)


def test_coefficients_are_in_order_and_each_once() -> None:
    assert settings(coefficients="2, -1,0,2").doses == (-1, 0, 2)
    assert settings(coefficient=0.5).doses == (0.5,)


# -------------------------------------------------------------------------------------------------------------- files


def test_files_of_all_kinds_are_the_same_vectors(tmp_path: Path) -> None:
    """A block N gives what enters block N + 1: `direction.N` and `layer.N` are layer N + 1."""
    rows = {block: normal(D_MODEL, seed=block) for block in (1, 12)}
    save_file({f"layer.{block}": row for block, row in rows.items()}, tmp_path / "v.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    for block, row in rows.items():
        writer.add_tensor(f"direction.{block}", row.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = SteeringVectors.by_layer({block + 1: row for block, row in rows.items()})
    assert expected.layers == (2, 13)
    assert SteeringVectors.load(tmp_path / "v.safetensors") == expected
    assert SteeringVectors.load(tmp_path / "v.gguf") == expected
    assert SteeringVectors.natural(str(tmp_path / "v.gguf")) == expected
    with pytest.raises(UsageError, match="--site 2:-1"):
        SteeringVectors.load(tmp_path / "v.gguf", Site(2, -1))


def test_a_direction_file_is_taken_at_its_site_or_another(tmp_path: Path) -> None:
    found = direction(learnt_from=frozenset({"ab" * 6}))
    save_direction(tmp_path / "d.safetensors", found)
    assert SteeringVectors.load(tmp_path / "d.safetensors") == SteeringVectors.of(found)
    other = SteeringVectors.load(tmp_path / "d.safetensors", Site(4, -2))
    assert other.layers == (4,)
    assert torch.allclose(other.vectors[0], found.difference_at((4, -2)), atol=1e-5)
    assert other.learnt_from == found.learnt_from


class Bad:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("name", ["v.pt", "v.bin", "v.PKL"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bad()))
    with pytest.raises(UsageError, match=r"layer\.\{n\}") as error:
        SteeringVectors.load(path)
    assert "\n" not in str(error.value)
    path = path.rename(tmp_path / "v.safetensors")  # whatever it is called
    with pytest.raises(AbliterateError):
        SteeringVectors.load(path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"layer.1": np.ones(3, np.float32), "layer.2": np.ones(2, np.float32)}, "one width"),
        ({"layer.1": np.ones((3, 2), np.float32)}, "vectors 'layer.N'"),
        ({"layer.1": np.ones(3, np.int32)}, "floats"),
        ({"layer.1": np.array([1, np.inf], np.float32)}, "finite"),
        ({"layer.1": np.ones(3, np.float32), "other": np.ones(3, np.float32)}, "'basis'"),
    ],
)
def test_other_safetensors_are_named(tmp_path: Path, tensors: dict[str, Any], said: str) -> None:
    from safetensors.numpy import save_file as save_arrays

    save_arrays(tensors, tmp_path / "v.safetensors")
    with pytest.raises(AbliterateError, match=said):
        SteeringVectors.load(tmp_path / "v.safetensors")


def test_a_file_of_other_names_is_not_by_layer(tmp_path: Path) -> None:
    save_file({"direction": normal(4)}, tmp_path / "v.safetensors")
    assert load_layered(tmp_path / "v.safetensors") is None
    with pytest.raises(UsageError, match="found none"):
        SteeringVectors.load(tmp_path / "none.safetensors")
