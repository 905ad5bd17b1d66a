"""Linears that servers run as one matrix, whatever format they come from: vLLM, and SGLang after it."""

from __future__ import annotations

from collections.abc import Mapping

from ptqcli.numerics.scheme import Scheme

# Of vLLM's packed_modules_mapping: attention, gated MLPs, latent attention, gated delta rules; each under its name there.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


def fused_refusal(group: Mapping[str, Scheme | None]) -> str | None:
    """Why servers would misread linears of one module that read one tensor, or None if those that they join have one scheme.

    group: the scheme of each by its path in the model, None for one that stays as it is.
    """
    for joined in JOINED.values():
        members = [name for name in group if name.rpartition(".")[2] in joined]
        for name in members[1:]:
            if group[name] != group[members[0]]:
                one, other = ("left as it is" if group[each] is None else str(group[each]) for each in (members[0], name))
                return (
                    f"{members[0]} ({one}) and {name} ({other}) read the same input and are run as one matrix by vLLM; "
                    "give them the same scheme, or leave all of them as they are"
                )
    return None
