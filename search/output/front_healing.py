"""Healing inside a search: plans are healed, scored as trials are, and kept under the run.

Which, and in how many goes, is what kinds of healing differ in: members of the front here, see `halving` for another.
Each lies in a folder of its own, ``RUN/healed/PLAN-HEALING``, which is an export like any other: PLAN is the plan's
key, HEALING a hash of the settings, the windows, the seed and the dense model. The record of what was measured is an
attribute of the study; what has both is not healed again. What was begun goes on from its checkpoint, in the hidden
folder beside it. See `storage.healed` for which members of the front are healed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from rankfront.methods import InputError
from rankfront.objectives import Teacher, score, teach
from rankfront.search import attributes as keys
from rankfront.search.atomic import new_folder, staged
from rankfront.search.errors import ExportError, Interrupted, Unwritable
from rankfront.search.heal.settings import HealSettings
from rankfront.search.heal.trainable import NothingToHeal
from rankfront.search.inputs.device import DTYPES, drop_unreachable, failure_of
from rankfront.search.inputs.model import count_bytes, load_model, load_tokenizer, use_attention
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.text import hash_tokens
from rankfront.search.measure.control import reported
from rankfront.search.measure.setup import Setup
from rankfront.search.output.card import Verified
from rankfront.search.output.derived import RECORD
from rankfront.search.output.export import check_same, verify_folder, writing
from rankfront.search.output.healed import export_healed, settings_of
from rankfront.search.output.healing_progress import Line, Say
from rankfront.search.output.results import Results
from rankfront.search.output.tensor_table import before_section
from rankfront.search.storage.checked import close
from rankfront.search.storage.folder import Run
from rankfront.search.storage.front import Row
from rankfront.search.storage.healed import Healed, next_to_heal


def folder_of(run: Run) -> Path:
    """Where a run keeps healed members."""
    return run.path / "healed"


class FrontHealing:
    """Heals members of a study's front.

    Args:
        run: of the study.
        setup: the study resolved on this machine.
        windows: what is healed on (W, L).
        read: reads the study anew.
        line, say: show how far a healing is, and print a line.
    """

    def __init__(
        self, run: Run, setup: Setup, windows: torch.Tensor, read: Callable[[], Results], line: Line, say: Say
    ) -> None:
        self.run, self.setup, self.windows, self.read, self.line, self.say = run, setup, windows, read, line, say
        self.failed: dict[str | None, dict[str, Any]] = {}  # plans of this launch that were not healed
        self.settings, refit = settings_of(setup.config)
        told = {**_chosen(self.settings), "refit": refit}
        about = {"settings": told, "windows": hash_tokens(windows), "dense": setup.fingerprint, **self._about()}
        text = json.dumps(about, sort_keys=True)
        split = setup.config.data.heal
        self.healing: dict[str, Any] = {
            "key": hashlib.sha256(text.encode()).hexdigest()[:16],
            **json.loads(text),
            "text": "" if split is None else split.label,
        }

    def _about(self) -> dict[str, Any]:
        """What else makes a healing another one."""
        return {}

    def heal(self) -> None:
        """Heal the members that are due. Those that are done are kept, whatever happens; one that fails is recorded so,
        and the next one is healed.

        Raises `InputError` for what the user can mend, `Unwritable` where the disk is full, `Interrupted` on Ctrl-C or
        SIGTERM.
        """
        if self.read().state.known.get(keys.HEALING) != self.healing:
            self._keep(keys.HEALING, self.healing)
        try:
            while (row := self._next()) is not None:
                record = self._sparing(row, partial(self._healed, row))
                if keys.FAILURE not in record:
                    self._keep(keys.healed_of(row.plan.key, self.healing["key"]), record)
        except KeyboardInterrupt as error:
            raise Interrupted("stopped: healed members and the last checkpoint are kept") from error
        due = tuple(f".{plan}-" for plan, record in self.failed.items() if keys.LOST in record)
        for left in folder_of(self.run).glob(f".*-{self.healing['key']}.*"):  # of plans that left the front meanwhile
            if not left.name.startswith(due):
                shutil.rmtree(left, ignore_errors=True)

    def _sparing(self, row: Row, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` gives of ``row``. Where that fails, the record of the failure, which is kept and said: it is of
        this plan alone, whatever it is, but for what the user can mend and what the disk does not take."""
        try:
            record = make()
        except NothingToHeal as error:
            record = {keys.FAILURE: str(error)}
        except (InputError, Interrupted, Unwritable):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system's, and not a library's
                raise
            record = failure_of(error)
        if keys.FAILURE in record:
            drop_unreachable()
            if keys.LOST not in record:
                shutil.rmtree(self._folder(row), ignore_errors=True)
            self.failed[row.plan_key] = record
            self._keep(keys.healed_of(row.plan.key, self.healing["key"]), record)
            place = f" at {record[keys.PLACE]}" if keys.PLACE in record else ""
            self.say(f"trial {row.number} was not healed: {record[keys.FAILURE]}{place}")
        return record

    def _is_out(self, row: Row, found: Results) -> bool:
        """Whether ``row`` could not be healed: what memory was short for, in this launch alone."""
        record = found.healed.failed.get(row.number)
        return record is not None and (keys.LOST not in record or row.plan_key in self.failed)

    def _next(self) -> Row | None:
        """The trial whose plan is due, or None."""
        config, found = self.setup.config.heal, self.read()
        front = [row for row in found.front(*config.where) if row.plan.choices and not self._is_out(row, found)]
        done = {row.number for row in front if row.number in found.healed.members and self._folder(row).is_dir()}
        row = next_to_heal(front, done, config.members)
        if row is not None:
            many = min(config.members, len(front))
            self.say(f"healing trial {row.number}, {len(done) + 1} of {many} members of the front")
        return row

    def _folder(self, row: Row) -> Path:
        return folder_of(self.run) / f"{row.plan.key}-{self.healing['key']}"

    def _keep(self, name: str, record: Any) -> None:
        storage = self.run.study(self.setup.config, write=True)
        try:
            storage.set_user_attr(name, record)
        finally:
            close(storage)

    def _healed(self, row: Row) -> dict[str, Any]:
        """The record of ``row``, healed where its folder is not there yet."""
        folder, stages = self._folder(row), self._made(row)
        source = resolve(str(folder), self.setup.source.trust_remote_code)
        measured = self._scored(row, source)
        if keys.FAILURE in measured:
            return measured
        tokens = sum(stage["tokens"] for stage in stages)
        return {"folder": folder.name, "weights": source.fingerprint, "tokens": tokens, "stages": stages, **measured}

    def _made(self, row: Row) -> list[dict[str, Any]]:
        """Heal ``row`` where its folder is not there yet; what each stage did. Raises `NothingToHeal`."""
        folder = self._folder(row)
        if not folder.is_dir():
            self._write(row, folder, self.settings, self.windows)
        return stages_in(folder)

    def _write(
        self, row: Row, folder: Path, settings: HealSettings, windows: torch.Tensor, start: Path | None = None
    ) -> None:
        """Heal ``row``, from ``start`` on where that is given, to the new ``folder``."""
        dense = self.read().dense_report
        with self.line() as show:
            export_healed(self.setup, row, folder, windows, settings, dense, show, self.say, start)

    def _scored(self, row: Row, source: Source) -> dict[str, Any]:
        """The losses of the healed model on what trials read, and its report."""
        model = self._loaded(source, "auto")
        stored, wanted = count_bytes(model), row.figure("bytes")
        if stored != wanted:
            raise ExportError(f"healed, trial {row.number} stores {stored:,} bytes and not {wanted:,.0f}: not kept")
        scores = score(model, self._read_by_trials, self._teacher)
        values = {"perplexity": scores.perplexity}
        if self._teacher is not None:
            values["divergence"] = scores.divergence
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            return {keys.FAILURE: f"not finite after healing: {', '.join(bad)}"}
        return {
            "values": values,
            "report": dict(reported(model, self.setup.tokens, load_tokenizer(source), self.setup.config.tasks)),
        }

    def _loaded(self, source: Source, dtype: torch.dtype | Literal["auto"]) -> Any:
        model = load_model(source, dtype, self.setup.device)
        use_attention(model, self.setup.config.model.attention)
        return model

    @property
    def _read_by_trials(self) -> torch.Tensor:
        return self.setup.tokens["search"][: self.setup.config.trial_windows]

    @cached_property
    def _teacher(self) -> Teacher | None:
        """The dense model's predictions on what trials read, where an objective wants them."""
        if "divergence" not in self.setup.config.objectives:
            return None
        return teach(self._loaded(self.setup.source, DTYPES[self.setup.dtype]), self._read_by_trials)


def _chosen(settings: HealSettings) -> dict[str, Any]:
    """What is not left at its default: settings that later versions add do not make a healing another one."""
    return {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.default is MISSING or getattr(settings, field.name) != field.default
    }


def stages_in(folder: Path) -> list[dict[str, Any]]:
    """What each stage did, as the folder of a healed model says."""
    try:
        stages: list[dict[str, Any]] = json.loads((folder / RECORD).read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / RECORD} is corrupt ({error}): remove its folder, and launch again") from error
    return stages


def export_stored(run: Run, setup: Setup, healed: Healed, out: Path) -> Verified:
    """Copy a healed member to the new folder ``out`` and verify it there: the weights that were scored, bit for bit.

    Raises `InputError` where ``out`` is taken, or the member is not what was scored any more; `ExportError` where
    writing or verifying fails.
    """
    out, folder, trusted = new_folder(out), folder_of(run) / healed.record["folder"], setup.source.trust_remote_code
    if not folder.is_dir() or resolve(str(folder), trusted).fingerprint != healed.record["weights"]:
        raise InputError(
            f"{str(folder)!r} is not there, or not what was scored: remove it, and launch the study to heal trial"
            f" {healed.row.number} again"
        )
    perplexity = healed.row.figure("perplexity")
    with writing(out), staged(out) as staging:
        shutil.copytree(folder, staging, dirs_exist_ok=True)
        if resolve(str(staging), trusted).fingerprint != healed.record["weights"]:
            raise ExportError(f"the copy of {str(folder)!r} differs: not kept")
        windows = setup.tokens["search"][: setup.config.trial_windows]
        verified = verify_folder(staging, windows, setup.device, trusted)
        check_same("healed export", verified, perplexity)
        if verified.bytes != healed.row.figure("bytes"):
            raise ExportError(f"the export has {verified.bytes:,} bytes and the plan another number: not kept")
        card = staging / "README.md"
        line = f"Healed, its perplexity on the search split is {verified.perplexity:.6g}, reloaded."
        card.write_text(before_section(card.read_text(encoding="utf-8"), line), encoding="utf-8")
    return replace(verified, parameters=healed.row.attributes[keys.PARAMETER_COUNT])  # integers and index bits too
