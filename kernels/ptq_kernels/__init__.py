"""Kernels of packed weights, in plain torch."""
