"""Synthetic problems for what proposes plans: menus whose true divergences are known."""

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

import moocore
import numpy as np
import optuna
from optuna.trial import TrialState

from rankfront.methods import DENSE_OPTION, Option, Site, Weight
from rankfront.search.names import Place
from rankfront.search.optimise.goal import Goal
from rankfront.search.optimise.predictor import Predictor
from rankfront.search.optimise.rankfront_sampler import RankfrontSampler
from rankfront.search.plans.lagrangian import Lagrangian
from rankfront.search.plans.menu import Line, Menu
from rankfront.search.plans.space import Space
from rankfront.search.plans.variables import Choices, Single
from rankfront.search.run.rankfront_strategy import next_reference

KINDS = ("attention", "mlp")
NEVER = 1e-9  # nats; the divergence of dense, so that its logarithm exists


def compatible(menu, places):
    """Whether no weight is treated twice."""
    return not any(place and any(places[other] for other in menu.rivals[i]) for i, place in enumerate(places))


class Drawn(Space):
    """A space with a variable for each line of a menu, two kinds of lines in each block."""

    variables = ()

    def __init__(self, menu):
        self.variables = [Single(line.site, Choices(("svd",), (), {}), line.options) for line in menu.lines]
        self.sites = {
            Site(line.site, tuple(Weight(path, path, 8, 8) for path in line.claims)): Place(n // 2, KINDS[n % 2])
            for n, line in enumerate(menu.lines)
        }
        self.choices = self.sites


@dataclass(frozen=True)
class Problem:
    """A model of which everything is known: divergence (interactions and noise on top) against stored values.

    Attributes:
        interaction: extra divergence of compressing both sites of a block, as a multiple of √(d_i d_j).
        noise: standard deviation of what is measured, in log-divergence.
        slow: whether there is a third objective, which the plan alone does not decide.
        bytes: whether there is a third one that options decide, and that has little to do with the stored values.
        seed: of the problem.
        sites: two kinds in each block.
        levels: options of each site, dense included.
    """

    interaction: float = 0.0
    noise: float = 0.0
    slow: bool = False
    bytes: bool = False
    seed: int = 0
    sites: int = 6
    levels: int = 4

    @cached_property
    def menu(self):
        """What the sampler knows beforehand; later blocks hurt more."""
        random = np.random.default_rng(self.seed)
        lines = []
        for site in range(self.sites):
            tail = np.cumsum(random.exponential(0.03, self.levels - 1)) * (site // 2 + 1)
            stored = 8 * np.array([100, *np.sort(random.integers(15, 90, self.levels - 1))[::-1]])
            options = (DENSE_OPTION, *(Option.of("svd", rank=self.levels - level) for level in range(1, self.levels)))
            heavy = 1000 * np.array([1.0, *random.uniform(0.1, 1.1, self.levels - 1)])
            more = (heavy.astype(int),) if self.bytes else ()
            lines.append(Line(f"site {site}", options, stored, np.array([0.0, *tail]), more=more))
        return Menu(tuple(lines))

    @cached_property
    def factors(self):
        """What the menu's divergence of each site is off by."""
        return np.exp(np.random.default_rng(self.seed + 1).normal(0, 0.5, self.sites))

    @property
    def options(self):
        return {line.site: line.options for line in self.menu.lines}

    def values(self, plan):
        """The true objectives of a plan, a choice of the menu."""
        menu = self.menu
        alone = [line.divergence[place] * f for line, place, f in zip(menu.lines, plan, self.factors, strict=True)]
        pairs = zip(alone[: self.sites : 2], alone[1 : self.sites : 2], strict=True)  # the two sites of each block
        divergence = sum(alone) + self.interaction * sum(math.sqrt(a * b) for a, b in pairs)
        stored = menu.size(plan) / menu.dense
        third = [0.2 + 0.5 * stored + 0.1 * (plan[0] == 0)] if self.slow else []
        return [max(divergence, NEVER), stored, *third, *([self.weight(plan)] if self.bytes else [])]

    def weight(self, plan):
        """The second cost, over that of dense."""
        return self.menu.costs(plan)[1] / self.menu.costs([0] * self.sites)[1]

    @property
    def count(self):
        return 2 + self.slow + self.bytes

    @property
    def goal(self):
        return Goal(
            loss=math.exp,
            log_divergence=lambda value: math.log(max(value, NEVER)),
            costs=self.costs,
            dense=NEVER,
            quality=0,
            count=self.count,
            unit=lambda values: np.reshape(values, (-1, self.count)) / np.array([0.5, *[1.0] * (self.count - 1)]),
        )

    def costs(self, plan):
        places = self.menu.encode(plan)
        return {1: self.menu.size(places) / self.menu.dense} | ({2: self.weight(places)} if self.bytes else {})

    def predictor(self, goal=None):
        return Predictor(self.menu, Drawn(self.menu), goal or self.goal)

    def sampler(self, seed, goal=None):
        return RankfrontSampler(self.predictor(goal), seed)

    def ask(self, study):
        """A running trial, and the plan it was given."""
        trial = study.ask()
        return trial, tuple(trial.suggest_int(site, 0, len(found) - 1) for site, found in self.options.items())

    def params(self, plan):
        """A trial's parameters for a plan."""
        return dict(zip(self.options, map(int, plan), strict=True))

    def tell(self, study, trial, plan):
        values = self.values(plan)
        values[0] *= math.exp(self.noise * np.random.default_rng(trial.number).standard_normal())
        study.tell(trial, values)

    def study(self, sampler):
        """An empty study."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return optuna.create_study(sampler=sampler, directions=["minimize"] * self.count)

    def run(self, study, trials, pending=1, fails=lambda number: False):
        """``trials`` more, ``pending`` at a time; the plans in order."""
        plans = []
        while len(plans) < trials:
            asked = [self.ask(study) for _ in range(pending)]
            for trial, plan in asked:
                plans.append(plan)
                if fails(trial.number):
                    study.tell(trial, state=TrialState.FAIL)
                else:
                    self.tell(study, trial, plan)
        return plans

    def share(self, plans):
        """Hypervolume of the plans' true values in the goal's box."""
        points = self.goal.unit(np.array([self.values(plan) for plan in plans]))
        return moocore.hypervolume(points, ref=np.ones(points.shape[1]))

    def best(self):
        """That of every plan there is."""
        return self.share(list(itertools.product(*(range(len(found)) for found in self.options.values()))))


class Both(Problem):
    """Perplexity beside the divergence that is modelled: the loss rises 1.3 times as much."""

    count = 3

    def values(self, plan):
        divergence, stored = super().values(plan)
        return [divergence, stored, 30 * math.exp(1.3 * divergence)]

    @property
    def goal(self):
        box = np.array([[0.0, 0.0, 30.0], [0.5, 1.0, 60.0]])
        return replace(
            super().goal, perplexity=(2, 30.0), unit=lambda values: (np.reshape(values, (-1, 3)) - box[0]) / box[1]
        )


class Misled(Problem):
    """The menu knows nothing: what it says of a site is another's, and off by a factor of seven besides."""

    def values(self, plan):
        random = np.random.default_rng(self.seed + 5)
        factors, other = np.exp(random.normal(0, 2.0, self.sites)), random.permutation(self.sites)
        alone = [self.menu.lines[i].divergence[place] * f for place, i, f in zip(plan, other, factors, strict=True)]
        return [max(sum(alone) / 10, NEVER), self.menu.size(plan) / self.menu.dense]


class Overlap(Problem):
    """A block's two sites may also be treated as one, and so may the first sites of all blocks: lines that overlap."""

    @cached_property
    def menu(self):
        singles, random = Problem.menu.func(self).lines, np.random.default_rng(self.seed)
        claims = [range(site, site + 2) for site in range(0, self.sites, 2)] + [range(0, self.sites, 2)]
        joint = []
        for number, claim in enumerate(claims):
            members = [singles[site] for site in claim]
            dense = int(sum(line.sizes[0] for line in members))
            stored = np.array([dense, int(0.7 * dense), int(0.4 * dense)])
            hurt = sum(line.divergence[-1] for line in members) * random.uniform(0.2, 1.2) * np.array([0.0, 0.3, 0.8])
            options = (DENSE_OPTION, Option.of("svd", rank=20), Option.of("svd", rank=10))
            joint.append(Line(f"joint {number}", options, stored, hurt, tuple(line.site for line in members)))
        return Menu((*singles, *joint))

    @cached_property
    def factors(self):
        return np.exp(np.random.default_rng(self.seed + 1).normal(0, 0.5, len(self.menu.lines)))

    def best(self):
        every = itertools.product(*(range(len(found)) for found in self.options.values()))
        return self.share([plan for plan in every if compatible(self.menu, plan)])


def plan_of(study, problem, number):
    """A trial's plan, as a choice of the menu."""
    return tuple(study.get_trials()[number].params[site] for site in problem.options)


def measure_slopes(problem, study, number, random=None):
    """A trial as a worker would leave it: the true change of every switch around a trial's plan, but of joint sites.
    With ``random``, changes and curvatures that have nothing to do with the problem."""
    plan = plan_of(study, problem, number)
    study.enqueue_trial(study.get_trials()[number].params, user_attrs={"slopes_of": number})
    trial, asked = problem.ask(study)
    assert asked == plan
    found = {}
    for line, place, factor in zip(problem.menu.lines, plan, problem.factors, strict=True):
        a, b = factor * (line.divergence - line.divergence[place]), np.zeros(len(line.options))
        if random is not None:
            divergence = problem.values(plan)[0]
            a, b = random.normal(0, 0.03 * divergence, len(a)), random.exponential(0.004 * divergence, len(b))
        found[line.site] = [[None if line.weights else float(value) for value in values] for values in (a, b)]
    trial.set_user_attr("slopes", found)
    study.tell(trial, state=TrialState.PRUNED)


def around(problem, sampler, keep, random=None):
    """A study of one plan of the menu, at ``keep``, with slopes around it, which ``sampler`` has learned from."""
    study = problem.study(sampler)
    study.enqueue_trial(problem.params(Lagrangian(problem.menu).solve(keep * problem.menu.dense)))
    problem.run(study, 1)
    measure_slopes(problem, study, 0, random)
    sampler.predictor.learn(study.trials)
    return study


def slopes_due(sampler, study):
    """The trial that slopes should be measured around next, or None."""
    trials = study.get_trials()
    sampler.predictor.learn(trials)
    return next_reference(trials, sampler.predictor, sampler.targets)
