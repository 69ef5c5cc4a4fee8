"""SVD-LLM: truncation-aware whitening by the Gram of the inputs.

    minimise Σ_t ‖(W − Ŵ) x_t‖² = ‖(W − Ŵ) C^{1/2}‖²_F, C = Σ_t x_t x_tᵀ

Source: SVD-LLM (2403.07378) Theorem 3.2. The paper whitens by a Cholesky factor and inverts it; the same
optimum is U_r (U_rᵀ W), which needs neither and holds for a singular C.
"""

from __future__ import annotations

from rankfront.methods._low_rank import LowRank
from rankfront.methods._method import register
from rankfront.methods._metric import WHITENING

SVD_LLM = register(LowRank(name="svd-llm", paper="2403.07378", weighting=WHITENING))
