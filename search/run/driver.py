"""The driver: ask the sampler, tell the storage. Both executors, in process and Ray, talk to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from rankfront.methods import DENSE, InputError
from rankfront.search import attributes as keys
from rankfront.search.attributes import ASKED, INTERRUPTED, is_void
from rankfront.search.choices import OURS
from rankfront.search.config import StudyConfig, quality_of
from rankfront.search.constraint import Constraint
from rankfront.search.errors import GaveUp
from rankfront.search.optimise.accuracy import Calibration, calibration
from rankfront.search.optimise.continuation import Paths
from rankfront.search.optimise.goal import menu_of
from rankfront.search.optimise.halving import Promotion, SuccessiveHalving, claim, promotion_of
from rankfront.search.optimise.history import rung_of
from rankfront.search.optimise.opening import MenuJobs, anchors_to_beat, opening_budgets, reference_first, warm_start
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.rankfront_sampler import RankfrontSampler, make_rankfront_sampler
from rankfront.search.optimise.samplers import make_sampler
from rankfront.search.optimise.tuning import DEFAULT, Tuning
from rankfront.search.plans.job import Job, Record
from rankfront.search.plans.latency_table import timed_objectives, timings_of
from rankfront.search.plans.menu import Menu
from rankfront.search.plans.menu_jobs import menu_record
from rankfront.search.plans.plan import Plan
from rankfront.search.plans.slope_cost import PASSES, SLOPE_TOKENS, slope_tokens
from rankfront.search.plans.space import Anchor, Space
from rankfront.search.run.retries import ATTEMPTS, MAX_LOST, Retries, requeue
from rankfront.search.run.slopes import next_reference
from rankfront.search.storage.checked import asked_again
from rankfront.search.storage.front import Row, StudyReader, StudyState, dense_row, front_of

MAX_REPEATS = 20  # proposals in a row that were measured before: then the space is taken to be exhausted
ENOUGH = 10  # trials beside the menu that a limit on tokens should leave room for
STEPS_AFTER = 1  # trials that the limit on tokens must leave room for after slopes

Listener = Callable[["Driver"], None]


@dataclass
class Stop:
    """What Ctrl-C asks for.

    Python drops a KeyboardInterrupt that arrives in a finaliser, so the handler only makes a request, which is looked
    at wherever it is safe to stop: between batches, sites and trials, and a few times a second while Ray works.
    """

    requested: bool = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop is requested."""
        if self.requested:
            raise KeyboardInterrupt


class Driver:
    """Decides what is measured next and records what came back. Optuna's storage is its only state.

    First the anchors, then what the sampler proposes, until the limits are reached; last, the front members that have
    no perplexity on the report split yet. Our sampler asks for the dense model and the menu first, then for the
    menu's reference plan, for those anchors that no other is predicted to dominate, for slopes around that plan, and
    for the front that menu and slopes predict. With several rungs, what it takes to promote the front is kept back
    until nothing else fits into the limits; see `SuccessiveHalving`. With ``only``, nothing is measured but the plan
    of that trial, up to the rung at which the front stands.

    A job whose worker died, or that ran out of memory, is measured again, `ATTEMPTS` times in all; then it has failed,
    and the next launch tries it again. A job that fails otherwise has failed. Without the dense model the launch ends,
    and where the workers of `MAX_LOST` jobs in succession died at every attempt; see `Retries`.
    """

    def __init__(
        self,
        study: optuna.Study,
        config: StudyConfig,
        space: Space,
        origin: dict[str, str],
        listener: Listener,
        report: bool = True,
        stop: Stop | None = None,
        only: int | None = None,
        tuning: Tuning = DEFAULT,
    ) -> None:
        self.study = study
        self.tuning = tuning
        self.config = config
        self.ours = config.search.sampler == OURS
        if self.ours:
            quality_of(config)
        self.limits = [Constraint.parse(text) for text in config.search.where]
        self.space = space
        self.origin = origin
        self.listener = listener
        self.report = report
        self.stop = stop or Stop()
        self.only = only
        self.started = time.monotonic()
        self.running: dict[int, optuna.Trial] = {}
        self.reporting: set[int] = set()
        self.unreportable: set[int] = set()
        self.retries = Retries()
        self.exhausted = False
        self._reader = StudyReader(study, list(config.objectives))
        self._state: StudyState | None = None  # None where something was written since it was read
        self._close_orphans()
        self._replace_damaged()
        if only is None:
            requeue(study)
        self._state = None
        self.halving = self._halving()
        self.halving.promote(self.rows())
        self._state = None
        self.seen = {(row.plan_key, row.rung) for row in self.rows() if row.counts}
        self.menu: Menu | None = None
        self.paths: Paths | None = None  # once our sampler proposes
        self.opened = False  # whether all of the menu's predicted front was queued
        self.record: Record | None = None  # what the menu is made of
        self.unmade: InputError | None = None  # why there is none
        self.menu_jobs = MenuJobs(study, space, config.search.menu)
        timed = self.ours and bool(timed_objectives(config.objectives))
        self.wants_timing = timed and keys.TIMING not in study.user_attrs.get(keys.TIMING, {})  # or one that failed
        self.timing_asked = False
        self.sampler = self._first_sampler()
        self._with_menu()

    def _first_sampler(self) -> BaseSampler:
        """The study's sampler; for ours, which needs the menu and the dense anchor, a stand-in that is never asked."""
        search = self.config.search
        name = "random" if self.ours else search.sampler
        self.study.sampler = make_sampler(name, search.seed, len(self.study.trials))
        return self.study.sampler

    def _halving(self) -> SuccessiveHalving:
        search = self.config.search
        tokens = [(part.stop - part.start) * self.config.data.length for part in self.config.rung_windows()]
        models = max(search.workers or 0, 1) if "divergence" in self.config.objectives else 0
        teacher_tokens = [models * own for own in tokens]
        limit = np.array([search.trials, math.inf if search.tokens is None else search.tokens], dtype=float)
        return SuccessiveHalving(self.study, tokens, search.reduction, limit, teacher_tokens)

    def rows(self) -> list[Row]:
        """Every trial so far."""
        return list(self.state.rows)

    @property
    def state(self) -> StudyState:
        """The study as it is: read anew at every step, and where a step has written."""
        if self._state is None:
            self._state = self._reader.read()
        return self._state

    # -- what is left from an earlier launch

    def _close_orphans(self) -> None:
        """Trials that a killed launcher left running can never be told: mark them failed, with the reason."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._fail(optuna.Trial(self.study, trial._trial_id), INTERRUPTED)

    def _replace_damaged(self) -> None:
        """Queue again what trials were asked for whose records are damaged."""
        for trial in asked_again(self.study) if self.only is None else ():
            asked = trial.user_attrs[ASKED]
            attributes = asked["attributes"] | {keys.REPLACES: trial.number}
            self.study.enqueue_trial(asked["params"], user_attrs=attributes)

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        trial.set_user_attr(keys.FAILURE, reason)
        self.study.tell(trial, state=TrialState.FAIL)
        self._state = None

    def _with_menu(self) -> None:
        """Do what is possible without the menu, or with it: untie variables, queue anchors, start our sampler."""
        record = menu_record(self.state.known) if self._wants_menu else None
        if self.config.search.untie and not self.ours:
            if record is None:
                return
            self.space = self.space.untied(record["predictions"], self.config.search.untie)
        self.record = record
        self._enqueue_anchors(self.space.anchors(() if self.ours else self.config.search.anchors))
        self._start_ours()

    def _enqueue_anchors(self, anchors: Iterable[Anchor]) -> None:
        """Queue those that were neither measured nor are waiting; an interrupted one is due again."""
        for anchor in anchors:
            self._enqueue("anchor", anchor.label, self.space.anchor_parameters(anchor))

    def _enqueue(self, origin: str, label: str, parameters: Mapping[str, int | str]) -> int:
        """Queue a trial unless one of the same origin and label was measured, failed by itself or is waiting; which
        number it has, or that one."""
        attributes = {keys.ORIGIN: origin, keys.LABEL: label}
        for trial in self.state.trials:
            same = attributes.items() <= trial.user_attrs.items()
            if same and not is_void(trial.user_attrs):
                return int(trial.number)
        self.study.enqueue_trial(dict(parameters), user_attrs=attributes)
        self._state = None
        return int(self.state.trials[-1].number)

    # -- our sampler: the menu first, then its predicted front, then proposals

    def _start_ours(self) -> None:
        """Once the menu and the dense model are measured: queue the predicted front, and hand over to our sampler."""
        dense = dense_row(self.rows(), rung=0)
        if not self.ours or self.wants_timing or self.record is None or dense is None or self.menu is not None:
            return
        timings = timings_of(self.config.objectives, self.state.known)
        self.menu = menu_of(self.config, self.space, self.record, self.origin["dtype"], timings)
        if not self.menu.lines:
            faster = " that is faster than dense" if timings else ""
            raise InputError(
                f"search.menu = {self.config.search.menu!r} predicts no option of this space{faster}: use another"
                " source or sampler, or other methods"
            )
        self.sampler = sampler = make_rankfront_sampler(
            self.menu, self.space, self.config, dense, self.origin, timings, self.tuning
        )
        self.study.sampler = sampler
        self._open(sampler)
        self._enqueue_anchors(anchors_to_beat(self.menu, self.space, self.config.search.anchors))

    def _open(self, sampler: RankfrontSampler) -> None:
        """Queue the predicted front: the plan at its reference, and the others once slopes around it are measured or
        cannot be, for they decide what the others are."""
        if self.only is not None:
            return
        budgets = _budgets(sampler)
        if not self._settled(sampler.predictor, reference_first(budgets, sampler.menu.even.dense)):
            return
        known = self.state.trials
        sampler.predictor.learn(known)
        self.opened = True
        labels = {trial.user_attrs.get(keys.LABEL) for trial in known}
        proposed = any(trial.user_attrs.get(keys.ORIGIN) == OURS for trial in known)
        for label, draws in warm_start(sampler.predictor, self.space, budgets):
            if label in labels or not proposed:  # after proposals only what was interrupted is due, by its label
                self._enqueue("menu", label, draws)

    def _settled(self, predictor: Predictor, budgets: Sequence[float]) -> bool:
        """Whether slopes around the plan at the reference, the first of ``budgets`` that the limits allow, are measured
        or cannot be; what is missing is queued."""
        trials = [t for t in self.state.trials if not is_void(t.user_attrs)]
        reference = next((t for t in reversed(trials) if t.user_attrs.get(keys.LABEL) == "centre"), None)
        if reference is None:
            found = next(warm_start(predictor, self.space, budgets), None)
            if found is not None:
                self._enqueue("menu", "centre", found[1])
            return found is None
        if not reference.state.is_finished():
            return False
        asked = [trial for trial in trials if trial.user_attrs.get(keys.SLOPES_OF) == reference.number]
        if asked or reference.state != TrialState.COMPLETE:
            return all(trial.state.is_finished() for trial in asked)
        if self._waiting():  # what waits comes first, and what the limits leave for slopes is known after it
            return False
        return not self._enqueue_slopes(reference.number)

    # -- ask

    def begin(self) -> None:
        """Start the clock of this launch's time limit."""
        self.started = time.monotonic()

    @property
    def spent(self) -> int:
        """Trials that count against the limit: finished ones, and failed ones that failed by themselves."""
        return self.state.spent

    @property
    def tokens(self) -> int:
        """Tokens that trials and the menu have run through the model, a backward pass counted as two forward ones."""
        return self.state.tokens

    def calibration(self, rows: Sequence[Row]) -> Calibration | None:
        """How well our sampler's predictions held so far; None with another sampler, or too few of them."""
        return calibration(rows, quality_of(self.config)) if self.ours else None

    @property
    def elapsed(self) -> float:
        """Seconds since this launch began to measure."""
        return time.monotonic() - self.started

    @property
    def searching(self) -> bool:
        """Whether more trials may start."""
        limits = self.config.search
        in_time = limits.time is None or self.elapsed < limits.time
        return in_time and bool((self._left > 0).all()) and (self.exploring or self._promotion() is not None)

    @property
    def exploring(self) -> bool:
        """Whether what starts within the limits is the next of the queue or a proposal, no promotion of the front."""
        if self.exhausted or self.only is not None:
            return False
        return len(self.halving.tokens) == 1 or self.halving.explores(self.rows(), self._left)

    def _promotion(self) -> Promotion | None:
        if self.only is not None:
            return promotion_of(self.rows(), self.only)
        return self.halving.next_promotion(self.rows(), self._left, self.exhausted)

    @property
    def _left(self) -> np.ndarray:
        """Trials and tokens that the limits leave once what runs is measured."""
        return self.halving.limit - (self.spent + len(self.running), self.tokens + self._promised)

    def next(self) -> Job | None:
        """The next thing to measure, or None: look at `done` to tell "wait" from "finished".

        Raises KeyboardInterrupt once a stop is requested.
        """
        self.stop.check()
        self._state = None
        begun = time.monotonic()
        again = self.retries.next()
        if again is not None:
            return again
        searching = self.searching
        exploring = searching and self.exploring
        if self.unmade is not None:  # a dense model that cannot be measured is the cause to name
            if any(trial.user_attrs.get(keys.LABEL) == DENSE for trial in self.running.values()):
                return None
            if not exploring or self._dense_waiting() is None:
                raise self.unmade
            return self._next_trial(begun)
        if self.wants_timing and exploring:  # alone, for what runs beside it would be in its figures
            if self.timing_asked or self.running or self.menu_jobs.running:
                return None
            self.timing_asked = True
            return Job("timing", 0, Plan(()))
        due = self.menu_jobs.next() if exploring and self._wants_menu and self.record is None else None
        if due is not None:
            return due
        if exploring and self._ready:
            self._ask_slopes()
        job = self._next_trial(begun) if searching else None
        if job is None and not self.running and not self.searching:
            job = self._next_report()
        return job

    def _check_tokens(self) -> None:
        """Raise `InputError` where the limit was spent before anything was measured."""
        limit = self.config.search.tokens
        spent = limit is not None and (limit <= self.tokens or not self.exploring)
        if spent and not (self.menu_jobs.running or self.running or self.spent):
            enough = self.tokens + (len(self.menu_jobs.missing()) + ENOUGH) * self.halving.tokens[0]
            raise InputError(
                f"search.tokens = {limit:,} is spent on the menu, which took {self.tokens:,} so far, and no plan was"
                f" measured: set it to {enough:,} or more"
            )

    def _ask_slopes(self) -> None:
        """Queue slopes at the next stop of a path, else around the plan that our sampler names, where the limit leaves
        tokens for them and a trial."""
        if isinstance(self.sampler, RankfrontSampler) and not self._waiting() and not self._goes_on(self.sampler):
            self.sampler.predictor.learn(self.state.trials)
            number = next_reference(self.state.trials, self.sampler.predictor, self.sampler.targets)
            if number is not None:
                self._enqueue_slopes(number)
        self._state = None

    def _goes_on(self, sampler: RankfrontSampler) -> bool:
        """Queue the next stop of a path, if one is due; whether it is."""
        if not self.tuning.paths:
            return False
        if self.paths is None:
            self.paths = Paths(self.study, self.space, sampler.predictor, _budgets(sampler), self._enqueue)
        return self.paths.advance(self.tokens, self._passes, self._readable, self._unreserved, self.halving.tokens[0])

    def _enqueue_slopes(self, number: int) -> bool:
        """Queue slopes around the plan of trial ``number``, where the limits leave tokens for them; whether they do."""
        tokens = self._slope_tokens
        if tokens:
            source = self.state.trials[number]
            attributes = {keys.SLOPES_OF: number, keys.ORIGIN: keys.SLOPES, keys.SLOPE_TOKENS: tokens}
            self.study.enqueue_trial(source.params, user_attrs=attributes)
            self._state = None
        return tokens > 0

    @property
    def _promised(self) -> int:
        """Tokens of the trials and slopes that run."""
        return sum(
            self._passes * trial.user_attrs.get(keys.SLOPE_TOKENS, SLOPE_TOKENS)
            if keys.SLOPES_OF in trial.user_attrs
            else self.halving.tokens[rung_of(trial)]
            for trial in self.running.values()
        )

    @property
    def _slope_tokens(self) -> int:
        """Of how many tokens slopes would be measured now; 0 where the limit leaves too few for them and trials."""
        room = (self._unreserved[1] - STEPS_AFTER * self.halving.tokens[0]) / self._passes
        fitting = min(slope_tokens(self.tokens, quality_of(self.config)), self._readable, room)
        return int(fitting) if fitting >= min(SLOPE_TOKENS, self._readable) else 0

    @property
    def _readable(self) -> int:
        """Tokens of the search split that slopes read: those that no trial does, where they are enough."""
        data = self.config.data
        unread = (data.search.windows - self.config.rung_windows()[-1].stop) * data.length
        return unread if unread >= SLOPE_TOKENS else data.search.windows * data.length

    @property
    def _unreserved(self) -> np.ndarray:
        """Trials and tokens that the limits leave once what runs is measured, beside what promoting the front takes."""
        left: np.ndarray = self._left - self.halving.reserve(self.rows(), self._left)
        return left

    @property
    def _passes(self) -> int:
        return PASSES[quality_of(self.config)]

    def _waiting(self) -> bool:
        return bool(self.state.waiting)

    def _dense_waiting(self) -> FrozenTrial | None:
        """The trial that is to measure the dense model, if it waits: without it there is nothing to compare with."""
        return next((t for t in self.state.waiting if t.user_attrs.get(keys.LABEL) == DENSE and rung_of(t) == 0), None)

    @property
    def _ready(self) -> bool:
        """Whether the sampler can be asked: ours only after its menu, while anchors are queued in any case."""
        if self._waiting():
            return True
        return self.opened if self.ours else not self._wants_menu or self.record is not None

    @property
    def _wants_menu(self) -> bool:
        """Whether the study has a menu: our sampler's, or for untying the variables of another."""
        return self.ours or self.config.search.untie > 0

    @property
    def done(self) -> bool:
        """Nothing is running and nothing is left to start."""
        return not self.running and not self.reporting and not self.searching and not self._unreported()

    def _next_trial(self, begun: float) -> Job | None:
        """The next trial, with the seconds that proposing it took since ``begun``."""
        for _ in range(MAX_REPEATS):
            trial = self._ask()
            self._state = None
            if trial is None:
                return None
            plan = self.space.suggest(trial, self.origin)
            if keys.SLOPES_OF in trial.user_attrs:
                self.running[trial.number] = trial
                return Job("slopes", trial.number, plan, tokens=trial.user_attrs.get(keys.SLOPE_TOKENS, SLOPE_TOKENS))
            rung = rung_of(trial)
            if (plan.key, rung) in self.seen:
                # Its values are known: a second measurement would only spend tokens.
                self.study.tell(trial, state=TrialState.PRUNED)
                self._state = None
                continue
            if keys.ORIGIN not in trial.user_attrs:
                trial.set_user_attr(keys.ORIGIN, self.config.search.sampler)
            if isinstance(self.sampler, RankfrontSampler) and rung == 0:
                self.sampler.predictor.learn(self.state.trials)  # which a queued trial does not bring about
                trial.set_user_attr(keys.PREDICTED, self.sampler.predictor.predict(plan))
            trial.set_user_attr(keys.PLAN, plan.to_json())
            trial.set_user_attr(keys.PLAN_KEY, plan.key)
            trial.set_user_attr(keys.SECONDS, {"propose": time.monotonic() - begun})
            self.seen.add((plan.key, rung))
            self.running[trial.number] = trial
            return Job("trial", trial.number, plan, rung)
        self.exhausted = True
        return None

    def _ask(self) -> optuna.Trial | None:
        """The next of the queue, a proposal, or what promotes the front; None where none of them can start now."""
        if self.exploring:
            dense = self._dense_waiting()
            if dense is not None:
                return claim(self.study, dense)
            if isinstance(self.sampler, RankfrontSampler) and not self.opened:
                self._open(self.sampler)
            # Not ready where the last of the anchors was a repetition, and our sampler is not there yet.
            return self.study.ask() if self._ready else None
        promotion = self._promotion()
        return None if promotion is None else self.halving.claim(promotion)

    def _unreported(self) -> list[Row]:
        rows = self.rows() if self.report else []
        front = {row.number: row for row in front_of(rows) if row.within}
        dense = dense_row(rows)
        if front and dense is not None:  # which what is reported of the others is compared with
            front[dense.number] = dense
        skip = self.reporting | self.unreportable
        return [row for row in front.values() if row.number not in skip and not self._reported(row)]

    def _reported(self, row: Row) -> bool:
        """Whether everything that is asked for was measured on the report split."""
        refit = self.config.search.refit != "none" and bool(row.plan.choices)
        asked = [{"refitted", "refit_failure"}] if refit else [{"perplexity"}]
        if self.config.data.control.windows:
            asked.append({"control", "control_failure"})
        report = row.report
        if report is None or "lost" in report:
            return False
        return "failure" in report or all(not each.isdisjoint(report) for each in asked)

    def _next_report(self) -> Job | None:
        for row in self._unreported():
            self.reporting.add(row.number)
            return Job("report", row.number, row.plan)
        return None

    # -- tell

    def finish(self, job: Job, record: Record) -> None:
        """Record what measuring ``job`` gave, or have it measured again where it was ``lost``.

        Raises `InputError` for a cause that would fail every trial, `GaveUp` where it is not the user's.
        """
        if "lost" not in record:
            self.retries.measured()
        elif self.retries.again(job):
            return
        else:
            record = record | {"failure": f"{record['failure']}; {ATTEMPTS} attempts"}
        self._state = None
        self._keep(job, record)
        self._state = None
        self.listener(self)

    def _keep(self, job: Job, record: Record) -> None:
        if job.kind == "menu":
            try:
                self.menu_jobs.finish(job.number, record)
            except InputError as error:
                self.unmade = error
                return
            self._state = None
            self._with_menu()
            self._check_tokens()
        elif job.kind == "timing":
            self.timing_asked = self.wants_timing = False
            self.study.set_user_attr(keys.TIMING, record)  # a failure too: latency is then read off the trials alone
            self._state = None
            self._start_ours()  # which waited for it, where an earlier launch had measured all else
        elif job.kind == "report":
            # A finished trial's attributes are frozen in Optuna, so the report split is kept with the study.
            self.study.set_user_attr(keys.report_of(job.number), record)
            self.reporting.discard(job.number)
            if "lost" in record:
                self.unreportable.add(job.number)  # until the next launch
        elif job.kind == "slopes":
            self._finish_slopes(self.running.pop(job.number), record)
        elif "failure" in record:
            self._finish_failed(self.running.pop(job.number), job, record)
        else:
            trial = self.running.pop(job.number)
            record[keys.SECONDS] |= trial.user_attrs.get(keys.SECONDS, {})
            for key, value in record.items():
                if key != "values":
                    trial.set_user_attr(key, value)
            for limit in self.limits:
                value = record["values"][limit.figure]
                trial.set_constraint(str(limit), limit.missed(value))
            self.study.tell(trial, list(record["values"].values()))
            self._state = None
            self.halving.taught(record["rung"])
            self._start_ours()
            self.halving.promote(self.rows())

    def _finish_failed(self, trial: optuna.Trial, job: Job, record: Record) -> None:
        lost = "lost" in record
        if lost:
            trial.set_user_attr(keys.LOST, True)
        self._fail(trial, record["failure"])
        if not job.plan.choices and job.rung == 0:
            message = f"the dense model could not be measured ({record['failure']}): nothing to compare with"
            raise GaveUp(f"{message}; give a trial more memory") if lost else InputError(message)

    def _finish_slopes(self, trial: optuna.Trial, record: Record) -> None:
        """Keep what was measured around a plan; the trial is a repetition of that plan's."""
        for key, value in record.items():
            trial.set_user_attr(key, value)
        self.study.tell(trial, state=TrialState.PRUNED)

    def lost(self, job: Job, reason: str) -> None:
        """The worker that measured ``job`` died: as `finish`. Raises `GaveUp` where they die whatever they measure."""
        self.finish(job, {"failure": reason, "lost": True})
        if self.retries.hopeless(job):
            raise GaveUp(
                f"workers died at every attempt of {MAX_LOST} jobs in succession ({reason}): give a trial more memory,"
                " or use --workers 0"
            )

    def abandon(self) -> None:
        """Mark what still runs as interrupted; it is measured again at the next launch."""
        while self.running:
            self._fail(self.running.popitem()[1], INTERRUPTED)
        self.reporting.clear()


def _budgets(sampler: RankfrontSampler) -> list[float]:
    """Sizes at which a study opens, and at which its paths are measured."""
    return opening_budgets(sampler.targets, sampler.menu.even.dense)
