"""On-disk formats of quantized weights, one file each.

A format is a pair of exact inverses, ``pack`` and ``unpack``, between a ``QuantizedWeight`` and named tensors; the entry that goes
into config.json, and the way back from such an entry to schemes; and ``refusal``, which says what the format cannot hold before
any work starts. Formats know schemes and codes, never the algorithm that chose them.
"""
