"""W4A16 and W8A16: the layout, the contract, the operator on the CPU, the kernels' PTX by hand, and the kernels in Triton's interpreter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers import signs
from ptq_kernels import tile_config
from ptq_kernels.packing import TILE_K, pack_groups, pack_tiles, unpack_groups, unpack_tiles
from ptq_kernels.tile_config import GPU, config_for, tables_for
from torch import Tensor

pytestmark = pytest.mark.triton

w4a16 = import_module("ptq_kernels.w4a16")  # the package may name the operator like its module
TOLERANCE = 7e-4  # relative Frobenius, float16; what is asked for is 4e-3


def random_codes(N: int, K: int, bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, (N, K), generator=torch.Generator().manual_seed(N + K), dtype=torch.uint8)


@pytest.mark.parametrize("bits", TILE_K)
@pytest.mark.parametrize("N, K", [(1, 1), (64, 64), (65, 99), (70, 2112), (192, 704)])
def test_unpack_is_the_inverse_of_pack(bits: int, N: int, K: int) -> None:
    codes = random_codes(N, K, bits)
    packed = pack_tiles(codes, bits)
    assert packed.shape == (-(-N // 64), -(-K // TILE_K[bits]), 128, 4)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_tiles(packed, bits, N, K), codes)


@pytest.mark.parametrize("bits", TILE_K)
def test_a_code_lies_where_the_matrix_instruction_wants_it(bits: int) -> None:
    width = TILE_K[bits]
    for row, column in [(0, 0), (1, 0), (0, 1), (8, 0), (0, 8), (77, 45), (100, 2 * width - 1), (63, width)]:
        codes = torch.zeros(128, 2 * width, dtype=torch.uint8)
        codes[row, column] = 1
        warp, r, g = row % 64 // 16, row % 16 // 8, row % 8
        step, c3, t, c0 = column % width // 16, column % 16 // 8, column % 8 // 2, column % 2
        value = 4 * c3 + 2 * r + c0
        word, bit = (step, 4 * (value // 2 + 4 * (value % 2))) if bits == 4 else (2 * step + c3, 8 * (value % 4))
        expected = torch.zeros(2, 2, 128, 4, dtype=torch.int64)
        expected[row // 64, column // width, 32 * warp + 4 * g + t, word] = 1 << bit
        assert torch.equal(pack_tiles(codes, bits).long() & 0xFFFFFFFF, expected)


def test_groups_there_and_back() -> None:
    scale = torch.randn(70, 3).half()
    packed = pack_groups(scale, torch.float16)
    assert packed.shape == (3, 128)
    assert torch.equal(unpack_groups(packed, 70), scale)
    assert torch.equal(packed[1, 16 + 2 * 5 + 1], scale[16 + 8 + 5, 1])
    with pytest.raises(TypeError):
        pack_groups(scale, torch.float32)
    with pytest.raises(ValueError):
        pack_groups(scale[0], torch.float16)


def test_codes_that_do_not_fit_are_refused() -> None:
    for codes, bits, error in [
        (torch.full((2, 2), 16, dtype=torch.uint8), 4, ValueError),
        (torch.zeros(2, 2, dtype=torch.int8), 4, TypeError),
        (torch.zeros(2, dtype=torch.uint8), 4, ValueError),
        (torch.zeros(2, 2, dtype=torch.uint8), 3, ValueError),
    ]:
        with pytest.raises(error):
            pack_tiles(codes, bits)


def arguments(bits: int = 4, group_size: int = 64, dtype: torch.dtype = torch.bfloat16, order: bool = False) -> dict[str, Any]:
    N, K = 70, 192
    groups = 1 if group_size == -1 else K // group_size
    scale = torch.rand(N, groups).add(0.5) * signs(N, groups)
    return {
        "x": torch.randn(3, K, dtype=dtype),
        "packed": pack_tiles(random_codes(N, K, bits), bits),
        "scale": pack_groups(scale, dtype),
        "zero": pack_groups(random_codes(N, groups, bits), torch.int16),
        "bits": bits,
        "group_size": group_size,
        "N": N,
        "bias": torch.randn(N, dtype=dtype),
        "perm": torch.randperm(K).to(torch.int32) if order else None,
    }


@pytest.mark.parametrize("bits", TILE_K)
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("order", [False, True])
def test_the_operator_on_the_cpu(bits: int, group_size: int, order: bool) -> None:
    given = arguments(bits, group_size, order=order)
    codes, groups = random_codes(70, 192, bits), unpack_groups(given["scale"], 70).double()
    zeros = unpack_groups(given["zero"], 70).double()
    weight = ((codes.double().view(70, groups.shape[1], -1) - zeros.unsqueeze(-1)) * groups.unsqueeze(-1)).view(70, 192)
    x = given["x"].double()
    truth = (x if given["perm"] is None else x[:, given["perm"].long()]) @ weight.T + given["bias"].double()
    found = w4a16.w4a16(**given).double()
    assert (found - truth).norm() < 4e-3 * truth.norm()


def test_the_operator_is_registered_properly() -> None:
    for order in (False, True):
        torch.library.opcheck(w4a16.w4a16, tuple(arguments(order=order).values()))
    given = arguments()
    compiled = torch.compile(w4a16.w4a16, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), w4a16.w4a16(**given))


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("x", lambda x: x.float()),
        ("packed", lambda packed: packed[:1]),
        ("packed", lambda packed: packed.short()),
        ("scale", lambda scale: scale.half()),
        ("scale", lambda scale: scale[:, :70]),
        ("zero", lambda zero: zero.to(torch.uint8)),
        ("bits", lambda bits: 3),
        ("group_size", lambda group_size: 128),
        ("group_size", lambda group_size: 0),
        ("bias", lambda bias: bias[1:]),
        ("perm", lambda perm: torch.zeros(192, dtype=torch.int64)),
        ("packed", lambda packed: packed.transpose(2, 3).contiguous().transpose(2, 3)),
    ],
)
def test_the_error_names_the_argument(name: str, wrong: Callable[[Any], Any]) -> None:
    given = arguments()
    with pytest.raises((TypeError, ValueError), match=name):
        w4a16.w4a16(**{**given, name: wrong(given[name])})


def test_the_table_is_found_for_every_gpu() -> None:
    def block_m(capability: int, tokens: int) -> int:
        return config_for("w4a16", GPU("a GPU of no table", capability, 100), 4096, 4096, tokens, 4).block_m

    assert [block_m(90, tokens) for tokens in (1, 16, 17, 64)] == [16, 16, 32, 64]
    for capability in (75, 80, 86, 89, 90, 100, 120):
        assert block_m(capability, 1) == 16
    for kernel, other in (("w4a16", 100), ("w8a8", 90), ("llm_int8", 90)):
        assert tables_for(kernel, "", 120) == tables_for(kernel, "", 86) == tables_for(kernel, "", 80) != tables_for(kernel, "", other)
    assert config_for("w4a16", GPU("", 90, 132), 4096, 4096, 1 << 20, 4) is None
    for kernel in ("w8a8", "llm_int8"):
        assert tables_for(kernel, "", 100) == tables_for(kernel, "", 75)
        assert all(config_for(kernel, GPU("", capability, 1), 1, 1, 2**31 - 1) for capability in (75, 80, 90, 100, 120))


def test_a_table_of_a_gpu_may_leave_out_what_it_has_nothing_to_say_about(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"block_m": 16, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 9, "ctas_per_sm": 1}
    own = [{"bits": 4, "max_m": 16, "shape": [4096, 4096], "config": config}]
    monkeypatch.setattr(tile_config, "_tables", lambda _kernel: {**tables, "Some GPU": own})
    tables = json.loads((Path(w4a16.__file__).parent / "tuned" / "w4a16.json").read_text())["tables"]
    tables_for.cache_clear()
    config_for.cache_clear()
    gpu, other = GPU("Some GPU", 90, 132), GPU("", 90, 132)
    assert config_for("w4a16", gpu, 4096, 4096, 16, 4).num_stages == 9
    assert config_for("w4a16", gpu, 4096, 4096, 17, 4) is None  # what its entries for this shape say
    assert config_for("w4a16", gpu, 6144, 4096, 1, 4) == config_for("w4a16", other, 6144, 4096, 1, 4)
    assert config_for("w4a16", gpu, 4096, 4096, 1, 8) == config_for("w4a16", other, 4096, 4096, 1, 8)
    tables_for.cache_clear()
    config_for.cache_clear()


def test_parts_of_k_fill_the_sms_once() -> None:
    assert w4a16._split_k(32, 32, 264, 0) == 8
    assert w4a16._split_k(1000, 32, 264, 0) == 1
    assert w4a16._split_k(1, 1, 264, 0) == 1


@pytest.mark.parametrize("N, K", [(28672, 4096), (14336, 4096), (4096, 14336), (6144, 4096), (4096, 4096)])
def test_splits_never_move_more_than_they_spare(N: int, K: int) -> None:
    """At few tokens K is split until a large GPU is busy; the sums of all parts stay below the weight in bytes."""
    gpu = GPU("", 90, 132)
    for M in (1, 16, 64, 128, 256, 512):
        config = config_for("w4a16", gpu, N, K, M, 4)
        plan = w4a16.plan(gpu, config, torch.bfloat16, 4, 128, M, N, K, False, False)
        if M <= 16:
            assert plan.grid[0] * plan.grid[1] * plan.split_k >= 2 * gpu.sms
        if plan.split_k > 1:
            assert 8 * plan.split_k * M * N <= 2 * N * K


def _to_float(halves: np.ndarray, bfloat16: bool) -> np.ndarray:
    kind = torch.bfloat16 if bfloat16 else torch.float16
    return torch.from_numpy(halves.astype(np.uint16).view(np.int16)).view(kind).double().numpy()


def _from_float(values: np.ndarray, bfloat16: bool) -> np.ndarray:
    kind = torch.bfloat16 if bfloat16 else torch.float16
    return torch.from_numpy(values).to(kind).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def _pairwise(operation: Callable[..., np.ndarray], bfloat16: bool, *words: np.ndarray) -> np.ndarray:
    low, high = (_from_float(operation(*(_to_float((w >> s) & 0xFFFF, bfloat16) for w in words)), bfloat16) for s in (0, 16))
    return low | (high << 16)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = [(word >> (8 * byte)) & 0xFF for word in (a, b) for byte in range(4)]
    picked = [pool[(int(selector.flat[0]) >> (4 * place)) & 7] for place in range(4)]
    return picked[0] | (picked[1] << 8) | (picked[2] << 16) | (picked[3] << 24)


def _run_ptx(text: str, operands: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The few PTX instructions that the unpacking is made of, on arrays of uint32; the eight 16-bit results."""
    operations: dict[str, Callable[..., np.ndarray]] = {
        "mov.b32": lambda a: a,
        "shr.u32": lambda a, by: a >> by,
        "lop3.b32": lambda a, b, c, table: (a & b) | c,
        "prmt.b32": _permute,
        "sub.f16x2": lambda a, b: _pairwise(np.subtract, False, a, b),
        "mul.f16x2": lambda a, b: _pairwise(np.multiply, False, a, b),
        "fma.rn.f16x2": lambda a, b, c: _pairwise(lambda p, q, r: p * q + r, False, a, b, c),
        "fma.rn.bf16x2": lambda a, b, c: _pairwise(lambda p, q, r: p * q + r, True, a, b, c),
        "sub.f32": lambda a, b: (a.view(np.float32) - b.view(np.float32)).view(np.uint32),
    }
    shape = operands["$8"].shape
    registers = dict(operands)
    for statement in re.sub(r"^\{|\}$", "", text.strip()).split(";"):
        if not statement.strip() or ".reg" in statement:
            continue
        name, rest = statement.strip().split(" ", 1)
        *targets, last = re.findall(r"\{[^}]*\}|[^,\s]+", rest)[:1], re.findall(r"\{[^}]*\}|[^,\s]+", rest)[1:]
        if name == "lop3.b32":
            assert last[-1] == "0xea"
        sources = [registers[s] if s in registers else np.full(shape, int(s, 0), np.uint32) for s in last]
        value = operations[name](*sources)
        target = targets[0][0]
        if target.startswith("{"):
            low, high = re.findall(r"\$\d", target)
            registers[low], registers[high] = value & 0xFFFF, value >> 16
        else:
            registers[target] = value
    return [registers[f"${index}"] for index in range(8)]


@pytest.mark.parametrize("bits", TILE_K)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_ptx_computes_every_code_minus_every_zero_point(bits: int, bfloat16: bool, scaled: bool) -> None:
    """All pairs of code and zero point, different ones in neighbouring places; ``code - zero`` exactly, times the scale rounded once."""
    pytest.importorskip("triton", reason="the kernels' module imports triton")
    import triton.language as tl
    from ptq_kernels import w4a16_kernels as kernels

    levels = 1 << bits
    code, zero = (a.reshape(-1) for a in np.meshgrid(np.arange(levels, dtype=np.uint32), np.arange(levels, dtype=np.uint32)))
    codes = [(code + 5 * place) % levels for place in range(8)]
    zeros = [zero, (zero + 3) % levels]
    if bits == 4:
        first = second = sum(value << (4 * (place // 2 + 4 * (place % 2))) for place, value in enumerate(codes))
    else:
        first, second = (sum(codes[4 * half + place] << (8 * place) for place in range(4)) for half in (0, 1))
    kind = tl.bfloat16 if bfloat16 else tl.float16
    low, high = kernels._zero_operands.fn(zeros[0].astype(np.int64), zeros[1].astype(np.int64), bits, kind)
    scales = _from_float(np.array([0.0123, 3.7]), bfloat16)
    operands = {"$8": first, "$9": second, "$10": low, "$11": high, "$12": scales[0] * 0x10001, "$13": scales[1] * 0x10001}
    operands = {name: np.broadcast_to(np.asarray(value) & 0xFFFFFFFF, code.shape).astype(np.uint32) for name, value in operands.items()}
    found = _run_ptx(kernels.assembly(bits, bfloat16, scaled), operands)
    for place in range(8):
        row = place // 2 % 2
        expected = codes[place].astype(float) - zeros[row].astype(float)
        if scaled:
            expected = _to_float(_from_float(expected * _to_float(scales[row : row + 1], bfloat16), bfloat16), bfloat16)
        assert np.array_equal(_to_float(found[place], bfloat16), expected)


@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs triton's interpreter")
    script = Path(__file__).with_name("interpret_w4a16.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    for result in json.loads(run.stdout):
        assert result["error"] < TOLERANCE < result["flipped"], result
        assert result.get("repeats", True), result
