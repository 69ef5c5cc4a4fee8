"""Limits as budgets: what a solver keeps within them is what the figures say, by brute force over a small menu."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic import compatible

from rankfront.methods import DENSE_OPTION, InputError, Option, Site, Weight
from rankfront.objectives.latency import Latency
from rankfront.search.constraint import Constraint
from rankfront.search.plans.knapsack import knapsack_several
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.latency_table import Timing
from rankfront.search.plans.limits import COSTS, Figures, met
from rankfront.search.plans.menu import make_menu
from rankfront.search.plans.plan import Prices

SHAPES = {"b.v": (96, 64), "b.o": (64, 96), "head": (160, 64)}
LEVELS = [Option.of("svd-llm", rank=rank) for rank in (16, 24)]
INTEGERS = [Option.of("svd-llm-int8", rank=rank) for rank in (16, 24)]  # as many numbers, in fewer bytes
UNTIMED = Option.of("svd", rank=2)


def make_figures(seed=0, levels=(*LEVELS, *INTEGERS), biased="b.o"):
    """Three weights, the last outside the blocks, and a joint site over the first two that drops them."""
    random = np.random.default_rng(seed)
    weights = {name: Weight("weight", name, *shape, bias=name == biased) for name, shape in SHAPES.items()}
    single = {Site(name, (weight,)): list(levels) for name, weight in weights.items()}
    single[Site("head", (weights["head"],))].append(UNTIMED)
    roles = {"b.v": "up", "b.o": "down"}  # of an MLP, which may be dropped
    joint = Site("b", tuple(replace(weights[name], role=role) for name, role in roles.items()))
    wanted = single | {joint: [Option.of("drop-block")]}
    predictions = {}
    for site, options in wanted.items():
        hurt = float(random.uniform(0.5, 2))
        level = {o.label: hurt / o["rank"] * (1.02 if "int8" in o.method else 1) for o in options if "rank" in o.label}
        predictions[site.name] = level or {options[0].label: 0.5 * hurt}
    seconds = {
        site.name: {o.label: {"prefill": float(random.uniform(0.1, 0.8)), "decode": 0.0} for o in options}
        for site, options in wanted.items()
    }
    for site, known in seconds.items():
        known[DENSE_OPTION.label] = {"prefill": 2.0 if site == "b" else 1.0, "decode": 0.0}
    del seconds["head"][UNTIMED.label]
    table = Timing(seconds, {"prefill": 4.0, "decode": 0.0}, slope=0.9)
    inside = {site: site.name.startswith("b") for site in wanted}
    return Figures(make_menu(wanted, predictions), Prices(inside, 30_000, 2), {"latency": (Latency(), table)})


def every_choice(menu):
    plans = itertools.product(*(range(len(line.options)) for line in menu.lines))
    return [plan for plan in plans if compatible(menu, plan)]


def bounds(figures, name, count):
    """Figures of plans, a bit more and a bit less: as tight as limits get."""
    values = sorted({figures.of(figures.menu.decode(plan))[name] for plan in every_choice(figures.menu)} - {math.nan})
    chosen = [value for value in values if math.isfinite(value)][:: max(len(values) // count, 1)]
    return [bound for value in chosen for bound in (value, 1.001 * value)]


@pytest.mark.parametrize("operator", ["<=", "<"])
@pytest.mark.parametrize("names", [("bytes",), ("block_parameters", "bytes"), ("parameters", "bytes", "latency")])
def test_the_solution_under_several_limits_is_the_best_by_brute_force(names, operator):
    figures = make_figures()
    menu = figures.menu
    known = [(figures.of(menu.decode(plan)), menu.divergence(plan)) for plan in every_choice(menu)]
    solved = refused = 0
    count = 4 if len(names) < 3 else 2
    for each in itertools.product(*(bounds(figures, name, count) for name in names)):
        limits = [Constraint(name, operator, bound) for name, bound in zip(names, each, strict=True)]
        # Latencies are kept with a billionth to spare.
        within = [loss for found, loss in known if met(limits, found) and abs(found["latency"] / each[-1] - 1) > 1e-6]
        try:
            plan = knapsack_several(menu, math.inf, figures.budgets(limits))
        except InputError:
            assert not within
            refused += 1
            continue
        assert compatible(menu, plan)
        assert met(limits, figures.of(menu.decode(plan)))
        if within:
            assert menu.divergence(plan) <= min(within) + 1e-12
        solved += 1
    assert solved > 5
    assert refused or operator == "<="


def test_fewer_bytes_at_as_many_parameters_are_chosen_where_bytes_are_limited():
    """What one budget of stored values, made smaller and smaller, cannot find."""
    figures = make_figures()
    menu = figures.menu
    alone = Lagrangian(menu).solve(0.6 * menu.dense)
    kept, heavy = (figures.of(menu.decode(alone))[name] for name in ("parameter_count", "bytes"))
    limits = [Constraint("parameter_count", "<=", kept), Constraint("bytes", "<=", 0.9 * heavy)]
    plan = knapsack_several(menu, math.inf, figures.budgets(limits))
    assert met(limits, figures.of(menu.decode(plan)))
    assert any("int8" in option.method for option in menu.decode(plan).by_site.values())
    smaller = (Lagrangian(menu).solve(budget) for budget in range(menu.size(alone), 0, -1))
    shrunk = next(plan for plan in smaller if met(limits, figures.of(menu.decode(plan))))
    assert menu.divergence(plan) < menu.divergence(shrunk)


def test_limits_from_below_are_kept_too():
    figures = make_figures()
    limits = [Constraint("bytes", "<=", 34_000), Constraint("parameters", ">=", 0.68)]
    found = figures.of(figures.menu.decode(knapsack_several(figures.menu, math.inf, figures.budgets(limits))))
    assert met(limits, found)
    assert found["parameters"] < 1


@pytest.mark.parametrize(
    ("names", "levels"),
    [
        (("parameters",), (*LEVELS, *INTEGERS)),
        (("parameter_count",), LEVELS),
        (("bytes",), LEVELS),
        (("bytes", "parameters"), LEVELS),
    ],
)
@pytest.mark.parametrize("operator", ["<=", "<"])
def test_limits_on_one_size_allow_the_plans_that_it_allows(names, levels, operator):
    figures = make_figures(levels=levels, biased=None)  # a bias is saved beside what the size counts
    plans = every_choice(figures.menu)
    for each in itertools.product(*(bounds(figures, name, 6) for name in names)):
        limits = [Constraint(name, operator, bound) for name, bound in zip(names, each, strict=True)]
        most = figures.size(limits)
        for plan in plans:
            assert met(limits, figures.of(figures.menu.decode(plan))) == (figures.menu.size(plan) <= most)


@pytest.mark.parametrize("text", ["block_parameters<=0.7", "bytes<=34000", "latency<=0.9", "parameters>=0.7"])
def test_what_is_no_straight_line_in_the_size_is_not_taken_for_one(text):
    """The head is outside of the blocks, integers take fewer bytes, and what is wanted larger is no limit of a size."""
    figures = make_figures(biased=None)
    assert figures.size([Constraint.parse("parameters<=0.9"), Constraint.parse(text)]) is None
    assert figures.size([Constraint.parse("parameters<=0.9"), Constraint.parse("perplexity<=30")]) is not None


def test_what_was_not_timed_is_not_taken_under_a_limit_on_latency():
    figures = make_figures()
    line = next(line for line in figures.menu.lines if line.site == "head")
    places = [line.options.index(UNTIMED) if each is line else 0 for each in figures.menu.lines]
    assert math.isnan(figures.of(figures.menu.decode(places))["latency"])
    assert not met([Constraint("latency", "<=", 9)], figures.of(figures.menu.decode(places)))
    losses = [np.where([o == UNTIMED for o in each.options], -9.0, each.divergence) for each in figures.menu.lines]
    assert knapsack_several(figures.menu, math.inf, losses=losses) == tuple(places)
    budgets = figures.budgets([Constraint("latency", "<=", 9)])
    assert knapsack_several(figures.menu, math.inf, budgets, losses) == (0,) * len(places)


def test_what_only_measuring_tells_is_no_budget():
    figures = make_figures()
    limits = [Constraint("perplexity", "<=", 30), Constraint("bytes", "<=", 3500)]
    assert len(figures.budgets(limits)) == 1
    assert met(limits, {"bytes": 3000.0})
    assert not met(limits, {"bytes": 3000.0, "perplexity": 31.0})
    assert figures.names == (*COSTS, "latency")
