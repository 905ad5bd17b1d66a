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

import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from ptqcli.checkpoint import CheckpointReader
from ptqcli.errors import PTQError, UsageError

# Tokens of the pass of empty tensors; more than one, so that code which treats single-token decoding apart is not taken.
PROBE_TOKENS = 8

# What transformers raises, depending on the model type, for a value in config.json that makes no sense.
CONFIG_ERRORS = (ValueError, KeyError, TypeError, AttributeError, AssertionError, ZeroDivisionError, StrictDataclassError)


@dataclass(frozen=True)
class LinearSite:
    """Where one linear stands. ``name`` is its path in the whole model, ``local`` its path inside the block."""

    name: str
    local: str
    block: int
    in_features: int
    out_features: int
    kind: str  # name of its class

    @property
    def transposed(self) -> bool:
        """Whether it stores its matrix as [in, out], as GPT-2's Conv1D does."""
        return self.kind == Conv1D.__name__


@dataclass(frozen=True)
class BlockShape:
    """What the pass of empty tensors told of one block.

    stages: linears in the order in which they run, those that read the same tensor together (local names).
    returns_tuple / extra_outputs: how the block returns its hidden states. unused: linears that did not run. repeated: linears that
    ran more than once.
    """

    stages: tuple[tuple[str, ...], ...]
    returns_tuple: bool
    extra_outputs: int
    unused: tuple[str, ...]
    repeated: tuple[str, ...]


def is_linear(module: nn.Module) -> bool:
    """True for the modules that hold a quantizable matrix: ``nn.Linear`` and GPT-2's transposed twin ``Conv1D``."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_weight(module: nn.Module) -> Tensor:
    """The matrix of a linear as a [out, in] view, whichever way the module stores it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return rows_first(module, weight)


def rows_first(linear: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` of ``linear`` turned from the way the module stores it to [out, in], or back."""
    return weight.t() if isinstance(linear, Conv1D) else weight


def load_config(folder: Path) -> Any:
    """The transformers configuration in ``folder``. Raises PTQError when it is missing, broken, or needs code from the folder."""
    from transformers import AutoConfig

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such model folder")
    if not (folder / "config.json").is_file():
        raise PTQError(f"{folder}: has no config.json, so it is not a transformers model folder")
    try:
        with _quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, *CONFIG_ERRORS) as error:
        if "trust_remote_code" in str(error):
            raise PTQError(f"{folder}: the model needs Python code from its folder, which is never run") from error
        raise PTQError(f"{folder / 'config.json'}: transformers cannot read it ({_first_line(error)})") from error
    return config


def refuse_other_kinds(config: Any) -> None:
    """Raise PTQError unless ``config`` is that of a causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # Of encoder-decoders transformers would build the decoder alone.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise PTQError(f"a model of type {config.model_type} is not a causal language model, which is all that is supported")


def build_on_meta(config: Any) -> nn.Module:
    """The causal language model of ``config`` with parameters on the meta device and its constant buffers computed on the CPU."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    refuse_other_kinds(config)
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False), _quiet_transformers():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ImportError, RuntimeError, *CONFIG_ERRORS) as error:
        raise PTQError(f"transformers cannot build a causal language model from this config: {_first_line(error)}") from error
    return model.eval()


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
        self.reader = CheckpointReader(folder)
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


class DiskNames:
    """Parameter and buffer names in memory -> tensor names in the file."""

    def __init__(self, model: nn.Module, stored: Sequence[str]) -> None:
        memory = set(model.state_dict())
        prefix = getattr(model, "base_model_prefix", "") + "."
        renamings, conversions = _declared_renamings(model)
        self._disk: dict[str, str] = {}
        self.unmatched: list[str] = []
        for name in stored:
            target = next((t for t in _candidates(name, prefix, renamings) if t in memory), None)
            if target is None:
                self._refuse_conversion(name, conversions)
                self.unmatched.append(name)
            else:
                self._disk.setdefault(target, name)
        for tied, source in _tied(model, memory):
            # The file holds one of the two, most often but not always the embedding.
            for name, twin in ((tied, source), (source, tied)):
                if twin in self._disk:
                    self._disk.setdefault(name, self._disk[twin])

    @staticmethod
    def _refuse_conversion(name: str, conversions: Sequence[Any]) -> None:
        for conversion in conversions:
            if conversion.rename_source_key(name)[1] is not None:
                raise PTQError(
                    f"tensor {name}: transformers assembles this parameter from several stored tensors, which is not supported yet"
                )

    def disk(self, name: str) -> str | None:
        """Stored name of ``name``, or None."""
        return self._disk.get(name)

    def items(self) -> list[tuple[str, str]]:
        """Pairs (name in memory, stored name)."""
        return list(self._disk.items())


def _declared_renamings(model: nn.Module) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    declared = get_model_conversion_mapping(model)
    renamings = [entry for entry in declared if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in declared if isinstance(entry, WeightConverter)]


def _candidates(name: str, prefix: str, renamings: Sequence[Any]) -> Iterator[str]:
    renamed = name
    for renaming in renamings:
        renamed = renaming.rename_source_key(renamed)[0]
    for candidate in (name, renamed):
        yield candidate
        yield prefix + candidate
        yield candidate.removeprefix(prefix)


def _tied(model: nn.Module, memory: set[str]) -> Iterator[tuple[str, str]]:
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    if head in names and embedding in names:
        tied, source = f"{names[head]}.weight", f"{names[embedding]}.weight"
        if tied in memory and source in memory:
            yield tied, source


def find_blocks(model: nn.Module, wanted: str | None = None) -> str:
    """Name of the ModuleList whose entries are the repeated blocks.

    The candidates are the outermost lists of modules of one class that hold linears; the largest is taken. Raises UsageError with the
    list of candidates when there is none, when another has more than half of its size, or when ``wanted`` is not a candidate.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(entry) for entry in module}) == 1
        and any(is_linear(inner) for inner in module[0].modules())
    }
    if wanted is not None:
        if wanted not in lists:
            raise UsageError(f"--blocks {wanted}: no such list of blocks; candidates are {_some(list(lists)) or 'none'}")
        return wanted
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if not outermost:
        raise UsageError("found no list of repeated blocks with linear layers in this model; name it with --blocks")
    sizes = {name: sum(p.numel() for p in lists[name].parameters()) for name in outermost}
    largest = max(sizes, key=lambda name: sizes[name])
    rivals = [name for name in outermost if name != largest and sizes[name] * 2 > sizes[largest]]
    if rivals:
        raise UsageError(f"several lists of blocks of similar size: {_some([largest, *rivals])}; choose one with --blocks")
    return largest


class StopForward(Exception):
    """Raised inside a forward pass once everything of interest has been seen."""


def probe_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> list[BlockShape]:
    """Run the model once on tensors without data and note, block by block, which linears run in which order on which tensors.

    Raises PTQError when the model cannot run on the meta device.
    """
    names = {id(module): name for name, module in model.named_modules()}
    mode = FakeTensorMode()
    twin = copy.deepcopy(model)
    probes = [_BlockProbe(twin.get_submodule(names[id(block)])) for block in blocks]
    try:
        with mode, torch.no_grad():
            _fill_with_fakes(twin, mode)
            twin(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long), use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise PTQError(f"the model does not run on empty tensors, so its structure cannot be discovered: {_first_line(error)}") from error
    return [probe.shape() for probe in probes]


def _fill_with_fakes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Tensors with a shape but no data, which unlike meta tensors answer the questions that mask building asks of its inputs."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = mode.from_tensor(buffer)


@dataclass
class _BlockProbe:
    """Hooks on one block of the empty twin; keeps the seen tensors alive so that their identities stay distinct."""

    block: nn.Module
    calls: list[tuple[str, Tensor, int]] = field(default_factory=list)  # the last: how often the tensor had been written to
    output: Any = None

    def __post_init__(self) -> None:
        self.block.register_forward_hook(self._returned)
        for local, module in self.block.named_modules():
            if is_linear(module):
                module.register_forward_pre_hook(self._entered(local))

    def _entered(self, local: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self.calls.append((local, args[0], args[0]._version))

        return hook

    def _returned(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.output = output

    def shape(self) -> BlockShape:
        names = [local for local, _, _ in self.calls]
        stages: dict[tuple[int, int], list[str]] = {}
        for local, tensor, version in self.calls:
            stages.setdefault((id(tensor), version), []).append(local)
        linears = [local for local, module in self.block.named_modules() if is_linear(module)]
        returns_tuple = isinstance(self.output, tuple)
        return BlockShape(
            stages=tuple(tuple(stage) for stage in stages.values()),
            returns_tuple=returns_tuple,
            extra_outputs=len(self.output) - 1 if returns_tuple else 0,
            unused=tuple(local for local in linears if local not in names),
            repeated=tuple(local for local in linears if names.count(local) > 1),
        )


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


def _some(names: Sequence[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300]


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """transformers warns on its logger about token ids of tiny or unusual configs; what matters is raised by us."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
