"""Layer fusion from recipe to model: the target is met, the measure decides the groups, the input is untouched."""

import copy
import itertools
import json

import pytest
import torch
from conftest import LAYERS, TINY, heads_of, tiny_model

from hf_layerfuse import (
    DataError,
    Fuse,
    FusionRecipe,
    Plan,
    RecipeError,
    adapter_for,
    apply,
    fuse,
    plan_fusion,
)
from hf_layerfuse.calibration import states_after
from hf_layerfuse.inputs import example_inputs
from hf_layerfuse.math import similarity

TEXT = sorted(TINY.keys() - {"vit", "deit"})
MEASURES = ("euclidean", "cosine", "cka", "block_influence")


def base_model(model_type, **changes):
    heads = [head for head in heads_of(model_type) if head.__name__.endswith("Model")]
    return tiny_model(model_type, min(heads, key=lambda head: len(head.__name__)), **changes)


def batches_for(model, count=2):
    return [example_inputs(model, 3, 10, seed) for seed in range(count)]


def groups(plan):
    return [edit.layers for edit in plan.edits]


def distances(plan):
    return torch.tensor(plan.notes["distances"], dtype=torch.float64)


def distinct(model):
    """How many different output projections a model has, for each kind of block."""
    found = {"attention": set(), "mlp": set()}
    for block in adapter_for(model).blocks(model):
        found[block.kind].add(model.get_submodule(block.modules["out"]).weight.data_ptr())
    return {kind: len(pointers) for kind, pointers in found.items()}


def make_equal(model, pair, noise=1e-3):
    """Give two layers nearly the same weights."""
    layers = adapter_for(model).layer_list(model)
    layers[pair[1]].load_state_dict(layers[pair[0]].state_dict())
    generator = torch.Generator().manual_seed(0)
    for parameter in layers[pair[1]].parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)


def make_idle(model, layer):
    """Let a layer return what it reads: nothing is added, and norms of what is normalised already change nothing."""
    adapter = adapter_for(model)
    for block in adapter.blocks(model):
        if block.layer == layer:
            for parameter in model.get_submodule(block.modules["out"]).parameters():
                parameter.data.zero_()
        if adapter.post_norm and block.layer in (layer - 1, layer):
            norm = model.get_submodule(block.modules["norm"])
            norm.weight.data.fill_(1)
            norm.bias.data.zero_()


@pytest.mark.parametrize(("mode", "cluster"), [("depth", "adjacent"), ("share", "adjacent"), ("share", "global")])
@pytest.mark.parametrize("blocks", ["layer", "attention", "mlp"])
def test_target_is_met_exactly(model_type, blocks, mode, cluster):
    """`keep_layers` distinct blocks of the kind remain, and the other kind is as it was."""
    model = base_model(model_type)
    for keep in range(1, LAYERS):
        plan = plan_fusion(model, FusionRecipe(keep_layers=keep, blocks=blocks, mode=mode, cluster=cluster))
        assert LAYERS - sum(len(group) - 1 for group in groups(plan)) == keep
        assert all((edit.kind, edit.mode) == (blocks, mode) for edit in plan.edits)
    fused = apply(model, plan_fusion(model, FusionRecipe(keep_layers=4, blocks=blocks, mode=mode, cluster=cluster)))
    expected = {kind: 4 if blocks in ("layer", kind) else LAYERS for kind in ("attention", "mlp")}
    assert distinct(fused) == expected
    assert fused.config.num_hidden_layers == (4 if (blocks, mode) == ("layer", "depth") else LAYERS)


@pytest.mark.parametrize("ratio", [0.1, 0.17, 0.3, 0.5, 0.66, 0.75, 0.8, 0.9])
@pytest.mark.parametrize("mode", ["depth", "share"])
def test_ratio_gives_the_nearest_count(ratio, mode):
    """A ratio is met as closely as whole layers allow, in counts and in parameters of the layers."""
    model = base_model("gpt2")
    fused = apply(model, plan_fusion(model, FusionRecipe(ratio=ratio, mode=mode)))
    keep = distinct(fused)["attention"]
    assert abs(1 - keep / LAYERS - ratio) == pytest.approx(min(abs(1 - k / LAYERS - ratio) for k in range(1, LAYERS)))
    if mode == "depth":
        before, after = (sum(p.numel() for p in m.h.parameters()) for m in (model, fused))
        assert 1 - after / before == pytest.approx(1 - keep / LAYERS)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"ratio": 0.05}, r"ratio=0\.05 is out of reach with 6 layer blocks: .* 0\.167 to 0\.833"),
        ({"ratio": 0.95}, r"ratio=0\.95 is out of reach with 6 layer blocks: .* 0\.167 to 0\.833"),
        ({"keep_layers": 6}, r"keep_layers=6 of the model's 6 fuses nothing: use 1 to 5"),
        ({"keep_layers": 7}, r"keep_layers=7 of the model's 6 fuses nothing: use 1 to 5"),
    ],
)
def test_targets_out_of_reach_are_refused(target, message):
    """A target that would fuse nothing, or leave nothing, is refused with what the model allows."""
    with pytest.raises(RecipeError, match=message):
        plan_fusion(base_model("gpt2"), FusionRecipe(**target))
    with pytest.raises(RecipeError, match="1 layer: there is nothing to fuse"):
        plan_fusion(base_model("gpt2", n_layer=1), FusionRecipe(keep_layers=1))


@pytest.mark.parametrize("measure", ["cka", "block_influence"])
def test_activation_measures_need_batches(measure):
    """Without batches the error says what to pass; batches without a token are a `DataError`."""
    model, recipe = base_model("gpt2"), FusionRecipe(keep_layers=3, similarity=measure)
    for call in (plan_fusion, fuse):
        with pytest.raises(RecipeError, match=f"similarity='{measure}' .*pass batches="):
            call(model, recipe)
    empty = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    for batches in ([], [empty]):
        with pytest.raises(DataError, match="no tokens"):
            plan_fusion(model, recipe, batches)


@pytest.mark.parametrize("measure", ["cka", "block_influence"])
def test_layer_distances_are_those_of_the_hidden_states(model_type, measure):
    """The distances are the measure of the hidden states that transformers returns, over all batches."""
    model = base_model(model_type)
    batches, last = batches_for(model), []
    # transformers puts the last hidden state through the final norm, so that one is taken from the layer
    handle = (
        adapter_for(model)
        .layer_list(model)[-1]
        .register_forward_hook(
            lambda module, args, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    with torch.inference_mode():
        hidden = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    handle.remove()
    states = torch.cat(
        [
            torch.stack([state.flatten(0, 1) for state in (*states[1:-1], final)])
            for states, final in zip(hidden, last, strict=True)
        ],
        dim=1,
    )
    expected = getattr(similarity, measure)(states)
    got = distances(plan_fusion(model, FusionRecipe(keep_layers=3, similarity=measure), batches))
    assert expected[0, 1] > 1e-4, "layers that are all alike: this test is blind"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("measure", ["cka", "block_influence"])
@pytest.mark.parametrize("model_type", TEXT)
def test_padding_does_not_change_distances(model_type, measure):
    """Padded tokens are left out: a batch gives the same distances with padding as without."""
    model = base_model(model_type)
    ids = example_inputs(model, 3, 10)["input_ids"]
    padding = torch.full((3, 7), model.config.pad_token_id)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(padding)], dim=1)
    recipe = FusionRecipe(keep_layers=3, similarity=measure)
    for blocks in ("layer", "mlp"):
        recipe.blocks = blocks
        plain, padded, unmasked = (
            distances(plan_fusion(model, recipe, [batch]))
            for batch in (
                {"input_ids": ids},
                {"input_ids": torch.cat([ids, padding], dim=1), "attention_mask": mask},
                {"input_ids": torch.cat([ids, padding], dim=1), "attention_mask": torch.ones_like(mask)},
            )
        )
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(unmasked, plain, rtol=1e-3), "padding has no effect: this test is blind"


def test_states_of_blocks(model_type):
    """After an MLP the state is the output of its layer; after attention, what the MLP of the layer adds to."""
    model = base_model(model_type)
    adapter, batches = adapter_for(model), batches_for(model)
    layer, attention, mlp = (states_after(model, adapter, kind, batches) for kind in ("layer", "attention", "mlp"))
    torch.testing.assert_close(mlp, layer)
    assert not torch.allclose(attention, layer, rtol=1e-2)
    for index in (0, 3):
        # with an MLP that adds nothing, the output of the layer is the state after its attention
        idle = copy.deepcopy(model)
        block = next(b for b in adapter.blocks(idle) if (b.layer, b.kind) == (index, "mlp"))
        for parameter in idle.get_submodule(block.modules["out"]).parameters():
            parameter.data.zero_()
        expected = attention[index]
        if adapter.post_norm:
            expected = idle.get_submodule(block.modules["norm"])(expected.clone()).detach()
        torch.testing.assert_close(states_after(idle, adapter, "layer", batches)[index], expected)


def test_calibration_keeps_a_bounded_uniform_sample():
    """Past `max_tokens` a seeded sample remains: the same tokens for every block, from early and late batches alike."""
    model = base_model("gpt2")
    adapter, batches = adapter_for(model), batches_for(model, 4)
    everything = states_after(model, adapter, "layer", batches)
    assert everything.shape == (LAYERS, 4 * 30, 32)

    def sample(seed):
        kept = states_after(model, adapter, "layer", batches, seed=seed, max_tokens=24)
        assert kept.shape == (LAYERS, 24, 32)
        found = [(kept[i][:, None] == everything[i][None]).all(-1) for i in range(LAYERS)]
        tokens = found[0].int().argmax(1)
        for matrix in found:
            assert matrix[torch.arange(24), tokens].all(), "another token, or another state, than the first block's"
        assert len(set(tokens.tolist())) == 24
        return tokens

    samples = [sample(seed) for seed in range(30)]
    assert torch.equal(sample(7), samples[7])
    assert not torch.equal(samples[0].sort().values, samples[1].sort().values)
    share = torch.bincount(torch.cat(samples) // 30, minlength=4) / (30 * 24)
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.06, rtol=0)


@pytest.mark.parametrize("blocks", ["layer", "mlp"])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_measure_drives_the_groups(model_type, measure, blocks):
    """Neighbours that the measure finds alike are the ones that are fused, wherever they are."""
    for pair in ((1, 2), (3, 4)):
        model = base_model(model_type)
        recipe = FusionRecipe(keep_layers=LAYERS - 1, similarity=measure, blocks=blocks)
        if recipe.needs_batches:
            make_idle(model, pair[1])
        else:
            make_equal(model, pair)
        plan = plan_fusion(model, recipe, batches_for(model))
        assert groups(plan) == [pair]
        matrix = distances(plan)
        neighbours = {(i, i + 1): matrix[i, i + 1].item() for i in range(LAYERS - 1)}
        assert neighbours.pop(pair) < 0.5 * min(neighbours.values())


@pytest.mark.parametrize("measure", ["euclidean", "cosine"])
@pytest.mark.parametrize("blocks", ["layer", "attention", "mlp"])
def test_global_clusters_find_blocks_that_are_apart(model_type, blocks, measure):
    """`global` groups the first layer with the fifth where these are alike; `adjacent` never does."""
    model = base_model(model_type)
    make_equal(model, (0, 4))
    recipe = FusionRecipe(keep_layers=LAYERS - 1, mode="share", blocks=blocks, similarity=measure, cluster="global")
    assert groups(plan_fusion(model, recipe)) == [(0, 4)]
    recipe.cluster = "adjacent"
    ((first, second),) = groups(plan_fusion(model, recipe))
    assert second == first + 1


def test_other_blocks_do_not_count():
    """The distance between MLPs reads the weights of MLPs only, that between layers those of both."""
    model = base_model("llama")
    layers = model.layers
    layers[3].mlp.load_state_dict(layers[2].mlp.state_dict())
    layers[1].self_attn.load_state_dict(layers[0].self_attn.state_dict())
    matrix = {
        blocks: distances(plan_fusion(model, FusionRecipe(keep_layers=5, blocks=blocks, similarity="euclidean")))
        for blocks in ("layer", "attention", "mlp")
    }
    assert matrix["mlp"][2, 3] == matrix["attention"][0, 1] == 0
    assert min(matrix["mlp"][0, 1], matrix["attention"][2, 3]) > 1
    squares = matrix["attention"] ** 2 + matrix["mlp"] ** 2
    torch.testing.assert_close(matrix["layer"] ** 2, squares, rtol=1e-4, atol=0)


# the models are random, so that fusing them may well be worse than chance: what is said of it is not the claim here
@pytest.mark.filterwarnings("ignore::hf_layerfuse.LayerFuseWarning")
@pytest.mark.parametrize("mode", ["depth", "share"])
def test_fuse_leaves_its_input_as_it_was(model_type, mode):
    """Weights, config, generation config, modes and hooks of the input are the same after `fuse`, batches included."""
    model = tiny_model(model_type)
    model.train()
    frozen = adapter_for(model).layer_list(model)[2].eval()
    batches = batches_for(model)
    weights, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    generation = model.generation_config.to_dict() if model.can_generate() else None
    modes = {name: module.training for name, module in model.named_modules()}
    given = copy.deepcopy(batches)
    fused = fuse(model, keep_layers=3, mode=mode, similarity="cka", batches=batches)

    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config
    assert generation == (model.generation_config.to_dict() if model.can_generate() else None)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not frozen.training
    assert fused.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(old[k], new[k]) for old, new in zip(given, batches, strict=True) for k in old)
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert mine.isdisjoint(parameter.data_ptr() for parameter in fused.parameters())


def same(one, other):
    assert type(one) is type(other)
    # saving, which verify does, writes the name of the class into the config
    mine, others = ({**model.config.to_dict(), "architectures": None} for model in (one, other))
    assert mine == others
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_recipe_or_keywords(model_type):
    """`fuse(model, keep_layers=3)` is `fuse(model, FusionRecipe(keep_layers=3))` is plan and apply."""
    model = tiny_model(model_type)
    by_keyword = fuse(model, keep_layers=3)
    same(by_keyword, fuse(model, FusionRecipe(keep_layers=3)))
    same(by_keyword, apply(model, plan_fusion(model, FusionRecipe(keep_layers=3))))


def test_overrides_on_top_of_a_recipe():
    """Keywords replace fields of the recipe, and a target replaces the other target; the recipe stays as it was."""
    model = tiny_model("gpt2")
    for recipe, overrides, expected in (
        (FusionRecipe(keep_layers=5, mode="share"), {"ratio": 0.5}, FusionRecipe(ratio=0.5, mode="share")),
        (
            FusionRecipe(ratio=0.2, operator="freeze"),
            {"keep_layers": 2},
            FusionRecipe(keep_layers=2, operator="freeze"),
        ),
        (FusionRecipe(keep_layers=3), {"mode": "share"}, FusionRecipe(keep_layers=3, mode="share")),
    ):
        before = copy.copy(recipe)
        same(fuse(model, recipe, **overrides), fuse(model, expected))
        assert recipe == before
    with pytest.raises(RecipeError, match=r"got keep_layers=3 and ratio=0\.5"):
        fuse(model, FusionRecipe(keep_layers=2), keep_layers=3, ratio=0.5)
    with pytest.raises(RecipeError, match="Did you mean 'keep_layers'"):
        fuse(model, keep_layer=3)
    with pytest.raises(RecipeError, match="exactly one target"):
        fuse(model)


@pytest.mark.parametrize("recipe", [{"keep_layers": 3}, 3, "recipe.yaml", Plan("gpt2", 6)])
def test_another_type_of_recipe_is_refused(recipe):
    """What is not a `FusionRecipe` is refused with its type."""
    with pytest.raises(RecipeError, match=f"recipe is {type(recipe).__name__}: pass a FusionRecipe"):
        fuse(tiny_model("gpt2"), recipe)


@pytest.mark.parametrize("measure", MEASURES)
def test_notes_say_what_the_plan_was_decided_from(measure):
    """The notes of a fresh plan hold the recipe and the distances, as JSON that gives both back."""
    model = base_model("bert")
    recipe = FusionRecipe(keep_layers=3, similarity=measure, mode="share", operator="telescope", seed=3)
    plan = plan_fusion(model, recipe, batches_for(model))
    assert all(edit == Fuse("layer", edit.layers, "share", "telescope") for edit in plan.edits)
    tree = json.loads(plan.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert tree["notes"] == plan.notes
    assert FusionRecipe(**tree["notes"]["recipe"]) == recipe
    matrix = torch.tensor(tree["notes"]["distances"])
    assert matrix.shape == (LAYERS, LAYERS)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.zeros(LAYERS))
    assert all(matrix[i, j] > 0 for i, j in itertools.combinations(range(LAYERS), 2))


def test_the_same_seed_gives_the_same_plan():
    """Planning twice gives the same plan to the last digit."""
    model = base_model("vit")
    recipe = FusionRecipe(keep_layers=3, similarity="cka")
    one, two = (plan_fusion(model, recipe, batches_for(model)) for _ in range(2))
    assert one == two
    assert one.notes == two.notes
