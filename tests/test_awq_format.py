"""AWQ files: against the vectors of AutoAWQ, both directions, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Change, random_weight, refused_when_damaged
from packed import change_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

import ptqcli
from ptqcli.checkpoint.tensors import MemoryTensors
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import Format, LinearSpec
from ptqcli.formats.awq import AWQ, AWQ_GEMV
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.numerics.scheme import ActivationScheme, Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.runtime import load_quantized

GOLDEN = Path(__file__).parent / "golden"
Q_PROJ = "model.layers.0.self_attn.q_proj"
# Column of an output in its word, from the lowest bits up, as AutoAWQ lists them.
PLACES = [0, 2, 4, 6, 1, 3, 5, 7]


def assert_same_weight(left: QuantizedWeight, right: QuantizedWeight) -> None:
    assert left.scheme == right.scheme
    for field in ("codes", "scale", "zero"):
        a, b = getattr(left, field), getattr(right, field)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), field
    assert left.g_idx is None
    assert right.g_idx is None


# Vectors of the library


def golden_cases() -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in json.loads((GOLDEN / "awq_gemm.json").read_text())["cases"]]


def golden(case: Mapping[str, Any], layout: str = "") -> dict[str, Tensor]:
    """The tensors of a case as those of the linear ``m``. layout: "gemv_" for that of vectors."""
    stored = load_file(GOLDEN / "awq_gemm.safetensors")
    return {f"m.{leaf}": stored[f"{case['name']}.{layout}{leaf}"] for leaf in ("qweight", "qzeros", "scales")}


def scheme_of(case: Mapping[str, Any]) -> Scheme:
    return Scheme(4, case["group_size"], case["name"].startswith("sym"))


@pytest.mark.parametrize("case", golden_cases())
@pytest.mark.parametrize(("format_", "layout"), [(AWQ, ""), (AWQ_GEMV, "gemv_")], ids=["gemm", "gemv"])
def test_golden_vectors_are_read(case: dict[str, Any], format_: Format, layout: str) -> None:
    stored = load_file(GOLDEN / "awq_gemm.safetensors")
    weight = format_.unpack("m", golden(case, layout).__getitem__, scheme_of(case))
    assert torch.equal(weight.codes.int(), stored[f"{case['name']}.codes"].int())
    assert torch.equal(weight.zero.int(), stored[f"{case['name']}.zeros"].int())
    assert torch.equal(weight.dequantize(torch.float32), stored[f"{case['name']}.dequantized"])


@pytest.mark.parametrize("case", golden_cases())
def test_golden_vectors_are_written(case: dict[str, Any]) -> None:
    expected = golden(case)
    weight = AWQ.unpack("m", expected.__getitem__, scheme_of(case))
    for name, tensor in AWQ.pack("m", weight).items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    weight.codes[5, 1] ^= 4
    assert not torch.equal(AWQ.pack("m", weight)["m.qweight"], expected["m.qweight"])


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("layout", ["", "gemv_"])
def test_the_golden_comparison_notices_one_change(leaf: str, layout: str) -> None:
    case = golden_cases()[0].values[0]
    tensors = golden(case, layout)
    tensors[f"m.{leaf}"].view(torch.uint8)[0, 0] ^= 16
    weight = (AWQ_GEMV if layout else AWQ).unpack("m", tensors.__getitem__, scheme_of(case))
    assert not torch.equal(weight.dequantize(torch.float32), load_file(GOLDEN / "awq_gemm.safetensors")[f"{case['name']}.dequantized"])


# The inverse pair


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    size = draw(st.sampled_from([-1, 1, 3, 16, 32, 64]))
    columns = draw(st.integers(1, 3)) * (draw(st.integers(1, 50)) if size == -1 else size)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    scheme = Scheme(4, size, draw(st.booleans()))
    return random_weight(scheme, 8 * draw(st.integers(1, 9)), columns, draw(st.integers(0, 2**31)), dtype)


@given(weight=weights())
@settings(max_examples=200, deadline=None)
def test_unpack_is_the_inverse_of_pack(weight: QuantizedWeight) -> None:
    tensors = AWQ.pack("a.b", weight)
    assert tuple(tensors) == AWQ.tensor_names("a.b", weight.scheme)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    rows, columns = weight.codes.shape
    spec = LinearSpec(name="a.b", scheme=weight.scheme, out_features=rows, in_features=columns, scale_dtype=weight.scale.dtype)
    assert AWQ.stored_bytes(spec) == sum(tensor.nbytes for tensor in tensors.values())
    assert AWQ.refusal(spec) is None
    assert_same_weight(AWQ.unpack("a.b", tensors.__getitem__, weight.scheme), weight)


@given(weight=weights())
@settings(max_examples=30, deadline=None)
def test_every_element_stands_where_the_formula_says(weight: QuantizedWeight) -> None:
    tensors = AWQ.pack("m", weight)
    for leaf, values in (("qweight", weight.codes), ("qzeros", weight.zero)):
        words = tensors[f"m.{leaf}"]
        for place, offset in enumerate(PLACES):
            assert torch.equal((words >> (4 * place)) & 15, values[offset::8].t().int())


@given(weight=weights())
@settings(max_examples=30, deadline=None)
def test_the_way_through_compressed_tensors_changes_no_byte(weight: QuantizedWeight) -> None:
    packed = AWQ.pack("m", weight)
    between = COMPRESSED_TENSORS.pack("m", AWQ.unpack("m", packed.__getitem__, weight.scheme))
    back = AWQ.pack("m", COMPRESSED_TENSORS.unpack("m", between.__getitem__, weight.scheme))
    assert all(torch.equal(back[name], tensor) for name, tensor in packed.items())


# Refusals


def spec_of(scheme: Scheme, rows: int = 64, columns: int = 64, name: str = "m", **others: Any) -> LinearSpec:
    return LinearSpec(name=name, scheme=scheme, out_features=rows, in_features=columns, scale_dtype=torch.float16, **others)


@pytest.mark.parametrize(
    ("scheme", "rows", "columns", "reason"),
    [
        (Scheme(3, 32), 64, 64, "awq holds 4-bit weights with activations of 16 bits, not w3a16-g32"),
        (Scheme(8, -1, activations=ActivationScheme()), 64, 64, "not w8a8"),
        (Scheme(4, 32), 60, 64, "awq packs multiples of 8 outputs, not 60"),
        (Scheme(4, 48), 64, 64, "group size 48 does not divide its 64 input features"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(scheme: Scheme, rows: int, columns: int, reason: str) -> None:
    assert reason in str(AWQ.refusal(spec_of(scheme, rows, columns)))
    if "divide" not in reason:
        with pytest.raises(PTQError, match=f"^m: .*{re.escape(reason)}"):
            AWQ.pack("m", random_weight(scheme, rows, columns, dtype=torch.float16))


def test_groups_that_move_are_refused_by_name() -> None:
    assert "needs a column index" in str(AWQ.refusal(spec_of(Scheme(4, 32), moving_groups=True)))
    weight = replace(random_weight(Scheme(4, 32), 8, 64, dtype=torch.float16), g_idx=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(PTQError, match="needs a column index, which awq cannot hold"):
        AWQ.pack("m", weight)


def test_the_layout_for_vectors_is_read_only() -> None:
    assert AWQ_GEMV.refusal(spec_of(Scheme(4, 32))) == "awq_gemv is read, not written; give --format awq"
    with pytest.raises(PTQError, match="m: awq_gemv is read, not written"):
        AWQ_GEMV.pack("m", random_weight(Scheme(4, 32), 8, 64, dtype=torch.float16))


def test_one_file_has_one_group_size_and_names_that_hold_no_other() -> None:
    one, other = (spec_of(Scheme(4, size), name=f"m.{size}") for size in (32, 64))
    assert AWQ.joint_refusal([one, replace(one, scheme=Scheme(4, 32, False))], []) is None
    assert "one group size for all linears, not 32 (m.32) and 64 (m.64)" in str(AWQ.joint_refusal([one, other], []))
    clash = AWQ.joint_refusal([spec_of(Scheme(4, 32), name="a.gate_proj")], ["lm_head", "a.gate"])
    assert clash == "readers of awq files would leave a.gate_proj as it is, like a.gate, which its name holds; give --format gptq"


def words(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


DAMAGE: dict[str, tuple[Change, str]] = {
    "codes as int64": (lambda t: t.update({"m.qweight": t["m.qweight"].long()}), r"m\.qweight: expected an int32 matrix, found int64"),
    "codes in a row": (lambda t: t.update({"m.qweight": words(256)}), r"m\.qweight: expected an int32 matrix, found int32 \[256\]"),
    "no codes": (lambda t: t.update({"m.qweight": words(0, 4)}), "m: awq packs multiples of 8 outputs"),
    "too few inputs": (lambda t: t.update({"m.qweight": words(63, 4)}), "m: group size 32 does not divide its 63 input features"),
    "another group size": (lambda t: t.update({"m.scales": torch.ones(4, 32)}), r"m\.scales: expected floating \[2, 32\], found float32"),
    "a scale of zero": (lambda t: t["m.scales"][0, 0].zero_(), r"m\.scales: holds 0, which is no scale"),
    "wrong zero points": (lambda t: t.update({"m.qzeros": words(2, 3)}), r"m\.qzeros: expected int32 \[2, 4\], found int32 \[2, 3\]"),
    "a zero point of its own": (lambda t: t["m.qzeros"][0, 0].add_(1), r"m\.qzeros: holds zero points other than 8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors_are_refused_by_name(kind: str) -> None:
    scheme = Scheme(4, 32)
    refused_when_damaged(AWQ, scheme, AWQ.pack("m", random_weight(scheme, 32, 64, dtype=torch.float16)), *DAMAGE[kind])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"m.scales": t["m.scales"][:, :-1]}), r"m\.scales: expected floating \[32, 32\], found float16 \[32, 31\]"),
        (lambda t: t.update({"m.qzeros": words(32, 0)}), r"m\.qzeros: expected int32 \[32, 1\], found int32 \[32, 0\]"),
        (lambda t: t.update({"m.qzeros": words(31, 4)}), r"m\.qzeros: expected int32 \[32, 4\], found int32 \[31, 4\]"),
        (lambda t: t["m.scales"][0, 0].zero_(), r"m\.scales: holds 0, which is no scale"),
    ],
)
def test_damaged_tensors_of_the_layout_for_vectors(change: Change, message: str) -> None:
    case = golden_cases()[0].values[0]
    refused_when_damaged(AWQ_GEMV, scheme_of(case), golden(case, "gemv_"), change, message)


# What config.json says

ENTRY = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
OLD = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}


def stored(symmetric: bool = True) -> MemoryTensors:
    return MemoryTensors(AWQ.pack("a", random_weight(Scheme(4, 32, symmetric), 32, 64, dtype=torch.float16)))


@pytest.mark.parametrize("entry", [ENTRY, OLD, {**ENTRY, "dynamic": {"-:^lm_head$": {}}}])
def test_symmetric_weights_are_told_by_their_zero_points(entry: dict[str, Any]) -> None:
    assert AWQ.recognises(entry)
    for symmetric in (True, False):
        assert AWQ.schemes(entry, stored(symmetric), {"x.a": "a", "lm_head": "lm_head"}) == {"x.a": Scheme(4, 32, symmetric)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "bits 8 are not read; AWQ has 4"),
        ({"bits": True}, "bits True are not read"),
        ({"group_size": 0}, "group_size 0 is not read"),
        ({"group_size": None}, "group_size None is not read"),
        ({"version": "marlin"}, "version 'marlin' is not read; what is read: gemm and gemv"),
        ({"version": "gemv_fast"}, "version 'gemv_fast' is not read"),
        ({"version": 3}, "version 3 is not read"),
        ({"dynamic": {"+:a": {"group_size": 64}}}, "dynamic .* is not read"),
        ({"dynamic": 3}, "dynamic 3 is not read"),
    ],
)
def test_an_entry_that_is_not_read_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    assert AWQ.recognises({**ENTRY, **change})
    with pytest.raises(PTQError, match=f"quantization_config: {message}"):
        AWQ.schemes({**ENTRY, **change}, stored(), {"a": "a"})


def test_the_layout_decides_who_reads_it() -> None:
    assert AWQ_GEMV.recognises({**ENTRY, "version": "GEMV"})
    assert not AWQ.recognises({**ENTRY, "version": "GEMV"})
    assert not AWQ_GEMV.recognises(ENTRY)
    assert not AWQ.recognises({**ENTRY, "quant_method": "gptq"})
    assert not AWQ.recognises({})


def test_what_is_written() -> None:
    specs = [spec_of(Scheme(4, 32), name=f"model.layers.{index}.q") for index in range(2)]
    described = AWQ.describe(specs, ["lm_head", "model.layers.0.o"])
    assert described["quantize_config.json"] == described["config.json"]["quantization_config"]
    assert described["quantize_config.json"] == {
        **ENTRY,
        "modules_to_not_convert": ["lm_head", "model.layers.0.o"],
        "dynamic": {r"-:^model\.layers\.0\.o$": {}},
    }
    assert AWQ.describe(specs, [])["quantize_config.json"] == {**ENTRY, "modules_to_not_convert": None}
    with pytest.raises(UsageError, match="no linear layer is quantized"):
        AWQ.describe([], [])


def test_readers() -> None:
    for size, refusing, noted in (
        (128, set(), ""),
        (16, set(), ""),
        (-1, set(), "whole"),
        (8, {"transformers", "GPTQModel"}, "groups of 8"),
    ):
        specs = [spec_of(Scheme(4, size))]
        assert {reader.name for reader in AWQ.readers(specs, "AutoModelForCausalLM", []) if reader.refusal} == refusing
        assert [note[: len(noted)] for note in AWQ.notes(specs)] == ([noted] if noted else [])
    assert "a.q_proj" in str(AWQ.fused_refusal({"a.q_proj": Scheme(4, 32), "a.k_proj": None}))


# The whole way


def quantized(folder: Path, name: str, **changes: Any) -> Path:
    ptqcli.quantize(folder / "model", output=folder / name, **{"algo": "rtn", "wbits": 4, "group_size": 32, **changes})
    return folder / name


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = load_quantized(folder)(tiny.token_ids()).logits
    return found.float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_logits_are_those_of_the_same_codes_in_another_format(tmp_path: Path, dtype: torch.dtype, symmetric: bool) -> None:
    tiny.make_model(tmp_path / "model", dtype=dtype)
    one = quantized(tmp_path, "one", format="awq", symmetric=symmetric)
    other = quantized(tmp_path, "other", symmetric=symmetric)
    expected = logits(other)
    assert torch.equal(logits(one), expected)
    assert open_checkpoint(one).schemes == open_checkpoint(other).schemes
    assert load_file(one / "model.safetensors")[f"{Q_PROJ}.scales"].dtype == dtype
    change_tensor(one, lambda tensors: tensors[f"{Q_PROJ}.qweight"][0, 0].bitwise_xor_(1))
    assert not torch.equal(logits(one), expected)


def test_scales_of_a_float32_model_are_float16(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    folder = quantized(tmp_path, "out", format="awq", overrides=[{"pattern": r"\.1\..*o_proj", "skip": True}])
    assert load_file(folder / "model.safetensors")[f"{Q_PROJ}.scales"].dtype == torch.float16
    assert len(open_checkpoint(folder).schemes) == 13
    assert logits(folder).isfinite().all()


def test_several_group_sizes_are_refused_in_the_plan(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    with pytest.raises(UsageError, match="awq has one group size for all linears"):
        quantized(tmp_path, "out", format="awq", overrides=[{"pattern": "o_proj", "group_size": 16}])
    assert not (tmp_path / "out").exists()


def test_old_folders_of_autoawq(tmp_path: Path) -> None:
    """The entry stands in quant_config.json alone, under other keys."""
    tiny.make_model(tmp_path / "model", dtype=torch.float16)
    folder = quantized(tmp_path, "out", format="awq")
    expected = logits(folder)
    (folder / "quantize_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PTQError, match="has no quantization_config"):
        open_checkpoint(folder)
    (folder / "quant_config.json").write_text(json.dumps(OLD))
    assert torch.equal(logits(folder), expected)


def test_a_folder_in_the_layout_for_vectors_runs(tmp_path: Path) -> None:
    """The same weights, laid out by hand as AutoAWQ pads them."""
    tiny.make_model(tmp_path / "model", dtype=torch.float16)
    folder = quantized(tmp_path, "out", format="awq", symmetric=False)
    other = Path(shutil.copytree(folder, tmp_path / "gemv"))
    checkpoint = open_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in checkpoint.schemes:
        weight = checkpoint.weight(name)
        rows, groups = weight.scale.shape
        padded_scale, padded_zero = torch.zeros(rows, 32, dtype=torch.float16), torch.zeros(rows, 32, dtype=torch.uint8)
        padded_scale[:, :groups], padded_zero[:, :groups] = weight.scale, weight.zero
        shifts = 4 * torch.arange(8)
        for leaf, values in (("qweight", weight.codes), ("qzeros", padded_zero)):
            tensors[f"{name}.{leaf}"] = (values.long().view(rows, -1, 8) << shifts).sum(2).to(torch.uint32).view(torch.int32)
        tensors[f"{name}.scales"] = padded_scale
    save_file(tensors, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (other / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(other), logits(folder))
