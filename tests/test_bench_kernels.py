"""Kernel benchmarks: what is timed is what it claims to be, on the same numbers for all; errors and sizes beside an independent count."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from packed import write_checkpoint
from torch import Tensor, nn
from torch.nn import functional

from ptqcli.bench import contenders, linears, timing
from ptqcli.bench.contenders import OUTLIER_SIZE, dense_weight, prepare, random_inputs, random_weight, rows_of, stored_bytes
from ptqcli.bench.linears import KernelPoint, bench_kernels
from ptqcli.bench.machine import Machine
from ptqcli.bench.peers import Peer
from ptqcli.bench.shapes import MODELS, Shape, named_shapes, shapes_of
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.compressed_tensors import COMPRESSED_TENSORS
from ptqcli.numerics.scheme import EXAMPLES, Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.runtime import quantized_linear

CPU = torch.device("cpu")
SMALL = Shape("small", 256, 64, 3)
MACHINE = Machine(
    name="a machine",
    device="cpu",
    threads=1,
    cache_bytes=1 << 20,
    bandwidth=1e10,
    arithmetic={"float32": 1e11, "bfloat16": 2e11, "int8": 4e11},
)
NEAR = 4e-3  # of 16-bit products
ROUNDED_INPUTS = 2e-2  # 8-bit activations


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few copies are enough."""
    monkeypatch.setattr(timing, "cache_bytes", lambda _device: 1 << 15)


def scheme_of(name: str) -> Scheme:
    """The scheme called ``name`` of a linear that groups of 128 divide."""
    return Scheme.parse(name).resolved(128)


def bench(scheme: str, tokens: list[int], peers: tuple = (), shape: Shape = SMALL, **options) -> tuple[list[KernelPoint], list[str]]:
    return bench_kernels([(shape, scheme_of(scheme))], tokens, "cpu", MACHINE, peers=peers, seconds=1e-3, **options)


def by_name(points: list[KernelPoint]) -> dict[str, KernelPoint]:
    return {point.name: point for point in points}


def peer(build: Callable, name: str = "peer", same_numbers: bool = True, graphs: bool = True) -> Peer:
    return Peer(name=name, version="1", build=build, same_numbers=same_numbers, graphs=graphs)


def plain(weight: QuantizedWeight, dtype: torch.dtype, _device: torch.device) -> Callable[[Tensor], Tensor]:
    dense = weight.dequantize(dtype)
    return lambda x: functional.linear(x, dense)


# Weights in the linears of the blocks, in billions, as their publishers count them: without embeddings (Qwen, Gemma), or all of the
# model's less vocabulary times hidden size, twice where the head is not tied.
PUBLISHED = {
    "llama2-7b": 6.738 - 2 * 32000 * 4096e-9,
    "llama3-8b": 8.030 - 2 * 128256 * 4096e-9,
    "llama3-70b": 70.554 - 2 * 128256 * 8192e-9,
    "llama3.2-1b": 1.236 - 128256 * 2048e-9,
    "llama3.2-3b": 3.213 - 128256 * 3072e-9,
    "qwen2.5-7b": 6.53,
    "qwen3-0.6b": 0.44,
    "qwen3-4b": 3.6,
    "qwen3-8b": 6.95,
    "qwen3-14b": 13.2,
    "qwen3-32b": 31.2,
    "mistral-7b": 7.242 - 2 * 32000 * 4096e-9,
    "gemma3-4b": 3.209,
    "gemma3-12b": 10.759,
    "gemma3-27b": 25.600,
    "phi4": 14.66 - 2 * 100352 * 5120e-9,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_known_by_name_have_as_many_weights_as_published(name: str) -> None:
    weights = sum(shape.count * shape.in_features * shape.out_features for shape in named_shapes(name))
    assert weights * 1e-9 == pytest.approx(PUBLISHED[name], rel=0.015)


def test_llama_3_8b_is_as_its_fused_linears_run() -> None:
    assert named_shapes(" Llama3-8B ") == [
        Shape("qkv", 4096, 6144, 32),
        Shape("o", 4096, 4096, 32),
        Shape("gate_up", 4096, 28672, 32),
        Shape("down", 14336, 4096, 32),
    ]


def test_shapes_can_be_listed_input_first() -> None:
    assert named_shapes("4096x14336, 64x32,4096x14336") == [Shape("4096x14336", 4096, 14336, 2), Shape("64x32", 64, 32, 1)]


@pytest.mark.parametrize("text", ["llama9", "4096", "4096x", "0x12", "12x34,", "", "4096x4096,llama3-8b"])
def test_other_shapes_are_refused_with_the_names_that_there_are(text: str) -> None:
    with pytest.raises(UsageError, match=r"no known model and no list .* llama3-8b, .*mistral-7b"):
        named_shapes(text)


def write_model(folder: Path, schemes: Callable[[str], Scheme | None] | None = None) -> Path:
    """A folder with a tiny model, its linears packed in the schemes that are chosen for them."""
    model = tiny.make_model(folder / "model")
    if schemes is None:
        return folder / "model"
    write_checkpoint(folder / "packed", model, schemes)
    return folder / "packed"


def test_a_checkpoint_lists_the_matrices_that_its_runtime_multiplies_by(tmp_path: Path) -> None:
    wide, narrow = scheme_of("w8a8"), scheme_of("w4a16-g32")

    def choose(name: str) -> Scheme | None:
        return None if "lm_head" in name or "v_proj" in name else wide if "down" in name or "layers.0.mlp.up" in name else narrow

    assert shapes_of(write_model(tmp_path, choose)) == [
        (Shape("q_proj+k_proj", 64, 96, 2), narrow),
        (Shape("o_proj", 64, 64, 2), narrow),
        (Shape("gate_proj", 64, 128, 1), narrow),
        (Shape("up_proj", 64, 128, 1), wide),
        (Shape("down_proj", 128, 64, 2), wide),
        (Shape("gate_proj+up_proj", 64, 256, 1), narrow),
    ]


def test_a_model_that_is_not_quantized_has_none(tmp_path: Path) -> None:
    with pytest.raises(PTQError, match="so the model is not quantized"):
        shapes_of(write_model(tmp_path))


INTEGERS = [name for name in EXAMPLES if Scheme.parse(name).codebook is None and Scheme.parse(name).blocks is None]
EVERY_SCHEME = [*INTEGERS, "w2a16-g32", "w3a16-asym", "w4a8", "w8a8-static", "w8a8-tensor"]


@pytest.mark.parametrize("name", EVERY_SCHEME)
def test_random_weights_are_as_a_checkpoint_could_hold_them_and_as_large(name: str) -> None:
    scheme = scheme_of(name)
    x = random_inputs(5, SMALL.in_features, torch.bfloat16, CPU, scheme)
    weight = random_weight(SMALL, scheme, x)
    packed = COMPRESSED_TENSORS.pack("m", weight)
    read = COMPRESSED_TENSORS.unpack("m", packed.__getitem__, scheme)
    assert torch.equal(read.dequantize(), weight.dequantize())
    assert weight.codes.unique().tolist() == list(range(scheme.levels))
    assert stored_bytes(weight) == sum(tensor.nbytes for tensor in packed.values())
    assert 0.2 < functional.linear(x, weight.dequantize()).float().std() < 100


@pytest.mark.parametrize("name", ["w4a16-g64-asym", "w8a8-tensor", "llm-int8", "llm-int8-static"])
def test_weights_are_expanded_block_by_block_to_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "ROWS_AT_ONCE", 24)
    scheme = scheme_of(name)
    weight = random_weight(SMALL, scheme, random_inputs(5, SMALL.in_features, torch.bfloat16, CPU, scheme))
    assert torch.equal(dense_weight(weight, torch.float32), weight.dequantize(torch.float32))
    rows = torch.tensor([3, 0, 63])
    assert torch.equal(rows_of(weight, rows).dequantize(torch.float64), weight.dequantize(torch.float64)[rows])


def test_inputs_have_both_signs_and_outliers_only_where_the_scheme_splits_them_off() -> None:
    usual = random_inputs(64, 128, torch.bfloat16, CPU, scheme_of("w8a8"))
    split = random_inputs(64, 128, torch.bfloat16, CPU, scheme_of("llm-int8"))
    assert usual.float().mean().abs() < 0.1
    assert usual.float().std() == pytest.approx(1, abs=0.1)
    assert (split.float().std(dim=0) > OUTLIER_SIZE / 2).sum() == contenders.OUTLIER_COLUMNS
    assert not (usual == 0).any()


@pytest.mark.parametrize("name", EVERY_SCHEME)
def test_every_scheme_is_timed_beside_both_baselines_with_errors_of_their_arithmetic(name: str) -> None:
    points, failures = bench(name, [1, 5])
    assert failures == []
    assert [point.tokens for point in points] == [1, 1, 1, 5, 5, 5]
    for exact, rounded, ours in (points[:3], points[3:]):
        assert [exact.name, rounded.name] == ["float32", "bfloat16"]
        assert [point.kind for point in (exact, rounded, ours)] == ["baseline", "baseline", "ours"]
        assert 0 < exact.error < 1e-5 < 1e-4 < rounded.error < NEAR
        assert 1e-4 < ours.error < (NEAR if scheme_of(name).activations is None else ROUNDED_INPUTS)
        assert {point.scheme for point in (exact, rounded, ours)} == {str(scheme_of(name))}


def test_ours_is_named_for_its_method_and_what_it_runs_on() -> None:
    assert bench("w4a16", [1], kernel="reference")[0][2].name == "W4A16 reference"
    assert bench("w4a8", [1], kernel="reference")[0][2].name == "W4A8 reference"
    assert bench("llm-int8", [1], kernel="reference")[0][2].name == "LLM.int8 reference"


def test_a_kernel_that_cannot_do_the_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match="kernel triton cannot run it"):
        bench("w4a16", [1], kernel="triton")


def test_numbers_of_a_point_follow_from_its_times() -> None:
    points = by_name(bench("w4a16", [7], kernel="reference")[0])
    ours, plain32, plain16 = points["W4A16 reference"], points["float32"], points["bfloat16"]
    assert ours.ratio == {name: points[name].microseconds / ours.microseconds for name in ("float32", "bfloat16")}
    assert plain16.ratio["bfloat16"] == 1
    assert ours.graph_microseconds is None
    assert ours.graph_ratio == {}
    assert ours.low <= ours.microseconds <= ours.high
    weights, moved = 256 * 64, 7 * (256 + 64)
    assert [plain32.bytes, plain16.bytes, ours.bytes] == [
        4 * (weights + moved),
        2 * (weights + moved),
        weights // 2 + 64 * 2 * 2 + 2 * 8 + 2 * moved,  # codes, scales, the shape as two int64
    ]
    assert {point.operations for point in points.values()} == {2 * 7 * weights}
    assert ours.bandwidth_share == pytest.approx(ours.bytes / (ours.microseconds * 1e-6) / 1e10)
    assert ours.arithmetic_share == pytest.approx(ours.operations / (ours.microseconds * 1e-6) / 2e11)
    assert plain32.arithmetic_share == pytest.approx(plain32.operations / (plain32.microseconds * 1e-6) / 1e11)
    integers = by_name(bench("w8a8", [7], kernel="reference")[0])["W8A8 reference"]
    assert integers.arithmetic_share == pytest.approx(integers.operations / (integers.microseconds * 1e-6) / 4e11)
    json.dumps(asdict(ours))


def test_a_share_above_one_is_shown_as_it_is() -> None:
    slow = replace(MACHINE, bandwidth=1.0, arithmetic=dict.fromkeys(MACHINE.arithmetic, 1.0))
    points, _ = bench_kernels([(SMALL, scheme_of("w4a16"))], [1], "cpu", slow, seconds=1e-3)
    assert all(point.bandwidth_share > 1 and point.arithmetic_share > 1 for point in points)


def test_one_wrong_code_shows_in_the_error() -> None:
    def wrong(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
        weight.codes[17, 100] ^= 8
        return plain(weight, dtype, device)

    points, failures = bench("w4a16", [4], (peer(plain, "right"), peer(wrong, "wrong")))
    errors = {name: point.error for name, point in by_name(points).items()}
    assert failures == []
    assert errors["right"] == errors["bfloat16"] < NEAR < errors["wrong"]


def test_all_rows_of_a_small_matrix_and_a_sample_of_a_large_one_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(linears, "_exact", lambda x, weight: seen.append(len(weight.codes)) or torch.ones(len(x), len(weight.codes)))
    bench("w4a16", [2])
    bench("w4a16", [2], shape=Shape("large", 128, 1000, 1))
    assert seen == [64, 64]


def test_the_truth_is_the_float64_product_whatever_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "TOKENS_AT_ONCE", 3)
    scheme = scheme_of("w4a16-g64-asym")
    x = random_inputs(8, 256, torch.bfloat16, CPU, scheme)
    weight = random_weight(SMALL, scheme, x)
    groups = torch.arange(256) // 64
    dense = (weight.codes.double() - weight.zero.double()[:, groups]) * weight.scale.double()[:, groups]
    torch.testing.assert_close(linears._exact(x, weight), x.double() @ dense.t(), rtol=1e-12, atol=1e-12)


def test_all_have_the_same_input() -> None:
    seen: list[Tensor] = []

    def watching(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
        multiply = plain(weight, dtype, device)
        return lambda x: seen.append(x) or multiply(x)

    bench("w4a16", [2, 9], (peer(watching, "a"), peer(watching, "b")))
    expected = random_inputs(9, 256, torch.bfloat16, CPU, scheme_of("w4a16"))
    assert {len(x) for x in seen} == {2, 9}
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, expected[: len(x)]) for x in seen)


def test_no_two_copies_share_memory() -> None:
    keeping = peer(lambda weight, _dtype, _device: SimpleNamespace(tensors=[weight.codes, weight.scale, weight.zero]), "keeping")
    scheme = scheme_of("llm-int8")
    lineup = prepare(SMALL, scheme, 4, CPU, torch.bfloat16, "reference", [keeping])
    for each in lineup.contenders:
        assert len(each.copies) == timing.copies(each.weight_bytes, CPU, 1 << 40) >= 2
        held = [set(map(Tensor.data_ptr, _tensors(copied))) for copied in each.copies]
        assert all(one and not one & other for one, other in combinations(held, 2))


def _tensors(copied: object) -> list[Tensor]:
    if isinstance(copied, nn.Module):
        return [tensor for tensor in [*copied.parameters(), *copied.buffers()] if tensor.numel()]
    return copied.keywords.values() if hasattr(copied, "keywords") else copied.tensors


def test_a_peer_that_does_not_do_the_scheme_is_left_out_and_one_that_fails_is_named() -> None:
    def refusing(*_arguments: object) -> None:
        return None

    def broken(*_arguments: object) -> None:
        raise RuntimeError("no kernel image\nis available")

    def failing(_weight: QuantizedWeight, _dtype: torch.dtype, _device: torch.device) -> Callable[[Tensor], Tensor]:
        def multiply(x: Tensor) -> Tensor:
            assert len(x) < 3, "too many tokens"
            return x.new_zeros(len(x), 64)

        return multiply

    peers = (peer(refusing, "refusing"), peer(broken, "broken"), peer(failing, "failing"), peer(lambda *_: lambda x: x[:, :9], "narrow"))
    points, failures = bench("w4a16", [2, 3], peers)
    assert [point.name for point in points if point.kind == "peer"] == ["failing"]
    assert failures == [
        "broken: w4a16-g128, small (256 x 64): RuntimeError: no kernel image",
        "narrow: w4a16-g128, small, 2 tokens: ValueError: returned [2, 9] instead of [2, 64]",
        "failing: w4a16-g128, small, 3 tokens: AssertionError: too many tokens",
        "narrow: w4a16-g128, small, 3 tokens: ValueError: returned [3, 9] instead of [3, 64]",
    ]


def test_a_peer_with_another_number_format_has_no_error_and_counts_as_the_scheme_does() -> None:
    point = by_name(bench("w4a16", [2], (peer(plain, "other", same_numbers=False),))[0])["other"]
    assert point.error is None
    assert point.kind == "peer"
    assert point.ratio.keys() == {"float32", "bfloat16"}


def test_what_waits_for_the_device_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = (peer(plain, "waits", graphs=False), peer(plain, "other"))
    lineup = prepare(SMALL, scheme_of("w4a16"), 1, CPU, torch.bfloat16, "reference", peers)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), to=lambda _dtype: None)
    there = replace(lineup, x=type("OnGpu", (), {"device": on_gpu.device, "__getitem__": lambda *_: on_gpu})())
    timed: dict[bool, list[str]] = {}

    def record(calls: dict[str, list], _device: object, graphs: bool = False, seconds: float = 0.2) -> dict[str, timing.Timing]:
        timed[graphs] = list(calls)
        return {name: timing.Timing(microseconds=2.0 - graphs, low=1.0, high=3.0, calls=1) for name in calls}

    monkeypatch.setattr(linears, "time_in_turn", record)
    monkeypatch.setattr(linears, "_errors", lambda *_: ({each.name: 0.0 for each in lineup.contenders}, []))
    points = by_name(linears._time_lineup(there, SMALL, 1, MACHINE, 1e-3)[0])
    assert timed[False] == ["float32", "bfloat16", "W4A16 reference", "waits", "other"]
    assert timed[True] == ["float32", "bfloat16", "W4A16 reference", "other"]
    assert points["waits"].graph_microseconds is None
    assert points["waits"].microseconds == 2
    assert points["other"].graph_microseconds == 1


def test_ours_failing_is_no_point_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(nn.Module):
        kernel = "torch"

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("of our own")

    monkeypatch.setattr(contenders, "quantized_linear", lambda *_arguments: Broken())
    with pytest.raises(RuntimeError, match="of our own"):
        bench("w4a16", [1])


def test_ours_is_the_layer_that_the_runtime_makes() -> None:
    scheme = scheme_of("w4a16-asym")
    lineup = prepare(SMALL, scheme, 3, CPU, torch.float32, "auto", [])
    ours = lineup.contenders[2]
    expected = quantized_linear(lineup.weight, None, torch.float32, "cpu", "auto")(lineup.x)
    assert all(torch.equal(copied(lineup.x), expected) for copied in ours.copies)
    assert ours.arithmetic == "float32"


def test_progress_is_told_before_and_after_each() -> None:
    seen = []
    work = [(SMALL, scheme_of("w4a16")), (SMALL, scheme_of("w8a8"))]
    bench_kernels(work, [1, 2], "cpu", MACHINE, seconds=1e-3, on_point=lambda done, total, point: seen.append((done, total, point is None)))
    assert seen == [(done + (not begins), 4, begins) for done in range(4) for begins in (True, False, False, False)]


def test_what_cannot_be_timed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^small \(256 x 64\): group size 96 does not divide its input features"):
        bench("w4a16-g96", [1])
    with pytest.raises(UsageError, match=r"^small \(256 x 64\): nf4-g64 has no kernel of its own to time"):
        bench("nf4-g64", [1])
    with pytest.raises(UsageError, match="numbers of tokens must be at least 1"):
        bench("w4a16", [1, 0])
    with pytest.raises(UsageError, match="cannot be timed on the device meta"):
        bench_kernels([], [1], "meta", MACHINE)
    monkeypatch.setattr(contenders, "free_bytes", lambda _device: 1 << 30)
    with pytest.raises(UsageError, match=r"^gate_up \(8192 x 57344\): takes 8\.\d GiB of memory with 1 tokens, but 1\.0 GiB are free"):
        bench("w4a16", [1], shape=Shape("gate_up", 8192, 57344, 80))


def test_copies_take_no_more_than_half_of_the_memory_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda _device: 1 << 30)  # no number of copies is enough
    for free in (1 << 20, 250_000, 200_000):
        monkeypatch.setattr(contenders, "free_bytes", lambda _device, free=free: free)
        lineup = prepare(Shape("small", 128, 64, 1), scheme_of("w4a16"), 1, CPU, torch.bfloat16, "reference", [])
        more = sum((len(each.copies) - 1) * each.weight_bytes for each in lineup.contenders)
        one_each = sum(each.weight_bytes for each in lineup.contenders)
        working = contenders.WORKING_BYTES_PER_WEIGHT * 128 * 64 + contenders.WORKING_BYTES_PER_VALUE * (128 + 64)
        assert 0.05 * (free - one_each - working) < more <= 0.5 * (free - one_each - working) + 64
