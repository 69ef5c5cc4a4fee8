"""Spaces that formats of exports hold at their size: no plan of them is ever refused, whoever proposes it."""

import itertools
import random

import numpy as np
import pytest
from common import HIDDEN, architecture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import make_run, small_data
from serving import BLOCKS

from rankfront.methods import InputError, Option
from rankfront.search.choices import OURS
from rankfront.search.config import SpaceConfig
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.setup import make_space
from rankfront.search.plans.agreed import agreeing, neighbour
from rankfront.search.plans.knapsack import Budget, knapsack_several
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import make_menu
from rankfront.search.plans.plan import Plan, Prices
from rankfront.search.plans.space import Space
from rankfront.search.serve.writing import write
from rankfront.search.study import Study

KEEP = (0.2, 0.35, 0.5, 0.67)


def servable(sites, form, groups=0, **more):
    multiple = {"keep": KEEP, "rank_multiple": 2, "servable": form, **more}
    return Space(sites, SpaceConfig.model_validate(multiple), groups)


def drawn(space, seed):
    """A plan of random values of every variable."""
    chooser = random.Random(seed)
    values = {name: chooser.randrange(count) for name, count in space.counts.items()}
    return space.decode(values)


@pytest.mark.parametrize("form", ["plain", "nemotron-nas", "gguf", ["gguf", "plain"]])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_every_plan_of_a_space_is_written_at_its_size(worlds, tmp_path_factory, form, seed):
    world = worlds("llama-tied")
    space = servable(world.setup.outline.sites, form)
    plan = drawn(space, seed)
    assert space.decode(space.encode(plan)) == plan
    world.compressed.apply(plan)
    stored = Prices(dict.fromkeys(space.sites, True), world.compressed.dense_values, 4).of(plan).values
    for each in [form] if isinstance(form, str) else form:
        said = write(world.compressed.model, each, tmp_path_factory.mktemp("out"), "F32", world.tokenizer)
        assert said.notes == () or "SGLang" in said.notes[0]  # nothing is multiplied out, or written as zeros
        assert said.values == stored + beside(plan, each)


def beside(plan, form):
    """Norms of what is gone are not written; llama.cpp wants an MLP beside every attention, if of zeros."""
    gone = [{half for half in ("self_attn", "mlp") if leaves_out(plan, number, half)} for number in range(BLOCKS)]
    zeros = sum(form == "gguf" and halves == {"mlp"} for halves in gone)
    return HIDDEN * (zeros - sum(map(len, gone))) + zeros * 3 * HIDDEN * 32


def leaves_out(plan, number, half):
    return any(f".{number}.{half}" in site and o.method == "drop-block" for site, o in plan.choices)


def test_spaces_offer_what_their_formats_hold(worlds):
    sites = worlds("llama-tied").setup.outline.sites
    everything = servable(sites, ())
    assert set(everything.methods) == {"svd-llm", "lama", "vo-svd", "nystrom", "drop-block"}
    assert servable(sites, "factored").choices == everything.choices
    widths = {option["neurons"] for own in servable(sites, "gguf").wanted().values() for option in own if option.level}
    assert widths == {32}  # of 48, in multiples of 32
    plain = servable(sites, "plain", 2)
    assert plain.counts == {"width of every MLP": 5, "block 1": 2, "block 2": 2, "block 3": 2}
    labels = {anchor.label: plan_of(plain, anchor) for anchor in plain.anchors([0.5, 0.2])}
    assert {option.method for option in labels["nystrom keep=0.5"].by_site.values()} == {"nystrom"}
    assert len(labels["drop-block keep=0.2"].by_site) == 2 * (BLOCKS - 1)
    assert not labels["drop-block keep=0.5"].by_site
    fewer = servable(sites, "plain", exclude=["*.2.mlp.*"])  # then no width is common, and block 2 stays
    assert list(fewer.counts) == ["block 1", "block 3"]
    with pytest.raises(ValueError, match="tied"):
        plain.encode(Plan.of({"model.layers.1.mlp.gate_proj+up_proj+down_proj": Option.of("drop-block")}))


def plan_of(space, anchor):
    return space.decode(space.anchor_parameters(anchor))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"methods": ["svd-llm", "lama"]},
            r"servable is \['plain'\], which holds none of \['lama', 'svd-llm'\]",
        ),
        ({"exclude": ["*.mlp.*"]}, "the space is empty: plain would hold no plan"),
    ],
)
def test_spaces_that_a_format_leaves_nothing_of_are_refused_in_a_line(model_folder, text_file, given, said):
    data = small_data(model_folder, text_file)
    data["space"] = {"servable": "plain", **given}
    with pytest.raises(InputError, match=said) as error:
        make_space(Study(data).setup())
    assert "\n" not in str(error.value)


def test_models_that_a_format_cannot_describe_are_refused_before_anything_is_measured(tmp_path, text_file, tokenizer):
    architecture("qwen3").build().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = small_data(tmp_path / "model", text_file)
    data["space"] = {"servable": ["plain", "gguf"]}
    with pytest.raises(InputError, match="gguf describes decoders of type llama, mistral, qwen2"):
        Study(data).setup()


# -- menus whose lines agree


def menu_of(sites, seed):
    """A menu of the format plain, with random divergences."""
    space, chooser = servable(sites, "plain"), np.random.default_rng(seed)
    predictions = {
        site.name: {option.label: float(chooser.exponential()) for option in options}
        for site, options in space.wanted().items()
    }
    return space, agreeing(make_menu(space.wanted(), predictions), space.linked)


@pytest.mark.parametrize("seed", range(4))
def test_menus_are_solved_among_the_plans_of_the_space(worlds, seed):
    space, menu = menu_of(worlds("llama-tied").setup.outline.sites, seed)
    values = itertools.product(*map(range, space.counts.values()))
    every = [menu.encode(space.decode(dict(zip(space.counts, each, strict=True)))) for each in values]
    assert menu.least == min(map(menu.size, every))
    changes, chooser = [], np.random.default_rng(seed)
    for line in menu.lines:
        changes.append(np.array([0.0, *-chooser.uniform(0, 1, len(line.options) - 1)]))
    for share in (0.2, 0.5, 0.9):
        budget = menu.least + share * (menu.dense - menu.least)
        found = Lagrangian(menu).solve(budget)
        assert found in every
        assert menu.size(found) <= budget
        best = min(menu.divergence(places) for places in every if menu.size(places) <= budget)
        assert menu.divergence(found) == pytest.approx(best, rel=0.2)

        def saved(places):
            return sum(own[place] for own, place in zip(changes, places, strict=True))

        second = Budget(np.concatenate(changes), share * min(map(saved, every)))
        exact = knapsack_several(menu, budget, [second])
        fits = [p for p in every if menu.size(p) <= budget and saved(p) <= second.room]
        assert exact in fits
        assert menu.divergence(exact) == pytest.approx(min(map(menu.divergence, fits)))
    with pytest.raises(InputError, match="no plan meets"):
        knapsack_several(menu, menu.least - 1)
    places = menu.untreated
    for _ in range(50):
        places = neighbour(menu, places, chooser)
        assert places in every


def test_a_search_measures_plans_of_one_width_alone(worlds, text_file, tmp_path):
    world = worlds("llama-tied")
    data = small_data(world.setup.source.location, text_file, sampler=OURS, trials=9)
    data["space"] = {"servable": "plain", "keep": KEEP, "rank_multiple": 2}
    study = make_run(data, tmp_path / "run")
    study.solve("parameters<=0.9")
    rows = [row for row in study.rows() if row.state == "complete"]
    assert {row.origin.partition(":")[0] for row in rows} >= {"menu", OURS}
    compressed = CompressedModel(study.setup())
    for number, row in enumerate(rows):
        compressed.apply(row.plan)
        assert write(compressed.model, "plain", tmp_path / str(number)).values <= compressed.dense_values
