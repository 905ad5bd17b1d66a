"""How many tokens a model takes."""

from __future__ import annotations

from torch import nn


def most_tokens(model: nn.Module) -> int | None:
    """The longest window that ``model`` takes, None if its configuration names none.

    A table of positions with a row for padding counts from behind that row, as RoBERTa's does: it has that many fewer.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    if not positions:
        return None
    words = model.get_input_embeddings()  # type: ignore[operator]
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    rows = [table.padding_idx + 1 for table in tables if table.num_embeddings == positions and table.padding_idx is not None]
    return int(positions) - max(rows, default=0)
