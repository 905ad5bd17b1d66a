"""What a run needs: bytes of the checkpoint, of the disk, and of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ptqcli.adapters import eora
from ptqcli.calibration.hidden import beyond_budget
from ptqcli.calibration.sources import BUILTIN, SELF
from ptqcli.calibration.statistics import SAMPLED_TOKENS
from ptqcli.checkpoint.writer import JOIN_BELOW
from ptqcli.finishing.estimate import tuning_bytes, tuning_work
from ptqcli.finishing.tune_scales import TuneScales
from ptqcli.formats import Format, LinearSpec
from ptqcli.model.linears import LinearSite
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.plan_texts import PlannedTexts
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources, process_bytes
from ptqcli.solvers import BlockSolver
from ptqcli.solvers.per_matrix import as_block_solver, statistics_for
from ptqcli.solvers.target import pairs_bytes

# Tokens on which transforms try their choices out, in whole windows.
TRIED_TOKENS = 1024

# Weights of an output head or an embedding that are solved at once.
OUTSIDE_PIECE = 1 << 25

# Experts of a layer of which the same linears are solved together: at most so many, and no more than take so many bytes, by device. Of
# experts 512 wide eight took 0.8 of the time of one after the other on a CPU; a GPU waits for the loops over columns much longer.
MOST_EXPERTS = 8
EXPERT_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}

# What libraries take when they are first used, measured on Linux with torch 2.13: tokenizers and BLAS; the readers of text files.
LIBRARY_BYTES = 64 << 20
TEXT_READER_BYTES = 64 << 20
# glibc keeps freed tensors of up to so many bytes for reuse: of the largest matrix in float32 about so many copies. A run with calibration
# keeps as much, but not on top of all that it ever needs at once.
LARGEST_KEPT = 32 << 20
KEPT_COPIES = 10


@dataclass(frozen=True)
class PlannedLinear:
    """A linear that will be quantized: where it stands, what it will be, and the dtype in which its weight is stored now."""

    site: LinearSite
    spec: LinearSpec
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Its path in the model."""
        return self.site.name

    @property
    def scheme(self) -> Scheme:
        """What its numbers will be."""
        return self.spec.scheme

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype in which its scales will be stored."""
        return self.spec.scale_dtype


def needs_calibration(recipe: Recipe, linears: Sequence[PlannedLinear]) -> bool:
    """Whether anything looks at calibration text at all."""
    looked_at = any(statistics_for(linear.scheme) for linear in linears)
    afterwards = recipe.adapter_rank > 0 or recipe.finish != "none"
    return bool(as_block_solver(recipe.solver()).needs) or bool(recipe.transforms()) or looked_at or afterwards


def bytes_after(chosen: Format, linears: Sequence[PlannedLinear], skeleton: Skeleton, mix: str | None) -> int:
    """Bytes of all tensors of the checkpoint; columns that outliers will take are not known yet. mix: of the recipe."""
    if chosen.one_file:
        return chosen.whole_bytes(mix, skeleton.config, skeleton.tensor_shapes, [linear.spec for linear in linears])
    return _bytes_of_parts(chosen, linears, skeleton)


def _bytes_of_parts(chosen: Format, linears: Sequence[PlannedLinear], skeleton: Skeleton) -> int:
    """Bytes of all tensors as they are packed or carried over."""
    return skeleton.total_bytes + sum(_growth(chosen, linear, skeleton) for linear in linears)


def _growth(chosen: Format, linear: PlannedLinear, skeleton: Skeleton) -> int:
    """Bytes by which the file grows when ``linear`` is quantized; fewer than none, as a rule."""
    return chosen.stored_bytes(linear.spec) - skeleton.nbytes(f"{linear.name}.weight")


def adapter_bytes(recipe: Recipe, linears: Sequence[PlannedLinear]) -> int:
    """Bytes of the adapter beside the checkpoint, which corrects linears in the blocks."""
    inside = (each for each in linears if not each.spec.outside)
    return sum(recipe.adapter_rank * (each.site.in_features + each.site.out_features) * each.dtype.itemsize for each in inside)


def checkpoint_room(chosen: Format, linears: Sequence[PlannedLinear], skeleton: Skeleton, mix: str | None) -> int:
    """Room that the checkpoint needs on disk: its size and one unit's, or twice its size if it will be joined into one file."""
    after = _bytes_of_parts(chosen, linears, skeleton)
    if chosen.one_file:
        return after + bytes_after(chosen, linears, skeleton, mix)
    if after < JOIN_BELOW:
        return 2 * after
    sizes = [skeleton.unit_bytes(unit) for unit in skeleton.units]
    for linear in (each for each in linears if not each.spec.outside):
        sizes[linear.site.block] += _growth(chosen, linear, skeleton)
    return after + max(*sizes, skeleton.unit_bytes(skeleton.before), skeleton.unit_bytes(skeleton.after))


def disk_bytes(
    chosen: Format, linears: Sequence[PlannedLinear], skeleton: Skeleton, recipe: Recipe, seqlen: int, windows: int, resources: Resources
) -> int:
    """Room that the run needs on disk: for the checkpoint, an adapter, activations that memory does not hold, and those behind the last
    block and the one before, with which a run that is ended goes on.
    """
    room = checkpoint_room(chosen, linears, skeleton, recipe.mix) + adapter_bytes(recipe, linears)
    kept = 2 * _streams(recipe) * _buffer_bytes(recipe, linears, seqlen, windows, resources)
    return room + kept + mapped_bytes(recipe, linears, seqlen, windows, resources)


def mapped_bytes(recipe: Recipe, linears: Sequence[PlannedLinear], seqlen: int, windows: int, resources: Resources) -> int:
    """Size of the files that hold the activations, 0 when they fit into memory."""
    buffer = _buffer_bytes(recipe, linears, seqlen, windows, resources)
    return 2 * _streams(recipe) * buffer if beyond_budget(buffer, resources.budget) else 0


def _buffer_bytes(recipe: Recipe, linears: Sequence[PlannedLinear], seqlen: int, windows: int, resources: Resources) -> int:
    """Hidden states of all calibration tokens before a block; 0 without calibration."""
    if not needs_calibration(recipe, linears):
        return 0
    features = min(linear.site.in_features for linear in linears)
    return windows * seqlen * features * resources.calibration_dtype(linears[0].dtype).itemsize


def windows_per_batch(recipe: Recipe, windows: int, seqlen: int, resources: Resources) -> int:
    """Calibration windows in one pass. A solver that learns from small batches gets at least four, so that some can be held out."""
    most = as_block_solver(recipe.solver()).batch
    size = resources.windows_per_batch(seqlen)
    return size if most is None else min(size, most, max(1, windows // 4))


def _streams(recipe: Recipe) -> int:
    """Streams of hidden states: the quantized model's, and the original's if the solver asks for it."""
    return 2 if as_block_solver(recipe.solver()).needs.original else 1


def memory_bytes(
    recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton, seqlen: int, texts: PlannedTexts, resources: Resources
) -> int:
    """Peak of a run: what the process holds already, activations, one block, and the solver's copies of the largest matrix; or what making
    the texts takes beforehand, if that is more.

    On a GPU it is the peak there, without what libraries hold.
    """
    needed = max(texts.memory_bytes, _tensor_bytes(recipe, linears, skeleton, seqlen, texts.windows, resources))
    if recipe.finish != "none":
        needed = max(needed, tuning_bytes([linear.spec for linear in linears], skeleton, texts.windows, seqlen, resources))
    if resources.device.type != "cpu":
        return needed
    if needs_calibration(recipe, linears):
        beside = 0 if all(share.source in (BUILTIN, SELF) for share in texts.shares) else TEXT_READER_BYTES
    else:
        largest = max(linear.site.in_features * linear.site.out_features for linear in linears) * 4
        beside = KEPT_COPIES * min(largest, LARGEST_KEPT)
    return process_bytes() + LIBRARY_BYTES + beside + needed


def run_work(recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton, tokens: int) -> float | None:
    """Floating operations of a run on so many calibration tokens, roughly: passes, Hessians, solving. None where they are not counted."""
    count = getattr(recipe.solver(), "work", None)  # which solvers of blocks do not tell
    if recipe.transforms() or recipe.adapter_rank or recipe.finish != "none" or count is None:
        return None
    each = [count(linear.site.out_features, linear.site.in_features) for linear in linears]
    counted = [work for work in each if work is not None]
    if len(counted) < len(each):
        return None
    if not needs_calibration(recipe, linears):
        return sum(counted)
    widths = {linear.name: linear.site.in_features for linear in linears}
    firsts = (f"{skeleton.block_prefix(index)}.{stage[0]}" for index, shape in enumerate(skeleton.shapes) for stage in shape.stages)
    return sum(counted) + skeleton.pass_work(tokens) + tokens * sum(widths.get(name, 0) ** 2 for name in firsts)


def finish_work(skeleton: Skeleton, windows: int, seqlen: int) -> float:
    """Floating operations that tuning the scales at the end takes."""
    return tuning_work(TuneScales(), skeleton, windows, seqlen)


def _tensor_bytes(
    recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton, seqlen: int, windows: int, resources: Resources
) -> int:
    solver, itemsize = as_block_solver(recipe.solver()), resources.calibration_dtype(linears[0].dtype).itemsize
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in skeleton.blocks]
    largest = max((linear.site for linear in linears), key=lambda site: site.in_features * site.out_features)
    workspace = max(recipe.solver().workspace_bytes(_rows_at_once(linear), linear.site.in_features, linear.scheme) for linear in linears)
    if recipe.adapter_rank:
        workspace = max(workspace, *(eora.workspace_bytes(linear.site.out_features, linear.site.in_features) for linear in linears))
        workspace += adapter_bytes(recipe, linears)
    window = min(solver.window, len(in_blocks))
    solving = window * max(in_blocks) * itemsize + 2 * largest.in_features * largest.out_features * 4 + workspace
    if not needs_calibration(recipe, linears):
        return solving
    together = [experts_at_once(recipe, linear, resources) * _expert_bytes(recipe, linear) for linear in expert_linears(linears, skeleton)]
    solving += max(0, max(together, default=0) - workspace)
    features = min(linear.site.in_features for linear in linears)
    widest = max((max(each.site.in_features, each.site.out_features) for each in linears if not each.spec.outside), default=0)
    inputs = max(sum(linear.site.in_features for linear in linears if linear.site.block == index) for index in range(len(in_blocks)))
    solving += window * SAMPLED_TOKENS * inputs * 4
    if solver.needs.hessian or recipe.adapter_rank:
        solving += max(linear.site.in_features for linear in linears) ** 2 * 4
    if solver.needs.pairs:
        solving += pairs_bytes(max(linear.site.in_features for linear in linears), features)
    if recipe.transforms():
        # the block in float32; where choices are tried out, its readers on trial and what each of its modules returned on the excerpt
        tries = any(each.tries for each in recipe.transforms())
        outputs = max(sum(site.out_features for site in skeleton.linears if site.block == index) for index in range(len(in_blocks)))
        returned = (outputs if tries else 0) + 3 * features + 2 * widest
        solving += (3 if tries else 1) * max(in_blocks) * 4 + max(TRIED_TOKENS, seqlen) * 2 * returned * 4
        most = _largest_block(linears, skeleton, features)
        matrix = largest.in_features * largest.out_features
        solving += max(each.learning_bytes(most[0], matrix, most[1], max(TRIED_TOKENS, seqlen)) for each in recipe.transforms())
    tokens = windows * seqlen
    hidden, inside = features * itemsize, (3 * features + 2 * widest) * itemsize  # bytes per token
    asleep = tokens * (2 * inside + 4 * features if solver.needs.pairs else inside)  # batches of both models, and the drift
    held = min(2 * _streams(recipe) * tokens * hidden, resources.budget) + min(asleep, resources.budget)
    batch = windows_per_batch(recipe, windows, seqlen, resources) * seqlen
    one_batch = batch * inside
    solving += _window_bytes(solver, window, linears, skeleton, features, batch)
    embeddings = (sum(p.numel() for p in skeleton.model.parameters()) - sum(in_blocks)) * itemsize
    return held + one_batch + max(embeddings, solving)


def experts_at_once(recipe: Recipe, linear: PlannedLinear, resources: Resources) -> int:
    """Experts of which linears like this one are solved together."""
    return max(1, min(MOST_EXPERTS, EXPERT_BYTES[resources.device.type] // _expert_bytes(recipe, linear)))


def _expert_bytes(recipe: Recipe, linear: PlannedLinear) -> int:
    """Memory of one of several experts that are solved together."""
    out_features, in_features = linear.site.out_features, linear.site.in_features
    workspace = recipe.solver().workspace_bytes(out_features, in_features, linear.scheme)
    return workspace + (2 * in_features**2 + 2 * out_features * in_features) * 4


def expert_linears(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> list[PlannedLinear]:
    """The linears of experts."""
    inside = [{local for mixture in shape.mixtures for alike in mixture.alike for local in alike} for shape in skeleton.shapes]
    return [linear for linear in linears if not linear.spec.outside and linear.site.local in inside[linear.site.block]]


def _rows_at_once(linear: PlannedLinear) -> int:
    """Rows of a matrix that are solved together."""
    site = linear.site
    return min(site.out_features, max(1, OUTSIDE_PIECE // site.in_features)) if linear.spec.outside else site.out_features


def _window_bytes(solver: BlockSolver, window: int, linears: Sequence[PlannedLinear], skeleton: Skeleton, hidden: int, tokens: int) -> int:
    """What the solver says of the largest window: all blocks like the largest."""
    weights, features = _largest_block(linears, skeleton, hidden)
    return solver.window_bytes(window * weights, window * features, tokens)


def _largest_block(linears: Sequence[PlannedLinear], skeleton: Skeleton, hidden: int) -> tuple[int, int]:
    """Weights that are quantized in a block, and features that its modules take and give for a token; the most of each."""
    blocks = range(len(skeleton.blocks))
    weights = max(sum(each.site.in_features * each.site.out_features for each in linears if each.site.block == index) for index in blocks)
    features = max(sum(site.in_features + site.out_features for site in skeleton.linears if site.block == index) for index in blocks)
    return weights, features + 4 * hidden
