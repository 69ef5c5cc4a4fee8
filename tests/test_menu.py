"""The menu: what every option of every site costs, and is predicted to hurt."""

import itertools
import math

import common
import numpy as np
import pytest

from rankfront.methods import DENSE_OPTION, Grid, Option, Site, Weight, get_method
from rankfront.search.factors.failures import Failures
from rankfront.search.measure.predictions import scaled_predictions, spectrum_predictions
from rankfront.search.plans.menu import TINY, make_menu, values_stored
from rankfront.search.plans.menu_jobs import probe_options
from rankfront.search.plans.plan import Plan

GRID = Grid((0.2, 0.4, 0.6, 0.8), 2)
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}


def make_site(name):
    return Site(name, (Weight("weight", name, *SHAPES[name]),))


SITES = {name: make_site(name) for name in SHAPES}
WANTED = {
    site: [option for method in ("svd", "svd-llm") for option in get_method(method).options(site, GRID).values()]
    for site in SITES.values()
}


def random_predictions(seed):
    """Site -> label -> a positive number; no order in them at all."""
    random = np.random.default_rng(seed)
    return {s.name: {o.label: float(random.exponential()) for o in options} for s, options in WANTED.items()}


def falling_tails():
    """Site -> label -> a tail that falls with rank, another for each method and site."""
    return {
        site.name: {o.label: math.exp(-0.1 * (1 + n) * o["rank"]) * (1 + len(o.method)) for o in options}
        for n, (site, options) in enumerate(WANTED.items())
    }


# -- making one


@pytest.mark.parametrize("seed", range(3))
def test_a_line_is_dense_and_then_falls_in_cost(seed):
    menu = make_menu(WANTED, random_predictions(seed))
    assert [line.site for line in menu.lines] == list(SHAPES)
    for line, (site, options) in zip(menu.lines, WANTED.items(), strict=True):
        assert line.options[0] == DENSE_OPTION
        assert line.divergence[0] == 0
        assert line.sizes[0] == site.storage.parameters
        assert set(line.options[1:]) == set(options)
        assert len(line.options) == len(options) + 1 == len(line.sizes) == len(line.divergence)
        assert (np.diff(line.sizes) <= 0).all()
        assert (line.divergence[1:] >= TINY).all()
        for option, stored in zip(line.options[1:], line.sizes[1:], strict=True):
            assert stored == get_method(option.method).storage(site, option).parameters


@pytest.mark.parametrize("seed", range(3))
def test_a_cheaper_level_of_a_method_is_never_predicted_better(seed):
    """And a prediction that already was monotone is kept as it is."""
    raw = random_predictions(seed)
    for line in make_menu(WANTED, raw).lines:
        for method in ("svd", "svd-llm"):
            own = [(o, d) for o, d in zip(line.options, line.divergence, strict=True) if o.method == method]
            expected = np.maximum.accumulate([raw[line.site][option.label] for option, _ in own])
            assert [d for _, d in own] == pytest.approx(list(expected))
    tails = falling_tails()
    for line in make_menu(WANTED, tails).lines:
        for option, divergence in zip(line.options[1:], line.divergence[1:], strict=True):
            assert divergence == pytest.approx(tails[line.site][option.label])


def test_a_prediction_of_nothing_is_not_free():
    nothing = {site.name: {option.label: 0.0 for option in options} for site, options in WANTED.items()}
    for line in make_menu(WANTED, nothing).lines:
        assert (line.divergence[1:] == TINY).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("level", range(len(GRID.keep)))
def test_a_prediction_that_is_no_number_is_not_free(level, value):
    """An option whose prediction overflowed is never as good as dense, and what is fitted to the menu stays finite."""
    predictions = random_predictions(0)
    predictions["wide"][WANTED[SITES["wide"]][level].label] = value
    line = make_menu(WANTED, predictions).lines[0]
    assert np.isfinite(line.divergence).all()
    assert (line.divergence[1:] > 0).all()


def test_options_without_a_prediction_are_left_out():
    predictions = random_predictions(0)
    lost = WANTED[SITES["wide"]][0]
    del predictions["wide"][lost.label]
    del predictions["tall"]
    menu = make_menu(WANTED, predictions)
    assert [line.site for line in menu.lines] == ["wide", "square"]
    assert lost not in menu.lines[0].options
    assert len(menu.lines[0].options) == len(WANTED[SITES["wide"]])


# -- reading one


def test_sums_are_over_the_lines():
    menu = make_menu(WANTED, random_predictions(0))
    places = [1, 0, 3]
    chosen = menu.decode(places)
    stored = sum(
        site.storage.parameters
        if chosen.option(site.name) == DENSE_OPTION
        else get_method(chosen.option(site.name).method).storage(site, chosen.option(site.name)).parameters
        for site in WANTED
    )
    assert menu.size(places) == stored
    assert menu.divergence(places) == pytest.approx(
        sum(line.divergence[place] for line, place in zip(menu.lines, places, strict=True))
    )
    assert menu.dense == menu.size([0, 0, 0]) == sum(site.storage.parameters for site in WANTED)
    assert menu.least == menu.size([len(line.options) - 1 for line in menu.lines])


def test_several_costs_are_weighed_against_each_other():
    """Alone a cost keeps its order and its shares of dense; weighed, the whole is one again; regions stay."""

    def bits(site, option):
        own = site.storage if option == DENSE_OPTION else get_method(option.method).storage(site, option)
        return own.bytes(2) + (0 if option == DENSE_OPTION else 7)

    menu = make_menu(WANTED, random_predictions(0), sizes=(values_stored, bits))
    assert menu.count == 2
    chooser = np.random.default_rng(0)
    plans = [[int(chooser.integers(len(line.options))) for line in menu.lines] for _ in range(20)]
    dense = np.array(menu.costs([0] * len(menu.lines)))
    for plan in plans:
        chosen = menu.decode(plan)
        costs = [sum(size(site, chosen.option(site.name)) for site in WANTED) for size in (values_stored, bits)]
        assert menu.costs(plan) == costs
        for weights in ([1, 0], [0, 1], [0.3, 0.7]):
            weighed = menu.weighed(weights)
            shares = np.array(weights) @ (np.array(costs) / dense)
            assert weighed.size(plan) / weighed.dense == pytest.approx(shares, abs=1e-3)
            assert (weighed.count, weighed.regions) == (1, menu.regions)
            assert [line.options for line in weighed.lines] == [line.options for line in menu.lines]
    assert make_menu(WANTED, random_predictions(0)).even.lines[0].sizes[0] == menu.lines[0].sizes[0]


def test_what_is_cheaper_by_any_cost_stays_on_the_menu():
    """As many values in fewer bytes: nothing to gain where values count alone, something where bytes do too."""
    whole = {site: options for site, options in WANTED.items() if site.name == "wide"}
    fine = make_menu(whole, random_predictions(0), sizes=(lambda site, option: 5, values_stored))
    assert len(fine.lines[0].options) == len(make_menu(whole, random_predictions(0)).lines[0].options)
    assert not make_menu(whole, random_predictions(0), sizes=(lambda site, option: 5,)).lines


@pytest.mark.parametrize("seed", range(3))
def test_encoding_a_plan_and_decoding_it_are_each_others_inverse(seed):
    menu = make_menu(WANTED, random_predictions(seed))
    random = np.random.default_rng(seed)
    places = tuple(int(random.integers(len(line.options))) for line in menu.lines)
    assert menu.encode(menu.decode(places)) == places


def test_a_site_that_a_plan_does_not_name_is_dense():
    menu = make_menu(WANTED, random_predictions(0))
    assert menu.encode(Plan(())) == (0, 0, 0)
    assert menu.encode(Plan.of({"tall": menu.lines[1].options[2]})) == (0, 2, 0)


def test_an_option_off_the_menu_has_no_place():
    menu = make_menu(WANTED, random_predictions(0))
    assert menu.encode(Plan.of({"tall": Option.of("svd", rank=1)})) is None


def test_a_treated_site_off_the_menu_has_no_place():
    """A plan that compresses an embedding without a prediction is not the plan that leaves it dense."""
    menu = make_menu(WANTED, random_predictions(0))
    assert menu.encode(Plan.of({"lm_head": DENSE_OPTION})) == (0, 0, 0)
    assert menu.encode(Plan.of({"lm_head": Option.of("svd", rank=2)})) is None


# -- predictions


def test_one_probe_scales_the_tail():
    """LEMS: d(r) = KL(r_ref) tail(r) / tail(r_ref), site by site and method by method."""
    tails, kl = falling_tails(), 0.37
    probed = {site.name: {options[1].label: kl} for site, options in WANTED.items()}
    found = scaled_predictions(tails, probed)
    for site, options in WANTED.items():
        reference = options[1]
        own = [option for option in options if option.method == reference.method]
        assert found[site.name].keys() == {option.label for option in own}  # the other method was never probed
        for option in own:
            expected = kl * tails[site.name][option.label] / tails[site.name][reference.label]
            assert found[site.name][option.label] == pytest.approx(expected)


@pytest.mark.parametrize("method", ["svd", "svd-llm"])
def test_probes_are_reproduced_and_the_ends_scaled(method):
    """At a probe the prediction is the probe; beyond the last ones it is the nearest probe's LEMS score."""
    tails = falling_tails()
    own = {s: [o for o in options if o.method == method] for s, options in WANTED.items()}  # by rising rank
    probed = {s.name: {options[1].label: 0.4, options[2].label: 0.07} for s, options in own.items()}
    found = scaled_predictions(tails, probed)
    for site, options in own.items():
        tail = [tails[site.name][option.label] for option in options]
        low, first, second, high = (found[site.name][option.label] for option in options)
        assert (first, second) == pytest.approx((0.4, 0.07))
        assert low == pytest.approx(0.4 * tail[0] / tail[1])
        assert high == pytest.approx(0.07 * tail[3] / tail[2])


def test_between_probes_is_a_straight_line_in_logarithms():
    tails = {"site": {f"svd rank={r}": math.exp(-r) for r in range(1, 6)}}
    probed = {"site": {"svd rank=1": 2.0, "svd rank=5": 2e-3}}
    found = scaled_predictions(tails, probed)["site"]
    logs = [math.log(found[f"svd rank={r}"]) for r in range(1, 6)]
    assert np.diff(logs) == pytest.approx([math.log(1e-3) / 4] * 4)


def test_probes_that_fall_out_of_order_are_made_monotone():
    """More of the tail cut off cannot hurt less: what noise turned round is pooled, in logarithms."""
    tails = {"site": {f"svd rank={r}": math.exp(-r) for r in range(1, 5)}}
    probed = {"site": {"svd rank=1": 1.0, "svd rank=2": 0.1, "svd rank=3": 0.4, "svd rank=4": 0.01}}
    found = scaled_predictions(tails, probed)["site"]
    assert [found[f"svd rank={r}"] for r in range(1, 5)] == pytest.approx([1.0, 0.2, 0.2, 0.01])


def test_a_probe_of_nothing_is_no_error():
    """Compressing a site that no output depends on measures a divergence of zero."""
    tails = falling_tails()
    probed = {site.name: {option.label: 0.0 for option in options} for site, options in WANTED.items()}
    for found in scaled_predictions(tails, probed).values():
        assert all(0 <= value <= 1e-6 for value in found.values())


def test_a_site_without_probes_has_no_scaled_prediction():
    assert scaled_predictions(falling_tails(), {"wide": {WANTED[SITES["wide"]][0].label: 0.1}}).keys() == {"wide"}


@pytest.mark.parametrize("fractions", [(0.3,), (0.3, 0.6, 0.9), (0.0, 1.0)])
def test_probes_are_the_options_nearest_in_storage(fractions):
    for site, chosen in probe_options(WANTED, fractions).items():
        assert len(chosen) == len(set(chosen))
        expected = set()
        for method in ("svd", "svd-llm"):
            ranks = {o["rank"]: o for o in WANTED[site] if o.method == method}
            (m, n), dense = SHAPES[site.name], site.storage.parameters
            for fraction in fractions:
                distance = {rank: abs(rank * (m + n) / dense - fraction) for rank in ranks}
                expected.add(ranks[min(ranks, key=distance.__getitem__)])
        assert set(chosen) == expected


def test_the_spectrums_tail_is_a_share_that_falls_with_rank(resident):
    wanted = resident.compressed.space.wanted()
    found = spectrum_predictions(wanted, resident.compressed.store, Failures())
    assert found.keys() == {site.name for site in wanted}
    for site, options in wanted.items():
        assert found[site.name].keys() == {option.label for option in options}
        assert all(0 < share <= 1 for share in found[site.name].values())
        for method in {option.method for option in options}:
            own = sorted((option for option in options if option.method == method), key=lambda o: o["rank"])
            shares = [found[site.name][option.label] for option in own]
            assert all(later < earlier for earlier, later in itertools.pairwise(shares))


def test_the_spectrums_tail_of_plain_svd_is_that_of_the_weight(resident):
    """Σ_{i > r} σ_i² / Σ σ_i², from the dense weight itself."""
    wanted = resident.compressed.space.wanted()
    found = spectrum_predictions(wanted, resident.compressed.store, Failures())
    for site, options in list(wanted.items())[:3]:
        weight = resident.compressed.dense_modules[site.name].weight.double()
        energy = np.linalg.svd(weight.numpy(), compute_uv=False) ** 2
        for option in options:
            if option.method == "svd":
                share = energy[option["rank"] :].sum() / energy.sum()
                assert found[site.name][option.label] == pytest.approx(share, rel=1e-4)


def test_a_menu_of_a_model_covers_its_space(resident):
    wanted = resident.compressed.space.wanted()
    menu = make_menu(wanted, spectrum_predictions(wanted, resident.compressed.store, Failures()))
    assert {line.site for line in menu.lines} == {site.name for site in wanted}
    treated = common.random_plan(resident, 0)
    assert menu.decode(menu.encode(treated)) == treated
