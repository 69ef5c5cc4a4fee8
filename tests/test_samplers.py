"""Every sampler by name finishes a study, with one or more measured and exact objectives."""

import moocore
import optuna
import pytest
from launching import again, check_whole, make_run, optuna_study, small_data, values_of
from optuna.distributions import IntDistribution

from rankfront.methods import InputError
from rankfront.search.choices import OURS, SAMPLERS
from rankfront.search.config import make_config
from rankfront.search.optimise.samplers import OPTUNA_SAMPLERS, make_sampler
from rankfront.search.plans.menu_jobs import menu_record

# Three anchors, then four of the sampler's own; ours measures the menu's reference plan before two of them, and the
# rest of its front after.
TRIALS = 7


def test_every_sampler_that_a_study_may_name_can_be_made():
    assert set(SAMPLERS) - {OURS} == set(OPTUNA_SAMPLERS)


@pytest.fixture(scope="module", params=SAMPLERS)
def finished(request, model_folder, text_file, tmp_path_factory):
    """A sampler, its study of seed 0 after `TRIALS` trials, to go on with, and the plans of those trials."""
    data = small_data(model_folder, text_file, sampler=request.param, trials=TRIALS)
    study = make_run(data, tmp_path_factory.mktemp("sampler") / "run")
    check_whole(study, {}, TRIALS)
    return request.param, study, plans_of(study)


def plans_of(study):
    return [row.plan_key for row in study.rows() if row.state == "complete"]


def test_a_sampler_finishes_a_study_and_goes_on(finished):
    sampler, study, _ = finished
    dense, *anchors = ["anchor: dense", "anchor: svd keep=0.6", "anchor: svd-llm keep=0.6"]
    origins = [row.origin for row in study.rows() if row.state == "complete"]
    own, reference = [], []
    if sampler == OURS:
        own, reference = [origin for origin in origins if origin.startswith("menu: keep=")], ["menu: centre"]
        anchors = [anchor for anchor in anchors if anchor in origins]  # those that may be better than another
        assert own
        assert anchors
    assert origins == ([dense, *reference, *anchors, *own] + [sampler] * TRIALS)[:TRIALS]
    before = values_of(study)
    longer = again(study, trials=TRIALS + 2)
    longer.launch()
    check_whole(longer, before, TRIALS + 2)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_sampler_chooses_for_every_site_alone(model_folder, text_file, tmp_path, sampler):
    """With groups = 0 each site has variables of its own, and some plan differs between blocks."""
    data = small_data(model_folder, text_file, sampler=sampler, trials=6, groups=0)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 6)
    plans = [row.plan for row in study.rows() if row.origin == sampler]
    kinds = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
    assert any(
        plan.option(f"model.layers.0.{kind}") != plan.option(f"model.layers.1.{kind}")
        for plan in plans
        for kind in kinds
    )


def test_the_most_sensitive_groups_are_untied(model_folder, text_file, tmp_path):
    """Their sites have variables of their own, known from a menu that is measured first; the others stay tied."""
    data = small_data(model_folder, text_file, sampler="random", trials=8, groups=1, untie=2)
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 8)
    storage = optuna_study(study)
    hurt: dict[str, float] = {}
    for site, known in menu_record(storage.user_attrs)["predictions"].items():
        kind = site.split(".", 3)[3]
        hurt[kind] = hurt.get(kind, 0.0) + sorted(known.values())[len(known) // 2]
    untied = sorted(hurt, key=hurt.get)[-2:]
    names = {name.removesuffix(" keep").removesuffix(" method") for name in storage.trials[-1].params}
    assert {name.split(".", 3)[3] for name in names if name.startswith("model.layers")} == set(untied)
    assert {name for name in names if name.endswith(" 1/1")} == {f"{kind} 1/1" for kind in hurt if kind not in untied}
    before = values_of(study)
    longer = again(study, trials=10)
    longer.launch()
    check_whole(longer, before, 10)


LIMIT, OBJECTIVES = "block_parameters<=0.7", ("divergence", "block_parameters")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_limits_are_kept_to(model_folder, text_file, tmp_path, sampler):
    """The front holds what meets them, Optuna knows which trials do, and our own proposes nothing else."""
    data = small_data(model_folder, text_file, sampler=sampler, trials=9, where=[LIMIT])
    data["objectives"] = {name: {} for name in OBJECTIVES}
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 9)
    rows = {row.number: row for row in study.rows()}
    assert study.front()
    assert all(row.values["block_parameters"] <= 0.7 for row in study.front())
    assert all(row.report for row in study.front())
    for trial in optuna_study(study).trials:
        if trial.number in rows and trial.values:
            met = all(value <= 0 for value in trial.constraints.values())
            assert met == (rows[trial.number].values["block_parameters"] <= 0.7)
    if sampler == OURS:
        own = [row for row in rows.values() if row.origin == OURS or row.origin.startswith("menu")]
        assert own
        assert all(row.values["block_parameters"] <= 0.7 for row in own)


def test_limits_are_on_objectives():
    with pytest.raises(InputError, match=r"unknown objective in search.where 'block_params'.*block_parameters"):
        make_config({"search": {"where": ["block_params<=0.7"]}, "objectives": {name: {} for name in OBJECTIVES}})
    with pytest.raises(InputError, match="does not read as FIGURE<=NUMBER"):
        make_config({"search": {"where": ["perplexity"]}})


def test_a_seed_decides_everything(finished, model_folder, text_file, tmp_path):
    """Two runs of one seed take the same plans, another seed others; no plan is measured twice."""
    sampler, _, others = finished
    data = small_data(model_folder, text_file, sampler=sampler, trials=12, seed=1)
    plans = [plans_of(make_run(data, tmp_path / name)) for name in ("first", "second")]
    assert plans[0] == plans[1]
    assert plans[0][:TRIALS] != others
    for found in (plans[0], others):
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_four_objectives_and_dense_among_the_trials(model_folder, text_file, tmp_path, sampler):
    data = small_data(model_folder, text_file, sampler=sampler, trials=6)
    data["objectives"] = {"divergence": {}, "block_parameters": {}, "bytes": {}, "parameters": {}}
    study = make_run(data, tmp_path / "run")
    check_whole(study, {}, 6)
    dense = [row for row in study.rows() if row.state == "complete" and not row.plan.choices]
    assert len(dense) == 1
    assert dense[0].values["divergence"] == pytest.approx(0, abs=1e-6)
    assert 0 < study.hypervolume() <= 1


def test_the_gaussian_process_rounds_its_levels():
    """Integers and names come back as such and within their bounds, and once fitted it finds more than its start."""
    names = {f"level {i}": IntDistribution(0, 6) for i in range(4)}

    def measure(trial: optuna.Trial) -> tuple[float, float]:
        levels = [trial.suggest_int(name, known.low, known.high) for name, known in names.items()]
        method = trial.suggest_categorical("method", ["good", "bad"])
        return sum((6 - level) ** 2 for level in levels) + 20 * (method == "bad"), sum(levels) / 24

    study = optuna.create_study(directions=["minimize", "minimize"], sampler=make_sampler("gp", 0, 0))
    study.optimize(measure, n_trials=20)
    assert all(isinstance(trial.params[name], int) for trial in study.trials for name in names)
    start, found = study.trials[:10], study.trials[10:]
    assert all(trial.params["method"] in ("good", "bad") for trial in found)
    volumes = [moocore.hypervolume([trial.values for trial in part], ref=[164, 1.1]) for part in (start, study.trials)]
    assert volumes[1] > 1.1 * volumes[0]
    assert sum(trial.params["method"] == "good" for trial in found) > 7
