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
  listed in ``joined`` by the names that it looks for; others that read one tensor may differ.

What a reader refuses by itself, and is written all the same: transformers needs ``dequantize=True`` for asymmetric packed weights since
0.18 of the library; vLLM has no dynamic activations per tensor, and of the narrower weights with 8-bit activations only 4 bits per
token. Of weights alone it has read 4 and 8 bits for long, in groups of 32, 64 or 128 or whole rows (its Marlin kernels); other bits and
groups since its Humming kernels took them (vllm-project/vllm#46389), and zero points but for 4 bits later. This follows from its source.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from torch import nn

from ptqcli.formats import LinearSpec, Reader
from ptqcli.model.linears import EMBEDDING
from ptqcli.numerics.scheme import WHOLE_ROW, ActivationScheme, Scheme

LIBRARY = "compressed-tensors>=0.18"  # which packs 3 bits as it is done here
FAST_GROUPS = (WHOLE_ROW, 32, 64, 128)
FAST_BITS = (4, 8)
# Of vLLM: releases whose source was read to take what the ones before refuse.
HUMMING, HUMMING_ZERO_POINTS = "0.25", "0.33"
# Multiples that vLLM's usual kernels work in: outputs and inputs, of weights alone and of 8-bit activations.
MARLIN_TILE, CUTLASS_TILE = (64, 128), (16, 16)

OUTLIERS = "outlier columns: only ptqcli reads them, transformers refuses the file"
TABLE = "a quantized embedding: ptqcli reads it; transformers fails on it, and vLLM has not been tried"
HEAD = (
    "a quantized output head: transformers and ptqcli read it, and vLLM by its source since vllm-project/vllm#37291; SGLang loaded it "
    "without an error and gave nonsense (sgl-project/sglang#35358), so try it there"
)
CONV1D = "Conv1D layers: ptqcli and vLLM read them from this format, transformers does not"
EXPANDED_AS_ONE = "transformers does not read it, since it would expand all schemes as one; ptqcli and vLLM read it"


def notes(specs: Sequence[LinearSpec]) -> list[str]:
    """What a user should know of the readers of such linears, one sentence each."""
    found = []
    if any(not spec.scheme.symmetric for spec in specs):
        several = "from 5.23 on does not, since its dequantize=True expands all schemes as the first"
        choice = several if _several(specs) else "needs CompressedTensorsConfig(dequantize=True)"
        found.append(f"asymmetric: vLLM reads it; transformers {choice}")
    if any(spec.scheme.outliers is not None for spec in specs):
        found.append(f"{OUTLIERS}; their size is known only after calibration")
    found += _activation_notes(list(dict.fromkeys(spec.scheme for spec in specs)))
    version = _vllm_version([spec.scheme for spec in specs])
    if version is not None:
        found.append(f"{_unusual(specs)}: vLLM reads it from {version} on, on NVIDIA GPUs only (Humming kernels)")
    found += _shape_notes(specs)
    if any(spec.kind == "Conv1D" for spec in specs):
        found.append(CONV1D)
    if any(map(_is_table, specs)):
        found.append(TABLE)
    elif any(map(_is_head, specs)):
        found.append(HEAD)
    return found


def readers(specs: Sequence[LinearSpec], auto_class: str, must_expand: bool) -> list[Reader]:
    """How transformers and vLLM load such linears. must_expand: transformers cannot keep them packed in this model."""
    for refusal, holds in ((OUTLIERS, _has_outliers), (TABLE, _is_table)):
        if any(map(holds, specs)):
            return [Reader(name="transformers", refusal=refusal), Reader(name="vLLM", refusal=refusal)]
    return [_transformers(specs, auto_class, must_expand), _vllm(specs)]


def _transformers(specs: Sequence[LinearSpec], auto_class: str, must_expand: bool) -> Reader:
    expand = must_expand or any(not spec.scheme.symmetric for spec in specs)
    if any(spec.kind == "Conv1D" for spec in specs):
        return Reader(name="transformers", refusal=CONV1D)
    if expand and _several(specs):
        return Reader(name="transformers", refusal=EXPANDED_AS_ONE)
    names, options = [auto_class, *(["CompressedTensorsConfig"] if expand else [])], "{folder}"
    if expand:
        options += ", quantization_config=CompressedTensorsConfig(dequantize=True)"
    code = f"from transformers import {', '.join(names)}\n\nmodel = {auto_class}.from_pretrained({options})"
    return Reader(name="transformers", needs=("transformers>=5.23" if must_expand else "transformers", LIBRARY), code=code)


def _vllm(specs: Sequence[LinearSpec]) -> Reader:
    schemes = [spec.scheme for spec in specs]
    refusals = _vllm_refusals(schemes)
    if refusals:
        return Reader(name="vLLM", refusal=refusals[0])
    version = _vllm_version(schemes) or (HUMMING if any(map(_is_head, specs)) else None)
    return Reader(name="vLLM", needs=(f"vllm>={version}" if version else "vllm",), code="vllm serve {folder}", language="sh")


def _vllm_version(schemes: Sequence[Scheme]) -> str | None:
    """The first release of vLLM that reads them, None if any does."""
    packed = [scheme for scheme in schemes if scheme.activations is None]
    if any(not scheme.symmetric and scheme.bits != 4 for scheme in packed):
        return HUMMING_ZERO_POINTS
    return HUMMING if any(scheme.bits not in FAST_BITS or scheme.group_size not in FAST_GROUPS for scheme in packed) else None


def _unusual(specs: Sequence[LinearSpec]) -> str:
    """The schemes because of which a recent vLLM is needed."""
    return ", ".join(dict.fromkeys(str(spec.scheme) for spec in specs if _vllm_version([spec.scheme]) is not None))


def _shape_notes(specs: Sequence[LinearSpec]) -> list[str]:
    """Of linears that vLLM's usual kernels do not take as they are."""
    found = []
    for packed, (outputs, inputs), then in (
        (True, MARLIN_TILE, "padded by vLLM's Marlin kernels, or refused by earlier versions of them"),
        (False, CUTLASS_TILE, "left by vLLM's CUTLASS kernels to slower ones"),
    ):
        odd = [
            spec
            for spec in specs
            if not _is_table(spec)
            and (spec.scheme.activations is None) is packed
            and (spec.out_features % outputs or spec.in_features % inputs)
        ]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            shape = f"{odd[0].name} ({odd[0].out_features} outputs, {odd[0].in_features} inputs)"
            found.append(f"{shape}{more}: not multiples of {outputs} outputs and {inputs} inputs, so {then}")
    return found


def trial(classes: Sequence[nn.Module], specs: Sequence[LinearSpec], packed: AbstractSet[str]) -> list[str]:
    """What transformers would make of such a file, found by doing what its loading does with a model whose linears hold packed weights.

    packed: linears whose ``weight`` is stored under another name. transformers hands every module to the model's own code for
    initial values, all of which are there already; where that code asks a packed linear for its ``weight``, loading fails.
    """
    if any(spec.kind in ("Conv1D", EMBEDDING) for spec in specs):
        return []  # transformers is stopped before it comes to that, or said to fail
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


def _has_outliers(spec: LinearSpec) -> bool:
    return spec.scheme.outliers is not None


def _is_table(spec: LinearSpec) -> bool:
    return spec.kind == EMBEDDING


def _is_head(spec: LinearSpec) -> bool:
    return spec.outside and not _is_table(spec)


def _several(specs: Sequence[LinearSpec]) -> bool:
    return len({spec.scheme for spec in specs}) > 1


def _activation_notes(schemes: Sequence[Scheme]) -> list[str]:
    narrow = [scheme for scheme in schemes if scheme.activations is not None and scheme.bits < 8]
    found = []
    if narrow:
        found.append(f"{narrow[0].bits}-bit codes beside 8-bit activations take a byte each, so the file is no smaller than with --wbits 8")
    return [*found, *_vllm_refusals(schemes)]


def _vllm_refusals(schemes: Sequence[Scheme]) -> list[str]:
    token, tensor = ActivationScheme(), ActivationScheme(per_token=False)
    found = []
    if any(scheme.activations == tensor for scheme in schemes):
        found.append("activations scaled per tensor at run time: transformers and ptqcli compute them, vLLM does not")
    narrow = [scheme for scheme in schemes if scheme.activations is not None and scheme.bits < 8]
    if any(scheme.bits != 4 or scheme.activations != token for scheme in narrow):
        found.append("of weights below 8 bits beside 8-bit activations, vLLM reads only 4 bits with --act-scales token")
    return found
