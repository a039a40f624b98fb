"""Number formats on disk: the same bytes where nothing changed, the nearest number where something did."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from abliterate.errors import CheckpointError, NumericalError
from abliterate.files.checkpoint import open_checkpoint
from abliterate.files.formats import PLAIN, Diffusion, Layout, diffuse_rows, layout
from steps import steps_apart

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FORMATS = ("F32", "F16", "BF16", "FP8-tensor", "FP8-channel", "FP8-block", "MXFP4")
COARSE = ("BF16", "FP8-tensor", "FP8-channel", "FP8-block", "MXFP4")


def laid_out(folder: Path, config: Any = None, **tensors: Tensor) -> Layout:
    """The layout of the first of the tensors."""
    names = {name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(names, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    checkpoint = open_checkpoint(folder)
    return layout(checkpoint, checkpoint.tensors[next(iter(names))])


def raw(tensor: Tensor) -> bytearray:
    return bytearray(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def stored(folder: Path, name: str, weight: Tensor) -> tuple[Layout, bytearray]:
    """`weight` [d, n] quantised by the book to the format `name`."""
    d, n = weight.shape
    if name in PLAIN:
        weight = weight.to(PLAIN[name])
        return laid_out(folder, w=weight), raw(weight)
    if name == "MXFP4":
        power = weight.view(d, -1, 32).abs().amax(-1).log2().floor() + 125
        how = laid_out(folder, w_blocks=torch.zeros(d, n // 32, 16, dtype=torch.uint8), w_scales=power.to(torch.uint8))
        return how, raw(how.encode(weight, 0))
    height, width = {"FP8-tensor": (d, n), "FP8-channel": (1, n), "FP8-block": (128, 128)}[name]
    padded = torch.nn.functional.pad(weight, (0, -n % width, 0, -d % height))
    scales = padded.view(-(-d // height), height, -1, width).abs().amax((1, 3)) / 448
    codes = (weight / scales.repeat_interleave(height, 0)[:d].repeat_interleave(width, 1)[:, :n]).to(E4M3.dtype)
    suffix = "_scale_inv" if name == "FP8-block" else "_scale"
    return laid_out(folder, **{"m__weight": codes, f"m__weight{suffix}": scales}), raw(codes)


# ------------------------------------------------------------------------------------------- decoding


def test_fp8_numbers_are_those_of_transformers(tmp_path: Path) -> None:
    codes = torch.randint(0, 256, (256, 384), dtype=torch.uint8)
    codes[codes & 127 == 127] = 0  # NaN is not equal to itself
    weight = codes.view(E4M3.dtype)
    for scales, name in (
        (torch.rand(2, 3), "FP8-block"),
        (torch.rand(2, 3).bfloat16(), "FP8-block"),
        (torch.randint(100, 140, (2, 3), dtype=torch.uint8), "FP8-block"),
        (torch.rand(256, 12), "FP8-block"),
        (torch.rand(256, 1), "FP8-channel"),
        (torch.rand(1, 384), "FP8-channel"),
        (torch.rand(1, 1), "FP8-tensor"),
    ):
        how = laid_out(tmp_path, m__weight=weight, m__weight_scale_inv=scales)
        assert (how.format, how.shape, how.row_bytes, how.rows) == (name, (256, 384), 384, 256)
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=torch.float32)
        assert torch.equal(how.decode(raw(weight), 0), theirs), name


def test_mxfp4_numbers_are_those_of_transformers(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 2), dtype=torch.uint8)
    how = laid_out(tmp_path, experts__down_proj_blocks=blocks, experts__down_proj_scales=scales)
    assert (how.format, how.shape, how.row_bytes, how.rows, how.columns) == ("MXFP4", (3, 10, 64), 32, 30, 64)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(how.decode(raw(blocks), 0).view(3, 10, 64), theirs.mT)


@pytest.mark.parametrize("config", [None, {"quantization_config": {"weight_block_size": [128, 128]}}])
def test_blocks_at_the_border_are_smaller(tmp_path: Path, config: Any) -> None:
    """192 rows are a block and a half: not two blocks of 96, though that would divide evenly."""
    weight, scales = torch.ones(192, 200).to(E4M3.dtype), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    how = laid_out(tmp_path, config, m__weight=weight, m__weight_scale_inv=scales)
    numbers = how.decode(raw(weight), 0)
    assert how.block == (128, 128)
    for rows, columns, scale in ((slice(128), slice(128), 1), (slice(128, None), slice(128, None), 4)):
        assert (numbers[rows, columns] == scale).all()
    assert numbers.sum() == 128 * 128 + 2 * 128 * 72 + 3 * 64 * 128 + 4 * 64 * 72


@pytest.mark.parametrize(
    ("config", "block"),
    [
        ({"quantization_config": {"weight_block_size": [100, 64]}}, (100, 64)),
        ({"quantization_config": {"weight_block_size": [3, 3]}}, (128, 128)),
        ({"quantization_config": {"weight_block_size": None}}, (128, 128)),
        ({"quantization_config": {"weight_block_size": ["a", 0]}}, (128, 128)),
        ({"quantization_config": []}, (128, 128)),
        ("{", (128, 128)),
        ("[" * 100_000, (128, 128)),
    ],
)
def test_block_size_is_that_of_the_config_where_it_fits(tmp_path: Path, config: Any, block: tuple[int, int]) -> None:
    weight, scales = torch.ones(200, 256 if block[1] == 128 else 128).to(E4M3.dtype), torch.ones(2, 2)
    assert laid_out(tmp_path, config, m__weight=weight, m__weight_scale_inv=scales).block == block


@pytest.mark.parametrize("scales", ["m.scale", "m.qscale_weight", "m.weight_scale", "m.weight_scale_inv"])
def test_scales_are_found_by_their_names(tmp_path: Path, scales: str) -> None:
    weight = torch.ones(4, 4).to(E4M3.dtype)
    how = laid_out(tmp_path, m__weight=weight, **{scales: torch.tensor(3.0)})
    assert how.decode(raw(weight), 0).unique().tolist() == [3.0]


def test_scales_of_experts_start_anew_with_each(tmp_path: Path) -> None:
    weight = torch.ones(3, 130, 4).to(E4M3.dtype)
    scales = torch.arange(1.0, 7.0).view(3, 2, 1)
    numbers = laid_out(tmp_path, w=weight, w_scale_inv=scales).decode(raw(weight), 0).view(3, 130, 4)
    for expert in range(3):
        assert (numbers[expert, :128] == 2 * expert + 1).all()
        assert (numbers[expert, 128:] == 2 * expert + 2).all()
    each = laid_out(tmp_path, w=weight, w_scale=torch.arange(1.0, 4.0)).decode(raw(weight), 0).view(3, -1)
    assert torch.equal(each, torch.arange(1.0, 4.0)[:, None].expand(3, 520))
    columns = laid_out(tmp_path, w=weight, w_scale=torch.arange(12.0).view(3, 1, 4)).decode(raw(weight), 0)
    assert torch.equal(columns.view(3, 130, 4), torch.arange(12.0).view(3, 1, 4).expand(3, 130, 4))


@pytest.mark.parametrize("name", FORMATS)
def test_any_rows_can_be_decoded_and_encoded_alone(tmp_path: Path, name: str) -> None:
    how, data = stored(tmp_path, name, torch.randn(150, 192))
    whole = how.decode(data, 0)
    for first, count in ((0, 1), (149, 1), (120, 20), (5, 145)):
        part = data[first * how.row_bytes : (first + count) * how.row_bytes]
        buffer = torch.full((count, 192), torch.nan, dtype=how.dtype)
        assert how.decode(part, first, out=buffer) is buffer
        assert torch.equal(buffer, whole[first : first + count])
        assert raw(how.encode(buffer, first)) == part


def test_biases_are_one_row(tmp_path: Path) -> None:
    bias = torch.randn(48)
    how = laid_out(tmp_path, b=bias)
    assert (how.rows, how.columns, how.row_bytes, how.format) == (1, 48, 192, "F32")
    assert torch.equal(how.decode(raw(bias), 0), bias[None])


# -------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_plain_code_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    codes = codes[~codes.isnan()]
    assert raw(laid_out(tmp_path, w=codes).encode(codes.float()[None], 0)) == raw(codes)


def test_double_precision_stays_double(tmp_path: Path) -> None:
    weight = torch.randn(3, 5, dtype=torch.float64)
    how = laid_out(tmp_path, w=weight)
    assert how.dtype == torch.float64
    assert torch.equal(how.decode(raw(weight), 0), weight)
    assert raw(how.encode(weight, 0)) == raw(weight)


def test_encode_gives_new_memory(tmp_path: Path) -> None:
    weight = torch.randn(3, 5)
    how = laid_out(tmp_path, w=weight)
    for numbers in (weight, torch.randn(5, 3).T):
        coded = how.encode(numbers, 0)
        assert coded.is_contiguous()
        assert coded.data_ptr() != numbers.data_ptr()
        assert raw(coded) == raw(numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_fp8_code_comes_back_under_any_scale(tmp_path: Path, dtype: torch.dtype) -> None:
    """NaN of either sign and both zeros among them."""
    scales = torch.randn(1000, 1).mul(4).clamp(-8, 8).exp().to(dtype)
    scales[::7] *= -1
    codes = E4M3.expand(1000, 256)
    how = laid_out(tmp_path, m__weight=codes, m__weight_scale=scales)
    numbers = how.decode(raw(codes), 0)
    assert int(numbers.isnan().sum()) == 2000
    assert raw(how.encode(numbers, 0)) == raw(codes)


def test_every_fp8_code_comes_back_under_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    codes = E4M3.expand(247, 256)  # beyond 2^119 the largest number overflows float32
    scales = torch.arange(247, dtype=torch.uint8)[:, None]
    how = laid_out(tmp_path, m__weight=codes, m__weight_scale_inv=scales)
    assert raw(how.encode(how.decode(raw(codes), 0), 0)) == raw(codes)


def test_every_mxfp4_byte_comes_back_under_every_scale(tmp_path: Path) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(253, 16, 16)
    scales = torch.arange(253, dtype=torch.uint8)[:, None].expand(253, 16)
    how = laid_out(tmp_path, w_blocks=blocks, w_scales=scales)
    assert raw(how.encode(how.decode(raw(blocks), 0), 0)) == raw(blocks)


def test_below_a_scale_of_zero_everything_is_zero(tmp_path: Path) -> None:
    codes = torch.zeros(2, 4).to(E4M3.dtype)
    how = laid_out(tmp_path, m__weight=codes, m__weight_scale=torch.tensor([[0.0], [1.0]]))
    numbers = how.decode(raw(codes), 0)
    assert raw(how.encode(numbers, 0)) == raw(codes)
    assert how.decode(how.encode(numbers + 2, 0), 0).tolist() == [[0.0] * 4, [2.0] * 4]


@given(st.sampled_from(FORMATS), st.integers(1, 140), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_unedited_tensors_keep_their_bytes(name: str, d: int, groups: int, seed: int) -> None:
    weight = torch.randn(d, 32 * groups, generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        how, data = stored(Path(folder), name, weight * weight.exp())
        assert raw(how.encode(how.decode(data, 0), 0)) == data
        diffusion = Diffusion(how, weight[:, :1].T)
        assert raw(diffusion.encode(how.decode(data, 0), 0)) == data
        assert not diffusion.left.any()
        assert raw(diffuse_rows(how, how.decode(data, 0), weight[:1], 0)) == data


# -------------------------------------------------------------------------------------------- rounding


def nearest(numbers: Tensor, grid: Tensor) -> Tensor:
    """Of the sizes in `grid`, in the order of their codes, the nearest to each number; the even code on a tie."""
    distance = (numbers.double().abs().unsqueeze(-1) - grid.double()).abs()
    tied = (distance == distance.amin(-1, keepdim=True)).double()
    even = torch.arange(len(grid)) % 2 == 0
    code = (tied * (1 + even)).argmax(-1)
    return grid[code].copysign(numbers)


@pytest.mark.parametrize("name", ["FP8", "MXFP4"])
def test_rounding_is_to_the_nearest_and_to_even(tmp_path: Path, name: str) -> None:
    grid = E2M1 if name == "MXFP4" else E4M3[:127].float()
    between = torch.cat((grid, (grid[1:] + grid[:-1]) / 2))
    numbers = torch.cat((between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(500.0))))
    numbers = torch.cat((numbers, torch.randn(4096) * grid[-1] / 3, torch.rand(256), torch.rand(64) * 1e-3))
    numbers = torch.cat((numbers, -numbers)).clamp(-grid[-1], grid[-1])
    numbers = numbers[: len(numbers) // 32 * 32][None]
    if name == "MXFP4":
        blocks = torch.zeros(1, numbers.shape[1] // 32, 16, dtype=torch.uint8)
        how = laid_out(tmp_path, w_blocks=blocks, w_scales=torch.full(blocks.shape[:2], 127, dtype=torch.uint8))
    else:
        how = laid_out(tmp_path, m__weight=numbers.to(E4M3.dtype), m__weight_scale=torch.ones(1))
    assert torch.equal(how.decode(how.encode(numbers, 0), 0), nearest(numbers, grid))


def test_numbers_beyond_the_largest_are_clamped(tmp_path: Path) -> None:
    for name, largest in (("FP8-tensor", 448.0), ("MXFP4", 6.0)):
        how, data = stored(tmp_path, name, torch.full((1, 32), largest))
        top = float(how.decode(data, 0).max())
        numbers = torch.zeros(1, 32)
        numbers[0, :3] = torch.tensor([1.5 * top, -9 * top, torch.inf])
        assert how.decode(how.encode(numbers, 0), 0)[0, :4].tolist() == [top, -top, top, 0.0]


def test_not_a_number_is_kept_or_refused(tmp_path: Path) -> None:
    numbers = torch.ones(1, 32)
    numbers[0, 5] = torch.nan
    how, _ = stored(tmp_path, "FP8-tensor", torch.ones(1, 32))
    assert torch.equal(how.decode(how.encode(numbers, 0), 0).isnan(), numbers.isnan())
    how, _ = stored(tmp_path, "MXFP4", torch.ones(1, 32))
    with pytest.raises(NumericalError, match=r"^rows from 0: expected finite numbers, found NaN"):
        how.encode(numbers, 0)


# ----------------------------------------------------------------------------------- what cannot be edited

FP8 = torch.ones(4, 32).to(E4M3.dtype)
U8 = torch.zeros(4, 1, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "expected", "found"),
    [
        ({"w": torch.ones(4, 4, dtype=torch.int8)}, "F8_E4M3 or MXFP4", "I8"),
        ({"w": torch.ones(4, 4).to(torch.float8_e5m2)}, "F8_E4M3 or MXFP4", "F8_E5M2"),
        ({"w": U8}, "F8_E4M3 or MXFP4", "U8"),
        ({"w": torch.ones(0, 4)}, "rows of numbers", r"shape \[0, 4\]"),
        ({"w": torch.ones(())}, "rows of numbers", r"shape \[\]"),
        ({"w__weight": FP8}, "one tensor with its scales", "none"),
        (
            {"w__weight": FP8, "w__weight_scale": torch.ones(1), "w__scale": torch.ones(1)},
            "one tensor",
            r"'w.weight_scale' \(F32\), 'w.scale' \(F32\)",
        ),
        ({"w__weight": FP8, "w__weight_scale": torch.ones(1).long()}, "one tensor", r"'w.weight_scale' \(I64\)"),
        ({"w__weight": FP8, "w__weight_scale": torch.ones(3, 1)}, r"shape \[4, 32\]", r"\[3, 1\]"),
        ({"w__weight": FP8, "w__weight_scale": torch.ones(4, 5)}, r"shape \[4, 32\]", r"\[4, 5\]"),
        ({"w__weight": FP8, "w__weight_scale": torch.ones(32)}, r"shape \[4, 32\]", r"\[32\]"),
        ({"w__weight": FP8[0], "w__weight_scale": torch.ones(2)}, r"shape \[32\]", r"\[2\]"),
        (
            {"w__weight": FP8, "w__weight_scale": torch.ones(4), "w__weight_zero_point": torch.ones(4)},
            "codes around zero",
            "'w.weight_zero_point'",
        ),
        ({"w_blocks": U8}, "'w_scales' with a U8 scale", "none"),
        ({"w_blocks": U8, "w_scales": torch.ones(4, 1)}, "'w_scales'", r"F32 \[4, 1\]"),
        ({"w_blocks": U8, "w_scales": U8[:, :, 0][:2]}, "'w_scales'", r"U8 \[2, 1\]"),
    ],
)
def test_formats_that_cannot_be_edited_are_named(
    tmp_path: Path, tensors: dict[str, Tensor], expected: str, found: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"^tensor 'w\S* in \S+: expected .*{expected}.*, found {found}; give"):
        laid_out(tmp_path, **tensors)


# ---------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("name", ["BF16", "F16", "FP8-tensor", "MXFP4"])
def test_steps_count_the_numbers_in_between(tmp_path: Path, name: str) -> None:
    """All numbers of the format in order: those at places i and j are |i − j| steps apart, and the zeros are one."""
    how, _ = stored(tmp_path, name, torch.full((1, 32), {"FP8-tensor": 448.0, "MXFP4": 6.0}.get(name, 1.0)))
    if name == "MXFP4":
        codes = (torch.arange(16) * 17).to(torch.uint8).repeat_interleave(16).view(16, 16)  # each in a row of its own
        values = torch.cat((E2M1, -E2M1))
    else:
        bits = torch.arange(256).to(torch.uint8) if name == "FP8-tensor" else torch.arange(-(2**15), 2**15).short()
        codes = bits[:, None].expand(-1, 32).contiguous()
        values = codes.view(PLAIN.get(name, E4M3.dtype)).float()[:, 0]
    keep = values.isfinite()
    codes, values = codes[keep], values[keep]
    order = values.unique(sorted=True)
    place = torch.searchsorted(order, values)
    shuffled = torch.randperm(len(codes))
    apart = steps_apart(codes, raw(codes[shuffled]), how)
    assert apart.dtype == torch.int64
    assert torch.equal(apart, (place - place[shuffled]).abs()[:, None].expand(-1, 32))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([-torch.inf, torch.inf]))
@settings(deadline=None)
def test_neighbours_are_one_step_apart(number: float, towards: float) -> None:
    for dtype, name in ((torch.float32, "F32"), (torch.float64, "F64")):
        a = torch.tensor([[number]], dtype=dtype)
        b = a.nextafter(torch.tensor(towards, dtype=dtype))
        how = Layout((1, 1), dtype.itemsize, name)
        assert steps_apart(a, b, how).tolist() == [[1]]
        assert steps_apart(a, raw(a), how).tolist() == [[0]]


def test_distances_too_large_to_count_are_the_largest() -> None:
    a = torch.tensor([[1e308, 0.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[-1e308, -0.0, 1.0]], dtype=torch.float64)
    assert steps_apart(a, b, Layout((1, 3), 24, "F64")).tolist() == [[2**63 - 1, 0, 2 * 1023 * 2**52]]


# ---------------------------------------------------------------------------------------------- diffusion


def unit(k: int, d: int, seed: int = 0) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(seed)))[0]
    return basis.T.contiguous()


def diffused(how: Layout, numbers: Tensor, reader: Tensor, height: int) -> tuple[Tensor, bytes, Diffusion]:
    diffusion, out = Diffusion(how, reader), torch.empty_like(numbers)
    data = b""
    for first in range(0, len(numbers), height):
        rows = slice(first, first + height)
        data += raw(diffusion.encode(numbers[rows], first, out=out[rows]))
    return out, data, diffusion


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", COARSE)
def test_diffusion_takes_out_what_rounding_would_leave(tmp_path: Path, name: str, k: int) -> None:
    torch.manual_seed(0)
    how, data = stored(tmp_path, name, torch.randn(896, 256))
    weight, reader, other = how.decode(data, 0), unit(k, 896), unit(1, 896, seed=1)
    wanted = weight - reader.T @ (reader @ weight)
    alone = how.decode(how.encode(wanted, 0), 0)
    together, _, diffusion = diffused(how, wanted, reader, 896)

    assert (reader @ together).norm() < (reader @ alone).norm() / 10
    assert (reader @ together).norm() < 0.01 * (reader @ weight).norm()
    assert (together - wanted).norm() < 2 * (alone - wanted).norm()
    assert torch.allclose(diffusion.left, reader @ (together - wanted), atol=1e-4)
    assert (other @ (together - wanted)).norm() > 10 * (reader @ (together - wanted)).norm() / k**0.5


@pytest.mark.parametrize("name", ["BF16", "FP8-block", "MXFP4"])
@pytest.mark.parametrize("k", [1, 3])
def test_bytes_do_not_depend_on_how_the_caller_cuts(tmp_path: Path, name: str, k: int) -> None:
    torch.manual_seed(0)
    how, data = stored(tmp_path, name, torch.randn(300, 96))
    numbers = how.decode(data, 0) * 0.98
    expected = [diffused(how, numbers, unit(k, 300), 300)[1], raw(diffuse_rows(how, numbers, unit(k, 96), 0))]
    for height in (1, 7, 64, 150, 299):
        assert diffused(how, numbers, unit(k, 300), height)[1] == expected[0]
        cuts = range(0, 300, height)
        parts = [raw(diffuse_rows(how, numbers[cut : cut + height], unit(k, 96), cut)) for cut in cuts]
        assert b"".join(parts) == expected[1]


@pytest.mark.parametrize("name", COARSE)
def test_rows_of_the_stream_are_diffused_within_themselves(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    how, data = stored(tmp_path, name, torch.randn(70, 896))
    weight, reader = how.decode(data, 0), unit(2, 896)
    wanted = weight - (weight @ reader.T) @ reader
    alone = how.decode(how.encode(wanted, 0), 0)
    together = how.decode(diffuse_rows(how, wanted, reader, 0), 0)
    assert (together @ reader.T).norm() < (alone @ reader.T).norm() / 10
    assert (together - wanted).norm() < 2 * (alone - wanted).norm()
    assert raw(diffuse_rows(how, weight, reader, 0)) == data


def test_matrices_inside_a_tensor_are_diffused_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(3, 40, 8)
    how = laid_out(tmp_path, w=numbers.bfloat16())
    for expert in range(3):
        inside = Diffusion(how, unit(1, 40), 40 * expert)
        alone = Diffusion(Layout((40, 8), 16, "BF16"), unit(1, 40))
        assert raw(inside.encode(numbers[expert], 40 * expert)) == raw(alone.encode(numbers[expert], 0))


def test_a_direction_that_is_nowhere_changes_nothing(tmp_path: Path) -> None:
    numbers = torch.randn(100, 32)
    how = laid_out(tmp_path, w=numbers.bfloat16())
    assert raw(Diffusion(how, torch.zeros(1, 100)).encode(numbers, 0)) == raw(how.encode(numbers, 0))


def test_rows_must_come_in_order() -> None:
    diffusion = Diffusion(Layout((4, 8), 16, "BF16"), unit(1, 4))
    diffusion.encode(torch.ones(2, 8), 0)
    with pytest.raises(ValueError, match="expected row 2, got 3"):
        diffusion.encode(torch.ones(1, 8), 3)
