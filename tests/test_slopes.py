"""Slopes around a compressed plan: against directional derivatives in fp64 and slow token-by-token sums."""

import copy

import common
import numpy as np
import pytest
import torch
from torch import nn

from rankfront.methods import DENSE_OPTION, Grid, get_method
from rankfront.methods.layers import replacement, set_module, weight_of
from rankfront.objectives import score, teach
from rankfront.search.factors.store import FactorStore
from rankfront.search.inputs import memory
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure.slopes import measure_slopes
from rankfront.search.plans.job import PASSES
from rankfront.search.run.budget import slope_tokens
from rankfront.search.tuning import TUNING

WINDOWS, LENGTH, SEED = 3, 16, 5
NAMES = ("llama", "gpt2")


class Between(nn.Module):
    """y = (W + t D) x + bias with t = 0: the module whose slope along D is wanted, in fp64."""

    def __init__(self, start, direction, bias):
        super().__init__()
        self.start, self.direction, self.bias = start, direction, bias
        self.t = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def forward(self, x):
        matrix = self.start + self.t * self.direction
        return nn.functional.linear(x, matrix, self.bias) if x.is_floating_point() else matrix[x]


class World:
    """A tiny model that runs a plan: every site, the embedding too, at dense or at one of its svd options."""

    def __init__(self, name, folder, seed=0, treated=True, dtype=torch.float32):
        self.model = common.architecture(name).build().to(dtype)
        self.store = FactorStore(name, "text", dtype, folder)
        self.sites = [site for site in find_sites(self.model) if get_method("svd").refuses(site) is None]
        self.wanted, self.current, self.dense = {}, {}, {}
        random = np.random.default_rng(seed)
        for number, site in enumerate(self.sites):
            found = set(get_method("svd").options(site, Grid((0.3, 0.6), 2)).values())
            self.wanted[site] = sorted(found, key=lambda option: option.label)
            (weight,) = site.weights
            self.store.prepare(site, self.wanted[site], {weight.role: self._weight(weight)}, {})
            for path in (weight.path, *weight.tied):
                self.dense[path] = self.model.get_submodule(path)
            options = [DENSE_OPTION, *self.wanted[site]]
            self.current[site.name] = options[(number + int(random.integers(3))) % 3] if treated else DENSE_OPTION
        self.teacher = teach(self.model, windows())
        for site in self.sites:
            self.apply(self.model, site)

    def _weight(self, weight):
        return weight_of(self.model.get_submodule(weight.path))

    def apply(self, model, site):
        option, (weight,) = self.current[site.name], site.weights
        if option != DENSE_OPTION:
            factors = self.store.factors(site, option)[weight.role]
            dtype = next(model.parameters()).dtype
            shared = {name: nn.Parameter(t.to(dtype).contiguous(), False) for name, t in factors.tensors.items()}
            for path in (weight.path, *weight.tied):
                set_module(model, path, replacement(self.dense[path], factors.kind, shared))

    def matrix(self, site, option):
        """Ŵ of an option, or W, (m, n) in fp64."""
        (weight,) = site.weights
        if option == DENSE_OPTION:
            return weight_of(self.dense[weight.path]).double()
        left, right = (self.store.factors(site, option)[weight.role].tensors[name] for name in ("left", "right"))
        return left.double() @ right.double()

    def slopes(self, teacher=None, seed=SEED, wanted=None):
        wanted = self.wanted if wanted is None else wanted
        return measure_slopes(self.model, windows(), wanted, self.current, self.dense, self.store, teacher, seed)

    def moving(self, path, start, direction):
        """The model in fp64 with a `Between` at ``path``, and that."""
        model, bias = copy.deepcopy(self.model).double(), getattr(self.dense[path], "bias", None)
        between = Between(start, direction, None if bias is None else bias.double())
        set_module(model, path, between)
        return model, between

    def slow_first(self, site, option, kl):
        """d/dt of the mean loss over predicted tokens, with Ŵ_i + t (Ŵ_o − Ŵ_i) at the site, at t = 0, in fp64."""
        path, ids = site.weights[0].path, windows()
        start = self.matrix(site, self.current[site.name])
        model, between = self.moving(path, start, self.matrix(site, option) - start)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        q = logits.log_softmax(-1)
        if kl:
            p = torch.zeros_like(q).scatter_(-1, self.teacher.indices.long(), self.teacher.log_probabilities.double())
            loss = (p.exp() * (p - q)).sum(-1).mean()
        else:
            loss = -q.gather(-1, ids[:, 1:, None]).mean()
        (slope,) = torch.autograd.grad(loss, between.t)
        return float(slope)

    def slow_second(self, site, option, step=WINDOWS, drawn=True):
        """½ (1/N) Σ_t (h_tᵀ (Ŵ_o − Ŵ_i) x_t)², token by token, with the labels drawn again, or those of the text."""
        module, seen = self.model.get_submodule(site.weights[0].path), {}
        change = self.matrix(site, option) - self.matrix(site, self.current[site.name])
        generator, total = torch.Generator().manual_seed(SEED), 0.0

        def hook(module, inputs, output):
            seen["x"] = common.arrived(inputs[0])
            seen["added"] = torch.zeros_like(output, requires_grad=True)
            return output + seen["added"]

        handle = module.register_forward_hook(hook)
        for start in range(0, WINDOWS, step):
            logits = self.model(input_ids=windows()[start : start + step], use_cache=False).logits[:, :-1].flatten(0, 1)
            labels = windows()[start : start + step, 1:].flatten()
            if drawn:
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = -logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
            (gradient,) = torch.autograd.grad(loss, seen["added"])
            for h, x in zip(gradient.flatten(0, -2).double(), seen["x"], strict=True):
                total += 0.5 * float(h @ common.product(change, x)) ** 2
        handle.remove()
        return total / (WINDOWS * (LENGTH - 1))


def windows():
    return common.tokens(WINDOWS, LENGTH)


@pytest.fixture(params=NAMES)
def world(request, tmp_path):
    return World(request.param, tmp_path)


@pytest.fixture
def llama(tmp_path):
    return World("llama", tmp_path)


def every(world):
    """(site, option) of every switch, dense included."""
    return [(site, option) for site, options in world.wanted.items() for option in (DENSE_OPTION, *options)]


# -- against slow code


@pytest.mark.parametrize("kl", [False, True], ids=["likelihood", "divergence"])
def test_a_is_the_derivative_along_the_switch(world, kl):
    """Through every other module of the plan as it is, compressed or not."""
    found = world.slopes(world.teacher if kl else None)
    treated = [option for option in world.current.values() if option != DENSE_OPTION]
    assert 0 < len(treated) < len(world.current)
    slow = {(site, option): world.slow_first(site, option, kl) for site, option in every(world)}
    largest = max(map(abs, slow.values()))
    for (site, option), expected in slow.items():
        assert found[site.name][option.label][0] == pytest.approx(expected, rel=1e-3, abs=1e-5 * largest)


def test_b_is_the_quadratic_form_of_drawn_labels(world):
    found = world.slopes(world.teacher)
    for site, option in every(world):
        expected = world.slow_second(site, option)
        assert found[site.name][option.label][1] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_b_of_the_likelihood_is_that_of_its_own_labels(world):
    found = world.slopes()
    for site, option in every(world):
        expected = TUNING.own_labels * world.slow_second(site, option, drawn=False)
        assert found[site.name][option.label][1] == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("batch", [1, 2 * LENGTH])
def test_batches_add_up(llama, monkeypatch, batch):
    """Each with its own part of the teacher, and its labels drawn after the last one's."""
    monkeypatch.setattr("rankfront.search.measure.slopes.BATCH_TOKENS", batch)
    found = llama.slopes(llama.teacher)
    for site, option in every(llama)[::7]:
        a, b = found[site.name][option.label]
        assert a == pytest.approx(llama.slow_first(site, option, kl=True), rel=1e-3, abs=1e-6)
        assert b == pytest.approx(llama.slow_second(site, option, max(1, batch // LENGTH)), rel=1e-3, abs=1e-9)


def test_it_says_what_a_small_step_changes(llama):
    """Measured with `score`: the loss a hundredth of the way to another option, and back, by its slope."""
    found = llama.slopes()
    site = next(site for site in llama.wanted if llama.current[site.name] != DENSE_OPTION)
    start = llama.matrix(site, llama.current[site.name])
    for option in (DENSE_OPTION, *llama.wanted[site]):
        step = 0.01 * (llama.matrix(site, option) - start)
        moved = [llama.moving(site.weights[0].path, start + sign * step, 0 * step)[0] for sign in (-1, 1)]
        before, after = (score(model, windows()).loss for model in moved)
        assert found[site.name][option.label][0] == pytest.approx((after - before) / 0.02, rel=0.02, abs=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_says_the_same(name, tmp_path):
    """Within what rounding leaves of sums over few tokens."""
    exact, half = (World(name, tmp_path / str(dtype), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    switches = [(site, option) for site, option in every(exact) if option != exact.current[site.name]]
    found = [world.slopes(world.teacher) for world in (exact, half)]
    a, b = np.array([[one[site.name][option.label] for site, option in switches] for one in found]).transpose(2, 0, 1)
    assert np.corrcoef(a)[0, 1] > 0.98
    assert np.corrcoef(np.log(b))[0, 1] > 0.9


# -- what must hold


def test_every_site_and_option_is_there(world):
    found = world.slopes()
    assert found.keys() == {site.name for site in world.wanted}
    for site, options in world.wanted.items():
        assert found[site.name].keys() == {DENSE_OPTION.label, *(option.label for option in options)}
        assert all(b >= 0 for _, b in found[site.name].values())


def test_staying_changes_nothing(world):
    for site, switches in world.slopes(world.teacher).items():
        for label, pair in switches.items():
            assert (pair == (0.0, 0.0)) == (label == world.current[site].label)


@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_flat_around_the_dense_model(name, tmp_path):
    """KL has its minimum there, so only b is left; likelihood has no reason to be flat."""
    world = World(name, tmp_path, treated=False)
    flat, steep = world.slopes(world.teacher), world.slopes()
    for site, option in every(world):
        if option != DENSE_OPTION:
            a, b = flat[site.name][option.label]
            assert abs(a) < 1e-5
            assert b > 1e-6
    assert max(abs(steep[site.name][option.label][0]) for site, option in every(world)) > 1e-2


def test_the_plan_matters(tmp_path):
    """Of two plans that differ in one site, all the other sites' slopes differ too."""
    world = World("llama", tmp_path)
    before = world.slopes(world.teacher)
    site = next(site for site in world.wanted if world.current[site.name] == DENSE_OPTION)
    world.current[site.name] = world.wanted[site][0]
    world.apply(world.model, site)
    after = world.slopes(world.teacher)
    changed = [before[other] != after[other] for other in before if other != site.name]
    assert np.mean(changed) > 0.9


def test_labels_come_from_the_seed(llama):
    first, second, other = (llama.slopes(llama.teacher, seed) for seed in (1, 1, 2))
    assert first == second
    for site, switches in first.items():
        for label, (a, b) in switches.items():
            assert other[site][label][0] == a  # drawn labels are for curvature alone
            assert other[site][label][1] != b or b == 0


def test_every_method_of_a_study_has_slopes(resident):
    """With the factors of a real study and its resident model, around a plan of it."""
    plan = common.random_plan(resident, 3)
    resident.compressed.apply(plan)
    wanted = resident.compressed.space.wanted()
    found = measure_slopes(
        resident.compressed.model,
        windows(),
        wanted,
        resident.compressed.current,
        resident.compressed.dense_modules,
        resident.compressed.store,
        None,
        SEED,
    )
    for site, options in wanted.items():
        assert found[site.name].keys() == {DENSE_OPTION.label, *(option.label for option in options)}
        assert found[site.name][plan.option(site.name).label] == (0.0, 0.0)
        assert all(np.isfinite(pair).all() for pair in found[site.name].values())


# -- what it leaves behind


def traces(model):
    """How many hooks and gradients there are, on modules that wait for their turn too."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return hooks, sum(parameter.grad is not None for parameter in model.parameters())


def test_the_model_is_left_as_it_was(world):
    before = world.model(input_ids=windows(), use_cache=False).logits
    weights = [parameter.clone() for parameter in world.model.parameters()]
    world.slopes(world.teacher)
    after = world.model(input_ids=windows(), use_cache=False).logits
    assert not after.requires_grad
    assert torch.equal(after, before)
    assert all(torch.equal(a, b) for a, b in zip(world.model.parameters(), weights, strict=True))
    assert not any(parameter.requires_grad for parameter in world.model.parameters())
    assert [traces(model) for model in (world.model, *world.dense.values())] == [(0, 0)] * (1 + len(world.dense))


@pytest.mark.parametrize("broken", ["forward", "products", "multinomial"])
def test_after_an_error_no_hook_is_left(world, monkeypatch, broken):
    """Before, within and between the backward passes."""

    def fail(*_, **__):
        raise MemoryError

    if broken == "multinomial":
        monkeypatch.setattr(torch, "multinomial", fail)
    elif broken == "products":
        monkeypatch.setattr("rankfront.search.measure.slopes.products", fail)
    else:
        monkeypatch.setattr(type(world.model), "forward", fail)
    with pytest.raises(MemoryError):
        world.slopes(world.teacher)
    monkeypatch.undo()
    assert [traces(model) for model in (world.model, *world.dense.values())] == [(0, 0)] * (1 + len(world.dense))
    assert world.slopes(world.teacher)


def test_late_slopes_read_more():
    """A twentieth of what a study has spent, of as many passes as the loss takes; few tokens would say little."""
    assert slope_tokens(0, "perplexity") == TUNING.slope_tokens
    for quality, passes in PASSES.items():
        assert slope_tokens(4_000_000, quality) == 200_000 // passes


@pytest.mark.parametrize("teaches", [False, True])
def test_blocks_run_again_where_a_pass_has_no_room_and_slopes_stay(world, teaches, monkeypatch):
    teacher = world.teacher if teaches else None
    held = world.slopes(teacher)
    monkeypatch.setattr(memory, "AMPLE", 0.0)
    assert world.slopes(teacher) == held
