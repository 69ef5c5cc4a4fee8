"""What our sampler optimises: the study's objectives as functions of a plan and of its log-divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rankfront.methods import DENSE_OPTION, Option, Site
from rankfront.objectives import make_objective
from rankfront.objectives.latency import Timed
from rankfront.search.attributes import BLOCK_COUNT, PARAMETER_COUNT
from rankfront.search.config import StudyConfig, quality_of
from rankfront.search.constraint import Constraint
from rankfront.search.names import inside_blocks
from rankfront.search.plans.agreed import agreeing
from rankfront.search.plans.alike import bundled
from rankfront.search.plans.job import Record
from rankfront.search.plans.latency_table import Timing, Timings
from rankfront.search.plans.menu import Menu, Size, make_menu, stored, values_stored
from rankfront.search.plans.plan import Plan, Prices, active
from rankfront.search.plans.space import Space
from rankfront.search.storage.front import Row, box_of
from rankfront.search.tuning import TUNING

NEVER = 2**62  # nanoseconds of an option that was not timed: never chosen


def sizes_of(config: StudyConfig, value_bytes: int, timings: Timings) -> list[Size]:
    """The costs among the objectives that single options add up to: stored values, bytes, values that a token reads,
    predicted times, in this order. Budgets count the first; stored values where there is none."""
    counted = bool({"parameters", "block_parameters"} & config.objectives.keys())
    found: list[Size] = [values_stored] if counted else []
    if "bytes" in config.objectives:
        found.append(lambda site, option: stored(site, option).bytes(value_bytes))
    if "active_parameters" in config.objectives:
        found.append(lambda site, option: round(active(site, option)))
    found += [partial(_nanoseconds, timing, objective) for objective, timing in timings.values()]
    return found or [values_stored]


def _nanoseconds(timing: Timing, objective: Timed, site: Site, option: Option) -> int:
    """Predicted time; nothing where the dense site was not timed either, so that no option gains any."""
    ours, dense = (timing.seconds(objective, site.name, each) for each in (option, DENSE_OPTION))
    if ours is None:
        return 0 if dense is None else NEVER
    return round(1e9 * ours)


def menu_of(config: StudyConfig, space: Space, record: Record, value_bytes: int, timings: Timings) -> Menu:
    """The menu of a study. Under latencies nothing is on it that takes no less time than dense by any of them."""

    def faster(site: Site, option: Option) -> bool:
        pairs = [[t.seconds(o, site.name, each) for each in (option, DENSE_OPTION)] for o, t in timings.values()]
        return not pairs or any(not ours or not dense or ours < dense for ours, dense in pairs)  # lookups take none

    menu = make_menu(space.wanted(), record["predictions"], sizes_of(config, value_bytes, timings), faster)
    return agreeing(menu, space.linked) if space.linked else bundled(menu, space.alike)


@dataclass(frozen=True)
class Goal:
    """What the search wants, as numbers for each plan.

    Attributes:
        loss: log-divergence of a plan -> value of the quality objective.
        log_divergence: value of the quality objective -> log-divergence.
        costs: plan -> values of the objectives that the plan alone decides, by position.
        timed: position -> a latency among the objectives, and its table.
        spread: standard deviation of a measured divergence, in nats, where a trial scores `Tuning.spread_tokens`.
        dense: value of the quality objective for the dense model.
        quality: position of the quality objective.
        perplexity: position of a perplexity beside a divergence that is modelled, and the dense model's; else None.
        count: of objectives, d.
        unit: values (N, d) -> the same in units of the box that hypervolume is measured in.
        excess: values (N, d) -> how far they miss the study's limits, (N,); 0 where they meet them.
    """

    loss: Callable[[float], float]
    log_divergence: Callable[[float], float]
    costs: Callable[[Plan], Mapping[int, float]]
    dense: float
    quality: int
    count: int
    unit: Callable[[np.ndarray], np.ndarray]
    excess: Callable[[np.ndarray], np.ndarray] = lambda values: np.zeros(len(values))
    timed: Mapping[int, tuple[Timed, Timing]] = field(default_factory=dict)
    perplexity: tuple[int, float] | None = None
    spread: float = 0.0


def prices_of(space: Space, dense: Row) -> Prices:
    """What plans of a study cost whose dense model is measured."""
    model_values, block_values = int(dense.attributes[PARAMETER_COUNT]), dense.attributes.get(BLOCK_COUNT)
    return Prices(inside_blocks(space.sites), model_values, dense.value_bytes, block_values)


def make_goal(config: StudyConfig, space: Space, dense: Row, timings: Timings) -> Goal:
    """The objectives of a study whose dense model is measured.

    Perplexity is read as divergence through its logarithm: log(perplexity / dense) is the excess loss in nats a token.
    """
    names, quality = list(config.objectives), quality_of(config)
    base = dense.values[quality] if quality == "perplexity" else None
    box = box_of(config.objectives, dense)
    objectives = [make_objective(name, settings) for name, settings in config.objectives.items()]
    prices = prices_of(space, dense)

    def loss(log_divergence: float) -> float:
        divergence = math.exp(min(log_divergence, 6.0))  # e^400 is perplexity enough
        return divergence if base is None else base * math.exp(divergence)

    def log_divergence(value: float) -> float:
        return math.log(max(value if base is None else math.log(value / base), TUNING.least_divergence))

    def costs(plan: Plan) -> dict[int, float]:
        cost = prices.of(plan)
        return {i: value for i, each in enumerate(objectives) if (value := each.from_cost(cost)) is not None}

    limits = [Constraint.parse(text) for text in config.search.where]

    def excess(values: np.ndarray) -> np.ndarray:
        columns = [[limit.missed(float(v)) for v in values[:, names.index(limit.figure)]] for limit in limits]
        return np.array(columns).sum(0) if limits else np.zeros(len(values))

    timed = {names.index(name): found for name, found in timings.items()}
    place = names.index(quality)
    beside = quality != "perplexity" and "perplexity" in names
    other = (names.index("perplexity"), dense.values["perplexity"]) if beside else None
    # A divergence is of whole distributions: no token is drawn from them.
    spread = 0.0 if base is None else TUNING.loss_spread
    return Goal(
        loss, log_divergence, costs, dense.values[quality], place, len(names), box.unit, excess, timed, other, spread
    )
