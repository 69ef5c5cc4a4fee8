"""Where the menu's predictions come from: the gradient, the spectrum, or the spectrum scaled by measured probes.

A source is measured in jobs, and each job's record is kept with the study (see `plans.menu_jobs`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression
from torch import Tensor

from rankfront.methods import Option, Site, get_method
from rankfront.objectives import CAUSAL, Task, score, teach
from rankfront.search.factors.calibration import Progress
from rankfront.search.factors.failures import Failures
from rankfront.search.factors.gradient import PASS_TOKENS, quadratic_divergence
from rankfront.search.factors.store import FactorStore
from rankfront.search.plans.job import Record
from rankfront.search.plans.menu import TINY, Predictions
from rankfront.search.plans.menu_jobs import GROUPED, probe_options
from rankfront.search.tuning import TUNING

MENU_TOKENS = 2048  # of the search split, for the gradient's predictions
PROBE_TOKENS = 512  # for each probe; LEMS spends about 3,000


def predict(
    model: Any,
    apply: Callable[[Site, Option], None],
    windows: Tensor,
    wanted: Mapping[Site, Sequence[Option]],
    store: FactorStore,
    source: str,
    seed: int,
    progress: Progress = lambda done, total: None,
    task: Task = CAUSAL,
) -> Record:
    """``predictions``, site name -> option label -> predicted divergence, from ``source``; the ``tokens`` that took.

    What cannot be predicted is ``unscored``, with the reason. ``model`` is dense, ``apply`` makes it dense but for one
    option, ``windows`` (W, L) are of the search split.
    """
    length, failures = windows.shape[1], Failures()
    if source in ("gradient", GROUPED):
        used = windows[: max(1, MENU_TOKENS // length)]
        found = quadratic_divergence(model, used, wanted, store, seed, progress, failures, task)
        return {"predictions": found, "tokens": PASS_TOKENS * used.numel(), "unscored": failures}
    spectrum = spectrum_predictions(wanted, store, failures)
    if source == "spectrum":
        return {"predictions": spectrum, "tokens": 0, "unscored": failures}
    used = windows[: max(1, PROBE_TOKENS // length)]
    probed = probe_options(wanted, TUNING.probe_fractions[source])
    probes, tokens = measure_probes(model, apply, used, probed, failures, task)
    scaled = {site: found for site, found in scaled_predictions(spectrum, probes).items() if site not in failures}
    return {"predictions": scaled, "tokens": tokens, "unscored": failures}


def measure_probes(
    model: Any,
    apply: Callable[[Site, Option], None],
    windows: Tensor,
    options: Mapping[Site, Sequence[Option]],
    failures: Failures,
    task: Task = CAUSAL,
) -> tuple[dict[str, dict[str, float]], int]:
    """Measured divergence of each option alone on the same ``windows`` (W, L), and the tokens that took.

    Sites that cannot be run so are named in ``failures``."""
    teacher = teach(model, windows, task=task)
    probes: dict[str, dict[str, float]] = {}
    tokens = windows.numel()
    for site, chosen in options.items():
        with failures.sparing(site.name):
            for option in chosen:
                apply(site, option)
                scores = score(model, windows, teacher, task)
                probes.setdefault(site.name, {})[option.label] = scores.divergence
                tokens += scores.tokens
    return probes, tokens


def spectrum_predictions(
    wanted: Mapping[Site, Iterable[Option]], store: FactorStore, failures: Failures
) -> dict[str, dict[str, float]]:
    """Tail energy over whole energy in each method's own metric: free, unit-less, comparable within a method.

    Sites without are named in ``failures``."""
    result: dict[str, dict[str, float]] = {}
    for site, options in wanted.items():
        tails = {}
        with failures.sparing(site.name):
            for option in options:
                prepared = store.load(site, option)
                whole = float(prepared["energy"].double().sum())
                tail = get_method(option.method).error(prepared, option)
                tails[option.label] = tail / max(whole, TINY)
            result[site.name] = tails
    return result


def scaled_predictions(spectrum: Predictions, probes: Predictions) -> dict[str, dict[str, float]]:
    """The spectrum's tails scaled by measured divergences, between probes by a straight line in logarithms.

    With one probe at r_ref this is LEMS' score d(r) = KL(r_ref) · tail(r) / tail(r_ref); with several, Maestro's
    estimator: an isotonic fit of log KL over the probes, which takes their noise out, then the factor KL / tail
    interpolated in the logarithm of the tail and kept beyond the ends.
    """
    result: dict[str, dict[str, float]] = {}
    for site, tails in spectrum.items():
        measured = probes.get(site, {})
        for method in {label.split(" ")[0] for label in tails}:
            own = {label: max(tail, TINY) for label, tail in tails.items() if label.split(" ")[0] == method}
            knots = sorted(
                (np.log(own[label]), np.log(max(measured[label], TINY))) for label in own if label in measured
            )
            if not knots:
                continue
            at, measured_logs = np.array(knots).T
            logs = isotonic_regression(measured_logs).x
            for label, tail in own.items():
                factor = np.interp(np.log(tail), at, logs - at)
                result.setdefault(site, {})[label] = float(tail * np.exp(factor))
    return result
