"""compressed-tensors: against the library's vectors and code, both directions, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import random_codes, random_weight
from torch import Tensor, nn

from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import LinearSpec, bitstream
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.formats.compressed_tensors_config import CONV1D_KEY, OUTLIERS_KEY, quantization_config, schemes_of
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import SUPPORTED_BITS, UNUSUAL_BITS, ActivationScheme, OutlierSplit, Scheme
from ptqcli.numerics.weight import QuantizedWeight

WIDTHS = (*SUPPORTED_BITS, *UNUSUAL_BITS)
GOLDEN = Path(__file__).parent / "golden"


def big_integer_stream(codes: Tensor, bits: int) -> Tensor:
    """The packed rows by arithmetic on one long integer a row."""
    width = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << (bits * e) for e, code in enumerate(row)).to_bytes(4 * width, "little") for row in codes]
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int32).view(len(rows), width)


def assert_same_weight(left: QuantizedWeight, right: QuantizedWeight) -> None:
    assert left.scheme == right.scheme
    pairs = [(getattr(left, field), getattr(right, field)) for field in ("codes", "scale", "zero", "g_idx", "input_scale")]
    assert (left.outliers is None) == (right.outliers is None)
    if left.outliers is not None and right.outliers is not None:
        pairs += [(left.outliers.index, right.outliers.index), (left.outliers.weight, right.outliers.weight)]
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), elements=st.integers(1, 130), seed=st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_bitstream_is_one_long_integer_a_row(bits: int, rows: int, elements: int, seed: int) -> None:
    codes = random_codes(rows, elements, bits, seed)
    words = bitstream.pack(codes, bits)
    assert words.shape == (rows, bitstream.word_count(elements, bits))
    assert torch.equal(words, big_integer_stream(codes, bits))
    assert torch.equal(bitstream.unpack(words, bits, elements), codes)


def test_bitstream_reads_transposed_views() -> None:
    codes = torch.arange(35, dtype=torch.uint8).view(7, 5).t()
    words = bitstream.pack(codes, 8)
    assert torch.equal(bitstream.unpack(words.t().contiguous().t(), 8, 7), codes)


# Words that the library wrote for the first row of the shared integer pattern code[o, i] = (7o + 3i + o*i//5) mod 2^bits.
KNOWN_WORDS = {
    2: "6c6c6c6c 6c6c6c6c",
    3: "98abc398 c398abc3 abc398ab",
    4: "52fc9630 da741eb8 52fc9630 da741eb8",
}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_known_words(bits: int) -> None:
    codes = (3 * torch.arange(32) % (1 << bits)).to(torch.uint8).unsqueeze(0)
    words = bitstream.pack(codes, bits)[0]
    assert " ".join(f"{int(word) & 0xFFFFFFFF:08x}" for word in words) == KNOWN_WORDS[bits]


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    bits = draw(st.sampled_from(WIDTHS))
    group_size = draw(st.sampled_from([-1, 1, 3, 8, 17, 32]))
    columns = draw(st.integers(1, 5)) * (draw(st.integers(1, 40)) if group_size == -1 else group_size)
    scheme = Scheme(bits, group_size, draw(st.booleans()))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return random_weight(scheme, draw(st.integers(1, 40)), columns, draw(st.integers(0, 2**31)), dtype)


TOKEN, TENSOR, STATIC = ActivationScheme(), ActivationScheme(per_token=False), ActivationScheme(per_token=False, dynamic=False)
SPLITS = (None, OutlierSplit(), OutlierSplit(4.5, dynamic=False))


@st.composite
def integer_weights(draw: st.DrawFn) -> QuantizedWeight:
    activations = draw(st.sampled_from([TOKEN, TENSOR, STATIC]))
    split = draw(st.sampled_from(SPLITS)) if activations.dynamic else None
    scheme = Scheme(draw(st.sampled_from(SUPPORTED_BITS)), draw(st.sampled_from([-1, 0])), True, activations, split)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    columns = draw(st.integers(1, 60))
    return random_weight(
        scheme, draw(st.integers(1, 40)), columns, draw(st.integers(0, 2**31)), dtype, outliers=draw(st.integers(0, columns))
    )


@given(weight=st.one_of(weights(), integer_weights()))
@settings(max_examples=400, deadline=None)
def test_unpack_is_the_inverse_of_pack(weight: QuantizedWeight) -> None:
    tensors = COMPRESSED_TENSORS.pack("a.b", weight)
    assert tuple(tensors) == COMPRESSED_TENSORS.tensor_names("a.b", weight.scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same_weight(COMPRESSED_TENSORS.unpack("a.b", tensors.__getitem__, weight.scheme), weight)


def golden_cases() -> list[Any]:
    cases = json.loads((GOLDEN / "ct_pack_quantized.json").read_text())["cases"]
    return [pytest.param(case, id=case_id(case)) for case in cases if case["num_bits"] in WIDTHS]


def case_id(case: dict[str, Any]) -> str:
    return f"b{case['num_bits']}_{'sym' if case['symmetric'] else 'asym'}_{case['strategy']}"


@pytest.mark.parametrize("case", golden_cases())
def test_golden_vectors_both_ways(case: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    stored = load_file(GOLDEN / "ct_pack_quantized.safetensors")
    prefix = case_id(case)
    scheme = Scheme(case["num_bits"], case["group_size"] or -1, case["symmetric"])
    weight = COMPRESSED_TENSORS.unpack(prefix, stored.__getitem__, scheme)
    assert torch.equal(weight.codes.int() - scheme.middle, stored[f"{prefix}.q_signed"].int())
    if not scheme.symmetric:
        assert torch.equal(weight.zero.int() - scheme.middle, stored[f"{prefix}.zero_point_signed"].int())
    assert torch.equal(weight.dequantize(), stored[f"{prefix}.dequantized"])
    packed = COMPRESSED_TENSORS.pack(prefix, weight)
    for name, tensor in packed.items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize("field", ["codes", "scale", "zero"])
def test_golden_comparison_notices_one_change(field: str) -> None:
    """The twin: with one code, scale or zero point moved, neither the values nor the bytes agree."""
    from safetensors.torch import load_file

    stored = load_file(GOLDEN / "ct_pack_quantized.safetensors")
    prefix = "b3_asym_group"
    weight = COMPRESSED_TENSORS.unpack(prefix, lambda name: stored[name].clone(), Scheme(3, 32, False))
    changed = getattr(weight, field)
    changed[5, 1] = (changed[5, 1] + 1) % 8
    assert not torch.equal(weight.dequantize(), stored[f"{prefix}.dequantized"])
    packed = COMPRESSED_TENSORS.pack(prefix, weight)
    assert sum(not torch.equal(tensor, stored[name]) for name, tensor in packed.items()) == 1


def library_weight(tensors: dict[str, Tensor], name: str, scheme: Scheme) -> Tensor:
    """One linear as compressed-tensors itself decompresses it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    group = quantization_config({name: scheme}, [])["config_groups"]["group_0"]
    local = {stored.rpartition(".")[2]: tensor for stored, tensor in tensors.items()}
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    weight: Tensor = compressor.decompress(local, QuantizationScheme.model_validate(group))["weight"]
    return weight


@pytest.mark.parametrize(("case", "group_size"), [("w8_sym_channel", -1), ("w8_sym_tensor", 0)])
def test_golden_integers_both_ways(case: str, group_size: int) -> None:
    """Scales, codes and values as the library computed them from a float weight, and the bytes back."""
    from safetensors.torch import load_file

    golden = load_file(GOLDEN / "ct_int_quantized.safetensors")
    scheme = Scheme(8, group_size, activations=TOKEN)
    weight = COMPRESSED_TENSORS.unpack(case, golden.__getitem__, scheme)
    assert torch.equal(weight.dequantize(), golden[f"{case}.dequantized"])
    grid = MinMax(signed=False).fit(golden["input_weight"], scheme, torch.float32)
    assert torch.equal(grid.scale, weight.scale)
    assert torch.equal(grid.nearest(golden["input_weight"]), weight.codes.float())
    packed = COMPRESSED_TENSORS.pack(case, weight)
    assert list(packed) == [f"{case}.weight", f"{case}.weight_scale"]
    for name, tensor in packed.items():
        assert tensor.dtype == golden[name].dtype
        assert torch.equal(tensor, golden[name]), name
    weight.codes[5, 1] ^= 1
    assert not torch.equal(weight.dequantize(), golden[f"{case}.dequantized"])
    assert not torch.equal(COMPRESSED_TENSORS.pack(case, weight)[f"{case}.weight"], golden[f"{case}.weight"])


@pytest.mark.parametrize("shape", [(1,), (1, 1), ()])
def test_one_scale_for_the_matrix_in_any_shape(shape: tuple[int, ...]) -> None:
    weight = random_weight(Scheme(8, 0, activations=TOKEN), 5, 7)
    tensors = COMPRESSED_TENSORS.pack("m", weight)
    tensors["m.weight_scale"] = tensors["m.weight_scale"].reshape(shape)
    assert_same_weight(COMPRESSED_TENSORS.unpack("m", tensors.__getitem__, weight.scheme), weight)


def test_integers_are_signed_bytes_at_every_width() -> None:
    codes = torch.tensor([[0, 7, 8, 15]], dtype=torch.uint8)
    scheme = Scheme(4, -1, activations=STATIC)
    ones = torch.ones(1, 1)
    weight = QuantizedWeight(
        codes=codes, scale=ones, zero=torch.full((1, 1), 8, dtype=torch.uint8), scheme=scheme, input_scale=torch.ones(1)
    )
    tensors = COMPRESSED_TENSORS.pack("m", weight)
    assert tensors["m.weight"].dtype == torch.int8
    assert tensors["m.weight"].tolist() == [[-8, -1, 0, 7]]
    assert list(tensors) == ["m.weight", "m.weight_scale", "m.input_scale"]


def test_stored_linears_of_both_formats() -> None:
    schemes = {
        "a.p": Scheme(4, 32, symmetric=False),
        "a.i": Scheme(8, -1, activations=STATIC),
        "o": Scheme(8, 0, True, TOKEN, OutlierSplit()),
    }
    names = [name for linear, scheme in schemes.items() for name in COMPRESSED_TENSORS.tensor_names(linear, scheme)]
    plain = ["a.norm.weight", "a.i.bias", "head.weight"]
    assert sorted(COMPRESSED_TENSORS.stored_linears(sorted([*names, *plain]))) == sorted(schemes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_library_reads_what_is_packed(bits: int, symmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    require_dense_packing(bits)
    weight = random_weight(Scheme(bits, group_size, symmetric), 24, 96, dtype=dtype)
    tensors = COMPRESSED_TENSORS.pack("m", weight)
    assert torch.equal(library_weight(tensors, "m", weight.scheme), weight.dequantize())
    tensors["m.weight_packed"][3, 2] ^= 1
    assert not torch.equal(library_weight(tensors, "m", weight.scheme), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 0])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_the_library_reads_integers(bits: int, group_size: int, dtype: torch.dtype) -> None:
    pytest.importorskip("compressed_tensors")
    weight = random_weight(Scheme(bits, group_size, activations=TOKEN), 24, 97, dtype=dtype)
    tensors = COMPRESSED_TENSORS.pack("m", weight)
    assert torch.equal(library_weight(tensors, "m", weight.scheme), weight.dequantize())
    tensors["m.weight"][3, 2] ^= 1
    assert not torch.equal(library_weight(tensors, "m", weight.scheme), weight.dequantize())


def require_dense_packing(bits: int) -> None:
    version = pytest.importorskip("compressed_tensors").__version__
    if bits in (3, 5, 6, 7) and tuple(map(int, version.split(".")[:2])) < (0, 18):
        pytest.skip(f"compressed-tensors {version} packs 3 bits in the older layout")


@pytest.mark.parametrize("folder", ["ct_w4_sym_g32", "ct_w4_asym_g32", "ct_w3_sym_g32", "ct_w8a8_dyn", "ct_w8a8_static", "ct_mixed"])
def test_checkpoints_written_by_the_library(folder: str) -> None:
    path = GOLDEN / "ckpt" / folder
    reader = SafetensorsFolder(path)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    linears = set(COMPRESSED_TENSORS.stored_linears(reader.names))
    assert linears == {name.removesuffix("_scale").removesuffix(".weight") for name in reader.names if name.endswith("weight_scale")}
    schemes = schemes_of(config, [*linears, "lm_head"])
    assert schemes.keys() == linears
    for name, scheme in schemes.items():
        require_dense_packing(scheme.bits)
        weight = COMPRESSED_TENSORS.unpack(name, reader.read, scheme)
        tensors = {stored: reader.read(stored) for stored in COMPRESSED_TENSORS.tensor_names(name, scheme)}
        assert torch.equal(weight.dequantize(), library_weight(tensors, name, scheme))
        for stored, tensor in COMPRESSED_TENSORS.pack(name, weight).items():
            assert torch.equal(tensor, tensors[stored])


def broken(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = COMPRESSED_TENSORS.pack("m", random_weight(Scheme(3, 32, symmetric=False), 16, 64))
    change(tensors)
    return tensors


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "older 3-bit layout": (
        lambda t: t.update({"m.weight_packed": torch.zeros(16, 7, dtype=torch.int32)}),
        r"m\.weight_packed: expected int32 \[16, 6\], found int32 \[16, 7\]; .*before 0\.18",
    ),
    "codes as int64": (
        lambda t: t.update({"m.weight_packed": t["m.weight_packed"].long()}),
        r"m\.weight_packed: expected int32",
    ),
    "another group size": (
        lambda t: t.update({"m.weight_scale": torch.ones(16, 4)}),
        r"m\.weight_scale: expected floating \[16, 2\], found float32 \[16, 4\]",
    ),
    "integer scales": (
        lambda t: t.update({"m.weight_scale": torch.ones(16, 2, dtype=torch.int32)}),
        r"m\.weight_scale: expected floating \[16, 2\], found int32",
    ),
    "unpacked zero points": (
        lambda t: t.update({"m.weight_zero_point": torch.zeros(16, 2, dtype=torch.int8)}),
        r"m\.weight_zero_point: expected int32 \[2, 2\], found int8 \[16, 2\]",
    ),
    "shape with three numbers": (
        lambda t: t.update({"m.weight_shape": torch.tensor([1, 2, 3])}),
        r"m\.weight_shape: expected two integers",
    ),
    "shape that the group does not divide": (
        lambda t: t.update({"m.weight_shape": torch.tensor([16, 65])}),
        "m: group size 32 does not divide its 65 input features",
    ),
    "negative shape": (
        lambda t: t.update({"m.weight_shape": torch.tensor([-16, 64])}),
        "m: a matrix of -16 x 64 has no weights",
    ),
}


def broken_integers(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = COMPRESSED_TENSORS.pack("m", random_weight(Scheme(4, -1, True, TOKEN, OutlierSplit()), 16, 64))
    change(tensors)
    return tensors


def columns(*index: int) -> Tensor:
    return torch.tensor(index, dtype=torch.int32)


INTEGER_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "unsigned codes": (
        lambda t: t.update({"m.weight": torch.zeros(16, 64, dtype=torch.uint8)}),
        r"m\.weight: expected int8 codes \[out, in\], found uint8 \[16, 64\]",
    ),
    "flat codes": (lambda t: t.update({"m.weight": torch.zeros(64, dtype=torch.int8)}), r"m\.weight: expected int8 codes"),
    "no codes": (lambda t: t.update({"m.weight": torch.zeros(16, 0, dtype=torch.int8)}), "m: a matrix of 16 x 0 has no weights"),
    "too large": (lambda t: t["m.weight"][2, 3].fill_(8), r"m\.weight: holds codes outside of 4 bits"),
    "too small": (lambda t: t["m.weight"][2, 3].fill_(-9), r"m\.weight: holds codes outside of 4 bits"),
    "groups": (
        lambda t: t.update({"m.weight_scale": torch.ones(16, 2)}),
        r"m\.weight_scale: expected floating \[16, 1\], found float32 \[16, 2\]",
    ),
    "one scale": (lambda t: t.update({"m.weight_scale": torch.ones(1)}), r"m\.weight_scale: expected floating \[16, 1\]"),
    "column beyond": (
        lambda t: t.update({"m.outlier_index": columns(1, 2, 64)}),
        r"m\.outlier_index: expected rising columns below 64",
    ),
    "negative column": (lambda t: t.update({"m.outlier_index": columns(-1, 2, 3)}), r"m\.outlier_index: expected rising columns"),
    "a column twice": (lambda t: t.update({"m.outlier_index": columns(1, 2, 2)}), r"m\.outlier_index: expected rising columns"),
    "falling columns": (lambda t: t.update({"m.outlier_index": columns(1, 3, 2)}), r"m\.outlier_index: expected rising columns"),
    "index as int64": (lambda t: t.update({"m.outlier_index": columns(1, 2, 3).long()}), r"m\.outlier_index: expected int32"),
    "other columns": (
        lambda t: t.update({"m.outlier_index": columns(1, 2)}),
        r"m\.outlier_weight: expected floating \[16, 2\], found float32 \[16, 3\]",
    ),
    "integer columns": (
        lambda t: t.update({"m.outlier_weight": torch.ones(16, 3, dtype=torch.int8)}),
        r"m\.outlier_weight: expected floating \[16, 3\], found int8",
    ),
}


@pytest.mark.parametrize("kind", INTEGER_DAMAGE)
def test_damaged_integers_are_named(kind: str) -> None:
    change, message = INTEGER_DAMAGE[kind]
    with pytest.raises(PTQError, match=message):
        COMPRESSED_TENSORS.unpack("m", broken_integers(change).__getitem__, Scheme(4, -1, True, TOKEN, OutlierSplit()))


def test_a_damaged_input_scale_is_named() -> None:
    scheme = Scheme(8, 0, activations=STATIC)
    tensors = COMPRESSED_TENSORS.pack("m", random_weight(scheme, 5, 7))
    tensors["m.input_scale"] = torch.ones(7)
    with pytest.raises(PTQError, match=r"m\.input_scale: expected floating \[1\], found float32 \[7\]"):
        COMPRESSED_TENSORS.unpack("m", tensors.__getitem__, scheme)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors_are_named(kind: str) -> None:
    change, message = DAMAGE[kind]
    with pytest.raises(PTQError, match=message):
        COMPRESSED_TENSORS.unpack("m", broken(change).__getitem__, Scheme(3, 32, symmetric=False))


def spec(scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype = torch.float32, **more: Any) -> LinearSpec:
    sizes = {"out_features": out_features, "in_features": in_features}
    return LinearSpec(**{"name": "m", "scheme": scheme, "scale_dtype": dtype, **sizes, **more})


@given(weight=st.one_of(weights(), integer_weights()))
@settings(max_examples=300, deadline=None)
def test_stored_bytes_are_those_of_the_packed_tensors(weight: QuantizedWeight) -> None:
    tensors = COMPRESSED_TENSORS.pack("m", weight)
    expected = sum(tensor.nbytes for name, tensor in tensors.items() if ".outlier_" not in name)
    assert COMPRESSED_TENSORS.stored_bytes(spec(weight.scheme, *weight.codes.shape, weight.scale.dtype)) == expected


def test_what_cannot_be_held_is_refused() -> None:
    grouped, row = Scheme(4, 32), Scheme(4, -1)
    assert COMPRESSED_TENSORS.refusal(spec(grouped, 8, 64)) is None
    assert COMPRESSED_TENSORS.refusal(spec(row, 8, 65, moving_groups=True)) is None
    assert "does not divide its 65" in str(COMPRESSED_TENSORS.refusal(spec(grouped, 8, 65)))
    assert "static groups" in str(COMPRESSED_TENSORS.refusal(spec(grouped, 8, 64, moving_groups=True)))
    weight = random_weight(grouped, 8, 64)
    moved = replace(weight, g_idx=torch.arange(64).int() % 2)
    with pytest.raises(PTQError, match="layer: act-order"):
        COMPRESSED_TENSORS.pack("layer", moved)


def test_a_symmetric_weight_with_other_zero_points_is_refused() -> None:
    weight = random_weight(Scheme(4, 32), 8, 64)
    weight.zero[3, 1] = 7
    with pytest.raises(PTQError, match="layer: a symmetric weight has zero points other than 8"):
        COMPRESSED_TENSORS.pack("layer", weight)


def test_parts_that_do_not_go_with_the_scheme_are_refused() -> None:
    split = random_weight(Scheme(8, -1, True, TOKEN, OutlierSplit()), 5, 7)
    static = random_weight(Scheme(8, 0, activations=STATIC), 5, 7)
    message = "layer: the input scale or the outlier columns do not go with its scheme"
    for wrong in (
        replace(split, outliers=None),
        replace(split, scheme=static.scheme, scale=static.scale),
        replace(split, scheme=Scheme(8, -1, activations=TOKEN)),
        replace(static, input_scale=None),
        replace(static, scheme=Scheme(8, 0, activations=TENSOR)),
    ):
        with pytest.raises(PTQError, match=message):
            COMPRESSED_TENSORS.pack("layer", wrong)
    static.scale[2] *= 2
    with pytest.raises(PTQError, match="layer: a weight with one scale for the whole matrix has several"):
        COMPRESSED_TENSORS.pack("layer", static)


def test_sums_that_32_bits_cannot_hold_are_refused() -> None:
    scheme = Scheme(8, -1, activations=TOKEN)
    assert COMPRESSED_TENSORS.refusal(spec(scheme, 8, (1 << 17) - 1, moving_groups=True)) is None
    assert "can exceed 32 bits" in str(COMPRESSED_TENSORS.refusal(spec(scheme, 8, 1 << 17)))
    assert COMPRESSED_TENSORS.refusal(spec(Scheme(8, -1), 8, 1 << 17)) is None


# The entry in config.json.


class TinyModel(nn.Module):
    """Names and classes as in a transformers model, for compressed-tensors' own matching."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q_proj", "k_proj", "up", "down")}) for _ in range(2)
        )
        self.embed = nn.Embedding(8, 64)
        self.lm_head = nn.Linear(64, 8)


LINEARS = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "k_proj", "up", "down")] + ["lm_head"]


def library_schemes(config: dict[str, Any]) -> dict[str, Scheme]:
    """Which linear gets which scheme when compressed-tensors itself applies ``config`` to a model."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = TinyModel()
    quantization.apply_quantization_config(model, quantization.QuantizationConfig.model_validate(config), show_progress=False)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme"):
            weights, inputs = module.quantization_scheme.weights, module.quantization_scheme.input_activations
            activations = inputs and ActivationScheme(inputs.num_bits, inputs.strategy == "token", inputs.dynamic)
            group_size = {"channel": -1, "tensor": 0}.get(weights.strategy, weights.group_size)
            found[name] = Scheme(weights.num_bits, group_size, weights.symmetric, activations)
    return found


W4, W8, W2 = Scheme(4, 32), Scheme(8, -1), Scheme(2, 64, symmetric=False)
W8A8, W4A8 = Scheme(8, -1, activations=TOKEN), Scheme(4, -1, activations=TOKEN)
W8A8_TENSOR, W8A8_STATIC = Scheme(8, 0, activations=TENSOR), Scheme(8, 0, activations=STATIC)
LLM_INT8 = Scheme(8, -1, True, TOKEN, OutlierSplit())


def test_one_scheme_targets_the_class() -> None:
    schemes = {name: W4 for name in LINEARS if "down" not in name and name != "lm_head"}
    ignored = [name for name in LINEARS if name not in schemes]
    config = quantization_config(schemes, ignored)
    assert config["quantization_status"] == "compressed"
    assert config["format"] == "pack-quantized"
    assert [group["targets"] for group in config["config_groups"].values()] == [["Linear"]]
    assert schemes_of(config, LINEARS) == schemes
    assert library_schemes(config) == schemes
    assert json.loads(json.dumps(config)) == config


def test_several_schemes_target_names() -> None:
    schemes = {name: {"q": W8, "k": W8, "u": W2, "d": W4}[name[9]] for name in LINEARS[:-1]}
    del schemes["layers.1.up"]
    config = quantization_config(schemes, ["layers.1.up", "lm_head"])
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(schemes)
    assert schemes_of(config, LINEARS) == schemes
    assert library_schemes(config) == schemes


@pytest.mark.parametrize("scheme", [W8A8, W4A8, W8A8_TENSOR, W8A8_STATIC, Scheme(8, -1, activations=STATIC)], ids=str)
def test_schemes_with_activations(scheme: Scheme) -> None:
    schemes = dict.fromkeys(LINEARS[:-1], scheme)
    config = quantization_config(schemes, ["lm_head"])
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "int-quantized"
    assert schemes_of(config, LINEARS) == schemes
    assert library_schemes(config) == schemes
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(("folder", "scheme"), [("ct_w8a8_dyn", W8A8), ("ct_w8a8_static", W8A8_STATIC)])
def test_the_entry_is_the_one_that_the_library_writes(folder: str, scheme: Scheme) -> None:
    theirs = json.loads((GOLDEN / "ckpt" / folder / "config.json").read_text())["quantization_config"]
    ours = quantization_config({"a": scheme}, ["lm_head"])
    assert ours == {key: value for key, value in theirs.items() if key != "moe_sparsity_config"}


def test_formats_differ_between_groups() -> None:
    schemes = {name: {"q": W8A8, "k": W8A8, "u": W2, "d": W4}[name[9]] for name in LINEARS[:-1]}
    config = quantization_config(schemes, ["lm_head"])
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["int-quantized", "pack-quantized", "pack-quantized"]
    assert schemes_of(config, LINEARS) == schemes
    assert library_schemes(config) == schemes


@pytest.mark.parametrize("split", [OutlierSplit(), OutlierSplit(0.125, dynamic=False)], ids=str)
def test_an_outlier_split_makes_the_library_stop(split: OutlierSplit) -> None:
    """It would leave the 16-bit columns out of the product."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = Scheme(8, -1, True, TOKEN, split)
    config = quantization_config({"a": scheme, "b": W8A8}, ["lm_head"])
    with pytest.raises(ValueError, match=OUTLIERS_KEY):
        quantization.QuantizationConfig.model_validate(config)
    assert schemes_of(json.loads(json.dumps(config)), ["a", "b", "lm_head"]) == {"a": scheme, "b": W8A8}


def test_nothing_quantized_is_refused() -> None:
    with pytest.raises(UsageError, match="no linear layer"):
        COMPRESSED_TENSORS.describe([], LINEARS)


def test_conv1d_makes_the_library_stop() -> None:
    """Without the extra key compressed-tensors passes over Conv1D, and transformers leaves it with random weights."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    linear = spec(W4, 96, 32, kind="Conv1D", name="h.0.c_attn")
    config = COMPRESSED_TENSORS.describe([linear], ["lm_head"])["config.json"]["quantization_config"]
    with pytest.raises(ValueError, match=CONV1D_KEY):
        quantization.QuantizationConfig.model_validate(config)
    assert schemes_of(config, ["h.0.c_attn", "lm_head"]) == {"h.0.c_attn": W4}


def written(groups: dict[str, tuple[list[str], Scheme]], ignore: list[str] | None) -> dict[str, Any]:
    """An entry as llm-compressor writes it."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    schemes = {
        name: quantization.QuantizationScheme(
            targets=targets,
            format="pack-quantized" if scheme.activations is None else "naive-quantized",
            weights=quantization.QuantizationArgs(
                num_bits=scheme.bits,
                symmetric=scheme.symmetric,
                group_size=scheme.group_size or None,
                actorder="static" if scheme.group_size else None,
                observer="mse",
            ),
            input_activations=scheme.activations
            and quantization.QuantizationArgs(
                strategy="token" if scheme.activations.per_token else "tensor",
                dynamic=scheme.activations.dynamic,
                observer=None if scheme.activations.dynamic else "minmax",
            ),
        )
        for name, (targets, scheme) in groups.items()
    }
    config = quantization.QuantizationConfig(
        config_groups=schemes, quantization_status="compressed", format="mixed-precision", ignore=ignore
    )
    dumped: dict[str, Any] = json.loads(config.model_dump_json())
    return dumped


MATCHING: dict[str, tuple[dict[str, tuple[list[str], Scheme]], list[str] | None]] = {
    "class": ({"group_0": (["Linear"], W4)}, ["lm_head"]),
    "class without ignore": ({"group_0": (["Linear"], W4)}, None),
    "regex": ({"group_0": (["re:.*_proj$"], W4)}, []),
    "regex is matched from the start": ({"group_0": (["re:up"], W4), "group_1": (["re:layers.0.up"], W8)}, []),
    "ignored by regex": ({"group_0": (["Linear"], W4)}, ["re:.*down", "lm_head"]),
    "name before regex before class": (
        {
            "group_0": (["Linear"], W4),
            "group_1": (["re:layers.1.*"], W8),
            "group_2": (["layers.1.up"], W2),
        },
        ["lm_head"],
    ),
    "two regexes": ({"group_0": (["re:.*up"], W4), "group_1": (["re:.*1.*"], W8)}, []),
    "two regexes, written the other way": ({"group_0": (["re:.*1.*"], W8), "group_1": (["re:.*up"], W4)}, []),
    "one target in two groups": ({"group_0": (["Linear"], W4), "group_1": (["Linear"], W8)}, ["lm_head"]),
    "activations": ({"group_0": (["re:.*_proj"], W8A8), "group_1": (["re:.*up"], W8A8_STATIC), "group_2": (["Linear"], W4)}, ["lm_head"]),
    "activations per tensor": ({"group_0": (["Linear"], W8A8_TENSOR), "group_1": (["re:.*down"], W4A8)}, ["lm_head"]),
    "ignored class": ({"group_0": (["re:.*"], W4)}, ["Linear"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", MATCHING)
def test_targets_match_as_in_the_library(kind: str) -> None:
    config = written(*MATCHING[kind])
    if kind == "regex is matched from the start":
        assert schemes_of(config, LINEARS) == {"layers.0.up": W8}
    assert schemes_of(config, LINEARS) == library_schemes(config)


def changed(path: str, value: Any, scheme: Scheme = W4) -> dict[str, Any]:
    config = copy.deepcopy(quantization_config({"a": scheme}, []))
    *parents, leaf = path.split("/")
    place = config
    for parent in parents:
        place = place[parent]
    place[leaf] = value
    return config


INPUTS = "config_groups/group_0/input_activations"
WEIGHTS = "config_groups/group_0/weights"
REFUSED: dict[str, tuple[str, Any, str]] = {
    "not compressed": ("quantization_status", "frozen", "quantization_status is 'frozen'"),
    "status missing": ("quantization_status", None, "quantization_status is None"),
    "kv cache": ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme is not supported"),
    "rotations": ("transform_config", {"config_groups": {}}, "transform_config is not supported"),
    "sparsity": ("sparsity_config", {"format": "sparse-24"}, "sparsity_config with format 'sparse-24'"),
    "activations": (INPUTS, {"num_bits": 8}, "group_0: input_activations are read in format int-quantized, not in pack-quantized"),
    "outputs": ("config_groups/group_0/output_activations", {"num_bits": 8}, "group_0: output_activations are not read"),
    "unknown key": ("config_groups/group_0/rotation", "R1", "group_0: the key rotation is not read"),
    "int-quantized": ("config_groups/group_0/format", "int-quantized", "group_0: format int-quantized without input_activations"),
    "another format": ("config_groups/group_0/format", "float-quantized", "group_0: format 'float-quantized' is not read"),
    "float": (f"{WEIGHTS}/type", "float", "weights with type 'float' are not read"),
    "dynamic": (f"{WEIGHTS}/dynamic", True, "weights with dynamic True are not read"),
    "act-order": (f"{WEIGHTS}/actorder", "group", "weights with actorder 'group' are not read"),
    "act-order as a flag": (f"{WEIGHTS}/actorder", True, "weights with actorder True are not read"),
    "per tensor": (f"{WEIGHTS}/strategy", "tensor", "strategy 'tensor'"),
    "block": (f"{WEIGHTS}/strategy", "block", "strategy 'block'"),
    "group without a size": (f"{WEIGHTS}/group_size", None, "group_size None"),
    "group of none": (f"{WEIGHTS}/group_size", 0, "group_size 0"),
    "4.0 bits": (f"{WEIGHTS}/num_bits", 4.0, "group_0: weights with num_bits 4.0 are not read"),
    "symmetric as text": (f"{WEIGHTS}/symmetric", "no", "group_0: weights with symmetric 'no' are not read"),
    "9 bits": (f"{WEIGHTS}/num_bits", 9, "group_0: 9 bits per weight is not supported"),
    "preset": ("config_groups", {"W4A16": ["Linear"]}, "W4A16: names a preset"),
    "no weights": (WEIGHTS, None, "malformed"),
    "groups as a list": ("config_groups", [], "malformed"),
    "bad regex": ("ignore", ["re:("], "is not a regular expression"),
    "targets of a wrong type": ("config_groups/group_0/targets", 3, "targets is 3, not a list of names"),
}
REFUSED_INTEGERS: dict[str, tuple[str, Any, str]] = {
    "4-bit inputs": (f"{INPUTS}/num_bits", 4, "group_0: input_activations with num_bits 4 are not read"),
    "float inputs": (f"{INPUTS}/type", "float", "input_activations with type 'float' are not read"),
    "asymmetric inputs": (f"{INPUTS}/symmetric", False, "input_activations with symmetric False are not read"),
    "inputs in groups": (f"{INPUTS}/strategy", "group", "input_activations with strategy 'group' are not read"),
    "local inputs": (f"{INPUTS}/dynamic", "local", "input_activations with dynamic 'local' are not read"),
    "static tokens": (f"{INPUTS}/dynamic", False, "group_0: activation scales fixed by calibration are per tensor"),
    "inputs as text": (INPUTS, "int8", "malformed"),
    "asymmetric weights": (f"{WEIGHTS}/symmetric", False, "weights beside input_activations with symmetric False are not read"),
    "grouped weights": (f"{WEIGHTS}/strategy", "group", "weights with strategy 'group', group_size None are not read"),
    "packed": ("config_groups/group_0/format", "pack-quantized", "input_activations are read in format int-quantized"),
    "no inputs": (INPUTS, None, "format int-quantized without input_activations is not read; expected pack-quantized"),
    "no threshold": (f"config_groups/group_0/{OUTLIERS_KEY}", {"dynamic": True}, "malformed"),
    "negative threshold": (
        f"config_groups/group_0/{OUTLIERS_KEY}",
        {"threshold": -1.0, "dynamic": True},
        "group_0: outlier threshold -1.0 is not valid",
    ),
}


@pytest.mark.parametrize("kind", REFUSED_INTEGERS)
def test_activations_that_are_not_read_are_refused_by_name(kind: str) -> None:
    path, value, message = REFUSED_INTEGERS[kind]
    with pytest.raises(PTQError, match=message) as caught:
        schemes_of(changed(path, value, W8A8), ["a"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read_is_refused_by_name(kind: str) -> None:
    path, value, message = REFUSED[kind]
    with pytest.raises(PTQError, match=message) as caught:
        schemes_of(changed(path, value), ["a"])
    assert "\n" not in str(caught.value)


def test_a_missing_strategy_is_told_by_the_group_size() -> None:
    for size, expected in ((-1, -1), (32, 32)):
        config = changed("config_groups/group_0/weights/group_size", size)
        del config["config_groups"]["group_0"]["weights"]["strategy"]
        assert schemes_of(config, ["a"]) == {"a": Scheme(4, expected)}


# What its readers cannot do.


def test_linears_run_as_one_matrix_need_one_scheme() -> None:
    alike = {"a.q_proj": W4, "a.k_proj": W4, "a.v_proj": W4}
    assert COMPRESSED_TENSORS.fused_refusal(alike) is None
    assert COMPRESSED_TENSORS.fused_refusal(dict.fromkeys(alike)) is None
    assert COMPRESSED_TENSORS.fused_refusal({**alike, "a.v_proj": W8}) == (
        f"a.q_proj ({W4}) and a.v_proj ({W8}) read the same input and are run as one matrix by vLLM; "
        "give them the same scheme, or leave all of them as they are"
    )
    assert "a.k_proj (left as it is)" in str(COMPRESSED_TENSORS.fused_refusal({**alike, "a.k_proj": None}))


NOTED: dict[str, tuple[list[tuple[Scheme, str]], list[str]]] = {
    "symmetric weights": ([(W4, "Linear"), (W8, "Linear")], []),
    "asymmetric": (
        [(W2, "Linear")],
        ["asymmetric: vLLM reads it; transformers needs CompressedTensorsConfig(dequantize=True)", "from 0.33 on"],
    ),
    "per token": ([(W8A8, "Linear")], []),
    "per tensor": ([(W8A8_TENSOR, "Linear")], ["activations scaled per tensor at run time"]),
    "4 bits per token": ([(W4A8, "Linear")], ["4-bit codes beside 8-bit activations take a byte each"]),
    "2 bits per token": ([(replace(W4A8, bits=2), "Linear")], ["2-bit codes", "vLLM reads only 4 bits"]),
    "outliers": ([(LLM_INT8, "Linear")], ["outlier columns: only ptqcli reads them"]),
    "Conv1D": ([(W4, "Conv1D")], ["Conv1D layers: ptqcli and vLLM read them"]),
    "asymmetric, in two schemes": (
        [(replace(W4, symmetric=False), "Linear"), (W8, "Linear")],
        ["asymmetric: vLLM reads it; transformers from 5.23 on does not"],
    ),
}


@pytest.mark.parametrize("kind", NOTED)
def test_a_user_hears_what_a_reader_cannot_do(kind: str) -> None:
    linears, beginnings = NOTED[kind]
    found = COMPRESSED_TENSORS.notes([spec(scheme, 64, 128, kind=of) for scheme, of in linears])
    assert len(found) == len(beginnings)
    assert all(beginning in note for beginning, note in zip(beginnings, found, strict=True))
