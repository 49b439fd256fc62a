"""Base of all recipes: keyword-only fields, checked types, and errors that are `RecipeError`s."""

import contextlib
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ..errors import RecipeError

_T = TypeVar("_T")


def strict_recipe(
    cls: type[_T] | None = None, *, renamed: Mapping[str, str] = MappingProxyType({})
) -> type[_T] | Callable[[type[_T]], type[_T]]:
    """Make a class a keyword-only strict dataclass that raises only `RecipeError`.

    Args:
        cls: Class to decorate; None where the decorator is called with options.
        renamed: Earlier name -> name of a field. Recipes of earlier releases have the former, and still load.
    """
    return partial(_strict, renamed=renamed) if cls is None else _strict(cls, renamed)


def _strict(cls: type[_T], renamed: Mapping[str, str]) -> type[_T]:
    cls = strict(dataclasses.dataclass(cls, kw_only=True))
    fill = cls.__init__
    hints = get_type_hints(cls)
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def check_and_fill(self: Any, values: dict[str, Any]) -> None:
        values = current_names(cls, values)
        for name in values:
            if name not in hints:
                close = difflib.get_close_matches(name, hints, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise RecipeError(f"{cls.__name__} has no field {name!r}.{hint} Its fields are: {', '.join(hints)}.")
            if "float" in str(hints[name]):
                values[name] = _as_float(values[name])
            if values[name] is False and "no" in get_args(hints[name]):
                values[name] = "no"  # YAML 1.1 reads that word as false
            if isinstance(values[name], str) and values[name].startswith("~/"):
                values[name] = os.path.expanduser(values[name])  # a shell does this only at the start of a word
        if missing := [name for name in required if name not in values]:
            raise RecipeError(
                f"{cls.__name__} lacks {', '.join(missing)}: add {'it' if len(missing) == 1 else 'them'}."
            )
        try:
            fill(self, **values)
        except (StrictDataclassError, TypeError) as error:
            wrong = re.search(r"[Ff]ield '(\w+)'", str(error))
            if wrong is not None and wrong[1] in values:
                name = wrong[1]
                raise RecipeError(f"{cls.__name__}: {name}={values[name]!r}: use {_allowed(hints[name])}.") from error
            reason = str(error).splitlines()[-1].strip().rstrip(".")
            raise RecipeError(f"{cls.__name__}: {reason}. Correct this value in the recipe.") from error

    def __init__(self, **values: Any) -> None:
        try:
            check_and_fill(self, values)
        except RecipeError as error:
            error.recipe = error.recipe or cls
            raise

    cls.__init__, cls._renamed = __init__, renamed
    return cls


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _allowed(hint: Any) -> str:
    """Values of a field in words."""
    words = []
    for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        if get_origin(part) is Literal:
            words += map(repr, get_args(part))
        elif part is not type(None):
            words.append(_KINDS.get(part) or f"a {part.__name__}")
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def current_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe with the current name of each field, in place of the name that an earlier release had.

    Raises:
        RecipeError: A field is given by both names.
    """
    found = dict(values)
    for earlier, name in cls._renamed.items():
        if earlier in found:
            if name in found:
                raise RecipeError(f"{cls.__name__}: {earlier!r} is the earlier name of {name!r}. Give only {name!r}.")
            found[name] = found.pop(earlier)
    return found


def _as_float(value: Any) -> Any:
    """People write 1 for 1.0, and YAML 1.1 reads 1e-4 as text."""
    if type(value) in (int, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def require_one(recipe: Any, names: Sequence[str], instead: str) -> None:
    """Raise a `RecipeError` unless exactly one of the named fields is set.

    Args:
        recipe: Recipe with these fields.
        names: Names of the fields.
        instead: Advice on the fields to set, for the message.
    """
    given = [f"{name}={value}" for name in names if (value := getattr(recipe, name)) is not None]
    require(len(given) == 1, f"give exactly one target, got {' and '.join(given) or 'none'}: set {instead}.")


def require(condition: bool, message: str) -> None:
    """Raise a `RecipeError` with `message` unless `condition` holds."""
    if not condition:
        raise RecipeError(message)
