"""What a plan says of the parts of a model that stay as they are, and of those that its kind does not have."""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.calibration.record import WAY_OUT
from ptqcli.checkpoint.auxiliary import left_out
from ptqcli.errors import UsageError
from ptqcli.formats import Format, LinearSpec, Reader
from ptqcli.model.discovery import listed
from ptqcli.model.skeleton import Skeleton
from ptqcli.recipe import Recipe


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


def known_readers(chosen: Format, specs: Sequence[LinearSpec], skeleton: Skeleton, tried: Sequence[str]) -> tuple[Reader, ...]:
    """How other programs load the result; nothing is known of what servers make of an encoder."""
    readers = chosen.readers(specs, skeleton.loaded_as, tried)
    return tuple(reader for reader in readers if skeleton.kind.causal or reader.name == "transformers")


def check_kind(recipe: Recipe, skeleton: Skeleton) -> None:
    """Raise UsageError for what is asked for and the kind of model does not have."""
    if recipe.finish != "none":
        check_finish(skeleton)
    routed = any(shape.mixtures for shape in skeleton.shapes)
    if not skeleton.kind.causal and routed and recipe.algo != "rtn":
        raise UsageError(f"{skeleton.where}: short texts are padded for an encoder, and its experts would see the padding; {WAY_OUT}")


def check_finish(skeleton: Skeleton) -> None:
    """Raise UsageError for a model whose scales cannot be tuned as a whole."""
    if not skeleton.kind.causal:
        raise UsageError(f"{skeleton.where}: scales are tuned to a model's next-word logits, and the {skeleton.kind.name} has none")
