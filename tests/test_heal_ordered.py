"""Healing by ordered dropout: what it finds in closed form, its sampler, its lasso, and what it leaves stored."""

import copy
from itertools import pairwise

import pytest
import torch
from healing import LENGTH, heal, settings, stopped_and_gone_on_with, windows
from healing import zoo as zoo  # a fixture

from rankfront.methods import InputError
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.search.factors.gradient import drawn_loss
from rankfront.search.heal import healing, logits, ordered, worth
from rankfront.search.heal.arms import ARMS
from rankfront.search.heal.fit import Fit
from rankfront.search.heal.ordered import Ordered, narrowed, pairs, ranked, spread
from rankfront.search.heal.settings import ORDERED, HealSettings
from rankfront.search.heal.trainable import Parameter, factored_modules, stored, training
from rankfront.search.heal.worth import widths_at
from rankfront.search.inputs.reached import differentiated


def low_rank(m, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankLinear(torch.randn(m, r, generator=generator) / r, torch.randn(r, n, generator=generator))


def arm_of(module, name="lod", lasso=0.0):
    own = [Parameter(name, tensor, "factor") for name, tensor in module.named_parameters()]
    arm = ARMS[name](module, module, own)
    arm.lasso = lasso
    return arm


def steps_of(arm, loss, steps, rate=2e-2):
    """Train ``arm`` on ``loss``, as a stage does."""
    with training(arm.parameters):
        run = Fit(arm.parameters, rate, steps)
        for step in range(steps):
            arm.before(step, steps)
            loss().backward()
            penalty = arm.penalty()
            if penalty is not None:
                penalty.backward()
            run.step()
            arm.after(step, steps)
    arm.finish()


# -- the optimum


@pytest.mark.parametrize("method", ORDERED)
@pytest.mark.parametrize("correlated", [False, True], ids=["uniform inputs", "correlated inputs"])
def test_every_truncation_of_one_trained_layer_is_that_of_the_svd_whitened_by_its_inputs(method, correlated):
    """From a random start: ‖(W − L[:, :b] R[:b]) S‖² is Σ_{i > b} σ_i² of W S, for every b at once."""
    generator = torch.Generator().manual_seed(3)
    root = torch.eye(8)
    if correlated:
        root = root + 0.3 * torch.randn(8, 8, generator=generator)
    weight = torch.randn(10, 8, generator=generator)
    module = low_rank(10, 8, 5)
    arm = arm_of(module, method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordered, "LEAST", 0.2)
        steps_of(arm, lambda: (module(root.T) - root.T @ weight.T).square().mean(), 1500)
    tails = torch.linalg.svdvals(weight @ root).square().flip(0).cumsum(0).flip(0)
    for width in range(1, 6):
        with narrowed(arm.groups, width / 5):
            error = float((module(root.T) - root.T @ weight.T).square().sum())
        assert error == pytest.approx(float(tails[width]), rel=1e-3), width


# -- what a step trains


def test_a_narrow_site_runs_on_its_first_components_and_gradients_reach_no_others():
    module, x = low_rank(6, 5, 4), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    arm = arm_of(module)
    with training(arm.parameters):
        arm.groups[0].narrow(2)
        assert torch.allclose(module(x), x @ module.right[:2].T @ module.left[:, :2].T, atol=1e-6)
        module(x).square().sum().backward()
        arm.finish()
        assert module.left.shape == (6, 4)
        for gradient, by_component in ((module.left.grad, 1), (module.right.grad, 0)):
            reached = gradient.abs().amax(1 - by_component) > 0
            assert reached.tolist() == [True, True, False, False]


def test_what_is_cut_changes_the_output_by_what_the_cut_components_make():
    module, x = low_rank(9, 8, 6), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    whole, changes = module(x), []
    for width in range(1, 7):
        with narrowed(ranked(module), width / 6):
            change = whole - module(x)
        cut = x @ module.right[width:].T @ module.left[:, width:].T
        assert torch.allclose(change, cut, atol=1e-5)
        changes.append(float(change.norm()))
    assert changes[-1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("method", "members"), [("hola", {2, 3}), ("shared-basis", {2})])
def test_modules_that_share_a_factor_are_narrowed_together(zoo, method, members):
    student = zoo.student(method)
    groups = ranked(student)
    assert {len(group.modules) for group in groups} == members
    assert sum(len(group.modules) for group in groups) == len(factored_modules(student))


# -- the sampler


def test_a_cycle_has_every_pair_once_and_every_round_every_site_that_is_left():
    ranks = [5, 3, 8]
    found = pairs(ranks, seed=7)
    assert sorted(found) == [(site, width) for site, rank in enumerate(ranks) for width in range(1, rank + 1)]
    rest = found
    for turn in range(max(ranks)):
        there = {site for site, rank in enumerate(ranks) if rank > turn}
        assert {site for site, _ in rest[: len(there)]} == there
        rest = rest[len(there) :]
    assert pairs(ranks, seed=7) == found
    assert pairs(ranks, seed=8) != found


@pytest.mark.parametrize("count", [8, 33, 200])
def test_every_stretch_of_a_sites_widths_is_spread_over_all_of_them(count):
    widths = spread(count, torch.Generator().manual_seed(2))
    for length in (4, 8):
        for start in range(0, count - length, 3):
            places = sorted(width / count for width in widths[start : start + length])
            gaps = [b - a for a, b in zip([0.0, *places], [*places, 1.0], strict=True)]
            assert max(gaps) < 3 / length


def test_a_training_goes_through_the_pairs_in_turn_and_begins_another_cycle_after_the_last():
    module = torch.nn.Sequential(low_rank(6, 5, 3), low_rank(4, 6, 2))
    arm = arm_of(module)
    seen = [arm.widths(step, 0) for step in range(10)]
    assert all(len(found) == 1 for found in seen)
    for cycle in (seen[:5], seen[5:]):
        assert sorted(pair for found in cycle for pair in found.items()) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    assert arm_of(copy.deepcopy(module)).widths(7, 0) == seen[7]  # of the seed and the step alone: it can go on there


def test_all_sites_together_are_at_one_share_of_their_ranks_spread_over_the_range():
    module = torch.nn.Sequential(low_rank(60, 60, 50), low_rank(60, 60, 20))
    arm = arm_of(module, "fjord")
    seen = [arm.widths(step, 0) for step in range(12)]
    shares = sorted(found[0] / 50 for found in seen)
    assert all(abs(found[0] / 50 - found[1] / 20) < 0.04 for found in seen)
    assert ordered.LEAST <= shares[0] < ordered.LEAST + 0.2
    assert 0.85 < shares[-1] <= 1
    assert max(b - a for a, b in pairwise(shares)) < 0.15


# -- the lasso


def test_importance_falls_along_components_and_the_lasso_is_the_sum_of_all_tail_norms():
    module = low_rank(7, 6, 5)
    arm = arm_of(module, lasso=0.5)
    importance = arm.groups[0].importance()
    assert bool((importance.diff() <= 0).all())
    left, right = module.left.double(), module.right.double()
    for b in range(5):
        assert float(importance[b]) == pytest.approx(float(left[:, b:].norm() * right[b:].norm()), rel=1e-5)
    slow = sum(float(left[:, b:].norm() + right[b:].norm()) for b in range(5))
    assert float(arm.penalty()) == pytest.approx(0.5 * slow, rel=1e-5)
    assert arm_of(module).penalty() is None


def test_the_gradient_of_the_lasso_is_finite_where_a_tail_is_zero():
    module = low_rank(7, 6, 5)
    arm = arm_of(module, lasso=1.0)
    arm.groups[0].drop(2)
    with training(arm.parameters):
        arm.penalty().backward()
        for tensor in (module.left, module.right):
            assert bool(torch.isfinite(tensor.grad).all())
        assert not module.left.grad[:, 2:].any()


def test_a_lasso_drops_components_from_the_end_and_they_stay_zero():
    """W has rank 3 of the 6 that are stored: with the lasso the rest goes, and what fits stays."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 3, generator=generator) @ torch.randn(3, 8, generator=generator)
    module = low_rank(9, 8, 6)
    arm = arm_of(module, lasso=1e-4)
    seen = []
    forward = arm.after

    def after(step, steps):
        forward(step, steps)
        seen.append(arm.groups[0].used())

    arm.after = after
    steps_of(arm, lambda: (module(torch.eye(8)) - weight.T).square().mean(), 1500)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == 3
    assert module.left.shape == (9, 6)
    assert not module.left[:, 3:].any()
    assert not module.right[3:].any()
    assert float((module.matrix() - weight).norm() / weight.norm()) < 0.02


# -- whole healings


def logits_alone(method, **more):
    return settings(stages=("logits",), method=method, **more)


def at(student, teacher, share):
    """Held-out divergence of a student at a share of its ranks."""
    from test_heal import divergence_of

    with narrowed(ranked(student), share):
        return divergence_of(student, teacher)


@pytest.mark.parametrize("method", ORDERED)
def test_healed_so_slices_are_nearer_to_the_dense_model_and_what_is_stored_keeps_its_shape(zoo, method, tmp_path):
    student, teacher = zoo.student("svd-llm"), zoo.teacher()
    before = {share: at(student, teacher, share) for share in (0.5, 0.7)}
    shapes = stored(student)
    (result,) = heal(zoo, student, tmp_path / "work", logits_alone(method, tokens=LENGTH * 4 * 40))
    assert result.after < result.before
    assert stored(student) == shapes
    assert all(at(student, teacher, share) < was for share, was in before.items())
    assert all(not {"left", "right"} & vars(module).keys() for module in factored_modules(student).values())


def test_all_sites_narrow_together_make_better_slices_than_training_at_full_rank(zoo, tmp_path):
    teacher, found = zoo.teacher(), {}
    for method in ("factors", "fjord"):
        student = zoo.student("svd-llm")
        heal(zoo, student, tmp_path / method, logits_alone(method, tokens=LENGTH * 4 * 60))
        found[method] = at(student, teacher, 0.5)
    assert found["fjord"] < found["factors"]


@pytest.mark.parametrize("method", ORDERED)
def test_at_full_rank_without_a_lasso_it_is_the_plain_training_step_for_step(zoo, method, tmp_path, monkeypatch):
    plain, wide = zoo.student("svd-llm"), zoo.student("svd-llm")
    heal(zoo, plain, tmp_path / "plain", logits_alone("factors"))
    monkeypatch.setattr(ordered, "SHARES", (1.0,))
    monkeypatch.setattr(
        ARMS[method], "widths", lambda arm, step, since: {n: group.rank for n, group in enumerate(arm.groups)}
    )
    heal(zoo, wide, tmp_path / "wide", logits_alone(method))
    for (name, one), other in zip(plain.state_dict().items(), wide.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_batch_in_parts_is_one_step(zoo, tmp_path):
    found = []
    for at_once in (4 * LENGTH, LENGTH):
        student = zoo.student("svd-llm")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(logits.AT_ONCE, "cpu", at_once)
            heal(zoo, student, tmp_path / str(at_once), logits_alone("fjord", tokens=LENGTH * 4))
        found.append(student.state_dict())
    for name, one in found[0].items():
        assert torch.allclose(one, found[1][name], atol=1e-5), name


@pytest.mark.parametrize(("method", "lasso"), [("lod", 0.0), ("lod", 1e-3), ("fjord", 1e-3)])
def test_stopped_and_gone_on_with_it_ends_where_it_would_have(zoo, method, lasso, tmp_path, monkeypatch):
    """With a lasso in the midst of what drops: all of it is in the tensors."""
    monkeypatch.setattr(healing, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(ordered, "DROPPED", 0.3)
    asked = logits_alone(method, lasso=lasso)
    whole = zoo.student("svd-llm")
    heal(zoo, whole, tmp_path / "whole", asked)
    for stop in (3, 8):
        again, *_ = stopped_and_gone_on_with(zoo, "svd-llm", asked, tmp_path / str(stop), stop)
        for (name, one), other in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
            assert torch.allclose(one, other, atol=1e-6), name


# -- what users may get wrong


def test_stages_plans_and_settings_that_it_is_none_for_are_named(zoo, tmp_path):
    with pytest.raises(InputError, match="leave blocks out of the stages"):
        HealSettings(1000, ("blocks", "logits"), "lod")
    with pytest.raises(InputError, match="low-rank factors, and the plan has none"):
        heal(zoo, zoo.student("nystrom"), tmp_path / "b", logits_alone("lod"))
    for method, lasso in (("factors", 1e-3), ("lod", -1.0), ("lod", float("nan"))):
        with pytest.raises(InputError, match="heal lasso"):
            HealSettings(1000, ("logits",), method, lasso=lasso)
    assert {name for name, arm in ARMS.items() if issubclass(arm, Ordered)} == set(ORDERED)


# -- which widths


def test_widths_of_all_sites_store_their_share_and_what_is_worth_more_keeps_more(zoo):
    student = zoo.student("svd-llm")
    groups = ranked(student)
    sites, shares = [group.modules for group in groups], (0.3, 0.5, 0.8, 1.0)
    found = widths_at(student, sites, windows(4), shares, 0)
    values = [sum(m.left.shape[0] + m.right.shape[1] for m in group.modules) for group in groups]
    whole = sum(value * group.rank for value, group in zip(values, groups, strict=True))
    for share, widths in zip(shares, found, strict=True):
        assert all(1 <= width <= group.rank for width, group in zip(widths, groups, strict=True))
        assert sum(value * width for value, width in zip(values, widths, strict=True)) <= share * whole
    assert found[-1] == [group.rank for group in groups]
    with torch.no_grad():
        for module in groups[0].modules:
            module.left[:, 1:] = 0  # nothing is lost by cutting it to one component
    assert widths_at(student, sites, windows(4), (0.8,), 0)[0][0] == 1


def test_what_a_cut_is_predicted_to_cost_is_the_slow_sum_over_tokens(zoo):
    student, ids = zoo.student("svd-llm"), windows(2)
    groups = ranked(student)
    module, path = groups[3].modules[0], {m: n for n, m in student.named_modules()}[groups[3].modules[0]]
    seen = {}

    def keep(_, inputs, output):
        seen["x"] = inputs[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: seen.update(h=gradient.flatten(0, -2)))

    with differentiated(student, [(path, keep)]):
        logits = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        drawn_loss(logits, torch.Generator().manual_seed(0)).backward()
    fast = worth._tails(student, [group.modules for group in groups], ids, 0)[3]
    for width in (0, 1, module.rank - 1):
        cut = seen["x"] @ (module.left[:, width:] @ module.right[width:]).T
        assert float(fast[width]) == pytest.approx(0.5 * float((seen["h"] * cut).sum(1).square().mean()), rel=1e-4)
