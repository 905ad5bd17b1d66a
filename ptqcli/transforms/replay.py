"""How far a block's output moves when some of its linears are quantized, tried on an excerpt of the calibration text.

The block runs in float32, whatever the dtype of the calibration: in bfloat16 the noise of a run is as large as the error of 8-bit codes.
What ran before the linears on trial is not run again: every module that had finished by then, and runs only once, returns what it
returned the first time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ptqcli.model.linears import is_linear
from ptqcli.numerics.fake_quant import FakeQuantLinear


class Replay:
    """Runs of one block in float32.

    block: float32, with all its weights. run: the output of a block on the excerpt.
    """

    def __init__(self, block: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
        self.block, self._run = block, run
        self._expected: Tensor | None = None  # scaling does not change it
        self.forget()

    def forget(self) -> None:
        """Something inside the block has been scaled: what its modules returned does not hold any more."""
        self._outputs: dict[str, Any] = {}  # of every module, in the order in which they finished
        self._finished: dict[str, int] = {}  # linear -> how many modules had finished when it started
        self._often: set[str] = set()  # modules that run more than once

    def output(self, trials: Mapping[str, FakeQuantLinear] | None = None) -> Tensor:
        """What the block returns on the excerpt, with the linears in ``trials`` replaced; gradients flow to what asks for them."""
        with self._replaced(trials or {}, ()):
            return self._run(self.block)

    def expected(self) -> Tensor:
        """What it returned when it was first asked."""
        if self._expected is None:
            self._expected = self._run(self.block)
        return self._expected

    def error(self, trials: Mapping[str, FakeQuantLinear]) -> float:
        """Mean squared difference of the block's output, with the linears in ``trials`` replaced, to its own."""
        expected = self.expected()
        if not self._outputs:
            self._remember_outputs()
        started = [self._finished[local] for local in trials if local in self._finished]
        if not started:  # linears of experts that the excerpt does not reach
            return 0.0
        known = min(started)
        with self._replaced(trials, [name for name in list(self._outputs)[:known] if name not in self._often]):
            output = self._run(self.block)
        return float((output - expected).square().mean())

    def _remember_outputs(self) -> None:
        runs: Counter[str] = Counter()

        def started(local: str) -> Callable[..., None]:
            return lambda _module, _args: self._finished.update({local: len(self._outputs)})

        def finished(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                runs[name] += 1
                self._outputs[name] = _cloned(output)

            return hook

        modules = [(name, module) for name, module in self.block.named_modules() if name]
        handles = [module.register_forward_pre_hook(started(name)) for name, module in modules if is_linear(module)]
        handles += [module.register_forward_hook(finished(name)) for name, module in modules]
        self._run(self.block)
        for handle in handles:
            handle.remove()
        self._often = {name for name, count in runs.items() if count > 1}

    @contextmanager
    def _replaced(self, trials: Mapping[str, FakeQuantLinear], before: Sequence[str]) -> Iterator[None]:
        """The linears on trial compute as their trials do, and the modules ``before`` them give the outputs that are known."""
        forwards: dict[str, Callable[..., Any]] = {}
        for name in before:
            forwards[name] = lambda *_args, name=name, **_kwargs: _cloned(self._outputs[name])
        forwards.update({local: trial.forward for local, trial in trials.items()})
        modules = {local: self.block.get_submodule(local) for local in forwards}
        for local, module in modules.items():
            module.forward = forwards[local]
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward


def _cloned(output: Any) -> Any:
    """Tensors copied, since code may change them in place."""
    if isinstance(output, tuple):
        return tuple(_cloned(entry) for entry in output)
    return output.clone() if isinstance(output, Tensor) else output
