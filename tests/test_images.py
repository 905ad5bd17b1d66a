"""Models with images: the language part is quantized from text, everything else arrives as it is, and images still run through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import ROTARY, TOKENS, byte_tokenizer, write_text

import ptqcli
from ptqcli.model.kinds import kind_of

IMAGE = 5  # the token that stands for a piece of an image
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
}


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**ROTARY, **TOKENS)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=False)
    return transformers.LlavaForConditionalGeneration(config)


def gemma() -> Any:
    vision = transformers.SiglipVisionConfig(**{key: value for key, value in VISION.items() if key != "projection_dim"})
    text = transformers.Gemma3TextConfig(**{**ROTARY, **TOKENS, "head_dim": 16, "sliding_window": 16})
    config = transformers.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4, image_token_id=IMAGE)
    return transformers.Gemma3ForConditionalGeneration(config)


MAKERS = {"llava": llava, "gemma3": gemma}


@torch.no_grad()
def make(folder: Path, name: str) -> Any:
    torch.manual_seed(0)
    model = MAKERS[name]().float().eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.5 if "emb" in key else 1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    return model


@torch.no_grad()
def with_image(model: Any) -> torch.Tensor:
    """Logits of a text with an image in four pieces."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(10, 250, (1, 20), generator=generator)
    ids[0, 3:7] = IMAGE
    logits: torch.Tensor = model(input_ids=ids, pixel_values=torch.rand(1, 3, 16, 16, generator=generator)).logits
    return logits


@pytest.mark.parametrize(("name", "algo"), [("llava", "gptq"), ("llava", "awq"), ("gemma3", "gptq")])
def test_the_language_part_is_quantized_and_images_run_through_it(name: str, algo: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", name)
    before, text = with_image(model), str(write_text(tmp_path / "text.txt"))
    ptqcli.quantize(tmp_path / "model", output=tmp_path / "out", algo=algo, calib=text, nsamples=4, seqlen=32, group_size=16)
    packed: Any = ptqcli.load_quantized(tmp_path / "out")
    assert type(packed) is type(model)
    stored, original = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert not any(key.endswith(".weight_packed") and ("vision" in key or "projector" in key) for key in stored)
    carried = [key for key in original if "vision" in key or "projector" in key]
    assert len(carried) > 10
    assert all(torch.equal(original[key], stored[key]) for key in carried)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()

    names = {key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")}
    assert len(names) == 2 * 7
    expected = with_image(type(model).from_pretrained(tmp_path / "out").eval())
    torch.testing.assert_close(with_image(packed), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2)
    [measured] = ptqcli.evaluate(tmp_path / "out", str(write_text(tmp_path / "held.txt", 300, seed=9)), seqlen=32)
    assert measured.mean_kl > 0  # type: ignore[union-attr, operator]


def test_the_auto_class_is_that_of_transformers_tables() -> None:
    assert kind_of(transformers.LlavaConfig()).auto_class == "AutoModelForImageTextToText"
    assert kind_of(transformers.Gemma3Config()).auto_class == "AutoModelForCausalLM"
    assert kind_of(transformers.Qwen2AudioConfig()).auto_class == "AutoModelForMultimodalLM"
