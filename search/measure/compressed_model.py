"""A model that stays loaded and runs one plan after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rankfront.methods import DENSE, DENSE_OPTION, Factors, InputError, Option, Site, get_method, measured_as
from rankfront.methods.layers import replacement, row_scale, set_module
from rankfront.search.inputs.device import DTYPES
from rankfront.search.inputs.memory import ample
from rankfront.search.inputs.model import count_parameters, load_model, load_tokenizer, use_attention
from rankfront.search.inputs.own_text import Progress
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure.prepare import prepare_store
from rankfront.search.measure.setup import Setup, make_space
from rankfront.search.names import Place
from rankfront.search.plans.plan import Plan, check_disjoint, check_option


class CompressedModel:
    """The dense model of a study with a plan applied; only sites whose option changed are swapped.

    Attributes:
        model: what transformers loaded, with modules of factors in the place of dense ones.
        sites: every site of it -> where it sits.
        dense_modules: path -> the dense module of every weight that a site has.
        current: site name -> option that runs there.
        modules: path -> what runs in the place of the dense module.
        layers: path -> kind and settings of that module, as an export names them.
        copies: whether memory is ample, and what runs are copies of factors: a process that runs what is mapped dies
            when the file is cut short. Else they stay mapped.
    """

    def __init__(self, setup: Setup, progress: Progress = lambda phase, done, total: None) -> None:
        self.setup = setup
        self.space = make_space(setup)
        self.store = prepare_store(setup, self.space, progress)  # only where this node has no copy of the store
        self.model = load_model(setup.source, DTYPES[setup.dtype], setup.device)
        use_attention(self.model, setup.config.model.attention)
        self.sites: dict[Site, Place] = {
            site: place for site, place in find_sites(self.model).items() if site.name not in setup.refused
        }
        _check_same_sites(self.space.sites, self.sites)
        self.names = {site.name for site in self.sites}
        self.dense_values = count_parameters(self.model)
        self.copies = ample(self.dense_values * DTYPES[setup.dtype].itemsize, torch.device(setup.device))
        self.dense_modules = {
            path: self.model.get_submodule(path)
            for site in self.sites
            for weight in site.weights
            for path in weight.paths
        }
        treated = (weight for site in self.space.choices for weight in site.weights)
        scales = {p: row_scale(self.dense_modules[p]) for weight in treated for p in weight.paths}
        self.scales = {path: {"scale": scale} for path, scale in scales.items() if scale is not None}
        self.current: dict[str, Option] = {}
        self.modules: dict[str, nn.Module] = {}  # what runs in the place of dense ones, by path
        self.layers: dict[str, dict[str, Any]] = {}  # their kinds and settings, as an export names them

    def apply(self, plan: Plan) -> None:
        """Make the model run ``plan``: only the sites whose option changed are touched.

        Raises `InputError` where the plan names a site that this model does not have, treats a weight twice, or has an
        option that is none there.
        """
        unknown = plan.by_site.keys() - self.names
        if unknown:
            raise InputError(f"the plan names {min(unknown)!r}, which this model does not have: it belongs to another")
        check_disjoint(site for site in self.sites if site.name in plan.by_site)
        changed = [
            (site, option)
            for site in self.sites
            if (option := plan.option(site.name)) != self.current.get(site.name, DENSE_OPTION)
        ]
        for site, option in changed:
            if option != DENSE_OPTION:
                check_option(site, option)
        # Dense first: a weight that one site lets go of may be another's to treat.
        for site, option in sorted(changed, key=lambda change: change[1] != DENSE_OPTION):
            self._swap(site, option)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.setup.source)

    def apply_one(self, site: Site, option: Option) -> None:
        """Make the model run dense but for one site."""
        self.apply(Plan.of({site.name: option}))

    def _swap(self, site: Site, option: Option) -> None:
        factors = {} if option.method == DENSE else self.store.factors(site, option)
        for weight in site.weights:
            if weight.role not in factors:  # of some options, what they leave as it is
                for path in weight.paths:
                    self.modules.pop(path, None)
                    self.layers.pop(path, None)
                    set_module(self.model, path, self.dense_modules[path])
        if factors:
            self.replace(site, factors)
        self.current[site.name] = option

    def replace(self, site: Site, factors: Mapping[str, Factors]) -> None:
        """Run ``factors`` at a site that the plan treats, instead of those of its option, until the site changes."""
        paths = {weight.role: weight.paths for weight in site.weights if weight.role in factors}
        modules = self.made(paths, factors)
        self.modules |= modules
        for path, module in modules.items():
            set_module(self.model, path, module)
        for role, own in paths.items():
            self.layers |= {
                path: {"kind": factors[role].kind, **factors[role].settings, **self.scales.get(path, {})}
                for path in own
            }

    def made(self, paths: Mapping[str, Sequence[str]], factors: Mapping[str, Factors]) -> dict[str, nn.Module]:
        """Modules that run each role's ``factors`` in the place of the dense ones at its ``paths``.

        A tensor that several of them have stays one. All are made before any is put in place: a site is treated whole
        or not at all.
        """
        distinct = {id(tensor): tensor for role in paths for tensor in factors[role].tensors.values()}
        held = {number: self._held(tensor) for number, tensor in distinct.items()}
        modules: dict[str, nn.Module] = {}
        for role, own in paths.items():
            chosen = factors[role]
            tensors = {name: held[id(tensor)] for name, tensor in chosen.tensors.items()}
            for path in own:
                dense = self.dense_modules[path]
                same = next((modules[p] for p in own if p in modules and self.dense_modules[p] is dense), None)
                modules[path] = same or replacement(dense, chosen.kind, tensors, chosen.settings)
        return modules

    def _held(self, tensor: Tensor) -> Tensor:
        """``tensor`` of some factors as it runs, see `copies`."""
        if not tensor.is_floating_point():
            return tensor.to(self.setup.device, copy=self.copies)
        own = tensor.to(self.setup.device, DTYPES[self.setup.dtype], copy=self.copies)
        transposed = own.ndim == 2 and own.T.is_contiguous()  # runs as well, and to lay it out would be a copy
        return nn.Parameter(own if transposed and not self.copies else own.contiguous(), requires_grad=False)

    @contextmanager
    def anchored(self) -> Iterator[None]:
        """Within, joint sites run as what does the same at their anchors alone, all else of theirs dense: what other
        options of them would read is there then."""
        joint = [site for site in self.sites if len(site.weights) > 1 and site.name in self.current]
        try:
            for site in joint:
                option = self.current[site.name]
                if option != DENSE_OPTION:
                    option = measured_as(site, option)
                    for path in (path for weight in site.weights for path in weight.paths):
                        set_module(self.model, path, self.dense_modules[path])
                    for part in site.parts:
                        factors = get_method(option.method).equivalent(part, self.store.load(site, option), option)
                        role, paths = part.anchor.role, part.anchor.paths
                        for path, module in self.made({role: paths}, {role: factors}).items():
                            set_module(self.model, path, module)
            yield
        finally:
            for path, module in self.modules.items():
                set_module(self.model, path, module)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Within, the model runs dense; after, its plan again. Moves references only."""
        try:
            for path in self.modules:
                set_module(self.model, path, self.dense_modules[path])
            yield
        finally:
            for path, module in self.modules.items():
                set_module(self.model, path, module)


def _check_same_sites(planned: Mapping[Site, Place], loaded: Mapping[Site, Place]) -> None:
    """Raise `InputError` where the space was made of other sites than the loaded model has."""
    different = planned.keys() ^ loaded.keys()
    if different:
        name = min(site.name for site in different)
        raise InputError(
            f"{name!r} is another site in the loaded model than by its configuration alone: make config.json agree with"
            " the checkpoint, such as in tie_word_embeddings"
        )
