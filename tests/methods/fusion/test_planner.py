"""Layer fusion from recipe to model: it meets the target, groups by the measure, and does not change the input."""

import copy
import itertools
import json
import re
from dataclasses import replace

import pytest
import torch
from helpers import LAYERS, TINY, few_pairs, heads_of, in_turn, slow_unless, tiny_model

from hf_layerfuse import (
    DataError,
    Drop,
    Fuse,
    FusionRecipe,
    Plan,
    RecipeError,
    apply,
    architecture_for,
    fuse,
    plan_fusion,
)
from hf_layerfuse.calibration.recorder import observe
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.math.similarity import ON_ACTIVATIONS, ON_WEIGHTS
from hf_layerfuse.methods.fusion.targets import settled
from hf_layerfuse.models.architectures import linear_maps
from hf_layerfuse.models.surgery.size import planned_size

TEXT = sorted(TINY.keys() - {"gpt2", "vit", "deit"})
MEASURES = (*ON_WEIGHTS, *ON_ACTIVATIONS)


def base_model(model_type, **changes):
    heads = [head for head in heads_of(model_type) if head.__name__.endswith("Model")]
    return tiny_model(model_type, min(heads, key=lambda head: len(head.__name__)), **changes)


def batches_for(model, count=2):
    return [dummy_inputs(model, 3, 10, seed) for seed in range(count)]


def groups(plan):
    return [edit.layers for edit in plan.edits]


def distances(plan):
    (matrix,) = plan.notes.distances.values()
    return torch.tensor(matrix, dtype=torch.float64)


def states_after(model, kind, batches):
    seen = []
    observe(model, architecture_for(model), batches, {kind: seen.append})
    return torch.cat(seen, dim=1)


def distinct(model):
    """Number of different output projections of a model, by kind of block."""
    found = {"attention": set(), "mlp": set()}
    for block in architecture_for(model).blocks(model):
        found[block.kind].add(model.get_submodule(block.modules["out"]).weight.data_ptr())
    return {kind: len(pointers) for kind, pointers in found.items()}


def make_equal(model, pair, noise=1e-3):
    """Give two layers nearly the same weights."""
    layers = architecture_for(model).layer_list(model)
    layers[pair[1]].load_state_dict(layers[pair[0]].state_dict())
    generator = torch.Generator().manual_seed(0)
    for parameter in layers[pair[1]].parameters():
        parameter.data += noise * torch.randn(parameter.shape, generator=generator)


def make_idle(model, layer):
    """Make a layer return its input: its blocks add nothing, and its norms do not change normalised states."""
    architecture = architecture_for(model)
    for block in architecture.blocks(model):
        if block.layer == layer:
            for parameter in model.get_submodule(block.modules["out"]).parameters():
                parameter.data.zero_()
        if architecture.post_norm and block.layer in (layer - 1, layer):
            norm = model.get_submodule(block.modules["norm"])
            norm.weight.data.fill_(1)
            norm.bias.data.zero_()


CLUSTERS = [("depth", "adjacent"), ("share", "adjacent"), ("share", "global"), ("share", "agglomerative")]
KINDS = ["layer", "attention", "mlp"]


_FEW_CLUSTERS = few_pairs(KINDS, CLUSTERS)


@pytest.mark.parametrize(
    ("model_type", "asked"),
    slow_unless(
        lambda kind, asked: kind != "gpt2" or asked in _FEW_CLUSTERS, in_turn(itertools.product(KINDS, CLUSTERS))
    ),
)
def test_target_is_met_exactly(model_type, asked):
    """`keep_layers` distinct blocks of the kind remain, and the other kind is unchanged."""
    blocks, (mode, cluster) = asked
    model = base_model(model_type)
    for keep in range(1, LAYERS):
        plan = plan_fusion(model, FusionRecipe(keep_layers=keep, blocks=blocks, mode=mode, cluster=cluster))
        assert LAYERS - sum(len(group) - 1 for group in groups(plan)) == keep
        assert all((edit.kind, edit.mode) == (blocks, mode) for edit in plan.edits)
    fused = apply(model, plan_fusion(model, FusionRecipe(keep_layers=4, blocks=blocks, mode=mode, cluster=cluster)))
    expected = {kind: 4 if blocks in ("layer", kind) else LAYERS for kind in ("attention", "mlp")}
    assert distinct(fused) == expected
    assert fused.config.num_hidden_layers == (4 if (blocks, mode) == ("layer", "depth") else LAYERS)


RATIOS = [0.1, 0.17, 0.3, 0.5, 0.66, 0.75, 0.8, 0.9]


@pytest.mark.parametrize(
    ("ratio", "mode"),
    slow_unless(
        lambda *case: case in few_pairs(RATIOS, ["depth", "share"]), itertools.product(RATIOS, ["depth", "share"])
    ),
)
def test_ratio_gives_the_nearest_count(ratio, mode):
    """A ratio is met as closely as whole layers allow, in number of layers and in their parameters."""
    model = base_model("gpt2")
    fused = apply(model, plan_fusion(model, FusionRecipe(ratio=ratio, mode=mode)))
    keep = distinct(fused)["attention"]
    assert abs(1 - keep / LAYERS - ratio) == pytest.approx(min(abs(1 - k / LAYERS - ratio) for k in range(1, LAYERS)))
    if mode == "depth":
        before, after = (sum(p.numel() for p in m.h.parameters()) for m in (model, fused))
        assert 1 - after / before == pytest.approx(1 - keep / LAYERS)


@pytest.mark.parametrize(
    ("mode", "rank", "blocks", "ratios"),
    [
        ("share", 1, "layer", (0.2, 0.4, 0.6)),
        ("share", 4, "mlp", (0.2, 0.3)),
        ("share", 2, "separate", (0.5,)),
        ("basis", 8, "layer", (0.3, 0.5)),
    ],
)
def test_ratio_counts_what_each_depth_keeps(mode, rank, blocks, ratios):
    """Residuals and coefficients count as kept, so fewer blocks remain for the same ratio."""
    model = base_model("gpt2")
    kinds = ("attn", "mlp") if blocks != "mlp" else ("mlp",)

    def size(of):  # norms and biases stay with each depth
        matrices = {p for name, p in of.h.named_parameters() if p.ndim > 1 and any(kind in name for kind in kinds)}
        return sum(p.numel() for p in matrices)

    for ratio in ratios:
        recipe = FusionRecipe(ratio=ratio, mode=mode, rank=rank, blocks=blocks)
        fused = apply(model, plan_fusion(model, recipe))
        assert 1 - size(fused) / size(model) == pytest.approx(ratio, abs=0.6 / LAYERS)
    with pytest.raises(RecipeError, match=r"ratio=0\.99 is out of reach .* and rank="):
        plan_fusion(model, FusionRecipe(ratio=0.99, mode=mode, rank=rank, blocks=blocks))


ASKED = [
    {"ratio": 0.2, "mode": "share"},
    {"ratio": 0.6, "mode": "share"},
    {"ratio": 0.5, "mode": "share", "blocks": "mlp"},
    {"ratio": 0.5, "mode": "share", "blocks": "separate"},
    {"ratio": 0.4, "mode": "basis"},
    {"max_parameters": 45_000, "mode": "share"},
    {"max_bytes": 120_000, "mode": "share"},
]


@pytest.mark.parametrize(
    ("model_type", "asked"),
    [
        pytest.param(*case, marks=pytest.mark.slow if place in (1, 3, 5) else ())
        for place, case in enumerate(in_turn(ASKED, rest=["bert", "llama"]))
    ],
    ids=str,
)
def test_rank_auto_is_the_largest_that_meets_the_target(model_type, asked):
    """All blocks share one set of weights, and the rank of the residuals is the largest that meets the target."""
    model = base_model(model_type)
    recipe = settled(model, FusionRecipe(rank="auto", **asked))
    assert recipe.keep_layers == 1
    kinds = {"separate": ("attention", "mlp"), "mlp": ("mlp",)}.get(recipe.blocks, ("attention", "mlp"))

    def size(rank: int) -> dict[str, int]:
        return planned_size(model, plan_fusion(model, replace(recipe, rank=rank)))

    architecture = architecture_for(model)
    blocks = sum(
        p.numel()
        for layer in architecture.layer_list(model)
        for n, p in layer.named_parameters()
        if architecture.owner(n) in kinds
    )
    limits = {"parameters": parameters(model) - asked["ratio"] * blocks} if "ratio" in asked else {}
    limits |= {name.removeprefix("max_"): most for name, most in asked.items() if name.startswith("max_")}
    for unit, most in limits.items():
        assert size(recipe.rank)[unit] <= most < size(recipe.rank + 1)[unit]
    plans = [plan_fusion(model, FusionRecipe(rank="auto", **asked)), plan_fusion(model, recipe)]
    assert plans[0].edits == plans[1].edits


def test_rank_auto_of_too_little_or_too_much():
    """There is an error if one set of weights already exceeds the target, or if the model already meets it."""
    model = base_model("gpt2")
    with pytest.raises(RecipeError, match=r"ratio=0\.97 is out of reach with rank='auto'"):
        plan_fusion(model, FusionRecipe(ratio=0.97, mode="share", rank="auto"))
    with pytest.raises(RecipeError, match=r"max_parameters=1000000 fuses nothing"):
        plan_fusion(model, FusionRecipe(max_parameters=1e6, mode="share", rank="auto"))


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
    """A target that fuses nothing, or leaves nothing, is refused with the possible range."""
    with pytest.raises(RecipeError, match=message):
        plan_fusion(base_model("gpt2"), FusionRecipe(**target))
    with pytest.raises(RecipeError, match="1 layer: there is nothing to fuse"):
        plan_fusion(base_model("gpt2", n_layer=1), FusionRecipe(keep_layers=1))


@pytest.mark.parametrize("measure", ON_ACTIVATIONS)
def test_activation_measures_need_batches(measure):
    """Without batches, the error says what to pass; batches without a token are a `DataError`."""
    model, recipe = base_model("gpt2"), FusionRecipe(keep_layers=3, similarity=measure)
    for call in (plan_fusion, fuse):
        with pytest.raises(RecipeError, match=f"similarity='{measure}' .*pass batches="):
            call(model, recipe)
    empty = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    for batches in ([], [empty]):
        with pytest.raises(DataError, match="no tokens"):
            plan_fusion(model, recipe, batches)


@pytest.mark.parametrize("measure", ON_ACTIVATIONS)
def test_layer_distances_are_those_of_the_hidden_states(model_type, measure):
    """Distances are the measure applied to the hidden states that transformers returns, over all batches."""
    model = base_model(model_type)
    batches, last = batches_for(model), []
    # transformers puts the last hidden state through the final norm, so that one is taken from the layer
    handle = (
        architecture_for(model)
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
    whole = ON_ACTIVATIONS[measure]()
    whole.update(states)
    expected = whole.distance()
    got = distances(plan_fusion(model, FusionRecipe(keep_layers=3, similarity=measure), batches))
    assert expected[0, 1] > 1e-4, "layers that are all alike: this test is blind"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("model_type", "measure"), in_turn(["cka", "block_influence"], rest=TEXT))
def test_padding_does_not_change_distances(model_type, measure):
    """Padding tokens are ignored: padding a batch does not change the distances."""
    model = base_model(model_type)
    ids = dummy_inputs(model, 3, 10)["input_ids"]
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
    """The state after an MLP is the output of its layer; the state after attention is the residual that the MLP adds
    to."""
    model = base_model(model_type)
    architecture, batches = architecture_for(model), batches_for(model)
    layer, attention, mlp = (states_after(model, kind, batches) for kind in ("layer", "attention", "mlp"))
    torch.testing.assert_close(mlp, layer)
    assert not torch.allclose(attention, layer, rtol=1e-2)
    for index in (0, 3):
        # with an MLP that adds nothing, the output of the layer is the state after its attention
        idle = copy.deepcopy(model)
        block = next(b for b in architecture.blocks(idle) if (b.layer, b.kind) == (index, "mlp"))
        for parameter in idle.get_submodule(block.modules["out"]).parameters():
            parameter.data.zero_()
        expected = attention[index]
        if architecture.post_norm:
            expected = idle.get_submodule(block.modules["norm"])(expected.clone()).detach()
        torch.testing.assert_close(states_after(idle, "layer", batches)[index], expected)


def test_observers_see_every_token_once(model_type):
    """One pass observes all kinds, batch by batch, with every token once; no hook is left behind."""
    model = base_model(model_type)
    batches = batches_for(model, 3)
    seen = {"attention": [], "mlp": []}
    observe(model, architecture_for(model), iter(batches), {kind: states.append for kind, states in seen.items()})
    for kind, states in seen.items():
        assert [state.shape for state in states] == [states[0].shape] * 3
        torch.testing.assert_close(torch.cat(states, dim=1), states_after(model, kind, batches))
    assert seen["mlp"][0].shape[::2] == (LAYERS, 32)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("measure", ON_ACTIVATIONS)
def test_the_size_of_batches_does_not_change_distances(measure):
    """Single rows give the same distances as a batch, up to the rounding of the model."""
    model = base_model("bert")
    ids = dummy_inputs(model, 12, 10)["input_ids"]
    recipe = FusionRecipe(keep_layers=3, similarity=measure)
    one, many = (
        distances(plan_fusion(model, recipe, [{"input_ids": part} for part in ids.split(size)])) for size in (12, 1)
    )
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-6)


_FEW_MEASURES = few_pairs(MEASURES, ["layer", "mlp"])


@pytest.mark.parametrize(
    ("model_type", "by"),
    slow_unless(
        lambda kind, by: kind != "gpt2" or by in _FEW_MEASURES, in_turn(itertools.product(MEASURES, ["layer", "mlp"]))
    ),
)
def test_the_measure_drives_the_groups(model_type, by):
    """The fused neighbours are those with the smallest distance, anywhere in the model."""
    measure, blocks = by
    for pair in ((1, 2), (3, 4)):
        model = base_model(model_type)
        recipe = FusionRecipe(keep_layers=LAYERS - 1, similarity=measure, blocks=blocks)
        if measure in ON_ACTIVATIONS:
            make_idle(model, pair[1])
        else:
            make_equal(model, pair)
        plan = plan_fusion(model, recipe, batches_for(model))
        assert groups(plan) == [pair]
        matrix = distances(plan)
        neighbours = {(i, i + 1): matrix[i, i + 1].item() for i in range(LAYERS - 1)}
        assert neighbours.pop(pair) < 0.5 * min(neighbours.values())


@pytest.mark.parametrize(
    ("model_type", "by"), in_turn(itertools.product(KINDS, ["euclidean", "kl"], ["global", "agglomerative"]))
)
def test_free_clusters_find_blocks_that_are_apart(model_type, by):
    """Free clusters group the first layer with the fifth if these are similar; `adjacent` never does."""
    blocks, measure, cluster = by
    model = base_model(model_type)
    make_equal(model, (0, 4))
    recipe = FusionRecipe(keep_layers=LAYERS - 1, mode="share", blocks=blocks, similarity=measure, cluster=cluster)
    assert groups(plan_fusion(model, recipe)) == [(0, 4)]
    recipe.cluster = "adjacent"
    ((first, second),) = groups(plan_fusion(model, recipe))
    assert second == first + 1


def test_other_blocks_do_not_count():
    """The distance between MLPs uses only MLP weights; the distance between layers uses all."""
    model = base_model("llama")
    layers = model.layers
    for pair, names in (((2, 3), ("mlp", "post_attention_layernorm")), ((0, 1), ("self_attn", "input_layernorm"))):
        for name in names:  # the norm scales what the block reads
            layers[pair[1]].get_submodule(name).load_state_dict(layers[pair[0]].get_submodule(name).state_dict())
    matrix = {
        blocks: distances(plan_fusion(model, FusionRecipe(keep_layers=5, blocks=blocks, similarity="euclidean")))
        for blocks in ("layer", "attention", "mlp")
    }
    assert matrix["mlp"][2, 3] == matrix["attention"][0, 1] == 0
    assert min(matrix["mlp"][0, 1], matrix["attention"][2, 3]) > 1
    squares = matrix["attention"] ** 2 + matrix["mlp"] ** 2
    torch.testing.assert_close(matrix["layer"] ** 2, squares, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("model_type", "measure"), in_turn(ON_WEIGHTS))
def test_gains_are_part_of_what_reads_them(model_type, measure):
    """Moving a gain from a norm into the maps after it changes no distance. The gain of a norm after the block is
    ignored."""
    model = base_model(model_type)
    architecture, recipe = architecture_for(model), FusionRecipe(keep_layers=3, similarity=measure)
    before = distances(plan_fusion(model, recipe))
    generator = torch.Generator().manual_seed(1)
    for block in architecture.blocks(model):
        gain = torch.rand(32, generator=generator) + 0.5
        model.get_submodule(block.modules["norm"]).weight.data /= gain
        for role, found in linear_maps(model, block).items():
            if role != "out" and not architecture.post_norm:
                found.write(found.weight * gain)
    torch.testing.assert_close(distances(plan_fusion(model, recipe)), before, rtol=1e-4, atol=1e-6)
    if not architecture.post_norm:
        first = next(iter(architecture.blocks(model)))
        model.get_submodule(first.modules["norm"]).weight.data[::2] *= 3
        assert not torch.allclose(distances(plan_fusion(model, recipe))[0], before[0], rtol=1e-3)


@pytest.mark.parametrize(("model_type", "measure"), in_turn(ON_WEIGHTS))
def test_every_weight_is_compared_and_no_bias(model_type, measure):
    """Changing any weight matrix changes the distance; changing biases does not (O'Neill et al. 2021)."""
    model = base_model(model_type)
    recipe = FusionRecipe(keep_layers=3, similarity=measure)
    before = distances(plan_fusion(model, recipe))
    for block in architecture_for(model).blocks(model):
        for role, found in linear_maps(model, block).items():
            if found.bias is not None:
                found.write(found.weight, torch.randn_like(found.bias))
            if block.layer == 2:
                kept = found.weight.clone()
                found.write(kept * torch.linspace(0.5, 2, kept.shape[1]))
                after = distances(plan_fusion(model, recipe))
                changed = after != before
                assert changed[2].any(), role
                assert changed[2].sum() == changed.sum() / 2, role
                found.write(kept)
    assert torch.equal(distances(plan_fusion(model, recipe)), before)


@pytest.mark.parametrize(("model_type", "measure"), in_turn(ON_WEIGHTS))
def test_order_of_hidden_units(model_type, measure):
    """Measures of distributions give distance zero to MLPs that differ only in the order of hidden units."""
    model = base_model(model_type)
    make_equal(model, (2, 3), noise=0)
    block = next(block for block in architecture_for(model).blocks(model) if (block.layer, block.kind) == (3, "mlp"))
    maps = linear_maps(model, block)
    order = torch.randperm(maps["out"].weight.shape[1], generator=torch.Generator().manual_seed(0))
    for role, found in maps.items():
        permuted = found.weight[:, order] if role == "out" else found.weight[order]
        found.write(permuted)
    matrix = distances(plan_fusion(model, FusionRecipe(keep_layers=5, similarity=measure, blocks="mlp")))
    if measure in ("covariance", "kl", "wasserstein"):
        assert matrix[2, 3] < 1e-9 * matrix.max()
    else:
        assert matrix[2, 3] > 0.5 * matrix.max()


@pytest.mark.parametrize(("model_type", "by"), in_turn(itertools.product(["depth", "share"], ["cosine", "cka"])))
def test_kinds_apart(model_type, by):
    """`separate` groups attention by distances of attention, and MLPs by distances of MLPs, in one pass over the
    batches."""
    mode, measure = by
    model = base_model(model_type)
    recipe = FusionRecipe(keep_layers=4, mode=mode, similarity=measure, blocks="separate")
    plan = plan_fusion(model, recipe, iter(batches_for(model)))
    assert distinct(apply(model, plan)) == {"attention": 4, "mlp": 4}
    for kind in ("attention", "mlp"):
        recipe.blocks = kind
        alone = plan_fusion(model, recipe, batches_for(model))
        assert [edit for edit in plan.edits if edit.kind == kind] == list(alone.edits)
        assert plan.notes.distances[kind] == alone.notes.distances[kind]


def test_kinds_apart_compute_what_the_plan_says(model_type):
    """With one pair of attention blocks and another pair of MLPs fused in depth, all other blocks run as before."""
    model = base_model(model_type)
    architecture = architecture_for(model)
    alike = {"attention": (0, 1), "mlp": (4, 5)}
    blocks = {(block.kind, block.layer): block for block in architecture.blocks(model)}
    with torch.no_grad():
        for kind, (first, second) in alike.items():
            for role, path in blocks[kind, first].modules.items():
                for name, tensor in model.get_submodule(path).named_parameters():
                    model.get_submodule(blocks[kind, second].modules[role]).get_parameter(name).copy_(tensor)
    plan = plan_fusion(model, FusionRecipe(keep_layers=LAYERS - 1, blocks="separate"))
    assert {edit.kind: edit.layers for edit in plan.edits} == alike
    fused = apply(model, plan)
    # the second block of either pair adds nothing: `freeze` keeps its weights, which are those of the first
    expected = copy.deepcopy(model)
    for kind, (_, second) in alike.items():
        for parameter in expected.get_submodule(blocks[kind, second].modules["out"]).parameters():
            parameter.data.zero_()
    inputs = dummy_inputs(model, 3, 12)
    with torch.inference_mode():
        got, wanted, before = (m(**inputs).last_hidden_state for m in (fused, expected, model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, wanted, rtol=1e-2)


def test_kinds_apart_can_meet():
    """If both kinds have the same groups, whole layers are removed, and the result is a stock model."""
    model = base_model("gpt2")
    make_equal(model, (2, 3))
    fused = apply(model, plan_fusion(model, FusionRecipe(keep_layers=LAYERS - 1, blocks="separate")))
    assert type(fused) is type(model)
    assert fused.config.num_hidden_layers == LAYERS - 1


HEADED = [("gpt2", "GPT2LMHeadModel"), ("bert", "BertForMaskedLM"), ("llama", "LlamaForCausalLM"), ("vit", "ViTModel")]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


QUICK_SIZES = [("depth", "layer"), ("share", "separate")]


def bytes_of_file(model, path):
    """Number of bytes of the tensors in the saved file, without the eight bytes of length and the header."""
    model.save_pretrained(path)
    content = (path / "model.safetensors").read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize(
    ("headed", "asked"),
    [
        pytest.param(*case, marks=() if case[1] in QUICK_SIZES else pytest.mark.slow)
        for case in in_turn(
            itertools.product(["depth", "share"], ["layer", "mlp", "separate"]), HEADED[:1], HEADED[1:2]
        )
    ],
)
def test_sizes_are_met_with_as_many_blocks_as_fit(headed, asked):
    """Any reachable limit is met, and one block more would exceed it."""
    model = tiny_model(*headed)
    options = dict(zip(("mode", "blocks"), asked, strict=True))
    plans = [plan_fusion(model, FusionRecipe(keep_layers=keep, **options)) for keep in range(1, LAYERS)]
    counts = [parameters(apply(model, plan)) for plan in plans]
    assert counts == sorted(set(counts))
    for keep, most in enumerate(counts, start=1):
        for limit in (most, *([counts[keep] - 1] if keep < LAYERS - 1 else [])):
            assert plan_fusion(model, FusionRecipe(max_parameters=limit, **options)) == plans[keep - 1]


@pytest.mark.parametrize(
    ("headed", "asked"),
    in_turn(itertools.product(["depth", "share"], [torch.float32, torch.bfloat16]), HEADED[:1], HEADED[1:]),
)
def test_bytes_are_those_of_the_file(tmp_path, headed, asked):
    """The file has at most `max_bytes` of weights, in the dtype of the model, and exactly the planned number."""
    (name, head), (mode, dtype) = headed, asked
    model = tiny_model(name, head).to(dtype)
    whole = bytes_of_file(model, tmp_path / "whole")
    assert planned_size(model, Plan(name, LAYERS)) == {"parameters": parameters(model), "bytes": whole}
    plan = plan_fusion(model, FusionRecipe(max_bytes=0.75 * whole, mode=mode))
    small = bytes_of_file(apply(model, plan), tmp_path / "small")
    assert small == planned_size(model, plan)["bytes"] <= 0.75 * whole
    keep = LAYERS - sum(len(group) - 1 for group in groups(plan))
    more = apply(model, plan_fusion(model, FusionRecipe(keep_layers=keep + 1, mode=mode)))
    assert bytes_of_file(more, tmp_path / "more") > 0.75 * whole


EDITS = [
    [Drop("attention", 1), Fuse("mlp", (2, 3))],
    [Drop("layer", 0), Fuse("layer", (2, 4, 5), "share")],
    [Fuse("layer", (1, 2), "share", rank=3), Fuse("attention", (3, 5), "share")],
    [Fuse("mlp", (1, 2, 4), "basis", rank=5)],
    [Fuse("layer", (1, 2, 3, 4), operator="mean")],
]


@pytest.mark.parametrize(("model_type", "edits"), in_turn(EDITS, rest=sorted(TINY.keys() - {"gpt2"})))
def test_planned_sizes_are_those_of_the_result(model_type, edits):
    """For all edits, the size is known before they are applied; for `mean` also with different layer types."""
    model = base_model(model_type, **({"use_sliding_window": False} if model_type == "qwen2" else {}))
    plan = Plan(model_type, LAYERS, edits)
    assert planned_size(model, plan)["parameters"] == parameters(apply(model, plan))


def test_sizes_out_of_reach_are_refused_before_calibration():
    """The error names the smallest size, which is reachable, and no batch is read."""
    model = base_model("gpt2")
    unread = iter([pytest.fail])
    asked = itertools.product(("depth", "share"), ("layer", "mlp", "separate"))
    limits = itertools.cycle([("max_parameters", "parameters"), ("max_bytes", "bytes")])
    for (mode, blocks), (name, unit) in zip(asked, limits, strict=False):
        options = {"mode": mode, "blocks": blocks, "similarity": "cka"}
        with pytest.raises(RecipeError, match=rf"{name}=100 is out of reach: .* \d+ {unit} remain") as refused:
            plan_fusion(model, FusionRecipe(**{name: 100}, **options), unread)
        smallest = int(re.search(rf"(\d+) {unit} remain", str(refused.value))[1])
        plan = plan_fusion(model, FusionRecipe(**{name: smallest}, **options), batches_for(model))
        assert all(group == tuple(range(LAYERS)) for group in groups(plan))
        assert planned_size(model, plan)[unit] == smallest
        whole = planned_size(model, Plan("gpt2", LAYERS))[unit]
        message = rf"{name}={whole} fuses nothing, because the model has {whole} {unit}: use less, .* {smallest}"
        with pytest.raises(RecipeError, match=message):
            plan_fusion(model, FusionRecipe(**{name: whole}, **options), unread)
    assert next(unread) is pytest.fail


# fused random models may be worse than chance; the warning about this is not tested here
@pytest.mark.filterwarnings("ignore::hf_layerfuse.LayerFuseWarning")
@pytest.mark.parametrize(("model_type", "mode"), in_turn(["depth", "share"], rest=["llama"]))
def test_fuse_leaves_its_input_as_it_was(model_type, mode):
    """`fuse` does not change weights, config, generation config, modes, hooks or batches."""
    model = tiny_model(model_type)
    model.train()
    frozen = architecture_for(model).layer_list(model)[2].eval()
    batches = batches_for(model)
    weights, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    generation = model.generation_config.to_dict() if model.can_generate() else None
    modes = {name: module.training for name, module in model.named_modules()}
    given = copy.deepcopy(batches)
    fused = fuse(model, keep_layers=3, mode=mode, similarity="cka", effort="low", batches=batches)

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
    """`fuse(model, keep_layers=3)` equals `fuse(model, FusionRecipe(keep_layers=3))`, and equals plan and apply."""
    model = tiny_model(model_type)
    by_keyword = fuse(model, keep_layers=3)
    same(by_keyword, fuse(model, FusionRecipe(keep_layers=3)))
    same(by_keyword, apply(model, plan_fusion(model, FusionRecipe(keep_layers=3))))


def test_overrides_on_top_of_a_recipe():
    """Keywords replace fields of the recipe, and a target replaces another target; the recipe object is unchanged."""
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
    """Anything but a `FusionRecipe` is refused with its type."""
    with pytest.raises(RecipeError, match=f"recipe is {type(recipe).__name__}: pass a FusionRecipe"):
        fuse(tiny_model("gpt2"), recipe)


@pytest.mark.parametrize("measure", MEASURES)
def test_notes_say_what_the_plan_was_decided_from(measure):
    """The notes of a new plan hold the recipe and the distances, and JSON preserves both."""
    model = base_model("bert")
    recipe = FusionRecipe(keep_layers=3, similarity=measure, mode="share", operator="telescope", seed=3)
    plan = plan_fusion(model, recipe, batches_for(model))
    assert all(edit == Fuse("layer", edit.layers, "share", "telescope") for edit in plan.edits)
    tree = json.loads(plan.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert tree["notes"] == plan.notes.to_dict()
    assert FusionRecipe(**tree["notes"]["recipe"]) == recipe
    matrix = torch.tensor(tree["notes"]["distances"]["layer"])
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
