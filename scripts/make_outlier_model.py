"""Make a model with outlier channels: the demo model with a few large channels in every norm, computing what it computed.

    python scripts/make_outlier_model.py FOLDER

Models of billions of parameters have such channels by themselves, and they are what 8-bit activations fail on (Dettmers et al. 2022,
section 4). Here 1 % of the channels of each norm are multiplied by 100 to 300 and the columns of the linears behind it divided.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import ptqcli

DEMO = Path(ptqcli.__file__).parent / "demo"

SHARE = 0.01  # of the channels of a norm
SMALLEST, LARGEST = 100.0, 300.0
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def make_outlier_model(folder: Path, seed: int = 0) -> Path:
    """Write the demo model in float32 to ``folder``, some channels of its norms multiplied and their readers' columns divided.

    In float32, since the factors are no powers of two.
    """
    shutil.copytree(DEMO, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in READERS:
            factors = outlier_factors(len(tensors[name]), generator)
            tensors[name] *= factors
            for reader in READERS[norm]:
                tensors[f"{block}.{reader}.weight"] /= factors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


def outlier_factors(channels: int, generator: torch.Generator) -> torch.Tensor:
    """1 for all of ``channels`` but a few, which get something between SMALLEST and LARGEST."""
    factors = torch.ones(channels)
    chosen = torch.randperm(channels, generator=generator)[: max(1, round(channels * SHARE))]
    factors[chosen] = SMALLEST + (LARGEST - SMALLEST) * torch.rand(len(chosen), generator=generator)
    return factors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make_outlier_model(parser.parse_args().folder))
