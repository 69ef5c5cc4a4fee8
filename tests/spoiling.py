"""Spoiling what Ray's workers do, in processes of their own."""

import os

import pytest

# Workers import rankfront in processes of their own. This is found before any other sitecustomize; it notes which
# process is a worker and how nice, and which measures what, and runs the code of $JOURNAL.code before the jobs that
# $JOURNAL.jobs names ("trial 3,report 0"): files, for the workers of a cluster have the environment that it began with.
SITE = """
import gc, importlib.abc, importlib.util, os, sys

gc.disable()  # while a worker imports: a quarter of its start

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
        gc.enable()
        if "JOURNAL" in os.environ:
            with open(os.environ["JOURNAL"] + ".workers", "a") as workers:
                print(os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), file=workers)
        initialise(self, *arguments)
    return before

def spoiled(measure):
    def before(self, job):
        if "JOURNAL" not in os.environ:  # a fork, for a later test, of a process that began among these
            return measure(self, job)
        with open(os.environ["JOURNAL"], "a") as journal:
            print(os.getpid(), job.kind, job.number, file=journal)
        with open(os.environ["JOURNAL"] + ".jobs") as jobs, open(os.environ["JOURNAL"] + ".code") as code:
            if {"every job", f"{job.kind} {job.number}"} & set(jobs.read().split(",")):
                exec(code.read())
        return measure(self, job)
    return before

sys.meta_path.insert(0, Finder())
"""

# Before what a job meets the first time alone.
ONCE = 'if open(os.environ["JOURNAL"]).read().count(f" {job.kind} {job.number}\\n") == 1: '


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """What workers that start from here on note, those of clusters that start from here on too."""
    folder = tmp_path_factory.mktemp("spoiling")
    (folder / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("JOURNAL", str(folder / "journal"))
        for name in ("journal.jobs", "journal.code"):
            (folder / name).touch()
        yield folder / "journal"


@pytest.fixture
def spoil(journal):
    """Have workers run ``code`` before the jobs named; the function returned gives the processes that measured."""

    def prepare(*jobs, code=""):
        journal.with_name("journal.jobs").write_text(",".join(jobs), encoding="utf-8")
        journal.with_name("journal.code").write_text(code, encoding="utf-8")
        return lambda: [line.split()[0] for line in journal.read_text(encoding="utf-8").splitlines()]

    for name in ("journal", "journal.workers"):
        journal.with_name(name).write_text("", encoding="utf-8")
    yield prepare
    prepare()
