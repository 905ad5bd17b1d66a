"""A checkpoint folder on the hub: what belongs to it, in one commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqcli.checkpoint.auxiliary import auxiliary_files, belongs_to_a_checkpoint, is_folder_of_a_checkpoint
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.model.locate import HUB_ID
from ptqcli.pipeline.report import REPORT_NAME, folder_of, read_report
from ptqcli.untrusted import foreign

# What the hub puts into a new repository by itself.
FRESH = {".gitattributes"}


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What goes to the hub. files: by name, with their sizes. left_out: what lies in the folder and belongs to no checkpoint."""

    folder: Path
    repo: str
    files: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())


def plan_publication(checkpoint: Path, repo: str) -> Publication:
    """What of the folder of ``checkpoint`` would go to the repository ``repo``, or that file alone if there is nothing of ours around it.

    Raises PTQError or UsageError for what is no whole checkpoint.
    """
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"{repo}: is no name of a repository; write owner/name")
    open_checkpoint(checkpoint)
    folder = folder_of(checkpoint)
    if folder.is_file():
        return Publication(folder=folder.parent, repo=repo, files={folder.name: folder.stat().st_size}, left_out=())
    auxiliary_files(folder)  # refuses links that lead out of the folder
    found = {name: folder / name for name in _names(folder)}
    wanted = {name for name in found if (belongs_to_a_checkpoint(name) and not name.endswith(".tmp")) or name == REPORT_NAME}
    outside = next((name for name in sorted(wanted) if not found[name].resolve().is_relative_to(folder.resolve())), None)
    if outside is not None and folder.resolve().parent.name != "snapshots":
        raise PTQError(f"{folder / outside}: is a link that leads out of the folder; put the file itself there")
    return Publication(
        folder=folder,
        repo=repo,
        files={name: found[name].stat().st_size for name in sorted(wanted)},
        left_out=tuple(sorted(found.keys() - wanted)),
    )


def publish(
    publication: Publication,
    *,
    private: bool,
    overwrite: bool,
    message: str | None = None,
    on_phase: Callable[[str], None] = lambda _: None,
) -> str:
    """Make the repository if there is none, put the files into it in one commit, and return its address.

    Raises UsageError for a repository that holds something already, unless it is to be overwritten, and PTQError where the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repo = HfApi(library_name="ptqcli"), publication.repo
    with foreign(f"{repo}: the hub does not take it", "; log in with `hf auth login`, or set HF_TOKEN, if you have not"):
        on_phase(f"making sure of the repository {repo}")
        address = api.create_repo(repo, private=private, exist_ok=True)
        present = [name for name in api.list_repo_files(repo) if name not in FRESH]
        if present and not overwrite:
            raise UsageError(f"{repo}: holds {present[0]} already; name another repository, or add a commit to this one with --overwrite")
        on_phase(f"sending {len(publication.files)} files")
        adds = [CommitOperationAdd(name, _content(publication.folder, name)) for name in publication.files]
        api.create_commit(repo, adds, commit_message=message or "A quantized checkpoint, written by ptqcli")
    return str(address)


def _names(folder: Path) -> list[str]:
    places = (folder, *(path for path in folder.iterdir() if path.is_dir() and is_folder_of_a_checkpoint(path.name)))
    return sorted(str(path.relative_to(folder)) for place in places if place.is_dir() for path in place.iterdir() if path.is_file())


def _content(folder: Path, name: str) -> Any:
    """The file's path; of the report its text, without the path of the original on this machine."""
    report = read_report(folder) if name == REPORT_NAME else None
    if report is None:
        return folder / name
    source = report["source"]
    calib = report["recipe"].get("calib")
    kept = {**report, "source": None if source is None else Path(source).name}
    if isinstance(calib, str):
        kept["recipe"] = {**report["recipe"], "calib": ",".join(Path(part).name for part in calib.split(","))}
    return (json.dumps(kept, indent=2) + "\n").encode()
