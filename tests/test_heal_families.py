"""Healing, family by family: what trains, in which gauge, and what must stay as it is."""

import common
import pytest
import torch
from healing import FAMILIES, Zoo, heal, settings, windows
from healing import zoo as zoo  # a fixture
from rows import JOINT_METHODS
from torch import nn

from rankfront.methods import InputError, _sparse, layers_blocks, layers_sparse_sum
from rankfront.search.heal.arms import Coefficients, StraightThrough
from rankfront.search.heal.trainable import balance, factored_modules, normalised, stored, trainable, training


def logits(model):
    with torch.no_grad():
        return model(input_ids=windows(2), use_cache=False).logits


@pytest.mark.parametrize("method", FAMILIES)
def test_the_model_before_the_first_step_is_the_one_that_was_stored(zoo, method):
    student = zoo.student(method)
    before = logits(student)
    balance(student)
    assert torch.allclose(logits(student), before, atol=1e-5)


@pytest.mark.parametrize("method", FAMILIES)
def test_factors_train_and_nothing_else_of_a_matrix(zoo, method):
    student = zoo.student(method)
    treated = factored_modules(student)
    found = trainable(student)
    names = {name for name, _ in student.named_parameters()}
    assert {parameter.name for parameter in found} <= names
    for parameter in found:
        path = parameter.name.rpartition(".")[0]
        assert (path in treated) or parameter.tensor.ndim == 1
    assert any(parameter.kind != "small" for parameter in found)
    table = student.get_input_embeddings().weight
    assert all(parameter.tensor is not table for parameter in found)


@pytest.mark.parametrize("method", [name for name in FAMILIES if name not in JOINT_METHODS])
def test_a_gradient_reaches_every_factor_and_is_that_of_the_rebuilt_matrix(zoo, method):
    """Through the module's own products, and through Ŵ rebuilt from the same factors: the same gradient."""
    for path, module in factored_modules(zoo.student(method)).items():
        own = [parameter for parameter in trainable(module) if parameter.kind in ("factor", "sparse")]
        with training(own):
            for parameter in own:
                parameter.tensor.data = parameter.tensor.data.double()
            x = torch.randn(3, module.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            g = torch.randn(3, module.out_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
            tensors = [parameter.tensor for parameter in own]
            ours = torch.autograd.grad((module(x) * g).sum(), tensors)
            slow = torch.autograd.grad((nn.functional.linear(x, module.matrix().double()) * g).sum(), tensors)
            for one, other, parameter in zip(ours, slow, own, strict=True):
                assert torch.allclose(one, other, rtol=1e-4, atol=1e-5), (path, parameter.name)


@pytest.mark.parametrize("method", FAMILIES)
def test_healing_closes_divergence_and_leaves_shapes_supports_and_the_rest_alone(zoo, method, tmp_path):
    student = zoo.student(method)
    before, moves = stored(student), {parameter.name for parameter in trainable(student)}
    fixed = {name: tensor.clone() for name, tensor in student.state_dict().items() if name not in moves}
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    results = heal(zoo, student, tmp_path / "work", settings())
    assert [result.stage for result in results] == ["blocks", "logits"]
    assert all(result.after <= result.before for result in results)
    assert results[-1].after < results[0].before
    assert stored(student) == before
    shared = {tensor.data_ptr() for name, tensor in student.state_dict().items() if name in moves}
    for name, value in fixed.items():
        now = student.state_dict()[name]
        assert now.data_ptr() in shared or torch.equal(now, value), name
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("method", ["sltrain", "oats", "cospadi", "dsformer-nm"])
def test_where_values_stand_is_worked_out_once_and_not_kept(zoo, method, tmp_path, monkeypatch):
    """However many steps there are, for each module a few times: it takes longer than a step."""
    student, made = zoo.student(method), []
    for module, name in ((layers_sparse_sum, "seeded_support"), (layers_sparse_sum, "columns_of")):
        monkeypatch.setattr(module, name, counted(getattr(module, name), made))
    monkeypatch.setattr(layers_blocks, "columns_of", counted(layers_blocks.columns_of, made))
    monkeypatch.setattr(_sparse, "unpack_mask", counted(_sparse.unpack_mask, made))
    heal(zoo, student, tmp_path, settings())
    treated = factored_modules(student).values()
    assert 0 < len(made) <= 4 * len(treated)
    assert all(module._places is None for module in treated)


def counted(function, made):
    def call(*arguments):
        made.append(arguments)
        return function(*arguments)

    return call


def test_a_factored_table_trains_though_no_head_shares_it(tmp_path, text_file):
    untied = Zoo(tmp_path / "model", text_file, "llama", include=["*embed_tokens"], methods=["svd"])
    student = untied.student("svd")
    table = student.get_input_embeddings()
    before = logits(student)
    balance(student)
    assert torch.allclose(logits(student), before, atol=1e-5)
    factors = [tensor.clone() for tensor in (table.left, table.right)]
    results = heal(untied, student, tmp_path / "work", settings(stages=("logits",)))
    assert results[-1].after < results[0].before
    assert not any(torch.equal(*pair) for pair in zip(factors, (table.left, table.right), strict=True))


def test_balanced_factors_have_components_of_equal_norms(zoo):
    student = zoo.student("svd-llm")
    for module in factored_modules(student).values():
        with torch.no_grad():
            module.left.mul_(10)
    balance(student)
    for module in factored_modules(student).values():
        assert torch.allclose(module.left.norm(dim=0), module.right.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("method", ["cospadi", "dsformer", "dsformer-nm"])
def test_atoms_keep_their_norm_while_they_train(zoo, method, tmp_path):
    student = zoo.student(method)
    heal(zoo, student, tmp_path / "work", settings())
    found = normalised(student)
    assert found
    for module in found:
        before = module.matrix()
        module.normalise()
        assert torch.allclose(module.matrix(), before, atol=1e-5)


def test_factors_that_blocks_share_keep_still_while_one_block_trains(zoo, tmp_path):
    student = zoo.student("shared-basis")
    counts = {}
    for path, module in factored_modules(student).items():
        counts.setdefault(id(module.right), []).append(path)
    shared = [paths for paths in counts.values() if len({path.split(".")[2] for path in paths}) > 1]
    assert shared
    before = {paths[0]: student.get_submodule(paths[0]).right.clone() for paths in shared}
    heal(zoo, student, tmp_path / "blocks", settings(stages=("blocks",)))
    assert all(torch.equal(student.get_submodule(path).right, value) for path, value in before.items())
    heal(zoo, student, tmp_path / "logits", settings(stages=("logits",)))
    assert not any(torch.equal(student.get_submodule(path).right, value) for path, value in before.items())
    for paths in shared:
        assert len({id(student.get_submodule(path).right) for path in paths}) == 1


def test_a_shared_basis_gets_the_sum_of_its_members_gradients(zoo):
    student = zoo.student("shared-basis")
    modules = factored_modules(student)
    first = next(iter(modules.values()))
    members = [module for module in modules.values() if module.right is first.right]
    assert len(members) > 1
    x = torch.randn(5, first.in_features, generator=torch.Generator().manual_seed(0))
    first.right.requires_grad_(True)
    (together,) = torch.autograd.grad(sum((module(x) ** 2).sum() for module in members), [first.right])
    apart = [torch.autograd.grad((module(x) ** 2).sum(), [first.right])[0] for module in members]
    first.right.requires_grad_(False)
    assert torch.allclose(together, sum(apart), rtol=1e-4, atol=1e-4)


def test_a_plan_with_nothing_to_train_is_refused():
    model = common.architecture("llama").build()
    with pytest.raises(InputError, match="nothing to heal"):
        trainable(model)


# -- what trains by name


STF = ("cospadi", "dsformer", "dsformer-nm")


def straight_through(zoo, method):
    student = zoo.student(method)
    balance(student)
    return student, StraightThrough(student, zoo.teacher(), trainable(student))


@pytest.mark.parametrize("method", STF)
def test_the_straight_through_model_starts_as_the_stored_one_and_is_sparse_at_every_step(zoo, method):
    student = zoo.student(method)
    before = logits(student)
    balance(student)
    counts = {path: module.values.numel() for path, module in factored_modules(student).items()}
    arm = StraightThrough(student, zoo.teacher(), trainable(student))
    assert torch.allclose(logits(student), before, atol=1e-4)
    for module, latent in arm.latents:
        with torch.no_grad():
            latent.add_(torch.randn(latent.shape, generator=torch.Generator().manual_seed(0)))
        assert int(module.largest(latent).sum()) == module.values.numel()
    now = logits(student)
    arm.finish()
    assert torch.allclose(logits(student), now, atol=1e-4)
    assert {path: module.values.numel() for path, module in factored_modules(student).items()} == counts


@pytest.mark.parametrize("method", STF)
def test_gradients_reach_coefficients_that_are_not_used_until_the_support_freezes(zoo, method):
    """∂Z̃ is ∂Z at every place; of the frozen support, at its places alone."""
    _, arm = straight_through(zoo, method)
    module, latent = arm.latents[0]
    x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0))
    g = torch.randn(4, module.out_features, generator=torch.Generator().manual_seed(1))
    (passed,) = torch.autograd.grad((module(x) * g).sum(), latent)
    codes = (latent * module.largest(latent)).detach().requires_grad_(True)
    (slow,) = torch.autograd.grad((module.coded(codes, x) * g).sum(), codes)
    assert torch.allclose(passed, slow, atol=1e-5)
    unused = ~module.largest(latent)
    assert float(passed[unused].abs().max()) > 0
    arm.before(2, 3)
    before = module.largest(latent)
    assert not latent[~before].any()
    with torch.no_grad():
        latent.add_(0.1)
    arm.after(2, 3)
    assert torch.equal(latent != 0, before)


@pytest.mark.parametrize("method", STF)
def test_supports_move_under_straight_through_training_and_under_no_other(zoo, method, tmp_path):
    for name in ("stf", "scales"):
        student = zoo.student(method)
        supports = [module.support.clone() for module in factored_modules(student).values()]
        before = stored(student)
        results = heal(zoo, student, tmp_path / name, settings(method=name, tokens=5_000))
        moved = [
            not torch.equal(module.support, support)
            for module, support in zip(factored_modules(student).values(), supports, strict=True)
        ]
        assert any(moved) == (name == "stf")
        assert stored(student) == before
        assert results[-1].after < results[0].before


@pytest.mark.parametrize(
    ("arm", "method"),
    [
        ("factors", "svd-llm"), ("scales", "sltrain"), ("lora", "svd-llm"), ("hola", "hola"),
        *(("stf", method) for method in STF),
    ],
)  # fmt: skip
def test_what_is_stored_in_half_precision_heals_too(zoo, arm, method, tmp_path):
    """As real models are: masters are fp32, and what is stored is not."""
    student = zoo.student(method).bfloat16()
    dtypes = {name: tensor.dtype for name, tensor in student.named_parameters()}
    asked = settings(stages=("logits",), method=arm, dtype="bfloat16")
    (result,) = heal(zoo, student, tmp_path, asked)
    assert result.after < result.before
    assert {name: tensor.dtype for name, tensor in student.named_parameters()} == dtypes


def test_coefficients_train_on_a_frozen_basis_first_and_then_both(zoo):
    student = zoo.student("shared-basis")
    parameters = trainable(student)
    arm = Coefficients(student, zoo.teacher(), parameters)
    bases = [parameter.tensor for parameter in parameters if parameter.name.endswith("right")]
    with training(arm.parameters):
        arm.before(0, 10)
        assert not any(basis.requires_grad for basis in bases)
        assert all(parameter.tensor.requires_grad for parameter in parameters if parameter.name.endswith("left"))
        arm.before(5, 10)
        assert all(basis.requires_grad for basis in bases)
