"""How fast a checkpoint is, beside the plain products of the same machine and what that machine was just measured to reach.

timing.py       several contenders timed side by side in one run, on buffers that no cache holds
machine.py      the limits: bytes and operations per second, measured
shapes.py       which matrices: those of a checkpoint, or of well-known models
contenders.py   random weights and inputs, and who multiplies them
linears.py      each linear, over numbers of tokens
peers.py        other libraries' kernels for the same weights
generation.py   a whole model: prefill and decode
roofline.py     the picture: points under the machine's limits
"""
