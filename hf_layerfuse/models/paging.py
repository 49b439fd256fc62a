"""Models larger than memory: each module reads its weights from the checkpoint when it runs, and drops them later."""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, UnsupportedModelError
from ..evaluation.precision import store_as
from .architectures import LayerArchitecture
from .files import stored_dtype, stored_files
from .heads import head_class
from .loading import explained
from .modeling import names_in_files

MEMORY = 1 << 30
"""Bytes of weights that stay in memory although they are not in use."""

_LARGE = (nn.Embedding, nn.Linear)
_SMALL = 1 << 24
"""Most bytes of a module outside the stack of layers that stays in memory."""

_PART = 1 << 22
"""Number of values to check at a time."""

_WEIGHTS = "_layerfuse_weights"
"""Attribute of a module that reads its weights from a checkpoint."""


class PagedWeights:
    """The weights of a checkpoint in pages, of which only some are in memory.

    Each layer is a page, and so is each large embedding and head. A page is read in float32 when its module runs. The
    pages that ran longest ago are dropped, once all pages in memory take more than `memory`. Weights that are not in
    memory are NaN, so that a computation with them cannot go unnoticed.

    Args:
        path: Directory or Hub name of the checkpoint.
        memory: Number of bytes of the pages that are kept.
        hub: Options of the Hub, such as `revision` and `token`.

    Raises:
        CheckpointError: A file of the checkpoint is missing.
    """

    def __init__(self, path: str, memory: int = MEMORY, **hub: Any) -> None:
        self.path, self.memory = path, memory
        self.files = stored_files(path, **hub)
        self._names: dict[nn.Module, dict[str, str]] = {}
        self._pages: OrderedDict[nn.Module, int] = OrderedDict()
        self._users: Counter[nn.Module] = Counter()
        self._tensors: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedWeights:
        return self  # a copy of a layer reads the same files

    def attach(self, model: PreTrainedModel, architecture: LayerArchitecture, *, layers: bool = True) -> None:
        """Let the modules of a hollow model read their weights from the checkpoint when they run.

        Args:
            model: Model from `hollow`.
            architecture: Architecture table of the model.
            layers: Whether the layers read theirs too. Otherwise, only the modules outside them do.

        Raises:
            CheckpointError: The checkpoint lacks weights of the model, or has them under other names.
        """
        stack = list(architecture.layer_list(model))
        inside = {module for layer in stack for module in layer.modules()}
        own = {layer: list(layer.state_dict()) for layer in stack if layers}
        own |= {module: names for module in model.modules() if module not in inside and (names := _own(module))}
        names = names_in_files(model, self.files)
        at = {module: f"{name}." if name else "" for name, module in model.named_modules()}
        for module, weights in own.items():
            if lost := [at[module] + name for name in weights if at[module] + name not in names]:
                raise CheckpointError(
                    f"the checkpoint at {self.path!r} holds no {lost[0]!r}: it is damaged, or Transformers computes "
                    "this weight from others while it loads the model. Load the whole model, and pass it to fuse()."
                )
            self._names[module] = {name: names[at[module] + name] for name in weights}
            setattr(module, _WEIGHTS, self)
            if module in stack or (type(module) in _LARGE and self._size(module) > _SMALL):
                module.forward = functools.partial(self._run, module, module.forward)
            else:  # others may read such weights without running their module
                self._read(module)
                self._users[module] += 1

    @contextmanager
    def kept(self, module: nn.Module) -> Iterator[None]:
        """Keep the weights of a module in memory inside the `with` block. A copy of a module has its own weights."""
        if module not in self._names:
            yield
            return
        self._users[module] += 1
        try:
            self._read(module)
            yield
        finally:
            self._users[module] -= 1

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A weight of the checkpoint, by default in the data type of its file.

        Raises:
            UnsupportedModelError: The weight is NaN or infinite.
        """
        with safe_open(self.files[name], "pt") as weights:
            stored = weights.get_tensor(name)  # mapped, so that only the copy takes memory
            found = stored.to(dtype if stored.is_floating_point() else None, copy=True)
            del stored
        if not all(torch.isfinite(part).all() for part in found.flatten().split(_PART)):
            raise UnsupportedModelError(
                f"{name} holds NaN or infinite values: the checkpoint is damaged or was trained past divergence; "
                "use an earlier one."
            )
        return found

    def size(self, name: str) -> int:
        """Number of bytes of a weight in its file."""
        with safe_open(self.files[name], "pt") as weights:
            return weights.get_tensor(name).nbytes

    def _run(self, page: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.kept(page):
            return forward(*args, **kwargs)

    def _read(self, page: nn.Module) -> None:
        if page in self._pages:
            self._pages.move_to_end(page)
            return
        shapes = {name: tensor.shape for name, tensor in page.state_dict().items() if name in self._names[page]}
        size = self._size(page)
        self._make_room(size)
        found = {}
        for name, stored in self._names[page].items():
            tensor = self._tensors.get(stored)  # another module may use it: tied embeddings
            if tensor is None:
                tensor = nn.Parameter(self.tensor(stored, torch.float32), requires_grad=False)
                self._tensors[stored] = tensor
            if tensor.shape != shapes[name]:
                raise CheckpointError(
                    f"{stored} in {self.path!r} has the shape {tuple(tensor.shape)}, and its config asks for "
                    f"{tuple(shapes[name])}: restore the original config.json."
                )
            found[name] = tensor
        fill(page, found)
        self._pages[page] = size

    def _size(self, module: nn.Module) -> int:
        """Number of bytes of the weights of a module in float32."""
        return sum(4 * tensor.numel() for name, tensor in module.state_dict().items() if name in self._names[module])

    def _make_room(self, size: int) -> None:
        for page in [page for page in self._pages if not self._users[page]]:
            if sum(self._pages.values()) + size <= self.memory:
                return
            empty(page, self._names[page])
            del self._pages[page]


@contextmanager
def in_memory(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep the weights of modules in memory inside the `with` block. Nothing changes for those of ordinary models."""
    with ExitStack() as stack:
        for module in modules:
            if (weights := getattr(module, _WEIGHTS, None)) is not None:
                stack.enter_context(weights.kept(module))
        yield


def paged_model(path: str | os.PathLike, memory: int = MEMORY, **hub: Any) -> tuple[PreTrainedModel, PagedWeights]:
    """Open a stock checkpoint as a model that reads each weight when it is needed.

    Args:
        path: Directory or Hub name.
        memory: Number of bytes of weights that stay in memory although they are not in use.
        hub: Options of the Hub, such as `revision` and `token`.

    Returns:
        The model in eval mode, and its weights, which are still to be attached to it.

    Raises:
        CheckpointError: The checkpoint is missing, is not a model, or lacks weights.
    """
    path = os.path.expanduser(os.fspath(path))
    with explained(path, hub):
        config = AutoConfig.from_pretrained(path, **hub)
        weights = PagedWeights(path, memory, **hub)
        if not weights.files:
            raise CheckpointError(f"{path!r} has no safetensors: save the model with save_pretrained, and give that.")
        model = hollow(head_class(config, weights.files), config)
        dtype = stored_dtype(path, **hub)
    return store_as(model, dtype or torch.float32), weights


def hollow(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model in eval mode whose weights are NaN and take no memory. Its other buffers are as usual."""
    with init_empty_weights(include_buffers=False):
        model = cls(copy.deepcopy(config))
    empty(model, model.state_dict())
    return model.eval()


def empty(module: nn.Module, names: Iterable[str]) -> None:
    """Replace weights of a module by NaN, which takes no memory. Its other buffers stay."""
    state = module.state_dict()
    nothing = torch.full((), torch.nan)
    fill(module, {name: nothing.expand(state[name].shape) for name in names if state[name].is_floating_point()})


def _own(module: nn.Module) -> list[str]:
    """Names of the weights of a module that do not belong to a module inside it."""
    return [name for name in module.state_dict() if "." not in name]


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace weights of a module by these tensors, without a copy."""
    module.load_state_dict(state, strict=False, assign=True)
    module.requires_grad_(False)
