"""What is known of the programs that read bitsandbytes files: transformers with the library, peft on top of it, and vLLM.

transformers replaces every linear that its list of modules to skip does not name by one of bitsandbytes, on CPUs and GPUs;
``tests/loaders`` runs it on a CPU, in 4 and 8 bits, doubly quantized or not, and trains an adapter with peft. Its 8-bit layers round inputs
to float16 first. Conv1D layers (GPT-2) are read as others are: codes lie as [out, in].

vLLM 0.33 has no bitsandbytes among the methods that it quantizes with; earlier releases had it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.formats import LinearSpec, Reader

NEEDS = ("transformers", "bitsandbytes", "accelerate")
NO_VLLM = "vLLM 0.33 does not read bitsandbytes any more"

TRAINING = """from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import {auto_class}

model = prepare_model_for_kbit_training({auto_class}.from_pretrained({{folder}}))
model = get_peft_model(model, LoraConfig(target_modules="all-linear"))"""


def notes(specs: Sequence[LinearSpec]) -> list[str]:
    """What a user should know of the readers of such linears, one sentence each."""
    found = [f"{NO_VLLM}; transformers, peft and ptqcli do"]
    if any(spec.scheme.outliers is not None for spec in specs):
        found.append("outliers among the inputs meet the 8-bit weights, read back: bitsandbytes keeps no columns in 16 bit")
    return found


def readers(specs: Sequence[LinearSpec], auto_class: str) -> list[Reader]:
    """How the programs load such linears. auto_class: of transformers, which builds the model."""
    code = f"from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained({{folder}})"
    return [
        Reader(name="transformers", needs=NEEDS, code=code),
        Reader(name="peft", needs=("peft", *NEEDS), code=TRAINING.format(auto_class=auto_class)),
        Reader(name="vLLM", refusal=NO_VLLM),
    ]
