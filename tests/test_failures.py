"""What cannot be measured costs itself: a site leaves the menu, a trial is a record, and only a defect ends a study."""

import common
import pytest
from launching import make_run, make_scheduler, small_data
from torch import nn

from rankfront.methods._low_rank import LowRank
from rankfront.search import attributes as keys
from rankfront.search.choices import OURS
from rankfront.search.errors import GaveUp
from rankfront.search.factors.calibration import calibrate
from rankfront.search.factors.failures import Failures
from rankfront.search.factors.gradient import quadratic_divergence
from rankfront.search.factors.store import FactorStore
from rankfront.search.inputs.reached import UNREACHED
from rankfront.search.measure.runner import MEASURES
from rankfront.search.measure.slopes import measure_slopes
from rankfront.search.plans.menu_jobs import menu_record
from rankfront.search.run.retries import MAX_ALIKE

QUERY, IDLE = "model.layers.0.self_attn.q_proj", "model.layers.1.idle"


@pytest.fixture
def data(model_folder, text_file):
    return small_data(model_folder, text_file, trials=10, sampler=OURS)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A factor store of the test's own: what is spoiled there is seen by no other test."""
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def world(tmp_path):
    """A model with a linear that nobody calls, its sites at one option each, and a store of their factors."""
    model = common.architecture("llama").build()
    model.model.layers[1].idle = nn.Linear(common.HIDDEN, common.HIDDEN).requires_grad_(False)
    wanted = {site: [common.rank_option("svd", 8)] for site in common.single_sites(model)}
    store = FactorStore("model", "text", model.dtype, tmp_path)
    for site, options in wanted.items():
        store.prepare(site, options, {"weight": model.get_submodule(site.name).weight}, {})
    return model, wanted, store


def broken(monkeypatch, name, path, error):
    """The method of low rank fails in what is called ``name``, at the site ``path``."""
    whole = getattr(LowRank, name)

    def failing(self, site, *rest):
        if path in site.name:
            raise error
        return whole(self, site, *rest)

    monkeypatch.setattr(LowRank, name, failing)


def test_a_pass_goes_on_without_what_fails_in_it(world, monkeypatch):
    model, wanted, store = world
    windows, failures = common.tokens(3, 16), Failures()
    alone = {site: options for site, options in wanted.items() if site.name not in (QUERY, IDLE)}
    expected = quadratic_divergence(model, windows, alone, store, 5)
    broken(monkeypatch, "gradient_dot_outputs", QUERY, IndexError("no such dimension"))
    assert quadratic_divergence(model, windows, wanted, store, 5, failures=failures) == expected
    assert failures == {QUERY: "IndexError: no such dimension", IDLE: UNREACHED}
    with pytest.raises(RuntimeError, match="no such dimension"):
        quadratic_divergence(model, windows, wanted, store, 5)
    dense = {site.name: model.get_submodule(site.name) for site in wanted}
    assert measure_slopes(model, windows, wanted, {}, dense, store, None, 5).keys() == expected.keys()


def test_calibration_names_what_no_token_reaches(world):
    model, wanted, _ = world
    failures = Failures()
    found = calibrate(model, common.tokens(2, 8), list(wanted), frozenset({"gram", "fisher"}), lambda *_: None,
                      failures=failures)  # fmt: skip
    linears = {site.name for site in wanted if site.weights[0].kind == "linear"}
    assert {site.name for site, _ in found} == linears - {IDLE}
    assert failures == {IDLE: UNREACHED}


def test_kinds_of_sites_that_cannot_be_scored_stay_dense(data, tmp_path, own_cache, monkeypatch, capsys):
    """One fails while it is factored, one in the gradient pass, one when its group is probed."""
    broken(monkeypatch, "prepare", "k_proj", TypeError("no such weight"))
    broken(monkeypatch, "gradient_dot_outputs", "q_proj", KeyError("heads"))
    menu = MEASURES["menu"]

    def probing(runner, job):
        if any("up_proj" in site for site, _ in job.plan.choices):
            raise AttributeError("a module without weight")
        return menu(runner, job)

    monkeypatch.setitem(MEASURES, "menu", probing)
    study = make_run(data, tmp_path / "run")
    state = study.read().state
    predicted = menu_record(state.known)["predictions"]
    assert predicted
    assert not [site for site in predicted if any(kind in site for kind in ("k_proj", "q_proj", "up_proj"))]
    assert {row.state for row in study.rows()} - {"repeated"} <= {"complete", "failed"}
    treated = {site for row in study.rows() if row.state == "complete" for site in row.plan.by_site}
    assert treated
    assert not any("k_proj" in site for site in treated)
    said = capsys.readouterr().err
    assert "2 sites self_attn.q_proj cannot be scored and stay dense: KeyError: 'heads'" in said
    assert "1 site mlp.up_proj cannot be scored and stays dense: AttributeError: a module without weight" in said


def test_trials_that_fail_alike_one_after_another_end_the_study(data, tmp_path):
    """By one line of code, whatever they treat; what was measured in between, or another reason, starts anew."""
    data["search"]["sampler"] = "random"
    scheduler, runner = make_scheduler(data, tmp_path / "run")
    scheduler.finish(job := scheduler.next(), runner.run(job))  # dense
    failure = {keys.FAILURE: "KeyError: 'x'", keys.PLACE: "methods/svd.py:3"}
    others = [failure] * (MAX_ALIKE - 1) + [failure | {keys.PLACE: "methods/svd.py:4"}]
    others += [{keys.FAILURE: "not finite: perplexity is inf"}] * MAX_ALIKE + [failure] * (MAX_ALIKE - 1)
    scheduler.config.search.__dict__["trials"] = 99
    scheduler.budget.limit[0] = 99
    for record in others:
        scheduler.finish(scheduler.next(), record)
    with pytest.raises(GaveUp, match=r"5 trials in succession failed alike, at methods/svd.py:3 \(KeyError: 'x'\)"):
        scheduler.finish(scheduler.next(), failure)
    assert scheduler.state().rows[1].attributes[keys.PLACE] == "methods/svd.py:3"


def test_progress_that_cannot_be_shown_ends_nothing(data, tmp_path, capsys):
    data["search"]["sampler"] = "random"
    scheduler, runner = make_scheduler(data, tmp_path / "run")

    def listener(status):
        raise ZeroDivisionError("no pace yet")

    scheduler.listener = listener
    scheduler.finish(job := scheduler.next(), runner.run(job))
    assert scheduler.state().rows[0].state == "complete"
    assert (
        "progress cannot be shown (ZeroDivisionError: no pace yet, at tests/test_failures.py:"
        in capsys.readouterr().err
    )
