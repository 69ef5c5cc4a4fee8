"""What measured plans say of their neighbours: the Gaussian process, written out, and what it must not do."""

import numpy as np
import pytest

from rankfront.search.optimise.neighbours import Neighbours, alike
from rankfront.search.tuning import TUNING


def made(seed=0, trials=7, lines=20):
    """(plans, levels, errors, spreads) of measured plans; what is predicted of all of them is 0."""
    random = np.random.default_rng(seed)
    plans = random.integers(0, 4, (trials, lines))
    return plans, random.normal(0, 0.1, trials), random.uniform(0.02, 0.2, trials), random.uniform(0, 0.02, trials)


def test_alike():
    a = np.zeros((1, 10), dtype=int)
    b = np.array([[0] * 10, [1] * 2 + [0] * 8, [1] * 10])
    np.testing.assert_allclose(alike(a, b), np.exp(-np.array([[0, 0.2, 1.0]]) / TUNING.alike))


def test_it_is_a_gaussian_process():
    """Against the joint Gaussian of all plans, conditioned by its blocks."""
    plans, missed, errors, spreads = made()
    others, claimed = np.random.default_rng(1).integers(0, 4, (5, 20)), np.linspace(0.01, 0.3, 5)
    others[0] = plans[2]
    every, deviations = np.vstack([plans, others]), np.append(errors, claimed)
    joint = np.array(
        [
            [s * t * float(alike(p[None], q[None])[0, 0]) for q, t in zip(every, deviations, strict=True)]
            for p, s in zip(every, deviations, strict=True)
        ]
    )
    count = len(plans)
    seen = joint[:count, :count] + np.diag(TUNING.alike_noise**2 + spreads**2)
    gain = joint[count:, :count] @ np.linalg.inv(seen)
    correction, left = Neighbours(plans, missed, errors, spreads).correct(others, claimed)
    np.testing.assert_allclose(correction, gain @ missed, rtol=1e-8)
    np.testing.assert_allclose(left**2, np.diag(joint[count:, count:] - gain @ joint[:count, count:]), rtol=1e-6)


def test_the_nearer_a_plan_is_the_more_it_is_corrected():
    plan = np.zeros((1, 10), dtype=int)
    neighbours = Neighbours(plan, np.array([0.1]), np.array([0.2]), np.array([0.0]))
    others = np.array([[1] * moved + [0] * (10 - moved) for moved in range(11)])
    correction, left = neighbours.correct(others, np.full(11, 0.2))
    assert (np.diff(correction) < 0).all()
    assert (np.diff(left) > 0).all()
    assert correction[0] == pytest.approx(0.1, rel=0.02)
    assert correction[-1] < 0.001
    assert left[0] == pytest.approx(TUNING.alike_noise, rel=0.02)


def test_what_is_sure_of_itself_is_not_corrected():
    plans, missed, errors, spreads = made()
    correction, left = Neighbours(plans, missed, errors, spreads).correct(plans, np.zeros(len(plans)))
    np.testing.assert_array_equal(correction, 0)
    np.testing.assert_array_equal(left, 0)


def test_noisy_measurements_correct_little():
    plans, missed, errors, _ = made()
    exact, noisy = (Neighbours(plans, missed, errors, np.full(len(plans), s)).correct(plans, errors)[0] for s in (0, 5))
    assert np.abs(noisy).max() < 0.01 * np.abs(exact).max()
