"""Which linears of a block write into its residual stream, found by behaviour alone.

A block of a pre-norm model returns ``h + sum_k c_k y_k``: the hidden states that it was given and the outputs of some of its linears, each
times a constant (1, or Granite's residual multiplier). On a twin that is cut at its modules with parameters (``cut.py``) these
outputs are leaves: when one is multiplied by random numbers, channel by channel, the block's output must change by ``c_k`` times what the
leaf has changed by, and in the end the sum must be the output. Linears whose output goes through a norm before it is added (Gemma 2) or
into a gate do not write in this sense; a block that has another output than such a sum has no writers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptqcli.transforms.cut import TOLERANCE, CutError, CutModule, Run


def residual_writers(block: nn.Module, run: Run) -> dict[str, float]:
    """Local name -> c of each linear that writes into the residual stream, in running order; empty where there is no such stream.

    The weights of ``block`` may be on the meta device. run: as in ``folds.find_folds``.
    """
    given: list[Tensor] = []

    def noting(twin: nn.Module, dtype: torch.dtype) -> Tensor:
        handle = twin.register_forward_pre_hook(lambda _module, args, kwargs: given.append(_hidden(args, kwargs)), with_kwargs=True)
        try:
            return run(twin, dtype)
        finally:
            handle.remove()

    try:
        cut = CutModule(block, noting)
        return _writers(cut, given[0])
    except (RuntimeError, CutError):  # code that the cuts or float64 do not suit
        return {}


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = kwargs.get("hidden_states", next((arg for arg in args if isinstance(arg, Tensor)), None))
    assert isinstance(hidden, Tensor)
    return hidden.detach().clone()


def _writers(cut: CutModule, hidden: Tensor) -> dict[str, float]:
    output = cut.before[-1][0].detach()
    writers: dict[str, float] = {}
    if hidden.shape != output.shape:  # several states in a stack
        return writers
    rest = output - hidden
    for index, (name, leaf) in enumerate(zip(cut.names, cut.leaves, strict=True)):
        if name not in cut.linears or (leaf.numel(), leaf.shape[-1]) != (output.numel(), output.shape[-1]):
            continue
        factor = _factor(cut, index, output)
        if factor is not None and cut.names.count(name) == 1:
            writers[name] = factor
            rest = rest - factor * leaf.detach().view_as(output)
    return writers if rest.norm() <= TOLERANCE * output.norm() else {}


def _factor(cut: CutModule, index: int, output: Tensor) -> float | None:
    """By what the leaf ``index`` is multiplied before it is added to the output, None if that is not all that becomes of it."""
    leaf = cut.leaves[index].detach()
    scale = 1 + torch.rand(leaf.shape[-1], generator=cut.generator, dtype=torch.float64).to(leaf.device)
    added = (leaf * (scale - 1)).view_as(output)
    change = cut.passed({index: lambda leaf: leaf * scale})[-1][0].detach() - output
    factor = float((change * added).sum() / added.square().sum())
    near = (change - factor * added).norm() <= TOLERANCE * change.norm()
    return factor if near and factor != 0 else None
