"""The taxonomy of matrix and tensor factorisations as subspace transformations, in the manner of 2410.03040 [M].

Every method names one of `FAMILIES` as its family and says its own geometry in a line.
"""

FAMILIES = {
    "subspace": "outputs lie in one subspace of few dimensions",
    "weighted subspace": "the same, distances weighed by what the model does with them",
    "shared subspace": "several weights, or classes of rows, lie in one subspace and keep coordinates of their own",
    "union of subspaces": "each column picks a few atoms of a dictionary: as many subspaces as there are choices",
    "subspace plus sparse": "a subspace, and single entries that lie outside it",
    "multi-resolution": "a subspace of its own in every band of a wavelet transform",
    "tensor-product subspaces": "modes of a reshaped weight have subspaces each, joined by a small core or chain",
    "integer grids": "no subspace: values on a grid of few steps, one for every row or group of inputs",
    "nested and selected coordinates": "coordinates that the model already has, the best of them kept",
}
