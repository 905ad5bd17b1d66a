"""The original model's logits on the calibration windows, without the original model in memory.

Its blocks are run over all windows one after the other, as quantization runs them, and what is behind the last one is kept: a vector a
token instead of a number for every word of the vocabulary. What runs behind the blocks (the last norm, the output head, whatever a model
does to its logits) is run again whenever logits are asked for, by the model itself, whose blocks then give what was kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ptqcli.calibration.hidden import HiddenStates, new_buffer
from ptqcli.calibration.record import Recording, record_calls
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.whole import given_hidden
from ptqcli.resources import Resources


class Teacher:
    """The original, opened as ``skeleton``, on ``windows``, int64 [windows, tokens].

    dtype: in which it runs. folder: where hidden states go that are larger than the activation budget.
    """

    def __init__(self, skeleton: Skeleton, windows: Tensor, dtype: torch.dtype, resources: Resources, folder: Path) -> None:
        self.skeleton, self.windows, self.device = skeleton, windows, resources.device
        self.hidden = self._behind_the_blocks(dtype, resources, folder)  # [windows, tokens, features], on the CPU
        self._load_rest(dtype)

    @torch.no_grad()
    def logits(self, chosen: Tensor) -> Tensor:
        """Those of the windows numbered ``chosen``, int64 [batch]: floating [batch, tokens, vocabulary]."""
        model = self.skeleton.model
        with given_hidden(self.skeleton, self.hidden[chosen].to(self.device)):
            found: Tensor = self.skeleton.kind.call(model, self.windows[chosen].to(self.device)).logits
        return found

    @torch.no_grad()
    def _behind_the_blocks(self, dtype: torch.dtype, resources: Resources, folder: Path) -> Tensor:
        budget = resources.budget
        batch = resources.windows_per_batch(self.windows.shape[1])
        make_buffer = partial(new_buffer, budget=budget, folder=folder)
        recording = record_calls(self.skeleton, self.windows, batch, self.device, dtype, make_buffer)
        self.skeleton.release(self.skeleton.before)
        states = HiddenStates(recording.hidden, budget, folder)
        for index in range(len(self.skeleton.blocks)):
            self._run_block(index, recording, states, dtype)
        return states.inputs

    def _run_block(self, index: int, recording: Recording, states: HiddenStates, dtype: torch.dtype) -> None:
        block = self.skeleton.load_block(index, self.device, dtype)
        for (start, stop), call in zip(recording.batches, recording.calls[index], strict=True):
            hidden = states.inputs[start:stop].to(self.device, copy=True)  # a block may change its input in place
            states.outputs[start:stop] = call.run(block, hidden).cpu()
        self.skeleton.release(self.skeleton.units[index])
        states.advance()

    def _load_rest(self, dtype: torch.dtype) -> None:
        """Everything but the blocks; what has two names is one tensor."""
        skeleton, loaded = self.skeleton, dict[str, nn.Parameter]()
        for name, _ in list(skeleton.model.named_parameters(remove_duplicate=False)):
            if name.startswith(f"{skeleton.blocks_name}."):
                continue
            stored = skeleton.stored_name(name)
            if stored not in loaded:
                loaded[stored] = nn.Parameter(skeleton.read(name).to(self.device, dtype), requires_grad=False)
            path, _, leaf = name.rpartition(".")
            skeleton.model.get_submodule(path)._parameters[leaf] = loaded[stored]
        for module in skeleton.model.modules():
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(self.device)
        for unit in (skeleton.before, skeleton.after):
            skeleton.release(unit)
