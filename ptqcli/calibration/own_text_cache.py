"""Text that a model wrote, kept for the next run: one JSON file a model, tokenizer, way of sampling and number of tokens.

Its name is a hash of everything that the text depends on, so it is never out of date; a file that is damaged, or that somebody else put
there, counts as none and is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.errors import PTQError
from ptqcli.untrusted import read_json

VERSION = 1  # of how text is written; another gives other text


def fingerprint(folder: Path, settings: Mapping[str, Any]) -> str:
    """A hash of ``settings`` and of all files in the model's ``folder``, or the file that it is, each by name, size and time of its last
    change."""
    import transformers

    found = sorted(path for path in (folder.iterdir() if folder.is_dir() else [folder]) if path.is_file())
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    versions = [VERSION, torch.__version__, transformers.__version__]
    return hashlib.sha256(json.dumps([versions, stamps, settings], sort_keys=True).encode()).hexdigest()


def load(cache: Path, key: str, count: int, vocabulary: int) -> Tensor | None:
    """The ``count`` tokens kept under ``key``, int64 [count], or None where there are none that a model of ``vocabulary`` tokens wrote."""
    path = _file(cache, key)
    if not path.is_file():
        return None
    try:
        kept = read_json(path)
    except PTQError:
        return None
    tokens = kept.get("tokens")
    if not isinstance(tokens, list) or len(tokens) != count or not all(type(token) is int and 0 <= token < vocabulary for token in tokens):
        return None
    return torch.tensor(tokens) if kept.get("fingerprint") == key and kept.get("sha256") == _digest(tokens) else None


def store(cache: Path, key: str, tokens: Tensor) -> None:
    """Keep ``tokens`` [count] under ``key``: whole or not at all. Where the folder cannot be written to, nothing is kept."""
    values = tokens.tolist()
    text = json.dumps({"fingerprint": key, "sha256": _digest(values), "tokens": values})
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache, prefix=".", suffix=".tmp", delete=False, encoding="utf-8") as file:
            try:
                file.write(text)
                file.close()
                os.replace(file.name, _file(cache, key))
            except BaseException:
                os.unlink(file.name)
                raise


def _file(cache: Path, key: str) -> Path:
    return cache / f"own-text-{key[:32]}.json"


def _digest(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()
