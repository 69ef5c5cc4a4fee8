"""Fill the factor store: calibrate the dense model and factor every site for the options of a space."""

from __future__ import annotations

from typing import Any

from rankfront.methods import Site, get_method
from rankfront.search.factors.calibration import calibrate
from rankfront.search.factors.failures import Failures
from rankfront.search.factors.store import FactorStore
from rankfront.search.inputs.device import DTYPES
from rankfront.search.inputs.model import load_model
from rankfront.search.inputs.own_text import Progress
from rankfront.search.inputs.sites import weights_at
from rankfront.search.measure.setup import Setup
from rankfront.search.plans.space import Space


def prepare_store(setup: Setup, space: Space, progress: Progress, anew: bool = False) -> FactorStore:
    """The study's store, once whatever it lacks for ``space`` is calibrated and factored, or with ``anew`` all of it.

    Weights are factored as the checkpoint has them; calibration runs in the evaluation dtype.
    """
    store = setup.store()
    missing = space.wanted() if anew else store.missing(space.wanted())
    if not missing:
        return store
    store.drop_partials(space.methods)
    progress("load", 0, 1)
    weights_from = load_model(setup.source, "auto", setup.device)
    dtype = DTYPES[setup.dtype]
    same = next(weights_from.parameters()).dtype == dtype
    model = weights_from if same else load_model(setup.source, dtype, setup.device)
    progress("load", 1, 1)

    done = 0

    def factor(site: Site, statistics: dict[str, Any]) -> None:
        nonlocal done
        weights = weights_at(weights_from, site)
        store.prepare(site, missing[site], weights, statistics, anew)
        done += 1
        progress("factor", done, len(missing))

    needy = [site for site, options in missing.items() if any(get_method(o.method).needs for o in options)]
    needs = frozenset(n for options in missing.values() for o in options for n in get_method(o.method).needs)
    for site in missing.keys() - set(needy):
        factor(site, {})
    if needy:
        windows = setup.tokens["calibrate"]
        failures = Failures()

        def seen(done: int, total: int) -> None:
            progress("calibrate", done, total)

        measured = calibrate(model, windows, needy, needs, seen, failures=failures, task=setup.task)
        for site, statistics in measured:
            factor(site, statistics)
        for site in needy:
            if site.name in failures:
                store.leave(site, missing[site], failures[site.name])
    return store
