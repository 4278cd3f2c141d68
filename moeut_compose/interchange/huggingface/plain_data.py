"""What stands for Pydantic in exported code: specs as plain objects.

An exported configuration was validated before it was written. Reading it needs no rules any more, only the
classes: each key becomes an attribute, and a map becomes the class that its `kind` names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_type_hints

Decorated = TypeVar("Decorated")


class BaseModel:
    """Keys as attributes; what is not given keeps the default of its class."""

    def __init__(self, **values: Any) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for name, value in values.items():
            setattr(self, name, read(hints[name], value))


def read(hint: Any, value: Any) -> Any:
    """A value of a document as its annotation has it."""
    if isinstance(value, dict):
        return described(hint, value)(**value)
    return [read(hint, item) for item in value] if isinstance(value, list) else value


def described(hint: Any, value: dict[str, Any]) -> type[BaseModel]:
    """The class, among those that an annotation allows, that a map describes."""
    kind = value.get("kind")
    return next(model for model in models(hint) if getattr(model, "kind", None) == kind)


def models(hint: Any) -> list[type[BaseModel]]:
    """All classes of specs inside an annotation."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [hint]
    return [model for part in get_args(hint) for model in models(part)]


def ConfigDict(**settings: Any) -> None:
    """Settings of the validation; nothing is validated here."""


def Field(**rules: Any) -> None:
    """Rules of a value; nothing is validated here."""


def BeforeValidator(*rules: Any, **settings: Any) -> None:
    """How people may write a value; documents hold the resolved form."""


def model_validator(**settings: Any) -> Callable[[Decorated], Decorated]:
    """A rule of a whole spec; never called here."""
    return lambda method: method
