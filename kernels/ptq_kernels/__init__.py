"""Kernels for weights in integers.

``reference`` is plain torch and runs anywhere; ``layout`` says how codes lie in memory; ``modules`` wraps both as layers.
Importing this package touches no GPU.
"""

from ptq_kernels.layout import signed_codes
from ptq_kernels.modules import LLMInt8Linear, W8A8Linear, WeightOnlyLinear
from ptq_kernels.reference import int8_linear, llm_int8_linear, weight_only_linear

__all__ = [
    "LLMInt8Linear",
    "W8A8Linear",
    "WeightOnlyLinear",
    "int8_linear",
    "llm_int8_linear",
    "signed_codes",
    "weight_only_linear",
]
