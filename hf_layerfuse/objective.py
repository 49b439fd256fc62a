"""What healing minimises: cross-entropy with the labels, and distance from the teacher."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .errors import DataError, LayerFuseError
from .inputs import predicts_next_token
from .recipe import HealRecipe

Batch = Mapping[str, Tensor]


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 x KL(teacher || student), averaged over rows, in float32 nats.

    Args:
        student_logits: (rows, classes), any floating dtype.
        teacher_logits: (rows, classes).
        temperature: T, which divides both logits first.
    """
    ours = F.log_softmax(student_logits.float() / temperature, dim=-1)
    theirs = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


class Objective:
    """The loss of a batch, for training and for validation."""

    def __init__(self, recipe: HealRecipe, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        self.recipe = recipe
        self.causal = predicts_next_token(student)
        self.teacher = teacher if recipe.kl_weight > 0 else None

    def train(self, model: nn.Module, batch: Batch) -> Tensor:
        labelled = self.recipe.ce_weight > 0 and "labels" in batch
        if not labelled and self.teacher is None:
            raise DataError(
                f"nothing to learn from batches of {', '.join(batch)} with ce_weight={self.recipe.ce_weight} and "
                f"kl_weight={self.recipe.kl_weight}: give labels, or a teacher and heal.kl_weight above 0."
            )
        outputs = model(**(batch if labelled else _without_labels(batch)))
        losses = []
        if labelled:
            losses.append(self.recipe.ce_weight * outputs.loss)
        if self.teacher is not None:
            losses.append(self.recipe.kl_weight * self._distil(outputs, batch))
        return sum(losses)

    def validate(self, model: nn.Module, batch: Batch) -> Tensor:
        if "labels" in batch:
            return model(**batch).loss
        if self.teacher is None:
            raise DataError("the validation batches have no labels and heal.kl_weight is 0: give labels, or a teacher.")
        return self._distil(model(**batch), batch)

    def _distil(self, outputs: ModelOutput, batch: Batch) -> Tensor:
        with torch.no_grad():
            targets = self.teacher(**_without_labels(batch))
        name = "logits" if "logits" in outputs else "last_hidden_state"
        ours, theirs = outputs[name], targets[name]
        if ours.shape != theirs.shape:
            raise LayerFuseError(
                f"{name} has shape {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher: "
                "take the model that the student was made from as teacher."
            )
        if name == "last_hidden_state":
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else ...
            return F.mse_loss(ours[mask].float(), theirs[mask].float())
        if ours.dim() == 3:
            if self.causal:
                ours, theirs = ours[:, :-1], theirs[:, :-1]
            mask = self._positions(batch)
            ours, theirs = ours[mask], theirs[mask]
        return distillation_loss(ours, theirs, self.recipe.temperature)

    def count(self, batch: Batch) -> int:
        """How many targets a batch holds, which weigh its loss among those of other batches."""
        if "labels" in batch and batch["labels"].dim() != 2:
            return len(batch["labels"])
        return int(self._positions(batch).sum()) if "input_ids" in batch else len(next(iter(batch.values())))

    def _positions(self, batch: Batch) -> Tensor:
        """Which positions predict something that counts: (batch, tokens), one less for causal models."""
        if "labels" in batch:
            counts = batch["labels"] != -100
        elif "attention_mask" in batch:
            counts = batch["attention_mask"].bool()
        else:
            counts = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return counts[:, 1:] if self.causal else counts


def _without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}
