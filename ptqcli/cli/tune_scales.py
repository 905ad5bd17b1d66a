"""``ptq tune-scales``: a checkpoint in, the same codes with better scales out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.console import Output, path_text, size_text, time_text
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import NamedPath, json_option, processes_option, quiet_option
from ptqcli.cli.progress import track
from ptqcli.cli.quantize import given_flags, resources_of
from ptqcli.cli.quantize_flags import CALIBRATION, FLAGS, MACHINE, OVERWRITE_FLAG, SEQLEN_FLAG, with_flags
from ptqcli.cli.quantize_report import QuantizeProgress, tuning_text
from ptqcli.cli.signals import stop_if_interrupted
from ptqcli.model.locate import find_model

if TYPE_CHECKING:
    from ptqcli.pipeline.tuning import TunedCheckpoint, TuningPlan

# Of ptqcli.finishing.tune_scales and ptqcli.pipeline.tuning, whose import takes torch along; a test compares them.
STEPS, LR, LONGEST_WINDOW = 150, 3e-3, 512
SUFFIX = "-tuned"
SECONDS_BETWEEN_LINES = 15.0


class TuningProgress(QuantizeProgress):
    """That of a command whose steps are those of the tuning."""

    def step(self, done: int, total: int, text: str) -> None:
        stop_if_interrupted()
        self._tracker.step(done, total, text)


@click.command(
    epilog=examples(
        "ptq tune-scales                 # the newest checkpoint here",
        "ptq tune-scales small --calib c4 --output better",
        "ptq tune-scales small --model ~/models/Llama-3.2-1B --steps 400 --no-norms",
    )
)
@click.argument("checkpoint", required=False, shell_complete=completion.checkpoint)
@click.option(
    "--model",
    metavar="MODEL",
    show_default="where the checkpoint came from",
    shell_complete=completion.model,
    help="The original, to whose logits the checkpoint is tuned.",
)
@click.option("--steps", type=int, metavar="N", default=STEPS, show_default=True, help="Steps of four windows.")
@click.option("--lr", type=float, metavar="X", default=LR, show_default=True, help="Largest relative change of a scale in one step, about.")
@click.option("--norms/--no-norms", default=True, show_default="norms", help="Tune the gains of norms and all biases, too.")
@with_flags([flag for flag in FLAGS[CALIBRATION] if flag is not SEQLEN_FLAG])
@click.option(
    "--seqlen", type=int, metavar="N", show_default=f"what the model allows, at most {LONGEST_WINDOW}", help="Tokens in a window."
)
@with_flags([flag for flag in FLAGS[MACHINE] if flag is not processes_option])
@click.option(
    "--output",
    type=NamedPath(),
    metavar="FOLDER",
    shell_complete=completion.folder,
    show_default=f"./CHECKPOINT{SUFFIX}",
    help="Where to write.",
)
@OVERWRITE_FLAG
@json_option
@quiet_option
def command(
    checkpoint: str | None,
    model: str | None,
    steps: int,
    lr: float,
    norms: bool,
    data_dir: Path | None,
    device: str,
    dtype: str,
    batch_size: int | None,
    memory: int | None,
    activation_budget: float | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **windows: Any,
) -> None:
    """Tune the scales of CHECKPOINT to the original, end to end.

    The loss is the KL divergence from the original's logits. CHECKPOINT is a folder that `ptq quantize` wrote, or any other that it reads;
    left out, it is the newest one here. Its codes stay as they are. Half of the calibration windows are held out, and on them the result is
    never worse than the checkpoint was.
    """
    from ptqcli.finishing.tune_scales import TuneScales
    from ptqcli.pipeline.tuning import tune_scales
    from ptqcli.recipe_loading import load_recipe

    words = Output(as_json=as_json, quiet=quiet)
    options, request = TuneScales(steps=steps, lr=lr, norms=norms), load_recipe(None, {"algo": "rtn", **given_flags(windows)})
    resources = resources_of(device, dtype, batch_size, activation_budget, memory)
    folder = find_checkpoint(checkpoint)
    silence_transformers()
    with track("step", quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        result = tune_scales(
            folder,
            output.expanduser() if output else Path(f"{folder.resolve().name}{SUFFIX}"),
            options,
            request,
            model=None if model is None else find_model(model),
            overwrite=overwrite,
            resources=resources,
            data_dir=data_dir,
            progress=TuningProgress(folder, words, tracker),
            on_plan=lambda plan: words.facts(_plan_rows(plan)),
        )
    click.get_current_context().obj.result_kept = not as_json
    words.say()
    words.facts(_result_rows(result))
    words.result(result.to_json())


def _plan_rows(plan: TuningPlan) -> Iterator[tuple[str, str]]:
    vectors = ", gains and biases" if plan.options.norms else ""
    yield "checkpoint", path_text(plan.checkpoint)
    yield "original", path_text(plan.original)
    yield "output", path_text(plan.output)
    yield "tuned", f"{plan.scales:,} scales{vectors}, in {plan.options.steps} steps"
    yield "calibration", f"{plan.texts.row(plan.seqlen)}, half of them held out"
    yield "disk needed", size_text(plan.disk_bytes)
    yield "memory needed", f"about {size_text(plan.memory_bytes)} in all"


def _result_rows(result: TunedCheckpoint) -> Iterator[tuple[str, str]]:
    folder = path_text(Path(result.output))
    yield "written", folder
    yield "held-out KL", tuning_text(result.tuning)
    yield "time", time_text(result.seconds)
    yield "peak memory", size_text(result.peak_memory_bytes)
    yield "measure it", f"ptq eval {shlex.quote(folder)}"
