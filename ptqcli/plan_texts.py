"""Calibration texts in a plan: how many windows of which, and what it takes that a model writes its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ptqcli.calibration.familiar import TOKENS, WINDOWS, Familiarity
from ptqcli.calibration.own_text import Sampling
from ptqcli.calibration.sources import SELF, Share, read_calib, shares_text
from ptqcli.model.skeleton import Skeleton
from ptqcli.recipe import Recipe

# Work that a CPU is not given unasked, in floating operations: hours on a few cores.
MOST_WORK = 5e14


@dataclass(frozen=True, kw_only=True)
class PlannedTexts:
    """What a run is calibrated on.

    shares: with their windows. notes: what a person should know. memory_bytes: that making it takes. known: how well the model knows it,
    where that is measured already.
    """

    shares: tuple[Share, ...]
    notes: tuple[str, ...] = ()
    memory_bytes: int = 0
    known: Familiarity | None = None

    @property
    def windows(self) -> int:
        """All of them."""
        return sum(share.windows or 0 for share in self.shares)

    def row(self, seqlen: int) -> str:
        """For people: ``128 windows of 2048 tokens from c4``."""
        return shares_text(self.shares, seqlen)


# Decides on the texts of windows of so many tokens.
ChooseTexts = Callable[[int], PlannedTexts]


def texts_as_asked(recipe: Recipe, seqlen: int) -> PlannedTexts:
    """The texts that ``recipe`` names, auto among them undecided."""
    return PlannedTexts(shares=tuple(share.sized(recipe.nsamples, seqlen) for share in read_calib(recipe.calib)))


def own_tokens(shares: tuple[Share, ...], seqlen: int) -> int:
    """Tokens that the model is to write."""
    return sum((share.windows or 0) * seqlen for share in shares if share.source == SELF)


def own_text_bytes(skeleton: Skeleton, tokens: int, dtype: torch.dtype) -> int:
    """Memory that writing ``tokens`` takes: the whole model, keys and values of one batch of pieces, and its probabilities."""
    how, config = Sampling(), skeleton.config.get_text_config()
    rows = min(how.rows, -(-tokens // how.length))
    heads = getattr(config, "num_attention_heads", None) or 1
    shared = (getattr(config, "num_key_value_heads", None) or heads) / heads
    kept = rows * how.length * len(skeleton.blocks) * 2 * int(shared * config.hidden_size) * dtype.itemsize
    return _parameter_bytes(skeleton, dtype) + kept + 4 * rows * config.vocab_size * 8


def check_bytes(skeleton: Skeleton, dtype: torch.dtype) -> int:
    """Memory that one pass over a few windows takes, a block at a time, with their probabilities."""
    blocks = [sum(p.numel() for p in block.parameters()) * dtype.itemsize for block in skeleton.blocks]
    vocabulary = skeleton.config.get_text_config().vocab_size
    logits = vocabulary * TOKENS * (WINDOWS * dtype.itemsize + 4 * 4)
    return _parameter_bytes(skeleton, dtype) - sum(blocks) + max(blocks) + logits


def _parameter_bytes(skeleton: Skeleton, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in skeleton.model.parameters()) * dtype.itemsize
