"""What the report split does not show: a plan may lose more on a second corpus of another domain.

A plan calibrated, searched and reported on one text may lose more elsewhere than its figures say. The excess loss of a
plan on a text is log perplexity(plan) − log perplexity(dense), in nats a token; that on the control text is compared
with that on the report split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rankfront.search.attributes import Report
from rankfront.search.storage.front import Row

BEYOND = 2.0  # times the excess on the report split that the control text may lose without a word
NOTABLE = 0.02  # nats; guess: smaller differences between texts are noise of a few windows


def excess(report: Report, dense: Report, name: str) -> float | None:
    """Nats a token that a plan loses against dense: ``perplexity`` on the report split, ``control`` on the other text.

    Infinite where the plan's perplexity there was not finite; None where either was not measured.
    """
    if f"{name}_failure" in report:
        return math.inf
    if not (report.get(name) and dense.get(name)):
        return None
    return math.log(report[name] / dense[name])


def hidden_loss(report: Report, dense: Report) -> float | None:
    """How many times the excess on the report split a plan loses on the control text, where that is beyond `BEYOND`.

    Infinite where the report split shows no loss at all; None where nothing is hidden or was not measured.
    """
    shown, other = (excess(report, dense, name) for name in ("perplexity", "control"))
    if shown is None or other is None or other < NOTABLE or other <= BEYOND * max(shown, 0.0):
        return None
    return other / shown if shown > 0 else math.inf


def warning(report: Report | None, dense: Report | None, control: str) -> str | None:
    """One line where the control text called ``control`` lost what the report split hides; else None."""
    if report is None or dense is None or (times := hidden_loss(report, dense)) is None:
        return None
    more = f"{times:.1f} times as much as" if math.isfinite(times) else "and nothing"
    figure = f"{report['control']:.4g}" if "control" in report else report["control_failure"]
    return (
        f"loses on {control} {more} on the report split: perplexity {figure} there (dense {dense['control']:.4g}),"
        f" {report['perplexity']:.4g} on the report split (dense {dense['perplexity']:.4g})"
    )


def front_warning(rows: Sequence[Row], dense: Report | None, control: str) -> str | None:
    """One line on the members of a front that lose what the report split hides, the worst named; else None."""
    found = []
    for row in rows:
        line = warning(row.report, dense, control)
        if line is not None and row.report and dense:
            found.append((hidden_loss(row.report, dense) or 0.0, row.number, line))
    if not found:
        return None
    _, number, line = max(found)
    return f"{len(found)} of {len(rows)} members lose far more than their figures say: trial {number} {line}"
