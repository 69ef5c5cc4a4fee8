"""How far predictions of plans are off before they are measured.

    python studies/predictions.py RUN [RUN ...]

RUN is a run folder of our sampler, such as studies/results/runs/rankfront-0 that studies/search_benchmark.py leaves.
Every plan that its sampler proposed is predicted once more from the trials before it. "Missed" is the median of
|measured − predicted| in log-divergence, "z" the root mean square of that over the standard deviation that was claimed.
Nothing is measured. The page goes to studies/results/predictions.md; the one that is there is of 9673a7a, which
corrected predictions by what was missed of measured neighbours, and has both.
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

| run | proposals | missed | z |
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
    missed, scores = [], []
    for trial in past.state.trials:
        plan = predictor.history.plan(trial)
        if trial.values is None or trial.user_attrs.get("origin") != OURS or plan is None or not any(plan):
            continue
        predictor.learn(past.state.trials[: trial.number])
        level = predictor.goal.log_divergence(trial.values[predictor.goal.quality])
        (predicted,), (claimed,) = predictor.levels([plan])
        missed.append(abs(level - predicted))
        scores.append((level - predicted) / claimed)
    z = np.sqrt(np.mean(np.square(scores)))
    text = f"| {Path(run).name} | {len(missed)} | {np.median(missed):.3f} | {z:.2f} |"
    print(text, flush=True)
    return text


if __name__ == "__main__":
    main()
