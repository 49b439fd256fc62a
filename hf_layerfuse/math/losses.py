"""Distances between the outputs of a student and its teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NUMBERS = 1 << 20
"""Logits that become probabilities at a time. All tokens of a large vocabulary would fill gigabytes."""


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, rows: Tensor | None = None
) -> Tensor:
    """Compute T^2 x KL(teacher || student), averaged over rows, in float32 nats.

    Args:
        student_logits: Logits of the student, (..., classes), any floating dtype.
        teacher_logits: Logits of the teacher, of the same shape; they get no gradient.
        temperature: Temperature T, which first divides both logits.
        rows: Indices of the distributions that count, over all dimensions but the last, flattened; None is all.
    """
    ours, theirs = (logits.reshape(-1, logits.shape[-1]) for logits in (student_logits, teacher_logits))
    rows = torch.arange(len(ours), device=ours.device) if rows is None else rows
    return temperature**2 * _Divergence.apply(ours, theirs, rows, temperature)


class _Divergence(torch.autograd.Function):
    """Mean of KL(teacher || student) over rows of logits / T, and its gradient, (softmax - the teacher's) / T.

    Both are computed in one pass, a few rows at a time. Autograd would keep several copies of all logits.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            # float16 would round the gradient to zero, because loss scaling comes later
            wide = torch.float32 if student.dtype == torch.float16 else student.dtype
            gradient = torch.zeros_like(student, dtype=wide)
        total = torch.zeros((), device=student.device)
        for part in rows.split(max(1, _NUMBERS // student.shape[-1])):
            ours, theirs = (F.log_softmax(logits[part].float() / temperature, dim=-1) for logits in (student, teacher))
            likely = theirs.exp()
            total += theirs.sub_(ours).mul_(likely).sum()
            if gradient is not None:
                gradient[part] = ours.exp_().sub_(likely).div_(temperature * len(rows)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.dtype = student.dtype
        return total / len(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * given.to(gradient.dtype)).to(ctx.dtype), None, None, None


def top_k_loss(student_logits: Tensor, ids: Tensor, logprobs: Tensor, temperature: float) -> Tensor:
    """Compute `distillation_loss` from the teacher's top k classes; all other classes count as one.

    The result is at most the loss over all classes, because merging classes lowers the divergence of two
    distributions. It is equal if k is the number of classes.

    Args:
        student_logits: Logits of the student, (rows, classes), any floating dtype.
        ids: Top classes of the teacher, (rows, k).
        logprobs: Log-probabilities of these classes by the teacher at temperature T, (rows, k).
        temperature: Temperature T.
    """
    ours = F.log_softmax(student_logits.float() / temperature, dim=-1).gather(-1, ids.long())
    theirs = logprobs.float()
    rest, our_rest = ((1 - part.exp().sum(-1)).clamp_min(1e-7) for part in (theirs, ours))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    if ids.shape[-1] < student_logits.shape[-1]:
        divergence = divergence + rest * (rest.log() - our_rest.log())
    return divergence.mean() * temperature**2


def relative_mse(ours: Tensor, theirs: Tensor) -> Tensor:
    """Compute the mean squared error divided by the mean square of `theirs`, in float32; for `ours` of zero, it is 1.

    Args:
        ours: States of the student, (rows, width), any floating dtype.
        theirs: States of the teacher, (rows, width).
    """
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(1e-12)
