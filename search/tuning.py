"""Constants of what proposes plans, in one place, each with the study that it comes from or "guess".

A sensitivity study is a loop over `with tuned(...)`. Sizes are shares of the dense model's, divergences are in nats a
token, errors are standard deviations of a log-divergence unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tuning:
    """What the search for plans is tuned by."""

    # -- proposals
    solutions: int = 24  # budgets at which the corrected menu is solved for each proposal; guess
    # Of nsga2 and nsga3: in tens to hundreds of trials Optuna's default of 50 would see few generations. guess
    population: int = 16
    random_steps: int = 100  # at most, before the space is taken to be exhausted; guess
    steps_after_slopes: tuple[int, ...] = (1, 2)  # proposals measured after a pass of slopes, in turn; guess
    global_every: int = 4  # of proposals, those from the newest slopes aside, one in so many is no step; guess
    # Budgets around that of a reference plan: how far, relative to it, and how many. Steps that store much less hurt
    # more than slopes say: what their switches do adds up, where those of a step of the same size in part cancel. guess
    stretch: float = 0.04
    around: int = 4
    near_slopes: float = 0.06  # share of the size within which slopes count as measured nearby; guess
    widest_gap: float = 0.1  # a wider one between front members says no more about what is to gain; guess
    slack: float = 0.01  # that a better plan may store more for a front member not to be worth refining; guess
    same: float = 0.03  # log-divergence by which plans may differ through noise; guess

    # -- predictions
    prior_error: float = 0.15  # of the surrogate before any trial; guess
    prior_trials: int = 8  # that this counts for; guess
    # The winner's curse, in standard deviations by which the best of many turns out worse than predicted: solutions of
    # the corrected menu, and steps along slopes. Means of tens of trials on smollm2-135m, not kept: guess.
    solutions_worse: float = 1.5
    steps_worse: float = 0.5
    # Shares of a reference plan's divergence that steps are solved to save. Longer ones promise more and keep less: the
    # best of all lengths promised 0.08 to 0.34 around plans of the menu and kept 0.11 to 0.25. study: results/steps.md
    lengths: tuple[float, ...] = (0.02, 0.05, 0.1, 0.18, 0.3)
    # Multiples of κ among which those are found: from, to, count; guess.
    dampings: tuple[float, float, int] = (0.5, 16.0, 16)
    references: int = 4  # plans with slopes that steps are taken from at once; guess
    share_rounds: int = 3  # of solving the corrected menu for a plan whose size is known once it is solved for; guess
    nearest: int = 2  # plans with slopes that an answer steps from; guess
    # Ridges of objectives that nothing predicts: on what all methods save in common, and on what each does; guess.
    ridges: tuple[float, float] = (1e-5, 1e-3)

    # -- surrogate: standard deviations of its prior, in log-divergence. The single-site ones follow the spread of the
    # gradient's prediction around measured single-site divergences on smollm2-135m (0.56), not kept: guess.
    site_deviation: float = 0.4
    kind_deviation: float = 0.3
    block_deviation: float = 0.2
    method_deviation: float = 0.3
    offset_deviation: float = 1.0  # of a around 0; guess
    slope_deviation: float = 0.3  # of c around 1; guess
    unexplained: float = 0.05  # of a measurement: what the terms cannot explain; guess
    # Of a measurement, in nats: the error of a difference in loss over so many tokens; guess.
    loss_spread: float = 0.004
    spread_tokens: int = 4096
    newton_steps: int = 6  # of each fit; guess

    # -- Taylor models: prior of α and κ, mean and standard deviation. What the first steps from the menu's plan at keep
    # 0.8 of smollm2-135m gave for switches of 10 to 100 sites (α 0.7 to 0.8, κ 3 to 4), not kept: guess.
    first_order: tuple[float, float] = (0.75, 0.2)
    second_order: tuple[float, float] = (3.0, 1.5)
    first_bounds: tuple[float, float] = (0.2, 1.5)  # of α; guess
    second_bounds: tuple[float, float] = (1.0, 12.0)  # of κ; guess
    change_error: float = 0.25  # of a predicted change, relative to its terms; guess
    change_floor: float = 0.004  # of the same, in nats; guess
    taught_below: float = 0.5  # of a reference's divergence: changes surer than that teach α and κ; guess
    taught_elsewhere: float = 3.0  # times as large is the error of what another reference teaches; guess
    least_left: float = 0.3  # of a reference's divergence that a prediction leaves at least; guess

    # -- correction factors of the menu by slopes
    factor_deviation: float = 0.5  # of a factor around 1; guess
    # What even exact slopes would miss: of a predicted increase, and of κ b; guess.
    increase_error: float = 0.5
    bend_error: float = 0.25
    factor_bounds: tuple[float, float] = (0.25, 4.0)  # guess
    factor_width: float = 0.12  # share of the size within which factors of one plan serve another; guess
    factor_prior: float = 0.1  # weight of no correction: far from every plan factors fade to 1; guess

    # -- accuracy of predictions
    recent: int = 16  # trials; guess
    least_predictions: int = 8  # fewer say nothing about a rank correlation or a median; guess
    poor_spearman: float = 0.8  # guess
    # Of log-divergence. On synthetic problems of 30 sites whose menu is off by a factor of 1.6 a site, with and without
    # interactions and 10% noise, the median over 14 trials was 0.02 to 0.16; with the menu's divergences shuffled
    # between sites and off by a factor of 7, 0.18 to 0.41. study: test_predictor.py
    poor_error: float = 0.3
    faint: float = 0.02  # nats a token; of less, noise of a few thousandths decides the logarithm; guess
    # Of the variance of ranks; what size leaves of less is of a few neighbours that swap places. guess
    least_variance: float = 0.02
    # Nats a token; below, a difference from dense is noise, and a perplexity may even be better. guess
    least_divergence: float = 1e-4

    # -- target budgets and answers
    # Fractions of the dense model's at which limits are set. guess
    round_fractions: tuple[float, ...] = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    limit_tries: int = 32  # budgets at which the most that limits allow is looked for; guess
    limit_halvings: int = 8  # after that; guess
    # Of the predicted divergence, relative, between an answer's knapsack and the optimum: exact takes seconds. guess
    answer_gap: float = 1e-3
    # Knapsacks solved for an answer, each further below limits on latency that the one before missed as measured. guess
    answer_tries: int = 3
    # Of what an integer program's plan stores: budgets for slopes, which see no other limit. guess
    answer_shares: tuple[float, ...] = (1.0, 0.98, 0.95)

    # -- opening
    # Kept fractions of the treated weights at which the predicted front is measured, where no target is nearby: where
    # they are few of those that an objective counts, targets are far apart. guess
    opening_fractions: tuple[float, ...] = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    opening_nearby: float = 0.05  # kept fraction; guess
    # Of the first plan, or as near as limits allow: slopes around it say of every site what it does in a compressed
    # model, and the others are solved for by that. guess
    reference_fraction: float = 0.6

    # -- solvers: how near the optimum, against time; guess, all of them
    grains: int = 50_000  # of the whole size where several costs are weighed against each other
    repairs: int = 12  # times that budgets are tightened where the integer solver's tolerance let a plan through
    beyond: float = 100.0  # times below and above all losses by stored value are the first and last multiplier
    bisections: int = 16  # multipliers tried for a budget
    exchanges: int = 200  # pairs of moves made at most
    paired: int = 256  # moves up and moves down of which every pair is looked at

    # -- jobs
    probe_jobs: int = 16  # that probes are split into, so that workers share them, interruptions lose little; guess
    # Of a site's dense storage, by the source of the menu that measures there; guess.
    probe_fractions: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {"probe": (0.3,), "probes": (0.3, 0.6, 0.9)}
    )
    group_bands: int = 3  # of depth, in the grouped source; guess
    group_keep: float = 0.5  # that the sites of a group are probed at; guess
    group_wider: float = 0.25  # than that, what may be probed: small steps say nothing of large ones; guess
    # Of a measured to a predicted divergence, either way: beyond, one of the two is not to be believed. guess
    worst_ratio: float = 30.0
    slope_tokens: int = 3072  # of the search split, for one plan, at least; guess
    # Of what a study has spent, the cost of slopes: late ones are of more tokens, where less is to gain. guess
    slope_share: float = 0.05
    # E (hᵀ δ)² over E (gᵀ δ)², h of drawn labels and g of the text's own. On smollm2-135m, not kept, medians of 0.66 at
    # keep 0.9 to 0.33 at 0.5, the logarithms' correlation 0.97 to 0.92, as much as between halves of the tokens. guess
    own_labels: float = 0.4


TUNING = Tuning()


@contextmanager
def tuned(**changes: Any) -> Iterator[None]:
    """Within, some constants are others, in this process: for studies of what they change, and for tests. They change
    in place, for everybody has imported the one `TUNING`, which is not passed through eight layers."""
    before = {name: getattr(TUNING, name) for name in changes}
    try:
        for name, value in changes.items():
            object.__setattr__(TUNING, name, value)  # whoever imported it sees the change
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(TUNING, name, value)
