"""From a model to a smaller one in one go: a study that fits, its launch, and its best plan as a folder.

The study is one like any other: its file, `STUDY_FILE`, lies in its run folder, and every other command reads it.
"""

from __future__ import annotations

import errno
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rankfront.methods import InputError
from rankfront.search.atomic import new_folder, staged, write_whole
from rankfront.search.attributes import PARAMETER_COUNT, Report
from rankfront.search.choices import AS_FACTORS, Format
from rankfront.search.config import StudyConfig, make_config
from rankfront.search.estimate.draft import EFFORTS, Subject, draft
from rankfront.search.estimate.estimate import Estimate, estimate, own_tokens
from rankfront.search.estimate.probe import probe
from rankfront.search.estimate.request import Request
from rankfront.search.estimate.study_file import to_toml
from rankfront.search.output.card import Verified
from rankfront.search.output.export import verify_folder
from rankfront.search.output.healing_progress import progress_line, summary
from rankfront.search.output.served import RUN, convert_folder
from rankfront.search.plain import literal, without_folders
from rankfront.search.quantities import parse_bytes, said_bytes
from rankfront.search.splits import own_text_seed
from rankfront.search.storage.front import Row, dense_row
from rankfront.search.study import Study

STUDY_FILE, RECORD = "study.toml", "compress.json"
PATIENCE = 3600.0  # seconds that a study may take before a quicker one is taken; guess

Say = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        trial: its number in the run.
        form: the format of the folder.
        parameters, bytes: that it stores; ``dense_parameters``, those of the dense model.
        perplexity, dense_perplexity: on ``text``, which nothing before has read.
        healed: tokens that it was trained on.
        notes: what else is to be known, a line each.
    """

    trial: int
    form: Format
    parameters: int
    dense_parameters: int
    bytes: int
    perplexity: float
    dense_perplexity: float
    text: str
    healed: int
    notes: tuple[str, ...] = ()

    def lines(self, out: Path, run: Path) -> Iterator[str]:
        """What the command ends with."""
        kept = self.parameters / self.dense_parameters
        healed = f", healed by {self.healed:,} tokens" if self.healed else ""
        yield f"{out}: trial {self.trial}{healed}, {self.parameters:,} parameters ({kept:.3f} of dense) in" + (
            f" {said_bytes(self.bytes)}"
        )
        worse = self.perplexity / self.dense_perplexity - 1
        yield f"perplexity {self.perplexity:.4g} on {self.text}, dense {self.dense_perplexity:.4g} ({worse:+.1%})"
        yield from (f"  {note}" for note in self.notes)
        yield "load it:"
        if self.form in ("gguf", "vllm"):
            yield f"  {RUN[self.form].replace('FOLDER', shlex.quote(str(out)))}"
        elif self.form == "openvino":
            yield "  import openvino_genai"
            yield f"  {RUN['openvino'].replace('FOLDER', repr(str(out)))}"
        else:
            yield "  from transformers import AutoModelForCausalLM, AutoTokenizer"
            yield f"  {RUN[self.form].replace('FOLDER', repr(str(out)))}"
            yield f"  tokenizer = AutoTokenizer.from_pretrained({str(out)!r})"
        yield f"what else was found: rankfront front {shlex.quote(str(run))}"


def propose(request: Request, say: Say) -> tuple[str, StudyConfig, Estimate]:
    """(The study file that fits, the study, what it will take): of the efforts, the largest that is over within
    `PATIENCE`, unless one is asked for. Raises `InputError` where nothing fits this machine."""
    subject = Subject.of(request)
    names = ["normal", "quick"] if request.effort == "auto" else [request.effort]
    found = None
    for name in names:
        data = draft(request, subject, EFFORTS[name])
        config = make_config(data)
        subject.outline.coverage.check(config.space)
        found = found or probe(subject, config, bool(own_tokens(config)), say)
        takes = estimate(subject, config, found, request.heal)
        if takes.total <= PATIENCE:
            break
    takes.check(subject.device)
    heading = f"{without_folders(request.model)}, {subject.outline.parameters:,} parameters, drafted with effort {name}"
    return to_toml(data, heading), config, takes


def said_texts(config: StudyConfig) -> Iterator[str]:
    """What the study reads, in a sentence."""
    name = config.data.report.label
    if own_text_seed(name) is not None:
        yield "text: what the dense model samples at temperature 1, half of it as chats where it has a template; name"
        yield "  your own by --text"
    else:
        yield f"text: {without_folders(name)}, mixed with what the dense model samples in equal parts"


def compress(
    request: Request, out: str | Path, run: str | Path | None = None, console: Console | None = None
) -> tuple[Made, Path]:
    """Make the smaller model that is asked for, in the new folder ``out``; what was made, and the run folder, by
    default ``OUT.run``.

    The same call goes on where an earlier one stopped. Raises `InputError` for what the user can mend, `Interrupted` on
    Ctrl-C or SIGTERM, `ExportError` where writing or verifying fails.
    """
    out = Path(out).expanduser()
    folder = Path(run).expanduser() if run is not None else out.with_name(f"{out.name}.run")
    compression = _Compression(request, out, folder, console or Console(stderr=True))
    return compression.make(), folder


@dataclass(frozen=True)
class _Compression:
    request: Request
    out: Path
    run: Path
    console: Console

    def say(self, line: str) -> None:
        self.console.print(literal(line), soft_wrap=True)

    def make(self) -> Made:
        made = self._record().get("made")
        if made is not None:
            made = Made(**made | {"notes": tuple(made["notes"])})
        if made is None or not (self.out.is_dir() or self._folder(made.form).is_dir()):
            new_folder(self.out)  # before hours of searching
            study = self._study()
            study.launch(self.console)
            made = self._export(study, self._best(study))
            self._keep(made=asdict(made))
        if self._folder(made.form).is_dir():
            _move(self._folder(made.form), new_folder(self.out))
        return made

    def _folder(self, form: str) -> Path:
        """Where the result lies until it is whole and the run knows of it: what is written last is its name."""
        return self.run / f"made-{form}"

    def _record(self) -> dict[str, Any]:
        """What the run knows of this command; `InputError` where it was begun for something else."""
        file, now = self.run / RECORD, json.loads(json.dumps(asdict(self.request)))
        if not file.is_file():
            if self.run.exists() and any(self.run.iterdir()):
                raise InputError(f"{str(self.run)!r} is there and not of this command: name another folder by --run")
            return {}
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        before = record["request"]
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                raise InputError(
                    f"{str(self.run)!r} was begun with {key} = {json.dumps(before.get(key))} and this is"
                    f" {json.dumps(now.get(key))}: repeat that command, or name another --out or --run"
                )
        return record

    def _keep(self, **more: Any) -> None:
        content = {"request": asdict(self.request), **more}
        write_whole(self.run / RECORD, (json.dumps(content, indent=1) + "\n").encode())

    def _study(self) -> Study:
        """The study of the run, which is drafted where there is none yet."""
        file = self.run / STUDY_FILE
        if not file.is_file():
            text, config, takes = propose(self.request, self.say)
            for line in (*said_texts(config), *takes.lines(config.model.device)):
                self.say(line)
            self._keep()
            write_whole(file, text.encode())
            self.say(f"the study is {file}; the same command goes on where it stopped")
        return Study(file, self.run)

    def _best(self, study: Study) -> Row:
        """The best trial within the limits; where none is, what the run expects to be, measured."""
        try:
            return study.best()
        except InputError:
            if not study.config.search.where:
                raise
            return study.solve(*study.config.search.where, console=self.console)

    def _export(self, study: Study, row: Row) -> Made:
        form: Format = self.request.serve or "factored"
        found = study.read()
        dense = dense_row(found.rows)
        assert dense is not None  # without which there is no trial to export
        text = f"the report split ({study.config.data.report.label_by(without_folders)})"
        before: Report = found.dense_report or {}
        if self.request.heal:
            verified = self._healed(study, row, form)
            after: Report = {"perplexity": verified.perplexity}
        else:
            self.say(f"exporting trial {row.number} ...")
            shutil.rmtree(self._folder(form), ignore_errors=True)
            verified = study.export(self._folder(form), row, form, gguf_type=self.request.gguf_type)
            after = row.report or {}
        if "perplexity" not in before or "perplexity" not in after:  # measuring it failed
            text, before = "the search split", {"perplexity": dense.figure("perplexity")}
            after = {"perplexity": row.figure("perplexity")}
        notes = self._notes(study, verified, after, before)
        if self.request.heal and row.report and "perplexity" in row.report:
            notes = (f"before healing: {row.report['perplexity']:.4g}", *notes)
        return Made(
            row.number, form, verified.parameters, int(dense.figure(PARAMETER_COUNT)), verified.bytes,
            after["perplexity"], before["perplexity"], text, self.request.heal, notes,
        )  # fmt: skip

    def _notes(self, study: Study, verified: Verified, after: Report, before: Report) -> tuple[str, ...]:
        """What else is to be known, of what was measured ``before``, of the dense model, and ``after``."""
        notes = [f"it {verified.warning}"] * bool(verified.warning) + [*verified.notes]
        if "control" in before and "control" in after:
            label = study.config.data.control.label_by(without_folders)
            notes.append(f"control text ({label}): {after['control']:.4g}, dense {before['control']:.4g}")
        most = None if self.request.bytes is None else parse_bytes(self.request.bytes, "--bytes")
        if most is not None and verified.bytes > most:  # of a file with a tokenizer and rows of other types
            notes.append(f"it is above --bytes {self.request.bytes}: ask for a little less, with another --out")
        return tuple(notes)

    def _healed(self, study: Study, row: Row, form: Format) -> Verified:
        """Heal the export of ``row`` in the run folder, and put it where it belongs as ``form``; its perplexity is that
        on the report split."""
        folder = self.run / f"healed-{row.plan.key}"
        if not folder.is_dir():
            windows = study.heal_windows(self.console)
            with progress_line(self.console) as show:
                results = study.export_healed(folder, row, self.request.heal, show, self.say, windows)
            for line in summary(results):
                self.say(line)
        setup = study.setup()
        trusted, made = self.request.trust_remote_code, self._folder(form)
        found = verify_folder(folder, setup.tokens["report"], setup.device, trusted)
        shutil.rmtree(made, ignore_errors=True)
        if form in AS_FACTORS:
            folder.rename(made)
            return found
        self.say(f"converting to {form} ...")
        kind = self.request.gguf_type
        written = convert_folder(folder, form, made, kind, device=setup.device, trust_remote_code=trusted)
        return replace(written, perplexity=found.perplexity)


def _move(folder: Path, out: Path) -> None:
    """Give ``folder`` the name ``out``, on another disk too; it is whole there or not at all."""
    try:
        folder.rename(out)  # which replaces an empty folder
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with staged(out) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
        shutil.rmtree(folder)
