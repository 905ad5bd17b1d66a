"""The solvers alone: the squared output error that each leaves in the linears of a model, summed, relative to rounding to nearest.

    python scripts/compare_solvers.py [--model FOLDER] [--schemes w4a16-g128 w3a16-g128 w2a16-g64] [--nsamples 128] [--seqlen 256]

Every solver gets the same matrices and the same Hessians, which one pass of calibration text through the unquantized model gives.
"of rtn" is the sum of ``tr((W - W') H (W - W')^T)`` over all linears of the blocks relative to that of rounding with the same search of
the scales, "of min-max rtn" relative to rounding without a search; "best" and "worst" are single linears beside their "of rtn".
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.calibration.statistics import Hessian
from ptqcli.calibration.text import calibration_windows, documents
from ptqcli.checkpoint.auxiliary import load_tokenizer
from ptqcli.model.linears import linear_weight
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder
from ptqcli.numerics.scheme import Scheme
from ptqcli.solvers import MatrixSolver
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.rtn import RTN

DEMO = Path(ptqcli.__file__).parent / "demo"
SEARCHES = ("minmax", "mse")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--schemes", nargs="+", default=["w4a16-g128", "w3a16-g128", "w2a16-g64"], metavar="SCHEME")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Print one table a scheme."""
    options = arguments()
    layers = hessians(options)
    for text in options.schemes:
        scheme = Scheme.parse(text)
        rounded = {search: errors(RTN(search), scheme, layers) for search in SEARCHES}
        table = Table(str(scheme), "scales", "of rtn", "of min-max rtn", "best", "worst", "seconds", box=None, header_style="")
        for search in SEARCHES:
            solvers = {"rtn": RTN(search), "obq": OBQ(0.01, search), "gptq, plain order": GPTQ(0.01, False, True, search)}
            for name, solver in {**solvers, "gptq": GPTQ(0.01, True, True, search)}.items():
                start = time.perf_counter()
                found = errors(solver, scheme, layers)
                seconds = time.perf_counter() - start
                shares = [found[layer] / rounded[search][layer] for layer in layers]
                totals = [sum(found.values()) / sum(rounded[other].values()) for other in (search, "minmax")]
                table.add_row(name, search, *(f"{share:.3f}" for share in (*totals, min(shares), max(shares))), f"{seconds:.1f}")
        Console(width=120).print(table)


def hessians(options: argparse.Namespace) -> dict[str, tuple[Tensor, Hessian]]:
    """Name -> (matrix float32 [out, in], Hessian) of every linear of the blocks."""
    names = [site.name for site in Skeleton(ModelFolder(options.model)).linears]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    windows = calibration_windows(
        documents("builtin", "calibration", None), load_tokenizer(options.model), options.nsamples, options.seqlen, seed=0
    )
    layers = {}
    for name in names:
        linear = model.get_submodule(name)
        weight = linear_weight(linear).float()
        layers[name] = weight, Hessian.zeros(weight.shape[1], weight.device)
        linear.register_forward_pre_hook(adding(layers[name][1]))
    for batch in windows.split(16):
        model(input_ids=batch, use_cache=False)
    return layers


def adding(hessian: Hessian):  # type: ignore[no-untyped-def]
    """A hook that adds a linear's input to ``hessian``."""

    def hook(_linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hessian.add(inputs[0])

    return hook


def errors(solver: MatrixSolver, scheme: Scheme, layers: dict[str, tuple[Tensor, Hessian]]) -> dict[str, float]:
    """Squared output error that ``solver`` leaves in each linear."""
    found = {}
    for name, (weight, hessian) in layers.items():
        prepared = solver.prepare(hessian, name)
        quantized = solver.solve(weight, prepared, scheme, torch.bfloat16).weight.dequantize(torch.float32)
        found[name] = hessian.output_energy(weight - quantized)
    return found


if __name__ == "__main__":
    main()
