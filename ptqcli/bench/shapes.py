"""Which matrices to time: those of a checkpoint, those of well-known models, or any.

The sizes of well-known models are those of their published config.json. q, k and v are one matrix and gate and up another, as
``load_quantized`` runs them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ptqcli.errors import UsageError
from ptqcli.formats.gguf import decoded_note
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.gguf import is_gguf
from ptqcli.model.kinds import kind_of
from ptqcli.numerics.scheme import Scheme
from ptqcli.runtime import same_input
from ptqcli.suggest import did_you_mean


@dataclass(frozen=True)
class Shape:
    """A linear [out_features, in_features]. count: how many of them a model has."""

    name: str
    in_features: int
    out_features: int
    count: int


@dataclass(frozen=True)
class _Sizes:
    """What config.json calls num_hidden_layers, hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "llama2-7b": _Sizes(32, 4096, 11008, 32, 32, 128),
    "llama3-8b": _Sizes(32, 4096, 14336, 32, 8, 128),
    "llama3-70b": _Sizes(80, 8192, 28672, 64, 8, 128),
    "llama3.2-1b": _Sizes(16, 2048, 8192, 32, 8, 64),
    "llama3.2-3b": _Sizes(28, 3072, 8192, 24, 8, 128),
    "qwen2.5-7b": _Sizes(28, 3584, 18944, 28, 4, 128),
    "qwen3-0.6b": _Sizes(28, 1024, 3072, 16, 8, 128),
    "qwen3-4b": _Sizes(36, 2560, 9728, 32, 8, 128),
    "qwen3-8b": _Sizes(36, 4096, 12288, 32, 8, 128),
    "qwen3-14b": _Sizes(40, 5120, 17408, 40, 8, 128),
    "qwen3-32b": _Sizes(64, 5120, 25600, 64, 8, 128),
    "mistral-7b": _Sizes(32, 4096, 14336, 32, 8, 128),
    "gemma3-4b": _Sizes(34, 2560, 10240, 8, 4, 256),
    "gemma3-12b": _Sizes(48, 3840, 15360, 16, 8, 256),
    "gemma3-27b": _Sizes(62, 5376, 21504, 32, 16, 128),
    "phi4": _Sizes(40, 5120, 17920, 40, 10, 128),
}


def named_shapes(text: str) -> list[Shape]:
    """The linears of a model in MODELS, or those that ``text`` lists as ``4096x14336,14336x4096``: in x out, each counted once.

    Raises UsageError, with the names that there are, for anything else.
    """
    name = text.strip().lower()
    if name in MODELS:
        return _block_shapes(MODELS[name])
    sizes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in name.split(",")]
    pairs = [(int(size[1]), int(size[2])) for size in sizes if size is not None]
    if len(pairs) < len(sizes):
        raise UsageError(
            f"--shapes {text}: is no known model and no list of sizes such as 4096x14336 (in x out); "
            f"known: {', '.join(MODELS)}{did_you_mean(name, MODELS)}"
        )
    return [Shape(f"{size[0]}x{size[1]}", *size, pairs.count(size)) for size in dict.fromkeys(pairs)]


def _block_shapes(sizes: _Sizes) -> list[Shape]:
    heads, cached = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    return [
        Shape("qkv", sizes.hidden, heads + 2 * cached, sizes.layers),
        Shape("o", heads, sizes.hidden, sizes.layers),
        Shape("gate_up", sizes.hidden, 2 * sizes.intermediate, sizes.layers),
        Shape("down", sizes.intermediate, sizes.hidden, sizes.layers),
    ]


def shapes_of(folder: Path) -> list[tuple[Shape, Scheme]]:
    """The matrices that the checkpoint ``folder`` multiplies by, with their schemes, equal ones counted, in the order of the model.

    Linears of one input are one matrix, as ``load_quantized`` runs them, and are called ``q_proj+k_proj+v_proj``; matrices that are equal
    under several names have them all: ``q_proj/o_proj``. No weight is read. Raises PTQError or UsageError, naming file or key, when the
    folder is no quantized model, cannot be understood or has no such linear.
    """
    packed = open_checkpoint(folder)
    schemes = {name: scheme for name, scheme in packed.schemes.items() if scheme.blocks is None}  # no kernel multiplies others
    if not schemes and is_gguf(folder):
        raise UsageError(f"{decoded_note(folder)}, so it has no kernels of its own; give --only model, or --shapes for kernels")
    if not schemes:
        raise UsageError(f"{folder}: config.json names no linear of the model as quantized, so there is nothing to time")
    found: dict[tuple[int, int, Scheme], list[str]] = {}
    for names in same_input(packed.model, kind_of(packed.config), schemes):
        for scheme in dict.fromkeys(packed.schemes[name] for name in names):
            alike = [packed.spec(name) for name in names if packed.schemes[name] == scheme]
            key = (alike[0].in_features, sum(spec.out_features for spec in alike), scheme)
            found.setdefault(key, []).append("+".join(spec.name.rpartition(".")[2] for spec in alike))
    return [
        (Shape("/".join(dict.fromkeys(names)), in_features, out_features, len(names)), scheme)
        for (in_features, out_features, scheme), names in found.items()
    ]
