"""What earlier launches left behind is queued again: what they lost, what was damaged in storage, what they left
running."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from rankfront.methods import DENSE
from rankfront.search import attributes as keys
from rankfront.search.attributes import ASKED, INTERRUPTED, is_void
from rankfront.search.storage.checked import asked_again
from rankfront.search.storage.trials import enqueue, tell_failed


def recover(study: optuna.Study, again: bool) -> None:
    """Mark what an earlier launch left running as failed; where it is to be measured ``again``, queue what that lost or
    was damaged."""
    close_orphans(study)
    if again:
        replace_damaged(study)
        requeue(study)


def close_orphans(study: optuna.Study) -> None:
    """Trials that a killed launcher left running can never be told: mark them failed, with the reason."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        tell_failed(study, optuna.Trial(study, trial._trial_id), INTERRUPTED)


def replace_damaged(study: optuna.Study) -> None:
    """Queue again what trials were asked for whose records are damaged."""
    for trial in asked_again(study):
        asked = trial.user_attrs[ASKED]
        enqueue(study, asked["params"], asked["attributes"] | {keys.REPLACES: trial.number})


def requeue(study: optuna.Study) -> None:
    """Queue again the trials and slopes that an earlier launch lost for good, and a dense model that failed.

    What is queued names in ``again`` the trial that it repeats, which counts no more.
    """
    trials = study.get_trials(deepcopy=False)
    repeated = keys.numbers_under(keys.AGAIN, (trial.user_attrs for trial in trials))
    for trial in trials:
        known = trial.user_attrs
        failed = keys.FAILURE in known and not is_void(known)
        dense = known.get(keys.LABEL) == DENSE and not known.get(keys.RUNG)
        if failed and (dense or keys.LOST in known) and trial.number not in repeated:
            kept = {key: value for key, value in known.items() if key not in keys.MEASURED}
            enqueue(study, trial.params, kept | {keys.AGAIN: trial.number})
