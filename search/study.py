"""The study: launch, resume, read. The Python face of rankfront.

Reading needs neither torch nor transformers: what launches, solves and exports is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from rankfront.search.choices import AS_FACTORS, Format, Refit
from rankfront.search.config import StudyConfig, check_tasks, load_config, make_config
from rankfront.search.constraint import Constraint
from rankfront.search.importing import uncollected
from rankfront.search.output.results import Results
from rankfront.search.storage.folder import Run
from rankfront.search.storage.front import Box, Row, frame
from rankfront.search.storage.healed import Healed

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from torch import Tensor

    from rankfront.search.heal.healing import Show
    from rankfront.search.heal.status import StageResult
    from rankfront.search.inputs.source import Source
    from rankfront.search.measure.setup import Setup
    from rankfront.search.optimise.accuracy import Calibration
    from rankfront.search.optimise.answer import Answer
    from rankfront.search.output.card import Verified
    from rankfront.search.plans.latency_table import Calibrated

RUNS = Path("runs")


@dataclass
class Study:
    """One search: its settings and its run folder.

    ::

        study = Study("studies/demo.toml")          # or a dictionary of the same shape
        study.launch()
        for row in study.front(): print(row.values, row.report)
        study.export("small", study.best("block_parameters<=0.8"))

    Every method that reads looks at the storage anew; `read` looks once, for several questions. The class is long
    because it is the one face: whatever may be asked has a method here, of a few lines.
    """

    config: StudyConfig
    run: Run

    def __init__(
        self,
        config: StudyConfig | Mapping[str, Any] | str | Path,
        run: str | Path | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        """From a study file, a dictionary of the same shape or a validated config; ``overrides`` are KEY=VALUE.

        The run folder is ``runs/<study file's name>`` unless named. Raises `InputError` where something is invalid.
        """
        if isinstance(config, StudyConfig):
            config = config.model_dump(mode="json")
        if isinstance(config, Mapping):
            self.config, name = make_config(dict(config), overrides), "study"
        else:
            self.config, name = load_config(Path(config), overrides), Path(config).stem
        self.run = Run(Path(run).expanduser() if run is not None else RUNS / name)

    @classmethod
    def open(cls, run: str | Path) -> Study:
        """The study that was launched into a run folder."""
        found = Run(Path(run).expanduser())
        return cls(found.definition().config, found.path)

    # -- reading

    def read(self) -> Results:
        """All that the study has found until now."""
        state, damaged = self.run.read(self.config)
        return Results(self.run.settled(self.config), self.run.path, state, damaged)

    def rows(self) -> list[Row]:
        """Every trial, in order."""
        return list(self.read().rows)

    def front(self, *constraints: str) -> list[Row]:
        """The non-dominated trials that meet ``constraints`` and the study's own, best in the first objective first."""
        return self.read().front(*constraints)

    def best(self, *constraints: str) -> Row:
        """Of the complete trials that meet ``constraints`` and the study's own, the best in the first objective; see
        `Results.best`."""
        return self.read().best(*constraints)

    def trial(self, number: int) -> Row:
        """One trial; `InputError` where it does not exist."""
        return self.read().trial(number)

    def knee(self, *constraints: str) -> Row:
        """Of the front members that meet ``constraints`` and the study's own, the nearest to the box's ideal corner."""
        return self.read().knee(*constraints)

    def box(self) -> Box:
        """The box that hypervolume is measured in; `InputError` before the dense anchor is measured."""
        return self.read().box

    def hypervolume(self) -> float:
        """The share of the box that the front dominates."""
        return self.read().hypervolume()

    def dense_report(self) -> dict[str, Any] | None:
        """What was measured of the dense model on the report split."""
        return self.read().dense_report

    def warning(self, rows: Sequence[Row]) -> str | None:
        """One line where some of ``rows`` lose on the control text what the report split does not show."""
        return self.read().warning(rows)

    def calibration(self) -> Calibration | None:
        """How well our sampler's predictions held; None where there are too few, or another sampler ran."""
        return self.read().calibration()

    def latency(self) -> dict[str, Calibrated]:
        """How well the latency table predicted, for every latency among the objectives that has one."""
        return self.read().latency()

    def latency_failure(self) -> str | None:
        """Why there is no latency table, where making it failed; the next launch tries again."""
        return self.read().latency_failure

    def damages(self) -> list[str]:
        """Records whose checksum does not match and that the next launch measures again, such as ``trial 3``."""
        return self.read().damages

    def tokens(self) -> int:
        """Tokens that trials and the menu have run through the model so far."""
        return self.read().state.tokens

    def frame(self) -> pd.DataFrame:
        """Every trial as one row of a pandas frame."""
        found = self.read()
        return frame(found.rows, found.healed.columns)

    def answer(self, *constraints: str) -> Answer:
        """The plan expected to be best within ``constraints``, such as ``block_parameters<=0.73``, and the study's own;
        not measured."""
        from rankfront.search.optimise.answer import answer

        found = self.read()
        limits = [Constraint.parse(text) for text in constraints]
        return answer(found.state, found.config, found.space, limits)

    def menu(self) -> pd.DataFrame:
        """What each option of each site stores and was predicted to hurt; see `answer.menu_frame`."""
        from rankfront.search.optimise.answer import menu_frame

        found = self.read()
        return menu_frame(found.state, found.config, found.space)

    # -- doing

    @property
    def source(self) -> Source:
        """Where the model comes from, resolved on this machine."""
        from rankfront.search.inputs.resolve import resolve

        model = self.config.model
        return resolve(model.name, model.trust_remote_code, model.task)

    def setup(self) -> Setup:
        """The study resolved on this machine: tokens, dtype, device, fingerprint, the grid of ranks."""
        from rankfront.search.run.resolving import make_setup

        return make_setup(self.run, self.config)

    def launch(
        self,
        console: Console | None = None,
        address: str | None = None,
        rebuild: bool = False,
        report: bool = True,
    ) -> None:
        """Run the study until its limits are reached, or go on with it where an earlier launch stopped.

        ``report`` measures the front on the report split at the end, and heals plans where the study asks for it;
        a later launch does both otherwise.

        Raises `InputError` for what the user can mend and `Interrupted` on Ctrl-C or SIGTERM.
        """
        with uncollected():
            from rankfront.search.run.launch import Launch

        self.config = self.run.remembered(self.config)
        heals = self.config.search.heal != "none"
        check_tasks(self.config)
        if heals:
            from rankfront.search.output.halving import check_healing

            check_healing(self.config)  # what is wrong there is said before the search
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        Launch(self.run, self.config, address, rebuild, report).measure(console)
        if report and heals:
            self._heal(console)

    def heal_windows(self, console: Console | None = None) -> Tensor:
        """Windows (W, L) of the study's ``data.heal``. What the model samples of them takes minutes the first time: how
        far it is, is shown on ``console``."""
        from rich.console import Console

        from rankfront.search.run.progress import Display
        from rankfront.search.run.resolving import heal_windows

        with Display(console or Console(quiet=True)) as display:
            return heal_windows(self.run, self.config, self.setup(), display.phase)

    def _heal(self, console: Console | None) -> None:
        """Heal members of the front, or entrants of a halving."""
        from rankfront.search.output.front_healing import FrontHealing
        from rankfront.search.output.halving import Halving
        from rankfront.search.output.healing_progress import lines_on

        with self.run.lock():
            setup, windows = self.setup(), self.heal_windows(console)
            kind = Halving if self.config.search.heal == "halving" else FrontHealing
            kind(self.run, setup, windows, self.read, *lines_on(console)).heal()

    def solve(self, *constraints: str, console: Console | None = None, report: bool = True) -> Row:
        """The plan expected to be best within ``constraints``, measured: one more trial, unless it was measured before.

        A plan may turn out worse than a trial that meets the limits too: what is returned is the best of all (see
        `best`). ``report`` is as of `launch`.
        """
        from rankfront.search.run.solving import solve

        solve(self.run, self.config, constraints, lambda: self.answer(*constraints), console, report)
        return self.best(*constraints)

    def export(
        self,
        out: str | Path,
        row: Row | None = None,
        form: Format = "factored",
        refit: Refit | None = None,
        gguf_type: str = "F16",
    ) -> Verified:
        """Write the model of ``row`` (by default the knee) to the new folder ``out``; see `export.export`, and
        `served.export_served` for the formats of engines.

        ``refit`` is the study's own unless given.
        """
        found = self.read()
        row, refit = row or found.knee(), refit or self.config.search.refit
        if form not in (*AS_FACTORS, "dense"):
            from rankfront.search.output.served import export_served

            return export_served(self.setup(), row, Path(out).expanduser(), form, gguf_type, refit)
        from rankfront.search.output.export import export

        return export(self.setup(), row, Path(out).expanduser(), form, refit, found.dense_report)

    def export_stored(self, out: str | Path, healed: Healed | None = None) -> Verified:
        """Write a plan that the search healed, by default the best, to the new folder ``out``, as it was scored; see
        `Results.pick_healed` and `front_healing.export_stored`."""
        from rankfront.search.output.front_healing import export_stored

        return export_stored(self.run, self.setup(), healed or self.read().pick_healed(), Path(out).expanduser())

    def export_healed(
        self,
        out: str | Path,
        row: Row | None = None,
        tokens: int | None = None,
        show: Show = lambda status: None,
        say: Callable[[str], None] = lambda line: None,
        windows: Tensor | None = None,
    ) -> list[StageResult]:
        """Write the model of ``row`` (by default the knee), healed as the study's ``heal`` says, to the new folder
        ``out``; ``tokens`` instead of the study's where they are given. See `healed.export_healed`.

        ``windows`` are those of `heal_windows`, where that was called to show what it does."""
        from rankfront.search.output.healed import export_healed, settings_of

        found, setup = self.read(), self.setup()
        settings, _ = settings_of(setup.config, tokens)
        windows = self.heal_windows() if windows is None else windows
        where = Path(out).expanduser()
        return export_healed(setup, row or found.knee(), where, windows, settings, found.dense_report, show, say)
