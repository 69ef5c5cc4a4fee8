"""Limits that no plan of a space can meet: said before anything is measured, with the nearest that a plan comes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from rankfront.methods import InputError, Option, Site
from rankfront.search.constraint import Constraint
from rankfront.search.plans.limits import COSTS, added, exact_figures
from rankfront.search.plans.plan import Plan, Prices

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
    """The plan of the least ``figure``: of sites that share no weight, those that save most together (set packing)."""
    best: dict[Site, tuple[float, Option]] = {}
    for site, options in wanted.items():
        saved = [(-added(figure, site, option, prices), option) for option in options]
        best[site] = max(saved, key=lambda pair: pair[0])
    sites = list(best)
    paths = {path: row for row, path in enumerate({weight.path: None for site in sites for weight in site.weights})}
    claims = [(paths[weight.path], column) for column, site in enumerate(sites) for weight in site.weights]
    rows, columns = np.array(claims).T
    claiming = csr_array((np.ones(len(claims)), (rows, columns)), shape=(len(paths), len(sites)))
    found = milp(
        -np.array([best[site][0] for site in sites]),
        integrality=np.ones(len(sites), dtype=int),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(claiming, ub=1),
    )
    if found.x is None:
        raise RuntimeError(f"the smallest plan was not found: {found.message}")
    return Plan.of({site.name: best[site][1] for site, taken in zip(sites, found.x, strict=True) if taken > 0.5})
