"""What slopes say of plans nearby, and how far they are believed: on synthetic slopes, against slow sums."""

import math

import numpy as np
import pytest

from rankfront.search.optimise.taylor import (
    Scaling,
    TaylorModel,
    learn_scalings,
    surest,
)
from rankfront.search.tuning import TUNING

LINES, OPTIONS, DIVERGENCE = 30, 5, 0.4
PRIOR = Scaling(TUNING.first_order[0], TUNING.second_order[0])
FIRST, SECOND = TUNING.first_order, TUNING.second_order
BOUNDS = TUNING.first_bounds, TUNING.second_bounds


def make_local(seed=0, places=None, divergence=DIVERGENCE):
    """Slopes of either sign and curvatures of none but positive, both 0 at the reference."""
    random = np.random.default_rng(seed)
    reference = random.integers(OPTIONS, size=LINES) if places is None else np.array(places)
    first, second = [], []
    for place in reference:
        a, b = random.normal(0, 0.02, OPTIONS), random.exponential(0.004, OPTIONS)
        a[place] = b[place] = 0.0
        first.append(a)
        second.append(b)
    return TaylorModel(reference, divergence, first, second)


def near(taylor, seed, count, switched):
    """Plans that differ from the reference at ``switched`` sites."""
    random = np.random.default_rng(seed)
    plans = np.tile(taylor.places, (count, 1))
    for plan in plans:
        sites = random.choice(LINES, switched, replace=False)
        plan[sites] = (plan[sites] + random.integers(1, OPTIONS, switched)) % OPTIONS
    return plans


def slow_change(taylor, plan, alpha, kappa):
    """α Σ a + κ Σ b, site by site."""
    pairs = [(taylor.first[i][place], taylor.second[i][place]) for i, place in enumerate(plan)]
    return sum(alpha * float(a) + kappa * float(b) for a, b in pairs)


def measured(taylor, plans, alpha, kappa, noise=0.0, seed=0):
    """D of plans that behave as the formula says, and noise in proportion."""
    random = np.random.default_rng(seed)
    changes = np.array([slow_change(taylor, plan, alpha, kappa) for plan in plans])
    return taylor.divergence + changes * (1 + noise * random.standard_normal(len(plans)))


# -- predicting


@pytest.mark.parametrize("scaling", [PRIOR, Scaling(1.0, 1.0), Scaling(0.3, 8.0)])
def test_a_prediction_is_the_formula(scaling):
    taylor = make_local()
    plans = near(taylor, 1, 12, 6)
    expected = [DIVERGENCE + slow_change(taylor, plan, scaling.first, scaling.second) for plan in plans]
    assert min(expected) > TUNING.least_left * DIVERGENCE
    logs, errors = taylor.predict(plans, scaling)
    assert logs == pytest.approx(np.log(expected))
    assert errors.shape == logs.shape
    a, b = taylor.sums(plans)
    assert a == pytest.approx([slow_change(taylor, plan, 1, 0) for plan in plans])
    assert b == pytest.approx([slow_change(taylor, plan, 0, 1) for plan in plans])


def test_the_centre_is_predicted_as_measured():
    """And nothing is predicted more surely."""
    taylor = make_local()
    logs, errors = taylor.predict(np.concatenate([taylor.places[None], near(taylor, 0, 20, 3)]), PRIOR)
    assert logs[0] == pytest.approx(math.log(DIVERGENCE))
    assert errors[0] == pytest.approx(TUNING.change_floor / DIVERGENCE)
    assert errors.argmin() == 0


def test_no_prediction_falls_below_the_floor():
    """However far downhill the slopes point, part of the centre's divergence stays."""
    taylor = make_local()
    downhill = np.array([int(a.argmin()) for a in taylor.first])
    floor = math.log(TUNING.least_left * DIVERGENCE)
    found = [taylor.predict(downhill[None], Scaling(alpha, 1.0))[0][0] for alpha in (0.1, 1.0, 100.0, 1e6)]
    assert found == sorted(found, reverse=True)
    assert min(found) == pytest.approx(floor)
    assert found[0] > floor + 0.1


def test_an_option_of_which_nothing_is_known_is_infinitely_bad():
    taylor = make_local()
    unknown = (int(taylor.places[0]) + 1) % OPTIONS
    taylor.first[0][unknown], taylor.second[0][unknown] = 0.0, np.inf
    plan = taylor.places.copy()
    plan[0] = unknown
    logs, errors = taylor.predict(np.stack([plan, taylor.places]), PRIOR)
    assert logs[0] == errors[0] == taylor.losses(PRIOR)[0][unknown] == math.inf
    assert np.isfinite([logs[1], errors[1]]).all()


@pytest.mark.parametrize("damping", [1.0, 2.0])
def test_losses_for_an_allocator_sum_to_the_predicted_change(damping):
    """With more damping κ counts more, and so steps get shorter."""
    taylor = make_local()
    losses = taylor.losses(PRIOR, damping)
    assert [loss[place] for loss, place in zip(losses, taylor.places, strict=True)] == [0.0] * LINES
    for plan in near(taylor, 2, 5, 10):
        expected = slow_change(taylor, plan, PRIOR.first, damping * PRIOR.second)
        assert sum(loss[place] for loss, place in zip(losses, plan, strict=True)) == pytest.approx(expected)


# -- which slopes are asked


def test_longer_steps_are_less_sure():
    taylor = make_local()
    errors = [taylor.predict(near(taylor, 0, 200, switched), PRIOR)[1].mean() for switched in (1, 4, 12, LINES)]
    assert errors == sorted(errors)


def test_the_surest_centre_is_asked():
    """Of every plan the one whose own prediction has the least error, by hand."""
    base = np.zeros(LINES, dtype=int)
    references = []
    for trial, differing in enumerate((12, 3, 7)):
        places = base.copy()
        places[:differing] = 1
        references.append(make_local(trial, places))
    plans = np.concatenate([base[None], *(near(taylor, 5, 10, 6) for taylor in references)])
    logs, errors = surest(references, plans, [PRIOR] * len(references))
    for plan, log, error in zip(plans, logs, errors, strict=True):
        every = [[float(value[0]) for value in taylor.predict(plan[None], PRIOR)] for taylor in references]
        expected = min(every, key=lambda pair: pair[1])
        assert (log, error) == pytest.approx(expected)
    assert surest(references[::-1], plans, [PRIOR] * len(references))[0] == pytest.approx(logs)
    for taylor in references:
        assert surest(references, taylor.places[None], [PRIOR] * len(references))[0] == pytest.approx(
            [math.log(taylor.divergence)]
        )


def test_without_slopes_nobody_is_sure():
    plans = np.zeros((3, LINES), dtype=int)
    assert (surest([], plans, [])[1] == math.inf).all()
    taylor = make_local(0, np.ones(LINES, dtype=int))
    for b in taylor.second:
        b[0] = np.inf
    assert (surest([taylor], plans, [PRIOR])[1] == math.inf).all()


# -- how far they are believed


def learn_trust(taylor, plans, values):
    """That of slopes around one reference alone."""
    (found,) = learn_scalings([taylor], plans, values)
    return found


@pytest.mark.parametrize(("alpha", "kappa"), [(0.5, 2.0), (0.75, 5.0), (1.0, 1.5), (1.2, 8.0)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_trust_is_recovered(alpha, kappa, noise):
    taylor = make_local()
    plans = np.concatenate([near(taylor, seed, 40, switched) for seed, switched in enumerate((4, 8, 12))])
    found = learn_trust(taylor, plans, measured(taylor, plans, alpha, kappa, noise))
    assert found.first == pytest.approx(alpha, abs=0.1)
    assert found.second == pytest.approx(kappa, rel=0.15)


def test_more_plans_bring_it_nearer():
    taylor = make_local()
    plans = near(taylor, 0, 200, 10)
    values = measured(taylor, plans, 1.2, 6.0)
    errors = []
    for count in (2, 20, 200):
        found = learn_trust(taylor, plans[:count], values[:count])
        errors.append(abs(found.first - 1.2) / FIRST[1] + abs(found.second - 6.0) / SECOND[1])
    assert errors[2] < errors[1] < errors[0]


def test_several_centres_teach_together():
    """Each plan is read through the references near to it; what the far one says of it is too unsure to count."""
    locals_ = [make_local(seed, np.full(LINES, seed), DIVERGENCE * (1 + seed)) for seed in (0, 1)]
    for taylor in locals_:
        for b in taylor.second:
            b[1 - int(taylor.places[0])] = 1.0
    plans = [near(taylor, seed, 60, 8) for seed, taylor in enumerate(locals_)]
    values = [measured(taylor, own, 0.6, 4.0) for taylor, own in zip(locals_, plans, strict=True)]
    for found in learn_scalings(locals_, np.concatenate(plans), np.concatenate(values)):
        assert found.first == pytest.approx(0.6, abs=0.1)
        assert found.second == pytest.approx(4.0, rel=0.15)


def test_without_data_it_stays_at_the_prior():
    """Neither without plans, nor with the reference alone, nor with plans of which the slopes are far from sure."""
    taylor, far = make_local(0, np.zeros(LINES, dtype=int)), np.full((5, LINES), 3)
    for b in taylor.second:
        b[3] = 1.0
    none = np.zeros((0, LINES), dtype=int)
    assert learn_scalings([], far, np.full(5, 5.0)) == []
    for plans in (none, far, taylor.places[None]):
        scaling = learn_trust(taylor, plans, np.full(len(plans), 5.0))
        assert (scaling.first, scaling.second) == pytest.approx((FIRST[0], SECOND[0]))


def test_an_option_of_which_nothing_is_known_teaches_nothing():
    taylor = make_local(0, np.zeros(LINES, dtype=int))
    taylor.second[4][2] = np.inf
    plans = near(taylor, 0, 30, 8)
    plans[:, 4] = 0
    values = measured(taylor, plans, 1.0, 5.0)
    unknown = plans[:5].copy()
    unknown[:, 4] = 2
    both = learn_trust(taylor, np.concatenate([plans, unknown]), np.append(values, np.full(5, 3.0)))
    assert both == learn_trust(taylor, plans, values)


def test_plans_that_agree_with_the_prior_leave_it_where_it_is():
    taylor = make_local()
    plans = near(taylor, 0, 30, 8)
    found = learn_trust(taylor, plans, measured(taylor, plans, *(FIRST[0], SECOND[0])))
    assert (found.first, found.second) == pytest.approx((FIRST[0], SECOND[0]))


@pytest.mark.parametrize("alpha", [-50.0, 50.0])
@pytest.mark.parametrize("kappa", [-500.0, 500.0])
def test_absurd_measurements_stay_within_the_bounds(alpha, kappa):
    taylor = make_local()
    plans = near(taylor, 0, 100, 8)
    found = learn_trust(taylor, plans, measured(taylor, plans, alpha, kappa))
    for value, (low, high), wild in zip((found.first, found.second), BOUNDS, (alpha, kappa), strict=True):
        assert value == (low if wild < 0 else high)


@pytest.mark.parametrize("values", [0.0, 1e-300, 1e12])
def test_any_measurement_gives_a_trust_within_the_bounds(values):
    taylor = make_local()
    plans = near(taylor, 0, 10, 8)
    found = learn_trust(taylor, plans, np.full(10, values))
    for value, (low, high) in zip((found.first, found.second), BOUNDS, strict=True):
        assert low <= value <= high


def test_one_wild_plan_among_many_is_outvoted_in_part():
    """Errors are taken in proportion to the terms, so that a long step weighs no more than a short one."""
    taylor = make_local()
    short, long = near(taylor, 0, 60, 3), near(taylor, 1, 1, LINES // 2)
    plans = np.concatenate([short, long])
    values = measured(taylor, plans, 0.75, 3.0)
    values[-1] += 5 * abs(values[-1] - DIVERGENCE)
    found = learn_trust(taylor, plans, values)
    assert found.first == pytest.approx(0.75, abs=0.25)


def test_the_same_measurements_give_the_same_trust():
    taylor = make_local()
    plans = near(taylor, 0, 20, 8)
    values = measured(taylor, plans, 0.9, 4.0, 0.2)
    assert learn_trust(taylor, plans, values) == learn_trust(taylor, plans, values)


def test_what_was_learned_elsewhere_says_less():
    """Plans around one reference teach its own slopes all they can, and another centre's only some of it."""
    found = [make_local(seed, np.full(LINES, seed)) for seed in (0, 1)]
    for taylor in found:
        for b in taylor.second:
            b[1 - int(taylor.places[0])] = 1.0
    plans = near(found[1], 1, 30, 8)
    values = measured(found[1], plans, 0.75, 6.0)
    other, own = learn_scalings(found, plans, values)
    alone = learn_trust(found[1], plans, values)
    assert (own.first, own.second) == pytest.approx((alone.first, alone.second))
    assert SECOND[0] < other.second < own.second
