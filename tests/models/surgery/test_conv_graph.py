"""Merged convolutions compute the same function as before, for any network and image."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import CONV_GRAPHS, NETWORKS, conv_graph_of, merge_plan, network, some_merge_plan, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_layerfuse import (
    AutoFusedModel,
    Drop,
    HealRecipe,
    Linearize,
    MergeConvs,
    Plan,
    PlanError,
    UnsupportedModelError,
    apply,
    architecture_for,
    expand,
    fuse,
    heal,
    merge_convs,
    verify,
)
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.models.architectures import ConvGraphArchitecture
from hf_layerfuse.models.modules.conv import PaddedConv2d, Parts
from hf_layerfuse.plan import CONV_GRAPH_KINDS

RESNET34 = ResNetConfig(layer_type="basic", depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 256, 512])


def logits(model, height: int = 48, width: int = 48) -> torch.Tensor:
    images = torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    with torch.inference_mode():
        return model(pixel_values=images).logits


def assert_equal(ours, theirs, tolerance: float) -> None:
    """Compare relative to the variation between images, because large parts of random logits are the same for all
    images."""
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= tolerance * (theirs - theirs.mean(0)).abs().max()


# the one of most layers is left to the longer run too
SMALL = [pytest.param(name, marks=pytest.mark.slow) if name == "mobilenet" else name for name in CONV_GRAPHS]


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.tuples(st.integers(33, 70), st.integers(33, 70)))
def test_merged_is_unmerged(name, seed, size):
    """One convolution computes the same as the kept ones, for images of all sizes, merged at once or later."""
    model = network(name)
    plan = some_merge_plan(model, seed, merged=False)
    whole = replace(plan, edits=tuple(replace(edit, merged=True) for edit in plan.edits))
    left_open = apply(model, plan)
    expected = logits(left_open, *size)
    assert_equal(logits(apply(model, whole), *size), expected, 1e-9)
    if plan.edits:
        merged, found = merge_convs(left_open)
        assert found == whole
        assert_equal(logits(merged, *size), expected, 1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_a_merged_model_is_a_model(name):
    """Merged models, and models with open segments, save and reload to the bit, have gradients, and can be exported. In
    float32, merged and unmerged outputs are equal up to rounding."""
    model = network(name)
    plan = some_merge_plan(model, 3)
    merged = apply(model, plan)
    left_open = apply(model, replace(plan, edits=tuple(replace(edit, merged=False) for edit in plan.edits)))
    expected = logits(left_open.float())
    assert (logits(merged.float()) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert merged.num_parameters() == sum(parameter.numel() for parameter in merged.parameters())
    for small in (merged, left_open):
        assert type(small).__name__ == f"Fused{type(model).__name__}"
        assert verify(small)["reload"] == 0
        inputs = dummy_inputs(small)
        exported = torch.export.export(small, (), dict(inputs), strict=False).module()
        torch.testing.assert_close(prediction(exported(**inputs)), prediction(small(**inputs)))
        prediction(small.train()(**inputs)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in small.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_an_empty_plan_changes_nothing(name):
    model = network(name)
    assert torch.equal(logits(apply(model, merge_plan(model))), logits(model))


def test_moved_padding_changes_the_border_alone():
    """Without activations in between, a merged segment computes the same except at the border."""
    model = copy.deepcopy(network("cifar"))
    for place in (0, 1):
        model.layers[place].act1 = nn.Identity()
    model.layers[0].act = nn.Identity()
    edit = MergeConvs(0, 4, (1, 2, 3, 4), merged=False)
    small = apply(network("cifar"), merge_plan(model, edit))
    images = torch.randn(2, 4, 20, 20, dtype=torch.float64)
    with torch.inference_mode():
        ours, theirs = (m.layers[1](m.layers[0](images)) for m in (small, model))
    torch.testing.assert_close(ours[..., 4:-4, 4:-4], theirs[..., 4:-4, 4:-4], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(ours, theirs)


def test_a_branch_of_which_nothing_is_left_adds_nothing():
    """A residual block without convolutions returns its input once, not twice."""
    model = network("cifar")
    small = apply(model, merge_plan(model, MergeConvs(0, 4, (4,), merged=False)))
    block, images = small.layers[0], torch.rand(1, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(block(images), images)
    assert isinstance(block, Parts)
    assert not list(block.parameters())


def test_convolutions_are_taken_out():
    """The activation of a removed convolution stays. A block without convolutions returns its input. A convolution that
    changes the shape cannot be removed."""
    model = network("cifar")
    small = apply(model, merge_plan(model, MergeConvs(0, 1, ()), MergeConvs(1, 2, ()), MergeConvs(2, 3, ())))
    images = torch.rand(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(small.layers[0](images), images)
    block = copy.deepcopy(model.layers[1])
    block.conv1 = block.bn1 = nn.Identity()
    torch.testing.assert_close(small.layers[1](images), block(images))
    assert verify(small)["reload"] == 0
    with pytest.raises(PlanError, match="leaves out convolution 7, which changes the shape"):
        apply(model, merge_plan(model, MergeConvs(6, 7, ())))


def test_a_linear_bottleneck_ends_with_an_activation_when_it_is_merged():
    """As published, the activation follows the sum, if there is one."""
    model = network("mobilenet")
    units = architecture_for(model, ConvGraphArchitecture).convolutions(model).units
    inside = [i for i, unit in enumerate(units) if unit.act == "mobilenet_v2.layer.1.activation"]
    small = apply(model, merge_plan(model, MergeConvs(inside[0] - 2, inside[0], (inside[0],))))
    block = small.mobilenet_v2.layer[1]
    assert isinstance(block.activation, nn.ReLU6)
    hidden = torch.randn(2, block.expand_1x1.convolution.in_channels, 9, 9, dtype=torch.float64)
    assert block(hidden).min() == 0
    assert block.adds
    second = next(i for i, unit in enumerate(units) if unit.act.startswith("mobilenet_v2.layer.2.reduce"))
    edit = MergeConvs(second - 2, second, (second - 1, second))
    small = apply(model, merge_plan(model, edit))
    assert isinstance(small.mobilenet_v2.layer[2].reduce_1x1.activation, nn.ReLU6)


def test_depthwise_convolutions_stay_depthwise():
    """Only depthwise convolutions merge into a depthwise one; padding that differs by side is kept."""
    torch.manual_seed(0)
    model = network("mobilenet")
    graph = conv_graph_of(model)
    found = [(i, j, kept) for i, j, merged, kept in graph.table() if merged.depthwise and j - i > 1]
    i, j, kept = found[-1]
    small = apply(model, merge_plan(model, MergeConvs(i, j, kept)))
    conv = small.get_submodule(architecture_for(model, ConvGraphArchitecture).convolutions(model).units[i + 1].conv)
    assert conv.groups == conv.in_channels
    assert isinstance(conv, PaddedConv2d)


def test_it_is_trained_while_it_is_open():
    """The usual order is open, heal, merge. The merged model equals the trained one, and can be trained further."""
    model = copy.deepcopy(network("basic")).float()
    small = apply(model, some_merge_plan(model, 5, merged=False))
    rows = [{"pixel_values": torch.randn(3, 48, 48), "labels": i % 3} for i in range(8)]
    before = copy.deepcopy(small.state_dict())
    recipe = HealRecipe(steps=2, batch_size=4, learning_rate=1e-2, mixed_precision="no")
    heal(small, DataLoader(rows, 4), recipe, teacher=model)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    merged, _ = merge_convs(small.eval())
    assert_equal(logits(merged), logits(small), 1e-4)
    heal(merged, DataLoader(rows, 4), recipe, teacher=model)


def test_a_checkpoint_is_loaded_as_it_was_saved(tmp_path):
    """`AutoFusedModel` and the Auto class load the checkpoint, with the plan in its config."""
    model = copy.deepcopy(network("mobilenet")).float()
    small = apply(model, some_merge_plan(model, 7))
    small.save_pretrained(tmp_path)
    loaded = AutoFusedModel.from_pretrained(tmp_path)
    assert Plan.from_dict(loaded.config.layerfuse_plan).edits == some_merge_plan(model, 7).edits
    assert torch.equal(logits(loaded), logits(small))
    network.cache_clear()


def test_plans_that_fit_nothing_are_refused():
    model = network("basic")
    for edits, reason in (
        ((MergeConvs(0, 3, (1, 2, 3)),), "cannot become one"),
        ((MergeConvs(2, 5, (3,)),), "cannot become one"),
        ((MergeConvs(0, 2, (1,)), MergeConvs(1, 4, (2,))), "both claim the convolution block of layer 2"),
        ((Drop("mlp", 1),), "has a kind that layers of 'resnet' do not have"),
        ((Drop("layer", 1),), "use MergeConvs"),
    ):
        with pytest.raises(PlanError, match=reason):
            apply(model, merge_plan(model, *edits))
    wide = next((i, j) for i, j in conv_graph_of(network("bottleneck")).segments() if j - i == 3)
    with pytest.raises(PlanError, match="which changes the shape: keep it"):
        apply(network("bottleneck"), merge_plan(network("bottleneck"), MergeConvs(*wide, (wide[1] - 1,))))
    for values, reason in (
        ((2, 2, (2,)), "a later end"),
        ((-2, 0, (0,)), "a later end"),
        ((0, 2, ()), "one or more of the convolutions 1 to 2"),
        ((1, 2, (1,)), "one or more of the convolutions 2 to 2"),
        ((0, 2, (2, 1)), "in ascending order"),
        ((0, 2, (3,)), "one or more of the convolutions"),
    ):
        with pytest.raises(PlanError, match=reason):
            MergeConvs(*values)
    with pytest.raises(PlanError, match="for 3 convolutions, the model has 15"):
        apply(model, Plan("resnet", 3, (), kinds=CONV_GRAPH_KINDS))
    with pytest.raises(PlanError, match="the plan is for 'mobilenet_v2'"):
        apply(model, replace(merge_plan(model), model_type="mobilenet_v2"))
    with pytest.raises(PlanError, match="no segment of this ResNet"):
        merge_convs(model)


def test_each_architecture_says_what_it_can():
    """Convolutional chains cannot be fused, transformers cannot be merged, and merged models have no stock class."""
    model = network("basic")
    with pytest.raises(UnsupportedModelError, match="'resnet' has no layers to fuse"):
        fuse(model, keep_layers=1)
    bert = tiny_model("bert")
    with pytest.raises(UnsupportedModelError, match=r"'bert' has no convolutions to merge.*mobilenet_v2, resnet"):
        apply(bert, Plan("bert", 6, (MergeConvs(0, 2, (1,)),), kinds=CONV_GRAPH_KINDS))
    with pytest.raises(UnsupportedModelError, match=r"convolutions of FusedResNet.* were merged"):
        expand(apply(model, some_merge_plan(model, 1)))
    bent = copy.deepcopy(model)
    bent.resnet.encoder.stages[0].layers[1].shortcut = nn.ReLU()
    with pytest.raises(PlanError, match=r"the shortcut of .*layers\.1 is neither the identity nor"):
        apply(bent, merge_plan(model, MergeConvs(2, 4, (3, 4))))
    odd = copy.deepcopy(model)
    odd.resnet.encoder.stages[0].layers[0].layer[0].convolution.padding_mode = "reflect"
    with pytest.raises(UnsupportedModelError, match="only a square Conv2d with zero padding can be merged"):
        apply(odd, some_merge_plan(model, 1))


def test_plans_survive_json():
    plan = merge_plan(
        network("basic"),
        MergeConvs(0, 2, (1,)),
        MergeConvs(2, 4, (3, 4), merged=False),
    )
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_dict()["edits"] == [
        {"edit": "merge", "start": 0, "end": 2, "keep": (1,)},
        {"edit": "merge", "start": 2, "end": 4, "keep": (3, 4), "merged": False},
    ]
    with pytest.raises(PlanError, match="do not have"):
        replace(plan, edits=(Linearize(1),))


@pytest.mark.parametrize(
    ("make", "config", "segments", "entries"),
    [
        (ResNetForImageClassification, RESNET34, 62, 150),
        (MobileNetV2ForImageClassification, MobileNetV2Config(), 171, 391),
    ],
)
def test_architectures_see_the_published_graphs(make, config, segments, entries):
    """ResNet-34 and MobileNetV2 have the published numbers of segments and entries."""
    with torch.device("meta"):
        model = make(config)
    graph = conv_graph_of(model)
    assert len(graph.segments()) == segments
    assert len(list(graph.table())) == entries
