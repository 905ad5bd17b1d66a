"""A corpus of general text that the machine has, or can reach: what ``--calib auto`` looks for.

On the machine first: C4, then the Pile, in the data folder and in the caches (``corpora.py``), then other general data sets in the hub's
cache. Then the hub itself, of which one short request asks for C4's shard; nobody is asked where the hub client is told to be offline.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ptqcli.calibration import corpora, files

GENERAL = ("c4", "pile")
# Text of the web and of books for training on, by repository; the first file of its training part is read.
OTHERS = (
    "HuggingFaceFW/fineweb-edu",
    "HuggingFaceFW/fineweb",
    "cerebras/SlimPajama-627B",
    "DKYoon/SlimPajama-6B",
    "Skylion007/openwebtext",
    "stas/openwebtext-10k",
    "NeelNanda/pile-10k",
)


def find_general(data_dir: Path | None) -> tuple[str, str] | None:
    """(source, where it is) of the first that there is, None for none. Raises UsageError for a data folder that does not exist."""
    for name in GENERAL:
        if corpora.found_here(name, "calibration", data_dir) is not None:
            return name, "on this machine"
    other = next(_others(), None)
    if other is not None:
        return str(other), "in the Hugging Face cache"
    return (GENERAL[0], "on the hub") if corpora.hub_answers(GENERAL[0], "calibration") else None


def _others() -> Iterator[Path]:
    """The files of OTHERS that the hub's cache holds, best first."""
    from huggingface_hub import constants

    for repo in OTHERS:
        snapshots = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "snapshots"
        found = sorted(path for path in snapshots.glob("*/**/*") if files.is_text_file(path.name) and path.suffix not in files.BESIDE)
        yield from [path for path in found if "train" in str(path)][:1] or found[:1]
