"""Methods are found by name and described without importing what they run on."""

import copy
import dataclasses

import pytest

from rankfront.methods import InputError, _registry, describe_methods, get_method, method_names
from rankfront.search.output.taxonomy import methods_json, methods_table


def test_the_catalogue_says_what_the_methods_say_of_themselves():
    """Where it does not: ``make catalogue``."""
    for described in describe_methods():
        method = get_method(described["name"])
        assert described == {key: getattr(method, key) for key in described} | {"needs": list(method.needs)}
        assert described.keys() == set(_registry.DESCRIBED)


def test_a_description_that_is_changed_changes_no_other():
    for described in describe_methods():
        described["needs"].append("changed")
        described.clear()
    assert describe_methods()[0]["needs"] == list(get_method(method_names()[0]).needs)


def test_the_table_of_methods_leaves_them_as_they_are():
    before = describe_methods()
    methods_table()
    assert describe_methods() == before


def test_what_a_caller_does_to_the_list_of_methods_changes_no_other_list():
    for listed in (methods_json, describe_methods):
        before = copy.deepcopy(listed())
        for described in listed():
            described["needs"].append("changed")
            described["name"] = "changed"
        assert listed() == before


def test_the_catalogue_lists_every_file_and_no_other():
    assert sorted(_registry._catalogue()) == sorted(_registry._files())


def test_no_file_registers_what_the_catalogue_lacks():
    listed = {described["name"] for methods in _registry._catalogue().values() for described in methods}
    for file in _registry._files():
        _registry._load(file)
    assert listed == set(_registry.METHODS)


def test_a_file_that_the_catalogue_does_not_list_is_found_anyway(monkeypatch):
    """A new method is a new file: it works before the catalogue is written again."""
    known = _registry._catalogue()
    monkeypatch.setattr(_registry, "_catalogue", lambda: {file: m for file, m in known.items() if file != "asvd"})
    _registry._file_of.cache_clear()
    try:
        assert "asvd" in method_names()
        assert get_method("asvd").name == "asvd"
        assert next(d for d in describe_methods() if d["name"] == "asvd")["paper"] == "2312.05821"
    finally:
        _registry._file_of.cache_clear()


def test_a_method_registered_from_elsewhere_counts_too(monkeypatch):
    added = dataclasses.replace(get_method("svd"), name="svd-again")
    monkeypatch.setitem(_registry.METHODS, "svd-again", added)
    assert method_names()[-1] == "svd-again"
    assert get_method("svd-again") is added
    assert describe_methods()[-1]["name"] == "svd-again"


def test_an_unknown_method_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown method 'svd-lm'.*did you mean 'svd-llm'"):
        get_method("svd-lm")
