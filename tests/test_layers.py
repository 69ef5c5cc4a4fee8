"""The modules that compressed weights run as."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from rankfront.methods import InputError
from rankfront.methods.layers import empty_replacement, replacement, set_module, weight_of
from rankfront.methods.layers_low_rank import LowRankEmbedding, LowRankLinear


def factors(m, n, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "left": torch.randn(m, rank, generator=generator),
        "right": torch.randn(rank, n, generator=generator),
    }


@pytest.mark.parametrize("scale", [None, 3.5])
def test_embedding_looks_up_rows_of_its_matrix(scale):
    layer = LowRankEmbedding(**factors(20, 6, 3), scale=scale)
    ids = torch.tensor([[0, 19, 7], [7, 7, 1]])
    expected = nn.functional.embedding(ids, layer.matrix()) * (1 if scale is None else scale)
    assert layer(ids).shape == (2, 3, 6)
    torch.testing.assert_close(layer(ids), expected)


def test_embedding_replaces_an_embedding():
    layer = replacement(nn.Embedding(20, 6), "low-rank", factors(20, 6, 3))
    assert isinstance(layer, LowRankEmbedding)
    assert (layer.num_embeddings, layer.embedding_dim, layer.rank) == (20, 6, 3)


def test_embedding_keeps_the_scale_of_the_table():
    table = GemmaTextScaledWordEmbedding(20, 6, padding_idx=0, embed_scale=2.0)
    layer = replacement(table, "low-rank", factors(20, 6, 3))
    torch.testing.assert_close(layer(torch.arange(20)), 2 * layer.matrix())


def test_linear_keeps_the_very_bias():
    dense = nn.Linear(6, 20)
    assert replacement(dense, "low-rank", factors(20, 6, 3)).bias is dense.bias


def test_parameters_stay_shared_between_modules():
    shared = {name: nn.Parameter(tensor) for name, tensor in factors(20, 6, 3).items()}
    head = replacement(nn.Linear(6, 20, bias=False), "low-rank", shared)
    table = replacement(nn.Embedding(20, 6), "low-rank", shared)
    assert head.left is table.left
    assert head.right is table.right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "dense", [nn.Linear(6, 20), nn.Embedding(20, 6), Conv1D(20, 6)], ids=lambda d: type(d).__name__
)
def test_empty_replacement_has_the_shapes_and_dtype_to_load_into(dense, dtype):
    layer = empty_replacement(dense.to(dtype), "low-rank", {"rank": 4})
    assert layer.left.shape == (20, 4)
    assert layer.right.shape == (4, 6)
    assert layer.left.dtype == layer.right.dtype == dtype


def test_conv1d_is_read_as_out_by_in():
    layer = Conv1D(20, 6)
    assert layer.weight.shape == (6, 20)
    assert weight_of(layer).shape == (20, 6)
    x = torch.randn(2, 6)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight_of(layer), layer.bias))


def test_unknown_layer_kind_names_the_nearest():
    with pytest.raises(InputError, match="low-rank"):
        replacement(nn.Linear(6, 20), "low_rank", factors(20, 6, 3))


def test_set_module_at_any_depth():
    root = nn.Sequential(nn.ModuleDict({"inner": nn.Linear(6, 6)}), nn.Linear(6, 6))
    deep, top = LowRankLinear(**factors(6, 6, 2)), LowRankLinear(**factors(6, 6, 1))
    set_module(root, "0.inner", deep)
    set_module(root, "1", top)
    assert root.get_submodule("0.inner") is deep
    assert root[1] is top
