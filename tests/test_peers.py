"""Adapters of other people's kernels: those that run here against float64, the others' packing read back by what their layers say."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import metadata
from subprocess import CalledProcessError
from types import ModuleType
from typing import Any

import pytest
import torch
from layers import random_codes, random_inputs
from torch import Tensor

from ptqcli.bench import peers
from ptqcli.bench.peers import Peer, first_line, installed_peers, kernel_errors, missing_peers
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import ActivationScheme, OutlierSplit, Scheme
from ptqcli.numerics.weight import QuantizedWeight, round_to_nearest

CPU = torch.device("cpu")
TOKEN, TENSOR, STATIC = ActivationScheme(), ActivationScheme(per_token=False), ActivationScheme(per_token=False, dynamic=False)
ROWS, COLUMNS = 96, 256


def weight(scheme: Scheme, rows: int = ROWS, columns: int = COLUMNS) -> QuantizedWeight:
    values = random_inputs(rows, columns) * 0.05
    made = round_to_nearest(values, scheme, torch.bfloat16, MinMax())
    static = scheme.activations is not None and not scheme.activations.dynamic
    return replace(made, input_scale=torch.tensor([0.03])) if static else made


def tokens(count: int, columns: int = COLUMNS) -> Tensor:
    return random_inputs(count, columns, dtype=torch.bfloat16, seed=2)


def error(found: Tensor, quantized: QuantizedWeight, x: Tensor) -> float:
    truth = x.double() @ quantized.dequantize(torch.float64).T
    return float((found.double() - truth).norm() / truth.norm())


def peer(name: str, device: str = "cpu") -> Peer:
    return next(each for each in installed_peers(device) if each.name == name)


@pytest.mark.parametrize(
    "name, scheme, limit",
    [
        ("torch int4", Scheme(4, 128), 4e-3),
        ("torch int4", Scheme(4, 32, symmetric=False), 4e-3),
        ("torch int4", Scheme(4, -1), 4e-3),
        ("torch int8", Scheme(8, -1), 4e-3),
        ("torch int_mm", Scheme(8, -1, activations=TOKEN), 2e-2),
        ("torch int_mm", Scheme(8, -1, activations=TENSOR), 2e-2),
        ("torch int_mm", Scheme(8, -1, activations=STATIC), 2e-2),
        ("torch int_mm", Scheme(8, 0, activations=TOKEN), 2e-2),
    ],
)
@pytest.mark.parametrize("count", [1, 17])
def test_what_runs_here_multiplies_with_the_same_codes(name: str, scheme: Scheme, limit: float, count: int) -> None:
    quantized, x = weight(scheme), tokens(count)
    multiply = peer(name).build(quantized, torch.bfloat16, CPU)
    assert multiply is not None
    found = multiply(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (count, ROWS)
    assert error(found, quantized, x) < limit
    codes = quantized.codes.clone()
    codes[:, 5] ^= quantized.scheme.middle
    changed = QuantizedWeight(codes=codes, scale=quantized.scale, zero=quantized.zero, scheme=scheme, input_scale=quantized.input_scale)
    again = peer(name).build(changed, torch.bfloat16, CPU)
    assert again is not None
    assert error(again(x), quantized, x) > limit


def test_int_mm_is_the_references_product_bit_by_bit() -> None:
    from ptq_kernels.reference import int8_linear

    for scheme in (Scheme(8, -1, activations=TOKEN), Scheme(8, -1, activations=STATIC)):
        quantized, x = weight(scheme), tokens(5)
        multiply = peer("torch int_mm").build(quantized, torch.bfloat16, CPU)
        assert multiply is not None
        signed = (quantized.codes - 128).view(torch.int8)
        expected = int8_linear(x, signed, quantized.scale.flatten(), quantized.input_scale, scheme.activations == TOKEN)
        assert torch.equal(multiply(x), expected)


def test_rows_of_zeros_fill_up_what_is_too_short() -> None:
    x = tokens(3)
    codes, scale = peers._quantized(x, None, True, 14)
    plain, plain_scale = peers._quantized(x, None, True, 0)
    assert codes.shape == (17, COLUMNS)
    assert torch.equal(codes[:3], plain)
    assert torch.equal(scale[:3], plain_scale)
    assert not codes[3:].any()


@pytest.mark.parametrize(
    "name, scheme",
    [
        ("torch int4", Scheme(8, 128)),
        ("torch int4", Scheme(4, 16)),
        ("torch int8", Scheme(8, 128)),
        ("torch int8", Scheme(8, -1, symmetric=False)),
        ("torch int8", Scheme(8, -1, activations=TOKEN)),
        ("torch int_mm", Scheme(8, -1)),
        ("torch int_mm", Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit())),
    ],
)
def test_what_a_peer_does_not_do_is_none(name: str, scheme: Scheme) -> None:
    assert peer(name).build(weight(scheme), torch.bfloat16, CPU) is None


def test_a_column_order_is_for_no_peer() -> None:
    plain = weight(Scheme(4, 128))
    order = torch.arange(COLUMNS, dtype=torch.int32) % 2
    ordered = replace(plain, g_idx=order)
    for build in (peers._torch_int4, peers._gemlite, peers._humming, peers._bitsandbytes_nf4):
        assert build(ordered, torch.bfloat16, CPU) is None


def test_a_shape_that_does_not_fit_is_none() -> None:
    assert peer("torch int4").build(weight(Scheme(4, 32), rows=70), torch.bfloat16, CPU) is None
    for rows, columns in ((96, 256), (128, 192)):
        assert peers._humming(weight(Scheme(4, 64), rows, columns), torch.bfloat16, CPU) is None


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes in int32 words, the first in the lowest bits, by shifts on 64 bits."""
    parts = [(words.long() >> (bits * place)) & ((1 << bits) - 1) for place in range(32 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_the_codes_in_rising_order(bits: int) -> None:
    codes = random_codes(6, 64, bits)
    assert torch.equal(unpacked(peers._words(codes, bits), bits), codes)
    assert torch.equal(unpacked(peers._words(codes.t()[:32].t(), bits), bits), codes[:, :32])


class FakeHumming:
    """Takes what ``humming.layer.HummingLayer`` takes, and keeps it."""

    def __init__(self, rows: int, columns: int, weights: dict[str, Any], inputs: Any, torch_dtype: torch.dtype) -> None:
        self.shape, self.weights, self.inputs, self.dtype = (rows, columns), weights, inputs, torch_dtype
        self.transformed = False

    def to(self, device: torch.device) -> FakeHumming:
        return self

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def transform(self) -> None:
        self.transformed = True


@pytest.mark.parametrize("scheme", [Scheme(4, 64, symmetric=False), Scheme(4, -1), Scheme(8, -1, activations=TOKEN)], ids=str)
def test_humming_is_given_the_codes_scales_and_zero_points(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    module: Any = ModuleType("humming.layer")
    module.HummingLayer = FakeHumming
    monkeypatch.setitem(sys.modules, "humming.layer", module)
    quantized = weight(scheme, rows=128)
    layer: Any = peers._humming(quantized, torch.bfloat16, CPU)
    assert layer.transformed
    assert layer.shape == (128, COLUMNS)
    assert layer.weights["dtype"] == f"uint{scheme.bits}"
    assert layer.weights["group_size"] == max(scheme.group_size, 0)
    assert layer.inputs == ({"dtype": "int8"} if scheme.activations else None)
    assert torch.equal(unpacked(layer.tensors["weight"], scheme.bits), quantized.codes)
    assert torch.equal(layer.tensors["weight_scale"], quantized.scale)
    assert ("zero_point" in layer.tensors) is not scheme.symmetric
    if not scheme.symmetric:
        assert torch.equal(unpacked(layer.tensors["zero_point"].t(), 4).t(), quantized.zero)


def test_the_packages_are_named_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert [each.name for each in installed_peers("cuda")] == ["torch int4", "torch int8", "torch int_mm"]
    assert set(missing_peers("cuda")) == {"gemlite", "humming", "bitsandbytes"}
    assert set(missing_peers("cpu")) == {"bitsandbytes"}
    assert all(line.startswith("pip install ") for line in missing_peers("cuda").values())


def test_nothing_is_imported_before_a_weight_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} 1.0")
    monkeypatch.setattr(peers, "import_module", lambda name: pytest.fail(f"imported {name}"))
    found = installed_peers("cuda")
    assert [each.name for each in found[3:]] == ["gemlite", "humming", "bitsandbytes", "bitsandbytes nf4"]
    assert [each.version for each in found[3:5]] == ["gemlite 1.0", "humming-kernels 1.0"]
    assert [each.name for each in found if not each.same_numbers] == ["bitsandbytes nf4"]
    assert [each.name for each in found if not each.graphs] == ["bitsandbytes", "bitsandbytes nf4"]
    assert missing_peers("cuda") == {}


def test_what_kernels_raise_is_caught_with_triton_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="an optional package")
    compiler = pytest.importorskip("triton.compiler.errors")
    assert issubclass(errors.OutOfResources, kernel_errors())
    assert issubclass(compiler.CompilationError, kernel_errors())
    monkeypatch.setitem(sys.modules, "triton.errors", None)
    assert not issubclass(errors.OutOfResources, kernel_errors())
    for usual in (RuntimeError, KeyError, FileNotFoundError, CalledProcessError, ModuleNotFoundError):
        assert issubclass(usual, kernel_errors())
    assert not issubclass(MemoryError, kernel_errors())


def test_an_error_is_told_in_one_line() -> None:
    assert first_line(RuntimeError("\n  no image\nfor this GPU")) == "RuntimeError: no image"
    assert first_line(AssertionError()) == "AssertionError: no message"
    assert len(first_line(ValueError("x" * 1000))) < 300


@pytest.mark.parametrize("scheme", [Scheme(8, -1, activations=TOKEN), Scheme(8, -1, activations=TOKEN, outliers=OutlierSplit())], ids=str)
def test_bitsandbytes_multiplies_with_the_same_codes(scheme: Scheme) -> None:
    pytest.importorskip("bitsandbytes", reason="a peer, installed where it is compared with")
    quantized, x = weight(scheme), tokens(5)
    x[:, 3] = 30.0
    multiply = peer("bitsandbytes").build(quantized, torch.bfloat16, CPU)
    assert multiply is not None
    assert error(multiply(x), quantized, x) < (1e-2 if scheme.outliers else 0.2)
