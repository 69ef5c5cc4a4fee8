"""What slopes around a plan cost in tokens (see `measure.slopes`)."""

from __future__ import annotations

from rankfront.search.tuning import TUNING

# One forward pass and a backward one of twice its cost; for KL a second backward one, and the teacher's forward one.
PASSES = {"perplexity": 3, "divergence": 6}


def slope_tokens(spent: int, quality: str) -> int:
    """Of how many tokens slopes of ``quality`` are measured once a study has ``spent`` so many."""
    return max(TUNING.slope_tokens, int(TUNING.slope_share * spent / PASSES[quality]))
