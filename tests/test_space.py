"""The space: which sites and options are open, and the variables that samplers draw."""

import random

import common
import optuna
import pytest

from rankfront.methods import DENSE_OPTION, Grid, InputError, get_method
from rankfront.search.config import SpaceConfig
from rankfront.search.inputs.sites import find_sites
from rankfront.search.names import Place
from rankfront.search.plans.plan import Plan, check_disjoint
from rankfront.search.plans.space import Space
from rankfront.search.plans.variables import Tied

KEEP = (0.3, 0.5, 0.8)
KINDS = common.GATED


def deep_sites(depth=8):
    """Sites of a gated model ``depth`` blocks deep, its head and its table."""
    sites = {}
    for block in range(depth):
        for kind, (m, n) in KINDS.items():
            path = f"model.layers.{block}.{kind}"
            sites[_site(path, m, n)] = Place(block, kind)
    sites[_site("lm_head", common.VOCABULARY, common.HIDDEN)] = Place(None, "lm_head")
    table = _site("model.embed_tokens", common.VOCABULARY, common.HIDDEN, kind="embedding")
    sites[table] = Place(None, "model.embed_tokens")
    return sites


def _site(path, m, n, **more):
    site = common.linear_site(m, n, **more)
    weight = site.weights[0]
    return type(site)(path, (type(weight)("weight", path, m, n, weight.kind, weight.tied),))


def make_space(sites=None, groups=0, **settings):
    methods = ("svd", "asvd", "fwsvd", "svd-llm")
    config = SpaceConfig.model_validate({"methods": methods, "keep": KEEP, "rank_multiple": 2, **settings})
    return Space(sites or deep_sites(2), config, groups)


def names(space):
    return {site.name for site in space.choices}


def sites_of(variable):
    """Names of the sites that a variable decides for."""
    return list(variable.sites) if isinstance(variable, Tied) else [variable.name]


def ask(space, parameters=None):
    """The plan of one trial, of fixed draws where given."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    if parameters is not None:
        study.enqueue_trial(parameters)
    return space.suggest(study.ask(), {})


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], [], {f"model.layers.{i}.{kind}" for i in (0, 1) for kind in KINDS}),
        (["*"], ["*.v_proj", "*.0.*"], {f"model.layers.1.{kind}" for kind in KINDS if "v_proj" not in kind}),
        (["*.mlp.*"], [], {f"model.layers.{i}.{kind}" for i in (0, 1) for kind in KINDS if "mlp" in kind}),
        (["model.layers.0.self_attn.q_proj"], [], {"model.layers.0.self_attn.q_proj"}),
        (
            ["*.0.*.q_proj", "*.1.*.k_proj"],
            [],
            {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"},
        ),
        (["lm_head"], [], {"lm_head"}),
        (["*.q_proj", "*embed*"], ["*.1.*"], {"model.layers.0.self_attn.q_proj", "model.embed_tokens"}),
        (["lm_head", "*.q_proj"], ["lm_*", "*.1.*"], {"model.layers.0.self_attn.q_proj"}),
        (["lm_head", "*.0.*.q_proj"], ["*_head"], {"model.layers.0.self_attn.q_proj"}),
    ],
)
def test_patterns_choose_sites(include, exclude, expected):
    assert names(make_space(include=include, exclude=exclude)) == expected


@pytest.mark.parametrize("pattern", ["*", "**", "?*", "model.*", "*.*", "model.?*"])
def test_a_bare_wildcard_leaves_the_embeddings_alone(pattern):
    assert not names(make_space(include=[pattern, "*.q_proj"])) & {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("pattern", ["lm_head", "model.embed_tokens", "*embed_tokens"])
def test_a_tied_matrix_is_named_by_either_of_its_modules(pattern):
    sites = find_sites(common.architecture("llama-tied").build())
    assert names(make_space(sites, include=[pattern])) == {"lm_head"}
    assert not names(make_space(sites, include=["*"], exclude=[pattern])) & {"lm_head"}


def test_a_table_takes_only_methods_without_statistics():
    space = make_space(include=["model.embed_tokens"])
    assert space.methods == ["svd"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"include": ["*.w_proj"]}, ["*.w_proj", "16 sites", "model.layers.0.self_attn.q_proj"]),
        ({"include": []}, ["include=[]"]),
        ({"exclude": ["*"]}, ["exclude=['*']"]),
        ({"rank_multiple": 64}, ["rank_multiple", "64"]),
        ({"include": ["model.embed_tokens"], "methods": ["svd-llm"]}, ["svd-llm"]),
    ],
)
def test_an_empty_space_is_refused_in_one_line(settings, said):
    with pytest.raises(InputError, match="the space is empty") as caught:
        make_space(**settings)
    assert all(part in str(caught.value) for part in said)
    assert "\n" not in str(caught.value)


def test_an_empty_space_of_tables_does_not_blame_the_ranks():
    """What a method cannot treat is not mended by a finer grid of ranks."""
    with pytest.raises(InputError) as caught:
        make_space(include=["model.embed_tokens"], methods=["svd-llm"])
    assert "embedding" in str(caught.value)


def test_options_are_what_the_methods_offer():
    space = make_space(include=["*", "lm_head"])
    grid = Grid(KEEP, 2)
    for site, choices in space.choices.items():
        for method in choices.methods:
            offered = get_method(method).options(site, grid)
            assert {level: choices.options[method, level] for level in KEEP} == offered
    wanted = space.wanted()
    assert all(len(options) == len(set(options)) for options in wanted.values())
    assert {site: set(options) for site, options in wanted.items()} == {
        site: set(choices.options.values()) for site, choices in space.choices.items()
    }


def test_rules_narrow_methods_and_levels():
    """The last rule that matches wins, key by key."""
    rules = [
        {"match": "*.v_proj", "methods": ["svd-llm"]},
        {"match": "*.1.*", "keep": [0.6]},
        {"match": "*.1.*.v_proj", "methods": ["svd", "asvd"]},
    ]
    choices = {site.name: found for site, found in make_space(rule=rules).choices.items()}
    every = ("svd", "asvd", "fwsvd", "svd-llm")
    assert choices["model.layers.0.self_attn.q_proj"].methods == every
    assert choices["model.layers.0.self_attn.q_proj"].keep == KEEP
    assert choices["model.layers.0.self_attn.v_proj"].methods == ("svd-llm",)
    assert choices["model.layers.0.self_attn.v_proj"].keep == KEEP
    assert choices["model.layers.1.self_attn.v_proj"].methods == ("svd", "asvd")
    assert choices["model.layers.1.self_attn.v_proj"].keep == (0.6,)
    assert choices["model.layers.1.self_attn.q_proj"].methods == every


def test_dense_is_open_everywhere():
    for choices in make_space().choices.values():
        for method in choices.methods:
            assert choices.option(method, 1.0) == DENSE_OPTION


@pytest.mark.parametrize("groups", [0, 1, 2, 3, 4, 8, 100])
def test_variables_cover_each_site_once(groups):
    space = make_space(deep_sites(), groups)
    covered = [name for variable in space.variables for name in sites_of(variable)]
    assert len(covered) == len(set(covered))
    assert set(covered) == names(space)
    labels = [variable.name for variable in space.variables]
    assert len(labels) == len(set(labels))
    bands = {0: 8, 100: 8}.get(groups, groups)
    assert len(space.variables) == bands * len(KINDS)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_a_group_is_one_kind_in_a_band_of_depth(groups):
    space = make_space(deep_sites(), groups)
    place = {site.name: where for site, where in space.sites.items()}
    for variable in space.variables:
        assert len({place[name].kind for name in sites_of(variable)}) == 1
        blocks = [place[name].block for name in sites_of(variable)]
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
        assert abs(len(blocks) - 8 / groups) < 1


def test_sites_that_differ_in_choices_get_variables_of_their_own():
    rules = [{"match": "*.3.*.v_proj", "methods": ["svd-llm"]}]
    space = make_space(deep_sites(), 1, rule=rules)
    groups = [variable for variable in space.variables if sites_of(variable)[0].endswith("v_proj")]
    assert sorted(len(sites_of(variable)) for variable in groups) == [1, 7]
    assert len({variable.name for variable in groups}) == 2


def test_embeddings_are_variables_of_their_own():
    space = make_space(deep_sites(), 1, include=["*", "lm_head", "model.embed_tokens"])
    alone = [variable for variable in space.variables if len(sites_of(variable)) == 1]
    assert {variable.name for variable in alone} == {"lm_head", "model.embed_tokens"}


@pytest.mark.parametrize("groups", [0, 2])
def test_anchors_give_uniform_plans(groups):
    """Every site takes the anchor's method at the anchor's level."""
    space = make_space(deep_sites(3), groups)
    anchors = space.anchors([0.9, 0.5])
    assert [anchor.label for anchor in anchors] == [
        "dense",
        *(f"{method} keep={keep}" for keep in (0.8, 0.5) for method in sorted(space.methods)),
    ]
    for anchor in anchors:
        plan = ask(space, space.anchor_parameters(anchor))
        for site in space.choices:
            offered = get_method(anchor.method).options(site, Grid(KEEP, 2)) if anchor.method != "dense" else {}
            assert plan.option(site.name) == offered.get(anchor.keep, DENSE_OPTION)
        assert bool(plan.choices) == (anchor.method != "dense")


def test_an_anchor_under_a_rule_takes_what_the_site_offers():
    rules = [{"match": "*.v_proj", "methods": ["svd-llm", "asvd"]}, {"match": "*.q_proj", "keep": [0.6]}]
    space = make_space(deep_sites(3), 2, rule=rules)
    (anchor,) = [anchor for anchor in space.anchors([0.5]) if anchor.method == "svd"]
    plan = ask(space, space.anchor_parameters(anchor))
    site = {site.name: site for site in space.choices}
    value, query = "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.q_proj"
    assert plan.option(value) == get_method("svd-llm").options(site[value], Grid(KEEP, 2))[0.5]
    assert plan.option(query) == get_method("svd").options(site[query], Grid((0.6,), 2))[0.6]


def test_anchor_draws_are_draws_that_a_sampler_makes():
    """What is enqueued names exactly the parameters that suggesting draws."""
    space = make_space(deep_sites(3), 2, rule=[{"match": "*.v_proj", "methods": ["svd"]}])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = study.ask()
    space.suggest(drawn, {})
    for anchor in space.anchors([0.5]):
        assert space.anchor_parameters(anchor).keys() == drawn.params.keys()
        assert space.decode(space.anchor_parameters(anchor)) == ask(space, space.anchor_parameters(anchor))


def test_draws_name_only_offered_options():
    space = make_space(deep_sites(3), 0, include=["*", "lm_head", "model.embed_tokens"])
    offered = {site.name: set(options) for site, options in space.wanted().items()}
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        for name, option in space.suggest(study.ask(), {}).choices:
            assert option in offered[name]


def test_an_anchor_between_levels_is_the_nearest_once():
    labels = [anchor.label for anchor in make_space(methods=["svd"]).anchors([0.9, 0.85, 0.7, 0.1])]
    assert labels == ["dense", "svd keep=0.8", "svd keep=0.3"]


def test_anchors_are_no_more_with_several_numbers_of_bits():
    """But for the dense weight in each. What is offered in fewer bits alone has its anchors in these."""
    methods, sites = ["svd-llm"], deep_sites(3)
    plain, both, narrow = (make_space(sites, methods=methods, bits=bits) for bits in ([16], [16, 4], [4]))
    assert {anchor.method for anchor in plain.anchors([0.5])} == {"dense", "svd-llm"}
    assert {anchor.method for anchor in both.anchors([0.5])} == {"dense", "svd-llm", "gptq-int4"}
    assert {anchor.method for anchor in narrow.anchors([0.5])} == {"dense", "svd-llm-int4", "gptq-int4"}


@pytest.mark.parametrize("seed", range(3))
def test_encoding_a_plan_and_decoding_it_are_each_others_inverse(seed):
    space = make_space(groups=0)
    chooser = random.Random(seed)
    plan = Plan.of({site.name: chooser.choice([DENSE_OPTION, *options]) for site, options in space.wanted().items()})
    assert space.decode(space.encode(plan)) == plan
    assert space.encode(space.decode({})) == dict.fromkeys(space.options, 0)
    with pytest.raises(ValueError, match="tied"):
        make_space(groups=2).encode(plan)


def test_untying_makes_another_space():
    space = make_space(deep_sites(3), 1)
    kinds = [variable.name for variable in space.variables]
    worst = next(iter(space.choices)).name
    untied = space.untied({worst: {"some option": 1.0}}, 1)
    assert [variable.name for variable in space.variables] == kinds
    alone = {variable.name for variable in untied.variables} - set(kinds)
    assert alone == {site.name for site in space.choices if site.name.endswith(worst.partition("layers.0.")[2])}


# -- sites that share weights


def test_general_samplers_never_treat_a_weight_twice():
    """They draw every variable; where draws overlap, the larger site keeps its weights."""
    space = make_space()
    singles = {site.name: site for site in space.choices}
    pair = [singles[f"model.layers.0.{kind}"] for kind in list(KINDS)[:2]]
    joint = type(pair[0])("model.layers.0.pair", tuple(weight for site in pair for weight in site.weights))
    option = next(iter(space.choices[pair[0]].options.values()))
    space.choices[joint] = space.choices[pair[0]]
    drawn = dict.fromkeys([*singles, joint.name], option)
    kept = space.disjoint(Plan.of(drawn)).by_site
    assert set(kept) == set(drawn) - {site.name for site in pair}
    assert set(space.disjoint(Plan.of(drawn | {joint.name: DENSE_OPTION})).by_site) == set(singles)
    check_disjoint([site for site in space.choices if site.name in kept])
    with pytest.raises(
        InputError, match=r"treats 'model.layers.0.* twice, at 'model.layers.0.*leave one of them dense"
    ):
        check_disjoint([joint, pair[1]])
