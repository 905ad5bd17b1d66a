"""Linears with an adapter beside them: ``y + B (A x)``, whatever computes y."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from ptqcli.adapters.files import read_adapter
from ptqcli.adapters.low_rank import LowRank
from ptqcli.arguments import as_path
from ptqcli.checkpoint.auxiliary import ADAPTER
from ptqcli.errors import PTQError
from ptqcli.model.linears import is_linear, linear_weight


class AdaptedLinear(nn.Module):
    """``linear`` [in -> out] and an adapter for it, whose products are of the inputs as they come, not rounded."""

    A: Tensor
    B: Tensor

    def __init__(self, linear: nn.Module, adapter: LowRank) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("A", adapter.A)
        self.register_buffer("B", adapter.B)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out]."""
        out: Tensor = self.linear(x)
        return out + functional.linear(functional.linear(x, self.A), self.B)


def adapter_folder(checkpoint: Path, adapter: str | Path | bool) -> Path | None:
    """Where the adapter lies that was asked for: True for the one in the ``checkpoint``, False for none."""
    if isinstance(adapter, bool):
        return checkpoint / ADAPTER if adapter else None
    return as_path(adapter, "adapter")


def add_adapter(model: nn.Module, folder: Path) -> None:
    """Put the adapter in ``folder`` beside the linears of ``model``, in the dtype of its inputs.

    Raises UsageError if there is none, PTQError, by name, for one that is damaged or does not fit the model.
    """
    _put(model, read_adapter(folder), str(folder))


def _put(model: nn.Module, adapter: Mapping[str, LowRank], where: str) -> None:
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    embeddings = next(tensor for tensor in (*table.parameters(), *table.buffers()) if tensor.is_floating_point())
    modules = dict(model.named_modules())
    for name, low_rank in adapter.items():
        linear = modules.get(name)
        if linear is None or _shape(linear) is None:
            raise PTQError(f"{where}: has an adapter for {name}, which is no linear of this model")
        if _shape(linear) != (low_rank.B.shape[0], low_rank.A.shape[1]):
            found, wanted = [low_rank.B.shape[0], low_rank.A.shape[1]], list(_shape(linear) or ())
            raise PTQError(f"{where}: the adapter of {name} is for a matrix {found}, and the model's is {wanted}")
        model.set_submodule(name, AdaptedLinear(linear, low_rank.to(embeddings.device, embeddings.dtype)))


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear, whatever it runs on; None for another module."""
    if is_linear(module):
        out_features, in_features = linear_weight(module).shape
        return out_features, in_features
    return (module.out_features, module.in_features) if hasattr(module, "kernel") else None  # type: ignore[return-value]
