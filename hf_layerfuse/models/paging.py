"""Models larger than memory: each module reads its weights from the checkpoint when it runs, and drops them later."""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

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

MEMORY = 1 << 30
"""Bytes of weights that stay in memory although they are not in use."""


_PAGED: WeakKeyDictionary[nn.Module, PagedWeights] = WeakKeyDictionary()


class PagedWeights:
    """The weights of a checkpoint in pages, of which only some are in memory.

    Each layer is a page, and so is each other module with weights of its own. A page is read in float32 when its module
    runs. The pages that ran longest ago are dropped, once all pages in memory take more than `memory`. Weights that are
    not in memory are NaN, so that a computation with them cannot go unnoticed.

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
        pages = {layer: list(layer.state_dict()) for layer in stack if layers}
        pages |= {module: own for module in model.modules() if module not in inside and (own := _own(module))}
        names = self.names_of(model)
        at = {module: f"{name}." if name else "" for name, module in model.named_modules()}
        for page, own in pages.items():
            if lost := [at[page] + name for name in own if at[page] + name not in names]:
                raise CheckpointError(
                    f"the checkpoint at {self.path!r} has no weights under the name {lost[0]!r}, so that they cannot "
                    "be read layer by layer: load the whole model, and pass it to fuse()."
                )
            self._names[page] = {name: names[at[page] + name] for name in own}
            page.forward = functools.partial(self._run, page, page.forward)
            _PAGED[page] = self

    @contextmanager
    def kept(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Keep the weights of attached modules in memory inside the `with` block."""
        self._users.update(modules)
        try:
            for module in modules:
                self._read(module)
            yield
        finally:
            self._users.subtract(modules)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A weight of the checkpoint, by default in the data type of its file.

        Raises:
            UnsupportedModelError: The weight is NaN or infinite.
        """
        with safe_open(self.files[name], "pt") as weights:
            stored = weights.get_tensor(name)  # mapped, so that only the copy takes memory
            found = stored.to(dtype if stored.is_floating_point() else None, copy=True)
        if found.is_floating_point() and not torch.isfinite(found.sum()):
            raise UnsupportedModelError(
                f"{name} holds NaN or infinite values: the checkpoint is damaged or was trained past divergence; "
                "use an earlier one."
            )
        return found

    def size(self, name: str) -> int:
        """Number of bytes of a weight in its file."""
        with safe_open(self.files[name], "pt") as weights:
            return weights.get_tensor(name).nbytes

    def names_of(self, model: PreTrainedModel) -> dict[str, str]:
        """Name in the files of each weight of a model. Files of a body lack the prefix that a head puts before it."""
        prefix, found = f"{model.base_model_prefix}.", {}
        for name in model.state_dict():
            tied = model.all_tied_weights_keys.get(name, name)
            for stored in (name, tied, tied.removeprefix(prefix), prefix + tied):
                if stored in self.files:
                    found.setdefault(name, stored)
        return found

    def _run(self, page: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if page not in self._names:  # a copy has weights of its own
            return forward(*args, **kwargs)
        with self.kept([page]):
            return forward(*args, **kwargs)

    def _read(self, page: nn.Module) -> None:
        if page in self._pages:
            self._pages.move_to_end(page)
            return
        shapes = {name: tensor.shape for name, tensor in page.state_dict().items() if name in self._names[page]}
        size = 4 * sum(map(torch.Size.numel, shapes.values()))
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
            if module in _PAGED:
                stack.enter_context(_PAGED[module].kept([module]))
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
