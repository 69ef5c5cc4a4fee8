"""Healing: its laws in closed form or against slow code, interrupted and gone on with, and what users may get wrong."""

import math

import common
import pytest
import torch
from healing import LENGTH, heal, settings, stopped_and_gone_on_with, windows
from healing import zoo as zoo  # a fixture
from torch import nn

from rankfront.methods import InputError
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.search.heal import healing, keeper, logits
from rankfront.search.heal.fit import Best, Fit, NotFinite, schedule
from rankfront.search.heal.healing import split_held_out
from rankfront.search.heal.keeper import Keeper
from rankfront.search.heal.logits import HeldOut
from rankfront.search.heal.loss import Head, descend, kl, summed
from rankfront.search.heal.precision import Precision
from rankfront.search.heal.settings import HealSettings, parse_tokens
from rankfront.search.heal.teacher import Beside, Cached
from rankfront.search.heal.trainable import NothingToHeal, Parameter, copied, trainable, training

PLAIN = Precision("cpu", "float32")


def divergence_of(student, teacher, held=None):
    held = windows(6, seed=9) if held is None else held
    return HeldOut(Beside(teacher, PLAIN), held, PLAIN).mean(Head(student))


# -- the loss


@pytest.mark.parametrize("architecture", [row.name for row in common.ARCHITECTURES])
def test_logits_from_the_last_hidden_states_are_the_models_own(architecture):
    model = common.architecture(architecture).build()
    assert Head(model).whole(windows(2))


def test_run_by_run_the_loss_and_its_gradient_are_those_of_all_logits_at_once(zoo, monkeypatch):
    student, teacher = zoo.student("svd-llm"), zoo.teacher()
    ids = windows(3)
    own = trainable(student)
    with training(own):
        tensors = [parameter.tensor for parameter in own]
        ours, theirs = student(input_ids=ids).logits[:, :-1].flatten(0, 1), teacher(input_ids=ids).logits[:, :-1]
        whole = kl(ours, theirs.flatten(0, 1))
        slow = torch.autograd.grad(whole, tensors, allow_unused=True)
        monkeypatch.setitem(logits_at_once(), "cpu", 5 * common.VOCABULARY)
        head = Head(student)
        target = Beside(teacher, PLAIN).target(torch.zeros(0), ids)
        part = descend(head, head.hidden(ids), ids, "kl", target, 1.0)
        fast = [tensor.grad for tensor in tensors]
    assert math.isclose(part, float(whole.detach()), rel_tol=1e-5)
    for one, other in zip(fast, slow, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def logits_at_once():
    from rankfront.search.heal import loss

    return loss.AT_ONCE


def test_the_dense_model_has_no_divergence_from_itself_and_no_gradient(zoo):
    teacher = zoo.teacher()
    assert divergence_of(zoo.teacher(), teacher) == pytest.approx(0, abs=1e-6)
    hidden = Head(teacher).hidden(windows(1)).detach().requires_grad_(True)
    target = Beside(zoo.teacher(), PLAIN).target(torch.zeros(0), windows(1))
    descend(Head(teacher), hidden, windows(1), "kl", target, 1.0)
    assert float(hidden.grad.abs().max()) < 1e-5


def test_a_cached_teacher_of_the_whole_vocabulary_gives_the_divergence_and_fewer_tokens_less(
    zoo, tmp_path, monkeypatch
):
    from rankfront.search.heal import teacher as module

    student, teacher, ids = zoo.student("svd-llm"), zoo.teacher(), windows(4)
    exact = divergence_of(student, teacher, ids)
    found = {}
    for top in (common.VOCABULARY, 8):
        monkeypatch.setattr(module, "TOP", top)
        (tmp_path / str(top)).mkdir()
        cached = Cached(teacher, ids, tmp_path / str(top), PLAIN, lambda done, total: None)
        head = Head(student)
        with torch.no_grad():
            total = sum(
                summed(head, head.hidden(ids[n : n + 1]), ids[n : n + 1], "kl", cached.target(torch.tensor([n]), ids))
                for n in range(4)
            )
        found[top] = total / (4 * (LENGTH - 1))
    assert found[common.VOCABULARY] == pytest.approx(exact, rel=2e-3)  # logarithms are kept in 16 bits
    assert found[8] < exact


def test_the_mean_loss_a_token_does_not_depend_on_how_windows_are_batched(zoo, tmp_path):
    """One step of four windows at once, and one at a time: the same gradient step."""
    values = []
    for at_once in (4 * LENGTH, LENGTH):
        student = zoo.student("svd-llm")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(logits.AT_ONCE, "cpu", at_once)
            heal(zoo, student, tmp_path / str(at_once), settings(LENGTH * 4, stages=("logits",)))
        values.append(copied(trainable(student)))
    for name, value in values[0].items():
        assert torch.allclose(value, values[1][name], atol=1e-5), name


# -- the optimum


def low_rank(m, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankLinear(torch.randn(m, r, generator=generator) / r, torch.randn(r, n, generator=generator))


def fit(module, inputs, targets, steps=1500, rate=2e-2):
    """Mean squared error of the module's outputs, after training."""
    own = [Parameter(name, tensor, "factor") for name, tensor in module.named_parameters()]
    with training(own):
        run = Fit(own, rate, steps)
        for _ in range(steps):
            ((module(inputs) - targets) ** 2).mean().backward()
            run.step()
    with torch.no_grad():
        return float(((module(inputs) - targets) ** 2).mean())


def test_training_one_layer_finds_the_whitened_svd():
    """min ‖(W − LR) X‖² over rank 4 has the singular values of W C^{1/2} beyond the fourth as its error."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 10, generator=generator) @ torch.randn(10, 10, generator=generator)
    weight = torch.randn(12, 10, generator=generator)
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(x.T @ x / len(x)))
    best = float(values[4:].square().sum()) / 12
    assert fit(low_rank(12, 10, 4), x, x @ weight.T) == pytest.approx(best, rel=0.01)


def test_a_window_with_a_nonlinearity_beats_its_matrices_one_by_one():
    """Two layers and a ReLU: trained together at their output, below the best of each by itself."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 8, generator=generator)
    first, second = torch.randn(16, 8, generator=generator), torch.randn(8, 16, generator=generator)
    dense = torch.relu(x @ first.T)
    one, two = low_rank(16, 8, 4, seed=1), low_rank(8, 16, 4, seed=2)
    fit(one, x, x @ first.T)
    fit(two, dense, dense @ second.T)
    window = nn.Sequential(one, nn.ReLU(), two)
    with torch.no_grad():
        apart = float(((window(x) - dense @ second.T) ** 2).mean())
    assert fit(window, x, dense @ second.T) < 0.9 * apart


def test_inputs_of_the_healed_model_beat_those_of_the_dense_one():
    """Four residual layers: each trained on what the compressed ones before it make, or on dense inputs."""
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(12, 12, generator=generator) / 3 for _ in range(4)]
    x = torch.randn(400, 12, generator=generator)
    states = [x]
    for weight in weights:
        states.append(states[-1] + torch.tanh(states[-1] @ weight.T))

    def error(drifting):
        here = x
        for number in range(4):
            module = nn.Sequential(low_rank(12, 12, 3, seed=number), nn.Tanh())
            inputs = here if drifting else states[number]
            fit(module, inputs, states[number + 1] - inputs, steps=400)
            with torch.no_grad():
                here = here + module(here)
        return float(((here - states[-1]) ** 2).mean())

    assert error(True) < error(False)


def test_the_rate_rises_and_falls():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


# -- whole healings


@pytest.mark.parametrize(
    "more",
    [
        {"stages": ("blocks",)},
        {"stages": ("blocks",), "window": "half"},
        {"stages": ("logits",)},
        {"stages": ("logits",), "loss": "ce"},
        {"stages": ("logits",), "loss": "both"},
        {"stages": ("logits",), "teacher": "cached"},
        {"method": "scales"},
        {"method": "lora"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["svd-llm", "nystrom"])
def test_every_way_of_healing_never_ends_worse_and_changes_no_shape(zoo, method, more, tmp_path):
    student, teacher = zoo.student(method), zoo.teacher()
    names = student.state_dict().keys()
    held = split_held_out(windows(), 0.05)[1]
    before = divergence_of(student, teacher, held)
    results = heal(zoo, student, tmp_path / "work", settings(**more))
    assert results[0].before == pytest.approx(before, rel=1e-4)
    assert divergence_of(student, teacher, held) == pytest.approx(results[-1].after, rel=1e-4)
    assert results[-1].after <= before
    assert student.state_dict().keys() == names


def test_more_tokens_close_more(zoo, tmp_path):
    left = []
    for tokens in (2_000, 12_000):
        left.append(heal(zoo, zoo.student("svd-llm"), tmp_path / str(tokens), settings(tokens))[-1].after)
    assert left[1] < left[0]


def test_halves_of_a_block_train_what_they_hold(zoo):
    """Attention first, then the MLP: cut where the residual stream enters the norm between."""
    from rankfront.search.heal.arm import Arm
    from rankfront.search.heal.blocks import BlockWise, middle

    student = zoo.student("svd-llm")
    train, held = split_held_out(windows(), 0.05)
    own = trainable(student)
    wise = BlockWise(student, zoo.teacher(), train, held, settings(window="half"), Arm, own, PLAIN)
    assert middle(wise.healed, 0) == "post_attention_layernorm"
    inside = [parameter for parameter in own if parameter.name.startswith("model.layers.0.")]
    first = {
        parameter.name for parameter in wise._half(inside, 0, "post_attention_layernorm", "post_attention_layernorm")
    }
    second = {parameter.name for parameter in wise._half(inside, 0, "post_attention_layernorm", None)}
    assert first == {name for name in {p.name for p in inside} if "self_attn" in name or "input_layernorm" in name}
    assert first | second == {parameter.name for parameter in inside}
    assert not first & second


def test_parallel_blocks_have_no_middle(tmp_path, text_file):
    from healing import Zoo

    from rankfront.search.heal.arm import Arm
    from rankfront.search.heal.blocks import BlockWise, middle

    parallel = Zoo(tmp_path, text_file, "gpt-neox")
    student = parallel.student("svd-llm")
    train, held = split_held_out(windows(), 0.05)
    wise = BlockWise(student, parallel.teacher(), train, held, settings(), Arm, trainable(student), PLAIN)
    assert middle(wise.healed, 0) is None


@pytest.mark.parametrize(
    ("method", "plan"),
    [
        ("factors", "svd-llm"),
        ("scales", "svd-llm"),
        ("lora", "svd-llm"),
        ("trp", "svd-llm"),
        ("stf", "dsformer"),
        ("hola", "shared-basis"),
    ],
)
def test_stopped_at_any_step_and_gone_on_with_it_ends_where_it_would_have(zoo, method, plan, tmp_path, monkeypatch):
    """A checkpoint after every step, and Ctrl-C after the second block and in the middle of the last stage."""
    monkeypatch.setattr(healing, "KEEP_EVERY", 0.0)
    asked = settings(LENGTH * 4 * 16, method=method)
    whole = zoo.student(plan)
    expected = heal(zoo, whole, tmp_path / "whole", asked)
    for stop in (1, 2, 5, 9):
        folder = tmp_path / f"stopped-{stop}"
        again, results, seen, after = stopped_and_gone_on_with(zoo, plan, asked, folder, stop)
        assert min(after) >= seen[-1] if stop != len(seen) else min(after) > 0
        assert [result.after for result in results] == pytest.approx([result.after for result in expected], rel=1e-5)
        for (name, one), other in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
            assert torch.allclose(one, other, atol=1e-6), name


# -- faults


@pytest.mark.parametrize("method", ["stf", "hola", "trp", "lod", "fjord"])
def test_a_method_of_which_the_plan_has_nothing_is_refused(zoo, method, tmp_path):
    with pytest.raises(NothingToHeal, match="the plan has none"):
        heal(zoo, zoo.student("nystrom"), tmp_path, settings(method=method, stages=("logits",)))


def test_a_loss_that_is_no_number_ends_the_stage_at_its_best_state(zoo, tmp_path):
    student = zoo.student("svd-llm")
    start = divergence_of(student, zoo.teacher(), split_held_out(windows(), 0.05)[1])
    results = heal(zoo, student, tmp_path / "work", settings(stages=("logits",), rate=1e30))
    assert "ended at its best state" in results[0].note
    assert results[0].after == pytest.approx(start, rel=1e-4)


TOO_HIGH = {"stages": ("logits",), "tokens": LENGTH * 4 * 24, "rate": 10.0}


def test_a_rate_that_is_too_high_becomes_lower_and_training_gains(zoo, tmp_path):
    (result,) = heal(zoo, zoo.student("svd-llm"), tmp_path / "work", settings(**TOO_HIGH))
    assert result.note is None
    assert result.after < 0.9 * result.before


def test_a_rate_that_became_lower_is_that_of_a_training_gone_on_with(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(healing, "KEEP_EVERY", 0.0)
    asked = settings(**TOO_HIGH)
    whole = zoo.student("svd-llm")
    heal(zoo, whole, tmp_path / "whole", asked)
    again, *_ = stopped_and_gone_on_with(zoo, "svd-llm", asked, tmp_path / "stopped", 12)
    for (name, one), other in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), name


def test_a_gradient_that_is_no_number_changes_nothing():
    module = low_rank(6, 5, 2)
    own = [Parameter(name, tensor, "factor") for name, tensor in module.named_parameters()]
    with training(own):
        run = Fit(own, 1e-2, 10)
        (module(torch.full((1, 5), float("nan")))).sum().backward()
        before = copied(own)
        with pytest.raises(NotFinite, match="step 1 of 10"):
            run.step()
    assert all(torch.equal(value, before[name]) for name, value in copied(own).items())


def test_the_best_state_is_kept_the_start_included():
    module = low_rank(6, 5, 2)
    own = [Parameter(name, tensor, "factor") for name, tensor in module.named_parameters()]
    best = Best(own, 1.0)
    start = copied(own)
    with torch.no_grad():
        module.left.mul_(2)
    best.offer(2.0)
    best.offer(float("nan"))
    best.take()
    assert all(torch.equal(value, start[name]) for name, value in copied(own).items())


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    Keeper(tmp_path / "work", {"plan": "a", "settings": {"tokens": 1}})
    Keeper(tmp_path / "work", {"plan": "a", "settings": {"tokens": 1}})
    with pytest.raises(InputError, match="holds checkpoints of another healing: its plan is 'a' and now 'b'"):
        Keeper(tmp_path / "work", {"plan": "b", "settings": {"tokens": 1}})


def test_a_disk_that_fills_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    kept = Keeper(tmp_path / "work", {"plan": "a"})
    kept.save({"step": 1}, {"x": torch.ones(3)})

    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "save_file", full)
        with pytest.raises(OSError, match="No space"):
            kept.save({"step": 2}, {"x": torch.zeros(3)})
    assert len(list((tmp_path / "work").iterdir())) == 3
    found = Keeper(tmp_path / "work", {"plan": "a"}).load()
    assert found.where == {"step": 1}
    assert torch.equal(found.tensors["x"], torch.ones(3))
    kept.save({"step": 3}, {"x": torch.zeros(3)})
    assert kept.load().where == {"step": 3}
    assert len(list((tmp_path / "work").glob("state-*.safetensors"))) == 1


@pytest.mark.parametrize("spoilt", ["state.json", "state-*.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, spoilt):
    kept = Keeper(tmp_path / "work", {"plan": "a"})
    kept.save({"step": 1}, {"x": torch.ones(3)})
    path = next((tmp_path / "work").glob(spoilt))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"corrupt .*: remove the folder to heal from the start"):
        kept.load()


def test_held_out_windows_are_trained_on_by_nothing():
    everything = windows(40)
    train, held = split_held_out(everything, 0.1)
    assert len(train) + len(held) == 40
    assert len(held) == 4
    assert not {tuple(window.tolist()) for window in train} & {tuple(window.tolist()) for window in held}
    with pytest.raises(InputError, match="needs at least 2 windows"):
        split_held_out(windows(1), 0.1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stages": ("logits", "blocks")}, "name blocks, logits, or blocks and then logits"),
        ({"stages": ("refit",)}, "heal stage"),
        ({"loss": "mse"}, "heal loss"),
        ({"window": "layer"}, "heal window"),
        ({"rate": -1.0}, "it must be above 0"),
        ({"dtype": "float16"}, "heal dtype"),
    ],
)
def test_settings_that_mean_nothing_are_named(wrong, said):
    with pytest.raises(InputError, match=said):
        HealSettings(1000, **wrong)


def test_an_unknown_method_is_named(zoo, tmp_path):
    with pytest.raises(InputError, match="heal method"):
        heal(zoo, zoo.student("svd-llm"), tmp_path / "work", settings(method="magic"))


def test_tokens_are_read_with_their_unit():
    assert [parse_tokens(text) for text in ("300k", "1M", "1.5M", "1_000", 7)] == [300_000, 10**6, 1_500_000, 1000, 7]
    for wrong in ("", "many", "-3", "0", "1e6M"):
        with pytest.raises(InputError, match="is no number of tokens"):
            parse_tokens(wrong)
