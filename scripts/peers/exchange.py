"""What accuracy_table.py and the process of another tool hand each other: the request, calibration windows, dequantized weights.

It runs in that tool's environment, so it imports nothing of ptqcli.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

SCALE_BITS = 16


@dataclass(frozen=True, kw_only=True)
class Request:
    """model: folder. windows: file with the calibration tokens. output: folder to make. options: what the row gives beside."""

    model: str
    windows: str
    output: str
    bits: int
    group_size: int
    seed: int
    options: dict[str, Any]

    @classmethod
    def read(cls) -> Request:
        """What this process was started with; torch gets the threads that the environment allows."""
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        return cls(**json.loads(sys.argv[1]))

    def tokens(self) -> Tensor:
        """The calibration windows, int64 [windows, seqlen]."""
        return load_file(self.windows)["windows"]

    def load(self) -> nn.Module:
        """The model in its own dtype, with GPT-2's transposed linears as plain ones, which compute the same and every tool knows."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto").eval()
        for name, module in list(model.named_modules()):
            if isinstance(module, Conv1D):
                model.set_submodule(name, _plain(module))
        return model

    def tokenizer(self) -> Any:
        """The model's."""
        return AutoTokenizer.from_pretrained(self.model)


def _plain(module: Conv1D) -> nn.Linear:
    linear = nn.Linear(module.nx, module.nf)
    linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
    linear.bias = module.bias
    return linear


def processor_time() -> float:
    """Seconds of this process and of those that it started and waited for."""
    return sum(os.times()[:4])


def linears_of(model: Any) -> dict[str, nn.Linear]:
    """The linears of the blocks by name: all but the output head."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def hand_back(request: Request, weights: dict[str, Tensor], begun: float, group_bits: int = SCALE_BITS) -> None:
    """Write the dequantized weights, [out, in] by name. begun: processor time before the work. group_bits: stored for each group."""
    seconds = processor_time() - begun
    folder = Path(request.output)
    folder.mkdir()
    save_file({name: weight.detach().float().contiguous() for name, weight in weights.items()}, folder / "weights.safetensors")
    done = {"cpu_seconds": round(seconds, 2), "bits_per_weight": request.bits + group_bits / request.group_size}
    (folder / "done.json").write_text(json.dumps(done))
