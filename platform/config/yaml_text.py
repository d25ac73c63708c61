"""YAML as it is typed: every scalar stays text, and the types of the schema decide what it means.

YAML 1.1 guesses what a bare word is: `1e-6` is a text to it, `on` true, `12:30` 750, `010` eight, `2026-01-01` a date.
Here only the null value (`null`, `~` or no value) differs from text, so `name: 2026` is a name and `eps: 1e-6` a
number, because the schema says so. A key that comes twice is an error.
"""

from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

_NULL, _MERGE, _TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"


class YamlError(ValueError):
    """A text that is no YAML; the message has the line and what is wrong there."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without its guesses and with unique keys."""

    # of what PyYAML would guess, by a scalar's first character, only these two are kept
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [one for one in resolvers if one[0] in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node: MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                continue
            if not isinstance(key, ScalarNode) or key.tag != _TEXT:
                raise YamlError(f"line {line}: a key must be a text, such as `name: ...`")
            if key.value in seen:
                raise YamlError(
                    f"line {line}: key {key.value!r} is there twice, first in line {seen[key.value]}: keep one of them"
                )
            seen[key.value] = line
        return node

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        node: Node | None = super().compose_node(parent, index)
        if isinstance(node, ScalarNode) and node.tag not in (_NULL, _MERGE, _TEXT):
            raise YamlError(f"line {node.start_mark.line + 1}: leave out the tag {node.tag!r}")
        return node


class _ValueLoader(_Loader):
    """The same, for the list or mapping of an override, where an anchor has no use: `*`, `&` and the like begin a text.

    So `[*_ref*, blocks.*]` are patterns.
    """

    fetch_alias = fetch_anchor = fetch_tag = _Loader.fetch_plain

    def check_plain(self) -> bool:
        return self.peek() in "@`%|>" or bool(super().check_plain())


def read_yaml(text: str, loader: type[_Loader] = _Loader) -> Any:
    """The mappings, lists, texts and Nones of a YAML document. Raises YamlError with the line of a fault."""
    try:
        return yaml.load(text, loader)  # noqa: S506: a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise YamlError(f"{line}{error.problem or error.context}{_hint(f'{error.context} {error.problem}')}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise YamlError(" ".join(str(error).split()) or type(error).__name__) from error


def _hint(problem: str) -> str:
    if "'\\t'" in problem:
        return " (indent with spaces, not with tabs)"
    if "alias" in problem or "cannot start any token" in problem:
        return " (put a text with special characters in quotes, such as '*')"
    return ""


def read_value(text: str) -> Any:
    """The value of an override: a list or mapping in brackets, nothing (`null`, `~` or empty), or the text itself.

    Quotes around the whole are taken off; any other text, also one that YAML could not read, is taken as it is.
    Raises YamlError for brackets that do not close or hold what YAML can't read.
    """
    value = text.strip()
    if value.startswith(("[", "{")):
        return read_yaml(value, _ValueLoader)
    if value in ("", "~", "null", "Null", "NULL"):
        return None
    if value[0] in "'\"":
        try:
            quoted = read_yaml(value)
        except YamlError:
            return value
        return quoted if isinstance(quoted, str) else value
    return value
