"""A block while transforms work on it.

A fold with scales ``s`` divides a producer's output channels by ``s`` and multiplies the columns of the linears that read them. The
scales are kept apart from the stored weights: ``weight`` is always the stored matrix times all scales so far, computed in float32 and
rounded once, when its codes are chosen. What is not quantized (norms, biases, linears that are left alone) is rounded to the dtype in
which it is stored; for a norm the scales that this leaves are taken over by its readers, so the fold stays exact (see ``folds.divide``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptqcli.calibration.statistics import InputStatistics
from ptqcli.errors import PTQError
from ptqcli.model.linears import linear_weight, rows_first
from ptqcli.numerics.activations import activation_scale
from ptqcli.numerics.grids import RangeSearch, range_search
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.transforms.folds import Fold, divide
from ptqcli.transforms.replay import Replay, Trial


@dataclass(frozen=True)
class Treatment:
    """How a linear will be quantized: its scheme, and the dtype of its scales."""

    scheme: Scheme
    scale_dtype: torch.dtype


@dataclass(frozen=True)
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

    block: with all its weights; its values are changed in place. order: local names of its linears in running order. treatments: of the
    linears that will be quantized. inputs: statistics of their inputs. stored: a parameter by its local name, as the file has it.
    run: the output of a block in float32 on the excerpt. scale_search: how grids are fitted on trial, see ``numerics.grids``. tell: called
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
        self.ranges: dict[str, RangeSearch] = {}  # linear -> what fits its grids, where that is not the run's scale search
        self.scale_search, self.tell = scale_search, tell
        self._inputs, self._stored = dict(inputs), stored
        self._columns: dict[str, Tensor] = {}  # linear -> [in], by which its columns are multiplied
        self._rows: dict[str, Tensor] = {}  # linear -> [out], by which its rows are divided
        self._norms: dict[str, Tensor] = {}  # parameters of producers that are no linears, in the dtype of the file
        self._replay: Replay | None = Replay(self._in_float32(), order, run)

    def _in_float32(self) -> nn.Module:
        if all(parameter.dtype == torch.float32 for parameter in self.block.parameters()):
            return self.block
        twin = copy.deepcopy(self.block).float()
        for name, parameter in twin.named_parameters():
            parameter.copy_(self._stored(name))  # the block may have been loaded in a narrower dtype
        return twin

    # What a transform looks at

    def readers(self, fold: Fold) -> list[str]:
        """The linears of a fold that will be quantized."""
        return [local for local in fold.readers if local in self.treatments]

    def inputs(self, local: str) -> InputStatistics:
        """Statistics of a quantized linear's inputs, divided by the scales so far."""
        return self._inputs[local]

    def outliers(self, local: str) -> Tensor | None:
        """Bool [in], the columns in which calibration saw outliers; None if the linear's scheme splits none off."""
        return self._outliers(local, torch.ones(()))

    def weight(self, local: str) -> Tensor:
        """A linear's matrix with the scales so far, float32 [out, in]; not to be changed."""
        if self._replay is not None:
            return linear_weight(self._replay.block.get_submodule(local))
        return self._scaled(local)

    def best_of(self, fold: Fold, plain: str, candidates: Iterable[tuple[str, Tensor]]) -> FoldNote:
        """Apply the (name, scales) with the least ``fold_error``, or none, which is called ``plain``, and say which it was."""
        without = best = self.fold_error(fold, None)
        choice, chosen = plain, None
        for name, scales in candidates:
            error = self.fold_error(fold, scales)
            if error < best:
                best, choice, chosen = error, name, scales
        if chosen is not None:
            self.scale(fold, chosen)
        return FoldNote(fold.producer, fold.readers, choice, best / without if without > 0 else 1.0)

    def fold_error(self, fold: Fold, scales: Tensor | None) -> float:
        """Mean squared change of the block's output when the fold's readers are rounded to nearest.

        scales: [fold.width], by which the producer is divided; None for no scaling.
        """
        assert self._replay is not None
        trials = {}
        for local in self.readers(fold):
            weight = self.weight(local)
            columns = torch.ones_like(weight[0]) if scales is None else fold.spread(scales)
            trials[local] = self._trial(local, weight * columns, columns)
        return self._replay.error(trials)

    def _trial(self, local: str, weight: Tensor, columns: Tensor) -> Trial:
        treatment = self.treatments[local]
        activations = treatment.scheme.activations
        ranges = range_search(self.scale_search)
        rounded = round_to_nearest(weight, treatment.scheme, treatment.scale_dtype, ranges).dequantize(torch.float32)
        if activations is None:
            return Trial(rounded / columns)
        static = None
        if not activations.dynamic:
            largest = self._inputs[local].largest
            assert largest is not None
            scale = activation_scale(largest / columns, replace(activations, dynamic=True))
            static = scale.to(treatment.scale_dtype).float()
        outliers = self._outliers(local, columns)
        if outliers is not None:
            rounded = torch.where(outliers, weight, rounded)
        return Trial(rounded, columns, activations, static, outliers)

    def _outliers(self, local: str, columns: Tensor) -> Tensor | None:
        split = self.treatments[local].scheme.outliers
        if split is None:
            return None
        largest = self._inputs[local].largest
        assert largest is not None
        return largest / columns.to(largest.device) > split.threshold

    # What a transform does

    def scale(self, fold: Fold, scales: Tensor) -> None:
        """Divide the producer of ``fold`` by ``scales`` [fold.width], float32, and multiply the columns of its readers by them.

        Channels that no reader sees are left alone. Not to be called once ranges are set, which hold for the weights as they are.
        """
        assert not self.ranges
        scales = torch.where(fold.folded().to(scales.device), scales, torch.ones_like(scales))
        if fold.producer in self.order:
            self._rows[fold.producer] = self._rows.get(fold.producer, torch.ones_like(scales)) * scales
        else:
            keys = {name: f"{fold.producer}.{name}" for name, _ in fold.offsets}
            current = {name: self._norms[key] if key in self._norms else self._stored(key) for name, key in keys.items()}
            divided, scales = divide(current, fold.offsets, scales)
            self._norms.update({keys[name]: value for name, value in divided.items()})
        columns = fold.spread(scales.float())  # [in]
        for local in fold.readers:
            self._columns[local] = self._columns.get(local, torch.ones_like(columns)) * columns
        # readers of one tensor share one object, and go on sharing one
        seen = {id(self._inputs[local]): self._inputs[local] for local in self.readers(fold)}
        behind = {key: statistics.divided(columns) for key, statistics in seen.items()}
        self._inputs.update({local: behind[id(self._inputs[local])] for local in self.readers(fold)})
        self._refresh([fold.producer, *fold.readers])

    # What the pipeline takes over

    def release(self) -> None:
        """Give the block the scaled values, and forget what only transforms look at."""
        assert self._replay is not None
        if self._replay.block is not self.block:
            self.block.load_state_dict(self._replay.block.state_dict())  # in the block's dtype
        self._replay = None
        self._inputs.clear()

    def rewritten(self) -> dict[str, Tensor]:
        """Every parameter that was changed and is not quantized, by its local name, as it has to be stored.

        Raises PTQError, naming it, for one that the scales have driven out of the range of its dtype.
        """
        changed = dict(self._norms)
        for local in {**self._columns, **self._rows}:
            if local not in self.treatments:
                stored = self._stored(f"{local}.weight")
                changed[f"{local}.weight"] = rows_first(self.block.get_submodule(local), self._scaled(local)).to(stored.dtype).contiguous()
        for local in self._rows:
            if self.block.get_submodule(local).bias is not None:
                stored = self._stored(f"{local}.bias")
                changed[f"{local}.bias"] = self._scaled_bias(local).to(stored.dtype)
        for name, value in changed.items():
            if not torch.isfinite(value).all():
                raise PTQError(f"{name}: scaling leaves the range of {value.dtype}; leave out the transform, or start from a wider dtype")
        return changed

    def _scaled(self, local: str) -> Tensor:
        weight = rows_first(self.block.get_submodule(local), self._stored(f"{local}.weight")).float()
        if local in self._columns:
            weight = weight * self._columns[local]
        if local in self._rows:
            weight = weight / self._rows[local].unsqueeze(1)
        return weight

    def _scaled_bias(self, local: str) -> Tensor:
        return self._stored(f"{local}.bias").float() / self._rows[local]

    def _refresh(self, names: Sequence[str]) -> None:
        """Give the replayed block the values that hold now."""
        assert self._replay is not None
        for local in names:
            module = self._replay.block.get_submodule(local)
            if local in self.order:
                linear_weight(module).copy_(self._scaled(local))
                bias = module.bias
                if local in self._rows and isinstance(bias, Tensor):
                    bias.copy_(self._scaled_bias(local))
            else:
                for name, parameter in module.named_parameters(recurse=False):
                    if f"{local}.{name}" in self._norms:
                        parameter.copy_(self._norms[f"{local}.{name}"])
        self._replay.forget()
