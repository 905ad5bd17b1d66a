"""Other programs bring warnings of their own, and all of these tests are run apart from the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.loaders)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
