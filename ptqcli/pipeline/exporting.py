"""A model as one GGUF file: a quantized checkpoint with its codes, or a plain one rounded to the types of a mix of llama.cpp's."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ptqcli.errors import UsageError
from ptqcli.formats.dequantized import DequantizedModel
from ptqcli.formats.gguf_export import ExportPlan, plan_checkpoint, plan_model, write_gguf
from ptqcli.formats.gguf_mix import PLAIN_REST, USUAL_MIX, find_mix
from ptqcli.formats.gguf_writer import check_target
from ptqcli.formats.sources import open_source
from ptqcli.model.gguf import is_gguf
from ptqcli.pipeline.folder import check_room
from ptqcli.pipeline.progress import Progress

GGUF = "gguf"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A GGUF file that was written. types: how many tensors have each block type. notes: what a user should know."""

    output: str
    types: dict[str, int]
    notes: tuple[str, ...]
    bytes_after: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def export(model: Path, output: Path, *, mix: str | None = None, overwrite: bool = False, progress: Progress) -> Exported:
    """Write the model or quantized checkpoint in ``model`` to the file ``output``.

    mix: of a model that is not quantized, the types of its matrices, USUAL_MIX where it is None; of a quantized checkpoint, whose linears
    keep their codes, the types of embedding and head, PLAIN_REST where it is None.
    ``output`` may lie in the folder of the model, as files on the hub do: whoever reads that folder goes by its config.json and
    safetensors files, which stay.
    Raises UsageError for what cannot work and PTQError for work that failed; either way ``output`` is as it was.
    """
    start = time.perf_counter()
    if is_gguf(model):
        raise UsageError(f"{model}: is a GGUF file already")
    if mix is not None:
        find_mix(mix)
    check_target(output, overwrite)
    progress.phase("deciding on the types of all tensors")
    plan = _plan(model, mix)
    check_room(output, plan.nbytes)
    with torch.no_grad():
        write_gguf(plan, output, overwrite, lambda name, number, count: progress.step(number + 1, count, name))
    kinds = list(plan.types().values())
    return Exported(
        output=str(output),
        types={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        notes=tuple(plan.notes),
        bytes_after=output.stat().st_size,
        seconds=time.perf_counter() - start,
    )


def _plan(model: Path, mix: str | None) -> ExportPlan:
    source = open_source(model, allow_requantize=True)
    if isinstance(source, DequantizedModel):
        return plan_checkpoint(source.packed, mix or PLAIN_REST)
    return plan_model(source, mix or USUAL_MIX)
