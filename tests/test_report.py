"""The report page: what it holds of a run, and, where Chromium is installed, what a browser makes of it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from launching import make_run, small_data

from rankfront.methods import Option
from rankfront.search.output.report import Grid, report_page, write_report
from rankfront.search.output.tables import plan_json
from rankfront.search.plans.plan import Plan

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def found(model_folder, text_file, tmp_path_factory):
    """A finished run whose options treat single weights and whole MLPs."""
    data = small_data(model_folder, text_file, trials=6)
    data["space"]["methods"] = ["svd", "nystrom"]
    return make_run(data, tmp_path_factory.mktemp("report") / "<b>run").read()


def embedded(page):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def names(grid):
    return [f"model.layers.{block}.{kind}" for kind in grid.kinds for block in grid.blocks] + grid.outside


def test_it_holds_every_trial_and_the_plans_of_the_front(found):
    data = embedded(report_page(found))
    axes = [axis["name"] for axis in data["axes"]]
    assert {"parameters", "perplexity", "block_parameters"} <= set(axes)
    assert [trial["number"] for trial in data["trials"]] == [row.number for row in found.rows]
    for trial in data["trials"]:
        row = found.trial(trial["number"])
        assert trial["values"] == [row.figure(name) for name in axes]
        assert (trial["group"] == "dense") == row.is_dense
    assert {str(row.number) for row in found.front()} <= data["plans"].keys()
    assert all("TRIAL" in command for _, command in data["commands"])


def test_plans_are_drawn_as_they_are_shown(found):
    """A single weight keeps what `show` says; a joint treatment is drawn on each weight that it claims."""
    grid = Grid(found)
    assert set(names(grid)) == {site.name for site in found.sites if len(site.weights) == 1}
    for row in found.front():
        drawn = grid.plan(row)
        shown = {site["site"]: site for site in plan_json(found, row)["sites"]}
        keeps = {name: shown[name]["keep"] for name in names(grid)}
        for site in found.sites:
            if len(site.weights) > 1 and shown[site.name]["method"] != "dense":
                keeps |= {weight.path: shown[site.name]["keep"] for weight in site.weights}
        assert drawn["keep"] == [keeps[name] for name in names(grid)]


def test_a_joint_treatment_is_named_on_each_of_its_weights(found):
    (mlp, *_) = [site for site in found.sites if site.roles == ("gate", "up", "down")]
    dense = next(row for row in found.rows if row.is_dense)
    plan = Plan.of({mlp.name: Option.of("nystrom", neurons=8)}, dict(dense.plan.origin))
    grid = Grid(found)
    drawn = grid.plan(replace(dense, plan_json=plan.to_json(), stored=None))
    named = dict(zip(names(grid), drawn["label"], strict=True))
    treated = {name for name, label in named.items() if grid.labels[label] == f"nystrom neurons=8 ({mlp.name})"}
    assert treated == {weight.path for weight in mlp.weights}
    assert {grid.labels[label] for name, label in named.items() if name not in treated} == {"dense"}


def test_it_needs_no_network_and_interprets_nothing(found):
    page = re.sub(r"<script>.*?</script>", "", report_page(found), flags=re.S)  # plotly's own code names addresses
    assert "http" not in page
    assert "src=" not in page
    assert "<b>" not in page
    assert "\\u003cb>run" in page  # in the commands to copy


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_it(found, tmp_path):
    write_report(found, tmp_path / "page.html")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert drawn.count("main-svg") >= 2  # the front and a plan
    limits = re.search(r'<table id="limits">(.*?)</table>', drawn, re.S)[1]
    assert limits.count("<tr") > 3
    assert f"--trial {found.knee().number}" in drawn
