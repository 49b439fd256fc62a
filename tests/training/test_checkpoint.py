"""An interrupted training resumes as if nothing had happened, and loses nothing."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, tracking
from accelerate.state import AcceleratorState, GradientState
from helpers import LAYERS, ROOT, on_two_processes, tiny_model
from torch.utils.data import DataLoader
from trainings import by_length, healed, models, recipe_of, rows, shuffled, weights

from hf_layerfuse import (
    CheckpointError,
    Drop,
    HealRecipe,
    LayerFuseError,
    Plan,
    RecipeError,
    TrainingError,
    apply,
    heal,
    heal_scope,
)
from hf_layerfuse.evaluation.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


def assert_equal(ours, theirs) -> None:
    ours, theirs = weights(ours), weights(theirs)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def uninterrupted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        whole = healed(None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return whole


# before the first step, in the middle of an accumulated step, next to each kind of checkpoint, and before the last
MOMENTS = [m if m in (1, 4, 5, 11, 18) else pytest.param(m, marks=pytest.mark.slow) for m in range(1, 19)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_anywhere_ends_the_same(tmp_path, interrupt, moment, uninterrupted):
    """Interrupted before any backward pass and started again, a training ends with the same weights and losses."""
    whole, expected = uninterrupted
    interruption = interrupt(moment)
    with pytest.raises(InterruptedError):
        healed(tmp_path / "run")
    torch.rand(7)  # a new process has other random states
    student, report = healed(tmp_path / "run")
    assert interruption.passes - moment == 18 - (moment - 1) // 4 * 4, "it did not go on from the last checkpoint"
    assert (report.train_loss, report.validation_loss) == (expected.train_loss, expected.validation_loss)
    assert_equal(student, whole)
    blocks = student.transformer.h
    assert blocks[1].mlp.c_fc.weight is blocks[3].mlp.c_fc.weight
    assert student.lm_head.weight is student.transformer.wte.weight


@pytest.mark.parametrize("moment", [11, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (3, 16))])
def test_batches_by_length_go_on_where_they_were(tmp_path, interrupt, moment):
    """Batches by length resume in the order of the interrupted epoch."""
    whole, expected = healed(None, batches=by_length)
    interrupt(moment)
    with pytest.raises(InterruptedError):
        healed(tmp_path / "run", batches=by_length)
    student, report = healed(tmp_path / "run", batches=by_length)
    assert report.train_loss == expected.train_loss
    assert_equal(student, whole)


_ON_TWO_PROCESSES = """
import json, os, sys
sys.path.insert(0, sys.argv[2])
import pytest, torch
from accelerate import Accelerator, PartialState
from trainings import by_length, healed, recipe_of, weights

recipe = recipe_of(hidden_weight=0.5, max_grad_norm=0.1)  # DeepSpeed clips by itself
whole, expected = healed(sys.argv[1] + "/whole", recipe, by_length)
backward, passes = Accelerator.backward, []

def stop(self, loss, **options):
    passes.append(loss)
    if len(passes) == 11:
        raise InterruptedError
    backward(self, loss, **options)

Accelerator.backward = stop
with pytest.raises(InterruptedError):
    healed(sys.argv[1] + "/run", recipe, by_length)
student, report = healed(sys.argv[1] + "/run", recipe, by_length)
assert len(passes) == 11 + 18 - 8, "it did not go on from the last checkpoint"
assert student.transformer.h[1].mlp.c_fc.weight is student.transformer.h[3].mlp.c_fc.weight
theirs = weights(whole)
found = {
    "processes": [report.num_processes, expected.num_processes],
    "type": report.distributed_type,
    "weights": max((value - theirs[name]).abs().max().item() for name, value in weights(student).items()),
    "losses": [report.train_loss, expected.train_loss],
}
if os.environ["RANK"] == "0":
    with open(sys.argv[1] + "/found.json", "w") as file:
        json.dump(found, file)
PartialState().destroy_process_group()
"""


def trained_by(folder: Path, kind: str) -> dict:
    on_two_processes(folder, _ON_TWO_PROCESSES, folder, ROOT / "tests", kind=kind)
    found = json.loads((folder / "found.json").read_text())
    assert found["processes"] == [2, 2]
    assert found["type"] == kind
    return found


def same(losses: list) -> list:
    return [[step, pytest.approx(loss, rel=1e-5)] for step, loss in losses]


@pytest.mark.slow
def test_two_processes_resume(tmp_path):
    """Two interrupted processes end with the weights of two that were not."""
    found = trained_by(tmp_path / "run", "MULTI_CPU")
    assert found["weights"] < 1e-6
    assert found["losses"][0] == same(found["losses"][1])


@pytest.mark.slow
def test_deepspeed_trains_as_data_parallelism_does(tmp_path):
    """ZeRO 2 gives the same losses, also after an interruption; shared weights stay shared."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: it is the extra `deepspeed`")
    found, plain = (trained_by(tmp_path / kind, kind) for kind in ("DEEPSPEED", "MULTI_CPU"))
    assert found["weights"] < 1e-6
    assert found["losses"][0] == same(found["losses"][1])
    assert found["losses"][1] == same(plain["losses"][1])


def test_nothing_is_said_of_shared_tensors(tmp_path, caplog):
    """Shared tensors are saved once, without a warning to the user."""
    healed(tmp_path / "run")
    assert not [record for record in caplog.records if "shared" in record.message]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from accelerate import Accelerator
from trainings import healed, recipe_of, weights
from safetensors.torch import save_file

folder = Path(sys.argv[1])
student, report = healed(folder / "run", recipe_of(steps=40, eval_every=1))
save_file({name: value.contiguous().clone() for name, value in weights(student).items()}, folder / "result.safetensors")
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(tmp_path):
    """A process that is killed repeatedly, at any moment, ends with the weights of an undisturbed one, to the bit."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen:
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, str(program), str(tmp_path / name), str(ROOT / "tests")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    generator = torch.Generator().manual_seed(0)
    killed = 0
    while not (tmp_path / "killed" / "result.safetensors").exists():
        process = start("killed")
        run = tmp_path / "killed" / "run"
        before = sorted(run.glob("step-*")) if run.exists() else []
        while process.poll() is None and (sorted(run.glob("step-*")) if run.exists() else []) == before:
            time.sleep(0.01)  # until it makes progress
        time.sleep(0.3 * torch.rand((), generator=generator).item())
        if process.poll() is None and killed < 8:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL)
    assert killed == 8
    results = [(tmp_path / name / "result.safetensors").read_bytes() for name in ("whole", "killed")]
    assert results[0] == results[1]


def test_the_best_weights_are_the_result(tmp_path):
    """The result has the weights of the lowest validation loss, not the last ones, with and without a folder."""
    recipe = recipe_of(
        steps=40, learning_rate=0.01, warmup_ratio=0.0, kl_weight=0.0, eval_every=8
    )  # it memorises noise
    for folder in (None, tmp_path / "run"):
        student, report = healed(folder, recipe, validation_batches=DataLoader(rows(4, seed=1)))
        losses = dict(report.validation_loss)
        assert report.best_step == min(losses, key=losses.get) < report.steps == 40
        with torch.no_grad():
            found = torch.stack([student(**batch).loss for batch in DataLoader(rows(4, seed=1))]).mean().item()
        assert found == pytest.approx(losses[report.best_step], rel=1e-5)
    kept = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert kept == sorted({f"step-{report.best_step:08d}", "step-00000040"})


def test_patience_ends_a_training(tmp_path):
    """Training stops after this number of validations without improvement; started again, it stays stopped."""
    recipe = recipe_of(learning_rate=0.2, warmup_ratio=0.0, steps=40, patience=2, max_grad_norm=100.0)
    student, report = healed(tmp_path / "run", recipe)
    assert report.steps < 40
    assert report.steps == report.best_step + 2 * recipe.eval_every
    again, second = healed(tmp_path / "run", recipe)
    assert second.steps == report.steps
    assert_equal(again, student)


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    """Repeating the call takes no step and gives the same weights."""
    student, report = healed(tmp_path / "run")
    monkeypatch.setattr(Accelerator, "backward", lambda *args: pytest.fail("it trained again"))
    again, second = healed(tmp_path / "run")
    assert second.train_loss == report.train_loss
    assert_equal(again, student)


@pytest.mark.parametrize("change", [{"steps": 12}, {"learning_rate": 1e-3}, {"seed": 1}])
def test_another_run_is_refused(tmp_path, change):
    """Checkpoints of other settings are neither resumed nor changed."""
    healed(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    options = {"seed": change.pop("seed")} if "seed" in change else {}
    with pytest.raises(CheckpointError, match=rf"{next(iter({**change, **options}))}.* was .* and is "):
        healed(tmp_path / "run", recipe_of(hidden_weight=0.5, **change), **options)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_run_is_known_by_the_same_things_as_ever(tmp_path):
    """Checkpoints name their run as those of 0.1.0 do, so that earlier ones resume."""
    healed(tmp_path, recipe_of(steps=0, hidden_weight=0.5), seed=3)
    run = json.loads((tmp_path / "run.json").read_text())
    own = {name: value for name, value in run.items() if not name.startswith(("heal.", "config."))}
    assert {f"heal.{field.name}" for field in dataclasses.fields(HealRecipe)} <= run.keys()
    assert own == {
        "seed": 3,
        "number of processes": 1,
        "weights at the start": fingerprint(models()[0]),
        "weights of the teacher": fingerprint(models()[1]),
        "frozen parameters": [],
        "threshold": None,
        "batches of an epoch": 4,
        "batch size": 3,
    }


def test_another_model_is_refused(tmp_path):
    """Checkpoints of a model with another plan are refused, even if the shapes are the same."""
    teacher = tiny_model("gpt2", "GPT2LMHeadModel")
    for dropped in (1, 4):
        student = apply(teacher, Plan("gpt2", LAYERS, (Drop("layer", dropped),)))
        arguments = student, shuffled(), recipe_of(kl_weight=0.0)
        if dropped == 1:
            heal(*arguments, checkpoints=tmp_path)
    with pytest.raises(CheckpointError, match="weights at the start was"):
        heal(*arguments, checkpoints=tmp_path)


def test_another_teacher_is_refused(tmp_path):
    """A training is not resumed with another teacher."""
    healed(tmp_path / "run")
    with pytest.raises(CheckpointError, match="weights of the teacher was"):
        healed(tmp_path / "run", teacher=tiny_model("gpt2", "GPT2LMHeadModel", seed=1))


def test_other_data_are_refused(tmp_path):
    healed(tmp_path / "run")
    with pytest.raises(CheckpointError, match="batches of an epoch was 4 and is 5"):
        healed(tmp_path / "run", batches=lambda: DataLoader(rows(14), 3, shuffle=True))


def test_a_folder_that_was_about_to_be_claimed(tmp_path):
    """If a process is killed while it writes the identity of its run, the same command starts."""
    (tmp_path / "run.tmp").write_text('{"heal.st')
    healed(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    """Nothing is written to a folder with other files."""
    (tmp_path / "thesis.tex").write_text("\\chapter{One}")
    with pytest.raises(CheckpointError, match="is not empty"):
        healed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    """A truncated file is reported as a damaged checkpoint."""
    healed(tmp_path / "run", recipe_of(steps=2))
    path = max((tmp_path / "run").glob("step-*")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot .*: SafetensorError.*Delete the whole folder"):
        healed(tmp_path / "run", recipe_of(steps=2))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, uninterrupted):
    """If the second checkpoint cannot be written, the first one is complete, and the error says what to do."""
    whole, _ = uninterrupted
    save, saves = Accelerator.save_state, 0

    def fill(self, output_dir, **options):
        nonlocal saves
        saves += 1
        save(self, output_dir, **options)
        if saves == 3:
            (Path(output_dir) / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Accelerator, "save_state", fill)
    with pytest.raises(LayerFuseError, match=r"No space left on device.*Make room"):
        healed(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.partial"))
    assert "step-00000002" in [path.name for path in (tmp_path / "run").iterdir()]
    student, _ = healed(tmp_path / "run")
    assert_equal(student, whole)


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow), 1e6])
def test_an_explosion_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, uninterrupted, value):
    """A loss that is not finite, or many times the first one, ends the training; the last good checkpoint remains."""
    from hf_layerfuse.training.objective import Objective

    train, calls = Objective.train, 0

    def explode(self, model, batch):
        nonlocal calls
        calls += 1
        loss = train(self, model, batch)
        return loss * value if calls == 11 else loss

    monkeypatch.setattr(Objective, "train", explode)
    with pytest.raises(TrainingError, match=r"at step 6 of 9, after .* lower heal\.learning_rate.* is whole"):
        healed(tmp_path / "run")
    monkeypatch.setattr(Objective, "train", train)
    student, _ = healed(tmp_path / "run")
    assert_equal(student, uninterrupted[0])


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, uninterrupted):
    """The loss before it is finite: without a check of gradients, the next checkpoint would have useless weights."""
    backward, calls = Accelerator.backward, 0

    def spoil(self, loss, **options):
        nonlocal calls
        calls += 1
        backward(self, loss, **options)
        if calls == 8:
            self._models[0].transformer.ln_f.bias.grad[0] = float("inf")

    monkeypatch.setattr(Accelerator, "backward", spoil)
    with pytest.raises(TrainingError, match=r"the norm of the gradients is .* at step 4 of 9.* is whole"):
        healed(tmp_path / "run")
    monkeypatch.setattr(Accelerator, "backward", backward)
    student, _ = healed(tmp_path / "run")
    assert_equal(student, uninterrupted[0])


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, uninterrupted):
    """Such weights are not saved, and the run resumes from the checkpoint before."""
    from hf_layerfuse.training.objective import Objective

    validate, calls = Objective.validate, 0

    def spoil(self, model, batch):
        nonlocal calls
        calls += 1
        return validate(self, model, batch) * (float("nan") if calls > 8 else 1)

    monkeypatch.setattr(Objective, "validate", spoil)
    with pytest.raises(TrainingError, match=r"the validation loss is nan .* is whole"):
        healed(tmp_path / "run")
    assert max(path.name for path in (tmp_path / "run").glob("step-*")) == "step-00000002"
    monkeypatch.setattr(Objective, "validate", validate)
    student, _ = healed(tmp_path / "run")
    assert_equal(student, uninterrupted[0])


def test_one_accelerator_for_two_trainings(tmp_path):
    """The checkpoints of the second training are separate: resumed with another accelerator, they give its weights."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    healed(tmp_path / "first", accelerator=accelerator)
    student, _ = healed(tmp_path / "second", accelerator=accelerator, seed=1)
    assert not any((accelerator._models, accelerator._optimizers, accelerator._schedulers, accelerator._dataloaders))
    assert len(list((tmp_path / "second").glob("*/model*"))) == len(list((tmp_path / "second").glob("step-*")))
    again, _ = healed(tmp_path / "second", seed=1)
    assert_equal(again, student)


@pytest.mark.slow
def test_recomputed_states_give_the_same_training():
    """Gradient checkpointing changes only memory, with and without losses of inner states, and is off afterwards."""
    expected, _ = healed(None)
    student, _ = healed(None, recipe_of(hidden_weight=0.5, gradient_checkpointing=True))
    ours, theirs = weights(student), weights(expected)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    assert student.config.use_cache


def test_a_tracker_sees_losses_and_rates():
    """Losses and rates go to the trackers of the given accelerator."""
    from accelerate.tracking import GeneralTracker

    class Recorder(GeneralTracker):
        name, requires_logging_directory, tracker, rows = "recorder", False, None, []

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **options):
            self.rows.append((step, values))

    accelerator = Accelerator(log_with=Recorder(), cpu=True)
    accelerator.init_trackers("test")
    _, report = healed(None, accelerator=accelerator)
    assert [
        (step, values["train/loss"]) for step, values in Recorder.rows if "train/loss" in values
    ] == report.train_loss
    assert [(s, v["validation/loss"]) for s, v in Recorder.rows if "validation/loss" in v] == report.validation_loss
    assert all(values["train/lr"] >= 0 for _, values in Recorder.rows if "train/lr" in values)


def test_a_tracker_of_the_recipe(monkeypatch, tmp_path):
    """The tracker starts with the settings, receives the losses, and finishes at the end. The processes stay connected,
    because they have more work to do."""
    from accelerate.tracking import GeneralTracker

    class Recorder(GeneralTracker):
        name, requires_logging_directory, tracker, seen = "wandb", False, None, []

        def __init__(self, run_name, **options):
            super().__init__()
            self.seen.append(run_name)

        def store_init_configuration(self, values):
            self.seen.append(values["learning_rate"])

        def log(self, values, step=None, **options):
            self.seen.append(step)

        def finish(self):
            self.seen.append("finished")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    monkeypatch.setattr(Accelerator, "end_training", lambda self: pytest.fail("it parts the processes"))
    healed(None, recipe_of(steps=2, hidden_weight=0.5, log_with="wandb", log_dir=str(tmp_path)))
    assert Recorder.seen == ["hf_layerfuse", 3e-3, 0, 1, 2, 2, "finished"]


def test_a_tracker_that_is_not_there_is_refused():
    """A tracker that is not installed is an error; Accelerate would silently ignore it."""
    with pytest.raises(RecipeError, match=r"log_with='abacus' is not installed"):
        healed(None, recipe_of(log_with="abacus"))


@pytest.mark.slow
# inductor imports torch.utils.mkldnn, which is written with it (torch 2.13)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
# dynamo looks at .grad of whatever it traces (torch 2.13)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_training_is_the_same(tmp_path):
    """With torch.compile, losses are the same up to rounding. Weights stay shared, the student is not wrapped, and its
    file has the same names."""
    found = []
    for compiled in (False, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        student, teacher, plan = models(**NO_DROPOUT)
        recipe = recipe_of(steps=4, gradient_accumulation_steps=1, hidden_weight=0.5, compile=compiled)
        options = {"teacher": teacher, "scope": heal_scope(student, teacher, plan, recipe)}
        loader, watched = DataLoader(rows(12), 3), DataLoader(rows(4))
        report = heal(
            student, loader, recipe, validation_batches=watched, checkpoints=tmp_path / f"{compiled}", **options
        )
        found.append((student, report))
    (plain, expected), (student, report) = found
    for history in ("train_loss", "validation_loss"):
        losses, others = ([loss for _, loss in getattr(found, history)] for found in (report, expected))
        assert losses == pytest.approx(others, rel=1e-4)
    assert type(student) is type(plain)
    assert student.state_dict().keys() == plain.state_dict().keys()
    assert student.transformer.h[1].mlp.c_fc.weight is student.transformer.h[3].mlp.c_fc.weight
