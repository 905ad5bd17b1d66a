"""Other tools in environments of their own, on the calibration windows that our runs draw; see scripts/peers/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch
from accuracy_rows import Row, Subject, bits_and_group
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptqcli.calibration.bos import window_bos
from ptqcli.calibration.text import calibration_windows, documents
from ptqcli.model.linears import is_linear, linear_weight
from ptqcli.runtime.models import load_tokenizer

PEERS = Path(__file__).resolve().parent / "peers"
# The versions that are compared with. torch is held, since any other request for it brings gigabytes of CUDA along.
TORCH = "torch==2.13.0"
PACKAGES = {
    "llm_compressor": ("llmcompressor==0.14.0.1",),
    "auto_round": ("auto-round==0.16.1",),
    "gptqmodel": ("gptqmodel==7.6.0",),  # 7.7 wants torch 2.14
    "hqq": ("hqq==0.2.8.post1",),
}


def quantize_with_peer(row: Row, scheme: str, seed: int, subject: Subject, work: Path, folder: Path) -> dict[str, Any]:
    """Quantize into ``folder / "output"`` by the tool that ``row`` names: cpu_seconds, bits_per_weight. Raises RuntimeError if it fails."""
    python = environment(str(row.peer), work / "env")
    save_file({"windows": calibration(subject, seed)}, folder / "windows.safetensors")
    bits, group = bits_and_group(scheme)
    request = {
        "model": str(subject.folder),
        "windows": str(folder / "windows.safetensors"),
        "output": str(folder / "output"),
        "bits": bits,
        "group_size": group,
        "seed": seed,
        "options": dict(row.options),
    }
    run_process([str(python), str(PEERS / f"run_{row.peer}.py"), json.dumps(request)], {**os.environ, "HF_HUB_OFFLINE": "1"}, folder)
    done: dict[str, Any] = json.loads((folder / "output" / "done.json").read_text())
    return done


def run_process(command: list[str], environment: dict[str, str], folder: Path, given: str = "") -> None:
    """Run ``command`` and wait. Raises RuntimeError with its last line if it fails."""
    done = subprocess.run(command, input=given, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        print("\n".join(said[-20:]), file=sys.stderr)
        raise RuntimeError(said[-1] if said else f"it ended with {done.returncode}")


def environment(peer: str, folder: Path) -> Path:
    """The Python of the environment of ``peer``, made below ``folder`` if it is not there. Raises RuntimeError if pip fails."""
    place = folder / peer.replace("_", "-")
    python, whole = place / "bin" / "python", place / "installed"
    if not whole.exists():
        print(f"  making an environment for {peer}", file=sys.stderr, flush=True)
        venv.create(place, with_pip=True)
        run_process([str(python), "-m", "pip", "install", "--quiet", TORCH, *PACKAGES[peer]], dict(os.environ), place)
        whole.touch()
    return python


def calibration(subject: Subject, seed: int) -> torch.Tensor:
    """The windows that our own run draws, int64 [nsamples, seqlen]."""
    tokenizer = load_tokenizer(subject.folder)
    texts = documents(subject.calib, "calibration")
    return calibration_windows(texts, tokenizer, subject.nsamples, subject.seqlen, seed, window_bos(tokenizer, "auto"))


def with_weights(original: Path, output: Path, scheme: str) -> Any:
    """The model in ``original`` with the weights that a peer wrote to ``output``.

    Raises RuntimeError if they are not those of all linears of the blocks, or if a group has more values than its bits can say.
    """
    model = AutoModelForCausalLM.from_pretrained(original, dtype="auto")
    weights = load_file(output / "weights.safetensors")
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if is_linear(module) and module is not head}
    if linears.keys() != weights.keys():
        raise RuntimeError(f"it quantized other linears: {sorted(linears.keys() ^ weights.keys())[:3]}")
    bits, group = bits_and_group(scheme)
    for name, module in linears.items():
        if (most := most_values(weights[name], group)) > 2**bits:
            raise RuntimeError(f"{name} has a group of {most} different weights, more than {bits} bits can say")
        linear_weight(module).data.copy_(weights[name])
    return model


def most_values(weight: torch.Tensor, group: int) -> int:
    """How many different values the group that has most of them has. weight: [out, in]."""
    ordered = weight.view(-1, group).sort(dim=1).values
    return 1 + int((ordered.diff(dim=1) != 0).sum(1).max())
