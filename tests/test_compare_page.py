"""The page of ``ptq compare``: sound HTML that needs nothing else, and whatever stands in files of others is text in it."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import Chromium, find_chromium

from ptqcli.comparing import charts
from ptqcli.comparing.page import as_page
from ptqcli.comparing.picture import build
from ptqcli.comparing.svg import Axis, apart
from ptqcli.comparing.words import with_error

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e$x_1$ </svg><img src=x onerror=alert(2)>"
VOID = {"meta", "img", "br"}
ADDRESS = re.compile(r"(?:https?:|//|@import|url\(|src=|href=)")


def result(text: str, kl: float) -> dict[str, Any]:
    return {
        "text": text, "perplexity": 12.0 + kl, "mean_nll": 2.5, "tokens": 1000, "windows": 10, "seqlen": 101, "stride": 101, "bos": False,
        "perplexity_error": 0.5, "mean_nll_error": 0.05, "baseline_perplexity": 12.0, "baseline_perplexity_error": 0.5, "loss_rise": kl,
        "loss_rise_error": kl / 10, "perplexity_ratio": 1 + kl, "perplexity_ratio_error": kl / 10, "mean_kl": kl, "mean_kl_error": kl / 20,
        "kl_median": kl / 2, "kl_median_error": kl / 20, "kl_99": 5 * kl, "kl_99_error": kl, "kl_max": 20 * kl, "top1_agreement": 0.9,
        "top1_agreement_error": 0.01, "top5_agreement": 0.8, "top5_agreement_error": 0.01,
    }  # fmt: skip


def checkpoint(name: str, size: int, kl: float, texts: list[str]) -> dict[str, Any]:
    curve = [(p / 100, kl * 20 ** (p / 50 - 1)) for p in range(0, 101, 2)]
    names = [f"model.layers.{block}.{kind}" for block in range(3) for kind in ("self_attn.q_proj", f"mlp.{name[:20]}")]
    return {
        "name": name, "folder": f"/tmp/{name}", "bytes": size, "bits_per_weight": 4.25, "schemes": {"w4a16-g64": 6}, "dtype": "float32",
        "sha256": "ab" * 32, "sha256_of": "SHA256SUMS", "adapter": False, "kernels": {"W4A16 torch": 6},
        "results": [result(text, kl) for text in texts],
        "calibration_overlap": {text: {"share": 0.12, "error": 0.01, "ngrams": 100} for text in texts},
        "kl_curve": dict.fromkeys(texts, curve),
        "layers": [{"name": each, "error": 0.01 * (index + 1)} for index, each in enumerate(names)], "error_kind": "output",
        "flips": [{
            "task": "arc", "questions": 200, "changed": 10, "lost": 2, "gained": 8, "accuracy": 0.7, "baseline_accuracy": 0.67,
            "accuracy_rise": 0.03, "accuracy_rise_error": 0.0156, "p_value": 0.109,
        }],
        "speed": {
            "prompt": 128, "new_tokens": 32, "prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 10.0, "prefill_gain": 1.5,
            "decode_gain": None,
        },
    }  # fmt: skip


def comparison(names: tuple[str, ...] = ("w8", "w4", "w2"), texts: tuple[str, ...] = ("builtin", "wiki.txt")) -> dict[str, Any]:
    """As ``Compared.to_json`` would have it."""
    found = [checkpoint(name, (8 - index) << 20, 0.001 * 10**index, list(texts)) for index, name in enumerate(names)]
    pairs = [
        {"text": text, "one": names[0], "other": other, "loss_difference": 0.1, "loss_difference_error": 0.01, "kl_difference": 0.2,
         "kl_difference_error": 0.02}
        for text in texts for other in names[1:]
    ]  # fmt: skip
    baseline = {key: found[0][key] for key in ("folder", "schemes", "dtype", "sha256", "sha256_of")}
    return {
        "baseline": {**baseline, "name": "model", "bytes": 16 << 20, "bits_per_weight": None},
        "conditions": {
            "seqlen": 101, "stride": 101, "bos": False, "device": "cpu", "kernel": "auto", "versions": {"ptqcli": "1"},
            "texts": [{"text": text, "tokens": 1010, "of": 2000, "sha256": "cd" * 32, "ids_sha256": "ef" * 32} for text in texts],
        },
        "checkpoints": found, "pairs": pairs, "fronts": {text: list(names) for text in texts}, "failures": [],
    }  # fmt: skip


class Reader(HTMLParser):
    """Reads a page, and is not content with tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def test_the_page_is_sound_and_needs_nothing_else() -> None:
    page = as_page(comparison())
    reader = read(page)
    assert {tag for tag, _, _ in reader.attributes}.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    outside = page.replace("http-equiv=", "")
    assert ADDRESS.search(outside) is None
    text = " ".join(reader.words)
    for said in (
        "w8",
        "Size against quality",
        "builtin",
        "wiki.txt",
        "12% of wiki.txt stood in the calibration text of w4",
        "SHA-256",
        "±",
    ):
        assert said in text
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["On builtin", "On wiki.txt", "Error by layer and block", "Speed", "Answers that changed", "Conditions"]


def test_whoever_does_not_see_is_told() -> None:
    page = as_page(comparison())
    reader = read(page)
    assert ("html", "lang", "en") in reader.attributes
    pictures = [drawing for drawing in drawings(page) if drawing.get("aria-hidden") != "true"]
    assert len(pictures) == 2 + 2 + 1 + 3
    for drawing in pictures:
        assert (drawing.get("role"), bool(drawing.get("aria-label"))) == ("img", True)
        assert drawing[0].tag == "title"
    scopes = [value for tag, name, value in reader.attributes if (tag, name) == ("th", "scope")]
    assert scopes.count("col") > 10
    assert len(scopes) == page.count("<th ")
    boxes = [value for tag, name, value in reader.attributes if name == "role" and value == "region"]
    assert len(boxes) == page.count('class="box"') == page.count('tabindex="0"')


@pytest.mark.parametrize("kl", [0.0, 1e-300, 1e-9, 1.0, 1e12])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_every_coordinate_is_finite_and_in_the_picture(kl: float, count: int) -> None:
    found = comparison(tuple(f"w{index}" for index in range(count)))
    for each in found["checkpoints"]:
        for entry in each["results"]:
            entry.update(dict.fromkeys(("mean_kl", "mean_kl_error"), kl))
        each["kl_curve"] = {text: [(p, kl * value) for p, value in curve] for text, curve in each["kl_curve"].items()}
        each["layers"][0]["error"] = kl * 1e288
    page = as_page(found)
    assert "nan" not in page.lower().replace("nano", "")
    for drawing in drawings(page):
        _, _, width, height = (float(number) for number in str(drawing.get("viewBox")).split())
        for part in drawing.iter():
            for name in ("x", "x1", "x2", "width"):
                assert 0 <= float(part.get(name) or 0) <= width
            for name in ("y", "y1", "y2", "height"):
                assert 0 <= float(part.get(name) or 0) <= height
            numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", part.get("d") or "")]
            assert all(math.isfinite(number) and -20 <= number <= width + 20 for number in numbers)


@pytest.mark.parametrize("place", ["name", "text", "layer", "folder", "failure", "kernel", "version"])
def test_a_hostile_name_is_text(place: str) -> None:
    found = comparison(("w8", HOSTILE) if place == "name" else ("w8", "w4"), ("builtin", HOSTILE) if place == "text" else ("builtin",))
    last = found["checkpoints"][-1]
    if place == "layer":
        last["layers"][0]["name"] = f"model.layers.0.{HOSTILE}"
    elif place == "folder":
        last["folder"] = HOSTILE
    elif place == "failure":
        found["failures"] = [{"checkpoint": HOSTILE, "error": HOSTILE}]
    elif place == "kernel":
        last["kernels"] = {HOSTILE: 1}
    elif place == "version":
        found["conditions"]["versions"][HOSTILE] = HOSTILE
    page = as_page(found)
    reader = read(page)
    tags = {tag for tag, _, _ in reader.attributes}
    assert tags.isdisjoint({"script", "img"})
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert any("<script>alert(1)</script>" in words for words in [*reader.words, *(value for _, _, value in reader.attributes)])
    drawings(page)
    assert build(found).axes  # matplotlib takes no name for a formula


def test_what_is_not_known_is_left_out() -> None:
    """Another program's checkpoints without a baseline: no KL, no layers, no share, no speed."""
    found = comparison(("one", "two"), ("builtin",))
    found["baseline"] = None
    for pair in found["pairs"]:
        pair["kl_difference"] = pair["kl_difference_error"] = None
    for each in found["checkpoints"]:
        kept = ("text", "perplexity", "mean_nll", "tokens", "windows", "seqlen", "stride", "bos")
        each["results"] = [{key: entry[key] for key in kept} for entry in each["results"]]
        each.update(layers=[], kl_curve={}, speed=None, flips=[], bits_per_weight=None, calibration_overlap={"builtin": None})
    page = as_page(found)
    text = " ".join(read(page).words)
    assert "KL" not in text.replace("KL over", "")
    assert "Error by layer" not in text
    assert "not known" in text
    assert "one: nothing tells which text it was calibrated on" in text
    assert build(found).axes


def test_errors_are_grouped_by_block_and_kind() -> None:
    layers = [
        {"name": f"model.layers.{block}.mlp.experts.{expert}.up_proj", "error": block + expert} for block in (0, 10) for expert in (1, 3)
    ] + [{"name": "lm_head", "error": 9.0}, {"name": "transformer.h.0.attn.c_attn", "error": 0.5}]
    assert charts.by_block(layers) == {"mlp.experts.*.up_proj": {0: 2.0, 10: 12.0}, "attn.c_attn": {0: 0.5}}


def test_axes() -> None:
    axis = Axis.around([1.0, 3.0], 0.0, 100.0)
    assert axis.at(2.0) == pytest.approx(50)
    assert axis.at(1.0) < 50 < axis.at(3.0)
    assert axis.ticks() == [1.0, 1.5, 2.0, 2.5, 3.0]
    decades = Axis.around([1e-4, 1.0], 100.0, 0.0, logarithmic=True)
    assert decades.at(1e-2) == pytest.approx(50)
    assert {1e-4, 1e-3, 1e-2, 1e-1, 1.0} <= {float(f"{tick:.3g}") for tick in decades.ticks()}
    for odd in (math.inf, -math.inf, math.nan, 0.0, -1.0):
        assert 0 <= decades.at(odd) <= 100
    assert apart([10.0, 11.0, 50.0], 12, 0, 100) == [10.0, 22.0, 50.0]


def test_numbers_with_their_errors() -> None:
    assert with_error(12.3456, 0.0123) == "12.346 ±0.012"
    assert with_error(145.3, 18.7) == "145 ±19"
    assert with_error(0.00029293, 0.0000038) == "(2.929 ±0.038)e-4"
    assert with_error(-0.023, 0.0171, sign=True) == "-0.023 ±0.017"
    assert with_error(0.5, None) == "0.5"
    assert with_error(0.0, 0.0) == "0"


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is on the PATH, and PTQ_CHROMIUM names none")
    found = Chromium(program)
    yield found
    found.close()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(browser: Chromium, tmp_path: Path, width: int, dark: bool) -> None:
    """From the disk: nothing in the console, nothing asked for, no scrolling sideways, letters that stand out from what is behind them."""
    page = tmp_path / "a page.html"
    page.write_text(as_page(comparison(("w8", HOSTILE, "a" * 120), ("builtin", "b" * 200))), encoding="utf-8")
    browser.problems.clear()
    browser.open(page, width, dark)
    browser.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.problems == []
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value("document.querySelectorAll('script, img').length") == 0
    colours = browser.value("['color', 'backgroundColor'].map(each => getComputedStyle(document.body)[each])")
    ink, back = (luminance(colour) for colour in colours)
    assert (ink > back) is dark
    assert contrast(ink, back) > 7
    series = browser.value("[...document.querySelectorAll('.legend .sign')].map(each => getComputedStyle(each).fill)")
    assert all(contrast(luminance(colour), back) > 3 for colour in series)
    sizes = browser.value("[...document.querySelectorAll('figure svg .tick')].map(each => each.getBoundingClientRect().height)")
    assert min(sizes) > 9  # pixels that the letters are high
    assert browser.picture().startswith(b"\x89PNG")


def luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)``, as WCAG 2.1 defines it."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
