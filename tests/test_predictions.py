"""The grouped source: what is probed, how predictions are scaled by it, and that both survive an interruption."""

import math

import pytest
from launching import launch_stopped, make_run, optuna_study, quiet, small_data, values_of

from rankfront.methods import get_method
from rankfront.objectives import score, teach
from rankfront.search.choices import OURS
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.predictions import PROBE_TOKENS
from rankfront.search.measure.runner import MEASURES, JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.plans.job import Job
from rankfront.search.plans.menu_jobs import (
    group_plans,
    menu_record,
    scaled_by_group,
)
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study
from rankfront.search.tuning import TUNING

PREDICTIONS = {"q": {"svd 1": 0.4, "svd 2": 0.1}, "k": {"svd 1": 0.2}, "v": {"svd 1": 0.3}}
PROBED = {"q": "svd 2", "k": "svd 1"}


@pytest.fixture
def data(model_folder, text_file):
    return small_data(model_folder, text_file, sampler=OURS, trials=9)


@pytest.fixture
def parts(data, tmp_path):
    """A finished run with its menu's records."""
    study = make_run(data, tmp_path / "run")
    known = optuna_study(study).user_attrs
    return study, {int(name.split()[1]): record for name, record in known.items() if name.startswith("menu ")}


def test_a_group_predicts_together_what_was_measured_of_it():
    scaled = scaled_by_group(PREDICTIONS, PROBED, 0.6)
    assert sum(scaled[site][label] for site, label in PROBED.items()) == pytest.approx(0.6)
    assert scaled["q"]["svd 1"] / scaled["q"]["svd 2"] == pytest.approx(4)  # one factor for the whole group
    assert scaled["v"] == PREDICTIONS["v"]


@pytest.mark.parametrize(
    ("measured", "ratio"), [(1e9, TUNING.worst_ratio), (0.0, 1 / TUNING.worst_ratio), (None, TUNING.worst_ratio)]
)
def test_what_cannot_be_believed_is_bounded(measured, ratio):
    """No group is ever predicted to cost nothing, and one that broke the model is predicted to hurt."""
    assert scaled_by_group(PREDICTIONS, PROBED, measured)["k"]["svd 1"] == pytest.approx(0.2 * ratio)


def test_every_site_is_probed_once_near_half_by_the_method_that_hurts_least(data):
    space = make_space(Study(data).setup())
    wanted = space.wanted()
    predictions = {
        site.name: {o.label: float(o.method == "svd") + 0.1 for o in options} for site, options in wanted.items()
    }
    plans = group_plans(space.bands(TUNING.group_bands), wanted, predictions)
    probed = [site for plan in plans for site in plan.by_site]
    assert sorted(probed) == sorted(site.name for site in wanted)
    options = {site: option for plan in plans for site, option in plan.by_site.items()}
    for site, offered in wanted.items():
        assert options[site.name].method == "svd-llm"
        dense = site.storage.parameters
        off = {o: abs(get_method(o.method).storage(site, o).parameters / dense - TUNING.group_keep) for o in offered}
        assert off[options[site.name]] == min(off.values())


def test_no_group_is_probed_by_a_rounding_of_the_whole_weight(data):
    """It hurts least of all, and says nothing of what a large step does."""
    data["space"] = {"methods": ["svd-llm", "gptq-int8"], "keep": [0.5, 0.9], "rank_multiple": 2}
    space = make_space(Study(data).setup())
    wanted = space.wanted()
    predictions = {s.name: {o.label: float(o.method == "svd-llm") + 0.1 for o in found} for s, found in wanted.items()}
    plans = group_plans(space.bands(TUNING.group_bands), wanted, predictions)
    assert {option.method for plan in plans for option in plan.by_site.values()} == {"svd-llm"}


def test_sites_of_a_group_are_of_one_kind_and_band(data):
    space = make_space(Study(data).setup())
    for count in (1, 2, 3):
        groups = space.bands(count)
        assert sum(map(len, groups)) == len(space.choices)
        kinds = [{space.sites[site].kind for site in group} for group in groups]
        assert all(len(kind) == 1 for kind in kinds)
        assert len(groups) == len({*map(frozenset, kinds)}) * min(count, 2)  # the model has two blocks


def test_what_nothing_is_predicted_of_is_not_probed(data):
    space = make_space(Study(data).setup())
    first = next(iter(space.choices)).name
    predictions = {first: {o.label: 0.1 for s, options in space.wanted().items() if s.name == first for o in options}}
    plans = group_plans(space.bands(TUNING.group_bands), space.wanted(), predictions)
    assert [list(plan.by_site) for plan in plans] == [[first]]


def test_probes_are_divergences_of_the_plans_that_they_name(parts):
    """Measured again by hand: KL of the group's plan, and the scaled predictions that the study solves with."""
    study, records = parts
    resident = JobRunner(study.setup())
    windows = resident.tokens.spare(0, PROBE_TOKENS)
    taught = teach(resident.compressed.model, windows)
    predictions = records[0]["predictions"]
    assert len(records) == records[0]["jobs"] > 1
    for number in range(1, len(records)):
        record = records[number]
        labels = {o.label: o for options in resident.compressed.space.wanted().values() for o in options}
        resident.compressed.apply(Plan.of({site: labels[label] for site, label in record["probed"].items()}))
        measured = score(resident.compressed.model, windows, taught).divergence
        assert record["divergence"] == pytest.approx(measured, rel=1e-4)
        predictions = scaled_by_group(predictions, record["probed"], measured)
    merged = menu_record(optuna_study(study).user_attrs)
    for site, found in merged["predictions"].items():
        assert found == pytest.approx(predictions[site], rel=1e-4)
    assert merged["tokens"] == sum(record["tokens"] for record in records.values())


def test_a_menu_is_whole_only_with_all_its_probes(parts):
    study, _ = parts
    known = dict(optuna_study(study).user_attrs)
    del known["menu 2"]
    assert menu_record(known) is None


def test_a_stop_between_probes_loses_none(data, tmp_path, monkeypatch):
    menu, study, done = MEASURES["menu"], Study(data, tmp_path / "run"), []

    def fourth(job):
        if len(done) == 3:
            return True
        done.append(job.number)
        return False

    launch_stopped(study, "menu", fourth)
    before = {name: r for name, r in optuna_study(study).user_attrs.items() if name.startswith("menu ")}
    assert len(before) == 3
    monkeypatch.setitem(MEASURES, "menu", lambda self, job: done.append(job.number) or menu(self, job))
    study.launch(quiet())
    known = optuna_study(study).user_attrs
    assert before.items() <= known.items()
    assert sorted(done) == list(range(known["menu 0"]["jobs"]))
    assert len(values_of(study)) == 9


def test_a_probe_that_breaks_the_model_is_a_record(data, monkeypatch):
    """Not finite: the group is predicted to hurt as much as is believed, and the study goes on."""
    resident = JobRunner(Study(data).setup())
    space = resident.compressed.space
    wanted = space.wanted()
    predictions = {site.name: {o.label: 0.1 for o in options} for site, options in wanted.items()}
    plan = group_plans(space.bands(TUNING.group_bands), wanted, predictions)[0]
    site = next(iter(plan.by_site))
    apply = CompressedModel.apply

    def broken(self, applied):
        apply(self, applied)
        for path in [path for path in self.modules if path == site]:
            next(self.model.get_submodule(path).parameters()).fill_(math.nan)

    monkeypatch.setattr(CompressedModel, "apply", broken)
    record = resident.run(Job("menu", 0, plan))
    assert record["divergence"] is None
    assert set(record["probed"]) == set(plan.by_site)
