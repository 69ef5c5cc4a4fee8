"""Heal an exported folder: a new folder with the same plan, whose factors were trained towards the dense model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

import rankfront
from rankfront.methods import InputError, check_choice
from rankfront.methods.checkpoint import QUANT_METHOD
from rankfront.objectives import score
from rankfront.search.atomic import new_folder
from rankfront.search.attributes import Report
from rankfront.search.choices import Refit
from rankfront.search.config import StudyConfig
from rankfront.search.errors import Interrupted, Unwritable
from rankfront.search.heal.adapter import adapt
from rankfront.search.heal.arms import ARMS
from rankfront.search.heal.healing import Healing, Show
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.memory import check, need_of
from rankfront.search.heal.processes import Processes
from rankfront.search.heal.scratch import initialise
from rankfront.search.heal.settings import HealSettings
from rankfront.search.heal.status import StageResult
from rankfront.search.inputs.capacity import capacity_of
from rankfront.search.inputs.device import pick_device
from rankfront.search.inputs.memory import free_bytes
from rankfront.search.inputs.model import load_model, load_tokenizer, quantisation, read_config
from rankfront.search.inputs.resolve import resolve
from rankfront.search.inputs.sites import blocks
from rankfront.search.inputs.source import Source
from rankfront.search.inputs.text import cut, hash_tokens, read_text, tokenize
from rankfront.search.measure.setup import Setup
from rankfront.search.output.card import REFIT_NOTE
from rankfront.search.output.derived import write_derived
from rankfront.search.output.export import export
from rankfront.search.output.healing_card import HealText, note
from rankfront.search.plain import without_folders
from rankfront.search.plans.plan import Plan
from rankfront.search.splits import Split
from rankfront.search.storage.front import Row

Say = Callable[[str], None]


def heal_folder(
    folder: Path,
    text: HealText,
    settings: HealSettings,
    out: Path,
    windows: torch.Tensor | None = None,
    dense: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    show: Show = lambda status: None,
    say: Say = lambda line: None,
) -> list[StageResult]:
    """Heal the factored export ``folder`` and write it to the new folder ``out``, verified there as an export is.

    ``windows`` (W, L) are those of the text; by default as many as the tokens need, spread over its part. ``dense``
    names the model that it was made of; by default what its plan says, which names no local folder. An interrupted
    healing goes on from its checkpoint in the hidden folder ``.OUT.healing`` when it is asked for again with the same
    settings.

    Raises `InputError` for what the user can mend, `ExportError` where writing or verifying fails, `Interrupted` on
    Ctrl-C or SIGTERM.
    """
    out = new_folder(out)
    source = resolve(str(folder), trust_remote_code)
    plan = plan_of(folder, source)
    teacher_source = None if settings.from_scratch else _teacher_of(plan, folder, dense, trust_remote_code)
    processes = Processes()
    if not processes.first:
        show, say = (lambda status: None), (lambda line: None)
    device = pick_device(processes.device(device))
    windows = _windows(source, text, settings) if windows is None else windows
    identity = {
        "plan": plan.key, "folder": source.fingerprint, "dense": teacher_source and teacher_source.fingerprint,
        "text": hash_tokens(windows), "settings": asdict(settings), "device": torch.device(device).type,
    }  # fmt: skip
    keeper = processes.one_by_one(lambda: Keeper(out.with_name(f".{out.name}.healing"), identity))
    student = load_model(source, "auto", device)
    capacity = capacity_of(student)
    capacity.check_length(text.length, "--length")
    capacity.check_tokens({"heal": windows})
    if teacher_source is None:
        initialise(student, settings.seed)
    if settings.adapter:
        added = adapt(student, settings.adapter, settings.seed)
        say(f"adapters of rank {settings.adapter} add {added:,} values to what is stored")
    teacher = student if teacher_source is None else load_model(teacher_source, "auto", device)
    try:
        healing = Healing(student, teacher, windows, settings, keeper, show)
        ours: Any = healing.student
        found = [ours] if settings.from_scratch else list(ours.get_submodule(blocks(healing.teacher)[0]))
        need = need_of(
            healing.student,
            healing.teacher,
            healing.parameters,
            found,
            settings,
            windows.numel(),
            text.length,
        )
        say(check(need, free_bytes(next(student.parameters()).device), settings))
        results = healing.run()
        if processes.first:
            _write(healing, source, plan, text, settings, out)
        processes.wait()
    except KeyboardInterrupt as error:
        raise Interrupted("stopped: the last checkpoint is kept") from error
    except (OSError, SafetensorError) as error:
        raise Unwritable(
            f"writing failed ({error}): free some space and run the same command again, which goes on from the last"
            " checkpoint"
        ) from error
    if processes.first:
        keeper.drop()
    return results


def settings_of(study: StudyConfig, tokens: int | None = None) -> tuple[HealSettings, Refit]:
    """How a study heals, ``tokens`` instead of its own where they are given; and whether it refits before. Raises
    `InputError` where nothing heals so."""
    config = study.heal
    check_choice("heal method", config.method, ARMS)
    stages = tuple(stage for stage in config.stages if stage != "refit")
    settings = HealSettings(
        tokens=tokens or config.tokens,
        stages=stages,
        method=config.method,
        loss=config.loss,
        error=config.error,
        window=config.window,
        teacher=config.teacher,
        rate=None if config.rate == "auto" else config.rate,
        batch=None if config.batch == "auto" else config.batch,
        lasso=config.lasso,
        adapter=config.adapter,
        seed=study.search.seed,
    )
    return settings, "sequential" if config.stages[0] == "refit" else "none"


def export_healed(
    setup: Setup,
    row: Row,
    out: Path,
    windows: torch.Tensor,
    settings: HealSettings,
    dense: Report | None = None,
    show: Show = lambda status: None,
    say: Say = lambda line: None,
    start: Path | None = None,
) -> list[StageResult]:
    """Export trial ``row`` and heal it on ``windows`` (W, L) with ``settings``, to the folder ``out``.

    Of the study's ``heal``, it refits before if that says so. The export before healing lies in the hidden folder
    ``.OUT.exported`` meanwhile; when the same is asked for again after an interruption, it is taken from there.
    ``start`` is an export to heal instead, such as one that was healed before; it stays.
    """
    config, split = setup.config.heal, setup.config.data.heal
    _, refit = settings_of(setup.config)
    if Processes().count > 1:
        raise InputError("export runs in one process: export without --heal, then heal the folder with several")
    before = out.with_name(f".{out.name}.exported")
    if start is None and not _is_export_of(before, row, refit):
        shutil.rmtree(before, ignore_errors=True)
        export(setup, row, before, "factored", refit, dense)
    label = "" if split is None else split.label
    text = HealText(label, windows.shape[1], (0.0, 1.0) if split is None else split.part)
    trusted = setup.source.trust_remote_code
    results = heal_folder(
        start or before, text, settings, out, windows, setup.config.model.name, config.device, trusted, show, say
    )
    shutil.rmtree(before, ignore_errors=True)
    return results


def _is_export_of(folder: Path, row: Row, refit: Refit) -> bool:
    """Whether ``folder``, which is whole if it is there, is what is to be healed."""
    try:
        plan = Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"))
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, InputError):
        return False
    return plan == row.plan and (REFIT_NOTE in card) == (refit != "none")


def plan_of(folder: Path, source: Source) -> Plan:
    """The plan of a factored export; `InputError` where ``folder`` is none, or has no plan."""
    if quantisation(read_config(source)) != QUANT_METHOD:
        raise InputError(f"{str(folder)!r} is no factored export: name a folder that `rankfront export` wrote")
    file = folder / "plan.json"
    if not file.is_file():
        raise InputError(f"{str(folder)!r} has no plan.json: restore it, or export the plan again")
    return Plan.from_json(file.read_text(encoding="utf-8"), str(file))


def _teacher_of(plan: Plan, folder: Path, dense: str | None, trust_remote_code: bool) -> Source:
    source = resolve(dense or _dense_name(plan, folder), trust_remote_code)
    read_config(source)  # which says in a line where there is no such model
    fingerprint = dict(plan.origin).get("fingerprint")
    if fingerprint is not None and source.fingerprint != fingerprint:
        raise InputError(
            f"{source.name!r} is not the model that {str(folder)!r} was made of (its weights differ): name that"
            " one by --model"
        )
    return source


def _dense_name(plan: Plan, folder: Path) -> str:
    name = dict(plan.origin).get("model")
    if name is None:
        raise InputError(f"{str(folder)!r} does not say which model it was made of: name it by --model")
    return name


def _windows(source: Source, text: HealText, settings: HealSettings) -> torch.Tensor:
    """As many windows as the tokens need, spread over the part of the text; all of them where it has fewer."""
    tokenizer = load_tokenizer(source)
    start, end = text.part
    ids = tokenize(tokenizer, read_text(text.name, tokenizer))
    there = int((end - start) * len(ids)) // text.length - 1
    wanted = max(settings.budget(stage) for stage in settings.stages) // text.length
    count = min(there, 1 + round(wanted / (1 - settings.held_out)))
    if count < 2:
        raise InputError(
            f"text {text.name!r} has {max(there, 0)} windows of {text.length} tokens in its part {list(text.part)} and"
            " healing needs 2 or more, one of them held out: give a longer text or a smaller --length"
        )
    return cut(tokenizer, {"heal": Split(text.name, count, text.part)}, text.length, tokenized={text.name: ids})["heal"]


def _write(healing: Healing, source: Source, plan: Plan, text: HealText, settings: HealSettings, out: Path) -> None:
    """Write the healed model, reload it in a fresh process and compare, and only then name it ``out``."""
    student: Any = healing.student
    held = healing.held[:4]
    measured = score(student, held).perplexity
    record = {
        "rankfront": rankfront.__version__,
        "text": asdict(text) | {"name": without_folders(text.name)},
        "settings": asdict(settings),
        "stages": [asdict(result) for result in healing.results],
    }
    section, written = note(healing.results, text, settings), json.dumps(record, indent=1) + "\n"
    write_derived(student, source, plan, held, measured, "healed", section, written, out)
