"""The reference shows the fields of recipes and their defaults, as it does for other dataclasses."""

from typing import Any

import griffe

DATACLASS = griffe.ExprCall(
    griffe.ExprName("dataclasses.dataclass"), [griffe.ExprKeyword("kw_only", griffe.ExprName("True"))]
)


class StrictRecipes(griffe.Extension):
    """`strict_recipe` makes a dataclass, which one cannot see without running it."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Take that decorator for the one of the standard library."""
        if any(str(decorator.value) == "strict_recipe" for decorator in cls.decorators):
            cls.decorators.append(griffe.Decorator(DATACLASS, lineno=cls.lineno, endlineno=cls.lineno))
