"""Truncated SVD: the best rank-r approximation of the weight itself.

    minimise ‖W − Ŵ‖_F over rank r

Source: Eckart & Young, Psychometrika 1936. Knows nothing of the inputs; the baseline of every other method.
"""

from __future__ import annotations

from rankfront.methods._low_rank import LowRank
from rankfront.methods._method import register
from rankfront.methods._metric import IDENTITY

register(LowRank(name="svd", paper="Eckart & Young 1936", weighting=IDENTITY))
