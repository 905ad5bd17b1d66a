"""LLM.int8: kernels in the interpreter, the operator in torch, the contract at the door."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptq_kernels import reference
from ptq_kernels.llm_int8 import launch, llm_int8, outlier_slots
from torch import Tensor, nn

pytestmark = pytest.mark.triton

CHILD = Path(__file__).with_name("w8a8_interpreter.py")
CHECKS = (
    ("llm_int8",),
    ("column_flags", "llm_int8_integers", "llm_int8_without_outliers", "threshold_is_compared_in_the_dtype_of_x"),
)


@pytest.mark.parametrize("checks", CHECKS, ids=" ".join)
def test_in_the_interpreter(checks: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, str(CHILD), *checks], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


def layer(tokens: int = 5, N: int = 7, K: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, K, generator=generator)
    x[1, 3] = 20
    codes = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
    index = torch.tensor([3, 8], dtype=torch.int32)
    return x, codes, torch.rand(N, generator=generator) / 100, index, torch.randn(N, 2, generator=generator)


def test_slots_are_the_index_turned_round() -> None:
    assert outlier_slots(torch.tensor([1, 4], dtype=torch.int32), 6).tolist() == [-1, 0, -1, -1, 1, -1]
    assert outlier_slots(torch.tensor([], dtype=torch.int32), 2).tolist() == [-1, -1]


def test_the_operator_is_registered_well() -> None:
    arguments = layer()
    for threshold, slots in ((None, None), (6.0, outlier_slots(arguments[3], 32))):
        torch.library.opcheck(llm_int8, (*arguments, threshold, True, None, slots))


def test_a_layer_compiles_whole() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in zip(("codes", "scale", "index", "weight"), layer()[1:], strict=True):
                self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return llm_int8(x, self.codes, self.scale, self.index, self.weight, 6.0).relu()

    module = Layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 5, 9):
        x = layer(tokens)[0]
        assert torch.equal(compiled(x), module(x))


def test_on_the_cpu_it_is_the_reference() -> None:
    arguments = layer()
    for threshold in (None, 6.0):
        assert torch.equal(llm_int8(*arguments, threshold), reference.llm_int8_linear(*arguments, threshold))


def test_the_contract_names_the_argument() -> None:
    pytest.importorskip("triton")
    x, codes, scale, index, weight = layer()
    with pytest.raises(ValueError, match=r"^threshold must be positive"):
        launch(x, codes, scale, index, weight, -1.0)
    with pytest.raises(TypeError, match=r"^outlier_index must be"):
        launch(x, codes, scale, index.long(), weight)
    with pytest.raises(ValueError, match=r"^outlier_weight must be contiguous"):
        launch(x, codes, scale, index, weight.t().contiguous().t())
    with pytest.raises(ValueError, match=r"^slots must be int32 of shape"):
        launch(x, codes, scale, index, weight, slots=torch.zeros(3, dtype=torch.int32))
