"""Run unlabelled batches through a model once, and keep the statistics that methods need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .adapters import TransformerAdapter
from .errors import DataError
from .modes import eval_mode
from .plan import Kind

Batches = Iterable[Mapping[str, Any]]

MAX_TOKENS = 4096


@torch.inference_mode()
def states_after(
    model: PreTrainedModel,
    adapter: TransformerAdapter,
    kind: Kind,
    batches: Batches,
    *,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """The residual stream after each layer, attention block or MLP block, on calibration tokens.

    Args:
        batches: dicts of model inputs, such as `{"input_ids", "attention_mask"}`; padding is left out.
        max_tokens: memory does not grow past this: a uniform sample is kept (reservoir sampling by random keys).

    Returns:
        (blocks, tokens, hidden) float32 on the model's device, the same tokens for every block.

    Raises:
        DataError: there are no batches, or they hold no token that is not padding.
    """
    recorder = _Recorder(model, adapter, kind)
    generator = torch.Generator().manual_seed(seed)
    kept = keys = None
    with eval_mode(model), recorder:
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=None, leave=False):
            inputs = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
            states = recorder.run(inputs, mask=inputs.get("attention_mask"))
            fresh = torch.rand(states.shape[1], generator=generator)
            kept = states if kept is None else torch.cat([kept, states], dim=1)
            keys = fresh if keys is None else torch.cat([keys, fresh])
            if len(keys) > max_tokens:
                chosen = keys.topk(max_tokens).indices
                kept, keys = kept[:, chosen.to(kept.device)], keys[chosen]
    if kept is None or kept.shape[1] == 0:
        raise DataError("the calibration batches hold no tokens: give `batches` with at least one batch of inputs.")
    return kept


class _Recorder:
    """Hooks that record the residual stream after every block of one kind during a forward pass."""

    def __init__(self, model: PreTrainedModel, adapter: TransformerAdapter, kind: Kind) -> None:
        self.model, self.states, self.handles = model, [], []
        if kind == "layer":
            for layer in adapter.layer_list(model):
                self._hook(layer, self._output)
            return
        for block in adapter.blocks(model):
            if block.kind == kind:
                norm = model.get_submodule(block.modules["norm"])
                if adapter.post_norm:
                    self._hook(norm, self._output)
                else:
                    # before the block the stream is what its norm reads; after it, that plus what the block adds
                    self._hook(norm, self._input)
                    self._hook(model.get_submodule(block.modules["out"]), self._addition)

    def _hook(self, module: torch.nn.Module, record: Any) -> None:
        self.handles.append(module.register_forward_hook(record))

    def _output(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self.states.append(output[0] if isinstance(output, tuple) else output)

    def _input(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self.states.append(args[0])

    def _addition(self, module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        self.states[-1] = self.states[-1] + output

    def run(self, inputs: dict[str, Tensor], mask: Tensor | None) -> Tensor:
        self.states.clear()
        self.model(**inputs)
        states = torch.stack([state.float() for state in self.states])
        states = states.flatten(1, -2)
        if mask is not None and mask.numel() == states.shape[1]:
            states = states[:, mask.flatten().bool()]
        return states

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()
