"""What to measure next. `rankfront_sampler` proposes, by what `predictor` learnt; `answer` keeps to limits."""
