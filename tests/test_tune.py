"""Tuning to a goal: strategies on invented losses beside brute force, and searches on a tiny model, ended and gone on from."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from commandline import Ptq, one_line
from test_encoders import make_encoder, write_rows
from tiny import make_model, write_text

import ptqcli
from ptqcli.cli import tune as command
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.locate import demo_model
from ptqcli.pipeline.prepare import plan_run
from ptqcli.pipeline.progress import NoProgress
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.trials import strategies
from ptqcli.trials.goal import Goal, Measured, TaskGoal, read_share, read_tasks
from ptqcli.trials.mixtures import Group
from ptqcli.trials.space import USUAL, Candidate, Point, read_space
from ptqcli.trials.traces import traces
from ptqcli.trials.trial import USUAL_TOKENS, Examination, Examiner, Trial
from ptqcli.trials.tune import MOST_TRIALS, NoTrialProgress, Request, tune
from ptqcli.trials.workshop import RECORD, Workshop


def measured(**losses: Any) -> Measured:
    return Measured(**{"rise": {}, "kl": {}, "perplexity": {}, "scores": {}, **losses})


# Goals


def test_the_excess_is_the_worst_of_all_losses() -> None:
    goal = Goal(max_rise=0.02, max_kl=0.1)
    assert goal.excess(measured(rise={"a": 0.01, "b": 0.03}, kl={"a": 0.02, "b": 0.05})) == pytest.approx(1.5)
    assert goal.excess(measured(rise={"a": -0.01}, kl={"a": 0.04})) == pytest.approx(0.4)
    assert goal.excess(measured(rise={"a": math.nan}, kl={"a": 0.04})) == math.inf


def test_a_score_counts_by_the_errors_beside_those_that_are_allowed() -> None:
    goal = Goal(tasks=(TaskGoal(task="t", metric="accuracy", least=0.8),))
    assert goal.excess(measured(scores={"t:accuracy": 0.8})) == pytest.approx(1)
    assert goal.excess(measured(scores={"t:accuracy": 0.6})) == pytest.approx(2)
    perfect = Goal(tasks=(TaskGoal(task="t", metric="accuracy", least=1.0),))
    assert perfect.excess(measured(scores={"t:accuracy": 1.0})) == 1
    assert perfect.excess(measured(scores={"t:accuracy": 0.99})) == math.inf


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.02", 0.02), (" 2.5 %", 0.025), ("100%", 1.0)])
def test_shares(text: str, share: float) -> None:
    assert read_share(text, "--max-rise") == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "abc", "0", "-1%", "nan", "inf", "1%%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-rise"):
        read_share(text, "--max-rise")


def test_goals_of_tasks() -> None:
    assert read_tasks(["dir/q.jsonl:accuracy>=0.7"]) == (TaskGoal(task="dir/q.jsonl", metric="accuracy", least=0.7),)
    for wrong in ("q.jsonl", "q:accuracy>0.7", "q:accuracy>=x", "q:accuracy>=1.5", "q:accuracy>=--"):
        with pytest.raises(UsageError, match="is no goal"):
            read_tasks([wrong])
    with pytest.raises(UsageError, match="given twice"):
        read_tasks(["q:accuracy>=0.7", "q:accuracy>=0.8"])


def test_there_has_to_be_a_goal() -> None:
    with pytest.raises(UsageError, match="there is no goal"):
        Goal()
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match=r"--max-kl .* is no goal"):
            Goal(max_kl=wrong)


# Spaces


def space(tmp_path: Path, text: str, **given: Any) -> list[Point]:
    (tmp_path / "space.yaml").write_text(text)
    return read_space(tmp_path / "space.yaml", given)


def test_a_space_is_all_combinations(tmp_path: Path) -> None:
    points = space(tmp_path, "algo: [rtn, gptq]\nwbits: [3, 4]\ngptq: {damp: [0.01, 0.1]}\ncalib: c4\nignore: [[], [down_proj]]\n")
    assert len(points) == 16
    assert points[0].changes == {"algo": "rtn", "wbits": 3, "gptq": {"damp": 0.01}, "calib": "c4", "ignore": []}
    assert points[-1].changes == {"algo": "gptq", "wbits": 4, "gptq": {"damp": 0.1}, "calib": "c4", "ignore": ["down_proj"]}
    assert points[-1].words == 'gptq w4 gptq.damp=0.1 calib=c4 ignore=["down_proj"]'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wbits: []", "'wbits' has no value"),
        ("wbits: [3, 3]", "'wbits' has a value twice"),
        ("gptq: {damp: {a: 1}}", "'gptq' must be a section"),
        ("- 3", "key: value"),
        ("wbits: [3", "is not valid YAML"),
        ("seed: [" + ", ".join(map(str, range(1001))) + "]", "has 1,001 recipes"),
    ],
)
def test_what_is_no_space_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        space(tmp_path, text)


def test_the_usual_space_leaves_out_what_is_given() -> None:
    def changes(**given: Any) -> list[Mapping[str, Any]]:
        return [point.changes for point in read_space(None, given)]

    assert len(changes()) == len(USUAL["quality"]) * len(USUAL["wbits"])
    assert changes(algo="rtn") == [{"wbits": bits} for bits in USUAL["wbits"]]
    assert changes(wbits=4) == [{"quality": quality} for quality in USUAL["quality"]]
    assert changes(algo="rtn", scheme="w4a16") == [{}]
    assert {"quality": "fast", "gguf_type": "q4_k_m"} in changes(format="gguf")


def test_a_key_cannot_be_given_and_searched(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="wbits is also given as a flag"):
        space(tmp_path, "wbits: [3, 4]", wbits=4)


# Strategies, on losses that add up over groups


@dataclass(frozen=True)
class Invented(Candidate):
    low: int = 0
    high: int | None = None
    raised: frozenset[str] = frozenset()


class Laboratory:
    """A search in which each group loses so much by level, and takes so many bytes."""

    def __init__(self, losses: Sequence[Mapping[str, float]], sizes: Sequence[int], allowed: float, most: int = 10_000) -> None:
        self.losses, self.sizes, self.allowed, self.most, self.seed = losses, sizes, allowed, most, 3
        self.names = list(losses[0])
        self.candidates = [self.of(level) for level in range(len(losses))]
        self.done: dict[str, Trial] = {}

    def of(self, low: int, high: int | None = None, raised: frozenset[str] = frozenset()) -> Invented:
        sixteen = 16
        size = sum((sixteen if high is None else self.sizes[high]) if name in raised else self.sizes[low] for name in self.names)
        recipe = load_recipe(flags={"seed": hash((low, high, tuple(sorted(raised)))) % 2**40})
        return Invented(recipe, f"{low} {high} {sorted(raised)}", size, low, high, raised)

    def run(self, candidate: Any) -> Trial:
        if candidate.key not in self.done:
            if len(self.done) >= self.most:
                raise strategies.BudgetSpent
            levels = {name: candidate.high if name in candidate.raised else candidate.low for name in self.names}
            parts = {name: 0.0 if level is None else self.losses[level][name] for name, level in levels.items()}
            self.done[candidate.key] = Trial(
                key=candidate.key,
                words=candidate.words,
                bytes=candidate.bytes,
                bits_per_weight=1.0,
                errors=parts,
                excess=sum(parts.values()) / self.allowed,
                seconds=1.0,
            )
        return self.done[candidate.key]

    def smaller(self, candidate: Candidate) -> bool:
        return all(candidate.bytes < trial.bytes for trial in self.done.values() if trial.holds)

    def groups(self, low: Candidate) -> list[Group]:
        return [Group((name,), name.partition(".")[2]) for name in self.names]

    def mixture(self, low: Any, high: Any, raised: Sequence[Group]) -> Invented:
        names = frozenset(group.linears[0] for group in raised)
        return self.of(low.low, None if high is None else high.low, names)

    def traces(self, low: Any) -> Mapping[str, float]:
        return self.losses[low.low]

    def best(self) -> Trial:
        return min((trial for trial in self.done.values() if trial.holds), key=lambda trial: trial.bytes)


def laboratory(seed: int, allowed: float, groups: int = 12, **options: Any) -> Laboratory:
    draw = random.Random(seed)
    names = [f"{block}.{kind}" for block in range(groups // 3) for kind in "abc"]
    base = {name: draw.lognormvariate(0, 1.5) for name in names}
    return Laboratory([{name: loss / 4**level for name, loss in base.items()} for level in range(4)], [2, 3, 4, 8], allowed, **options)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("allowed", [2.0, 8.0])
def test_exhaustive_is_brute_force_over_the_space(seed: int, allowed: float) -> None:
    search = laboratory(seed, allowed)
    fitting = [level for level, parts in enumerate(search.losses) if sum(parts.values()) <= allowed]
    strategies.exhaustive(search)
    assert search.best().bytes == min(search.of(level).bytes for level in fitting)
    assert len(search.done) == min(fitting) + 1


@pytest.mark.parametrize("seed", range(10))
def test_random_ends_with_the_same(seed: int) -> None:
    one, other = laboratory(seed, 4.0), laboratory(seed, 4.0)
    strategies.random(one)
    strategies.exhaustive(other)
    assert one.best().bytes == other.best().bytes


@pytest.mark.parametrize("strategy", ["mse", "hawq"])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("allowed", [1.0, 4.0, 12.0])
def test_nothing_that_fell_back_can_be_taken_back(strategy: str, seed: int, allowed: float) -> None:
    """Behind the end of mse the goal is kept, and without any single one of the groups that fell back it is not."""
    search = laboratory(seed, allowed)
    strategies.STRATEGIES[strategy](search)
    best, uniform = search.best(), laboratory(seed, allowed)
    strategies.exhaustive(uniform)
    assert best.distance <= 1
    if any(trial.holds for trial in uniform.done.values()):
        assert best.bytes <= uniform.best().bytes
    found = next(each for each in (search.of(*parts) for parts in mixed(search)) if each.key == best.key)
    if found.raised:
        for name in found.raised:
            without = search.of(found.low, found.high, found.raised - {name})
            assert search.run(without).distance > 1


def mixed(search: Laboratory) -> list[tuple[int, int | None, frozenset[str]]]:
    """All recipes that were tried."""
    found = []
    for trial in search.done.values():
        low, high, raised = trial.words.split(" ", 2)
        found.append((int(low), None if high == "None" else int(high), frozenset(json.loads(raised.replace("'", '"')))))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_basic_moves_whole_kinds(seed: int) -> None:
    search = laboratory(seed, 4.0)
    strategies.basic(search)
    assert search.best().holds
    for _, _, raised in mixed(search):
        kinds = {name.partition(".")[2] for name in raised}
        assert raised == frozenset(name for name in search.names if name.partition(".")[2] in kinds)


def test_where_the_largest_recipe_does_not_do_linears_stay_in_16_bit() -> None:
    search = laboratory(1, 0.05)
    assert all(sum(parts.values()) > 0.05 for parts in search.losses)
    strategies.mse(search)
    assert search.best().holds
    assert all(high is None for _, high, raised in mixed(search) if raised)


def test_the_smallest_recipe_that_does_is_the_end() -> None:
    search = laboratory(1, 1e6)
    strategies.mse(search)
    assert search.best().bytes == search.of(0).bytes
    assert len(search.done) == 2  # bisected: the third of four, then the first two


def test_other_recipes_of_a_size_are_tried_where_they_may_do() -> None:
    search = laboratory(2, 4.0)
    better = replace(search.of(0), recipe=load_recipe(flags={"seed": 77}), words="9 None []")
    near = Trial(key=better.key, words="9 None []", bytes=better.bytes, bits_per_weight=1.0, excess=0.9, seconds=1)
    search.done[better.key] = near
    lowest = sum(search.losses[0].values())
    for allowed, tried in ((lowest / 2, True), (lowest / 10, False)):
        search.allowed, search.done = allowed, {better.key: near}
        candidate, holds = strategies._tried(search, [search.of(0), better])
        assert (candidate.key == better.key, holds) == (tried, tried)


# Searches


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("room")
    make_model(folder / "model")
    write_text(folder / "text.txt", 600)
    return folder


ROUNDING = {"algo": "rtn", "group_size": 16}


def request_of(room: Path, **changes: Any) -> Request:
    given = {
        "goal": Goal(max_kl=0.02),
        "points": [Point({"wbits": bits}) for bits in (2, 3, 4, 8)],
        "flags": ROUNDING,
        "strategy": "mse",
        "examination": Examination(texts=(str(room / "text.txt"),), seqlen=64, tokens=512),
        **changes,
    }
    return Request(**given)


def tree(folder: Path) -> dict[str, bytes]:
    logs = ("ptq_log.txt", "ptq_log.jsonl")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in logs}


def uniform_kl(room: Path, folder: Path, bits: int) -> float:
    ptqcli.quantize(room / "model", output=folder / f"w{bits}", wbits=bits, **ROUNDING)
    return kl_of(room, folder / f"w{bits}")


def kl_of(room: Path, checkpoint: Path) -> float:
    (room / "part.txt").write_bytes((room / "text.txt").read_bytes()[:512])  # a token a byte
    [found] = ptqcli.evaluate(checkpoint, str(room / "part.txt"), baseline=room / "model", seqlen=64)
    assert found.mean_kl is not None
    return found.mean_kl


def test_the_result_keeps_the_goal_and_is_smaller_than_what_does_in_one_scheme(room: Path, tmp_path: Path) -> None:
    found = tune(room / "model", tmp_path / "out", request_of(room))
    assert found.holds
    assert not found.spent or "12 trials" in found.spent
    assert len(found.trials) <= MOST_TRIALS
    assert kl_of(room, tmp_path / "out") == pytest.approx(found.best.measured["kl"][str(room / "text.txt")], rel=1e-6)
    assert kl_of(room, tmp_path / "out") <= 0.02
    assert uniform_kl(room, tmp_path, 3) > 0.02, "otherwise there is nothing to mix"
    assert found.best.bytes < min(trial.bytes for trial in found.trials if trial.holds and "groups" not in trial.words)
    report = json.loads((tmp_path / "out" / "ptq_report.json").read_text())
    assert len({layer["scheme"] for layer in report["layers"]}) == 2
    assert sorted(os.listdir(tmp_path / "out.trials")) == [RECORD]


@pytest.mark.parametrize("strategy", ["basic", "hawq", pytest.param("random", marks=pytest.mark.slow)])
def test_other_strategies_keep_the_goal_too(room: Path, tmp_path: Path, strategy: str) -> None:
    flags = {**ROUNDING, "calib": str(room / "text.txt"), "nsamples": 4, "seqlen": 32}
    found = tune(room / "model", tmp_path / "out", request_of(room, strategy=strategy, flags=flags, trials=6))
    assert found.holds
    assert kl_of(room, tmp_path / "out") <= 0.02


def test_the_traces_are_those_of_the_sensitivities(room: Path, tmp_path: Path) -> None:
    """The same numbers as a budget of bits finds, whose own tests compare them with the Hessian."""
    flags = {**ROUNDING, "wbits": 3, "calib": str(room / "text.txt"), "nsamples": 4, "seqlen": 32}
    skeleton, plan = plan_run(room / "model", load_recipe(flags=flags), Resources())
    found = traces(plan, skeleton, Resources(), None, NoProgress())
    shared = ptqcli.quantize(
        room / "model",
        output=tmp_path / "out",
        target_bits=4.5,
        candidates="w2g16,w3g16",
        sensitivity="hawq",
        **{key: value for key, value in flags.items() if key not in ("wbits", "group_size")},
    ).allocation
    assert shared is not None
    for group in shared.groups:
        [local] = {found[name] for name in found if name.startswith(group.name.split("|")[0])}
        assert local == pytest.approx(group.losses[1], rel=1e-5)


def test_a_task_can_be_the_goal(room: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"question": "the model of", "choices": [" the", " zero"], "answer": number % 2} for number in range(4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    request = request_of(room, goal=Goal(tasks=read_tasks([f"{file}:accuracy>=0.5"])), strategy="exhaustive", trials=1)
    found = tune(room / "model", tmp_path / "out", request)
    assert found.best.measured["scores"] == {f"{file}:accuracy": 0.5}, "the same question with each answer once"
    assert found.best.measured["kl"] == {}
    assert found.holds
    with pytest.raises(UsageError, match="has no foo; it has acc, acc_norm, accuracy"):
        tune(room / "model", tmp_path / "foo", replace(request, goal=Goal(tasks=read_tasks([f"{file}:foo>=0.5"]))))


def test_an_encoder_is_held_to_its_masked_words(tmp_path: Path) -> None:
    make_encoder(tmp_path / "model", "BertForMaskedLM")
    text = str(write_rows(tmp_path / "rows.jsonl"))
    examination = Examination(texts=(text,), seqlen=32, tokens=100_000)
    points = [Point({"wbits": bits}) for bits in (3, 8)]
    request = request_of(tmp_path, goal=Goal(max_rise=0.02), points=points, examination=examination, trials=2)
    found = tune(tmp_path / "model", tmp_path / "out", request)
    [result] = ptqcli.evaluate(tmp_path / "out", text, baseline=tmp_path / "model", seqlen=32)
    assert found.holds
    assert found.best.measured["rise"].keys() == {text}
    assert result.masked_perplexity / result.baseline_masked_perplexity - 1 <= 0.02  # type: ignore[union-attr,operator]
    with pytest.raises(UsageError, match="is an encoder, which has no next word"):
        tune(tmp_path / "model", tmp_path / "kl", replace(request, goal=Goal(max_kl=0.1)))


def test_a_goal_that_cannot_be_kept_ends_with_the_nearest(room: Path, tmp_path: Path) -> None:
    request = request_of(room, goal=Goal(max_kl=1e-9), points=[Point({"wbits": bits}) for bits in (2, 4)], strategy="exhaustive")
    found = tune(room / "model", tmp_path / "out", request)
    assert not found.holds
    assert found.best.words == "w4"
    assert json.loads((tmp_path / "out" / "ptq_report.json").read_text())["recipe"]["wbits"] == 4


class Ending(NoTrialProgress):
    """Ends a search as Ctrl-C does, at a moment."""

    def __init__(self, trial: int, moment: str) -> None:
        self.trial, self.moment, self.now, self.known = trial, moment, 0, list[bool]()

    def trial_begun(self, number: int, most: int, words: str) -> None:
        self.now = number

    def block_done(self, index: int, count: int) -> None:
        self._end("block")

    def measuring(self, text: str, done: int, total: int) -> None:
        self._end("measuring")

    def trial_done(self, number: int, trial: Trial, known: bool) -> None:
        self.known.append(known)
        self._end("done")

    def _end(self, moment: str) -> None:
        if (self.now, moment) == (self.trial, self.moment):
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "moment", ["block", pytest.param("measuring", marks=pytest.mark.slow), pytest.param("done", marks=pytest.mark.slow)]
)
def test_a_search_that_was_ended_goes_on_to_the_same_bytes(room: Path, tmp_path: Path, moment: str) -> None:
    request = request_of(room, trials=6)
    whole = tune(room / "model", tmp_path / "a" / "out", request)
    with pytest.raises(KeyboardInterrupt, match=r"[23] trials, .* are kept in .*out\.trials: the same command goes on"):
        tune(room / "model", tmp_path / "b" / "out", request, progress=Ending(3, moment))
    assert not (tmp_path / "b" / "out").exists()
    listener = Ending(0, "")
    again = tune(room / "model", tmp_path / "b" / "out", request, progress=listener)
    assert listener.known[:3] == [True, True, moment == "done"]
    assert not any(listener.known[3:])
    assert [(trial.key, trial.excess) for trial in again.trials] == [(trial.key, trial.excess) for trial in whole.trials]
    assert tree(tmp_path / "a" / "out") == tree(tmp_path / "b" / "out")
    assert sorted(os.listdir(tmp_path / "b")) == ["out", "out.trials"]


def test_the_first_trial_goes_on_behind_its_last_finished_block(room: Path, tmp_path: Path) -> None:
    request = request_of(room, trials=1)

    class EndingInTheSecond(NoTrialProgress):
        def block_started(self, index: int, count: int) -> None:
            if index:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="0 trials, and what is finished of the next"):
        tune(room / "model", tmp_path / "out", request, progress=EndingInTheSecond())
    assert (tmp_path / "out.trials" / "000" / "out.partial" / ".ptq-progress.json").is_file()

    class Blocks(NoTrialProgress):
        begun: ClassVar[list[int]] = []

        def block_started(self, index: int, count: int) -> None:
            self.begun.append(index)

    tune(room / "model", tmp_path / "out", request, progress=Blocks())
    assert Blocks.begun == [1], "the first of two blocks was finished"


def test_one_that_was_asked_for_otherwise_is_refused_and_restart_begins_anew(room: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(room / "model", tmp_path / "out", request_of(room), progress=Ending(2, "done"))
    other = request_of(room, goal=Goal(max_kl=0.5), trials=3)
    with pytest.raises(UsageError, match=r"out.trials: holds 2 trials of a search that was asked for something else \(goal .*--restart"):
        tune(room / "model", tmp_path / "out", other)
    listener = Ending(0, "")
    found = tune(room / "model", tmp_path / "out", other, restart=True, progress=listener)
    assert listener.known == [False] * len(found.trials)


def test_a_larger_budget_goes_on(room: Path, tmp_path: Path) -> None:
    first = tune(room / "model", tmp_path / "out", request_of(room, trials=3))
    assert first.spent
    assert len(first.trials) == 3
    listener = Ending(0, "")
    before = tree(tmp_path / "out")
    with pytest.raises(UsageError, match="already exists"):
        tune(room / "model", tmp_path / "out", request_of(room, trials=5))
    assert tree(tmp_path / "out") == before
    second = tune(room / "model", tmp_path / "out", request_of(room, trials=5), overwrite=True, progress=listener)
    assert listener.known[:3] == [True, True, True]
    assert len(second.trials) == 5
    assert second.best.key != first.best.key
    assert kl_of(room, tmp_path / "out") == pytest.approx(second.best.measured["kl"][str(room / "text.txt")], rel=1e-6)
    assert tune(room / "model", tmp_path / "out", request_of(room, trials=5)).best == second.best, "nothing is left to do"


def test_a_result_is_replaced_only_if_asked(room: Path, tmp_path: Path) -> None:
    tune(room / "model", tmp_path / "out", request_of(room, trials=1))
    before = tree(tmp_path / "out")
    with pytest.raises(UsageError, match="already exists"):
        tune(room / "model", tmp_path / "out", request_of(room, trials=1, goal=Goal(max_kl=9.0)), restart=True)
    assert tree(tmp_path / "out") == before
    tune(room / "model", tmp_path / "out", request_of(room, trials=2, goal=Goal(max_kl=9.0)), restart=True, overwrite=True)
    assert tree(tmp_path / "out") != before


def test_what_is_not_ours_is_left_alone(room: Path, tmp_path: Path) -> None:
    (tmp_path / "out.trials").mkdir()
    (tmp_path / "out.trials" / "diary.txt").write_text("mine")
    with pytest.raises(PTQError, match=r"is in the way and holds diary\.txt"):
        tune(room / "model", tmp_path / "out", request_of(room))
    (tmp_path / "out.trials" / "diary.txt").unlink()
    with pytest.raises(KeyboardInterrupt):
        tune(room / "model", tmp_path / "out", request_of(room), progress=Ending(1, "done"))
    (tmp_path / "out.trials" / "000" / "out" / "diary.txt").write_text("mine")
    with pytest.raises(PTQError, match=r"holds diary\.txt, which ptq quantize did not write"):
        tune(room / "model", tmp_path / "out", request_of(room), restart=True)
    assert (tmp_path / "out.trials" / "000" / "out" / "diary.txt").read_text() == "mine"


def test_a_damaged_record_is_told(room: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(room / "model", tmp_path / "out", request_of(room), progress=Ending(1, "done"))
    record = tmp_path / "out.trials" / RECORD
    record.write_text(record.read_text().replace('"excess": ', '"excess": 1'))
    with pytest.raises(PTQError, match=f"{RECORD}: is damaged.*--restart begins anew"):
        tune(room / "model", tmp_path / "out", request_of(room))
    assert tune(room / "model", tmp_path / "out", request_of(room, trials=1), restart=True).trials


def test_two_searches_do_not_share_a_folder(room: Path, tmp_path: Path) -> None:
    first = Workshop(tmp_path / "out", {"goal": "x"}, restart=False)
    with pytest.raises(PTQError, match="another run is writing there"):
        tune(room / "model", tmp_path / "out", request_of(room))
    first.close()
    assert not (tmp_path / "out.trials").exists()


def test_a_budget_of_time_begins_no_trial_that_would_end_later(room: Path, tmp_path: Path) -> None:
    found = tune(room / "model", tmp_path / "out", request_of(room, seconds=1e-3))
    assert len(found.trials) == 1
    assert "--max-time" in found.spent


def test_gguf_files_are_tried_by_their_mixes(room: Path, tmp_path: Path) -> None:
    points = [Point({"gguf_type": mix}) for mix in ("q4_0", "q8_0")]
    request = request_of(room, points=points, flags={"algo": "rtn", "format": "gguf"}, goal=Goal(max_kl=1e-9))
    found = tune(demo_model(), tmp_path / "out", request)
    assert [(trial.words, trial.error) for trial in found.trials] == [("q4_0", None), ("q8_0", None)]
    assert found.best.words == "q8_0", "the nearest of the two"
    assert found.left_out == ["q8_0 cannot be mixed with 16 bit: format gguf chooses the type of each linear"]
    [file] = (tmp_path / "out").glob("*.gguf")
    [result] = ptqcli.evaluate(file, str(room / "text.txt"), baseline=demo_model(), seqlen=64)
    assert result.mean_kl == pytest.approx(found.best.measured["kl"][str(room / "text.txt")], rel=0.5), "of a part of the text"


def test_a_trial_that_failed_is_tried_again(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(room, trials=2, strategy="exhaustive", goal=Goal(max_kl=1e-9))

    def failing(*_: Any) -> Measured:
        raise PTQError("no numbers")

    monkeypatch.setattr(Examiner, "measure", failing)
    with pytest.raises(PTQError, match=r"no trial gave a checkpoint that can be measured; .*no numbers"):
        tune(room / "model", tmp_path / "out", request)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    listener = Ending(0, "")
    found = tune(room / "model", tmp_path / "out", request, progress=listener)
    assert listener.known == [False, False]
    assert [trial.error for trial in found.trials] == [None, None]


def test_recipes_that_cannot_work_are_left_out_and_told(room: Path, tmp_path: Path) -> None:
    points = [Point({"wbits": 4}), Point({"wbits": 4, "group_size": 48}), Point({"wbits": 8})]
    flags = {"algo": "rtn"}
    found = tune(room / "model", tmp_path / "out", request_of(room, points=points, flags=flags, strategy="exhaustive"))
    [told] = found.left_out
    assert "group_size=48" in told
    with pytest.raises(UsageError, match="none of 1 recipes can work"):
        tune(room / "model", tmp_path / "none", request_of(room, points=points[1:2], flags=flags))
    assert not (tmp_path / "none.trials").exists()


def test_all_checkpoints_stay_on_request(room: Path, tmp_path: Path) -> None:
    found = tune(room / "model", tmp_path / "out", request_of(room, trials=3, keep=True, strategy="exhaustive", goal=Goal(max_kl=1e-9)))
    left = sorted(path.parent.name for path in (tmp_path / "out.trials").glob("*/out"))
    best = found.trials.index(found.best)
    assert left == [f"{number:03d}" for number in range(3) if number != best]


def test_the_command(room: Path, tmp_path: Path, ptq: Ptq) -> None:
    flags = ("--ppl", room / "text.txt", "--tokens", "512", "--eval-seqlen", "64", "--algo", "rtn", "--group-size", "16")
    answer = ptq("tune", room / "model", "--max-kl", "0.02", "--output", tmp_path / "out", "--json", *flags)
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert result["holds"]
    assert result["best"]["excess"] <= 1
    assert "keeps the goal" in answer.err
    again = ptq("tune", room / "model", "--max-kl", "1e-9", "--max-trials", "1", "--output", tmp_path / "far", *flags)
    assert again.code == 1
    assert "none of 1 trials keeps the goal (mean KL at most 1e-09); the nearest is in" in one_line(again)
    assert (tmp_path / "far" / "config.json").is_file()


def test_words_of_the_command_are_those_of_the_room() -> None:
    assert tuple(strategies.STRATEGIES) == command.STRATEGIES
    assert (command.MOST_TRIALS, command.USUAL_TOKENS) == (MOST_TRIALS, USUAL_TOKENS)
