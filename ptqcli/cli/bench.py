"""``ptq bench``: how fast a checkpoint's kernels and the whole model are, beside the original and what the machine reaches."""

from __future__ import annotations

from pathlib import Path

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.bench_flags import check_flags, check_plot, parse_counts
from ptqcli.cli.bench_job import USUAL_PROMPT, Job
from ptqcli.cli.bench_measurement import Measurement
from ptqcli.cli.console import Output, path_text
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import NamedPath, device_option, json_option, kernel_option, open_device, quiet_option
from ptqcli.cli.progress import track
from ptqcli.cli.report import baseline_of

DEFAULT_SCHEME = "w4a16"
SECONDS_BETWEEN_LINES = 15.0


@click.command(
    epilog=examples(
        "ptq bench small --device cuda",
        "ptq bench small --only model --batch 1,8 --prompt 512",
        "ptq bench --shapes llama3-8b --scheme w4a16 --scheme w8a8 --peers --plot roofline.png",
    )
)
@click.argument("checkpoint", required=False, shell_complete=completion.checkpoint)
@click.option("--only", type=click.Choice(["kernels", "model"]), help="Measure the kernels alone, or the whole model alone.")
@click.option("--shapes", metavar="NAME|KxN[,KxN...]", help="No checkpoint: the layers of a known model such as llama3-8b, or in x out.")
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    metavar="w4a16|w8a8|...",
    shell_complete=completion.scheme,
    show_default=DEFAULT_SCHEME,
    help="Number format of --shapes, such as w4a16-g64-asym, w8a8, llm-int8; may be given several times.",
)
@click.option(
    "--tokens",
    callback=parse_counts,
    default="1,4,16,64,256",
    show_default=True,
    metavar="M[,M...]",
    help="Kernels: tokens in one call.",
)
@kernel_option
@click.option("--peers", is_flag=True, help="Kernels: beside those of other libraries that are installed.")
@click.option("--batch", callback=parse_counts, default="1", show_default=True, metavar="B[,B...]", help="Model: sequences at once.")
@click.option(
    "--prompt",
    callback=parse_counts,
    show_default=f"{USUAL_PROMPT}, or what the model allows",
    metavar="T[,T...]",
    help="Model: tokens of a prompt.",
)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True, metavar="N", help="Model: tokens made behind it.")
@click.option(
    "--baseline",
    metavar="MODEL",
    show_default="where the checkpoint came from",
    shell_complete=completion.model,
    help="Model: compare with this one.",
)
@click.option("--no-baseline", is_flag=True, help="Model: measure the checkpoint alone.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True, max=600),
    default=0.2,
    show_default=True,
    metavar="S",
    help="For each kernel; ten times that for each model.",
)
@click.option("--plot", type=NamedPath(), metavar="FILE.png", help="Kernels: draw them under the machine's limits.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier file of --plot.")
@device_option
@json_option
@quiet_option
@click.pass_context
def command(
    ctx: click.Context,
    checkpoint: str | None,
    only: str | None,
    shapes: str | None,
    schemes: tuple[str, ...],
    tokens: tuple[int, ...],
    kernel: str,
    peers: bool,
    batch: tuple[int, ...],
    prompt: tuple[int, ...] | None,
    new_tokens: int,
    baseline: str | None,
    no_baseline: bool,
    seconds: float,
    plot: Path | None,
    overwrite: bool,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how fast CHECKPOINT is, beside the original.

    CHECKPOINT is a folder that `ptq quantize` wrote; left out, it is the newest one here. Measured are the products of its layers, on
    random numbers (kernels), then the whole model: prefill, decode, memory. With --only model it may be any model folder or hub id.
    """
    output = Output(as_json=as_json, quiet=quiet)
    check_flags(ctx)
    place = open_device(device)
    if plot is not None:
        check_plot(plot, overwrite)
    silence_transformers()
    job = Job(
        device=place,
        kernel=kernel,
        tokens=tokens,
        peers=peers,
        batches=batch,
        prompts=prompt,
        new_tokens=new_tokens,
        seconds=seconds,
    )
    if shapes is not None:
        job.add_shapes(shapes, schemes or (DEFAULT_SCHEME,))
    else:
        folder = find_checkpoint(checkpoint)
        job.add_checkpoint(folder, None if no_baseline else baseline_of(folder, baseline, output), only)
    with track("measurement", quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        results = Measurement(job, output, tracker).run()
    results.show(output)
    if plot is not None:
        from ptqcli.bench.roofline import draw

        draw(results.kernels, results.machine, plot)
        output.say()
        output.say(f"roofline  {path_text(plot)}")
    output.result(results.to_json())
    if results.error is not None:
        raise results.error
