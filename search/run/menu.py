"""The jobs that a study's menu is measured in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.menu_jobs import GROUPED, group_plans, menu_jobs
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Space
from rankfront.search.tuning import TUNING


class MenuJobs:
    """Which jobs a menu is measured in, of a study that knows so much of it. Their records are its attributes.

    Args:
        study: where the records are kept.
        space: what the menu is of.
        source: ``search.menu``.
    """

    def __init__(self, study: optuna.Study, space: Space, source: str) -> None:
        self.study = study
        self.space = space
        self.source = source

    def missing(self, known: Mapping[str, Any]) -> list[Job]:
        """Those without a record, as far as is ``known``: the first job decides how many there are."""
        plans = self._plans(known.get(keys.menu_part(0)))
        return [Job("menu", part, plan) for part, plan in enumerate(plans) if keys.menu_part(part) not in known]

    def finish(self, part: int, record: Record, known: Mapping[str, Any]) -> None:
        """Keep what a job measured; `InputError` where it failed."""
        if keys.FAILURE in record:
            advice = "give a trial more memory, or set" if keys.LOST in record else "set"
            raise InputError(
                f"the menu could not be made by {self.source!r} ({record[keys.FAILURE]}): {advice} search.menu to"
                " another"
            )
        first = known.get(keys.menu_part(0), record if part == 0 else None)
        self.study.set_user_attr(keys.menu_part(part), record | {"jobs": len(self._plans(first))})

    def _plans(self, first: Record | None) -> list[Plan]:
        """The plan of each job: dense, but where a group is probed, which the ``first`` job's record decides on."""
        plans = [Plan(())] * menu_jobs(self.source, len(self.space.choices))
        if self.source == GROUPED and first is not None:
            plans += group_plans(self.space.bands(TUNING.group_bands), self.space.wanted(), first["predictions"])
        return plans
