"""Kernels for linear layers whose weight is kept in integers.

``modules`` are layers to put into a model, on the operators ``w4a16``, ``w8a8`` and ``llm_int8`` (each a module of that name, Triton on a
GPU); ``codebook`` has one for codes that count levels. ``torch_cpu`` are layers on torch's own kernels for the CPU, ``joined`` joins layers
of one input. ``reference`` is plain torch and runs anywhere; ``layout`` and ``packing`` say how codes lie in memory. Importing this package
touches no GPU and needs no triton.
"""

from ptq_kernels.codebook import CodebookLinear
from ptq_kernels.joined import JoinedLinear, LinearPart
from ptq_kernels.layout import signed_codes
from ptq_kernels.modules import LLMInt8Linear, ReferenceWeightOnly, TritonWeightOnly, W8A8Linear
from ptq_kernels.reference import int8_linear, llm_int8_linear, weight_only_linear
from ptq_kernels.torch_cpu import TorchInt4WeightOnly, TorchInt8WeightOnly

__all__ = [
    "CodebookLinear",
    "JoinedLinear",
    "LLMInt8Linear",
    "LinearPart",
    "ReferenceWeightOnly",
    "TorchInt4WeightOnly",
    "TorchInt8WeightOnly",
    "TritonWeightOnly",
    "W8A8Linear",
    "int8_linear",
    "llm_int8_linear",
    "signed_codes",
    "weight_only_linear",
]
