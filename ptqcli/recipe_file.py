"""A recipe file as it is written: YAML, of which only what a recipe needs is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ptqcli.errors import PTQError, UsageError
from ptqcli.untrusted import one_line, read_text

# A line for each of 3,000 linears. YAML takes seconds for a MB.
MOST_RECIPE_BYTES = 256 << 10
LARGEST_BITS = 512  # of a number; Python writes none of more than 4,300 digits


def read_recipe_file(file: Path) -> dict[str, object]:
    """The keys of a recipe file and their values. Raises UsageError for a file that cannot be read, is too long, or is no mapping."""
    try:
        values = yaml.load(read_text(file, MOST_RECIPE_BYTES), _Loader)
    except PTQError as error:
        raise UsageError(str(error)) from error
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # the last two of dates and numbers that do not exist
        raise UsageError(f"{file}: is not valid YAML: {one_line(error)}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{file}: a recipe is a list of 'key: value' lines; see configs/ for examples")
    return values


class _Loader(yaml.SafeLoader):
    """As YAML's safe loader, but for two things that it takes without a word: a key that stands twice, of which the last counts, and
    aliases (``*name``), with which ten lines can stand for billions of values. Here both are errors."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"'*{self.peek_event().anchor}' stands for what is written elsewhere; write it out")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if value.bit_length() > LARGEST_BITS:
            raise yaml.YAMLError(f"a number of {value.bit_length()} bits is none that a recipe needs")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise yaml.YAMLError(f"'{key}' is given twice; give it once")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
