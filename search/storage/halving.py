"""Successive halving over healing: which plans enter at a size, and what every rung may spend.

Of n plans all are healed a little, the best n/η go on from the state that they have, and so on; the last one gets what
is left. Source: successive halving (1502.07943), here over tokens of training, with states that are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankfront.methods import InputError, describe_methods, whole_name
from rankfront.search.constraint import Constraint
from rankfront.search.storage.front import Row
from rankfront.search.storage.picking import holds

CLASS = 0.9  # of the largest plan within a size: smaller ones are of another size; guess


@dataclass(frozen=True)
class Rung:
    """How many ``plans`` are healed in it, for ``tokens`` each."""

    plans: int
    tokens: int


def rungs(tokens: int, entrants: int, eta: int, first: int | None) -> list[Rung]:
    """``tokens`` in all spread over rungs that ``entrants`` plans go through.

    A rung gives each of its plans ``eta`` times what the one before did, beginning with ``first``, by default so that
    all rungs cost the same; the last one has one plan and the rest. `InputError` where that is less than the plan had
    in the rung before.
    """
    plans = [entrants]
    while plans[-1] > 1:
        plans.append(max(1, plans[-1] // eta))
    if first is None:
        first = tokens // (len(plans) * entrants)
    found = [Rung(count, first * eta**number) for number, count in enumerate(plans[:-1])]
    left = tokens - sum(rung.plans * rung.tokens for rung in found)
    if found and left < found[-1].tokens:
        raise InputError(
            f"heal.tokens is {tokens}, and {entrants} entrants that begin with {first} each leave {max(0, left)} for"
            f" the last rung, less than the {found[-1].tokens} that its plan had in the rung before: give more"
            " heal.tokens, or set fewer heal.entrants or a smaller heal.first_rung"
        )
    return [*found, Rung(1, left)]


def entrants_of(
    rows: Sequence[Row], front: set[int], size: Constraint, loss: str, weights: Mapping[str, int], most: int
) -> list[Row]:
    """Of ``rows``, those that enter at a ``size``, ``most`` at most: by family the one of the least ``loss``, best
    first; then members of the ``front``, the nearest below the size first; then the others, best first.

    ``weights`` are the values of every site in the dense model.
    """
    within = [row for row in rows if row.plan.choices and holds(row, size)]
    largest = max((row.figure(size.figure) for row in within), default=0.0)
    near = sorted(
        (row for row in within if row.figure(size.figure) >= CLASS * largest), key=lambda row: row.values[loss]
    )
    best: dict[str, Row] = {}
    for row in near:
        best.setdefault(family_of(row, weights), row)
    members = sorted((row for row in near if row.number in front), key=lambda row: -row.figure(size.figure))
    by_plan = {row.plan_key: row for row in (*best.values(), *members, *near)}
    return list(by_plan.values())[:most]


def family_of(row: Row, weights: Mapping[str, int]) -> str:
    """The family whose methods treat most of the values that the plan treats."""
    families = {method["name"]: method["family"] for method in describe_methods()}
    treated: Counter[str] = Counter()
    for site, option in row.plan.choices:
        treated[families[whole_name(option.method)]] += weights[site]
    return treated.most_common(1)[0][0]
