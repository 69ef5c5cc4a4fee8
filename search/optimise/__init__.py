"""What to measure next: predictions learnt from trials, samplers, and the answer within given limits."""
