"""A resident model through many trials: plans go in and out, and a failure is a value."""

import math

import pytest
import torch
from common import random_plan, rank_option, save_folder, tokens
from launching import small_data

from rankfront.methods import InputError, method_names
from rankfront.methods.layers import weight_of
from rankfront.search.factors.mapped import MappedFiles
from rankfront.search.inputs.model import count_parameters
from rankfront.search.measure.evaluation_tokens import EvaluationTokens
from rankfront.search.measure.prepare import prepare_store
from rankfront.search.measure.runner import JobRunner
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

IDS = tokens(2, 16)


def logits(resident):
    with torch.no_grad():
        return resident.compressed.model(input_ids=IDS, use_cache=False).logits


def test_dense_again_is_the_very_same_model(resident):
    before, modules = logits(resident), dict(resident.compressed.model.named_modules())
    resident.compressed.apply(random_plan(resident, 0))
    assert not torch.equal(logits(resident), before)
    resident.compressed.apply(Plan(()))
    assert torch.equal(logits(resident), before)
    assert all(module is modules[path] for path, module in resident.compressed.model.named_modules())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_what_is_offered_for_a_shared_head_can_be_looked_up(name, text_file, tmp_path):
    """Whatever treats an output head that is the embedding table as well runs as both."""
    data = small_data(save_folder(name, tmp_path / "model"), text_file)
    fast = [method for method in method_names() if not method.endswith("-published")]
    data["space"] = {"methods": fast, "keep": [0.5], "rank_multiple": 2, "include": ["lm_head"]}
    resident = JobRunner(Study(data).setup())
    ((site, options),) = resident.compressed.space.wanted().items()
    assert site.weights[0].tied
    assert {"svd-llm", "lrt", "gptq-int8", "rtn-int4", "hola-embedding"} <= {option.method for option in options}
    for option in options:
        resident.compressed.apply(Plan.of({site.name: option}))
        assert logits(resident).isfinite().all(), option


def test_a_plan_is_the_same_whatever_came_before(resident):
    first, second = random_plan(resident, 1), random_plan(resident, 2)
    resident.compressed.apply(first)
    expected = logits(resident)
    resident.compressed.apply(second)
    assert not torch.equal(logits(resident), expected)
    resident.compressed.apply(first)
    assert torch.equal(logits(resident), expected)


def test_only_sites_whose_option_changed_are_swapped(resident):
    name, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    wanted = {site.name: options for site, options in resident.compressed.space.wanted().items()}
    resident.compressed.apply(Plan.of({name: wanted[name][0], other: wanted[other][0]}))
    kept, swapped = resident.compressed.model.get_submodule(name), resident.compressed.model.get_submodule(other)
    resident.compressed.apply(Plan.of({name: wanted[name][0], other: wanted[other][1]}))
    assert resident.compressed.model.get_submodule(name) is kept
    assert resident.compressed.model.get_submodule(other) is not swapped


def test_factors_are_the_methods_own(resident):
    """What runs after apply is the best rank-r matrix under plain SVD, for the whole space of svd options."""
    for site, options in resident.compressed.space.wanted().items():
        for option in options:
            if option.method != "svd":
                continue
            resident.compressed.apply(Plan.of({site.name: option}))
            weight = weight_of(resident.compressed.dense_modules[site.name]).double()
            difference = (weight - resident.compressed.model.get_submodule(site.name).matrix().double()).square().sum()
            best = torch.linalg.svdvals(weight)[option["rank"] :].square().sum()
            assert float(difference) == pytest.approx(float(best), rel=1e-4)


def test_within_dense_the_model_is_dense(resident):
    before = logits(resident)
    resident.compressed.apply(random_plan(resident, 3))
    compressed, count = logits(resident), count_parameters(resident.compressed.model)
    with resident.compressed.dense():
        assert torch.equal(logits(resident), before)
        assert count_parameters(resident.compressed.model) == resident.compressed.dense_values
    assert torch.equal(logits(resident), compressed)
    assert count_parameters(resident.compressed.model) == count


def test_after_an_error_within_dense_the_plan_is_back(resident):
    resident.compressed.apply(random_plan(resident, 3))
    compressed = logits(resident)
    with pytest.raises(KeyError), resident.compressed.dense():
        raise KeyError("within")
    assert torch.equal(logits(resident), compressed)


def test_a_trial_is_one_flat_record(resident):
    plan = random_plan(resident, 4)
    record = resident.run(Job("trial", 0, plan))
    assert list(record["values"]) == ["perplexity", "parameters"]
    assert record["values"]["perplexity"] == record["perplexity"] > 1
    assert record["values"]["parameters"] == record["parameters"] < 1
    assert record["parameter_count"] == count_parameters(resident.compressed.model)
    assert record["bytes"] == 4 * record["parameter_count"]
    assert record["tokens"] == resident.setup.tokens["search"].numel()
    assert {"apply", "evaluate", "total"} <= record["seconds"].keys()
    again = resident.run(Job("trial", 1, plan))
    assert again["values"] == record["values"]


def test_a_report_is_scored_on_the_report_split(resident):
    plan = random_plan(resident, 4)
    report, trial = resident.run(Job("report", 0, plan)), resident.run(Job("trial", 0, plan))
    assert report["tokens"] == resident.setup.tokens["report"].numel()
    assert math.isfinite(report["perplexity"])
    assert report["perplexity"] != trial["perplexity"]


@pytest.mark.parametrize("kind", ["trial", "report"])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of memory\nwith a trace"), MemoryError(), ValueError("not finite"), KeyError("x"), TypeError()],
)
def test_a_failure_is_a_value_and_the_next_trial_runs(resident, monkeypatch, kind, error):
    plan, before = random_plan(resident, 5), logits(resident)

    def fail(*arguments, **named):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("rankfront.objectives._scores.score", fail)
        patch.setattr("rankfront.search.measure.control.score", fail)
        record = resident.run(Job(kind, 0, plan))
    assert list(record) == ["failure", "lost" if isinstance(error, MemoryError) else "place"]
    assert "test_trial.py:" in record.get("place", "test_trial.py:")
    assert type(error).__name__ in record["failure"]
    assert "\n" not in record["failure"]
    assert torch.equal(logits(resident), before)
    assert "failure" not in resident.run(Job(kind, 1, plan))


@pytest.mark.parametrize("kind", ["trial", "report", "menu", "slopes"])
def test_a_record_has_its_seconds_and_no_field_that_is_not_documented(resident, kind):
    plan = Plan(()) if kind == "menu" else random_plan(resident, 7)
    record = resident.run(Job(kind, 0, plan, tokens=64))
    assert record["seconds"]
    assert "failure" not in record
    assert record.keys() <= Record.__annotations__.keys()


def test_a_note_that_cannot_be_taken_costs_nothing(resident, monkeypatch):
    """How a model runs is bookkeeping."""
    plan = random_plan(resident, 5)
    whole = resident.run(Job("trial", 0, plan))

    def fail(subject):
        raise TypeError("forward() takes no cache")

    monkeypatch.setattr("rankfront.search.measure.runner.note_running", fail)
    monkeypatch.setattr("rankfront.search.measure.control.continuations", lambda *_: fail(None))
    record, report = resident.run(Job("trial", 0, plan)), resident.run(Job("report", 0, plan))
    assert record["values"] == whole["values"]
    assert record["notes_failure"] == report["continuations_failure"] == "TypeError: forward() takes no cache"
    assert math.isfinite(report["perplexity"])


def test_what_is_not_finite_is_a_failure(resident, monkeypatch):
    monkeypatch.setattr("rankfront.objectives._scores.Scores.perplexity", math.inf)
    record = resident.run(Job("trial", 0, random_plan(resident, 5)))
    assert record["failure"] == "not finite: perplexity is inf"


def test_a_corrupt_factor_file_is_the_users_to_mend(resident, monkeypatch):
    """It would fail every trial alike, so it is raised, naming the file and the remedy."""
    site, options = next(iter(resident.compressed.space.wanted().items()))
    path = resident.compressed.store.path(site, options[0])
    whole = path.read_bytes()
    monkeypatch.setattr(resident.compressed.store, "_files", MappedFiles())
    try:
        path.write_bytes(whole[:-4] + b"\0\1\2\3")
        with pytest.raises(InputError, match=r"corrupt.*--rebuild") as caught:
            resident.run(Job("trial", 0, Plan.of({site.name: options[0]})))
        assert str(path) in str(caught.value)
        path.unlink()
        with pytest.raises(InputError, match="missing"):
            resident.run(Job("trial", 0, Plan.of({site.name: options[0]})))
    finally:
        path.write_bytes(whole)
    assert "failure" not in resident.run(Job("trial", 0, Plan.of({site.name: options[0]})))


def test_a_plan_beyond_what_was_prepared_is_refused(resident):
    plan = Plan.of({"model.layers.0.mlp.up_proj": rank_option("svd", 31)})
    with pytest.raises(InputError, match="rank=31"):
        resident.run(Job("trial", 0, plan))


def test_what_is_in_the_store_is_not_prepared_again(resident):
    def unwanted(phase, done, total):
        raise AssertionError(phase)

    assert not prepare_store(resident.setup, resident.compressed.space, unwanted).seconds
    assert not resident.compressed.store.missing(resident.compressed.space.wanted())


def test_a_second_resident_gives_the_same_values(resident):
    plan = random_plan(resident, 6)
    other = JobRunner(resident.setup)
    assert other.run(Job("trial", 0, plan))["values"] == resident.run(Job("trial", 0, plan))["values"]


def test_menu_and_slopes_read_short_pieces_that_no_trial_reads(resident, monkeypatch):
    """Pieces are whole, neighbours read others, and every call the same."""
    monkeypatch.setattr(
        "rankfront.search.measure.evaluation_tokens.PIECE_TOKENS", 12
    )  # windows of 32 in three pieces of 10
    windows = torch.arange(6 * 32).reshape(6, 32)
    tokens = EvaluationTokens(windows, 2, seed=0)
    first, second = tokens.spare(0, 50), tokens.spare(1, 50)
    assert first.shape == second.shape == (5, 10)
    assert torch.equal(first, tokens.spare(0, 50))
    both = torch.cat([first, second]).flatten()
    assert both.min() >= 64
    assert len(both.unique()) == len(both)
    assert torch.equal(first[:, 1:], first[:, :1] + torch.arange(1, 10))
    assert EvaluationTokens(windows, 6, seed=0).spare(0, 60).min() < 64
