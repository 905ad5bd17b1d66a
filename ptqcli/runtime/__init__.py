"""A packed checkpoint as a transformers model whose quantized linears run on the kernels.

load.py    the model: built empty, filled from the file
layers.py  which kernel a linear gets, and its layer
joined.py  which linears become one
"""

from ptqcli.runtime.joined import same_input
from ptqcli.runtime.layers import KERNELS, kernels_in, quantized_linear
from ptqcli.runtime.load import load_quantized

__all__ = ["KERNELS", "kernels_in", "load_quantized", "quantized_linear", "same_input"]
