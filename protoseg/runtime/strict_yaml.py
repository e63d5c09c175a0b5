"""YAML in which nothing is lost without a word."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from protoseg.runtime.errors import UserError


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key stands once, and a number means what it looks like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in lines:
                raise _at(
                    key_node, f"the key '{key}' stands here and in line {lines[key]}; keep one of the two"
                )
            if isinstance(key, Hashable):
                lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        value = int(super().construct_yaml_int(node))
        text = node.value
        if re.match(r"[-+]?0[0-9_]+$", text) or ":" in text or "_" in text:  # octal, base 60
            raise _at(
                node,
                f"{text} is read as the number {value}; write {value}, or '{text}' in quotes if it is a name",
            )
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_number)


def _at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says. Raises UserError with the line, `where` being what it calls the text."""
    try:
        return yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise UserError(f"{where}:{line} {problem}; mend the YAML") from None
