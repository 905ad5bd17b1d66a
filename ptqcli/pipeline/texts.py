"""The calibration text of a run: what ``auto`` becomes, what is read, what the model writes, and whether it knows the kind.

``auto`` takes the first of these:

1. the built-in text, where the model does no worse on it than on its own (``familiar.py``): a small model of just that
2. a general corpus that the machine has or can reach (``general.py``), and for a quarter of the windows text that the model writes
   itself, unless that does not fit into memory, or would take a CPU hours
3. text that the model writes, with the built-in text for a quarter

Where none can be had the run ends before it began and asks for a text. The shares are measured: ``scripts/calibration_table.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.calibration import own_text_cache
from ptqcli.calibration.bos import window_bos
from ptqcli.calibration.chat import chat_writer
from ptqcli.calibration.familiar import Familiarity, familiarity, looked_at
from ptqcli.calibration.general import find_general
from ptqcli.calibration.own_text import Sampling, prompts, write_tokens
from ptqcli.calibration.padded import joined, padded_windows
from ptqcli.calibration.rows import Rows
from ptqcli.calibration.sources import AUTO, BUILTIN, SELF, Share
from ptqcli.calibration.text import calibration_windows, documents
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.whole import walked, whole
from ptqcli.pipeline.progress import Progress
from ptqcli.plan_texts import MOST_WORK, PlannedTexts, check_bytes, own_text_bytes, own_tokens, texts_as_asked
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources, free_bytes
from ptqcli.untrusted import foreign

OWN_SHARE = 0.25  # of the windows of auto, beside a corpus: on other kinds of text a corpus alone is up to half worse
BUILTIN_SHARE = 0.25  # of the windows of auto, where the model writes the others
CHECKED_SHARE = 1 / 8  # of a run's tokens that are looked at beforehand, at most
ONE_TOKEN_SHARE = 0.5  # of a text that one token makes up, beyond which it is no text


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """What a run is calibrated on.

    windows: token ids, int64 [windows, tokens]. shares: the texts that they are from. bos: whether each begins with the
    beginning-of-sequence token. skipped_rows: rows of the texts' tables that hold none. known: how well the model knows those that it has
    not written itself, None where there is too little to say. sampling: how it wrote, None if it did not.
    """

    windows: Tensor
    shares: tuple[Share, ...]
    bos: bool
    skipped_rows: int
    known: dict[Share, Familiarity | None] = field(default_factory=dict)
    sampling: dict[str, float] | None = None


@dataclass(kw_only=True)
class TextMaker:
    """Decides on the texts of one run, and makes windows of them. data_dir: the folder that known corpora are looked for in first."""

    recipe: Recipe
    skeleton: Skeleton
    resources: Resources
    data_dir: Path | None
    progress: Progress
    _made: dict[tuple[tuple[Share, ...], int, bool], CalibrationSet] = field(default_factory=dict)

    # What is taken

    def choose(self, seqlen: int) -> PlannedTexts:
        """The texts of windows of ``seqlen`` tokens. Raises UsageError where none is at hand, or one that is asked for cannot be."""
        asked = texts_as_asked(self.recipe, seqlen)
        chosen = self._auto(seqlen) if [share.source for share in asked.shares] == [AUTO] else asked
        memory, tokens = check_bytes(self.skeleton, self._dtype), own_tokens(chosen.shares, seqlen)
        if not tokens:
            return replace(chosen, memory_bytes=memory)
        obstacle = self._cannot_write(tokens)
        if obstacle is not None:
            raise UsageError(f"calib self: {obstacle}; give a text with --calib")
        needed = own_text_bytes(self.skeleton, tokens, self._dtype)
        work = self.skeleton.pass_work(tokens) / 1e12
        note = f"the model writes {tokens:,} tokens itself beforehand: about {work:,.2g} TFLOP, with the whole model in memory"
        return replace(chosen, notes=(*chosen.notes, note), memory_bytes=max(memory, needed))

    def _auto(self, seqlen: int) -> PlannedTexts:
        builtin = Share(BUILTIN).sized(self.recipe.nsamples, seqlen)
        known = self._known_builtin(builtin, seqlen)
        if known is not None and known.at_home:
            return PlannedTexts(shares=(builtin,), notes=(f"calib auto is builtin: the model is at home there, {known}",), known=known)
        found = find_general(self.data_dir)
        if found is not None:
            return self._beside_corpus(*found, seqlen)
        own = Share(SELF).sized(self.recipe.nsamples, seqlen)
        obstacle = self._cannot_write(own_tokens((own,), seqlen), unasked=True)
        if obstacle is not None:
            raise UsageError(
                f"calib auto finds no text: no general corpus is on this machine or can be reached, and {obstacle}; "
                "give text of the kind that the model will see with --calib PATH"
            )
        windows = own.windows or 0
        beside = round(windows * BUILTIN_SHARE) if known is not None else 0
        shares = (Share(SELF, windows - beside), Share(BUILTIN, beside)) if beside else (own,)
        note = (
            "calib auto is text that the model writes, as no general corpus is here or can be reached; --calib with text like that which "
        )
        return PlannedTexts(shares=shares, notes=(note + "it will see is better",))

    def _beside_corpus(self, source: str, where: str, seqlen: int) -> PlannedTexts:
        whole = Share(source).sized(self.recipe.nsamples, seqlen)
        own = round((whole.windows or 0) * OWN_SHARE)
        note = f"calib auto is {source}, which is {where}"
        obstacle = self._cannot_write(own * seqlen, unasked=True)
        if obstacle is not None or not own:
            return PlannedTexts(shares=(whole,), notes=(f"{note}, alone: {obstacle}" if obstacle else note,))
        return PlannedTexts(
            shares=(Share(source, (whole.windows or 0) - own), Share(SELF, own)), notes=(f"{note}, and text that the model writes",)
        )

    def _known_builtin(self, share: Share, seqlen: int) -> Familiarity | None:
        """How well the model knows this share of the built-in text, None where this Python carries too little."""
        try:
            windows = self._read(share, seqlen)
        except PTQError:
            return None
        return self._known(windows)

    def _cannot_write(self, tokens: int, unasked: bool = False) -> str | None:
        """Why the model cannot write, or should not unasked."""
        if not self.skeleton.kind.causal:
            return f"the model is no causal language model but {self.skeleton.kind.name}, which writes none"
        needed, free = own_text_bytes(self.skeleton, tokens, self._dtype), free_bytes(self.resources.device)
        if needed > free:
            return f"for the model to write it takes about {needed / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} are free"
        work = self.skeleton.pass_work(tokens)
        if unasked and self.resources.device.type == "cpu" and work > MOST_WORK:
            return f"for the model to write it takes about {work / 1e12:,.0f} TFLOP, hours on a CPU (--calib self does it nevertheless)"
        return None

    # What is made

    def make(self, texts: PlannedTexts, seqlen: int, rehearsal: bool) -> CalibrationSet:
        """Windows of ``seqlen`` tokens of ``texts``; in a rehearsal, those that the model would write left out.

        Raises UsageError and PTQError for texts that cannot be had, that are too short, or that the model writes badly.
        """
        key = (texts.shares, seqlen, rehearsal)
        if key not in self._made:
            self._made[key] = self._make(texts, seqlen, rehearsal)
        return self._made[key]

    def _make(self, texts: PlannedTexts, seqlen: int, rehearsal: bool) -> CalibrationSet:
        read = {share: self._read(share, seqlen) for share in texts.shares if share.source != SELF}
        known = {share: texts.known or self._known(windows) for share, windows in read.items()}
        tokens = 0 if rehearsal else own_tokens(texts.shares, seqlen)
        parts = [read[share] if share in read else self._write(share, seqlen) for share in texts.shares if share in read or tokens]
        windows = joined(parts) if parts else torch.empty(0, seqlen, dtype=torch.long)
        if len(parts) > 1:  # so that every excerpt has some of each
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.recipe.seed))]
        return CalibrationSet(
            windows=windows,
            shares=texts.shares,
            bos=self._bos is not None,
            skipped_rows=self._rows.skipped,
            known=known,
            sampling=Sampling().stored() if tokens else None,
        )

    def _read(self, share: Share, seqlen: int) -> Tensor:
        """Windows of a text that is there; read once."""
        if share not in self._read_before:
            self.progress.phase(f"reading calibration text from {share.source}")
            self._rows.column = None  # that of the text before
            texts = documents(share.source, "calibration", self.data_dir, self._rows)
            try:
                self._read_before[share] = self._windows_of(texts, share.windows or 0, seqlen)
            except UsageError as error:
                raise UsageError(f"{share.source}: {error}") from error
        return self._read_before[share]

    def _windows_of(self, texts: list[str], count: int, seqlen: int) -> Tensor:
        if self.skeleton.kind.causal:
            return calibration_windows(texts, self._tokenizer, count, seqlen, self.recipe.seed, self._bos)
        return padded_windows(texts, self._tokenizer, count, seqlen, self.recipe.seed)

    def _write(self, share: Share, seqlen: int) -> Tensor:
        """Windows of text that the model writes, or has written before."""
        bos = self._bos
        room = seqlen - (bos is not None)
        count, vocabulary = (share.windows or 0) * room, self.skeleton.config.get_text_config().vocab_size
        folder, cache = self.skeleton.source.folder, self.resources.cache
        key = None
        if folder is not None and cache is not None:
            settings = {**Sampling().stored(), "count": count, "seed": self.recipe.seed, "bos": bos, "dtype": str(self._dtype)}
            settings |= {"device": self.resources.device.type, "threads": torch.get_num_threads()}
            key = own_text_cache.fingerprint(folder, settings)
            kept = own_text_cache.load(cache, key, count, vocabulary)
            if kept is not None:
                self.progress.phase("taking the text that the model wrote before")
                return _windows(kept, room, bos)
        self.progress.phase(f"the model writes {count:,} tokens")
        told = partial(self.progress.layer_progress, "writing")
        start = prompts(self._tokenizer, vocabulary, bos)
        device = self.resources.device
        failing = foreign(f"{self.skeleton.where}: the model fails while it writes", "; give a text with --calib")
        with failing, whole(self.skeleton, device, self._dtype) as model:
            tokens = write_tokens(model, self.skeleton.kind, start, count, Sampling(), self.recipe.seed, device, told)
        _check_text(tokens)
        if key is not None and cache is not None:
            own_text_cache.store(cache, key, tokens)
        return _windows(tokens, room, bos)

    def _known(self, windows: Tensor) -> Familiarity | None:
        """How well the model knows ``windows``, None for an encoder, which expects no next word.

        None, too, where its code fails: what is wrong, the run itself will say by name.
        """
        if not self.skeleton.kind.causal:
            return None
        self.progress.phase("measuring whether the model knows the text")
        device = self.resources.device
        try:
            with foreign(self.skeleton.where), walked(self.skeleton, device, self._dtype) as model:
                return familiarity(model, self.skeleton.kind, looked_at(windows, int(windows.numel() * CHECKED_SHARE)).to(device))
        except PTQError:
            return None

    @cached_property
    def _tokenizer(self) -> Any:
        return self.skeleton.source.tokenizer()

    @cached_property
    def _rows(self) -> Rows:
        return Rows(write_chat=chat_writer(self._tokenizer))

    @cached_property
    def _read_before(self) -> dict[Share, Tensor]:
        return {}

    @property
    def _bos(self) -> int | None:
        """The token before each window; an encoder's stand between the marks of its tokenizer."""
        return window_bos(self._tokenizer, self.recipe.bos) if self.skeleton.kind.causal else None

    @property
    def _dtype(self) -> torch.dtype:
        return self.resources.calibration_dtype(self.skeleton.dtype(f"{self.skeleton.linears[0].name}.weight"))


def _windows(tokens: Tensor, room: int, bos: int | None) -> Tensor:
    """Tokens [windows * room] as windows [windows, tokens], each behind ``bos`` where there is one."""
    windows = tokens.view(-1, room)
    return windows if bos is None else torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)


def _check_text(tokens: Tensor) -> None:
    token, times = torch.bincount(tokens).max(0).indices.item(), int(torch.bincount(tokens).max())
    if times > ONE_TOKEN_SHARE * len(tokens):
        raise UsageError(
            f"calib self: the model writes little but token {token} ({times / len(tokens):.0%} of its text), which is no text to calibrate "
            "on; give one with --calib"
        )
