"""Latency: what is reported, never how fast. The clock of a shared machine proves nothing."""

import math
from functools import partial

import common
import pytest
import torch

from rankfront.methods import Cost, InputError
from rankfront.objectives import Clock, Subject, generate, make_objective
from rankfront.objectives.latency import STEADY, Latency
from rankfront.search.plans.plan import Plan

NAMES = ["latency", "latency_prefill", "latency_decode"]
NOTES = {"latency_prefill", "latency_decode", "latency_spread", "latency_dense_ms"}
SMALL = {"batch": 1, "prompt": 6, "decode": 2, "rounds": 2, "seconds": 0}


def subject_of(resident, plan):
    return resident.subject(plan, Clock())


def a_plan(resident):
    """Every site at its first option."""
    return Plan.of({site.name: options[0] for site, options in resident.compressed.space.wanted().items()})


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt", [1, 6, 40])
def test_a_ratio_and_its_notes(resident, batch, prompt):
    subject = subject_of(resident, a_plan(resident))
    ratio = Latency(batch=batch, prompt=prompt, decode=2, rounds=2, seconds=0).value(subject)
    assert math.isfinite(ratio)
    assert ratio > 0
    assert subject.notes.keys() == NOTES
    assert all(math.isfinite(note) and note >= 0 for note in subject.notes.values())
    assert subject.notes["latency_dense_ms"] > 0
    assert subject.clock.seconds["latency"] > 0


def test_the_model_runs_its_plan_again_afterwards(resident):
    subject = subject_of(resident, a_plan(resident))
    modules = dict(resident.compressed.model.named_modules())
    Latency(**SMALL).value(subject)
    after = dict(resident.compressed.model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[path] is module for path, module in modules.items())


def test_both_models_run_in_turns(resident, monkeypatch):
    """One warm-up each, then the two take turns at going first."""
    subject = subject_of(resident, a_plan(resident))
    order = []

    def record(model, ids, decode):
        dense = isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), torch.nn.Linear)
        order.append("dense" if dense else "ours")
        return generate(model, ids, decode)

    monkeypatch.setattr("rankfront.objectives._generation.generate", record)
    Latency(**{**SMALL, "rounds": 3}).value(subject)
    assert order == ["ours", "dense", "ours", "dense", "dense", "ours", "ours", "dense"]


@pytest.mark.parametrize("name", NAMES)
def test_the_dense_model_is_as_fast_as_itself(resident, name):
    """Exactly, and without a spread that others would have to beat."""
    subject = subject_of(resident, Plan(()))
    assert make_objective(name, SMALL).value(subject) == 1.0
    assert subject.notes[f"{name}_spread"] == 0.0
    assert all(note > 0 for key, note in subject.notes.items() if not key.endswith("_spread"))


def test_the_value_is_the_median_of_ratios(resident, monkeypatch):
    """Of compressed seconds over dense seconds, round by round."""
    ours, dense = [(9, 9), (1, 1), (2, 4), (3, 3)], [(9, 9), (1, 1), (1, 1), (3, 9)]
    times = {"ours": iter(ours), "dense": iter(dense)}

    def fixed(model, ids, decode):
        kind = "dense" if isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), torch.nn.Linear) else "ours"
        return type(generate(model, ids, 1))(*map(float, next(times[kind])))

    monkeypatch.setattr("rankfront.objectives._generation.generate", fixed)
    subject = subject_of(resident, a_plan(resident))
    assert Latency(**{**SMALL, "rounds": 3}).value(subject) == 1.0  # of 2/2, 6/2 and 6/12
    assert subject.notes["latency_prefill"] == 1.0  # of 1/1, 2/1, 3/3
    assert subject.notes["latency_decode"] == 1.0  # of 1/1, 4/1, 3/9
    assert subject.notes["latency_dense_ms"] == 2000.0


def test_both_models_run_compiled(resident, monkeypatch):
    """One graph of either for a prompt and one for a token, kept from round to round; scoring goes on as before."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    subject = subject_of(resident, a_plan(resident))
    ratios = {}
    for name in NAMES:
        ratios[name] = make_objective(name, SMALL | {"compile": True}).value(subject)
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in ratios.values())
    made = len(graphs)
    assert made
    make_objective("latency", SMALL | {"compile": True, "rounds": 5}).value(subject)
    assert len(graphs) == made
    make_objective("latency", SMALL).value(subject)
    assert subject.timings.keys() == {(1, 6, 2, True, False, None), (1, 6, 2, False, False, None)}
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_bad_word_on_compiling_is_refused(name, value):
    with pytest.raises(InputError, match=f"objectives.{name}.compile"):
        make_objective(name, {"compile": value})


@pytest.mark.parametrize("name", ["batch", "prompt", "decode", "rounds"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True])
def test_bad_settings_are_refused_in_one_line(name, value):
    objective = "latency_decode" if name == "decode" else "latency"  # the others may decode nothing
    with pytest.raises(InputError, match=f"objectives.{objective}.{name}") as caught:
        make_objective(objective, {name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, "2", None, True, math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_limit_in_seconds_is_refused(name, value):
    with pytest.raises(InputError, match=f"objectives.{name}.seconds"):
        make_objective(name, {"seconds": value})


@pytest.fixture
def clocked(monkeypatch):
    """Runs that take the seconds they are told, (prefill, decode) by kind of model, the last for ever; what was run."""
    times = {"ours": [], "dense": []}
    ran = []

    def fixed(model, ids, decode):
        kind = "dense" if isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), torch.nn.Linear) else "ours"
        ran.append(kind)
        own = times[kind]
        return type(generate(model, ids, 1))(*map(float, own.pop(0) if len(own) > 1 else own[0]))

    monkeypatch.setattr("rankfront.objectives._generation.generate", fixed)
    return times, ran


def test_prefill_and_decode_share_their_rounds(resident, clocked):
    times, ran = clocked
    times |= {"ours": [(2, 6)], "dense": [(4, 4)]}
    subject = subject_of(resident, a_plan(resident))
    assert make_objective("latency_prefill", SMALL).value(subject) == 0.5
    assert make_objective("latency_decode", SMALL).value(subject) == 1.5
    assert make_objective("latency", SMALL).value(subject) == 1.0
    assert len(ran) == 2 * (SMALL["rounds"] + 1)
    assert subject.notes["latency_prefill_tokens_per_second"] == SMALL["prompt"] / 2
    assert subject.notes["latency_decode_ms"] == 1000 * 6 / SMALL["decode"]
    other = make_objective("latency_decode", SMALL | {"decode": 3})
    assert other.value(subject) == 1.5
    assert len(ran) == 4 * (SMALL["rounds"] + 1)


def test_rounds_go_on_until_the_ratio_is_steady(resident, clocked):
    """Two wild rounds, then quiet ones: it takes twelve rounds until the middle half of them agrees."""
    times, ran = clocked
    times |= {"ours": [(1, 1), (9, 9), (5, 5), (3, 3), (1, 1)], "dense": [(1, 1)]}
    subject = subject_of(resident, a_plan(resident))
    assert make_objective("latency", SMALL | {"rounds": 4, "seconds": 60}).value(subject) == 1.0
    assert subject.notes["latency_spread"] < STEADY
    assert 8 < len(ran) // 2 - 1 < 20


def test_rounds_end_where_the_limit_is(resident, clocked):
    times, ran = clocked
    times |= {"ours": [(1, 1), (9, 9), (5, 5), (3, 3), (1, 1)], "dense": [(1, 1)]}
    subject = subject_of(resident, a_plan(resident))
    make_objective("latency", SMALL | {"rounds": 4, "seconds": 0}).value(subject)
    assert len(ran) // 2 - 1 == 4
    assert subject.notes["latency_spread"] > STEADY


def test_unknown_settings_name_the_nearest():
    with pytest.raises(InputError, match="did you mean 'rounds'"):
        make_objective("latency", {"round": 3})


def test_generation_takes_one_token_at_a_time(architecture, model):
    """A prefill of the whole prompt, then single tokens with the cache, on every architecture."""
    lengths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    run = generate(model, common.tokens(2, 5), decode=3)
    assert lengths == [(2, 5), (2, 1), (2, 1), (2, 1)]
    assert run.total == run.prefill + run.decode > 0


def test_objectives_of_the_plan_alone_need_no_model():
    cost = Cost(values=60, dense_values=80, block_values=10, dense_block_values=40, bytes=120)
    subject = Subject(torch.nn.Identity(), None, torch.zeros(0), None, cost, Clock())
    assert make_objective("parameters", {}).value(subject) == 0.75
    assert make_objective("block_parameters", {}).value(subject) == 0.25
    assert make_objective("bytes", {}).value(subject) == 120.0
