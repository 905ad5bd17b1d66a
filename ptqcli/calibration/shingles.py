"""Hashes of runs of tokens, and how much of a text stood in the calibration windows of a checkpoint. See ``fingerprint.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.calibration.fingerprint import HASH_BITS, LEAST_NGRAM, NGRAM, Fingerprint
from ptqcli.model.kinds import PADDING

# Of splitmix64 (Steele, Lea and Flood 2014), as signed numbers; products wrap around at 64 bits.
GAMMA, FIRST, SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Overlap:
    """How much of a text was calibrated on. share: 0 to 1, with its standard error; ngrams: the runs of tokens that were looked up."""

    share: float
    error: float
    ngrams: int


def text_fingerprint(windows: Tensor, bos: bool) -> Fingerprint | None:
    """Of calibration windows, int64 [windows, tokens], PADDING left out; None for windows too short to have one.

    bos: windows begin with a token of their own, which is not of the text.
    """
    text = windows[:, int(bos) :].cpu()
    ngram = min(NGRAM, text.shape[1])
    if ngram < LEAST_NGRAM or not len(text):
        return None
    hashes = _hashes(text, ngram)
    tokens = int((text != PADDING).sum())
    return Fingerprint.of(hashes.unique().tolist(), ngram, len(hashes), tokens) if len(hashes) else None


def overlap(known: Fingerprint, ids: Tensor) -> Overlap | None:
    """The share of the text ``ids``, int64 [tokens], that is known; None where the text is too short to say.

    A window of L tokens has L - n + 1 runs of n, but a text that it is part of has a run at each of the L places; so the share of runs is
    divided by the windows' runs per token. Raises PTQError for a fingerprint that is damaged.
    """
    kept = torch.tensor(known.kept(), dtype=torch.long)
    if len(ids) < known.ngram:
        return None
    hashes = _hashes(ids[None].cpu(), known.ngram)
    sample = hashes[hashes < known.bound]
    if not len(sample):
        return None
    share = float(torch.isin(sample, kept).double().mean())
    scale = known.tokens / known.ngrams
    error = scale * math.sqrt(share * (1 - share) / len(sample))
    return Overlap(min(1.0, share * scale), error, len(sample))


def _hashes(rows: Tensor, ngram: int) -> Tensor:
    """Of every run of ``ngram`` tokens in a row of ``rows``, int64 [rows, tokens], without padding: int64 [runs], below 2^HASH_BITS."""
    places = rows.shape[1] - ngram + 1
    state = torch.zeros(len(rows), places, dtype=torch.long)
    whole = torch.ones(len(rows), places, dtype=torch.bool)
    for step in range(ngram):
        token = rows[:, step : step + places]
        state = _mixed(state * FIRST + token)
        whole &= token != PADDING
    return _shifted(state[whole], 64 - HASH_BITS)


def _mixed(state: Tensor) -> Tensor:
    """splitmix64's output function after its step: each bit depends on every other."""
    state = state + GAMMA
    state = (state ^ _shifted(state, 30)) * FIRST
    state = (state ^ _shifted(state, 27)) * SECOND
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in from the left: torch's own shift brings in the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
