"""Layers on torch's own CPU kernels, against float64."""

from __future__ import annotations

import pytest
import torch
from layers import exact_output, random_codes, random_inputs, random_layer
from ptq_kernels import TorchInt4WeightOnly, TorchInt8WeightOnly, torch_cpu
from torch import Tensor

# The kernel, and above its limit the expanded weight.
TOKENS = (1, 2, 3, 16, 17, 300)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 1e-6}
# rows, columns, group size
SHAPES = ((16, 64, 32), (101, 128, 64), (130, 256, -1), (33, 1024, 512), (257, 2112, 64), (70, 704, 32), (64, 512, 128))


def distance(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits(shape: tuple[int, int, int], symmetric: bool, dtype: torch.dtype) -> None:
    codes, scale, zero, bias = layer = random_layer(*shape[:2], 4, shape[2], dtype, symmetric)
    made = TorchInt4WeightOnly(codes, scale, zero, shape[2], bias)
    assert made.block is not None
    flipped = codes.clone()
    flipped[shape[0] // 2] ^= 8  # one code of a row's thousand is lost in the rounding of bfloat16
    other = TorchInt4WeightOnly(flipped, scale, zero, shape[2], bias)
    for tokens in TOKENS:
        x = random_inputs(2, tokens, shape[1], dtype=dtype)
        truth = exact_output(x, layer, 4)
        assert made(x).shape == (2, tokens, shape[0])
        assert distance(made(x), truth) < TOLERANCE[dtype]
        assert distance(other(x), truth) > TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(37, 96, -1), (130, 704, -1), (1, 2112, -1)], ids=str)
def test_eight_bits(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    codes, scale, _, bias = layer = random_layer(*shape[:2], 8, shape[2], dtype)
    signed = (codes.int() - 128).to(torch.int8)
    made = TorchInt8WeightOnly(signed, scale.flatten(), bias)
    other = TorchInt8WeightOnly(signed.roll(1, dims=1), scale.flatten(), bias)
    for tokens in TOKENS:
        x = random_inputs(2, tokens, shape[1], dtype=dtype)
        truth = exact_output(x, layer, 8)
        assert distance(made(x), truth) < TOLERANCE[dtype]
        assert distance(other(x), truth) > TOLERANCE[dtype]


def test_a_flipped_code_is_seen_in_its_output() -> None:
    codes, scale, _, bias = random_layer(64, 256, 4, 32)
    flipped = codes.clone()
    flipped[63, 255] ^= 1
    x = random_inputs(2, 3, 256)
    change = TorchInt4WeightOnly(flipped, scale, None, 32, bias)(x) - TorchInt4WeightOnly(codes, scale, None, 32, bias)(x)
    step = (1 if flipped[63, 255] > codes[63, 255] else -1) * scale[63, 7]
    assert torch.allclose(change[..., 63], step * x[..., 255], atol=1e-5)
    assert (change[..., :63] == 0).all()


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 96, 112, 128, 176])
def test_what_torch_packs_is_unpacked(rows: int) -> None:
    codes = random_codes(rows, 34, 4)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert any(torch.equal(torch_cpu._unpack(packed, block), codes) for block in (64, 32))


def test_an_unknown_layout_still_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cpu, "_unpack", lambda packed, block: torch.zeros(1))
    codes, scale, zero, bias = layer = random_layer(32, 64, 4, 32, torch.bfloat16, symmetric=False)
    made = TorchInt4WeightOnly(codes, scale, zero, 32, bias)
    assert made.block is None
    x = random_inputs(2, 300, 64, dtype=torch.bfloat16)
    assert distance(made(x), exact_output(x, layer, 4)) < 4e-3


def test_which_group_size_torch_runs() -> None:
    assert torch_cpu.int4_group_size(4096, 128) == 128
    assert torch_cpu.int4_group_size(2112, -1) == 64
    assert torch_cpu.int4_group_size(1024, 512) == 256
    assert torch_cpu.int4_group_size(96, 48) is None
    assert torch_cpu.int4_group_size(100, -1) is None


def test_the_contract_names_the_argument() -> None:
    codes, scale, _, bias = random_layer(16, 64, 4, 32, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^group_size 16 does not go"):
        TorchInt4WeightOnly(codes, scale, None, 16)
    with pytest.raises(ValueError, match=r"^group_size 32 does not go .* scales \[16, 1\]"):
        TorchInt4WeightOnly(codes, scale[:, :1], None, 32)
    with pytest.raises(ValueError, match=r"^codes must be below 16, found \d+"):
        TorchInt4WeightOnly(codes + (codes == codes[0, 0]).byte() * 16, scale, None, 32)
    with pytest.raises(TypeError, match=r"^scale must be one of"):
        TorchInt4WeightOnly(codes, scale.double(), None, 32)
    with pytest.raises(ValueError, match=r"^bias must be torch.bfloat16 of shape \[16\]"):
        TorchInt4WeightOnly(codes, scale, None, 32, bias.float())
    with pytest.raises(TypeError, match=r"^codes must be uint8"):
        TorchInt4WeightOnly(codes.view(torch.int8), scale, None, 32)
    for zero in (scale, torch.zeros(16, 1, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"^zero must be uint8 of shape \[16, 2\]"):
            TorchInt4WeightOnly(codes, scale, zero, 32)
    with pytest.raises(ValueError, match=r"^zero must be below 16, found 200"):
        TorchInt4WeightOnly(codes, scale, torch.full((16, 2), 200, dtype=torch.uint8), 32)
    with pytest.raises(ValueError, match=r"^group_size 0 does not go"):
        TorchInt4WeightOnly(codes, scale, None, 0)
    with pytest.raises(TypeError, match=r"^codes must be int8"):
        TorchInt8WeightOnly(codes, scale[:, 0])
    with pytest.raises(ValueError, match=r"^scale must have shape \[16\]"):
        TorchInt8WeightOnly(codes.view(torch.int8), scale)
    with pytest.raises(ValueError, match=r"^codes must have a multiple of 32 columns, not 48"):
        TorchInt8WeightOnly(codes.view(torch.int8)[:, :48], scale[:, 0])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_compiles_whole(bits: int) -> None:
    codes, scale, zero, bias = random_layer(48, 128, bits, 64 if bits == 4 else -1, torch.bfloat16, symmetric=False)
    made = (
        TorchInt4WeightOnly(codes, scale, zero, 64, bias) if bits == 4 else TorchInt8WeightOnly(codes.view(torch.int8), scale[:, 0], bias)
    )
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for tokens in (1, 300):
        x = random_inputs(2, tokens, 128, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), made(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_input_that_does_not_fit_is_named(bits: int) -> None:
    codes, scale, _, _ = random_layer(16, 64, 4, 32, torch.bfloat16)
    made = TorchInt4WeightOnly(codes, scale, None, 32) if bits == 4 else TorchInt8WeightOnly(codes.view(torch.int8), scale[:, 0])
    for x, error, message in [
        (torch.ones(2, 64, dtype=torch.float64), TypeError, "x must be torch.bfloat16, as the scales are"),
        (torch.ones(2, 63).bfloat16(), ValueError, r"x must have 64 columns, not the shape \[2, 63\]"),
        (torch.tensor(1.0).bfloat16(), ValueError, "x must have 64 columns"),
    ]:
        with pytest.raises(error, match=message):
            made(x)
    with pytest.raises(TypeError, match=r"x must be torch.float64, as the scales are, and one of"):
        made.to(torch.float64)(torch.ones(2, 64, dtype=torch.float64))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_an_input_with_gaps(bits: int, dtype: torch.dtype) -> None:
    codes, scale, _, _ = random_layer(16, 64, 4, 32, dtype)
    made = (
        TorchInt4WeightOnly(codes, scale, None, 32) if bits == 4 else TorchInt8WeightOnly(codes.view(torch.int8), scale[:, 0].contiguous())
    )
    wide = random_inputs(5, 1, 128, dtype=dtype)
    for x in (wide.chunk(2, dim=-1)[1], wide[..., ::2], wide[:1, :, ::2]):
        assert torch.equal(made(x), made(x.contiguous()))
    assert made(wide[:0, :, :64]).shape == (0, 1, 16)
