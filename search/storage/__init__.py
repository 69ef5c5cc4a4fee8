"""The study on disk: the run's folder, Optuna's storage with checksums, and the trials read from it."""
