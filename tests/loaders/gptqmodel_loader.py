"""What GPTQModel, and transformers through it, make of a checkpoint folder; and checkpoints that GPTQModel writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import torch
from packed import change_tensor
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.runtime import load_quantized

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to work with one, which it takes on two cores

DEMO = Path(__file__).parents[2] / "ptqcli" / "demo"
# Its first kernel for 4 bits multiplies in bfloat16 whatever the model's dtype is; the plain ones do not.
CLOSE, CLOSE_IN_BFLOAT16 = 5e-3, 2e-2


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tiny.token_ids() if tokens is None else tokens).logits
    return found.float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def ours(folder: Path) -> Tensor:
    return logits(load_quantized(folder, dtype=torch.float32, kernel="reference"))


def by_transformers(folder: Path) -> Any:
    """The model, with nothing missing, unexpected or mismatched."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, output_loading_info=True)
    assert {key: list(found) for key, found in info.items() if found} == {}
    return model


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


def share_of_negative_scales(folder: Path) -> float:
    checkpoint = open_checkpoint(folder)
    scales = torch.cat([checkpoint.weight(name).scale.flatten() for name in checkpoint.schemes])
    return float((scales < 0).float().mean())


def without_signs(folder: Path) -> None:
    """The twin of a file with negative scales."""
    change_tensor(folder, lambda tensors: [tensor.abs_() for name, tensor in tensors.items() if name.endswith(".scales")])


@contextmanager
def made_by_gptqmodel(folder: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """A checkpoint of a tiny model that GPTQModel has quantized on random tokens."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    # Its search for clips wants multiples of 64 outputs, and ends the process where it finds others.
    tiny.make_model(folder / "model", dtype=torch.float16, seed=3, hidden_size=128, intermediate_size=256)
    model = GPTQModel.load(str(folder / "model"), QuantizeConfig(**settings), device="cpu", dtype=torch.float16)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tiny.token_ids(count=64, batch=8)]
    before = Path.cwd()
    os.chdir(folder)  # it writes a log wherever it is called
    try:
        model.quantize(samples, batch_size=4, backend=BACKEND.TORCH)
        model.save(str(folder / "made"))
    finally:
        os.chdir(before)
    yield folder / "made"
