"""YAML of others, of which only what can be written down in plain values is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ptqcli.errors import PTQError
from ptqcli.untrusted import one_line, read_text

LARGEST_BITS = 512  # of a number; Python writes none of more than 4,300 digits


def read_yaml(file: Path, most: int) -> Any:
    """What stands in a file of at most ``most`` bytes. Raises PTQError, naming it, for one that cannot be read or is no YAML."""
    text = read_text(file, most)
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # the last two of dates and numbers that do not exist
        raise PTQError(f"{file}: is not valid YAML: {one_line(error)}") from error


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
            raise yaml.YAMLError(f"a number of {value.bit_length()} bits is none that anybody needs")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key in seen:
                raise yaml.YAMLError(f"'{key}' is given twice; give it once")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
