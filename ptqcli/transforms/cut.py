"""A module without its weights, cut into the small networks without parameters that lie between its modules with parameters.

Every module that owns parameters returns, in place of its result, a *leaf*: a tensor of random numbers of the same shape; and its inputs
are noted. So attention, activations, products and sums run as they are, on random numbers, and whatever depends on weights is left out: a
pass costs next to nothing however large the model is, and nothing but the code and the shapes of the module matters. What a leaf does to
the noted inputs is found by changing the leaf (``passed``), by gradients (``factors``), or by both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ptqcli.model.choices import each_on_all
from ptqcli.model.discovery import StopForward
from ptqcli.model.linears import is_linear, linear_weight
from ptqcli.model.stacks import experts_of

# Runs a twin of the module on a few tokens, floating arguments cast to the dtype; gives the output.
Run: TypeAlias = Callable[[nn.Module, torch.dtype], Tensor]

# Of what is found in float64; above the noise of attention code that computes its softmax in float32.
TOLERANCE = 1e-5
DRAWS = 4  # of the integers w: one would do, but for a chance of about TOLERANCE per channel
LARGEST_WEIGHT = 4

OTHER_PATH = "the block takes another path when its output is scaled"


class CutError(StopForward):
    """Why nothing can be found out about a cut module, or about the module as a whole."""


class CutModule:
    """A twin of ``module`` in float64, cut at its modules with parameters.

    names: the cut modules, one entry a call, in running order. leaves: what they return in place of their results. linears: names of
    those that are linears. arguments: what each was called with. before: the floating tensors among these, and last the module's output.

    ``run`` brings its tensors to the device of the module, or to the CPU when that is the meta device. Raises CutError, and RuntimeError
    from code that the cuts or float64 do not suit.
    """

    def __init__(self, module: nn.Module, run: Run) -> None:
        self.module, self.run = module, run
        self.names: list[str] = []
        self.leaves: list[Tensor] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.before: list[list[Tensor]]
        self.generator = torch.Generator().manual_seed(0)
        self.twin = without_weights(module, self.generator)
        self.linears = {name for name, inner in self.twin.named_modules() if is_linear(inner)}
        for name, inner in self.twin.named_modules():
            experts = experts_of(inner)
            if experts is not None:
                inner.forward = partial(_unrouted, inner, experts)
            if name in self.linears:
                inner.forward = partial(_empty_result, linear_weight(inner).shape[0])
            if name in self.linears or _is_leaf(inner):
                inner.register_forward_hook(partial(self._cut, name), with_kwargs=True)
        self._first = True
        self.before = self.passed({})

    def passed(self, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> list[list[Tensor]]:
        """What the cut modules receive, and last what the module returns, with ``changes`` made to the leaves of these numbers."""
        self._changes = changes
        self._seen: list[list[Tensor]] = []
        with torch.set_grad_enabled(self._first):  # later passes are compared, not differentiated
            output = self.run(self.twin, torch.float64)
        if len(self._seen) != len(self.names):
            raise CutError(OTHER_PATH)
        self._first = False
        passed = [*self._seen, [output]]
        if any(value.isnan().any() for values in passed for value in values):
            raise CutError("it uses the weight of a linear without calling the linear")
        return passed

    def _cut(self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Tensor | None:
        if not (isinstance(result, Tensor) and result.is_floating_point()):
            return None  # not one tensor of channels: the module stays part of the network, with random parameters
        call = len(self._seen)
        if self._first:
            self.names.append(name)
            self.arguments.append((args, kwargs))
            self.leaves.append(random_numbers(result.shape, self.generator, result.device).requires_grad_())
        elif self.names[call : call + 1] != [name] or self.leaves[call].shape != result.shape:
            raise CutError(OTHER_PATH)
        # clones, here and in what is returned, because code may change its tensors in place
        self._seen.append([value.clone() for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()])
        leaf = self.leaves[call]
        return self._changes[call](leaf) if call in self._changes else leaf.clone()

    def factors(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Bool [channels] for each leaf: of which channels ``inputs``, of those noted, are homogeneous of degree 1."""
        inputs = [x for x in inputs if x.requires_grad]
        found = [torch.ones(leaf.shape[-1], dtype=torch.bool, device=leaf.device) for leaf in self.leaves]
        for _ in range(DRAWS if inputs else 0):
            cotangents = [self._cotangent(x.detach()) for x in inputs]
            gradients = torch.autograd.grad(inputs, self.leaves, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True)
            for factors, leaf, gradient in zip(found, self.leaves, gradients, strict=True):
                degree = _over_tokens(leaf.detach() * gradient)
                whole = degree.round()
                factors &= (whole >= 1) & ((degree - whole).abs() <= TOLERANCE * whole)
        return found

    def _cotangent(self, x: Tensor) -> Tensor:
        weights = torch.randint(1, LARGEST_WEIGHT + 1, x.shape[-1:], generator=self.generator).to(x.device)
        return weights * x / _over_tokens(x * x).clamp_min(torch.finfo(x.dtype).tiny)


def without_weights(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in float64 whose linears and embeddings hold NaN, without memory, and whose other parameters are random."""
    matrices = {
        id(parameter)
        for inner in module.modules()
        if is_linear(inner) or isinstance(inner, nn.Embedding)
        for parameter in inner.parameters()
    }
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        device = torch.device("cpu") if parameter.is_meta else parameter.device
        if id(parameter) in matrices:  # not on the meta device: a product with it on the CPU would be garbage instead of an error
            value = torch.full((), torch.nan, dtype=torch.float64, device=device).expand(parameter.shape)
        else:
            value = random_numbers(parameter.shape, generator, device)
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return copy.deepcopy(module, memo).double()


def random_numbers(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Normal ones in float64."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def multiplied_by(old: Tensor, new: Tensor, numbers: Tensor) -> Tensor | None:
    """Which of ``numbers``, each 1 or one of a kind, the channels of ``old`` were multiplied by: int64, -1 for 1; None if by no number."""
    values, index = torch.cat([numbers.new_ones(1), numbers[numbers != 1]]), (numbers != 1).nonzero().flatten()
    energy = _over_tokens(old * old)
    ratio = torch.where(energy > 0, _over_tokens(old * new) / energy, 1.0)
    nearest = torch.bucketize(ratio, (values[1:] + values[:-1]) / 2)
    difference = new - values[nearest] * old
    if (_over_tokens(difference * difference) > TOLERANCE**2 * energy).any():
        return None
    return torch.cat([index.new_full((1,), -1), index])[nearest]


def distinct_numbers(channels: Tensor) -> Tensor:
    """A number of its own for each channel that bool ``channels`` marks, 1 for the others; large, so that a clamp shows."""
    numbers = torch.logspace(1, 3, int(channels.sum()), dtype=torch.float64, device=channels.device)
    return torch.ones(len(channels), dtype=torch.float64, device=channels.device).masked_scatter(channels, numbers)


def _is_leaf(module: nn.Module) -> bool:
    """Whether all parameters below ``module`` are its own, and there are some."""
    own = len(list(module.parameters(recurse=False)))
    return own > 0 and own == len(list(module.parameters()))


def _unrouted(module: nn.Module, experts: int, *args: Any, **kwargs: Any) -> Any:
    """Every expert on all tokens, added up: so each is reached, and none on a way that depends on values."""
    outputs = list(each_on_all(module, range(experts), args, kwargs))
    return sum(outputs[1:], outputs[0]) if outputs else type(module).forward(module, *args, **kwargs)


def _empty_result(out_features: int, *args: Tensor, **kwargs: Tensor) -> Tensor:
    (x,) = (*args, *kwargs.values())
    return x.new_empty(*x.shape[:-1], out_features)


def _over_tokens(x: Tensor) -> Tensor:
    return x.flatten(0, -2).sum(0)
