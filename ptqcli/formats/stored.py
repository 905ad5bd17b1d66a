"""What is asked of the tensors of a quantized linear before they are believed, and before they are written; the same in every format."""

from __future__ import annotations

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import FLOATING
from ptqcli.errors import PTQError
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight

DAMAGED = "the file is damaged"


def describe(tensor: Tensor) -> str:
    """Dtype and shape, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def reach(scheme: Scheme) -> int:
    """Steps from the zero point to the code farthest from it."""
    return scheme.middle if scheme.symmetric else scheme.levels - 1


def middle(scale: Tensor, scheme: Scheme) -> Tensor:
    """The zero points of a symmetric weight: uint8, in the shape of ``scale``."""
    return torch.full(scale.shape, scheme.middle, dtype=torch.uint8)


def expect_words(name: str, words: Tensor, shape: tuple[int, int], reason: str = DAMAGED) -> None:
    """Raise PTQError unless ``words`` is int32 of ``shape``. reason: what else may be the matter."""
    if tuple(words.shape) != shape or words.dtype != torch.int32:
        raise PTQError(f"{name}: expected int32 {list(shape)}, found {describe(words)}; {reason}")


def expect_floats(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise PTQError unless ``tensor`` is floating of ``shape``."""
    if tuple(tensor.shape) != shape or tensor.dtype not in FLOATING:
        raise PTQError(f"{name}: expected floating {list(shape)}, found {describe(tensor)}")


def expect_scales(name: str, scale: Tensor, shape: tuple[int, ...], steps: int) -> None:
    """Raise PTQError unless ``scale`` is floating of ``shape`` and its numbers are such as a kernel can compute with.

    They must be normal as float32, in which kernels divide by them (the subnormal ones of float16 are), and not so large that what a code
    ``steps`` from the zero point stands for is infinite. A scale of weights may be negative, see ``numerics.grids``.
    """
    expect_floats(name, scale, shape)
    smallest, largest = map(float, scale.abs().aminmax())
    if not smallest >= torch.finfo(torch.float32).tiny:
        raise PTQError(f"{name}: holds {smallest:g}, which is no scale; {DAMAGED}")
    if not largest * steps <= torch.finfo(scale.dtype).max:
        raise PTQError(f"{name}: holds {largest:g}, with which weights leave the range of {scale.dtype}; {DAMAGED}")


def expect_writable(name: str, weight: QuantizedWeight) -> None:
    """Raise PTQError for a ``weight`` that is no integers or, symmetric, has zero points of its own, and for one whose values its scales'
    dtype does not hold."""
    scheme = weight.scheme
    if scheme.codebook is not None:
        raise PTQError(f"{name}: holds codes of {scheme.codebook}, and the format holds integers; give --format bitsandbytes")
    if scheme.symmetric and not bool((weight.zero == scheme.middle).all()):
        raise PTQError(f"{name}: a symmetric weight has zero points other than {scheme.middle}")
    if not float(weight.scale.abs().max()) * reach(scheme) <= torch.finfo(weight.scale.dtype).max:
        raise PTQError(
            f"{name}: its weights come so close to the end of {weight.scale.dtype} that rounded ones can pass it; "
            "leave it as it is (--ignore), or convert the model to bfloat16"
        )
