"""Matrices of a GGUF file as quantized weights: every block type is a scheme.

    Q4_0    w = d (q - 8),   groups of 32, d fp16       w4a16-g32
    Q8_0    w = d q,         groups of 32, d fp16       w8a16-g32
    others  see ``numerics.blocks``                     q4_1, q4_k and so on

The first two run as they are, packed; a zero point of the others need not be among the values of a group, so they run on numbers that are
decoded when the model is loaded.

A checkpoint in this format is one file in a folder of its own. Its matrices are collected as tensors called ``NAME.q4_k``, uint8
[out, bytes of a row], beside those that are carried over, and written as a whole in the end (``gguf_export``). Which matrix has which type
is the choice of a mix (``gguf_mix``), unless the recipe names a scheme.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.gguf_blocks import BLOCK_TYPES, decode, encode
from ptqcli.checkpoint.gguf_file import SUFFIX, GGUFFile
from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import Assembly, Format, LinearSpec, Parts, Reader
from ptqcli.formats.gguf_mix import PLAIN_REST, USUAL_MIX, find_mix, tensor_types
from ptqcli.formats.gguf_readers import notes, readers
from ptqcli.model.config import build_on_meta
from ptqcli.model.gguf import GGUFTensors
from ptqcli.model.gguf_architectures import architecture_of, names_in_file
from ptqcli.model.gguf_config import read_config
from ptqcli.numerics.blocks import LEGACY_TYPES, LegacyBlocks, all_finite
from ptqcli.numerics.scheme import BLOCKS, SAME_AS_BLOCKS, Scheme
from ptqcli.numerics.weight import QuantizedWeight

PACKED_TYPES = tuple(name.upper() for name in SAME_AS_BLOCKS)  # that run packed
SCHEMES = {name.upper(): Scheme.of_blocks(name) for name in (*SAME_AS_BLOCKS, *BLOCKS)}


class GGUFBlocks(Format):
    """The pair ``pack`` and ``unpack`` for one matrix. Its only tensor is called ``NAME.q4_0`` or by another type, see ``GGUFTensors``."""

    name = "gguf"
    blocks = one_file = True
    usual_mix = USUAL_MIX

    def scale_dtype(self, weights: torch.dtype, scheme: Scheme) -> torch.dtype:
        """See ``Format``: fp16, or what the parts of a block make in float32."""
        return torch.float16 if scheme.blocks is None else torch.float32

    def usual_scheme(self, mix: str) -> Scheme:
        """See ``Format``. Raises UsageError for a mix of plain numbers, too."""
        chosen = find_mix(mix)
        if not BLOCK_TYPES[chosen.usual].quantized:
            raise UsageError(f"GGUF type '{mix}' quantizes nothing; ptq convert MODEL --to gguf --gguf-type {mix} writes such a file")
        return SCHEMES[chosen.usual]

    def assigned(self, mix: str, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Scheme]:
        """See ``Format``."""
        types = _types(mix, config, shapes)
        return {name.removesuffix(".weight"): SCHEMES[kind] for name, kind in types.items() if kind in SCHEMES}

    def refusal(self, spec: LinearSpec) -> str | None:
        """See ``Format``."""
        if spec.scheme not in SCHEMES.values():
            held = ", ".join(str(scheme) for scheme in SCHEMES.values())
            return f"a GGUF file holds blocks of {held}, not {spec.scheme}; name a mix of them with --gguf-type, and no bits or groups"
        columns = BLOCK_TYPES[type_of(spec.scheme)].columns
        if spec.in_features % columns:
            return f"{spec.scheme} has blocks of {columns} columns, not a part of its {spec.in_features}; --gguf-type q4_k_m chooses others"
        return "a GGUF file has no index of groups that move; leave --no-static-groups out" if spec.moving_groups else None

    def stored_bytes(self, spec: LinearSpec) -> int:
        """See ``Format``."""
        return spec.out_features * BLOCK_TYPES[type_of(spec.scheme)].row_bytes(spec.in_features)

    def notes(self, specs: Sequence[LinearSpec]) -> list[str]:
        """See ``Format``."""
        return notes(specs)

    def readers(self, specs: Sequence[LinearSpec], auto_class: str, tried: Sequence[str]) -> list[Reader]:
        """See ``Format``."""
        return readers(auto_class)

    def whole_bytes(self, mix: str | None, config: Any, shapes: Mapping[str, tuple[int, ...]], specs: Sequence[LinearSpec]) -> int:
        """See ``Format``."""
        quantized = {f"{spec.name}.weight" for spec in specs}
        types = _types(mix or PLAIN_REST, config, shapes)
        rest = {name: BLOCK_TYPES[kind] for name, kind in types.items() if name not in quantized}
        carried = sum(kind.row_bytes(shapes[name][-1]) * prod(shapes[name][:-1]) for name, kind in rest.items())
        return carried + sum(map(self.stored_bytes, specs))

    def assemble(self, parts: Parts) -> Assembly:
        """See ``Format``: the file, called by the model and its types."""
        from ptqcli.formats.gguf_export import gguf_pieces, plan_checkpoint  # which knows this module
        from ptqcli.formats.packed_checkpoint import PackedCheckpoint

        model = build_on_meta(parts.config, len(parts.tensors.names))
        packed = PackedCheckpoint(parts.folder, parts.config, model, self, parts.tensors, {})
        plan = plan_checkpoint(packed, parts.mix or PLAIN_REST, parts.tokenizer(), parts.mix)
        kind = parts.mix or Counter(type_of(scheme) for scheme in packed.schemes.values()).most_common(1)[0][0]
        name = f"{plan.metadata['general.name'].replace(' ', '-')}-{kind.upper()}{SUFFIX}"
        return Assembly(name=name, nbytes=plan.nbytes, pieces=lambda tell: gguf_pieces(plan, tell))

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """See ``Format``."""
        return (f"{name}.{type_of(scheme).lower()}",)

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """See ``Format``. Scales are rounded to fp16. Raises PTQError for another scheme."""
        kind = type_of(weight.scheme)
        if weight.blocks is not None:
            return {f"{name}.{kind.lower()}": encode(weight.blocks.with_codes(weight.codes))}
        codes = weight.codes.unflatten(1, (-1, LEGACY_TYPES[kind].columns))
        return {f"{name}.{kind.lower()}": encode(LegacyBlocks(kind=LEGACY_TYPES[kind], codes=codes, d=weight.scale.to(torch.float16)))}

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """See ``Format``. A block whose scale is 0 holds zeros, and gets the scale 1. Raises PTQError for scales that are not finite."""
        kind = BLOCK_TYPES[type_of(scheme)]
        blocks = decode(kind, read(f"{name}.{kind.name.lower()}"))
        if not all_finite(blocks):
            raise PTQError(f"{name}: a block has a scale that is no finite number; the file is damaged")
        if scheme.blocks is not None:
            return QuantizedWeight.of_blocks(blocks, scheme)
        assert isinstance(blocks, LegacyBlocks)
        empty = blocks.d == 0
        return QuantizedWeight(
            codes=torch.where(empty[..., None], blocks.middle, blocks.codes).to(torch.uint8).flatten(1),
            scale=torch.where(empty, 1, blocks.d),
            zero=torch.full(blocks.d.shape, blocks.middle, dtype=torch.uint8),
            scheme=scheme,
        )

    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        """See ``Format``: the file says it of each tensor."""
        return {}

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """See ``Format``: such a file has no config.json."""
        return False

    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Mapping[str, str]) -> dict[str, Scheme]:
        """See ``Format``."""
        stored = set(tensors.names)
        found = ((name, on_disk, scheme) for name, on_disk in linears.items() for scheme in SCHEMES.values())
        return {name: scheme for name, on_disk, scheme in found if self.tensor_names(on_disk, scheme)[0] in stored}

    def stored_linears(self, names: Iterable[str]) -> list[str]:
        """See ``Format``."""
        suffixes = tuple(f".{kind.lower()}" for kind in SCHEMES)
        return [name.rpartition(".")[0] for name in names if name.endswith(suffixes)]


GGUF_BLOCKS = GGUFBlocks()


def _types(mix: str, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The block type of each tensor of the file by transformers' name. Raises PTQError for a model that llama.cpp does not know."""
    own = {name: shape for name, shape in shapes.items() if not (config.tie_word_embeddings and name == "lm_head.weight")}
    in_file = names_in_file(architecture_of(config), config.num_hidden_layers, own)
    sharing = config.num_attention_heads // config.num_key_value_heads
    types = tensor_types(mix, {theirs: own[name] for name, theirs in in_file.items()}, sharing)
    return {name: types[theirs] for name, theirs in in_file.items()}


def type_of(scheme: Scheme) -> str:
    """The block type of a scheme, as ggml calls it. Raises PTQError if none holds it."""
    for kind, held in SCHEMES.items():
        if held == scheme:
            return kind
    raise PTQError(f"no block type of GGUF files holds {scheme} as a quantized weight")


def decoded_note(path: Path) -> str | None:
    """What a user should know of how the matrices of a file run, None if all of its codes do so packed."""
    kinds = {tensor.kind.name for tensor in GGUFFile(path).stored.values() if tensor.kind.quantized and len(tensor.shape) == 2}
    decoded = sorted(kinds.difference(PACKED_TYPES))
    if not decoded:
        return None
    return f"{path}: {', '.join(decoded)} are decoded when the model is loaded; only {' and '.join(PACKED_TYPES)} run packed"


def open_tensors(path: Path) -> tuple[Any, GGUFTensors]:
    """Configuration and tensors of a file, the matrices of linears as blocks."""
    file = GGUFFile(path)
    config = read_config(file)
    return config, GGUFTensors(file, config, SCHEMES)
