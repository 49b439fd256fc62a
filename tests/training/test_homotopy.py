"""`Blend` activations: the original at a = 0, one linear map at a = 1, and training in between."""

import json

import pytest
import torch
from accelerate import Accelerator
from helpers import GATED, LAYERS, ROOT, TINY, on_two_processes, predicted, some_batches, tiny_model
from torch import nn
from torch.utils.data import DataLoader
from trainings import blended, rows, trained

from hf_layerfuse import (
    Blend,
    CheckpointError,
    CollapseRecipe,
    Drop,
    Fuse,
    HealRecipe,
    HealScope,
    LayerFuseError,
    Linearize,
    Plan,
    PlanError,
    RecipeError,
    UnsupportedModelError,
    apply,
    collapse,
    expand,
    heal,
    linearize_mlps,
    search_collapse,
    verify,
)
from hf_layerfuse.errors import DataError
from hf_layerfuse.models.activation_fit import fit_lines, watch_activations
from hf_layerfuse.models.architectures import architecture_for
from hf_layerfuse.models.modules.homotopy import Homotopy
from hf_layerfuse.training.homotopy import HomotopyPenalty

PLAIN = sorted(set(TINY) - set(GATED))
POINTWISE = ["relu", "gelu", "gelu_new", "silu", "tanh", "quick_gelu"]


def seen_by(model, layer: int, batches) -> list[torch.Tensor]:
    """Inputs and outputs of the activation of a layer, (tokens, units) each."""
    seen = []
    watch_activations(model, architecture_for(model), [layer], batches, lambda _, z, y: seen.append((z, y)))
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


def set_a(model, value: float) -> None:
    for a in HomotopyPenalty(model, 0.0).parameters:
        a.data.fill_(value)


@pytest.mark.parametrize("model_type", PLAIN)
def test_at_the_start_it_is_the_original(model_type):
    """At a = 0, the model is bit-equal to the original; it saves, reloads and decodes like the original."""
    model, student = blended(model_type)
    assert torch.equal(predicted(student), predicted(model))
    assert verify(student)["reload"] == 0
    with pytest.raises(UnsupportedModelError, match="layers 1, 4 are linear, or becoming linear"):
        expand(student)


@pytest.mark.usefixtures("fresh_accelerate")
def test_from_the_front_door():
    """`collapse` by homotopy, `heal` and `linearize_mlps` make the cheapest MLPs linear, without a warning."""
    model = tiny_model("gpt2", "GPT2LMHeadModel")
    student = collapse(model, count=2, method="homotopy", batches=some_batches(model))
    assert torch.equal(predicted(student), predicted(model))
    chosen = [edit.layer for edit in search_collapse(model, CollapseRecipe(count=2), some_batches(model)).plan.edits]
    recipe = HealRecipe(steps=6, learning_rate=1e-3, homotopy_strength="auto", mixed_precision="no")
    heal(student, DataLoader(rows(12), 4), recipe, teacher=model, scope=HealScope(threshold=0.05))
    small, plan = linearize_mlps(student)
    assert plan.edits == tuple(map(Linearize, chosen))
    assert small.num_parameters() < model.num_parameters()
    with pytest.raises(UnsupportedModelError, match="gated"):
        collapse(tiny_model("llama"), count=2, method="homotopy", order="deepest")


@pytest.mark.parametrize("act", POINTWISE)
def test_every_pointwise_activation(act):
    """Every activation of a config is bit-equal at a = 0, and a line at a = 1."""
    model, student = blended("vit", hidden_act=act)
    assert torch.equal(predicted(student), predicted(model))
    homotopy = next(part for part in student.modules() if isinstance(part, Homotopy))
    z = torch.randn(5, len(homotopy.slope))
    assert torch.equal(homotopy(z), homotopy.act(z))
    set_a(student, 1.0)
    torch.testing.assert_close(homotopy(z), homotopy.slope * z + homotopy.offset)


@pytest.mark.parametrize("model_type", PLAIN)
def test_at_the_end_it_is_one_map(model_type):
    """At a = 1, the model merged in float64 computes the same to 1e-6; it saves and reloads."""
    model, student = blended(model_type)
    student = student.double()
    set_a(student, 1.0)
    expected = predicted(student)
    straight, plan = linearize_mlps(student)
    assert (predicted(straight) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert straight.num_parameters() < model.num_parameters()
    assert plan.edits == (Linearize(1), Linearize(4))
    assert Plan.from_dict(straight.config.layerfuse_plan) == plan
    assert verify(straight)["reload"] == 0
    assert not HomotopyPenalty(straight, 0.0).activations
    if architecture_for(model).adds is not None:
        folded, plan = linearize_mlps(student, fold=True)
        assert (predicted(folded) - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert plan.edits == (Linearize(1, fold=True), Linearize(4, fold=True))
    else:
        with pytest.raises(UnsupportedModelError, match="cannot be folded"):
            linearize_mlps(student, fold=True)


def test_other_edits_stay():
    """Shared, dropped and linear blocks of the same plan are unchanged, and layers keep their places."""
    edits = (Drop("layer", 0), Blend(1), Fuse("layer", (2, 3), "share", rank=2), Linearize(4, rank=4), Blend(5))
    _, student = blended("gpt2", *edits, head="GPT2LMHeadModel")
    set_a(student, 1.0)
    straight, plan = linearize_mlps(student, batches=some_batches(student))
    assert plan.edits == (edits[0], Linearize(1), *edits[2:4], Linearize(5))
    torch.testing.assert_close(predicted(straight), predicted(student), rtol=1e-4, atol=1e-5)
    blocks = straight.transformer.h
    assert blocks[1].mlp.c_fc.weight is blocks[2].mlp.c_fc.weight
    assert verify(straight)["reload"] == 0


def test_lines_come_from_what_is_seen():
    """Slope and offset are the least-squares line of each unit; padding is ignored."""
    model = tiny_model("bert")
    batches = some_batches(model)
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:, -3:] = 0
    architecture = architecture_for(model)
    slope, offset = fit_lines(model, architecture, [2], batches)[2]
    z, y = seen_by(model, 2, batches)
    assert len(z) == sum(int(batch["attention_mask"].sum()) for batch in batches)
    for unit in (0, 7, 40):
        x = torch.stack([z[:, unit], torch.ones_like(z[:, unit])], dim=1)
        expected = torch.linalg.lstsq(x, y[:, unit : unit + 1]).solution.flatten()
        torch.testing.assert_close(torch.stack([slope[unit], offset[unit]]), expected)
    with pytest.raises(DataError, match="hold no tokens"):
        fit_lines(
            model, architecture, [2], [{**batch, "attention_mask": 0 * batch["attention_mask"]} for batch in batches]
        )


def test_published_variant_is_prelu():
    """`faithful` replaces any activation by PReLU with slope 0.01, and lines go through the origin."""
    model, student = blended("gpt2", Blend(2, faithful=True))
    homotopy = student.base_model.h[2].mlp.act
    z = torch.randn(3, 4, len(homotopy.slope))
    torch.testing.assert_close(homotopy(z), nn.functional.prelu(z, torch.tensor([0.01])))
    assert not torch.equal(predicted(student), predicted(model))
    set_a(student, 0.4)
    torch.testing.assert_close(homotopy(z), nn.functional.prelu(z, torch.tensor([0.4])))


def test_what_is_no_line_yet_is_refused():
    """The error names an a below the threshold with its layer, and the loss of the last step is measured."""
    _, student = blended("bert")
    first, second = HomotopyPenalty(student, 0.0).parameters
    first.data.fill_(0.97)
    second.data.fill_(0.69)
    with pytest.raises(LayerFuseError, match=r"layer 4, a = 0\.690; a must be 0\.950 or more"):
        linearize_mlps(student)
    batches = some_batches(student)
    _, plan = linearize_mlps(student, threshold=0.4, batches=batches)
    rows = plan.notes.homotopy
    assert [row.layer for row in rows] == [1, 4]
    assert rows[1].a == pytest.approx(0.69)
    # f_a - f_1 = (1 - a) W2 (act(z) - line), relative to f_a
    homotopy = student.base_model.encoder.layer[4].intermediate.intermediate_act_fn
    out = student.base_model.encoder.layer[4].output.dense
    z = seen_by(student, 4, batches)[0].float()
    with torch.inference_mode():
        lost = 0.31 * (homotopy.act(z) - homotopy.line(z)) @ out.weight.T
        assert rows[1].relative_error == pytest.approx((lost.norm() / out(homotopy(z)).norm()).item(), rel=1e-3)
    model = tiny_model("bert")
    for other in (model, apply(model, Plan("bert", LAYERS, (Linearize(1),)))):
        with pytest.raises(PlanError, match="apply Blend edits first"):
            linearize_mlps(other)


@pytest.mark.parametrize("model_type", GATED)
def test_gated_mlps_are_refused(model_type):
    """With a linear activation, gated MLPs are still products; the error says so, and what to do instead."""
    with pytest.raises(UnsupportedModelError, match=r"gated.*still products.*collapse"):
        apply(tiny_model(model_type), Plan(model_type, LAYERS, (Blend(1),)))


@pytest.mark.usefixtures("fresh_accelerate")
class TestTraining:
    def test_pulls_to_the_line(self):
        """With `auto`, every a ends near 1, each step follows the formula, and the result can be merged."""
        student, report = trained(threshold=0.05)
        assert [step for step, _ in report.homotopy] == [0, 4, 8, 12]
        assert set(report.homotopy[0][1].values()) == {0.0}
        assert all(a > 0.95 for a in report.homotopy[-1][1].values())
        assert report.best_step == 12, "earlier weights are no lines, whatever their validation loss"
        straight, _ = linearize_mlps(student)
        assert straight.num_parameters() < student.num_parameters()

    def test_the_pull_is_decoupled(self):
        """With a zero gradient, a follows the formula with the rate of each step, without weight decay."""
        penalty = HomotopyPenalty(blended("vit")[1], strength=3.0)
        expected = 0.2
        for a in penalty.parameters:
            a.data.fill_(expected)
        for rate in (0.01, 0.02, 0.005):
            penalty.step(rate)
            expected -= 2 * rate * 3.0 * (expected - 1)
        assert list(penalty.values.values()) == pytest.approx([expected] * 2)
        penalty.step(10.0)
        assert set(penalty.values.values()) == {1.0}, "no further than to the line"

    @pytest.mark.slow
    def test_one_after_the_other(self):
        """With `progressive`, the last layer reaches a line before the one before it begins, and all are lines at the
        end."""
        _, report = trained(steps=40, threshold=0.05, progressive=True)
        first, last = next(iter(report.homotopy[0][1])), list(report.homotopy[0][1])[-1]
        early = dict(report.homotopy)[12]  # rates are high at first: more than a quarter of the training is done
        assert early[last] > 0.9
        assert early[first] == 0.0
        assert all(a > 0.95 for a in report.homotopy[-1][1].values())

    def test_trackers_see_every_a(self, monkeypatch):
        """Trackers receive the a of each activation in every step, with the loss."""
        rows = []
        monkeypatch.setattr(Accelerator, "log", lambda self, values, step=None: rows.append((step, values)))
        _, report = trained(threshold=0.05)
        names = list(report.homotopy[0][1])
        seen = {step: [values[f"homotopy/{name}"] for name in names] for step, values in rows if "train/loss" in values}
        assert list(seen) == list(range(1, 13))
        assert seen[12] == list(report.homotopy[-1][1].values())

    def test_as_a_regulariser(self):
        """With a weak penalty and no merge, a ends between 0 and 1, the best weights stay, and the model reloads."""
        student, report = trained(strength=5.0)
        ends = report.homotopy[-1][1].values()
        assert all(0 < a < 0.95 for a in ends)
        assert report.best_step == min(report.validation_loss, key=lambda row: row[1])[0]
        assert verify(student)["reload"] == 0

    def test_without_a_pull_the_task_decides(self):
        """With strength 0, a is trained like any other parameter, but stays in [0, 1] and does not decay."""
        _, report = trained(strength=0.0)
        assert all(0 <= a < 0.2 for a in report.homotopy[-1][1].values())

    def test_goes_on_where_it_was_killed(self, tmp_path, interrupt):
        """An interrupted training ends with the same weights, the same a and the same record."""
        whole, expected = trained(threshold=0.05)
        interrupt(7)
        with pytest.raises(InterruptedError):
            trained(folder=tmp_path / "run", threshold=0.05)
        student, report = trained(folder=tmp_path / "run", threshold=0.05)
        assert report.homotopy == expected.homotopy
        assert report.best_step == expected.best_step
        ours, theirs = student.state_dict(), whole.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        with pytest.raises(CheckpointError, match="threshold was"):
            trained(folder=tmp_path / "run", threshold=0.1)

    def test_no_activation_to_move_is_refused(self):
        """A penalty for a model without `Blend` activations is an error."""
        model = tiny_model("gpt2", "GPT2LMHeadModel")
        with pytest.raises(RecipeError, match="apply Blend edits first"):
            heal(model, DataLoader(rows(12), 4), HealRecipe(steps=1, kl_weight=0.0, homotopy_strength=10.0))


ON_TWO_PROCESSES = """
import dataclasses, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from accelerate import PartialState
from trainings import trained
from hf_layerfuse import Linearize, linearize_mlps

student, report = trained(threshold=0.05, progressive=True)
plan = linearize_mlps(student)[1]
assert all(isinstance(edit, Linearize) for edit in plan.edits)
if PartialState().is_main_process:
    Path(sys.argv[1], "report.json").write_text(json.dumps(dataclasses.asdict(report)))
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_deepspeed_pulls_as_data_parallelism_does(tmp_path):
    """The optimiser of DeepSpeed updates copies of the parameters, and the penalty is written to them too."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: it is the extra `deepspeed`")
    reports = []
    for kind in ("DEEPSPEED", "MULTI_CPU"):
        on_two_processes(tmp_path / kind, ON_TWO_PROCESSES, tmp_path / kind, ROOT / "tests", kind=kind)
        reports.append(json.loads((tmp_path / kind / "report.json").read_text()))
        assert reports[-1]["distributed_type"] == kind
        assert reports[-1]["num_processes"] == 2
    ours, theirs = reports
    assert ours["train_loss"] == [[step, pytest.approx(loss, rel=1e-4)] for step, loss in theirs["train_loss"]]
    assert ours["homotopy"] == [[step, pytest.approx(values, abs=1e-4)] for step, values in theirs["homotopy"]]


@pytest.mark.parametrize(
    "values",
    [{"homotopy_strength": -1.0}, {"homotopy_strength": "soon"}, {"homotopy_strength": 1e4}, {"progressive": True}],
)
def test_strengths_that_mean_nothing_are_refused(values):
    with pytest.raises(RecipeError, match="homotopy_strength"):
        HealRecipe(**values)
