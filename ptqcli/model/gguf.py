"""A GGUF file as a model: its tensors under transformers' names, its tokenizer, and what a run that quantizes asks of a source."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.auxiliary import auxiliary_files, copy_auxiliary_files
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.gguf_blocks import PLAIN_DTYPES, values_of
from ptqcli.checkpoint.gguf_file import SUFFIX, GGUFFile, StoredTensor
from ptqcli.checkpoint.tensors import TensorSource, refuse_not_finite
from ptqcli.errors import PTQError
from ptqcli.model.config import build_on_meta
from ptqcli.model.gguf_architectures import architecture_of, names_in_file
from ptqcli.model.gguf_config import ROPE_FREQS, read_config
from ptqcli.model.gguf_tokenizer import build_tokenizer
from ptqcli.model.quantized import already_quantized, requantized_note
from ptqcli.temporary import temporary_folder
from ptqcli.untrusted import shown


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file that is called a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


class GGUFTensors(TensorSource):
    """The tensors of a file as transformers has them: its names, its order of rows, numbers in the place of blocks.

    packed: types whose matrices stay blocks. Such a tensor is called ``MODULE.q4_0`` in the place of ``MODULE.weight`` and is uint8
    [out, bytes of a row], for ``formats.gguf`` to read.
    """

    def __init__(self, file: GGUFFile, config: Any, packed: Collection[str] = ()) -> None:
        self.file, self._config, self._architecture = file, config, architecture_of(config)
        model = build_on_meta(config, len(file.stored))
        names = names_in_file(self._architecture, config.num_hidden_layers, model.state_dict())
        self._stored: dict[str, tuple[str, StoredTensor]] = {}  # name here -> of transformers, and what is stored
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        for name, theirs in names.items():
            if theirs in file.stored:
                module, kind = name.removesuffix(".weight"), file.stored[theirs].kind.name
                known_as = f"{module}.{kind.lower()}" if kind in packed and module in linears else name
                self._stored[known_as] = name, file.stored[theirs]
        self._refuse_strays(set(names.values()))

    def _refuse_strays(self, known: Collection[str]) -> None:
        stray = sorted(self.file.stored.keys() - known - {ROPE_FREQS})
        if stray:
            more = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
            raise PTQError(f"{self.file.path}: a {self._architecture.name} model of transformers has no tensor {shown(stray[0])}{more}")

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._stored))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""
        original, stored = self._entry(name)
        return stored.shape if original == name else (stored.shape[0], stored.kind.row_bytes(stored.shape[1]))

    def dtype(self, name: str) -> torch.dtype:
        """float32 for codes, uint8 for blocks, otherwise the stored dtype."""
        original, stored = self._entry(name)
        return PLAIN_DTYPES.get(stored.kind.name, torch.float32) if original == name else torch.uint8

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, decoded. Raises PTQError if it holds NaN or infinity, or its file has become shorter."""
        original, stored = self._entry(name)
        data = self.file.read(stored.name)
        order = self._architecture.row_order(original, stored.shape[0], self._config)
        if original != name:
            return data if order is None else data[order.argsort()]
        values = values_of(stored.kind, data).reshape(stored.shape)
        refuse_not_finite(values, f"{self.file.path}: tensor {stored.name}")
        shift = self._architecture.norm_shift(original)
        if shift:
            values = (values.float() - shift).to(values.dtype)
        return values if order is None else values[order.argsort()]

    def stored_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(stored.nbytes for _, stored in self._stored.values())

    def block_type(self, name: str) -> str:
        """The type in which ``name`` is stored, as ggml calls it."""
        return self._entry(name)[1].kind.name

    def is_quantized(self, name: str) -> bool:
        """Whether ``name`` is stored in codes."""
        return self._entry(name)[1].kind.quantized

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the numbers that ``name`` holds, whether they are decoded or not."""
        return self._entry(name)[1].shape

    def block_bytes(self, name: str) -> int:
        """Bytes of ``name`` in the file."""
        return self._entry(name)[1].nbytes

    def _entry(self, name: str) -> tuple[str, StoredTensor]:
        if name not in self._stored:
            raise PTQError(f"{self.file.path} holds no tensor {name}")
        return self._stored[name]


class GGUFModel:
    """A GGUF file as a model to quantize.

    Raises UsageError if its weights are quantized already, unless ``allow_requantize``, and PTQError for one that cannot be read.
    """

    def __init__(self, path: Path, allow_requantize: bool = False) -> None:
        self.folder: Path | None = path  # where it is on disk
        self.where = str(path)
        self.file = GGUFFile(path)
        self.config = read_config(self.file)
        self.notes: tuple[str, ...] = ()
        if getattr(self.config, "quantization_config", None) is not None:
            kinds = ", ".join(sorted({tensor.kind.name for tensor in self.file.stored.values() if tensor.kind.quantized}))
            if not allow_requantize:
                raise already_quantized(self.where, kinds)
            self.notes = (requantized_note(kinds),)
            del self.config.quantization_config

    @cached_property
    def tensors(self) -> TensorSource:
        """Its tensors, decoded."""
        return GGUFTensors(self.file, self.config)

    def tokenizer(self) -> Any:
        """The tokenizer in the file. Raises PTQError when there is none."""
        return load_tokenizer(self.file)

    def config_json(self) -> dict[str, Any]:
        """What would stand in config.json."""
        values: dict[str, Any] = json.loads(self.config.to_json_string(use_diff=True))
        return {key: value for key, value in values.items() if not key.startswith("_")}

    def write_auxiliary(self, folder: Directory) -> None:
        """Save the tokenizer, if there is one."""
        if not has_tokenizer(self.file):
            return
        with temporary_folder() as saved:
            self.tokenizer().save_pretrained(saved)
            copy_auxiliary_files(saved, auxiliary_files(saved), folder)

    def check_unchanged(self) -> None:
        """Raise PTQError if the file was replaced, cut or written to since it was opened."""
        self.file.stamp.check()


def load_config(path: Path) -> Any:
    """The transformers configuration of the file ``path``, see ``gguf_config.read_config``."""
    return read_config(GGUFFile(path))


def has_tokenizer(file: GGUFFile) -> bool:
    """Whether there are tokens in the file."""
    return file.metadata.get("tokenizer.ggml.model", "no_vocab") not in ("no_vocab", "none")


def load_tokenizer(file: GGUFFile) -> Any:
    """The tokenizer in a file, see ``gguf_tokenizer``. Raises PTQError when there is none, or it is damaged."""
    if not has_tokenizer(file):
        raise PTQError(f"{file.path}: holds no tokenizer; give the original model's folder where one is needed")
    return build_tokenizer(file)
