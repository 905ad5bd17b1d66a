"""Every shipped W4A16 configuration, compiled for GPUs that are not there: registers, shared memory, no spills, the right instructions."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from ptq_kernels.tile_config import TileConfig, shipped

triton = pytest.importorskip("triton", reason="compiles with triton")
kernels = import_module("ptq_kernels.w4a16_kernels")
w4a16 = import_module("ptq_kernels.w4a16")

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_BYTES = {80: 99 << 10, 90: 227 << 10}  # to a program: of the smallest GPU that takes the sm_80 table, sm_86
# dtype, group (0: whole rows), zero points
VARIANTS = ((torch.bfloat16, 128, False), (torch.float16, 64, True), (torch.bfloat16, 32, True), (torch.bfloat16, 0, True))


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], capability: int, warps: int) -> Any:
    """``kernel`` for a GPU of that capability; arguments are 32-bit integers unless ``types`` says otherwise, pointers aligned."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {"N", "K", "stride_x"} | set(types)
    divisible = [index for index, name in enumerate(kernel.arg_names) if name in aligned and signature[name] != "constexpr"]
    source = triton.compiler.ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in divisible})
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def inspect(binary: Any, folder: Path, capability: int, name: str) -> str:
    """Prints the use of registers and shared memory and refuses spills; the disassembly."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    sys.stdout.write(f"sm_{capability} {name}: {registers} registers, {binary.metadata.shared} bytes of shared memory\n")
    assert stack == 0, f"{stack} bytes of registers spilled"
    assert binary.metadata.shared <= SHARED_BYTES[capability]
    return subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout


def pointer(dtype: torch.dtype) -> str:
    return "*bf16" if dtype == torch.bfloat16 else "*fp16"


def fused(capability: int, config: Any, bits: int, dtype: torch.dtype, group: int, zeros: bool) -> Any:
    constants = w4a16.constants(config, dtype, bits, group, zeros, False, True)
    constants |= {"EVEN": True, "PDL": capability >= 90, "bias": None} | ({} if zeros else {"zero": None})
    types = {"x": pointer(dtype), "packed": "*i32", "scale": "*i32", "zero": "*i32", "out": "*fp32"}
    return compiled(kernels.w4a16_kernel, constants, types, capability, config.num_warps)


SHIPPED = [(int(key[3:]), entry.bits, entry.config) for key, entry in shipped("w4a16") if key.startswith("sm_")]


@pytest.mark.parametrize("place", range(len(SHIPPED)))
def test_a_shipped_configuration_compiles_without_spills(place: int, tmp_path: Path) -> None:
    capability, bits, config = SHIPPED[place]
    variants = cycle(VARIANTS[1:])
    for _ in range(place):
        next(variants)
    for dtype, group, zeros in (VARIANTS[0], next(variants)):
        fitted = w4a16.fitted(config, group, bits)
        listing = inspect(
            fused(capability, fitted, bits, dtype, group, zeros), tmp_path, capability, f"{bits} bit {fitted} {dtype} {group}"
        )
        product = "HGMMA" if capability == 90 else "HMMA"
        assert "LDGSTS.E.BYPASS.128" in listing
        # What is unpacked reaches the matrix unit in registers: nothing is stored to shared memory before the last product. (Triton 3.6
        # takes another way on sm_80, where it costs time and changes nothing else.)
        if capability == 90 or not triton.__version__.startswith("3.6"):
            assert not re.search(r"\bSTS", listing[: listing.rindex(product)])


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_other_kernels_compile_without_spills(capability: int, bits: int, tmp_path: Path) -> None:
    block_n, block_k = w4a16.DEQUANTIZE_BLOCK
    for dtype, group, zeros in VARIANTS:
        config = TileConfig(block_m=16, block_n=block_n, block_k=block_k, num_warps=4, num_stages=1, scale_weights=True)
        constants: dict[str, Any] = w4a16.constants(config, dtype, bits, group, zeros, False, True)
        constants = {name: value for name, value in constants.items() if name in kernels.dequantize_kernel.arg_names}
        constants |= {} if zeros else {"zero": None}
        types = {"packed": "*i32", "scale": "*i32", "zero": "*i32", "out": pointer(dtype)}
        binary = compiled(kernels.dequantize_kernel, constants, types, capability, 4)
        assert "STG.E.128" in inspect(binary, tmp_path, capability, f"dequantize {bits} bit {dtype} {group}")
    constants = {"BIAS": True, "BLOCK": 1024, "PDL": capability >= 90}
    types = {"partial": "*fp32", "bias": "*bf16", "out": "*bf16"}
    inspect(compiled(kernels.reduce_kernel, constants, types, capability, 4), tmp_path, capability, "reduce")
