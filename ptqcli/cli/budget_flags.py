"""Flags that say how large the result may be, and those of what is measured for that."""

from __future__ import annotations

import click

from ptqcli.budget import DEFAULT_CANDIDATES, METHODS
from ptqcli.cli import completion

CANDIDATES_FLAG = click.option(
    "--candidates",
    metavar="SCHEME,SCHEME,...",
    show_default=f"{DEFAULT_CANDIDATES}; of --format gguf block types",
    help="What a linear can become: schemes, or short as in w3g128 (bits, columns of a group), w4-row and w4g64-asym. Groups that do not "
    "divide a linear become smaller.",
)
BUDGET_FLAGS = [
    click.option(
        "--target-bits",
        type=float,
        metavar="X",
        help="Average bits of a quantized weight, scales and all counted, such as 3.5: each group of linears gets the candidate with which "
        "the whole loses least.",
    ),
    click.option("--target-size", metavar="SIZE", help="The same for the bytes of the whole checkpoint, such as 4GiB: it is never larger."),
    CANDIDATES_FLAG,
    click.option(
        "--sensitivity",
        metavar=f"{'|'.join(METHODS)}|FILE",
        show_default="gradient, or output where that does not fit",
        shell_complete=completion.names(lambda: METHODS),
        help="How what a candidate costs a group is measured, or a file of `ptq sensitivity --output`.",
    ),
]
