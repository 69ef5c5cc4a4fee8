"""Healing inside a search by successive halving: several plans of a size are healed a little, the best go on.

A rung heals each of its plans on windows that no other rung reads, from the state that the rung before left, and ranks
them by the divergence of windows that it holds out. Of every size one plan goes through all rungs: it is scored and
kept as a healed member of the front is. What others became goes when their rung is over.

A state is a folder, written and verified as any healed export, so a launch that was stopped goes on with the plan that
it was at. Entrants and scores are attributes of the study: trials that come later change no halving that has begun.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rankfront.methods import InputError
from rankfront.search import attributes as keys
from rankfront.search.config import StudyConfig, quality_of
from rankfront.search.constraint import Constraint
from rankfront.search.heal.settings import HealSettings
from rankfront.search.output.front_healing import FrontHealing, folder_of, stages_in
from rankfront.search.output.healed import settings_of
from rankfront.search.output.results import Results
from rankfront.search.storage.front import Row, comparable
from rankfront.search.storage.halving import Rung, entrants_of, rungs
from rankfront.search.storage.picking import holding

CHOOSING = 4_096  # tokens of a rung that are held out to rank its plans; guess
FEWEST = 2  # windows of a rung: one to train on and one that is held out


def check_healing(config: StudyConfig) -> None:
    """Raise `InputError` where a launch could not heal as its study says."""
    settings, _ = settings_of(config)
    if config.search.heal != "halving":
        return
    if settings.method == "trp":
        raise InputError(
            "heal.method is trp, which starts from the dense weights again, so no rung goes on from the one before:"
            ' set search.heal = "front", or another method'
        )
    assert config.data.heal is not None
    planned = _rungs(config, config.heal.entrants)
    shares(config.data.heal.windows, planned)
    least = replace(settings, tokens=planned[0].tokens)
    seen = min(least.budget(stage) for stage in least.stages)
    if seen < least.step_tokens and len(planned) > 1:
        raise InputError(
            f"the first rung of {config.heal.entrants} entrants has {seen} tokens for a stage of healing, less than a"
            f" step of {least.step_tokens}: give more heal.tokens, or fewer heal.entrants"
        )


def _rungs(config: StudyConfig, entrants: int) -> list[Rung]:
    return rungs(config.heal.tokens, entrants, config.heal.eta, config.heal.first_rung)


def shares(windows: int, planned: list[Rung]) -> list[int]:
    """How many of the windows each rung reads: as the tokens of one of its plans are, two at least. `InputError` where
    there are too few."""
    every = sum(rung.tokens for rung in planned)
    found = [max(FEWEST, windows * rung.tokens // every) for rung in planned[:-1]]
    left = windows - sum(found)
    if left < FEWEST:
        raise InputError(
            f"data.heal has {windows} windows, and {len(planned)} rungs read {FEWEST} or more each, none twice: give it"
            " more, or fewer heal.entrants"
        )
    return [*found, left]


@dataclass(frozen=True)
class _Size:
    """What goes on at one size: its limit, its rungs, and the windows of each (W, L)."""

    limit: str
    rungs: list[Rung]
    windows: tuple[torch.Tensor, ...]


class Halving(FrontHealing):
    """Heals plans of every size of ``heal.sizes``, of each size one to the end.

    Attributes:
        sizes: key of an entrant's plan -> where it entered.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.sizes: dict[str | None, _Size] = {}

    def _about(self) -> dict[str, Any]:
        config = self.setup.config.heal
        return {"halving": {"eta": config.eta, "entrants": config.entrants, "first_rung": config.first_rung}}

    def _next(self) -> Row | None:
        for limit in self.setup.config.heal.sizes:
            found = self.read()
            row = self._winner(found, limit)
            if row is None or self._is_out(row, found):
                continue
            if row.number not in found.healed.members or not self._folder(row).is_dir():
                return row
        return None

    def _winner(self, found: Results, limit: str) -> Row | None:
        """The plan of this size that goes through the last rung; None where no plan is so small, or none heals."""
        name, rows = keys.halving_of(self.healing["key"], limit), {r.plan_key: r for r in comparable(found.rows)}
        record: Any = found.state.known.get(name)
        if record is None:
            record = {"entrants": [row.plan_key for row in self._entrants(found, limit)], "scores": []}
            self._keep(name, record)
            tokens = self.setup.config.heal.tokens
            self.say(f"halving at {limit}: {len(record['entrants'])} plans, {tokens:,} tokens in all")
        alive = record["entrants"]
        if not alive:  # no plan is as small, or it has entered elsewhere
            return None
        planned = _rungs(self.setup.config, len(alive))
        windows = torch.split(self.windows, shares(len(self.windows), planned))
        self.sizes |= dict.fromkeys(alive, _Size(limit, planned, windows))
        for number in range(len(planned) - 1):
            if number == len(record["scores"]):
                tried = {key: None if key in self.failed else self._score(rows[key], number) for key in alive}
                lost = any(keys.LOST in self.failed.get(key, {}) for key in alive)
                if lost and set(tried.values()) == {None}:
                    return None  # memory was short for all: the next launch tries the rung again
                record["scores"].append(tried)
                self._keep(name, record)
            scores = record["scores"][number]
            alive = self._survivors(scores, planned[number + 1].plans)
        return rows[alive[0]] if alive else None

    def _entrants(self, found: Results, limit: str) -> list[Row]:
        """Trials that enter at a size: such as entered at no other."""
        config, known = self.setup.config, found.state.known
        others = [known.get(keys.halving_of(self.healing["key"], other), {}) for other in config.heal.sizes]
        taken = {key for record in others for key in record.get("entrants", [])}
        rows = [row for row in comparable(found.rows) if row.within and row.plan_key not in taken]
        rows = holding(rows, [Constraint.parse(text) for text in config.heal.where])
        weights = {site.name: sum(w.out_features * w.in_features for w in site.weights) for site in found.sites}
        front = {row.number for row in found.members}
        return entrants_of(rows, front, Constraint.parse(limit), quality_of(config), weights, config.heal.entrants)

    def _score(self, row: Row, number: int) -> float | None:
        """Held-out divergence after a rung; None where the plan could not be healed."""
        record = self._sparing(row, lambda: {"after": stages_in(self._state(row, number))[-1]["after"]})
        return float(record["after"]) if keys.FAILURE not in record else None

    def _survivors(self, scores: Mapping[str, float | None], most: int) -> list[str]:
        """The plans of the best scores; what others became goes."""
        healed = {key: score for key, score in scores.items() if score is not None}
        best = sorted(healed, key=lambda key: healed[key])[:most]
        for key in scores.keys() - set(best):
            for left in folder_of(self.run).glob(f".{key}-{self.healing['key']}.*"):
                shutil.rmtree(left, ignore_errors=True)
        return best

    def _state(self, row: Row, number: int) -> Path:
        """The folder of a plan as a rung left it, healed where it is not there."""
        size, folder = self.sizes[row.plan_key], self._folder(row)
        last = number == len(size.rungs) - 1
        if not last:
            folder = folder.with_name(f".{folder.name}.rung{number}")
        if not folder.is_dir():
            start = self._state(row, number - 1) if number else None
            rung, windows = size.rungs[number], size.windows[number]
            of = f"rung {number + 1} of {len(size.rungs)} at {size.limit}"
            self.say(f"{of}: healing trial {row.number} by {rung.tokens:,} tokens, one of {rung.plans} plans")
            self._write(row, folder, self._settings(rung, windows, last), windows, start)
        return folder

    def _settings(self, rung: Rung, windows: torch.Tensor, last: bool) -> HealSettings:
        """Those of the study; rungs that rank hold out enough for that."""
        settings = replace(self.settings, tokens=rung.tokens)
        share = min(0.5, CHOOSING / windows.numel())
        return settings if last else replace(settings, held_out=max(settings.held_out, share))

    def _made(self, row: Row) -> list[dict[str, Any]]:
        count = len(self.sizes[row.plan_key].rungs)
        return [stage for number in range(count) for stage in stages_in(self._state(row, number))]

    def _healed(self, row: Row) -> dict[str, Any]:
        found, size = self.read(), self.sizes[row.plan_key]
        scores = found.state.known[keys.halving_of(self.healing["key"], size.limit)]["scores"]
        number = {each.plan_key: each.number for each in comparable(found.rows)}
        ranked = [
            {"tokens": rung.tokens, "scores": {str(number[key]): score for key, score in of.items()}}
            for rung, of in zip(size.rungs, scores, strict=False)  # the last rung ranks nothing
        ]
        return super()._healed(row) | {"halving": {"size": size.limit, "rungs": ranked}}
