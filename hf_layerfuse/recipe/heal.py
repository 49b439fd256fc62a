"""How the fused model is retrained."""

from typing import Literal

from .strict import require, strict_recipe


@strict_recipe(renamed={"straighten": "homotopy_strength"})
class HealRecipe:
    """Settings of healing: the fused model is retrained, with the original as teacher.

    The loss is `ce_weight` x cross-entropy + `kl_weight` x KL(teacher || student) at `temperature` (scaled by its
    square, Hinton et al. 2015) + `hidden_weight` and `attention_weight` x the mean squared error of hidden states and
    of attention outputs, relative to the mean square of the teacher's. The plan decides which layer of the teacher each
    layer is compared with: the last original layer of its group.

    Attributes:
        steps: Optimiser steps of all rounds together; 0 skips healing.
        schedule: Division of fusion into rounds. `one-shot` fuses everything at once. The others fuse a little, heal,
            and fuse further in `rounds` rounds: `uniform` takes equal steps, `exponential` larger ones early (O'Neill
            et al. 2021, section 3).
        rounds: Number of rounds of an iterative schedule.
        curriculum_rate: Rate of an `exponential` schedule: the share (1 - e^(-rate t / T)) / (1 - e^-rate) of the
            fusion is done after round t of T.
        last_round: Share of `steps` for the last of several rounds, which makes the result. The earlier rounds divide
            the rest equally.
        batch_size: Number of sequences or images per device and step.
        gradient_accumulation_steps: Number of batches in one optimiser step.
        learning_rate: Peak of the warm-up and cosine schedule.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: AdamW weight decay, not applied to norms and biases.
        max_grad_norm: Norm at which gradients are clipped.
        dropout: Probability of every dropout of the student during training; None keeps those of the checkpoint. Under
            one epoch, overfitting is unlikely, and 0 learns more.
        ce_weight: Weight of the cross-entropy with the labels.
        kl_weight: Weight of the divergence from the teacher's logits, or, without a head, from its last hidden states.
        hidden_weight: Weight of the error of hidden states, averaged over layers.
        attention_weight: Weight of the error of attention outputs, averaged over layers.
        teacher_top_k: Number of classes whose teacher log-probabilities are cached on disk; the others count as one.
            The teacher then runs once per training row instead of in every step. Only for text that is the same in
            every epoch: causal language models and classification.
        temperature: Temperature that softens both distributions in the divergence.
        mixed_precision: Precision of the computation. `auto` is bf16 where the device supports it natively, unless
            `accelerate launch` sets bf16, fp16 or fp8. `no` is float32.
        eval_every: Steps between validations, each with a checkpoint; one more follows at the end. The weights with the
            lowest validation loss are the result.
        patience: Number of validations in a row without improvement after which training stops.
        lora_rank: Rank of residuals beside each linear map; only these are trained, and they are merged at the end
            (needs the extra `peft`).
        mix: Whether every element of a fused weight is drawn anew in each step from its source layers. These are
            trained, and averaged at the end. Needs operator `mix`.
        homotopy_strength: Strength g of the penalty that moves `Blend` activations to lines: after each step,
            a <- a - 2 learning rate g (a - 1), so that 1 - a settles near 1 / (2 g). With `auto`, g is 10, or as much
            as takes an a to 0.99 in `steps`. Without a later `linearize_mlps(model)`, this is a regulariser.
        progressive: Whether activations become lines one after the other, from the last layer on, each in an equal
            part of the training, instead of all together.
        freeze_fused: Whether fused blocks are frozen, so that only the others are trained.
        gradient_checkpointing: Whether the backward pass recomputes activations, to save memory.
        compile: Whether `torch.compile` (inductor) compiles the model.
        log_with: Installed tracker that Accelerate supports, such as `tensorboard` or `wandb`.
        log_dir: Folder of a tracker that writes to disk.
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
    homotopy_strength: float | Literal["auto"] = 0.0
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
            f"{' and '.join(f'heal.{name}' for name in chosen)} each set the trained parameters: choose one of them.",
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
            f"heal.teacher_top_k={self.teacher_top_k} caches answers that heal.kl_weight=0 does not use: leave it out.",
        )
        require(
            self.homotopy_strength == "auto" or self.homotopy_strength >= 0,
            f"heal.homotopy_strength={self.homotopy_strength}: use 'auto', or 0 or more.",
        )
        require(
            self.homotopy_strength == "auto" or self.homotopy_strength * self.learning_rate < 0.5,
            f"heal.homotopy_strength={self.homotopy_strength} with heal.learning_rate={self.learning_rate} overshoots "
            "the line in one step: lower one of them.",
        )
        require(
            not self.progressive or self.homotopy_strength != 0,
            "heal.progressive linearises one activation after the other, and heal.homotopy_strength is 0: set it to "
            "'auto'.",
        )
        require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"heal.dropout={self.dropout}: use a probability from 0 to 1, less than 1, or leave it out.",
        )
        require(0 < self.last_round < 1, f"heal.last_round={self.last_round}: use a share between 0 and 1.")
        require(0 <= self.warmup_ratio <= 1, f"heal.warmup_ratio={self.warmup_ratio}: use a share from 0 to 1.")

    @property
    def needs_teacher(self) -> bool:
        """Whether a term of the loss compares the student with the original."""
        return self.kl_weight > 0 or self.hidden_weight > 0 or self.attention_weight > 0
