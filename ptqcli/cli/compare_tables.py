"""What was found out about checkpoints side by side, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ptqcli.cli.console import Output, size_text
from ptqcli.comparing.words import conditions_text, overlap_lines, rise_text, share_with_error, with_error

SIZE_COLUMNS = ("checkpoint", "size", "bits/weight", "perplexity", "rise", "mean KL (nats)")
KL_COLUMNS = ("checkpoint", "median KL", "99 %", "largest", "same top-1", "shared top-5")
SPEED_COLUMNS = ("checkpoint", "prefill tok/s", "gain", "decode tok/s", "gain")
FLIP_COLUMNS = ("checkpoint", "task", "questions", "changed", "lost", "gained", "accuracy", "of the original", "p")
SHORT = 12  # digits of a hash that is shown


def show_compared(found: Mapping[str, Any], output: Output) -> None:
    """``found``: as ``Compared.to_json`` has it."""
    checkpoints = found["checkpoints"]
    for index, text in enumerate(found["conditions"]["texts"]):
        _show_text(index, text["text"], found, output)
    show_speed(found, output)
    flips = [(each["name"], flip) for each in checkpoints for flip in each["flips"]]
    if flips:
        output.table("Answers that changed", FLIP_COLUMNS, (_flip_row(name, flip) for name, flip in flips))


def show_speed(found: Mapping[str, Any], output: Output) -> None:
    """Tokens a second, where they were measured."""
    timed = [each for each in found["checkpoints"] if each["speed"]]
    if timed:
        speed = timed[0]["speed"]
        title = f"Speed, a prompt of {speed['prompt']} tokens and {speed['new_tokens']} new ones"
        output.table(title, SPEED_COLUMNS, map(_speed_row, timed))


def _show_text(index: int, text: str, found: Mapping[str, Any], output: Output) -> None:
    checkpoints, baseline, front = found["checkpoints"], found["baseline"], found["fronts"][text]
    results = [(each, each["results"][index]) for each in checkpoints]
    first = results[0][1]
    beside = "mean_kl" in first
    rows = [_size_row(each, result, each["name"] in front) for each, result in results]
    if baseline is not None:
        original = with_error(first["baseline_perplexity"], first.get("baseline_perplexity_error"))
        rows.insert(0, [f"{baseline['name']} (baseline)", size_text(baseline["bytes"]), "", original, "", ""])
    title = f"{text}: {first['tokens']:,} tokens in {first['windows']} windows; * no other is both smaller and nearer"
    output.table(title, SIZE_COLUMNS if beside else SIZE_COLUMNS[:4], rows)
    if beside:
        output.table(f"{text}: KL over the tokens, and agreement", KL_COLUMNS, (kl_row(each["name"], result) for each, result in results))
    nearest = [pair for pair in found["pairs"] if pair["text"] == text and _are_neighbours(pair, checkpoints)]
    if nearest:
        columns = ("one, other", "loss of the other, more by", *(["KL of the other, more by"] if beside else []))
        output.table(f"{text}: token by token, neighbours in size", columns, map(_pair_row, nearest))


def _are_neighbours(pair: Mapping[str, Any], checkpoints: Sequence[Mapping[str, Any]]) -> bool:
    order = [each["name"] for each in sorted(checkpoints, key=lambda each: each["bytes"])]
    return abs(order.index(pair["one"]) - order.index(pair["other"])) == 1


def _size_row(checkpoint: Mapping[str, Any], result: Mapping[str, Any], in_front: bool) -> list[str]:
    bits = checkpoint["bits_per_weight"]
    row = [
        checkpoint["name"] + (" *" if in_front else ""),
        size_text(checkpoint["bytes"]),
        "" if bits is None else f"{bits:.3f}",
        with_error(result["perplexity"], result.get("perplexity_error")),
    ]
    return row if "mean_kl" not in result else [*row, rise_text(result), with_error(result["mean_kl"], result.get("mean_kl_error"))]


def kl_row(name: str, result: Mapping[str, Any]) -> list[str]:
    """Under KL_COLUMNS. name: of the row."""
    return [
        name,
        with_error(result["kl_median"], result.get("kl_median_error")),
        with_error(result["kl_99"], result.get("kl_99_error")),
        with_error(result["kl_max"], None),
        share_with_error(result["top1_agreement"], result.get("top1_agreement_error")),
        share_with_error(result["top5_agreement"], result.get("top5_agreement_error")),
    ]


def _pair_row(pair: Mapping[str, Any]) -> list[str]:
    kinds = [kind for kind in ("loss", "kl") if pair[f"{kind}_difference"] is not None]
    numbers = (with_error(pair[f"{kind}_difference"], pair[f"{kind}_difference_error"], sign=True) for kind in kinds)
    return [f"{pair['one']}, {pair['other']}", *numbers]


def _speed_row(checkpoint: Mapping[str, Any]) -> list[str]:
    speed = checkpoint["speed"]
    gains = ["" if speed[f"{kind}_gain"] is None else f"{speed[f'{kind}_gain']:.2f}x" for kind in ("prefill", "decode")]
    rates = [f"{speed[f'{kind}_tokens_per_second']:,.1f}" for kind in ("prefill", "decode")]
    return [checkpoint["name"], rates[0], gains[0], rates[1], gains[1]]


def _flip_row(name: str, flip: Mapping[str, Any]) -> list[str]:
    counted = ["" if flip[key] is None else str(flip[key]) for key in ("lost", "gained")]
    shares = ["" if flip[key] is None else f"{flip[key]:.1%}" for key in ("accuracy", "baseline_accuracy")]
    p = "" if flip["p_value"] is None else f"{flip['p_value']:.3f}"
    return [name, flip["task"], str(flip["questions"]), str(flip["changed"]), *counted, *shares, p]


def show_conditions(found: Mapping[str, Any], output: Output) -> None:
    """In short under which conditions the numbers were found, and what flatters them."""
    output.say()
    output.say(conditions_text(found))
    for name, facts in _hashed(found):
        output.say(f"{name}: SHA-256 {facts['sha256'][:SHORT]}... (of {facts['sha256_of']})")
    for line in overlap_lines(found):
        output.say(line)


def _hashed(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if found["baseline"]:
        yield f"{found['baseline']['name']} (baseline)", found["baseline"]
    yield from ((each["name"], each) for each in found["checkpoints"])
    yield from ((each["text"], {"sha256": each["sha256"], "sha256_of": "the text"}) for each in found["conditions"]["texts"])
