"""The allocator for options that interact: against the additive optimum, slow sums and brute force, on random menus."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from test_allocate import budgets, every_choice, every_plan, joint_menu, make_line, random_menu

from rankfront.methods import InputError, Option
from rankfront.search.plans.knapsack import sweep
from rankfront.search.plans.lagrangian import Descent
from rankfront.search.plans.menu import Line, Menu

LARGE = [(seed, lines, options) for seed in range(4) for lines, options in ((40, 6), (60, 12), (45, 3))]
SMALL = [(seed, lines, options) for seed in range(12) for lines, options in ((4, 5), (5, 4), (6, 4))]
BELIEF = 0.5  # how far cosines are believed: the surrogate's mean


def large_menu(seed, lines, options):
    return random_menu(seed, lines, options, largest=400)


def divergences(menu):
    return [line.divergence for line in menu.lines]


def cosines(menu, seed, scale=BELIEF, directions=3):
    """Those of random directions, of either sign, without the diagonal."""
    vectors = np.random.default_rng(seed).normal(size=(len(menu.lines), directions))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    coupling = scale * vectors @ vectors.T
    np.fill_diagonal(coupling, 0.0)
    return coupling


def nothing(menu):
    return np.zeros((len(menu.lines), len(menu.lines)))


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


def slow_value(losses, coupling, plan):
    """Σ_i e_i + ½ Σ_{i≠j} K_ij √(2 e_i) √(2 e_j), by loops."""
    e = [float(loss[place]) for loss, place in zip(losses, plan, strict=True)]
    found = sum(e)
    for i, j in itertools.permutations(range(len(e)), 2):
        found += 0.5 * coupling[i, j] * math.sqrt(2 * max(e[i], 0.0)) * math.sqrt(2 * max(e[j], 0.0))
    return found


def within(menu, count=12):
    return [budget for budget in budgets(menu, count) if budget >= menu.least]


# -- the formula


@pytest.mark.parametrize("seed", range(4))
def test_the_value_is_the_formula(seed):
    menu = random_menu(seed, 7, 5)
    coupling, random = cosines(menu, seed), np.random.default_rng(seed)
    for losses in (divergences(menu), around_a_plan(menu, seed)):
        descent = Descent(menu, losses, coupling)
        for _ in range(20):
            plan = [int(random.integers(len(line.options))) for line in menu.lines]
            expected = slow_value(losses, coupling, plan)
            assert descent.value(plan) == pytest.approx(expected)
            assert descent.value(np.array(plan)) == pytest.approx(expected)


# -- without coupling


@pytest.mark.parametrize(("seed", "lines", "options"), LARGE)
def test_without_coupling_it_is_nearly_the_knapsack(seed, lines, options):
    """A Lagrangian finds the convex hull alone; on many lines what lies between is filled nearly as well."""
    menu = large_menu(seed, lines, options)
    descent, exact = Descent(menu, divergences(menu), nothing(menu)), sweep(menu)
    excess = []
    for budget in within(menu, 24):
        plan = descent.solve(budget)
        assert menu.size(plan) <= budget
        best = menu.divergence(exact.solve(budget))
        assert menu.divergence(plan) >= best - 1e-9
        excess.append((menu.divergence(plan) - best) / max(best, 1e-9))
        assert menu.divergence(plan) <= 1.05 * best + 0.003 * menu.divergence(menu.cheapest)
    assert np.median(excess) <= 0.005
    assert np.mean(np.array(excess) <= 0.05) >= 0.85


@pytest.mark.parametrize(("seed", "lines", "options"), LARGE)
def test_losses_may_be_negative_and_dense_need_not_be_free(seed, lines, options):
    """Slopes say what a switch changes, which may be for the better; without coupling the exact solver can check."""
    menu = large_menu(seed, lines, options)
    losses = around_a_plan(menu, seed)
    descent, exact = Descent(menu, losses, nothing(menu)), sweep(menu, losses)
    best = {budget: total(losses, exact.solve(budget)) for budget in within(menu)}
    assert min(best.values()) < 0
    span = max(best.values()) - min(best.values())
    for budget, least in best.items():
        plan = descent.solve(budget)
        assert menu.size(plan) <= budget
        assert descent.value(plan) == pytest.approx(total(losses, plan))
        assert least - 1e-9 <= descent.value(plan) <= least + 0.03 * span


def test_losses_may_all_be_negative():
    """Nothing at all to pay for saving: no slope from dense is positive."""
    menu = large_menu(0, 45, 5)
    random = np.random.default_rng(0)
    losses = [-random.exponential(0.1, len(line.options)) for line in menu.lines]
    descent, exact = Descent(menu, losses, nothing(menu)), sweep(menu, losses)
    for budget in within(menu):
        plan = descent.solve(budget)
        assert menu.size(plan) <= budget
        assert total(losses, plan) <= 0.97 * total(losses, exact.solve(budget))


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
        descent = Descent(menu, losses, nothing(menu))
        for budget in (menu.size(centre), menu.size(centre) + 40, menu.dense):
            plan = descent.solve(budget)
            assert menu.size(plan) <= budget
            assert math.isfinite(descent.value(plan))
            assert plan[:2] == centre[:2]


# -- with coupling


@pytest.fixture(scope="module")
def small():
    """(S of the descent's plan, of the additive optimum's, the least by brute force) at many budgets of many menus."""
    found = []
    for seed, lines, options in SMALL:
        menu = random_menu(seed, lines, options)
        descent, additive = Descent(menu, divergences(menu), cosines(menu, seed)), sweep(menu)
        plans = [(menu.size(plan), descent.value(plan)) for plan in every_plan(menu)]
        for budget in within(menu, 10):
            if budget < menu.dense:
                plan = descent.solve(budget)
                assert menu.size(plan) <= budget
                least = min(value for stored, value in plans if stored <= budget)
                found.append((descent.value(plan), descent.value(additive.solve(budget)), least))
    return np.array(found)


def test_with_coupling_it_is_near_the_optimum(small):
    """A local optimum only, and so few lines leave large gaps: the optimum in most cases, near it in nine of ten."""
    ours, _, least = small.T
    assert (ours >= least - 1e-9).all()
    gap = (ours - least) / np.maximum(least, 1e-3)
    assert np.median(gap) == pytest.approx(0, abs=1e-9)
    assert np.mean(gap <= 0.1) >= 0.9


def test_with_coupling_it_beats_the_additive_optimum(small):
    """On the whole; it does not start from that plan, so that in a few cases it ends above it."""
    ours, additive, least = small.T
    assert np.mean(ours <= additive + 1e-9) >= 0.9
    assert np.mean(ours - least) < 0.5 * np.mean(additive - least)


@pytest.mark.parametrize("seed", range(3))
def test_as_large_as_a_studys_menu_it_beats_the_additive_optimum(seed):
    """Where brute force cannot go: every budget between the ends."""
    menu = random_menu(seed, 70, 12, unit=64, largest=9_000)
    descent, additive = Descent(menu, divergences(menu), cosines(menu, seed)), sweep(menu)
    for share in np.linspace(0.1, 0.9, 6):
        budget = menu.least + share * (menu.dense - menu.least)
        plan = descent.solve(budget)
        assert menu.size(plan) <= budget
        assert descent.value(plan) < descent.value(additive.solve(budget))


def test_two_sites_that_cancel_are_treated_together():
    """K = −1: what one does, the other undoes. Additively the third site is the cheaper one to treat."""
    menu = Menu(tuple(make_line(name, [80, 40], [0.0, loss]) for name, loss in (("a", 0.5), ("b", 0.5), ("c", 0.4))))
    coupling = np.zeros((3, 3))
    coupling[0, 1] = coupling[1, 0] = -1.0
    descent = Descent(menu, divergences(menu), coupling)
    assert descent.solve(160) == [1, 1, 0]
    assert descent.value([1, 1, 0]) == pytest.approx(0, abs=1e-12)
    assert Descent(menu, divergences(menu), nothing(menu)).solve(200) == [0, 0, 1]


def test_two_sites_that_do_the_same_thing_are_treated_apart():
    """K = 1: what both do adds up in amplitude, so the second one hurts three times as much as alone."""
    menu = Menu(tuple(make_line(name, [80, 40], [0.0, loss]) for name, loss in (("a", 0.2), ("b", 0.2), ("c", 0.4))))
    coupling = np.zeros((3, 3))
    coupling[0, 1] = coupling[1, 0] = 1.0
    descent = Descent(menu, divergences(menu), coupling)
    assert descent.value([1, 1, 0]) == pytest.approx(0.8)
    places = descent.solve(160)
    assert places[2] == 1
    assert descent.value(places) == pytest.approx(0.6)


# -- sites that share weights


@pytest.mark.parametrize("scale", [0.0, BELIEF])
@pytest.mark.parametrize("seed", range(4))
def test_joint_sites_are_never_treated_beside_their_own_weights(seed, scale):
    menu = joint_menu(seed, blocks=1 + seed % 2)
    descent = Descent(menu, divergences(menu), cosines(menu, seed, scale))
    assert all(menu.compatible(plan) for plan in descent.plans)
    for budget in within(menu):
        plan = descent.solve(budget)
        assert menu.compatible(plan)
        assert menu.size(plan) <= budget


def test_joint_sites_are_solved_well():
    """Over every compatible choice; a move that takes two at once can be missed."""
    gaps = []
    for seed in range(0, 16, 2):
        menu = joint_menu(seed, blocks=1)
        descent = Descent(menu, divergences(menu), cosines(menu, seed))
        choices = [(menu.size(places), descent.value(places)) for places in every_choice(menu)]
        for budget in within(menu):
            least = min(value for stored, value in choices if stored <= budget)
            gaps.append((descent.value(descent.solve(budget)) - least) / max(least, 1e-3))
    assert min(gaps) >= -1e-9
    assert np.median(gaps) == pytest.approx(0, abs=1e-9)
    assert np.mean(np.array(gaps) <= 0.1) >= 0.7


@pytest.mark.parametrize("seed", range(4))
def test_joint_sites_with_losses_of_either_sign_stay_compatible(seed):
    menu = joint_menu(seed, blocks=1 + seed % 2)
    descent = Descent(menu, around_a_plan(menu, seed), nothing(menu))
    assert all(menu.compatible(plan) for plan in descent.plans)
    for budget in within(menu):
        plan = descent.solve(budget)
        assert menu.compatible(plan)
        assert menu.size(plan) <= budget


def test_a_joint_site_stays_where_nothing_is_known_of_leaving_it():
    """As slopes around a plan that treats two weights as one: they say what single sites would change, but not that."""
    singles = [make_line(name, [80, 10], [0.0, 1.0]) for name in "ab"]
    menu = Menu((*singles, replace(make_line("a+b", [160, 100], [0.0, 0.1]), weights=("a", "b"))))
    losses = [np.array([0.0, -0.1]), np.array([0.0, 2.0]), np.array([np.inf, 0.0])]
    descent = Descent(menu, losses, nothing(menu))
    for budget in (100, 120, 150):
        assert descent.solve(budget) == [0, 0, 1]


# -- the path and the ends


@pytest.mark.parametrize("scale", [0.0, BELIEF])
@pytest.mark.parametrize("seed", range(4))
def test_the_path_runs_from_dense_to_the_cheapest(seed, scale):
    menu = large_menu(seed, 12, 5)
    descent = Descent(menu, divergences(menu), cosines(menu, seed, scale))
    plans = descent.plans
    assert plans[0] == [0] * len(menu.lines)
    assert menu.size(plans[-1]) == menu.least
    assert len(set(map(tuple, plans))) == len(plans) > 5
    if not scale:
        stored = [menu.size(plan) for plan in plans]
        assert stored == sorted(stored, reverse=True)
        lost = [menu.divergence(plan) for plan in plans]
        assert lost == sorted(lost)


@pytest.mark.parametrize("more", [0, 1, 10**9])
def test_dense_is_reachable(more):
    for menu in (random_menu(1, 6, 4), joint_menu(0, 1), Menu((make_line("alone", [80], [0.0]),))):
        descent = Descent(menu, divergences(menu), nothing(menu))
        assert descent.solve(menu.dense + more) == [0] * len(menu.lines)


def test_the_least_budget_is_met():
    for menu in (random_menu(1, 6, 4), random_menu(2, 40, 6), joint_menu(1, 2)):
        descent = Descent(menu, divergences(menu), cosines(menu, 0))
        assert menu.size(descent.solve(menu.least)) == menu.least


def test_too_small_a_budget_is_refused_in_one_line():
    menu = random_menu(0, 5, 4)
    descent = Descent(menu, divergences(menu), cosines(menu, 0))
    for budget in (menu.least - 1, 0):
        with pytest.raises(InputError) as caught:
            descent.solve(budget)
        assert "\n" not in str(caught.value)
        assert f"{budget:,}" in str(caught.value)


def test_the_same_menu_gives_the_same_plans():
    menu = large_menu(0, 40, 6)
    first, second = (Descent(menu, divergences(menu), cosines(menu, 0)) for _ in range(2))
    assert first.plans == second.plans
    asked = within(menu)
    forwards = [first.solve(budget) for budget in asked]
    assert [second.solve(budget) for budget in reversed(asked)] == forwards[::-1]


def test_what_it_is_given_stays_as_it_is():
    menu = random_menu(0, 6, 4)
    losses, coupling = divergences(menu), cosines(menu, 0)
    before = [loss.copy() for loss in losses], coupling.copy()
    Descent(menu, losses, coupling).solve(menu.dense // 2 + menu.least // 2)
    assert all(np.array_equal(a, b) for a, b in zip(losses, before[0], strict=True))
    assert np.array_equal(coupling, before[1])


# -- rivals, and few lines


def test_a_joint_centre_stays_where_nothing_is_known_of_leaving_it():
    singles = [make_line(name, [80, 10], [0.0, 1.0]) for name in "ab"]
    menu = Menu((*singles, replace(make_line("a+b", [160, 100], [0.0, 0.1]), weights=("a", "b"))))
    slopes = [np.array([0.0, -0.1]), np.array([0.0, 2.0]), np.array([np.inf, 0.0])]  # a+b treated at the centre
    descent = Descent(menu, slopes, nothing(menu))
    assert np.isfinite(descent.value(descent.solve(120)))  # [0, 0, 1] stores 100 and changes nothing


def test_a_move_counts_what_its_rivals_lose():
    """Giving up `a+b` costs 5, more than moving `a` gains."""
    singles = [make_line(name, [80, 10], [0.0, 1.0]) for name in "ab"]
    menu = Menu((*singles, replace(make_line("a+b", [160, 100], [0.0, 0.1]), weights=("a", "b"))))
    slopes = [np.array([0.0, -0.1]), np.array([0.0, 2.0]), np.array([5.0, 0.0])]
    descent, places, multiplier = Descent(menu, slopes, nothing(menu)), np.array([0, 0, 1]), 1e-3
    before = descent._priced(places, multiplier)
    priced = descent._e - multiplier * descent._saved
    descent._improve(0, places, priced, descent._r[descent._all, places], np.zeros(3))
    assert descent._priced(places, multiplier) <= before


def test_it_is_never_worse_than_the_additive_plan():
    for seed in range(12):
        for lines, options in ((4, 5), (5, 4), (6, 4)):
            menu = random_menu(seed, lines, options)
            for scale in (0.0, 0.5):
                descent, additive = Descent(menu, divergences(menu), cosines(menu, seed, scale)), sweep(menu)
                for budget in np.linspace(menu.least, menu.dense, 10):
                    ours = descent.value(descent.solve(budget))
                    assert ours <= descent.value(additive.solve(budget)) + 1e-9, (seed, lines, scale, budget)


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
        descent = Descent(menu, losses, nothing(menu))
        for share in random.uniform(0.2, 1.0, 6):
            budget = menu.least + share * (menu.dense - menu.least)
            plan = descent.solve(budget)
            assert menu.compatible(plan)
            assert menu.size(plan) <= budget
