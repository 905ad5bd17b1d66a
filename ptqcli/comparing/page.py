"""A comparison as a page of HTML: one file that needs no other, no network and no program, to be opened from the disk.

All text comes from files of others (names of folders, of layers, of texts) and is escaped where it is put in (``svg.text_of``); for what
might slip through, the page forbids itself scripts and everything from elsewhere (Content-Security-Policy).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptqcli.comparing.charts import block_chart, error_map, kl_chart, size_chart
from ptqcli.comparing.svg import SERIES, element, path, sign, text_of
from ptqcli.comparing.words import conditions_text, overlap_lines, rise_text, share_with_error, size_text, with_error

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
WORST = 10  # layers of a checkpoint
ERRORS_NOTE = (
    "± is a standard error; windows are its units, as tokens of one window are not independent. Differences are taken token by token."
)


def as_page(found: Mapping[str, Any]) -> str:
    """The page. found: as ``Compared.to_json`` has it, with at least one checkpoint that was measured."""
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    names = [each["name"] for each in found["checkpoints"]]
    title = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}: size and quality"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{text_of(title)}</title><style>\n{style}</style>"
    )
    main = element("main", [*_head(found, title), *_quality(found), *_layers(found), *_others(found), *_conditions(found)])
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{main}</body></html>\n'


def _head(found: Mapping[str, Any], title: str) -> Iterator[str]:
    yield element("h1", text_of(title))
    beside = f"beside {found['baseline']['name']}, " if found["baseline"] else ""
    texts = ", ".join(f"{text['text']} ({text['tokens']:,} tokens)" for text in found["conditions"]["texts"])
    yield element("p", text_of(f"Measured {beside}on {texts}, all on the same tokens in one process."), class_="soft")
    for failure in found["failures"]:
        yield element("p", text_of(f"{failure['checkpoint']} could not be measured: {failure['error']}"), class_="warn")
    for line in overlap_lines(found):
        yield element("p", text_of(f"{line}."), class_="warn")
    yield element("ul", (_legend(series, each["name"]) for series, each in enumerate(found["checkpoints"])), class_="legend")


def _legend(series: int, name: str) -> str:
    line = element("path", class_=f"line s{series % SERIES} d{series // SERIES % 3}", d=path([(0, 7), (22, 7)]))
    drawn = element("svg", line + sign(series, 11, 7, name), viewBox="0 0 22 14", aria_hidden="true")
    return element("li", drawn + element("span", text_of(name)))


def _quality(found: Mapping[str, Any]) -> Iterator[str]:
    """For each text a table, size against quality, and the distribution of KL."""
    for index, text in enumerate(found["conditions"]["texts"]):
        name = text["text"]
        results = [(each, each["results"][index]) for each in found["checkpoints"]]
        yield element("h2", text_of(f"On {name}"))
        yield _quality_table(name, results, found)
        note = "Down and to the left is better. The dashed line joins the checkpoints of which none is both smaller and nearer."
        figures = [_figure("Size against quality", size_chart(index, name, found), note)]
        if "mean_kl" in results[0][1]:
            note = "Both axes are logarithmic; the further a line lies to the left, the fewer tokens have moved. A sign marks each line."
            figures.append(_figure("How far single tokens moved", kl_chart(name, found), note))
        yield element("div", figures, class_="charts")
        pairs = [pair for pair in found["pairs"] if pair["text"] == name]
        if pairs:
            yield _pairs_table(name, pairs)
    yield element("p", text_of(ERRORS_NOTE), class_="soft")


def _figure(title: str, chart: str, note: str) -> str:
    return element("figure", element("h3", text_of(title)) + chart + element("figcaption", text_of(note)))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table in a box of its own, which scrolls where it is wider than the page. The first cell of a row names it."""
    head = element("thead", element("tr", (element("th", text_of(column), scope="col") for column in columns)))
    body = element("tbody", (_row(row, style) for row in rows))
    inner = element("table", head + body, class_=style, aria_label=caption)
    box = element("div", inner, class_="box", role="region", tabindex="0", aria_label=f"{caption}: scrolls")
    return element("p", text_of(caption), class_="caption") + box


def _row(cells: Sequence[str], style: str) -> str:
    rest = ({"class_": "wide"} if style and number == len(cells) - 1 else {} for number in range(1, len(cells)))
    cells_after = (element("td", text_of(cell), **marked) for cell, marked in zip(cells[1:], rest, strict=True))
    return element("tr", [element("th", text_of(cells[0]), scope="row"), *cells_after])


def _quality_table(text: str, results: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], found: Mapping[str, Any]) -> str:
    columns = ["checkpoint", "size", "bits per weight", "perplexity"]
    first, baseline, rows = results[0][1], found["baseline"], []
    beside = "mean_kl" in first
    if beside:
        columns += ["rise", "mean KL, nats", "median KL", "99 % KL", "largest KL", "same top-1", "shared top-5", "front"]
    if baseline is not None:
        original = with_error(first["baseline_perplexity"], first.get("baseline_perplexity_error"))
        rows.append([f"{baseline['name']} (baseline)", size_text(baseline["bytes"]), "", original, *[""] * (len(columns) - 4)])
    for each, result in results:
        bits = "" if each["bits_per_weight"] is None else f"{each['bits_per_weight']:.3f}"
        row = [each["name"], size_text(each["bytes"]), bits, with_error(result["perplexity"], result.get("perplexity_error"))]
        in_front = "yes" if each["name"] in found["fronts"][text] else "no"
        rows.append([*row, *_kl_cells(result), in_front] if beside else row)
    return table(f"Size and quality on {text}, {first['tokens']:,} tokens in {first['windows']} windows", columns, rows)


def _kl_cells(result: Mapping[str, Any]) -> list[str]:
    quantiles = [with_error(result[key], result.get(f"{key}_error")) for key in ("mean_kl", "kl_median", "kl_99", "kl_max")]
    shares = [share_with_error(result[key], result.get(f"{key}_error")) for key in ("top1_agreement", "top5_agreement")]
    return [rise_text(result), *quantiles, *shares]


def _pairs_table(text: str, pairs: Sequence[Mapping[str, Any]]) -> str:
    beside = all(pair["kl_difference"] is not None for pair in pairs)
    kinds = {"loss": "log loss, nats", "kl": "mean KL, nats"} if beside else {"loss": "log loss, nats"}
    rows = [
        [
            f"{pair['other']} less {pair['one']}",
            *(with_error(pair[f"{kind}_difference"], pair[f"{kind}_difference_error"], sign=True) for kind in kinds),
        ]
        for pair in pairs
    ]
    inner = table(f"Differences on {text}, token by token", ("pair", *kinds.values()), rows)
    return element("details", element("summary", text_of(f"Every two checkpoints on {text}")) + inner)


def _layers(found: Mapping[str, Any]) -> Iterator[str]:
    """Errors of linears by block, as the reports tell."""
    chart = block_chart(found)
    if chart is None:
        return
    yield element("h2", "Error by layer and block")
    kinds = " or ".join(dict.fromkeys(each["error_kind"] for each in found["checkpoints"] if each["layers"]))
    note = f"Relative error of each linear when it was quantized, of its {kinds}; errors of weights and of outputs do not compare."
    yield element("div", _figure("Mean over the linears of a block", chart, note), class_="charts")
    for each in found["checkpoints"]:
        drawn = error_map(each)
        if drawn is not None:
            box = element("div", drawn, class_="box", role="region", tabindex="0", aria_label=f"Errors of {each['name']}")
            worst = sorted(each["layers"], key=lambda layer: -layer["error"])[:WORST]
            rows = [[layer["name"], f"{layer['error']:.4g}"] for layer in worst]
            inner = box + table(f"Largest errors of {each['name']}", ("linear", "relative error"), rows)
            yield element("details", element("summary", text_of(f"Each linear of {each['name']}")) + inner)


def _others(found: Mapping[str, Any]) -> Iterator[str]:
    """Speed and flips, where they were measured."""
    timed = [each for each in found["checkpoints"] if each["speed"]]
    if timed:
        yield element("h2", "Speed")
        first = timed[0]["speed"]
        caption = f"One sequence, a prompt of {first['prompt']} tokens and {first['new_tokens']} new ones, timed in turn with the baseline"
        columns = ("checkpoint", "prefill, tokens/s", "of the baseline's", "decode, tokens/s", "of the baseline's")
        yield table(caption, columns, map(_speed_cells, timed))
    flips = [(each["name"], flip) for each in found["checkpoints"] for flip in each["flips"]]
    if flips:
        yield element("h2", "Answers that changed")
        asked = ("checkpoint", "task", "questions", "changed", "lost", "gained", "accuracy", "baseline's", "difference", "McNemar's p")
        yield table("Answers to the same questions", asked, (_flip_cells(name, flip) for name, flip in flips))


def _speed_cells(checkpoint: Mapping[str, Any]) -> list[str]:
    speed = checkpoint["speed"]
    cells = [checkpoint["name"]]
    for kind in ("prefill", "decode"):
        gain = speed[f"{kind}_gain"]
        cells += [f"{speed[f'{kind}_tokens_per_second']:,.1f}", "" if gain is None else f"{gain:.2f}x"]
    return cells


def _flip_cells(name: str, flip: Mapping[str, Any]) -> list[str]:
    counts = ["" if flip[key] is None else str(flip[key]) for key in ("questions", "changed", "lost", "gained")]
    if flip["accuracy"] is None:
        return [name, flip["task"], *counts, "", "", "", ""]
    accuracies = [f"{flip[key]:.1%}" for key in ("accuracy", "baseline_accuracy")]
    rise = f"{flip['accuracy_rise']:+.1%} ±{flip['accuracy_rise_error']:.1%}"
    return [name, flip["task"], *counts, *accuracies, rise, f"{flip['p_value']:.3g}"]


def _conditions(found: Mapping[str, Any]) -> Iterator[str]:
    """Everything that the numbers depend on."""
    yield element("h2", "Conditions")
    yield element("p", text_of(conditions_text(found)))
    models = [*([found["baseline"]] if found["baseline"] else []), *found["checkpoints"]]
    columns = ("model", "dtype", "schemes", "SHA-256", "of", "where")
    yield table("Models", columns, (_model_cells(each) for each in models), "words")
    hashed = ("text", "tokens measured, of all", "SHA-256 of the text", "SHA-256 of the token ids")
    rows = [
        [text["text"], f"{text['tokens']:,} of {text['of']:,}", text["sha256"], text["ids_sha256"]] for text in found["conditions"]["texts"]
    ]
    yield table("Texts", hashed, rows, "words")
    shared = ("checkpoint", *(f"of {text['text']}" for text in found["conditions"]["texts"]))
    shares = [[each["name"], *map(_overlap_text, each["calibration_overlap"].values())] for each in found["checkpoints"]]
    yield table("Share of each text that stood in the calibration text", shared, shares)


def _model_cells(model: Mapping[str, Any]) -> list[str]:
    schemes = ", ".join(f"{scheme} x {count}" for scheme, count in model["schemes"].items()) or "not quantized"
    return [model["name"], model["dtype"], schemes, model["sha256"], model["sha256_of"], model["folder"]]


def _overlap_text(overlap: Mapping[str, Any] | None) -> str:
    return "not known" if overlap is None else f"{overlap['share']:.1%} ±{overlap['error']:.1%}"
