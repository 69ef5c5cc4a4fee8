"""Paths down in short steps: on synthetic slopes against slow sums and the knapsack, and in whole studies."""

from itertools import pairwise

import numpy as np
import pytest
from launching import check_whole, launch_stopped, make_run, optuna_study, quiet, small_data
from test_allocate import random_menu
from test_opening import predictor_of

from rankfront.search.attributes import INTERRUPTED
from rankfront.search.choices import OURS
from rankfront.search.measure.runner import MEASURES
from rankfront.search.optimise.budgets import target_budgets
from rankfront.search.optimise.continuation import END, POOLED, START, STEP, next_plan, path_sizes, pooled, stops
from rankfront.search.optimise.opening import opening_budgets
from rankfront.search.optimise.taylor import TaylorModel
from rankfront.search.plans.knapsack import sweep
from rankfront.search.run.paths import MORE
from rankfront.search.study import Study

LINES, OPTIONS = 12, 5


def make_local(seed, tokens, places=None):
    random = np.random.default_rng(seed)
    places = random.integers(OPTIONS, size=LINES) if places is None else places
    first, second = random.normal(0, 0.02, (LINES, OPTIONS)), random.exponential(0.004, (LINES, OPTIONS))
    first[np.arange(LINES), places] = second[np.arange(LINES), places] = 0.0
    return TaylorModel(seed, np.array(places), np.nan, list(first), list(second), tokens)


def test_stops_fall_by_short_steps_and_meet_the_marks():
    found = stops(0.95, [0.9, 0.8, 0.97, 0.71], 0.025)
    assert found[0] == 0.95
    assert found[-1] == 0.71
    assert {0.9, 0.8} <= set(found)
    assert max(a - b for a, b in pairwise(found)) <= 0.025 + 1e-9
    assert found == sorted(set(found), reverse=True)
    assert len(found) == 1 + 2 + 4 + 4
    assert stops(0.5, [0.9], 0.1) == [0.5]


@pytest.mark.parametrize("tokens", [512, 2048, POOLED, 2 * POOLED])
def test_pooled_slopes_are_the_weighted_mean_by_the_book(tokens):
    path = [make_local(seed, tokens) for seed in range(4)]
    path[0].second[3][:] = np.inf  # where nothing is known, and another option stood
    path[0].places[3] = (path[-1].places[3] + 1) % OPTIONS
    found, fading = pooled(path), max(1 - tokens / POOLED, 0)
    for i, place in enumerate(path[-1].places):
        for option in range(OPTIONS):
            above = below = own = count = 0.0
            for age, taylor in enumerate(reversed(path)):
                weight = fading**age
                above += weight * (taylor.first[i][option] - taylor.first[i][place])
                below += weight
                if weight and taylor.places[i] == place:
                    own += weight * taylor.second[i][option]
                    count += weight
            assert found.first[i][option] == pytest.approx(above / below)
            assert found.second[i][option] == pytest.approx(own / count)
        assert found.first[i][place] == found.second[i][place] == 0
    if fading == 0:
        assert all((a == b).all() for a, b in zip(found.first, path[-1].first, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_where_effects_add_up_the_path_is_the_knapsack_s_at_every_stop(seed):
    """Slopes that are exact and straight: a is the difference of losses, and b is nothing."""
    menu = random_menu(seed, 40, 6)
    solved = sweep(menu)
    span = menu.divergence(menu.cheapest)
    sizes = stops(START * menu.dense, [0.5 * menu.dense], STEP * menu.dense)
    places, path = solved.solve(sizes[0]), []
    for size in sizes[1:]:
        first = [line.divergence - line.divergence[place] for line, place in zip(menu.lines, places, strict=True)]
        path.append(TaylorModel(0, np.array(places), np.nan, first, [np.zeros_like(a) for a in first], 2048))
        places = next_plan(path, menu, size)
        assert menu.size(places) <= size
        assert menu.divergence(places) <= menu.divergence(solved.solve(size)) + 0.003 * span


# -- whole studies


@pytest.fixture
def data(model_folder, text_file, monkeypatch):
    """A study that goes a short path as soon as it may, and a longer one once that is worth it."""
    monkeypatch.setattr("rankfront.search.run.paths.FEWEST", 32)
    monkeypatch.setattr("rankfront.search.optimise.continuation.STEP", 0.05)
    monkeypatch.setattr("rankfront.search.run.budget.SLOPE_TOKENS", 32)
    data = small_data(model_folder, text_file, sampler=OURS, trials=24, anchors=[], rungs=[64])
    data["data"]["search"]["windows"] = 32
    data["space"] |= {"methods": ["svd-llm"], "keep": [0.2, 0.4, 0.6, 0.8]}
    return data | {"objectives": {"divergence": {}, "block_parameters": {}}}


def stops_of(study):
    """The trials that measured slopes along paths, by path; what was interrupted or waits still is left out."""
    found = {}
    for trial in optuna_study(study).trials:
        own = "path" in trial.user_attrs and trial.state.is_finished()
        if own and trial.user_attrs.get("failure") != INTERRUPTED:
            found.setdefault(trial.user_attrs["path"], []).append(trial)
    return found


def sizes_of(study, predictor):
    """Where its paths stop."""
    targets = opening_budgets(target_budgets(predictor), predictor.menu.even.dense)
    return path_sizes(predictor, targets)


def check_paths(study):
    """The laws of paths: each stop's plan is what slopes before it promise, within its size; what is measured there is
    that plan; a later path reads more."""
    predictor, trials = predictor_of(study), optuna_study(study).trials
    even, expected = predictor.menu.even, sizes_of(study, predictor)
    found = stops_of(study)
    for number, path in found.items():
        slopes, sizes = predictor.history.along(path), []
        for i, stop in enumerate(path):
            plan = predictor.history.plan_of(stop.params)
            sizes.append(even.size(plan))
            if i:
                assert plan == next_plan(slopes[:i], even, expected[i])
            assert sizes[-1] <= expected[i]
            reference = stop.user_attrs["slopes_of"]
            if reference is not None:
                assert trials[reference].params == stop.params
                assert trials[reference].user_attrs["origin"] == "path"
                assert trials[reference].user_attrs["anchor"].startswith(f"{number}, keep=")
        assert sizes == sorted(sizes, reverse=True)
        assert len({stop.user_attrs["slope_tokens"] for stop in path}) == 1
    read = [path[0].user_attrs["slope_tokens"] for path in found.values()]
    assert all(later >= MORE * earlier for earlier, later in pairwise(read))
    labels = [row.origin for row in study.rows() if row.origin.startswith("path") and row.state == "complete"]
    assert len(set(labels)) == len(labels)
    return found


def test_a_study_goes_paths_and_measures_their_marks(data, tmp_path):
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 24)
    found = check_paths(study)
    assert len(found) >= 2
    whole = [len(path) for path in found.values()]
    assert whole[0] == max(whole) >= 6
    targets = [trial.user_attrs["slopes_of"] for trial in found[1]]
    assert targets[0] is None
    assert sum(target is not None for target in targets) == 3  # 0.9, 0.8, 0.7
    assert targets[-1] is not None
    rows = {row.number: row for row in study.rows()}
    measured = [rows[target].attributes["block_parameters"] for target in targets if target in rows]
    assert END - 0.06 <= min(measured) <= END


def test_no_path_is_begun_that_limits_would_cut_short(data, tmp_path):
    """Neither for want of tokens, nor where it ends above what limits allow."""
    whole = make_run(data, tmp_path / "whole")
    first = stops_of(whole)[1]
    before = sum(t.user_attrs.get("tokens", 0) for t in optuna_study(whole).trials[: first[0].number])
    menu = whole.tokens() - sum(t.user_attrs.get("tokens", 0) for t in optuna_study(whole).trials)
    cost = sum(stop.user_attrs["tokens"] for stop in first)
    data["search"] |= {"trials": 1000, "tokens": menu + before + cost // 2}
    assert not stops_of(make_run(data, tmp_path / "short"))
    data["search"] |= {"trials": 14, "tokens": None, "where": ["block_parameters<=0.5"]}
    assert not stops_of(make_run(data, tmp_path / "limited"))


@pytest.mark.parametrize("stopped", [1, 4])
@pytest.mark.parametrize("kind", ["slopes", "trial"])
def test_an_interrupted_path_goes_on_where_it_was(data, tmp_path, stopped, kind):
    data["search"]["trials"] = 16
    study, asked = Study(data, tmp_path / "run"), []

    def due(job):
        asked.extend([job.number] if stops_of(study).get(1, []) else [])
        return len(asked) == stopped

    launch_stopped(study, kind, due)
    study.launch(quiet())
    check_whole(study, {}, 16)
    path = check_paths(study)[1]
    assert len(path) >= 6
    states = {t.number: t for t in optuna_study(study).trials}
    for stop in path:
        reference = stop.user_attrs["slopes_of"]
        if reference is not None and states[reference].user_attrs.get("failure") == INTERRUPTED:
            again = [t for t in states.values() if t.user_attrs.get("anchor") == states[reference].user_attrs["anchor"]]
            assert any(t.state.name in ("COMPLETE", "PRUNED") and t.params == stop.params for t in again)


def test_the_last_mark_of_a_path_is_measured_again_where_it_was_interrupted(data, tmp_path):
    study = Study(data, tmp_path / "run")

    def last(job):
        return optuna_study(study).trials[job.number].user_attrs.get("anchor") == "1, keep=0.7"

    failed = launch_stopped(study, "trial", last).number
    study.launch(quiet())
    check_paths(study)
    trials = optuna_study(study).trials
    same = [t for t in trials if t.user_attrs.get("anchor") == "1, keep=0.7" and t.number != failed]
    assert [(t.state.name in ("COMPLETE", "PRUNED"), t.params) for t in same] == [(True, trials[failed].params)]


def test_a_path_ends_where_slopes_fail(data, tmp_path, monkeypatch):
    measure, asked = MEASURES["slopes"], []

    def failing(self, job):
        asked.extend([job.number] if 1 in stops_of(study) else [])
        if len(asked) == 3:
            raise RuntimeError("out of memory")
        return measure(self, job)

    monkeypatch.setitem(MEASURES, "slopes", failing)
    study = Study(data, tmp_path / "run")
    study.launch(quiet())
    check_whole(study, {}, 24)
    found = stops_of(study)
    assert len(found[1]) < 6
    assert "failure" in found[1][-1].user_attrs
