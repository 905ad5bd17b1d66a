"""The model card, ``README.md`` in the checkpoint: what the model is, how it was made, how each reader loads it.

The hub reads its front matter. The same work gives the same card, wherever it was done: no path of the machine stands in it, and of a
local model only the folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import ptqcli
from ptqcli.calibration.sources import Share, read_calib, shares_text
from ptqcli.checkpoint.auxiliary import ADAPTER
from ptqcli.checkpoint.directory import Directory
from ptqcli.errors import UsageError
from ptqcli.formats import Reader
from ptqcli.model.locate import hub_id, model_name
from ptqcli.pipeline.report import REPORT_NAME, Report, TuningReport
from ptqcli.plan import Plan
from ptqcli.sensitivity.allocation import Allocation

CARD_NAME = "README.md"
FOLDER = "path/to/this/folder"  # in what a reader is told to write
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's LoRA kernels
WORST_LAYERS = 5
MEASURED = "## Measured"
ITS_ADAPTER = "## Its adapter"
WORST = "## Worst layers"
STALE = (MEASURED, f"{MEASURED}, with its adapter", ITS_ADAPTER)  # sections that hold for these very codes and scales
MOST_NAMES = 8
# Keys that a card hands on to the card of what is made of the model, where they are one plain word or address.
CARRIED_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")
CARD_BYTES = 1 << 16  # of the model's own card that are looked at


MADE_BY, CONVERTED_BY = "quantized by ptqcli with", "converted by ptqcli"  # one of them in every card that is written here


def is_card(text: str) -> bool:
    """Whether ``text`` was a card of ours, whatever was added to it; a README that somebody else wrote is not."""
    return MADE_BY in text or CONVERTED_BY in text


def model_card(plan: Plan, report: Report, source: Path | None) -> str:
    """The card of what ``plan`` has become. source: the folder of the model, None for one in memory."""
    base, name = hub_id(source), model_name(source)
    schemes = ", ".join(str(scheme) for scheme in plan.schemes())
    lines = [
        "---",
        *_front_matter(plan, base, source),
        "---",
        "",
        f"# {name}, {schemes}",
        "",
        f"{base or name} {MADE_BY} `{plan.recipe.algo}`: {len(plan.linears)} linears in {schemes}, the rest as it was.",
        *([] if report.tuning is None else ["", tuning_text(report.tuning)]),
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in _facts(plan, report, base or name)),
        "",
        "## Loading it",
        "",
        *_loading(plan.readers, plan.writes),
        *_adapter(plan),
        WORST,
        "",
        *_worst_layers(report),
        *([] if report.allocation is None else _budget(report.allocation)),
    ]
    if plan.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in plan.notes)]
    lines += ["", "## Recipe", "", *(f"    {line}" for line in _recipe(plan).splitlines())]
    return "\n".join(lines) + "\n"


def tuning_text(tuning: TuningReport) -> str:
    """What was done to the scales when the codes stood."""
    if not tuning.best_step:
        return "Tuning its scales end to end brought nothing on the windows held out, and they are as they were."
    what = "Its scales, and gains and biases," if tuning.norms else "Its scales"
    text = f"{tuning.nsamples} windows of {tuning.seqlen} tokens from {Path(tuning.calib).name}, seed {tuning.seed}"
    gain = f"mean KL on the {tuning.held_out} of them that were held out {tuning.kl_before:.5f} before, {tuning.kl_after:.5f} after"
    return f"{what} were then tuned end to end to the original's logits ({tuning.steps} steps, {text}): {gain}."


def tuned_card(text: str, tuning: TuningReport) -> str:
    """The card ``text`` of ours, with what was done to the scales since; the adapter, which fits the old ones, has not come along.

    What was measured goes, too, unless the scales are as they were.
    """
    lines = _without(text.splitlines(), STALE if tuning.best_step else STALE[1:])
    place = next(number for number, line in enumerate(lines) if MADE_BY in line) + 1
    return "\n".join([*lines[:place], "", tuning_text(tuning), *lines[place:]]) + "\n"


def converted_card(
    text: str,
    checkpoint: Path,
    formats: tuple[str, str],
    schemes: tuple[Sequence[str], Sequence[str]],
    facts: Mapping[str, str],
    errors: Mapping[str, float],
    readers: tuple[Reader, ...],
) -> str:
    """The card of a checkpoint in another format. text: its card so far, of ours or of others. formats, schemes: the old and the new ones.

    facts: what its table says now, by the name of the row. errors: relative, of the linears that were rounded anew; where there are any,
    what the card says of errors, the adapter and what was measured goes.
    """
    old, new = formats
    done = f"It was {CONVERTED_BY} from {old} to {new}" + (
        f"; {len(errors)} linears were rounded anew, with a mean relative error of {sum(errors.values()) / len(errors):.4f}."
        if errors
        else ", every code, scale and zero point as it was."
    )
    loading = ["## Loading it", "", *_loading(readers)]
    if not is_card(text):
        front = ["---", "library_name: transformers", *(f"{key}: {value}" for key, value in _carried(checkpoint).items())]
        tags = ["tags:", *(f"- {tag}" for tag in ("ptqcli", "quantized", new, *schemes[1])), "---", ""]
        return "\n".join([*front, *tags, f"# {model_name(checkpoint)}, {', '.join(schemes[1])}", "", done, "", *loading]) + "\n"
    lines = [_as_it_is(line, facts) for line in text.splitlines() if CONVERTED_BY not in line]
    lines = _tagged_anew(lines, [old, *schemes[0]], [new, *schemes[1]])
    if errors:
        lines = _without(lines, (*STALE, WORST))
    place = next((number for number, line in enumerate(lines) if MADE_BY in line), lines.index("## Loading it") - 2) + 1
    begin, end = _section(lines, "## Loading it")
    return "\n".join([*lines[:place], "", done, *lines[place:begin], *loading, *lines[end:]]) + "\n"


def _section(lines: Sequence[str], title: str) -> tuple[int, int]:
    """Where the section of this title begins, and where it ends."""
    begin = lines.index(title)
    return begin, next((number for number in range(begin + 1, len(lines)) if lines[number].startswith("## ")), len(lines))


def _as_it_is(line: str, facts: Mapping[str, str]) -> str:
    """A line of the card, with what ``facts`` says of it if it is that row of the table."""
    what = line.removeprefix("| ").partition(" | ")[0]
    return f"| {what} | {facts[what]} |" if line.startswith("| ") and what in facts else line


def _tagged_anew(lines: Sequence[str], old: Sequence[str], new: Sequence[str]) -> list[str]:
    """``lines`` with the tags ``new`` in the place of ``old``, format and schemes, and the schemes in the title."""
    end = next((number for number, line in enumerate(lines) if line.startswith("# ")), len(lines))
    front = [line for line in lines[:end] if line not in {f"- {tag}" for tag in old}]
    place = front.index("---", 1) if "---" in front[1:] else len(front)
    title = [f"{line.partition(', ')[0]}, {', '.join(new[1:])}" for line in lines[end : end + 1]]
    return [*front[:place], *(f"- {tag}" for tag in new), *front[place:], *title, *lines[end + 1 :]]


def _without(lines: Sequence[str], titles: Sequence[str]) -> list[str]:
    """``lines`` without the sections of these titles."""
    kept = list(lines)
    for title in titles:
        if title in kept:
            begin, end = _section(kept, title)
            del kept[begin:end]
    return kept


def check_card(folder: Path) -> None:
    """Raise UsageError for a checkpoint without a card of ours, to which nothing is added."""
    card = folder / CARD_NAME
    if card.is_symlink() or not card.is_file() or not is_card(card.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(f"{card}: is no model card of ptqcli; leave --write-card out, or quantize again")


def write_measured(folder: Path, results: Sequence[Mapping[str, Any]], adapter: bool) -> None:
    """Put ``results``, as `ptq eval --json` has them, into the card in ``folder``, in the place of earlier ones."""
    check_card(folder)
    with closing(Directory(folder)) as place:
        identity = place.identity_of(CARD_NAME)
        old = b"".join(place.pieces(CARD_NAME)).decode(errors="replace")
        place.remove(f"{CARD_NAME}.tmp")  # of an earlier one that was interrupted
        place.write(f"{CARD_NAME}.tmp", [measured_card(old, results, adapter).encode()])
        place.rename(f"{CARD_NAME}.tmp", CARD_NAME, identity)
        place.sync()


def measured_card(text: str, results: Sequence[Mapping[str, Any]], adapter: bool) -> str:
    """The card ``text`` of ours with what was measured; of a path to a text stands its name."""
    title = f"{MEASURED}, with its adapter" if adapter else MEASURED
    lines = [*_measured(title, results), ""]
    old = text.splitlines()
    if title in old:
        begin, end = _section(old, title)
    else:
        begin = end = next((number for number, line in enumerate(old) if line in (WORST, "## Notes", "## Recipe")), len(old))
    return "\n".join([*old[:begin], *lines, *old[end:]]).rstrip() + "\n"


def _measured(title: str, results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    first = results[0]
    begun = ", each with the beginning-of-sequence token in front" if first["bos"] else ""
    yield from (title, "", f"Perplexity over windows of {first['seqlen']} tokens, {first['stride']} from one to the next{begun}.", "")
    beside = "mean_kl" in first
    yield "| text | tokens | perplexity |" + (" of the original | mean KL to it, nats | same top-1 |" if beside else "")
    yield "|---|---|---|" + ("---|---|---|" if beside else "")
    for result in results:
        row = f"| {Path(result['text']).name} | {result['tokens']:,} | {result['perplexity']:.4f} |"
        if beside:
            row += f" {result['baseline_perplexity']:.4f} | {result['mean_kl']:.5f} | {result['top1_agreement']:.2%} |"
        yield row


def _front_matter(plan: Plan, base: str | None, source: Path | None) -> Iterator[str]:
    if base is not None:
        yield f"base_model: {base}"
        yield "base_model_relation: quantized"
    yield "library_name: transformers"
    carried = _carried(source)
    yield from (f"{key}: {value}" for key, value in carried.items())
    yield "tags:"
    algorithm = [part.name for part in plan.recipe.algorithm.parts]
    yield from (f"- {tag}" for tag in ["ptqcli", "quantized", plan.recipe.format, *algorithm, *map(str, plan.schemes())])


def _carried(source: Path | None) -> dict[str, str]:
    """What the model's own card says that is true of this one, too."""
    if source is None or not (source / CARD_NAME).is_file():
        return {}
    with open(source / CARD_NAME, encoding="utf-8", errors="replace") as file:
        text = file.read(CARD_BYTES)
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    lines = front[1].splitlines() if front else []
    pairs = [found for line in lines if (found := re.fullmatch(r"(\w+): *[\"']?([\w.:/+-]+)[\"']?", line))]
    return {found[1]: found[2] for found in pairs if found[1] in CARRIED_KEYS}


def stored_facts(schemes: Mapping[str, int], bits_per_weight: float, bytes_before: int, bytes_after: int) -> dict[str, str]:
    """What the card says of what is stored. schemes: how many linears have each. bytes_before: of the original."""
    return {
        "linears": ", ".join(f"{scheme} x {count}" for scheme, count in schemes.items()),
        "bits per weight": f"{bits_per_weight:.3f} in them, everything stored for them counted",
        "size": f"{bytes_before / 1e6:,.1f} MB before, {bytes_after / 1e6:,.1f} MB after",
    }


def _facts(plan: Plan, report: Report, base: str) -> Iterator[tuple[str, str]]:
    recipe = plan.recipe
    yield "made from", base
    yield "algorithm", recipe.algo
    counts = {str(scheme): count for scheme, count in plan.schemes().items()}
    yield from stored_facts(counts, report.bits_per_weight, report.bytes_before, report.bytes_after).items()
    if plan.skipped:
        more = f" and {len(plan.skipped) - MOST_NAMES} more" if len(plan.skipped) > MOST_NAMES else ""
        yield "left as they are", ", ".join(f"`{name}` ({reason})" for name, reason in plan.skipped[:MOST_NAMES]) + more
    if plan.needs_calibration:
        named = [Share(Path(share.source).name, share.windows) for share in plan.texts.shares]
        yield "calibration", f"{shares_text(named, plan.seqlen)}, seed {recipe.seed}"
    yield "made with", f"ptqcli {ptqcli.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"


def _loading(readers: tuple[Reader, ...], writes: bool = True) -> Iterator[str]:
    for reader in readers:
        if reader.refusal is not None:
            yield f"{reader.name} does not load it: {reader.refusal}."
            yield ""
            continue
        install = f" (`{reader.install}`)" if reader.needs else ""
        yield from (f"In {reader.name}{install}:", "", f"```{reader.language}")
        yield from (reader.code_for(FOLDER), "```", "")
    speaking = [f'ptq generate {FOLDER} "text"'] if writes else []
    yield from ("In ptqcli:", "", "```sh", f"ptq eval {FOLDER} --ppl wikitext2", *speaking, "```", "")


def _adapter(plan: Plan) -> Iterator[str]:
    """How the adapter beside the checkpoint is added to it."""
    rank = plan.recipe.adapter_rank
    if not rank:
        return
    yield from (ITS_ADAPTER, "")
    yield f"`{ADAPTER}` holds low-rank matrices (EoRA, rank {rank}) that correct the error of each quantized linear. It is optional:"
    yield from ("", "```sh", f"ptq eval {FOLDER} --adapter")
    yield f"vllm serve {FOLDER} --enable-lora --max-lora-rank {_served_rank(rank)} --lora-modules corrected={FOLDER}/{ADAPTER}"
    yield from ("```", "", "```python", f'model = PeftModel.from_pretrained(model, "{FOLDER}/{ADAPTER}")', "```", "")


def _served_rank(rank: int) -> int:
    """The least ``max_lora_rank`` of vLLM that holds ``rank``."""
    return next(least for least in SERVED_RANKS if least >= rank)


def _worst_layers(report: Report) -> Iterator[str]:
    yield f"By relative {report.error_kind} error; all layers are in `{REPORT_NAME}`."
    yield from ("", "| layer | scheme | error |", "|---|---|---|")
    for layer in sorted(report.layers, key=lambda layer: -layer.relative_error)[:WORST_LAYERS]:
        yield f"| `{layer.name}` | {layer.scheme} | {layer.relative_error:.4f} |"


def _budget(allocation: Allocation) -> Iterator[str]:
    """How the schemes were chosen, and how many groups of linears got each."""
    yield from ("", "## Bits under a budget", "")
    yield from (f"- {what}: {value}" for what, value in allocation.rows())
    for scheme in allocation.candidates:
        groups = [group for group in allocation.groups if group.scheme == scheme]
        yield f"- {scheme}: {len(groups)} of {len(allocation.groups)} groups, {sum(group.weights for group in groups):,} weights"


def _recipe(plan: Plan) -> str:
    """The request as YAML; of a path to a text only its name."""
    stored: dict[str, Any] = {key: value for key, value in plan.recipe.stored().items() if value not in (None, (), [], {})}
    shares = read_calib(plan.recipe.calib)
    named = [Path(share.source).name + (f":{share.windows}" if share.windows else "") for share in shares]
    stored["calib"] = ",".join(named)
    return yaml.safe_dump(_plain(stored), sort_keys=False)


def _plain(value: Any) -> Any:
    """``value`` in lists and dictionaries, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
