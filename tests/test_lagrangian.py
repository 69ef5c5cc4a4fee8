"""The allocator by Lagrangian relaxation: against the integer program and brute force, on random menus."""

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic import compatible
from test_allocate import budgets, every_choice, every_plan, joint_menu, make_line, random_menu

from rankfront.methods import InputError, Option
from rankfront.search.plans.knapsack import knapsack_several
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Line, Menu

LARGE = [(seed, lines, options) for seed in range(2) for lines, options in ((40, 6), (60, 12), (45, 3))]
SMALL = [(seed, lines, options) for seed in range(12) for lines, options in ((4, 5), (5, 4), (6, 4))]


def large_menu(seed, lines, options):
    return random_menu(seed, lines, options, largest=400)


def divergences(menu):
    return [line.divergence for line in menu.lines]


def around_a_plan(menu, seed):
    """Losses as slopes have them: relative to a random plan, where they are 0, elsewhere of either sign, dense too."""
    random = np.random.default_rng(seed)
    losses = []
    for line in menu.lines:
        place = random.integers(len(line.options))
        change = line.divergence - line.divergence[place] + random.normal(0, 0.2, len(line.options))
        change[place] = 0.0
        losses.append(change)
    return losses


def total(losses, plan):
    return sum(float(loss[place]) for loss, place in zip(losses, plan, strict=True))


def within(menu, count=12):
    return [budget for budget in budgets(menu, count) if budget >= menu.least]


# -- against exact solvers


@pytest.mark.parametrize(("seed", "lines", "options"), LARGE)
def test_it_is_nearly_the_integer_program(seed, lines, options):
    """Relaxation finds the convex hull alone; on many lines what lies between is filled nearly as well."""
    menu = large_menu(seed, lines, options)
    solver, excess = Lagrangian(menu), []
    for budget in within(menu, 12):
        plan = solver.solve(budget)
        assert menu.size(plan) <= budget
        best = menu.divergence(knapsack_several(menu, budget))
        assert menu.divergence(plan) >= best - 1e-9
        excess.append((menu.divergence(plan) - best) / max(best, 1e-9))
        assert menu.divergence(plan) <= 1.05 * best + 0.003 * menu.divergence(menu.cheapest)
    assert np.median(excess) <= 0.005
    assert np.mean(np.array(excess) <= 0.05) >= 0.85


def test_on_a_menu_as_large_as_a_study_gets_it_is_the_integer_program_to_a_thousandth():
    """210 sites of 20 options."""
    menu = random_menu(0, 210, 20, unit=64, largest=9_000)
    solver = Lagrangian(menu)
    for share in (0.2, 0.6):
        budget = menu.least + share * (menu.dense - menu.least)
        plan, best = solver.solve(budget), knapsack_several(menu, budget, gap=1e-4)
        assert menu.size(plan) <= budget
        assert menu.divergence(plan) <= 1.001 * menu.divergence(best)


@pytest.mark.parametrize(("seed", "lines", "options"), LARGE)
def test_losses_may_be_negative_and_dense_need_not_be_free(seed, lines, options):
    """Slopes say what a switch changes, which may be for the better."""
    menu = large_menu(seed, lines, options)
    losses = around_a_plan(menu, seed)
    solver = Lagrangian(menu, losses)
    best = {budget: total(losses, knapsack_several(menu, budget, losses=losses)) for budget in within(menu, 6)}
    assert min(best.values()) < 0
    span = max(best.values()) - min(best.values())
    for budget, least in best.items():
        plan = solver.solve(budget)
        assert menu.size(plan) <= budget
        assert least - 1e-9 <= total(losses, plan) <= least + 0.03 * span


def test_losses_may_all_be_negative():
    """Nothing at all to pay for saving: no slope from dense is positive."""
    menu = large_menu(0, 45, 5)
    random = np.random.default_rng(0)
    losses = [-random.exponential(0.1, len(line.options)) for line in menu.lines]
    solver = Lagrangian(menu, losses)
    for budget in within(menu, 6):
        plan = solver.solve(budget)
        assert menu.size(plan) <= budget
        assert total(losses, plan) <= 0.97 * total(losses, knapsack_several(menu, budget, losses=losses))


def test_an_option_of_which_nothing_is_known_is_not_taken():
    """Its loss is infinite; the plan that slopes were measured around is always there to return."""
    for seed in range(6):
        menu = random_menu(seed, 6, 4)
        random = np.random.default_rng(seed)
        centre = [int(random.integers(1, len(line.options))) for line in menu.lines]
        losses = around_a_plan(menu, seed)
        for loss, place in list(zip(losses, centre, strict=True))[:2]:
            loss[:] = np.inf
            loss[place] = 0.0
        solver = Lagrangian(menu, losses)
        for budget in (menu.size(centre), menu.size(centre) + 40, menu.dense):
            plan = solver.solve(budget)
            assert menu.size(plan) <= budget
            assert math.isfinite(total(losses, plan))
            assert tuple(plan[:2]) == tuple(centre[:2])


def test_on_few_lines_it_is_nearly_always_the_best():
    """By brute force: a hull of few points leaves large gaps, not all of which are filled."""
    exact = []
    for seed, lines, options in SMALL:
        menu = random_menu(seed, lines, options)
        solver = Lagrangian(menu)
        plans = [(menu.size(plan), menu.divergence(plan)) for plan in every_plan(menu)]
        for budget in within(menu, 10):
            least = min(value for stored, value in plans if stored <= budget)
            found = menu.divergence(solver.solve(budget))
            assert found >= least - 1e-9
            exact.append(found <= least + 1e-9)
    assert np.mean(exact) >= 0.85


# -- sites that share weights


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_joint_sites_are_never_treated_beside_their_own_weights(seed, around):
    menu = joint_menu(seed, blocks=1 + seed % 2)
    solver = Lagrangian(menu, around_a_plan(menu, seed) if around else divergences(menu))
    for budget in within(menu):
        plan = solver.solve(budget)
        assert compatible(menu, plan)
        assert menu.size(plan) <= budget


def test_joint_sites_are_solved_well():
    """Over every compatible choice; a move that takes two at once can be missed."""
    gaps = []
    for seed in range(0, 16, 2):
        menu = joint_menu(seed, blocks=1)
        solver = Lagrangian(menu)
        choices = [(menu.size(places), menu.divergence(places)) for places in every_choice(menu)]
        for budget in within(menu):
            least = min(value for stored, value in choices if stored <= budget)
            gaps.append((menu.divergence(solver.solve(budget)) - least) / max(least, 1e-3))
    assert min(gaps) >= -1e-9
    assert np.median(gaps) == pytest.approx(0, abs=1e-9)
    assert np.mean(np.array(gaps) <= 0.1) >= 0.7


def test_a_joint_site_stays_where_nothing_is_known_of_leaving_it():
    """As slopes around a plan that treats two weights as one: they say what single sites would change, but not that."""
    singles = [make_line(name, [80, 10], [0.0, 1.0]) for name in "ab"]
    menu = Menu((*singles, replace(make_line("a+b", [160, 100], [0.0, 0.1]), weights=("a", "b"))))
    solver = Lagrangian(menu, [np.array([0.0, -0.1]), np.array([0.0, 2.0]), np.array([np.inf, 0.0])])
    for budget in (100, 120, 150):
        assert solver.solve(budget) == (0, 0, 1)


def tied_menu(seed, blocks=72, options=8):
    """A line for each block, and one for any 2, 3 and 4 that follow each other, as bases that blocks share."""
    lines = list(random_menu(seed, blocks, options, largest=400).lines)
    for width in (2, 3, 4):
        drawn = random_menu(seed + width, blocks, options, largest=400).lines
        for first in range(0, blocks, width):
            claimed, own = lines[first : first + width], drawn[first]
            sizes = (own.sizes * (sum(int(line.sizes[0]) for line in claimed) / own.sizes[0])).astype(int)
            names = tuple(line.site for line in claimed)
            lines.append(Line("+".join(names), own.options, sizes, width * own.divergence, names))
    return Menu(tuple(lines))


def test_groups_that_tie_many_blocks_together_are_solved_well():
    menu = tied_menu(0)
    assert len(menu.regions) == 6
    solver, gaps = Lagrangian(menu), []
    for budget in within(menu, 5):
        plan, best = solver.solve(budget), menu.divergence(knapsack_several(menu, budget, gap=1e-3))
        assert compatible(menu, plan)
        assert menu.size(plan) <= budget
        gaps.append((menu.divergence(plan) - best) / max(best, 1e-3))
    assert np.median(gaps) <= 0.01
    assert max(gaps) <= 0.1


def weighed_joint_menu(random, blocks=8):
    """Values and outputs, alone or joint, whose options may take more of the second cost than dense."""
    lines = []
    for block in range(blocks):
        names = [f"{block}.v", f"{block}.o", f"{block}.vo"]
        for name, width, weights in zip(names, (1, 1, 2), ((), (), tuple(names[:2])), strict=True):
            options = (Option.of("dense"), *(Option.of("svd", rank=rank) for rank in (3, 2, 1)))
            sizes = width * np.array([100, 75, 55, 35])
            more = width * np.array([100, *random.integers(60, 140, 3)])
            divergence = np.array([0.0, *(width * 0.01 * np.array([1, 4, 9]) * random.uniform(0.5, 2, 3))])
            lines.append(Line(name, options, sizes, divergence, weights, (more,)))
    return Menu(tuple(lines)).weighed([1 - (weight := random.uniform()), weight])


def test_exchanges_never_treat_a_weight_twice_where_options_may_be_dearer_than_dense():
    for seed in range(120):
        random = np.random.default_rng(seed)
        menu = weighed_joint_menu(random)
        losses = []
        for line in menu.lines:
            place = 0 if random.uniform() < 0.7 else int(random.integers(4))
            change = line.divergence - line.divergence[place] + random.normal(0, 0.03, 4)
            change[place] = 0
            losses.append(change)
        solver = Lagrangian(menu, losses)
        for share in random.uniform(0.2, 1.0, 6):
            budget = menu.least + share * (menu.dense - menu.least)
            plan = solver.solve(budget)
            assert compatible(menu, plan)
            assert menu.size(plan) <= budget


# -- the ends


@pytest.mark.parametrize("more", [0, 1, 10**9])
def test_dense_is_reachable(more):
    for menu in (random_menu(1, 6, 4), joint_menu(0, 1), Menu((make_line("alone", [80], [0.0]),))):
        assert Lagrangian(menu).solve(menu.dense + more) == menu.untreated


def test_the_least_budget_is_met():
    for menu in (random_menu(1, 6, 4), random_menu(2, 40, 6), joint_menu(1, 2)):
        assert menu.size(Lagrangian(menu).solve(menu.least)) == menu.least


def test_too_small_a_budget_is_refused_in_one_line():
    menu = random_menu(0, 5, 4)
    solver = Lagrangian(menu)
    for budget in (menu.least - 1, 0):
        with pytest.raises(InputError) as caught:
            solver.solve(budget)
        assert "\n" not in str(caught.value)
        assert f"{budget:,}" in str(caught.value)


def test_budgets_may_be_asked_for_in_any_order():
    menu = large_menu(0, 40, 6)
    first, second = (Lagrangian(menu) for _ in range(2))
    asked = within(menu)
    forwards = [first.solve(budget) for budget in asked]
    assert [second.solve(budget) for budget in reversed(asked)] == forwards[::-1]


def test_what_it_is_given_stays_as_it_is():
    menu = random_menu(0, 6, 4)
    losses = divergences(menu)
    before = [loss.copy() for loss in losses]
    Lagrangian(menu, losses).solve(menu.dense // 2 + menu.least // 2)
    assert all(np.array_equal(a, b) for a, b in zip(losses, before, strict=True))
