"""Contexts: what slopes around one plan say of every site, against models in which the truth is known."""

import numpy as np
import pytest

from rankfront.methods import Option
from rankfront.search.optimise.corrections import Corrections, corrections_of, factors_at
from rankfront.search.optimise.surrogate import Surrogate
from rankfront.search.optimise.taylor import TaylorModel
from rankfront.search.plans.menu import Line, Menu
from rankfront.search.tuning import TUNING

SITES, LEVELS = 24, 5


def line(i):
    """A site of `LEVELS` ranks by two methods, dense first."""
    options = [Option.of("dense")]
    sizes, divergence = [100], [0.0]
    for k in range(LEVELS):
        for method, times in (("svd", 2.0), ("svd-llm", 1.0)):
            options.append(Option.of(method, rank=8 * (LEVELS - k)))
            sizes.append(90 - 18 * k)
            divergence.append(times * (1 + i % 3) * 0.004 * (k + 1) ** 2)
    return Line(f"site {i}", tuple(options), np.array(sizes), np.array(divergence))


MENU = Menu(tuple(line(i) for i in range(SITES)))
FEATURES = Surrogate(MENU, ["kind"] * SITES, [0] * SITES).features


def around(places, factors, scale=2.0, noise=0.0):
    """Slopes around ``places`` where each site hurts ``scale`` times ``factors`` (SITES,) what the menu says."""
    random = np.random.default_rng(0)
    first, second = [], []
    for i, place in enumerate(places):
        increase = scale * factors[i] * MENU.lines[i].divergence
        b = np.abs(increase - increase[place]) / 10
        a = (
            increase
            - increase[place]
            - TUNING.second_order[0] * (b - b[place])
            + noise * np.sqrt(b) * random.standard_normal(len(b))
        )
        a[0] = increase[0] - increase[place]  # taking a site's treatment back is straight
        first.append(a)
        second.append(b)
    return TaylorModel(np.array(places), 1.0, first, second)


def factors_of(context):
    """f by line and method."""
    return {key: float(np.exp(context.logs[place])) for key, place in FEATURES.items()}


def test_a_menu_that_is_right_stays_as_it_is():
    """Only relative factors count: what slopes say of all sites alike is the surrogate's slope and offset."""
    for scale in (0.5, 3.0):
        context = corrections_of(around([4] * SITES, np.ones(SITES), scale), MENU, FEATURES)
        assert context.share == pytest.approx(MENU.size([4] * SITES) / MENU.dense)
        assert [value for (_, method), value in factors_of(context).items() if method == "svd-llm"] == pytest.approx(
            [1.0] * SITES, abs=0.05
        )


def test_sites_that_hurt_more_in_context_are_found():
    truth = np.exp(np.random.default_rng(1).normal(0, 0.5, SITES))
    found = factors_of(corrections_of(around([4] * SITES, truth), MENU, FEATURES))
    mine = [found[i, "svd-llm"] for i in range(SITES)]
    assert np.corrcoef(np.log(mine), np.log(truth))[0, 1] > 0.95
    assert np.std(np.log(mine)) < np.std(np.log(truth))  # shrunk


def test_untreated_sites_have_factors_too():
    truth = np.exp(np.random.default_rng(2).normal(0, 0.5, SITES))
    places = [4 if i % 2 else 0 for i in range(SITES)]
    found = factors_of(corrections_of(around(places, truth), MENU, FEATURES))
    untreated = [i for i in range(SITES) if not places[i]]
    mine = [found[i, "svd-llm"] for i in untreated]
    assert np.corrcoef(np.log(mine), np.log(truth[untreated]))[0, 1] > 0.9


def test_the_surest_options_say_most_and_noise_leaves_a_factor_at_one():
    taylor = around([4] * SITES, np.full(SITES, 1.0))
    doubtful = [np.full_like(b, 1e6) for b in taylor.second]
    noisy = TaylorModel(taylor.places, 1.0, taylor.first, doubtful)
    assert np.exp(corrections_of(noisy, MENU, FEATURES).logs) == pytest.approx(1.0, abs=0.01)


def test_what_is_unknown_has_no_factor():
    taylor = around([4] * SITES, np.ones(SITES))
    unknown = [np.full_like(b, np.inf) for b in taylor.second]
    assert not corrections_of(TaylorModel(taylor.places, 1.0, taylor.first, unknown), MENU, FEATURES).logs.any()


def test_there_is_no_context_around_dense_nor_where_treatments_help():
    assert corrections_of(around([0] * SITES, np.ones(SITES)), MENU, FEATURES) is None
    assert corrections_of(around([4] * SITES, -np.ones(SITES)), MENU, FEATURES) is None


def test_factors_fade_with_the_distance_in_size():
    """At a reference nearly its own factors, between two a mean of them, far from all of them none."""
    one, other = Corrections(0.3, np.array([1.0, -1.0])), Corrections(0.8, np.array([0.0, 0.4]))
    at = factors_at([one, other], np.array([0.3, 0.8, 0.55, 3.0]), 2)
    assert at[0] == pytest.approx(one.logs / (1 + TUNING.factor_prior), abs=0.01)
    assert at[1] == pytest.approx(other.logs / (1 + TUNING.factor_prior), abs=0.01)
    near = np.exp(-0.5 * (0.25 / TUNING.factor_width) ** 2)
    assert at[2] == pytest.approx((one.logs + other.logs) * near / (2 * near + TUNING.factor_prior))
    assert abs(at[3]).max() < 1e-9
    assert not factors_at([], np.array([0.5]), 2).any()


def test_the_surrogate_reads_each_plan_by_its_own_size():
    """Predictions and the losses for an allocator agree with adding up by hand, at every size."""
    surrogate = Surrogate(MENU, ["kind"] * SITES, [0] * SITES)
    random = np.random.default_rng(3)
    surrogate.corrections = [Corrections(share, random.normal(0, 0.5, len(FEATURES))) for share in (0.4, 0.8)]
    for plan in random.integers(0, 2 * LEVELS + 1, (20, SITES)):
        share = MENU.size(list(plan)) / MENU.dense
        logs = factors_at(surrogate.corrections, np.array([share]), len(FEATURES))[0]
        expected = sum(
            MENU.lines[i].divergence[place] * np.exp(logs[FEATURES[i, MENU.lines[i].options[place].method]])
            for i, place in enumerate(plan)
            if place
        )
        losses = surrogate.losses(share)
        assert sum(losses[i][place] for i, place in enumerate(plan)) == pytest.approx(expected)
        assert surrogate.predict(plan[None])[0] == pytest.approx(np.log(expected), abs=1e-6)


def test_a_slope_that_is_no_number_has_no_factor():
    taylor = around([4] * SITES, np.ones(SITES))
    taylor.first[2][3] = np.nan
    assert np.isfinite(corrections_of(taylor, MENU, FEATURES).logs).all()
