"""What GPTQModel, and transformers through it, make of a folder; what GPTQModel writes; what GPTQ and AWQ files are both tested for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import loading
import pytest
import tiny
import torch
from loading import DEMO, check_perplexity, logits, relative
from packed import change_tensor
from torch import Tensor

from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.runtime import load_quantized

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to work with one, which it takes on two cores

# Its first kernel for 4 bits multiplies in bfloat16 whatever the model's dtype is; the plain ones do not.
CLOSE, CLOSE_IN_BFLOAT16 = 5e-3, 2e-2


def ours(folder: Path) -> Tensor:
    return logits(load_quantized(folder, dtype=torch.float32, kernel="reference"))


def by_transformers(folder: Path) -> Any:
    return loading.by_transformers(folder, dtype=torch.float16)


def by_gptqmodel(folder: Path, backend: str) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend=BACKEND(backend)).model


def packed_modules(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}


def our_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and values, float16 [out, in], of each quantized linear."""
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.schemes:
        yield name, checkpoint.weight(name).dequantize(torch.float32).half()


def check_logits(folder: Path, backend: str) -> Any:
    """GPTQModel has our linears and logits; it is given back."""
    model = by_gptqmodel(folder, backend)
    assert packed_modules(model).keys() == open_checkpoint(folder).schemes.keys()
    assert relative(logits(model), ours(folder)) < CLOSE
    return model


def check_no_whole_rows(folder: Path) -> None:
    """transformers loads rows of one scale each, and does not run them on a CPU."""
    model = by_transformers(folder)
    with pytest.raises(RuntimeError, match="qGroupSize"):
        logits(model)


def check_signs(folder: Path, backend: str) -> None:
    """Negative scales are kept. And the twin: without the signs, both have other logits."""
    expected = ours(folder)
    assert 0.4 < share_of_negative_scales(folder) < 0.6
    assert relative(logits(by_gptqmodel(folder, backend)), expected) < CLOSE
    change_tensor(folder, lambda tensors: [tensor.abs_() for name, tensor in tensors.items() if name.endswith(".scales")])
    assert relative(logits(by_gptqmodel(folder, backend)), expected) > 0.5
    assert relative(logits(by_transformers(folder)), expected) > 0.5


def share_of_negative_scales(folder: Path) -> float:
    checkpoint = open_checkpoint(folder)
    scales = torch.cat([checkpoint.weight(name).scale.flatten() for name in checkpoint.schemes])
    return float((scales < 0).float().mean())


def check_made(made: Path, backend: str) -> Any:
    """What GPTQModel has written runs here as it does there; the model of GPTQModel is given back, and the file is another one then."""
    model = check_logits(made, backend)
    check_perplexity(made, model, ".scales")
    return model


def made_by_gptqmodel(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The demo model, quantized by GPTQModel on random tokens."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(DEMO), QuantizeConfig(**settings), device="cpu", dtype=torch.float16)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tiny.token_ids(count=32, batch=4)]
    with inside(folder):  # it writes a log wherever it is called
        model.quantize(samples, batch_size=4, backend=BACKEND.TORCH)
        model.save(str(folder / "made"))
    return folder / "made"


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
