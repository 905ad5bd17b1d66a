"""Matrices that a module takes out of a stack one at a time.

Models with mixtures of experts keep the matrices of a layer's experts in one parameter, [experts, out, in] or [experts, in, out], and
multiply the tokens that are routed to expert ``e`` with the slice ``[e]``. ``Matrices`` stands in the place of such a parameter. It is no
tensor: what is asked of it (a slice, and a product with that) is handed to ``multiply``, and everything else to ``other``. So the module's
own code runs as it is, while each product is made by a linear, whatever that is by then.

``Watched`` stands there while a model runs once without weights, and tells whether a parameter is used in this way and no other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ptqcli.errors import PTQError

PRODUCTS = {torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}
STACKED_PRODUCTS = {torch.bmm, torch.Tensor.bmm, *PRODUCTS}


class Matrices:
    """In the place of a parameter of this shape, [count, ...]."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape

    def __getitem__(self, index: Any) -> Any:
        whole = isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point())
        return Matrix(self, int(index)) if whole else self.other("is indexed by more than one number").__getitem__(index)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Products of as many batches as there are matrices; anything else is ``other``."""
        if func in STACKED_PRODUCTS and len(args) == 2 and isinstance(args[1], Matrices) and isinstance(args[0], Tensor):
            x, stack = args
            if x.dim() == 3 and len(x) == stack.shape[0]:
                return torch.stack([stack.multiply(index, rows, turned=True) for index, rows in enumerate(x)])
        return _otherwise(func, args, kwargs or {})

    @abstractmethod
    def multiply(self, index: int, x: Tensor, turned: bool) -> Tensor:
        """``x @ M.T`` for matrix number ``index``, or where it is ``turned`` ``x @ M``."""

    @abstractmethod
    def other(self, what: str) -> Any:
        """The values for code that does something else with them, named by ``what``; or an error."""


class Matrix:
    """Matrix number ``index`` of ``stack``, or its transpose where ``turned``."""

    def __init__(self, stack: Matrices, index: int, turned: bool = False) -> None:
        self.stack, self.index, self.turned = stack, index, turned

    @property
    def shape(self) -> torch.Size:
        """Its two dimensions."""
        rows = self.stack.shape[1:]
        return rows[::-1] if self.turned else rows

    @property
    def T(self) -> Matrix:
        """The transpose."""
        return Matrix(self.stack, self.index, not self.turned)

    mT = T

    def t(self) -> Matrix:
        """The transpose."""
        return self.T

    def transpose(self, first: int, second: int) -> Matrix:
        """The transpose, or the matrix itself."""
        return self.T if (first - second) % 2 else self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """``linear`` and products with a tensor on the left; anything else is ``other``."""
        kwargs = kwargs or {}
        if func is nn.functional.linear and isinstance(args[0], Tensor) and isinstance(args[1:2], tuple) and not kwargs.keys() - {"bias"}:
            x, matrix, *rest = args
            bias = rest[0] if rest else kwargs.get("bias")
            if isinstance(matrix, Matrix):
                product = matrix.stack.multiply(matrix.index, x, matrix.turned)
                return product if bias is None else product + bias
        if func in PRODUCTS and not kwargs and isinstance(args[0], Tensor) and isinstance(args[1], Matrix):
            x, matrix = args
            return matrix.stack.multiply(matrix.index, x, not matrix.turned)
        return _otherwise(func, args, kwargs)


def separated(model: nn.Module) -> list[Linears]:
    """All stacks of a model whose matrices have become linears."""
    return [value for module in model.modules() for value in vars(module).values() if isinstance(value, Linears)]


def experts_of(module: nn.Module) -> int | None:
    """How many experts this module has among its children; None if it is none that was separated."""
    found = next((value for value in vars(module).values() if isinstance(value, Linears)), None)
    return None if found is None else found.shape[0]


@contextmanager
def experts_alone(module: nn.Module, numbers: Collection[int]) -> Iterator[None]:
    """Have ``module``, of which experts were separated, run those of ``numbers`` alone: products of the others are zeros."""
    stacks = [value for value in vars(module).values() if isinstance(value, Linears)]
    for stack in stacks:
        stack.alone = numbers
    try:
        yield
    finally:
        for stack in stacks:
            stack.alone = None


def linear_path(index: int, part: str) -> str:
    """Where a linear of matrix number ``index`` is, below the module that had the parameter."""
    return f"{index}.{part}" if part else str(index)


def _otherwise(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``func`` with the values themselves."""
    what = f"is handed to {getattr(func, '__name__', func)}"
    given = [_values(value, what) for value in args]
    return func(*given, **{key: _values(value, what) for key, value in kwargs.items()})


def _values(value: Any, what: str) -> Any:
    if isinstance(value, Matrices):
        return value.other(what)
    if isinstance(value, Matrix):
        values = value.stack.other(what)[value.index]
        return values.t() if value.turned else values
    return value


class Watched(Matrices):
    """Zeros in the place of ``parameter``. products: whether its matrices were multiplied turned, not turned, or both. others: what else
    was done."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(parameter.shape)
        self._zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        self.products: set[bool] = set()
        self.others: set[str] = set()

    def __deepcopy__(self, _memo: Any) -> Watched:
        return self  # what a copy of the model does is seen here

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.other(f"is asked for {name}"), name)

    def multiply(self, index: int, x: Tensor, turned: bool) -> Tensor:
        """Zeros, as many as there would be numbers."""
        self.products.add(turned)
        return x.new_zeros(*x.shape[:-1], self.shape[2 if turned else 1])

    def other(self, what: str) -> Any:
        """The zeros."""
        self.others.add(what)
        return self._zeros

    @property
    def turned(self) -> bool | None:
        """Whether each matrix is [in, out] instead of [out, in]; None if this is not all that is done with them."""
        return next(iter(self.products)) if len(self.products) == 1 and not self.others else None


class Linears(Matrices):
    """In the place of a parameter whose matrices are linears below ``owner``, the module that had the parameter.

    name: of the parameter. parts: names of the linears of one matrix below ``owner.<index>``, their outputs one after the other; an empty
    one is ``owner.<index>`` itself. turned: whether the module takes each matrix for [in, out]. declared: transformers makes the
    parameter of tensors of these names. Linears are looked up when they are called, so that others can take their places.
    """

    def __init__(
        self, owner: nn.Module, name: str, shape: torch.Size, parts: tuple[str, ...], turned: bool, declared: bool = False
    ) -> None:
        super().__init__(shape)
        self.owner, self.name, self.parts, self.turned, self.declared = owner, name, parts, turned, declared
        self.alone: Collection[int] | None = None  # see ``experts_alone``

    @property
    def linears(self) -> list[str]:
        """Paths of its linears in the model."""
        path = self.name.rpartition(".")[0]
        return [f"{path}.{linear_path(index, part)}" for index in range(self.shape[0]) for part in self.parts]

    def multiply(self, index: int, x: Tensor, turned: bool) -> Tensor:
        """What the linears return."""
        if turned != self.turned:
            self.other("is multiplied from two sides")
        index %= self.shape[0]
        if self.alone is not None and index not in self.alone:
            return x.new_zeros(*x.shape[:-1], self.shape[2 if turned else 1])
        outputs = [self.owner.get_submodule(linear_path(index, part))(x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def other(self, what: str) -> NoReturn:
        """Raises PTQError: there are no values."""
        raise PTQError(f"{self.name}: {what} by the code of the model, which was found to take one matrix after the other out of it")
