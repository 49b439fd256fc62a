"""A GPU gives the same results as a CPU, for every method and architecture."""

import copy
import math

import pytest
import torch
from helpers import NETWORKS, TINY, batches_of, network, some_batches, tiny_model, whole
from torch.utils.data import DataLoader

from hf_layerfuse import (
    AutoFusedModel,
    CollapseRecipe,
    FusionRecipe,
    HealRecipe,
    MergeRecipe,
    apply,
    collapse,
    fuse,
    heal,
    merge,
    refit,
    search,
    search_collapse,
    search_merge,
    verify,
)
from hf_layerfuse.calibration.samples import Sample
from hf_layerfuse.evaluation.divergence import prediction
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.evaluation.metrics import classification, embedding_fidelity
from hf_layerfuse.methods.fusion.block_latency import BlockLatencies
from hf_layerfuse.methods.merge.candidates import LossImportance, segment_candidates
from hf_layerfuse.methods.merge.segment_latency import SegmentLatencies

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run convolutions in full float32 precision."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def accelerate(fresh_accelerate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")


def on_gpu(model):
    return copy.deepcopy(model).cuda()


def outputs(model) -> torch.Tensor:
    """Outputs of a model for random inputs, on the CPU."""
    inputs = dummy_inputs(model, 4)
    with torch.inference_mode():
        found = prediction(model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}))
    return found.double().cpu()


def assert_alike(model, other) -> None:
    ours, theirs = outputs(model), outputs(other)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def assert_made_alike(found, original, batches) -> None:
    """Check that the result of a search on the GPU is still there, can be verified there, and equals its plan applied
    on the CPU."""
    assert found.model.device.type == "cuda"
    verify(found.model)
    student = apply(original, found.plan)
    refit(student, original, found.plan, batches)
    assert_alike(found.model, student)


@pytest.mark.parametrize("mode", ["depth", "share", "basis"])
@pytest.mark.parametrize("model_type", TINY)
def test_layers_are_fused(model_type, mode) -> None:
    model = whole(model_type)
    batches = batches_of(model)
    target = {"keep_layers": 2} if mode == "depth" else {"ratio": 0.4, "rank": 4}
    recipe = FusionRecipe(mode=mode, effort="low", **target)
    assert_made_alike(search(on_gpu(model), recipe, batches), model, batches)


@pytest.mark.parametrize("align", ["permutation", "activation", "rotation"])
def test_layers_are_aligned(align) -> None:
    model = whole("gpt2")
    batches = batches_of(model)
    assert fuse(on_gpu(model), keep_layers=2, align=align, operator="mean", batches=batches).device.type == "cuda"


@pytest.mark.parametrize("model_type", TINY)
def test_mlps_become_linear(model_type) -> None:
    model = whole(model_type)
    batches = batches_of(model)
    assert_made_alike(search_collapse(on_gpu(model), CollapseRecipe(count=2), batches), model, batches)


@pytest.mark.parametrize("model_type", TINY)
def test_a_latency_budget_is_kept(model_type, steady) -> None:
    model = whole(model_type)
    batches = batches_of(model)
    assert_made_alike(search(on_gpu(model), FusionRecipe(latency_budget=0.7, effort="low"), batches), model, batches)


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_are_merged(name, steady) -> None:
    model = copy.deepcopy(network(name)).float()
    batches = some_batches(model)
    assert_made_alike(
        search_merge(on_gpu(model), MergeRecipe(latency_budget=0.7, max_kernel=5), batches), model, batches
    )


def test_blocks_and_convolutions_are_timed(tmp_path) -> None:
    """Latencies are measured on the device of the model, and the tables name it."""
    model = on_gpu(whole("gpt2"))
    times = BlockLatencies(model, dummy_inputs(model), tmp_path / "blocks.json")
    assert 0 < times.layer(0) < times.original
    model = on_gpu(network("cifar")).float()
    candidates = segment_candidates(model, 5)
    latencies = SegmentLatencies(model, dummy_inputs(model)["pixel_values"], tmp_path / "convs.json")
    latencies.measure(candidates)
    assert all(0 < latencies.of(candidate) < latencies.original for candidate in candidates)
    assert all(torch.cuda.get_device_name() in path.read_text() for path in tmp_path.glob("*.json"))


def test_losses_on_the_gpu_are_those_on_the_cpu() -> None:
    """Losses agree, so that a table from one device can be used on the other."""
    model = copy.deepcopy(network("cifar")).float()
    sample, candidates = Sample.of(some_batches(model)), segment_candidates(model, 5)
    tables = [LossImportance(other, sample) for other in (model, on_gpu(model))]
    assert tables[0].cache.about == tables[1].cache.about
    for table in tables:
        table.measure(candidates)
    for candidate in candidates:
        assert tables[0].of(candidate) == pytest.approx(tables[1].of(candidate), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("compress", [fuse, collapse, merge])
def test_the_result_is_retrained(compress, precision, tmp_path, steady, accelerate) -> None:
    """Healing works in each precision, from float32 weights, with the original as teacher; the result reloads."""
    if compress is merge:
        model = copy.deepcopy(network("cifar")).float()
        batches, asked = some_batches(model), {"latency_budget": 0.8}
    else:
        model = tiny_model("bert", "BertForSequenceClassification")
        batches, asked = batches_of(model), {"keep_layers": 3} if compress is fuse else {"count": 2}
    model = on_gpu(model)
    small = compress(model, batches=batches, **asked)
    inputs = [{name: tensor[0] for name, tensor in dummy_inputs(model, 1, seed=seed).items()} for seed in range(16)]
    loader = DataLoader(inputs, 4, shuffle=True)
    recipe = HealRecipe(steps=12, learning_rate=1e-4, eval_every=4, mixed_precision=precision)
    report = heal(small, loader, recipe, teacher=model, validation_batches=DataLoader(inputs, 4))
    assert report.mixed_precision == precision
    assert all(math.isfinite(loss) for _, loss in report.train_loss + report.validation_loss)
    assert small.device.type == "cuda"
    small.save_pretrained(tmp_path)
    assert_alike(AutoFusedModel.from_pretrained(tmp_path, device_map="cuda"), small)


def test_what_is_evaluated_is_the_same() -> None:
    model = tiny_model("vit", "ViTForImageClassification")
    batches = [{**dummy_inputs(model, 4, seed=seed), "labels": torch.tensor([0, 1, 1, 0])} for seed in range(2)]
    scores = [classification(other, batches) for other in (model, on_gpu(model))]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert embedding_fidelity(on_gpu(model), model, batches)["cosine"] == pytest.approx(1.0, abs=1e-5)
