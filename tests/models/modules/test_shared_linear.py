"""Low-rank residuals on shared weights, and shared bases, from their factors to their checkpoints."""

import copy
import itertools

import pytest
import torch
from helpers import LAYERS, heads_of, in_turn, tiny_model
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_layerfuse import (
    AutoFusedModel,
    CheckpointError,
    Drop,
    Fuse,
    LayerFuseError,
    Plan,
    PlanError,
    UnsupportedModelError,
    apply,
    architecture_for,
    expand,
    verify,
)
from hf_layerfuse.evaluation.dummy_inputs import dummy_inputs
from hf_layerfuse.math.lowrank import low_rank, shared_basis
from hf_layerfuse.models.modeling import fused_class
from hf_layerfuse.models.modules.shared_linear import (
    PER_DEPTH,
    BasisLinear,
    Relaxed,
    ResidualConv1D,
    ResidualLinear,
    out_in,
    relax,
)
from hf_layerfuse.models.verify import prediction

RESIDUAL = Fuse("layer", (1, 3), "share", "mean", rank=3)
BASIS = Fuse("layer", (0, 2, 4), "basis", rank=8)
FULL = 32  # no matrix of the tiny models has a higher rank

both = pytest.mark.parametrize("edit", [RESIDUAL, BASIS], ids=["residual", "basis"])
REST = ["bert", "vit", "llama"]
in_turns = pytest.mark.parametrize(("model_type", "edit"), in_turn([RESIDUAL, BASIS], rest=REST))


def fused(model_type, *edits, head=None, **changes):
    return apply(tiny_model(model_type, head, **changes), Plan(model_type, LAYERS, edits))


def outputs(model):
    with torch.inference_mode():
        return prediction(model(**dummy_inputs(model)))


def layer_list(model):
    return architecture_for(model).layer_list(model)


def relaxed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Relaxed)}


def distance(one, other):
    """Relative error of all weight matrices of the layers, and of the outputs."""
    weights = [
        torch.cat([p.flatten() for p in layer_list(model).parameters()]) for model in (expand(one), expand(other))
    ]
    results = [outputs(one), outputs(other)]
    return [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in (weights, results)]


# the factors


@pytest.fixture
def numbers():
    return torch.Generator().manual_seed(0)


def cost(inputs, error):
    return (inputs @ error.T).norm().item()


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
@pytest.mark.parametrize("weighted", [False, True])
def test_low_rank_is_the_best(numbers, shape, weighted):
    """No other product of that rank is closer: compared with the whitened SVD, and with gradient descent from many
    starts."""
    delta = torch.randn(shape, generator=numbers, dtype=torch.float64)
    inputs = torch.randn(40, shape[1], generator=numbers, dtype=torch.float64) @ torch.diag(
        torch.logspace(-1, 1, shape[1], dtype=torch.float64)
    )
    if not weighted:
        inputs = torch.eye(shape[1], dtype=torch.float64)
    for rank in (1, 2, min(shape)):
        left, right = low_rank(delta, rank, inputs.T @ inputs if weighted else None)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        torch.testing.assert_close(right @ right.T, torch.eye(rank, dtype=torch.float64))
        ours = cost(inputs, delta - left @ right)
        # the singular values left out give the lowest possible cost (Eckart and Young)
        least = torch.linalg.svdvals(inputs @ delta.T)[rank:].norm().item()
        assert ours == pytest.approx(least, rel=1e-4, abs=1e-10)
        for _ in range(3):
            b = torch.randn(shape[0], rank, generator=numbers, dtype=torch.float64)
            for _ in range(50):  # alternating least squares
                a = torch.linalg.lstsq(b, delta).solution
                b = (torch.linalg.pinv(inputs @ a.T) @ inputs @ delta.T).T
            assert ours <= cost(inputs, delta - b @ a) + 1e-6


def test_low_rank_is_the_truncated_svd(numbers):
    """Without a Gram matrix, B = U_r S_r and A = V_r^T, up to the signs of the singular vectors."""
    delta = torch.randn(7, 5, generator=numbers)
    left, right = low_rank(delta, 3)
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    torch.testing.assert_close(left.abs(), (u[:, :3] * s[:3]).abs())
    torch.testing.assert_close(right.abs(), vh[:3].abs())
    torch.testing.assert_close(left @ right, (u[:, :3] * s[:3]) @ vh[:3])


def test_a_gram_matrix_never_hurts(numbers):
    """With the Gram matrix of the inputs, outputs are never worse than without it, for any rank, scale and rounding."""
    for tokens, scale, dtype in ((60, 1, torch.float64), (4, 1e-3, torch.float64), (30, 1e4, torch.float32)):
        for rank in range(1, 13):
            delta = torch.randn(16, 12, generator=numbers)
            inputs = scale * torch.randn(tokens, 12, generator=numbers) * torch.logspace(-3, 1, 12)
            gram = inputs.to(dtype).T @ inputs.to(dtype)
            one, other = low_rank(delta, rank, gram), low_rank(delta, rank)
            ours, plain = (cost(inputs.double(), delta - b @ a) for b, a in (one, other))
            assert ours <= plain * (1 + 1e-6) + 1e-9 * scale


def test_singular_gram_matrices(numbers):
    """Few tokens, dead inputs or no inputs: exact in directions that inputs use, and the plain SVD in others."""
    delta = torch.randn(10, 8, generator=numbers).double()
    inputs = torch.randn(3, 8, generator=numbers).double()
    left, right = low_rank(delta, 3, inputs.T @ inputs)
    assert cost(inputs, delta - left @ right) < 1e-4 * cost(inputs, delta)
    left, right = low_rank(delta, 8, inputs.T @ inputs)
    torch.testing.assert_close(left @ right, delta)
    plain = low_rank(delta, 4)
    nothing = low_rank(delta, 4, torch.zeros(8, 8))
    torch.testing.assert_close(nothing[0] @ nothing[1], plain[0] @ plain[1])
    # three tokens determine three directions; the plain norm determines the others
    left, right = low_rank(delta, 5, inputs.T @ inputs)
    decided = torch.linalg.svd(delta @ inputs.T).U[:, :3]
    rest = delta - decided @ decided.T @ delta
    assert (delta - left @ right).norm().item() == pytest.approx(torch.linalg.svdvals(rest)[2:].norm().item(), rel=1e-3)


def test_nothing_is_left_to_approximate():
    """A zero matrix gives the initial residual of LoRA: B is zero and A is not, so that B can learn."""
    left, right = low_rank(torch.zeros(6, 4), 2)
    assert not left.any()
    torch.testing.assert_close(right @ right.T, torch.eye(2, dtype=torch.float64))


def test_shared_basis_is_the_papers(numbers):
    """The basis equals the paper's, in its orientation and whitening: basis S^-1 U_k S_k, coefficients V_k^T, for S^T S
    = X^T X."""
    weights = [torch.randn(7, 5, generator=numbers).double() for _ in range(3)]
    inputs = torch.randn(50, 5, generator=numbers).double()
    for whitening in (torch.eye(5).double(), torch.linalg.cholesky(inputs.T @ inputs).T):
        u, s, vh = torch.linalg.svd(whitening @ torch.cat([w.T for w in weights], dim=1), full_matrices=False)
        papers = torch.linalg.inv(whitening) @ (u[:, :2] * s[:2])
        basis, coefficients = shared_basis(weights, 2, whitening.T @ whitening)
        assert basis.shape == (2, 5)
        torch.testing.assert_close(basis.T.abs(), papers.abs(), rtol=1e-4, atol=1e-5)
        for part, other in zip(coefficients, vh[:2].split(7, dim=1), strict=True):
            assert part.shape == (7, 2)
            torch.testing.assert_close(part @ basis, (papers @ other).T, rtol=1e-4, atol=1e-5)
    plain = shared_basis(weights, 2), shared_basis(weights, 2, torch.eye(5))
    torch.testing.assert_close(plain[0][0].abs(), plain[1][0].abs())


def test_full_basis_is_exact(numbers):
    """As many basis vectors as inputs, or as outputs of all maps together, reproduce the maps; one fewer does not."""
    for outs, ins, full in ((9, 6, 6), (2, 8, 6)):
        weights = [torch.randn(outs, ins, generator=numbers).double() for _ in range(3)]
        grams = [g.T @ g for g in torch.randn(3, 20, ins, generator=numbers)]
        for gram in (None, grams[0], grams):
            errors = []
            for rank in (full, full - 1):
                basis, coefficients = shared_basis(weights, rank, gram)
                errors.append(max((w - c @ basis).norm().item() for w, c in zip(weights, coefficients, strict=True)))
            assert errors[0] < 1e-8 < 1e-2 < errors[1]


def test_coefficients_for_each_maps_own_inputs(numbers):
    """With one Gram matrix per map, no map is worse on its own inputs than with their sum, and at least one is
    better."""
    weights = [torch.randn(7, 5, generator=numbers).double() for _ in range(3)]
    inputs = [torch.randn(20, 5, generator=numbers).double() * torch.rand(5, generator=numbers) for _ in range(3)]
    grams = [x.T @ x for x in inputs]
    costs = []
    for gram in (grams, sum(grams)):
        basis, coefficients = shared_basis(weights, 2, gram)
        rows = zip(inputs, weights, coefficients, strict=True)
        costs.append([cost(x, weight - part @ basis) for x, weight, part in rows])
    assert all(own <= common * (1 + 1e-5) for own, common in zip(*costs, strict=True))
    assert sum(costs[0]) < 0.99 * sum(costs[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: low_rank(w, 0), "rank is 0: .* allows 1 to 4"),
        (lambda w: low_rank(w, 5), "rank is 5: .* allows 1 to 4"),
        (lambda w: low_rank(w, 2, torch.eye(6)), r"\(6, 6\) for a map of 4 inputs"),
        (lambda w: low_rank(w, 2, torch.full((4, 4), torch.nan)), "finite inputs"),
        (lambda w: shared_basis([w, w], 5), "allows 1 to 4"),
        (lambda w: shared_basis([w, w], 2, [torch.eye(4)]), "1 Gram matrices for 2 maps"),
        (lambda w: shared_basis([w, w], 2, [torch.eye(4), torch.eye(3)]), r"\(3, 3\)"),
    ],
)
def test_factors_refuse(call, message):
    """An invalid rank or Gram matrix gives an error that names it and the allowed values."""
    with pytest.raises(LayerFuseError, match=message):
        call(torch.ones(6, 4))


# the modules


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", [nn.Linear, lambda ins, outs, bias: Conv1D(outs, ins)], ids=["Linear", "Conv1D"])
def test_modules_compute_what_they_merge_to(make, bias):
    """A map with a residual equals its stock module with the merged weight, for any orientation and leading shape."""
    stock = make(5, 7, bias=bias)
    for module, names in (
        (relax(stock, "share", 2), {"weight", "bias", "residual_in", "residual_out"}),
        (relax(stock, "basis", 3), {"bias", "basis", "coefficients"}),
    ):
        assert dict(module.named_parameters()).keys() == names - ({"bias"} if stock.bias is None else set())
        assert module.bias is stock.bias
        assert module.weight.shape == stock.weight.shape
        assert out_in(module, module.weight).shape == (7, 5)
        x = torch.randn(2, 3, 5)
        if isinstance(module, BasisLinear):
            assert isinstance(module, Relaxed)
        else:
            assert isinstance(module, type(stock))
            assert module.weight is stock.weight
            torch.testing.assert_close(module(x), stock(x))  # a new residual adds nothing
        for name in PER_DEPTH & names:
            nn.init.normal_(module.get_parameter(name))
        twin = copy.deepcopy(stock)
        twin.weight.data = module.merged_weight().float()
        torch.testing.assert_close(module(x), twin(x))
        assert not torch.allclose(module(x), stock(x)), "the parameters of its own do nothing"
        losses = [module.train(mode)(x).square().sum() for mode in (True, False)]  # made whole, or in two parts
        torch.testing.assert_close(*(torch.autograd.grad(loss, list(module.parameters())) for loss in losses))
        assert str(module).startswith(f"{type(module).__name__}(5, 7, rank={2 if 'weight' in names else 3}, bias=")
        exported = torch.export.export(nn.Sequential(module).eval(), (x,)).module()
        torch.testing.assert_close(exported(x), module(x))


def test_fresh_weights_have_the_usual_size():
    """A basis initialised for training from scratch gives weights with the variance of nn.Linear."""
    torch.manual_seed(0)
    stock = nn.Linear(256, 300)
    for rank in (8, 64):
        module = relax(stock, "basis", rank)
        assert module.weight.std().item() == pytest.approx(stock.weight.std().item(), rel=0.15)


# the models


@pytest.mark.parametrize(("model_type", "operator"), in_turn(["mean", "freeze", "telescope", "mix"], rest=REST))
def test_full_residual_reproduces_the_original(model_type, operator):
    """A residual of full rank restores the original for any operator."""
    edits = (Fuse("layer", (1, 3), "share", operator, rank=FULL), Fuse("mlp", (2, 4, 5), "share", operator, rank=FULL))
    model = tiny_model(model_type)
    assert max(distance(apply(model, Plan(model_type, LAYERS, edits)), model)) < 1e-4


def test_full_basis_reproduces_the_original(model_type):
    """A basis with as many vectors as inputs restores the original."""
    model = tiny_model(model_type)
    wide = max(p.shape[axis] for p in layer_list(model)[0].parameters() if p.ndim == 2 for axis in (0, 1))
    edits = (Fuse("attention", (0, 1, 4), "basis", rank=32), Fuse("mlp", (2, 3, 4, 5), "basis", rank=min(wide, 128)))
    assert max(distance(apply(model, Plan(model_type, LAYERS, edits)), model)) < 1e-4


@pytest.mark.parametrize(("model_type", "mode"), in_turn(["share", "basis"], rest=["bert", "llama"]))
def test_error_falls_with_rank(model_type, mode):
    """The weights approach the original's as the rank grows, and reach them."""
    model = tiny_model(model_type)
    ranks = [r for r in (0, 1, 4, 16, 32) if r or mode == "share"]
    errors = []
    for rank in ranks:
        edit = Fuse("layer", (1, 2, 4), mode, "mean", rank=rank)
        errors.append(distance(apply(model, Plan(model_type, LAYERS, (edit,))), model)[0])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_rank_zero_is_plain_sharing(model_type):
    """With rank 0, the model has no module of this library, and no new name in its state dict."""
    edits = (Fuse("layer", (1, 3), "share", "mean"),)
    model = tiny_model(model_type)
    plain = apply(model, Plan(model_type, LAYERS, edits))
    assert not relaxed(plain)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert {type(m) for m in layer_list(plain).modules()} == {type(m) for m in layer_list(model).modules()}


def test_what_is_shared_and_what_is_not(model_type):
    """Weights and bases are one tensor for all depths; residuals, coefficients and biases are separate."""
    model = fused(model_type, RESIDUAL, BASIS, Drop("attention", 5))
    layers = layer_list(model)
    for group, shared in ((RESIDUAL.layers, "weight"), (BASIS.layers, "basis")):
        first, *others = [relaxed(layers[i]) for i in group]
        assert first
        for other in others:
            assert other.keys() == first.keys()
            for at, module in other.items():
                assert getattr(module, shared) is getattr(first[at], shared)
                own = {name: p for name, p in module.named_parameters() if name != shared}
                assert len(own) >= (2 if shared == "weight" else 1)
                assert all(parameter is not first[at].get_parameter(name) for name, parameter in own.items())
    # the whole size by hand, from the original's
    original = tiny_model(model_type)
    size = fused(model_type, Drop("attention", 5)).num_parameters()
    for name, p in layer_list(original)[0].named_parameters():
        if p.ndim >= 2 and architecture_for(original).owner(name):
            outs, ins = p.shape
            size += 2 * 3 * (outs + ins) - outs * ins  # two residuals for one matrix
            ins, outs = (ins, outs) if model_type != "gpt2" else (outs, ins)
            size += 8 * ins + 3 * 8 * outs - 3 * outs * ins
    assert model.num_parameters() == size


@pytest.mark.parametrize(("model_type", "edit"), in_turn([RESIDUAL, BASIS]))
def test_saved_once_and_loaded_alike(tmp_path, model_type, edit):
    """The file holds each shared tensor once, and each residual. The reloaded model has equal outputs and the same
    ties."""
    model = fused(model_type, edit)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert count <= model.num_parameters() + sum(b.numel() for b in model.buffers())
    loaded = AutoFusedModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.num_parameters() == model.num_parameters()
    half = AutoFusedModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.num_parameters() == model.num_parameters()


@pytest.mark.parametrize(("model_type", "dropped"), in_turn([0, 5]))
def test_expands_to_an_equal_stock_model(model_type, dropped):
    """Expansion multiplies residuals and bases out: stock class and size, the same outputs, removed blocks included."""
    edits = (Fuse("layer", (1, 3), "share", "mean", rank=3), Fuse("mlp", (2, 4), "basis", rank=8), Drop("mlp", dropped))
    model = fused(model_type, *edits)
    stock = expand(model)
    original = tiny_model(model_type)
    assert type(stock) is type(original)
    assert not relaxed(stock)
    assert stock.state_dict().keys() == original.state_dict().keys()
    assert stock.num_parameters() == original.num_parameters()
    scale = outputs(model).abs().max()
    torch.testing.assert_close(outputs(stock) / scale, outputs(model) / scale, rtol=1e-5, atol=1e-5)


def test_mixed_plan(model_type):
    """One model can have groups with a rank, without one, with a basis, and dropped blocks; it verifies."""
    model = tiny_model(model_type)
    edits = (
        Fuse("attention", (0, 1), "share", "mean", rank=2),
        Fuse("attention", (2, 4), "share"),
        Fuse("mlp", (0, 5), "basis", rank=6),
        Fuse("mlp", (1, 2), operator="mean"),
        Drop("mlp", 3),
        Drop("attention", 5),
    )
    mixed = apply(model, Plan(model_type, LAYERS, edits))
    verify(mixed)
    architecture = architecture_for(model)
    names = [name.partition(".") for name in relaxed(layer_list(mixed))]
    found = {(int(layer), architecture.owner(f"{path}.weight")) for layer, _, path in names}
    assert found == {(0, "attention"), (1, "attention"), (0, "mlp"), (5, "mlp")}


@in_turns
def test_trains_and_stays_tied(model_type, edit):
    """Every parameter gets a gradient and changes; ties remain in training and after reloading."""
    model = fused(model_type, edit).train()
    ties = dict(model.all_tied_weights_keys)
    before = {name: p.detach().clone() for name, p in layer_list(model).named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    prediction(model(**dummy_inputs(model))).square().mean().backward()
    for name, module in relaxed(layer_list(model)).items():
        for own, parameter in module.named_parameters():
            assert parameter.grad is not None, (name, own)
            assert own == "bias" or parameter.grad.abs().sum() > 0, (name, own)
    optimizer.step()
    after = dict(layer_list(model).named_parameters())
    matrices = [name for name, value in before.items() if value.ndim >= 2]
    assert matrices
    assert all(not torch.equal(after[name], before[name]) for name in matrices)
    for copied, kept in ties.items():
        assert model.get_parameter(copied) is model.get_parameter(kept)
    assert verify(model)["reload"] == 0


def test_frozen_layer_starts_as_lora_does():
    """The layer whose weights are kept needs no correction: its B starts at zero and learns first, then A does."""
    model = fused("llama", Fuse("mlp", (1, 2), "share", rank=2))
    kept, other = (layer_list(model)[i].mlp.up_proj for i in (2, 1))
    assert not kept.residual_out.any()
    assert kept.residual_in.any()
    assert other.residual_out.any()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        prediction(model(**dummy_inputs(model))).square().mean().backward()
        optimizer.step()
    assert kept.residual_out.any()
    assert kept.residual_in.grad.any()


@pytest.mark.parametrize(
    ("model_type", "asked"), in_turn(itertools.product([RESIDUAL, BASIS], [torch.bfloat16, torch.float16]), rest=REST)
)
def test_half_precision(model_type, asked):
    """Factors are computed in float64 and cast once; the model runs, saves and merges in half precision."""
    edit, dtype = asked
    half = apply(tiny_model(model_type).to(dtype), Plan(model_type, LAYERS, (edit,)))
    assert {p.dtype for p in half.parameters()} == {dtype}
    exact = apply(tiny_model(model_type).to(dtype).double(), Plan(model_type, LAYERS, (edit,)))
    for name, module in relaxed(half).items():
        if isinstance(module, BasisLinear):
            merged = exact.get_submodule(name).merged_weight()
            error = (module.merged_weight() - merged).norm() / merged.norm()
            assert error < 3 * torch.finfo(dtype).eps
    assert expand(half).dtype == dtype
    if dtype == torch.bfloat16:
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in dummy_inputs(half).items()}
        verify(half, inputs=inputs)


@in_turns
def test_starts_from_scratch(model_type, edit):
    """A model built from its config alone has finite weights, ties, and residuals that initially add nothing."""
    config = fused(model_type, edit).config
    torch.manual_seed(0)
    model = fused_class(heads_of(model_type)[0])(copy.deepcopy(config)).eval()
    assert torch.isfinite(outputs(model)).all()
    assert model.num_parameters() == fused(model_type, edit).num_parameters()
    for module in relaxed(model).values():
        if isinstance(module, BasisLinear):
            assert module.weight.std() < 1
            assert module.coefficients.any()
        else:
            assert module.residual_in.any()
            assert not module.residual_out.any()
    assert verify(model)["reload"] == 0


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "qwen3"])
@both
def test_missing_residuals_are_named_and_drawn(tmp_path, model_type, edit):
    """A checkpoint without its residuals or coefficients is refused. transformers itself initialises them, and loads
    the rest from the file."""
    model = fused(model_type, edit)
    own = "residual_in" if edit.mode == "share" else "coefficients"
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(own)}
    ties = model.all_tied_weights_keys
    model.save_pretrained(tmp_path, state_dict={name: v for name, v in state.items() if name not in ties})
    with pytest.raises(CheckpointError, match=own):
        AutoFusedModel.from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        if name.endswith(own):
            assert torch.isfinite(value).all()
            assert 0 < value.std() < 1
        else:
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@both
def test_another_head_takes_the_body(tmp_path, model_type, edit):
    """A new head on a saved body is initialised; the body with residuals is loaded with its ties."""
    by_name = {head.__name__.removeprefix("Llama").removeprefix("GPT2"): head for head in heads_of(model_type)}
    body = fused(model_type, edit, head=by_name["Model"])
    body.save_pretrained(tmp_path)
    classifier = fused_class(by_name["ForSequenceClassification"]).from_pretrained(tmp_path)
    assert classifier.score.weight.std() > 0
    assert classifier.base_model.num_parameters() == body.num_parameters()
    for name, value in body.state_dict().items():
        assert torch.equal(classifier.base_model.state_dict()[name], value)


def test_rank_beyond_every_matrix_is_refused(model_type):
    """A rank that no matrix of the group can have is an error. If some can, the others get their full rank."""
    model = tiny_model(model_type)
    for kind, mode, layers, most in (
        ("attention", "share", (1, 2), 32),
        ("mlp", "share", (1, 2), 32),
        ("layer", "share", (1, 2), 32),
        ("attention", "basis", (1, 2), 32),
        ("mlp", "basis", (1, 4), 64 if model_type == "gpt2" else 48),
    ):
        with pytest.raises(PlanError, match=rf"Fuse\.rank is {most + 1}, but the matrices .* at most {most} "):
            apply(model, Plan(model_type, LAYERS, (Fuse(kind, layers, mode, rank=most + 1),)))
        apply(model, Plan(model_type, LAYERS, (Fuse(kind, layers, mode, rank=most),)))


def test_llama_keys_have_fewer_dimensions_than_queries():
    """Grouped keys and values get their full rank, which is smaller than that of the queries."""
    model = fused("llama", Fuse("attention", (1, 2), "share", rank=20))
    attention = layer_list(model)[1].self_attn
    assert (len(attention.q_proj.residual_in), len(attention.k_proj.residual_in)) == (20, 16)
    assert isinstance(attention.q_proj, ResidualLinear)
    assert isinstance(layer_list(fused("gpt2", RESIDUAL))[1].attn.c_attn, ResidualConv1D)


def test_maps_that_are_not_plain_are_refused():
    """A subclass of nn.Linear that computes something else gets no residual; it can still be shared. A subclass that
    computes the same (Falcon's) gets one."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias

    model = tiny_model("llama")
    for layer in layer_list(model):
        layer.mlp.up_proj.__class__ = Same
    apply(model, Plan("llama", LAYERS, (Fuse("mlp", (1, 2), "share", rank=2),)))
    for layer in layer_list(model):
        layer.mlp.up_proj.__class__ = Scaled
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj is a Scaled\. A residual needs an nn\.Linear"):
        apply(model, Plan("llama", LAYERS, (Fuse("mlp", (1, 2), "share", rank=2),)))
    apply(model, Plan("llama", LAYERS, (Fuse("attention", (1, 2), "share", rank=2),)))
