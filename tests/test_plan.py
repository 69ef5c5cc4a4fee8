"""Plans: JSON there and back, equality, and a cost that is the count of what the model then holds."""

import itertools
import json

import common
import pytest
from common import random_plan, rank_option

from rankfront.methods import DENSE_OPTION, Grid, InputError, Option, get_method, method_names
from rankfront.search.inputs.model import count_parameters
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure.runner import JobRunner
from rankfront.search.names import inside_blocks
from rankfront.search.plans.plan import VERSION, Plan, cost_of
from rankfront.search.study import Study

CHOICES = {"b": rank_option("svd", 8), "a": rank_option("svd-llm", 16), "c": DENSE_OPTION}


def test_json_there_and_back():
    plan = Plan.of(CHOICES, {"model": "tiny", "dtype": "float32"})
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.origin == plan.origin
    assert again.key == plan.key
    assert again.to_json() == plan.to_json()
    assert "\n" not in plan.to_json()


def test_levels_keep_their_types():
    option = Option.of("svd", rank=8, sparsity=0.5, pattern="2:4")
    assert Plan.from_json(Plan.of({"a": option}).to_json()).option("a") == option


def test_order_and_dense_choices_do_not_matter():
    plans = [Plan.of(dict(order)) for order in itertools.permutations(CHOICES.items())]
    plans.append(Plan.of({name: option for name, option in CHOICES.items() if option != DENSE_OPTION}))
    assert len(set(plans)) == 1
    assert len({hash(plan) for plan in plans}) == 1
    assert len({plan.key for plan in plans}) == 1


def test_the_order_of_a_level_does_not_matter():
    assert Option.of("mixed", a=1, b=2) == Option.of("mixed", b=2, a=1)
    assert hash(Option.of("mixed", a=1, b=2)) == hash(Option.of("mixed", b=2, a=1))


def test_origin_is_not_part_of_what_a_plan_is():
    assert Plan.of(CHOICES, {"model": "one"}) == Plan.of(CHOICES, {"model": "other"})
    assert Plan.of(CHOICES, {"model": "one"}).key == Plan.of(CHOICES, {"model": "other"}).key


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"b": rank_option("svd", 8)},
        {**CHOICES, "a": rank_option("svd-llm", 8)},
        {**CHOICES, "a": rank_option("svd", 16)},
    ],
)
def test_plans_that_differ_are_not_equal(other):
    assert Plan.of(other) != Plan.of(CHOICES)
    assert Plan.of(other).key != Plan.of(CHOICES).key


def test_sites_that_are_not_named_are_dense():
    plan = Plan.of(CHOICES)
    assert plan.option("a") == CHOICES["a"]
    assert plan.option("c") == plan.option("elsewhere") == DENSE_OPTION


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"plan"',
        "{}",
        '{"version": 1}',
        '{"version": 1, "sites": []}',
        '{"version": 1, "sites": {"a": 3}}',
        '{"version": 1, "sites": {"a": {}}}',
        '{"version": 1, "sites": {"a": {"rank": 3}}}',
        '{"version": 1, "sites": {"a": {"method": 3, "rank": 3}}}',
        '{"version": 1, "sites": {"a": {"method": "svd", "rank": [3]}}}',
        '{"version": 1, "sites": {}, "origin": []}',
        Plan.of(CHOICES).to_json()[:-9],
    ],
)
def test_corrupt_json_is_named(text):
    with pytest.raises(InputError, match=r"^plan\.json is corrupt") as caught:
        Plan.from_json(text, "plan.json")
    assert "\n" not in str(caught.value)


def test_another_version_is_named():
    data = json.loads(Plan.of(CHOICES).to_json()) | {"version": VERSION + 1}
    with pytest.raises(InputError, match=rf"plan\.json has version {VERSION + 1}"):
        Plan.from_json(json.dumps(data), "plan.json")


# -- cost


def llama_sites():
    model = common.architecture("llama").build()
    return inside_blocks(find_sites(model)), count_parameters(model)


def test_an_empty_plan_costs_what_dense_does():
    sites, values = llama_sites()
    cost = cost_of(Plan(()), sites, values, 2)
    assert cost.values == cost.dense_values == values
    assert cost.bytes == 2 * values
    assert cost.parameters == cost.block_parameters == 1.0


def test_cost_in_closed_form():
    """r(m + n) in the place of mn, at one site in the blocks and at the head."""
    sites, values = llama_sites()
    plan = Plan.of({"model.layers.0.mlp.up_proj": rank_option("svd", 6), "lm_head": rank_option("svd", 4)})
    blocks = common.BLOCKS * sum(m * n + m for m, n in common.GATED.values())  # with biases
    saved_inside = common.INNER * common.HIDDEN - 6 * (common.INNER + common.HIDDEN)
    saved_outside = common.VOCABULARY * common.HIDDEN - 4 * (common.VOCABULARY + common.HIDDEN)
    cost = cost_of(plan, sites, values, 2)
    assert cost.values == values - saved_inside - saved_outside
    assert cost.bytes == 2 * cost.values
    assert (cost.block_values, cost.dense_block_values) == (blocks - saved_inside, blocks)


def test_a_plan_of_another_model_is_refused():
    sites, values = llama_sites()
    with pytest.raises(InputError, match=r"transformer\.h\.0.*another model"):
        cost_of(Plan.of({"transformer.h.0": rank_option("svd", 6)}), sites, values, 2)


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "svdd", "rank": 6},
        {"method": "svd"},
        {"method": "svd", "rank": "six"},
        {"method": "svd", "rank": -3},
        {"method": "svd", "rank": 0},
    ],
    ids=["unknown method", "no rank", "rank is a word", "negative rank", "rank zero"],
)
def test_a_plan_with_no_such_option_is_refused(spec):
    """A plan is a file that people may edit: what it asks for is checked before anything is computed."""
    sites, values = llama_sites()
    text = json.dumps({"version": VERSION, "origin": {}, "sites": {"lm_head": spec}})
    with pytest.raises(InputError):
        cost_of(Plan.from_json(text), sites, values, 2)


@pytest.mark.parametrize("seed", range(4))
def test_cost_is_the_count_of_the_models_parameters(resident, seed):
    plan = random_plan(resident, seed)
    resident.compressed.apply(plan)
    inside = inside_blocks(resident.compressed.sites)
    cost = cost_of(plan, inside, resident.compressed.dense_values, 4)
    assert cost.values == count_parameters(resident.compressed.model) < cost.dense_values
    assert cost.bytes == sum(p.numel() * p.element_size() for p in resident.compressed.model.parameters())
    linears = [
        module for path, module in resident.compressed.model.model.layers.named_modules() if path.endswith("_proj")
    ]
    assert cost.block_values == sum(p.numel() for module in linears for p in module.parameters())


def test_cost_of_a_tied_matrix_is_counted_once(tied_folder, text_file):
    data = common.study_data(tied_folder, text_file)
    data["space"] |= {"include": ["lm_head"], "methods": ["svd"]}
    resident = JobRunner(Study(data).setup())
    ((site, options),) = resident.compressed.space.wanted().items()
    inside = inside_blocks(resident.compressed.sites)
    for option in options:
        plan = Plan.of({site.name: option})
        resident.compressed.apply(plan)
        cost = cost_of(plan, inside, resident.compressed.dense_values, 4)
        saved = site.storage.values - option["rank"] * (common.VOCABULARY + common.HIDDEN)
        assert cost.values == count_parameters(resident.compressed.model) == resident.compressed.dense_values - saved
        assert cost.block_parameters == 1.0


EXTREMES = {"least": min, "most": max}


@pytest.mark.parametrize("extreme", EXTREMES)
def test_kept_fractions_lie_between_nothing_and_dense(architecture, model, extreme):
    """Every site that a method treats, as small and as large as it makes it; integers are counted in bytes, for a
    scale beside a rounded weight is one value more."""
    sites, dense = find_sites(model), count_parameters(model)
    grid = Grid(keep=(0.01, 0.5, 0.99), rank_multiple=2)
    for name in method_names():
        method, claimed, chosen = get_method(name), set(), {}
        for site in sites:
            offered = list(method.options(site, grid).values())
            paths = {weight.path for weight in site.weights}
            if offered and claimed.isdisjoint(paths):
                claimed |= paths
                chosen[site.name] = EXTREMES[extreme](offered, key=lambda o: method.storage(site, o).parameters)
        cost = cost_of(Plan.of(chosen), inside_blocks(sites), dense, 2)
        assert 0 < cost.bytes <= 2 * cost.dense_values, name
        if not any(method.storage(site, chosen[site.name]).integers for site in sites if site.name in chosen):
            assert 0 < cost.parameters <= 1, name
            assert 0 <= cost.block_parameters <= 1, name


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_model_of_dropped_blocks_keeps_nothing_of_them(name):
    model = common.architecture(name).build()
    sites = inside_blocks(find_sites(model))
    dropped = [site for site in sites if set(site.roles) in ({"query", "key", "value", "output"}, MLP_ROLES[name])]
    cost = cost_of(Plan.of({site.name: Option.of("drop-block") for site in dropped}), sites, count_parameters(model), 2)
    assert len(dropped) == 2 * common.BLOCKS
    assert cost.block_parameters == 0.0


MLP_ROLES = {"llama": {"gate", "up", "down"}, "opt": {"up", "down"}}
