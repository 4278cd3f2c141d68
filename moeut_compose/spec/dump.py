"""A spec as YAML to read: every default written out, small maps on one line."""

from typing import Any

import yaml

from moeut_compose.spec.base import Spec
from moeut_compose.spec.yaml import resolve

MAX_WIDTH = 100


class _Dumper(yaml.SafeDumper):
    """Quotes whatever another YAML reader, or ours, would not take for text."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        is_plain = isinstance(resolve(text), str) and "\n" not in text
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def dump_yaml(spec: Spec) -> str:
    """The resolved spec. `load_spec` reads it back as an equal spec."""
    data = _kind_first(spec.model_dump(mode="json"))
    return "".join(f"{line}\n" for line in _block(data))


def _kind_first(value: Any) -> Any:
    """What a map is comes before how big it is."""
    match value:
        case {"kind": kind, **others}:
            return {"kind": kind, **{key: _kind_first(item) for key, item in others.items()}}
        case dict():
            return {key: _kind_first(item) for key, item in value.items()}
        case list():
            return [_kind_first(item) for item in value]
        case _:
            return value


def _block(data: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, value in data.items():
        lines += _entry(key, value)
    return lines


def _entry(key: str, value: Any) -> list[str]:
    line = f"{key}: {_inline(value)}"
    nests = isinstance(value, dict | list) and any(
        isinstance(item, dict | list) and item for item in _items(value)
    )
    is_list_of_maps = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if not value or not (
        len(line) > MAX_WIDTH or (nests and _depth(value) > 2) or (is_list_of_maps and len(value) > 1)
    ):
        return [line]
    if isinstance(value, dict):
        return [f"{key}:", *(f"  {line}" for line in _block(value))]
    if isinstance(value, list):
        return [f"{key}:", *(f"  {line}" for item in value for line in _item(item))]
    return [line]


def _item(item: Any) -> list[str]:
    if not isinstance(item, dict) or (_depth(item) < 2 and len(_inline(item)) <= MAX_WIDTH):
        return [f"- {_inline(item)}"]
    first, *others = _block(item)
    return [f"- {first}", *(f"  {line}" for line in others)]


def _items(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _depth(value: Any) -> int:
    """How deeply maps and lists nest; 0 for a scalar."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max((_depth(item) for item in _items(value)), default=0)


def _inline(value: Any) -> str:
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
