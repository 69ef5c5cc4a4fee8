"""ASVD: columns weighted by mean activation magnitude.

    minimise ‖(W − Ŵ) diag(mean|x|^α)‖_F, α = 0.5

Source: ASVD (2312.05821), the absolute-mean scaling with the published α. Its sensitivity search over ranks is
an allocation and does not belong here.
"""

from __future__ import annotations

from rankfront.methods._low_rank import LowRank
from rankfront.methods._method import register
from rankfront.methods._metric import ACTIVATION

register(LowRank(name="asvd", paper="2312.05821", weighting=ACTIVATION))
