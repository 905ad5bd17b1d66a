"""The corpora that papers calibrate and measure with: which file of which one, and where it is looked for.

In this order: the data folder that the user names, the cache of the hub client, the cache of prepared data sets that the
``datasets`` library keeps (WikiText-2 only: its name for a C4 shard does not say which shard it is), the hub itself. The hub
client on its own tries six times over 23 seconds before it gives up, so one request goes ahead to learn whether it answers.

Rows of WikiText are as ``datasets`` gives them: every line of the raw file with its newline, blank lines as "". Joined with
blank lines they are the text of the published protocol. Some copies of the raw file have lost their blank lines (the test
split has 4,358 lines, 1,467 of them blank); they are read as they are, but give another number than the published one.

A whole shard of C4 or of the Pile takes more than 1 GB of memory, and calibration needs a small part of it; so only documents from
the front are read. GPTQ's protocol for evaluation on C4 does so too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ptqcli.calibration import files
from ptqcli.calibration.builtin import Part
from ptqcli.errors import PTQError, UsageError

# About 9 million tokens of C4, 30 million of the Pile: thousands of windows of 2,048 tokens.
CALIBRATION_DOCUMENTS = 20_000
C4_EVALUATION_DOCUMENTS = 1_100
HUB_ANSWER_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One part of a known corpus.

    repo, file: dataset repository on the hub and the path in it. local: patterns below the data folder, best first.
    prepared: pattern below the cache of the ``datasets`` library. limit: how many documents are read.
    """

    repo: str
    file: str
    local: tuple[str, ...]
    prepared: str | None = None
    limit: int | None = None


def _wikitext2(split: str) -> CorpusFile:
    return CorpusFile(
        repo="Salesforce/wikitext",
        file=f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet",
        local=(
            f"wiki.{split}.raw",
            f"wikitext-2-raw/wiki.{split}.raw",
            f"wikitext-2-raw-v1/{split}*.parquet",
            f"{split}*.parquet",
        ),
        prepared=f"*wikitext/wikitext-2-raw-v1/*/*/wikitext-{split}.arrow",
    )


def _c4(split: str, shards: str, limit: int) -> CorpusFile:
    shard = f"c4-{split}.00000-of-{shards}"
    local = (f"{shard}.json.gz", f"{shard}.jsonl", f"en/{shard}.json.gz", f"en/{shard}.jsonl")
    return CorpusFile(repo="allenai/c4", file=f"en/{shard}.json.gz", local=local, limit=limit)


_PILE = CorpusFile(
    repo="mit-han-lab/pile-val-backup", file="val.jsonl.zst", local=("val.jsonl.zst", "val.jsonl"), limit=CALIBRATION_DOCUMENTS
)

CORPORA: dict[str, dict[Part, CorpusFile]] = {
    "wikitext2": {"calibration": _wikitext2("train"), "evaluation": _wikitext2("test")},
    "c4": {
        "calibration": _c4("train", "01024", CALIBRATION_DOCUMENTS),
        "evaluation": _c4("validation", "00008", C4_EVALUATION_DOCUMENTS),
    },
    "pile": {"calibration": _PILE},
}


def read_corpus(name: str, part: Part, data_dir: Path | None) -> list[str]:
    """The documents of one part of a known corpus; WikiText-2 is one document, its rows joined with blank lines.

    Raises UsageError for a part that the corpus lacks or a data folder that does not exist; PTQError where the text is found
    nowhere, saying how to get it, or cannot be read.
    """
    wanted = CORPORA[name].get(part)
    if wanted is None:
        others = ", ".join(other for other, parts in CORPORA.items() if part in parts)
        raise UsageError(f"{name} has no {part} text; use builtin, {others} or a path")
    path = found_here(name, part, data_dir) or _from_hub(name, part, data_dir)
    texts = files.read_file(path, wanted.limit)
    return ["\n\n".join(texts)] if name == "wikitext2" else texts


def found_here(name: str, part: Part, data_dir: Path | None) -> Path | None:
    """The file of a part of a known corpus that this machine has, or None. Raises UsageError for a data folder that does not exist."""
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"data folder {data_dir} does not exist; correct --data-dir or PTQ_DATA_DIR")
    wanted = CORPORA[name][part]
    return _in_data_dir(wanted, data_dir) or _in_hub_cache(wanted) or _in_datasets_cache(wanted)


def hub_answers(name: str, part: Part) -> bool:
    """Whether the hub has the file: one short request, and none where the hub client is told to be offline."""
    from huggingface_hub import errors

    transport_error = errors.HTTPError  # type: ignore[attr-defined]
    try:
        _ask_hub(CORPORA[name][part])
    except (OSError, transport_error):
        return False
    return True


def _ask_hub(wanted: CorpusFile) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(wanted.repo, wanted.file, repo_type="dataset"), timeout=HUB_ANSWER_SECONDS)


def _in_data_dir(wanted: CorpusFile, data_dir: Path | None) -> Path | None:
    if data_dir is None:
        return None
    return next((path for pattern in wanted.local for path in sorted(data_dir.glob(pattern))), None)


def _in_hub_cache(wanted: CorpusFile) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(wanted.repo, wanted.file, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _in_datasets_cache(wanted: CorpusFile) -> Path | None:
    if wanted.prepared is None:
        return None
    from datasets import config

    return next(iter(sorted(Path(config.HF_DATASETS_CACHE).glob(wanted.prepared))), None)


def _from_hub(name: str, part: Part, data_dir: Path | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    wanted = CORPORA[name][part]
    # Errors of the connection: httpx's class in version 1 of the hub client, httpx2's since.
    transport_error = errors.HTTPError  # type: ignore[attr-defined]
    try:
        _ask_hub(wanted)
        return Path(hf_hub_download(wanted.repo, wanted.file, repo_type="dataset"))
    except (OSError, transport_error) as error:
        # The hub client's own message for this case is three lines long.
        reason = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else files.first_line(error)
        raise PTQError(
            f"the {part} text of {name} is not in {_places_searched(name, part, data_dir)}, "
            f"and the hub did not give it ({reason}); "
            f"put {wanted.local[0]} into a folder and name that by --data-dir or PTQ_DATA_DIR, "
            f"or run: hf download {wanted.repo} {wanted.file} --repo-type dataset"
        ) from error


def _places_searched(name: str, part: Part, data_dir: Path | None) -> str:
    if data_dir is None:
        return "the Hugging Face cache"
    others = [other for other, file in CORPORA[name].items() if other != part and _in_data_dir(file, data_dir)]
    only = f" (which has only its {others[0]} text)" if others else ""
    return f"{data_dir}{only} or the Hugging Face cache"
