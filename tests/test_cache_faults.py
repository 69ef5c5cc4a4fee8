"""What happens to the shared cache: files changed under a running study, passing failures, two writers at once."""

import logging
import math
import multiprocessing
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from launching import make_run, quiet, small_data, values_of
from test_factors import EVERY, SITE, STATISTICS, WEIGHT, fill, make_store
from torch import nn

from rankfront.methods import InputError
from rankfront.methods._low_rank import LowRank
from rankfront.search.atomic import HOST, staged, write_checked
from rankfront.search.inputs import resolve as resolving
from rankfront.search.measure import timing
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.measure.evaluation_tokens import EvaluationTokens
from rankfront.search.measure.prepare import prepare_store
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.timing import Stopwatches
from rankfront.search.plans.job import Job
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study


@pytest.fixture
def resident(setup, tmp_path):
    """A resident with a factor store of its own, to spoil."""
    return JobRunner(replace(setup, cache=str(tmp_path / "cache")))


@pytest.fixture
def data(model_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    return small_data(model_folder, text_file, trials=3)


def plan_of(resident, place=0):
    """Every site at one of its options, and the file that the first of them is read from."""
    wanted = resident.compressed.space.wanted()
    site, options = next(iter(wanted.items()))
    return Plan.of({s.name: o[place] for s, o in wanted.items()}), resident.compressed.store.path(site, options[place])


def trial(resident, plan, number=0):
    return resident.run(Job("trial", number, plan))


# -- files changed under a running study


def overwrite(path):
    """In place, with another file's numbers: whole, of the same size and even with the right checksum."""
    before = path.stat()
    content = max((p for p in path.parent.glob("*.safetensors") if p.stat().st_size == before.st_size), key=str)
    assert content != path
    with path.open("r+b") as file:
        file.write(content.read_bytes())


def flip(path):
    with path.open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\x40")


def swap(path):
    """Another file renamed to its name."""
    other = path.with_name("other")
    shutil.copyfile(max(path.parent.glob("*.safetensors"), key=str), other)
    other.replace(path)


CHANGES = {
    "overwritten in place": (overwrite, "other content"),
    "a byte flipped in place": (flip, "corrupt"),
    "cut short": (lambda path: os.truncate(path, path.stat().st_size // 2), "corrupt"),
    "emptied": (lambda path: os.truncate(path, 0), "corrupt"),
    "replaced by another": (swap, "other content"),
    "deleted": (lambda path: path.unlink(), "missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_between_two_trials_is_named_and_nothing_is_measured(resident, change):
    spoil, message = CHANGES[change]
    plan, path = plan_of(resident)
    value = trial(resident, plan)["values"]
    assert trial(resident, Plan(()))["values"] != value
    spoil(path)
    with pytest.raises(InputError, match=message) as caught:
        trial(resident, plan, 1)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_within_a_trial_is_named_too(resident, monkeypatch, change):
    """What the model runs by then is a copy, so that cutting the file short does not kill the process."""
    spoil, message = CHANGES[change]
    plan, path = plan_of(resident)
    windows = EvaluationTokens.windows.fget

    def late(tokens):
        spoil(path)
        return windows(tokens)

    monkeypatch.setattr(EvaluationTokens, "windows", property(late))
    with pytest.raises(InputError, match=message):
        trial(resident, plan)


def test_a_file_replaced_by_the_same_is_used_on(resident):
    """As rebuilding beside a running study does."""
    plan, path = plan_of(resident)
    value, before = trial(resident, plan)["values"], path.stat().st_ino
    trial(resident, Plan(()))
    prepare_store(resident.setup, resident.compressed.space, lambda phase, done, total: None, anew=True)
    assert path.stat().st_ino != before
    assert trial(resident, plan)["values"] == value


def test_nothing_that_a_model_runs_is_mapped(resident):
    plan, _ = plan_of(resident)
    resident.compressed.apply(plan)
    sites = {site.name: site for site in resident.compressed.sites}
    mapped = {
        t.untyped_storage().data_ptr()
        for name, option in plan.choices
        for t in resident.compressed.store.load(sites[name], option).values()
    }
    run = {
        t.untyped_storage().data_ptr() for module in resident.compressed.modules.values() for t in module.parameters()
    }
    assert mapped
    assert run
    assert mapped.isdisjoint(run)


# -- failures that pass, and those that do not


def failing(error):
    def prepare(self, site, weights, statistics, options):
        raise error

    return prepare


PASSING = [
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes\nmore"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    ValueError("odd"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_a_passing_failure_is_kept_for_this_launch_alone(tmp_path, monkeypatch, error):
    store = make_store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "prepare", failing(error))
        fill(store, EVERY[:2])
    assert type(error).__name__ in store.failure(SITE, EVERY[0])
    assert "\n" not in store.failure(SITE, EVERY[0])
    assert not store.missing({SITE: EVERY[:2]})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(RuntimeError, match=f"could not factor.*{type(error).__name__}"):
        store.load(SITE, EVERY[0])
    assert make_store(tmp_path).missing({SITE: EVERY[:2]}) == {SITE: EVERY[:2]}  # the next launch


def test_weights_that_cannot_be_factored_are_remembered(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "prepare", failing(torch.linalg.LinAlgError("eigh did not converge")))
        fill(make_store(tmp_path), EVERY[:2])
    later = make_store(tmp_path)
    assert "eigh did not converge" in later.failure(SITE, EVERY[0])
    assert not later.missing({SITE: EVERY[:2]})
    later.prepare(SITE, EVERY[:2], {"weight": WEIGHT}, STATISTICS, anew=True)
    assert later.failure(SITE, EVERY[0]) is None
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


@pytest.mark.parametrize("cut", [0, 9, -3])
def test_a_kept_failure_that_is_not_whole_is_not_believed(tmp_path, cut):
    store = make_store(tmp_path)
    file = store.path(SITE, EVERY[0]).with_suffix(".failed")
    write_checked(file, "LinAlgError: did not converge")
    assert store.failure(SITE, EVERY[0])
    file.write_bytes(file.read_bytes()[:cut])
    assert store.failure(SITE, EVERY[0]) is None
    file.write_text("RuntimeError: what an earlier version kept", encoding="utf-8")
    assert store.failure(SITE, EVERY[0]) is None


def test_trials_that_want_what_could_not_be_made_fail_with_the_reason_and_the_next_launch_makes_it(
    data, tmp_path, monkeypatch, capsys
):
    real = LowRank.prepare

    def short(self, site, weights, statistics, options):
        if self.name == "svd":
            raise RuntimeError("can't allocate memory")
        return real(self, site, weights, statistics, options)

    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "prepare", short)
        console = quiet()
        study = Study(data, tmp_path / "run")
        study.launch(console)
    said = console.file.getvalue()
    assert "factorisations failed" in said
    assert "can't allocate memory" in said
    rows = {row.origin: row for row in study.rows()}
    assert "allocate" in rows["anchor: svd keep=0.6"].failure
    assert rows["anchor: svd-llm keep=0.6"].state == "complete"
    before = values_of(study)
    data["search"]["trials"] = 6
    longer = Study(data, tmp_path / "run")
    console = quiet()
    longer.launch(console)
    assert "factorisations failed" not in console.file.getvalue()
    assert not longer.setup().store().missing(CompressedModel(longer.setup()).space.wanted())
    assert values_of(longer).items() >= before.items()


def test_rebuilding_beside_a_running_study_takes_nothing_away(data, tmp_path):
    """A worker in the middle of its trials; then another launch rebuilds; the worker's next trial is the same."""
    running = JobRunner(Study(data).setup())
    plan, _ = plan_of(running)
    value = trial(running, plan)["values"]
    trial(running, Plan(()))
    study = Study(data, tmp_path / "run")
    study.launch(quiet(), rebuild=True)
    assert trial(running, plan, 1)["values"] == value
    later, path = plan_of(running, place=-1)  # files that it had not read yet
    assert path.is_file()
    assert "values" in trial(running, later, 2)
    before = path.stat().st_ino
    study.launch(quiet(), rebuild=True)  # which has no trial left to do
    assert path.stat().st_ino != before


def test_of_two_that_prepare_at_once_the_second_uses_what_the_first_made(tmp_path, monkeypatch):
    """Both find it missing; a reader of the first's file is not shown another."""
    first, second, real = make_store(tmp_path), make_store(tmp_path), LowRank.prepare
    states = []

    def slow(self, site, weights, statistics, options):
        prepared = real(self, site, weights, statistics, options)
        if not states:
            states.append(None)
            fill(first, EVERY[:2])
            states[0] = first.path(SITE, EVERY[0]).stat().st_ino
        return prepared

    monkeypatch.setattr(LowRank, "prepare", slow)
    fill(second, EVERY[:2])
    assert first.path(SITE, EVERY[0]).stat().st_ino == states[0]


def test_a_run_of_the_same_study_finds_everything_made(data, tmp_path, monkeypatch):
    make_run(data, tmp_path / "one")
    monkeypatch.setattr(LowRank, "prepare", failing(AssertionError("made again")))
    make_run(data, tmp_path / "two")


# -- latency tables


def watches(folder):
    return Stopwatches(folder, "cpu", torch.float32)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A latency table of two figures on disk."""
    monkeypatch.setattr(timing, "timed", lambda *_: 1e-3)
    monkeypatch.setattr(timing, "compared", lambda *_: 0.5)
    found = watches(tmp_path)
    found.seconds("dense 8x16", nn.Linear(16, 8), X)
    found.ratio("low rank", lambda: None, X, lambda: None)
    found.save()
    return found


@pytest.fixture
def warnings():
    """What is logged, line by line, as it comes."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    yield lines
    logging.getLogger().removeHandler(handler)


X = torch.ones(1, 1, 16)


def test_a_flipped_bit_in_a_latency_table_is_never_used(table, tmp_path, warnings):
    """Wherever it is: the table is read as it was, or discarded with one warning and timed anew."""
    whole, known = table.path.read_bytes(), dict(table.known)
    for place in range(len(whole)):
        for bit in range(8):
            warnings.clear()
            table.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            found = watches(tmp_path)
            assert found.known in (known, {})
            assert len(warnings) == (not found.known)
            assert all("discarded" in line for line in warnings)


SPOILED = {
    "half of it": lambda whole: whole[: len(whole) // 2],
    "nothing": lambda whole: b"",
    "no JSON": lambda whole: b"\xff\xfe not JSON",
    "deep": lambda whole: b"[" * 100_000,
    "another shape": lambda whole: b"[1, 2]",
    "what an earlier version wrote": lambda whole: b'{"dense 8x16 on 1x1": 0.001}',
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_latency_table_that_is_not_whole_is_timed_anew(table, tmp_path, warnings, spoil):
    table.path.write_bytes(SPOILED[spoil](table.path.read_bytes()))
    found = watches(tmp_path)
    assert found.known == {}
    (line,) = warnings
    assert str(table.path) in line
    assert "\n" not in line
    assert found.seconds("dense 8x16", nn.Linear(16, 8), X) == 1e-3
    found.save()
    assert watches(tmp_path).known == found.known
    assert len(warnings) == 1


@pytest.mark.parametrize("figure", [-1e-3, 0.0, math.nan, math.inf, 1e-300, 1e300, "0.5", None, True, [0.5]])
def test_a_figure_that_no_clock_gives_is_not_used(table, tmp_path, warnings, figure):
    write_checked(table.path, {**table.known, "odd": figure})
    assert watches(tmp_path).known == {}
    assert any("odd" in line for line in warnings)


def test_a_clock_that_gives_no_such_figure_fails_the_timing(table, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "timed", lambda *_: math.nan)
    with pytest.raises(ValueError, match="nan"):
        table.seconds("dense 9x16", nn.Linear(16, 9), X)
    assert "dense 9x16 on 1x1" not in table.known


def test_two_that_save_at_once_lose_nothing(table, tmp_path, monkeypatch):
    """A second writer comes between the first's reading and writing."""
    one, other, real = watches(tmp_path), watches(tmp_path), timing.write_checked
    one.seconds("dense 9x16", nn.Linear(16, 9), X)
    other.seconds("dense 10x16", nn.Linear(16, 10), X)
    rival = threading.Thread(target=other.save)

    def between(path, figures):
        monkeypatch.setattr(timing, "write_checked", real)
        rival.start()
        rival.join(0.2)
        real(path, figures)

    monkeypatch.setattr(timing, "write_checked", between)
    one.save()
    rival.join()
    assert watches(tmp_path).known.keys() == one.known.keys() | other.known.keys()
    assert len(one.known.keys() | other.known.keys()) == 4


# -- two at once, and what a killed one left


class Fake:
    """What loads as a model or a tokenizer of a GGUF file."""

    def save_pretrained(self, folder):
        (folder / "config.json").write_text("{}", encoding="utf-8")


def test_of_two_that_unpack_one_model_at_once_the_second_waits_and_uses_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    begun, loads, found = threading.Event(), [], []

    def load(*arguments, **named):
        loads.append(1)
        begun.set()
        rival.join(0.2)
        return Fake()

    monkeypatch.setattr(resolving, "load_whole", load)
    monkeypatch.setattr(resolving, "_check_none_dropped", lambda *_: None)
    monkeypatch.setattr(resolving.AutoTokenizer, "from_pretrained", lambda *_, **__: Fake())
    rival = threading.Thread(target=lambda: (begun.wait(), found.append(resolving.resolve(str(file)))))
    rival.start()
    first = resolving.resolve(str(file))
    rival.join()
    assert found == [first]
    assert len(loads) == 1
    assert (tmp_path / "cache" / first.location / "config.json").is_file()
    assert resolving.resolve(str(file)) == first


def gone():
    """The number of a process that has ended."""
    process = multiprocessing.get_context("fork").Process(target=lambda: None)
    process.start()
    process.join()
    return process.pid


def test_a_folder_is_staged_whole_and_what_a_killed_process_left_of_it_is_dropped(tmp_path):
    dead = tmp_path / f".out.0123abcd.{HOST}-{gone()}"
    kept = [
        tmp_path / f".out.0123abcd.{HOST}-{os.getpid()}",  # another thread's, at work
        tmp_path / f".out.0123abcd.ffffffff-{gone()}",  # on another machine
        tmp_path / f".other.0123abcd.{HOST}-{gone()}",  # of another place
        tmp_path / ".out.0123abcd",
    ]
    for folder in (dead, *kept):
        folder.mkdir()
        (folder / "half").write_text("half", encoding="utf-8")
    with staged(tmp_path / "out") as staging:
        (staging / "whole").write_text("whole", encoding="utf-8")
        assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", *(path.name for path in kept)}
    assert (tmp_path / "out" / "whole").is_file()


@pytest.mark.parametrize("there", ["an empty folder", "a full folder", "a file", "a link"])
def test_a_folder_that_was_taken_meanwhile_is_left_as_it_is(tmp_path, there):
    out = tmp_path / "out"

    def write():
        with staged(out) as staging:
            (staging / "ours").write_text("ours", encoding="utf-8")
            if there == "a file":
                out.write_text("theirs", encoding="utf-8")
            elif there == "a link":
                out.symlink_to(tmp_path / "elsewhere")
            else:
                out.mkdir()
            if there == "a full folder":
                (out / "theirs").write_text("theirs", encoding="utf-8")

    if there == "an empty folder":
        write()
        assert os.listdir(out) == ["ours"]
        return
    with pytest.raises(InputError, match="another process meanwhile"):
        write()
    assert os.listdir(tmp_path) == ["out"]
    assert not (out / "ours").exists()
