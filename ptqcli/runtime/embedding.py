"""A quantized embedding: rows of codes, of which those that are looked up are decoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptqcli.formats import bitstream
from ptqcli.numerics.weight import QuantizedWeight


class PackedEmbedding(nn.Module):
    """``embedding``, whatever its class does with what it looks up, on the rows of ``weight`` [tokens, hidden] in ``dtype``.

    Codes stay in ``bits`` each; scales and zero points are [tokens, groups]. The embedding loses its own weight.
    """

    kernel = "reference"
    words: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, embedding: nn.Embedding, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.codes.shape
        self.scheme, self.dtype, self.bits = weight.scheme, dtype, weight.scheme.bits
        self.register_buffer("words", bitstream.pack(weight.codes, self.bits))
        self.register_buffer("scale", weight.scale.to(dtype))
        self.register_buffer("zero", weight.zero)
        del embedding.weight
        embedding.padding_idx = None  # which matters to gradients alone
        self.embedding = embedding

    def rows(self, ids: Tensor) -> Tensor:
        """The rows ``ids``, int64 [n], as numbers: [n, hidden]."""
        codes = bitstream.unpack(self.words[ids], self.bits, self.embedding_dim)
        return QuantizedWeight(codes=codes, scale=self.scale[ids], zero=self.zero[ids], scheme=self.scheme).dequantize(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` [...] to [..., hidden]."""
        self.embedding.weight = self.rows(ids.flatten())
        try:
            found: Tensor = self.embedding(torch.arange(ids.numel(), device=ids.device).view(ids.shape))
        finally:
            del self.embedding.weight
        return found
