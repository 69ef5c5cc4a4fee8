"""What a search measures before its sampler proposes: plans of the front that its menu predicts, anchors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import moocore
import numpy as np

from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.solvers import corrected
from rankfront.search.plans.menu import Menu
from rankfront.search.plans.space import Anchor, Space
from rankfront.search.plans.variables import Parameters

# Kept fractions of the treated weights at which the predicted front is measured, where no target is nearby: where they
# are few of those that an objective counts, targets are far apart. The reference plan, at `REFERENCE` or as near as
# limits allow, comes first: slopes around it say of every site what it does in a compressed model, and the others are
# solved for by that. All guesses.
WARM_START = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
REFERENCE = 0.6
NEARBY = 0.05  # kept fraction


def opening_budgets(targets: Iterable[float], dense: float) -> list[float]:
    """Sizes at which the predicted front is measured, falling, for a model of the size ``dense``: the ``targets`` down
    to the least of `WARM_START`, or where all are smaller every one of them, and what of it has no target `NEARBY`."""
    every = sorted(targets, reverse=True)
    opened = [target for target in every if target >= math.floor(WARM_START[-1] * dense)] or every
    lonely = [keep for keep in WARM_START if all(abs(target / dense - keep) > NEARBY for target in opened)]
    return sorted([*opened, *(keep * dense for keep in lonely)], reverse=True)


def warm_start(predictor: Predictor, space: Space, budgets: Iterable[float]) -> Iterator[tuple[str, Parameters]]:
    """(label, draws) of the front that the menu and slopes so far predict, at ``budgets`` in stored values, every cost
    weighed alike: of what may meet the study's limits."""
    even = predictor.menu.even
    solved = corrected(predictor, menu=even)
    for budget in budgets:
        if budget >= even.least:
            chosen = even.decode(solved.solve(budget))
            if predictor.may_meet(chosen):
                yield f"keep={budget / even.dense:.3g}", space.encode(chosen)


def reference_first(budgets: Iterable[float], dense: float) -> list[float]:
    """``budgets`` by how far they are from `REFERENCE`."""
    return sorted(budgets, key=lambda budget: abs(budget / dense - REFERENCE))


def anchors_to_beat(menu: Menu, space: Space, fractions: Sequence[float]) -> list[Anchor]:
    """The anchors that ``menu`` knows nothing of, or predicts no other to be as small and as good as."""
    anchors = space.anchors(fractions)
    found = [menu.encode(space.decode(space.anchor_parameters(anchor))) for anchor in anchors]
    known = np.array([(*menu.costs(places), menu.divergence(places)) for places in found if places is not None])
    kept = iter(moocore.is_nondominated(known, keep_weakly=False))
    return [anchor for anchor, places in zip(anchors, found, strict=True) if places is None or next(kept)]
