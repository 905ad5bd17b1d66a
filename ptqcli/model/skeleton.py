"""A model without its weights, and one unit's weights at a time.

``Skeleton`` builds the transformers model on the meta device (no memory), finds the repeated blocks and their linears by looking
at the module tree, learns from one pass without weights in which order the linears run and which of them read the very same
tensor, and maps every parameter's name in memory to its name in the file. Nothing here knows an architecture by name.

The stored tensors fall into units, each tensor into one: what runs before the blocks, each block, and all that is left. A unit is
loaded, worked on, written and released. While it is at work its stored tensors are kept, so that each is read once a run: a loaded
parameter of the same dtype on the CPU is the stored tensor itself, and is therefore replaced, never written into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ptqcli.checkpoint.stacked import UnstackedTensors
from ptqcli.checkpoint.tensors import FLOATING, TensorSource
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.classes import build_classes
from ptqcli.model.discovery import Probe, find_blocks, linear_size, listed, probe_model
from ptqcli.model.experts import stacked_parameters
from ptqcli.model.kinds import kind_of
from ptqcli.model.linears import LinearSite, is_linear, linear_weight
from ptqcli.model.names import DiskNames
from ptqcli.model.source import ModelSource


@dataclass(frozen=True)
class Unit:
    """Tensors that are loaded, worked on and written together. name: for people. stored: their names in the file."""

    name: str
    stored: tuple[str, ...]


class Skeleton:
    """A model opened for work on one unit after the other.

    blocks: name of the ModuleList to quantize, needed only when several candidates exist. Raises PTQError or UsageError, by name, for
    whatever cannot be quantized this way.
    """

    def __init__(self, source: ModelSource, blocks: str | None = None) -> None:
        self.source, self.where, self.config = source, source.where, source.config
        if getattr(self.config, "quantization_config", None) is not None:
            raise PTQError(f"{self.where}: is already quantized; start from the original model")
        self.kind = kind_of(self.config)
        self._tensors: TensorSource = source.tensors
        self._kept: dict[str, Tensor] = {}  # stored tensors of the units at work
        classes = build_classes(self.config, self._tensors.names, source.config_json().get("architectures"))
        if classes.cut:
            self._tensors = UnstackedTensors(source.tensors, classes.cut)
        self.classes, self.unbuilt, self.loaded_as = classes.built, classes.unbuilt, classes.loaded_as(self.kind)
        self.model, self.names = self.classes[0]
        self.names.refuse_assembled()
        self.names.refuse_twice()
        self._refuse_missing()
        self._refuse_stacks()
        probe = probe_model(self.model, self.kind)
        self.blocks_name = find_blocks(self.model, blocks, probe.order)
        if blocks is None:
            self._refuse_few(probe)
        self.blocks: list[nn.Module] = list(self.model.get_submodule(self.blocks_name).children())
        self.shapes = [probe.shape(self.block_prefix(index)) for index in range(len(self.blocks))]
        self._late = probe.behind(self.block_prefix(len(self.blocks) - 1))
        self.linears = [site for index in range(len(self.blocks)) for site in self._sites(index)]
        self.before, self.units, self.after = self._units()

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the model by their names in memory."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    def _sites(self, index: int) -> Iterator[LinearSite]:
        prefix = self.block_prefix(index)
        for local, module in self.blocks[index].named_modules():
            if is_linear(module):
                out_features, in_features = linear_weight(module).shape
                yield LinearSite(
                    name=f"{prefix}.{local}",
                    local=local,
                    block=index,
                    in_features=in_features,
                    out_features=out_features,
                    kind=type(module).__name__,
                )

    @cached_property
    def stacks(self) -> dict[str, int]:
        """Size of each parameter that is a stack of matrices and has stayed one."""
        return {name: parameter.numel() for name, parameter in stacked_parameters(self.model).items()}

    @cached_property
    def other_parameters(self) -> list[str]:
        """Parameters of the blocks that are more than a row and belong to no linear, such as kernels of convolutions, tables, states."""
        return [
            f"{self.block_prefix(index)}.{name}"
            for index, block in enumerate(self.blocks)
            for name, parameter in block.named_parameters()
            if parameter.dim() > 1 and not is_linear(_owner(block, name)[0])
        ]

    @cached_property
    def matrix_size(self) -> int:
        """Weights in all matrices of the model, stacks too; neither embeddings nor the output head."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return linear_size(self.model) - (0 if head is None else linear_size(head)) + sum(self.stacks.values())

    def _refuse_stacks(self) -> None:
        share = sum(self.stacks.values()) / max(self.matrix_size, 1)
        if share > 0.5:
            largest = max(self.stacks, key=lambda name: self.stacks[name])
            raise PTQError(
                f"{largest}: {share:.0%} of the weights in the model's matrices are in stacks like this one of "
                f"{list(self.model.get_parameter(largest).shape)}, which are not multiplied matrix by matrix, or are stored in another form"
            )

    def _refuse_few(self, probe: Probe) -> None:
        """Quantizing the linears of the blocks must be quantizing what runs on text."""
        ran = {name for name, _, _ in probe.calls if not self._is_head(name)}
        total = sum(linear_size(self.model.get_submodule(name)) for name in ran)
        inside = sum(linear_size(self.model.get_submodule(name)) for name in ran if name.startswith(self.blocks_name + "."))
        if 2 * inside < total:
            raise UsageError(
                f"the largest list of blocks, {self.blocks_name}, holds {100 * inside // total} % of the linear weights that run on text, "
                f"and the rest would stay as it is; use --blocks {self.blocks_name} if that is meant, or name another list"
            )

    def _is_head(self, name: str) -> bool:
        return self.model.get_submodule(name) is self.model.get_output_embeddings()  # type: ignore[operator]

    def _refuse_missing(self) -> None:
        if self.names.missing:
            raise PTQError(
                f"{self.where}: the safetensors files hold no tensor for {listed(self.names.missing)}; "
                "the download may be incomplete or the model type may not match config.json"
            )
        for name, wanted in self.model.state_dict().items():
            stored = self.names.disk(name)
            if stored is None:
                continue  # a persistent buffer that old files do not carry
            shape, dtype = list(self._tensors.shape(stored)), self._tensors.dtype(stored)
            if shape != list(wanted.shape):
                raise PTQError(f"{self.where}: tensor {stored} has shape {shape} but config.json asks for {list(wanted.shape)}")
            if (dtype not in FLOATING) if wanted.is_floating_point() else dtype.is_floating_point:
                kind = "already quantized or not a weight" if wanted.is_floating_point() else "no whole number"
                raise PTQError(f"{self.where}: tensor {stored} is stored as {dtype}, which is {kind}; start from the original model")

    def _units(self) -> tuple[Unit, list[Unit], Unit]:
        """Each stored tensor in the first unit that wants it; what no parameter takes is carried over in the last."""
        owners: dict[str, int] = {}
        last = len(self.blocks) + 1
        for name, stored in self.names.items():
            owners[stored] = min(owners.get(stored, last), self._unit_of(name))
        members: list[list[str]] = [[] for _ in range(last + 1)]
        for stored in self._tensors.names:
            members[owners.get(stored, last)].append(stored)
        titles = ["what runs before the blocks", *map(self.block_prefix, range(len(self.blocks))), "what runs behind the blocks"]
        before, *blocks, after = (Unit(title, tuple(stored)) for title, stored in zip(titles, members, strict=True))
        return before, blocks, after

    def _unit_of(self, name: str) -> int:
        """0 before the blocks, then one number a block, then one for what runs behind them."""
        if name.startswith(self.blocks_name + "."):
            return 1 + int(name.removeprefix(self.blocks_name + ".").partition(".")[0])
        return len(self.blocks) + 1 if name.rpartition(".")[0] in self._late else 0

    # Names

    @cached_property
    def shared(self) -> dict[str, str]:
        """Linears of the blocks whose weight has another place in the model -> the first other place."""
        places = _by_stored_name([self.names])
        found = {}
        for site in self.linears:
            others = [name for name in places[self.stored_name(f"{site.name}.weight")] if name != f"{site.name}.weight"]
            if others:
                found[site.name] = others[0].removesuffix(".weight")
        return found

    @cached_property
    def _names_of(self) -> dict[str, list[str]]:
        """Stored tensor -> its names in all classes."""
        return _by_stored_name([names for _, names in self.classes])

    def aliases(self, name: str) -> tuple[str, ...]:
        """Other names of the linear ``name``: in the class that config.json names or, where that is not known, in the file."""
        stored = self.stored_name(f"{name}.weight")
        names = [*self._names_of[stored], *([stored] if self.unbuilt else [])]
        return tuple(dict.fromkeys(linear for linear in (other.removesuffix(".weight") for other in names) if linear != name))

    def plain_names(self, quantized: Iterable[str]) -> tuple[str, ...]:
        """All matrices but those of the linears ``quantized``, by every name that a reader may know: its class's, or the file's."""
        packed = {self.stored_name(f"{name}.weight") for name in quantized}
        linears = [
            name
            for model, names in self.classes
            for name, module in model.named_modules()
            if (isinstance(module, nn.Linear) or is_linear(module)) and names.disk(f"{name}.weight") not in packed
        ]
        matrices = [name for name in self._tensors.names if name not in packed and len(self._tensors.shape(name)) == 2]
        stored = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
        # Readers take these for patterns and for classes of modules; a tensor of such a name is no module's.
        classes = {type(module).__name__ for model, _ in self.classes for module in model.modules()}
        stored = [name for name in stored if name not in classes and not name.startswith("re:")]
        return tuple(dict.fromkeys([*linears, *stored]))

    # Stored tensors

    def stored_name(self, name: str) -> str:
        """The stored name of the parameter ``name``. Raises PTQError if the file has none."""
        stored = self.names.disk(name)
        if stored is None:
            raise PTQError(f"{self.where}: no stored tensor for {name}")
        return stored

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the parameter ``name`` is stored."""
        return self._tensors.dtype(self.stored_name(name))

    def nbytes(self, name: str) -> int:
        """The stored bytes of the parameter ``name``."""
        return self._tensors.nbytes(self.stored_name(name))

    def unit_bytes(self, unit: Unit) -> int:
        """The stored bytes of all tensors of ``unit``."""
        return sum(self._tensors.nbytes(stored) for stored in unit.stored)

    @property
    def total_bytes(self) -> int:
        """The stored bytes of the whole model."""
        return self._tensors.total_bytes

    def read(self, name: str) -> Tensor:
        """The parameter ``name`` as it is stored, on the CPU; not to be written into. It is kept until its unit is released."""
        return self.read_stored(self.stored_name(name))

    def read_stored(self, stored: str) -> Tensor:
        """As ``read``, by the name in the file."""
        if stored not in self._kept:
            self._kept[stored] = self._tensors.read(stored)
        return self._kept[stored]

    def put(self, stored: str, value: Tensor) -> None:
        """Read ``value`` in the place of the tensor ``stored`` until its unit is released."""
        self._kept[stored] = value

    # Units

    def block_prefix(self, index: int) -> str:
        """Path of block ``index`` in the model, such as ``model.layers.3``."""
        return f"{self.blocks_name}.{index}"

    def pass_work(self, tokens: int) -> float:
        """Floating operations of one pass over ``tokens``, and of writing them where earlier tokens' keys are kept: two a weight."""
        return 2.0 * tokens * sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def fused_groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears that servers run as one matrix (q, k and v; gate and up): paths in the model, in running order."""
        return tuple(
            tuple(f"{self.block_prefix(index)}.{local}" for local in group)
            for index, shape in enumerate(self.shapes)
            for group in shape.fused_groups
        )

    def load_block(self, index: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Block ``index`` with its weights on ``device``, floating tensors as ``dtype``."""
        block, prefix = self.blocks[index], self.block_prefix(index) + "."
        state = {}
        for key in block.state_dict():
            if self.names.disk(prefix + key) is None:
                continue  # a persistent buffer that old files do not carry; it was computed when the skeleton was built
            value = self.read(prefix + key).to(device)
            state[key] = value.to(dtype) if value.is_floating_point() else value
        block.load_state_dict(state, assign=True, strict=False)
        block.requires_grad_(False)
        return block.to(device)

    @contextmanager
    def loaded_before(self, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """The model with what runs before its blocks loaded for the duration."""
        with self._loaded([name for name, _ in self.model.named_parameters() if self._unit_of(name) == 0], device, dtype):
            yield self.model

    @contextmanager
    def loaded_outside(self, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """The model with all but its blocks loaded for the duration; what is stored for that is not kept."""
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False) if not name.startswith(self.blocks_name + ".")]
        with self._loaded(names, device, dtype):
            self.release(self.before)
            self.release(self.after)
            yield self.model

    @contextmanager
    def _loaded(self, names: Sequence[str], device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """The parameters ``names``, and all buffers, on ``device``; of two that are stored as one tensor both are one."""
        loaded: dict[str, nn.Parameter] = {}
        for name in names:
            module, leaf = _owner(self.model, name)
            stored = self.stored_name(name)
            if stored not in loaded:
                loaded[stored] = nn.Parameter(self.read(name).to(device, dtype), requires_grad=False)
            module._parameters[leaf] = loaded[stored]
        for name, buffer in list(self.model.named_buffers()):
            module, leaf = _owner(self.model, name)
            module._buffers[leaf] = buffer.to(device)
        try:
            yield
        finally:
            for name in names:
                _empty(*_owner(self.model, name))

    def release(self, unit: Unit) -> None:
        """Give the memory of ``unit`` back; the parameters of a block return to the meta device."""
        for stored in unit.stored:
            self._kept.pop(stored, None)
        if unit in self.units:
            for module in self.blocks[self.units.index(unit)].modules():
                for leaf in module._parameters:
                    _empty(module, leaf)


def _by_stored_name(classes: Sequence[DiskNames]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for names in classes:
        for name, stored in names.items():
            found.setdefault(stored, []).append(name)
    return found


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _empty(module: nn.Module, leaf: str) -> None:
    parameter = module._parameters[leaf]
    if parameter is not None:
        module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
