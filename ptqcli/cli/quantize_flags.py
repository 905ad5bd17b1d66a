"""The flags of ``ptq quantize``: those of the request, which stand here as data, and those that the parts of ``--algo`` declare.

Every flag of the request is None unless it was given, so that a value in a recipe file is not overridden by a default of ours. The
defaults shown for the fields of ``ptqcli.recipe.Recipe`` are compared with them by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion
from ptqcli.cli.budget_flags import BUDGET_FLAGS
from ptqcli.cli.options import (
    NamedPath,
    activation_budget_option,
    data_dir_option,
    device_option,
    json_option,
    log_format_option,
    memory_option,
    processes_option,
    quiet_option,
)
from ptqcli.cli.processes import OneVoice
from ptqcli.cli.quantize_values import OVERRIDE_EXAMPLES, SET_EXAMPLE, parse_group, parse_overrides, parse_settings_flag
from ptqcli.formats import DEFAULT_FORMAT, format_names
from ptqcli.quality import QUALITIES, described

if TYPE_CHECKING:
    from ptqcli.algorithms import Declaration
    from ptqcli.options import Option

# Flags of the request and of the run, in the groups that the help shows

ALGORITHM, CALIBRATION, MACHINE, OUTPUT = "Algorithm", "Calibration data", "Machine", "Output"
BUDGET = "Budget (in place of a scheme)"
SEQLEN_FLAG = click.option(
    "--seqlen", type=int, metavar="N", show_default="what the model allows, at most 2048", help="Tokens in a window."
)
OVERWRITE_FLAG = click.option("--overwrite", is_flag=True, help="Replace an earlier checkpoint in the output folder.")
FLAGS = {
    ALGORITHM: [
        click.option(
            "--algo",
            metavar="NAME[+NAME]",
            show_default="gptq",
            shell_complete=completion.algorithm,
            help="rtn, gptq, obq, autoround, awq, smoothquant, let, equalize, rotate, llm-int8, or several joined: transforms, then a "
            "solver, such as awq+gptq. `ptq algorithms` lists them.",
        ),
        click.option(
            "--recipe",
            metavar="NAME|FILE",
            shell_complete=completion.recipe,
            help="Where to begin: a recipe of `ptq recipes`, or a YAML file. Flags win over it.",
        ),
        click.option(
            "--quality",
            metavar="|".join(QUALITIES),
            shell_complete=completion.names(lambda: QUALITIES),
            help=f"In place of --algo. {described()}.",
        ),
        click.option(
            "--sequential/--no-sequential",
            default=None,
            show_default="sequential",
            help="Calibrate later linears of a block behind the quantized earlier ones, or all on the block as it was (less memory).",
        ),
        click.option(
            "--set",
            "options",
            multiple=True,
            callback=parse_settings_flag,
            metavar="PART.OPTION=VALUE",
            help=f"Any option of any part, such as {SET_EXAMPLE}; `ptq algorithms` lists them.",
        ),
    ],
    "Scheme (what the numbers are)": [
        click.option(
            "--scheme",
            metavar="TEXT",
            shell_complete=completion.scheme,
            help="What the numbers are as one word, such as w4a16-g64-asym or w8a8, in place of the next seven.",
        ),
        click.option(
            "--wbits",
            type=int,
            metavar="2..8",
            show_default="4; smoothquant, llm-int8: 8",
            help="Bits per weight. Recent readers alone take others than 4 and 8; the plan says which.",
        ),
        click.option(
            "--group-size",
            callback=parse_group,
            metavar="auto|N",
            show_default="auto",
            help="Neighbouring columns that share a scale; -1: whole rows; 0: the whole matrix; auto: for each linear the first of 128, "
            "64, 32 and 16 that divides its width, or whole rows with 8-bit activations.",
        ),
        click.option("--sym/--asym", "symmetric", default=None, show_default="sym", help="Fixed zero point, or one per group."),
        click.option(
            "--abits",
            type=int,
            metavar="8|16",
            show_default="16; smoothquant, llm-int8: 8",
            help="Bits per activation; 16 leaves them as they are.",
        ),
        click.option(
            "--act-scales",
            metavar="token|tensor|static",
            show_default="token",
            help="Scales of 8-bit activations: for each token or for the whole tensor when the model runs, or for the tensor from "
            "calibration.",
        ),
        click.option(
            "--outliers",
            metavar="none|dynamic|static",
            show_default="none; llm-int8: dynamic",
            help="Columns with outliers in 16 bit: found when the model runs (the paper's), or fixed by calibration.",
        ),
        click.option(
            "--outlier-threshold", type=float, metavar="X", show_default="6.0", help="Magnitude above which an input is an outlier."
        ),
        click.option(
            "--override",
            "overrides",
            multiple=True,
            callback=parse_overrides,
            metavar="REGEX:WHAT",
            help=f"Treat some linears otherwise: {OVERRIDE_EXAMPLES}.",
        ),
        click.option("--ignore", multiple=True, metavar="REGEX", help="Leave these linears as they are."),
        click.option("--lm-head", metavar="W8|W4|SCHEME", help="Quantize the output head, too; a table that it shares gets a copy."),
        click.option("--embeddings", metavar="W8|W4|SCHEME", help="Quantize the embedding, too, each row by itself."),
        click.option("--blocks", metavar="NAME", help="Which list of blocks to quantize, where it is not evident."),
    ],
    BUDGET: BUDGET_FLAGS,
    CALIBRATION: [
        click.option(
            "--calib",
            metavar="auto|self|builtin|wikitext2|c4|pile|PATH",
            show_default="auto",
            shell_complete=completion.texts("calibration"),
            help="Calibration text; of a table, FILE:COLUMN reads the column of that name. auto: what the model is at home in, or a "
            "general corpus that is at hand and self, text that the model writes. Several, with the windows of each: c4:64,code.jsonl:64.",
        ),
        click.option("--nsamples", type=int, metavar="N", show_default="128; self: 16,384 tokens", help="Calibration windows."),
        SEQLEN_FLAG,
        click.option(
            "--expert-calibration",
            metavar="routed|all",
            show_default="routed",
            shell_complete=completion.names(lambda: ("routed", "all")),
            help="Which tokens the experts of a mixture are calibrated on: those that are routed to each, or every token (slower).",
        ),
        click.option(
            "--min-expert-tokens",
            type=int,
            metavar="N",
            show_default="32",
            help="An expert that fewer tokens reach is calibrated on those of all experts of its block; 0: never.",
        ),
        click.option(
            "--bos",
            metavar="auto|yes|no",
            show_default="auto",
            help="Whether windows begin with the beginning-of-sequence token; auto: if the tokenizer puts it in front of a text by itself.",
        ),
        click.option("--seed", type=int, metavar="N", show_default="0", help="Of the choice of windows, and of what the model writes."),
        data_dir_option,
    ],
    MACHINE: [
        device_option,
        click.option(
            "--dtype",
            type=click.Choice(["auto", "float32", "bfloat16"]),
            default="auto",
            show_default=True,
            help="Of the calibration passes alone. float32 is quicker on a CPU without bfloat16 arithmetic.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(min=1),
            metavar="N",
            show_default="by window length",
            help="Windows in one forward pass; another number gives other last digits, so other codes of equal quality.",
        ),
        memory_option,
        activation_budget_option,
        processes_option,
    ],
    OUTPUT: [
        click.option(
            "--format",
            metavar="|".join(format_names()),
            show_default=DEFAULT_FORMAT,
            shell_complete=completion.names(format_names),
            help="How the checkpoint is stored.",
        ),
        click.option(
            "--gguf-type",
            metavar="TYPE",
            show_default="q4_k_m",
            help="With --format gguf, a mix of block types in place of bits and groups: q2_k, q4_k_m, q5_0, q6_k and the like.",
        ),
        click.option(
            "--for-tensor-parallel",
            type=int,
            metavar="N",
            show_default="1",
            help="Groups that a server which cuts matrices over N GPUs can take.",
        ),
        click.option(
            "--finish",
            metavar="none|kl",
            show_default="none",
            shell_complete=completion.names(lambda: ("none", "kl")),
            help="kl: when all codes stand, tune the scales to the original's logits, end to end, as `ptq tune-scales` does.",
        ),
        click.option(
            "--adapter-rank",
            type=int,
            metavar="N",
            show_default="0",
            help="Write an adapter of this rank, too, that corrects the linears' errors (EoRA), for peft and vLLM. 32 is usual, 0 is none.",
        ),
        click.option(
            "--output",
            type=NamedPath(),
            metavar="FOLDER",
            shell_complete=completion.folder,
            show_default="./MODEL-ALGO-SCHEME",
            help="Where to write.",
        ),
        OVERWRITE_FLAG,
        click.option(
            "--restart", is_flag=True, help="Begin anew where an earlier run with this output was ended, and would be gone on from."
        ),
        click.option(
            "--allow-requantize",
            is_flag=True,
            help="Take a model whose weights are quantized already; its error stays, and the new one adds to it.",
        ),
        click.option("--dry-run", is_flag=True, help="Say what would be done and what it needs, and stop."),
        json_option,
        quiet_option,
        log_format_option,
    ],
}


def all_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the command with the flags that stand here, in their order."""
    return with_flags([flag for group in FLAGS.values() for flag in group])(function)


def with_flags(flags: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """A decorator that gives a command these flags, in their order."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for add in reversed(flags):
            function = add(function)
        return function

    return decorate


# Flags of the parts


class QuantizeCommand(OneVoice):
    """A command whose flags are also those that the parts declare; they are imported when the flags are first asked for."""

    @property
    def part_options(self) -> list[Option]:
        """The options that have a flag: all but those whose name is taken, which are left to ``--set``."""
        return [declared.option for declared, _ in self._part_flags]

    @cached_property
    def _part_flags(self) -> list[tuple[Declaration, click.Option]]:
        from ptqcli.algorithms import declarations

        taken = {text for param in self.params for text in (param.name, *param.opts, *param.secondary_opts)} | {"--help", "-h"}
        made = [(declared, _flag(declared)) for declared in declarations() if declared.shared]
        return [(declared, flag) for declared, flag in made if taken.isdisjoint((flag.name, *flag.opts, *flag.secondary_opts))]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Those of the parts stand before ``--set``; a shell that completes a word does not wait for them."""
        found = super().get_params(ctx)
        if ctx.resilient_parsing:
            return found
        place = next(index for index, param in enumerate(found) if "--set" in param.opts)
        return [*found[:place], *(flag for _, flag in self._part_flags), *found[place:]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The groups of FLAGS; behind those of the algorithm come those of its parts."""
        own = iter([param for param in self.params if isinstance(param, click.Option)])  # each flag has made one
        for title, flags in FLAGS.items():
            last = [self.get_help_option(ctx)] if title == OUTPUT else []
            _write_group(ctx, formatter, title, [*(next(own) for _ in flags), *filter(None, last)])
            if title == ALGORITHM:
                for parts in dict.fromkeys(declared.parts for declared, _ in self._part_flags):
                    of_parts = [flag for declared, flag in self._part_flags if declared.parts == parts]
                    _write_group(ctx, formatter, f"{ALGORITHM}: options of {', '.join(parts)}", of_parts)


def _write_group(ctx: click.Context, formatter: click.HelpFormatter, title: str, options: Sequence[click.Option]) -> None:
    with formatter.section(title):
        formatter.write_dl([record for option in options if (record := option.get_help_record(ctx)) is not None])


def _flag(declared: Declaration) -> click.Option:
    from ptqcli.options import from_text, kinds

    option = declared.option
    text = f"{option.help[:1].upper()}{option.help[1:]}."
    if kinds(option.hint) == (bool,):
        shown = option.flag if option.default else f"no-{option.flag}"
        return click.Option([f"--{option.flag}/--no-{option.flag}", option.key], default=None, show_default=shown, help=text)

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> object:
        return None if value is None else from_text(option, value)

    default = False if option.default is None else str(option.default)
    return click.Option([f"--{option.flag}", option.key], metavar=option.metavar, show_default=default, callback=convert, help=text)
