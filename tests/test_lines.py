"""Straight lines in what each method saves: exact where that is what there is, an average where nobody tried."""

import numpy as np
import pytest
from common import save_folder
from launching import make_run, optuna_study, small_data
from test_figures import disjoint_plan, value

from rankfront.search.measure.runner import JobRunner
from rankfront.search.optimise.acquisition import fitted, savings
from rankfront.search.optimise.goal import menu_of
from rankfront.search.plans.menu_jobs import menu_record


def test_one_slope_for_each_method_is_found():
    chooser = np.random.default_rng(0)
    known, asked = chooser.uniform(0, 0.3, (12, 3)), chooser.uniform(0, 0.3, (5, 3))
    slopes = np.array([-4.0, 0.0, 1.0])
    np.testing.assert_allclose(fitted(known, 7 + known @ slopes, asked), 7 + asked @ slopes, atol=0.02)


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_a_method_that_no_trial_used_is_taken_for_an_average_one(scale):
    known = np.array([[0.0, 0.0], [0.1, 0.0], [0.3, 0.0]])
    values = scale * (1 - 2 * known[:, 0])
    found = fitted(known, values, np.array([[0.0, 0.2], [0.0, 0.0]]))
    np.testing.assert_allclose(found / scale, [0.6, 1.0], atol=0.02)


def test_without_trials_all_are_as_dense():
    np.testing.assert_array_equal(fitted(np.zeros((0, 2)), np.zeros(0), np.ones((3, 2))), 1.0)


@pytest.mark.parametrize("name", ["kv_bytes", "flops"])
def test_what_a_model_does_is_predicted_from_a_few_trials(name, text_file, tmp_path):
    """Of the plans of a tiny model: low ranks leave the cache alone, thinner heads do not."""
    data = small_data(save_folder("llama", tmp_path / "model"), text_file, sampler="rankfront", trials=3)
    data["space"] = {"methods": ["svd-llm", "lama", "vo-svd"], "keep": [0.3, 0.5, 0.7], "rank_multiple": 2}
    study = make_run(data, tmp_path / "run")
    resident = JobRunner(study.setup())
    menu = menu_of(study.config, resident.compressed.space, menu_record(optuna_study(study).user_attrs), "float32", {})
    plans = [disjoint_plan(resident, seed) for seed in range(40)]
    found = [(places, value(resident, plan, name)) for plan in plans if (places := menu.encode(plan))]
    assert len(found) > 20
    saved, measured = savings(menu, [places for places, _ in found]), np.array([each for _, each in found])
    predicted = fitted(saved[:15], measured[:15], saved[15:])
    spread = measured.max() - measured.min()
    assert spread > 0
    assert np.abs(predicted - measured[15:]).max() < 0.1 * spread
