"""What slopes say of plans nearby, and how far they are believed: on synthetic slopes, against slow sums."""

import math

import numpy as np
import pytest

from rankfront.search.optimise.taylor import (
    BOUNDS,
    FIRST,
    FLOOR,
    LEAST_SHARE,
    SECOND,
    Local,
    Trust,
    learn_trusts,
    surest,
)

LINES, OPTIONS, DIVERGENCE = 30, 5, 0.4
PRIOR = Trust(FIRST[0], SECOND[0])


def make_local(seed=0, trial=0, places=None, divergence=DIVERGENCE):
    """Slopes of either sign and curvatures of none but positive, both 0 at the centre."""
    random = np.random.default_rng(seed)
    centre = random.integers(OPTIONS, size=LINES) if places is None else np.array(places)
    first, second = [], []
    for place in centre:
        a, b = random.normal(0, 0.02, OPTIONS), random.exponential(0.004, OPTIONS)
        a[place] = b[place] = 0.0
        first.append(a)
        second.append(b)
    return Local(trial, centre, divergence, first, second)


def near(local, seed, count, switched):
    """Plans that differ from the centre at ``switched`` sites."""
    random = np.random.default_rng(seed)
    plans = np.tile(local.places, (count, 1))
    for plan in plans:
        sites = random.choice(LINES, switched, replace=False)
        plan[sites] = (plan[sites] + random.integers(1, OPTIONS, switched)) % OPTIONS
    return plans


def slow_change(local, plan, alpha, kappa):
    """α Σ a + κ Σ b, site by site."""
    pairs = [(local.first[i][place], local.second[i][place]) for i, place in enumerate(plan)]
    return sum(alpha * float(a) + kappa * float(b) for a, b in pairs)


def measured(local, plans, alpha, kappa, noise=0.0, seed=0):
    """D of plans that behave as the formula says, and noise in proportion."""
    random = np.random.default_rng(seed)
    changes = np.array([slow_change(local, plan, alpha, kappa) for plan in plans])
    return local.divergence + changes * (1 + noise * random.standard_normal(len(plans)))


# -- predicting


@pytest.mark.parametrize("trust", [PRIOR, Trust(1.0, 1.0), Trust(0.3, 8.0)])
def test_a_prediction_is_the_formula(trust):
    local = make_local()
    plans = near(local, 1, 12, 6)
    expected = [DIVERGENCE + slow_change(local, plan, trust.first, trust.second) for plan in plans]
    assert min(expected) > LEAST_SHARE * DIVERGENCE
    logs, errors = local.predict(plans, trust)
    assert logs == pytest.approx(np.log(expected))
    assert errors.shape == logs.shape
    a, b = local.sums(plans)
    assert a == pytest.approx([slow_change(local, plan, 1, 0) for plan in plans])
    assert b == pytest.approx([slow_change(local, plan, 0, 1) for plan in plans])


def test_the_centre_is_predicted_as_measured():
    """And nothing is predicted more surely."""
    local = make_local()
    logs, errors = local.predict(np.concatenate([local.places[None], near(local, 0, 20, 3)]), PRIOR)
    assert logs[0] == pytest.approx(math.log(DIVERGENCE))
    assert errors[0] == pytest.approx(FLOOR / DIVERGENCE)
    assert errors.argmin() == 0


def test_no_prediction_falls_below_the_floor():
    """However far downhill the slopes point, part of the centre's divergence stays."""
    local = make_local()
    downhill = np.array([int(a.argmin()) for a in local.first])
    floor = math.log(LEAST_SHARE * DIVERGENCE)
    found = [local.predict(downhill[None], Trust(alpha, 1.0))[0][0] for alpha in (0.1, 1.0, 100.0, 1e6)]
    assert found == sorted(found, reverse=True)
    assert min(found) == pytest.approx(floor)
    assert found[0] > floor + 0.1


def test_an_option_of_which_nothing_is_known_is_infinitely_bad():
    local = make_local()
    unknown = (int(local.places[0]) + 1) % OPTIONS
    local.first[0][unknown], local.second[0][unknown] = 0.0, np.inf
    plan = local.places.copy()
    plan[0] = unknown
    logs, errors = local.predict(np.stack([plan, local.places]), PRIOR)
    assert logs[0] == errors[0] == local.losses(PRIOR)[0][unknown] == math.inf
    assert np.isfinite([logs[1], errors[1]]).all()


@pytest.mark.parametrize("caution", [1.0, 2.0])
def test_losses_for_an_allocator_sum_to_the_predicted_change(caution):
    """With more caution κ counts more, and so steps get shorter."""
    local = make_local()
    losses = local.losses(PRIOR, caution)
    assert [loss[place] for loss, place in zip(losses, local.places, strict=True)] == [0.0] * LINES
    for plan in near(local, 2, 5, 10):
        expected = slow_change(local, plan, PRIOR.first, caution * PRIOR.second)
        assert sum(loss[place] for loss, place in zip(losses, plan, strict=True)) == pytest.approx(expected)


# -- which slopes are asked


def test_longer_steps_are_less_sure():
    local = make_local()
    errors = [local.predict(near(local, 0, 200, switched), PRIOR)[1].mean() for switched in (1, 4, 12, LINES)]
    assert errors == sorted(errors)


def test_the_surest_centre_is_asked():
    """Of every plan the one whose own prediction has the least error, by hand."""
    base = np.zeros(LINES, dtype=int)
    centres = []
    for trial, differing in enumerate((12, 3, 7)):
        places = base.copy()
        places[:differing] = 1
        centres.append(make_local(trial, trial, places))
    plans = np.concatenate([base[None], *(near(local, 5, 10, 6) for local in centres)])
    logs, errors = surest(centres, plans, [PRIOR] * len(centres))
    for plan, log, error in zip(plans, logs, errors, strict=True):
        every = [[float(value[0]) for value in local.predict(plan[None], PRIOR)] for local in centres]
        expected = min(every, key=lambda pair: pair[1])
        assert (log, error) == pytest.approx(expected)
    assert surest(centres[::-1], plans, [PRIOR] * len(centres))[0] == pytest.approx(logs)
    for local in centres:
        assert surest(centres, local.places[None], [PRIOR] * len(centres))[0] == pytest.approx(
            [math.log(local.divergence)]
        )


def test_without_slopes_nobody_is_sure():
    plans = np.zeros((3, LINES), dtype=int)
    assert (surest([], plans, [])[1] == math.inf).all()
    local = make_local(0, 0, np.ones(LINES, dtype=int))
    for b in local.second:
        b[0] = np.inf
    assert (surest([local], plans, [PRIOR])[1] == math.inf).all()


# -- how far they are believed


def learn_trust(local, plans, values):
    """That of slopes around one centre alone."""
    (found,) = learn_trusts([local], plans, values)
    return found


@pytest.mark.parametrize(("alpha", "kappa"), [(0.5, 2.0), (0.75, 5.0), (1.0, 1.5), (1.2, 8.0)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_trust_is_recovered(alpha, kappa, noise):
    local = make_local()
    plans = np.concatenate([near(local, seed, 40, switched) for seed, switched in enumerate((4, 8, 12))])
    found = learn_trust(local, plans, measured(local, plans, alpha, kappa, noise))
    assert found.first == pytest.approx(alpha, abs=0.1)
    assert found.second == pytest.approx(kappa, rel=0.15)


def test_more_plans_bring_it_nearer():
    local = make_local()
    plans = near(local, 0, 200, 10)
    values = measured(local, plans, 1.2, 6.0)
    errors = []
    for count in (2, 20, 200):
        found = learn_trust(local, plans[:count], values[:count])
        errors.append(abs(found.first - 1.2) / FIRST[1] + abs(found.second - 6.0) / SECOND[1])
    assert errors[2] < errors[1] < errors[0]


def test_several_centres_teach_together():
    """Each plan is read through the centres near to it; what the far one says of it is too unsure to count."""
    locals_ = [make_local(seed, seed, np.full(LINES, seed), DIVERGENCE * (1 + seed)) for seed in (0, 1)]
    for local in locals_:
        for b in local.second:
            b[1 - int(local.places[0])] = 1.0
    plans = [near(local, seed, 60, 8) for seed, local in enumerate(locals_)]
    values = [measured(local, own, 0.6, 4.0) for local, own in zip(locals_, plans, strict=True)]
    for found in learn_trusts(locals_, np.concatenate(plans), np.concatenate(values)):
        assert found.first == pytest.approx(0.6, abs=0.1)
        assert found.second == pytest.approx(4.0, rel=0.15)


def test_without_data_it_stays_at_the_prior():
    """Neither without plans, nor with the centre alone, nor with plans of which the slopes are far from sure."""
    local, far = make_local(0, 0, np.zeros(LINES, dtype=int)), np.full((5, LINES), 3)
    for b in local.second:
        b[3] = 1.0
    none = np.zeros((0, LINES), dtype=int)
    assert learn_trusts([], far, np.full(5, 5.0)) == []
    for plans in (none, far, local.places[None]):
        trust = learn_trust(local, plans, np.full(len(plans), 5.0))
        assert (trust.first, trust.second) == pytest.approx((FIRST[0], SECOND[0]))
    assert Trust() == PRIOR


def test_an_option_of_which_nothing_is_known_teaches_nothing():
    local = make_local(0, 0, np.zeros(LINES, dtype=int))
    local.second[4][2] = np.inf
    plans = near(local, 0, 30, 8)
    plans[:, 4] = 0
    values = measured(local, plans, 1.0, 5.0)
    unknown = plans[:5].copy()
    unknown[:, 4] = 2
    both = learn_trust(local, np.concatenate([plans, unknown]), np.append(values, np.full(5, 3.0)))
    assert both == learn_trust(local, plans, values)


def test_plans_that_agree_with_the_prior_leave_it_where_it_is():
    local = make_local()
    plans = near(local, 0, 30, 8)
    found = learn_trust(local, plans, measured(local, plans, *(FIRST[0], SECOND[0])))
    assert (found.first, found.second) == pytest.approx((FIRST[0], SECOND[0]))


@pytest.mark.parametrize("alpha", [-50.0, 50.0])
@pytest.mark.parametrize("kappa", [-500.0, 500.0])
def test_absurd_measurements_stay_within_the_bounds(alpha, kappa):
    local = make_local()
    plans = near(local, 0, 100, 8)
    found = learn_trust(local, plans, measured(local, plans, alpha, kappa))
    for value, (low, high), wild in zip((found.first, found.second), BOUNDS, (alpha, kappa), strict=True):
        assert value == (low if wild < 0 else high)


@pytest.mark.parametrize("values", [0.0, 1e-300, 1e12])
def test_any_measurement_gives_a_trust_within_the_bounds(values):
    local = make_local()
    plans = near(local, 0, 10, 8)
    found = learn_trust(local, plans, np.full(10, values))
    for value, (low, high) in zip((found.first, found.second), BOUNDS, strict=True):
        assert low <= value <= high


def test_one_wild_plan_among_many_is_outvoted_in_part():
    """Errors are taken in proportion to the terms, so that a long step weighs no more than a short one."""
    local = make_local()
    short, long = near(local, 0, 60, 3), near(local, 1, 1, LINES // 2)
    plans = np.concatenate([short, long])
    values = measured(local, plans, 0.75, 3.0)
    values[-1] += 5 * abs(values[-1] - DIVERGENCE)
    found = learn_trust(local, plans, values)
    assert found.first == pytest.approx(0.75, abs=0.25)


def test_the_same_measurements_give_the_same_trust():
    local = make_local()
    plans = near(local, 0, 20, 8)
    values = measured(local, plans, 0.9, 4.0, 0.2)
    assert learn_trust(local, plans, values) == learn_trust(local, plans, values)


def test_what_was_learned_elsewhere_says_less():
    """Plans around one centre teach its own slopes all they can, and another centre's only some of it."""
    found = [make_local(seed, seed, np.full(LINES, seed)) for seed in (0, 1)]
    for local in found:
        for b in local.second:
            b[1 - int(local.places[0])] = 1.0
    plans = near(found[1], 1, 30, 8)
    values = measured(found[1], plans, 0.75, 6.0)
    other, own = learn_trusts(found, plans, values)
    alone = learn_trust(found[1], plans, values)
    assert (own.first, own.second) == pytest.approx((alone.first, alone.second))
    assert SECOND[0] < other.second < own.second
