"""Our sampler near known optima: what it proposes on synthetic problems."""

import optuna
import pytest
from optuna.trial import TrialState
from synthetic import Overlap, Problem, compatible, measure_slopes, plan_of, slopes_due

from rankfront.search.attributes import INTERRUPTED

TRIALS = 40
PROBLEMS = {
    "additive": (Problem(), 0.97),
    "additive, another": (Problem(seed=7), 0.97),
    "interactions": (Problem(interaction=1.5), 0.93),
    "noise": (Problem(noise=0.1), 0.93),
    "interactions and noise": (Problem(interaction=1.0, noise=0.1, seed=3), 0.93),
    "three objectives": (Problem(slow=True, interaction=0.5), 0.93),
    "two costs": (Problem(bytes=True), 0.97),
    "two costs and noise": (Problem(bytes=True, noise=0.1, seed=1), 0.95),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_it_comes_near_the_optimum_and_past_random(name):
    problem, least = PROBLEMS[name]
    best = problem.best()
    ours = [problem.share(problem.run(problem.study(problem.sampler(seed)), TRIALS)) / best for seed in (0, 1)]
    randoms = [optuna.samplers.RandomSampler(seed) for seed in (0, 1)]
    random = [problem.share(problem.run(problem.study(sampler), TRIALS)) / best for sampler in randoms]
    assert min(ours) >= least
    assert min(ours) > max(random)
    assert max(ours) <= 1 + 1e-9


@pytest.mark.parametrize("pending", [1, 5])
@pytest.mark.parametrize("name", ["interactions", "three objectives"])
def test_no_plan_is_proposed_twice(name, pending):
    """Neither one that is measured, nor one that failed, nor one that still runs."""
    problem, _ = PROBLEMS[name]
    plans = problem.run(problem.study(problem.sampler(0)), TRIALS, pending, fails=lambda number: number % 4 == 1)
    assert len({tuple(plan) for plan in plans}) == len(plans)


def test_failed_trials_cost_no_more_than_themselves():
    problem = Problem(interaction=1.5)
    plans = problem.run(problem.study(problem.sampler(0)), TRIALS, fails=lambda number: number % 3 == 0)
    measured = [plan for number, plan in enumerate(plans) if number % 3]
    assert problem.share(measured) >= 0.9 * problem.best()
    assert len(problem.run(problem.study(problem.sampler(0)), 10, fails=lambda number: True)) == 10


def test_a_new_sampler_goes_on_with_an_old_study():
    problem = Problem(interaction=1.5)
    study = problem.study(problem.sampler(0))
    plans = problem.run(study, TRIALS // 2)
    study.sampler = problem.sampler(0)
    plans += problem.run(study, TRIALS // 2)
    assert len({tuple(plan) for plan in plans}) == TRIALS
    assert problem.share(plans) >= 0.93 * problem.best()


def test_the_seed_decides():
    problem = Problem(interaction=1.5)
    first, second, other = (problem.run(problem.study(problem.sampler(seed)), 16) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_proposals_go_on_until_every_plan_is_measured():
    """A space of nine plans: each once. After that there is nothing left to propose, and asking still returns."""
    problem = Problem(sites=2, levels=3)
    study = problem.study(problem.sampler(0))
    plans = problem.run(study, 9)
    assert len({tuple(plan) for plan in plans}) == 9
    problem.run(study, 1)


# -- sites that share weights, and slopes


def run_with_slopes(problem, study, sampler, trials, pending=1):
    """Slopes wherever the sampler wants them, as the scheduler has it; the plans that were proposed."""
    plans, references = [], []
    while len(plans) < trials:
        number = slopes_due(sampler, study)
        if number is not None:
            measure_slopes(problem, study, number)
            references.append(number)
        plans += problem.run(study, pending, pending)
    return plans, references


@pytest.mark.parametrize("pending", [1, 4])
@pytest.mark.parametrize("seed", range(2))
def test_overlapping_sites_are_proposed_apart_and_no_plan_twice(seed, pending):
    problem = Overlap(seed=seed, sites=4)
    plans = problem.run(problem.study(problem.sampler(0)), TRIALS, pending)
    assert all(compatible(problem.menu, plan) for plan in plans)
    assert len({tuple(plan) for plan in plans}) == len(plans)
    assert any(place for plan in plans for place in plan[problem.sites :])
    assert problem.share(plans) >= 0.93 * problem.best()


@pytest.mark.parametrize(("seed", "pending"), [(0, 1), (2, 4)])
def test_with_slopes_too(seed, pending):
    """Around plans that treat joint sites as well, of which slopes say nothing."""
    problem = Overlap(seed=seed, sites=4)
    sampler = problem.sampler(0)
    study = problem.study(sampler)
    plans, references = run_with_slopes(problem, study, sampler, TRIALS, pending)
    assert len(references) >= 2
    assert any(any(plan_of(study, problem, number)[problem.sites :]) for number in references)
    assert all(compatible(problem.menu, plan) for plan in plans)
    assert len({tuple(plan) for plan in plans}) == len(plans)
    assert problem.share(plans) >= 0.93 * problem.best()


@pytest.mark.parametrize("name", ["interactions", "noise"])
def test_slopes_are_measured_around_front_members_each_once(name):
    problem, least = PROBLEMS[name]
    sampler = problem.sampler(0)
    study = problem.study(sampler)
    plans, references = run_with_slopes(problem, study, sampler, TRIALS)
    assert len(references) >= 3
    assert len(set(references)) == len(references)
    assert all(
        sampler.predictor.history.measured[plan_of(study, problem, number)].trial == number for number in references
    )
    assert len(sampler.predictor.history.taylor_models) == len(references)
    assert len({tuple(plan) for plan in plans}) == len(plans)
    assert problem.share(plans) >= least * problem.best()


def test_slopes_that_wait_or_run_are_not_asked_for_again():
    """One pass at a time, however many workers there are; one that failed by itself is not tried again."""
    problem = Problem()
    sampler = problem.sampler(0)
    study = problem.study(sampler)
    problem.run(study, 10)
    number = slopes_due(sampler, study)
    assert number is not None
    study.enqueue_trial(study.get_trials()[number].params, user_attrs={"slopes_of": number})
    assert slopes_due(sampler, study) is None
    trial, _ = problem.ask(study)
    assert slopes_due(sampler, study) is None
    trial.set_user_attr("failure", INTERRUPTED)
    study.tell(trial, state=TrialState.FAIL)
    assert slopes_due(sampler, study) == number
    study.enqueue_trial(study.get_trials()[number].params, user_attrs={"slopes_of": number})
    trial, _ = problem.ask(study)
    trial.set_user_attr("failure", "MemoryError")
    study.tell(trial, state=TrialState.PRUNED)
    problem.run(study, 10)
    assert slopes_due(sampler, study) not in (None, number)
