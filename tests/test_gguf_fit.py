"""Grids of GGUF blocks that are fitted here, beside those that ggml's quantizers find for the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor

from ptqcli.checkpoint.gguf_blocks import BLOCK_TYPES, decode, encode, values_of
from ptqcli.formats.gguf_encode import encode_weight
from ptqcli.numerics.block_fit import Sums, fit_legacy
from ptqcli.numerics.blocks import LEGACY_TYPES, fit_blocks
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.k_fit import fit_k
from ptqcli.numerics.k_quants import K_TYPES

GOLDEN = load_file(Path(__file__).parent / "golden" / "gguf_k_quants.safetensors")
WEIGHT, IMPORTANCE = GOLDEN["input"], GOLDEN["importance"]


def error(values: Tensor, weight: Tensor = WEIGHT, importance: Tensor | None = None) -> Tensor:
    """Squared error of each row, float64."""
    missed = (values.double() - weight.double()).square()
    return (missed if importance is None else missed * importance.double()).sum(1)


@pytest.mark.parametrize("kind", ["plain", "weighted"])
@pytest.mark.parametrize("name", K_TYPES)
def test_what_ggml_wrote_is_decoded_as_ggml_does(name: str, kind: str) -> None:
    data = GOLDEN[f"{name}.{kind}.bytes"]
    blocks = decode(BLOCK_TYPES[name], data)
    assert torch.equal(encode(blocks), data)
    if kind == "plain":
        assert torch.equal(blocks.values(), GOLDEN[f"{name}.dequantized"])


@pytest.mark.parametrize("kind", ["plain", "weighted"])
@pytest.mark.parametrize("name", K_TYPES)
def test_the_error_is_below_that_of_ggml(name: str, kind: str) -> None:
    importance = IMPORTANCE if kind == "weighted" else None
    ours = error(fit_k(WEIGHT, K_TYPES[name], importance).values(), importance=importance)
    theirs = error(values_of(BLOCK_TYPES[name], GOLDEN[f"{name}.{kind}.bytes"]), importance=importance)
    assert ours.sum() < theirs.sum()
    assert (ours <= 1.02 * theirs).all(), ours / theirs


@pytest.mark.parametrize("name", LEGACY_TYPES)
def test_legacy_errors_are_below_those_of_the_gguf_package(name: str) -> None:
    kind = BLOCK_TYPES[name]
    ours = error(values_of(kind, encode_weight(kind, WEIGHT)))
    theirs = error(torch.from_numpy(dequantize(quantize(WEIGHT.numpy(), GGMLQuantizationType[name]), GGMLQuantizationType[name])))
    assert ours.sum() < theirs.sum()
    assert (ours <= theirs).all(), ours / theirs


@pytest.mark.parametrize("name", K_TYPES)
def test_importance_moves_the_error_to_where_it_matters_less(name: str) -> None:
    plain, weighted = (fit_k(WEIGHT, K_TYPES[name], importance).values() for importance in (None, IMPORTANCE))
    assert error(weighted, importance=IMPORTANCE).sum() < error(plain, importance=IMPORTANCE).sum()
    assert error(weighted).sum() > error(plain).sum()


@pytest.mark.parametrize("name", K_TYPES)
def test_codes_are_the_nearest_of_their_grid(name: str) -> None:
    """Brute force over all codes of a type, in float64."""
    kind = K_TYPES[name]
    blocks = fit_k(WEIGHT[:4], kind)
    assert (blocks.scales != 0).all()
    every = torch.stack([blocks.with_codes(torch.full_like(WEIGHT[:4], code)).values() for code in range(kind.levels)]).double()
    nearest = (every - WEIGHT[:4].double()).abs().amin(0)
    missed = (blocks.values().double() - WEIGHT[:4].double()).abs()
    assert (missed <= nearest + 1e-6 * WEIGHT.abs().max()).all()
    codes = blocks.codes.flatten(1).clone()
    codes[0, 3] ^= 1
    assert ((blocks.with_codes(codes).values().double() - WEIGHT[:4].double()).abs() > nearest + 1e-6 * WEIGHT.abs().max()).any()


@pytest.mark.parametrize("name", [*LEGACY_TYPES, *K_TYPES])
def test_a_solver_can_choose_the_codes_of_a_fitted_grid(name: str) -> None:
    """Columns are rounded one after the other on the grid that was fitted before, each error going to the next column."""
    blocks = fit_blocks(name, WEIGHT)
    grid, columns, left = blocks.grid(), blocks.kind.columns, WEIGHT.clone()
    codes = torch.empty_like(WEIGHT)
    for column in range(WEIGHT.shape[1]):
        group = column // columns
        here = Grid(grid.element, grid.scale[:, group], grid.zero[:, group])
        codes[:, column] = here.nearest(left[:, column])
        if column + 1 < WEIGHT.shape[1]:
            left[:, column + 1] += 0.5 * (left[:, column] - here.decode(codes[:, column]))
    values = values_of(BLOCK_TYPES[name], encode(blocks.with_codes(codes)))
    wide = Grid(grid.element, *(part.repeat_interleave(columns, dim=1) for part in (grid.scale, grid.zero)))
    assert torch.allclose(values, wide.decode(codes), rtol=1e-3, atol=1e-5)
    near = wide.nearest(WEIGHT)
    assert (near.to(torch.uint8) == blocks.codes.flatten(1)).double().mean() > 0.999
    assert not torch.equal(near, codes)


@pytest.mark.parametrize("name", K_TYPES)
def test_weights_of_a_grid_are_found_again(name: str) -> None:
    """Rows that a type holds exactly come back with next to no error; of random codes every sub-block uses its ends."""
    kind = K_TYPES[name]
    lowest, highest = kind.scales
    draw = torch.Generator().manual_seed(3)
    blocks = fit_k(WEIGHT[5:8], kind)
    codes = torch.randint(kind.levels, blocks.codes.shape, generator=draw).unflatten(2, (kind.sub_blocks, kind.columns))
    codes[..., 0], codes[..., 1] = 0, kind.levels - 1
    scales = torch.randint(max(lowest, 1), highest + 1, blocks.scales.shape, generator=draw).short()
    exact = replace(blocks, codes=codes.flatten(2).to(torch.uint8), scales=scales)
    values = exact.values()
    again, usual = error(fit_k(values, kind).values(), values), error(fit_k(WEIGHT[5:8], kind).values(), WEIGHT[5:8])
    assert again.sum() / values.square().sum() < 0.05 * usual.sum() / WEIGHT[5:8].square().sum()


def test_rows_of_zeros_and_of_one_value() -> None:
    weight = torch.zeros(3, 256)
    weight[1], weight[2] = 0.5, -0.5
    for kind in K_TYPES.values():
        values = fit_k(weight, kind).values()
        assert torch.equal(values[0], weight[0])
        assert torch.allclose(values[1:], weight[1:], rtol=2e-2)
    for name in LEGACY_TYPES:
        values = values_of(BLOCK_TYPES[name], encode_weight(BLOCK_TYPES[name], weight))
        assert torch.allclose(values, weight, rtol=1e-3)


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1e3])
@pytest.mark.parametrize("name", K_TYPES)
def test_very_small_and_very_large_weights_stay_finite(name: str, magnitude: float) -> None:
    weight = WEIGHT[:2] * magnitude
    values = fit_k(weight, K_TYPES[name]).values()
    assert torch.isfinite(values).all()
    assert error(values, weight).sum() <= weight.double().square().sum()


def test_pieces_of_a_matrix_are_fitted_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_k(WEIGHT, K_TYPES["Q4_K"], IMPORTANCE)
    monkeypatch.setattr("ptqcli.numerics.block_fit.MOST_NUMBERS", 3 * 512)
    assert torch.equal(encode(fit_k(WEIGHT, K_TYPES["Q4_K"], IMPORTANCE)), encode(whole))
    with pytest.raises(ValueError, match="do not divide rows of 100"):
        fit_k(WEIGHT[:, :100], K_TYPES["Q4_K"])


def test_sums_give_the_error_of_every_scale_and_offset() -> None:
    draw = torch.Generator().manual_seed(0)
    weights, importance = torch.randn(5, 32, generator=draw, dtype=torch.float64), torch.rand(32, generator=draw, dtype=torch.float64)
    codes = torch.randint(16, (5, 32), generator=draw).double()
    sums, scale, offset = Sums.of(weights, importance, codes), torch.tensor(0.3).double(), torch.tensor(-0.7).double()
    direct = (importance * (weights - scale * codes - offset).square()).sum(1)
    assert torch.allclose(sums.error(scale, offset), direct)
    best = sums.error(*sums.best_pair(torch.inf))
    for change in (-1e-3, 1e-3):
        fitted, start = sums.best_pair(torch.inf)
        assert (sums.error(fitted + change, start) > best).all()
        assert (sums.error(fitted, start + change) > best).all()


def test_four_bit_weights_are_found_again_at_five_bits() -> None:
    codes, d, m = fit_legacy(WEIGHT, 4, 32, True)
    codes[..., 0], codes[..., 1] = 0, 15
    values = (codes.float() * d.float()[..., None] + m.float()[..., None]).flatten(1)
    again = values_of(BLOCK_TYPES["Q5_1"], encode_weight(BLOCK_TYPES["Q5_1"], values))
    assert error(again, values).sum() < 1e-4 * error(values).sum()
