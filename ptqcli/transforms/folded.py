"""A block while transforms work on it.

A fold with scales ``s`` divides a producer's output channels by ``s`` and multiplies the columns of the linears that read them. The
scales are kept apart from the stored weights: ``weight`` is always the stored matrix times all scales so far, computed in float32 and
rounded once, when its codes are chosen. What is not quantized (norms, biases, linears that are left alone) is rounded to the dtype in
which it is stored; for a norm the scales that this leaves are taken over by its readers, so the fold stays exact (see ``folds.divide``).

A fold that can be shifted moves its producer's bias, and its readers' biases take up what they miss.

``verified`` proves folds with the very ``FoldedBlock.scale`` and ``shift`` that transforms then use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.calibration.statistics import InputStatistics
from ptqcli.errors import PTQError
from ptqcli.model.linears import is_linear, linear_weight, rows_first
from ptqcli.numerics.activations import static_scale
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.numerics.ranges import MinMax, RangeSearch
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.transforms.cut import Run
from ptqcli.transforms.folds import Fold, FoldSearch, divide
from ptqcli.transforms.replay import Replay

# Largest relative difference of the outputs of a float32 block with and without a fold.
BOUND = 1e-5


@dataclass(frozen=True)
class WeightSpec:
    """How a linear's weight will be stored: its scheme, and the dtype of its scales."""

    scheme: Scheme
    scale_dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class FoldNote:
    """What a transform chose for one fold.

    error: the block's squared output error with the fold's readers rounded, relative to the same without scales; None if not measured.
    """

    producer: str
    readers: tuple[str, ...]
    choice: str
    error: float | None = None


class FoldedBlock:
    """One loaded block, its folds, and what calibration knows of it.

    block: with all its weights; nothing of it is changed before ``release``.
    specs: of the linears that will be quantized, by their local names.
    inputs: statistics of their inputs.
    stored: a parameter by its local name, as the file has it.
    run: the output of a block in float32 on the excerpt.
    search: fits grids on trial.
    tell: called with what a transform is doing.
    divided: does so many pieces of work, each of which gives a number, and gives the numbers; other processes may do some of them.
    """

    def __init__(
        self,
        block: nn.Module,
        folds: Sequence[Fold],
        specs: Mapping[str, WeightSpec],
        inputs: Mapping[str, InputStatistics],
        stored: Callable[[str], Tensor],
        run: Callable[[nn.Module], Tensor],
        search: RangeSearch,
        tell: Callable[[str], None] = lambda text: None,
        divided: Callable[[Sequence[float], Callable[[int], float]], Iterator[float]] = lambda costs, work: map(work, range(len(costs))),
    ) -> None:
        self.block, self.folds, self.specs = block, tuple(folds), specs
        self.ranges: dict[str, RangeSearch] = {}  # linear -> what fits its grids, where that is not ``search``
        self.search, self.tell, self._divided = search, tell, divided
        self._stored = stored
        self._inputs = dict(inputs)
        self._columns: dict[str, Tensor] = {}  # linear -> [in], by which its columns are multiplied
        self._rows: dict[str, Tensor] = {}  # linear -> [out], by which its rows are divided
        self._norms: dict[str, Tensor] = {}  # parameters of producers that are no linears, in the dtype of the file
        self._moved: dict[str, Tensor] = {}  # linear -> [out], what shifts have added to its bias
        self._changed: dict[str, None] = {}  # parameters that a scale has changed
        self._given = self.state()
        self._replay: Replay | None = Replay(self._in_float32(), run)

    def _in_float32(self) -> nn.Module:
        twin = copy.deepcopy(self.block).float()
        if any(parameter.dtype != torch.float32 for parameter in self.block.parameters()):
            for name, parameter in twin.named_parameters():
                parameter.copy_(self._stored(name))  # the block may have been loaded in a narrower dtype
        return twin

    # What a transform looks at

    def readers(self, fold: Fold) -> list[str]:
        """The linears of a fold that will be quantized."""
        return [local for local in fold.readers if local in self.specs]

    def inputs(self, local: str) -> InputStatistics:
        """Statistics of a quantized linear's inputs, divided by the scales so far."""
        return self._inputs[local]

    def outliers(self, local: str, columns: Tensor | None = None) -> Tensor | None:
        """Bool [in], the columns in which calibration saw outliers; None if the linear's scheme splits none off.

        columns: [in], by which the inputs are yet to be divided, None for 1.
        """
        split = self.specs[local].scheme.outliers
        if split is None:
            return None
        largest = self._inputs[local].largest
        assert largest is not None
        return (largest if columns is None else largest / columns.to(largest.device)) > split.threshold

    def weight(self, local: str) -> Tensor:
        """A linear's matrix with the scales so far, float32 [out, in]; not to be changed."""
        if self._replay is not None:
            return linear_weight(self._replay.block.get_submodule(local))
        return rows_first(self.block.get_submodule(local), self._scaled(f"{local}.weight"))

    def bias(self, local: str) -> Tensor | None:
        """A linear's bias with the scales so far, float32 [out]; None if it has none."""
        assert self._replay is not None
        bias = self._replay.block.get_submodule(local).bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def output(self, trials: Mapping[str, FakeQuantLinear] | None = None) -> Tensor:
        """What the block returns on the excerpt in float32, with the scales so far and ``trials`` in the place of linears."""
        assert self._replay is not None
        return self._replay.output(trials)

    def target(self) -> Tensor:
        """What the unquantized block returns on the excerpt, which scales leave as it is but for the rounding of what is stored."""
        assert self._replay is not None
        return self._replay.expected()

    def error(self, search: RangeSearch) -> float:
        """Mean squared change of the block's output when all that is to be quantized is rounded, with the scales so far.

        search: fits the grids.
        """
        assert self._replay is not None
        replay, weights = self._replay, {local: self.weight(local) for local in self.specs}

        def error(_piece: int) -> float:
            return replay.error({local: self._trial(local, each, torch.ones_like(each[0]), search) for local, each in weights.items()})

        return next(self._divided([1.0], error))  # one number for all processes, since it decides something

    def best_of(self, fold: Fold, plain: str, candidates: Iterable[tuple[str, Tensor]]) -> FoldNote:
        """Apply the (name, scales) with the least ``fold_error``, or none, which is called ``plain``, and say which it was."""
        tried: list[tuple[str, Tensor | None]] = [(plain, None), *candidates]
        errors = self._divided([1.0] * len(tried), lambda number: self.fold_error(fold, tried[number][1]))
        without = best = next(errors)
        choice, chosen = plain, None
        for (name, scales), error in zip(tried[1:], errors, strict=True):
            if error < best:
                best, choice, chosen = error, name, scales
        if chosen is not None:
            self.scale(fold, chosen)
        return FoldNote(producer=fold.producer, readers=fold.readers, choice=choice, error=best / without if without > 0 else 1.0)

    def fold_error(self, fold: Fold, scales: Tensor | None) -> float:
        """Mean squared change of the block's output when the fold's readers are rounded to nearest.

        scales: [fold.width], by which the producer is divided; None for no scaling.
        """
        assert self._replay is not None
        trials = {}
        for local in self.readers(fold):
            weight = self.weight(local)
            columns = torch.ones_like(weight[0]) if scales is None else fold.spread(scales)
            trials[local] = self._trial(local, weight * columns, columns, self.search)
        return self._replay.error(trials)

    def _trial(self, local: str, weight: Tensor, columns: Tensor, search: RangeSearch) -> FakeQuantLinear:
        """A linear whose ``weight`` has been multiplied by ``columns`` [in], rounded to nearest, for inputs that are yet to be divided."""
        spec, bias = self.specs[local], self.bias(local)
        activations = spec.scheme.activations
        rounded = round_to_nearest(weight, spec.scheme, spec.scale_dtype, search).dequantize(torch.float32)
        if activations is None:
            return FakeQuantLinear(rounded / columns, bias)
        outliers = self.outliers(local, columns)
        return FakeQuantLinear(
            rounded if outliers is None else torch.where(outliers, weight, rounded),
            bias,
            divisor=columns,
            activations=activations,
            input_scale=None if activations.dynamic else self._input_scale(local, columns),
            outliers=outliers,
        )

    def _input_scale(self, local: str, columns: Tensor) -> Tensor:
        largest = self._inputs[local].largest
        assert largest is not None
        return static_scale(largest / columns, self.specs[local].scale_dtype).float()

    # What a transform does

    def scale(self, fold: Fold, scales: Tensor) -> None:
        """Divide the producer of ``fold`` by ``scales`` [fold.width], float32, and multiply the columns of its readers by them.

        Channels that no reader sees are left alone. Not to be called once ranges are set, which hold for the weights as they are.
        """
        assert not self.ranges
        scales = torch.where(fold.folded().to(scales.device), scales, torch.ones_like(scales))
        if is_linear(self.block.get_submodule(fold.producer)):
            self._rows[fold.producer] = self._rows.get(fold.producer, torch.ones_like(scales)) * scales
            if fold.producer in self._moved:
                self._moved[fold.producer] = self._moved[fold.producer] / scales
        else:
            keys = {name: f"{fold.producer}.{name}" for name, _ in fold.offsets}
            current = {name: self._norms[key] if key in self._norms else self._stored(key) for name, key in keys.items()}
            divided, scales = divide(current, fold.offsets, scales)
            self._norms.update({keys[name]: value for name, value in divided.items()})
        columns = fold.spread(scales.float())  # [in]
        for local in fold.readers:
            self._columns[local] = self._columns.get(local, torch.ones_like(columns)) * columns
        self._follow(fold, lambda statistics: statistics.divided(columns))
        self._refresh([*(f"{local}.weight" for local in fold.readers), *self._divided_parameters(fold)])

    def shift(self, fold: Fold, by: Tensor) -> None:
        """Take ``by`` [fold.width], float32, off what the producer of ``fold`` gives, and let the biases of its readers take it up.

        The producer's bias is rounded to the dtype in which it is stored at once, so that its readers take up what it has moved by. Only
        for a fold that has a ``shift``; channels that no reader sees are left alone.
        """
        assert fold.shift is not None
        assert not self.ranges
        key = f"{fold.producer}.{fold.shift}"
        before = self._scaled(key).double()
        after = (before - by.to(before.device)).to(self._stored(key).dtype)
        by = torch.where(fold.folded().to(before.device), before - after.double(), 0.0)
        if is_linear(self.block.get_submodule(fold.producer)):
            self._moved[fold.producer] = self._moved.get(fold.producer, torch.zeros_like(by).float()) - by.float()
        else:
            self._norms[key] = (before - by).to(after.dtype)
        columns = fold.spread(by.float(), 0.0)  # [in]
        for local in fold.readers:
            self._moved[local] = self._moved.get(local, 0.0) + self.weight(local) @ columns
        self._follow(fold, lambda statistics: statistics.shifted(columns))
        self._refresh([key, *(f"{local}.bias" for local in fold.readers)])

    def _follow(self, fold: Fold, change: Callable[[InputStatistics], InputStatistics]) -> None:
        """What is known of the readers' inputs changes with them; readers of one tensor share one object, and go on sharing one."""
        seen = {id(self._inputs[local]): self._inputs[local] for local in self.readers(fold)}
        behind = {key: change(statistics) for key, statistics in seen.items()}
        self._inputs.update({local: behind[id(self._inputs[local])] for local in self.readers(fold)})

    def state(self) -> tuple[dict[str, Any], ...]:
        """The scales and shifts so far, for ``undo``."""
        return tuple(dict(kept) for kept in (self._inputs, self._columns, self._rows, self._norms, self._moved, self._changed))

    def undo(self, to: tuple[dict[str, Any], ...] | None = None) -> None:
        """Take all scales and shifts back, or those since ``state`` gave ``to``: weights and inputs are what they were, to the last bit."""
        changed = list(self._changed)
        self._inputs, self._columns, self._rows, self._norms, self._moved, kept = (dict(each) for each in to or self._given)
        self._refresh(changed)
        self._changed = kept

    def _divided_parameters(self, fold: Fold) -> list[str]:
        producer = self.block.get_submodule(fold.producer)
        leaves = [name for name, _ in producer.named_parameters()] if is_linear(producer) else [name for name, _ in fold.offsets]
        return [f"{fold.producer}.{leaf}" for leaf in leaves]

    def _refresh(self, names: Sequence[str]) -> None:
        """Give the replayed block the values that hold now of some parameters."""
        assert self._replay is not None
        self._changed.update(dict.fromkeys(names))
        for name in names:
            value = self._scaled(name)
            if name.endswith(".bias"):  # of a weight it is for its codes to say what is stored
                value = value.to(self._stored(name).dtype)
            self._replay.block.get_parameter(name).copy_(value)
        self._replay.forget()

    # What the pipeline takes over

    def moved(self) -> tuple[dict[str, Tensor], ...]:
        """All scales and shifts, and what they have made of producers, for ``take`` in another process."""
        return self._columns, self._rows, self._norms, self._moved

    def take(self, moved: tuple[dict[str, Tensor], ...]) -> None:
        """Scale and shift by the numbers of another process, which has made the same choices and may have rounded differently."""
        pairs = [(own[key], theirs[key]) for own, theirs in zip(self.moved(), moved, strict=True) for key in own]
        if not all(torch.equal(own, theirs) for own, theirs in pairs):
            self._columns, self._rows, self._norms, self._moved = moved
            self._refresh(list(self._changed))

    def release(self) -> None:
        """Give the block new parameters with the scaled values where there are any, and forget what only transforms look at."""
        assert self._replay is not None
        for name in sorted(self._changed):
            path, _, leaf = name.rpartition(".")
            module, value = self.block.get_submodule(path), self._replay.block.get_parameter(name)
            module._parameters[leaf] = nn.Parameter(value.to(module.get_parameter(leaf).dtype), requires_grad=False)
        self._replay = None
        self._given, self._inputs = (), {}

    def rewritten(self) -> dict[str, Tensor]:
        """Every parameter that was changed and is not quantized, by its local name, as it has to be stored.

        Raises PTQError, naming it, for one that the scales have driven out of the range of its dtype.
        """
        quantized = {f"{local}.weight" for local in self.specs}
        changed = {
            name: self._scaled(name).to(self._stored(name).dtype).contiguous() for name in sorted(self._changed) if name not in quantized
        }
        for name, value in changed.items():
            if not torch.isfinite(value).all():
                raise PTQError(f"{name}: scaling leaves the range of {value.dtype}; leave out the transform, or start from a wider dtype")
        return changed

    def _scaled(self, name: str) -> Tensor:
        """A parameter with the scales so far, laid out as its module has it; float32, that of a norm in the dtype of the file."""
        if name in self._norms:
            return self._norms[name]
        local, _, leaf = name.rpartition(".")
        module = self.block.get_submodule(local)
        value = rows_first(module, self._stored(name).float())
        if leaf == "weight" and local in self._columns:
            value = value * self._columns[local]
        if local in self._rows:
            value = value / (self._rows[local].unsqueeze(1) if leaf == "weight" else self._rows[local])
        if leaf == "bias" and local in self._moved:
            value = value + self._moved[local]
        return rows_first(module, value)


@torch.no_grad()
def verified(block: nn.Module, search: FoldSearch, run: Run, seed: int = 0) -> FoldSearch:
    """``search`` without the folds that change the output of the loaded ``block`` by more than ``BOUND``, which join those rejected.

    The values of the block are taken as if they were stored in float32: what a narrower file rounds is no fault of a fold.
    """
    device = next(block.parameters()).device
    folded = FoldedBlock(
        block,
        search.folds,
        specs={},
        inputs={},
        stored=lambda name: block.get_parameter(name).float(),
        run=lambda twin: run(twin, torch.float32),
        search=MinMax(),  # nothing is rounded
    )
    expected = folded.output()
    whole = float(expected.norm())  # 0 for a block that gives nothing on this text
    generator = torch.Generator().manual_seed(seed)
    kept, rejected = [], list(search.rejected)
    for fold in search.folds:
        folded.scale(fold, _random_scales(fold.width, generator).to(device))
        change = float((folded.output() - expected).norm())
        folded.undo()
        if change <= BOUND * whole:
            kept.append(fold if _shifts(folded, fold, expected, generator) else replace(fold, shift=None))
        else:
            share = change / whole if whole else torch.inf
            rejected.append((fold.producer, f"folding it into {', '.join(fold.readers)} changes the block's output by {share:.1e}"))
    return FoldSearch(tuple(kept), tuple(rejected))


def _shifts(folded: FoldedBlock, fold: Fold, expected: Tensor, generator: torch.Generator) -> bool:
    """Whether a random shift of ``fold`` leaves the ``expected`` output as it is."""
    if fold.shift is None:
        return False
    folded.shift(fold, torch.randn(fold.width, generator=generator).to(expected.device))
    change = float((folded.output() - expected).norm())
    folded.undo()
    return change <= BOUND * float(expected.norm())


def _random_scales(count: int, generator: torch.Generator) -> Tensor:
    """Between 1/2 and 2, as often above 1 as below."""
    return torch.exp2(2 * torch.rand(count, generator=generator) - 1)
