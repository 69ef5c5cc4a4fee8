"""A wavelet adapter beside low-rank weights: its transform and gradient, no change at the start, and what it stores."""

import json

import pytest
import torch
from healing import heal, settings
from healing import zoo as zoo  # a fixture
from launching import make_run, small_data, verify_here
from test_wara import transform
from torch import nn
from transformers import AutoModelForCausalLM

from rankfront.methods import InputError
from rankfront.methods.checkpoint import RankfrontConfig
from rankfront.methods.layers_adapted import AdaptedLinear
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.search.__main__ import run as command_line
from rankfront.search.heal.adapter import adapt
from rankfront.search.heal.trainable import factored_modules, stored


def adapted(m=12, n=10, k=2, moments=1, zero=False):
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    up = drawn((m + 1) // 2, k)
    return AdaptedLinear(drawn(m, 4), drawn(4, n), up * (not zero), drawn(k, (n + 1) // 2), drawn(m), moments)


@pytest.mark.parametrize("moments", [1, 2])
@pytest.mark.parametrize(("m", "n"), [(12, 10), (11, 10), (12, 9), (7, 13)])
def test_it_adds_a_low_rank_product_in_both_bands(m, n, moments):
    module = adapted(m, n, moments=moments)
    both = torch.kron(torch.eye(2, dtype=torch.float64), module.up @ module.down)
    slow = (transform(m + m % 2, moments).T @ both @ transform(n + n % 2, moments))[:m, :n]
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(module.adapted(x), x @ slow.T)
    assert torch.allclose(module(x), x @ (module.left @ module.right + slow).T + module.bias)
    assert torch.allclose(module.matrix(), (module.left @ module.right + slow).float(), atol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(12, 10), (11, 9)])
def test_its_gradient_is_its_adjoint(m, n):
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩, padding cropped, and finite differences of every factor."""
    module = adapted(m, n)
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.randn(3, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    product = (module.adapted(x) * y).sum()
    (back,) = torch.autograd.grad(product, x)
    assert torch.allclose((x * back).sum(), product)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda *_: module(x), tuple(module.parameters()))


def with_config(student):
    """As a loaded export has it: what runs where, by kind."""
    modules = {
        path: {"kind": "low-rank", "rank": module.rank}
        for path, module in factored_modules(student).items()
        if isinstance(module, LowRankLinear)
    }
    student.config.quantization_config = RankfrontConfig(modules=modules)
    return student


def test_an_adapter_changes_nothing_at_first_and_adds_exactly_its_values(zoo):
    student = with_config(zoo.student("svd-llm"))
    student.config.quantization_config.tied = {"lm_head.left": "model.embed_tokens.left"}
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = student(input_ids=ids).logits
    shapes, count = stored(student)[1], stored(student)[0]
    sites = {path: m for path, m in factored_modules(student).items() if type(m) is LowRankLinear and path != "lm_head"}
    added = adapt(student, 3, seed=0)
    assert added == sum(3 * ((m.out_features + 1) // 2 + (m.in_features + 1) // 2) for m in sites.values())
    assert stored(student)[0] == count + added
    assert {name: shape for name, shape in stored(student)[1].items() if name in shapes} == shapes
    assert {path for path, m in factored_modules(student).items() if isinstance(m, AdaptedLinear)} == sites.keys()
    with torch.no_grad():
        assert torch.equal(student(input_ids=ids).logits, before)
    assert not isinstance(adapted(), LowRankLinear)  # what slices or truncates low-rank weights leaves it alone


def test_adapters_train_with_the_factors(zoo, tmp_path):
    student = with_config(zoo.student("svd-llm"))
    adapt(student, 3, seed=0)
    before = stored(student)
    results = heal(zoo, student, tmp_path / "work", settings(6_000, adapter=3))
    assert results[-1].after < results[0].before
    assert stored(student) == before
    assert all(m.up.any() for m in factored_modules(student).values() if isinstance(m, AdaptedLinear))


def test_an_adapter_beside_nothing_or_with_another_method_is_refused(zoo):
    with pytest.raises(InputError, match="the plan has none: leave --adapter out"):
        adapt(with_config(zoo.student("oats")), 3, seed=0)
    with pytest.raises(InputError, match="adapters train beside an export's own factors"):
        settings(adapter=2, method="scales")


def test_a_table_takes_no_adapter():
    with pytest.raises(ValueError, match="embedding"):
        AdaptedLinear.build(nn.Embedding(4, 4), {}, None, {"moments": 1})


def test_a_folder_with_adapters_loads_and_is_larger_by_them(model_folder, text_file, tmp_path, monkeypatch, capsys):
    verify_here(monkeypatch)
    data = small_data(model_folder, text_file, trials=2, anchors=[0.6])
    study = make_run(data, tmp_path / "run")
    study.export(tmp_path / "small", next(row for row in study.rows() if row.plan.choices))
    asked = ["--text", str(text_file), "--tokens", "2000", "--length", "32", "--batch", "128", "--rate", "0.003"]
    asked += ["--model", str(model_folder)]
    out = tmp_path / "healed"
    assert command_line(["heal", str(tmp_path / "small"), *asked, "--adapter", "2", "--out", str(out)]) == 0
    small, large = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "small", out))
    beside = [m for m in factored_modules(large).values() if isinstance(m, AdaptedLinear)]
    added = sum(m.up.numel() + m.down.numel() for m in beside)
    assert added > 0
    assert f"add {added:,} values" in " ".join(capsys.readouterr().err.split())
    assert large.num_parameters() == small.num_parameters() + added
    assert json.loads((out / "healing.json").read_text())["settings"]["adapter"] == 2
    assert "`parameters` above leaves these out" in (out / "README.md").read_text()
