"""Decoding with a cache says what whole forward passes say, for every architecture; attention equals torch's own."""

import common
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rankfront.search.inputs.decoding import attend, cache_bytes, decoder

LENGTH = 12


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("heads", [1, 3, 6])
def test_attention_of_one_query_equals_torchs(kind, heads):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 4)
    mask = {"none": None, "boolean": torch.rand(2, 1, 1, 5) < 0.7, "additive": torch.randn(1, 6, 1, 5)}[kind]
    if kind == "boolean":
        mask[..., 0] = True
    for scale in (None, 0.3):
        expected = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
        torch.testing.assert_close(attend(query, key, value, mask, scale), expected)


@torch.inference_mode()
@pytest.mark.parametrize("name", [row.name for row in common.ARCHITECTURES])
def test_logits_equal_those_of_a_pass_without_a_cache(name):
    """Per token the same logits, and afterwards the model's weights are what they were."""
    model = common.architecture(name).build()
    weights = {key: each.clone() for key, each in model.state_dict().items()}
    ids = torch.randint(0, common.VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, use_cache=False).logits
    with decoder(model, LENGTH) as decode:
        found = torch.stack([decode(ids[:, place : place + 1]) for place in range(LENGTH)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(each, weights[key]) for key, each in model.state_dict().items())


@torch.inference_mode()
def test_the_size_of_the_cache_is_known_before_it_is_made():
    model = common.architecture("llama").build()
    cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    assert cache_bytes(model) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
