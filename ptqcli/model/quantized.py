"""Models that are stored with fewer bits than they were trained in, as sources: what is said of them, and FP8 and MXFP4 folders as models.

FP8 needs no permission: such models are published, and many were trained, that way. Whatever else is quantized is taken only by a user who
says so, since its error stays in the result and the new one adds to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.scaled_floats import BLOCK, FP8, ScaledFloats
from ptqcli.errors import PTQError, UsageError
from ptqcli.untrusted import shown

if TYPE_CHECKING:
    from ptqcli.model.source import ModelFolder

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
UNASKED = FP8.__name__


def already_quantized(where: str, stored_as: str) -> UsageError:
    """The refusal of a source whose weights are quantized. stored_as: in what."""
    return UsageError(
        f"{where}: its weights are quantized already ({stored_as}), and quantizing them again adds to that error; "
        "start from the original model, or give --allow-requantize"
    )


def requantized_note(stored_as: str) -> str:
    """What a plan says of a source whose weights are quantized, and which is taken all the same."""
    return f"its weights are quantized already ({stored_as}): what that has cost stays, and the error of this run is added to it"


def not_quantized(values: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in config.json, but for what tells readers that the model is quantized."""
    return {key: value for key, value in values.items() if key not in QUANTIZATION_KEYS}


def block_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    """The blocks of FP8 weights that share a scale, as a ``quantization_config`` tells them. Raises PTQError for what is no size."""
    groups = entry.get("config_groups")
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
    told = [entry.get("weight_block_size"), *(each.get("block_structure") for each in weights if isinstance(each, Mapping))]
    found = next((each for each in told if each is not None), BLOCK)
    if not (isinstance(found, (list, tuple)) and len(found) == 2 and all(type(size) is int and 0 < size < 2**31 for size in found)):
        raise PTQError(f"quantization_config: blocks of {shown(found)} are not rows and columns; write such as [128, 128]")
    return found[0], found[1]


def scaled_floats(folder: ModelFolder) -> ScaledFloats | None:
    """The tensors of a folder with 8- or 4-bit floats among them, as numbers; None where there are none.

    They become what config.json names as the model's dtype, bfloat16 where it names none.
    """
    entry = getattr(folder.config, "quantization_config", None)
    if not isinstance(entry, Mapping):
        return None
    found = ScaledFloats(folder.tensors, folder.config.dtype or torch.bfloat16, block_of(entry))
    return found if found.kinds else None


class ScaledModel:
    """A folder with 8- or 4-bit floats, a ``ModelSource`` of the numbers that they stand for. files: the folder. tensors: its numbers.

    Raises UsageError for MXFP4, unless ``allow_requantize``.
    """

    def __init__(self, files: ModelFolder, tensors: ScaledFloats, allow_requantize: bool = False) -> None:
        self.folder: Path | None = files.folder
        self.where, self.config = files.where, copy.deepcopy(files.config)
        self.config.quantization_config = None
        self.tensors = tensors
        self._files = files
        asking = [kind for kind in tensors.kinds if kind != UNASKED]
        if asking and not allow_requantize:
            raise already_quantized(self.where, ", ".join(asking))
        self.notes = tuple(self._note(kind) for kind in tensors.kinds)

    def _note(self, kind: str) -> str:
        if kind != UNASKED:
            return requantized_note(kind)
        size = self.tensors.stored.total_bytes
        return f"its weights are stored in FP8 ({size / 1e9:,.2f} GB in all), and are quantized from the numbers that those stand for"

    def tokenizer(self) -> Any:
        """The tokenizer in the folder. Raises PTQError when there is none."""
        return self._files.tokenizer()

    def config_json(self) -> dict[str, Any]:
        """What stands in config.json, but for what tells readers that the model is quantized."""
        return not_quantized(self._files.config_json())

    def write_auxiliary(self, folder: Directory) -> None:
        """Copy the files beside the weights."""
        self._files.write_auxiliary(folder)

    def check_unchanged(self) -> None:
        """Raise PTQError, naming it, if a file has changed since the model was opened."""
        self._files.check_unchanged()
