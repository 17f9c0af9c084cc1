"""Classes of settings: fields with types and defaults that are set once.

They are frozen dataclasses to a type checker. When the program runs they are not: `dataclasses`
imports half of Python's parser and compiles code for each class, which takes a start 50 ms of CPU
and 2 MB of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as record
    from dataclasses import replace
else:

    def record(*, frozen: bool):
        """The decorator of a class of settings, whose annotations are its fields."""
        assert frozen

        def decorate(cls: type) -> type:
            for name, function in _METHODS.items():
                setattr(cls, name, function)
            return cls

        return decorate

    def replace(settings: Any, /, **changes: Any) -> Any:
        """A copy in which some fields are different."""
        return type(settings)(**{**vars(settings), **changes})


def field_names(cls: type) -> tuple[str, ...]:
    """The fields of a class of settings, in order."""
    return tuple(cls.__annotations__)


def _init(self: Any, *values: Any, **fields: Any) -> None:
    cls = type(self)
    names = field_names(cls)
    given = {**dict(zip(names, values, strict=False)), **fields}
    found = {name: given[name] if name in given else getattr(cls, name) for name in names}
    if len(values) > len(names) or len(values) + len(fields) != len(given.keys() & found.keys()):
        raise TypeError(f"{cls.__name__} has no such fields, or a field is given twice: {fields}")
    vars(self).update(found)


def _refuse(self: Any, name: str, value: Any = None) -> None:
    raise AttributeError(f"{type(self).__name__}.{name} cannot be changed")


def _eq(self: Any, other: object) -> Any:
    return vars(self) == vars(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash(tuple(vars(self).values()))


def _repr(self: Any) -> str:
    fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
    return f"{type(self).__name__}({fields})"


_METHODS = {
    "__init__": _init,
    "__setattr__": _refuse,
    "__delattr__": _refuse,
    "__eq__": _eq,
    "__hash__": _hash,
    "__repr__": _repr,
}
