"""A quantized checkpoint as a model whose scales, and gains and biases, ask for gradients.

Codes, zero points and doubly quantized scales are as they are stored. A weight is decoded when it is used, and again in the backward pass:
each block is a checkpoint of torch, which keeps a block's input and runs the block again. So there are never decoded weights of more than
one block.

What is trained is moved in units of its own. A scale becomes ``s (1 + d)``, which leaves it its sign; a vector (the gain or bias of a norm,
a bias of a linear) becomes ``v + rms(v) d``. All d begin at 0, and none leaves +-LARGEST_CHANGE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from ptqcli.errors import UsageError
from ptqcli.formats.packed_checkpoint import PackedCheckpoint, open_checkpoint
from ptqcli.model.gguf import is_gguf
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.numerics.scheme import WHOLE_MATRIX
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.runtime import load_quantized

LARGEST_CHANGE = 0.5


def check_tunable(checkpoint: PackedCheckpoint, vectors: bool) -> None:
    """Raise UsageError for a checkpoint of which nothing can be trained. vectors: whether gains and biases are, too."""
    if is_gguf(checkpoint.folder):
        raise UsageError(
            f"{checkpoint.folder}: scales in a GGUF file are not tuned; tune those of the checkpoint that it was made from, and give that "
            "to `ptq convert --to gguf`"
        )
    outside = next((name for name in checkpoint.schemes if checkpoint.spec(name).outside), None)
    if outside is not None:
        raise UsageError(f"{checkpoint.folder}: {outside} is quantized, and only scales of linears in the blocks are tuned")
    if not vectors and all(scheme.double for scheme in checkpoint.schemes.values()):
        raise UsageError(
            f"{checkpoint.folder}: doubly quantized scales do not move one by one; leave --no-norms out, and the rest is tuned"
        )


class TunedLinear(nn.Module):
    """A quantized linear that computes with ``scale``, float32 [out, groups], in the place of its weight's own."""

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.quantized = quantized
        self.scale = quantized.scale.float()
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] to [..., out], as the runtime computes it."""
        quantized = replace(self.quantized, scale=self.scale)
        if quantized.scheme.activations is None:
            return functional.linear(x, quantized.dequantize(x.dtype), self.bias)
        out: Tensor = FakeQuantLinear.of(quantized, None if self.bias is None else self.bias.float())(x)
        return out


class Tuned:
    """One tensor that is trained: ``base + unit d``, with d float32 of its shape, or of one element where all of it moves together.

    base: as it is stored, in whose dtype it will be. places: the modules that hold it, each with its name there; what is put there is
    given the dtype ``used``.
    """

    def __init__(self, base: Tensor, unit: Tensor, places: list[tuple[nn.Module, str]], used: torch.dtype, together: bool = False) -> None:
        self.base, self.unit, self.places, self.used, self.stored = base.float(), unit, places, used, base.dtype
        self.change = torch.zeros([1] * base.dim() if together else base.shape, device=base.device, requires_grad=True)

    def value(self) -> Tensor:
        """As it stands, float32."""
        return self.base + self.unit * self.change

    def rounded(self) -> Tensor:
        """What would be stored; exactly what was, while d is 0."""
        return self.value().detach().to(self.stored)

    def put(self, value: Tensor) -> None:
        """Let the model compute with ``value``."""
        for module, leaf in self.places:
            module._parameters.pop(leaf, None)
            setattr(module, leaf, value.to(self.used))


class Student:
    """The checkpoint in ``folder``, to be run and tuned on ``device``.

    dtype: in which it runs. blocks: name of its list of blocks. vectors: whether gains and biases are trained, too.
    Raises PTQError or UsageError for a folder that is no quantized checkpoint, or does not fit its model.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, blocks: str, vectors: bool) -> None:
        self.checkpoint: PackedCheckpoint = open_checkpoint(folder, dtype)
        check_tunable(self.checkpoint, vectors)
        self.model: Any = load_quantized(folder, device, dtype, kernel="reference", fuse=False).eval().requires_grad_(False)
        self._layers = {name: self._replace(name, device) for name in self.checkpoint.schemes}
        self.scales = {name: _scale_of(layer) for name, layer in self._layers.items() if not layer.quantized.scheme.double}
        self.vectors = dict(self._vectors()) if vectors else {}
        for block in self.model.get_submodule(blocks).children():
            block.forward = partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)

    @property
    def tuned(self) -> list[Tuned]:
        """Everything that is trained."""
        return [*self.scales.values(), *self.vectors.values()]

    def logits(self, ids: Tensor, rounded: bool) -> Tensor:
        """Those of ``ids``, int64 [windows, tokens]. rounded: with what would be stored, not with what is trained."""
        for tuned in self.tuned:
            tuned.put(tuned.rounded().float() if rounded else tuned.value())
        found: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint that have changed, by their stored names, as the format stores them."""
        names, format_ = self.checkpoint.names, self.checkpoint.format
        found: dict[str, Tensor] = {}
        for name, tuned in self.scales.items():
            weight = format_.held(replace(self._layers[name].quantized, scale=tuned.rounded()).to(torch.device("cpu")))
            found |= format_.pack((names.disk(f"{name}.weight") or name).removesuffix(".weight"), weight)
        found |= {stored: tuned.rounded().cpu() for stored, tuned in self.vectors.items()}
        read = self.checkpoint.tensors.read
        return {name: value for name, value in found.items() if not torch.equal(value, read(name))}

    def _replace(self, name: str, device: torch.device) -> TunedLinear:
        layer = TunedLinear(self.checkpoint.weight(name).to(device), self.model.get_submodule(name).bias)
        self.model.set_submodule(name, layer)
        return layer

    def _vectors(self) -> Iterator[tuple[str, Tuned]]:
        """Every vector that is stored by itself, found by its shape: gains and biases, whatever they are called. By its stored name."""
        places: dict[str, list[tuple[nn.Module, str]]] = {}
        for path, module in self.model.named_modules():
            for leaf, parameter in module._parameters.items():
                stored = self.checkpoint.names.disk(f"{path}.{leaf}")
                if parameter is not None and parameter.dim() == 1 and stored is not None and not isinstance(module, nn.Embedding):
                    places.setdefault(stored, []).append((module, leaf))
        for stored, found in places.items():
            module, leaf = found[0]
            parameter = module.get_parameter(leaf).detach()
            base = self.checkpoint.tensors.read(stored).to(parameter.device)
            rms = base.float().square().mean().sqrt()
            yield stored, Tuned(base, torch.where(rms > 0, rms, torch.ones_like(rms)), found, parameter.dtype)


def _scale_of(layer: TunedLinear) -> Tuned:
    scale = layer.quantized.scale
    together = layer.quantized.scheme.group_size == WHOLE_MATRIX
    return Tuned(scale, scale.float(), [(layer, "scale")], torch.float32, together)
