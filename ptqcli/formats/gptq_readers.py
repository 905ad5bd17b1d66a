"""What is known of the programs that read GPTQ files: GPTQModel, transformers with optimum and GPTQModel, vLLM, SGLang.

GPTQModel reads both versions at every width, symmetric or not, with groups that move and schemes that differ. transformers builds its
layers through optimum, which knows one scheme for all. Both multiply codes by scales, whose sign may be either; ``tests/loaders`` runs
them.

The servers follow from their source. vLLM reads 4 and 8 bits, symmetric, in groups of 32, 64 or 128 or whole rows (Marlin), and no groups
that move. SGLang does the same, and the rest in float16 with the kernels of exllama.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.formats import LinearSpec, Reader
from ptqcli.numerics.scheme import WHOLE_ROW, Scheme

SERVED_BITS = (4, 8)
SERVED_GROUPS = (WHOLE_ROW, 32, 64, 128)
GROUPS_OF_GPTQMODEL = (WHOLE_ROW, 16, 32, 64, 128, 256, 512, 1024)
FAST_ON_CPU = 4  # bits

ROWS_ON_CPU = "whole rows: transformers takes a kernel for them that fails on the CPU; GPTQModel by itself does not"


def notes(specs: Sequence[LinearSpec]) -> list[str]:
    """What a user should know of the readers of such linears, one sentence each."""
    found = [
        f"{reason}; ptqcli reads it" for reason in (not_in_gptqmodel(specs, GROUPS_OF_GPTQMODEL), _not_in_transformers(specs)) if reason
    ]
    if not found and any(spec.scheme.bits == FAST_ON_CPU and spec.scheme.group_size == WHOLE_ROW for spec in specs):
        found.append(ROWS_ON_CPU)
    reason = _not_in_vllm(specs)
    return found if reason is None else [*found, f"{reason}; GPTQModel reads it"]


def readers(specs: Sequence[LinearSpec], auto_class: str) -> list[Reader]:
    """How the programs load such linears. auto_class: of transformers, which builds the model."""
    alone, through, server = not_in_gptqmodel(specs, GROUPS_OF_GPTQMODEL), _not_in_transformers(specs), _not_in_vllm(specs)
    code = f"from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained({{folder}})"
    by_itself = "from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load({folder})"
    slow = "" if all(_served(spec.scheme) for spec in specs) else " --dtype half"
    return [
        Reader(name="transformers", needs=("transformers", "optimum", "gptqmodel"), code=code, refusal=alone or through),
        Reader(name="GPTQModel", needs=("gptqmodel",), code=by_itself, refusal=alone),
        Reader(name="vLLM", needs=("vllm",), code="vllm serve {folder}", language="sh", refusal=server),
        Reader(
            name="SGLang",
            needs=("sglang",),
            code=f"python -m sglang.launch_server --model-path {{folder}}{slow}",
            language="sh",
            refusal=alone,
        ),
    ]


def not_in_gptqmodel(specs: Sequence[LinearSpec], groups: Sequence[int]) -> str | None:
    """Why GPTQModel, which has kernels of a format for these ``groups``, whole rows first, has none for such linears, or None if it has."""
    size = next((spec.scheme.group_size for spec in specs if spec.scheme.group_size not in groups), None)
    return None if size is None else f"groups of {size}: GPTQModel has kernels for {', '.join(map(str, groups[1:]))} and whole rows"


def _not_in_transformers(specs: Sequence[LinearSpec]) -> str | None:
    schemes = list(dict.fromkeys(spec.scheme for spec in specs))
    return f"several schemes ({', '.join(map(str, schemes))}): transformers takes all linears for the same" if len(schemes) > 1 else None


def _not_in_vllm(specs: Sequence[LinearSpec]) -> str | None:
    odd = next((spec.scheme for spec in specs if not _served(spec.scheme)), None)
    if odd is not None:
        return f"{odd}: vLLM reads GPTQ files of 4 and 8 bits, symmetric, in groups of 32, 64 or 128 or whole rows"
    return "groups that move (act-order): vLLM does not read them" if any(spec.moving_groups for spec in specs) else None


def _served(scheme: Scheme) -> bool:
    return scheme.bits in SERVED_BITS and scheme.symmetric and scheme.group_size in SERVED_GROUPS
