"""What is known of the programs that read AWQ files: GPTQModel, transformers with it, vLLM and SGLang.

GPTQModel and transformers multiply codes by scales, whose sign may be either; ``tests/loaders`` runs them. The servers follow from their
source: vLLM takes any group size that divides, with fast kernels (Marlin) for groups of 32, 64 or 128 and whole rows; so does SGLang, but
the other groups in float16.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.formats import LinearSpec, Reader
from ptqcli.formats.gptq_readers import ROWS_ON_CPU, not_in_gptqmodel
from ptqcli.numerics.scheme import WHOLE_ROW

FAST_GROUPS = (WHOLE_ROW, 32, 64, 128)
GROUPS_OF_GPTQMODEL = (WHOLE_ROW, 16, 32, 64, 128)


def notes(specs: Sequence[LinearSpec]) -> list[str]:
    """What a user should know of the readers of such linears, one sentence each."""
    reason = not_in_gptqmodel(specs, GROUPS_OF_GPTQMODEL)
    if reason is not None:
        return [f"{reason}; ptqcli reads it"]
    rows = any(spec.scheme.group_size == WHOLE_ROW for spec in specs)
    return [ROWS_ON_CPU] if rows else []


def readers(specs: Sequence[LinearSpec], auto_class: str) -> list[Reader]:
    """How the programs load such linears. auto_class: of transformers, which builds the model."""
    reason = not_in_gptqmodel(specs, GROUPS_OF_GPTQMODEL)
    code = f"from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained({{folder}})"
    by_itself = "from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load({folder})"
    slow = "" if all(spec.scheme.group_size in FAST_GROUPS for spec in specs) else " --dtype half"
    serve = f"python -m sglang.launch_server --model-path {{folder}}{slow}"
    return [
        Reader(name="transformers", needs=("transformers", "gptqmodel"), code=code, refusal=reason),
        Reader(name="GPTQModel", needs=("gptqmodel",), code=by_itself, refusal=reason),
        Reader(name="vLLM", needs=("vllm",), code="vllm serve {folder}", language="sh"),
        Reader(name="SGLang", needs=("sglang",), code=serve, language="sh"),
    ]
