"""One loaded block on its way from stored weights to packed ones: its transforms, its tasks, what is finished."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from ptqcli.adapters.eora import beside_bias, low_rank_correction
from ptqcli.adapters.low_rank import LowRank
from ptqcli.calibration.paired import PairedBlock
from ptqcli.calibration.statistics import InputStatistics, StatisticsRequest
from ptqcli.calibration.walk import CalibratedBlock
from ptqcli.errors import PTQError
from ptqcli.estimate import PlannedLinear, experts_at_once
from ptqcli.formats import Format
from ptqcli.model.linears import rows_first
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.pipeline.memory import RETURN_AFTER, return_freed_memory
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.ranks import Ranks
from ptqcli.pipeline.report import FoldReport, LayerReport
from ptqcli.pipeline.streams import Streams
from ptqcli.plan import Plan
from ptqcli.resources import Resources
from ptqcli.solvers import BlockSolver, LinearTask, Solution
from ptqcli.solvers.error import relative_error
from ptqcli.solvers.per_matrix import statistics_for
from ptqcli.transforms import BlockTransform
from ptqcli.transforms.folded import FoldedBlock, FoldNote, WeightSpec, verified
from ptqcli.transforms.folds import FoldSearch, find_folds
from ptqcli.transforms.residual import residual_writers


@dataclass(kw_only=True)
class Run:
    """What all blocks of a run share.

    ranks: the processes that share it. streams: None when nothing looks at calibration text. layers, folds: for the report, in the first
    process. adapters: there, of the linears that are placed, if the recipe asks for any, on the CPU and in the dtype of their weights.
    note: is given what is to be said of each linear and fold at once.
    """

    skeleton: Skeleton
    plan: Plan
    format: Format
    resources: Resources
    solver: BlockSolver
    transforms: Sequence[BlockTransform]
    progress: Progress
    ranks: Ranks = field(default_factory=Ranks)
    streams: Streams | None = None
    layers: list[LayerReport] = field(default_factory=list)
    folds: list[FoldReport] = field(default_factory=list)
    adapters: dict[str, LowRank] = field(default_factory=dict)
    note: Callable[[LayerReport | FoldReport], None] = lambda _: None

    def add_fold(self, fold: FoldReport) -> None:
        """A fold, for the report."""
        self.folds.append(fold)
        self.note(fold)

    def solver_needs(self) -> StatisticsRequest:
        """What is to be known of every input while codes are chosen; samples for the errors of the report, too."""
        rounded = any(linear.scheme.activations is not None for linear in self.plan.linears)
        needs = self.solver.needs | StatisticsRequest(hessian=self.plan.recipe.adapter_rank > 0)
        needs |= StatisticsRequest(samples=rounded or not needs.hessian)
        for linear in self.plan.linears:
            needs |= statistics_for(linear.scheme)
        return needs


@dataclass(frozen=True)
class Judged:
    """Codes of a linear as the file holds them, and their relative error; with the adapter that corrects them, the error that is left."""

    solution: Solution
    error: float
    adapter: LowRank | None
    corrected: float | None


class LoadedBlock:
    """Block ``index``. block: its module, None when nothing runs through it and matrices are read one by one."""

    def __init__(self, run: Run, index: int, block: nn.Module | None) -> None:
        self.run, self.index, self.block = run, index, block
        self.prefix = run.skeleton.block_prefix(index)
        self.stages = run.plan.stages[index]
        self.planned = {linear.name: linear for linear in run.plan.linears if linear.site.block == index}
        self.folded: FoldedBlock | None = None
        self.mixtures = run.skeleton.shapes[index].mixtures
        self.seen: dict[str, tuple[int, bool]] = {}  # linears of experts: tokens that reached them, and whether they were pooled
        self.statistics: dict[str, InputStatistics] = {}  # of the inputs of linears, by local name, while they are needed
        self.writers: Mapping[str, float] = {}  # into the residual stream, where somebody has asked
        self._finished: dict[str, Tensor] = {}  # what is stored for the block, as far as it differs from the model file
        self._layers: dict[str, LayerReport] = {}
        self._placed: set[str] = set()  # stored names of weights that have codes
        self._unreturned = 0  # bytes of weights solved since memory was given back

    def walk(self, streams: Streams, source: Tensor) -> CalibratedBlock:
        """The block over all batches, from hidden states ``source`` to those behind the blocks at work."""
        assert self.block is not None
        recording, resources = streams.recording, self.run.resources
        target, calls = streams.quantized.outputs, recording.calls[self.index]
        fed = {mixture.path: mixture.count for mixture in self.mixtures} if self.run.plan.recipe.expert_calibration == "all" else {}
        return CalibratedBlock(
            self.block,
            self.stages,
            calls,
            recording.batches,
            source,
            target,
            resources.device,
            resources.budget,
            fed,
            recording.real,
            recording.share,
        )

    def at_once(self, stage: int) -> int:
        """How many experts can have their codes for linears like those of ``stage`` chosen together."""
        plan = self.run.plan
        linears = [self.planned[f"{self.prefix}.{local}"] for local in self.stages[stage]]
        return max(1, min(experts_at_once(plan.recipe, linear, self.run.resources) for linear in linears))

    def paired(self, walk: CalibratedBlock, streams: Streams) -> PairedBlock:
        """The block as ``walk`` runs it, side by side with itself as it is now, which stays so, on the original model's hidden states."""
        assert self.block is not None
        assert streams.original is not None
        recording, resources, states = streams.recording, self.run.resources, streams.original
        twin = copy.deepcopy(self.block, {id(value): value for value in (*self.block.parameters(), *self.block.buffers())})
        original = CalibratedBlock(
            twin,
            self.stages,
            streams.original_calls[self.index],
            recording.batches,
            states.inputs,
            states.outputs,
            resources.device,
            resources.budget,
            share=recording.share,
        )
        block, probe = self.block, streams.excerpt("probe", self.index, streams.quantized.inputs)
        self.writers = self.run.ranks.from_first(lambda: residual_writers(block, probe))
        return PairedBlock(walk, original, self.writers, resources.budget)

    def stored(self, local: str) -> Tensor:
        """A parameter of the block as the model file has it, on the device of the run."""
        return self.run.skeleton.read(f"{self.prefix}.{local}").to(self.run.resources.device)

    # Linears

    def task(self, name: str) -> LinearTask:
        """The linear ``name``, to be given codes. Raises PTQError if the transforms have left its weight not finite."""
        linear = self.planned[name]
        local = linear.site.local
        if self.folded is not None:
            weight = self.folded.weight(local)
            if not torch.isfinite(weight).all():
                raise PTQError(f"{name}: the weight that the transforms have scaled holds NaN or infinity")
        else:
            stored = self.stored(f"{local}.weight")
            weight = (stored.t() if linear.site.transposed else stored).float()
        ranges = None if self.folded is None else self.folded.ranges.get(local)
        return LinearTask(
            name=name,
            weight=weight,
            scheme=linear.scheme,
            scale_dtype=linear.scale_dtype,
            ranges=ranges,
            bias=self._bias(local),
            writes=self.writers.get(local),
        )

    def _bias(self, local: str) -> Tensor | None:
        """The bias of a linear as it is now, float32."""
        bias = None if self.block is None else getattr(self.block.get_submodule(local), "bias", None)
        return bias.detach().float() if isinstance(bias, Tensor) else None

    def judge(self, task: LinearTask, solution: Solution) -> Judged:
        """``solution`` as the file holds it, with what there is to say of it; nothing of the block is changed."""
        linear, statistics = self.planned[task.name], self.statistics.get(self.planned[task.name].site.local)
        solution = replace(solution, weight=self.run.format.held(solution.weight))
        shift = solution.bias - task.bias if solution.bias is not None and task.bias is not None else None
        layer = FakeQuantLinear.of(solution.weight)
        error = relative_error(task.weight, layer, statistics, shift)
        wanted = task.weight if solution.aimed is None else solution.aimed
        adapter = self._correction(linear, wanted, layer, shift)
        corrected = None if adapter is None else relative_error(wanted, layer, statistics, shift, adapter.matrix())
        return Judged(replace(solution, aimed=None), error, adapter, corrected)

    def place(self, name: str, judged: Judged) -> None:
        """Pack the codes for the file and put their values into the block; what was placed before is forgotten."""
        linear, solution = self.planned[name], judged.solution
        stored_name = self.run.skeleton.stored_name(f"{name}.weight")
        if self.block is not None:
            module = self.block.get_submodule(linear.site.local)
            weight = torch.empty_like(module.get_parameter("weight"))
            rows_first(module, weight).copy_(solution.weight.dequantize(linear.dtype))
            module.weight = nn.Parameter(weight, requires_grad=False)
        if solution.bias is not None and self._bias(linear.site.local) is not None:
            self.replace(f"{name}.bias", solution.bias)
        self._placed.add(stored_name)
        self._unreturned += linear.site.in_features * linear.site.out_features * 4
        if self._unreturned >= RETURN_AFTER:
            return_freed_memory()
            self._unreturned = 0
        if not self.run.ranks.first:
            return
        packed = self.run.format.pack(stored_name.removesuffix(".weight"), solution.weight.to(torch.device("cpu")))
        self._finished.update(packed)
        if judged.adapter is not None:
            self.run.adapters[name] = judged.adapter.to(torch.device("cpu"), linear.dtype)
        self._note(linear, judged, sum(tensor.nbytes for tensor in packed.values()) * 8)
        self.run.progress.layer_done(name, judged.error)

    def _correction(self, linear: PlannedLinear, weight: Tensor, layer: FakeQuantLinear, shift: Tensor | None) -> LowRank | None:
        """The adapter of a linear, if there is to be one. Nothing that is calibrated later sees it.

        weight: what the codes were to answer to. shift: what has been added to the bias.
        """
        rank, statistics = self.run.plan.recipe.adapter_rank, self.statistics.get(linear.site.local)
        if not rank:
            return None
        assert statistics is not None
        assert statistics.hessian is not None
        difference, hessian = weight - layer.matrix(), statistics.hessian.matrix
        if shift is not None and statistics.sums is not None:
            difference = beside_bias(difference, hessian, statistics.sums, statistics.tokens, linear.name)
        return low_rank_correction(difference, hessian, rank).to(weight.device, linear.dtype)

    def _note(self, linear: PlannedLinear, judged: Judged, bits: int) -> None:
        solution = judged.solution
        outliers, seen = solution.notes.outlier_columns, self.statistics.get(linear.site.local)
        tokens, pooled = self.seen.get(linear.site.local, (None, False))
        self._layers[linear.name] = LayerReport(
            name=linear.name,
            scheme=str(linear.scheme),
            bits_per_weight=bits / (linear.site.in_features * linear.site.out_features),
            relative_error=judged.error,
            adapter_error=judged.corrected,
            tokens=tokens,
            pooled=pooled,
            inputs_all_zero=seen is not None and seen.all_zero,
            outlier_share=None if outliers is None else outliers / linear.site.in_features,
            **asdict(solution.notes),
        )
        self.run.note(self._layers[linear.name])

    def replace(self, parameter: str, value: Tensor) -> None:
        """Another value for a parameter of the block, by its path in the model, that is not quantized.

        Raises PTQError for one that is, for another shape, and for values that the stored dtype does not hold.
        """
        assert self.block is not None
        stored_name = self.run.skeleton.stored_name(parameter)
        path, _, leaf = parameter.removeprefix(self.prefix + ".").rpartition(".")
        module = self.block.get_submodule(path)
        present = module.get_parameter(leaf)
        if parameter.removesuffix(".weight") in self.planned or value.shape != present.shape:
            raise PTQError(f"{parameter}: takes {list(present.shape)} and no codes; found {list(value.shape)}")
        stored = value.detach().to(self.run.skeleton.dtype(parameter))
        if not torch.isfinite(stored).all():
            raise PTQError(f"{parameter}: its new values leave the range of {stored.dtype}")
        module._parameters[leaf] = nn.Parameter(stored.to(present), requires_grad=False)
        self._finished[stored_name] = stored.cpu()

    def finished(self) -> dict[str, Tensor]:
        """Every tensor that is stored for the block, whose linears join the report; none in a process that does not write.

        Raises PTQError if one has no codes yet.
        """
        missing = [name for name in self.planned if self.run.skeleton.stored_name(f"{name}.weight") not in self._placed]
        if missing:
            raise PTQError(f"{missing[0]}: the solver has not placed it; this is a defect of the solver {self.run.plan.recipe.algo}")
        if not self.run.ranks.first:
            return {}
        self.run.layers.extend(self._layers.values())
        skeleton, rewritten = self.run.skeleton, self._rewritten()
        unit = skeleton.units[self.index]
        rest = [name for name in unit.stored if name not in self._placed and name not in self._finished]
        return {**self._finished, **{name: rewritten[name] if name in rewritten else skeleton.read_stored(name) for name in rest}}

    def _rewritten(self) -> dict[str, Tensor]:
        """The parameters that transforms have changed and that are not quantized, by the names under which they are stored."""
        if self.folded is None:
            return {}
        changed = self.folded.rewritten().items()
        return {self.run.skeleton.stored_name(f"{self.prefix}.{local}"): tensor.cpu() for local, tensor in changed}

    # Transforms

    def transform(self, streams: Streams, source: Tensor, statistics: Sequence[InputStatistics]) -> list[InputStatistics]:
        """Apply the transforms to the block; return the statistics of its stages as they are behind them."""
        assert self.block is not None
        for stage, seen in zip(self.stages, statistics, strict=True):
            seen.check_finite(f"{self.prefix}.{stage[0]}")
        probe, tried = (streams.excerpt(name, self.index, source) for name in ("probe", "tried"))
        run, prefix = self.run, self.prefix  # closures over self would keep every finished block alive
        progress, skeleton, device = run.progress, run.skeleton, run.resources.device
        progress.detail(f"{prefix}: looking for folds")
        block = self.block
        found = run.ranks.from_first(lambda: verified(block, find_folds(block, probe), probe))
        self.folded = FoldedBlock(
            self.block,
            found.folds,
            specs={linear.site.local: WeightSpec(linear.scheme, linear.scale_dtype) for linear in self.planned.values()},
            inputs={local: seen for stage, seen in zip(self.stages, statistics, strict=True) for local in stage},
            stored=lambda local: skeleton.read(f"{prefix}.{local}").to(device),
            run=lambda block: tried(block, torch.float32),
            search=run.solver.ranges,
            tell=lambda text: progress.detail(f"{prefix}: {text}"),
            divided=run.ranks.divided,
        )
        notes = [(transform.name, note) for transform in run.transforms for note in transform.apply(self.folded)]
        self.folded.take(run.ranks.from_first(self.folded.moved))
        for transform in run.transforms:
            transform.finish(self.folded)
        behind = [self.folded.inputs(stage[0]) for stage in self.stages]
        self.folded.release()
        self._note_folds(found, notes)
        return behind

    def _note_folds(self, found: FoldSearch, notes: Sequence[tuple[str, FoldNote]]) -> None:
        report = self.run.add_fold
        for fold in found.folds:
            mine = [(name, note) for name, note in notes if note.producer == fold.producer and note.readers == fold.readers]
            choices = tuple((name, note.choice, note.error) for name, note in mine)
            readers = tuple(f"{self.prefix}.{reader}" for reader in fold.readers)
            reason = None if choices else "none of its readers is quantized"
            report(FoldReport(producer=f"{self.prefix}.{fold.producer}", readers=readers, choices=choices, left_alone=reason))
        for producer, reason in found.rejected:
            report(FoldReport(producer=self.prefix if producer == "block" else f"{self.prefix}.{producer}", readers=(), left_alone=reason))
        read = {reader for fold in found.folds for reader in fold.readers}
        alone = tuple(name for name, linear in self.planned.items() if linear.site.local not in read)
        if alone:
            report(FoldReport(producer=None, readers=alone, left_alone="nothing that feeds them can be scaled"))
