"""What our sampler's studies measure before it proposes: a plan at the menu's reference, slopes, the front by them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from launching import again, check_whole, make_run, optuna_study, quiet, small_data
from test_rankfront_study import make_scheduler

from rankfront.search.choices import OURS
from rankfront.search.measure.runner import MEASURES
from rankfront.search.optimise.answer import prior_predictor
from rankfront.search.optimise.candidates import corrected
from rankfront.search.optimise.opening import opening_budgets
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu_jobs import menu_record
from rankfront.search.study import Study
from rankfront.search.tuning import TUNING, tuned

ROUND, WARM_START, REFERENCE = TUNING.round_fractions, TUNING.opening_fractions, TUNING.reference_fraction
FRONT = [f"menu: keep={keep:g}" for keep in WARM_START]


@pytest.fixture
def data(model_folder, text_file):
    data = small_data(model_folder, text_file, sampler=OURS, trials=12, anchors=[])
    return data | {"objectives": {"perplexity": {}, "block_parameters": {}}}


def opening(study):
    """Origins of what was measured or asked before the first proposal, slopes among them, in order."""
    origins = []
    for trial in optuna_study(study).trials:
        if trial.user_attrs.get("origin") == OURS:
            break
        if trial.state.name in ("COMPLETE", "FAIL") or "slopes_of" in trial.user_attrs:
            origins.append(": ".join(trial.user_attrs[key] for key in ("origin", "anchor") if key in trial.user_attrs))
    return origins


def predictor_of(study):
    """What a run taught."""
    state = study.read().state
    predictor, _, _ = prior_predictor(state, study.config, study.read().space)
    predictor.learn(state.trials)
    return predictor


def test_slopes_around_the_centre_come_before_the_front(data, tmp_path):
    study = make_run(data, tmp_path / "run")
    dense, reference, slopes, *front = opening(study)
    front = [origin for origin in front if origin != "slopes"]  # those before the first proposal
    assert [dense, reference, slopes] == ["anchor: dense", "menu: centre", "slopes"]
    assert front
    assert front == [origin for origin in FRONT if origin in front]
    row = next(row for row in study.rows() if row.origin == "menu: centre")
    assert row.attributes["block_parameters"] <= REFERENCE


def test_slopes_change_what_the_front_is(data, tmp_path, monkeypatch):
    """Without corrections a study measures another front. Of divergence: a random model's perplexity may fall."""
    data["objectives"] = {"divergence": {}, "block_parameters": {}}
    data["space"]["keep"] = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    fronts = []
    for name in ("with", "without"):
        study = make_run(data, tmp_path / name)
        fronts.append({row.origin: row.plan_key for row in study.rows() if row.origin in FRONT})
        monkeypatch.setattr("rankfront.search.optimise.predictor.corrections_of", lambda *_: None)
    assert fronts[0] != fronts[1]


def test_without_tokens_for_slopes_the_menu_s_own_front_is_measured(data, tmp_path):
    """The plan at the reference is not measured twice where slopes change nothing."""
    study = make_run(data | {"search": data["search"] | {"trials": 2}}, tmp_path / "first")
    menu, trial = menu_record(optuna_study(study).user_attrs)["tokens"], study.setup().tokens["search"].numel()
    # Dense and the reference take two of five; slopes and a trial after them would take four.
    data["search"]["tokens"] = menu + 5 * trial
    study = make_run(data, tmp_path / "run")
    assert not any("slopes_of" in one.user_attrs for one in optuna_study(study).trials)
    dense, reference, *front = opening(study)
    assert (dense, reference) == ("anchor: dense", "menu: centre")
    assert front == [origin for origin in FRONT if origin in front]
    assert len(front) >= 2
    keys = [row.plan_key for row in study.rows() if row.state == "complete"]
    assert len(set(keys)) == len(keys)


def test_the_front_is_measured_though_its_centre_fails(data, tmp_path, monkeypatch):
    measure = MEASURES["trial"]

    def failing(self, job):
        if job.number == 1:
            raise RuntimeError("out of memory")
        return measure(self, job)

    monkeypatch.setitem(MEASURES, "trial", failing)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 12)
    origins = opening(study)
    assert origins[:2] == ["anchor: dense", "menu: centre"]
    assert study.rows()[1].state == "failed"
    assert set(origins[2:]) & set(FRONT)


@pytest.mark.parametrize("more", [10, 22])
def test_slopes_wait_for_what_is_queued_and_keep_to_the_limit(data, tmp_path, more):
    """Whatever the limit leaves, slopes are not the last thing that is measured, and no limit is missed by more."""
    study = make_run(data | {"search": data["search"] | {"trials": 2}}, tmp_path / "first")
    menu, trial = menu_record(optuna_study(study).user_attrs)["tokens"], study.setup().tokens["search"].numel()
    data["search"] |= {"trials": 100, "tokens": menu + more * trial // 2, "anchors": [0.4, 0.6, 0.8]}
    data["space"]["methods"] = ["svd", "asvd", "svd-llm"]
    study = make_run(data, tmp_path / "run")
    assert study.tokens() < data["search"]["tokens"] + trial
    done = [trial for trial in optuna_study(study).trials if trial.state.is_finished()]
    assert "slopes_of" not in done[-1].user_attrs


def test_slopes_read_less_where_the_limit_leaves_less(data, monkeypatch):
    """Room for a trial after them is left; as few as say little are none."""
    monkeypatch.setattr("rankfront.search.run.budget.slope_tokens", lambda spent, quality: 10**6)
    scheduler = make_scheduler(Study(data))
    trial = scheduler.budget.trial
    for left, expected in ((math.inf, trial), (5 * trial, trial), (2 * trial, trial // 3), (trial + 45, 0), (0, 0)):
        budget = replace(scheduler.budget, limit=np.array([100.0, left]))
        with tuned(slope_tokens=16):
            assert budget.slope_tokens(scheduler.state(), scheduler.in_flight) == expected


def test_a_plan_that_is_solved_for_queues_nothing_else(data, tmp_path):
    """Where an earlier launch had no tokens for slopes, none are left waiting for the next."""
    study = make_run(data | {"search": data["search"] | {"trials": 2}}, tmp_path / "first")
    menu, trial = menu_record(optuna_study(study).user_attrs)["tokens"], study.setup().tokens["search"].numel()
    data["search"]["tokens"] = menu + 2 * trial
    study = make_run(data, tmp_path / "run")
    study.solve("block_parameters<=0.55", console=quiet(), report=False)
    solved = next(row for row in study.front() if row.origin.startswith("solve"))
    assert solved.report is None
    assert not any("slopes_of" in one.user_attrs for one in optuna_study(study).trials)


def test_the_front_of_several_costs_is_solved_by_the_sizes_of_its_plans(data, tmp_path):
    """By what hurts in plans of the size that they turn out to have, whatever the budget of all costs weighed alike."""
    data["objectives"] = {"divergence": {}, "block_parameters": {}, "bytes": {}}
    data["space"] = {"methods": ["svd-llm", "gptq-int8"], "keep": [0.4, 0.6, 0.8], "rank_multiple": 2}
    study = make_run(data, tmp_path / "run")
    predictor = predictor_of(study)
    assert predictor.surrogate.corrections
    even, apart = predictor.menu.even, []
    for keep in WARM_START:
        if keep * even.dense >= even.least:
            plan = corrected(predictor, keep * even.dense, even)
            share = predictor.menu.size(plan) / predictor.menu.dense
            apart.append(abs(share - keep) > 0.1)
            settled = Lagrangian(even, predictor.surrogate.losses(share)).solve(keep * even.dense)
            assert abs(predictor.menu.size(settled) / predictor.menu.dense - share) <= 0.1
    assert any(apart)


def test_the_front_is_measured_at_round_fractions_of_what_is_searched(data, tmp_path):
    """And ends at as much of the treated weights as anywhere, whatever else the objective counts."""
    data["objectives"] = {"perplexity": {}, "parameters": {}}
    study = make_run(data, tmp_path / "run")
    rows = {row.origin: row.attributes for row in study.rows() if row.origin.startswith("menu: keep=")}
    dense = next(row for row in study.rows() if row.origin == "anchor: dense").attributes["parameters"]
    shares = [figures["parameters"] / dense for figures in rows.values()]
    round_ones = []
    for share, (origin, figures) in zip(shares, rows.items(), strict=True):
        keep = float(origin.rpartition("=")[2])
        assert figures["block_parameters"] <= keep + 0.001
        if keep not in WARM_START:  # what stands between round fractions that are far apart
            round_ones.append(min(target - share for target in ROUND if target >= share - 1e-9))
    assert len(round_ones) >= 3
    assert max(round_ones) < 0.03  # the options are few
    assert sorted(shares, reverse=True) == shares


@pytest.mark.parametrize("most", [0.38, 0.73])
def test_what_a_limit_allows_is_opened_and_slopes_measured_below_it(data, tmp_path, most):
    """Above the reference plan, and below it, where it is what the limit leaves; below all that is opened otherwise."""
    data["search"]["where"] = [f"block_parameters<={most}"]
    data["space"]["keep"] = [0.2, 0.3, 0.4, 0.6, 0.8]
    study = make_run(data, tmp_path / "run")
    opened = [row for row in study.rows() if row.origin.startswith("menu")]
    shares = [row.attributes["block_parameters"] for row in opened]
    assert max(shares) <= most
    assert opened[0].origin == "menu: centre"
    assert abs(shares[0] - min(most, REFERENCE)) < 0.03
    assert most - max(shares) < 0.03
    assert opening(study)[2] == "slopes"


def test_a_run_that_has_proposals_is_not_opened_again(data, tmp_path, monkeypatch):
    """As one that was opened at other budgets, by an earlier version."""
    study = make_run(data, tmp_path / "run")
    before = len(study.rows())
    assert any(row.origin == OURS for row in study.rows())
    monkeypatch.setattr(
        "rankfront.search.run.rankfront_strategy.opening_budgets", lambda targets, dense: [0.87 * dense, 0.66 * dense]
    )
    longer = again(study, trials=14)
    longer.launch(quiet())
    assert {row.origin for row in longer.rows()[before:]} <= {OURS, "slopes"}


def test_budgets_of_the_opening():
    """Marks, all of them where none is as large as usual, and what lies far from them."""
    assert opening_budgets([], 1000) == [1000 * keep for keep in WARM_START]
    targets = [int(1000 * keep) for keep in WARM_START]
    assert opening_budgets([100, 299, *targets], 1000) == targets
    assert opening_budgets([100, 399, 420, 637, 777, 930], 1000) == [930, 777, 700, 637, 500, 420, 399, 300]
    assert opening_budgets([200, 277], 1000)[-2:] == [277, 200]
