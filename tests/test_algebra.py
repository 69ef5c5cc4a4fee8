"""Numerical guards against closed forms and matrices that break the plain way."""

import pytest
import torch

from rankfront.methods._algebra import lower_root


def spectrum(values):
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0))
    ).Q.double()
    basis = torch.linalg.qr(basis).Q
    return (basis * torch.tensor(values, dtype=torch.float64)) @ basis.T


def test_a_lower_root_is_that_of_the_gram_and_its_ridge():
    gram, ridge = spectrum([4.0, 1.0, 0.5, 0.0]), torch.tensor(0.01, dtype=torch.float64)
    lower = lower_root(gram, ridge)
    assert torch.equal(lower, lower.tril())
    assert torch.allclose(lower @ lower.T, gram + ridge * torch.eye(4, dtype=torch.float64))


def test_a_gram_that_rounding_left_indefinite_has_one_too():
    """Eigenvalues further below zero than the ridge count as zero."""
    gram, ridge = spectrum([4.0, 1.0, 0.5, -0.02]), torch.tensor(0.01, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(gram + ridge * torch.eye(4, dtype=torch.float64))
    lower = lower_root(gram, ridge)
    assert torch.equal(lower, lower.tril())
    expected = spectrum([4.0, 1.0, 0.5, 0.0]) + ridge * torch.eye(4, dtype=torch.float64)
    assert torch.allclose(lower @ lower.T, expected, atol=1e-9)


def test_a_gram_that_is_not_finite_has_none():
    with pytest.raises(ValueError, match="not finite"):
        lower_root(torch.full((3, 3), torch.nan), torch.tensor(1.0))
