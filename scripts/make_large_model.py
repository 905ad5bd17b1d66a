"""Make a Llama model of a given size with random weights, in shards: to see what memory a model needs that is larger than it.

    python scripts/make_large_model.py FOLDER [--gigabytes 12] [--hidden 4096] [--inner 11008] [--shard-gigabytes 1]

The width and the number of blocks tell what a run needs, not what the weights are; the tokenizer is the demo model's. Memory stays below
two shards.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import ptqcli

DEMO = Path(ptqcli.__file__).parent / "demo"
HEAD_DIM = 128
SPREAD = 0.02  # standard deviation of the matrices


def shapes_of(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that the model stores."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def config_of(gigabytes: float, hidden: int, inner: int, vocabulary: int) -> LlamaConfig:
    """As many blocks as make about so many GB in bfloat16."""
    heads = max(1, hidden // HEAD_DIM)
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    outside = 2 * vocabulary * hidden
    block = 4 * hidden**2 + 3 * hidden * inner
    blocks = max(1, round((gigabytes * 1e9 / 2 - outside) / block))
    return LlamaConfig(**sizes, num_hidden_layers=blocks, dtype="bfloat16")


def shards(shapes: Mapping[str, tuple[int, ...]], most: float) -> Iterator[list[str]]:
    """The names of the tensors of each shard, which takes at most so many bytes."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if names and size + nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def make_large_model(folder: Path, config: LlamaConfig, shard_bytes: float, seed: int = 0) -> None:
    """Write the model, whose weights depend on the seed alone."""
    folder.mkdir(parents=True)
    shapes = shapes_of(config)
    generator = torch.Generator().manual_seed(seed)
    parts = list(shards(shapes, shard_bytes))
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: _random(shapes[name], generator) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {len(names)} tensors", flush=True)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for path in DEMO.glob("tokenizer*"):
        shutil.copy(path, folder)
    print(f"{folder}: {total / 1e9:.2f} GB, {config.num_hidden_layers} blocks")


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(0, SPREAD, generator=generator).bfloat16()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=12)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shard-gigabytes", type=float, default=1)
    asked = parser.parse_args()
    found = config_of(asked.gigabytes, asked.hidden, asked.inner, asked.vocabulary)
    make_large_model(asked.folder, found, asked.shard_gigabytes * 1e9)
