"""Pictures show the edits of a plan, and are readable on light and dark pages."""

import copy
from dataclasses import replace

import pytest
from helpers import TINY, network, tiny_model
from PIL import Image
from runs import REPORT

from hf_layerfuse import Drop, Fuse, FusionRecipe, Linearize, MergeConvs, Plan, apply, architecture_for, plan_fusion
from hf_layerfuse.pipeline.report.plots import _COLOURS, _GREY, Quality, _made_of, draw, plot_quality
from hf_layerfuse.plan import CONV_GRAPH_KINDS, TRANSFORMER, EditLoss, PlanNotes

MIXED = Plan("gpt2", 6, (Linearize(1), Drop("attention", 2), Drop("layer", 3), Fuse("layer", (4, 5))))
SHARED = Plan("gpt2", 6, (Fuse("mlp", (0, 3, 5), mode="share"), Fuse("attention", (1, 2), mode="basis", rank=2)))
MERGED = Plan(
    "resnet", 9, (MergeConvs(0, 2, (1, 2)), MergeConvs(3, 4, ()), MergeConvs(4, 8, (6,))), kinds=CONV_GRAPH_KINDS
)


def test_what_became_of_what() -> None:
    """Each block of the result has its original blocks; removed blocks are in none."""
    assert _made_of(MIXED, "mlp") == [((0,), False), ((1,), True), ((2,), False), ((4, 5), False)]
    assert _made_of(MIXED, "attention") == [((0,), False), ((1,), False), ((4, 5), False)]
    assert _made_of(SHARED, "mlp") == [((layer,), False) for layer in range(6)]
    assert [layers for layers, _ in _made_of(MERGED, "convolution")] == [(0,), (1, 2), (3,), (5, 6, 7, 8)]


@pytest.mark.parametrize("model_type", TINY)
def test_as_many_blocks_as_the_result_has(model_type) -> None:
    model = tiny_model(model_type)
    plan = plan_fusion(model, FusionRecipe(keep_layers=3))
    result = apply(model, plan)
    for kind in TRANSFORMER:
        blocks = [block for block in architecture_for(model).blocks(result) if block.kind == kind]
        assert len(_made_of(plan, kind)) == len(blocks)


@pytest.mark.parametrize("plan", [MIXED, SHARED, MERGED], ids=["mixed", "shared", "merged"])
@pytest.mark.parametrize("healed", [None, REPORT, replace(REPORT, homotopy=[(0, {"a": 0.9})])])
def test_pictures_are_written(tmp_path, plan, healed) -> None:
    """Pictures with content are written, with a transparent background, and at most twice the width of a card."""
    drawn = draw(plan, healed, tmp_path)
    assert set(drawn) == {path.name for path in tmp_path.iterdir()}
    expected = {"plan.png"} | ({"training.png"} if healed else set())
    assert expected | ({"homotopy.png"} if healed and healed.homotopy else set()) == set(drawn)
    for name in drawn:
        with Image.open(tmp_path / name) as picture:
            assert picture.getpixel((0, 0))[3] == 0
            assert 500 < picture.width < 1600


def test_distances_are_drawn_with_what_was_grouped(tmp_path) -> None:
    """This also works for groups that are not runs, and for layers that can never become one."""
    for cluster in ("adjacent", "global"):
        plan = plan_fusion(tiny_model("bert"), FusionRecipe(ratio=0.5, mode="share", cluster=cluster))
        assert "distances.png" in draw(plan, None, tmp_path)
    model = copy.deepcopy(network("cifar")).float()
    plan = plan_fusion(model, FusionRecipe(keep_layers=4))
    assert any(None in row for row in plan.notes.distances["conv"])
    assert "distances.png" in draw(plan, None, tmp_path)


@pytest.mark.parametrize("spread", [0, 1e9, *(pytest.param(small, marks=pytest.mark.slow) for small in (1e-9, 1e-3))])
def test_distances_of_any_size_are_drawn(tmp_path, spread) -> None:
    """This also works if all distances are nearly equal, or if there is only one."""
    for count in (2, 6):
        apart = [[0.0 if i == j else 0.985 + spread * (i + j) for i in range(count)] for j in range(count)]
        plan = Plan("gpt2", count, (Fuse("layer", (0, 1)),), notes={"distances": {"layer": apart}})
        assert "distances.png" in draw(plan, None, tmp_path)


@pytest.mark.parametrize("far", [0.99, 0.5])
def test_losses_replace_distances_without_contrast(tmp_path, far) -> None:
    """Losses of candidates are drawn, down to 0. Distances that are nearly equal are drawn only without losses."""
    apart = [[0.0, 0.98, far], [0.98, 0.0, 0.98], [far, 0.98, 0.0]]
    losses = [EditLoss(Linearize(layer), 0.1**layer) for layer in range(3)]
    plan = Plan("gpt2", 3, (Linearize(1),), PlanNotes(distances={"layer": apart}, losses=losses))
    drawn = {"plan.png", "candidates.png"} | ({"distances.png"} if far == 0.5 else set())
    assert set(draw(plan, None, tmp_path)) == drawn
    (tmp_path / "candidates.png").unlink()
    perfect = [EditLoss(Linearize(layer), loss) for layer, loss in enumerate((0.0, 0.5, float("inf")))]
    none = replace(plan, notes=PlanNotes(losses=perfect, distances={"layer": apart}))
    assert "candidates.png" in draw(none, None, tmp_path)
    with Image.open(tmp_path / "candidates.png") as picture:
        assert 500 < picture.width < 1600


def test_groups_of_the_original_are_not_marked_among_fewer_layers(tmp_path) -> None:
    """After several rounds, distances are between fused layers, so the picture marks no groups of the original."""
    apart = [[0.0, 0.989371, 0.992524], [0.989371, 0.0, 0.993531], [0.992524, 0.993531, 0.0]]
    for edit in (Fuse("layer", (1, 2, 3, 4, 5)), Fuse("layer", (0, 5), mode="share")):
        assert "distances.png" in draw(Plan("gpt2", 6, (edit,), notes={"distances": {"layer": apart}}), None, tmp_path)


def test_quality_is_drawn_against_size(tmp_path) -> None:
    """Each model has a panel, with its knee, on any scale."""
    curves = {"fused": [50, 60, 90], "healed": [50, 52, 60]}
    panels = [Quality("one", "perplexity", [0, 0.25, 0.5], curves, 1, log=True)]
    panels.append(Quality("two", "accuracy", [0, 0.5], {"healed": [0.9, 0.8]}))
    for count in (1, 2):
        plot_quality(panels[:count], tmp_path / "quality.png")
        with Image.open(tmp_path / "quality.png") as picture:
            assert picture.getpixel((0, 0))[3] == 0
            assert 500 * count < picture.width < 700 * count


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colours_are_seen_on_light_and_dark_pages(page) -> None:
    """Contrast by WCAG 2.1 is at least 3 for graphics, and near 4.5 for text of these sizes."""
    for colour in (*_COLOURS, _GREY):
        light, dark = sorted((luminance(colour), luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > (4 if colour == _GREY else 3), colour
