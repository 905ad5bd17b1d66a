"""Compiles every shipped configuration of the int8 kernels for GPUs that are not there: no spills, and the instructions that are meant.

The launchers run as they are, on memory that nobody touches; only the last step, which would hand a kernel to the driver, is replaced by
the compiler. ``pytest -s`` shows registers and shared memory.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from ptq_kernels import int8_product, llm_int8, quantize_rows, w8a8
from ptq_kernels.tile_config import Entry, TileConfig, tables_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.triton

NAMES = {torch.int8: "i8", torch.int32: "i32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# What a block may have: H100 and H200, and the least of the older generation (the A100 has more).
SHARED_MEMORY = {90: 227 << 10, 80: 99 << 10}
QUANTIZERS = ("quantize_rows", "split_rows", "column_flags", "partial_maxima")
PRODUCT = {90: "wgmma.mma_async.sync.aligned.m64n", 80: "mma.sync.aligned.m16n8k32.row.col"}


class Compiler:
    """Stands in for launches: compiles what would run and keeps what came out."""

    def __init__(self, architecture: int, folder: Path) -> None:
        self.target = GPUTarget("cuda", architecture, 32)
        self.cubin = folder / "kernel.cubin"
        self.skipped: tuple[str, ...] = ()
        self.done: list[tuple[str, str]] = []  # name, PTX

    def run(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        """``JITFunction.run``, without running."""
        if kernel.__name__ in self.skipped:
            return
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | {
            name: named.pop(name) for name in tuple(named) if name in kernel.arg_names
        }
        signature, constants, attributes = {}, {}, {}
        for position, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            constant = parameter.is_constexpr or value is None
            signature[parameter.name] = "constexpr" if constant else type_of(value)
            if constant:
                constants[(position,)] = value
            elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize):
                attributes[(position,)] = [["tt.divisibility", 16]]
        named.setdefault("enable_fp_fusion", True)
        built = triton.compile(ASTSource(kernel, signature, constants, attributes), target=self.target, options=named)
        self.cubin.write_bytes(built.asm["cubin"])
        usage = self.cuobjdump("-res-usage")
        registers, frame = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
        tile = "x".join(str(values[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in values)
        tile += f" in {values['SPLIT_K']}" if tile else ""
        what = f"sm_{self.target.arch} {kernel.__name__:15} {tile:17}"
        print(f"{what}: {registers:>3} registers, {built.metadata.shared:>6} bytes shared, frame of {frame}")
        # What is spilled lies in the frame: without one there is none. A frame alone is no spill: the slow path of a division is a call,
        # which may take a few bytes to return to. Spills are loads from it and stores to it (LDL, STL).
        assert frame == "0" or not re.search(r"\b(LDL|STL)\b", self.cuobjdump("-sass")), f"{what} spills"
        assert built.metadata.shared <= SHARED_MEMORY[self.target.arch], f"{what} takes too much shared memory"
        self.done.append((kernel.__name__, built.asm["ptx"]))

    def cuobjdump(self, option: str) -> str:
        """What the disassembler says of the kernel that was compiled last."""
        done = subprocess.run([str(DISASSEMBLER), option, str(self.cubin)], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def type_of(value: Any) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
    return "i32" if isinstance(value, int) else "fp32"


def shipped(kind: str, architecture: int) -> tuple[Entry, ...]:
    """The entries of a generation for what ``launch`` calls ``kind``."""
    (table,) = tables_for("w8a8" if kind == "w8a8" else "llm_int8", "", architecture)
    return table


@pytest.fixture(params=[90, 80], ids="sm_{}".format)
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    made = Compiler(request.param, tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    # The same code and registers in two thirds of the time.
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    monkeypatch.setattr(triton.JITFunction, "run", lambda kernel, *arguments, **named: made.run(kernel, *arguments, **named))
    return made


def launch(kind: str, M: int, N: int, K: int, dtype: torch.dtype, config: TileConfig, split_k: int) -> None:
    """One call of a launcher, on memory that is allocated and no more."""
    x = torch.empty(M, K, dtype=dtype)
    codes = torch.empty(N, K, dtype=torch.int8)
    scale, bias = torch.empty(N, dtype=dtype), torch.empty(N, dtype=dtype)
    config = replace(config, split_k=split_k)
    if kind == "w8a8":
        w8a8.launch(x, codes, scale, None, True, bias, config)
        return
    index, weight = torch.empty(32, dtype=torch.int32), torch.empty(N, 32, dtype=dtype)
    slots = torch.empty(K, dtype=torch.int32)
    llm_int8.launch(x, codes, scale, index, weight, 6.0 if kind == "dynamic" else None, True, bias, slots, config)


@pytest.mark.parametrize(
    ("kind", "N", "K", "split"),
    [
        ("w8a8", 4095, 2112, True),
        ("w8a8", 4096, 4096, False),
        ("dynamic", 4095, 2112, True),
        ("static", 4096, 4096, False),
        pytest.param("dynamic", 4096, 4096, False, marks=pytest.mark.slow),
        pytest.param("static", 4095, 2112, True, marks=pytest.mark.slow),
    ],
)
def test_every_shipped_config(compiler: Compiler, kind: str, N: int, K: int, split: bool) -> None:
    """Sizes with a remainder everywhere and, where the table allows it, K split, which take the most registers; and friendly ones."""
    compiler.skipped = QUANTIZERS
    architecture = compiler.target.arch
    table = shipped(kind, architecture)
    for entry in table:
        launch(kind, min(entry.max_m, 600), N, K, torch.bfloat16, entry.config, 2 if split and entry.config.ctas_per_sm else 1)
    assert len(compiler.done) == len(table)
    assert all(PRODUCT[architecture] in ptx and ".s32.s8.s8" in ptx for _, ptx in compiler.done)
    # Sums of other parts come 16 bytes at a time, for any N.
    assert sum("ld.global.cg.v4.b32" in ptx for _, ptx in compiler.done) == sum(split and entry.config.ctas_per_sm > 0 for entry in table)


@pytest.mark.slow
def test_the_largest_configs_in_every_dtype_and_with_the_most_parts(compiler: Compiler) -> None:
    compiler.skipped = QUANTIZERS
    for kind in ("w8a8", "dynamic"):
        for entry in shipped(kind, compiler.target.arch)[-2:]:
            if entry.config.ctas_per_sm:
                launch(kind, 600, 4095, 2112, torch.float16, entry.config, int8_product.MOST_SPLITS)
            if kind == "w8a8":
                launch(kind, 600, 4095, 2112, torch.float32, entry.config, 2 if entry.config.ctas_per_sm else 1)


def test_a_config_that_spills_or_does_not_fit_is_refused(compiler: Compiler) -> None:
    """The twin of the others: too many sums for each thread, too many stages."""
    compiler.skipped = QUANTIZERS
    with pytest.raises(AssertionError, match="spills"):
        launch("w8a8", 600, 4096, 4096, torch.bfloat16, TileConfig(block_m=128, block_n=256, block_k=64, num_warps=4, num_stages=2), 1)
    with pytest.raises(AssertionError, match="shared memory"):
        launch("w8a8", 600, 4096, 4096, torch.bfloat16, TileConfig(block_m=64, block_n=64, block_k=256, num_warps=4, num_stages=9), 1)


@pytest.mark.slow
def test_the_config_for_everything_else(compiler: Compiler) -> None:
    """Rows that do not start at multiples of 16 bytes, and outliers in float32."""
    for kind, dtype, K in (("w8a8", torch.float32, 2111), ("dynamic", torch.float16, 2111), ("dynamic", torch.float32, 2112)):
        launch(kind, 40, 4095, K, dtype, int8_product.SMALL, 2)


def test_loads_are_whole(compiler: Compiler) -> None:
    """Friendly sizes: 16 bytes at a time, or a tile by the copy engine."""
    small, *_, large = shipped("w8a8", compiler.target.arch)
    launch("w8a8", 16, 4096, 4096, torch.bfloat16, small.config, 2)
    launch("w8a8", 4096, 4096, 4096, torch.bfloat16, large.config, 1)
    quantize, few, _, many = (ptx for _, ptx in compiler.done)
    assert "ld.global.v4.b32" in quantize
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 0x10", few)
    assert ("cp.async.bulk.tensor.2d" if compiler.target.arch == 90 else "cp.async.cg") in many


def test_other_scales_and_an_early_launch(compiler: Compiler) -> None:
    """One scale for all tokens, a static one, few and many tokens with a threshold; and on Hopper a product that is launched early."""
    x = torch.empty(40, 4096, dtype=torch.bfloat16)
    for input_scale in (None, torch.empty(1)):
        quantize_rows.quantize(x, False, input_scale, None)
    slots = torch.empty(4096, dtype=torch.int32)
    for tokens, threshold, per_token in ((4, 6.0, True), (4, 6.0, False), (40, 6.0, True), (40, None, True), (40, None, False)):
        quantize_rows.split(x[:tokens], torch.empty(32, dtype=torch.int32), slots, threshold, per_token, None)
    x, slots = x.new_empty(40, 14336), slots.new_empty(14336)  # rows that are read twice
    for tokens, threshold in ((4, 6.0), (40, 6.0), (40, None)):
        quantize_rows.split(x[:tokens], slots[:32], slots, threshold, True, None)
    if compiler.target.arch == 90:
        launch(
            "w8a8",
            16,
            4096,
            4096,
            torch.bfloat16,
            TileConfig(block_m=16, block_n=64, block_k=256, num_warps=4, num_stages=4, weight_left=True, pdl=True),
            2,
        )
        (_, first), (_, second) = compiler.done[-2:]
        assert "griddepcontrol.launch_dependents" in first
        assert "griddepcontrol.wait" in second
