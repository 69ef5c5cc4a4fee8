"""What a study has found: everything that is shown of it, from one reading of its storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.config import StudyConfig
from rankfront.search.constraint import Constraint
from rankfront.search.inputs.known_sites import Sites, known_sites
from rankfront.search.optimise.accuracy import Calibration, calibration_of
from rankfront.search.output.control_check import front_warning
from rankfront.search.plans.latency_table import Calibrated, timings_of
from rankfront.search.plans.space import Space
from rankfront.search.storage import front as fronts
from rankfront.search.storage.front import Box, Row, StudyState
from rankfront.search.storage.healed import Healed, HealedFront, healed_front
from rankfront.search.storage.picking import best_meeting, holding, meeting


@dataclass(frozen=True)
class Results:
    """A study as it was when it was read.

    Attributes:
        config: the study, with the grid of ranks that its first launch found.
        path: its run folder.
        state: its trials and attributes.
        damages: records whose checksum does not match and that the next launch measures again, such as ``trial 3``.
    """

    config: StudyConfig
    path: Path
    state: StudyState
    damages: list[str]

    @property
    def rows(self) -> Sequence[Row]:
        """Every trial, in order."""
        return self.state.rows

    @cached_property
    def members(self) -> list[Row]:
        """The non-dominated trials, best in the first objective first."""
        return fronts.front_of(self.rows)

    def front(self, *constraints: str) -> list[Row]:
        """The `members` that meet ``constraints`` and the study's own."""
        return holding(self.members, self._limits(constraints))

    @cached_property
    def healed(self) -> HealedFront:
        """What was healed of them."""
        return healed_front(self.state)

    def healed_front(self, *constraints: str) -> list[Row]:
        """The healed plans that no other healed plan dominates, those that meet ``constraints`` and the study's own.

        Their figures are those after healing."""
        return holding(self.healed.front, self._limits(constraints))

    def healed_hypervolume(self) -> float:
        """The share of the box that the front of healed plans dominates."""
        return fronts.hypervolume(self.healed_front(), self.box)

    def pick_healed(self, constraints: Sequence[str] = (), trial: int | None = None, knee: bool = False) -> Healed:
        """A healed plan: of ``trial``, or of those that meet ``constraints`` and the study's own the best in the first
        objective, or the ``knee`` of their front, by figures after healing. `InputError` where there is none."""
        members = self.healed.members
        if not members:
            raise InputError(
                f'run {str(self.path)!r} has no healed plan: launch it with search.heal = "front" or "halving", or'
                " export by --heal"
            )
        if trial is not None:
            if trial not in members:
                why = self.healed.failures.get(trial)
                raise InputError(
                    f"trial {trial} was not healed{'' if why is None else f' ({why})'}: healed are"
                    f" {', '.join(map(str, members))}; or export with --heal"
                )
            return members[trial]
        limits = self._limits(constraints)
        if knee:
            return members[fronts.knee(meeting(self.healed.front, limits), self.box).number]
        met = meeting([healed.row for healed in members.values()], limits)
        return members[min(met, key=lambda row: list(row.values.values())).number]

    def best(self, *constraints: str) -> Row:
        """Of the complete trials that meet ``constraints`` and the study's own, the best in the first objective.

        Raises `InputError` naming the closest trial where none does.
        """
        if not fronts.comparable(self.rows, rung=0):
            fronts.check_dense(self.rows)
        return best_meeting(self.rows, self._limits(constraints))

    def trial(self, number: int) -> Row:
        """One trial; `InputError` where it does not exist."""
        rows = {row.number: row for row in self.rows}
        if number not in rows:
            known = f"0 to {max(rows)}" if rows else "none yet"
            raise InputError(f"run {str(self.path)!r} has no trial {number}: its trials are {known}")
        return rows[number]

    def knee(self, *constraints: str) -> Row:
        """Of the `members` that meet ``constraints`` and the study's own, the nearest to the box's ideal corner."""
        box = self.box  # which names the cause where nothing was measured
        return fronts.knee(meeting(self.members, self._limits(constraints)), box)

    def _limits(self, constraints: Sequence[str]) -> list[Constraint]:
        return [Constraint.parse(text) for text in (*self.config.search.where, *constraints)]

    @cached_property
    def box(self) -> Box:
        """The box that hypervolume is measured in; `InputError` before the dense anchor is measured."""
        dense = fronts.dense_row(self.rows)
        if dense is None:
            fronts.check_dense(self.rows)
            raise InputError(f"run {str(self.path)!r} has not measured the dense model yet: launch it first")
        return fronts.box_of(self.config.objectives, dense)

    def hypervolume(self) -> float:
        """The share of the box that the front dominates."""
        return fronts.hypervolume(self.front(), self.box)

    @property
    def dense_report(self) -> dict[str, Any] | None:
        """What was measured of the dense model on the report split."""
        return next((row.report for row in self.rows if row.is_dense and row.report), None)

    def warning(self, rows: Sequence[Row]) -> str | None:
        """One line where some of ``rows`` lose on the control text what the report split does not show."""
        return front_warning(rows, self.dense_report, self.config.data.control.label)

    def calibration(self) -> Calibration | None:
        """How well our sampler's predictions held; None where there are too few, or another sampler ran."""
        return calibration_of(self.config, self.rows)

    def latency(self) -> dict[str, Calibrated]:
        """How well the latency table predicted, for every latency among the objectives that has one."""
        rows = [row for row in self.rows if row.state == "complete"]
        tables = timings_of(self.config.objectives, self.state.known)
        return {
            name: timing.calibrated(objective, [(row.plan_to_show, row.values[name]) for row in rows])
            for name, (objective, timing) in tables.items()
        }

    @property
    def latency_failure(self) -> str | None:
        """Why there is no latency table, where making it failed; the next launch tries again."""
        failure: str | None = self.state.known.get(keys.TIMING, {}).get(keys.FAILURE)
        return failure

    @cached_property
    def sites(self) -> Sites:
        """The sites of the study's model."""
        return known_sites(self.state.known, self.config.model)

    @property
    def space(self) -> Space:
        """What our sampler chooses from: a variable for each site."""
        return Space(self.sites, self.config.space, 0)
