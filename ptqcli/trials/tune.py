"""The search for the cheapest recipe that keeps a goal: trials until a strategy is through, or its budget."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers

import ptqcli
from ptqcli.calibration.sources import read_calib
from ptqcli.calibration.text import source_path
from ptqcli.errors import MachineError, PTQError, UsageError
from ptqcli.formats.sources import open_source
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.memory import return_freed_memory
from ptqcli.pipeline.output import check_output
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.prepare import plan_run
from ptqcli.pipeline.progress import NoProgress, Progress
from ptqcli.plan import Plan
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.trials.goal import Goal
from ptqcli.trials.mixtures import Group, groups_of, overrides
from ptqcli.trials.space import Candidate, Point
from ptqcli.trials.strategies import STRATEGIES, BudgetSpent
from ptqcli.trials.traces import traces
from ptqcli.trials.trial import Examination, Examiner, Trial
from ptqcli.trials.workshop import Workshop

MOST_TRIALS = 12


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is searched for and how.

    start, flags: what all recipes have, as in ``recipe_loading.load_recipe``. points: of the space. strategy: of ``STRATEGIES``.
    trials, seconds: the budget; None for no end of time. seed: of whatever the strategy draws. keep: leave all checkpoints.
    """

    goal: Goal
    points: Sequence[Point]
    start: Path | Recipe | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    strategy: str = "mse"
    trials: int = MOST_TRIALS
    seconds: float | None = None
    seed: int = 0
    keep: bool = False
    examination: Examination = field(default_factory=Examination)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise UsageError(f"strategy {self.strategy!r} is unknown; use {', '.join(STRATEGIES)}")
        if self.trials < 1:
            raise UsageError(f"--max-trials {self.trials}: allows no trial; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """How a search ended. best: the trial whose checkpoint is at ``output``. trials: all, in order. spent: why it ended, where that was its
    budget; "" where the strategy was through."""

    output: str
    goal: str
    strategy: str
    best: Trial
    trials: list[Trial]
    left_out: list[str]
    spent: str

    @property
    def holds(self) -> bool:
        """Whether the best one keeps the goal."""
        return self.best.holds

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {**asdict(self), "holds": self.holds}


class TrialProgress(Progress, Protocol):
    """Who wants to know how far a search is: of each run in it, and of trials."""

    def trial_begun(self, number: int, most: int, words: str) -> None:
        """Trial ``number``, from 1 on, of at most so many begins."""

    def measuring(self, text: str, done: int, total: int) -> None:
        """``done`` of ``total`` windows of a text are behind us."""

    def trial_done(self, number: int, trial: Trial, known: bool) -> None:
        """What came out; known: an earlier run of the search had done it."""


class NoTrialProgress(NoProgress):
    """One that ignores everything."""

    def trial_begun(self, number: int, most: int, words: str) -> None:
        pass

    def measuring(self, text: str, done: int, total: int) -> None:
        pass

    def trial_done(self, number: int, trial: Trial, known: bool) -> None:
        pass


def tune(
    model: Path,
    output: Path,
    request: Request,
    *,
    allow_requantize: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    resources: Resources | None = None,
    data_dir: Path | None = None,
    progress: TrialProgress | None = None,
) -> Tuned:
    """Find the smallest checkpoint of ``model`` that keeps the goal, and put it into ``output``; where none does, the nearest one.

    A search that was ended goes on with the same request, unless ``restart``.
    Raises UsageError for a request that cannot work and PTQError for work that failed; ``output`` is then as it was, and the trials are
    kept beside it.
    """
    progress, resources = progress or NoTrialProgress(), resources or Resources()
    with closing(Workshop(output, _asked(model, request, resources, data_dir), restart)) as workshop:
        if not workshop.is_placed:
            check_output(output, model, overwrite)
        search = _Search(model, request, workshop, allow_requantize, overwrite, resources, data_dir, progress)
        try:
            spent = search.through()
            best = search.finish()
        except KeyboardInterrupt as interruption:
            kept = f"{len(workshop.record.trials)} trials, and what is finished of the next, are kept in {workshop.path}"
            raise KeyboardInterrupt(f"{kept}: the same command goes on from there, with --restart it begins anew") from interruption
        trials = list(workshop.record.trials.values())
    return Tuned(
        output=str(output),
        goal=request.goal.words(),
        strategy=request.strategy,
        best=best,
        trials=trials,
        left_out=search.left_out,
        spent=spent,
    )


def _asked(model: Path, request: Request, resources: Resources, data_dir: Path | None) -> dict[str, Any]:
    """All that the numbers depend on, by the words in which a person knows it; neither budget is among them."""
    files = sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else [model]
    return {
        "model": str(model.resolve()),
        **{f"model file {path.name}": [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "goal": request.goal.words(),
        "strategy": request.strategy,
        "seed": request.seed,
        "recipes": [point.words for point in request.points],
        "start": str(request.start),
        **{f"flag {key}": str(value) for key, value in request.flags.items()},
        **{f"measuring: {key}": str(value) for key, value in asdict(request.examination).items()},
        **{f"text {path}": [path.stat().st_size, path.stat().st_mtime_ns] for path in _texts(request)},
        "data folder": str(data_dir),
        "batch size": resources.batch_size,
        "dtype": str(resources.dtype),
        "device": resources.device.type,
        "versions": f"ptqcli {ptqcli.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _texts(request: Request) -> list[Path]:
    """The files and folders of text that are named."""
    named = [share.source for share in read_calib(str(request.flags.get("calib", "auto")))]
    paths = [source_path(name) for name in (*named, *request.examination.texts)]
    return [path for path in paths if path is not None and path.exists()]


class _Search:
    """See ``strategies.Search``."""

    def __init__(
        self,
        model: Path,
        request: Request,
        workshop: Workshop,
        allow_requantize: bool,
        overwrite: bool,
        resources: Resources,
        data_dir: Path | None,
        progress: TrialProgress,
    ) -> None:
        self.model, self.request, self.workshop, self.resources, self.data_dir = model, request, workshop, resources, data_dir
        self.source = open_source(model, allow_requantize=True) if allow_requantize else model
        self.overwrite = overwrite
        self.progress, self.seed, self.left_out = progress, request.seed, list[str]()
        self.examiner = Examiner(model, request.goal, request.examination, resources)
        self._recipes: dict[str, Recipe] = {}
        self._plans: dict[str, tuple[Skeleton, Plan]] = {}
        self._told: set[str] = set()
        self._done = 0  # trials that this search has asked for
        self._spent = 0.0  # seconds that these have taken, in whatever run of it
        self._longest = 0.0
        self.candidates: Sequence[Candidate] = self._space()

    def _space(self) -> list[Candidate]:
        """The recipes of the space that can work, from the smallest on. Raises UsageError if none can."""
        load_recipe(self.request.start)  # a file that is wrong is wrong for all of them
        found: dict[str, Candidate] = {}
        for point in self.request.points:
            try:
                planned = self._planned(self._recipe(point.changes), point.words)
            except UsageError as error:
                self.left_out.append(f"{point.words}: {error}")
                continue
            found.setdefault(planned.key, planned)
        if not found:
            raise UsageError(f"none of {len(self.request.points)} recipes can work; the first: {self.left_out[0]}")
        for words in self.left_out:
            self.progress.remark(f"left out, {words}")
        return sorted(found.values(), key=lambda candidate: candidate.bytes)  # stable: in the order of the space among equals

    def _recipe(self, changes: Mapping[str, Any]) -> Recipe:
        return load_recipe(self.request.start, {**self.request.flags, **changes})

    def _planned(self, recipe: Recipe, words: str) -> Candidate:
        _, plan = plan_run(self.source, recipe, self.resources)
        planned = Candidate(recipe, words, plan.bytes_after)
        self._recipes[planned.key] = recipe
        return planned

    def _plan(self, candidate: Candidate) -> tuple[Skeleton, Plan]:
        """Of one between which and another mixtures are made."""
        if candidate.key not in self._plans:
            self._plans[candidate.key] = plan_run(self.source, candidate.recipe, self.resources)
        return self._plans[candidate.key]

    # What strategies ask for

    def run(self, candidate: Candidate) -> Trial:
        """See ``strategies.Search``."""
        known = self.workshop.record.trials.get(candidate.key)
        asked_before = candidate.key in self._told
        if asked_before and known is not None:
            return known
        if known is not None and known.error is not None:
            known = None  # it failed in an earlier run, and what was wrong may be mended
        self._check_budget(known)
        self._done += 1
        self._told.add(candidate.key)
        trial = known or self._tried(candidate)
        self._spent += trial.seconds
        self._longest = max(self._longest, trial.seconds)
        self.progress.trial_done(self._done, trial, known is not None)
        return trial

    def _check_budget(self, known: Trial | None) -> None:
        if self._done >= self.request.trials:
            raise BudgetSpent(f"{self.request.trials} trials are done (--max-trials)")
        most = self.request.seconds
        if most is not None and known is None and self._done and self._spent + self._longest > most:
            raise BudgetSpent(f"the next trial may end behind the {most:.0f} seconds that are allowed (--max-time)")

    def _tried(self, candidate: Candidate) -> Trial:
        check_output(self.workshop.output, self.model, self.overwrite)  # the result of a search that ended may lie there
        self.progress.trial_begun(self._done, self.request.trials, candidate.words)
        start, key = time.perf_counter(), candidate.key
        path = self.workshop.checkpoint(key)
        if path.exists():  # finished by a run that was ended before it was measured: of the same request, but let it be the same bytes
            self.workshop.remove(key)
            path = self.workshop.checkpoint(key)
        trial = Trial(key=key, words=candidate.words, bytes=candidate.bytes, bits_per_weight=None, excess=None, seconds=0)
        try:
            report = quantize(self.source, candidate.recipe, path, resources=self.resources, data_dir=self.data_dir, progress=self.progress)
            return_freed_memory()
            errors = {layer.name: layer.relative_error for layer in report.layers}
            trial = replace(trial, bytes=report.bytes_after, bits_per_weight=report.bits_per_weight, errors=errors)
            measured = self.examiner.measure(path, self.progress.measuring)
            return_freed_memory()
            excess = self.request.goal.excess(measured)
            trial = replace(trial, measured=asdict(measured), excess=excess if math.isfinite(excess) else None)
        except (MachineError, UsageError):
            raise
        except PTQError as error:
            trial = replace(trial, error=str(error))
        trial = replace(trial, seconds=time.perf_counter() - start)
        self.workshop.add(trial)
        if not self.request.keep:
            best = self.best()
            self.workshop.keep_only(None if best is None else best.key)
        return trial

    def smaller(self, candidate: Candidate) -> bool:
        """See ``strategies.Search``."""
        return all(candidate.bytes < trial.bytes for trial in self._own() if trial.holds)

    def _own(self) -> list[Trial]:
        """The trials that this search has asked for."""
        return [trial for trial in self.workshop.record.trials.values() if trial.key in self._told]

    def best(self) -> Trial | None:
        """The smallest that keeps the goal, or else the nearest to it; the first of several."""
        done = [trial for trial in self._own() if trial.error is None]
        holding = [trial for trial in done if trial.holds]
        if holding:
            return min(holding, key=lambda trial: (trial.bytes, trial.distance))
        return min(done, key=lambda trial: trial.distance, default=None)

    def groups(self, low: Candidate) -> list[Group]:
        """See ``strategies.Search``."""
        skeleton, plan = self._plan(low)
        return groups_of(plan, skeleton)

    def mixture(self, low: Candidate, high: Candidate | None, raised: Sequence[Group]) -> Candidate | None:
        """See ``strategies.Search``. Between two recipes the solver is that of the larger one, which kept the goal."""
        base = high or low
        names = {name for group in raised for name in group.linears}
        lowered = [group for group in self.groups(low) if not names & set(group.linears)]
        scheme = "16 bit" if high is None else high.words
        words = f"{low.words}, {len(raised)} of {len(raised) + len(lowered)} groups {scheme}"
        try:
            if base.recipe.mix is not None:
                raise UsageError(f"format {base.recipe.format} chooses the type of each linear")
            made = overrides(raised, {}) if high is None else overrides(lowered, self._schemes(low))
            recipe = replace(base.recipe, overrides=(*base.recipe.overrides, *made))
            return self._planned(recipe, words)
        except UsageError as error:
            told = f"{low.words} cannot be mixed with {scheme}: {error}"
            if told not in self.left_out:
                self.left_out.append(told)
                self.progress.remark(told)
            return None

    def _schemes(self, candidate: Candidate) -> dict[str, Scheme]:
        return {linear.name: linear.scheme for linear in self._plan(candidate)[1].linears}

    def traces(self, low: Candidate) -> Mapping[str, float]:
        """See ``strategies.Search``."""
        skeleton, plan = self._plan(low)
        return traces(plan, skeleton, self.resources, self.data_dir, self.progress)

    # The end

    def through(self) -> str:
        """Follow the strategy; why it was not followed to its end, "" if it was."""
        try:
            STRATEGIES[self.request.strategy](self)
        except BudgetSpent as spent:
            return str(spent)
        return ""

    def finish(self) -> Trial:
        """Put the best checkpoint into its place. Raises PTQError if no trial gave one."""
        best = self.best()
        if best is None:
            failed = self._own()[-1]
            raise PTQError(f"no trial gave a checkpoint that can be measured; the last one ({failed.words}): {failed.error}")
        if self.workshop.is_placed and self.workshop.record.placed_key == best.key:
            if not self.request.keep:
                self.workshop.keep_only(None)
            return best
        path = self.workshop.checkpoint(best.key)
        if not path.exists():  # it was not the best when a run was ended that knew less; the same bytes again
            recipe = self._recipes[best.key]
            quantize(self.source, recipe, path, resources=self.resources, data_dir=self.data_dir, progress=self.progress)
        self.workshop.place(best.key, self.model, self.overwrite)
        if not self.request.keep:
            self.workshop.keep_only(None)
        return best
