"""Budgets that were never searched, answered from a run."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
from launching import again, check_whole, make_run, quiet, small_data, values_of

from rankfront.methods import InputError
from rankfront.objectives.latency import Timed
from rankfront.search.__main__ import run
from rankfront.search.choices import OURS
from rankfront.search.constraint import Constraint
from rankfront.search.inputs.device import DTYPES
from rankfront.search.measure import runner, timing
from rankfront.search.measure.setup import make_space
from rankfront.search.names import inside_blocks
from rankfront.search.optimise.answer import _Learned
from rankfront.search.plans.limits import COSTS
from rankfront.search.plans.plan import Plan, cost_of
from rankfront.search.run.solving import SOLVES
from rankfront.search.study import Study


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, text_file):
    """A run of our sampler, to read."""
    data = small_data(model_folder, text_file, sampler=OURS, trials=12)
    return make_run(data, tmp_path_factory.mktemp("answer") / "run")


@pytest.mark.parametrize("keep", [0.55, 0.63, 0.77, 0.86, 1.0])
def test_the_answer_meets_its_limit(finished, keep):
    found = finished.answer(f"block_parameters<={keep}")
    assert found.figures["block_parameters"] <= keep
    assert found.figures.keys() == set(COSTS)


@pytest.mark.parametrize("figure", COSTS)
def test_every_figure_that_a_plan_decides_can_be_limited(finished, figure):
    dense = finished.answer("block_parameters<=1").figures[figure]
    small = finished.answer("block_parameters<=0.6").figures[figure]
    bound = (dense + small) / 2
    for operator in ("<=", "<"):
        found = finished.answer(f"{figure}{operator}{bound:.6f}")
        assert small * 0.9 < found.figures[figure] <= bound + 1e-6


def test_limits_hold_together(finished):
    loose, tight = finished.answer("block_parameters<=0.8"), finished.answer("block_parameters<=0.7")
    bound = (loose.figures["bytes"] + tight.figures["bytes"]) / 2
    both = finished.answer("block_parameters<=0.8", f"bytes<={bound:.0f}")
    assert both.figures["block_parameters"] <= 0.8
    assert both.figures["bytes"] <= bound


def test_nothing_measured_within_the_limit_was_better_than_predicted(finished):
    rows = [row for row in finished.rows() if row.state == "complete"]
    for keep in (0.6, 0.8):
        within = [row.values["perplexity"] for row in rows if row.attributes["block_parameters"] <= keep]
        assert finished.answer(f"block_parameters<={keep}").predicted <= min(within) * (1 + 1e-9)


def test_answering_is_deterministic_and_leaves_the_run_alone(finished):
    before = values_of(finished)
    first, second = (finished.answer("block_parameters<=0.71") for _ in range(2))
    assert first == second
    assert values_of(finished) == before


def test_solving_measures_one_more_trial_and_keeps_the_rest(model_folder, text_file, tmp_path):
    study = make_run(small_data(model_folder, text_file, sampler=OURS, trials=10), tmp_path / "run")
    before, limit = values_of(study), "block_parameters<=0.735"
    expected = study.answer(limit)
    row = study.solve(limit, console=quiet())
    assert row.attributes["block_parameters"] <= 0.735
    after = values_of(study)
    assert before.items() <= after.items()
    if expected.trial is None:
        (more,) = after.keys() - before.keys()
        solved = study.trial(more)
        assert solved.origin == f"solve: {limit}"
        assert solved.plan == expected.plan
        assert solved.attributes["predicted"] == pytest.approx(expected.predicted)
    assert row.values == study.best(limit).values
    study.solve(limit, console=quiet())  # now it is known, or was the best already
    assert len(values_of(study)) <= len(after) + 1
    longer = again(study, trials=len(values_of(study)) + 2)
    longer.launch(quiet())
    check_whole(longer, values_of(study), len(values_of(study)))


def test_fewer_bytes_at_as_many_parameters(model_folder, text_file, tmp_path):
    """Budgets are stored values here, and integers are as many as what they stand for."""
    data = small_data(model_folder, text_file, sampler=OURS, trials=8)
    data["space"] = {"methods": ["svd-llm", "svd-llm-int8"], "keep": [0.4, 0.6, 0.8], "rank_multiple": 2}
    data["objectives"] = {"divergence": {}, "parameters": {}}
    study = make_run(data, tmp_path / "run")
    heavy = study.answer("parameters<=1").figures["bytes"]
    limits = "parameters<=0.95", f"bytes<={0.6 * heavy:.0f}"
    found = study.answer(*limits)
    assert found.figures["bytes"] <= 0.6 * heavy
    assert 0.65 < found.figures["parameters"] <= 0.95
    assert any("int8" in option.method for option in found.plan.by_site.values())
    assert found.predicted <= study.answer("parameters<=0.65", limits[1]).predicted


@pytest.mark.parametrize("limit", ["bytes<=75000", "block_parameters<=0.7"])
def test_the_studys_own_limits_hold_for_what_is_best_and_for_answers(model_folder, text_file, tmp_path, limit):
    data = small_data(model_folder, text_file, sampler=OURS, trials=10, where=[limit])
    data["objectives"] = {"divergence": {}, "block_parameters": {}, "bytes": {}}
    study = make_run(data, tmp_path / "run")
    figure, bound = limit.split("<=")
    assert study.best().figure(figure) <= float(bound)
    assert study.knee().figure(figure) <= float(bound)
    found = study.answer("block_parameters<=0.95")
    assert found.figures[figure] <= float(bound)
    assert found.predicted <= study.best("block_parameters<=0.95").values["divergence"] * (1 + 1e-9)
    with pytest.raises(InputError, match=f"no plan meets {limit} and block_parameters<=0.01"):
        study.answer("block_parameters<=0.01")


def test_a_limit_that_only_measuring_decides_holds_for_measured_plans(model_folder, text_file, tmp_path):
    data = small_data(model_folder, text_file, sampler=OURS, trials=8)
    data["objectives"] = {"divergence": {}, "block_parameters": {}}
    study = make_run(data, tmp_path / "run")
    worst = max(row.values["divergence"] for row in study.rows() if row.state == "complete")
    own = again(study, where=[f"divergence<={0.5 * worst}"])
    assert own.best("block_parameters<=0.95").values["divergence"] <= 0.5 * worst
    with pytest.raises(InputError, match="no trial meets"):
        own.best("block_parameters<=0.5", "divergence<=0")
    found = own.answer("block_parameters<=0.95")
    assert found.trial is None or study.trial(found.trial).values["divergence"] <= 0.5 * worst


# -- latency


@pytest.fixture
def clocked(monkeypatch, tmp_path):
    """Modules take time as they have parameters, whole models a little more than that; returns by how much more."""
    worse = {"by": 0.0}

    def size(module):
        return sum(parameter.numel() for parameter in module.parameters())

    def value(objective, subject):
        ours = size(subject.model)
        if subject.dense is None:
            return 1.0
        with subject.dense():
            return ours / size(subject.model) + worse["by"]

    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timing, "timed", lambda module, x, prepack: 1e-6 * size(module))
    monkeypatch.setattr(timing, "compared", lambda module, dense, x, prepack: size(module) / size(dense))
    monkeypatch.setattr(Timed, "value", value)
    whole = {"prefill": 1e-6, "decode": 2e-6}
    monkeypatch.setattr(
        runner, "time_whole", lambda _, model, windows, task: {p: s * size(model) for p, s in whole.items()}
    )
    return worse


@pytest.fixture
def timed_run(clocked, model_folder, text_file, tmp_path):
    data = small_data(model_folder, text_file, sampler=OURS, trials=9)
    lengths = {"prompt": 6, "decode": 2, "rounds": 2, "seconds": 0}
    data["objectives"] = {"divergence": {}, "block_parameters": {}, "latency": lengths}
    return make_run(data, tmp_path / "run")


def middle(study):
    """A latency between those of measured plans."""
    values = sorted(row.values["latency"] for row in study.rows() if row.state == "complete")
    return (values[1] + values[-1]) / 2


def test_a_limit_on_a_latency_that_has_a_table(timed_run):
    bound = middle(timed_run)
    found = timed_run.answer(f"latency<={bound}")
    assert found.figures.keys() - set(COSTS) >= {"latency_predicted"}
    if found.trial is None:
        assert "latency" not in found.figures
        assert found.figures["latency_predicted"] <= bound
    else:
        assert found.figures["latency"] <= bound
    both = timed_run.answer(f"latency<={bound}", "block_parameters<=0.7")
    assert both.figures["block_parameters"] <= 0.7
    assert both.predicted >= found.predicted * 0.99
    with pytest.raises(InputError, match=r"no plan meets latency<=0.01; the cheapest has .*latency=0\."):
        timed_run.answer("latency<=0.01")
    with pytest.raises(InputError, match="COSTS, latency".replace("COSTS", ", ".join(COSTS))):
        timed_run.answer("latency_decode<=1")
    row = timed_run.solve(f"latency<={bound}", console=quiet())
    assert row.values["latency"] <= bound


def test_a_latency_that_was_predicted_too_low_is_tried_again_further_below(timed_run, clocked):
    bound, before = middle(timed_run), values_of(timed_run)
    found = timed_run.answer(f"latency<={bound}", "block_parameters<=0.97")
    clocked["by"] = bound - found.figures["latency_predicted"] + 0.02  # the next one measured misses by two hundredths
    row = timed_run.solve(f"latency<={bound}", "block_parameters<=0.97", console=quiet())
    assert row.values["latency"] <= bound
    solved = [each for each in timed_run.rows() if each.number not in before]
    assert all(each.origin.startswith("solve: ") for each in solved)
    assert len(solved) <= SOLVES
    if found.trial is None:
        assert solved[0].values["latency"] > bound
        if len(solved) > 1:
            assert solved[1].values["latency"] < solved[0].values["latency"]
        else:  # what was measured already is better than anything that is left
            assert timed_run.answer(f"latency<={bound}", "block_parameters<=0.97").trial is not None


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("perplexity<=30", "is not on what a plan decides"),
        ("block_parameters>=0.5", "is not on what a plan decides"),
        ("block_parameters", "does not read as FIGURE<=NUMBER"),
        ("block_parameters<=0.01", "no plan meets block_parameters<=0.01; the cheapest has"),
    ],
)
def test_what_cannot_be_answered(finished, limit, message):
    with pytest.raises(InputError, match=message):
        finished.answer(limit)


def test_other_samplers_predict_nothing(model_folder, text_file, tmp_path):
    study = make_run(small_data(model_folder, text_file, sampler="random", trials=3), tmp_path / "run")
    with pytest.raises(InputError, match="this one used 'random': use `front`"):
        study.answer("block_parameters<=0.8")


def test_a_run_that_has_not_begun(model_folder, text_file, tmp_path):
    study = Study(small_data(model_folder, text_file, sampler=OURS, trials=3), tmp_path / "run")
    with pytest.raises(InputError, match=r"cannot be opened|launch it first"):
        study.answer("block_parameters<=0.8")


def test_the_command_line(finished, capsys):
    path = str(finished.run.path)
    assert run(["solve", path, "block_parameters<=0.72", "--no-measure"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"predicted", "measured_by", "figures", "plan"}
    assert found["figures"]["block_parameters"] <= 0.72
    assert run(["solve", path, "speed<=1", "--no-measure"]) == 2
    assert "is not on what a plan decides" in capsys.readouterr().err


def test_the_menu_lists_every_option_with_what_it_stores(finished):
    """Bytes and parameters are the plan's own, option by option; predictions never rise with storage in a method."""
    frame = finished.menu()
    assert list(frame.columns) == ["site", "option", "method", "parameters", "bytes", "divergence"]
    setup = finished.setup()
    space = make_space(setup)
    wanted = space.wanted()
    assert set(frame.site) == {site.name for site in wanted}
    inside = inside_blocks(space.sites)
    dense = cost_of(Plan(()), inside, 10**6, DTYPES[setup.dtype].itemsize)
    for site, options in wanted.items():
        rows = frame[frame.site == site.name].set_index("option")
        assert next(iter(rows.index)) == "dense"
        assert set(rows.index) == {"dense", *(option.label for option in options)}
        for option in options:
            cost = cost_of(Plan.of({site.name: option}), inside, 10**6, DTYPES[setup.dtype].itemsize)
            assert dense.values - cost.values == rows.parameters["dense"] - rows.parameters[option.label]
            assert dense.bytes - cost.bytes == rows.bytes["dense"] - rows.bytes[option.label]
        for _, known in rows[rows.method != "dense"].groupby("method"):
            assert known.sort_values("parameters").divergence.is_monotonic_decreasing


def test_the_menu_on_the_command_line(finished, tmp_path, capsys):
    path = str(finished.run.path)
    assert run(["menu", path, "--csv", str(tmp_path / "menu.csv")]) == 0
    assert run(["menu", path, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert pd.read_csv(tmp_path / "menu.csv").option.tolist() == [row["option"] for row in listed]
    assert run(["menu", path]) == 0
    assert "dense" in capsys.readouterr().out


class Tabled:
    """Plans by name, with a latency that a table predicts and one that was measured."""

    def __init__(self, plans):
        self.tables, self.plans = {"latency": None}, plans

    def of(self, plan):
        return {"latency": self.plans[plan[0]][0]}


@pytest.mark.parametrize(
    ("plans", "bound"),
    [
        ({"missed": (0.88, 0.92)}, 0.9 * 0.88 / 0.92),
        ({"missed": (0.5, 0.95), "met, nearer": (0.89, 0.885), "met": (0.85, 0.84)}, 0.9),
        ({"met": (0.5, 0.5), "missed, nearer": (0.89, 0.91)}, 0.9 * 0.89 / 0.91),
        ({"missed, as predicted": (0.95, 0.96)}, 0.9),
        ({}, 0.9),
    ],
)
def test_a_limit_moves_by_what_the_table_was_wrong_about_the_plan_nearest_to_it(plans, bound):
    measured = {(name,): SimpleNamespace(values=[value]) for name, (_, value) in plans.items()}
    history, menu = SimpleNamespace(measured=measured), SimpleNamespace(decode=lambda places: places)
    learned = _Learned(SimpleNamespace(history=history, menu=menu), Tabled(plans), ["latency"])
    assert learned._tightened(Constraint.parse("latency<=0.9")).bound == pytest.approx(bound)
