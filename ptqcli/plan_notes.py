"""What a plan says of the parts of a model that stay as they are, and of those that its kind does not have."""

from __future__ import annotations

from ptqcli.checkpoint.auxiliary import left_out
from ptqcli.errors import UsageError
from ptqcli.model.discovery import listed
from ptqcli.model.skeleton import Skeleton


def kept_notes(skeleton: Skeleton) -> list[str]:
    """Files that do not go along, and parameters of the blocks that are more than a row and belong to no linear."""
    notes, folder = [], skeleton.source.folder
    left = left_out(folder) if folder is not None and folder.is_dir() else []
    if left:
        notes.append(f"files that do not go along, as no reader of the result knows them by their names: {listed(left)}")
    others = [name for name in skeleton.other_parameters if name not in skeleton.stacks]
    if others:
        notes.append(f"parameters of the blocks that belong to no linear stay as they are: {listed(others)}")
    return notes


def check_finish(skeleton: Skeleton) -> None:
    """Raise UsageError for a model whose scales cannot be tuned as a whole."""
    if not skeleton.kind.causal:
        raise UsageError(f"{skeleton.where}: scales are tuned to a model's next-word logits, and the {skeleton.kind.name} has none")
