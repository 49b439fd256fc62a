"""Rounds of fusing and healing: how far each goes, and that the plan of all of them is the plan of the result."""

import math
import random

import pytest

from hf_layerfuse import Drop, Fuse, HealRecipe, Plan, PlanError, RecipeError
from hf_layerfuse.recipe import DataRecipe, FusionRecipe, Recipe
from hf_layerfuse.training.schedule import compose, keeps_of, steps_of


def recipe_of(schedule: str, rounds: int = 3, rate: float = 2.0) -> HealRecipe:
    return HealRecipe(steps=100, schedule=schedule, rounds=rounds, curriculum_rate=rate)


def test_curricula():
    """12 blocks to 3 in three rounds: equal steps, or larger ones early, by the formula; at once, one step."""
    assert keeps_of(12, 3, recipe_of("one-shot")) == [3]
    assert keeps_of(12, 3, recipe_of("uniform")) == [9, 6, 3]
    lost = [9 * (1 - math.exp(-2 * t / 3)) / (1 - math.exp(-2)) for t in (1, 2, 3)]
    assert keeps_of(12, 3, recipe_of("exponential")) == [12 - round(c) for c in lost] == [7, 4, 3]


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("schedule", ["uniform", "exponential"])
def test_every_round_goes_on(schedule, seed):
    """Each round leaves fewer blocks than the one before, the last one what was asked for; an exponential curriculum
    is never behind the uniform one."""
    rng = random.Random(seed)
    blocks, rounds, rate = rng.randint(2, 60), rng.randint(1, 12), rng.uniform(0.1, 20)
    keep = rng.randint(1, blocks - 1)
    found = keeps_of(blocks, keep, recipe_of(schedule, rounds, rate))
    assert len(found) <= rounds
    assert found[-1] == keep
    assert [blocks, *found] == sorted({blocks, *found}, reverse=True)
    uniform = keeps_of(blocks, keep, recipe_of("uniform", rounds))
    if len(found) == len(uniform) == rounds:
        assert all(ours <= theirs for ours, theirs in zip(found, uniform, strict=True))


@pytest.mark.parametrize("last", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(("steps", "rounds"), [(1, 1), (0, 3), (500, 7), (12, 12), (100, 3)])
def test_the_last_round_has_its_share_of_the_steps(steps, rounds, last):
    """They add up, those of earlier rounds differ by one at most, and no round is without steps."""
    found = steps_of(HealRecipe(steps=steps, last_round=last), rounds)
    assert len(found) == rounds
    assert sum(found) == steps
    assert max(found[:-1], default=0) - min(found[:-1], default=0) <= 1
    assert steps == 0 or min(found) >= 1
    if steps >= 100:
        assert found[-1] == round(last * steps)


def stock_plan(layers: int, rng: random.Random) -> Plan:
    """Depth groups and drops of whole layers that leave at least one."""
    edits, layer = [], 0
    while layer < layers:
        size = rng.randint(1, min(3, layers - layer))
        kind = rng.choice(["alone", "fuse", "drop"])
        if kind == "fuse" and size > 1:
            operator = rng.choice(["mean", "freeze", "weighted"])
            weights = (1 / size,) * size if operator == "weighted" else None
            edits.append(Fuse("layer", tuple(range(layer, layer + size)), operator=operator, weights=weights))
        elif kind == "drop":
            size = 1
            edits.append(Drop("layer", layer))
        else:
            size = 1
        layer += size
    alone = sum(isinstance(edit, Drop) for edit in edits) < layers
    return Plan("gpt2", layers, tuple(edits) if alone else ())


@pytest.mark.parametrize("seed", range(100))
def test_a_plan_of_two_rounds_groups_as_both_did(seed):
    """The layers that each layer of the result stands for are those that two plans, one after the other, give it."""
    rng = random.Random(seed)
    first = stock_plan(8, rng)
    slots = first.layout().slots
    second = stock_plan(len(slots), rng)
    both = compose(first, second)
    expected = [tuple(layer for i in slot.layers for layer in slots[i].layers) for slot in second.layout().slots]
    assert [slot.layers for slot in both.layout().slots] == expected
    assert both.layout().is_stock
    assert both.num_layers == 8
    assert Plan.from_json(both.to_json()) == both
    assert both.notes.rounds == (first, second)


def test_what_was_done_once_is_told_as_it_was():
    """An edit that only one round made keeps its operator; layers are those of the original."""
    first = Plan("gpt2", 6, (Fuse("layer", (0, 1), operator="select", keep=0), Drop("layer", 3)))
    second = Plan("gpt2", 4, (Fuse("layer", (2, 3), operator="weighted", weights=(0.25, 0.75)),))
    kept = Fuse("layer", (0, 1), operator="select", keep=0)
    assert compose(first, second).edits == (
        kept,
        Drop("layer", 3),
        Fuse("layer", (4, 5), operator="weighted", weights=(0.25, 0.75)),
    )
    third = Plan("gpt2", 3, (Fuse("layer", (0, 1), operator="weighted", weights=(0.5, 0.5)),))
    grown = compose(compose(first, second), third)
    assert grown.edits[-1] == Fuse("layer", (0, 1, 2, 3), operator="mean")
    assert len(grown.notes.rounds) == 3


def test_shared_layers_are_all_there_in_the_next_round():
    """After sharing, the next plan is of the expanded model: it alone says what is shared."""
    first = Plan("gpt2", 6, (Fuse("layer", (0, 1), "share"),))
    second = Plan("gpt2", 6, (Fuse("layer", (0, 1, 2), "share"),))
    both = compose(first, second)
    assert both == second
    assert len(both.notes.rounds) == 2


def test_plans_that_cannot_follow_each_other():
    """Another number of layers, or blocks that are gone, are refused."""
    first = Plan("gpt2", 6, (Fuse("layer", (0, 1)),))
    with pytest.raises(PlanError, match="leads to 5 layers, the second is for 6"):
        compose(first, Plan("gpt2", 6))
    with pytest.raises(PlanError, match="follow each other"):
        compose(first, Plan("gpt2", 5, (Fuse("mlp", (0, 1)),)))


def test_recipes_that_cannot_go_on_in_rounds():
    """Rounds need steps to heal, and blocks that are still there to fuse."""
    with pytest.raises(RecipeError, match=r"heal\.rounds=3.*heal\.steps=2"):
        HealRecipe(steps=2, schedule="uniform")
    common = {"model": "m", "task": "causal-lm", "output_dir": "o"}
    with pytest.raises(RecipeError, match=r"fusion\.blocks='mlp'"):
        Recipe(
            **common,
            data=DataRecipe(train="t"),
            fusion=FusionRecipe(keep_layers=3, blocks="mlp"),
            heal=HealRecipe(steps=9, schedule="uniform"),
        )
