"""Limits that no plan of a space can meet: said before anything is measured, with the nearest that a plan comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rankfront.methods import InputError, Option, Site
from rankfront.search.constraint import Constraint
from rankfront.search.plans.limits import COSTS, added, exact_figures
from rankfront.search.plans.plan import Plan, Prices
from rankfront.search.plans.regions import regions_of

SLACK = 1e-3  # of a figure: index bits are rounded up option by option here and once in a plan, so the least is less


def check_reachable(limits: Iterable[Constraint], wanted: Mapping[Site, Iterable[Option]], prices: Prices) -> None:
    """Raise `InputError` where a limit on what plans store cannot be met by any choice of the options ``wanted``."""
    for limit in limits:
        if limit.figure not in COSTS:
            continue
        least = limit.operator.startswith("<")
        extreme = smallest(wanted, limit.figure, prices) if least else Plan(())
        nearest = exact_figures(prices.of(extreme))[limit.figure]
        if limit.missed(nearest) > SLACK:
            raise InputError(
                f"search.where has {limit}, which no plan of this space can meet: the"
                f" {'smallest' if least else 'largest'} {limit.figure} is {nearest:.4g}; change the limit, or the space"
            )


def smallest(wanted: Mapping[Site, Iterable[Option]], figure: str, prices: Prices) -> Plan:
    """The plan of the least ``figure``: of sites that share no weight, those that save most together."""
    best = {s: min(options, key=lambda option: added(figure, s, option, prices)) for s, options in wanted.items()}
    alone = dict.fromkeys(weight.path for site in best for weight in site.weights)  # as it is, a weight adds nothing
    claims = (*((path,) for path in alone), *(tuple(weight.path for weight in site.weights) for site in best))
    values = [0.0] * len(alone) + [added(figure, site, option, prices) for site, option in best.items()]
    taken = {line for region in regions_of(claims) for line in region.cover(values)}
    numbered = enumerate(best.items(), start=len(alone))
    return Plan.of({site.name: option for number, (site, option) in numbered if number in taken})
