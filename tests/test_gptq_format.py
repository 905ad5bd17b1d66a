"""GPTQ files: against the vectors and checkpoints of GPTQModel and AutoGPTQ, both directions, and what is refused."""

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
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import ptqcli
from ptqcli.checkpoint.tensors import MemoryTensors
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import Format, LinearSpec
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.formats.gptq import GPTQ, GPTQ_V2
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.numerics.ranges import MinMax
from ptqcli.numerics.scheme import SUPPORTED_BITS, ActivationScheme, Scheme
from ptqcli.numerics.weight import QuantizedWeight, round_to_nearest
from ptqcli.runtime import load_quantized
from ptqcli.runtime.layers import kernels_in

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ["gq_sym4", "gq_asym4_act", "gq_v2_3"]
TOKENS = torch.arange(1, 17).unsqueeze(0)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def assert_same_weight(left: QuantizedWeight, right: QuantizedWeight) -> None:
    assert left.scheme == right.scheme
    for field in ("codes", "scale", "zero", "g_idx"):
        a, b = getattr(left, field), getattr(right, field)
        assert (a is None) == (b is None), field
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), field


# Vectors of the libraries


def golden_cases() -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in json.loads((GOLDEN / "gptq.json").read_text())["cases"]]


def golden(case: Mapping[str, Any], zeros: str = "qzeros") -> dict[str, Tensor]:
    """The tensors of a case as those of the linear ``m``."""
    stored = load_file(GOLDEN / "gptq.safetensors")
    name = case["name"]
    return {f"m.{leaf}": stored[f"{name}.{leaf}"] for leaf in ("qweight", "scales", "g_idx")} | {"m.qzeros": stored[f"{name}.{zeros}"]}


def truth(case: Mapping[str, Any], part: str) -> Tensor:
    return load_file(GOLDEN / "gptq.safetensors")[f"{case['name']}.{part}"]


@pytest.mark.parametrize("case", golden_cases())
@pytest.mark.parametrize(("format_", "zeros"), [(GPTQ_V2, "qzeros"), (GPTQ, "qzeros_v1")], ids=["v2", "v1"])
def test_golden_vectors_are_read(case: dict[str, Any], format_: Format, zeros: str) -> None:
    scheme = Scheme(case["bits"], case["group_size"], case["sym"])
    weight = format_.unpack("m", golden(case, zeros).__getitem__, scheme)
    assert torch.equal(weight.codes.int(), truth(case, "codes").int())
    assert torch.equal(weight.zero.int(), truth(case, "zeros").int())
    assert torch.equal(weight.dequantize(torch.float32), truth(case, "dequantized"))
    assert (weight.g_idx is None) == ("actorder" not in case["name"])


@pytest.mark.parametrize("case", golden_cases())
def test_golden_vectors_are_written(case: dict[str, Any]) -> None:
    scheme = Scheme(case["bits"], case["group_size"], case["sym"])
    weight = GPTQ_V2.unpack("m", golden(case).__getitem__, scheme)
    for format_, zeros in ((GPTQ_V2, "qzeros"), *([(GPTQ, "qzeros_v1"), (GPTQ, "qzeros_v1_autogptq")] if case["sym"] else [])):
        expected = golden(case, zeros)
        for name, tensor in format_.pack("m", weight).items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name]), name


def test_what_the_two_writers_make_of_zero_points_of_0() -> None:
    """Read as GPTQModel reads it, the form of AutoGPTQ has other zero points, in 2, 3 and 4 bits: such a file cannot be told apart."""
    cases = [case.values[0] for case in golden_cases() if case.id.endswith("z0")]  # type: ignore[union-attr]
    same = {}
    for case in cases:
        scheme = Scheme(case["bits"], 32, False)
        read = GPTQ.unpack("m", golden(case, "qzeros_v1_autogptq").__getitem__, scheme)
        same[case["bits"]] = torch.equal(read.zero.int(), truth(case, "zeros").int())
    assert same == {2: False, 3: False, 4: False, 8: True}


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales", "g_idx"])
def test_the_golden_comparison_notices_one_change(leaf: str) -> None:
    case = next(case.values[0] for case in golden_cases() if case.id == "b3_asym_actorder")
    tensors = golden(case)
    if leaf == "g_idx":
        tensors["m.g_idx"] = tensors["m.g_idx"].flip(0)
    else:
        tensors[f"m.{leaf}"].view(torch.uint8)[0, 3] ^= 16
    weight = GPTQ_V2.unpack("m", tensors.__getitem__, Scheme(3, 32, False))
    assert not torch.equal(weight.dequantize(torch.float32), truth(case, "dequantized"))


# The inverse pair


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    bits, size = draw(st.sampled_from(SUPPORTED_BITS)), draw(st.sampled_from([-1, 1, 8, 16, 32, 48, 64]))
    columns = draw(st.integers(1, 3)) * (96 if size == 48 else 64)
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    seed = draw(st.integers(0, 2**31))
    weight = random_weight(Scheme(bits, size, draw(st.booleans())), 32 * draw(st.integers(1, 3)), columns, seed, dtype)
    if weight.scale.shape[1] == 1 or draw(st.booleans()):
        return weight
    groups = weight.scale.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    index = (torch.arange(columns) // (columns // groups)).int()[order]
    return replace(weight, g_idx=None if torch.equal(index, index.sort().values) else index)


@given(weight=weights())
@settings(max_examples=200, deadline=None)
def test_unpack_is_the_inverse_of_pack(weight: QuantizedWeight) -> None:
    for format_ in (GPTQ_V2, *([GPTQ] if weight.scheme.symmetric else [])):
        tensors = format_.pack("a.b", weight)
        assert tuple(tensors) == format_.tensor_names("a.b", weight.scheme)
        assert all(tensor.is_contiguous() for tensor in tensors.values())
        spec = LinearSpec(
            name="a.b", scheme=weight.scheme, out_features=len(weight.codes), in_features=weight.codes.shape[1],
            scale_dtype=weight.scale.dtype,
        )  # fmt: skip
        assert format_.stored_bytes(spec) == sum(tensor.nbytes for tensor in tensors.values())
        assert format_.refusal(spec) is None
        assert_same_weight(format_.unpack("a.b", tensors.__getitem__, weight.scheme), weight)


@given(weight=weights())
@settings(max_examples=50, deadline=None)
def test_the_way_through_compressed_tensors_changes_no_byte(weight: QuantizedWeight) -> None:
    weight = replace(weight, g_idx=None)
    packed = GPTQ_V2.pack("m", weight)
    between = COMPRESSED_TENSORS.pack("m", GPTQ_V2.unpack("m", packed.__getitem__, weight.scheme))
    assert torch.equal(between["m.weight_packed"], packed["m.qweight"].t())
    back = GPTQ_V2.pack("m", COMPRESSED_TENSORS.unpack("m", between.__getitem__, weight.scheme))
    assert all(torch.equal(back[name], tensor) for name, tensor in packed.items())


def test_without_an_index_groups_are_neighbours() -> None:
    weight = random_weight(Scheme(4, 32), 32, 96, dtype=torch.float16)
    tensors = GPTQ.pack("m", weight)
    assert tensors.pop("m.g_idx").tolist() == [column // 32 for column in range(96)]
    assert_same_weight(GPTQ.unpack("m", tensors.__getitem__, weight.scheme), weight)
    assert_same_weight(GPTQ.unpack("m", MemoryTensors(tensors).read, weight.scheme), weight)


# Refusals


def spec_of(scheme: Scheme, rows: int = 64, columns: int = 64, name: str = "m", **others: Any) -> LinearSpec:
    return LinearSpec(name=name, scheme=scheme, out_features=rows, in_features=columns, scale_dtype=torch.float16, **others)


@pytest.mark.parametrize(
    ("format_", "scheme", "rows", "columns", "reason"),
    [
        (GPTQ, Scheme(4, 32, False), 64, 64, "give --format gptq_v2, or --sym"),
        (GPTQ, Scheme(4, 8), 40, 64, "gptq packs multiples of 32, not 40 outputs and 64 inputs"),
        (GPTQ_V2, Scheme(4, 8), 64, 40, "gptq packs multiples of 32, not 64 outputs and 40 inputs"),
        (GPTQ_V2, Scheme(4, 48), 64, 64, "group size 48 does not divide its 64 input features"),
        (GPTQ_V2, Scheme(8, -1, activations=ActivationScheme()), 64, 64, "activations of 16 bits"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(format_: Format, scheme: Scheme, rows: int, columns: int, reason: str) -> None:
    assert reason in str(format_.refusal(spec_of(scheme, rows, columns)))
    if "divide" not in reason:
        with pytest.raises(PTQError, match=f"^m: .*{re.escape(reason)}"):
            format_.pack("m", random_weight(scheme, rows, columns, dtype=torch.float16))


def test_zero_points_of_a_symmetric_weight_are_in_the_middle() -> None:
    weight = random_weight(Scheme(4, 32), 32, 64, dtype=torch.float16)
    weight.zero[3, 1] = 7
    for format_ in (GPTQ, GPTQ_V2):
        with pytest.raises(PTQError, match="m: a symmetric weight has zero points other than 8"):
            format_.pack("m", weight)


def test_scales_that_leave_float16_are_refused_by_name() -> None:
    for sign in (1, -1):
        weight = round_to_nearest(torch.full((32, 64), sign * 2e6), Scheme(4, 32), torch.float16, MinMax())
        with pytest.raises(PTQError, match=r"m: its weights come so close to the end of torch\.float16"):
            GPTQ.pack("m", weight)


def words(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def index(**at: int) -> Tensor:
    found = torch.arange(64, dtype=torch.int32) // 32
    for place, value in at.items():
        found[int(place[1:])] = value
    return found


DAMAGE: dict[str, tuple[Change, str]] = {
    "codes as int64": (lambda t: t.update({"m.qweight": t["m.qweight"].long()}), r"m\.qweight: expected int32"),
    "a row too many": (lambda t: t.update({"m.qweight": words(7, 32)}), r"m\.qweight: expected int32 \[in \* 3 / 32, out\], found int32"),
    "no codes": (lambda t: t.update({"m.qweight": words(0, 32)}), "m: gptq packs multiples of 32, not 32 outputs and 0 inputs"),
    "another width": (lambda t: t.update({"m.qweight": words(6, 30)}), "m: gptq packs multiples of 32, not 30 outputs"),
    "another group size": (lambda t: t.update({"m.scales": torch.ones(4, 32)}), r"m\.scales: expected floating \[2, 32\], found"),
    "a scale of zero": (lambda t: t["m.scales"][0, 0].zero_(), r"m\.scales: holds 0, which is no scale"),
    "an endless weight": (lambda t: t["m.scales"][0, 0].fill_(3e4), r"m\.scales: holds 30000, with which weights leave"),
    "wrong zero points": (lambda t: t.update({"m.qzeros": words(2, 4)}), r"m\.qzeros: expected int32 \[2, 3\], found int32 \[2, 4\]"),
    "a zero point of its own": (lambda t: t["m.qzeros"][0, 0].add_(1), r"m\.qzeros: holds zero points other than 4, .*says sym"),
    "a group that is not there": (lambda t: t.update({"m.g_idx": index(_0=2)}), r"m\.g_idx: holds 2, but there are the groups 0 to 1"),
    "a negative group": (lambda t: t.update({"m.g_idx": index(_5=-1)}), r"m\.g_idx: holds -1, but"),
    "a group too large": (lambda t: t.update({"m.g_idx": index(_0=1)}), r"m\.g_idx: gives group 1 33 columns, not 32"),
    "an index as int64": (lambda t: t.update({"m.g_idx": index().long()}), r"m\.g_idx: expected int32 \[64\], found int64"),
    "an index too short": (lambda t: t.update({"m.g_idx": index()[:-1]}), r"m\.g_idx: expected int32 \[64\], found int32 \[63\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_tensors_are_refused_by_name(kind: str) -> None:
    scheme = Scheme(3, 32)
    refused_when_damaged(GPTQ_V2, scheme, GPTQ_V2.pack("m", random_weight(scheme, 32, 64, dtype=torch.float16)), *DAMAGE[kind])


# What config.json says


ENTRY = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
LAYERS = [f"model.layers.{index}.{name}" for index in range(12) for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]


def schemes(entry: Mapping[str, Any], linears: list[str] = LAYERS, format_: Format = GPTQ) -> dict[str, Scheme]:
    stored = MemoryTensors({f"{name}.qweight": torch.zeros(1) for name in linears})
    return format_.schemes(entry, stored, {name: name for name in [*linears, "lm_head", "model.vision"]})


def test_linears_with_codes_have_the_scheme_of_the_entry() -> None:
    assert schemes(ENTRY) == dict.fromkeys(LAYERS, Scheme(4, 32))
    assert schemes({**ENTRY, "group_size": -1, "bits": 8}) == dict.fromkeys(LAYERS, Scheme(8, -1))
    assert schemes({**ENTRY, "sym": False, "checkpoint_format": "gptq_v2"}, format_=GPTQ_V2) == dict.fromkeys(LAYERS, Scheme(4, 32, False))


def test_the_first_pattern_that_matches_from_the_start_counts() -> None:
    dynamic = {
        r"+:model\.layers\.1\.mlp": {"bits": 8, "group_size": 64},
        r".*\.1\.": {"sym": False},
        r"+:.*\.1\.mlp": {"bits": 2},
        r"layers\.2": {"bits": 2},
        r"-:^lm_head": {},
    }
    found = schemes({**ENTRY, "dynamic": dynamic})
    assert found["model.layers.1.mlp.down_proj"] == Scheme(8, 64)
    assert found["model.layers.1.self_attn.q_proj"] == Scheme(4, 32, False)
    assert found["model.layers.2.mlp.down_proj"] == found["model.layers.11.mlp.down_proj"] == Scheme(4, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "bits 5 are not read; what is read: 2, 3, 4, 8"),
        ({"bits": "4"}, "bits '4' are not read"),
        ({"bits": None}, "bits None are not read"),
        ({"group_size": 0}, "group_size 0 is not read"),
        ({"group_size": True}, "group_size True is not read"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not read; what is read: gptq and gptq_v2"),
        ({"format": "gptq_p", "pack_dtype": "int32"}, "checkpoint_format 'gptq_p' is not read"),
        ({"is_marlin_format": True}, "is_marlin_format True is not read"),
        ({"pack_dtype": "int64"}, "pack_dtype 'int64' is not read"),
        ({"dynamic": {"+:a(": {}}}, "not a regular expression"),
        ({"dynamic": {"+:a": {"bits": 6}}}, "bits 6 are not read"),
        ({"dynamic": {"+:a": {"format": "gptq_p"}}}, "dynamic: '.:a' with .* is not read"),
        ({"dynamic": {"+:a": 4}}, "dynamic: '.:a' with 4 is not read"),
        ({"dynamic": ["a"]}, "dynamic is"),
        ({"dynamic": {r"-:.*\.3\.mlp": {}}}, r"model\.layers\.3\.mlp\.down_proj: has codes in the file, but quantization_config says"),
    ],
)
def test_an_entry_that_is_not_read_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    assert GPTQ.recognises({**ENTRY, **change})
    with pytest.raises(PTQError, match=message) as caught:
        schemes({**ENTRY, **change})
    assert "quantization_config" in str(caught.value)


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_what_must_stand_in_the_entry(key: str) -> None:
    with pytest.raises(PTQError, match=f"lacks {key}"):
        schemes({name: value for name, value in ENTRY.items() if name != key})


def test_the_version_decides_who_reads_it() -> None:
    assert GPTQ.recognises(ENTRY)
    assert not GPTQ_V2.recognises(ENTRY)
    assert GPTQ_V2.recognises({**ENTRY, "checkpoint_format": "gptq_v2"})
    assert GPTQ_V2.recognises({**ENTRY, "format": "gptq_v2"})
    assert GPTQ.recognises({"bits": 4, "group_size": 128, "desc_act": True})  # quantize_config.json of AutoGPTQ
    assert not GPTQ.recognises({"quant_method": "awq", "desc_act": False})
    assert not GPTQ.recognises({})


def entry_for(specs: list[LinearSpec], untouched: list[str], format_: Format = GPTQ) -> dict[str, Any]:
    described = format_.describe(specs, untouched)
    assert described["quantize_config.json"] == described["config.json"]["quantization_config"]
    return described["quantize_config.json"]


def test_one_scheme_for_all() -> None:
    specs = [spec_of(Scheme(4, 128), name=name) for name in LAYERS]
    assert entry_for(specs, ["lm_head", "model.embed_tokens"]) == {
        "quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
        "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip
    moving = entry_for([replace(spec, moving_groups=True) for spec in specs], [], GPTQ_V2)
    assert (moving["desc_act"], moving["checkpoint_format"]) == (True, "gptq_v2")
    with pytest.raises(UsageError, match="no linear layer is quantized"):
        GPTQ.describe([], [])


def test_skipped_linears_are_told_to_every_reader() -> None:
    """Once by the ends of names, where all blocks are alike, and once by whole names."""
    kept = [name for name in LAYERS if "mlp" not in name]
    entry = entry_for([spec_of(Scheme(4, 32), name=name) for name in kept], [name for name in LAYERS if "mlp" in name] + ["lm_head"])
    assert entry["modules_in_block_to_quantize"] == [["self_attn.q_proj", "self_attn.k_proj"]]
    assert next(iter(entry["dynamic"].items())) == (r"-:^model\.layers\.0\.mlp\.down_proj$", {})
    assert len(entry["dynamic"]) == 12
    left = "model.layers.1.mlp.down_proj"
    entry = entry_for([spec_of(Scheme(4, 32), name=name) for name in LAYERS if name != left], [left])
    assert entry["modules_in_block_to_quantize"] == [[name for name in LAYERS if name != left]]
    assert schemes(entry, [name for name in LAYERS if name != left]).keys() == set(LAYERS) - {left}


def test_several_schemes_are_read_back() -> None:
    wanted = {name: Scheme(8, -1) if ".3." in name else Scheme(4, 64, ".4." not in name) for name in LAYERS}
    entry = entry_for([spec_of(scheme, name=name) for name, scheme in wanted.items()], ["lm_head"], GPTQ_V2)
    assert (entry["bits"], entry["group_size"], entry["sym"]) == (4, 64, True)
    whole = {"bits": 8, "group_size": -1, "sym": True}
    assert entry["dynamic"][r"+:^model\.layers\.3\.self_attn\.qkv_proj$"] == whole  # as vLLM calls it
    assert schemes(entry, format_=GPTQ_V2) == wanted


def test_blocks_that_optimum_does_not_know_are_named() -> None:
    specs = [spec_of(Scheme(4, 32), name="backbone.stack.0.proj")]
    assert entry_for(specs, [])["block_name_to_quantize"] == "backbone.stack"
    assert "block_name_to_quantize" not in entry_for([replace(specs[0], aliases=("model.layers.0.proj",))], [])


def test_readers() -> None:
    def refused(*specs: LinearSpec) -> set[str]:
        told = GPTQ_V2.readers(specs, "AutoModelForCausalLM", [])
        assert bool(GPTQ_V2.notes(specs)) == any(reader.refusal for reader in told)
        return {reader.name for reader in told if reader.refusal}

    usual = spec_of(Scheme(4, 32))
    assert refused(usual) == set()
    assert refused(spec_of(Scheme(3, 32))) == refused(spec_of(Scheme(4, 32, False))) == refused(spec_of(Scheme(4, 16))) == {"vLLM"}
    assert refused(replace(usual, moving_groups=True)) == {"vLLM"}
    assert refused(usual, spec_of(Scheme(8, 32))) == {"transformers"}
    assert refused(spec_of(Scheme(4, 8))) == {"transformers", "GPTQModel", "vLLM", "SGLang"}
    assert [note[:10] for note in GPTQ.notes([spec_of(Scheme(4, -1))])] == ["whole rows"]
    assert GPTQ.notes([spec_of(Scheme(8, -1))]) == []
    assert "a.q_proj" in str(GPTQ.fused_refusal({"a.q_proj": Scheme(4, 32), "a.k_proj": None}))


# Whole checkpoints


def decoded(folder: Path, bits: int, first_version: bool) -> dict[str, Tensor]:
    """Every weight of a checkpoint by arithmetic on one long integer a column, float32 [out, in]."""
    tensors = load_file(folder / "model.safetensors")

    def elements(column: Tensor) -> list[int]:
        whole = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(column.tolist()))
        return [(whole >> (bits * e)) & ((1 << bits) - 1) for e in range(len(column) * 32 // bits)]

    found = {}
    for stored in [name for name in tensors if name.endswith(".qweight")]:
        name = stored.removesuffix(".qweight")
        codes = torch.tensor([elements(column) for column in tensors[stored].t()])  # [out, in]
        zero = torch.tensor([elements(row) for row in tensors[f"{name}.qzeros"]]).t() + first_version  # [out, G]
        group = tensors[f"{name}.g_idx"].long()
        found[name] = (codes - zero[:, group]).float() * tensors[f"{name}.scales"].t().float()[:, group]
    return found


def dense(folder: Path, weights: Mapping[str, Tensor]) -> Any:
    """The model of ``folder`` in float32 with these weights."""
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder)).float().eval()
    stored = load_file(folder / "model.safetensors")
    plain = {name: tensor.float() for name, tensor in stored.items() if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))}
    lacking = model.load_state_dict({**plain, **{f"{name}.weight": weight for name, weight in weights.items()}}, strict=False)
    assert set(lacking.missing_keys) <= {"lm_head.weight"}
    assert lacking.unexpected_keys == []
    return model


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found.float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_gptqmodel_run(name: str) -> None:
    """Against their weights decoded by hand, and against the logits of transformers, which ran in bfloat16."""
    folder = GOLDEN / "ckpt" / name
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    model = load_quantized(folder, dtype=torch.float32)
    assert sum(kernels_in(model).values()) == 14
    weights = decoded(folder, config["bits"], config["checkpoint_format"] == "gptq")
    assert relative(logits(model), logits(dense(folder, weights))) < 1e-5
    expected = load_file(GOLDEN / "ckpt" / "expected_logits.safetensors")[name].float()
    assert relative(logits(model), expected) < 0.015


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_comparison_notices_a_misread_checkpoint(tmp_path: Path, name: str) -> None:
    """The twins: the other version, or columns in the groups of their neighbours."""
    folder = shutil.copytree(GOLDEN / "ckpt" / name, tmp_path / name)
    if name == "gq_asym4_act":
        change_tensor(folder, lambda tensors: [tensors.pop(each) for each in list(tensors) if each.endswith(".g_idx")])
    else:
        config = json.loads((folder / "config.json").read_text())
        entry = config["quantization_config"]
        entry.update(checkpoint_format="gptq_v2" if entry["checkpoint_format"] == "gptq" else "gptq", sym=False)
        (folder / "config.json").write_text(json.dumps(config))
    expected = load_file(GOLDEN / "ckpt" / "expected_logits.safetensors")[name].float()
    assert relative(logits(load_quantized(folder, dtype=torch.float32)), expected) > 0.1


def test_old_folders_of_autogptq(tmp_path: Path) -> None:
    """The entry stands in quantize_config.json alone, names no method, and says what the weights are called."""
    source = GOLDEN / "ckpt" / "gq_sym4"
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    entry = {
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "model_file_base_name": "gptq_model-4bit-32g",
        "damp_percent": 0.01,
    }
    (tmp_path / "quantize_config.json").write_text(json.dumps(entry))
    shutil.copy(source / "model.safetensors", tmp_path / "gptq_model-4bit-32g.safetensors")
    assert torch.equal(logits(load_quantized(tmp_path)), logits(load_quantized(source)))
    for base in ("../gptq", "other", 3):
        (tmp_path / "quantize_config.json").write_text(json.dumps({**entry, "model_file_base_name": base}))
        with pytest.raises(PTQError, match=r"holds neither model\.safetensors nor"):
            open_checkpoint(tmp_path)


def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "ckpt" / "gq_sym4", tmp_path / "c")
    change_tensor(folder, lambda tensors: tensors.pop(f"{Q_PROJ}.scales"))
    with pytest.raises(PTQError, match=f"holds no tensor {Q_PROJ}.scales"):
        open_checkpoint(folder)
    change_tensor(folder, lambda tensors: tensors.update({f"{Q_PROJ}.scales": torch.ones(4, 128), f"{Q_PROJ}.bits": torch.ones(1)}))
    with pytest.raises(PTQError, match=f"nothing in the model takes the tensor {Q_PROJ}.bits"):
        open_checkpoint(folder)


def test_a_file_that_was_left_beside_other_weights_says_nothing(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    (tmp_path / "model" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False, "sym": True}))
    with pytest.raises(PTQError, match="has no quantization_config"):
        open_checkpoint(tmp_path / "model")
    assert len(open_checkpoint(quantized(tmp_path, "out", format="gptq")).schemes) == 14


# The whole way


def quantized(folder: Path, name: str, **changes: Any) -> Path:
    ptqcli.quantize(folder / "model", output=folder / name, **{"algo": "rtn", "wbits": 4, "group_size": 32, **changes})
    return folder / name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "bits", "symmetric"), [("gptq", 4, True), ("gptq", 2, True), ("gptq_v2", 3, False), ("gptq_v2", 8, True)])
def test_logits_are_those_of_the_same_codes_in_another_format(
    tmp_path: Path, dtype: torch.dtype, name: str, bits: int, symmetric: bool
) -> None:
    tiny.make_model(tmp_path / "model", dtype=dtype)
    one = quantized(tmp_path, "one", format=name, wbits=bits, symmetric=symmetric)
    other = quantized(tmp_path, "other", wbits=bits, symmetric=symmetric)
    tokens = tiny.token_ids()
    expected = logits(load_quantized(other), tokens)
    assert torch.equal(logits(load_quantized(one), tokens), expected)
    assert load_file(one / "model.safetensors")[f"{Q_PROJ}.scales"].dtype == dtype
    change_tensor(one, lambda tensors: tensors[f"{Q_PROJ}.qweight"][0, 0].bitwise_xor_(1))
    assert not torch.equal(logits(load_quantized(one), tokens), expected)


def test_scales_of_a_float32_model_are_float16_and_its_codes_the_best_for_them(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    folder = quantized(tmp_path, "out", format="gptq", scale_search="minmax")
    checkpoint = open_checkpoint(folder)
    weight = checkpoint.weight(Q_PROJ)
    assert weight.scale.dtype == torch.float16
    assert checkpoint.spec(Q_PROJ).scale_dtype == torch.float16
    dense_weight = model.get_submodule(Q_PROJ).weight.detach()
    assert_same_weight(weight, round_to_nearest(dense_weight, Scheme(4, 32), torch.float16, MinMax()))
    rounded_later = round_to_nearest(dense_weight, Scheme(4, 32), torch.float32, MinMax())
    assert not torch.equal(weight.scale.float(), rounded_later.scale)


def test_groups_that_move_have_a_home(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    text = str(tiny.write_text(tmp_path / "text.txt"))
    asked = {"algo": "gptq", "calib": text, "nsamples": 4, "seqlen": 64, "static_groups": False}
    with pytest.raises(UsageError, match="needs a column index"):
        quantized(tmp_path, "out", **asked)
    folder = quantized(tmp_path, "out", format="gptq", **asked)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["desc_act"] is True
    checkpoint = open_checkpoint(folder)
    index = checkpoint.weight(Q_PROJ).g_idx
    assert index is not None
    assert sorted(index.tolist()) == [column // 32 for column in range(64)]
    expected = logits(dense(folder, decoded(folder, 4, True)))
    assert relative(logits(load_quantized(folder)), expected) < 1e-5
    change_tensor(folder, lambda tensors: [tensors.pop(each) for each in list(tensors) if each.endswith(".g_idx")])
    assert relative(logits(load_quantized(folder)), expected) > 1e-2


def test_a_model_of_odd_widths_is_refused_in_the_plan(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model", intermediate_size=80)
    with pytest.raises(UsageError, match=r"gate_proj: gptq packs multiples of 32, not 80 outputs and 64 inputs"):
        quantized(tmp_path, "out", format="gptq", group_size=16)
    assert not (tmp_path / "out").exists()


def test_mixed_schemes_and_skipped_linears_are_read_back(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    overrides = [{"pattern": r"\.0\..*down_proj", "bits": 8}, {"pattern": r"\.1\..*o_proj", "skip": True}]
    folder = quantized(tmp_path, "out", format="gptq", overrides=overrides)
    found = open_checkpoint(folder).schemes
    assert found["model.layers.0.mlp.down_proj"] == Scheme(8, 32)
    assert "model.layers.1.self_attn.o_proj" not in found
    assert len(found) == 13
    assert logits(load_quantized(folder)).isfinite().all()


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    tiny.make_model(tmp_path / "model")
    one, other = (quantized(tmp_path, name, format="gptq") for name in ("a", "b"))
    third = quantized(tmp_path, "c", format="gptq", wbits=8)
    for file in ("model.safetensors", "config.json", "quantize_config.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
        assert (one / file).read_bytes() != (third / file).read_bytes()
