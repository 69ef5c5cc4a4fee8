"""FWSVD: columns weighted by Fisher information.

    minimise ‖(W − Ŵ) diag(√f)‖_F, f_j = Σ_t ‖g_t‖² x_tj²

Source: FWSVD (2207.00112) section 3: SVD of the weight scaled by the square root of row-summed Fisher
information (its weights are in × out, so its row is our input column). We use the token-wise Fisher, which one
forward and one backward hook give as an n-vector, instead of squared batch gradients.
"""

from __future__ import annotations

from rankfront.methods._low_rank import LowRank
from rankfront.methods._method import register
from rankfront.methods._metric import FISHER

register(LowRank(name="fwsvd", paper="2207.00112", weighting=FISHER))
