"""Healing trains every weight, takes exactly the requested steps, and changes nothing else."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import family_config
from helpers import TINY, tiny_model
from torch.utils.data import DataLoader

from hf_layerfuse import Fuse, HealScope, Plan, apply, fused_parameters, heal_scope, layer_map
from hf_layerfuse.errors import DataError, LayerFuseError, RecipeError, TrainingError
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.evaluation.modes import dropout_of
from hf_layerfuse.math.losses import distillation_loss
from hf_layerfuse.plan.match import Match
from hf_layerfuse.recipe import HealRecipe
from hf_layerfuse.training.accelerator import accelerator_of
from hf_layerfuse.training.heal import heal
from hf_layerfuse.training.objective import Objective

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def _recipe(**values) -> HealRecipe:
    return HealRecipe(**{"steps": 8, "learning_rate": 3e-3, "eval_every": 4, "mixed_precision": "no", **values})


def _loader(rows: list[dict[str, torch.Tensor]], batch_size: int = 4, shuffle: bool = True) -> DataLoader:
    return DataLoader(rows, batch_size, shuffle, drop_last=shuffle, generator=torch.Generator().manual_seed(0))


def _rows(task: str, count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = (torch.randint(3, 64, (count, 1), generator=generator) + torch.arange(10)) % 61 + 3  # counting, easy to learn
    pixels = torch.randn(count, 3, 8, 8, generator=generator)
    rows = []
    for index in range(count):
        text = {"input_ids": ids[index], "attention_mask": torch.ones_like(ids[index])}
        rows.append(
            {
                "causal-lm": {**text, "labels": ids[index]},
                "masked-lm": {**text, "labels": ids[index].masked_fill(ids[index] % 3 > 0, -100)},
                "token-classification": {**text, "labels": torch.ones_like(ids[index])},
                "text-classification": {**text, "labels": ids[index, 0] % 2},
                "feature-extraction": text,
                "image-classification": {"pixel_values": pixels[index], "labels": torch.tensor(index % 2)},
            }[task]
        )
    return rows


MODELS = {
    "causal-lm": ("gpt2", "GPT2LMHeadModel"),
    "masked-lm": ("bert", "BertForMaskedLM"),
    "token-classification": ("roberta", "RobertaForTokenClassification"),
    "text-classification": ("distilbert", "DistilBertForSequenceClassification"),
    "feature-extraction": ("distilbert", "DistilBertModel"),
    "image-classification": ("vit", "ViTForImageClassification"),
}


@pytest.mark.parametrize("task", MODELS)
def test_healing_lowers_the_loss_and_teaches_every_parameter(task: str) -> None:
    """The validation loss falls for every task, every parameter changes, the teacher does not, and the report is
    JSON."""
    student, teacher = tiny_model(*MODELS[task]), tiny_model(*MODELS[task], seed=1).train()
    before = {name: value.clone() for name, value in student.named_parameters()}
    taught = copy.deepcopy(teacher.state_dict())
    rows = _rows(task)
    report = heal(
        student, _loader(rows), _recipe(steps=10), teacher=teacher, validation_batches=_loader(rows, shuffle=False)
    )
    assert report.validation_loss[-1][1] < report.validation_loss[0][1]
    assert [step for step, _ in report.validation_loss] == [0, 4, 8, 10]
    assert [step for step, _ in report.train_loss] == list(range(1, 11))
    unchanged = [name for name, value in student.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []
    assert all(torch.equal(value, taught[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert teacher.training
    assert not any(module.training for module in student.modules())
    again = json.loads(json.dumps(dataclasses.asdict(report)))
    assert again["num_processes"] == 1
    assert again["distributed_type"] == "NO"


def test_the_same_seed_heals_the_same_way() -> None:
    """Two runs with the same seeds give the same weights, with dropout; another seed does not."""

    def healed(seed: int) -> torch.Tensor:
        student = tiny_model("gpt2", "GPT2LMHeadModel")
        heal(student, _loader(_rows("causal-lm")), _recipe(steps=2, kl_weight=0.0), seed=seed)
        return torch.nn.utils.parameters_to_vector(student.parameters()).detach()

    first = healed(0)
    assert torch.equal(first, healed(0))
    assert not torch.equal(first, healed(1))


def test_accumulated_batches_are_one_large_batch() -> None:
    """Six rows have the same losses however they are divided, also if an epoch ends within a step."""
    rows = _rows("causal-lm", count=6)

    def losses(batch_size: int, accumulation: int) -> list[float]:
        student = tiny_model("gpt2", "GPT2LMHeadModel", attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
        recipe = _recipe(steps=4, kl_weight=0.0, gradient_accumulation_steps=accumulation, warmup_ratio=0.0)
        return [loss for _, loss in heal(student, DataLoader(rows, batch_size), recipe).train_loss]

    whole = losses(6, 1)
    assert len(whole) == 4
    assert whole[3] < 0.9 * whole[0]
    assert losses(1, 6) == pytest.approx(whole, rel=1e-3)
    assert losses(3, 4) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_targets_count_alike(size: int) -> None:
    """A step lowers the sum of the losses of all targets divided by their number, also if batches have different
    numbers of targets, or none."""
    rows = _rows("causal-lm", count=4)
    for row, kept in zip(rows, (1, 5, 0, 9), strict=True):
        row["labels"] = row["input_ids"].masked_fill(torch.arange(len(row["input_ids"])) >= kept, -100)
    recipe = _recipe(steps=2, warmup_ratio=0.0, gradient_accumulation_steps=4 // size)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    student, teacher, whole = (tiny_model("gpt2", "GPT2LMHeadModel", seed=seed, **no_dropout) for seed in (0, 1, 0))
    report = heal(student, _loader(rows, size, shuffle=False), recipe, teacher=teacher)
    one = heal(whole, _loader(rows, 4, shuffle=False), _recipe(steps=2, warmup_ratio=0.0), teacher=teacher)
    assert [loss for _, loss in report.train_loss] == pytest.approx([loss for _, loss in one.train_loss], rel=1e-5)


def test_a_batch_without_targets_changes_nothing() -> None:
    """Such a batch has no loss, and does not count as an explosion."""
    rows = _rows("causal-lm", count=4)
    for row in rows:
        row["labels"] = torch.full_like(row["input_ids"], -100)
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    before = student.transformer.wte.weight.detach().clone()
    report = heal(student, _loader(rows), _recipe(steps=1, kl_weight=0.0, weight_decay=0.0))
    assert report.train_loss == [(1, 0.0)]
    assert torch.equal(student.transformer.wte.weight, before)


def test_a_head_that_nothing_depends_on_stays() -> None:
    """If only inner states are compared, the head does not learn, and its weights do not decay."""
    student, teacher = (tiny_model("bert", "BertForSequenceClassification", seed=seed) for seed in (0, 1))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    path = "bert.encoder.layer.5"
    recipe = _recipe(steps=3, ce_weight=0.0, kl_weight=0.0, hidden_weight=1.0, weight_decay=0.1)
    rows = [{"input_ids": torch.arange(3, 12), "labels": torch.tensor(i % 2)} for i in range(8)]
    heal(student, _loader(rows), recipe, teacher=teacher, scope=HealScope([Match("hidden", path, path)]))
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("classifier", "bert.pooler")), name


def test_gradients_of_before_are_forgotten() -> None:
    """Gradients of an interrupted training do not affect the first step of the next one."""
    students = [tiny_model("gpt2", "GPT2LMHeadModel") for _ in range(2)]
    for parameter in students[1].parameters():
        parameter.grad = torch.ones_like(parameter)
    reports = [heal(student, _loader(_rows("causal-lm")), _recipe(steps=2, kl_weight=0.0)) for student in students]
    assert reports[0].train_loss == reports[1].train_loss


def test_compilation_is_asked_for_each_time() -> None:
    """Accelerators of one process share settings, but the compilation of an earlier training does not affect the next
    one."""
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    for compiled in (False, True, False):
        accelerator = accelerator_of(student, _recipe(compile=compiled))
        assert accelerator.state.dynamo_plugin.backend == ("INDUCTOR" if compiled else "NO")


def test_learning_rate_warms_up_and_ends_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule spans exactly the optimiser steps, with any accumulation."""
    rates = []
    step = torch.optim.AdamW.step

    def recorded(optimizer, *arguments, **options):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    recipe = _recipe(steps=10, warmup_ratio=0.2, learning_rate=1.0e-3, gradient_accumulation_steps=2, kl_weight=0.0)
    heal(student, _loader(_rows("causal-lm")), recipe)
    rates = [first for first, second in rates if first == second]
    assert len(rates) == 10
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 1e-4


def test_shared_parameters_stay_shared_and_are_optimised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manual tie and the tied output layer remain ties, and are one entry of the optimiser."""
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    first, second = student.transformer.h[0].mlp.c_fc, student.transformer.h[1].mlp.c_fc
    second.weight = first.weight
    seen = []
    monkeypatch.setattr(
        torch.optim.AdamW, "__init__", _spy(torch.optim.AdamW.__init__, lambda _, groups, **__: seen.extend(groups))
    )
    heal(student, _loader(_rows("causal-lm")), _recipe(steps=2, kl_weight=0.0, weight_decay=0.1))
    assert second.weight is first.weight
    assert student.lm_head.weight is student.transformer.wte.weight
    decayed, rest = (group["params"] for group in seen)
    assert (
        len({id(value) for value in (*decayed, *rest)}) == len(decayed) + len(rest) == len(list(student.parameters()))
    )
    assert {value.dim() for value in rest} == {1}
    assert {value.dim() for value in decayed} == {2}
    assert [group["weight_decay"] for group in seen] == [0.1, 0.0]


def _spy(function, look):
    def spied(*arguments, **options):
        look(*arguments, **options)
        return function(*arguments, **options)

    return spied


def test_divergence_from_itself_is_zero_and_matches_the_formula() -> None:
    """KL(p || p) = 0, otherwise T^2 sum p log(p / q), in float32 even for bfloat16 logits."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7, generator=generator)
    assert distillation_loss(ours, ours, 2.0).item() == pytest.approx(0, abs=1e-6)
    p, q = (theirs / 2).softmax(-1), (ours / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(ours, theirs, 2.0).item() == pytest.approx(expected.item(), rel=1e-4)
    assert distillation_loss(ours.bfloat16(), theirs.bfloat16(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("task", ["causal-lm", "feature-extraction"])
def test_a_model_is_its_own_best_student(task: str) -> None:
    """Without dropout, distilling a model into its copy has loss zero."""
    options = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0} if task == "causal-lm" else {}
    options = options or {"dropout": 0, "attention_dropout": 0}
    student, teacher = (tiny_model(*MODELS[task], **options) for _ in range(2))
    report = heal(student, _loader(_rows(task)), _recipe(steps=1, ce_weight=0.0), teacher=teacher)
    assert report.train_loss[0][1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
def test_padding_has_no_part_in_the_loss(labelled: bool) -> None:
    """The content of padding changes no loss, before or after an update, with or without labels."""
    rows = _rows("causal-lm", count=4)

    def losses(padding: int) -> list[float]:
        padded = []
        for row in rows:
            pad = torch.full((3,), padding)
            new = {
                "input_ids": torch.cat([row["input_ids"], pad]),
                "attention_mask": torch.cat([row["attention_mask"], torch.zeros_like(pad)]),
            }
            if labelled:
                new["labels"] = torch.cat([row["labels"], torch.full((3,), -100)])
            padded.append(new)
        student = tiny_model("gpt2", "GPT2LMHeadModel", attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
        teacher = tiny_model("gpt2", "GPT2LMHeadModel", seed=1)
        report = heal(
            student,
            _loader(padded),
            _recipe(steps=2, warmup_ratio=0.0),
            teacher=teacher,
            validation_batches=_loader(padded, 3, shuffle=False),
        )
        return [loss for _, loss in (*report.train_loss, *report.validation_loss)]

    assert losses(5) == pytest.approx(losses(40), rel=1e-5)


def test_validation_loss_is_the_mean_over_targets() -> None:
    """Batches count by their targets: any batch size gives the same loss."""
    rows = _rows("causal-lm", count=5)
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    losses = [
        heal(student, _loader(rows), _recipe(steps=0, kl_weight=0.0), validation_batches=_loader(rows, size, False))
        for size in (1, 2, 5)
    ]
    values = [report.validation_loss[0][1] for report in losses]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_bf16_leaves_the_class_forward_in_place() -> None:
    """Mixed precision is undone: the student has float32 weights and its own decorated forward again."""
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    report = heal(student, _loader(_rows("causal-lm")), _recipe(steps=2, kl_weight=0.0, mixed_precision="bf16"))
    assert report.mixed_precision == "bf16"
    assert "forward" not in vars(student)
    assert student.dtype == torch.float32
    assert student(torch.tensor([[3, 4]]), output_hidden_states=True).hidden_states is not None
    assert student(torch.tensor([[3, 4]])).logits.dtype == torch.float32


@pytest.mark.parametrize("bf16", [True, False])
def test_auto_precision_is_what_the_device_does_natively(monkeypatch: pytest.MonkeyPatch, bf16: bool) -> None:
    """The capability of the CPU decides."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16}, raising=False)
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    report = heal(student, _loader(_rows("causal-lm")), _recipe(steps=0, kl_weight=0.0, mixed_precision="auto"))
    assert report.mixed_precision == ("bf16" if bf16 else "no")


@pytest.mark.parametrize(
    ("launcher", "capable", "expected"), [("bf16", False, "bf16"), ("no", True, "bf16"), ("no", False, "no")]
)
def test_auto_precision_heeds_the_launcher(monkeypatch: pytest.MonkeyPatch, launcher, capable, expected) -> None:
    """The precision of `accelerate launch` has priority over the device. Its "no" is also its default, so the device
    decides then."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    report = heal(student, _loader(_rows("causal-lm")), _recipe(steps=0, kl_weight=0.0, mixed_precision="auto"))
    assert report.mixed_precision == expected


def test_a_given_accelerator_is_used() -> None:
    """Its precision applies, and the recipe sets its accumulation: three batches per step."""
    accelerator, read = Accelerator(mixed_precision="bf16"), []
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    student.register_forward_pre_hook(lambda *_: read.append(torch.is_autocast_enabled("cpu")))
    recipe = _recipe(steps=2, kl_weight=0.0, gradient_accumulation_steps=3)
    report = heal(student, _loader(_rows("causal-lm")), recipe, accelerator=accelerator)
    assert report.mixed_precision == "bf16"
    assert read == [True] * 6


@pytest.mark.parametrize("weight", ["hidden_weight", "attention_weight"])
@pytest.mark.parametrize("model", [("gpt2", "GPT2LMHeadModel"), ("bert", "BertForTokenClassification")])
def test_inner_states_come_nearer_to_those_they_answer_to(model, weight) -> None:
    """Each loss alone lowers its distance between the layers that the plan matches."""
    teacher = tiny_model(*model)
    plan = Plan(model[0], 6, (Fuse("layer", (1, 2)), Fuse("layer", (3, 5), "share")))
    student = apply(teacher, plan)
    matches = layer_map(student, teacher, plan)
    rows = _rows("causal-lm" if model[0] == "gpt2" else "token-classification")
    recipe = _recipe(steps=30, ce_weight=0.0, kl_weight=0.0, **{weight: 1.0})

    def distance() -> float:
        objective = Objective(recipe, student.eval(), teacher.eval(), matches)
        with torch.no_grad():
            return objective.train(student, torch.utils.data.default_collate(rows)).item()

    before = distance()
    heal(student, _loader(rows), recipe, teacher=teacher, scope=HealScope(matches))
    assert distance() < 0.8 * before


def test_bf16_trains_as_float32_does() -> None:
    """Losses equal those of float32 up to rounding, also in a resumed run."""
    found = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        student, teacher = tiny_model("gpt2", "GPT2LMHeadModel"), tiny_model("gpt2", "GPT2LMHeadModel", seed=1)
        rows, recipe = _rows("causal-lm"), _recipe(steps=10, mixed_precision=precision)
        report = heal(student, _loader(rows), recipe, teacher=teacher, validation_batches=_loader(rows, shuffle=False))
        found.append([loss for _, loss in report.validation_loss])
    assert found[1] == pytest.approx(found[0], rel=2e-2)
    assert found[1][-1] < found[1][0]


def test_a_loss_that_is_not_finite_stops() -> None:
    """The error names the step, no weight is updated, and the student is in eval mode."""
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    student.transformer.ln_f.bias.data[0] = float("nan")
    before = student.transformer.wte.weight.detach().clone()
    with pytest.raises(TrainingError, match="nan at step 1 of 8"):
        heal(student, _loader(_rows("causal-lm")), _recipe(kl_weight=0.0))
    assert torch.equal(student.transformer.wte.weight, before)
    assert not student.training


def test_what_cannot_work_is_refused() -> None:
    """No teacher, half-precision weights, no labels, no batches, or a teacher that does not fit: each error says what
    to do."""
    student = tiny_model("gpt2", "GPT2LMHeadModel")
    batches = _loader(_rows("causal-lm"))
    with pytest.raises(RecipeError, match="needs a teacher"):
        heal(student, batches, _recipe())
    with pytest.raises(RecipeError, match="needs pairs of layers: pass scope=heal_scope"):
        heal(student, batches, _recipe(hidden_weight=1.0), teacher=student)
    with pytest.raises(LayerFuseError, match=r"torch\.float32"):
        heal(tiny_model("gpt2", "GPT2LMHeadModel").half(), batches, _recipe(kl_weight=0.0))
    with pytest.raises(DataError, match="nothing to learn"):
        heal(student, _loader(_rows("feature-extraction")), _recipe(kl_weight=0.0))
    with pytest.raises(DataError, match="no training batches"):
        heal(student, DataLoader([]), _recipe(kl_weight=0.0))
    with pytest.raises(DataError, match="no validation batches"):
        heal(student, batches, _recipe(kl_weight=0.0), validation_batches=[])
    with pytest.raises(LayerFuseError, match="as teacher"):
        heal(student, batches, _recipe(), teacher=tiny_model("gpt2", "GPT2LMHeadModel", vocab_size=70))


_ACROSS_PROCESSES = """
import dataclasses, json, os, sys, torch
from accelerate import PartialState
from datasets import IterableDataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel
from hf_layerfuse.training.heal import heal
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.evaluation.modes import dropout_of
from hf_layerfuse.training.objective import Objective
from hf_layerfuse.plan.heal_scope import HealScope
from hf_layerfuse.plan.match import Match
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.recipe import HealRecipe

def run(kind, config, batch_size):
    models = [torch.manual_seed(seed) and kind(config) for seed in (1, 2)]
    ids = torch.randint(3, 64, (24, 10), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, **({"labels": row} if kind is GPT2LMHeadModel else {})} for row in ids]
    for place, row in enumerate(rows if kind is GPT2LMHeadModel else ()):  # the third batch of four has no targets
        kept = 0 if place // 4 == 2 else place % 10
        row["labels"] = row["labels"].masked_fill(torch.arange(10) >= kept, -100)
    recipe = HealRecipe(
        steps=6, learning_rate=3e-3, eval_every=3, mixed_precision="no", gradient_accumulation_steps=2, warmup_ratio=0.2
    )
    report = heal(
        models[0], DataLoader(rows, batch_size), recipe, teacher=models[1], validation_batches=DataLoader(rows, 5)
    )
    return dataclasses.asdict(report)

def ragged(rows):
    names = ("input_ids", "attention_mask")
    batch = {name: pad_sequence([torch.tensor(row[name]) for row in rows], True) for name in names}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

def streamed(config, batch_size):
    def rows():
        for n in range(48):
            yield {"input_ids": list(range(3, 5 + n % 7)), "attention_mask": [1] * (2 + n % 7), "labels": n % 2}
    models = [torch.manual_seed(seed) and BertForSequenceClassification(config) for seed in (1, 2)]
    loader = DataLoader(IterableDataset.from_generator(rows), batch_size, collate_fn=ragged, drop_last=True)
    return dataclasses.asdict(heal(models[0], loader, HealRecipe(steps=6, mixed_precision="no"), teacher=models[1]))

def hidden(config, batch_size):
    models = [torch.manual_seed(seed) and GPT2LMHeadModel(config) for seed in (1, 2)]
    ids = torch.randint(3, 64, (24, 10), generator=torch.Generator().manual_seed(0))
    recipe = HealRecipe(steps=3, mixed_precision="no", ce_weight=0.0, kl_weight=0.0, hidden_weight=1.0)
    scope = HealScope([Match("hidden", "transformer.h.0", "transformer.h.0")])
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return dataclasses.asdict(heal(models[0], DataLoader(rows, batch_size), recipe, teacher=models[1], scope=scope))

def main(batch_size):
    bert = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "vocab_size": 64}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1}
    gpt2 |= {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    return [
        run(BertModel, BertConfig(**bert), batch_size),
        run(GPT2LMHeadModel, GPT2Config(**gpt2), batch_size),
        streamed(BertConfig(**bert), batch_size),
        hidden(GPT2Config(**gpt2), batch_size),
    ]

if __name__ == "__main__":
    reports = main(4)
    if os.environ["RANK"] == "0":
        with open(sys.argv[1], "w") as file:
            json.dump(reports, file)
    PartialState().destroy_process_group()  # no process leaves while another still talks to it
"""


@pytest.mark.slow
def test_two_processes_heal_as_one_does(tmp_path: Path) -> None:
    """Half of the batch on each of two processes gives the losses of one process: for cross-entropy, also with unevenly
    spread targets, for last and inner hidden states, and for streamed texts."""
    program, result = tmp_path / "program.py", tmp_path / "reports.json"
    program.write_text(_ACROSS_PROCESSES)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(program), str(result)], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    here: dict = {"__name__": "here"}
    exec(_ACROSS_PROCESSES, here)
    for place, (two, one) in enumerate(zip(json.loads(result.read_text()), here["main"](8), strict=True)):
        assert two["num_processes"] == 2
        assert two["distributed_type"] == "MULTI_CPU"
        for history in ("train_loss", "validation_loss"):
            losses, expected = ([loss for _, loss in report[history]] for report in (two, one))
            # errors of inner states are relative to what the batch at hand has
            assert losses == pytest.approx(expected, rel=5e-2 if place == 3 else 1e-4)


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_dropout_is_what_the_recipe_says(model_type: str) -> None:
    """With dropout=0, the model is deterministic in training; afterwards, each dropout has its earlier value."""
    fields = family_config(model_type).to_dict()
    names = [name for name, value in fields.items() if "drop" in name and value is not None]
    model = tiny_model(model_type, **dict.fromkeys(names, 0.5)).train()
    inputs = dummy_inputs(model)
    with dropout_of(model, 0.0):
        assert torch.equal(prediction(model(**inputs)), prediction(model(**inputs)))
    for setting in (None, 0.5):
        with dropout_of(model, setting):
            assert not torch.equal(prediction(model(**inputs)), prediction(model(**inputs)))


@pytest.mark.parametrize("dropout", [0.0, None])
def test_healing_without_dropout_is_that_of_a_model_that_has_none(dropout: float | None) -> None:
    """The option equals setting the config; without it, the dropout of the checkpoint applies."""
    rows, ended = _rows("causal-lm"), []
    for rate in (0.0, 0.5):
        changes = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), rate)
        student = tiny_model("gpt2", "GPT2LMHeadModel", **changes)
        heal(student, _loader(rows), _recipe(kl_weight=0.0, dropout=dropout))
        assert {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)} == {rate}
        ended.append(student.state_dict())
    same = all(torch.equal(value, ended[1][name]) for name, value in ended[0].items())
    assert same == (dropout == 0.0)


def test_distillation_shifts_only_where_the_next_token_is_predicted() -> None:
    """A token classifier learns the teacher's output at the labelled position; a causal model learns the one before."""
    no_dropout = {
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "gpt2": {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
    }
    for kind, head, shift in (("bert", "BertForTokenClassification", 0), ("gpt2", "GPT2LMHeadModel", 1)):
        student, teacher = (tiny_model(kind, head, seed=seed, **no_dropout[kind]) for seed in (1, 2))
        ids = torch.arange(3, 15)[None]
        labels = torch.full_like(ids, -100)
        labels[0, 5] = 1
        batch = {"input_ids": ids, "labels": labels}
        recipe = _recipe(steps=1, ce_weight=0.0, learning_rate=1e-12)
        report = heal(student, DataLoader([{k: v[0] for k, v in batch.items()}]), recipe, teacher=teacher)
        with torch.no_grad():
            ours, theirs = student(input_ids=ids).logits[0, 5 - shift], teacher(input_ids=ids).logits[0, 5 - shift]
        expected = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum()
        assert report.train_loss[0][1] == pytest.approx(expected.item(), rel=1e-4)


def test_frozen_parameters_stay_as_they_are() -> None:
    """`freeze_fused` freezes fused weights and trains all others. Afterwards, all can be trained again."""
    teacher = tiny_model("gpt2", "GPT2LMHeadModel")
    plan = Plan("gpt2", 6, (Fuse("layer", (1, 3), "share"), Fuse("layer", (4, 5))))
    student = apply(teacher, plan)
    names = fused_parameters(student, plan)
    before = {name: value.detach().clone() for name, value in student.named_parameters(remove_duplicate=False)}
    recipe = _recipe(steps=3, freeze_fused=True)
    scope = heal_scope(student, teacher, plan, recipe)
    heal(student, _loader(_rows("causal-lm")), recipe, teacher=teacher, scope=scope)
    for name, value in student.named_parameters(remove_duplicate=False):
        assert torch.equal(value, before[name]) == (name in names), name
        assert value.requires_grad
    with pytest.raises(RecipeError, match="nothing to train"):
        heal(student, _loader(_rows("causal-lm")), _recipe(kl_weight=0.0), scope=HealScope(frozen=before))
