"""Show the fields of recipes and their defaults in the API reference, as for other dataclasses."""

from typing import Any

import griffe

DATACLASS = griffe.ExprCall(
    griffe.ExprName("dataclasses.dataclass"), [griffe.ExprKeyword("kw_only", griffe.ExprName("True"))]
)


class StrictRecipes(griffe.Extension):
    """Extension for `strict_recipe`, which makes a dataclass only when the code runs."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Treat `strict_recipe` as the decorator of the standard library."""
        if any(str(decorator.value) == "strict_recipe" for decorator in cls.decorators):
            cls.decorators.append(griffe.Decorator(DATACLASS, lineno=cls.lineno, endlineno=cls.lineno))
