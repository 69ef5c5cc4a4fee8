"""``kfac-svd``: low rank in the two-sided metric of a Kronecker-factored Fisher.

Minimises tr(Γ Δ C Δᵀ) = ‖Γ^{1/2} Δ C^{1/2}‖²_F for Δ = W − Ŵ, which is the second-order loss of Δ where inputs and
output gradients are independent, E[(gᵀ Δ x)²] ≈ tr(Γ Δ C Δᵀ). Source: KFAC-SVD as shipped with LEMS (its code: clipping
to the middle 75% of tokens by gradient norm, shrinkage 0.1 of C and 0.3 of Γ), GFWSVD; the factorisation of the Fisher
is K-FAC's (1503.05671).
"""

from rankfront.methods._low_rank import LowRank
from rankfront.methods._method import register
from rankfront.methods._metric import TWO_SIDED

register(LowRank("kfac-svd", "LEMS, ICML 2026; K-FAC, 1503.05671", TWO_SIDED))
