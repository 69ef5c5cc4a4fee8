"""What is measured last: the front on the report split, which nothing before has seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from rankfront.search import attributes as keys
from rankfront.search.config import StudyConfig
from rankfront.search.plans.job import Job, Record
from rankfront.search.run.in_flight import InFlight
from rankfront.search.storage.front import Row, StudyState, dense_row, front_of


class ReportQueue:
    """Members of the front that are to be measured on the report split still, the dense model with them; and by tasks,
    where the study names some.

    Args:
        study: which the records are kept with: a finished trial's attributes are frozen in Optuna.
        config: says what is measured.
        wanted: whether anything is.
        in_flight: what runs.
    """

    def __init__(self, study: optuna.Study, config: StudyConfig, wanted: bool, in_flight: InFlight) -> None:
        self.study = study
        self.refit = config.search.refit != "none"
        self.control = config.data.control.windows > 0
        self.tasks = config.tasks
        self.wanted = wanted
        self.in_flight = in_flight
        self.lost: set[int] = set()  # at every attempt: the next launch tries again

    def due(self, state: StudyState) -> list[Row]:
        """Those that neither run nor have all that is asked for."""
        rows = state.rows if self.wanted else []
        front = {row.number: row for row in front_of(rows) if row.within}
        dense = dense_row(rows)
        if front and dense is not None:  # which what is reported of the others is compared with
            front[dense.number] = dense
        skip = self.in_flight.reports | self.lost
        return [row for row in front.values() if row.number not in skip and not self._reported(row)]

    def next(self, state: StudyState) -> Job | None:
        """The next of them; it runs from now on."""
        for row in self.due(state):
            self.in_flight.reports.add(row.number)
            return Job("report", row.number, row.plan)
        return None

    def finish(self, number: int, record: Record) -> None:
        """Keep what was measured."""
        self.study.set_user_attr(keys.report_of(number), record)
        self.in_flight.reports.discard(number)
        if keys.LOST in record or "failure" in record.get("tasks", {}):
            self.lost.add(number)

    def _reported(self, row: Row) -> bool:
        """Whether everything that is asked for was measured on the report split."""
        report = row.report
        if report is None or keys.LOST in report:
            return False
        asked = [{"refitted", "refit_failure"}] if self.refit and row.plan.choices else [{"perplexity"}]
        if self.control:
            asked.append({"control", "control_failure"})
        return keys.FAILURE in report or (
            all(not each.isdisjoint(report) for each in asked) and (self.tasks is None or self._has_tasks(report))
        )

    def _has_tasks(self, report: Mapping[str, Any]) -> bool:
        """Whether a report has scores of the tasks that are asked for now."""
        found = report.get("tasks", {})
        return "scores" in found and found["asked"] == self.tasks
