"""Where weights go: arithmetic with made-up memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from abliterate.config import ModelSettings
from abliterate.errors import UsageError
from abliterate.model.placement import Needs, Room, needs_of, place

GB = 10**9
FOLDER = Path("offload")


def needs(gigabytes: float) -> Needs:
    """Weights, and a batch that takes 2 GB."""
    return Needs(int(gigabytes * GB), 0, 0, 2 * GB // 16)


ONE: dict[Room, int] = {0: 24 * GB, "cpu": 64 * GB}
TWO: dict[Room, int] = {0: 24 * GB, 1: 24 * GB, "cpu": 64 * GB}
NONE: dict[Room, int] = {"cpu": 24 * GB}


@pytest.mark.parametrize(
    ("device", "weights", "rooms", "folder", "expected"),
    [
        ("auto", 16, ONE, None, ("cuda:0", None)),
        ("auto", 16, TWO, None, ("cuda:0", None)),
        ("auto", 16, NONE, None, ("cpu", None)),
        ("auto", 16, {"mps": 20 * GB, "cpu": 20 * GB}, None, ("mps", None)),
        ("auto", 23, NONE, None, ("cpu", None)),  # small batches
        ("auto", 30, ONE, None, ("auto", {0: 19.2, "cpu": 57.6})),
        ("auto", 40, TWO, None, ("auto", {0: 19.2, 1: 21.6, "cpu": 57.6})),
        ("balanced", 16, TWO, None, ("auto", {0: 19.2, 1: 21.6, "cpu": 57.6})),
        ("cuda:1", 16, TWO, None, ("cuda:1", None)),
        ("cuda", 16, TWO, None, ("cuda:0", None)),
        ("cpu", 16, TWO, None, ("cpu", None)),
        ("auto", 16, ONE, FOLDER, ("cuda:0", None)),  # nothing needs to stay on disk
        ("auto", 200, ONE, FOLDER, ("auto", {0: 19.2, "cpu": 57.6})),
        ("auto", 200, NONE, FOLDER, ("auto", {"cpu": 12})),
        ("cuda:1", 30, TWO, FOLDER, ("auto", {1: 19.2, "cpu": 57.6})),
        ("xpu:0", 200, NONE, None, ("xpu:0", None)),  # nothing is known of it
    ],
)
def test_weights_go_where_they_fit(
    device: str, weights: float, rooms: dict[Room, int], folder: Path | None, expected: tuple[str, Any]
) -> None:
    found = place(device, needs(weights), rooms, folder=folder)
    limits = None if found.limits is None else {room: size / GB for room, size in found.limits.items()}
    assert (found.device, limits) == expected
    assert found.spread == (limits is not None)
    assert found.balanced == (device == "balanced")


@pytest.mark.parametrize(
    ("device", "weights", "rooms", "quantised", "todo"),
    [
        ("cuda:0", 40, TWO, False, "give --device balanced"),
        ("cuda:0", 30, ONE, False, "give --device auto, which spreads it over GPUs and memory"),
        ("auto", 40, NONE, False, r"give --quantization bnb-8bit \(about 22.0 GB of weights\)"),
        ("auto", 70, NONE, False, r"give --quantization bnb-4bit \(about 22.4 GB of weights\)"),
        ("auto", 70, NONE, True, "give --offload FOLDER"),
        ("auto", 1000, TWO, False, "give --offload FOLDER"),
        ("cpu", 1000, NONE, False, "give --offload FOLDER"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_nearest_setting_that_does(
    device: str, weights: float, rooms: dict[Room, int], quantised: bool, todo: str
) -> None:
    with pytest.raises(UsageError, match=f"the model does not fit: .* of weights.*{todo}") as caught:
        place(device, needs(weights), rooms, quantised=quantised)
    assert "\n" not in str(caught.value)


def test_the_users_own_limits_stand_for_what_is_free() -> None:
    found = place("auto", needs(16), TWO, limits={0: 10 * GB, "cpu": 8 * GB})
    assert found.options() == {"device_map": "auto", "max_memory": {0: 10 * GB, "cpu": 8 * GB}}
    with pytest.raises(UsageError, match=r"does not fit: 30\.0 GB of weights"):
        place("auto", needs(30), TWO, limits={0: 10 * GB, "cpu": 8 * GB})
    with pytest.raises(UsageError, match="give --offload FOLDER"):  # in 4 bits it would fit what is free, not this
        place("auto", needs(30), NONE, limits={"cpu": 8 * GB})
    found = place("cpu", needs(30), TWO, limits={"cpu": 8 * GB}, folder=FOLDER)
    assert found.options() == {"device_map": "auto", "max_memory": {"cpu": 8 * GB}, "offload_folder": "offload"}
    assert found.said.endswith("22.0 GB or more stay on disk")


def test_limits_are_of_devices_that_are_there() -> None:
    with pytest.raises(UsageError, match="--max-memory: expected devices of cuda:0, cpu, found cuda:3"):
        place("auto", needs(16), ONE, limits={3: GB})
    with pytest.raises(UsageError, match="--max-memory: expected a limit for --device cuda:1, found cuda:0"):
        place("cuda:1", needs(16), TWO, limits={0: GB})
    with pytest.raises(UsageError, match="--device balanced: expected two GPUs or more, found 1"):
        place("balanced", needs(16), ONE)


def test_limits_are_read_from_a_line_or_a_mapping() -> None:
    assert ModelSettings(max_memory="0=20GiB, cuda:1=1.5GB,cpu=48MB").limits == {
        0: 20 << 30,
        1: 3 * 10**9 // 2,
        "cpu": 48 * 10**6,
    }
    assert ModelSettings.natural({"max_memory": {0: "20GiB", "cpu": "1TB"}}).limits == {0: 20 << 30, "cpu": 10**12}
    assert ModelSettings().limits is None
    for wrong in ("20GiB", "0=", "0=20 stones", "disk=3GB", "0=20GiB,,", "0=-1GB"):
        with pytest.raises(UsageError, match="expected DEVICE=SIZE like 0=20GiB,cpu=48GiB"):
            ModelSettings(max_memory=wrong)


def test_needs_are_those_of_the_configuration() -> None:
    """Llama 3.1 8B: 128 KiB of keys and values a token in bfloat16."""
    text = SimpleNamespace(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    )
    found = needs_of(SimpleNamespace(get_text_config=lambda decoder: text), 16 * GB, 2)
    assert found.cache == 128 << 10
    assert found.row == 12 * 128256
    assert found.weights == 16 * GB
    assert found.batch == 16 * (256 * (found.cache + found.activations) + found.row)
