"""What llama.cpp calls the models that can be read from GGUF files and written to them, and how their tensors differ from transformers'.

    permuted         rows of q and k: transformers rotates element i of a head together with i + h/2, llama.cpp's ``llama`` neighbours
    shifted norms    Gemma multiplies by 1 + w; the file holds 1 + w

Everything else a tensor keeps but its name, for which the gguf package has the table. An architecture stands here once both directions have
been compared with llama.cpp itself; any other is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptqcli.errors import PTQError
from ptqcli.untrusted import shown


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A kind of model. name: llama.cpp's. model_types: transformers', the first being what a file is read as. See the module for the rest.

    activation: of the MLP, which no file names. window_every: of so many layers all but the last look at a sliding window; 0: none does.
    """

    name: str
    model_types: tuple[str, ...]
    activation: str = "silu"
    permuted: bool = False
    shifted_norms: bool = False
    window_every: int = 0

    def row_order(self, name: str, rows: int, config: Any) -> Tensor | None:
        """Row of transformers' tensor ``name`` that stands in each row of the file, int64 [rows]; None where they are the same."""
        layer = name.rpartition(".")[0].rpartition(".")[2]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer)
        if not self.permuted or heads is None:
            return None
        return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()

    def norm_shift(self, name: str) -> float:
        """What the file adds to transformers' tensor ``name``."""
        return 1.0 if self.shifted_norms and name.endswith("norm.weight") else 0.0


ARCHITECTURES = {
    each.name: each
    for each in (
        Architecture(name="llama", model_types=("llama", "mistral"), permuted=True),
        Architecture(name="qwen2", model_types=("qwen2",)),
        Architecture(name="qwen3", model_types=("qwen3",)),
        Architecture(name="gemma", model_types=("gemma",), activation="gelu_pytorch_tanh", shifted_norms=True),
        Architecture(name="gemma2", model_types=("gemma2",), activation="gelu_pytorch_tanh", shifted_norms=True, window_every=2),
        Architecture(name="gemma3", model_types=("gemma3_text",), activation="gelu_pytorch_tanh", shifted_norms=True, window_every=6),
    )
}


def architecture_named(name: str, where: str) -> Architecture:
    """The architecture that llama.cpp calls ``name``. Raises PTQError, listing what is read, for another."""
    if name not in ARCHITECTURES:
        raise PTQError(f"{where}: general.architecture is {shown(name)}, which is not read; what is read: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers configuration. Raises PTQError, listing what can be written, for one that has none here."""
    found = next((each for each in ARCHITECTURES.values() if config.model_type in each.model_types), None)
    if found is None:
        written = ", ".join(name for each in ARCHITECTURES.values() for name in each.model_types)
        raise PTQError(f"{config.name_or_path}: a model of type {config.model_type} cannot be a GGUF file yet; what can: {written}")
    return found


def names_in_file(architecture: Architecture, blocks: int, names: Iterable[str]) -> dict[str, str]:
    """transformers' tensor names -> those of a GGUF file, for the ``names`` that have one.

    Raises PTQError if the gguf package is missing, or maps two of them to one.
    """
    gguf = gguf_package()
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(number, blocks)
    found: dict[str, str] = {}
    for name in names:
        known = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            continue
        if known in found.values():
            raise PTQError(f"the gguf package calls two tensors of a {architecture.name} model {known}, {name} being one; update it")
        found[name] = known
    return found


def gguf_package() -> Any:
    """The package that knows llama.cpp's names. Raises PTQError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise PTQError("GGUF files need the package gguf; install it with pip install 'ptqcli[gguf]'") from error
    return gguf
