"""What is known of the programs that read compressed-tensors: compressed-tensors inside transformers, and vLLM.

What a reader would get silently wrong, and what is done about it here:

- Without ``quantization_status: compressed`` transformers loads random weights and only warns. It is always written, and a file
  without it is refused.
- Versions of the library before 0.18 packed 3-bit codes ten to a word, under the same names. Such a file has another width and is
  refused by name.
- A linear of class ``Conv1D`` (GPT-2) is passed over by compressed-tensors inside transformers, which then leaves it random with
  a warning. The entry for such a model carries a key that compressed-tensors does not know and therefore refuses, so that
  transformers stops with an error that shows the key.
- The outlier split is an extension of this program: transformers and vLLM would leave the 16-bit columns out of the product. A key
  of the same kind, which also holds the threshold, stops them.
- vLLM runs some linears that read one tensor as one matrix, and takes the first one's scheme for all. Those that it is known to join are
  listed in JOINED by the names that it looks for; others that read one tensor may differ.

What a reader refuses by itself, and is written all the same: transformers needs ``dequantize=True`` for asymmetric packed weights since
0.18 of the library; vLLM has no dynamic activations per tensor, and of the narrower weights with 8-bit activations only 4 bits per
token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from torch import nn

from ptqcli.formats import LinearSpec
from ptqcli.numerics.scheme import ActivationScheme, Scheme

# Of vLLM's packed_modules_mapping: attention, gated MLPs, latent attention, gated delta rules.
JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


def fused_refusal(group: Mapping[str, Scheme | None]) -> str | None:
    """Why vLLM would misread linears of one module that read one tensor, or None if those that it joins have one scheme.

    group: the scheme of each by its path in the model, None for one that stays as it is.
    """
    for joined in JOINED:
        members = [name for name in group if name.rpartition(".")[2] in joined]
        for name in members[1:]:
            if group[name] != group[members[0]]:
                one, other = ("left as it is" if group[each] is None else str(group[each]) for each in (members[0], name))
                return (
                    f"{members[0]} ({one}) and {name} ({other}) read the same input and are run as one matrix by vLLM; "
                    "give them the same scheme, or leave all of them as they are"
                )
    return None


def notes(specs: Sequence[LinearSpec]) -> list[str]:
    """What a user should know of the readers of such linears, one sentence each."""
    found = []
    if any(not spec.scheme.symmetric for spec in specs):
        several = "from 5.23 on does not, since its dequantize=True expands all schemes as the first"
        choice = several if _several(specs) else "needs CompressedTensorsConfig(dequantize=True)"
        found.append(f"asymmetric: vLLM reads it; transformers {choice}")
    if any(spec.scheme.outliers is not None for spec in specs):
        found.append("outlier columns: only ptqcli reads them, transformers refuses the file; their size is known only after calibration")
    found += _activation_notes(list(dict.fromkeys(spec.scheme for spec in specs)))
    if any(spec.kind == "Conv1D" for spec in specs):
        found.append("Conv1D layers: ptqcli and vLLM read them from this format, transformers does not")
    return found


def trial(classes: Sequence[nn.Module], specs: Sequence[LinearSpec], packed: AbstractSet[str]) -> list[str]:
    """What transformers would make of such a file, found by doing what its loading does with a model whose linears hold packed weights.

    packed: linears whose ``weight`` is stored under another name. transformers hands every module to the model's own code for
    initial values, all of which are there already; where that code asks a packed linear for its ``weight``, loading fails.
    """
    if any(spec.kind == "Conv1D" for spec in specs):
        return []  # transformers is stopped before it comes to that
    names = {name for spec in specs if spec.name in packed for name in (spec.name, *spec.aliases)}
    for model in classes:
        twin = copy.deepcopy(model)
        if _initialization_failure(twin) is not None:
            continue  # it fails with plain weights, too, so it tells nothing of packed ones
        for name, module in twin.named_modules():
            if name in names:
                del module.weight
        failure = _initialization_failure(twin)
        if failure is not None:
            several = "does not read it, since its dequantize=True expands all schemes as the first"
            choice = several if _several(specs) else "needs CompressedTensorsConfig(dequantize=True), from version 5.23 on"
            return [f"{type(model).__name__} does not take packed weights ({failure}): transformers {choice}"]
    return []


def _initialization_failure(model: nn.Module) -> str | None:
    for module in model.modules():  # transformers marks the tensors that it has read, not the modules
        module._is_hf_initialized = False  # type: ignore[assignment]
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        model.initialize_weights()  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001  whatever a model's code raises is the answer
        return " ".join(str(error).split())[:80]
    return None


def _several(specs: Sequence[LinearSpec]) -> bool:
    return len({spec.scheme for spec in specs}) > 1


def _activation_notes(schemes: Sequence[Scheme]) -> list[str]:
    token, tensor = ActivationScheme(), ActivationScheme(per_token=False)
    found = []
    if any(scheme.activations == tensor for scheme in schemes):
        found.append("activations scaled per tensor at run time: transformers and ptqcli compute them, vLLM does not")
    narrow = [scheme for scheme in schemes if scheme.activations is not None and scheme.bits < 8]
    if narrow:
        found.append(f"{narrow[0].bits}-bit codes beside 8-bit activations take a byte each, so the file is no smaller than with --wbits 8")
    if any(scheme.bits != 4 or scheme.activations != token for scheme in narrow):
        found.append("of weights below 8 bits beside 8-bit activations, vLLM reads only 4 bits with --act-scales token")
    return found
