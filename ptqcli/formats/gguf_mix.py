"""Which block type each tensor of a GGUF file gets: llama.cpp's mixes, by the names that its quantizer has for them.

A mix has one type for most matrices and more bits for those where error costs most: values of the attention and the down projection, in
the first eighth of the layers, the last eighth, and every third between (``more_bits``), and the output head, which is Q6_K; where head and
embedding are one, that is, too. Norms and everything else with one dimension stay F32. A row that super-blocks do not divide gets the type
with blocks of 32 and at least as many bits. Taken from what ``llama_model_quantize`` does without an importance matrix, of models
without experts; its own files are what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ptqcli.checkpoint.gguf_blocks import BLOCK_TYPES
from ptqcli.errors import UsageError
from ptqcli.numerics.blocks import LEGACY_BLOCK
from ptqcli.numerics.k_quants import K_TYPES
from ptqcli.suggest import did_you_mean

PLAIN_REST = "f16"  # of embedding and head beside codes that are no mix
USUAL_MIX = "q4_k_m"  # where nobody names one
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LARGE = 80  # layers of the 70B models, whose values are shared by eight heads


@dataclass(frozen=True)
class Place:
    """Where a matrix stands. layer, layers: its number and how many there are. sharing: heads of queries that share keys and values."""

    layer: int
    layers: int
    sharing: int

    @property
    def has_more_bits(self) -> bool:
        """Whether it is one of the layers where error costs most."""
        eighth = self.layers // 8
        return self.layer < eighth or self.layer >= 7 * self.layers // 8 or (self.layer - eighth) % 3 == 2


Rule = Callable[[Place], bool]


def _always(place: Place) -> bool:
    return True


def _more_bits(place: Place) -> bool:
    return place.has_more_bits


def _first(part: int) -> Rule:
    return lambda place: place.layer < place.layers // part


def _below(count: int) -> Rule:
    return lambda place: place.layer < count


def _shared(place: Place) -> bool:
    return place.sharing >= 4


@dataclass(frozen=True)
class Mix:
    """file_type: the gguf package's name for it. usual: the type of most matrices. rules: for other matrices the types that they get, with
    when; the first that holds counts."""

    file_type: str
    usual: str
    rules: Mapping[str, tuple[tuple[str, Rule], ...]]


MIXES = {
    "f32": Mix("ALL_F32", "F32", {}),
    "f16": Mix("MOSTLY_F16", "F16", {}),
    "bf16": Mix("MOSTLY_BF16", "BF16", {}),
    "q4_0": Mix("MOSTLY_Q4_0", "Q4_0", {}),
    "q4_1": Mix("MOSTLY_Q4_1", "Q4_1", {}),
    "q5_0": Mix("MOSTLY_Q5_0", "Q5_0", {}),
    "q5_1": Mix("MOSTLY_Q5_1", "Q5_1", {}),
    "q8_0": Mix("MOSTLY_Q8_0", "Q8_0", {}),
    "q2_k": Mix(
        "MOSTLY_Q2_K",
        "Q2_K",
        {"attn_v": (("Q4_K", _shared), ("Q3_K", _always)), "ffn_down": (("Q3_K", _always),), "attn_output": (("Q3_K", _always),)},
    ),
    "q3_k_s": Mix("MOSTLY_Q3_K_S", "Q3_K", {}),
    "q3_k_m": Mix(
        "MOSTLY_Q3_K_M",
        "Q3_K",
        {
            "attn_v": (("Q5_K", _below(2)), ("Q4_K", _always)),
            "ffn_down": (("Q5_K", _first(16)), ("Q4_K", _always)),
            "attn_output": (("Q4_K", _always),),
        },
    ),
    "q3_k_l": Mix("MOSTLY_Q3_K_L", "Q3_K", dict.fromkeys(("attn_v", "ffn_down", "attn_output"), (("Q5_K", _always),))),
    "q4_k_s": Mix("MOSTLY_Q4_K_S", "Q4_K", {"attn_v": (("Q5_K", _below(4)),), "ffn_down": (("Q5_K", _first(8)),)}),
    "q4_k_m": Mix("MOSTLY_Q4_K_M", "Q4_K", dict.fromkeys(("attn_v", "ffn_down"), (("Q6_K", _more_bits),))),
    "q5_k_s": Mix("MOSTLY_Q5_K_S", "Q5_K", {}),
    "q5_k_m": Mix("MOSTLY_Q5_K_M", "Q5_K", dict.fromkeys(("attn_v", "ffn_down"), (("Q6_K", _more_bits),))),
    "q6_k": Mix("MOSTLY_Q6_K", "Q6_K", {}),
}


def find_mix(name: str) -> Mix:
    """The mix ``name``, in capitals as well. Raises UsageError, listing what there is, for an unknown one."""
    if name.lower() not in MIXES:
        raise UsageError(f"GGUF type '{name}' is unknown; use {', '.join(MIXES)}{did_you_mean(name, list(MIXES))}")
    return MIXES[name.lower()]


def tensor_types(mix: str, shapes: Mapping[str, tuple[int, ...]], sharing: int) -> dict[str, str]:
    """The type of each tensor of a file.

    mix: one of MIXES. shapes: of the tensors by their names in the file, as torch has them. sharing: heads of queries that share keys and
    values. Raises UsageError for an unknown mix.
    """
    chosen = find_mix(mix)
    layers = 1 + max((_layer(name) for name in shapes), default=0)
    tied = "output.weight" not in shapes
    return {name: _type(chosen, name, shape, Place(_layer(name), layers, sharing), tied) for name, shape in shapes.items()}


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" else 0


def _type(mix: Mix, name: str, shape: tuple[int, ...], place: Place, tied: bool) -> str:
    if len(shape) < 2 or not name.endswith(".weight") or "norm" in name:
        return "F32"
    if not BLOCK_TYPES[mix.usual].quantized:
        return mix.usual
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return fitting_type(_head_type(mix, shape[-1]), shape[-1])
    part = name.split(".")[-2]
    wanted = next((kind for kind, holds in mix.rules.get(part, ()) if holds(place)), mix.usual)
    if part == "attn_v" and place.layers == LARGE and place.sharing > 1 and wanted in ("Q3_K", "Q4_K"):
        wanted = "Q5_K"
    return fitting_type(wanted, shape[-1])


def _head_type(mix: Mix, columns: int) -> str:
    undivided = columns % BLOCK_TYPES[mix.usual].columns
    return "Q8_0" if undivided or mix.usual == "Q8_0" else "Q6_K"


def fitting_type(kind: str, columns: int) -> str:
    """``kind``, or what llama.cpp takes in its place for rows of so many columns."""
    if columns % BLOCK_TYPES[kind].columns == 0:
        return kind
    return FALLBACKS[kind] if kind in K_TYPES and columns % LEGACY_BLOCK == 0 else "F16"
