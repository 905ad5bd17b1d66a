"""The checkpoint while it grows: the finished tensors of one unit after the other, then the files that make the folder a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ptqcli.adapters.files import adapter_files
from ptqcli.checkpoint.auxiliary import ADAPTER, auxiliary_files, belongs_to_a_checkpoint, copy_auxiliary_files, is_licence
from ptqcli.checkpoint.checksums import write_checksums
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import INDEX_FILE, SafetensorsFolder
from ptqcli.checkpoint.writer import DEFAULT_SHARD_BYTES, CheckpointWriter, write_json
from ptqcli.formats import Parts
from ptqcli.formats.packed_checkpoint import check_schemes, open_checkpoint
from ptqcli.model.skeleton import Unit
from ptqcli.pipeline.card import CARD_NAME, model_card
from ptqcli.pipeline.loaded import Run
from ptqcli.pipeline.report import REPORT_NAME, Report

# Of tensors that are only carried over, so many bytes are in memory at once, or the largest of them.
CARRIED_BYTES = 1 << 30


class WrittenUnits:
    """What a run has written into ``folder``."""

    def __init__(self, run: Run, folder: Directory) -> None:
        self._run, self._folder = run, folder
        limit = run.resources.max_shard_bytes
        self._writer = CheckpointWriter(folder, DEFAULT_SHARD_BYTES if limit is None else limit, known=folder.made)
        self._assembled: int | None = None

    @property
    def bytes(self) -> int:
        """Of all tensors so far."""
        return sum(size for _, sizes in self.shards for size in sizes.values()) if self._assembled is None else self._assembled

    @property
    def shards(self) -> list[tuple[str, dict[str, int]]]:
        """Every finished file and the bytes of each tensor in it."""
        return self._writer.shards

    def restore(self, shards: Sequence[tuple[str, dict[str, int]]]) -> None:
        """Go on behind what an earlier run has written."""
        self._writer.restore(shards)

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Store the finished tensors of one unit, by their stored names. Raises PTQError if the model's files have changed meanwhile."""
        self._run.skeleton.source.check_unchanged()
        self._writer.write(tensors)

    def carry_over(self, unit: Unit, packed: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store the tensors of ``unit`` as the model has them, or what is ``packed`` in the place of some, and release them."""
        skeleton = self._run.skeleton
        for names in self._pieces(unit):
            stored = (packed[name] if name in packed else {name: skeleton.read_stored(name)} for name in names)
            self.write({name: tensor for tensors in stored for name, tensor in tensors.items()})
            skeleton.release(Unit(unit.name, names))

    def _pieces(self, unit: Unit) -> Iterator[tuple[str, ...]]:
        piece: list[str] = []
        size = 0
        for name in unit.stored:
            added = self._run.skeleton.unit_bytes(Unit(unit.name, (name,)))
            if piece and size + added > CARRIED_BYTES:
                yield tuple(piece)
                piece, size = [], 0
            piece.append(name)
            size += added
        if piece:
            yield tuple(piece)

    def finish_tensors(self, joined: Callable[[], None], changing: Callable[[], None]) -> None:
        """Give the shards their names and write what a reader needs beside them.

        joined: see ``CheckpointWriter.finish``. changing: is called before the shards go, where one file takes their place.
        """
        shards = self._writer.finish(joined)
        if self._run.format.one_file:
            self._assemble([path.name for path in shards], changing)
            return
        self._run.skeleton.source.write_auxiliary(self._folder)
        for file, entries in self._described().items():
            write_json(self._folder, file, entries)

    def _assemble(self, shards: Sequence[str], changing: Callable[[], None]) -> None:
        """Make one file of the shards, which then go."""
        run, folder = self._run, self._folder
        run.progress.phase(f"writing all tensors to one {run.format.name} file")
        source = run.skeleton.source
        parts = Parts(
            folder=folder.path,
            tensors=SafetensorsFolder(folder.path),
            config=run.skeleton.config,
            tokenizer=source.tokenizer,
            mix=run.plan.recipe.mix,
        )
        assembly = run.format.assemble(parts)
        assert assembly is not None
        tell = run.progress.step
        folder.write(f"{assembly.name}.tmp", assembly.pieces(lambda name, number, count: tell(number + 1, count, name)))
        folder.rename(f"{assembly.name}.tmp", assembly.name)
        self._assembled = assembly.nbytes
        changing()
        for shard in (*shards, INDEX_FILE):
            folder.remove(shard)
        if source.folder is not None and source.folder.is_dir():
            copy_auxiliary_files(source.folder, [name for name in auxiliary_files(source.folder) if is_licence(name)], folder)

    def finish(self, report: Report) -> Report:
        """Write what is left, behind ``finish_tensors``; then read it all as it lies on the disk.

        Gives the report with the names of the files. Raises PTQError if that is not what was written, if a reader would refuse it, or if
        the model's files have changed meanwhile.
        """
        source, folder = self._run.skeleton.source, self._folder
        self._run.progress.phase("comparing the checkpoint on the disk with what was written")
        if self._run.adapters:
            transposed = any(linear.site.transposed for linear in self._run.plan.linears)
            for file, pieces in adapter_files(self._run.adapters, transposed):
                folder.write(f"{ADAPTER}/{file}", pieces)
        write_checksums(folder)
        report = replace(report, files=[name for name in folder.made_names() if belongs_to_a_checkpoint(name)])
        write_json(folder, REPORT_NAME, report.stored())
        folder.write(CARD_NAME, [model_card(self._run.plan, report, source.folder).encode()])
        folder.check()
        check_schemes(open_checkpoint(folder.path), {linear.name: linear.scheme for linear in self._run.plan.linears})
        source.check_unchanged()
        return report

    def _described(self) -> dict[str, dict[str, Any]]:
        """File name -> its JSON: the model's own config.json and what the format adds, there and elsewhere."""
        plan = self._run.plan
        added = self._run.format.describe([linear.spec for linear in plan.linears], plan.plain)
        return {**added, "config.json": {**self._run.skeleton.source.config_json(), **added.get("config.json", {})}}
