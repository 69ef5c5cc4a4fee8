"""The grid of ranks that a device likes: the rule, what is asked of the device, and that a study keeps its answer."""

import pytest
import torch
from launching import make_run, small_data

from rankfront.methods import InputError
from rankfront.search import Study
from rankfront.search.inputs.model import skeleton
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure import ranks
from rankfront.search.measure.ranks import GAIN, liked, measured_multiple, shapes_of
from rankfront.search.measure.setup import make_space
from rankfront.search.measure.timing import Stopwatches

SHAPES = {(96, 96): 3, (192, 96): 1}
KEEP, TOKENS = (0.3, 0.6), (1, 7)


@pytest.mark.parametrize("liked_by_all", [8, 16, 32, 64])
def test_the_multiple_of_least_time_wins(liked_by_all):
    """On a device where ranks off a grid take twice as long as they should."""

    def ratio(shape, rank, least, tokens):
        return (1 if rank % liked_by_all == 0 else 2) / (1 if least % liked_by_all == 0 else 2)

    assert liked(SHAPES, KEEP, TOKENS, ratio) == liked_by_all


def test_where_time_follows_the_rank_the_finest_wins():
    assert liked(SHAPES, KEEP, TOKENS, lambda shape, rank, least, tokens: rank / least) == 8


def test_a_gain_below_the_noise_is_none():
    assert liked(SHAPES, KEEP, TOKENS, lambda shape, rank, least, tokens: 1 - GAIN / 4) == 8


def test_a_shape_counts_by_its_weights():
    """The small one is three times there and holds as much as one and a half of the large one."""
    for slow, found in (((96, 96), 8), ((192, 96), 16)):

        def ratio(shape, rank, least, tokens, slow=slow):
            return 1.0 if rank % 16 else (1.5 if shape == slow else 0.4)

        assert liked(SHAPES, [0.35], TOKENS, ratio) == found


def test_ranks_are_rounded_up_and_compared_with_the_finest():
    asked = []
    liked({(96, 96): 1}, [0.5], [3], lambda *case: asked.append(case) or 1.0)
    assert asked == [((96, 96), 32, 24, 3)] * 2 + [((96, 96), 64, 24, 3)]  # 24 of 8, 32 of 16 and of 32


def test_the_shapes_are_those_of_the_blocks_linears(model_folder, text_file, tmp_path):
    setup = Study(small_data(model_folder, text_file), run=tmp_path / "run").setup()
    model = skeleton(setup.source)
    linears = [m for path, m in model.named_modules() if ".layers." in path and isinstance(m, torch.nn.Linear)]
    shapes = shapes_of(find_sites(model))
    assert sum(shapes.values()) == len(linears)
    assert {(m.out_features, m.in_features) for m in linears} == shapes.keys()


def test_a_device_is_asked_once(tmp_path, monkeypatch):
    """What it answered is kept for all studies; the figures are ratios of real modules."""
    found = measured_multiple({(48, 32): 1}, [0.5], None, "cpu", "float32", tmp_path)
    assert found in ranks.MULTIPLES
    known = Stopwatches(tmp_path, "cpu", torch.float32).known
    assert known
    assert all(0 < ratio < float("inf") for ratio in known.values())
    monkeypatch.setattr("rankfront.search.measure.timing.compared", lambda *_: pytest.fail("timed again"))
    assert measured_multiple({(48, 32): 1}, [0.5], None, "cpu", "float32", tmp_path) == found


@pytest.fixture
def data(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    data = small_data(model_folder, text_file, sampler="random", trials=3)
    data["space"] |= {"rank_multiple": "device", "methods": ["svd"], "keep": [0.9, 0.95]}
    return data


def test_a_study_keeps_what_its_device_liked(data, tmp_path, monkeypatch):
    """Its options have such ranks, and a later launch, on a device that likes another, goes on with them."""
    monkeypatch.setattr("rankfront.search.run.resolving.measured_multiple", lambda *_: 4)
    study = make_run(data, tmp_path / "run")
    assert study.run.definition().resolved["rank_multiple"] == "4"
    taken = [o["rank"] for row in study.rows() for o in row.plan.by_site.values() if o.method == "svd"]
    assert taken
    assert all(rank % 4 == 0 for rank in taken)
    assert any(rank % 8 for rank in taken)
    monkeypatch.setattr("rankfront.search.run.resolving.measured_multiple", lambda *_: pytest.fail("asked again"))
    assert Study.open(study.run.path).setup().config.space.rank_multiple == 4


def test_menu_and_answers_know_the_grid(data, tmp_path, monkeypatch):
    """They read the run, not the study file, which says no more than to ask."""
    monkeypatch.setattr("rankfront.search.run.resolving.measured_multiple", lambda *_: 3)
    data["space"]["keep"], data["search"]["sampler"], data["search"]["trials"] = [0.5, 0.9], "rankfront", 6
    study = make_run(data, tmp_path / "run")
    offered = {option.label for own in make_space(study.setup()).wanted().values() for option in own}
    treated = set(study.menu()["option"]) - {"dense"}
    assert treated
    assert treated <= offered
    assert study.answer("parameters<=0.9").figures["parameters"] <= 0.9


def test_another_word_than_device_is_refused(data, tmp_path):
    data["space"]["rank_multiple"] = "eight"
    with pytest.raises(InputError, match=r"space\.rank_multiple"):
        Study(data, run=tmp_path / "run")
