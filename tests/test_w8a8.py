"""W8A8: kernels in the interpreter, the fused quotient, the operator in torch, the contract at the door."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptq_kernels import reference
from ptq_kernels.w8a8 import launch, w8a8
from torch import Tensor, nn

pytestmark = pytest.mark.triton

CHILD = Path(__file__).with_name("w8a8_interpreter.py")


def interpret(*checks: str) -> None:
    """Runs checks of the child, in the interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, str(CHILD), *checks], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "checks", [("quantize", "nan", "bfloat16", "strides"), ("integers", "extremes"), ("w8a8",), ("shipped",)], ids=" ".join
)
def test_in_the_interpreter(checks: tuple[str, ...]) -> None:
    interpret(*checks)


def layer(tokens: int = 5, N: int = 7, K: int = 32, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, K, generator=generator).to(dtype)
    codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    return x, codes, torch.rand(N, generator=generator) / 100, torch.randn(N, generator=generator).to(dtype)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a b + c`` of float32 in one rounding: float64 holds the product exactly, and long double the sum as closely as is needed."""
    exact = a.astype(np.float64) * b.astype(np.float64)
    return (exact.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


@pytest.mark.parametrize("bits", [np.float16, "bfloat16", np.float32], ids=str)
def test_three_fused_steps_are_the_rounded_quotient(bits: type | str) -> None:
    """What ``quantize_rows_kernels._code`` does on a GPU, and the interpreter cannot: same codes as a division for every 16-bit value."""
    generator = np.random.default_rng(0)
    if bits == np.float32:
        values = generator.standard_normal(100_000).astype(np.float32)
    else:
        words = np.arange(1 << 15, dtype=np.uint16)
        values = words.view(np.float16).astype(np.float32) if bits == np.float16 else (words.astype(np.uint32) << 16).view(np.float32)
    values = values[np.isfinite(values)]
    largest = [value for value in generator.choice(values, 60) if 1e-24 < abs(value) < 1e27]
    assert len(largest) > 20
    corrected = 0
    for top in largest:
        scale = np.float32(abs(top)) / np.float32(127.5)
        inverse = np.float32(1) / scale
        row = values[np.abs(values) <= abs(top)]
        near = row * inverse
        got = fused(fused(-near, scale, row), inverse, near)
        wanted = row / scale
        matters = np.abs(wanted) > 0.25  # below, both round to zero
        assert np.array_equal(got[matters], wanted[matters])
        assert (np.abs(got[~matters]) < 0.5).all()
        corrected += int((near != wanted).sum())
    assert corrected  # one product alone would not do


def test_the_operator_is_registered_well() -> None:
    x, codes, scale, bias = layer()
    one = torch.tensor([0.02])
    for arguments in ((x, codes, scale), (x, codes, scale[:1], None, False, bias), (x.view(1, 5, 32), codes, scale, one, False)):
        torch.library.opcheck(w8a8, arguments)


def test_a_layer_compiles_whole() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in zip(("codes", "scale", "bias"), layer()[1:], strict=True):
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return w8a8(x, self.codes, self.scale, None, True, self.bias).relu()

    module = Layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 5, 9):
        x = layer(tokens)[0]
        assert torch.equal(compiled(x), module(x))


def test_on_the_cpu_it_is_the_reference() -> None:
    x, codes, scale, bias = layer(dtype=torch.bfloat16)
    assert torch.equal(w8a8(x, codes, scale, bias=bias), reference.int8_linear(x, codes, scale, bias=bias))


def test_the_contract_names_the_argument() -> None:
    pytest.importorskip("triton")
    x, codes, scale, bias = layer()
    with pytest.raises(TypeError, match=r"^x must be float16"):
        launch(x.double(), codes, scale)
    with pytest.raises(ValueError, match=r"^codes must be contiguous"):
        launch(x, codes.t().contiguous().t(), scale)
    with pytest.raises(ValueError, match=r"^codes must have shape"):
        launch(x, codes[:, 1:], scale)
    with pytest.raises(TypeError, match=r"^bias must be"):
        launch(x, codes, scale, bias=bias.half())
    with pytest.raises(ValueError, match=r"^scale must be on the device of x"):
        launch(x, codes, scale.to("meta"))


def test_importing_needs_no_triton_and_no_gpu() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch, ptq_kernels.w8a8, ptq_kernels.llm_int8; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)
