"""The jobs that a menu is measured in: which plans they probe, and how their records become one menu.

Source ``grouped``, the default, is the gradient's quadratic, then one probe of each group of sites (kind of projection
x band of depth): its sites compressed together to about `Tuning.group_keep`, all else dense. The measured divergence
over the predicted one scales the predictions of the group,

    d'_i(o) = d_i(o) · KL(group) / Σ_{j in group} d_j(o_j),

for a quadratic around the dense model misjudges large steps alike in sites that are alike: through the softmax of
attention above all. One probe a site at a large step is what LEMS does; probes of whole groups are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rankfront.methods import InputError, Option, Site, get_method
from rankfront.search import attributes as keys
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.menu import TINY, Predictions
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.space import Space
from rankfront.search.tuning import TUNING

GROUPED = "grouped"


def menu_jobs(source: str, sites: int) -> int:
    """How many jobs a menu of ``sites`` from ``source`` is measured in, before any probes of groups."""
    return min(TUNING.probe_jobs, sites) if source in TUNING.probe_fractions else 1


class MenuJobs:
    """Which jobs the menu of ``space`` from ``source`` is measured in, of a study that knows so much of it."""

    def __init__(self, space: Space, source: str) -> None:
        self.space = space
        self.source = source

    def missing(self, known: Mapping[str, Any]) -> list[Job]:
        """Those without a record, as far as is ``known``: the first job decides how many there are."""
        plans = self._plans(known.get(keys.menu_part(0)))
        return [Job("menu", part, plan) for part, plan in enumerate(plans) if keys.menu_part(part) not in known]

    def kept(self, part: int, record: Record, known: Mapping[str, Any]) -> Record:
        """What is kept of what a job measured: with it, how many jobs there are. `InputError` where it failed.

        A group whose probe failed leaves the menu."""
        first = known.get(keys.menu_part(0), record if part == 0 else None)
        probed = self._plans(first)[part].by_site if keys.FAILURE in record and part and first is not None else {}
        if probed and keys.LOST not in record:
            left = dict.fromkeys(probed, record[keys.FAILURE])
            record = {"predictions": {}, "unscored": left, "tokens": 0, "seconds": {}}
        elif keys.FAILURE in record:
            advice = "give a trial more memory, or set" if keys.LOST in record else "set"
            raise InputError(
                f"the menu could not be made by {self.source!r} ({record[keys.FAILURE]}): {advice} search.menu to"
                " another"
            )
        return record | {"jobs": len(self._plans(first))}

    def _plans(self, first: Record | None) -> list[Plan]:
        """The plan of each job: dense, but where a group is probed, which the ``first`` job's record decides on."""
        plans = [Plan(())] * menu_jobs(self.source, len(self.space.choices))
        if self.source == GROUPED and first is not None:
            plans += group_plans(self.space.bands(TUNING.group_bands), self.space.wanted(), first["predictions"])
        return plans


def menu_record(known: Mapping[str, Any]) -> Record | None:
    """The menu that a study's attributes hold, the records of its jobs as one; None while any is missing."""
    parts: list[Record] | None = keys.menu_parts(known)
    if parts is None:
        return None
    merged = parts[0].copy()
    for part in parts[1:]:
        merged["tokens"] += part["tokens"]
        merged["seconds"] = {k: v + part["seconds"].get(k, 0.0) for k, v in merged["seconds"].items()}
        merged["unscored"] = unscored = {**merged.get("unscored", {}), **part.get("unscored", {})}
        if "probed" in part:
            merged["predictions"] = scaled_by_group(merged["predictions"], part["probed"], part["divergence"])
        else:
            found = {**merged["predictions"], **part["predictions"]}
            merged["predictions"] = {site: known for site, known in found.items() if site not in unscored}
    return merged


def group_plans(
    groups: Iterable[Sequence[Site]], wanted: Mapping[Site, Sequence[Option]], predictions: Predictions
) -> list[Plan]:
    """What the grouped source probes: each group's sites at the option nearest `Tuning.group_keep` of their storage, of
    the method with the least predicted divergence there. Groups of which nothing is predicted are left out."""
    plans, widest = [], TUNING.group_keep + TUNING.group_wider
    for sites in groups:
        near = probe_options({site: wanted[site] for site in sites if site in wanted}, (TUNING.group_keep,))
        chosen = {}
        for site, options in near.items():
            known = predictions.get(site.name, {})
            predicted = [o for o in options if o.label in known and _share(site, o) < 1]
            predicted = [o for o in predicted if _share(site, o) <= widest] or predicted
            if predicted:
                chosen[site.name] = min(predicted, key=lambda option: known[option.label])
        if chosen:
            plans.append(Plan.of(chosen))
    return plans


def _share(site: Site, option: Option) -> float:
    """What it stores of the dense site, in numbers: one that only rounds them stores them all."""
    return get_method(option.method).storage(site, option).parameters / site.storage.parameters


def scaled_by_group(
    predictions: Predictions, probed: Mapping[str, str], divergence: float | None
) -> dict[str, Mapping[str, float]]:
    """``predictions`` with those of the ``probed`` sites (name -> label) scaled to what was measured of them together;
    None where that was not finite."""
    predicted = max(sum(predictions[site][label] for site, label in probed.items()), TINY)
    ratio = TUNING.worst_ratio if divergence is None else max(divergence, TINY) / predicted
    ratio = min(max(ratio, 1 / TUNING.worst_ratio), TUNING.worst_ratio)
    scaled = {site: {label: ratio * value for label, value in predictions[site].items()} for site in probed}
    return {**predictions, **scaled}


def probe_options(wanted: Mapping[Site, Sequence[Option]], fractions: Sequence[float]) -> dict[Site, list[Option]]:
    """The options to probe at each site: per method, those nearest to ``fractions`` of its dense storage."""
    chosen: dict[Site, list[Option]] = {}
    for site, options in wanted.items():
        picked = {
            min((o for o in options if o.method == method), key=lambda o: abs(_share(site, o) - fraction))
            for method in {option.method for option in options}
            for fraction in fractions
        }
        chosen[site] = sorted(picked, key=lambda option: option.label)
    return chosen
