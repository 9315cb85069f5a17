"""Plain data from files become typed dataclasses. Each value is checked once, by its type and its range.

Tensors are checked too: by name, shape and numbers.

The annotation of a field says both. `Annotated[int, cli.positive_int]` has the range of a flag of that type.
"""

import argparse
import types
import typing
from collections.abc import Callable, Container, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import torch
from torch import Tensor

from runtime.errors import UserError

T = TypeVar("T")
TOO_LARGE = 2**63  # no number of a checkpoint is so large
LETTERS = 60  # letters of a value, or names of keys, in a message


def one_of(names: Container[str]) -> Callable[[str], str]:
    """A range for Annotated: one of these names."""

    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{brief(text)} is not one of {', '.join(names)}")
        return text

    return check


def read_as(kind: type[T], contents: object, name: str = "it") -> T:
    """A dataclass from a dict of plain data. A field's metadata may give its `key` in the dict, if that differs.

    Args:
        name: what messages call the dict.

    Raises:
        ValueError: a key is missing or unknown, or a value has another type or is out of its range.
    """
    if not isinstance(contents, dict):
        raise ValueError(f"{name} is {brief(contents)}, not a dict")
    keys = {field.metadata.get("key", field.name): field for field in fields(kind)}
    unknown = [key for key in contents if key not in keys]
    if unknown:
        raise ValueError(f"{name} has the unknown key {brief_names(unknown)}: a newer version of EqM may know it")
    hints = typing.get_type_hints(kind, include_extras=True)
    values = {}
    for key, field in keys.items():
        if key in contents:
            values[field.name] = as_type(hints[field.name], contents[key], key if name == "it" else f"{name}.{key}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} has no {key}")
    return kind(**values)


def as_type(kind: Any, value: object, name: str) -> Any:
    """A value of a field's type. Lists become tuples where the type is a tuple.

    Raises:
        ValueError: it has another type, or is out of its range.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = as_type(parts[0], value, name)
        try:
            parts[1](str(value))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{name}: {error}") from None
        return value
    if origin in (Union, types.UnionType):
        return as_one_of(parts, value, name)
    if is_dataclass(kind):
        return read_as(kind, value, name)
    wrong = ValueError(f"{name} is {brief(value)}, not {getattr(origin or kind, '__name__', kind)}")
    if origin is tuple:
        every = parts[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (every or len(value) == len(parts)):
            raise wrong
        named = zip(parts[:1] * len(value) if every else parts, value, strict=True)
        return tuple(as_type(part, each, f"{name}[{i}]") for i, (part, each) in enumerate(named))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, parts[0]) for key in value):
            raise wrong
        return {key: as_type(parts[1], each, f"{name}.{brief(key)[1:-1]}") for key, each in value.items()}
    if kind in (int, float) and isinstance(value, int) and abs(value) >= TOO_LARGE:
        raise ValueError(f"{name} is a number beyond 2^63")
    if not isinstance(value, kind | int if kind is float else kind):  # a whole number may stand for a float
        raise wrong
    return value


def as_one_of(kinds: tuple, value: object, name: str) -> Any:
    """A value of the first type that it fits; raises ValueError as the last one does."""
    kinds = sorted(kinds, key=lambda kind: kind is not types.NoneType)
    for kind in kinds[:-1]:
        try:
            return as_type(kind, value, name)
        except ValueError:
            continue
    return as_type(kinds[-1], value, name)


def brief(value: object) -> str:
    """A value for a message, short and in one line, whatever it is."""
    if isinstance(value, str | bool | float | types.NoneType) or (isinstance(value, int) and abs(value) < TOO_LARGE):
        text = ascii(value[:LETTERS] if isinstance(value, str) else value)
        return f"{text[:LETTERS]}…" if len(text) > LETTERS else text
    return f"a {type(value).__name__}"


def brief_names(keys: "Mapping | list") -> str:
    """The first keys of a dict for a message, in one line."""
    names = ", ".join(brief(key) for key in list(keys)[:5])
    more = len(keys) - 5
    return (f"{names} and {more} more" if more > 0 else names) or "nothing"


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape; () for a nested tensor, which has none."""
    return () if tensor.is_nested else tuple(tensor.shape)


def check_tensors(
    expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], source: str | Path, finite: bool = True
) -> None:
    """Checks tensors by name from the file `source`: their names, their shapes, and that all numbers are `finite`.

    Raises:
        UserError: with the first difference.
    """
    check_shapes(expected, {name: shape_of(tensor) for name, tensor in tensors.items()}, source)
    for name, tensor in tensors.items():
        problem = tensor_problem(tensor, finite)
        if problem:
            raise UserError(f"{source} holds tensors that cannot be used: {name} {problem}")


def check_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: str | Path) -> None:
    """Raises UserError, with the first difference, if tensors of the file `source` have other names or shapes."""
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(name, "nothing"), found.get(name, "nothing")
        if ours != theirs:
            raise UserError(f"{source} holds another network: {brief(name)[1:-1]} is {theirs} there and {ours} here")


def tensor_problem(tensor: Tensor, finite: bool) -> str:
    """Why a tensor from a file cannot be computed with, or an empty text."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "is sparse, quantised or without data"
    if not tensor.is_floating_point():
        return f"holds {tensor.dtype}, not floating-point numbers"
    # A sum is finite only if all its terms are, and takes a third of the time.
    if finite and not (tensor.sum().isfinite() or tensor.isfinite().all()):
        return "holds numbers that are not finite"
    return ""
