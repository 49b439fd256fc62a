"""Loading a checkpoint, fused or stock, with specific errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, LayerFuseError
from ..evaluation.modes import outside_inference_mode
from .architectures import ARCHITECTURES, FUSED_PREFIX
from .files import stored_names, why_unreadable
from .heads import head_class, own_auto_class

_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


@outside_inference_mode
def load_checkpoint(path: str | os.PathLike, *, auto_class: type | None = None, **kwargs: Any) -> Any:
    """Load a fused or stock checkpoint, see `AutoFusedModel.from_pretrained`.

    Args:
        path: Directory or Hub name.
        auto_class: Auto class such as `AutoModelForCausalLM`; by default, the class of the saved model.
        kwargs: Arguments of `PreTrainedModel.from_pretrained`.

    Raises:
        CheckpointError: The checkpoint is missing, is not a model, is damaged, or lacks weights of the body or head.
        PlanError: The plan has a newer format, or does not fit the config.
    """
    if isinstance(path, PreTrainedModel):
        raise CheckpointError("the model is in memory already: call fuse(model, recipe) to fuse it.")
    path = os.path.expanduser(os.fspath(path))
    config = kwargs.pop("config", None)
    wants_report = kwargs.pop("output_loading_info", False)
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    kwargs.setdefault("use_safetensors", True)  # only safetensors, unless the caller sets it otherwise
    with explained(path, hub):
        if config is None:
            # as in the Auto classes: arguments that are config fields go to the config, except for the data type
            fields = {k: v for k, v in kwargs.items() if k not in (*_HUB_ARGUMENTS, "dtype", "torch_dtype")}
            config, rest = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **hub, **fields)
            kwargs = {k: v for k, v in kwargs.items() if k not in fields or k in rest}
        elif not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(os.path.expanduser(config), **hub)
        architectures = config.architectures
        cls = auto_class or _class_of(path, config, kwargs, hub)
        model, report = cls.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    wrong = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    if model.base_model is model:
        # published bodies often lack the pooler of their class; all other weights must be in the checkpoint
        wrong = [key for key in wrong if not key.startswith("pooler.")]
    if wrong:
        raise CheckpointError(
            f"the checkpoint at {path!r} lacks weights that {type(model).__name__} needs: "
            f"{', '.join(sorted(wrong)[:5])}{' and more' if len(wrong) > 5 else ''}. Download it again if it is "
            "damaged; fine-tune it first if it has no head for this task."
        )
    _check_layers(model, path, report["unexpected_keys"])
    if auto_class is None and not architectures and report["unexpected_keys"]:
        raise CheckpointError(
            f"config.json of {path!r} has no `architectures`, and {type(model).__name__} has no place for "
            f"{sorted(report['unexpected_keys'])[0]}: add the class of the model to config.json."
        )
    return (model, report) if wants_report else model


@contextmanager
def explained(path: str, hub: Mapping[str, Any]) -> Iterator[None]:
    """Turn any error while a checkpoint is read into a `CheckpointError` that says what is wrong with it."""
    try:
        yield
    except Exception as error:  # configs of users lead to anything, such as KeyError for an unknown activation
        if (why := _why_unknown(path, hub)) is not None:
            raise CheckpointError(why) from error
        if isinstance(error, LayerFuseError):
            raise
        if (why := why_unreadable(path)) is not None:
            raise CheckpointError(why) from error
        if not os.path.exists(path) and (os.path.isabs(path) or path.startswith(".") or path.count("/") != 1):
            raise CheckpointError(f"there is no directory {path!r}: correct the path, or give a Hub name.") from error
        reason = " ".join(str(error).split())
        if "trust_remote_code=True" in reason:
            raise CheckpointError(
                f"the checkpoint at {path!r} has code of its own, which is not run unasked: read it, then pass "
                "trust_remote_code=True in Python, add --trust_remote_code to `inspect`, `adapt` or `plan`, or set "
                "trust_remote_code in the recipe of a run."
            ) from error
        if not isinstance(error, OSError | ValueError) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        raise CheckpointError(f"cannot load a model from {path!r}: {reason[:400]}") from error


def _why_unknown(path: str, hub: Mapping[str, Any]) -> str | None:
    """Message for a fused checkpoint whose architecture has no table in this process, or None."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(path, **hub)
        model_type = str(fields.get("model_type"))
    except (AttributeError, OSError, TypeError, ValueError):  # a damaged config has a message of its own
        return None
    base = model_type.removeprefix(FUSED_PREFIX)
    if base == model_type or base in ARCHITECTURES:
        return None
    return (
        f"the checkpoint at {path!r} is a fused {base!r}, whose architecture table is not registered: import the "
        "module with the table before loading. `hf-layerfuse adapt ORIGINAL`, with the model it was made from, prints "
        "the table."
    )


def _class_of(path: str, config: PreTrainedConfig, kwargs: Mapping[str, Any], hub: Mapping[str, Any]) -> type:
    """Class of a checkpoint: that of its config, else the one that takes all its weights."""
    if config.architectures:
        return (own_auto_class(config) if hub.get("trust_remote_code") else None) or head_class(config)
    if "gguf_file" in kwargs:
        return AutoModelForCausalLM  # a GGUF file holds a language model, and its config names no class
    return head_class(config, stored_names(path, **hub))


def _check_layers(model: PreTrainedModel, path: str, unexpected: Iterable[str]) -> None:
    """Raise `CheckpointError` if the file holds layers that the model does not have.

    Transformers only logs such weights. Those of a head may stay unused; a missing layer is another model.
    """
    known = {_numbered(name) for name, _ in model.named_parameters()}
    layers = [name for name in unexpected if "#" in _numbered(name)]
    # a body that is loaded from the file of a model with a head has no prefix
    surplus = sorted(name for name in layers if known & {_numbered(name), _numbered(name).partition(".")[2]})
    if surplus:
        depth = getattr(model.config, "num_hidden_layers", None)
        raise CheckpointError(
            f"the checkpoint at {path!r} has weights of layers that its config does not have, such as {surplus[0]}: "
            f"correct {'the depths' if depth is None else f'num_hidden_layers={depth}'} in config.json."
        )


def _numbered(name: str) -> str:
    """Name of a weight with # for the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
