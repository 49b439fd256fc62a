"""Alignment changes the weights of a block and not its outputs."""

import builtins
from itertools import permutations, product

import pytest
import torch
from helpers import LAYERS, TINY, in_turn, tiny_model

from hf_layerfuse import Drop, Fuse, Plan, apply
from hf_layerfuse.errors import DataError, RecipeError, UnsupportedModelError
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.math.align import (
    CrossCorrelation,
    assignment,
    fit,
    gain,
    inner_product,
    match,
    rotation,
    scores,
    transport,
)
from hf_layerfuse.math.turn import Planes
from hf_layerfuse.models.align import align
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.models.architectures.block_weights import linear_maps, rows_of
from hf_layerfuse.models.verify import prediction

ALIGNS = ["permutation", "activation", "transport", "rotation"]
MODELS = [*((kind, None) for kind in TINY), ("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaModel")]
# what the tiny models do not have: grouped heads without rotary positions or norms, biases everywhere, no biases at all
CHANGES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "vit": {"qkv_bias": False},
    "qwen3": {"num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True},
}
CASES = [(kind, head, {}) for kind, head in MODELS] + [(kind, None, changes) for kind, changes in CHANGES.items()]

in_turns = pytest.mark.parametrize(("model", "how"), in_turn(ALIGNS, CASES[-len(CHANGES) :], CASES[: -len(CHANGES)]))
every_model = pytest.mark.parametrize(
    ("model_type", "head", "changes"),
    CASES,
    ids=[head or kind for kind, head in MODELS] + [f"{kind}-changed" for kind in CHANGES],
)


def outputs(model, inputs):
    with torch.inference_mode():
        return prediction(model(**inputs))


def batches_of(model, count=2):
    return [dummy_inputs(model, batch_size=8, seed=seed) for seed in range(count)]


def block_of(model, layer, kind):
    return next(b for b in architecture_for(model).blocks(model) if (b.layer, b.kind) == (layer, kind))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def distance(model, kind, a, b):
    """Squared distance of two blocks over all linear maps, without the biases of the outputs, which are not aligned."""
    one, other = (linear_maps(model, block_of(model, layer, kind)) for layer in (a, b))
    return sum(
        (one[role].weight - other[role].weight).square().sum()
        + (0 if one[role].bias is None or role == "out" else (one[role].bias - other[role].bias).square().sum())
        for role in one
    )


@in_turns
def test_the_function_stays_and_the_weights_change(model, how):
    """For every alignment and mode: same class, same outputs, other weights, unchanged input."""
    model_type, head, changes = model
    model = tiny_model(model_type, head, **changes).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = dummy_inputs(model)
    edits = (
        Fuse("layer", (0, 1, 2), operator="mean", align=how),
        Fuse("attention", (3, 5), "share", "telescope", align=how),
        Fuse("mlp", (3, 4), "share", operator="freeze", keep=3, align=how),
    )
    aligned = align(model, Plan(model_type, LAYERS, edits), batches_of(model))
    assert type(aligned) is type(model)
    close(outputs(aligned, inputs), outputs(model, inputs))
    after = aligned.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    path = architecture_for(model).layers_path(model)
    changed = {
        (int(n[len(path) + 1 :].split(".")[0]), architecture_for(model).owner(n[len(path) + 1 :].split(".", 1)[1]))
        for n in before
        if not torch.equal(before[n], after[n])
    }
    # with few heads, their order may already be best
    assert {(0, "mlp"), (2, "mlp"), (4, "mlp")} <= changed
    # the norm of two blocks belongs to neither
    wanted = {(0, "attention"), (0, "mlp"), (0, None), (2, "attention"), (2, "mlp"), (2, None)}
    assert changed <= wanted | {(5, "attention"), (4, "mlp")}


@in_turns
def test_a_disguised_copy_is_recovered(model, how):
    """A copy of a block with shuffled units and heads, rotated heads, and a gain moved between its norm and its maps
    becomes equal to the block again, and so does their mean."""
    model_type, head, changes = model
    model = tiny_model(model_type, head, **changes).double()
    architecture = architecture_for(model)
    layers = architecture.layer_list(model)
    if how == "activation":
        quiet(model)
    layers[2].load_state_dict(layers[1].state_dict())
    plan = Plan(model_type, LAYERS, (Fuse("layer", (1, 2), operator="telescope", align=how),))
    inputs = dummy_inputs(model)
    expected = outputs(model, inputs)
    for kind in ("attention", "mlp"):
        disguise(model, 2, kind, turned=how == "rotation", norm=architecture.own_norm(kind) is not None)
        assert distance(model, kind, 1, 2) > 1
    close(outputs(model, inputs), expected)

    aligned = align(model, plan, batches_of(model))
    one, other = (architecture.layer_list(aligned)[layer].state_dict() for layer in (1, 2))
    for name in one:
        close(other[name], one[name])
    mean = Plan(model_type, LAYERS, (Fuse("layer", (1, 2), operator="mean"),))
    expected = outputs(apply(model, Plan(model_type, LAYERS, (Drop("layer", 2),))), inputs)
    close(outputs(apply(aligned, mean), inputs), expected)
    if how != "activation":
        assert not torch.allclose(outputs(apply(model, mean), inputs), expected, rtol=1e-2), "this test is blind"


def quiet(model):
    """Make the blocks before layers 1 and 2 add almost nothing, so that both layers read the same states."""
    architecture = architecture_for(model)
    for block in architecture.blocks(model):
        if block.layer in (0, 1, 2):
            for parameter in model.get_submodule(block.modules["out"]).parameters():
                parameter.data.mul_(1e-5)
            if architecture.post_norm:
                norm = model.get_submodule(block.modules["norm"])
                norm.weight.data.fill_(1)
                norm.bias.data.zero_()


def disguise(model, layer, kind, *, turned, norm):
    """Shuffle and rotate a block in place without changing its function. Written with loops, head by head."""
    generator = torch.Generator().manual_seed(layer)
    block = block_of(model, layer, kind)
    maps = linear_maps(model, block)
    if kind == "mlp":
        rows = torch.randperm(maps["out"].weight.shape[1], generator=generator)
        for role in maps.keys() - {"out"}:
            take(maps[role], rows)
        maps["out"].write(maps["out"].weight[:, rows])
    else:
        heads = block.heads
        dim, members = heads.dim, heads.count // heads.groups
        groups, order = list(range(heads.groups)), list(range(heads.count))
        if not heads.bound:
            groups = torch.randperm(heads.groups, generator=generator).tolist()
            order = [g * members + i for g in groups for i in torch.randperm(members, generator=generator).tolist()]
        wide = torch.cat([torch.arange(dim) + head * dim for head in order])
        narrow = torch.cat([torch.arange(dim) + group * dim for group in groups])
        take(maps["q"], wide)
        take(maps["k"], narrow)
        take(maps["v"], narrow)
        maps["out"].write(maps["out"].weight[:, wide])
        for group in range(heads.groups if turned else 0):
            kv = slice(group * dim, (group + 1) * dim)
            qk, vo = torch.eye(dim).double(), random_rotation(dim, generator)
            if heads.rotary and "q_norm" not in block.modules:
                for j in range(heads.rotary // 2):
                    plane = [j, j + heads.rotary // 2] if heads.pairing == "halves" else [2 * j, 2 * j + 1]
                    t = 6 * torch.rand((), generator=generator, dtype=torch.float64)
                    qk[plane, plane] = t.cos()
                    qk[plane, plane[::-1]] = torch.stack([-t.sin(), t.sin()])
                qk[heads.rotary :, heads.rotary :] = random_rotation(dim - heads.rotary, generator)
            elif not heads.rotary:
                qk = random_rotation(dim, generator)
            turn(maps["k"], kv, qk)
            turn(maps["v"], kv, vo)
            for head in range(group * members, (group + 1) * members):
                at = slice(head * dim, (head + 1) * dim)
                turn(maps["q"], at, qk)
                weight = maps["out"].weight.clone()
                weight[:, at] = weight[:, at] @ vo.T
                maps["out"].write(weight)
    readers = [each for role, each in maps.items() if role != "out"]
    module = model.get_submodule(block.modules["norm"])
    bias = getattr(module, "bias", None)
    if norm and (bias is None or all(each.bias is not None for each in readers)):
        gain = torch.rand(len(module.weight), generator=generator, dtype=torch.float64) + 0.5
        shift = torch.randn(len(module.weight), generator=generator, dtype=torch.float64)
        for each in readers:
            weight = each.weight / gain
            each.write(weight, None if bias is None else each.bias - weight @ shift)
        module.weight.data.mul_(gain)
        if bias is not None:
            bias.data.mul_(gain).add_(shift)


def take(each, rows):
    each.write(each.weight[rows], None if each.bias is None else each.bias[rows])


def turn(each, rows, matrix):
    weight, bias = each.weight.clone(), None if each.bias is None else each.bias.clone()
    weight[rows] = matrix @ weight[rows]
    if bias is not None:
        bias[rows] = matrix @ bias[rows]
    each.write(weight, bias)


def random_rotation(dim, generator):
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]


def test_activation_of_a_gated_unit_is_its_product():
    """Units that differ only in their gates are distinguished."""
    model = tiny_model("llama", "LlamaModel").double()
    quiet(model)
    model.layers[1].mlp.up_proj.weight.data[:] = model.layers[1].mlp.up_proj.weight[0].clone()
    model.layers[2].load_state_dict(model.layers[1].state_dict())
    disguise(model, 2, "mlp", turned=False, norm=False)
    plan = Plan("llama", LAYERS, (Fuse("mlp", (1, 2), "share", "telescope", align="activation"),))
    assert distance(model, "mlp", 1, 2) > 1
    assert distance(align(model, plan, batches_of(model)), "mlp", 1, 2) < 1e-6


@every_model
def test_blocks_that_differ_come_closer(model_type, head, changes):
    """A permutation never increases the distance of two blocks, and reduces it for units. Rotating heads reduces it
    further."""
    model = tiny_model(model_type, head, **changes).double()

    def after(how, kind):
        plan = Plan(model_type, LAYERS, (Fuse("layer", (1, 4), "share", "mean", align=how),))
        return distance(align(model, plan), kind, 1, 4)

    assert after("permutation", "mlp") < distance(model, "mlp", 1, 4)
    assert after("permutation", "attention") <= distance(model, "attention", 1, 4) + 1e-9
    assert after("rotation", "attention") < after("permutation", "attention")
    close(after("rotation", "mlp"), after("permutation", "mlp"))


@pytest.mark.parametrize("how", ALIGNS)
def test_half_precision_is_kept(how):
    """In bfloat16, a permutation moves weights without rounding them, and outputs stay close."""
    model = tiny_model("llama", "LlamaModel").to(torch.bfloat16)
    plan = Plan("llama", LAYERS, (Fuse("layer", (1, 2), "share", "mean", align=how),))
    aligned = align(model, plan, batches_of(model))
    assert aligned.dtype == torch.bfloat16
    before, after = model.layers[1].mlp.up_proj.weight, aligned.layers[1].mlp.up_proj.weight
    assert not torch.equal(before, after)
    assert torch.equal(before.float().sum(1).sort().values, after.float().sum(1).sort().values)


def test_no_alignment_is_no_copy():
    """If no edit needs alignment, the model itself is returned."""
    model = tiny_model("bert")
    assert align(model, Plan("bert", LAYERS, (Fuse("layer", (1, 2)), Drop("mlp", 4)))) is model


@pytest.mark.parametrize("off", [[5], range(32)], ids=["one", "all"])
def test_gains_that_are_nearly_off_are_not_divided_by(off):
    """A coordinate whose gain is almost zero in the reference keeps its own gain; the others take the reference's."""
    model = tiny_model("gpt2", "GPT2Model").double()
    off = torch.tensor(list(off))
    model.h[1].ln_2.weight.data[off] = 0
    aligned = align(model, Plan("gpt2", LAYERS, (Fuse("mlp", (1, 2), operator="telescope", align="permutation"),)))
    gains = aligned.h[2].ln_2.weight
    expected = model.h[1].ln_2.weight.clone()
    expected[off] = model.h[2].ln_2.weight[off]
    assert torch.equal(gains, expected)
    close(outputs(aligned, dummy_inputs(model)), outputs(model, dummy_inputs(model)))


def test_a_norm_that_adds_one_to_its_gain_is_left_alone(monkeypatch):
    """Gains move between norms and maps only if the norm multiplies by them. Gemma's norm multiplies by 1 + weight."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    forward = LlamaRMSNorm.forward

    def plus_one(self, states):
        return forward(self, states) * (1 + 1 / self.weight)

    monkeypatch.setattr(LlamaRMSNorm, "forward", plus_one)
    model = tiny_model("llama").double()
    aligned = align(model, Plan("llama", LAYERS, (Fuse("layer", (1, 2), operator="mean", align="rotation"),)))
    close(outputs(aligned, dummy_inputs(model)), outputs(model, dummy_inputs(model)))


def test_activation_ignores_padding_and_batching():
    """Statistics ignore padding, do not depend on the batches, and need one pass."""
    model = tiny_model("bert").double()
    plan = Plan("bert", LAYERS, (Fuse("layer", (1, 3), "share", "mean", align="activation"),))
    ids = dummy_inputs(model, batch_size=12, sequence_length=16)["input_ids"]
    padded = torch.cat([ids, torch.zeros(12, 9, dtype=ids.dtype)], 1)
    mask = (torch.arange(25) < 16).long().expand(12, 25)

    def weights(batches):
        return align(model, plan, batches).state_dict()

    whole = weights([{"input_ids": ids, "labels": ids}])
    parts = weights({"input_ids": p, "attention_mask": m} for p, m in zip(padded.split(5), mask.split(5), strict=True))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    blind = weights([{"input_ids": padded}])
    assert not all(torch.equal(value, blind[name]) for name, value in whole.items()), "this test is blind"


@pytest.mark.parametrize(
    "batches", [None, [], [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4)}]]
)
def test_activation_without_tokens_says_what_to_pass(batches):
    """No batches, or batches without tokens, are errors that say what to pass; the model keeps no hooks."""
    model = tiny_model("bert")
    plan = Plan("bert", LAYERS, (Fuse("mlp", (1, 2), align="activation"),))
    with pytest.raises(RecipeError if batches is None else DataError, match="batch"):
        align(model, plan, batches)
    assert not any(module._forward_hooks for module in model.modules())


def test_transport_without_pot_says_how_to_install_it(monkeypatch):
    """POT is an extra: without it, the error gives the command that installs it."""
    real = builtins.__import__

    def without_pot(name, *args, **kwargs):
        if name == "ot":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pot)
    with pytest.raises(RecipeError, match=r"pip install \"hf-layerfuse\[transport\]\""):
        align(tiny_model("bert"), Plan("bert", LAYERS, (Fuse("mlp", (1, 2), align="transport"),)))


def test_maps_with_other_names_are_refused(monkeypatch):
    """An architecture may use other names for its maps; alignment says which names it needs."""
    architecture = architecture_for(tiny_model("bert"))
    table = {"up": "intermediate.dense", "out": "output.dense", "norm": "output.LayerNorm"}
    monkeypatch.setattr(type(architecture), "mlp", table)
    with pytest.raises(UnsupportedModelError, match="'qkv' "):
        align(tiny_model("bert"), Plan("bert", LAYERS, (Fuse("mlp", (1, 2), align="permutation"),)))


def test_norms_of_some_heads_are_refused():
    """If a norm on queries has gains for neither one head nor all heads, heads cannot be permuted."""
    model = tiny_model("qwen3", "Qwen3Model")
    model.layers[1].self_attn.q_norm.weight = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(UnsupportedModelError, match="q_norm of layer 1 has 16 gains"):
        rows_of(model, block_of(model, 1, "attention"))


def test_assignment_and_transport_agree():
    """With equal masses, the transport plan is the permutation with the largest total score."""
    score = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).double()
    order = assignment(score)
    assert torch.equal(transport(score), order)
    assert sorted(order.tolist()) == list(range(40))
    assert score[range(40), order].sum() > score.trace()
    assert transport(torch.ones(3, 3).double()).sort().values.tolist() == [0, 1, 2]


@pytest.mark.parametrize("solve", [assignment, transport])
def test_heads_stay_in_their_group(solve):
    """The result has the largest total score of all matchings of groups, and of heads inside matched groups."""
    score = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    groups, heads = match(score, solve)

    def total(groups, heads):
        return sum(score[g, groups[g], i, heads[g][i]] for g in range(3) for i in range(2))

    swaps = list(permutations(range(2)))
    best = max(total(order, inner) for order in permutations(range(3)) for inner in product(swaps, repeat=3))
    close(total(groups, heads), best)


@pytest.mark.parametrize("seed", range(20))
def test_grouped_heads_are_permuted_for_the_best(seed):
    """With keys and values shared by heads, no permutation of groups and their heads is closer than that of `fit`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (2, 2, 3, 5), "k": (2, 1, 3, 5), "v": (2, 1, 3, 5), "out": (2, 2, 3, 4)}
    a, b = ({role: torch.randn(*s, generator=generator).double() for role, s in shapes.items()} for _ in range(2))
    turns = {("q", "k"): "none", ("v", "out"): "none"}
    found = inner_product(a, fit(a, b, scores(a, b, turns), turns))

    def total(groups, heads):
        rows = {role: torch.stack([b[role][g] for g in groups]) for role in b}
        for role in ("q", "out"):
            rows[role] = torch.stack([row[list(order)] for row, order in zip(rows[role], heads, strict=True)])
        return inner_product(a, rows)

    swaps = list(permutations(range(2)))
    assert found == pytest.approx(max(total(g, h) for g in swaps for h in product(swaps, repeat=2)))


HALVES = Planes((0, 1, 2, 3), (4, 5, 6, 7))
TURNS = {
    "none": "none",
    "halves": HALVES,
    "neighbours": Planes((0, 2, 4, 6), (1, 3, 5, 7)),
    "partial": Planes((0, 1), (2, 3)),
    "any": "any",
}


@pytest.mark.parametrize("how", TURNS.values(), ids=TURNS)
def test_rotation_reaches_the_gain(how):
    """R is orthogonal and reaches the computed gain, which no allowed map exceeds. Rotations in planes commute with
    positions."""
    generator = torch.Generator().manual_seed(0)
    cross = torch.randn(5, 8, 8, generator=generator).double()
    turned = rotation(cross, how)
    close(turned @ turned.mT, torch.eye(8).double().expand(5, 8, 8))
    close((turned * cross).sum((-2, -1)), gain(cross, how))
    assert (gain(cross, "none") <= gain(cross, how) + 1e-9).all()
    assert (gain(cross, how) <= gain(cross, "any") + 1e-9).all()
    if isinstance(how, Planes):
        for angle in torch.linspace(0, 6.3, 50).double():
            position = torch.eye(8).double()
            for place, (i, j) in enumerate(zip(how.first, how.second, strict=True)):
                t = angle * (place + 1)
                position[i, i] = position[j, j] = t.cos()
                position[i, j], position[j, i] = -t.sin(), t.sin()
            close(turned @ position, position @ turned)
            assert ((position * cross).sum((-2, -1)) <= gain(cross, how)).all()


def test_cross_correlation_streams():
    """Correlation over batches equals that over all tokens, for any means; constants have correlation zero."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(90, n, generator=generator).double() * 3 + 50 for n in (4, 5))
    x[:, 2] = 0.1
    moments = CrossCorrelation()
    for part in torch.arange(90).split(13):
        moments.update(x[part], y[part])
    expected = torch.corrcoef(torch.cat([x, y], 1).T)[:4, 4:].nan_to_num(0)
    expected[2] = 0
    torch.testing.assert_close(moments.value(), expected)
