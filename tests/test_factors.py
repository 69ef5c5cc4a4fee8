"""The factor store: keyed by everything that factors depend on, written whole or not at all."""

import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
from common import linear_site, rank_option

from rankfront.methods import Gram, InputError, Statistics, get_method, method_names
from rankfront.methods._fitted import matrix_of
from rankfront.search.atomic import HOST
from rankfront.search.factors import calibration
from rankfront.search.factors.store import FactorStore

SITE = linear_site(12, 8)
WEIGHT = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
G = torch.randn(40, 12, generator=torch.Generator().manual_seed(2))
STATISTICS = {"weight": Statistics(40, Gram(X.T @ X), X.abs().sum(0), X.square().sum(0), G.T @ G)}
METHODS = [name for name in method_names() if get_method(name).nested and get_method(name).refuses(SITE) is None]
EVERY = [rank_option(name, rank) for name in METHODS for rank in (2, 4)]


def make_store(root, fingerprint="weights", text="text", dtype=torch.float32):
    return FactorStore(fingerprint, text, dtype, root)


def fill(store, options=EVERY):
    store.prepare(SITE, options, {"weight": WEIGHT}, STATISTICS)
    return store


@pytest.mark.parametrize("option", EVERY, ids=lambda option: option.label)
def test_factors_are_what_the_method_gives(tmp_path, option):
    method = get_method(option.method)
    prepared = method.prepare(SITE, {"weight": WEIGHT}, STATISTICS, [option])
    expected = method.truncate(prepared, option)["weight"]
    found = fill(make_store(tmp_path)).factors(SITE, option)["weight"]
    assert found.storage == expected.storage
    assert found.tensors.keys() == expected.tensors.keys()
    shape = WEIGHT.shape  # how norms are shared among cores may hang on how many components are kept, Ŵ does not
    torch.testing.assert_close(matrix_of(found, *shape), matrix_of(expected, *shape), rtol=1e-6, atol=1e-6)


def test_every_level_of_a_nested_method_is_one_file(tmp_path):
    store = fill(make_store(tmp_path))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(METHODS)
    for name in METHODS:
        assert store.path(SITE, rank_option(name, 2)) == store.path(SITE, rank_option(name, 4))


def test_matrices_are_kept_in_the_dtype_they_run_in(tmp_path):
    store = fill(make_store(tmp_path, dtype=torch.bfloat16))
    tensors = store.factors(SITE, EVERY[0])["weight"].tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert store.load(SITE, EVERY[0])["energy"].dtype == torch.float32


def test_what_is_there_is_not_missing(tmp_path):
    store = make_store(tmp_path)
    assert store.missing({SITE: EVERY}) == {SITE: EVERY}
    fill(store, EVERY[:2])
    assert store.missing({SITE: EVERY}) == {SITE: EVERY[2:]}
    fill(store, EVERY[2:])
    assert store.missing({SITE: EVERY}) == {}
    assert make_store(tmp_path).missing({SITE: EVERY}) == {}  # another process finds them


def test_the_key_is_all_that_factors_depend_on(tmp_path):
    store = make_store(tmp_path)
    for name in METHODS:
        method = get_method(name)
        folder = store.folder(method)
        assert folder == make_store(tmp_path).folder(method)
        assert folder != make_store(tmp_path, fingerprint="other").folder(method)
        assert folder != make_store(tmp_path, dtype=torch.bfloat16).folder(method)
        assert (folder != make_store(tmp_path, text="other").folder(method)) == bool(method.needs)
    assert len({store.folder(get_method(name)) for name in METHODS}) == len(METHODS)


def test_the_key_changes_with_the_version_alone(tmp_path):
    method = get_method("svd")
    before = make_store(tmp_path).folder(method)
    assert make_store(tmp_path).folder(replace(method, version=method.version + 1)) != before
    assert make_store(tmp_path).folder(replace(method)) == before


def test_the_key_changes_with_the_version_of_the_statistics_where_they_are_read(tmp_path, monkeypatch):
    before = {name: make_store(tmp_path).folder(get_method(name)) for name in ("svd", "svd-llm")}
    monkeypatch.setattr(calibration, "VERSION", calibration.VERSION + 1)
    after = {name: make_store(tmp_path).folder(get_method(name)) for name in ("svd", "svd-llm")}
    assert after["svd"] == before["svd"]
    assert after["svd-llm"] != before["svd-llm"]


@pytest.mark.parametrize("place", ["start", "middle", "end", "cut short", "empty"])
def test_a_corrupt_file_is_named_with_the_remedy(tmp_path, place):
    path = fill(make_store(tmp_path)).path(SITE, EVERY[0])
    whole = bytearray(path.read_bytes())
    spoiled = {
        "start": b"\xff" * 8 + whole[8:],
        "middle": whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
        "end": whole[:-1] + bytes([whole[-1] ^ 1]),
        "cut short": whole[:-10],
        "empty": b"",
    }[place]
    path.write_bytes(spoiled)
    with pytest.raises(InputError, match="corrupt") as caught:
        make_store(tmp_path).load(SITE, EVERY[0])
    assert str(path) in str(caught.value)
    assert "--rebuild" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="missing"):
        make_store(tmp_path).load(SITE, EVERY[0])


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, *_, **__):
        path.write_text("half", encoding="utf-8")
        raise OSError("no space left on device")

    monkeypatch.setattr("rankfront.search.atomic.open", fail, raising=False)
    with pytest.raises(OSError, match="no space"):
        fill(make_store(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_made_anew_replaces_what_is_there_and_nothing_else(tmp_path):
    store = fill(make_store(tmp_path))
    path, kept = (store.path(SITE, option) for option in (EVERY[0], EVERY[-1]))
    before = {each: (each.read_bytes(), each.stat().st_ino) for each in (path, kept)}
    fill(store)  # another writer that is late uses what it finds
    assert {each: (each.read_bytes(), each.stat().st_ino) for each in (path, kept)} == before
    store.prepare(SITE, EVERY[:1], {"weight": WEIGHT}, STATISTICS, anew=True)
    assert path.read_bytes() == before[path][0]
    assert path.stat().st_ino != before[path][1]
    assert kept.stat().st_ino == before[kept][1]


def test_what_a_killed_writer_left_is_dropped_and_others_are_not(tmp_path):
    """A process that was killed while it wrote; this one, which is alive; and one on another machine."""
    context = multiprocessing.get_context("fork")
    gone = context.Process(target=lambda: None)
    gone.start()
    gone.join()
    store = fill(make_store(tmp_path))
    folder = store.folder(get_method("svd"))
    mine, dead, elsewhere = f"{HOST}-{os.getpid()}", f"{HOST}-{gone.pid}", f"0123abcd-{gone.pid}"
    for writer in (mine, dead, elsewhere):
        (folder / f".site.safetensors.{'0' * 8}.{writer}").write_bytes(b"half")
    before = set(folder.glob("*.safetensors"))
    store.drop_partials(METHODS)
    left = {path.name.rpartition(".")[2] for path in folder.iterdir() if path.name.startswith(".")}
    assert left == {mine, elsewhere}
    assert set(folder.glob("*.safetensors")) >= before
