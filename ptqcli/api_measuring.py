"""Of what a program imports from ``ptqcli``, what says how good a model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ptqcli.arguments import as_path, check_argument
from ptqcli.calibration.bos import window_bos
from ptqcli.calibration.text import evaluation_ids
from ptqcli.comparing.results import Compared
from ptqcli.comparing.run import Settings, common_source, compare_checkpoints
from ptqcli.errors import UsageError
from ptqcli.evaluation.encoders import EncoderEvaluation, measured_encoder
from ptqcli.evaluation.measure import Evaluation, measure
from ptqcli.model.config import load_config
from ptqcli.model.kinds import is_encoder
from ptqcli.model.locate import find_model
from ptqcli.pipeline.report import read_source
from ptqcli.resources import open_device
from ptqcli.runtime.models import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: str | Path | PreTrainedModel,
    texts: str | Path | Sequence[str | Path] = "builtin",
    *,
    baseline: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    device: str | torch.device = "cpu",
    kernel: str = "auto",
    adapter: str | Path | bool = False,
    data_dir: str | Path | None = None,
) -> list[Evaluation] | list[EncoderEvaluation]:
    """How good ``model`` is on each of ``texts``: perplexity and, beside a baseline, KL divergence and agreement of the likeliest token;
    of an encoder masked perplexity and the cosine of embeddings, see ``evaluation.encoders``.

    model: a checkpoint folder, any model folder or hub id, or a model in memory, which then needs ``tokenizer``.
    texts: builtin, wikitext2, c4 or a path; one or several.
    baseline: what it is compared with; None for the model that the checkpoint was made from, if that is still there.
    tokenizer: of a model in memory; a folder has its own.
    seqlen, stride: tokens in a window and from one to the next, see ``evaluation.windows``.
    bos: whether every window begins with the beginning-of-sequence token: yes, no, or auto, which is what the tokenizer does.
    device: where folders are loaded; a model in memory stays where it is.
    kernel, adapter: what packed weights are multiplied by, and what is added to them, see ``load_quantized``.
    data_dir: where files of known corpora are looked for first.

    Raises UsageError and PTQError for what cannot be loaded, read or measured.
    """
    for name, number in (("seqlen", seqlen), ("stride", stride)):
        check_argument(number, name, int, optional=True)
    sources = [texts] if isinstance(texts, (str, Path)) else texts
    check_argument(sources, "texts", str, Path, Sequence)
    for source in sources:
        check_argument(source, "a text", str, Path)
    searched = None if data_dir is None else as_path(data_dir, "data_dir")
    folder = find_model(str(model)) if isinstance(model, (str, Path)) else None
    for given in (model, baseline):
        if not isinstance(given, (str, Path)) and (given is not None or given is model):
            check_model(given)
    if baseline is None and folder is not None:
        origin = read_source(folder)
        baseline = origin if origin is not None and origin.exists() else None
    if folder is not None:
        refuse_tokenizer(tokenizer)
        tokenizer = load_tokenizer(folder)
    elif adapter is not False:
        raise UsageError("adapter belongs to a checkpoint folder; a model in memory has it added by whoever loads it")
    elif tokenizer is None:
        raise UsageError("a model in memory is evaluated with its tokenizer; give tokenizer=")
    place = open_device(device)
    causal = not is_encoder(model.config if folder is None else load_config(folder))  # type: ignore[union-attr]
    begin, names = window_bos(tokenizer, bos), list(map(str, sources))
    # A text that is not there is told before models are loaded.
    rows = {name: evaluation_ids(name, tokenizer, searched) for name in names} if causal else {}
    loaded = model if folder is None else load_model(folder, place, kernel, adapter)
    original = load_model(find_model(str(baseline)), place) if isinstance(baseline, (str, Path)) else baseline
    if not causal:
        return measured_encoder(loaded, names, tokenizer, seqlen, original, searched)
    return list(measure(loaded, rows, original, seqlen, stride, bos=begin))


def compare(
    checkpoints: Sequence[str | Path],
    texts: str | Path | Sequence[str | Path] | None = None,
    *,
    baseline: str | Path | None = None,
    tokens: int | None = None,
    seqlen: int | None = None,
    stride: int | None = None,
    bos: str = "auto",
    speed: bool = False,
    device: str | torch.device = "cpu",
    kernel: str = "auto",
    data_dir: str | Path | None = None,
) -> Compared:
    """Several ``checkpoints`` on the same tokens, beside the model that they came from, as `ptq compare` does; one at a time is in memory.

    checkpoints: folders, GGUF files or hub ids, each called in the result what it is called here.
    texts: as in ``evaluate``; None for builtin, and those of wikitext2 and c4 that this machine has.
    baseline: what they are compared with; None for the model that their reports name.
    tokens: of each text, from its front; None for all of it, and for 131,072 where no text is named.
    seqlen, stride, bos, device, kernel, data_dir: as in ``evaluate``.
    speed: whether tokens a second are measured, too.

    What failed is among the ``failures`` of the result, unless only one checkpoint is asked for. Its ``to_json()`` is what
    ``comparing.page.as_page`` makes a page of.
    Raises UsageError for a request that cannot work and PTQError for a baseline or a text that cannot be read.
    """
    check_argument(checkpoints, "checkpoints", Sequence)
    for name, number in (("tokens", tokens), ("seqlen", seqlen), ("stride", stride)):
        check_argument(number, name, int, optional=True)
    check_argument(speed, "speed", bool)
    sources = [texts] if isinstance(texts, (str, Path)) else texts
    folders = {str(name): find_model(str(as_path(name, "a checkpoint"))) for name in checkpoints}
    if isinstance(checkpoints, str) or not folders:
        raise UsageError("checkpoints are a list of folders; give one or more")
    reference = common_source(folders) if baseline is None else find_model(str(as_path(baseline, "baseline")))
    if reference is None or not reference.exists():
        raise UsageError(f"{next(iter(folders))}: which model it came from is not known, or it is gone; name it with baseline=")
    settings = Settings(
        texts=None if sources is None else list(map(str, sources)),
        tokens=tokens,
        seqlen=seqlen,
        stride=stride,
        bos=bos,
        data_dir=None if data_dir is None else as_path(data_dir, "data_dir"),
        device=open_device(device),
        kernel=kernel,
        speed=speed,
    )
    return compare_checkpoints(folders, reference, settings)


def check_model(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"a model is a folder, a hub id or a model of transformers, not {type(model).__name__}")


def refuse_tokenizer(tokenizer: Any) -> None:
    if tokenizer is not None:
        raise UsageError("tokenizer belongs to a model in memory; a folder has its own")
