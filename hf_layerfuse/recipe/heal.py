"""How the fused model is retrained."""

from typing import Literal

from .strict import require, strict_recipe


@strict_recipe
class HealRecipe:
    """How the fused model is retrained, with the original as teacher.

    The loss is `ce_weight` x cross-entropy + `kl_weight` x KL(teacher || student) at `temperature` (scaled by its
    square, Hinton et al. 2015) + `hidden_weight` and `attention_weight` x the mean squared error of hidden states and
    of attention outputs, relative to the mean square of the teacher's. Which layer of the teacher each layer answers to
    follows from the plan: the last original layer of its group.

    Attributes:
        steps: optimiser steps, of all rounds together; 0 skips healing.
        schedule: `one-shot` fuses everything at once. The others fuse a step, heal, and fuse further, in so many
            `rounds`: `uniform` takes equal steps, `exponential` larger ones early (O'Neill et al. 2021, section 3).
        rounds: of an iterative schedule.
        curriculum_rate: how early an `exponential` schedule fuses: after round t of T, (1 - e^(-rate t / T)) /
            (1 - e^-rate) of all is done.
        last_round: the share of `steps` that the last of several rounds has, which is the one that leads to the result;
            those before it have as many each.
        batch_size: sequences or images per device and step.
        gradient_accumulation_steps: batches that make one optimiser step.
        learning_rate: peak of the warm-up and cosine schedule.
        warmup_ratio: share of the steps spent warming up.
        weight_decay: AdamW weight decay, not applied to norms and biases.
        max_grad_norm: gradient clipping.
        dropout: probability of every dropout of the student while it is trained; None leaves them as the checkpoint has
            them. In less than an epoch, nothing is learnt by heart, and 0 learns more.
        ce_weight: weight of the cross-entropy with the labels.
        kl_weight: weight of the divergence from the teacher's logits, or, without a head, from its last hidden states.
        hidden_weight: weight of the error of hidden states, averaged over layers.
        attention_weight: weight of the error of attention outputs, averaged over layers.
        teacher_top_k: ask the teacher once for each training row, and keep the log-probabilities of so many classes on
            disk, the rest taken as one, instead of asking it in every step. For text that is the same in every epoch:
            causal language models and classification.
        temperature: softens both distributions in the divergence.
        mixed_precision: `auto` is bf16 where the device computes in it natively, unless `accelerate launch` was told
            bf16, fp16 or fp8. `no` is float32.
        eval_every: validation loss is taken and a checkpoint written every so many steps, and at the end. The weights
            of the least validation loss are the result.
        patience: stop after so many validations in a row that found nothing better.
        lora_rank: train only residuals of this rank beside each linear map, merged at the end (needs the extra `peft`).
        mix: with operator `mix`, draw every element of a fused weight anew in each step from the layers that it was
            made of, which are what is trained, and average them at the end.
        straighten: how strongly activations that are on their way to a line (`Blend`) are pulled there: after each
            step, a <- a - 2 learning rate g (a - 1), so that 1 - a settles near 1 / (2 g). With `auto`, g is 10, or as
            much as takes an a to 0.99 in `steps`. Where no `straighten(model)` follows, this is a regulariser.
        progressive: straighten one activation after the other, from the last layer on, each in an equal part of the
            training, and not all together.
        freeze_fused: train only what was not made of several blocks.
        gradient_checkpointing: compute inner states twice, to train in less memory.
        compile: let `torch.compile` (inductor) make the model faster.
        log_with: a tracker that Accelerate knows and that is installed, such as `tensorboard` or `wandb`.
        log_dir: where a tracker on disk writes.
    """

    steps: int = 500
    schedule: Literal["one-shot", "uniform", "exponential"] = "one-shot"
    rounds: int = 3
    curriculum_rate: float = 2.0
    last_round: float = 0.5
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None
    ce_weight: float = 1.0
    kl_weight: float = 1.0
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    teacher_top_k: int | None = None
    temperature: float = 1.0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    eval_every: int = 100
    patience: int | None = None
    lora_rank: int | None = None
    mix: bool = False
    straighten: float | Literal["auto"] = 0.0
    progressive: bool = False
    freeze_fused: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    log_with: str | None = None
    log_dir: str = "logs"

    def __post_init__(self) -> None:
        require(self.steps >= 0, f"heal.steps={self.steps}: use 0 to skip healing, or more.")
        require(
            self.schedule == "one-shot" or self.steps >= self.rounds,
            f"heal.schedule={self.schedule!r} heals in each of heal.rounds={self.rounds}, and there are "
            f"heal.steps={self.steps}: use more steps, or schedule 'one-shot'.",
        )
        counts = (
            "rounds",
            "batch_size",
            "gradient_accumulation_steps",
            "eval_every",
            "patience",
            "teacher_top_k",
            "lora_rank",
        )
        for field in counts:
            value = getattr(self, field)
            require(value is None or value >= 1, f"heal.{field}={value}: use a whole number of 1 or more.")
        chosen = [name for name in ("lora_rank", "mix", "freeze_fused") if getattr(self, name)]
        require(
            len(chosen) < 2,
            f"{' and '.join(f'heal.{name}' for name in chosen)} each say what is trained: choose one of them.",
        )
        for field in ("curriculum_rate", "learning_rate", "max_grad_norm", "temperature"):
            value = getattr(self, field)
            require(value > 0, f"heal.{field}={value}: use a number above 0.")
        losses = ("ce_weight", "kl_weight", "hidden_weight", "attention_weight")
        for field in (*losses, "weight_decay"):
            value = getattr(self, field)
            require(value >= 0, f"heal.{field}={value}: use 0 or more.")
        require(
            any(getattr(self, field) > 0 for field in losses),
            f"{', '.join(f'heal.{field}' for field in losses)} are all 0, so there is nothing to learn: raise one.",
        )
        require(
            self.teacher_top_k is None or self.kl_weight > 0,
            f"heal.teacher_top_k={self.teacher_top_k} keeps answers that heal.kl_weight=0 does not read: leave it out.",
        )
        require(
            self.straighten == "auto" or self.straighten >= 0,
            f"heal.straighten={self.straighten}: use 'auto', or 0 or more.",
        )
        require(
            self.straighten == "auto" or self.straighten * self.learning_rate < 0.5,
            f"heal.straighten={self.straighten} with heal.learning_rate={self.learning_rate} pulls further than to the "
            "line in one step: use less of one of them.",
        )
        require(
            not self.progressive or self.straighten != 0,
            "heal.progressive straightens one activation after the other, and heal.straighten is 0: set it to 'auto'.",
        )
        require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"heal.dropout={self.dropout}: use a probability from 0 to 1, less than 1, or leave it out.",
        )
        require(0 < self.last_round < 1, f"heal.last_round={self.last_round}: use a share between 0 and 1.")
        require(0 <= self.warmup_ratio <= 1, f"heal.warmup_ratio={self.warmup_ratio}: use a share from 0 to 1.")

    @property
    def needs_teacher(self) -> bool:
        """Whether a part of the loss compares with the original."""
        return self.kl_weight > 0 or self.hidden_weight > 0 or self.attention_weight > 0
