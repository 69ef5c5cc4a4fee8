"""Constants of what proposes plans, in one place, each with the study that it comes from or "guess".

An ablation or a sensitivity study is a loop over `replace(Tuning(), ...)`. Sizes are shares of the dense model's,
divergences are in nats a token, errors are standard deviations of a log-divergence unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """What the search for plans is tuned by. A mechanism is off where its comment says so."""

    # -- mechanisms (studies/ablation.py switches each of them off)
    paths: bool = True  # continuation from near dense in short steps; study: results/paths.md
    neighbours: bool = True  # correct predictions by what they missed of similar plans; study: results/predictions.md
    # Of what similar plans explain within the surrogate; the evidence decides among them. (0.0,) is off. guess
    residuals: tuple[float, ...] = (0.1, 0.03, 0.3, 1.0)
    # What global proposals are drawn from, in turn: the corrected menu, a posterior sample of it, level switches. guess
    modes: tuple[str, ...] = ("solve", "sample", "solve", "switch")
    switches: int = 64  # budget-preserving switches tried for a proposal of that mode; 0 is off. guess
    # By how many standard deviations predictions are taken to be too dark, until something gains; (0.0,) is off. guess
    easings: tuple[float, ...] = (0.0, 1.0, 2.0)

    # -- proposals
    solutions: int = 24  # budgets at which the corrected menu is solved for each proposal; guess
    random_steps: int = 100  # at most, before the space is taken to be exhausted; guess
    partners: int = 24  # sites looked at to make up for a switched one; guess
    steps_after_slopes: tuple[int, ...] = (1, 2)  # proposals measured after a pass of slopes, in turn; guess
    global_every: int = 4  # one of the proposals beside those from the newest slopes in so many is global; guess
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
    bands: int = 10  # shares of the dense size that the corrected menu is solved for each by itself; guess
    band_rounds: int = 3  # of solving for a budget whose plan turns out of another band; guess
    nearest: int = 2  # plans with slopes that an answer steps from; guess


DEFAULT = Tuning()
