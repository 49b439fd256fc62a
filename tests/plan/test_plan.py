"""Plans survive JSON, refuse impossible values, and need no torch."""

import json
import subprocess
import sys

import pytest

from hf_layerfuse import Drop, Fuse, Plan, PlanError
from hf_layerfuse.plan import Slot, Source, Tie

EDITS = (Fuse("layer", (0, 1)), Fuse("mlp", (2, 5), "share", "freeze"), Drop("attention", 3), Drop("layer", 4))


def test_round_trip():
    """A plan survives JSON with its notes, and a config carries it without them."""
    plan = Plan("gpt2", 6, EDITS, {"why": "because"})
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.notes.extra == {"why": "because"}
    assert Plan.from_dict(plan.to_dict(notes=False)) == plan
    assert "notes" not in plan.to_dict(notes=False)
    assert "kinds" not in plan.to_dict()
    conv = Plan("resnet", 6, (Fuse("conv", (0, 1)),), kinds=("conv",))
    assert Plan.from_json(conv.to_json()) == conv


def test_rank_and_mode_reach_the_layout():
    """Residuals and bases are ties with a rank; fields that an edit does not use are left out of the JSON."""
    edits = (Fuse("layer", (0, 2), "share", "mean", rank=4), Fuse("mlp", (1, 3), "basis", rank=8), Fuse("mlp", (4, 5)))
    plan = Plan("gpt2", 6, edits)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.layout().ties == (
        Tie("attention", (0, 2), Source((0, 2), "mean"), "share", 4),
        Tie("mlp", (0, 2), Source((0, 2), "mean"), "share", 4),
        Tie("mlp", (1, 3), Source((1, 3)), "basis", 8),
    )
    assert not plan.layout().is_stock
    assert ["rank" in edit for edit in plan.to_dict()["edits"]] == [True, True, False]


def test_names_blocks_by_layer_and_kind_only():
    """The JSON has no parameter name, because ViT has other names on disk than in memory."""
    text = Plan("vit", 6, EDITS).to_json()
    assert "." not in text
    assert "weight" not in text


def test_file(tmp_path):
    """`load` reads the file that `to_json` wrote, and names a missing file."""
    path = tmp_path / "plan.json"
    path.write_text(Plan("gpt2", 6, EDITS).to_json())
    assert Plan.load(path) == Plan("gpt2", 6, EDITS)
    with pytest.raises(PlanError, match="no plan at"):
        Plan.load(tmp_path / "other.json")


def test_layout():
    """Layers close up after fused and dropped ones; ties name positions in the result."""
    layout = Plan("gpt2", 6, EDITS).layout()
    assert layout.slots == (
        Slot((0, 1), {"attention": Source((0, 1)), "mlp": Source((0, 1))}),
        Slot((2,), {"attention": Source((2,)), "mlp": Source((2,))}),
        Slot((3, 4), {"attention": None, "mlp": Source((3,))}),
        Slot((5,), {"attention": Source((5,)), "mlp": Source((5,))}),
    )
    assert layout.ties == (Tie("mlp", (1, 3), Source((2, 5), "freeze")),)
    assert not layout.is_stock
    assert Plan("gpt2", 6, (Drop("attention", 1), Drop("mlp", 1))).layout().is_stock
    assert not Plan("gpt2", 6, (Drop("attention", 1),)).layout().is_stock


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan("gpt2", 6, (Drop("layer", 6),)), "layers 0 to 5"),
        (lambda: Plan("gpt2", 6, (Drop("layer", -1),)), "layers 0 to 5"),
        (lambda: Plan("gpt2", 6, (Drop("mlp", 1), Fuse("layer", (1, 2)))), "both claim the mlp block of layer 1"),
        (lambda: Plan("gpt2", 2, (Drop("attention", 0), Drop("attention", 1))), "every attention block"),
        (lambda: Fuse("layer", (1,)), "two or more"),
        (lambda: Fuse("layer", (2, 1)), "ascending"),
        (lambda: Fuse("layer", (1, 3)), "neighbours"),
        (lambda: Fuse("head", (1, 2)), "allowed: 'layer', 'attention', 'cross', 'mlp'"),
        (lambda: Fuse("mlp", (1, 2), "wide"), "allowed: 'depth', 'share'"),
        (lambda: Fuse("mlp", (1, 2), "share", "median"), "allowed: 'mean', 'weighted', 'freeze', 'mix', 'telescope'"),
        (lambda: Drop("head", 1), "Drop.kind"),
        (lambda: Fuse("mlp", (1, 2), "share", rank=-1), "rank is -1: use a whole number"),
        (lambda: Fuse("mlp", (1, 2), "share", rank=2.0), "rank is 2.0: use a whole number"),
        (lambda: Fuse("mlp", (1, 2), rank=4), "rank is 4 in depth mode"),
        (lambda: Fuse("mlp", (1, 2), "basis"), "mode='basis' needs Fuse.rank"),
    ],
)
def test_refuses(make, message):
    """Each impossible edit is refused with the allowed values."""
    with pytest.raises(PlanError, match=message):
        make()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"format_version": 2}, "upgrade"),
        ({"model_type": "gpt2"}, "no format_version"),
        (["edits"], "no format_version"),
        ({"format_version": 1, "model_type": "gpt2"}, "num_layers|edits"),
        ({"format_version": 1, "model_type": "gpt2", "num_layers": 3, "edits": [{"edit": "melt"}]}, "fuse, drop"),
        ({"format_version": 1, "model_type": "gpt2", "num_layers": 3, "edits": [{"edit": "drop"}]}, "not a readable"),
        ({"format_version": 1, "model_type": "gpt2", "num_layers": 3, "edits": 3}, "not a readable"),
    ],
)
def test_refuses_damaged_json(tree, message):
    """A newer format, or JSON that is not a plan, gives a clear error instead of a KeyError."""
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(tree))
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json("{")


def test_needs_no_torch():
    """`hf_layerfuse.plan` imports nothing heavier than the standard library, errors included."""
    code = (
        "import importlib.util as u, sys, types\n"
        "package = types.ModuleType('hf_layerfuse')\n"
        "package.__path__ = list(u.find_spec('hf_layerfuse').submodule_search_locations)\n"
        "sys.modules['hf_layerfuse'] = package\n"
        "import hf_layerfuse.plan\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
