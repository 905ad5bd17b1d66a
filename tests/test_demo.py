"""What the toolkit promises on the demo model that it carries: GPTQ repairs most of what rounding breaks."""

from pathlib import Path

import pytest
import torch

import ptqcli
from ptqcli.calibration.text import evaluation_ids
from ptqcli.checkpoint.auxiliary import load_tokenizer
from ptqcli.evaluation.divergence import compare
from ptqcli.evaluation.perplexity import perplexity
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import Recipe
from ptqcli.runtime import load_quantized

DEMO = Path(ptqcli.__file__).parent / "demo"
TOKENS = 4096
WINDOW = 256

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def held_out():
    return evaluation_ids("builtin", load_tokenizer(DEMO))[:TOKENS]


@pytest.fixture(scope="module")
def demo():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO).eval()


@pytest.fixture(scope="module")
def original(demo, held_out):
    return perplexity(demo, held_out, WINDOW).perplexity


def quantized(folder, **changes):
    quantize(DEMO, Recipe(nsamples=64, seqlen=WINDOW, **changes), folder)
    return load_quantized(folder)


def rise(held_out, original, folder, **changes):
    return perplexity(quantized(folder, **changes), held_out, WINDOW).perplexity - original


# Plain min-max ranges, and what the defaults leave of their divergence, each with some room.
PLAIN = {"gptq": {"scale_search": "minmax", "signed": False, "polish": 0}}


@pytest.mark.parametrize("bits, group, share", [(4, 128, 0.9), (3, 128, 0.8), (2, 64, 0.65)])
def test_the_defaults_stay_closer_to_the_original_than_plain_ranges(bits, group, share, demo, held_out, tmp_path):
    """At every width: what is best at one of them may be what ruins another, as clipped ranges do at 2 bits."""

    def divergence(name, options):
        model = quantized(tmp_path / name, algo="gptq", wbits=bits, group_size=group, options=options)
        return compare(model, demo, held_out, WINDOW).mean_kl

    defaults, plain = divergence("defaults", {}), divergence("plain", PLAIN)
    assert 0 < defaults < share * plain


@pytest.mark.parametrize("bits, group", [(3, 128), (2, 64)])
def test_the_rise_in_perplexity_is_at_most_two_fifths_of_rounding(bits, group, held_out, original, tmp_path):
    scheme = {"wbits": bits, "group_size": group}
    rounded = rise(held_out, original, tmp_path / "rtn", algo="rtn", **scheme)
    solved = rise(held_out, original, tmp_path / "gptq", algo="gptq", **scheme)
    assert rounded > 0.02 * original, "at this width rounding has to hurt, or the comparison means nothing"
    assert solved < 0.4 * rounded


def test_four_bits_stay_close_to_the_original(held_out, original, tmp_path):
    assert rise(held_out, original, tmp_path / "w4") < 0.03 * original


def test_the_demo_model_is_what_its_card_says():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(DEMO)
    assert config.model_type == "llama"
    assert config.hidden_size == 256
    assert config.intermediate_size % 128 == 0
    assert config.num_hidden_layers >= 4
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.dtype == torch.bfloat16
    assert sum(file.stat().st_size for file in DEMO.iterdir()) < 12e6
