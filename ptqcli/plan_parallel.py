"""What tensor parallelism asks of a checkpoint: a server cuts each matrix over N GPUs, and every part must hold whole groups.

As Megatron-LM has it (Shoeybi et al. 2019, section 3), and vLLM and SGLang do: what reads the residual stream is cut along its outputs,
what writes into it along its inputs. The latter is the linear that alone reads its input and returns as many features as the stream has;
any other is cut along its outputs, which leaves its groups whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.errors import UsageError
from ptqcli.estimate import PlannedLinear
from ptqcli.model.linears import LinearSite
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import AUTO_GROUPS, Scheme


def cut_along_inputs(site: LinearSite, skeleton: Skeleton) -> bool:
    """Whether servers cut the linear along its inputs."""
    stage = next(stage for stage in skeleton.shapes[site.block].stages if site.local in stage)
    hidden = skeleton.config.get_text_config().hidden_size
    return len(stage) == 1 and site.out_features == hidden and site.local != skeleton.shapes[site.block].stages[0][0]


def columns_of_a_part(site: LinearSite, skeleton: Skeleton, parts: int) -> int:
    """Input features of one part of ``parts``: those that groups have to divide. All of them where they cannot be cut evenly."""
    evenly = parts > 1 and site.in_features % parts == 0 and cut_along_inputs(site, skeleton)
    return site.in_features // parts if evenly else site.in_features


def resolved_for_parts(scheme: Scheme, site: LinearSite, skeleton: Skeleton, parts: int) -> Scheme:
    """``scheme`` with groups that divide a part of the linear. Raises UsageError, by name, if none does."""
    columns = columns_of_a_part(site, skeleton, parts)
    try:
        return scheme.resolved(columns)
    except UsageError as error:
        raise UsageError(f"{site.name}: in {parts} parts: {error}; give a smaller --for-tensor-parallel, or --group-size -1") from error


def check_parallel(linears: Sequence[PlannedLinear], skeleton: Skeleton, parts: int) -> None:
    """Raise UsageError, by name and with what to give instead, for a linear that cannot be cut into ``parts``."""
    if parts == 1:
        return
    for linear in linears:
        site = linear.site
        along = cut_along_inputs(site, skeleton)
        size, what = (site.in_features, "input") if along else (site.out_features, "output")
        if size % parts:
            raise UsageError(
                f"{linear.name}: its {size} {what} features cannot be cut into {parts} parts; give another --for-tensor-parallel"
            )
        group = linear.scheme.group_size
        if along and group > 0 and (size // parts) % group:
            told = f"{linear.name}: in {parts} parts it has {size // parts} input features each, which groups of {group} do not divide"
            raise UsageError(f"{told}; use {_advice(linears, skeleton, parts)}")


def _advice(linears: Sequence[PlannedLinear], skeleton: Skeleton, parts: int) -> str:
    widths = {columns_of_a_part(linear.site, skeleton, parts) for linear in linears}
    common = next((size for size in AUTO_GROUPS if not any(width % size for width in widths)), None)
    return "--group-size auto" + ("" if common is None else f" or --group-size {common}")
