"""What may stand where in a spec, read off the Pydantic models: the fields of a map, the members of a union."""

import types
import typing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined


@dataclass(frozen=True)
class Shape:
    """One place in a spec: the alternatives that its annotation allows, and its default."""

    alternatives: tuple[Any, ...] = ()
    default: Any = PydanticUndefined
    is_known: bool = True
    """False below an unknown key, where nothing can be said."""

    @classmethod
    def of(cls, annotation: Any, default: Any = PydanticUndefined) -> "Shape":
        return cls(tuple(_alternatives(annotation)), default)

    @classmethod
    def unknown(cls) -> "Shape":
        return cls(is_known=False)

    @cached_property
    def models(self) -> tuple[type[BaseModel], ...]:
        """The maps that may stand here; several are a union told apart by `kind`."""
        found = tuple(a for a in self.alternatives if isinstance(a, type) and issubclass(a, BaseModel))
        return found or (self.item().models if self._item_annotations else ())

    @property
    def takes_null(self) -> bool:
        return type(None) in self.alternatives

    @property
    def is_list(self) -> bool:
        return bool(self._item_annotations)

    @cached_property
    def _item_annotations(self) -> tuple[Any, ...]:
        lists = (a for a in self.alternatives if typing.get_origin(a) in (list, tuple))
        return tuple(item for a in lists for item in typing.get_args(a) if item is not Ellipsis)

    def item(self) -> "Shape":
        """The items of the list that may stand here."""
        if not self._item_annotations:
            return Shape.unknown()
        return Shape(tuple(inner for item in self._item_annotations for inner in _alternatives(item)))

    def model(self, kind: str | None) -> type[BaseModel] | None:
        """The map that stands here, if `kind` decides it or there is only one."""
        if len(self.models) == 1:
            return self.models[0]
        return next((model for model in self.models if kind in kinds(model)), None)

    def kinds(self) -> list[str]:
        """What `kind` may be here."""
        return [kind for model in self.models for kind in kinds(model)]

    def child(self, key: str, kind: str | None) -> "Shape":
        """What may stand under `key` of the map of this `kind`."""
        for alternative in self.alternatives:
            if typing.get_origin(alternative) is dict:
                return Shape.of(typing.get_args(alternative)[1])
        model = self.model(kind)
        field = model.model_fields.get(key) if model is not None else None
        if field is None:
            return Shape.unknown()
        return Shape.of(field.annotation, field.get_default(call_default_factory=True, validated_data={}))

    def default_data(self) -> Any:
        """The default as plain data; None if there is none."""
        return None if self.default is PydanticUndefined else as_data(self.default)


def as_data(value: Any) -> Any:
    """A field's value as YAML would hold it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [as_data(item) for item in value]
    return value


def kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of `kind` that select this model in a union."""
    field = model.model_fields.get("kind")
    return typing.get_args(field.annotation) if field is not None else ()


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, however deeply it is annotated or nested."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [inner for member in typing.get_args(annotation) for inner in _alternatives(member)]
    return [annotation]


def union_members(shape: Shape, family: str = "") -> list[tuple[str, str, type[BaseModel]]]:
    """Every member of every union at or below a place: the key that it stands under, its kind, and its model."""
    found: dict[tuple[str, str], type[BaseModel]] = {}
    for model in shape.models:
        if len(shape.models) > 1:
            found.update({(family, kind): model for kind in kinds(model)})
        for key, field in model.model_fields.items():
            for name, kind, member in union_members(Shape.of(field.annotation), key):
                found.setdefault((name, kind), member)
    order = list(dict.fromkeys(name for name, _ in found))
    return [
        (name, kind, found[name, kind]) for name, kind in sorted(found, key=lambda pair: order.index(pair[0]))
    ]
