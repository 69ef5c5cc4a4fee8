"""What holds of every architecture, looked at for one type: sites, a tiny study, its laws, an export, decoding."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import random_text, tiny_tokenizer, tokens
from launching import quiet, small_data, verify_here
from tiny import tiny_config, tiny_model, wide_config
from torch import nn
from transformers import AutoModelForCausalLM

from rankfront.methods import Factors, Option, Site, get_method
from rankfront.methods.layers import set_module, weight_of
from rankfront.objectives._caches import cache_of
from rankfront.search.inputs.apart import take_apart
from rankfront.search.inputs.coverage import coverage_of
from rankfront.search.inputs.sites import find_sites
from rankfront.search.measure.compressed_model import CompressedModel
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study

JOINT = ("lama", "vo-svd", "nystrom", "drop-block")
METHODS = ("svd-llm", "kfac-svd", *JOINT)
CLOSE = 2e-3  # of the largest logit: fp32 through a few blocks


class Examined:
    """One type, step by step; what goes wrong at a step is a line under its name."""

    def __init__(self, name: str, patch: Any) -> None:
        self.name, self.patch = name, patch
        self.failed: dict[str, str] = {}
        self.found: dict[str, Any] = {}

    def row(self) -> dict[str, Any]:
        """What was found, as plain data."""
        try:
            self.model = tiny_model(self.name)
            self.dense = logits(self.model)
        except Exception as error:  # noqa: BLE001 - what is wrong with the type, whatever it is
            return {"built": False, "failed": {"build": one_line(error)}}
        self.folder = Path(tempfile.mkdtemp(prefix="rankfront-type-"))
        try:
            for step in (self.sites, self.study, self.laws, self.export, self.cache):
                self.attempt(step)
                if step.__name__ in self.failed and step.__name__ != "laws":
                    break
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        return {"built": True, "failed": self.failed, "coverage": 0.0, "left": [], "joint": [], **self.found}

    def attempt(self, step: Callable[[], str | None]) -> None:
        try:
            said = step()
        except Exception as error:  # noqa: BLE001
            said = one_line(error)
        if said:
            self.failed[step.__name__] = said.replace(str(self.folder), "")

    def sites(self) -> str | None:
        model = copy.deepcopy(self.model)
        take_apart(model)
        if (gap := apart(logits(model), self.dense)) > CLOSE:
            return f"taken apart, it is another model ({gap:.1g})"
        self.found |= {"sites": len(find_sites(model))}
        self.cover({})
        return None

    def cover(self, refused: Mapping[str, str]) -> None:
        """Coverage at the widths of the default configuration, without the sites that the tiny model ``refused``."""
        with torch.device("meta"):
            wide = AutoModelForCausalLM.from_config(wide_config(self.name))
        take_apart(wide)
        sites = find_sites(wide)
        coverage = coverage_of(wide, sites).without(sites, refused)
        self.found |= {
            "coverage": round(coverage.share, 4),
            "reached_coverage": round(coverage.reached_share, 4),
            "left": [f"{each.name}: {each.values / coverage.values:.1%}, {each.why}" for each in coverage.left[:4]],
        }

    def study(self) -> str | None:
        self.model.save_pretrained(self.folder / "model")
        tiny_config(self.name).save_pretrained(self.folder / "model")  # of some types only a part is the model's own
        tiny_tokenizer().save_pretrained(self.folder / "model")
        text = self.folder / "text.txt"
        text.write_text(random_text(4000), encoding="utf-8")
        data = small_data(self.folder / "model", text, trials=3)
        data["space"] = {"methods": list(METHODS), "keep": [0.5], "rank_multiple": 2, "allow_partial": True}
        data["search"] |= {"anchors": []}
        self.study_run = Study(data, self.folder / "run")
        self.study_run.launch(quiet())
        offered = self.resident.space.methods  # of what numbers accept
        self.found["joint"] = [name for name in JOINT if name in offered]
        self.cover(self.resident.setup.refused)
        rows = self.study_run.rows()
        bad = [str(row.failure) for row in rows if row.state != "complete"]
        if bad:
            return f"{len(bad)} of {len(rows)} trials failed: {bad[0]}"
        return None

    @cached_property
    def resident(self) -> CompressedModel:
        return CompressedModel(self.study_run.setup())

    def laws(self) -> str | None:
        """Full rank leaves the logits alone; a joint treatment is what its stand-in is, with a cache and without."""
        model = self.resident.model
        if apart(logits(model), self.dense) > CLOSE:
            return "the saved model, loaded again, has other logits"
        wrong = self._singles()
        kinds: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
        for site, options in self.resident.space.wanted().items():
            for option in options:
                if option.method in JOINT:
                    kinds.setdefault((option.method, site.roles), {})[site.name] = option
        for (method, _), chosen in kinds.items():
            self.resident.apply(self.resident.space.disjoint(Plan.of(chosen)))
            treated = logits(model)
            with self.resident.anchored():
                gap = apart(logits(model), treated)
            if gap > CLOSE:
                wrong.append(f"{method} is not its stand-in ({gap:.1g})")
            cached = apart(stepwise(model), treated[:1, :12])
            if cached > CLOSE and apart(stepwise(self.model), self.dense[:1, :12]) <= CLOSE:
                wrong.append(f"{method} with a cache is another model ({cached:.1g})")
        self.resident.apply(Plan(()))
        return "; ".join(wrong)

    def _singles(self) -> list[str]:
        model = self.resident.model
        singles = [site for site in self.resident.sites if len(site.weights) == 1]
        put: dict[str, nn.Module] = {}
        for site in singles:
            put |= self.resident.made({"weight": site.anchor.paths}, full_rank(model, site))
        for path, module in put.items():
            set_module(model, path, module)
        gap = apart(logits(model), self.dense)
        for path in put:
            set_module(model, path, self.resident.dense_modules[path])
        return [f"factors of full rank are another model ({gap:.1g})"] if gap > CLOSE else []

    def export(self) -> str | None:
        verify_here(self.patch)
        rows = [row for row in self.study_run.rows() if row.plan.choices]
        row = max(rows, key=lambda row: len({option.method for _, option in row.plan.choices}))
        self.resident.apply(row.plan)
        expected = logits(self.resident.model)
        self.study_run.export(self.folder / "out", row)
        self.loaded = AutoModelForCausalLM.from_pretrained(self.folder / "out").eval()
        gap = apart(logits(self.loaded), expected)
        return f"reloaded, it has other logits ({gap:.1g})" if gap > CLOSE else None

    def cache(self) -> str | None:
        """The reloaded export step by step gives what it gives at once, if the dense model does."""
        gap = apart(stepwise(self.loaded), logits(self.loaded)[:1, :12])
        if gap <= CLOSE:
            return None
        dense = apart(stepwise(self.model), self.dense[:1, :12])
        return None if dense > CLOSE else f"step by step it gives something else ({gap:.1g})"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens(2, 20), use_cache=False).logits.float()
    return found


@torch.no_grad()
def stepwise(model: Any) -> torch.Tensor:
    """Logits (1, 12, V) of a prompt at once and then token by token, with whatever cache the model makes."""
    ids = tokens(2, 20)[:1, :12]
    out = model(input_ids=ids[:, :5], use_cache=True)
    found = [out.logits.float()]
    for i in range(5, 12):
        out = model(input_ids=ids[:, i : i + 1], use_cache=True, **cache_of(out))
        found.append(out.logits.float())
    return torch.cat(found, dim=1)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """max |difference| over max |logit|; infinite where something is not finite."""
    gap = float((one - other).abs().max() / other.abs().max())
    return gap if gap == gap else float("inf")


def full_rank(model: Any, site: Site) -> Mapping[str, Factors]:
    """Factors of full rank of the one weight of ``site``."""
    (weight,) = site.weights
    option = Option.of("svd", rank=min(weight.out_features, weight.in_features))
    dense = model.get_submodule(weight.path)
    return get_method("svd").truncate(
        get_method("svd").prepare(site, {"weight": weight_of(dense)}, {}, [option]), option
    )


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
