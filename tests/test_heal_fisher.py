"""Errors of hidden states weighted by the Fisher information: its diagonal against slow code, and healing by it."""

import pytest
import torch
from healing import LENGTH, heal, settings, windows
from healing import zoo as zoo  # a fixture

from rankfront.methods import InputError
from rankfront.search.factors.gradient import drawn_loss
from rankfront.search.heal import fisher as module
from rankfront.search.heal.fisher import fisher
from rankfront.search.heal.loss import weighted_error
from rankfront.search.heal.memory import need_of
from rankfront.search.heal.precision import Precision
from rankfront.search.heal.trainable import stored, trainable
from rankfront.search.measure.streams import Call, calls_of, first_hidden

PLAIN = Precision("cpu", "float32")
CUT = "post_attention_layernorm"


def test_weights_of_ones_give_the_plain_squared_error():
    hidden, target = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    slow = sum(float((hidden[b, t] - target[b, t]).square().sum()) for b in range(3) for t in range(1, 5)) / 12
    assert float(weighted_error(hidden, target, torch.ones(4))) == pytest.approx(slow, rel=1e-5)


def test_the_diagonal_is_that_of_gradients_token_by_token(zoo, monkeypatch):
    """Every block run by itself from hidden states that are leaves, and autograd's gradient of what follows."""
    monkeypatch.setattr(module, "CLIPPED", 1.0)
    model, ids = zoo.teacher(), windows(3)
    layers = list(model.model.layers)
    found = fisher(model, layers, [(0, None), (1, CUT), (1, None)], ids, PLAIN, seed=4)
    generator = torch.Generator().manual_seed(4)
    slow = {point: torch.zeros(model.config.hidden_size) for point in found}
    for window in ids.split(1):
        with torch.no_grad():
            calls: list[Call] = calls_of(model, layers, window)
            first = calls[0].run(layers[0], first_hidden(model, layers[0], window))
        first.requires_grad_(True)
        middle = first + layers[1].self_attn(layers[1].input_layernorm(first), **calls[1].named)[0]
        last = middle + layers[1].mlp(layers[1].post_attention_layernorm(middle))
        loss = drawn_loss(model.lm_head(model.model.norm(last)).flatten(0, 1), generator)
        gradients = torch.autograd.grad(loss, [first, middle, last])
        for point, gradient in zip([(0, None), (1, CUT), (1, None)], gradients, strict=True):
            slow[point] += gradient[0, 1:].square().sum(0)
    for point, weights in found.items():
        assert torch.allclose(weights, slow[point] / (3 * (LENGTH - 1)), rtol=1e-3, atol=1e-9), point


def test_no_channel_weighs_more_than_the_99th_percentile(zoo, monkeypatch):
    model, ids = zoo.teacher(), windows(3)
    layers = list(model.model.layers)
    clipped = fisher(model, layers, [(0, None)], ids, PLAIN, seed=4)[0, None]
    monkeypatch.setattr(module, "CLIPPED", 1.0)
    whole = fisher(model, layers, [(0, None)], ids, PLAIN, seed=4)[0, None]
    assert torch.allclose(clipped, whole.clamp_max(torch.quantile(whole, 0.99)))
    assert float(clipped.max()) < float(whole.max())
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in layers)


@pytest.mark.parametrize("window", ["block", "half"])
def test_blocks_heal_by_it_and_change_no_shape(zoo, window, tmp_path):
    student = zoo.student("svd-llm")
    before = stored(student)
    asked = settings(20_000, stages=("blocks",), error="fisher", window=window)
    results = heal(zoo, student, tmp_path / "work", asked)
    assert results[0].after < results[0].before
    assert results[0].note is None
    assert stored(student) == before


def test_its_memory_is_that_of_one_window_through_all_blocks(zoo):
    student, teacher = zoo.student("svd-llm"), zoo.teacher()

    def activations(length, error):
        asked = settings(stages=("blocks",), error=error)
        return need_of(student, teacher, trainable(student), list(student.model.layers), asked, 0, length).activations

    assert activations(1000, "relative") == activations(2000, "relative")
    assert activations(2000, "fisher") == 2 * activations(1000, "fisher") > activations(2000, "relative")


def test_another_error_is_refused():
    with pytest.raises(InputError, match="heal error"):
        settings(error="absolute")
