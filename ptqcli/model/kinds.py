"""What differs between kinds of model: the class that transformers builds, how it is called, whether tokens see what follows them.

    causal language model     of transformers' table of such classes
    encoder                   of its table of masked language models; in the class that config.json names, whatever head that has
    model with images or sound  of its tables of such models, where there is no causal class: it is run on text alone

One configuration can stand in several tables, as BERT's does. Then the class that config.json names decides, and is_decoder without one.

Windows of an encoder end in places without a token, PADDING, where a text is shorter than they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ptqcli.errors import PTQError

PADDING = -1  # in a window, a place that holds no token


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """One kind of model.

    name: as a user reads it. auto_class: the class of transformers that builds it. causal: a token never sees what follows it, so that
    windows can be packed with texts, and the model can write.
    """

    name: str
    auto_class: str
    causal: bool

    def call(self, model: nn.Module, ids: Tensor) -> Any:
        """One pass over ``ids``, int64 [windows, tokens], that keeps nothing for later ones; an encoder's may hold PADDING."""
        if self.causal:
            return model(input_ids=ids, use_cache=False)
        tokens = ids != PADDING
        filler = getattr(model.config, "pad_token_id", None) or 0
        return model(input_ids=ids.where(tokens, filler), attention_mask=tokens.long())

    def answer(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The first that a pass gives: logits, or the hidden states of a model without a head, [windows, ...]."""
        found: Tensor = self.call(model, ids)[0]
        return found


CAUSAL = ModelKind(name="causal language model", auto_class="AutoModelForCausalLM", causal=True)


def is_encoder(config: Any) -> bool:
    """Whether ``config`` describes an encoder alone, whose tokens see what follows them."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    causal, masked = (_class_of(config, mapping) for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING))
    if masked is None or getattr(config, "is_encoder_decoder", False):
        return False
    named = _named(config)
    return causal is None or (named != causal and not (named is None and getattr(config, "is_decoder", False)))


def kind_of(config: Any) -> ModelKind:
    """The kind of the model that ``config`` describes. Raises PTQError for one that is not supported."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    where = config.name_or_path or "the model in memory"
    if getattr(config, "is_encoder_decoder", False):  # of which transformers would build the decoder alone
        raise PTQError(
            f"{where}: a model of type {config.model_type} is an encoder with a decoder, which is not supported: calibration has one stack "
            "of blocks and one text, and such a model takes two of each"
        )
    if is_encoder(config):
        usual = _class_of(config, MODEL_FOR_MASKED_LM_MAPPING)
        return ModelKind(name="encoder", auto_class=_own_class(config, _named(config)) or str(usual), causal=False)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return CAUSAL
    with_images = _auto_class_with_images(config)
    if with_images is not None:
        return ModelKind(name="language model with images or sound", auto_class=with_images, causal=True)
    raise PTQError(
        f"{where}: a model of type {config.model_type} is neither a {CAUSAL.name}, with or without images, nor an encoder with a class for "
        "masked words, which is all that is supported"
    )


def _named(config: Any) -> str | None:
    """The class that config.json names."""
    return (config.architectures or [None])[0]


def _class_of(config: Any, mapping: Any) -> str | None:
    """The name of the class that a table of transformers has for ``config``."""
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return str((found[0] if isinstance(found, tuple) else found).__name__)


def _own_class(config: Any, name: str | None) -> str | None:
    """``name``, if transformers has a model class of that name for ``config``."""
    import transformers

    found: Any = getattr(transformers, name, None) if name else None
    model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return name if model and found.config_class is type(config) else None


def _auto_class_with_images(config: Any) -> str | None:
    import transformers

    tables = {
        "AutoModelForImageTextToText": transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        "AutoModelForMultimodalLM": transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    return next((name for name, mapping in tables.items() if type(config) in mapping), None)
