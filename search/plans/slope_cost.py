"""What slopes around a plan cost in tokens, and how sure they are (see `measure.slopes`)."""

from __future__ import annotations

SLOPE_TOKENS = 3072  # of the search split, for one plan, at least; guess
# Of what a study has spent, the cost of slopes: late ones are of more tokens, where less is to gain. guess
SLOPE_SHARE = 0.05
# One forward pass and a backward one of twice its cost; for KL a second backward one, and the teacher's forward one.
PASSES = {"perplexity": 3, "divergence": 6}
# E (hᵀ δ)² over E (gᵀ δ)², h of drawn labels and g of the text's own: on smollm2-135m medians of 0.66 at keep 0.9 to
# 0.33 at 0.5, the logarithms' correlation 0.97 to 0.92, as much as between halves of the tokens.
OWN_LABELS = 0.4


def slope_tokens(spent: int, quality: str) -> int:
    """Of how many tokens slopes of ``quality`` are measured once a study has ``spent`` so many."""
    return max(SLOPE_TOKENS, int(SLOPE_SHARE * spent / PASSES[quality]))
