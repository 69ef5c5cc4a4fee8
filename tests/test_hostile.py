"""Plans and exports from strangers: what they say is checked against the model before anything is allocated.

Whatever stands in a plan, a study or an export's configuration, it is either right or refused in one line.
"""

import copy
import json
import re
import shutil

import common
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import measured

from rankfront.methods import Grid, InputError, Option, get_method, method_names
from rankfront.methods.checkpoint import CONFIG_VERSION, RankfrontConfig, RankfrontQuantizer
from rankfront.methods.layers import LITTLE, layers
from rankfront.search.config import make_config
from rankfront.search.inputs.model import count_bytes, load_model
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.sites import find_sites
from rankfront.search.output.export import export
from rankfront.search.plans.plan import Plan, check_option, cost_of

HUGE = 10_000_000
many = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

whole = st.one_of(st.integers(-3, 70), st.integers(), st.sampled_from([0, HUGE, 2**63, 10**30]))
scalars = st.one_of(whole, st.floats(), st.booleans(), st.none(), st.text(max_size=8))
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)

MODEL = common.architecture("llama").build()
LLAMA = {site.name: (site, place.block is not None) for site, place in find_sites(MODEL).items()}
LEVELS = ("rank", "bits", "neurons", "nonzeros", "atoms", "group", "block", "terms", "kept", "width", "components")
options = st.fixed_dictionaries(
    {"method": st.one_of(st.sampled_from(method_names()), st.text(max_size=6))},
    optional={name: st.one_of(whole, scalars) for name in LEVELS},
)
plans = st.fixed_dictionaries(
    {
        "version": st.one_of(st.just(1), junk),
        "sites": st.one_of(st.dictionaries(st.sampled_from([*LLAMA]), options), junk),
    },
    optional={"origin": junk},
)


def whole_or_refused(call, *arguments):
    """What ``call`` gives, or None where it refuses in one line."""
    try:
        return call(*arguments)
    except InputError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
        return None


@many
@given(st.one_of(plans, junk))
def test_any_plan_is_within_the_model_or_refused(data):
    text = json.dumps(data)
    plan = whole_or_refused(Plan.from_json, text)
    if plan is not None:
        inside = dict(LLAMA.values())
        cost = whole_or_refused(cost_of, plan, inside, 20_000, 2)
        assert cost is None or 0 <= cost.bytes <= 2 * cost.dense_values


NOT_IN_TWO_BLOCKS = ("drop-block", "expert-prune", "hola-embedding", "hola-experts", "shared-basis-3", "shared-basis-4")


def fits(site, option):
    try:
        get_method(option.method).check(option)
        check_option(site, option)
    except InputError:
        return False
    return True


@pytest.mark.parametrize("name", method_names())
def test_a_level_that_stores_no_less_than_dense_is_refused(name):
    """Of every method its own option with each number made huge."""
    method, tried = get_method(name), 0
    for site, _ in LLAMA.values():
        for option in method.options(site, Grid(keep=(0.5,), rank_multiple=2)).values():
            check_option(site, option)
            for level, value in option.level:
                if type(value) is int:
                    larger = Option.of(name, **(dict(option.level) | {level: HUGE * value}))
                    assert not fits(site, larger), larger
                    tried += 1
    assert tried or name in NOT_IN_TWO_BLOCKS


def test_a_method_at_a_site_that_it_refuses_is_refused():
    plan = Plan.of({"model.layers.0.mlp.gate_proj+up_proj+down_proj": Option.of("svd", rank=4)})
    with pytest.raises(InputError, match="one weight at a time"):
        cost_of(plan, dict(LLAMA.values()), 20_000, 2)


@pytest.mark.parametrize("depth", [1_000, 200_000])
def test_a_deep_plan_is_refused(depth):
    with pytest.raises(InputError, match="corrupt"):
        Plan.from_json('{"version": 1, "sites": ' + "[" * depth + "]" * depth + "}")


# -- exports


@pytest.fixture(scope="module")
def exported(_resident, tmp_path_factory):
    """A small export, to copy and spoil."""
    folder = tmp_path_factory.mktemp("hostile") / "export"
    chosen = {"model.layers.0.mlp.up_proj": Option.of("svd", rank=4), "lm_head": Option.of("svd", rank=6)}
    plan = Plan.of(chosen, _resident.setup.origin())
    export(_resident.setup, measured(_resident, plan), folder, "factored")
    return folder


PATHS = ("model.layers.0.mlp.up_proj", "lm_head", "model.embed_tokens", "model.norm", "model", "", "model.layers.9.x")
SETTINGS = (
    "rank", "bits", "heads", "kept", "width", "placed", "cached", "rows", "columns", "atoms", "nonzeros", "group",
    "block", "seed", "scale", "modes", "terms",
)  # fmt: skip
specs = st.fixed_dictionaries(
    {"kind": st.one_of(st.sampled_from([*layers()]), junk)},
    optional={name: st.one_of(whole, scalars) for name in SETTINGS},
)
configurations = st.fixed_dictionaries(
    {"version": st.one_of(st.just(CONFIG_VERSION), junk)},
    optional={
        "modules": st.one_of(st.dictionaries(st.sampled_from(PATHS), specs, max_size=3), junk),
        "tied": st.one_of(st.dictionaries(st.sampled_from(PATHS), st.sampled_from(PATHS)), junk),
        "joined": st.one_of(st.lists(st.fixed_dictionaries({"modules": junk, "most": junk}), max_size=2), junk),
    },
)


@many
@given(configurations)
def test_any_configuration_makes_small_layers_or_is_refused(data):
    """On the real device, where every tensor that is made takes memory."""
    model = copy.deepcopy(MODEL)
    config = whole_or_refused(lambda: RankfrontConfig(**data))
    if config is not None:
        held = count_bytes(model)
        quantizer = RankfrontQuantizer(config)
        if whole_or_refused(lambda: quantizer._process_model_before_weight_loading(model) or True):
            assert count_bytes(model) <= 3 * held + 3 * 4 * LITTLE


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "low-rank", "rank": HUGE},
        {"kind": "low-rank", "rank": -1},
        {"kind": "low-rank", "rank": "4"},
        {"kind": "low-rank"},
        {"kind": "plain", "rows": HUGE, "columns": HUGE},
        {"kind": "from-heads", "heads": 4, "kept": 8, "width": HUGE},
        {"kind": "pickle"},
        {"rank": 4},
    ],
    ids=str,
)
def test_an_export_that_asks_for_another_layer_is_refused_by_name(exported, tmp_path, spec):
    folder = spoiled(exported, tmp_path, lambda config: config["modules"].update({PATHS[0]: spec}))
    with pytest.raises(InputError, match=r"mlp\.up_proj") as caught:
        load_model(resolve(str(folder)), torch.float32, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.7.mlp.up_proj", "model.norm", "__class__", ""])
def test_an_export_that_names_another_module_is_refused_by_name(exported, tmp_path, path):
    folder = spoiled(
        exported, tmp_path, lambda config: config["modules"].update({path: {"kind": "low-rank", "rank": 4}})
    )
    with pytest.raises(InputError, match=re.escape(repr(path))):
        load_model(resolve(str(folder)), torch.float32, "cpu")


# A width of 0 may be drawn: transformers initialises its empty weights.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")
@settings(many, max_examples=100)
@given(st.data())
def test_any_value_in_a_models_own_configuration_loads_or_is_refused(exported, tmp_path_factory, data):
    written = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    changed = {data.draw(st.sampled_from(sorted(written))): data.draw(st.one_of(whole, junk))}
    folder = spoiled(exported, tmp_path_factory.mktemp("any"), lambda config: None, **changed)
    model = whole_or_refused(load_model, resolve(str(folder)), torch.float32, "cpu")
    if model is not None:
        assert count_bytes(model) <= 3 * count_bytes(MODEL)
    shutil.rmtree(folder.parent)


def spoiled(folder, to, change, **more):
    """A copy of an export with what it says of its layers changed."""
    shutil.copytree(folder, to / "spoiled")
    file = to / "spoiled" / "config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data["rankfront"])
    file.write_text(json.dumps(data | more), encoding="utf-8")
    return to / "spoiled"


# -- study files


tables = {
    "model": ("name", "dtype", "device", "attention"),
    "data": ("length", "calibrate", "search", "report"),
    "space": ("include", "exclude", "methods", "keep", "rank_multiple", "rule"),
    "objectives": ("perplexity", "divergence", "parameters", "latency"),
    "search": (
        "sampler", "menu", "trials", "time", "tokens", "seed", "workers", "groups", "untie", "anchors",
        "trial_tokens", "where", "refit", "heal", "resources",
    ),
}  # fmt: skip
studies = st.fixed_dictionaries(
    {},
    optional={
        t: st.one_of(st.dictionaries(st.sampled_from(keys), junk, max_size=3), junk) for t, keys in tables.items()
    },
)


@many
@given(studies)
def test_any_study_is_valid_or_refused(data):
    whole_or_refused(make_config, data)
