"""The latency table: sums, calibration, what it keeps, what it takes off the menu. Never how fast anything is."""

import json
import math

import numpy as np
import pytest
import torch
from common import save_folder
from launching import make_run, optuna_study, quiet, small_data
from torch import nn

from rankfront.methods import DENSE_OPTION, InputError, Option, Unpacked
from rankfront.objectives.latency import Latency, LatencyDecode, LatencyPrefill
from rankfront.search import Plan, Study
from rankfront.search.measure import timing
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.timing import Stopwatches, compared, timed
from rankfront.search.optimise.goal import menu_of, sizes_of
from rankfront.search.output.tables import menu_table
from rankfront.search.plans.job import Job
from rankfront.search.plans.latency_table import Timing, pack, timings_of, unpack
from rankfront.search.run import rankfront_strategy

SMALL = {"prompt": 6, "decode": 2, "rounds": 2, "seconds": 0}
FAST, SLOW = Option.of("svd", rank=2), Option.of("svd", rank=9)
DENSE = DENSE_OPTION.label
SITES = {
    "a": {
        DENSE: {"prefill": 0.4, "decode": 2.0},
        FAST.label: {"prefill": 0.1, "decode": 1.0},
        SLOW.label: {"prefill": 0.5, "decode": 3.0},
    },
    "b": {DENSE: {"prefill": 0.4, "decode": 2.0}, FAST.label: {"prefill": 0.2, "decode": 1.5}},
}
TABLE = Timing(SITES, {"prefill": 2.0, "decode": 8.0})


@pytest.fixture
def data(model_folder, text_file, tmp_path, monkeypatch):
    """A study of our sampler with perplexity and latency, and a cache of its own."""
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    data = small_data(model_folder, text_file, sampler="rankfront", trials=9)
    data["objectives"] = {"perplexity": {}, "latency": SMALL}
    return data


@pytest.fixture
def counted(monkeypatch):
    """Timings of a millisecond, a module half of it where its rank is small; what was timed."""
    seen = []

    def once(module, x, prepack):
        seen.append(("dense", module, tuple(x.shape)))
        return 1e-3

    def ratio(module, dense, x, prepack):
        seen.append(("ours", module, tuple(x.shape)))
        return 0.5 if getattr(module, "rank", 0) <= 4 else 1.5

    monkeypatch.setattr(timing, "timed", once)
    monkeypatch.setattr(timing, "compared", ratio)
    return seen


@pytest.mark.parametrize(
    ("objective", "expected"),
    [(Latency(), 1 - (0.3 + 1.0 + 0.2 + 0.5) / 10), (LatencyPrefill(), 1 - 0.5 / 2), (LatencyDecode(), 1 - 1.5 / 8)],
)
def test_a_plan_takes_what_its_sites_take_and_the_rest(objective, expected):
    assert TABLE.ratio(objective, Plan.of({"a": FAST, "b": FAST})) == pytest.approx(expected)
    assert TABLE.ratio(objective, Plan.of({"a": DENSE_OPTION, "b": DENSE_OPTION})) == 1.0
    assert TABLE.ratio(objective, Plan.of({"a": SLOW})) > 1


def test_what_was_not_timed_is_not_predicted():
    assert TABLE.ratio(Latency(), Plan.of({"b": SLOW})) is None
    assert TABLE.ratio(Latency(), Plan.of({"c": FAST})) is None
    assert TABLE.seconds(Latency(), "c", FAST) is None


@pytest.mark.parametrize("slope", [0.4, 1.0, 1.3])
def test_trials_say_how_much_of_a_saving_comes_true(slope):
    objective, plans = (
        Latency(),
        [Plan.of(each) for each in ({"a": FAST}, {"b": FAST}, {"a": FAST, "b": FAST}, {"a": SLOW})] * 25,
    )
    trials = [(plan, 1 + slope * (TABLE.ratio(objective, plan) - 1)) for plan in plans]
    found = TABLE.calibrated(objective, [*trials, (Plan(()), 1.07), (Plan.of({"a": DENSE_OPTION}), 0.9)])
    assert found.trials == 100
    assert found.timing.slope == pytest.approx(slope, abs=0.02)
    assert found.worst < 0.01
    assert found.timing.ratio(objective, Plan.of({"a": FAST})) == pytest.approx(trials[0][1], abs=0.01)


def test_without_trials_nothing_is_corrected_or_claimed():
    found = TABLE.calibrated(Latency(), [(Plan(()), 1.2)])
    assert found.timing.slope == 1.0
    assert math.isnan(found.median)
    assert found.figures() == {"trials": 0, "slope": 1.0, "median": None, "worst": None}
    assert "no trial" in str(found)


def test_tables_go_through_the_storage():
    found = unpack(json.loads(json.dumps({"sites": pack(SITES), "whole": TABLE.whole})))
    assert found.ratio(Latency(), Plan.of({"a": FAST, "b": FAST})) == pytest.approx(
        TABLE.ratio(Latency(), Plan.of({"a": FAST, "b": FAST}))
    )


def test_clocks_give_seconds_and_ratios():
    x = torch.ones(1, 3, 16)
    with torch.no_grad():
        assert 0 < timed(nn.Linear(16, 16), x) < 1
        assert 0.05 < compared(nn.Linear(16, 16), nn.Linear(16, 16), x) < 20


def test_what_was_timed_is_kept_by_device_threads_and_dtype(tmp_path, counted, monkeypatch):
    x, module = torch.ones(2, 3, 16), nn.Linear(16, 8)
    first = Stopwatches(tmp_path, "cpu", torch.float32)
    assert first.seconds("dense 8x16", module, x) == 1e-3
    assert first.seconds("dense 8x16", module, x) == 1e-3
    assert first.seconds("dense 8x16", module, x[:1]) == 1e-3
    first.save()
    assert len(counted) == 2
    again = Stopwatches(tmp_path, "cpu", torch.float32)
    again.seconds("dense 8x16", module, x)
    assert len(counted) == 2
    assert not Stopwatches(tmp_path, "cpu", torch.bfloat16).known
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert not Stopwatches(tmp_path, "cpu", torch.float32).known
    assert {path.stem for path in tmp_path.iterdir()} == {first.path.stem}  # the table, and its lock


def test_what_was_timed_by_other_code_is_timed_again(tmp_path, counted, monkeypatch):
    Stopwatches(tmp_path, "cpu", torch.float32).seconds("dense 8x16", nn.Linear(16, 8), torch.ones(1, 1, 16))
    monkeypatch.setattr(timing, "source_behind", lambda *modules: "other code")
    Stopwatches(tmp_path, "cpu", torch.float32).seconds("dense 8x16", nn.Linear(16, 8), torch.ones(1, 1, 16))
    assert len(counted) == 2


@pytest.mark.parametrize("name", ["oats", "compot", "sltrain"])
def test_what_a_model_keeps_unpacked_is_timed_unpacked(data, name, monkeypatch):
    """As it runs in trials: made dense once, not at every call."""
    data["space"] = {"methods": [name], "keep": [0.5], "rank_multiple": 2}
    resident = JobRunner(Study(data).setup())
    seen = []
    monkeypatch.setattr(
        timing, "_round", lambda copies, x: seen.extend(each(x) is None or each for each in copies) or 1.0
    )
    resident.run(Job("timing", 0, Plan(())))
    sparse = [module for module in seen if isinstance(module, Unpacked)]
    assert sparse
    assert all(module.unpacked for module in sparse)


def test_a_table_made_on_resuming_is_used(data, counted, tmp_path, monkeypatch):
    """By the search that goes on, not by those alone who read the run later."""
    with monkeypatch.context() as broken:
        broken.setattr("rankfront.search.measure.runner.time_sites", lambda *arguments: 1 / 0)
        make_run(data, tmp_path / "run")
    seen = []
    real = rankfront_strategy.make_goal
    monkeypatch.setattr(
        rankfront_strategy, "make_goal", lambda *arguments: seen.append(arguments[3]) or real(*arguments)
    )
    Study(data | {"search": data["search"] | {"trials": 12}}, tmp_path / "run").launch(quiet())
    assert [list(timings) for timings in seen] == [["latency"]]


def test_two_studies_at_once_keep_both_their_figures(tmp_path, counted):
    one, other = (Stopwatches(tmp_path, "cpu", torch.float32) for _ in range(2))
    for watches, key in ((one, "dense 8x16"), (other, "dense 9x16")):
        watches.seconds(key, nn.Linear(16, 8), torch.ones(1, 1, 16))
        watches.save()
    assert len(Stopwatches(tmp_path, "cpu", torch.float32).known) == 2


def test_every_distinct_module_is_timed_once_at_both_lengths(data, counted):
    data["space"] = {
        "methods": ["svd-llm", "nystrom"],
        "keep": [0.4, 0.7],
        "rank_multiple": 2,
        "include": ["*", "lm_head"],
    }
    resident = JobRunner(Study(data).setup())
    record = resident.run(Job("timing", 0, Plan(())))
    sites = record["timing"]["latency"]["sites"]
    wanted = resident.compressed.space.wanted()
    assert all({DENSE, *(o.label for o in options)} <= sites[site.name].keys() for site, options in wanted.items())
    shapes = [(kind, repr(module), shape) for kind, module, shape in counted]
    assert len(shapes) == len(set(shapes))
    prompts = {shape[1] for _, module, shape in counted if "96" not in repr(module)}
    assert prompts == {1, SMALL["prompt"]}
    assert {
        shape[1]
        for kind, module, shape in counted
        if kind == "dense" and module is resident.compressed.dense_modules["lm_head"]
    } == {1}
    joint = next(site for site in wanted if len(site.weights) == 3)
    parts = [np.array(sites[weight.path][DENSE]) for weight in joint.weights]
    assert np.array(sites[joint.name][DENSE]) == pytest.approx(sum(parts), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_whatever_a_method_makes_can_be_timed(name, text_file, tmp_path, monkeypatch):
    """For real: what a joint treatment leaves may read fewer inputs than the dense module."""
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    data = small_data(save_folder(name, tmp_path / "model"), text_file, sampler="rankfront")
    data["objectives"] = {"perplexity": {}, "latency": SMALL}
    methods = [
        "svd-llm",
        "lama",
        "vo-svd",
        "nystrom",
        "drop-block",
        "shared-basis",
        "hola",
        "gptq-int8",
        "oats",
        "wara",
    ]
    data["space"] = {"methods": methods, "keep": [0.5], "rank_multiple": 2}
    resident = JobRunner(Study(data).setup())
    record = resident.run(Job("timing", 0, Plan(())))
    assert "failure" not in record
    sites = record["timing"]["latency"]["sites"]
    for site, options in resident.compressed.space.wanted().items():
        assert all(min(sites[site.name][option.label]) >= 0 for option in options)


def test_what_is_slower_than_dense_is_not_on_the_menu(data, counted, tmp_path):
    study = make_run(data, tmp_path / "run")
    known = optuna_study(study).user_attrs
    assert known["timing"]["timing"]["latency"]["sites"]
    frame = study.menu()
    ranks = frame["option"].str.extract(r"rank=(\d+)")[0].dropna().astype(int)
    assert len(ranks)
    assert ranks.max() <= 4
    offered = {option.label for options in CompressedModel(study.setup()).space.wanted().values() for option in options}
    assert any(int(label.rpartition("=")[2]) > 4 for label in offered)
    assert [column.header for column in menu_table(frame).columns][-1] == "latency"
    assert (frame.loc[frame["method"] == "dense", "latency"] == 1).all()
    assert (frame.loc[frame["method"] != "dense", "latency"] < 1).all()
    assert {"trials", "slope", "median", "worst"} == study.latency()["latency"].figures().keys()


def test_what_is_faster_in_one_way_of_two_is_on_the_menu(data, counted, tmp_path, monkeypatch):
    """Four bits decode faster and read prompts slower, and somebody who asks for both figures may want them."""
    monkeypatch.setattr(timing, "compared", lambda module, dense, x, prepack: 2.0 if x.shape[1] > 1 else 0.5)
    data["objectives"] = {"perplexity": {}, "parameters": {}, "latency_prefill": SMALL, "latency_decode": SMALL}
    study = make_run(data, tmp_path / "run")
    frame, wanted = study.menu(), CompressedModel(study.setup()).space.wanted()
    assert set(frame["option"]) - {DENSE} == {option.label for options in wanted.values() for option in options}


def test_a_table_that_is_looked_up_costs_no_time_and_stays_on_the_menu(data, counted, tmp_path):
    data["space"] = {"methods": ["rtn-int8"], "keep": [0.5], "include": ["*.o_proj", "model.embed_tokens"]}
    data["objectives"] |= {"bytes": {}}
    frame = make_run(data, tmp_path / "run").menu()
    offered = frame[(frame["method"] != "dense") & (frame["site"] == "model.embed_tokens")]
    assert len(offered) == 1
    assert (offered["divergence"] > 0).all()


def test_budgets_are_time_where_nothing_else_is_counted(data, counted, tmp_path):
    study = make_run(data, tmp_path / "run")
    timings = timings_of(study.config.objectives, optuna_study(study).user_attrs)
    objective, table = timings["latency"]
    space = CompressedModel(study.setup()).space
    (size,) = sizes_of(study.config, 4, timings)
    for site, options in space.wanted().items():
        for option in (DENSE_OPTION, *options):
            assert size(site, option) == round(1e9 * table.seconds(objective, site.name, option))


def test_a_table_is_made_once_and_a_failed_one_does_not_stop_the_study(data, tmp_path, monkeypatch):
    made = []

    def failing(*arguments):
        made.append(arguments)
        raise RuntimeError("no clock")

    monkeypatch.setattr("rankfront.search.measure.runner.time_sites", failing)
    study = make_run(data, tmp_path / "run")
    assert len(made) == 1
    assert "no clock" in optuna_study(study).user_attrs["timing"]["failure"]
    assert study.latency() == {}
    assert sum(row.counts for row in study.rows()) == data["search"]["trials"]
    again = Study(data | {"search": data["search"] | {"trials": 11}}, tmp_path / "run")
    again.launch(quiet())
    assert len(made) == 2  # a launch asks once more
    monkeypatch.undo()
    assert "no clock" in again.latency_failure()


def test_where_nothing_is_faster_the_study_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "compared", lambda *_: 2.0)
    with pytest.raises(InputError, match="faster than dense"):
        make_run(data, tmp_path / "run")


def test_other_samplers_time_nothing(data, tmp_path, counted):
    data["search"]["sampler"] = "random"
    make_run(data, tmp_path / "run")
    assert not counted


def test_menus_without_a_table_are_as_before(data, tmp_path, counted):
    study = make_run(data, tmp_path / "run")
    space = CompressedModel(study.setup()).space
    record = optuna_study(study).user_attrs["menu 0"]
    whole = menu_of(study.config, space, record, "float32", {})
    assert sum(len(line.options) for line in whole.lines) > sum(len(set(found)) for found in [study.menu()["option"]])
