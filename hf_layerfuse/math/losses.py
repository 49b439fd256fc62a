"""How far a student's outputs are from its teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NUMBERS = 1 << 20
"""Logits that become probabilities at a time: those of all tokens and a large vocabulary would fill gigabytes."""


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, rows: Tensor | None = None
) -> Tensor:
    """T^2 x KL(teacher || student), averaged over rows, in float32 nats.

    Args:
        student_logits: (..., classes), any floating dtype.
        teacher_logits: the same shape; it gets no gradient.
        temperature: T, which divides both logits first.
        rows: the distributions that count, numbers among all but the last dimension, flattened; None is all of them.
    """
    ours, theirs = (logits.reshape(-1, logits.shape[-1]) for logits in (student_logits, teacher_logits))
    rows = torch.arange(len(ours), device=ours.device) if rows is None else rows
    return temperature**2 * _Divergence.apply(ours, theirs, rows, temperature)


class _Divergence(torch.autograd.Function):
    """Mean of KL(teacher || student) over rows of logits / T, and its gradient, (softmax - the teacher's) / T.

    Both are taken in one pass, of a few rows at a time: what autograd would keep are several copies of all logits.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor, temperature: float) -> Tensor:
        gradient = None
        if ctx.needs_input_grad[0]:
            # in float16 it would be too small for any digit: what scales the loss comes later
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
    """`distillation_loss` where the teacher's answer is known for k classes, and the rest of them is taken as one.

    It is never more than the loss of all classes (the divergence of two distributions falls when classes are merged),
    and equal to it where k is all of them.

    Args:
        student_logits: (rows, classes), any floating dtype.
        ids: (rows, k), classes.
        logprobs: (rows, k), the teacher's log-probabilities of them at temperature T.
        temperature: T.
    """
    ours = F.log_softmax(student_logits.float() / temperature, dim=-1).gather(-1, ids.long())
    theirs = logprobs.float()
    rest, our_rest = ((1 - part.exp().sum(-1)).clamp_min(1e-7) for part in (theirs, ours))
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    if ids.shape[-1] < student_logits.shape[-1]:
        divergence = divergence + rest * (rest.log() - our_rest.log())
    return divergence.mean() * temperature**2


def relative_mse(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared error divided by the mean square of `theirs`, in float32: 0 is the same, 1 as far off as zero.

    Args:
        ours: (rows, width), any floating dtype.
        theirs: (rows, width).
    """
    ours, theirs = ours.float(), theirs.float()
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(1e-12)
