"""What every method makes of fixed weights is what is stored, or its `version` was raised: factors that are kept on
disk are known by that number.

Where a test fails because numbers were meant to change: raise ``version`` of the methods that it names, and write
``stored_outputs.json`` anew with ``make stored-outputs``.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import common
import pytest
import torch
import transformers
from mixtures import built
from rows import Sample

from rankfront.methods import Grid, Site, get_method, method_names
from rankfront.search.inputs.apart import take_apart
from rankfront.search.inputs.sites import find_sites, weights_at

STORED = Path(__file__).parent / "stored_outputs.json"
SHAPES = 3  # of sites looked at for each method: wide, square, tall
TOLERANCE = 1e-3  # of the largest output; perturbing the weights by 1e-6 moves none by more than 3e-4
CHAOTIC = {"cospadi-published": 0.05}  # rounding alone picks other atoms here: its error alone is compared, so closely


@cache
def _sites() -> list[tuple[Any, Site]]:
    """One of every distinct list of weights, of an untied and of a tied tiny Llama of four blocks."""
    found = {}
    for name in ("llama", "llama-tied"):
        row = common.architecture(name)
        settings = {**row.settings, "num_hidden_layers": 4}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval().requires_grad_(False)
        common.randomise(model)
        for site in find_sites(model):
            shapes = tuple((w.role, w.kind, bool(w.tied), w.out_features, w.in_features) for w in site.weights)
            found.setdefault(shapes, (model, site))
    return list(found.values())


@cache
def _of_experts() -> list[tuple[Any, Site]]:
    """The joint sites of a layer's experts, for methods of these alone."""
    model = built("qwen3_moe")
    take_apart(model)
    return [(model, site) for site in find_sites(model) if site.separate and any(w.share < 1 for w in site.weights)]


def _sample(outputs: int, inputs: int, seed: int) -> Sample:
    random = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.2, 2, inputs, dtype=torch.float64)
    x = scales * torch.randn(96, inputs, generator=random, dtype=torch.float64)
    return Sample(x, torch.randn(96, outputs, generator=random, dtype=torch.float64))


def outputs(name: str) -> dict[str, dict[str, Any]]:
    """``SITE OPTION`` -> the error, and the products with gradients of what runs at each anchor, of a method."""
    method, found = get_method(name), {}
    plain = any(method.refuses(site) is None for _, site in _sites())
    for model, site in _sites() if plain else _of_experts():
        if method.refuses(site) is not None or len(found) == SHAPES:
            continue
        option = method.options(site, Grid((0.5,), 2)).get(0.5)
        if option is None:
            continue
        statistics = {w.role: _sample(w.out_features, w.in_features, 1).statistics() for w in site.weights}
        prepared = method.prepare(site, weights_at(model, site), statistics, [option])
        prepared = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in prepared.items()}
        products = []
        for part in site.parts:
            own = _sample(part.anchor.out_features, part.anchor.in_features, 2)
            products += method.gradient_dot_outputs(part, prepared, [option], own.g[:4].float(), own.x[:4].float())[
                option.label
            ]
        found[f"{site.name} {option.label}"] = {
            "error": method.error(prepared, option),
            "products": [float(product) for product in products],
        }
    return found


def write() -> None:
    stored = {name: {"version": get_method(name).version, "outputs": outputs(name)} for name in method_names()}
    STORED.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", method_names())
def test_a_method_makes_what_is_stored_under_its_version(name):
    stored = json.loads(STORED.read_text(encoding="utf-8"))[name]
    assert stored["version"] == get_method(name).version
    found = outputs(name)
    assert found.keys() == stored["outputs"].keys()
    for option, expected in stored["outputs"].items():
        assert found[option]["error"] == pytest.approx(expected["error"], rel=CHAOTIC.get(name, TOLERANCE), abs=1e-9)
        if name not in CHAOTIC:
            scale = max(map(abs, expected["products"]))
            assert found[option]["products"] == pytest.approx(expected["products"], rel=0, abs=TOLERANCE * scale)


def test_every_method_is_stored_and_makes_something():
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert stored.keys() == set(method_names())
    assert all(record["outputs"] for record in stored.values())


def test_what_differs_is_noticed(monkeypatch):
    method = get_method("svd-llm")
    before = outputs("svd-llm")
    monkeypatch.setattr(type(method), "error", lambda self, prepared, option: 1.01)
    assert outputs("svd-llm") != before
