"""Healed members of a front: what was measured of them, and which is healed next.

A healed plan is a model of its own. It has the size and speed of the plan, since healing changes no shape and no dtype,
and losses of its own; so it stands on a front of healed plans alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rankfront.search import attributes as keys
from rankfront.search.storage.front import Row, StudyState, front_of, front_rung


@dataclass(frozen=True)
class Healed:
    """A trial's plan after healing.

    Attributes:
        row: the trial with the losses and the report of the healed plan in the place of its own.
        record: ``folder``, ``tokens``, ``stages``, ``values``, ``report``, and ``weights``, a hash of what was scored;
            of a halving, ``halving`` with the size and the scores of every rung.
    """

    row: Row
    record: Mapping[str, Any]


@dataclass(frozen=True)
class HealedFront:
    """What the newest healing of a study made of its trials.

    Attributes:
        healing: its ``key``, ``settings`` and ``text``; nothing where nothing was healed.
        members: trial -> its plan after healing.
        failed: trial -> why its plan was not healed, as ``failure``; and as ``place`` where in the code that was, or
            ``lost`` where memory was short, so that it is due again.
        others: how many trials were healed otherwise alone, with other settings or on another text.
        rung: the fidelity of the front, see `front_rung`.
    """

    healing: Mapping[str, Any]
    members: Mapping[int, Healed]
    failed: Mapping[int, Mapping[str, Any]]
    others: int
    rung: int

    @property
    def failures(self) -> dict[int, str]:
        """Trial -> why its plan was not healed."""
        return {number: record[keys.FAILURE] for number, record in self.failed.items()}

    @cached_property
    def front(self) -> list[Row]:
        """The healed plans that no other healed plan dominates, best in the first objective first."""
        return front_of([healed.row for healed in self.members.values()], self.rung)

    @property
    def columns(self) -> dict[int, dict[str, Any]]:
        """Trial -> what a frame shows of its healing."""
        front = {row.number for row in self.front}
        found: dict[int, dict[str, Any]] = {n: {"healed.failure": why} for n, why in self.failures.items()}
        for number, healed in self.members.items():
            report = healed.record["report"].items()
            found[number] = {"healed.tokens": healed.record["tokens"], "healed.pareto": number in front}
            found[number] |= {f"healed.{name}": value for name, value in healed.record["values"].items()}
            found[number] |= {f"healed.report.{name}": v for name, v in report if isinstance(v, int | float | str)}
        return found


def healed_front(state: StudyState) -> HealedFront:
    """What ``state`` holds of healing."""
    healing = state.known.get(keys.HEALING, {})
    key = healing.get("key", "")
    members, failed, others = {}, {}, 0
    for row in state.rows:
        if row.state != "complete" or row.plan_key is None:
            continue
        record = state.known.get(keys.healed_of(row.plan_key, key))
        if record is None:
            others += any(name.startswith(keys.healed_of(row.plan_key, "")) for name in state.known)
        elif keys.FAILURE in record:
            failed[row.number] = record
        else:
            members[row.number] = Healed(_healed(row, record), record)
    return HealedFront(healing, members, failed, others, front_rung(state.rows))


def _healed(row: Row, record: Mapping[str, Any]) -> Row:
    measured = {name: record["values"].get(name, value) for name, value in row.values.items()}
    attributes = row.attributes | {"perplexity": record["values"]["perplexity"]}
    return replace(row, values=measured, attributes=attributes, report=record["report"])


def next_to_heal(candidates: Sequence[Row], healed: set[int], most: int) -> Row | None:
    """Of ``candidates``, members of one front, the one to heal next, or None where ``most`` are healed or all.

    The smallest first, which has lost most; then the one whose size is the farthest from those of the ``healed``.
    """
    sizes = [row.figure("parameters") for row in candidates if row.number in healed]
    left = [row for row in candidates if row.number not in healed]
    if not left or len(sizes) >= most:
        return None
    if not sizes:
        return min(left, key=lambda row: row.figure("parameters"))
    return max(left, key=lambda row: min(abs(row.figure("parameters") - size) for size in sizes))
