"""``ptq bench``: how fast a checkpoint's kernels and the whole model are, beside the original and what the machine reaches."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ptqcli.cli.bench_tables import GENERATION_COLUMNS, generation_rows, show_kernels
from ptqcli.cli.console import Output, path_text, size_text
from ptqcli.cli.load import hush_transformers
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import device_option, json_option, kernel_option, open_device, quiet_option
from ptqcli.cli.progress import Tracker, track
from ptqcli.cli.report import baseline_of
from ptqcli.errors import PTQError, UsageError

if TYPE_CHECKING:
    import torch

    from ptqcli.bench.generation import GenerationPoint
    from ptqcli.bench.linears import KernelPoint
    from ptqcli.bench.machine import Machine
    from ptqcli.bench.peers import Peer
    from ptqcli.bench.shapes import Shape
    from ptqcli.numerics.scheme import Scheme

DEFAULT_SCHEME = "w4a16"
USUAL_PROMPT = 128
SECONDS_BETWEEN_LINES = 15.0
VERSIONS = ("ptqcli", "torch", "transformers", "triton")
MODEL_FLAGS = {"batch": "--batch", "prompt": "--prompt", "new_tokens": "--new-tokens", "baseline": "--baseline or --no-baseline"}
KERNEL_FLAGS = {"tokens": "--tokens", "peers": "--peers", "plot": "--plot", "shapes": "--shapes"}


def _parse_counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """``1,4,16`` as numbers in the order given, each once."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and part.isascii() and 0 < int(part) < 2**31 for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers from 1 on, such as 1,4,16")
    return tuple(dict.fromkeys(int(part) for part in parts))


@click.command()
@click.argument("checkpoint", required=False)
@click.option("--only", type=click.Choice(["kernels", "model"]), help="Measure the kernels alone, or the whole model alone.")
@click.option("--shapes", metavar="NAME|KxN[,KxN...]", help="No checkpoint: the layers of a known model such as llama3-8b, or in x out.")
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    metavar="w4a16|w8a8|...",
    show_default=DEFAULT_SCHEME,
    help="Number format of --shapes, such as w4a16-g64-asym, w8a8, llm-int8; may be given several times.",
)
@click.option(
    "--tokens",
    callback=_parse_counts,
    default="1,4,16,64,256",
    show_default=True,
    metavar="M[,M...]",
    help="Kernels: tokens in one call.",
)
@kernel_option
@click.option("--peers", is_flag=True, help="Kernels: beside those of other libraries that are installed.")
@click.option("--batch", callback=_parse_counts, default="1", show_default=True, metavar="B[,B...]", help="Model: sequences at once.")
@click.option(
    "--prompt",
    callback=_parse_counts,
    show_default=f"{USUAL_PROMPT}, or what the model allows",
    metavar="T[,T...]",
    help="Model: tokens of a prompt.",
)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True, metavar="N", help="Model: tokens made behind it.")
@click.option("--baseline", metavar="MODEL", show_default="where the checkpoint came from", help="Model: compare with this one.")
@click.option("--no-baseline", is_flag=True, help="Model: measure the checkpoint alone.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True, max=600),
    default=0.2,
    show_default=True,
    metavar="S",
    help="For each kernel; ten times that for each model.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Kernels: draw them under the machine's limits.")
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
    _refuse_without_effect(ctx, only, shapes, schemes)
    if not math.isfinite(seconds):
        raise UsageError(f"--seconds {seconds} is not a time; give a number of seconds")
    _refuse_together(checkpoint, shapes, baseline, no_baseline)
    place = open_device(device)
    if plot is not None:
        check_plot(plot, overwrite)
    hush_transformers()
    job = _Job(place, kernel, tokens, peers, batch, prompt, new_tokens, seconds)
    if shapes is not None:
        job.add_shapes(shapes, schemes or (DEFAULT_SCHEME,))
    else:
        folder = find_checkpoint(checkpoint)
        job.add_checkpoint(folder, None if no_baseline else baseline_of(folder, baseline, output), only)
    with track("measurement", quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        results = job.run(output, tracker)
    results.show(output)
    if plot is not None:
        from ptqcli.bench.roofline import draw

        draw(results.kernels, results.machine, plot)
        output.say()
        output.say(f"roofline  {path_text(plot)}")
    output.result(results.to_json())
    if results.error is not None:
        raise results.error


# What is refused before anything is measured


def _refuse_without_effect(ctx: click.Context, only: str | None, shapes: str | None, schemes: tuple[str, ...]) -> None:
    if only == "kernels" or shapes is not None:
        reason, flags = "--shapes" if shapes is not None else "--only kernels", {**MODEL_FLAGS, "no_baseline": MODEL_FLAGS["baseline"]}
        without = "the whole model is not measured"
        _refuse_given(ctx, flags, f"has no effect with {reason}: {without}")
    if only == "model":
        _refuse_given(ctx, KERNEL_FLAGS, "has no effect with --only model: no kernel is measured by itself")
    if schemes and shapes is None:
        raise click.UsageError("--scheme has no effect without --shapes: a checkpoint has its own")
    if ctx.params["overwrite"] and ctx.params["plot"] is None:
        raise click.UsageError("--overwrite has no effect without --plot")


def _refuse_given(ctx: click.Context, flags: Mapping[str, str], why: str) -> None:
    for name, flag in flags.items():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{flag} {why}")


def _refuse_together(checkpoint: str | None, shapes: str | None, baseline: str | None, no_baseline: bool) -> None:
    if checkpoint is not None and shapes is not None:
        raise click.UsageError("CHECKPOINT and --shapes exclude each other: a checkpoint has its own shapes")
    if baseline and no_baseline:
        raise click.UsageError("--baseline and --no-baseline exclude each other")


def check_plot(file: Path, overwrite: bool) -> None:
    """Raise UsageError, or PTQError where matplotlib is missing, unless a picture can be written to ``file``."""
    from ptqcli.bench.roofline import check_installed

    if file.suffix.lower() != ".png":
        raise UsageError(f"--plot {file}: only PNG is written; name a file that ends in .png")
    if file.is_dir():
        raise UsageError(f"--plot {file}: is a folder; name a file in it")
    if not file.parent.is_dir():
        raise UsageError(f"--plot {file}: there is no folder {file.parent}; make it first")
    if file.exists() and not overwrite:
        raise UsageError(f"--plot {file}: already exists; give --overwrite to replace it")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PTQError(f"--plot {file}: cannot write there; name a file in a folder of yours")
    check_installed()


# The work


Setting = tuple[int, int]  # batch, prompt


@dataclass
class _Job:
    """What is to be measured. work: matrices with their schemes. models: name -> folder, the checkpoint last. subject: as a person named
    it."""

    device: torch.device
    kernel: str
    tokens: tuple[int, ...]
    peers: bool
    batches: tuple[int, ...]
    prompts: tuple[int, ...] | None
    new_tokens: int
    seconds: float
    work: list[tuple[Shape, Scheme]] = field(default_factory=list)
    dtype: torch.dtype | None = None
    models: dict[str, Path] = field(default_factory=dict)
    subject: str = ""

    def add_shapes(self, shapes: str, schemes: Sequence[str]) -> None:
        """The matrices that ``shapes`` names in each of ``schemes``."""
        from ptqcli.bench.shapes import named_shapes
        from ptqcli.numerics.scheme import Scheme

        formats = list(dict.fromkeys(Scheme.parse(text) for text in schemes))
        self.work = [(shape, scheme) for scheme in formats for shape in named_shapes(shapes)]
        self.subject = shapes

    def add_checkpoint(self, folder: Path, original: Path | None, only: str | None) -> None:
        """What a checkpoint is made of, the whole checkpoint, and the model that it came from."""
        from ptqcli.model.config import load_config

        config = load_config(folder)
        self.subject = path_text(folder)
        quantized = getattr(config, "quantization_config", None) is not None
        if only != "model":
            self._add_layers(folder, quantized, config)
        if only == "kernels":
            return
        if original is not None:
            self.models["original"] = original
        self.models["checkpoint" if quantized else "model"] = folder
        self._check_settings()

    def _add_layers(self, folder: Path, quantized: bool, config: Any) -> None:
        from ptqcli.bench.shapes import shapes_of

        if not quantized:
            raise UsageError(f"{folder}: is not quantized, so it has no kernels of its own; give --only model, or --shapes for kernels")
        self.work = shapes_of(folder)
        self.dtype = config.dtype

    def _check_settings(self) -> None:
        from ptqcli.bench.generation import check_setting, positions_of
        from ptqcli.model.config import load_config
        from ptqcli.model.kinds import kind_of

        configs = {name: load_config(folder) for name, folder in self.models.items()}
        if self.prompts is None:
            room = min(positions_of(config) for config in configs.values()) - self.new_tokens
            self.prompts = (max(1, min(USUAL_PROMPT, room)),)
        for name, config in configs.items():
            kind_of(config)
            for batch, prompt in self._settings():
                check_setting(config, name, batch, prompt, self.new_tokens)

    def _settings(self) -> list[Setting]:
        return [(batch, prompt) for prompt in self.prompts or () for batch in self.batches]

    def run(self, output: Output, tracker: Tracker) -> _Results:
        """Measure the machine, then the kernels, then the models."""
        import torch

        from ptqcli.bench.linears import check_kernels
        from ptqcli.bench.machine import measure
        from ptqcli.bench.peers import installed_peers

        peers = installed_peers(self.device) if self.peers else []
        check_kernels(self.work, self.tokens, self.device, self.dtype or torch.bfloat16, self.kernel, len(peers))
        tracker.say("measuring what the machine reaches")
        results = _Results(self.subject, measure(self.device), self.models)
        output.facts(self._plan(results.machine))
        if self.work:
            self._run_kernels(results, peers, tracker)
        if self.models:
            self._run_models(results, output, tracker)
        return results

    def _plan(self, machine: Machine) -> Iterator[tuple[str, str]]:
        from ptqcli.bench.roofline import rate_text

        threads = f", {machine.threads} threads" if machine.threads else ""
        yield "machine", f"{machine.name} ({machine.device}{threads}), cache {size_text(machine.cache_bytes)}"
        arithmetic = [f"{name} {rate_text(limit)}" for name, limit in machine.arithmetic.items()]
        yield "reaches", ", ".join([f"memory {rate_text(machine.bandwidth, 'B/s')}", *arithmetic]) + " (measured just now)"
        yield "subject", self.subject
        if self.models:
            yield "original", path_text(self.models["original"]) if "original" in self.models else "none"
        if self.work:
            schemes = dict.fromkeys(str(scheme) for _, scheme in self.work)
            yield "kernels", f"{len(self.work)} matrices ({'; '.join(schemes)}) with {_listed(self.tokens)} tokens"
        if self.models:
            settings = f"batch {_listed(self.batches)}, prompt {_listed(self.prompts or ())}, {self.new_tokens} new tokens"
            yield "whole model", f"{' and '.join(self.models)}: {settings}"

    def _run_kernels(self, results: _Results, peers: Sequence[Peer], tracker: Tracker) -> None:
        import torch

        from ptqcli.bench.linears import bench_kernels
        from ptqcli.bench.peers import missing_peers

        def report(done: int, total: int, point: KernelPoint | None) -> None:
            if point is None:
                tracker.step(done, total, "")
            else:
                tracker.note(f"{point.shape.name}, {point.tokens} tokens, {point.name}: {point.microseconds:,.1f} us")

        tracker.say("measuring kernels")
        if self.peers:
            results.missing_peers = missing_peers(self.device)
        results.kernels, failures = bench_kernels(
            self.work,
            self.tokens,
            self.device,
            results.machine,
            self.dtype or torch.bfloat16,
            self.kernel,
            peers,
            self.seconds,
            report,
        )
        results.failures += failures

    def _run_models(self, results: _Results, output: Output, tracker: Tracker) -> None:
        """All models at all settings: in turn if they fit into memory together, else one model after the other."""
        from ptqcli.bench.machine import free_bytes

        memory = self._all_memory(results, tracker)
        if not memory:
            return
        largest = [max(memory[name].values()) for name in memory]
        results.in_turn = sum(largest) < free_bytes(self.device)
        for names in [list(memory)] if results.in_turn else [[name] for name in memory]:
            tracker.say(f"loading {' and '.join(names)}")
            models = {name: self._loading(name)() for name in names}
            self._tell_layers(models, results, output)
            tracker.say(f"measuring {' and '.join(names)}{' in turn' if len(names) > 1 else ''}")
            for index, setting in enumerate(self._settings()):
                present = {name: model for name, model in models.items() if setting in memory[name]}
                peaks = {name: memory[name][setting] for name in present}
                if present:
                    results.generation += self._time(present, peaks, setting, index, results.machine, tracker)
        order = {setting: index for index, setting in enumerate(self._settings())}
        results.generation.sort(key=lambda point: order[point.batch, point.prompt])

    def _all_memory(self, results: _Results, tracker: Tracker) -> dict[str, dict[Setting, int]]:
        """Peak bytes by model and setting. A setting that does not run is left out and the reason noted."""
        tracker.say("measuring memory, each model in a process of its own")
        memory: dict[str, dict[Setting, int]] = {name: {} for name in self.models}
        jobs = [(name, setting) for name in self.models for setting in self._settings()]
        for done, (name, (batch, prompt)) in enumerate(jobs):
            tracker.step(done, len(jobs), f"{name}, batch {batch}, prompt {prompt}")
            try:
                memory[name][batch, prompt] = self._memory(name, batch, prompt)
            except UsageError:
                raise
            except PTQError as error:
                results.failures.append(f"{name}, batch {batch}, prompt {prompt}: {error}")
        for name in self.models:
            if not memory[name] and name != "original":
                results.error = PTQError(f"{self.models[name]}: could not be measured; see what failed above")
        return {name: peaks for name, peaks in memory.items() if peaks}

    def _loading(self, name: str) -> Callable[[], Any]:
        """A call that loads the model ``name``, and that another process can be sent."""
        from ptqcli.runtime.models import load_model

        return partial(load_model, self.models[name], self.device, "auto" if name == "original" else self.kernel)

    def _memory(self, name: str, batch: int, prompt: int) -> int:
        from ptqcli.bench.generation import peak_memory
        from ptqcli.bench.machine import free_bytes

        folder = self.models[name]
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        free = free_bytes(self.device)
        if stored > free:
            raise PTQError(f"{folder}: its weights are {size_text(stored)} and {size_text(free)} of memory are free")
        return peak_memory(self._loading(name), batch, prompt, self.new_tokens, self.device)

    def _time(
        self, models: Mapping[str, Any], peaks: Mapping[str, int], setting: Setting, index: int, machine: Machine, tracker: Tracker
    ) -> list[GenerationPoint]:
        from ptqcli.bench.generation import bench_generation

        batch, prompt = setting
        settings = len(self._settings())

        def step(done: int, total: int) -> None:
            tracker.step(index * total + done, settings * total, f"batch {batch}, prompt {prompt}")

        return bench_generation(models, batch, prompt, self.new_tokens, self.device, machine, peaks, 10 * self.seconds, step)

    def _tell_layers(self, models: Mapping[str, Any], results: _Results, output: Output) -> None:
        from ptqcli.runtime import kernels_in

        if "checkpoint" in models and not results.layers:
            results.layers = dict(kernels_in(models["checkpoint"]))
            output.say(f"layers run on {', '.join(f'{name} x {count}' for name, count in results.layers.items())}")


# What is shown


@dataclass
class _Results:
    """All that was measured. layers: kernels of the checkpoint's layers, counted. in_turn: models were timed in alternation.

    error: why the model that was asked for has no result at all.
    """

    subject: str
    machine: Machine
    models: Mapping[str, Path]
    layers: dict[str, int] = field(default_factory=dict)
    kernels: list[KernelPoint] = field(default_factory=list)
    generation: list[GenerationPoint] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    missing_peers: dict[str, str] = field(default_factory=dict)
    in_turn: bool = True
    error: PTQError | None = None

    def show(self, output: Output) -> None:
        """Tables, then what failed."""
        for scheme in dict.fromkeys(point.scheme for point in self.kernels):
            show_kernels(scheme, [point for point in self.kernels if point.scheme == scheme], output)
        if self.generation:
            self._show_generation(output)
        for failure in self.failures:
            output.say(f"failed: {failure}")
        for name, advice in self.missing_peers.items():
            output.say(f"not installed: {name} ({advice})")

    def _show_generation(self, output: Output) -> None:
        new_tokens, dtype = self.generation[0].new_tokens, self.generation[0].dtype
        output.table(f"Whole model, {new_tokens} new tokens, medians", GENERATION_COLUMNS, generation_rows(self.generation))
        output.say(f"MFU, HFU: model's and hardware's operations as a share of the measured limit of {dtype}; attention counted in full")
        output.say("MFU by definition counts the head for every token of the prompt, HFU for the last alone, as it is computed")
        if self.machine.threads:
            output.say("peak memory: largest resident size of a process that loads the model and runs it once, Python and torch included")
        else:
            output.say("peak memory: most that torch allocated in a process that loads the model and runs it once")
        if not self.in_turn:
            output.say("the models did not fit into memory together, so they were timed one after the other")

    def to_json(self) -> dict[str, Any]:
        """Everything, as one object."""
        return {
            "subject": self.subject,
            "models": {name: str(folder) for name, folder in self.models.items()},
            "versions": {name: _version(name) for name in VERSIONS},
            "machine": asdict(self.machine),
            "layers": self.layers,
            "kernels": [asdict(point) for point in self.kernels],
            "generation": [asdict(point) for point in self.generation],
            "in_turn": self.in_turn,
            "failures": self.failures,
            "missing_peers": self.missing_peers,
        }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
