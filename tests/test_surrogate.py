"""What the search believes of divergence: the menu with no data, the truth with enough, and how sure it is."""

import numpy as np
import pytest

from rankfront.methods import DENSE_OPTION, Option
from rankfront.search.optimise.surrogate import Surrogate
from rankfront.search.plans.menu import Line, Menu
from rankfront.search.tuning import TUNING

BLOCKS, KINDS, METHODS, LEVELS = 4, ("query", "up", "down"), ("svd", "svd-llm"), 3
SPREAD = TUNING.loss_spread  # of every measurement


def make_menu(seed=0):
    """A line for each block and kind: dense, then the methods' levels by turns."""
    random = np.random.default_rng(seed)
    lines = []
    for block in range(BLOCKS):
        for kind in KINDS:
            tails = {method: np.sort(random.exponential(0.05, LEVELS)) for method in METHODS}
            options = [Option.of(method, rank=LEVELS - level) for level in range(LEVELS) for method in METHODS]
            divergence = [0.0, *(tails[method][level] for level in range(LEVELS) for method in METHODS)]
            stored = [100, *np.repeat([75, 50, 25], len(METHODS))]
            lines.append(Line(f"{block}.{kind}", (DENSE_OPTION, *options), np.array(stored), np.array(divergence)))
    return Menu(tuple(lines))


MENU = make_menu()
SITES = len(MENU.lines)


def make_surrogate():
    return Surrogate(MENU, list(KINDS) * BLOCKS, np.repeat(range(BLOCKS), len(KINDS)).tolist())


def random_plans(count, seed):
    """Plans (count, SITES) of all sizes: from a few sites at mild levels to all at the cheapest."""
    random = np.random.default_rng(seed)
    largest = random.integers(1, 2 * LEVELS + 1, (count, 1))
    plans = random.integers(0, largest + 1, (count, SITES))
    plans[:, 0] = np.maximum(plans[:, 0], 1)  # never the dense plan
    return plans


def truth(plans, offset=0.0, slope=1.0, factors=None):
    """a + c log Σ_i d_i f_i of each plan, with a factor for each site and method, (SITES, METHODS)."""
    factors = np.ones((SITES, len(METHODS))) if factors is None else factors
    sums = np.zeros(len(plans))
    for i, line in enumerate(MENU.lines):
        own = [0.0, *(factors[i, METHODS.index(option.method)] for option in line.options[1:])]
        sums += (line.divergence * np.array(own))[plans[:, i]]
    return offset + slope * np.log(sums)


def true_factors(seed=1, spread=0.5):
    """Multipliers of site and method."""
    return np.exp(np.random.default_rng(seed).normal(0, spread, (SITES, len(METHODS))))


def root_mean_square(values):
    return float(np.sqrt(np.mean(np.square(values))))


# -- prediction


def test_without_data_it_is_the_menu():
    surrogate, plans = make_surrogate(), random_plans(20, 0)
    assert surrogate.mean[-2] == 0
    assert surrogate.mean[-1] == 0
    expected = [np.log(MENU.divergence(plan)) for plan in plans]
    assert surrogate.predict(plans) == pytest.approx(expected, abs=1e-6)
    for losses, line in zip(surrogate.losses(), MENU.lines, strict=True):
        assert losses == pytest.approx(line.divergence)


def test_dense_costs_nothing_whatever_was_measured():
    surrogate = make_surrogate()
    surrogate.fit(random_plans(30, 0), truth(random_plans(30, 0), 1.0, 1.3, true_factors()), SPREAD)
    for losses in surrogate.losses():
        assert losses[0] == 0
        assert (losses[1:] > 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_more_trials_predict_better(seed):
    """Each site and method hurts its own factor more or less than the menu says."""
    factors, unseen = true_factors(seed), random_plans(200, 100 + seed)
    surrogate, errors = make_surrogate(), []
    for count in (0, 20, 80):
        if count:
            plans = random_plans(count, seed)
            surrogate.fit(plans, truth(plans, factors=factors), SPREAD)
        errors.append(root_mean_square(surrogate.predict(unseen) - truth(unseen, factors=factors)))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.4 * errors[0]


@pytest.mark.parametrize(("offset", "slope"), [(0.0, 1.0), (0.7, 1.0), (0.0, 1.4), (-0.8, 0.7), (1.5, 1.5)])
def test_offset_and_slope_are_recovered(offset, slope):
    """A common factor and a faster growth, as divergences of many sites together show."""
    surrogate, plans, unseen = make_surrogate(), random_plans(60, 0), random_plans(200, 1)
    surrogate.fit(plans, truth(plans, offset, slope), SPREAD)
    assert 1 + surrogate.mean[-1] == pytest.approx(slope, abs=0.1)
    assert root_mean_square(surrogate.predict(unseen) - truth(unseen, offset, slope)) < 0.08
    whole = surrogate.mean[-2] + (1 + surrogate.mean[-1]) * float(surrogate.mean[:-2].mean())
    assert whole == pytest.approx(offset, abs=0.2)


def test_one_trial_is_enough_to_fit():
    surrogate, plan = make_surrogate(), random_plans(1, 0)
    surrogate.fit(plan, truth(plan, offset=1.0), SPREAD)
    assert surrogate.predict(plan) == pytest.approx(truth(plan, offset=1.0), abs=TUNING.unexplained)


# -- noise


def near_dense_plans(count, seed):
    """Plans (count, SITES) of one option each that hurts by less than twice the spread."""
    mild = [(i, k) for i, line in enumerate(MENU.lines) for k in np.flatnonzero(line.divergence < 2 * SPREAD) if k]
    plans = np.zeros((count, SITES), dtype=int)
    for plan, which in zip(plans, np.random.default_rng(seed).permutation(len(mild)), strict=False):
        plan[mild[which][0]] = mild[which][1]
    return plans


def test_near_dense_measurements_spoil_nothing():
    """A few thousandths of a nat of noise, and less than dense where it hides the difference: as good as without."""
    errors = {True: [], False: []}
    for seed in range(8):
        random, factors = np.random.default_rng(seed), true_factors(seed)
        plans = np.vstack([random_plans(12, seed), near_dense_plans(8, seed)])
        measured = np.exp(truth(plans, factors=factors)) + SPREAD * random.standard_normal(len(plans))
        unseen = random_plans(100, 100 + seed)
        for all_of_them in (True, False):
            kept = np.ones(len(plans), dtype=bool) if all_of_them else np.exp(truth(plans)) > 5 * SPREAD
            surrogate = make_surrogate()
            surrogate.fit(plans[kept], np.log(np.maximum(measured[kept], TUNING.least_divergence)), SPREAD)
            errors[all_of_them].append(root_mean_square(surrogate.predict(unseen) - truth(unseen, factors=factors)))
    assert np.median(errors[True]) <= 1.05 * np.median(errors[False])


def test_what_is_below_the_spread_is_only_known_to_be_small():
    """How far below, noise decides; no plan is made out to be worse by it than a measurement of it could."""
    plans, predicted = np.vstack([random_plans(12, 0), near_dense_plans(2, 0)]), []
    for least in (TUNING.least_divergence, 0.1 * SPREAD, TUNING.loss_spread):
        surrogate, observed = make_surrogate(), truth(plans)
        observed[-2:] = np.log(least)
        surrogate.fit(plans, observed, SPREAD)
        predicted.append(surrogate.predict(plans))
    assert predicted[0] == pytest.approx(predicted[2])
    assert predicted[1] == pytest.approx(predicted[2])


def test_each_measurement_has_its_own_spread():
    """A wrong one that is said to be uncertain changes little, one that is said to be certain much."""
    plans = random_plans(20, 0)
    observed, shifts = truth(plans), {}
    wrong = observed + 1.5 * (np.arange(len(plans)) == 7)
    for own in (0.0, 10.0):
        spread = np.where(np.arange(len(plans)) == 7, own * np.exp(observed), 0.0)
        right, misled = make_surrogate(), make_surrogate()
        right.fit(plans, observed, spread)
        misled.fit(plans, wrong, spread)
        shifts[own] = root_mean_square(misled.predict(plans) - right.predict(plans))
    assert shifts[10.0] < 0.2 * shifts[0.0]


def test_what_earlier_trials_had_predicted_of_each():
    """The innovations against conditioning one trial after the other on those before it."""
    surrogate, plans = make_surrogate(), random_plans(12, 0)
    surrogate.fit(plans, truth(plans, 0.3, 1.1, true_factors()), SPREAD)
    gap, covariance, _ = surrogate.linearised(surrogate.mean)
    slow = [gap[t] - covariance[t, :t] @ np.linalg.solve(covariance[:t, :t], gap[:t]) for t in range(len(gap))]
    assert surrogate.ahead() == pytest.approx(slow)


# -- the linearisation


def test_the_jacobian_is_that_of_finite_differences():
    surrogate, plans = make_surrogate(), random_plans(15, 0)
    surrogate.fit(plans, truth(plans, 0.5, 1.2, true_factors()), SPREAD)
    values = surrogate.mean

    def predicted(changed):
        return surrogate.predict(plans, changed)

    jacobian = surrogate.jacobian(values)
    assert jacobian.shape == (len(plans), len(values))
    assert values.size == SITES * len(METHODS) + 2
    for column in range(len(values)):
        step = np.zeros(len(values))
        step[column] = 1e-5
        slow = (predicted(values + step) - predicted(values - step)) / 2e-5
        assert jacobian[:, column] == pytest.approx(slow, rel=1e-5, abs=1e-8)
