"""What a search measures before its sampler proposes: plans of the front that its menu predicts, anchors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import moocore
import numpy as np

from rankfront.search.optimise.candidates import corrected
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.plans.menu import Menu
from rankfront.search.plans.space import Anchor, Space
from rankfront.search.plans.variables import Parameters
from rankfront.search.tuning import TUNING


def opening_budgets(targets: Iterable[float], dense: float) -> list[float]:
    """Sizes at which the predicted front is measured, falling, for a model of the size ``dense``: the ``targets`` down
    to the least of `Tuning.opening_fractions`, or where all are smaller every one of them, and what of these fractions
    has no target nearby."""
    every, keeps = sorted(targets, reverse=True), TUNING.opening_fractions
    opened = [target for target in every if target >= math.floor(min(keeps) * dense)] or every
    lonely = [keep for keep in keeps if all(abs(target / dense - keep) > TUNING.opening_nearby for target in opened)]
    return sorted([*opened, *(keep * dense for keep in lonely)], reverse=True)


def warm_start(predictor: Predictor, budgets: Iterable[float]) -> Iterator[tuple[str, Parameters]]:
    """(label, draws) of the front that the menu and slopes so far predict, at ``budgets`` in stored values, every cost
    weighed alike: of what may meet the study's limits."""
    even = predictor.menu.even
    for budget in budgets:
        if budget >= even.least:
            chosen = even.decode(corrected(predictor, budget, even))
            if predictor.may_meet(chosen):
                yield f"keep={budget / even.dense:.3g}", predictor.space.encode(chosen)


def anchors_to_beat(menu: Menu, space: Space, fractions: Sequence[float]) -> list[Anchor]:
    """The anchors that ``menu`` knows nothing of, or predicts no other to be as small and as good as, all costs weighed
    alike: by each cost apart, few would be."""
    anchors, menu = space.anchors(fractions), menu.even
    found = [menu.encode(space.decode(space.anchor_parameters(anchor))) for anchor in anchors]
    known = np.array([(menu.size(places), menu.divergence(places)) for places in found if places is not None])
    kept = iter(moocore.is_nondominated(known, keep_weakly=False))
    return [anchor for anchor, places in zip(anchors, found, strict=True) if places is None or next(kept)]
