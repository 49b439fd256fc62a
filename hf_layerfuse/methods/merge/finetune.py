"""Short training of candidates, so that they compete on the loss that they reach after training."""

from __future__ import annotations

from itertools import cycle, islice

import torch
from transformers import PreTrainedModel

from ...calibration.samples import Sample
from ...evaluation.batches import model_inputs
from ...evaluation.divergence import prediction
from ...evaluation.modes import eval_mode
from ...math.losses import distillation_loss

RATE = 1e-3
"""Initial learning rate of Adam; it decays linearly to zero."""


def tune(student: PreTrainedModel, teacher: PreTrainedModel, sample: Sample, steps: int) -> None:
    """Train a student in place on the outputs of its teacher, on the calibration data that are not held out.

    Both stay in eval mode, so that batch norms keep their statistics.

    Args:
        student: Model whose main output is logits.
        teacher: Original model.
        sample: Calibration data. Each batch is one step, in order and repeated.
        steps: Number of steps; 0 changes nothing.
    """
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(steps, 1))
    with eval_mode(student, teacher):
        for batch in islice(cycle(sample.fitted_batches), steps):
            inputs = model_inputs(batch, student)
            with torch.no_grad():
                theirs = prediction(teacher(**inputs))
            optimizer.zero_grad()
            distillation_loss(prediction(student(**inputs)), theirs, 1.0).backward()
            optimizer.step()
            rates.step()
