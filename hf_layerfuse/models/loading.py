"""Loading a checkpoint, fused or stock, with specific errors."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..errors import CheckpointError, LayerFuseError
from .modeling import head_class

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
    path = os.fspath(path)
    config = kwargs.pop("config", None)
    wants_report = kwargs.pop("output_loading_info", False)
    hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    kwargs.setdefault("use_safetensors", True)  # only safetensors, unless the caller sets it otherwise
    try:
        if config is None:
            # as in the Auto classes: arguments that are config fields go to the config, except for the data type
            fields = {k: v for k, v in kwargs.items() if k not in (*_HUB_ARGUMENTS, "dtype", "torch_dtype")}
            config, rest = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **hub, **fields)
            kwargs = {k: v for k, v in kwargs.items() if k not in fields or k in rest}
        elif not isinstance(config, PreTrainedConfig):
            config = AutoConfig.from_pretrained(config, **hub)
        cls = auto_class or head_class(config)
        model, report = cls.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    except LayerFuseError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        if not os.path.exists(path) and (os.path.isabs(path) or path.startswith(".") or path.count("/") != 1):
            raise CheckpointError(f"there is no directory {path!r}: correct the path, or give a Hub name.") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot load a model from {path!r}: {reason[:400]}") from error
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
    return (model, report) if wants_report else model
