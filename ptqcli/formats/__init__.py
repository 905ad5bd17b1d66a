"""On-disk formats of quantized weights, one file each.

A format is a pair of exact inverses, ``pack`` and ``unpack``, between a ``QuantizedWeight`` and named tensors; the JSON files that tell
readers which linear has which scheme, and the way back from them to schemes; and everything that is known of its readers: what they
cannot hold (``refusal``), what they run as one matrix (``fused_refusal``), what else a user should hear (``notes``). Formats know
schemes and codes, never the algorithm that chose them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight

if TYPE_CHECKING:
    from ptqcli.checkpoint.tensors import TensorSource


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """A linear before it has codes.

    name: its path in the model. kind: its class, such as ``Linear`` or ``Conv1D``. scale_dtype: the dtype in which its scales are stored.
    moving_groups: its groups are not neighbouring columns (act-order without static groups), so that an index is needed.
    """

    name: str
    scheme: Scheme
    out_features: int
    in_features: int
    scale_dtype: torch.dtype
    kind: str = "Linear"
    moving_groups: bool = False


class Format(Protocol):
    """How schemes are stored and told to readers."""

    name: str

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why this format cannot hold a linear, or None if it can."""

    def fused_refusal(self, group: Mapping[str, Scheme | None]) -> str | None:
        """Why linears that read one tensor inside one module cannot differ as they do, or None if all is well.

        group: the scheme of each by its path in the model, None for one that stays as it is.
        """

    def stored_bytes(self, spec: LinearSpec) -> int:
        """Bytes of a linear's stored tensors, as far as they are known before calibration."""

    def notes(self, specs: Sequence[LinearSpec]) -> list[str]:
        """What a user should know of the readers of such linears, one sentence each."""

    def tensor_names(self, name: str, scheme: Scheme) -> tuple[str, ...]:
        """Names of the tensors that hold the linear ``name``."""

    def pack(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The stored tensors of the linear ``name``. Raises PTQError if the format cannot hold ``weight``."""

    def unpack(self, name: str, read: Callable[[str], Tensor], scheme: Scheme) -> QuantizedWeight:
        """Inverse of ``pack``, from stored tensors, which ``read`` returns by name. Raises PTQError for damaged ones."""

    def describe(self, specs: Sequence[LinearSpec], untouched: Sequence[str]) -> dict[str, dict[str, Any]]:
        """File name -> keys to merge into its JSON. untouched: paths of all linears that are not quantized, the output head too."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` entry of config.json is of this format."""

    def schemes(self, config: Mapping[str, Any], tensors: TensorSource, linears: Iterable[str]) -> dict[str, Scheme]:
        """The scheme of each quantized linear among ``linears``. Raises PTQError, naming the key, for everything that is not read."""

    def stored_linears(self, names: Iterable[str]) -> list[str]:
        """The quantized linears among the tensor ``names`` of a checkpoint, by their stored names."""
