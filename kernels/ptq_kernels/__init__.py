"""Kernels for packed weights.

``reference`` is plain torch and runs anywhere; ``layout`` says how codes lie in memory; ``modules`` wraps both as layers.
Importing this package touches no GPU.
"""

from ptq_kernels.modules import WeightOnlyLinear
from ptq_kernels.reference import weight_only_linear

__all__ = ["WeightOnlyLinear", "weight_only_linear"]
