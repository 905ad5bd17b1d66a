"""What all loader tests share: the demo model, a text that it has not seen, and logits and perplexity of a model, whoever loaded it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tiny
import torch
from packed import change_tensor
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import ptqcli

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "ptqcli" / "demo"
TEXT = (ROOT / "LICENSE").read_text(encoding="utf-8")  # stays as it is
WINDOW = 256
SAME_PERPLEXITY = 1e-3


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    """float32 [batch, tokens, vocabulary], of random tokens where none are given."""
    with torch.no_grad():
        found: Tensor = model(tiny.token_ids() if tokens is None else tokens).logits
    return found.float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def demo_in(folder: Path, dtype: torch.dtype) -> Path:
    """The demo model in ``dtype``; transformers runs many a quantized checkpoint in the dtype of its config, whatever else is asked for."""
    AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def by_transformers(folder: Path, **asked: Any) -> Any:
    """The model, with nothing missing, unexpected or mismatched."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **asked)
    assert {key: list(found) for key, found in info.items() if found} == {}
    return model.eval()


def their_perplexity(model: Any) -> float:
    """By the formula: exp of the mean loss over windows of TEXT that follow each other, in the tokens of the demo model."""
    ids = AutoTokenizer.from_pretrained(DEMO)(TEXT, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, 1, WINDOW)
    losses = [cross_entropy(logits(model, window)[0, :-1], window[0, 1:]) for window in windows]
    return math.exp(float(torch.stack(losses).double().mean()))


def our_perplexity(checkpoint: Path) -> float:
    """What ``ptq eval`` prints for a folder or a GGUF file."""
    text = checkpoint.with_name("text.txt")
    text.write_text(TEXT, encoding="utf-8")
    [found] = ptqcli.evaluate(checkpoint, [text], seqlen=WINDOW)
    return found.perplexity


def check_perplexity(folder: Path, model: Any, scales: str) -> None:
    """``ptq eval`` of a folder and whoever loaded ``model`` from it say the same. The twin: with scales a tenth larger, it says something
    else. scales: how the names of their tensors end."""
    theirs = their_perplexity(model)
    assert abs(our_perplexity(folder) / theirs - 1) < SAME_PERPLEXITY
    change_tensor(folder, lambda tensors: [tensor.mul_(1.1) for name, tensor in tensors.items() if name.endswith(scales)])
    assert abs(our_perplexity(folder) / theirs - 1) > SAME_PERPLEXITY
