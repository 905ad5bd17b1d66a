"""A block while transforms work on it.

A fold with scales ``s`` divides a producer's output channels by ``s`` and multiplies the columns of the linears that read them. The
scales are kept apart from the stored weights: ``weight`` is always the stored matrix times all scales so far, computed in float32 and
rounded once, when its codes are chosen. What is not quantized (norms, biases, linears that are left alone) is rounded to the dtype in
which it is stored; for a norm the scales that this leaves are taken over by its readers, so the fold stays exact (see ``folds.divide``).

``output_error`` tells how far the block's output moves on an excerpt of the calibration text when some of its linears are quantized. It
runs the block in float32, whatever the dtype of the calibration: in bfloat16 the noise of a run is as large as the error of 8-bit
codes. What ran before the linears on trial is not run again: every module that had finished by then, and runs only once, returns what it
returned the first time.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptqcli.calibration.statistics import InputStatistics
from ptqcli.model import linear_weight
from ptqcli.scheme import ActivationScheme, Scheme, activation_scale, round_activations, round_to_nearest
from ptqcli.transforms.folds import Fold, divide


@dataclass(frozen=True)
class Treatment:
    """How a linear will be quantized: its scheme, and the dtype of its scales."""

    scheme: Scheme
    scale_dtype: torch.dtype


@dataclass(frozen=True)
class Trial:
    """A linear as it would compute when quantized: ``round(x / divisor) W^T + b``.

    weight: [out, in]. divisor: [in], None for 1. activations: how inputs are rounded, None for not at all. input_scale: [1], if static.
    outliers: bool [in], inputs that are not rounded, None for none.
    """

    weight: Tensor
    divisor: Tensor | None = None
    activations: ActivationScheme | None = None
    input_scale: Tensor | None = None
    outliers: Tensor | None = None

    def run(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """The output for ``inputs`` [..., in]."""
        if self.divisor is not None:
            inputs = inputs / self.divisor
        if self.activations is not None:
            even = inputs if self.outliers is None else inputs.masked_fill(self.outliers, 0)
            rounded = round_activations(even, self.activations, self.input_scale)
            inputs = rounded if self.outliers is None else torch.where(self.outliers, inputs, rounded)
        return functional.linear(inputs, self.weight, bias)


@dataclass(frozen=True)
class FoldNote:
    """What a transform chose for one fold. error: the block's squared output error with its readers quantized, relative to the same
    without scales; None where nothing was measured."""

    producer: str
    readers: tuple[str, ...]
    choice: str
    error: float | None = None


class FoldedBlock:
    """One loaded block, its folds, and what calibration knows of it.

    block: with all its weights; its values are changed in place. order: local names of its linears in running order. treatments: of the
    linears that will be quantized. inputs: statistics of their inputs. stored: a parameter by its local name, as the file has it.
    run: the output of a block in float32 on the excerpt. scale_search: how grids are fitted on trial, see ``scheme.fit``. tell: called
    with what a transform is doing.
    """

    def __init__(
        self,
        block: nn.Module,
        folds: Sequence[Fold],
        order: Sequence[str],
        treatments: Mapping[str, Treatment],
        inputs: Mapping[str, InputStatistics],
        stored: Callable[[str], Tensor],
        run: Callable[[nn.Module], Tensor],
        scale_search: str = "minmax",
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.block, self.folds, self.order, self.treatments = block, tuple(folds), tuple(order), treatments
        self.limits: dict[str, Tensor] = {}
        self.scale_search, self.tell = scale_search, tell
        self._inputs, self._stored, self._run = dict(inputs), stored, run
        same = all(parameter.dtype == torch.float32 for parameter in block.parameters())
        self._twin = block if same else copy.deepcopy(block).float()
        self._columns: dict[str, Tensor] = {}  # linear -> [in], by which its columns are multiplied
        self._rows: dict[str, Tensor] = {}  # linear -> [out], by which its rows are divided
        self._changed: dict[str, Tensor] = {}  # parameters of producers, in the dtype of the file
        self._outputs: dict[str, Any] = {}  # of every module of the unquantized block, in the order in which they finished
        self._finished: dict[str, int] = {}  # linear -> how many modules had finished when it started
        self._often: set[str] = set()  # modules that run more than once
        self._expected: Tensor | None = None

    # What a transform looks at

    def readers(self, fold: Fold) -> list[str]:
        """The linears of a fold that will be quantized."""
        return [local for local in fold.readers if local in self.treatments]

    def inputs(self, local: str) -> InputStatistics:
        """Statistics of a quantized linear's inputs, divided by the scales so far."""
        return self._inputs[local]

    def weight(self, local: str) -> Tensor:
        """A linear's matrix with the scales so far, float32 [out, in]."""
        weight = _oriented(self.block.get_submodule(local), self._stored(f"{local}.weight")).float()
        if local in self._columns:
            weight = weight * self._columns[local]
        if local in self._rows:
            weight = weight / self._rows[local].unsqueeze(1)
        return weight

    def fold_error(self, fold: Fold, scales: Tensor | None) -> float:
        """Mean squared change of the block's output when the fold's readers are rounded to nearest.

        scales: [fold.width], by which the producer is divided; None for no scaling.
        """
        trials = {}
        for local in self.readers(fold):
            weight = self.weight(local)
            columns = torch.ones_like(weight[0]) if scales is None else fold.spread(scales)
            trials[local] = self._trial(local, weight * columns, columns)
        return self.output_error(trials)

    def _trial(self, local: str, weight: Tensor, columns: Tensor) -> Trial:
        treatment = self.treatments[local]
        scheme = treatment.scheme
        rounded = round_to_nearest(weight, scheme, treatment.scale_dtype, self.scale_search).dequantize(torch.float32)
        if scheme.activations is None:
            return Trial(rounded / columns)
        largest = self._inputs[local].largest
        assert largest is not None
        largest = largest / columns
        static = None if scheme.activations.dynamic else activation_scale(largest, replace(scheme.activations, dynamic=True))
        if scheme.outliers is None:
            return Trial(rounded, columns, scheme.activations, static)
        outliers = largest > scheme.outliers.threshold
        return Trial(torch.where(outliers, weight, rounded), columns, scheme.activations, static, outliers)

    def output_error(self, trials: Mapping[str, Trial]) -> float:
        """Mean squared difference of the block's output on the excerpt, with the linears in ``trials`` replaced, to its own."""
        if self._expected is None:
            self._expected = self._run(self._twin)
        if not self._outputs:
            self._remember_outputs()
        known = min(self._finished[local] for local in trials)
        known_before = [name for name in list(self._outputs)[:known] if name not in self._often]
        with self._replaced(trials, known_before):
            output = self._run(self._twin)
        return float((output - self._expected).square().mean())

    # What a transform does

    def scale(self, fold: Fold, scales: Tensor) -> None:
        """Divide the producer of ``fold`` by ``scales`` [fold.width], float32, and multiply the columns of its readers by them.

        Channels that no reader sees are left alone.
        """
        scales = torch.where(fold.folded().to(scales.device), scales, torch.ones_like(scales))
        parameters = self._parameters(fold.producer)
        if fold.producer in self.order:
            self._rows[fold.producer] = self._rows.get(fold.producer, torch.ones_like(scales)) * scales
            divided = {"bias": (parameters["bias"].float() / scales).to(parameters["bias"].dtype)} if "bias" in parameters else {}
        else:
            divided, scales = divide({name: parameters[name] for name, _ in fold.offsets}, fold.offsets, scales)
        self._changed.update({f"{fold.producer}.{name}": value for name, value in divided.items()})
        columns = fold.spread(scales.float())  # [in]
        for local in fold.readers:
            self._columns[local] = self._columns.get(local, torch.ones_like(columns)) * columns
            if local in self._inputs:
                self._inputs[local] = self._inputs[local].divided(columns)
        self._refresh([fold.producer, *fold.readers])

    def limit(self, local: str, limit: Tensor) -> None:
        """Let the grids of a quantized linear reach no further than ``limit`` [out, groups]."""
        self.limits[local] = limit

    # What the pipeline takes over

    def rewritten(self) -> dict[str, Tensor]:
        """Every parameter that was changed and is not quantized, by its local name, as it has to be stored."""
        scaled = [local for local in {**self._columns, **self._rows} if local not in self.treatments]
        weights = {f"{local}.weight": self._as_stored(local) for local in scaled}
        return {**self._changed, **weights}

    def release(self) -> None:
        """Forget what only transforms look at, and give the block the values of its float32 twin."""
        if self._twin is not self.block:
            self.block.load_state_dict(self._twin.state_dict())  # in the block's dtype
        self._twin = self.block
        self._outputs.clear()
        self._expected = None

    def _parameters(self, local: str) -> dict[str, Tensor]:
        """A producer's parameters as they would be stored now."""
        names = [name for name, _ in self.block.get_submodule(local).named_parameters(recurse=False)]
        return {name: self._changed[key] if (key := f"{local}.{name}") in self._changed else self._stored(key) for name in names}

    def _as_stored(self, local: str) -> Tensor:
        weight = self.weight(local).to(self._stored(f"{local}.weight").dtype)
        return _oriented(self.block.get_submodule(local), weight).contiguous()

    def _refresh(self, locals_: Sequence[str]) -> None:
        """Give the float32 twin the values that hold now."""
        for local in locals_:
            module = self._twin.get_submodule(local)
            for name, parameter in module.named_parameters(recurse=False):
                if local in self.order and name == "weight":
                    linear_weight(module).copy_(self.weight(local))
                elif f"{local}.{name}" in self._changed:
                    parameter.copy_(self._changed[f"{local}.{name}"])
        self._outputs.clear()

    def _remember_outputs(self) -> None:
        runs: Counter[str] = Counter()

        def started(local: str) -> Callable[..., None]:
            return lambda _module, _args: self._finished.update({local: len(self._outputs)})

        def finished(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                runs[name] += 1
                self._outputs[name] = _cloned(output)

            return hook

        handles = [self._twin.get_submodule(local).register_forward_pre_hook(started(local)) for local in self.order]
        handles += [module.register_forward_hook(finished(name)) for name, module in self._twin.named_modules() if name]
        self._run(self._twin)
        for handle in handles:
            handle.remove()
        self._often = {name for name, count in runs.items() if count > 1}

    @contextmanager
    def _replaced(self, trials: Mapping[str, Trial], before: Sequence[str]) -> Iterator[None]:
        """The linears on trial compute as their trials do, and the modules ``before`` them give the outputs that are known."""
        forwards: dict[str, Callable[..., Any]] = {}
        for name in before:
            forwards[name] = lambda *_args, name=name, **_kwargs: _cloned(self._outputs[name])
        for local, trial in trials.items():
            bias = self._twin.get_submodule(local).bias
            forwards[local] = lambda inputs, trial=trial, bias=bias: trial.run(inputs, bias)
        modules = {local: self._twin.get_submodule(local) for local in forwards}
        for local, module in modules.items():
            module.forward = forwards[local]
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward


def _cloned(output: Any) -> Any:
    """Tensors copied, since code may change them in place."""
    if isinstance(output, tuple):
        return tuple(_cloned(entry) for entry in output)
    return output.clone() if isinstance(output, Tensor) else output


def _oriented(linear: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` of ``linear`` turned from the way it is stored to [out, in], or back."""
    return weight if linear_weight(linear) is linear.weight else weight.t()
