"""The placeholders that remove a block: modules to replace, and the classes that replace them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor, nn

from ..models.architectures import Placeholder, ZeroAttention, ZeroBlock
from .dataflow import LayerGraph, ModuleCall
from .sums import Branch


def placeholders(graph: LayerGraph, branch: Branch, complete: bool) -> dict[str, type[nn.Module]]:
    """Find the modules to replace so that a layer runs without a block.

    Parts that read the stream become zeros. Norms in front of them, and parts that read zeros, return their input.

    Args:
        graph: Dataflow of the layer.
        branch: Branch of the block.
        complete: Whether the parts that do not add the residual hold the whole block.

    Returns:
        Path -> class of the placeholder.
    """
    found: dict[str, type[nn.Module]] = {}
    if branch.adder is not None:
        inside = [part for part in branch.parts if part.path.startswith(f"{branch.adder.path}.")]
        if not complete or sum(part.behaviour not in ("norm", "inert") for part in inside) > 1:
            for part in branch.parts:
                if part not in inside:
                    found[part.path] = _passing(part)
            found[branch.adder.path] = _class_for(branch.adder, _places(branch.adder, graph, branch.sum.residual))
            return found
    silent: list[int] = []  # outputs of parts that are zeros
    for part in branch.parts:
        zero = any(graph.depends(node, of) for of in silent for node in part.inputs)
        if zero or part.behaviour in ("norm", "inert"):
            found[part.path] = _passing(part)
        else:
            found[part.path] = _class_for(part, {})
        if zero or part.behaviour not in ("norm", "inert"):
            silent += part.outputs
    return found


@functools.cache
def _subclass(outputs: int | None, passed: tuple[tuple[int, int | str], ...]) -> type[nn.Module]:
    """A subclass of `Placeholder`, the same each time for the same values, so that tables can be compared."""
    names = [f"{place}{str(key).title().replace('_', '')}" for place, key in passed]
    name = "_".join(["Zero" if 0 not in dict(passed) else "Pass", *([str(outputs)] if outputs else []), *names])
    return type(name, (Placeholder,), {"outputs": outputs, "passed": dict(passed), "__module__": __name__})


def _class_for(part: ModuleCall, passed: Mapping[int, int | str]) -> type[nn.Module]:
    """Class that returns zeros in place of a part. Outputs that are among the arguments of the part are passed on."""
    outputs = len(part.output) if isinstance(part.output, tuple) else None
    given: dict[int | str, object] = {**dict(enumerate(part.args)), **part.kwargs}
    passed = dict(passed)
    for place in range(1, outputs or 1):
        value = part.output[place]
        if isinstance(value, Tensor):
            keys = [key for key, argument in given.items() if argument is value]
            if keys:
                passed[place] = keys[0]
    simple = not passed and (bool(part.args) or "hidden_states" in part.kwargs)
    if simple and outputs in (1, 2):
        return ZeroAttention
    if simple and outputs is None:
        return ZeroBlock
    return _subclass(outputs, tuple(sorted(passed.items())))


def _passing(part: ModuleCall) -> type[nn.Module]:
    """Class that returns the input of a part."""
    if len(part.args) == 1 and not part.kwargs and isinstance(part.output, Tensor):
        return nn.Identity
    if isinstance(part.output, tuple):
        return _class_for(part, {})
    first = 0 if part.args else next(name for name, value in part.kwargs.items() if isinstance(value, Tensor))
    return _subclass(None, ((0, first),))


def _places(adder: ModuleCall, graph: LayerGraph, residual: int) -> dict[int, int | str]:
    """{0: place or name of the argument that is the residual}."""
    at = adder.inputs.index(residual)
    tensors = [key for key, value in (*enumerate(adder.args), *adder.kwargs.items()) if isinstance(value, Tensor)]
    return {0: tensors[at]}
