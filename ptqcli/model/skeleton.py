"""A model without its weights, and one block's weights at a time.

``Skeleton`` builds the transformers model on the meta device (no memory), finds the repeated blocks and their linears by looking
at the module tree, learns from one pass of empty tensors in which order the linears run and which of them read the very same
tensor, and maps every parameter's name in memory to its name in the safetensors file. Nothing here knows an architecture by name.

Names differ between file and memory in three ways, all handled here: a base-model prefix that only one of the two has
(``h.0.attn...`` and ``transformer.h.0.attn...``), plain renamings that transformers itself declares for a model type, and an output
head that is tied to the embedding and so is not in the file. Parameters that transformers would assemble from several stored
tensors (fused experts) are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.errors import PTQError
from ptqcli.model.config import build_on_meta, load_config
from ptqcli.model.discovery import _some, find_blocks, probe_blocks
from ptqcli.model.linears import LinearSite, is_linear, linear_weight
from ptqcli.model.names import DiskNames


class Skeleton:
    """A model folder opened for block-by-block work.

    folder: a local model folder with config.json and safetensors. blocks: name of the ModuleList to quantize, needed only when several
    candidates exist. Raises PTQError or UsageError, by name, for whatever cannot be quantized this way.
    """

    def __init__(self, folder: Path, blocks: str | None = None) -> None:
        self.folder = folder
        self.config = load_config(folder)
        if getattr(self.config, "quantization_config", None) is not None:
            raise PTQError(f"{folder}: is already quantized; start from the original model")
        self.reader = SafetensorsFolder(folder)
        self.model = build_on_meta(self.config)
        self.names = DiskNames(self.model, self.reader.names)
        self.blocks_name = find_blocks(self.model, blocks)
        self.blocks: list[nn.Module] = list(self.model.get_submodule(self.blocks_name).children())
        self._refuse_fused_experts()
        self._refuse_missing()
        self.shapes = probe_blocks(self.model, self.blocks)
        self.linears = [site for index in range(len(self.blocks)) for site in self._sites(index)]

    def _sites(self, index: int) -> Iterator[LinearSite]:
        prefix = f"{self.blocks_name}.{index}"
        for local, module in self.blocks[index].named_modules():
            if is_linear(module):
                out_features, in_features = linear_weight(module).shape
                yield LinearSite(f"{prefix}.{local}", local, index, in_features, out_features, type(module).__name__)

    def _refuse_fused_experts(self) -> None:
        for name, parameter in self.model.get_submodule(self.blocks_name).named_parameters():
            if parameter.dim() == 3 and parameter.numel() > 0 and min(parameter.shape) > 1:
                raise PTQError(
                    f"{self.blocks_name}.{name}: fused expert weights {list(parameter.shape)} are not supported yet; "
                    "choose a model without mixture-of-experts layers"
                )

    def _refuse_missing(self) -> None:
        missing = [name for name, _ in self.model.named_parameters() if self.names.disk(name) is None]
        if missing:
            raise PTQError(
                f"{self.folder}: the safetensors files hold no tensor for {_some(missing)}; "
                "the download may be incomplete or the model type may not match config.json"
            )
        for name, parameter in self.model.named_parameters():
            stored = self.reader.shape(self.disk_name(name))
            if tuple(stored) != tuple(parameter.shape):
                raise PTQError(
                    f"{self.folder}: tensor {self.disk_name(name)} has shape {list(stored)} but config.json asks for "
                    f"{list(parameter.shape)}"
                )

    def disk_name(self, name: str) -> str:
        """The stored name of the parameter ``name``. Raises PTQError if the file has none."""
        stored = self.names.disk(name)
        if stored is None:
            raise PTQError(f"{self.folder}: no stored tensor for {name}")
        return stored

    def block_prefix(self, index: int) -> str:
        """Path of block ``index`` in the model, such as ``model.layers.3``."""
        return f"{self.blocks_name}.{index}"

    def block_disk_names(self, index: int) -> list[str]:
        """Stored names of all tensors that belong to block ``index``."""
        prefix = self.block_prefix(index) + "."
        return [stored for name, stored in self.names.items() if name.startswith(prefix)]

    def load_block(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Block ``index`` with its weights on ``device``, floating tensors as ``dtype``."""
        block = self.blocks[index]
        self._fill(block, self.block_prefix(index) + ".", device, dtype)
        return block.to(device)

    def release_block(self, index: int) -> None:
        """Give the memory of block ``index`` back; its parameters return to the meta device."""
        _release(self.blocks[index])

    @contextmanager
    def outside_loaded(self, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """The model with everything before and after its blocks loaded for the duration, the output head excepted."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        own = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        prefix = self.blocks_name + "."
        embedding = {id(parameter) for parameter in self.model.get_input_embeddings().parameters()}  # type: ignore[operator]
        outside = [
            name
            for name, parameter in self.model.named_parameters()
            if not name.startswith(prefix) and (id(parameter) in embedding or id(parameter) not in own)
        ]
        for name in outside:
            module, leaf = _owner(self.model, name)
            value = self.reader.read(self.disk_name(name)).to(device, dtype)
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for buffer_name, buffer in list(self.model.named_buffers()):
            module, leaf = _owner(self.model, buffer_name)
            module._buffers[leaf] = buffer.to(device)
        try:
            yield self.model
        finally:
            for name in outside:
                module, leaf = _owner(self.model, name)
                module._parameters[leaf] = nn.Parameter(_on_meta(module._parameters[leaf]), requires_grad=False)

    def _fill(self, module: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
        state = {}
        for key in module.state_dict():
            stored = self.names.disk(prefix + key)
            if stored is None:
                continue  # a persistent buffer that old files do not carry; it was computed when the skeleton was built
            value = self.reader.read(stored).to(device)
            state[key] = value.to(dtype) if value.is_floating_point() else value
        module.load_state_dict(state, assign=True, strict=False)
        module.requires_grad_(False)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _on_meta(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    return torch.empty_like(parameter, device="meta")


def _release(module: nn.Module) -> None:
    for inner in module.modules():
        for leaf, parameter in inner._parameters.items():
            if parameter is not None:
                inner._parameters[leaf] = nn.Parameter(_on_meta(parameter), requires_grad=False)
