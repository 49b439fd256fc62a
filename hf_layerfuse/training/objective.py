"""The loss that healing minimises: cross-entropy with the labels, and distance from the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..data.collate import TEACHER_IDS, TEACHER_LOGPROBS
from ..errors import DataError, LayerFuseError
from ..evaluation.batches import without_labels
from ..evaluation.divergence import prediction
from ..evaluation.dummy_inputs import predicts_next_token
from ..evaluation.hooks import watch
from ..math.losses import distillation_loss, relative_mse, top_k_loss
from ..plan.match import Match
from ..recipe import HealRecipe

Batch = Mapping[str, Tensor]


class Objective:
    """The loss of a batch, for training and for validation.

    Args:
        recipe: Recipe with the weights of the loss terms.
        student: Student model, without wrappers.
        teacher: Teacher model, or None if no loss term needs it.
        matches: Pairs of modules that `hidden_weight` and `attention_weight` compare.

    Attributes:
        reads_outputs: Whether a loss term depends on the model's outputs. Otherwise no term depends on the head.
    """

    def __init__(
        self,
        recipe: HealRecipe,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        matches: Sequence[Match] = (),
    ) -> None:
        self.recipe = recipe
        self.causal = predicts_next_token(student)
        self.teacher = teacher if recipe.needs_teacher else None
        self.reads_outputs = recipe.ce_weight > 0 or recipe.kl_weight > 0
        weights = {"hidden": recipe.hidden_weight, "attention": recipe.attention_weight}
        self.matches = [match for match in matches if weights[match.kind] > 0]
        self._weight = {
            kind: weight / max(1, sum(match.kind == kind for match in matches)) for kind, weight in weights.items()
        }
        self._ours = [student.get_submodule(match.student) for match in self.matches]
        self._theirs = [teacher.get_submodule(match.teacher) for match in self.matches]

    def train(self, model: nn.Module, batch: Batch) -> Tensor:
        answers, batch = _stored(batch)
        if not self.count(batch):  # no target gives a loss, but all parameters still need a gradient
            return 0.0 * prediction(model(**without_labels(batch))).float().sum()
        labelled = self.recipe.ce_weight > 0 and "labels" in batch
        if not labelled and self.teacher is None:
            raise DataError(
                f"nothing to learn from batches of {', '.join(batch)} with ce_weight={self.recipe.ce_weight} and "
                "without a teacher: give labels, or a teacher and heal.kl_weight, heal.hidden_weight or "
                "heal.attention_weight."
            )
        with _outputs_of(self._ours) as ours:
            outputs = model(**(batch if labelled else without_labels(batch)))
        losses = []
        if not self.reads_outputs:  # data parallelism needs a gradient of every output
            losses.append(0.0 * prediction(outputs).float().sum())
        if labelled:
            losses.append(self.recipe.ce_weight * outputs.loss)
        if self.teacher is not None and answers and self.recipe.kl_weight > 0:
            losses.append(self.recipe.kl_weight * self._recall(outputs, answers, batch))
        if self.teacher is not None and (self.matches or not answers):
            targets, theirs = self._taught(batch)
            if self.recipe.kl_weight > 0 and not answers:
                losses.append(self.recipe.kl_weight * self._distil(outputs, targets, batch))
            mask = self._tokens(batch)
            for match, *pair in zip(self.matches, ours, theirs, strict=True):
                rows = [states[mask] if mask is not None else states for states in pair]
                losses.append(self._weight[match.kind] * relative_mse(*rows))
        return sum(losses)

    def validate(self, model: nn.Module, batch: Batch) -> Tensor:
        if "labels" in batch:
            return model(**batch).loss
        if self.teacher is None:
            raise DataError("the validation batches have no labels, and no teacher is given: give labels or a teacher.")
        targets, _ = self._taught(batch)
        return self._distil(model(**batch), targets, batch)

    def _taught(self, batch: Batch) -> tuple[ModelOutput, list[Tensor]]:
        """The teacher's outputs, and the outputs of its matched modules."""
        with torch.inference_mode(), _outputs_of(self._theirs) as seen:
            return self.teacher(**without_labels(batch)), seen

    def _distil(self, outputs: ModelOutput, targets: ModelOutput, batch: Batch) -> Tensor:
        name = "logits" if "logits" in outputs else "last_hidden_state"
        ours, theirs = outputs[name], targets[name]
        if ours.shape != theirs.shape:
            raise LayerFuseError(
                f"{name} has shape {tuple(ours.shape)} in the student and {tuple(theirs.shape)} in the teacher: "
                "use the student's original as teacher."
            )
        if name == "last_hidden_state":
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else ...
            return (ours[mask].float() - theirs[mask].float()).square().mean()
        rows = self._rows(batch) if ours.dim() == 3 else None
        return distillation_loss(ours, theirs, self.recipe.temperature, rows)

    def _recall(self, outputs: ModelOutput, answers: Batch, batch: Batch) -> Tensor:
        """Distillation from stored outputs of the teacher."""
        parts = [outputs["logits"], answers[TEACHER_IDS], answers[TEACHER_LOGPROBS]]
        rows = self._rows(batch) if parts[0].dim() == 3 else slice(None)
        ours, ids, logprobs = (part.reshape(-1, part.shape[-1])[rows] for part in parts)
        return top_k_loss(ours, ids, logprobs, self.recipe.temperature)

    def count(self, batch: Batch) -> int:
        """Number of targets in a batch. It weights the loss of the batch."""
        if "labels" in batch and batch["labels"].dim() != 2:
            return len(batch["labels"])
        return int(self._positions(batch).sum()) if "input_ids" in batch else len(next(iter(batch.values())))

    def _positions(self, batch: Batch) -> Tensor:
        """Mask of the positions whose predictions count, (batch, tokens), or one token less for causal models."""
        if "labels" in batch:
            counts = batch["labels"] != -100
        elif "attention_mask" in batch:
            counts = batch["attention_mask"].bool()
        else:
            counts = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return counts[:, 1:] if self.causal else counts

    def _rows(self, batch: Batch) -> Tensor:
        """Indices of these positions among all tokens of a batch. In causal models the last position never counts."""
        return pad(self._positions(batch), (0, int(self.causal))).flatten().nonzero().squeeze(1)

    def _tokens(self, batch: Batch) -> Tensor | None:
        """Mask of the tokens that are not padding, (rows, tokens); None stands for all tokens."""
        mask = batch.get("attention_mask")
        return None if mask is None else mask.reshape(-1, mask.shape[-1]).bool()


@contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Record the outputs of modules inside the `with` block, in the modules' order; of a tuple, the first element."""
    found: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(place: int, output: Tensor) -> None:
        found[place] = output

    with watch({place: (module, "after") for place, module in enumerate(modules)}, keep):
        yield found


def _stored(batch: Batch) -> tuple[Batch, Batch]:
    """Split a batch into the stored outputs of the teacher, if any, and the other inputs."""
    answers = {name: batch[name] for name in (TEACHER_IDS, TEACHER_LOGPROBS) if name in batch}
    return answers, {name: value for name, value in batch.items() if name not in answers}
