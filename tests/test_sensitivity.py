"""What rounding costs, each method against another way to the same numbers."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import EXPERTS, MIXTURES
from test_encoders import make_encoder
from tiny import ARCHITECTURES, make_model, write_text
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.linears import linear_weight, rows_first
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.pipeline.budget import Setting, make_setting, measure_all, usual_method, windows_of
from ptqcli.pipeline.prepare import plan_opened
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.texts import TextMaker
from ptqcli.recipe_loading import load_recipe
from ptqcli.resources import Resources
from ptqcli.sensitivity.compare import divergences
from ptqcli.sensitivity.gradient import Gradient
from ptqcli.sensitivity.groups import Group, Work
from ptqcli.sensitivity.hawq import HAWQ, _signs
from ptqcli.sensitivity.journal import Journal, fingerprint
from ptqcli.sensitivity.kl import KL
from ptqcli.sensitivity.measure import METHODS, measured
from ptqcli.sensitivity.output import BlockOutput
from ptqcli.sensitivity.table import rank_correlation, read_table

CANDIDATES = "w2g16,w3g32,w4g32,w8"
DEMO = Path(ptqcli.__file__).parent / "demo"


def setting_of(folder: Path, text: Path, resources: Resources | None = None, **changes: Any) -> Setting:
    """What measuring the model in ``folder`` needs."""
    asked = {"algo": "rtn", "target_bits": 16.0, "candidates": CANDIDATES, "calib": str(text), "nsamples": 6, "seqlen": 24, **changes}
    recipe, resources = load_recipe(None, asked), resources or Resources(batch_size=2)
    opened, plan = plan_opened(folder, recipe, resources)
    maker = TextMaker(recipe=recipe, skeleton=opened.opened, resources=resources, data_dir=None, progress=NoProgress())
    return make_setting(plan, opened.skeleton, windows_of(plan, maker), resources, NoProgress())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def work(llama: Path, text: Path) -> Work:
    setting = setting_of(llama, text)
    return setting.work(setting.measured_on, "")


def losses(method: Any, work: Work) -> list[list[float | None]]:
    return [row for _, row in sorted(method.losses(work, ()))]


def with_rounded(model: nn.Module, group: Group, number: int, work: Work) -> nn.Module:
    """A copy of ``model`` with a group in one of its candidates."""
    twin = copy.deepcopy(model)
    for site, spec in zip(group.sites, group.options[number] or (), strict=True):
        module = twin.get_submodule(site.name)
        weight = linear_weight(module).detach()
        found = round_to_nearest(weight.float(), spec.scheme, spec.scale_dtype, work.ranges).dequantize(weight.dtype)
        module.weight = nn.Parameter(rows_first(module, found))
    return twin


def test_groups_are_what_servers_run_as_one_matrix(work: Work) -> None:
    assert [group.name for group in work.groups[:4]] == [
        "model.layers.0.self_attn.q_proj|k_proj|v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj|up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert [group.block for group in work.groups] == [0] * 4 + [1] * 4
    assert all(len({spec.scheme for spec in specs or ()}) == 1 for group in work.groups for specs in group.options)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@torch.no_grad()
def test_kl_is_that_of_a_copy_with_the_group_rounded(architecture: str, text: Path, tmp_path: Path) -> None:
    make_model(tmp_path, architecture)
    setting = setting_of(tmp_path, text)
    work = setting.work(setting.measured_on, "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    log_p = model(work.windows).logits.log_softmax(-1)
    found = losses(KL(), work)
    for number in (1, 5):
        for candidate in (0, 2):
            log_q = with_rounded(model, work.groups[number], candidate, work)(work.windows).logits.log_softmax(-1)
            wanted = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            assert found[number][candidate] == pytest.approx(wanted, rel=1e-3)
    assert all(row[0] > row[1] > row[2] > row[3] > 0 for row in found)  # type: ignore[operator]


@torch.no_grad()
def test_output_is_the_error_behind_the_block(llama: Path, work: Work) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    found = losses(BlockOutput(), work)

    def behind(changed: nn.Module, index: int) -> Tensor:
        # The last block's is behind the norm in hidden_states, so hooks are asked.
        seen: list[Tensor] = []
        handle = changed.model.layers[index].register_forward_hook(  # type: ignore[union-attr, index]
            lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        changed(work.windows)
        handle.remove()
        return seen[0]

    for number in (0, 3, 6):
        group = work.groups[number]
        original, rounded = behind(model, group.block), behind(with_rounded(model, group, 0, work), group.block)
        wanted = ((rounded - original).square().sum(-1) / original.square().sum(-1)).mean().item()
        assert found[number][0] == pytest.approx(wanted, rel=1e-3)


def test_gradient_is_the_exact_fisher_information_in_the_mean(llama: Path, text: Path) -> None:
    """All words of the vocabulary are gone through, each with its probability, where the method draws one."""
    setting = setting_of(llama, text, seqlen=3)
    window = setting.measured_on[:1]
    work = setting.work(window.repeat(600, 1), "")
    group = work.groups[5]  # o_proj of the last block
    [site] = group.sites
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    weight = model.get_submodule(site.name).weight
    exact = torch.zeros_like(weight)
    log_p = model(window).logits[0].log_softmax(-1)
    for place in log_p:
        for word in range(len(place)):
            (gradient,) = torch.autograd.grad(place[word], weight, retain_graph=True)
            exact += place[word].exp().item() * gradient.square() / len(log_p)
    specs = group.options[0]
    assert specs is not None
    with torch.no_grad():
        error = round_to_nearest(weight.float(), specs[0].scheme, specs[0].scale_dtype, work.ranges).dequantize(torch.float32) - weight
    wanted = 0.5 * (exact * error.square()).sum().item()
    assert losses(Gradient(), replace(work, groups=[group]))[0][0] == pytest.approx(wanted, rel=0.12)


def test_products_with_the_hessian_are_differences_of_gradients(text: Path, tmp_path: Path) -> None:
    make_model(tmp_path)
    setting = setting_of(tmp_path, text, Resources(dtype=torch.float64), seqlen=12)
    work = setting.work(setting.measured_on[:1], "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    sites = [site for group in work.groups for site in group.sites]
    weights = [model.get_submodule(site.name).weight for site in sites]
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        found = HAWQ._products(work, model, weights, work.windows, torch.Generator().manual_seed(3))

    def gradients(step: float, signs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for weight, sign in zip(weights, signs, strict=True):
                weight += step * sign
        logits = model(work.windows).logits[0, :-1]
        moved = torch.autograd.grad(nn.functional.cross_entropy(logits, work.windows[0, 1:]), weights)
        with torch.no_grad():
            for weight, sign in zip(weights, signs, strict=True):
                weight -= step * sign
        return list(moved)

    generator, step = torch.Generator().manual_seed(3), 1e-3  # the loss is float32
    wanted = torch.zeros(len(sites), dtype=torch.float64)
    for _ in range(2):  # draws
        signs = [_signs(weight, generator) for weight in weights]
        up, down = gradients(step, signs), gradients(-step, signs)
        wanted += torch.stack([(z * (a - b)).sum() / (2 * step) for z, a, b in zip(signs, up, down, strict=True)]).detach()
    assert torch.allclose(found, wanted, rtol=5e-3, atol=5e-3 * wanted.abs().max().item())


def test_hawq_weighs_squared_errors_with_mean_traces(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    traces = {site.name: float(number + 1) for number, site in enumerate(site for group in work.groups for site in group.sites)}
    monkeypatch.setattr(HAWQ, "found", lambda self, work, model: traces)
    found = losses(HAWQ(), work)
    group = work.groups[0]
    wanted = 0.0
    for site, spec in zip(group.sites, group.options[0] or (), strict=True):
        weight = work.skeleton.read(f"{site.name}.weight").float()
        error = round_to_nearest(weight, spec.scheme, spec.scale_dtype, work.ranges).dequantize(torch.float32) - weight
        wanted += traces[site.name] / weight.numel() * error.square().sum().item()
    assert found[0][0] == pytest.approx(wanted, rel=1e-5)


def test_the_comparison_is_that_of_copies(llama: Path, work: Work) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    versions, wanted = [], []
    with torch.no_grad():
        log_p = model(work.windows).logits.log_softmax(-1)
        for number in (0, 3):
            twin = model
            for group in work.groups:
                twin = with_rounded(twin, group, number, work)
            versions.append({spec.name: spec for group in work.groups for spec in group.options[number] or ()})
            log_q = twin(work.windows).logits.log_softmax(-1)
            wanted.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
    assert divergences(work, versions) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_methods_rank_groups_of_a_trained_model_alike() -> None:
    table = ptqcli.measure_sensitivity(DEMO, ["gradient", "kl", "output", "hawq"], calib="builtin", nsamples=8, seqlen=64)
    columns = {method: [loss for group in table.groups for loss in group.losses[method]] for method in table.methods}
    fours = {method: [group.losses[method][2] for group in table.groups] for method in table.methods}
    assert rank_correlation(columns["gradient"], columns["kl"]) > 0.99  # type: ignore[arg-type]
    assert rank_correlation(fours["gradient"], fours["kl"]) > 0.9  # type: ignore[arg-type]
    assert rank_correlation(fours["output"], fours["kl"]) > 0.7  # type: ignore[arg-type]
    assert rank_correlation(fours["hawq"], fours["kl"]) > 0.6  # type: ignore[arg-type]
    # Both are KL in nats, the one to second order.
    assert sum(fours["gradient"]) == pytest.approx(sum(fours["kl"]), rel=0.25)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_all_experts_of_a_block_are_one_group(name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, name, MIXTURES[name])
    make_model(tmp_path, name)
    setting = setting_of(tmp_path, text)
    groups = [group for group in setting.groups if "experts" in group.name]
    assert len(groups) == 2
    assert all(len(group.sites) % EXPERTS == 0 and len(group.sites) >= 2 * EXPERTS for group in groups)
    for method in METHODS.values():
        rows = losses(method, setting.work(setting.measured_on, ""))
        assert all(loss is not None and math.isfinite(loss) and loss >= 0 for row in rows for loss in row)


def test_an_encoder_is_measured_by_its_outputs(text: Path, tmp_path: Path) -> None:
    make_encoder(tmp_path, "BertForMaskedLM")
    setting = setting_of(tmp_path, text)
    assert usual_method(setting) == "output"
    table = measure_all(setting, ["output"])
    assert all(row.losses["output"][0] > row.losses["output"][3] > 0 for row in table.groups)  # type: ignore[operator]
    for method in ("gradient", "kl", "hawq"):
        with pytest.raises(
            UsageError, match=f"sensitivity {method} looks at the next word, and .* of the kind encoder; use --sensitivity out"
        ):
            measure_all(setting, [method])


def test_what_does_not_fit_is_refused_early(llama: Path, text: Path) -> None:
    setting = setting_of(llama, text, Resources(memory=1 << 20))
    with pytest.raises(
        PTQError, match=r"sensitivity kl takes about .* GiB of memory, of which 0.00 GiB may be taken; use --sensitivity output"
    ):
        measure_all(setting, ["kl"])
    assert usual_method(setting) == "output"
    assert usual_method(setting_of(llama, text)) == "gradient"


class Ended(Exception):
    """An interruption."""


def interrupted(work: Work, at: int) -> Work:
    def tell(done: int, total: int) -> None:
        if done == at:
            raise Ended

    return replace(work, tell=tell)


def test_measuring_goes_on_behind_the_groups_that_are_finished(work: Work, tmp_path: Path) -> None:
    file, asked = tmp_path / "found.json", fingerprint(work, [])
    whole = measured(KL(), work, Journal(None, None, asked))[0]
    with pytest.raises(Ended):
        measured(KL(), interrupted(work, at=10), Journal(file, None, asked))  # two groups of four candidates, and half of one
    kept = json.loads(file.read_text())["losses"]["kl"]
    assert kept == {"0": whole[0], "1": whole[1]}
    told: list[tuple[int, int]] = []
    journal = Journal(file, None, asked)
    again = measured(KL(), replace(work, tell=lambda done, total: told.append((done, total))), journal)[0]
    assert again == whole
    assert told[-1] == (6 * 4, 6 * 4)
    journal.finish()
    assert not file.exists()


def test_what_another_request_found_counts_for_nothing(work: Work, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    asked = fingerprint(work, [])
    other = fingerprint(replace(work, windows=work.windows[:1]), [])
    assert asked != other
    Journal(file, None, asked).note("kl", {0: [1.0, 2.0, 3.0, 4.0]}, 1.0)
    assert Journal(file, None, asked).losses("kl", [4, 4]) == {0: [1.0, 2.0, 3.0, 4.0]}
    assert Journal(file, None, asked).losses("kl", [3, 4]) == {}
    assert Journal(file, None, other).losses("kl", [4, 4]) == {}
    damaged = json.loads(file.read_text())
    damaged["losses"]["kl"]["0"][0] = 9.0
    file.write_text(json.dumps(damaged))
    assert Journal(file, None, asked).losses("kl", [4, 4]) == {}


def test_what_a_killed_process_left_goes(work: Work, tmp_path: Path) -> None:
    file, left = tmp_path / "found.json", tmp_path / ".found.json.tmp"
    left.write_text("half of")
    journal = Journal(file, None, fingerprint(work, []))
    journal.note("kl", {0: [1.0]}, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    left.write_text("half of")
    journal.finish()
    assert not list(tmp_path.iterdir())


def test_a_file_of_somebody_else_is_not_replaced(work: Work, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_text('{"mine": 1}')
    with pytest.raises(PTQError, match=r"found.json: is in the place of what is found of sensitivities, and is something else"):
        Journal(file, None, fingerprint(work, []))
    assert file.read_text() == '{"mine": 1}'


def test_the_next_command_takes_what_is_in_the_cache(work: Work, tmp_path: Path) -> None:
    asked = fingerprint(work, [])
    journal = Journal(tmp_path / "found.json", tmp_path / "cache", asked)
    whole = measured(BlockOutput(), work, journal)[0]
    journal.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    again = Journal(tmp_path / "other.json", tmp_path / "cache", asked)
    assert again.losses("output", [4] * 8) == dict(enumerate(whole))


def test_a_model_that_is_rewritten_is_measured_by_itself(llama: Path, text: Path, tmp_path: Path) -> None:
    kept = Resources(cache=tmp_path, batch_size=2)
    tables = [measure_all(setting_of(llama, text, kept, algo=algo), ["output"]) for algo in ("rtn", "rotate+rtn", "rtn")]
    assert len(list(tmp_path.iterdir())) == 2
    assert tables[0] == tables[2]
    assert tables[0].groups[0].losses != tables[1].groups[0].losses


def test_a_table_comes_back_from_its_file(llama: Path, text: Path, tmp_path: Path) -> None:
    table = measure_all(setting_of(llama, text), ["output", "gradient"])
    table.write(tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == table
    assert table.best_method == "gradient"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("about",), "else", "holds no sensitivities"),
        (("version",), 2, "holds no sensitivities"),
        (("groups", 0, "losses", "output", 0), "x", "is damaged ('x' in the place of a number)"),
        (("groups", 0, "losses", "output", 0), -1.0, "is damaged (a loss of -1.0)"),
        (("groups", 0, "losses", "output", 0), math.nan, "is damaged (nan in the place of a number)"),
        (("groups", 0, "losses", "output"), [1.0], "a group with other than 4 candidates"),
        (("groups", 0, "losses"), {}, "a group without losses"),
        (("groups", 0, "weights"), -3, "in the place of a whole number"),
        (("units",), {"guess": "x"}, "methods ['guess']"),
        (("groups",), 3, "in the place of a list"),
        (("candidates", 0), 3, "in the place of a text"),
    ],
)
def test_what_is_no_table_is_named(place: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    group = {"name": "a", "linears": ["a"], "weights": 4, "nbytes": [1, 2, 3, 4], "losses": {"output": [4.0, 3.0, 2.0, None]}}
    table: Any = {
        "about": "sensitivities of `ptq sensitivity`",
        "version": 1,
        "model": "m",
        "candidates": CANDIDATES.split(","),
        "format": "f",
        "texts": "t",
        "windows": {"output": 1},
        "tokens": {"output": 1},
        "seconds": {"output": 1.0},
        "units": {"output": "u"},
        "groups": [group],
    }
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    assert read_table(file).groups[0].losses["output"][3] is None
    *path, last = place
    target = table
    for key in path:
        target = target[key]
    target[last] = value
    file.write_text(json.dumps(table))
    with pytest.raises(PTQError) as error:
        read_table(file)
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_rank_correlation_is_that_of_scipy_s_examples() -> None:
    assert rank_correlation([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))
    assert math.isnan(rank_correlation([1.0], [1.0]))
