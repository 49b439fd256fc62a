"""Names, allowed values and meanings of recipe fields, for help and completion."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Field(NamedTuple):
    """One field of a recipe; `values` lists its allowed words, and is empty for numbers and text."""

    name: str
    values: tuple[str, ...]
    kind: str
    meaning: str


def fields_of(recipe: type) -> list[Field]:
    """Fields of a recipe class other than sections, with their descriptions in its docstring and their defaults."""
    hints = get_type_hints(recipe)
    _, _, attributes = inspect.getdoc(recipe).partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w|^\S|\Z)", attributes, flags=re.DOTALL | re.MULTILINE)
    said = {name: " ".join(text.split()) for name, text in found}
    fields = []
    for field in dataclasses.fields(recipe):
        hint = _plain(hints[field.name])
        if not dataclasses.is_dataclass(hint):
            words = get_args(hint) if get_origin(hint) is Literal else ()
            # fields with allowed words keep the explanation of each word; others need one sentence
            meaning = said[field.name] if words else re.split(r"(?<=\w[\w`)]\.) |; ", said[field.name])[0]
            fields.append(Field(field.name, words, _kind(hints[field.name]), meaning.rstrip(".") + _default(field)))
    return fields


def add_fields(
    parser: argparse.ArgumentParser, title: str, recipe: type, prefix: str = "", skip: Collection[str] = ()
) -> None:
    """Add an option `--prefix.field` to a parser for each field of a recipe; values stay text.

    The result omits options that are not given. `skip` names fields that the parser defines itself.
    """
    group = parser.add_argument_group(title)
    for name, values, kind, meaning in fields_of(recipe):
        if name not in skip:
            group.add_argument(
                f"--{prefix}{name}",
                dest=f"{prefix}{name}",
                metavar=kind,
                choices=values or None,
                default=argparse.SUPPRESS,
                help=meaning.replace("%", "%%"),
            )


def _plain(hint: Any) -> Any:
    """A hint without `| None`."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    return parts[0] if len(parts) == 1 and get_origin(hint) is not Literal else hint


def _kind(hint: Any) -> str:
    """Placeholder of a value in help: `{a,b}`, or its type."""
    if get_origin(plain := _plain(hint)) is Literal:
        return "{" + ",".join(get_args(plain)) + "}"
    parts = [part for part in get_args(hint) or (hint,) if part is not type(None)]
    return "|".join(word for part in parts for word in (get_args(part) or (_NAMES[part],)))


_NAMES = {bool: "{true,false}", int: "N", float: "X", str: "TEXT"}


def _default(field: dataclasses.Field) -> str:
    if field.default is None or field.default is dataclasses.MISSING:
        return ""
    return f" [{str(field.default).lower() if isinstance(field.default, bool) else field.default}]"
