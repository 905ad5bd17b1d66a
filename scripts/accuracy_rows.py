"""What accuracy_table.py measures: models with their texts, schemes, and rows. Data only; a row is what a recipe file would say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab_models import FOLDER

import ptqcli

BEFORE = "5a5594a"  # ranges of least squared error, scales without a sign
DEMO = Path(ptqcli.__file__).parent / "demo"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and how it is calibrated and measured, where the command line says nothing else.

    folder: of the model. calib: calibration text, nsamples windows of seqlen tokens. texts: name -> held-out text, of each of which the
    first ``tokens`` count, in windows of seqlen. schemes: those of the tables.
    """

    folder: Path
    calib: str
    texts: Mapping[str, str]
    nsamples: int
    seqlen: int
    tokens: int
    schemes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table.

    changes: keys of a recipe; the table adds scheme, text and seed. commit: whose code quantizes, None for this tree's. peer: whose
    ``scripts/peers/run_NAME.py`` quantizes instead. options: what it is told beside. then: further commands of ``ptq`` on the checkpoint,
    each a list of words, with {input} and {output} for folders.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    commit: str | None = None
    peer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    then: tuple[tuple[str, ...], ...] = ()


SUBJECTS = {
    "smollm2": Subject(
        folder=FOLDER / "smollm2",
        calib="c4",
        texts={"wikitext2": "wikitext2"},
        nsamples=32,
        seqlen=512,
        tokens=30_000,
        schemes=("w4a16-g64", "w3a16-g64", "w2a16-g64"),
    ),
    "mgm": Subject(
        folder=FOLDER / "mgm",
        calib=str(FOLDER / "mgm" / "calibration.txt"),
        texts={"its own": str(FOLDER / "mgm" / "heldout.txt")},
        nsamples=512,
        seqlen=32,
        tokens=16_384,
        schemes=("w4a16-g128", "w3a16-g128", "w2a16-g64"),
    ),
    "demo": Subject(
        folder=DEMO,
        calib="builtin",
        texts={"builtin": "builtin"},
        nsamples=128,
        seqlen=256,
        tokens=65_536,
        schemes=("w4a16-g128", "w3a16-g128", "w2a16-g64"),
    ),
}

RTN, GPTQ = "rtn", "gptq"
RTN_BEFORE, GPTQ_BEFORE = f"rtn, {BEFORE}", f"gptq, {BEFORE}"

# gptq without what is added to the algorithm of the paper
PLAIN = {"polish": 0, "correct_bias": False}

# In the scheme of the table, weights alone.
WEIGHTS = {
    RTN_BEFORE: Row(changes={"algo": "rtn"}, commit=BEFORE),
    GPTQ_BEFORE: Row(changes={"algo": "gptq"}, commit=BEFORE),
    RTN: Row(changes={"algo": "rtn"}),
    "rtn, min-max": Row(changes={"algo": "rtn", "scale_search": "minmax"}),
    "rtn, polished": Row(changes={"algo": "rtn", "polish": 3}),
    "awq": Row(changes={"algo": "awq"}),
    # What gptq is made of, one after the other; the first is what it was at BEFORE.
    "gptq, mse unsigned": Row(changes={"algo": "gptq", **PLAIN, "scale_search": "mse", "signed": False}),
    "gptq, mse": Row(changes={"algo": "gptq", **PLAIN, "scale_search": "mse"}),
    "gptq, min-max unsigned": Row(changes={"algo": "gptq", **PLAIN, "scale_search": "minmax", "signed": False}),
    "gptq, min-max": Row(changes={"algo": "gptq", **PLAIN, "scale_search": "minmax"}),
    "gptq, better of both": Row(changes={"algo": "gptq", **PLAIN}),
    "gptq, biases corrected": Row(changes={"algo": "gptq", "polish": 0}),
    GPTQ: Row(changes={"algo": "gptq"}),
    # One part more, or another.
    "gptq, plain order": Row(changes={"algo": "gptq", "act_order": False}),
    "gptq, adapter of rank 32": Row(changes={"algo": "gptq", "adapter_rank": 32}),
    "gptq, scales tuned": Row(changes={"algo": "gptq", "finish": "kl"}),
    "balanced": Row(changes={"quality": "balanced"}),
    "best": Row(changes={"quality": "best"}),
    "obq": Row(changes={"algo": "obq"}),
    "equalize+gptq": Row(changes={"algo": "equalize+gptq"}),
    "rotate+gptq": Row(changes={"algo": "rotate+gptq"}),
    "rotate heads+gptq, target original": Row(changes={"algo": "rotate+gptq", "rotate_stream": False, "target": "original"}),
    "awq+gptq": Row(changes={"algo": "awq+gptq"}),
    "rotate+gptq, target original": Row(changes={"algo": "rotate+gptq", "target": "original"}),
    "rotate+gptq, target original, scales tuned": Row(changes={"algo": "rotate+gptq", "target": "original", "finish": "kl"}),
    "equalize+gptq, target original": Row(changes={"algo": "equalize+gptq", "target": "original"}),
    "autoround": Row(changes={"algo": "autoround"}),
    "autoround, V2": Row(changes={"algo": "autoround", "autoround": {"version": "2"}}),
    "autoround, 2 blocks": Row(changes={"algo": "autoround", "learn_window": 2}),
    "autoround from gptq": Row(changes={"algo": "autoround", "start": "gptq"}),
    "flexround": Row(changes={"algo": "flexround"}),
    "omniquant": Row(changes={"algo": "omniquant"}),
    "let+omniquant": Row(changes={"algo": "let+omniquant"}),
    "llm-compressor": Row(peer="llm_compressor"),
    "auto-round": Row(peer="auto_round", options={"iters": 200, "batch_size": 8}),
    "gptqmodel": Row(peer="gptqmodel"),
    "hqq": Row(peer="hqq"),
}

# In schemes of their own; the table is called w8a8.
ACTIVATIONS = {
    RTN: Row(changes={"algo": "rtn", "wbits": 8, "abits": 8}),
    "rtn, per tensor": Row(changes={"algo": "rtn", "wbits": 8, "abits": 8, "act_scales": "tensor"}),
    "rtn, static": Row(changes={"algo": "rtn", "wbits": 8, "abits": 8, "act_scales": "static"}),
    "smoothquant": Row(changes={"algo": "smoothquant"}),
    "smoothquant, alpha auto": Row(changes={"algo": "smoothquant", "smooth_alpha": "auto"}),
    "smoothquant O1": Row(changes={"algo": "smoothquant", "smooth_level": "O1"}),
    "smoothquant O2": Row(changes={"algo": "smoothquant", "smooth_level": "O2"}),
    "smoothquant O3": Row(changes={"algo": "smoothquant", "smooth_level": "O3"}),
    "smoothquant+gptq": Row(changes={"algo": "smoothquant+gptq"}),
    "let+omniquant": Row(changes={"algo": "let+omniquant", "wbits": 8, "abits": 8}),
    "llm-int8": Row(changes={"algo": "llm-int8"}),
    "llm-int8, static": Row(changes={"algo": "llm-int8", "outliers": "static"}),
    "llm-int8+gptq, static": Row(changes={"algo": "llm-int8+gptq", "outliers": "static"}),
}
EIGHT_BITS = "w8a8"


def rows_of(scheme: str) -> Mapping[str, Row]:
    """The rows of the table ``scheme``."""
    return ACTIVATIONS if scheme == EIGHT_BITS else WEIGHTS


def recipe_of(row: Row, scheme: str, seed: int) -> dict[str, Any]:
    """The recipe of ``row`` in the table ``scheme``: of weights alone with bits and group, which every commit knows."""
    rotates = "rotate" in row.changes.get("algo", "") or row.changes.get("quality") == "best"
    seeded = {**row.changes, "rotate_seed": seed} if rotates else dict(row.changes)
    if scheme == EIGHT_BITS:
        return seeded
    bits, group = bits_and_group(scheme)
    return {"wbits": bits, "group_size": group, **seeded}


def bits_and_group(scheme: str) -> tuple[int, int]:
    """Bits and group size of a scheme of weights alone, such as w4a16-g64. Raises SystemExit for another."""
    from ptqcli.numerics.scheme import Scheme

    parsed = Scheme.parse(scheme)
    if parsed.activations is not None or not parsed.symmetric:
        raise SystemExit(f"{scheme}: the tables are of symmetric weights alone, such as w4a16-g64, and of {EIGHT_BITS}")
    return parsed.bits, parsed.group_size
