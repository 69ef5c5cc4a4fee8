"""Slice an exported folder: the same factors at lower ranks, which are their first components; nothing is trained.

Ranks are those of least predicted divergence within the size asked for: the Fisher quadratic of every rank of every
site, from one pass around the model as it is (see `factors.gradient`), solved as a knapsack. It asks for components in
the order of their worth, as SVD leaves them, and healing with ordered dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rankfront.methods import Factors, InputError, Option, Prepared, Site, get_method
from rankfront.methods.checkpoint import contents
from rankfront.methods.layers_low_rank import LowRankEmbedding, LowRankLinear
from rankfront.objectives import score
from rankfront.search.atomic import new_folder
from rankfront.search.factors.gradient import quadratic_divergence
from rankfront.search.inputs.capacity import capacity_of
from rankfront.search.inputs.coverage import coverage_of
from rankfront.search.inputs.device import pick_device
from rankfront.search.inputs.model import count_parameters, dense_skeleton, load_model, load_tokenizer
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.sites import find_sites
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.text import cut
from rankfront.search.measure.joining import separate
from rankfront.search.names import inside_blocks
from rankfront.search.output.derived import RECORD, write_derived
from rankfront.search.output.export import writing
from rankfront.search.output.healed import plan_of
from rankfront.search.output.healing_card import HealText
from rankfront.search.plain import markdown, without_folders
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Line, Menu
from rankfront.search.plans.plan import Plan, Prices
from rankfront.search.splits import Split

VALUE_BYTES = 2  # of a value, for prices in bytes, which are not looked at
MEASURED = 4  # windows that perplexity is measured on; guess


@dataclass(frozen=True)
class Sliced:
    """What slicing did: kept fractions of the dense model, and perplexities on the same windows, before and after; what
    is stored now, and at how many sites that is less."""

    parameters_before: float
    parameters: float
    perplexity_before: float
    perplexity: float
    stored_values: int
    sites: int


def slice_folder(
    folder: Path,
    text: HealText,
    most: float,
    out: Path,
    windows: int = 8,
    multiple: int = 8,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Sliced:
    """Write the factored export ``folder`` with at most ``most`` of the dense model's parameters to the new folder
    ``out``, verified there as an export is.

    Ranks are multiples of ``multiple``; their worth is measured on so many ``windows`` of the text, and perplexity on
    `MEASURED` more. Raises `InputError` for what the user can mend, `ExportError` where writing or verifying fails.
    """
    out = new_folder(out)
    source = resolve(str(folder), trust_remote_code)
    plan = plan_of(folder, source)
    empty = dense_skeleton(source)
    sites = find_sites(empty)
    block_values = coverage_of(empty, sites).block_values
    prices = Prices(inside_blocks(sites), count_parameters(empty), VALUE_BYTES, block_values)
    before = prices.of(plan)
    if not 0 < most < before.parameters:
        raise InputError(
            f"--max-parameters is {most:g} and {str(folder)!r} keeps {before.parameters:.4g} of the dense model's"
            " parameters: give a fraction above 0 and below that"
        )
    split = Split(text.name, windows + MEASURED, text.part)
    found = cut(load_tokenizer(source), {"slice": split}, text.length)["slice"]
    chosen, held = found[:windows], found[windows:]
    model = load_model(source, "auto", pick_device(device))
    capacity = capacity_of(model)
    capacity.check_length(text.length, "--length")
    capacity.check_tokens({"slice": found})
    separate(model.modules())
    levels = offered(model, sites, plan, multiple)
    menu = priced(model, levels, chosen, seed)
    ranks = within(menu, int(most * before.dense_values) - (before.values - menu.dense), before.dense_values)
    sliced = Plan.of(plan.by_site | ranks.by_site, dict(plan.origin))
    perplexity, count, after = score(model, held).perplexity, count_parameters(model), prices.of(sliced)
    changed = [site for site in levels if sliced.option(site.name) != plan.option(site.name)]
    for site in changed:
        _apply(model, site, cast(int, sliced.option(site.name)["rank"]))
    if count - count_parameters(model) != before.values - after.values:
        raise RuntimeError("the sliced model stores something else than its plan: a defect of rankfront")
    result = Sliced(
        before.parameters, after.parameters, perplexity, score(model, held).perplexity, after.values, len(changed)
    )
    with writing(out):
        _write(model, source, sliced, text, result, held, out)
    return result


def offered(model: nn.Module, sites: Iterable[Site], plan: Plan, multiple: int) -> dict[Site, list[Option]]:
    """The ranks that each site of ``plan`` may be cut to, its own first: sites of nested low-rank factors.

    Embedding tables of their own stay: what their components are worth, no gradient at a linear says.
    """
    found = {}
    for site in sites:
        option = plan.option(site.name)
        rank = dict(option.level).get("rank")
        modules = _modules(model, site)
        fits = all(
            isinstance(module, LowRankLinear | LowRankEmbedding) and module.in_full and module.rank == rank
            for module in modules
        )
        if type(rank) is int and fits and site.anchor.kind == "linear" and get_method(option.method).nested:
            ranks = [rank, *range((rank - 1) // multiple * multiple, 0, -multiple)]
            found[site] = [Option.of(option.method, rank=own) for own in ranks]
    if not any(len(options) > 1 for options in found.values()):
        raise InputError("the plan has no low-rank factors that can be cut: export a plan of another method")
    return found


def _paths(site: Site) -> list[str]:
    return [path for weight in site.weights for path in weight.paths]


def _modules(model: nn.Module, site: Site) -> list[Any]:
    return [model.get_submodule(path) for path in _paths(site)]


class _Held:
    """The factors that a model runs, as a store of prepared ones."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def load(self, site: Site, option: Option) -> Prepared:
        modules = [cast(LowRankLinear, self.model.get_submodule(weight.path)) for weight in site.weights]
        ends = np.cumsum([0, *(module.out_features for module in modules)]).tolist()
        rows = {
            f"rows.{weight.role}": torch.tensor(span) for weight, span in zip(site.weights, pairwise(ends), strict=True)
        }
        left = torch.cat([module.left.detach() for module in modules])
        return {"left": left.T, "right": modules[0].right.detach(), **rows}

    def factors(self, site: Site, option: Option) -> Mapping[str, Factors]:
        return get_method(option.method).truncate(self.load(site, option), option)


def priced(model: nn.Module, levels: Mapping[Site, Sequence[Option]], windows: Tensor, seed: int) -> Menu:
    """What every rank stores, and the divergence that it is predicted to cause by itself."""
    predicted = quadratic_divergence(model, windows, levels, _Held(model), seed)
    lines = []
    for site, options in levels.items():
        own = np.array([predicted[site.name][option.label] for option in options])
        own[0] = 0.0
        sizes = np.array([get_method(option.method).storage(site, option).parameters for option in options])
        lines.append(Line(site.name, tuple(options), sizes, np.maximum.accumulate(own)))
    return Menu(tuple(lines))


def within(menu: Menu, budget: int, dense: int) -> Plan:
    """The ranks of least predicted divergence that store at most ``budget`` values; ``dense`` is the dense model's."""
    if budget < menu.least:
        raise InputError(
            f"every rank at its lowest keeps {(menu.least - budget) / dense:.4g} of the dense model's parameters more"
            " than --max-parameters: raise it, or lower --rank-multiple"
        )
    return menu.decode(Lagrangian(menu).solve(budget))


@torch.no_grad()
def narrow(model: nn.Module, site: Site, rank: int) -> None:
    """Keep the first ``rank`` components of a site's factors; what modules share stays shared."""
    known: dict[int, nn.Parameter] = {}
    for module in _modules(model, site):
        for name, kept in (("left", module.left[:, :rank]), ("right", module.right[:rank])):
            whole = getattr(module, name)
            setattr(module, name, known.setdefault(id(whole), nn.Parameter(kept.clone(), requires_grad=False)))
        module.rank = rank


def _apply(model: Any, site: Site, rank: int) -> None:
    """`narrow` a site of a loaded export, and describe it so."""
    narrow(model, site, rank)
    described = (contents(model.config) or {})["modules"]
    for path in _paths(site):
        described[path]["rank"] = rank


def _write(model: Any, source: Source, plan: Plan, text: HealText, result: Sliced, held: Tensor, out: Path) -> None:
    """Write the sliced model, reload it in a fresh process and compare, and only then name it ``out``."""
    healed = Path(source.location) / RECORD
    record = healed.read_text(encoding="utf-8") if healed.is_file() else None
    write_derived(model, source, plan, held, result.perplexity, "sliced", note(result, text), record, out)


def note(result: Sliced, text: HealText) -> str:
    """A model card's section on what was cut."""
    name = markdown(without_folders(text.name))
    return f"""## Sliced

The factors were cut to their first components at {result.sites} sites, without training. **The figures above are of the
model before that.** Perplexity is on {MEASURED} windows of {text.length} tokens of {name}, part
{list(text.part)}; ranks were chosen on others.

| | kept fraction of the model | perplexity |
| --- | --- | --- |
| before | {result.parameters_before:.4f} | {result.perplexity_before:.6g} |
| after | {result.parameters:.4f} | {result.perplexity:.6g} |
"""
