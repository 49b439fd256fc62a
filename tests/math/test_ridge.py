"""Least squares from moments, compared with the same fits on the rows themselves."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_layerfuse.calibration.refit.linear import fit_gain, fit_map, fold, store
from hf_layerfuse.math import ridge
from hf_layerfuse.math.ridge import STRENGTHS, Moments, compose, eliminate, fit
from hf_layerfuse.models.modules.shared_linear import Relaxed, out_in, relax, theta_of

IN, OUT, ROWS = 6, 4, 60


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def moments_of(x, y, *sizes):
    """Moments of rows added in parts of these sizes."""
    found = Moments.empty(x.shape[1], y.shape[1])
    for part in zip(x.split(list(sizes) or len(x)), y.split(list(sizes) or len(y)), strict=True):
        found.add(*part)
    return found


def tensors(moments):
    return moments.xx, moments.xy, moments.yy


@pytest.fixture
def data():
    """Inputs of unequal scale and nonzero mean, and targets that depend on them, with noise."""
    x = random(ROWS, IN) * torch.arange(1, IN + 1) + 0.5
    return x, x @ random(IN, OUT, seed=1) + random(1, OUT, seed=2) + 0.3 * random(ROWS, OUT, seed=3)


@pytest.fixture
def split(data):
    """Moments for fitting, and moments held out."""
    x, y = data
    return moments_of(x[:48], y[:48]), moments_of(x[48:], y[48:])


def test_scaled_rows_count_by_the_square_of_their_scale(data):
    """A row scaled by sqrt(3) counts like three rows in every fit and error; its constant is scaled too."""
    x, y = data
    found = Moments.empty(IN, OUT)
    found.add(x, y, torch.tensor([1.0, 3.0], dtype=torch.float64).sqrt().repeat(ROWS // 2)[:, None])
    thrice = moments_of(torch.cat([x, x[1::2], x[1::2]]), torch.cat([y, y[1::2], y[1::2]]))
    for one, other in zip(tensors(found), tensors(thrice), strict=True):
        torch.testing.assert_close(one, other)
    assert found.rows == pytest.approx(2 * ROWS)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_one_scale_for_all_rows_leaves_fits_and_errors(data, scale):
    """The mean error is that of the rows, also where scales are so small that they sum to less than one row."""
    x, y = data
    theta, found = random(IN + 1, OUT, seed=4), Moments.empty(IN, OUT)
    found.add(x, y, torch.full((ROWS, 1), scale, dtype=torch.float64))
    assert found.error(theta) == pytest.approx(moments_of(x, y).error(theta))
    torch.testing.assert_close(found.ridge(theta, 0.1), moments_of(x, y).ridge(theta, 0.1))


def test_without_a_penalty_it_is_least_squares(data):
    """With a vanishing penalty, the fit equals torch.linalg.lstsq, with a constant."""
    x, y = data
    expected = torch.linalg.lstsq(with_ones(x), y).solution
    torch.testing.assert_close(moments_of(x, y).ridge(torch.zeros(IN + 1, OUT).double(), 1e-13), expected)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0])
def test_ridge_is_the_closed_form(data, strength):
    """The fit is start + (X^T X + penalty)^-1 X^T (y - X start). The penalty is relative to the mean square of the
    inputs, pulls towards the start, and does not apply to the constant."""
    x, y = data
    start, ones = random(IN + 1, OUT, seed=4), with_ones(x)
    penalty = strength * x.square().sum() / IN * torch.diag(torch.tensor([1.0] * IN + [0.0]).double())
    expected = start + torch.linalg.solve(ones.T @ ones + penalty, ones.T @ (y - ones @ start))
    torch.testing.assert_close(moments_of(x, y).ridge(start, strength), expected)


def test_strong_penalties_leave_all_but_the_constant(data):
    """For any penalty, the constant stays free: the residuals have mean zero."""
    x, y = data
    start = random(IN + 1, OUT, seed=4)
    theta = moments_of(x, y).ridge(start, 1e9)
    torch.testing.assert_close(theta[:-1], start[:-1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((y - with_ones(x) @ theta).mean(0), torch.zeros(OUT).double(), atol=1e-6, rtol=0)


def test_error_is_that_of_the_rows(data):
    """The mean squared error from moments equals that of the rows for any map, and is never below zero."""
    x, y = data
    theta = random(IN + 1, OUT, seed=4)
    expected = (with_ones(x) @ theta - y).square().sum(1).mean()
    assert moments_of(x, y).error(theta) == pytest.approx(expected.item())
    assert 0 <= moments_of(x, with_ones(x) @ theta).error(theta) < 1e-10


@pytest.mark.parametrize("sizes", [(1,) * ROWS, (7, 50, 3), (0, 60, 0)])
def test_batches_do_not_matter(data, sizes):
    """Rows one by one, in unequal parts, or with empty parts have the same moments."""
    x, y = data
    for found, expected in zip(tensors(moments_of(x, y, *sizes)), tensors(moments_of(x, y)), strict=True):
        torch.testing.assert_close(found, expected)
    assert moments_of(x, y, *sizes).rows == ROWS


def test_moments_add_up(data):
    """The sum of two moments equals the moments of all rows, and leaves both unchanged."""
    x, y = data
    first, second = moments_of(x[:20], y[:20]), moments_of(x[20:], y[20:])
    before = first.xx.clone()
    for found, expected in zip(tensors(first + second), tensors(moments_of(x, y)), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(first.xx, before)


def test_sums_are_float64(data):
    """Rows in float32 are summed in float64: many rows have no larger error than one."""
    x, y = (part.float() for part in data)
    found = Moments.empty(IN, OUT)
    for _ in range(300):
        found.add(x, y)
    assert all(tensor.dtype == torch.float64 for tensor in tensors(found))
    single = Moments.empty(IN, OUT)
    single.add(x, y)
    for total, once in zip(tensors(found), tensors(single), strict=True):
        torch.testing.assert_close(total, 300 * once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [255, 256, 257, 600])
def test_moments_of_many_inputs(width):
    """Moments are the products of all pairs of inputs, for any block size of the computation."""
    x, y = random(40, width, seed=1), random(40, 3, seed=2)
    found = moments_of(x, y)
    torch.testing.assert_close(found.xx, with_ones(x).T @ with_ones(x))
    torch.testing.assert_close(found.xx, found.xx.T)


def test_mapped_inputs_and_targets(data):
    """`through` and `towards` give the moments after a map of the inputs or of the targets."""
    x, y = data
    first, aim = random(IN + 1, 5, seed=4), random(OUT + 1, 3, seed=5)
    found = moments_of(x, y).through(first).towards(aim)
    expected = moments_of(with_ones(x) @ first, with_ones(y) @ aim)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(one, other)


def test_composed_maps(data):
    """`compose` composes two maps, with their constants."""
    x, _ = data
    first, then = random(IN + 1, 5, seed=4), random(6, 3, seed=5)
    torch.testing.assert_close(with_ones(x) @ compose(first, then), with_ones(with_ones(x) @ first) @ then)


def test_moments_of_some_inputs(data):
    """`only` keeps the given inputs in the given order, and the constant."""
    x, y = data
    chosen = torch.tensor([4, 0, 3])
    for one, other in zip(tensors(moments_of(x, y).only(chosen)), tensors(moments_of(x[:, chosen], y)), strict=True):
        torch.testing.assert_close(one, other)


def test_centred_is_the_scatter(data):
    """`centred` gives the sums of squares and products about the means."""
    x, y = data
    whole = torch.cat([x, y], dim=1).T.cov() * (ROWS - 1)
    for found, expected in zip(
        moments_of(x, y).centred(), (whole[:IN, :IN], whole[:IN, IN:], whole[IN:, IN:]), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_fits_without_a_constant(data):
    """`linear` gives the best map among those without a constant, and the error that this map has."""
    x, y = data
    moments = moments_of(x, y).linear()
    theta = moments.ridge(torch.zeros(IN + 1, OUT).double(), 1e-13)
    assert torch.equal(theta[-1], torch.zeros(OUT).double())
    torch.testing.assert_close(theta[:-1], torch.linalg.lstsq(x, y).solution)
    assert moments.error(theta) == pytest.approx(moments_of(x, y).error(theta))


def test_strength_is_chosen_on_other_rows(split):
    """The strength is one of the candidates, and is best on the held-out rows within the tolerance of the search, which
    goes from strong to weak. All rows are then fitted with it."""
    train, held_out = split
    start = torch.zeros(IN + 1, OUT).double()
    errors = {strength: held_out.error(train.ridge(start, strength)) for strength in STRENGTHS}
    found = fit(train, held_out, start)
    assert found.after == errors[found.strength]
    weaker = max(strength for strength in STRENGTHS if strength < found.strength)
    assert found.after <= min(errors[s] for s in STRENGTHS if s >= found.strength)
    assert found.after < errors[weaker]
    assert found.before == held_out.error(start)
    torch.testing.assert_close(found.theta, (train + held_out).ridge(start, found.strength))
    assert found.theta.dtype == torch.float64


def test_noise_asks_for_a_strong_penalty():
    """Few noisy rows are fitted with a stronger penalty than many clean ones."""

    def strength(rows, noise):
        x = random(rows, IN, seed=7)
        y = x @ random(IN, OUT, seed=1) + noise * random(rows, OUT, seed=9)
        cut = rows // 2
        start = random(IN + 1, OUT, seed=1) * 0.9
        return fit(moments_of(x[:cut], y[:cut]), moments_of(x[cut:], y[cut:]), start).strength

    assert strength(16, 1.0) > strength(400, 0.01)


@pytest.mark.parametrize("targets", ["exact", "noise"])
def test_a_map_that_cannot_be_bettered_is_kept(data, targets):
    """If the start is exact, or the rows do not generalise, the start is kept to the bit."""
    x, _ = data
    start = random(IN + 1, OUT, seed=4)
    y = with_ones(x) @ start
    held_out = moments_of(x[48:], y[48:])
    if targets == "noise":
        y = y - 5 * random(ROWS, OUT, seed=8) * x[:, :1]
    found = fit(moments_of(x[:12], y[:12]), held_out, start)
    assert found.theta is start
    assert found.strength is None
    assert found.after == found.before


@pytest.mark.parametrize("seed", range(20))
def test_never_worse_than_the_start(seed):
    """For any rows, even fewer than inputs, the held-out error of the result is at most that of the start."""
    rows, inputs = 2 + seed % 7, 1 + seed % 5
    x, y = random(rows, inputs, seed=seed), random(rows, 2, seed=100 + seed)
    cut = max(1, rows // 5)
    held_out = moments_of(x[:cut], y[:cut])
    found = fit(moments_of(x[cut:], y[cut:]), held_out, random(inputs + 1, 2, seed=200 + seed))
    assert found.after <= found.before
    assert held_out.error(found.theta) <= found.before * (1 + 1e-12)


def test_nothing_to_choose_by():
    """Without held-out rows, or without any rows, there is no fit and no division by zero."""
    x, y = random(3, IN), random(3, OUT, seed=1)
    start = random(IN + 1, OUT, seed=4)
    for train in (moments_of(x, y), Moments.empty(IN, OUT)):
        found = fit(train, Moments.empty(IN, OUT), start)
        assert found.theta is start
        assert (found.before, found.after, found.strength) == (0, 0, None)


def test_inputs_that_are_dead():
    """Inputs that are always zero keep their weights. If all are, nothing changes."""
    x, y = random(ROWS, IN), random(ROWS, OUT, seed=1)
    start = random(IN + 1, OUT, seed=4)
    x[:, 2] = 0
    found = fit(moments_of(x[:48], y[:48]), moments_of(x[48:], y[48:]), start)
    torch.testing.assert_close(found.theta[2], start[2])
    assert not torch.allclose(found.theta[1], start[1])
    assert torch.equal(moments_of(0 * x, y).ridge(start, 1.0), start)


def test_eliminate_drops_what_costs_least(data):
    """Elimination picks the input whose removal raises the penalised error least, after the others adapt."""
    x, y = data
    moments, start, strength = moments_of(x, y), random(IN + 1, OUT, seed=4), 0.1
    penalty = strength * x.square().mean() * ROWS

    def cost(without):
        left = torch.tensor([i for i in range(IN) if i != without])
        part, part_start = x[:, left], torch.cat([start[left], start[-1:]])
        ones, held = with_ones(part), penalty * torch.diag(torch.tensor([1.0] * (IN - 1) + [0.0]).double())
        theta = part_start + torch.linalg.solve(ones.T @ ones + held, ones.T @ (y - ones @ part_start))
        gone = penalty * start[without].square().sum()
        return (y - ones @ theta).square().sum() + penalty * (theta - part_start)[:-1].square().sum() + gone

    least = min(range(IN), key=cost)
    assert eliminate(moments, start, IN - 1, strength).tolist() == [i for i in range(IN) if i != least]


def test_eliminate_drops_units_as_a_whole(data):
    """Elimination picks the pair of inputs whose removal raises the error least, after the others adapt."""
    x, y = data
    moments, start, strength = moments_of(x, y), random(IN + 1, OUT, seed=4), 0.1
    penalty = strength * x.square().mean() * ROWS

    def cost(unit):
        gone = [2 * unit, 2 * unit + 1]
        left = torch.tensor([i for i in range(IN) if i not in gone])
        ones, begin = with_ones(x[:, left]), torch.cat([start[left], start[-1:]])
        held = penalty * torch.diag(torch.tensor([1.0] * len(left) + [0.0]).double())
        theta = begin + torch.linalg.solve(ones.T @ ones + held, ones.T @ (y - ones @ begin))
        moved = (theta - begin)[:-1].square().sum() + start[gone].square().sum()
        return (y - ones @ theta).square().sum() + penalty * moved

    units = IN // 2
    least = min(range(units), key=cost)
    kept = eliminate(moments, start, units - 1, strength, size=2)
    assert kept.tolist() == [unit for unit in range(units) if unit != least]


def test_eliminate_finds_what_matters():
    """The inputs that determine the targets are kept, even if copies of other inputs are larger."""
    x = random(300, 24)
    x[:, 12:] = 3 * x[:, :12] + 0.3 * x[:, 12:]
    useful = torch.tensor([1, 4, 13, 20])
    y = x[:, useful] @ random(4, 5, seed=1)
    kept = eliminate(moments_of(x, y), torch.zeros(25, 5).double(), 4, 1e-5)
    assert torch.equal(kept, useful)


def test_eliminate_among_dead_inputs():
    """Inputs that are always zero are removed first. If all are, the requested number remains."""
    x, y = random(ROWS, IN), random(ROWS, OUT, seed=1)
    x[:, [1, 2, 5]] = 0
    start = torch.zeros(IN + 1, OUT).double()
    assert eliminate(moments_of(x, y), start, 3, 1e-3).tolist() == [0, 3, 4]
    assert len(eliminate(moments_of(0 * x, y), start, 3, 1e-3)) == 3


def linear(bias=True, kind=nn.Linear):
    torch.manual_seed(0)
    module = Conv1D(OUT, IN) if kind is Conv1D else nn.Linear(IN, OUT, bias=bias)
    module.bias = nn.Parameter(torch.randn(OUT)) if bias else None
    return module


def module_of(name):
    mode, _, rank = name.partition(" ")
    module = linear(kind=Conv1D if "Conv1D" in name else nn.Linear, bias="no bias" not in name)
    if mode not in ("share", "basis"):
        return module
    module = relax(module, mode, int(rank.split()[0]))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


MODULES = ["Linear", "Linear no bias", "Conv1D", "share 2", "share 2 Conv1D", "basis 3", "basis 3 Conv1D"]
every_module = pytest.mark.parametrize("name", MODULES)


@every_module
def test_theta_is_what_a_module_computes(data, name):
    """The map read from a module gives the module's outputs, for any orientation and number of parts."""
    x, _ = data
    module = module_of(name)
    torch.testing.assert_close(with_ones(x) @ theta_of(module), module.double()(x), rtol=1e-6, atol=1e-6)


FREE = {"share": {"residual_in", "residual_out", "bias"}, "basis": {"coefficients", "bias"}}


@every_module
def test_fitted_modules_are_nearer_to_the_targets(data, split, name):
    """Fitting lowers the held-out error of a module, reports the error before, and changes only free parameters."""
    x, y = data
    module = module_of(name)
    before = copy.deepcopy(module)
    found = fit_map(module, *split, tied=isinstance(module, Relaxed))

    def error(which):
        return (copy.deepcopy(which).double()(x[48:]) - y[48:]).square().sum(1).mean().item()

    assert found.before == pytest.approx(error(before), rel=1e-4)
    assert found.after < found.before
    assert error(module) < found.before
    state = before.state_dict()
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, state[key])}
    assert changed == FREE.get(name.split()[0], set(state))


@every_module
@pytest.mark.parametrize("tied", [True, False])
def test_modules_that_cannot_be_bettered_stay_as_they_are(data, name, tied):
    """A module that already gives the targets keeps every bit."""
    x, _ = data
    module = module_of(name)
    tied = tied or isinstance(module, Relaxed)
    y = with_ones(x) @ theta_of(module)
    before = copy.deepcopy(module.state_dict())
    fit_map(module, moments_of(x[:48], y[:48]), moments_of(x[48:], y[48:]), tied=tied)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=1e-6, atol=1e-6)


def test_a_tied_weight_stays(data, split):
    """If the weight of a plain map is tied, only the bias is fitted, and the residuals have mean zero. Without a bias,
    nothing is fitted."""
    x, y = data
    module = linear()
    weight = module.weight.clone()
    fit_map(module, moments_of(x[:48], y[:48] + 20), moments_of(x[48:], y[48:] + 20), tied=True)
    assert torch.equal(module.weight, weight)
    torch.testing.assert_close((y + 20 - module.double()(x)).mean(0), torch.zeros(OUT).double(), atol=1e-5, rtol=0)
    module = linear(bias=False)
    found = fit_map(module, *split, tied=True)
    assert torch.equal(module.weight, weight)
    assert found.after == found.before


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_without_noise_the_map_is_found(data, kind):
    """Targets from a map of the same shape are fitted exactly, with a bias and without."""
    x, _ = data
    for bias in (True, False) if kind is nn.Linear else (True,):
        module = linear(bias=bias, kind=kind)
        aim = random(IN + 1, OUT, seed=4)
        aim[-1] *= bias
        y = with_ones(x) @ aim
        fit_map(module, moments_of(x[:48], y[:48]), moments_of(x[48:], y[48:]), tied=False)
        torch.testing.assert_close(theta_of(module), aim, rtol=1e-3, atol=1e-3)


def test_a_map_without_a_bias_is_fitted_without_one(data, split):
    """Without a bias, the fit is the best map without a constant."""
    x, y = data

    def error(weight):
        return (y - x @ weight).square().sum()

    module = linear(bias=False)
    fit_map(module, *split, tied=False)
    lost = torch.linalg.lstsq(with_ones(x), y).solution[:-1]
    least = torch.linalg.lstsq(x, y).solution
    assert error(least) <= error(module.weight.double().T) < 1.01 * error(least) < error(lost)


@pytest.mark.parametrize("kind", ["", " Conv1D"])
def test_residuals_are_reduced_rank_regression(data, kind):
    """Beside a shared weight W, the residual minimises ||Y - X (W + B A)^T - b|| for its rank: it is the least squares
    fit, projected on the leading directions of its outputs."""
    x, y = data
    module = module_of(f"share 2{kind}")
    shared = out_in(module, module.weight).detach().double()
    fit_map(module, moments_of(x[:48], y[:48]), moments_of(x[48:], y[48:]), tied=True)
    inputs, rest = x - x.mean(0), (y - x @ shared.T) - (y - x @ shared.T).mean(0)
    best = torch.linalg.lstsq(inputs, rest).solution
    directions = torch.linalg.svd(inputs @ best).Vh[:2]
    least = (rest - inputs @ best @ directions.T @ directions).square().sum()
    plain = torch.linalg.svd(best)
    by_weights = plain.U[:, :2] * plain.S[:2] @ plain.Vh[:2]  # the nearest weight is not the one of nearest outputs
    left = y - module.double()(x)
    assert least <= left.square().sum() < 1.01 * least < (rest - inputs @ by_weights).square().sum()
    torch.testing.assert_close(left.mean(0), torch.zeros(OUT).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["", " Conv1D"])
def test_full_rank_is_as_good_as_free_weights(data, split, kind):
    """A residual of full rank beside a shared weight, or a basis of all inputs, is as good as a free map."""
    x, y = data
    best = (y - with_ones(x) @ torch.linalg.lstsq(with_ones(x), y).solution).square().sum()
    for name in (f"share {OUT}{kind}", f"basis {IN}{kind}"):
        module = module_of(name)
        fit_map(module, *split, tied=True)
        assert (y - module.double()(x)).square().sum() < 1.05 * best


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_folding(data, kind):
    """A map with another map folded in gives for x the output that it gave for the mapped x; without a bias, no
    constant is folded."""
    x, _ = data
    before = random(IN + 1, IN, seed=4)
    module = linear(kind=kind)
    expected = copy.deepcopy(module).double()(with_ones(x) @ before)
    fold(module, before)
    torch.testing.assert_close(module.double()(x), expected, rtol=1e-5, atol=1e-4)
    module = linear(bias=False)
    expected = copy.deepcopy(module).double()(x @ before[:-1])
    fold(module, before)
    torch.testing.assert_close(module.double()(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(data, split, dtype):
    """A map in half precision is fitted in float64 and rounded once."""
    module, twin = linear().to(dtype), linear().to(dtype).double()
    fits = [fit_map(each, *copy.deepcopy(split), tied=False) for each in (module, twin)]
    assert fits[0].after == pytest.approx(fits[1].after)
    assert torch.equal(module.weight, twin.weight.to(dtype))
    assert torch.equal(module.bias, twin.bias.to(dtype))


def test_storing_goes_around(data):
    """Reading a map returns the map that was written."""
    theta = random(IN + 1, OUT, seed=4)
    for kind in (nn.Linear, Conv1D):
        module = linear(kind=kind).double()
        store(module, theta)
        assert torch.equal(theta_of(module), theta)


class Scaled(nn.Module):
    """A norm that multiplies by a function of its weight."""

    def __init__(self, gain):
        super().__init__()
        self.weight = nn.Parameter(random(IN).float())
        self.gain = gain

    def forward(self, x):
        return nn.functional.layer_norm(x, (IN,)) * self.gain(self.weight)


def gain_case(bias, noise=0.0):
    """A norm, two maps that read it, and rows. The targets come from another gain, with noise, and with a constant if
    maps have a bias."""
    norm = nn.LayerNorm(IN)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias)
    readers, scale = [linear(bias=bias), linear(kind=Conv1D, bias=bias)], 1 + 0.5 * random(IN, seed=8)
    y = norm(random(ROWS, IN, seed=9).float()).double().detach()
    x = y / scale + noise * random(ROWS, IN, seed=10) + (3.0 if bias else 0.0)
    aims = [theta_of(reader) for reader in readers]
    return norm, list(zip(readers, aims, strict=True)), x, y, scale


@pytest.mark.parametrize("bias", [True, False])
def test_a_gain_that_explains_everything_is_found(bias):
    """If the inputs differ from the original's by one factor each, the norm gets these factors. A constant between them
    remains for the biases of the maps that read it."""
    norm, readers, x, y, scale = gain_case(bias)
    before = copy.deepcopy(norm)
    found = fit_gain(norm, readers, moments_of(x[:48], y[:48]), moments_of(x[48:], y[48:]))
    torch.testing.assert_close(found.theta[:-1, 0], scale, rtol=1e-3, atol=1e-3)
    assert found.after < 1e-4 * found.before
    probe = random(3, IN).float()
    torch.testing.assert_close(norm(probe), scale.float() * before(probe), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gain_is_the_least_squares_one(bias):
    """With noise, no other gain gives the maps a smaller error on the rows, for any biases."""
    norm, readers, x, y, _ = gain_case(bias, noise=0.3)
    moments = moments_of(x, y)
    found = fit_gain(norm, readers, moments, moments).theta[:-1, 0]

    def error(scale):
        total = 0.0
        for reader, aim in readers:
            left = (scale * x) @ theta_of(reader)[:-1] - y @ aim[:-1]
            total += (left - left.mean(0) if bias else left).square().sum().item()
        return total

    best = error(found)
    assert best < error(torch.ones_like(found))
    for seed in range(20):
        assert best <= error(found + 0.02 * random(IN, seed=seed)) * (1 + 1e-9)


def test_a_gain_of_one_plus_the_weight_is_scaled():
    """A norm that multiplies by 1 + weight, as Gemma's do, is scaled as others are."""
    norm, readers, x, y, _ = gain_case(bias=True)
    norm = Scaled(lambda weight: 1 + weight)
    probe = random(4, IN).float()
    before = norm(probe)
    found = fit_gain(norm, readers, moments_of(x[:48], y[:48]), moments_of(x[48:], y[48:]))
    assert found.after < found.before
    torch.testing.assert_close(norm(probe), found.theta[:-1, 0].float() * before)


def test_a_weight_that_is_no_gain_is_left_alone():
    """A norm whose output is not proportional to its weight keeps the weight, and the report says that nothing was
    fitted."""
    norm, readers, x, y, _ = gain_case(bias=True)
    norm = Scaled(torch.square)
    before = norm.weight.clone()
    found = fit_gain(norm, readers, moments_of(x[:48], y[:48]), moments_of(x[48:], y[48:]))
    assert torch.equal(norm.weight, before)
    assert found.strength is None
    assert found.before == found.after


@pytest.mark.parametrize("tied", [False, True])
def test_wide_fits_are_near_those_in_double_precision(data, monkeypatch, tied):
    """With float32 sums and solutions, as for wide inputs, errors and maps are those of float64 up to rounding."""
    x, y = data
    found = []
    for wide in (4096, IN - 1):
        monkeypatch.setattr(ridge, "_WIDE", wide)
        train, selection = (moments_of(*rows) for rows in ((x[:48], y[:48]), (x[48:], y[48:])))
        assert train.xx.dtype == (torch.float64 if wide == 4096 else torch.float32)
        module = linear()
        found.append((fit_map(module, train, selection, tied=tied), module.weight))
    (exact, expected), (ours, weight) = found
    assert ours.strength == exact.strength
    assert (ours.before, ours.after) == pytest.approx((exact.before, exact.after), rel=1e-4)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)


def test_moments_that_may_change_give_the_same_fit(split):
    """`consume` only saves memory."""
    start = theta_of(linear())
    plain = fit(*copy.deepcopy(split), start)
    consumed = fit(*copy.deepcopy(split), start, consume=True)
    assert torch.equal(plain.theta, consumed.theta)
    assert torch.equal(split[0].linear().xx, copy.deepcopy(split[0]).linear(consume=True).xx)
