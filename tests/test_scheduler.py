"""What scheduling asks of the storage."""

import numpy as np
import optuna
from launching import make_scheduler, small_data


def test_the_study_is_read_as_often_for_a_late_trial_as_for_an_early_one(
    model_folder, text_file, tmp_path, monkeypatch
):
    read, reads, marks = optuna.storages.InMemoryStorage.get_all_trials, [], []

    def counted(self, *arguments, **more):
        reads.append(arguments)
        return read(self, *arguments, **more)

    monkeypatch.setattr(optuna.storages.InMemoryStorage, "get_all_trials", counted)
    data = small_data(model_folder, text_file, trials=30)
    scheduler, resident = make_scheduler(data, tmp_path / "run")
    while not scheduler.done and len(marks) < 30:
        job = scheduler.next()
        scheduler.finish(job, resident.run(job))
        marks.append(len(reads))
    assert len(marks) == 30
    assert len(set(np.diff(marks)[5:])) == 1
