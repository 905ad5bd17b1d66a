"""``ptq tune``: a model and what it may lose in, the smallest checkpoint that loses no more out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.console import Output, path_text, size_text, time_text
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.options import json_option, kernel_option, processes_option, quiet_option
from ptqcli.cli.progress import Tracker, track
from ptqcli.cli.quantize import given_flags, resources_of
from ptqcli.cli.quantize_flags import ALGORITHM, CALIBRATION, FLAGS, MACHINE, OUTPUT, with_flags
from ptqcli.cli.quantize_report import QuantizeProgress
from ptqcli.cli.signals import clean_up_first, stop_if_interrupted
from ptqcli.errors import PTQError
from ptqcli.model.locate import find_model

if TYPE_CHECKING:
    from ptqcli.plan import Plan
    from ptqcli.trials.trial import Trial
    from ptqcli.trials.tune import Request, Tuned

STRATEGIES = ("basic", "mse", "hawq", "exhaustive", "random")  # of ptqcli.trials, whose import takes torch along; a test compares them
MOST_TRIALS = 12
USUAL_TOKENS = 32_768
SECONDS_BETWEEN_LINES = 15.0
SUFFIX = "-tuned-to-goal"
OF_THE_RUN = ("format", "gguf_type", "for_tensor_parallel", "output", "overwrite", "restart", "allow_requantize")
UNITS = {"s": 1, "m": 60, "h": 3600, "": 1}


def parse_time(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Seconds: a number with a unit, such as 90s, 30m or 2h."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(s|m|h|)(?:in|ec|ours?)?", value.strip())
    if found is None or float(found[1]) == 0:
        raise click.BadParameter(f"{value!r} is no time; give one such as 90s, 30m or 2h", ctx, param)
    return float(found[1]) * UNITS[found[2]]


def _named(flag: Any) -> str:
    """The name of the parameter that a flag adds to a command."""

    def bare() -> None:
        pass

    name: str = flag(bare).__click_params__[0].name
    return name


class _Progress(QuantizeProgress):
    """Tells of trials; of what happens in one, only how far it is."""

    def __init__(self, model: Path, words: Output, tracker: Tracker) -> None:
        super().__init__(model, words, tracker)
        self._trial, self._remarks = "", set[str]()

    def planned(self, plan: Plan, output: Path) -> None:
        clean_up_first()

    def remark(self, text: str) -> None:
        if text not in self._remarks:
            self._remarks.add(text)
            self._tracker.remark(text)

    def phase(self, text: str) -> None:
        stop_if_interrupted()
        self._tracker.note(f"{self._trial}: {text}")

    def block_started(self, index: int, count: int) -> None:
        self._errors.clear()

    def block_done(self, index: int, count: int) -> None:
        self._tracker.part(f"{self._trial}, block {index + 1} of {count}:", index + 1, count)

    def trial_begun(self, number: int, most: int, words: str) -> None:
        """See ``trials.tune.TrialProgress``."""
        clean_up_first()
        self._trial = f"trial {number} of at most {most}"
        self._tracker.say(f"{self._trial}: {words}")

    def measuring(self, text: str, done: int, total: int) -> None:
        """See ``trials.tune.TrialProgress``."""
        stop_if_interrupted()
        self._tracker.part(f"{self._trial}, measuring on {text}:", done, total)

    def trial_done(self, number: int, trial: Trial, known: bool) -> None:
        """See ``trials.tune.TrialProgress``."""
        self._tracker.remark(f"trial {number}: {trial.words}: {_outcome(trial)}{', as an earlier run has found' if known else ''}")


def _outcome(trial: Trial) -> str:
    if trial.error is not None:
        return f"failed: {trial.error}"
    held = "keeps the goal" if trial.holds else f"{trial.distance:.3g} times what is allowed"
    return f"{size_text(trial.bytes)}, {_losses(trial)}; {held}"


def _losses(trial: Trial) -> str:
    """Its losses on the worst of the texts."""
    measured, parts = trial.measured, []
    for key, name, form in (("rise", "rise", "+.2%"), ("kl", "KL", ".5f")):
        if measured.get(key):
            text, value = max(measured[key].items(), key=lambda pair: pair[1])
            error = measured.get(f"{key}_error", {}).get(text)
            parts.append(f"{name} {value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}"))
    parts += [f"{name} {score:.2%}" for name, score in measured.get("scores", {}).items()]
    return ", ".join(parts)


@click.command(
    epilog=examples(
        "ptq tune --max-rise 1%                        # the demo model",
        "ptq tune ~/models/Llama-3.2-1B --max-kl 0.02 --ppl wikitext2 --ppl code.txt --calib c4",
        "ptq tune ~/models/Llama-3.2-1B --max-rise 2% --space space.yaml --strategy exhaustive --max-time 2h",
        "ptq tune ~/models/Llama-3.2-1B --max-rise 1% --format gguf",
        "ptq tune ~/models/Llama-3.2-1B --task 'questions.jsonl:accuracy>=0.7'",
    )
)
@click.argument("model", required=False, shell_complete=completion.model)
@click.option("--max-rise", metavar="SHARE", help="What the perplexity may rise by, such as 1%, on each text.")
@click.option("--max-kl", type=float, metavar="NATS", help="What the mean KL divergence from the original may be, on each text.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK:METRIC>=SHARE",
    help="What a task of `ptq eval --tasks` may not fall below, such as questions.jsonl:accuracy>=0.7; may be given several times.",
)
@click.option(
    "--space",
    type=click.Path(path_type=Path),
    metavar="FILE.yaml",
    show_default="quality fast and balanced, in 2, 3, 4 and 8 bits",
    help="Keys of a recipe with lists of the values to try, such as `wbits: [3, 4]`.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="mse",
    show_default=True,
    help="basic: recipes bisected by size, then kinds of linears in the next larger scheme, those with the largest errors first, and the "
    "least needed taken back. mse: linears of single blocks in place of kinds. hawq: so, by Hessian traces. exhaustive: from the smallest "
    "on. random: as drawn.",
)
@click.option("--max-trials", type=click.IntRange(min=1), default=MOST_TRIALS, show_default=True, metavar="N", help="Trials at most.")
@click.option("--max-time", callback=parse_time, metavar="TIME", help="Begin no trial that would probably end later, such as 2h.")
@click.option("--keep-trials", is_flag=True, help="Leave the checkpoints of all trials in FOLDER.trials.")
@click.option(
    "--ppl",
    "texts",
    multiple=True,
    default=["builtin"],
    show_default=True,
    metavar="wikitext2|c4|builtin|PATH",
    shell_complete=completion.texts("evaluation"),
    help="Text that the goal is measured on; may be given several times, and then it has to be kept on each.",
)
@click.option("--tokens", type=int, default=USUAL_TOKENS, show_default=True, metavar="N", help="Of each text, at most.")
@click.option(
    "--eval-seqlen", type=int, metavar="N", show_default="2048, or the model's positions if fewer", help="Tokens in a window of it."
)
@with_flags(FLAGS[ALGORITHM])
@with_flags(FLAGS["Scheme (what the numbers are)"])
@with_flags(FLAGS[CALIBRATION])
@with_flags([flag for flag in FLAGS[MACHINE] if flag is not processes_option])
@with_flags([flag for flag in FLAGS[OUTPUT] if _named(flag) in OF_THE_RUN])
@kernel_option
@json_option
@quiet_option
def command(
    model: str | None,
    output: Path | None,
    overwrite: bool,
    restart: bool,
    allow_requantize: bool,
    device: str,
    dtype: str,
    batch_size: int | None,
    memory: int | None,
    activation_budget: float | None,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Find the smallest checkpoint of MODEL that keeps a goal.

    Recipes are tried one after the other: quantized, and measured beside the original. What all of them have is said with the flags of
    `ptq quantize`, what is tried with --space. The best checkpoint gets the output's name; where none keeps the goal that is the one that
    is nearest to it, and the exit code is 1. A search that was ended goes on with the same command.
    """
    from ptqcli.trials.tune import tune

    words, data_dir = Output(as_json=as_json, quiet=quiet), flags["data_dir"]
    request = _request(**flags)
    resources = resources_of(device, dtype, batch_size, activation_budget, memory)
    folder = find_model(model)
    silence_transformers()
    target = output.expanduser() if output else Path(f"{folder.resolve().name.removesuffix('.gguf')}{SUFFIX}")
    words.facts(_plan_rows(folder, target, request))
    how: dict[str, Any] = {"allow_requantize": allow_requantize, "overwrite": overwrite, "restart": restart, "data_dir": data_dir}
    with track("trial", quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        found = tune(folder, target, request, resources=resources, progress=_Progress(folder, words, tracker), **how)
    click.get_current_context().obj.result_kept = not as_json
    _show(found, words)
    words.result(found.to_json())
    if not found.holds:
        raise PTQError(
            f"none of {len(found.trials)} trials keeps the goal ({found.goal}); the nearest is in {path_text(target)}: {found.best.words}, "
            f"{found.best.distance:.3g} times what is allowed; allow more, or other recipes (--space)"
        )


def _request(
    *,
    max_rise: str | None,
    max_kl: float | None,
    tasks: tuple[str, ...],
    space: Path | None,
    strategy: str,
    max_trials: int,
    max_time: float | None,
    keep_trials: bool,
    texts: tuple[str, ...],
    tokens: int,
    eval_seqlen: int | None,
    recipe: str | None,
    data_dir: Path | None,
    kernel: str,
    **flags: Any,
) -> Request:
    """What the flags ask for. Raises UsageError for what cannot work."""
    from ptqcli.shipped import find_recipe
    from ptqcli.trials.goal import Goal, read_share, read_tasks
    from ptqcli.trials.space import read_space
    from ptqcli.trials.trial import Examination
    from ptqcli.trials.tune import Request

    given = {name: value for name, value in given_flags(flags).items() if value != {}}
    bos = given.get("bos", "auto")
    named = tuple(dict.fromkeys(texts))
    return Request(
        goal=Goal(max_rise=None if max_rise is None else read_share(max_rise, "--max-rise"), max_kl=max_kl, tasks=read_tasks(tasks)),
        points=read_space(space, given),
        start=None if recipe is None else find_recipe(recipe),
        flags=given,
        strategy=strategy,
        trials=max_trials,
        seconds=max_time,
        seed=given.get("seed", 0),
        keep=keep_trials,
        examination=Examination(texts=named, seqlen=eval_seqlen, tokens=tokens, bos=bos, data_dir=data_dir, kernel=kernel),
    )


def _plan_rows(model: Path, target: Path, request: Request) -> Iterator[tuple[str, str]]:
    yield "model", path_text(model)
    yield "output", path_text(target)
    texts = f"{', '.join(request.examination.texts)}, {request.examination.tokens:,} tokens at most of each"
    yield "goal", request.goal.words() + (f", on {texts}" if request.goal.of_texts else "")
    yield "space", f"{len(request.points)} recipes: {_listed([point.words for point in request.points])}"
    within = "" if request.seconds is None else f", within {time_text(request.seconds)}"
    yield "strategy", f"{request.strategy}, {request.trials} trials at most{within}"


def _listed(words: list[str], most: int = 8) -> str:
    more = f", and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _show(found: Tuned, words: Output) -> None:
    rows = [
        (
            f"{number}{' *' if trial.key == found.best.key else ''}",
            trial.words,
            size_text(trial.bytes),
            "" if trial.bits_per_weight is None else f"{trial.bits_per_weight:.3f}",
            _losses(trial) or f"failed: {trial.error}",
            "yes" if trial.holds else "no",
            time_text(trial.seconds),
        )
        for number, trial in enumerate(found.trials, start=1)
    ]
    words.table("Trials", ("trial", "recipe", "size", "bits/weight", "losses", "keeps the goal", "time"), rows)
    words.say()
    folder = path_text(Path(found.output))
    facts = [("written", folder), ("best", f"{found.best.words}: {_outcome(found.best)}")]
    if found.spent:
        facts.append(("ended", found.spent))
    words.facts([*facts, ("measure it", f"ptq eval {folder}")])
