"""What a proposal is chosen from, and by what."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from synthetic import Both, Problem, around

from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.tuning import TUNING

ROUND = TUNING.round_fractions


def test_solutions_are_doubted_more_than_steps():
    """By what the best of many flatters itself; the step is proposed where both are predicted alike."""
    problem = Problem(sites=30, levels=8)
    sampler = problem.sampler(0)
    around(problem, sampler, 0.8)
    steps = set(next(sampler.candidates.groups("newest")))
    both = next(sampler.candidates.groups("any"))
    assert steps
    assert {both[plan] for plan in steps & both.keys()} == {TUNING.steps_worse}
    assert {worse for plan, worse in both.items() if plan not in steps} == {TUNING.solutions_worse}
    step = next(iter(steps))
    other = (*step[1:], step[0])
    sampler.acquisition.values = lambda plans, pessimism: np.array([[0.1 * np.exp(0.15 * d), 0.5] for d in pessimism])
    assert sampler.acquisition.best({other: TUNING.solutions_worse, step: TUNING.steps_worse}) == step


def test_what_is_smaller_than_anything_measured_is_not_doubted():
    """It would be new on the front for any value within the box, which pessimism would take it out of."""
    problem = Problem(sites=30, levels=8)
    sampler = problem.sampler(0)
    around(problem, sampler, 0.95)
    ((known, size),) = sampler.predictor.history.met()
    plan = next(iter(sampler.predictor.history.measured))
    small, alike = problem.menu.cheapest, (*plan[1:], plan[0])
    values = {small: (0.9 * 0.5, 0.1), alike: (0.99 * known, size)}  # the first a tenth within the box
    sampler.acquisition.values = lambda plans, pessimism: np.array(
        [[values[plan][0] * np.exp(0.15 * d), values[plan][1]] for plan, d in zip(plans, pessimism, strict=True)]
    )
    candidates = {small: TUNING.solutions_worse, alike: 0.0}
    assert sampler.acquisition.best(candidates) == small
    sampler.predictor.history.measured[small] = replace(sampler.predictor.history.measured[plan], values=[1.0, 0.1])
    assert sampler.acquisition.best(candidates) == alike


def test_perplexity_follows_from_the_divergence_beside_it():
    problem = Both()
    sampler = problem.sampler(0)
    problem.run(problem.study(sampler), 12)
    plans = [(place,) * problem.sites for place in range(1, problem.levels)]
    divergence, _, perplexity = sampler.acquisition.values(plans, np.zeros(len(plans))).T
    np.testing.assert_allclose(perplexity, 30 * np.exp(1.3 * divergence), rtol=1e-6)
    assert (np.diff(perplexity) > 0).all()


# -- target budgets


def test_steps_end_at_round_kept_fractions():
    """Budgets are those at which limits are set; candidates that do not use them up are left out."""
    problem = Problem(sites=30, levels=8)
    sampler, menu = problem.sampler(0), problem.menu
    full, idle = (Lagrangian(menu).solve(share * menu.dense) for share in (0.7, 0.67))
    assert sampler.candidates.at_targets({full: 1.5, idle: 0.5, (0,) * 30: 0.5}) == {full: 1.5}
    around(problem, sampler, 0.79)
    for mode, targets in (("newest", {0.8}), ("any", set(ROUND))):
        first = next(sampler.candidates.groups(mode))
        sizes = [menu.size(plan) / menu.dense for plan in first]
        assert sizes
        assert {min(target for target in ROUND if target >= size) for size in sizes} <= targets
        assert all(min(target - size for target in ROUND if target >= size) < TUNING.slack for size in sizes)


def test_once_plans_at_targets_are_tried_others_are_proposed():
    """What is solved for elsewhere, before anything at random."""
    problem = Problem(sites=30, levels=8)
    sampler = problem.sampler(0)
    around(problem, sampler, 0.8)
    at_targets = set()
    for pessimism in islice(sampler.candidates.groups("newest"), 4):
        at_targets |= pessimism.keys()
    sampler.candidates.step = None  # which would fail
    assert sampler.propose(at_targets, "newest") not in at_targets


@pytest.mark.parametrize("limit", [0.637, 0.5, 0.75])
def test_a_limit_of_the_study_is_a_target(limit):
    """Nothing above it is solved for; what is just within is what will be asked for."""
    problem = Problem(sites=30, levels=8)
    goal = replace(problem.goal, excess=lambda values: np.maximum(values[:, 1] - limit, 0.0))
    menu, sampler = problem.menu, problem.sampler(0, goal)
    *below, most = sampler.targets / menu.dense
    expected = [target for target in sorted(ROUND) if menu.least / menu.dense <= target < limit - TUNING.slack]
    assert below[: len(expected)] == pytest.approx(expected, abs=1 / menu.dense)
    assert limit - TUNING.slack < most <= limit


@pytest.mark.parametrize(("low", "high", "expected"), [(0.55, 0.637, 0.637), (2.0, 3.0, 0.95)])
def test_limits_that_no_cheap_plan_meets_leave_the_targets(low, high, expected):
    """Of two sides, the upper one counts; where no plan of the menu meets them, none does."""
    problem = Problem(sites=30, levels=8)

    def missed(values):
        return np.maximum(values[:, 1] - high, 0) + np.maximum(low - values[:, 1], 0)

    sampler = problem.sampler(0, goal=replace(problem.goal, excess=missed))
    assert expected - TUNING.slack < sampler.targets[-1] / problem.menu.dense <= expected
    if low < 1:  # nor is there a target below the lower one
        assert low <= sampler.targets[0] / problem.menu.dense


def test_targets_are_fractions_of_what_is_searched():
    """Where the objective counts what no site of the space holds, 0.8 of it is less of the menu."""
    problem = Problem(sites=30, levels=8)
    menu = problem.menu

    def costs(plan):
        return {1: 0.2 + 0.8 * menu.size(menu.encode(plan)) / menu.dense}

    sampler = problem.sampler(0, goal=replace(problem.goal, costs=costs))
    kept = 0.2 + 0.8 * sampler.targets / menu.dense
    assert kept == pytest.approx(
        [target for target in sorted(ROUND) if target >= 0.2 + 0.8 * menu.least / menu.dense], abs=1e-3
    )


def test_solutions_end_at_targets_too():
    problem = Problem(sites=30, levels=8)
    sampler, menu = problem.sampler(0), problem.menu
    problem.run(problem.study(sampler), 10)
    first = next(sampler.candidates.groups("solve"))
    sizes = [menu.size(plan) / menu.dense for plan in first]
    assert len({min(target for target in ROUND if target >= size - 1e-9) for size in sizes}) >= 4
    assert all(min(target - size for target in ROUND if target >= size - 1e-9) < TUNING.slack for size in sizes)


def test_where_several_costs_count_budgets_are_free():
    problem = Problem(bytes=True)
    sampler = problem.sampler(0)
    assert not len(sampler.targets)
    assert sampler.candidates.at_targets({(0,) * 6: 0.5}) == {}
    at_targets, everywhere = islice(sampler.candidates.groups("solve"), 2)
    assert not at_targets
    assert len({problem.menu.size(plan) for plan in everywhere}) > 10
