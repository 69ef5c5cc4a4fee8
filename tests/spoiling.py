"""Spoiling what Ray's workers do, in processes of their own."""

import os

import pytest

# Workers import rankfront in processes of their own. This is found before any other sitecustomize; it notes which
# process is a worker and how nice, and which measures what, and runs the code $SPOIL_BY before the jobs that $SPOIL
# names ("trial 3,report 0").
SITE = """
import importlib.abc, importlib.util, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "rankfront.search.measure.runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            module.JobRunner.__init__ = noted(module.JobRunner.__init__)
            for kind in ("trial", "report"):
                module.MEASURES[kind] = spoiled(module.MEASURES[kind])
        spec.loader.exec_module = exec_module
        return spec

def noted(initialise):
    def before(self, *arguments):
        with open(os.environ["JOURNAL"] + ".workers", "a") as workers:
            print(os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), file=workers)
        initialise(self, *arguments)
    return before

def spoiled(measure):
    def before(self, job):
        with open(os.environ["JOURNAL"], "a") as journal:
            print(os.getpid(), job.kind, job.number, file=journal)
        if {"every job", f"{job.kind} {job.number}"} & set(os.environ["SPOIL"].split(",")):
            exec(os.environ["SPOIL_BY"])
        return measure(self, job)
    return before

sys.meta_path.insert(0, Finder())
"""

# Before what a job meets the first time alone.
ONCE = 'if open(os.environ["JOURNAL"]).read().count(f" {job.kind} {job.number}\\n") == 1: '


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    """Have workers run ``code`` before the jobs named; the function returned gives the processes that measured."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    journal = tmp_path / "journal"
    journal.touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setenv("JOURNAL", str(journal))

    def prepare(*jobs, code=""):
        monkeypatch.setenv("SPOIL", ",".join(jobs))
        monkeypatch.setenv("SPOIL_BY", code)
        return lambda: [line.split()[0] for line in journal.read_text(encoding="utf-8").splitlines()]

    return prepare
