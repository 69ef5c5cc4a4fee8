"""Limits that no plan can meet: the smallest plan of a space against all of them, and one line that says so."""

import itertools

import pytest
from launching import small_data

from rankfront.methods import InputError
from rankfront.search.constraint import Constraint
from rankfront.search.measure.setup import make_space
from rankfront.search.names import inside_blocks
from rankfront.search.plans.plan import Plan, Prices
from rankfront.search.plans.reach import check_reachable, smallest
from rankfront.search.study import Study


@pytest.fixture(scope="module")
def joint(model_folder, text_file):
    """The options of a space whose sites share weights, and what they cost; few enough to try every plan."""
    data = small_data(model_folder, text_file)
    data["space"] = {
        "include": ["*.0.self_attn*"],
        "methods": ["svd", "lama", "vo-svd", "drop-block"],
        "keep": [0.3, 0.7],
        "rank_multiple": 2,
    }
    study = Study(data)
    space = make_space(study.setup())
    assert len(space.choices) > 4
    return space.wanted(), Prices(inside_blocks(space.sites), 40_000, 4)


@pytest.mark.parametrize("figure", ["parameters", "block_parameters", "bytes"])
def test_the_smallest_plan_is_the_smallest_of_all(joint, figure):
    wanted, prices = joint

    def cost(plan):
        return getattr(prices.of(plan), figure)

    every = []
    for count in range(len(wanted) + 1):
        for sites in itertools.combinations(wanted, count):
            paths = [weight.path for site in sites for weight in site.weights]
            if len(set(paths)) == len(paths):
                own = [min(wanted[s], key=lambda o, s=s: cost(Plan.of({s.name: o}))) for s in sites]
                every.append(cost(Plan.of({s.name: o for s, o in zip(sites, own, strict=True)})))
    assert cost(smallest(wanted, figure, prices)) == min(every) < cost(Plan(()))


@pytest.mark.parametrize("limit", ["parameters<=0.0001", "block_parameters<0.05", "bytes<=10", "parameters>=1.5"])
def test_a_limit_that_nothing_meets_is_refused_with_the_nearest(joint, limit):
    wanted, prices = joint
    with pytest.raises(InputError, match="no plan of this space can meet") as caught:
        check_reachable([Constraint.parse(limit)], wanted, prices)
    assert ("largest" if ">" in limit else "smallest") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_limit_that_the_smallest_meets_is_not(joint):
    wanted, prices = joint
    least = prices.of(smallest(wanted, "parameters", prices)).parameters
    limits = [f"parameters<={least:.6f}", "parameters>=0.99", "perplexity<=0.1", "latency<=0.001"]
    check_reachable([Constraint.parse(limit) for limit in limits], wanted, prices)


def test_it_is_said_before_anything_is_calibrated(model_folder, text_file, tmp_path, monkeypatch):
    data = small_data(model_folder, text_file, where=["parameters<=0.0001"])
    monkeypatch.setattr("rankfront.search.run.launch.prepare_store", lambda *_, **__: pytest.fail("calibrated"))
    with pytest.raises(InputError, match="the smallest parameters is 0"):
        Study(data, tmp_path / "run").launch()
    assert not (tmp_path / "run" / "study.json").exists()
