"""How far predictions of plans are off before they are measured, and what measured neighbours make of them.

    python studies/predictions.py RUN [RUN ...]

RUN is a run folder of our sampler, such as studies/results/runs/rankfront-0 that studies/search_benchmark.py leaves.
Every plan that its sampler proposed is predicted once more from the trials before it: by surrogate and slopes alone,
and corrected by what they missed of measured neighbours. "Missed" is the median of |measured − predicted| in
log-divergence, "z" the root mean square of that over the standard deviation that was claimed. Nothing is measured. The
page goes to studies/results/predictions.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import write_page

from rankfront.search import Study
from rankfront.search.choices import OURS
from rankfront.search.optimise.answer import prior_predictor

PAGE = """# Predictions before measurements

Proposals of our sampler, predicted from the trials before them. How is said at the top of `studies/predictions.py`.

| run | proposals | missed: surrogate and slopes, then neighbours too | z, likewise |
| --- | --- | --- | --- |
{lines}

```
{source}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    lines = [line(run) for run in parser.parse_args().runs]
    write_page("predictions", PAGE, lines)


def line(run: str) -> str:
    """The run's line of the table."""
    study = Study.open(run)
    past = study.read()
    predictor, _, _ = prior_predictor(past.state, past.config, past.space)
    missed: list[list[float]] = [[], []]
    scores: list[list[float]] = [[], []]
    for trial in past.state.trials:
        plan = predictor.history.plan(trial)
        if trial.values is None or trial.user_attrs.get("origin") != OURS or plan is None or not any(plan):
            continue
        predictor.learn(past.state.trials[: trial.number])
        level = predictor.goal.log_divergence(trial.values[predictor.goal.quality])
        for kind, found in enumerate((predictor.uncorrected(np.array([plan])), predictor.levels([plan]))):
            (predicted,), (claimed,) = found
            missed[kind].append(abs(level - predicted))
            scores[kind].append((level - predicted) / claimed)
    medians = ", ".join(f"{np.median(values):.3f}" for values in missed)
    z = ", ".join(f"{np.sqrt(np.mean(np.square(values))):.2f}" for values in scores)
    text = f"| {Path(run).name} | {len(missed[0])} | {medians} | {z} |"
    print(text, flush=True)
    return text


if __name__ == "__main__":
    main()
