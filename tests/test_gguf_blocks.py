"""Block types of GGUF files against what ggml itself has written, and against the dequantizers of the gguf package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

from ptqcli.checkpoint.gguf_blocks import BLOCK_TYPES, PLAIN_DTYPES, decode, encode, plain_bytes, values_of
from ptqcli.errors import PTQError
from ptqcli.numerics.blocks import LEGACY_TYPES, LegacyBlocks
from ptqcli.numerics.k_quants import K_TYPES, SuperBlocks

GOLDEN = Path(__file__).parent / "golden"
QUANTIZED = [name for name, kind in BLOCK_TYPES.items() if kind.quantized]


def random_bytes(name: str, rows: int = 5, blocks: int = 3) -> torch.Tensor:
    """Any bytes are blocks, but for fp16 numbers, which must be finite here."""
    kind = BLOCK_TYPES[name]
    data = torch.randint(256, (rows, blocks, kind.nbytes), generator=torch.Generator().manual_seed(kind.number), dtype=torch.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(name, (0, 2) if "_1" in name else (0,))
    for start in halves:
        data[..., start + 1] &= 0b10111111  # the exponent stays below its highest
    return data.flatten(1)


def truth(name: str, data: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(dequantize(data.numpy(), GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_sizes_and_numbers_are_those_of_ggml(name: str) -> None:
    kind, number = BLOCK_TYPES[name], GGMLQuantizationType[name]
    assert kind.number == number
    assert (kind.columns, kind.nbytes) == GGML_QUANT_SIZES[number]


@pytest.mark.parametrize("name", QUANTIZED)
def test_any_bytes_are_decoded_as_the_gguf_package_does_and_come_back(name: str) -> None:
    data = random_bytes(name)
    blocks = decode(BLOCK_TYPES[name], data)
    assert torch.equal(blocks.values(), truth(name, data))
    assert torch.equal(values_of(BLOCK_TYPES[name], data), blocks.values())
    assert torch.equal(encode(blocks), data)


@pytest.mark.parametrize("name", QUANTIZED)
def test_one_code_more_is_noticed(name: str) -> None:
    data = random_bytes(name)
    blocks = decode(BLOCK_TYPES[name], data)
    codes = blocks.codes.clone()
    codes[1, 1, 7] ^= 1
    assert not torch.equal(encode(replace(blocks, codes=codes)), data)
    assert not torch.equal(replace(blocks, codes=codes).values(), truth(name, data))


@pytest.mark.parametrize("case", json.loads((GOLDEN / "gguf_blocks.json").read_text())["cases"], ids=lambda case: case["type"])
def test_what_ggml_wrote_both_ways(case: dict[str, object]) -> None:
    golden, name = load_file(GOLDEN / "gguf_blocks.safetensors"), str(case["type"])
    data = golden[f"{name}.bytes"]
    blocks = decode(BLOCK_TYPES[name], data)
    assert torch.equal(blocks.values(), golden[f"{name}.dequantized"])
    assert torch.equal(encode(blocks), data)


@pytest.mark.parametrize("name", LEGACY_TYPES)
def test_legacy_rows_that_the_gguf_package_wrote(name: str) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    data = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType[name]))
    blocks = decode(BLOCK_TYPES[name], data)
    assert isinstance(blocks, LegacyBlocks)
    assert torch.equal(encode(blocks), data)
    assert torch.allclose(blocks.values(), weight, atol=2 * blocks.d.float().abs().max().item())


@pytest.mark.parametrize("name", PLAIN_DTYPES)
def test_plain_numbers(name: str) -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    data = plain_bytes(BLOCK_TYPES[name], weight)
    assert data.shape == (3, BLOCK_TYPES[name].row_bytes(8))
    assert torch.equal(values_of(BLOCK_TYPES[name], data), weight.to(PLAIN_DTYPES[name]))
    if name != "BF16":
        assert np.array_equal(dequantize(data.numpy(), GGMLQuantizationType[name]), weight.to(PLAIN_DTYPES[name]).float().numpy())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PTQError, match="leave the range of F16"):
        plain_bytes(BLOCK_TYPES["F16"], torch.full((1, 2), 1e6))
    with pytest.raises(PTQError, match="blocks of 256 weights, which do not divide rows of 576"):
        BLOCK_TYPES["Q4_K"].row_bytes(576)


@pytest.mark.parametrize("name", K_TYPES)
def test_the_grid_of_super_blocks_gives_the_codes_back(name: str) -> None:
    blocks = decode(BLOCK_TYPES[name], random_bytes(name))
    assert isinstance(blocks, SuperBlocks)
    scales = blocks.scales.clone()
    scales[scales == 0] = 1  # with a step of 0 all codes are one
    blocks = replace(blocks, scales=scales, d=blocks.d.abs() + 1)
    values = blocks.values()
    grid = blocks.grid()
    wide = grid.scale.repeat_interleave(blocks.kind.columns, dim=1), grid.zero.repeat_interleave(blocks.kind.columns, dim=1)
    decoded = (blocks.codes.flatten(1) - wide[1]) * wide[0]
    assert torch.allclose(decoded, values, rtol=1e-4, atol=1e-4 * values.abs().max().item())
    near = blocks.nearest(values)
    assert torch.allclose(near.values(), values, rtol=1e-5)
    assert torch.equal(near.rows(slice(1, 3)).values(), near.values()[1:3])
