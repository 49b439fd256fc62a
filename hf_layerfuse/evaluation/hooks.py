"""Forward hooks that record the tensors at modules while a model runs. They are always removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Cache, PreTrainedModel

from ..errors import DataError
from .batches import Batches, model_inputs, tokens_of
from .modes import eval_mode

When = Literal["before", "after"]
Key = TypeVar("Key", bound=Hashable)


class StopForward(Exception):
    """Stops a forward pass once all requested tensors are recorded, so that the rest of the model does not run."""


def uncached(argument: Any) -> Any:
    """An argument of a layer; None replaces a cache, which would hold the tokens of an earlier call."""
    return None if isinstance(argument, Cache) else argument


@contextmanager
def watch(modules: Mapping[Key, tuple[nn.Module, When]], record: Callable[[Key, Tensor], None]) -> Iterator[None]:
    """Pass the tensors at modules to `record` during every forward pass inside the `with` block.

    The hooks are removed at the end of the block, also after an error. If `record` raises `StopForward`, the block ends
    without an error.

    Args:
        modules: Modules by any key, each with the side to watch. `before` is the first input of the module, `after` its
            output, or the first element of a tuple.
        record: Function that receives a key and its tensor, in the order in which the modules run. The tensor is not
            copied.
    """

    def add_hook(key: Key, module: nn.Module, when: When) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(key, args[0] if args else next(iter(kwargs.values())))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record(key, output[0] if isinstance(output, tuple) else output)

        if when == "before":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    with ExitStack() as hooks:
        for key, (module, when) in modules.items():
            hooks.callback(add_hook(key, module, when).remove)
        with suppress(StopForward):
            yield


@torch.no_grad()
def watch_tokens(
    model: PreTrainedModel,
    batches: Batches,
    modules: Mapping[Key, tuple[nn.Module, When]],
    record: Callable[[Key, Tensor], None],
    after_batch: Callable[[], None] = lambda: None,
    mask_name: str = "attention_mask",
) -> None:
    """Run batches in eval mode, and pass the tokens at modules to `record`, without padding.

    This function keeps no tensors, so its memory depends on `record` alone.

    Args:
        model: Model that contains the modules.
        batches: Calibration batches, dicts of model inputs such as `{"input_ids", "attention_mask"}`.
        modules: Modules to watch, as in `watch`.
        record: Function that receives a key and its tokens, (tokens, width). The pixels of images count as tokens.
        after_batch: Function called after each batch with at least one token.
        mask_name: Input of the model that masks the tokens.

    Raises:
        DataError: No batches, or no tokens but padding.
    """
    mask: Tensor | None = None
    tokens = 0

    def without_padding(key: Key, states: Tensor) -> None:
        nonlocal tokens
        states = tokens_of(states).flatten(0, -2)
        if mask is not None and mask.numel() == len(states):
            states = states[mask.flatten().bool()]
        tokens += len(states)
        if len(states):
            record(key, states)

    with eval_mode(model), watch(modules, without_padding):
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=None, leave=False):
            before = tokens
            inputs = model_inputs(batch, model)
            mask = inputs.get(mask_name)
            model(**inputs)
            if tokens > before:
                after_batch()
    if not tokens:
        raise DataError(
            "the calibration batches hold no tokens that are not padding: pass `batches` with at least one such token."
        )
