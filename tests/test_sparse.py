"""Sparse rows: packed supports come back, and the dense matrix that runs is never an old one."""

import copy
import io

import pytest
import torch
from torch import nn

from rankfront.methods._sparse import SparseRows, gather_rows, pack_mask, scatter_rows, unpack_mask

M, K, S = 7, 11, 4


def random_mask(rows, columns, kept, seed=0):
    noise = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, noise.topk(kept, dim=1).indices, True)


def make_module(seed=0):
    values = torch.randn(M, S, generator=torch.Generator().manual_seed(seed))
    return SparseRows(values, pack_mask(random_mask(M, K, S, seed)), K)


def slow(module):
    """The dense matrix, value by value."""
    dense = torch.zeros(M, K, dtype=module.values.dtype)
    for i, row in enumerate(module.mask()):
        for value, j in zip(module.values[i].detach(), row.nonzero().flatten(), strict=True):
            dense[i, j] = value
    return dense


@pytest.mark.parametrize(("rows", "columns", "kept"), [(1, 1, 1), (3, 5, 2), (8, 8, 8), (13, 17, 1)])
def test_masks_come_back_packed(rows, columns, kept):
    mask = random_mask(rows, columns, kept)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.nbytes == -(-rows * columns // 8)
    assert torch.equal(unpack_mask(packed, rows, columns), mask)


def test_values_return_to_their_places():
    module = make_module()
    assert torch.equal(module.sparse_matrix(), slow(module))
    assert torch.equal(gather_rows(module.sparse_matrix(), module.mask()), module.values)


def test_what_is_kept_is_returned_again():
    module = make_module()
    assert module.sparse_matrix() is module.sparse_matrix()


def changed_in_place(module):
    with torch.no_grad():
        module.values.mul_(2)


def loaded(module):
    module.load_state_dict(make_module(seed=1).state_dict())


def replaced(module):
    module.values = nn.Parameter(make_module(seed=2).values.detach().clone(), requires_grad=False)


def moved_on(module):
    module.support = make_module(seed=3).support


def narrowed(module):
    module.to(torch.bfloat16)


def cast_there_and_back(module):
    module.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [changed_in_place, loaded, replaced, moved_on, narrowed, cast_there_and_back])
def test_every_change_is_seen(change):
    module = make_module()
    before = module.sparse_matrix()
    change(module)
    after = module.sparse_matrix()
    assert after.dtype == module.values.dtype
    assert torch.equal(after, slow(module))
    assert not torch.equal(after.float(), before)


def test_what_is_kept_is_neither_saved_nor_copied():
    module = make_module()
    module.sparse_matrix()
    assert module.state_dict().keys() == {"values", "support"}
    twin = copy.deepcopy(module)
    assert twin._kept is None
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=False)._kept is None
    assert module._kept is not None
    changed_in_place(twin)
    assert torch.equal(twin.sparse_matrix(), 2 * module.sparse_matrix())


def test_moving_gives_the_memory_back():
    module = make_module()
    module.sparse_matrix()
    module.to(torch.bfloat16)
    assert module._kept is None


def test_gradients_reach_the_values_and_nothing_is_kept():
    module = make_module().requires_grad_(True)
    weights = torch.randn(M, K)
    (module.sparse_matrix() * weights).sum().backward()
    assert torch.equal(module.values.grad, gather_rows(weights, module.mask()))
    assert module._kept is None
    with torch.no_grad():
        assert not module.sparse_matrix().requires_grad


def test_kept_in_inference_mode_it_serves_a_backward_pass():
    module = make_module()
    with torch.inference_mode():
        module.sparse_matrix()
    assert module._kept is not None
    x = torch.randn(3, K, requires_grad=True)
    nn.functional.linear(x, module.sparse_matrix()).square().sum().backward()
    assert x.grad is not None


def test_values_made_in_inference_mode_work():
    with torch.inference_mode():
        module = make_module()
        assert torch.equal(module.sparse_matrix(), slow(module))


def test_compiled_it_follows_changes():
    module = make_module()
    compiled = torch.compile(module.sparse_matrix, backend="eager", fullgraph=True)
    assert torch.equal(compiled(), slow(module))
    changed_in_place(module)
    assert torch.equal(compiled(), slow(module))


def test_rows_of_the_scatter_keep_their_order():
    mask = torch.tensor([[False, True, True], [True, False, True]])
    dense = scatter_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), mask)
    assert dense.tolist() == [[0, 1, 2], [3, 0, 4]]
