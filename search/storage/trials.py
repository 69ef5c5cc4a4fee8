"""What is written of a study's trials: queued, begun, told. Queue and trials are Optuna's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from rankfront.methods import DENSE
from rankfront.search import attributes as keys
from rankfront.search.attributes import is_void
from rankfront.search.constraint import Constraint
from rankfront.search.plans.job import Record
from rankfront.search.storage.front import StudyState


def labelled(trials: Iterable[FrozenTrial], origin: str) -> dict[str, int]:
    """Label -> number of the first trial of one origin; void ones are due again, and left out."""
    found: dict[str, int] = {}
    for trial in trials:
        known = trial.user_attrs
        if known.get(keys.ORIGIN) == origin and keys.LABEL in known and not is_void(known):
            found.setdefault(known[keys.LABEL], trial.number)
    return found


def enqueue(study: optuna.Study, params: Mapping[str, Any], attributes: Mapping[str, Any]) -> int:
    """Queue a trial; its number."""
    study.enqueue_trial(dict(params), user_attrs=dict(attributes))
    return int(study.get_trials(deepcopy=False)[-1].number)


def enqueue_missing(
    study: optuna.Study, known: dict[str, int], origin: str, label: str, params: Mapping[str, Any]
) -> int:
    """Queue a trial unless one with its label is ``known`` of its origin (see `labelled`), which it is from now on;
    which number it has, or that one."""
    if label not in known:
        known[label] = enqueue(study, params, {keys.ORIGIN: origin, keys.LABEL: label})
    return known[label]


def claim(study: optuna.Study, waiting: FrozenTrial) -> optuna.Trial:
    """A trial of the queue, which runs from now on, as `Study.ask` does with the first."""
    study._storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    return optuna.Trial(study, waiting._trial_id)


def tell_measured(study: optuna.Study, trial: optuna.Trial, record: Record, limits: Sequence[Constraint]) -> None:
    """Keep what a trial measured, its ``values`` by objective first, and by how much it misses each of ``limits``."""
    seconds = record[keys.SECONDS] | trial.user_attrs.get(keys.SECONDS, {})
    for key, value in {**record, keys.SECONDS: seconds}.items():
        if key != "values":
            trial.set_user_attr(key, value)
    for limit in limits:
        trial.set_constraint(str(limit), limit.missed(record["values"][limit.figure]))
    study.tell(trial, list(record["values"].values()))


def tell_slopes(study: optuna.Study, trial: optuna.Trial, record: Record) -> None:
    """Keep what was measured around a plan; the trial is a repetition of that plan's."""
    for key, value in record.items():
        trial.set_user_attr(key, value)
    tell_repeated(study, trial)


def tell_repeated(study: optuna.Study, trial: optuna.Trial) -> None:
    """Its plan was measured before: its values are known, and a second measurement would only spend tokens."""
    study.tell(trial, state=TrialState.PRUNED)


def tell_failed(
    study: optuna.Study, trial: optuna.Trial, reason: str, lost: bool = False, place: str | None = None
) -> None:
    """Keep why a trial failed, the line of code that raised it if one did, and whether it was its worker's death or a
    shortage of memory."""
    if place is not None:
        trial.set_user_attr(keys.PLACE, place)
    if lost:
        trial.set_user_attr(keys.LOST, True)
    trial.set_user_attr(keys.FAILURE, reason)
    study.tell(trial, state=TrialState.FAIL)


def waiting_dense(state: StudyState) -> FrozenTrial | None:
    """The trial that is to measure the dense model, if it waits: without it there is nothing to compare with."""
    return next((t for t in state.waiting if t.user_attrs.get(keys.LABEL) == DENSE), None)
