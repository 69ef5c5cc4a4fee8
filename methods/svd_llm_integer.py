"""SVD-LLM with both factors in 8 or 4 bits, under the names that it had before `bits` was an axis of its own."""

from rankfront.methods._method import register
from rankfront.methods._rounded import Rounded
from rankfront.methods._sizes import INTEGER_BITS
from rankfront.methods.svd_llm import SVD_LLM

for bits in INTEGER_BITS:
    register(Rounded(SVD_LLM, bits))
