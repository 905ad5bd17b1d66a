"""``ptq bench`` at work: the machine is measured, then the kernels, then the whole models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ptqcli.cli.bench_job import Job, Setting
from ptqcli.cli.bench_results import Results
from ptqcli.cli.console import Output, size_text
from ptqcli.cli.progress import Tracker
from ptqcli.errors import PTQError, UsageError

if TYPE_CHECKING:
    import torch

    from ptqcli.bench.generation import GenerationPoint
    from ptqcli.bench.linears import KernelPoint
    from ptqcli.bench.machine import Machine
    from ptqcli.bench.peers import Peer


class Measurement:
    """One job being done. It tells ``output`` what is measured and ``tracker`` how far it is."""

    def __init__(self, job: Job, output: Output, tracker: Tracker) -> None:
        self._job = job
        self._output = output
        self._tracker = tracker

    def run(self) -> Results:
        """Measure all that the job names. Raises what ``check_kernels`` raises before anything is measured."""
        from ptqcli.bench.linears import check_kernels
        from ptqcli.bench.machine import measure
        from ptqcli.bench.peers import installed_peers

        job = self._job
        peers = installed_peers(job.device) if job.peers else []
        check_kernels(job.work, job.tokens, job.device, self._kernel_dtype(), job.kernel, len(peers))
        self._tracker.say("measuring what the machine reaches")
        results = Results(subject=job.subject, machine=measure(job.device), models=job.models)
        self._output.facts(job.facts(results.machine))
        if job.work:
            self._run_kernels(results, peers)
        if job.models:
            self._run_models(results)
        return results

    def _kernel_dtype(self) -> torch.dtype:
        import torch

        return self._job.dtype or torch.bfloat16

    def _run_kernels(self, results: Results, peers: Sequence[Peer]) -> None:
        from ptqcli.bench.linears import bench_kernels
        from ptqcli.bench.peers import missing_peers

        def report(done: int, total: int, point: KernelPoint | None) -> None:
            if point is None:
                self._tracker.step(done, total, "")
            else:
                self._tracker.note(f"{point.shape.name}, {point.tokens} tokens, {point.name}: {point.microseconds:,.1f} us")

        job = self._job
        self._tracker.say("measuring kernels")
        if job.peers:
            results.missing_peers = missing_peers(job.device)
        results.kernels, failures = bench_kernels(
            job.work,
            job.tokens,
            job.device,
            results.machine,
            self._kernel_dtype(),
            job.kernel,
            peers,
            job.seconds,
            report,
        )
        results.failures += failures

    def _run_models(self, results: Results) -> None:
        """All models at all settings: in turn if they fit into memory together, else one model after the other."""
        from ptqcli.resources import free_bytes

        memory = self._all_memory(results)
        if not memory:
            return
        largest = [max(memory[name].values()) for name in memory]
        results.in_turn = sum(largest) < free_bytes(self._job.device)
        for names in [list(memory)] if results.in_turn else [[name] for name in memory]:
            self._time_models(names, memory, results)
        order = {setting: index for index, setting in enumerate(self._job.settings())}
        results.generation.sort(key=lambda point: order[point.batch, point.prompt])

    def _all_memory(self, results: Results) -> dict[str, dict[Setting, int]]:
        """Peak bytes by model and setting. A setting that does not run is left out and the reason noted."""
        job = self._job
        self._tracker.say("measuring memory, each model in a process of its own")
        memory: dict[str, dict[Setting, int]] = {name: {} for name in job.models}
        runs = [(name, setting) for name in job.models for setting in job.settings()]
        for done, (name, (batch, prompt)) in enumerate(runs):
            self._tracker.step(done, len(runs), f"{name}, batch {batch}, prompt {prompt}")
            try:
                memory[name][batch, prompt] = self._memory(name, batch, prompt)
            except UsageError:
                raise
            except PTQError as error:
                results.failures.append(f"{name}, batch {batch}, prompt {prompt}: {error}")
        for name in job.models:
            if not memory[name] and name != "original":
                results.error = PTQError(f"{job.models[name]}: could not be measured; see what failed above")
        return {name: peaks for name, peaks in memory.items() if peaks}

    def _memory(self, name: str, batch: int, prompt: int) -> int:
        from ptqcli.bench.generation import peak_memory
        from ptqcli.resources import free_bytes

        job = self._job
        folder = job.models[name]
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        free = free_bytes(job.device)
        if stored > free:
            raise PTQError(f"{folder}: its weights are {size_text(stored)} and {size_text(free)} of memory are free")
        return peak_memory(self._loading(name), batch, prompt, job.new_tokens, job.device)

    def _loading(self, name: str) -> Callable[[], Any]:
        """A call that loads the model ``name``, and that another process can be sent."""
        from ptqcli.runtime.models import load_model

        return partial(load_model, self._job.models[name], self._job.device, "auto" if name == "original" else self._job.kernel)

    def _time_models(self, names: Sequence[str], memory: Mapping[str, Mapping[Setting, int]], results: Results) -> None:
        """The models ``names``, in memory together, at each setting that ``memory`` has for them."""
        self._tracker.say(f"loading {' and '.join(names)}")
        models = {name: self._loading(name)() for name in names}
        self._tell_layers(models, results)
        self._tracker.say(f"measuring {' and '.join(names)}{' in turn' if len(names) > 1 else ''}")
        for index, setting in enumerate(self._job.settings()):
            present = {name: model for name, model in models.items() if setting in memory[name]}
            peaks = {name: memory[name][setting] for name in present}
            if present:
                results.generation += self._time(present, peaks, index, results.machine)

    def _tell_layers(self, models: Mapping[str, Any], results: Results) -> None:
        from ptqcli.runtime import kernels_in

        if "checkpoint" in models and not results.layers:
            results.layers = dict(kernels_in(models["checkpoint"]))
            self._output.say(f"layers run on {', '.join(f'{name} x {count}' for name, count in results.layers.items())}")

    def _time(self, models: Mapping[str, Any], peaks: Mapping[str, int], index: int, machine: Machine) -> list[GenerationPoint]:
        from ptqcli.bench.generation import bench_generation

        job, settings = self._job, self._job.settings()
        batch, prompt = settings[index]

        def step(done: int, total: int) -> None:
            self._tracker.step(index * total + done, len(settings) * total, f"batch {batch}, prompt {prompt}")

        return bench_generation(models, batch, prompt, job.new_tokens, job.device, machine, peaks, 10 * job.seconds, step)
