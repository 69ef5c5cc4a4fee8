"""Budgets that were never searched, answered from a run."""

import json

import pandas as pd
import pytest
from launching import again, check_whole, finish, make_run, quiet, small_data, values_of

from rankfront.methods import InputError
from rankfront.search.__main__ import run
from rankfront.search.device import DTYPES
from rankfront.search.limits import COSTS
from rankfront.search.plan import Plan, cost_of
from rankfront.search.samplers import OURS
from rankfront.search.study import Study
from rankfront.search.trial import make_space


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


def test_the_command_line(finished):
    done = finish("solve", finished.run.path, "block_parameters<=0.72", "--no-measure")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"predicted", "measured_by", "figures", "plan"}
    assert found["figures"]["block_parameters"] <= 0.72
    wrong = finish("solve", finished.run.path, "speed<=1", "--no-measure")
    assert wrong.returncode == 2
    assert "is not on what a plan decides" in wrong.stderr


def test_the_menu_lists_every_option_with_what_it_stores(finished):
    """Bytes and parameters are the plan's own, option by option; predictions never rise with storage in a method."""
    frame = finished.menu()
    assert list(frame.columns) == ["site", "option", "method", "parameters", "bytes", "divergence"]
    setup = finished.setup()
    space = make_space(setup)
    wanted = space.wanted()
    assert set(frame.site) == {site.name for site in wanted}
    inside = {site: place.block is not None for site, place in space.sites.items()}
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
