"""What differs between kinds of model: the class that transformers builds, how it is called, whether tokens see what follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ptqcli.errors import PTQError


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """One kind of model.

    name: as a user reads it. auto_class: the class of transformers that builds it. causal: a token never sees what follows it, so the
    beginning of a window can be run by itself.
    """

    name: str
    auto_class: str
    causal: bool

    def call(self, model: nn.Module, ids: Tensor) -> Any:
        """One pass over ``ids``, int64 [windows, tokens], that keeps nothing for later ones."""
        return model(input_ids=ids, use_cache=False)


CAUSAL = ModelKind(name="causal language model", auto_class="AutoModelForCausalLM", causal=True)


def kind_of(config: Any) -> ModelKind:
    """The kind of the model that ``config`` describes. Raises PTQError for one that is not supported."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # Of encoder-decoders transformers would build the decoder alone.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        where = config.name_or_path or "the model in memory"
        raise PTQError(f"{where}: a model of type {config.model_type} is not a {CAUSAL.name}, which is all that is supported")
    return CAUSAL
