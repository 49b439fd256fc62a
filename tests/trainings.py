"""Tiny trainings, for tests and for the programs that tests start."""

from pathlib import Path

import torch
from helpers import LAYERS, some_batches, tiny_model
from torch.utils.data import DataLoader

from hf_layerfuse import Blend, Fuse, HealRecipe, HealScope, Plan, apply, heal, heal_scope
from hf_layerfuse.data.sampler import ByLength


def recipe_of(**values) -> HealRecipe:
    plain = {"steps": 9, "learning_rate": 3e-3, "eval_every": 2, "mixed_precision": "no"}
    return HealRecipe(**{**plain, "gradient_accumulation_steps": 2, **values})


def rows(count: int = 11, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 64, (count, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def shuffled() -> DataLoader:
    return DataLoader(rows(), 3, shuffle=True)


def by_length() -> DataLoader:
    return DataLoader(rows(), 3, sampler=ByLength([8] * 11, 3, seed=5))


def models(**changes):
    """A fused student with shared weights, its teacher, and their plan; dropout is on."""
    teacher = tiny_model("gpt2", "GPT2LMHeadModel", **changes)
    plan = Plan("gpt2", LAYERS, (Fuse("layer", (1, 3), "share", rank=2), Fuse("layer", (4, 5))))
    return apply(teacher, plan), teacher, plan


def healed(folder: Path | None, recipe: HealRecipe | None = None, batches=shuffled, **options):
    student, teacher, plan = models()
    recipe = recipe or recipe_of(hidden_weight=0.5)
    plain = {
        "teacher": teacher,
        "scope": heal_scope(student, teacher, plan, recipe),
        "validation_batches": DataLoader(rows(4)),
    }
    report = heal(student, batches(), recipe, checkpoints=folder, **{**plain, **options})
    return student, report


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def blended(model_type, *edits, **changes):
    """A model, and the same model with `Blend` activations."""
    model = tiny_model(model_type, **changes)
    edits = edits or (Blend(1), Blend(4))
    return model, apply(model, Plan(model_type, LAYERS, edits), some_batches(model))


def trained(steps: int = 12, strength: float | str = "auto", folder=None, threshold=None, **options):
    model, student = blended("gpt2", head="GPT2LMHeadModel")
    recipe = HealRecipe(
        steps=steps, learning_rate=2e-3, eval_every=4, mixed_precision="no", homotopy_strength=strength, **options
    )
    settings = {"scope": HealScope(threshold=threshold), "validation_batches": DataLoader(rows(4))}
    batches = DataLoader(rows(12), 4, shuffle=True)
    report = heal(student, batches, recipe, teacher=model, checkpoints=folder, **settings)
    return student, report
