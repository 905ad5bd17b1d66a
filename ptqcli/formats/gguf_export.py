"""A model, quantized or not, as one GGUF file.

What is written is decided first, for every tensor, from names, shapes and schemes alone (``plan_model``, ``plan_checkpoint``); then the
tensors are read, made and written one by one, so that memory holds the largest of them, decoded, and a few copies of its rows.

A tensor is made of bytes in transformers' order of rows; putting the rows of queries and keys in llama.cpp's order moves whole rows of
blocks and changes no number. Norms are F32. Embedding and head of a quantized checkpoint, which are no codes there, get a type of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ptqcli
from ptqcli.checkpoint.auxiliary import load_tokenizer
from ptqcli.checkpoint.gguf_blocks import BLOCK_TYPES
from ptqcli.checkpoint.gguf_file import ALIGNMENT, GGUFFile, TensorInfo
from ptqcli.checkpoint.tensors import FLOATING, TensorSource
from ptqcli.errors import PTQError
from ptqcli.formats.gguf_encode import encode_codes, encode_weight, holding_type, is_in_blocks
from ptqcli.formats.gguf_mix import find_mix, fitting_type, tensor_types
from ptqcli.formats.gguf_tokenizer import tokenizer_keys
from ptqcli.formats.gguf_writer import WRITER, WRITER_KEY, GGUFWriting, check_target, header_bytes
from ptqcli.formats.packed_checkpoint import PackedCheckpoint
from ptqcli.model.classes import build_classes
from ptqcli.model.gguf import GGUFTensors
from ptqcli.model.gguf_architectures import Architecture, architecture_of, gguf_package, names_in_file
from ptqcli.model.gguf_config import ROPE_FREQS, full_rope, head_size, llama3_divisors, metadata_of, notes_of, read_config
from ptqcli.model.locate import model_name
from ptqcli.model.names import DiskNames
from ptqcli.model.source import ModelSource

QUANTIZATION_VERSION = 2  # of ggml's block types, the same since 2023


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor that is to be written. name: of transformers. info: in the file. make: its bytes, uint8 [rows, bytes of a row], rows in
    transformers' order; None for one that the caller writes. order: of transformers' rows in the file, None for the same."""

    name: str
    info: TensorInfo
    make: Callable[[], Tensor] | None
    order: Tensor | None = None

    def in_file(self, data: Tensor) -> Tensor:
        """The bytes ``data`` with their rows in llama.cpp's order."""
        return data if self.order is None else data.reshape(len(self.order), -1)[self.order]

    def bytes(self) -> Tensor:
        """Its bytes, rows in the order of the file."""
        if self.make is None:
            raise PTQError(f"{self.name}: nothing makes this tensor; this is a defect")
        return self.in_file(self.make())


@dataclass
class ExportPlan:
    """A file before anything of it is written. notes: what a user should know, one sentence each; some come while tensors are made."""

    metadata: dict[str, Any]
    entries: list[Entry]
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.info.nbytes for entry in self.entries)

    def types(self) -> dict[str, str]:
        """The type of each tensor by transformers' name."""
        return {entry.name: entry.info.kind.name for entry in self.entries}

    def with_makers(self, makers: Mapping[str, Callable[[], Tensor] | None]) -> ExportPlan:
        """The same file with other sources for the tensors of these names, as for codes that a solver has chosen."""
        entries = [replace(entry, make=makers.get(entry.name, entry.make)) for entry in self.entries]
        return ExportPlan(self.metadata, entries, self.notes)


def gguf_pieces(plan: ExportPlan, tell: Callable[[str, int, int], None] | None = None) -> Iterator[Any]:
    """The bytes of the file of ``plan``, a buffer at a time; tell as for ``write_gguf``."""
    yield header_bytes(plan.metadata, [entry.info for entry in plan.entries])
    for number, entry in enumerate(plan.entries):
        if tell is not None:
            tell(entry.name, number, len(plan.entries))
        data = entry.bytes()
        yield data.contiguous().numpy().data
        yield bytes(-data.nbytes % ALIGNMENT)


def write_gguf(plan: ExportPlan, path: Path, overwrite: bool = False, tell: Callable[[str, int, int], None] | None = None) -> None:
    """Write the file of ``plan``. tell: is told of each tensor, its number, and how many there are.

    Raises UsageError for a path that cannot be written to, PTQError for values that a type cannot hold; then nothing is left at ``path``.
    """
    with GGUFWriting(path, plan.metadata, [entry.info for entry in plan.entries], overwrite) as file:
        for number, entry in enumerate(plan.entries):
            if tell is not None:
                tell(entry.name, number, len(plan.entries))
            file.write(entry.info.name, entry.bytes())
        written = GGUFFile(file.partial)  # which is to be read as any other
        GGUFTensors(written, read_config(written))


def plan_model(source: ModelSource, mix: str, importance: Mapping[str, Tensor] | None = None) -> ExportPlan:
    """A model that is not quantized, its matrices rounded to the types of ``mix``, one of ``gguf_mix.MIXES``.

    importance: of the input columns of each linear by its name, positive, float32 [in], such as the diagonal of its Hessian.
    Raises UsageError for an unknown mix and PTQError, by name, for what cannot be a GGUF file.
    """
    find_mix(mix)
    model, names = build_classes(source.config, source.tensors.names, source.config_json().get("architectures")).built[0]
    draft = _Draft(source.config, source.tensors, names, model)
    types = tensor_types(mix, draft.shapes_in_file(), draft.sharing)
    important = importance or {}
    entries = [draft.entry(name, types[draft.in_file[name]], important.get(name.removesuffix(".weight"))) for name in draft.in_file]
    return draft.finished(entries, mix, source.tokenizer())


def plan_checkpoint(checkpoint: PackedCheckpoint, rest: str = "f16", tokenizer: Any = None, mix: str | None = None) -> ExportPlan:
    """A quantized checkpoint, its codes as they are where a block type holds them, see ``gguf_encode``, otherwise the numbers they stand
    for in F16.

    rest: the mix whose type embedding and head get. tokenizer: None for the one in the checkpoint's folder. mix: what the file is called,
    None for the type of most matrices.
    Raises UsageError for an unknown mix and PTQError, by name, for what cannot be a GGUF file.
    """
    draft = _Draft(checkpoint.config, checkpoint.tensors, checkpoint.names, checkpoint.model, set(checkpoint.schemes))
    types = tensor_types(rest, draft.shapes_in_file(), draft.sharing)
    codes = _Codes(checkpoint)
    entries = []
    for name in draft.in_file:
        linear = name.removesuffix(".weight")
        if linear in checkpoint.schemes and name.endswith(".weight"):
            entries.append(draft.entry(name, codes.type_of(linear), made_of=codes.maker(linear)))
        else:
            entries.append(draft.entry(name, types[draft.in_file[name]]))
    kinds = [entry.info.kind.name for entry in entries if entry.name.removesuffix(".weight") in checkpoint.schemes]
    usual = max(set(kinds), key=kinds.count) if kinds else rest
    plan = draft.finished(entries, mix or usual.lower(), tokenizer or load_tokenizer(checkpoint.folder, checkpoint.config))
    plan.notes = codes.notes = [*plan.notes, *codes.notes]
    return plan


class _Codes:
    """The codes of a checkpoint as blocks. notes: what became of them; those on single weights come while they are made."""

    def __init__(self, checkpoint: PackedCheckpoint) -> None:
        self.checkpoint, self.notes = checkpoint, list[str]()
        self._stored = frozenset(checkpoint.tensors.names)
        self._types = {name: self._type(name) for name in checkpoint.schemes}
        plain = [name for name, kind in self._types.items() if not BLOCK_TYPES[kind].quantized]
        if plain:
            more = f" and {len(plain) - 1} more" if len(plain) > 1 else ""
            self.notes.append(
                f"no block type holds the codes of {plain[0]}{more} ({checkpoint.schemes[plain[0]]}), which become plain numbers"
            )
        if any(scheme.activations is not None for scheme in checkpoint.schemes.values()):
            self.notes.append("llama.cpp quantizes activations in its own way; the checkpoint's scales of activations are left out")

    def _type(self, name: str) -> str:
        spec, linear = self.checkpoint.spec(name), self.checkpoint.stored_linear(name)
        held = holding_type(spec.scheme, spec.in_features)
        doubtful = spec.scheme.outliers is not None or f"{linear}.g_idx" in self._stored
        if held is None or (doubtful and not is_in_blocks(self.checkpoint.weight(name))):
            return "F16"
        return held

    def type_of(self, name: str) -> str:
        """The type that the linear ``name`` gets."""
        return self._types[name]

    def maker(self, name: str) -> Callable[[], Tensor]:
        """What makes its bytes."""

        def make() -> Tensor:
            weight, kind = self.checkpoint.weight(name), BLOCK_TYPES[self._types[name]]
            if not kind.quantized:
                return encode_weight(kind, weight.dequantize(torch.float32))
            data, exact = encode_codes(weight)
            if not exact and not any("fp16" in note for note in self.notes):
                self.notes.append("scales or minima are rounded to fp16, which is what a GGUF file has")
            return data

        return make


class _Draft:
    """What is to be written of a model: its tensors by transformers' names, and where they are stored.

    in_file: transformers' names -> those in the file, in the order of the model.
    """

    def __init__(
        self, config: Any, tensors: TensorSource, names: DiskNames, model: torch.nn.Module, quantized: set[str] | None = None
    ) -> None:
        self.config, self.tensors, self.names = config, tensors, names
        self.architecture: Architecture = architecture_of(config)
        self.metadata = metadata_of(config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            self.shapes.pop("lm_head.weight", None)
        self.in_file = names_in_file(self.architecture, config.num_hidden_layers, self.shapes)
        self._refuse_missing(quantized or set())

    def _refuse_missing(self, quantized: set[str]) -> None:
        where = self.config.name_or_path or "the model in memory"
        for name in self.shapes:
            if name not in self.in_file:
                raise PTQError(f"{where}: llama.cpp's {self.architecture.name} models have no tensor {name}, so it cannot be written")
            if name.removesuffix(".weight") not in quantized and self.names.disk(name) is None:
                raise PTQError(f"{where}: no tensor is stored for {name}")

    @property
    def sharing(self) -> int:
        """Heads of queries that share keys and values."""
        return int(self.config.num_attention_heads // self.config.num_key_value_heads)

    def shapes_in_file(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the names in the file."""
        return {theirs: self.shapes[name] for name, theirs in self.in_file.items()}

    def entry(self, name: str, kind: str, importance: Tensor | None = None, made_of: Callable[[], Tensor] | None = None) -> Entry:
        """The tensor ``name`` in the type ``kind``. made_of: makes its bytes, None to round what is stored."""
        shape = self.shapes[name]
        chosen = BLOCK_TYPES[fitting_type(kind, shape[-1])]
        return Entry(
            name=name,
            info=TensorInfo(name=self.in_file[name], kind=chosen, shape=shape),
            make=made_of or (lambda: encode_weight(chosen, self._read(name), importance)),
            order=self.architecture.row_order(name, shape[0], self.config),
        )

    def _read(self, name: str) -> Tensor:
        stored = self.names.disk(name)
        assert stored is not None
        values = self.tensors.read(stored)
        if values.dtype not in FLOATING or tuple(values.shape) != self.shapes[name]:
            raise PTQError(f"tensor {stored} is {values.dtype} {list(values.shape)}; a floating {list(self.shapes[name])} is needed")
        shift = self.architecture.norm_shift(name)
        return (values.float() + shift if shift else values).reshape(-1, values.shape[-1])

    def finished(self, entries: Sequence[Entry], mix: str, tokenizer: Any) -> ExportPlan:
        """The plan of a file with ``entries``."""
        made = tokenizer_keys(tokenizer, self.config.vocab_size)
        file_type = gguf_package().LlamaFileType[find_mix(_nearest_mix(mix)).file_type]
        where = self.config.name_or_path
        metadata = {
            "general.architecture": self.architecture.name,
            "general.type": "model",
            "general.name": model_name(Path(where) if where else None),
            "general.file_type": int(file_type),
            "general.quantization_version": QUANTIZATION_VERSION,
            WRITER_KEY: f"{WRITER} {ptqcli.__version__}",
            **self.metadata,
            **{key: value for key, value in made.values.items() if value != []},
        }
        return ExportPlan(metadata, [*entries, *self._rotation()], [*notes_of(self.config), *made.notes])

    def _rotation(self) -> list[Entry]:
        rope = full_rope(self.config)
        if rope["rope_type"] != "llama3":
            return []
        divisors = llama3_divisors(rope, head_size(self.config))
        info = TensorInfo(name=ROPE_FREQS, kind=BLOCK_TYPES["F32"], shape=tuple(divisors.shape))
        return [Entry(name=ROPE_FREQS, info=info, make=lambda: divisors[None].view(torch.uint8))]


def _nearest_mix(kind: str) -> str:
    """A mix of block types is told by the name of the usual one."""
    return {"q2_k": "q2_k", "q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}.get(kind, kind)


def export_model(
    source: ModelSource,
    path: Path,
    mix: str,
    importance: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    tell: Callable[[str, int, int], None] | None = None,
) -> ExportPlan:
    """``plan_model``, written to ``path``; see there and ``write_gguf``. Returns the plan."""
    check_target(path, overwrite)
    plan = plan_model(source, mix, importance)
    write_gguf(plan, path, overwrite, tell)
    return plan


def export_checkpoint(
    checkpoint: PackedCheckpoint,
    path: Path,
    rest: str = "f16",
    overwrite: bool = False,
    tell: Callable[[str, int, int], None] | None = None,
) -> ExportPlan:
    """``plan_checkpoint``, written to ``path``; see there and ``write_gguf``. Returns the plan."""
    check_target(path, overwrite)
    plan = plan_checkpoint(checkpoint, rest)
    write_gguf(plan, path, overwrite, tell)
    return plan
