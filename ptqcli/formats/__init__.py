"""On-disk formats of quantized weights, one file each, and the one table of them.

A format is a pair of exact inverses, ``pack`` and ``unpack``, between a ``QuantizedWeight`` and named tensors; the JSON files that tell
readers which linear has which scheme, and the way back from them to schemes; and everything that is known of its readers: what they
cannot hold (``refusal``), what they run as one matrix (``fused_refusal``), what else a user should hear (``notes``). Formats know
schemes and codes, never the algorithm that chose them.

A new format is one file with an instance of a class that has what ``Format`` asks for, and one entry in FORMATS. Another installed package
adds one under the entry point group ``ptqcli.formats``, in the same form: ``its-name = "package.module:INSTANCE"``.
"""

from __future__ import annotations

import json
import shlex
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ptqcli.errors import PTQError, UsageError
from ptqcli.numerics.scheme import Scheme
from ptqcli.suggest import did_you_mean
from ptqcli.untrusted import shown

if TYPE_CHECKING:  # a recipe names a format, and must not wait for torch
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ptqcli.checkpoint.tensors import TensorSource
    from ptqcli.numerics.weight import QuantizedWeight

DEFAULT_FORMAT = "compressed-tensors"

ENTRY_POINTS = "ptqcli.formats"

# Name -> "module:attribute" of the built-in formats, imported when they are used.
FORMATS = {
    "compressed-tensors": "ptqcli.formats.compressed_tensors:COMPRESSED_TENSORS",
    "gptq": "ptqcli.formats.gptq:GPTQ",
    "gptq_v2": "ptqcli.formats.gptq:GPTQ_V2",
    "awq": "ptqcli.formats.awq:AWQ",
    "awq_gemv": "ptqcli.formats.awq:AWQ_GEMV",
    "bitsandbytes": "ptqcli.formats.bitsandbytes:BITSANDBYTES",
    "gguf": "ptqcli.formats.gguf:GGUF_BLOCKS",
}


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """A linear before it has codes.

    name: its path in the model. aliases: its paths in other classes that a reader may build from the same files. kind: its class, such as
    ``Linear`` or ``Conv1D``. scale_dtype: the dtype in which its scales are stored. moving_groups: its groups are not neighbouring columns
    (act-order without static groups), so that an index is needed. signed_scales: a scale may be negative; a format whose readers do not
    take that refuses it, and the user gives ``--no-signed``. weight_dtype: the one in which its weight was stored, None if nobody knows.
    outside: it stands in no block, as the output head does, or the embedding, whose kind is ``Embedding``.
    """

    name: str
    scheme: Scheme
    out_features: int
    in_features: int
    scale_dtype: torch.dtype
    kind: str = "Linear"
    moving_groups: bool = False
    signed_scales: bool = True
    aliases: tuple[str, ...] = ()
    weight_dtype: torch.dtype | None = None
    outside: bool = False


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All tensors of a checkpoint, packed or carried over, that are to become one file.

    folder: where they lie. tensors: by their stored names. config: the model's. tokenizer: asked for where it is needed. mix: as in a
    recipe, None where it named a scheme.
    """

    folder: Path
    tensors: TensorSource
    config: Any
    tokenizer: Callable[[], Any]
    mix: str | None


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """One file. name: of the file. pieces: its bytes, a buffer at a time; tell is told of each tensor, its number, and how many there are.

    nbytes: of all tensors in it.
    """

    name: str
    nbytes: int
    pieces: Callable[[Callable[[str, int, int], None]], Iterator[Any]]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Another program, and how it loads a checkpoint.

    name: of the program. needs: what to install, one pip requirement each. code: what to write, in python or sh as language says, with
    ``{folder}`` in the place of the checkpoint's folder. refusal: why it does not load the checkpoint, None if it does.
    """

    name: str
    needs: tuple[str, ...] = ()
    code: str = ""
    language: str = "python"
    refusal: str | None = None

    def code_for(self, folder: str) -> str:
        """What to write for a checkpoint in ``folder``."""
        return self.code.format(folder=json.dumps(folder) if self.language == "python" else shlex.quote(folder))

    @property
    def install(self) -> str:
        """The line that installs what it needs."""
        return f"pip install {shlex.join(self.needs)}"


@runtime_checkable
class Format(Protocol):
    """How schemes are stored and told to readers.

    name: as in a recipe and in FORMATS. packages: Python packages outside the core that a reader needs, each with what it is for.
    optional: last parts of names of tensors that files of other programs may lack. codebooks: whether it holds codes of codebooks, too.
    blocks: whether it holds blocks, see ``numerics.blocks``. outside: whether it holds codes of output heads and embeddings.
    usual_mix: of the mixes of schemes that it has names for, that where nobody
    names one; None where it has none. one_file: its checkpoints are one file each, made when all tensors are there (``assemble``).
    A class that derives from this one takes over what has a body here: a format that nothing else reads, under its own name.
    """

    name: str
    packages: Mapping[str, str] = MappingProxyType({})
    optional: tuple[str, ...] = ()
    codebooks: bool = False
    blocks: bool = False
    outside: bool = False
    one_file: bool = False
    usual_mix: str | None = None

    def scale_dtype(self, weights: torch.dtype, scheme: Scheme) -> torch.dtype:
        """The dtype in which scales of ``scheme`` are stored beside ``weights`` of that one. Codes are chosen for scales so rounded."""
        return weights

    def usual_scheme(self, mix: str) -> Scheme:
        """The scheme of most linears in ``mix``. Raises UsageError for one that the format does not have."""
        raise UsageError(f"{self.name} has no mixes of types, so leave gguf_type out, or give --format gguf")

    def assigned(self, mix: str, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Scheme]:
        """The schemes of linears, by their paths, in a mix; others have ``usual_scheme``.

        config: the model's. shapes: of all its tensors. Raises PTQError for a model that the format cannot hold.
        """
        return {}

    def whole_bytes(self, mix: str | None, config: Any, shapes: Mapping[str, tuple[int, ...]], specs: Sequence[LinearSpec]) -> int:
        """Bytes of all tensors of a checkpoint that is one file. specs: of the linears that are quantized; as it stands, theirs alone."""
        return sum(map(self.stored_bytes, specs))

    def assemble(self, parts: Parts) -> Assembly | None:
        """What a checkpoint consists of in the end, if not of the tensors as they were packed; see ``one_file``."""
        return None

    @abstractmethod
    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this format cannot hold a linear, or None if it can."""

    def fused_refusal(self, group: Mapping[str, Scheme | None]) -> str | None:
        """Why linears that read one tensor inside one module cannot differ as they do, or None if all is well.

        group: the scheme of each by its path in the model, None for one that stays as it is.
        """
        return None

    def joint_refusal(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> str | None:
        """Why linears, each of which this format can hold, cannot stand in one file, or None if they can. untouched: as in ``describe``."""
        return None

    @abstractmethod
    def stored_bytes(self, spec: LinearSpec) -> int:
        """Bytes of a linear's stored tensors, all but those of outlier columns, whose number is known only after calibration."""

    def notes(self, specs: Sequence[LinearSpec]) -> list[str]:
        """What a user should know of the readers of such linears, one sentence each."""
        return [f"{self.name}: nothing but ptq reads it"]

    def trial(self, classes: Sequence[nn.Module], specs: Sequence[LinearSpec]) -> list[str]:
        """What a reader would do with such linears in this very model, found by trying, one sentence each.

        classes: the model on the meta device, in each class that a reader may build of it; it stays as it is.
        """
        return []

    def assembled_by_transformers(self, specs: Sequence[LinearSpec]) -> bool:
        """Whether transformers makes one parameter of packed experts, all of which are among the linears of a model."""
        return False

    def readers(self, specs: Sequence[LinearSpec], auto_class: str, tried: Sequence[str]) -> list[Reader]:
        """The programs that are known to read such linears, or not to.

        auto_class: of transformers, which builds the model. tried: what ``trial`` found.
        """
        return []

    @abstractmethod
    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors that hold the linear ``name``."""

    def held(self, weight: QuantizedWeight) -> QuantizedWeight:
        """What ``pack`` keeps of ``weight``, and ``unpack`` gives back; as it stands, all of it. What is placed and measured is this."""
        return weight

    @abstractmethod
    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of the linear ``name``. Raises PTQError if the format cannot hold ``weight``."""

    @abstractmethod
    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """Inverse of ``pack``, from stored tensors, which ``read`` returns by name. Raises PTQError for damaged ones.

        ``read`` raises a LookupError for a tensor that is not there.
        """

    @abstractmethod
    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        """File name -> keys to merge into its JSON. untouched: all other matrices, by every name that a reader may know them under."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` entry of config.json is of this format."""
        return config.get("quant_method") == self.name

    @abstractmethod
    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Mapping[str, str]) -> dict[str, Scheme]:
        """The scheme of each quantized linear among ``linears``: paths in the model, each with the name under which it is stored.

        Raises PTQError, naming the key, for everything that is not read.
        """

    @abstractmethod
    def stored_linears(self, names: Iterable[str]) -> list[str]:
        """The quantized linears among the tensor ``names`` of a checkpoint, by their stored names."""


def format_names() -> list[str]:
    """Names of all formats, the built-in ones first, then those of other installed packages. Loads none of them."""
    return list(dict.fromkeys(entry.name for entry in _entries()))


def find_format(name: str) -> Format:
    """The format ``name``.

    Raises UsageError, listing what there is, for an unknown name, and PTQError, naming the package, for a format that cannot be loaded.
    """
    found = [entry for entry in _entries() if entry.name == name]
    if not found:
        raise UsageError(f"format '{name}' is unknown; use {', '.join(format_names())}{did_you_mean(name, format_names())}")
    if len(found) > 1:
        packages = ", ".join(_package(entry) for entry in found)
        raise PTQError(f"format '{name}' comes from more than one package: {packages}; uninstall all but one")
    return _load(found[0])


def format_of(config: Mapping[str, Any]) -> Format:
    """The format of a ``quantization_config`` entry of config.json. Raises PTQError, listing what is read, if it is of none."""
    broken = []
    for name in format_names():
        try:
            candidate = find_format(name)
        except PTQError as error:  # of another package, perhaps, and no matter unless nothing else reads the entry
            broken.append(f"; {error}")
            continue
        if candidate.recognises(config):
            return candidate
    read = ", ".join(format_names())
    raise PTQError(
        f"quantization_config: quant_method {shown(config.get('quant_method'))} is not read; what is read: {read}{''.join(broken)}"
    )


def other_codes(chosen: Format, scheme: Scheme) -> str | None:
    """Why ``chosen`` holds no codes of ``scheme``, if these count levels or stand in blocks and it holds integers only; None otherwise."""
    if scheme.blocks is not None and not chosen.blocks:
        return f"{chosen.name} holds integers with free scales, not blocks of {scheme}, which --format gguf does"
    if scheme.codebook is None or chosen.codebooks:
        return None
    return f"{chosen.name} holds integers, not codes of {scheme.codebook}; give --format bitsandbytes, or --scheme w4a16"


def no_place(chosen: Format) -> str | None:
    """Why ``chosen`` holds no codes of an output head or an embedding, or None if it does."""
    if chosen.outside:
        return None
    if chosen.one_file:
        return f"in {chosen.name} a mix of types, --gguf-type, says what becomes of embedding and output head"
    return f"{chosen.name} holds codes of the linears in the blocks only, as its readers do; {DEFAULT_FORMAT} holds it"


def _entries() -> list[EntryPoint]:
    """Where each format is found: the built-in ones first, then those of other packages."""
    built_in = [EntryPoint(name, place, ENTRY_POINTS) for name, place in FORMATS.items()]
    others = sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: (_package(entry), entry.name))  # else as the disk lists them
    return [*built_in, *others]


def _load(entry: EntryPoint) -> Format:
    try:
        found = entry.load()
    except Exception as error:  # whatever another package raises when it is imported
        raise PTQError(f"format '{entry.name}' of the package {_package(entry)} cannot be loaded: {_first_line(error)}") from error
    if not isinstance(found, Format):
        raise PTQError(f"format '{entry.name}' of the package {_package(entry)}: {entry.value} lacks a method or attribute of a format")
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module.partition(".")[0]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
