"""What a run needs: bytes of the checkpoint, of the disk, and of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ptqcli.calibration.statistics import SAMPLED_TOKENS
from ptqcli.model.linears import LinearSite
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.solvers.per_matrix import as_block_solver, needs_of

# Tokens on which transforms try their choices out, in whole windows.
TRIED_TOKENS = 1024


@dataclass(frozen=True)
class PlannedLinear:
    """A linear that will be quantized. scale_dtype: the dtype in which its weight is stored now, and its scales will be."""

    site: LinearSite
    scheme: Scheme
    scale_dtype: torch.dtype

    @property
    def name(self) -> str:
        """Its path in the model."""
        return self.site.name


def _needs_calibration(recipe: Recipe, linears: Sequence[PlannedLinear]) -> bool:
    looked_at = any(needs_of(linear.scheme) for linear in linears)
    return bool(as_block_solver(recipe.solver()).needs) or bool(recipe.transforms()) or looked_at


def weight_bits(linear: PlannedLinear) -> int:
    """Stored bits of a quantized linear: codes, scales and zero points. The columns that outliers will take are not known yet."""
    site, scheme = linear.site, linear.scheme
    scale_bits = linear.scale_dtype.itemsize * 8
    if scheme.activations is not None:  # signed codes of a byte each, whatever their width
        scales = (1 if scheme.group_size == WHOLE_MATRIX else site.out_features) + (0 if scheme.activations.dynamic else 1)
        return site.out_features * site.in_features * 8 + scales * scale_bits
    groups = scheme.group_count(site.in_features)
    zero_bits = 0 if scheme.symmetric else scheme.bits
    return site.out_features * (site.in_features * scheme.bits + groups * (scale_bits + zero_bits))


def _bytes_after(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> int:
    replaced = sum(skeleton.nbytes(f"{linear.name}.weight") for linear in linears)
    return skeleton.total_bytes - replaced + sum(weight_bits(linear) for linear in linears) // 8


def _mapped_bytes(recipe: Recipe, linears: Sequence[PlannedLinear], seqlen: int, resources: Resources) -> int:
    """Size of the file that holds the activations, 0 when they fit into memory."""
    if not _needs_calibration(recipe, linears):
        return 0
    features = min(linear.site.in_features for linear in linears)
    size = recipe.nsamples * seqlen * features * resources.calibration_dtype(linears[0].scale_dtype).itemsize
    return size if size > resources.activation_budget else 0


def _memory_bytes(recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton, seqlen: int, resources: Resources) -> int:
    """Peak of a run beyond Python and torch themselves: activations, one block, and the solver's copies of the largest matrix."""
    itemsize = resources.calibration_dtype(linears[0].scale_dtype).itemsize
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in skeleton.blocks]
    largest = max((linear.site for linear in linears), key=lambda site: site.in_features * site.out_features)
    workspace = max(recipe.solver().workspace_bytes(linear.site.out_features, linear.site.in_features) for linear in linears)
    solving = max(in_blocks) * itemsize + 2 * largest.in_features * largest.out_features * 4 + workspace
    if not _needs_calibration(recipe, linears):
        return solving
    features = min(linear.site.in_features for linear in linears)
    widest = max(max(linear.site.in_features, linear.site.out_features) for linear in linears)
    inputs = max(sum(linear.site.in_features for linear in linears if linear.site.block == index) for index in range(len(in_blocks)))
    solving += SAMPLED_TOKENS * inputs * 4
    if as_block_solver(recipe.solver()).needs.hessian:
        solving += max(linear.site.in_features for linear in linears) ** 2 * 4
    if recipe.transforms():
        # the block in float32, its readers on trial, and what each of its modules returned on the excerpt
        outputs = max(sum(site.out_features for site in skeleton.linears if site.block == index) for index in range(len(in_blocks)))
        solving += 3 * max(in_blocks) * 4 + max(TRIED_TOKENS, seqlen) * 2 * (outputs + 3 * features + 2 * widest) * 4
    tokens = recipe.nsamples * seqlen
    hidden, inside = features * itemsize, (3 * features + 2 * widest) * itemsize  # bytes per token
    held = min(tokens * hidden, resources.activation_budget) + min(tokens * inside, resources.activation_budget)
    one_batch = resources.windows_per_batch(seqlen) * seqlen * inside
    embeddings = (sum(p.numel() for p in skeleton.model.parameters()) - sum(in_blocks)) * itemsize
    return held + one_batch + max(embeddings, solving)
