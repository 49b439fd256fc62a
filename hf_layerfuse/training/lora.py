"""Low-rank healing: trains only a small matrix beside each linear map, and merges it at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import RecipeError
from .sharding import shares_layers


@contextlib.contextmanager
def low_rank(model: PreTrainedModel, rank: int | None) -> Iterator[None]:
    """Train only low-rank residuals of a model's linear maps inside the `with` block (LoRA, Hu et al. 2021).

    The head and the embeddings do not change. When the block ends without an exception, the residuals are merged into
    the weights; otherwise they are removed.

    Args:
        model: Model to train in place.
        rank: Rank of the residuals, which are scaled by 2; None does nothing.

    Raises:
        RecipeError: PEFT is not installed, or depths share weights.
    """
    if rank is None:
        yield
        return
    if shares_layers(model):
        raise RecipeError(
            f"heal.lora_rank={rank} adds a residual to each depth, which cannot be merged into weights that several "
            "depths share: leave it out, and give fusion.rank, which keeps such residuals as parts of the model."
        )
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise RecipeError(
            f"heal.lora_rank={rank} needs PEFT: pip install 'hf-layerfuse[peft]', or leave it out."
        ) from error
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    prefix = next(name for name, module in model.named_modules() if module is model.base_model)
    inner = {f"{prefix}.{name}".lstrip("."): module for name, module in model.base_model.named_modules()}
    maps = {name: module for name, module in inner.items() if isinstance(module, nn.Linear | Conv1D)}
    transposed = any(isinstance(module, Conv1D) for module in maps.values())  # as GPT-2 stores them
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(maps), fan_in_fan_out=transposed)
    tuner = LoraModel(model, config, "default")
    try:
        yield
    except BaseException:
        tuner.unload()
        raise
    else:
        tuner.merge_and_unload()
    finally:
        for name in trained:
            model.get_parameter(name).requires_grad_(True)
