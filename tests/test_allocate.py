"""Laws of allocators, over every one of them, on random menus: (menu, budget) -> a plan within the budget."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from allocators import knapsack, sensitivity, tolerance, uniform, value
from synthetic import compatible

from rankfront.methods import DENSE_OPTION, InputError, Option
from rankfront.search.plans.knapsack import Budget, _silent, knapsack_several
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import TINY, Line, Menu

# One row per allocator, those that studies compare with too: a new one adds a row here.
ROWS = {
    "uniform": uniform,
    "tolerance": tolerance,
    "value": value,
    "sensitivity": sensitivity,
    "knapsack": knapsack,
    "knapsack_several": knapsack_several,
}


def make_line(site, costs, losses):
    """A line of dense and ``len(costs) - 1`` other options."""
    options = (DENSE_OPTION, *(Option.of("svd", rank=len(costs) - k) for k in range(1, len(costs))))
    return Line(site, options, np.array(costs), np.array(losses, dtype=float))


def random_menu(seed, lines, options, unit=8, largest=40):
    """Dense costs up to ``unit * largest``, the rest multiples of ``unit`` below; losses rise as costs fall.

    Costs within a line may be equal, and so may losses.
    """
    random = np.random.default_rng(seed)
    found = []
    for number in range(lines):
        dense = int(random.integers(largest // 2, largest + 1))
        cheaper = np.sort(random.integers(1, dense, options - 1))[::-1]
        losses = np.sort(random.choice([0.01, 0.1, 0.5, *random.exponential(size=options)], options - 1))
        found.append(make_line(f"site {number}", unit * np.array([dense, *cheaper]), [0.0, *losses]))
    return Menu(tuple(found))


def mixed_menu():
    """A line with dense alone, one of a single other option, one whose options all cost the same."""
    lines = random_menu(3, 2, 4).lines
    alone = make_line("alone", [80], [0.0])
    pair = make_line("pair", [96, 16], [0.0, 0.3])
    equal = make_line("equal", [64, 32, 32, 32], [0.0, 0.2, 0.2, 0.4])
    return Menu((*lines, alone, pair, equal))


MENUS = {
    "one line": random_menu(0, 1, 5),
    "one option": Menu((make_line("alone", [80], [0.0]),)),
    "small": random_menu(1, 4, 3),
    "mixed": mixed_menu(),
    "many": random_menu(2, 12, 6),
    "coprime": random_menu(4, 5, 4, unit=1, largest=1009),
    "coarse": random_menu(5, 5, 4, unit=1, largest=1_000_003),
}
SMALL = ("one line", "one option", "small", "mixed", "coprime")  # for brute force, on an exact grid


@pytest.fixture(params=MENUS, ids=str)
def menu(request):
    return MENUS[request.param]


@pytest.fixture(params=ROWS)
def allocate(request):
    return ROWS[request.param]


def budgets(menu, count=12):
    """From the least budget to more than dense, those of single plans included."""
    return [*map(int, np.linspace(menu.least, menu.dense, count)), menu.least + 1, menu.dense - 1, 2 * menu.dense]


def every_plan(menu):
    return [list(plan) for plan in itertools.product(*(range(len(line.options)) for line in menu.lines))]


def least_loss(menu, plans, budget):
    """The least predicted divergence within ``budget``, by looking at every plan."""
    return min(menu.divergence(plan) for plan in plans if menu.size(plan) <= budget)


def test_a_plan_stays_within_its_budget(menu, allocate):
    for budget in budgets(menu):
        if budget >= menu.least:
            plan = allocate(menu, budget)
            assert all(0 <= place < len(line.options) for place, line in zip(plan, menu.lines, strict=True))
            assert menu.size(plan) <= budget


@pytest.mark.parametrize("more", [0, 1, 10**9])
def test_dense_is_reachable(menu, allocate, more):
    assert menu.divergence(allocate(menu, menu.dense + more)) == 0


@pytest.mark.parametrize("name", ROWS)
def test_dense_is_reachable_beside_an_option_that_costs_nothing(name):
    """A prediction of next to nothing at one site does not make it compressed when there is no need."""
    menu = Menu((make_line("free", [80, 40], [0.0, TINY]), make_line("hard", [80, 40], [0.0, 3.0])))
    assert ROWS[name](menu, menu.dense) == (0, 0)


def test_too_small_a_budget_is_refused_in_one_line(menu, allocate):
    for budget in (menu.least - 1, 0):
        with pytest.raises(InputError) as caught:
            allocate(menu, budget)
        assert "\n" not in str(caught.value)
        assert f"{budget:,}" in str(caught.value) or f"{budget:,.6g}" in str(caught.value)


def test_the_same_menu_gives_the_same_plan(menu, allocate):
    for budget in (menu.least, (menu.least + menu.dense) // 2, menu.dense):
        if budget >= menu.least:
            assert allocate(menu, budget) == allocate(menu, budget)


def test_storage_never_falls_with_the_budget(menu, allocate):
    """The knapsack may store less at a larger budget where that hurts less; the rules by one knob may not."""
    if allocate in (knapsack, knapsack_several):
        return
    stored = [menu.size(allocate(menu, budget)) for budget in sorted(budgets(menu)) if budget >= menu.least]
    assert stored == sorted(stored)


def test_loss_never_rises_with_the_budget_of_an_integer_program(menu):
    losses = [menu.divergence(knapsack_several(menu, b)) for b in sorted(budgets(menu)) if b >= menu.least]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(losses))


@pytest.mark.parametrize("size", SMALL)
def test_the_integer_program_is_exact(size):
    menu = MENUS[size]
    plans = every_plan(menu)
    for budget in budgets(menu, 8):
        if budget >= menu.least:
            plan = knapsack_several(menu, budget)
            assert menu.divergence(plan) == pytest.approx(least_loss(menu, plans, budget))


@pytest.mark.parametrize("other", ROWS)
@pytest.mark.parametrize("size", [*SMALL, "many"])
def test_no_allocator_predicts_less_than_the_integer_program(size, other):
    menu = MENUS[size]
    for budget in budgets(menu):
        if budget >= menu.least:
            exact, plan = knapsack_several(menu, budget), ROWS[other](menu, budget)
            assert menu.divergence(exact) <= menu.divergence(plan) + 1e-9


def test_other_losses_replace_the_menus():
    menu = MENUS["small"]
    random = np.random.default_rng(0)
    other = [np.append(0.0, random.permutation(line.divergence[1:])) for line in menu.lines]
    changed = Menu(tuple(Line(m.site, m.options, m.sizes, d) for m, d in zip(menu.lines, other, strict=True)))
    for budget in budgets(menu):
        if budget >= menu.least:
            assert Lagrangian(menu, other).solve(budget) == Lagrangian(changed).solve(budget)
            assert knapsack_several(menu, budget, losses=other) == knapsack_several(changed, budget)


# -- several budgets at once


def latencies(menu, seed):
    """A second cost that knows nothing of the first: (K,) a line, dense the slowest but for some options."""
    random = np.random.default_rng(seed)
    return [random.uniform(0.2, 1.1, len(line.options)) for line in menu.lines]


def cost(costs, plan):
    return sum(values[place] for values, place in zip(costs, plan, strict=True))


def over_dense(costs, most):
    """What plans cost, line by line, may come to ``most``: the same as changes from dense."""
    return Budget(np.concatenate([own - own[0] for own in costs]), most - sum(own[0] for own in costs))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", ["small", "mixed"])
def test_two_budgets_are_met_exactly(size, seed):
    menu = MENUS[size]
    plans, slow = every_plan(menu), latencies(menu, seed)
    times = np.quantile([cost(slow, plan) for plan in plans], [0.02, 0.2, 0.6])
    solved = 0
    for budget, time in itertools.product(budgets(menu, 5), times):
        within = [plan for plan in plans if menu.size(plan) <= budget and cost(slow, plan) <= time]
        others = [over_dense(slow, float(time))]
        if not within:
            with pytest.raises(InputError):
                knapsack_several(menu, budget, others)
            continue
        plan = knapsack_several(menu, budget, others)
        assert menu.size(plan) <= budget
        assert cost(slow, plan) <= time + 1e-9
        assert menu.divergence(plan) == pytest.approx(min(menu.divergence(plan) for plan in within))
        solved += 1
    assert solved >= 5


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_one_value_short_is_kept(seed):
    """Costs of models of billions of parameters: the solver's tolerances must not let a value through."""
    menu = random_menu(seed, 10, 5, unit=1, largest=10**8)
    random = np.random.default_rng(seed)
    plan = [int(random.integers(len(line.options))) for line in menu.lines]
    for budget in (menu.size(plan) - 1, menu.size(plan)):
        assert menu.size(knapsack_several(menu, budget)) <= budget


def test_budgets_that_contradict_each_other_are_refused_in_one_line():
    """Whatever is small is slow."""
    menu = MENUS["small"]
    slow = [-line.sizes for line in menu.lines]
    with pytest.raises(InputError) as caught:
        knapsack_several(menu, menu.dense // 2, [over_dense(slow, -menu.dense)])
    assert "\n" not in str(caught.value)
    assert f"{menu.dense // 2:,.6g}" in str(caught.value)


def test_near_is_near_and_infinite_is_never_taken():
    menu = MENUS["many"]
    slow = [np.append(times[:-1], np.inf) for times in latencies(menu, 0)]
    others = [over_dense(slow, 0.7 * sum(times[0] for times in slow))]
    exact = menu.divergence(knapsack_several(menu, 0.6 * menu.dense, others))
    plan = knapsack_several(menu, 0.6 * menu.dense, others, gap=0.01)
    assert np.isfinite(cost(slow, plan))
    assert exact - 1e-9 <= menu.divergence(plan) <= 1.01 * exact + 1e-9


def test_what_the_solver_prints_does_not_reach_the_output(capfd):
    with _silent():
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution")
    os.write(1, b"after")
    assert capfd.readouterr().out == "after"


# -- sites that share weights


def joint_menu(seed, blocks=2):
    """Blocks of four weights: joint sites over the first two, over the last two, over all four, and across blocks."""
    random = np.random.default_rng(seed)
    lines = []
    for block in range(blocks):
        names = [f"{block}.{name}" for name in "qkvo"]
        lines += [
            replace(line, site=name) for line, name in zip(random_menu(seed + block, 4, 3).lines, names, strict=True)
        ]
        dense = {line.site: int(line.sizes[0]) for line in lines}
        for claimed in (names[:2], names[2:], names):
            whole = sum(dense[name] for name in claimed)
            costs = [whole, *np.sort(8 * random.integers(0, whole // 8, 2))[::-1]]
            line = make_line(f"{block}.{'+'.join(claimed)}", costs, [0.0, *np.sort(random.exponential(size=2))])
            lines.append(replace(line, weights=tuple(claimed)))
    if blocks > 1:
        whole = sum(dense[f"{block}.q"] for block in range(blocks))
        across = make_line("all q", [whole, whole // 16 * 8], [0.0, 0.2])
        lines.append(replace(across, weights=tuple(f"{block}.q" for block in range(blocks))))
    return Menu(tuple(lines))


JOINT = {seed: joint_menu(seed, blocks=1 + seed % 2) for seed in range(4)}


def every_choice(menu):
    """Every choice that treats no weight twice."""
    return (p for p in itertools.product(*(range(len(line.options)) for line in menu.lines)) if compatible(menu, p))


def some_choices(menu, count):
    """Random choices that treat no weight twice: line after line in random order, where the others leave room."""
    random = np.random.default_rng(0)
    for _ in range(count):
        places = [0] * len(menu.lines)
        for number in random.permutation(len(places)):
            tried = [*places]
            tried[number] = int(random.integers(len(menu.lines[number].options)))
            places = tried if compatible(menu, tried) else places
        yield places


@pytest.fixture(params=JOINT, ids=str)
def joint(request):
    return JOINT[request.param]


def test_joint_sites_are_never_treated_beside_their_own_weights(joint, allocate):
    for budget in budgets(joint):
        places = allocate(joint, budget)
        assert compatible(joint, places)
        assert joint.size(places) <= budget


def test_stored_values_of_a_joint_choice_count_every_weight_once(joint):
    dense = {line.site: int(line.sizes[0]) for line in joint.lines if not line.weights}
    assert joint.dense == sum(dense.values())
    for places in some_choices(joint, 200):
        treated = [(line, place) for line, place in zip(joint.lines, places, strict=True) if place]
        taken = {weight for line, _ in treated for weight in line.claims}
        untouched = sum(stored for weight, stored in dense.items() if weight not in taken)
        assert joint.size(places) == untouched + sum(int(line.sizes[place]) for line, place in treated)


def test_the_cheapest_choice_of_joint_sites(joint):
    if len(joint.lines) < 10:
        assert joint.least == min(joint.size(places) for places in every_choice(joint))
    assert compatible(joint, joint.cheapest)


def test_the_integer_program_with_joint_sites_is_the_best_by_brute_force():
    menu = JOINT[0]
    choices = [(menu.size(places), menu.divergence(places)) for places in every_choice(menu)]
    for budget in budgets(menu):
        best = min(divergence for stored, divergence in choices if stored <= budget)
        assert menu.divergence(knapsack_several(menu, budget)) == pytest.approx(best, abs=1e-12)


def test_a_joint_site_that_is_worth_it_is_taken(allocate):
    singles = [make_line(name, [80, 40], [0.0, 1.0]) for name in "ab"]
    both = replace(make_line("a+b", [160, 40], [0.0, 1e-6]), weights=("a", "b"))
    menu = Menu((*singles, both))
    places = allocate(menu, 100)
    assert menu.size(places) <= 100
    if allocate in (ROWS["knapsack"], ROWS["knapsack_several"], ROWS["sensitivity"]):
        assert places == (0, 0, 1)


def test_a_joint_line_needs_a_line_for_each_of_its_weights():
    joint = replace(make_line("a+b", [160, 40], [0.0, 0.1]), weights=("a", "b"))
    with pytest.raises(ValueError, match="has no line of its own"):
        Menu((make_line("a", [80, 40], [0.0, 0.2]), joint))


def test_a_joint_option_that_takes_more_than_all_of_its_weights_dense_is_left_out():
    """As by one of several latencies."""
    options = (Option.of("dense"), Option.of("svd", rank=1))
    alone = [Line(name, options, np.array([100, 51]), np.array([0.0, 1.0])) for name in ("v", "o")]
    joint = Line("v+o", options, np.array([200, 250]), np.array([0.0, 0.1]), ("v", "o"))
    menu = Menu((*alone, joint))
    for budget in (102, 151, 200):
        for plan in (knapsack(menu, budget), knapsack_several(menu, budget)):
            assert menu.size(plan) <= budget
            assert plan[2] == 0
