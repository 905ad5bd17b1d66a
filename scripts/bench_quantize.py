"""Quantize one model by us and by llm-compressor, in one run on the same calibration tokens: time and perplexity.

    pip install -e '.[peers]'
    python scripts/bench_quantize.py --nsamples 256 --seqlen 256

Both run GPTQ in the same scheme, act-order with groups fixed beforehand (the default of both), damping 0.01, and
write a packed compressed-tensors checkpoint. Each otherwise runs with its own defaults: ours fits scales by least
squared error and solves a block in stages, llm-compressor fits them to the range and solves a whole block at once.
llm-compressor runs once for each of --peer-batch windows per forward pass (its default is 1); the fastest counts.

What is timed: from a model folder on disk and token windows in memory to a finished checkpoint on disk. Not timed:
imports, and reading and tokenizing the calibration text, which llm-compressor is given as token ids. Every run has
a process of its own that first quantizes the model with a few windows to warm up; the runs take turns, in an order
that is reversed every round, and the median counts.

The floor is the least that calibration needs: one forward pass over the same tokens, and for every distinct input
of a linear its Hessian, the plain product X^T X in float32 (ours sums the lower triangle only). Its batch size is the
fastest of FLOOR_BATCHES. Our loop over the blocks (everything but building the skeleton) is compared with it.

Perplexity is that of the checkpoints as plain transformers loads them, on the held-out part of the built-in text.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ptqcli

DEMO_MODEL = Path(ptqcli.__file__).parent / "demo"
WARM_UP_WINDOWS = 8
FLOOR_BATCHES = (4, 16, 64)
OURS, FLOOR = "ptqcli", "floor"


@dataclass(frozen=True)
class Job:
    """One run in a process of its own. work: ``ours``, ``peer``, ``floor`` or ``perplexity``. batch: windows per forward pass."""

    work: str
    model: str
    output: str
    nsamples: int
    seqlen: int
    bits: int
    group_size: int
    symmetric: bool
    threads: int
    batch: int | None = None


@dataclass(frozen=True)
class Entry:
    """A line of the table. seconds: median of the runs. steps: seconds by step of the last run."""

    name: str
    seconds: float
    steps: dict[str, float]
    perplexity: float | None = None


@dataclass(frozen=True)
class Outcome:
    """peer: the faster variant of llm-compressor, which the speed-up is against. loop: our run without building the skeleton."""

    entries: list[Entry]
    versions: dict[str, str]
    original_perplexity: float
    peer: str
    speedup: float
    loop_seconds: float
    loop_per_floor: float


def main() -> None:
    options = parse_arguments()
    if options.job:
        run_job(options.job)
        return
    with tempfile.TemporaryDirectory() as folder:
        outcome = compare(options, Path(folder))
    if options.json:
        print(json.dumps({"options": vars(options), **asdict(outcome)}, indent=2, default=str))
    else:
        show(outcome, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="model folder (default: the demo model)")
    parser.add_argument("--random", metavar="HIDDEN,LAYERS", help="a Llama with random weights of this size instead")
    parser.add_argument("--nsamples", type=int, default=256, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens in a window")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--asym", action="store_true", help="with zero points")
    parser.add_argument("--peer-batch", type=int, nargs="+", default=[1, 8], help="llm-compressor's batch sizes")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; the median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # how this script starts its own runs
    options = parser.parse_args()
    if importlib.util.find_spec("llmcompressor") is None:
        parser.error("llm-compressor is not installed; pip install -e '.[peers]' into an environment of its own")
    return options


def compare(options: argparse.Namespace, folder: Path) -> Outcome:
    """Run everything, each run in its own process."""
    model = random_model(options.random, folder / "random") if options.random else options.model
    base = Job(
        work="ours",
        model=str(model),
        output=str(folder / OURS),
        nsamples=options.nsamples,
        seqlen=options.seqlen,
        bits=options.bits,
        group_size=options.group_size,
        symmetric=not options.asym,
        threads=options.threads,
    )
    jobs = {OURS: base}
    for batch in options.peer_batch:
        jobs[f"llm-compressor, batch {batch}"] = replace(base, work="peer", batch=batch, output=str(folder / f"peer-{batch}"))
    peers = list(jobs)[1:]
    jobs[FLOOR] = replace(base, work="floor")

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for number in range(options.repeats):
        for name in list(jobs) if number % 2 == 0 else reversed(jobs):
            say(f"round {number + 1} of {options.repeats}: {name}")
            runs[name].append(start(jobs[name], folder))
    say("perplexity")
    losses = {name: start(replace(jobs[name], work="perplexity"), folder)["perplexity"] for name in [OURS, *peers]}
    original = start(replace(base, work="perplexity", output=str(model)), folder)["perplexity"]

    seconds = {name: statistics.median(run["seconds"] for run in runs[name]) for name in jobs}
    loop = statistics.median(run["seconds"] - run["plan"] for run in runs[OURS])
    fastest = min(peers, key=seconds.__getitem__)
    entries = []
    for name in jobs:
        steps = {key: value for key, value in runs[name][-1].items() if key != "seconds"}
        entries.append(Entry(name, seconds[name], steps, losses.get(name)))
    return Outcome(
        entries=entries,
        versions=versions(),
        original_perplexity=original,
        peer=fastest,
        speedup=seconds[fastest] / seconds[OURS],
        loop_seconds=loop,
        loop_per_floor=loop / seconds[FLOOR],
    )


def start(job: Job, folder: Path) -> dict[str, float]:
    """Run ``job`` in a new process and return what it measured."""
    request, answer = folder / "job.json", folder / "job.result.json"
    request.write_text(json.dumps(asdict(job)))
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--job", str(request)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if ended.returncode or not answer.exists():
        raise SystemExit(f"{job.work} failed:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    measured: dict[str, float] = json.loads(answer.read_text())
    return measured


def run_job(request: Path) -> None:
    """The other side of ``start``."""
    import torch

    job = Job(**json.loads(request.read_text()))
    torch.set_num_threads(job.threads)
    work: dict[str, Callable[[Job], dict[str, float]]] = {
        "ours": run_ours,
        "peer": run_peer,
        "floor": run_floor,
        "perplexity": run_perplexity,
    }
    request.with_suffix(".result.json").write_text(json.dumps(work[job.work](job)))


def run_ours(job: Job) -> dict[str, float]:
    from ptqcli.pipeline.pipeline import quantize
    from ptqcli.recipe import Recipe
    from ptqcli.resources import Resources

    def once(nsamples: int) -> dict[str, float]:
        recipe = Recipe(
            algo="gptq",
            wbits=job.bits,
            group_size=job.group_size,
            symmetric=job.symmetric,
            nsamples=nsamples,
            seqlen=job.seqlen,
        )
        report = quantize(Path(job.model), recipe, Path(job.output), overwrite=True, resources=Resources())
        steps = dict(report.seconds_by_step)
        return {"seconds": report.seconds - steps.pop("text"), **steps}

    once(WARM_UP_WINDOWS)
    return once(job.nsamples)


def run_peer(job: Job) -> dict[str, float]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = QuantizationArgs(
        num_bits=job.bits,
        symmetric=job.symmetric,
        strategy="channel" if job.group_size == -1 else "group",
        group_size=None if job.group_size == -1 else job.group_size,
    )

    def once(nsamples: int) -> dict[str, float]:
        windows = calibration_tokens(job, nsamples)
        dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * job.seqlen] * nsamples})
        reset_session()
        begin = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(job.model)
        loaded = time.perf_counter()
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=dataset,
            recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
            batch_size=job.batch,
            num_calibration_samples=nsamples,
            max_seq_length=job.seqlen,
            shuffle_calibration_samples=False,
        )
        solved = time.perf_counter()
        model.save_pretrained(job.output, save_compressed=True)
        tokenizer.save_pretrained(job.output)
        end = time.perf_counter()
        return {"seconds": end - begin, "load": loaded - begin, "oneshot": solved - loaded, "write": end - solved}

    once(WARM_UP_WINDOWS)
    return once(job.nsamples)


def run_floor(job: Job) -> dict[str, float]:
    import torch
    from torch import Tensor, nn
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto").base_model  # without the output head
    windows = torch.tensor(calibration_tokens(job, job.nsamples))
    hessians: dict[nn.Module, Tensor] = {}
    latest: Tensor | None = None
    in_products = 0.0

    def add_product(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
        nonlocal latest, in_products
        if args[0] is latest:  # q, k, v and gate, up read one tensor
            return
        latest = args[0]
        begin = time.perf_counter()
        rows = latest.flatten(0, -2).float()
        if linear not in hessians:
            hessians[linear] = torch.zeros(rows.shape[1], rows.shape[1])
        hessians[linear].addmm_(rows.t(), rows)
        in_products += time.perf_counter() - begin

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(add_product)

    def once(batch: int, nsamples: int) -> dict[str, float]:
        nonlocal in_products
        in_products = 0.0
        begin = time.perf_counter()
        with torch.no_grad():
            for inputs in windows[:nsamples].split(batch):
                model(input_ids=inputs, use_cache=False)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "forward": seconds - in_products, "products": in_products, "batch": batch}

    once(WARM_UP_WINDOWS, WARM_UP_WINDOWS)
    return min((once(batch, job.nsamples) for batch in FLOOR_BATCHES), key=lambda run: run["seconds"])


def run_perplexity(job: Job) -> dict[str, float]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    from ptqcli.calibration.text import evaluation_ids
    from ptqcli.evaluation.perplexity import perplexity

    # transformers reads packed zero points only this way; the original has nothing to expand
    packed = not job.symmetric and job.output != job.model
    choice = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed else {}
    model = AutoModelForCausalLM.from_pretrained(job.output, dtype="auto", **choice)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    return {"perplexity": perplexity(model, evaluation_ids("builtin", tokenizer), job.seqlen).perplexity}


def calibration_tokens(job: Job, nsamples: int) -> list[list[int]]:
    """The windows that our own run draws."""
    from ptqcli.calibration.text import calibration_windows, documents
    from ptqcli.checkpoint.auxiliary import load_tokenizer
    from ptqcli.recipe import Recipe

    tokenizer = load_tokenizer(Path(job.model))
    texts = documents("builtin", "calibration")
    windows: list[list[int]] = calibration_windows(texts, tokenizer, nsamples, job.seqlen, Recipe().seed).tolist()
    return windows


def random_model(size: str, folder: Path) -> Path:
    """A Llama of random weights in bfloat16, with the demo model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, layers = (int(part) for part in size.split(","))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def versions() -> dict[str, str]:
    """Versions of what was compared and of what both stand on."""
    from importlib.metadata import version

    found = {name: version(name) for name in ("llmcompressor", "compressed-tensors", "transformers", "torch")}
    return {"ptqcli": ptqcli.__version__, **found}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(outcome: Outcome, options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from ptqcli.numerics.scheme import Scheme

    scheme = Scheme(options.bits, options.group_size, not options.asym)
    windows = f"{options.nsamples} windows of {options.seqlen} tokens"
    table = Table(title=f"GPTQ {scheme}, {windows}, {options.threads} threads")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("perplexity", justify="right")
    table.add_column("steps of the last run")
    for entry in outcome.entries:
        perplexity = "" if entry.perplexity is None else f"{entry.perplexity:.3f}"
        table.add_row(entry.name, f"{entry.seconds:.2f}", perplexity, steps_text(entry.steps))
    table.add_row("original", "", f"{outcome.original_perplexity:.3f}", "")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {version}" for name, version in outcome.versions.items()))
    console.print(f"ptqcli is {outcome.speedup:.2f} times as fast as {outcome.peer}")
    console.print(f"our loop over the blocks, {outcome.loop_seconds:.2f} s, is {outcome.loop_per_floor:.2f} times the floor")


def steps_text(steps: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in steps.items())


if __name__ == "__main__":
    main()
