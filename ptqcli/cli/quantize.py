"""``ptq quantize``: a model in, a packed checkpoint folder out."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.budget_report import show_allocation
from ptqcli.cli.console import Output, time_text
from ptqcli.cli.folder_name import default_output
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.options import open_device
from ptqcli.cli.processes import alone, shared
from ptqcli.cli.progress import track
from ptqcli.cli.quantize_flags import QuantizeCommand, all_flags
from ptqcli.cli.quantize_report import QuantizeProgress, plan_as_json, show_report
from ptqcli.errors import UsageError
from ptqcli.model.locate import find_model

if TYPE_CHECKING:
    from ptqcli.pipeline.report import Report
    from ptqcli.recipe import Recipe
    from ptqcli.resources import Resources


@click.command(
    cls=QuantizeCommand,
    epilog=examples(
        "ptq quantize ~/models/Llama-3.2-1B --algo gptq --wbits 4 --calib c4",
        "ptq quantize ~/models/Llama-3.2-1B --algo awq+gptq --scheme w3a16-g64-asym --damp 0.05",
        "ptq quantize ~/models/Llama-3.2-1B --algo smoothquant --output small --overwrite",
        "ptq quantize ~/models/Llama-3.2-1B --recipe w4a16-awq --override 'down_proj:bits=8' --ignore 'layers\\.0\\.'",
        "ptq quantize ~/models/Llama-3.2-1B --dry-run      # every decision, the memory and the disk it needs",
    ),
)
@click.argument("model", required=False, shell_complete=completion.model)
@all_flags
def command(
    model: str | None,
    recipe: str | None,
    output: Path | None,
    overwrite: bool,
    restart: bool,
    allow_requantize: bool,
    data_dir: Path | None,
    device: str,
    dtype: str,
    batch_size: int | None,
    memory: int | None,
    activation_budget: float | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    processes: int | None,
    log_format: str,
    **request: Any,
) -> None:
    """Turn MODEL into a packed checkpoint folder.

    MODEL is a local folder, a GGUF file or a hub id; left out, it is the small demo model that the package carries. The output head and the
    embedding stay as they are, unless --lm-head and --embeddings are given.
    """
    for_machines = log_format == "json" and not dry_run
    words = Output(as_json=as_json, quiet=quiet or for_machines)
    session = click.get_current_context().obj

    def asked() -> Recipe:
        from ptqcli.recipe_loading import load_recipe
        from ptqcli.shipped import find_recipe

        return load_recipe(None if recipe is None else find_recipe(recipe), given_flags(request))

    share = alone if dry_run else partial(shared, processes=processes, most=lambda: _most_processes(asked()), arguments=session.arguments)
    with share(device) as (ranks, own_device):
        resources = resources_of(str(own_device), dtype, batch_size, activation_budget, memory)
        run: dict[str, Any] = {"overwrite": overwrite, "resources": resources, "data_dir": data_dir, "ranks": ranks}
        on_event = tell_event if for_machines and not quiet and ranks.first else None
        report = _quantized(model, asked(), output, words if ranks.first else None, restart, allow_requantize, dry_run, on_event, run)
        if report is None:
            return
    if ranks.first:
        session.result_kept = not as_json
        show_report(report, words)
        words.result(report.to_json())


def _quantized(
    model: str | None,
    asked: Recipe,
    output: Path | None,
    words: Output | None,
    restart: bool,
    allow_requantize: bool,
    dry_run: bool,
    on_event: Callable[[Mapping[str, Any]], None] | None,
    run: dict[str, Any],
) -> Report | None:
    """The report of the run, None for a dry one, whose plan is shown. words: None in a process that says nothing."""
    from ptqcli.estimate import run_work
    from ptqcli.formats.sources import open_source
    from ptqcli.pipeline.clock import Clock
    from ptqcli.pipeline.pipeline import quantize, seconds_needed
    from ptqcli.pipeline.prepare import prepare

    folder = find_model(model)
    silence_transformers()
    target = output.expanduser() if output else partial(default_output, model, folder, overwrite=run["overwrite"])
    source = open_source(folder, allow_requantize=True) if allow_requantize else folder
    if words is None:
        return quantize(source, asked, target, restart=restart, **run)
    with track("block", words.quiet) as tracker:
        run["progress"] = QuantizeProgress(folder, words, tracker)
        if not dry_run:
            return quantize(source, asked, target, restart=restart, on_event=on_event, **run)
        ready = prepare(source, asked, target, clock=Clock(), rehearsal=True, **run)
        if ready.plan.allocation is not None:
            show_allocation(ready.plan.allocation, words)
        seconds = seconds_needed(ready, run["progress"])
        work = run_work(ready.plan.recipe, ready.plan.linears, ready.skeleton, ready.plan.texts.windows * ready.plan.seqlen)
        if seconds is not None:
            words.facts([("time needed", f"about {time_text(seconds)}, as the first block tells")])
        elif ready.declared and work is not None:
            words.facts([("time needed", f"about {time_text(work / 1e12)} for each TFLOP/s that the machine reaches")])
        words.result({**plan_as_json(ready), "seconds": seconds, "floating_operations": work})
    return None


def _most_processes(asked: Recipe) -> int:
    """How many processes can share a run for which nobody has said how many."""
    from ptqcli.solvers.per_matrix import as_block_solver

    return max(1, asked.nsamples or 1 << 10) if as_block_solver(asked.solver()).shares else 1


def tell_event(event: Mapping[str, Any]) -> None:
    """One line on standard error, a JSON object."""
    print(json.dumps(event), file=sys.stderr, flush=True)


def given_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Those that were given: None stands for one that was not."""
    return {name: value for name, value in flags.items() if value is not None and value != ()}


def resources_of(device: str, dtype: str, batch_size: int | None, activation_budget: float | None, memory: int | None = None) -> Resources:
    """What the flags of the machine ask for. Raises UsageError for what cannot be."""
    import torch

    from ptqcli.resources import Resources

    return Resources(
        device=open_device(device),
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        batch_size=batch_size,
        memory=memory,
        activation_budget=None if activation_budget is None else _bytes(activation_budget),
        cache=_cache(),
    )


def _cache() -> Path | None:
    """The user's folder for what can be made again, None for one without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptqcli"
    except RuntimeError:
        return None


def _bytes(gib: float) -> int:
    if not math.isfinite(gib * 1024**3):
        raise UsageError(f"--activation-budget {gib} is not a size; give a number of GiB")
    return int(gib * 1024**3)
