"""Where in a YAML file something stands, for messages that name the line. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import yaml


def of_path(text: str, path: Sequence[str | int]) -> int | None:
    """The line, from 1, of what a path of keys and positions leads to in a YAML text, or as far as it leads; None where
    already its first step leads nowhere."""
    node, line = _tree(text), None
    for step in path:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(step)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            pair = node.value[step], node.value[step]
        else:
            pair = None
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def of_names(text: str, section: str, names: Sequence[str]) -> int | None:
    """The line of the last of the names that is there: each is a key, or a `name`, somewhere inside what the one before
    it names, or else beside that; the first is inside a section of the file."""
    line, root = of_path(text, [section]), _tree(text)
    within = [value for key, value in root.value if key.value == section] if isinstance(root, yaml.MappingNode) else []
    for name in names:
        hit = next((hit for node in reversed(within) if (hit := _named(node, name)) is not None), None)
        if hit is not None:
            line = hit[0].start_mark.line + 1
            within.append(hit[1])
    return line


def _tree(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None


def _named(node: yaml.Node, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    """A key of that name with its value, or the `name` of a mapping with the mapping: the outermost one."""
    level = [node]
    while level:
        for inner in level:
            if isinstance(inner, yaml.MappingNode):
                for key, value in inner.value:
                    if key.value == name:
                        return key, value
                    if key.value == "name" and value.value == name:
                        return value, inner
        level = [child for inner in level for child in _children(inner)]
    return None


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
