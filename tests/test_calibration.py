"""Calibration's fast sums against slow ones: a loop over tokens, and explicit gradients of every output."""

import common
import pytest
import torch
from tiny import tiny_model
from torch import nn

from rankfront.search.factors.calibration import BATCH_TOKENS, calibrate, shared_inputs
from rankfront.search.factors.failures import Failures
from rankfront.search.factors.held import STATISTIC_BYTES, held_by, passes_of
from rankfront.search.inputs import memory
from rankfront.search.inputs.apart import take_apart
from rankfront.search.inputs.model import _share_modules

NEEDS = frozenset({"gram", "absolute", "fisher", "gradient"})
WINDOWS, LENGTH = 3, 12


@pytest.fixture
def windows():
    return common.tokens(WINDOWS, LENGTH, seed=3)


def linear_sites(model):
    """The sites with inputs to measure: everything but an untied table."""
    return [site for site in common.single_sites(model) if site.weights[0].kind == "linear"]


def collect(model, windows, sites=None, needs=NEEDS, **more):
    found = calibrate(model, windows, sites or linear_sites(model), needs, lambda done, total: None, **more)
    return {site.name: statistics["weight"] for site, statistics in found}


def slow_statistics(model, windows, paths):
    """Path -> (x (T, n), g (T, m)), one window at a time.

    Each output y gets a zero e added to it, y + e, and g = ∂loss/∂e by autograd, so that neither the hooks nor
    the frozen weights of the fast code play a part.
    """
    inputs = {path: [] for path in paths}
    zeros, gradients = {}, {path: [] for path in paths}

    def hook(path):
        def probe(module, args, output):
            inputs[path].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())
            zeros[path] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[path]

        return probe

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        loss = sum(-torch.log_softmax(logits[t].float(), -1)[window[t + 1]] for t in range(len(window) - 1))
        found = torch.autograd.grad(loss, [zeros[path] for path in paths])
        for path, gradient in zip(paths, found, strict=True):
            gradients[path].append(gradient.reshape(-1, gradient.shape[-1]).double())
    for handle in handles:
        handle.remove()
    return {path: (torch.cat(inputs[path]), torch.cat(gradients[path])) for path in paths}


def assert_near(found, expected):
    """Within fp32 of the largest entry."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-5 * scale)


def test_sums_are_those_of_a_loop_over_tokens(model, windows):
    """C = Σ x xᵀ, Σ |x| and f_j = Σ_t ‖g_t‖² x_tj², for every linear and the head."""
    found = collect(model, windows)
    slow = slow_statistics(model, windows, list(found))
    assert list(found) == [site.name for site in linear_sites(model)]
    for path, (x, g) in slow.items():
        statistics = found[path]
        assert statistics.tokens == WINDOWS * LENGTH == len(x)
        assert_near(statistics.gram.raw, sum(torch.outer(token, token) for token in x))
        assert_near(statistics.absolute, sum(token.abs() for token in x))
        assert_near(statistics.fisher, sum((b @ b) * a.square() for a, b in zip(x, g, strict=True)))
        assert statistics.fisher.abs().max() > 0
        norms = g.norm(dim=1)  # all tokens are one batch
        middle = [b for b, norm in zip(g, norms, strict=True) if norms.quantile(0.125) <= norm <= norms.quantile(0.875)]
        assert 0.7 * len(g) < len(middle) < 0.9 * len(g)  # gradients of exactly zero at the ends of windows tie
        assert_near(statistics.gradient, sum(torch.outer(b, b) for b in middle))


def test_weights_that_read_one_input_share_one_gram(architecture, model, windows):
    """q, k and v, and gate and up, are handed the very same Gram; nothing else shares."""
    found = collect(model, windows)
    expected = {
        frozenset(f"{architecture.blocks}.{i}.{kind}" for kind in group)
        for i in range(common.BLOCKS)
        for group in architecture.shared
    }
    groups = {}
    for path, statistics in found.items():
        groups.setdefault(id(statistics.gram), set()).add(path)
    assert {frozenset(group) for group in groups.values() if len(group) > 1} == expected


def test_shared_inputs_run_once_and_leave_no_hooks(architecture, model, windows):
    paths = list(architecture.linears)
    groups = shared_inputs(model, paths, windows[:1, :4])
    assert list(groups) != []
    assert set(groups) == set(paths)
    assert all(groups[lead] == lead for lead in groups.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "needs", [{"gram"}, {"absolute"}, {"fisher"}, {"gradient"}, {"gram", "fisher"}], ids=lambda n: "+".join(sorted(n))
)
def test_only_what_is_needed_is_collected(windows, needs):
    model = common.architecture("llama").build()
    whole = collect(model, windows)
    for path, statistics in collect(model, windows, needs=frozenset(needs)).items():
        assert (statistics.gram is not None) == ("gram" in needs)
        assert (statistics.absolute is not None) == ("absolute" in needs)
        assert (statistics.fisher is not None) == ("fisher" in needs)
        assert (statistics.gradient is not None) == ("gradient" in needs)
        if "gram" in needs:
            torch.testing.assert_close(statistics.gram.raw, whole[path].gram.raw)
        if "fisher" in needs:
            torch.testing.assert_close(statistics.fisher, whole[path].fisher)


@pytest.mark.parametrize("limit", [1, 30_000, 60_000])
def test_many_passes_give_the_statistics_of_one(architecture, model, windows, limit):
    once = collect(model, windows)
    heard = []
    found = {
        site.name: statistics["weight"]
        for site, statistics in calibrate(
            model,
            windows,
            linear_sites(model),
            NEEDS,
            lambda done, total: heard.append((done, total)),
            limit=limit,
        )
    }
    assert heard[-1][1] > len(windows)  # windows in all, over more than one pass
    assert heard[-1][0] == heard[-1][1]
    assert found.keys() == once.keys()
    for path, statistics in once.items():  # the very same: a pass goes on from the states that the others left
        assert torch.equal(found[path].gram.raw, statistics.gram.raw)
        assert torch.equal(found[path].absolute, statistics.absolute)
        assert torch.equal(found[path].fisher, statistics.fisher)
        assert torch.equal(found[path].gradient, statistics.gradient)


@pytest.mark.parametrize("needs", [{"gram"}, NEEDS], ids=["gram", "gradient"])
def test_a_pass_runs_the_blocks_of_its_sites_alone(architecture, model, windows, needs):
    """With a pass for every block each runs once, and once before where gradients are needed."""
    sites = linear_sites(model)
    blocks = [f"{architecture.blocks}.{number}." for number in range(common.BLOCKS)]
    own = {block: [site.name for site in sites if site.name.startswith(block)] for block in blocks}
    counts = dict.fromkeys(blocks, 0)
    for block in blocks:

        def count(module, inputs, output, block=block):
            counts[block] += output.shape[:2] == windows.shape

        model.get_submodule(own[block][0]).register_forward_hook(count)
    collect(model, windows, sites, frozenset(needs), limit=1)
    assert counts == dict.fromkeys(blocks, 1 + ("fisher" in needs))


@pytest.mark.parametrize("name", ["zamba2", "rwkv", "mixtral"])
def test_passes_give_the_statistics_of_one_in_models_of_other_structure(name, windows):
    """Blocks that share linears, blocks that read more than hidden states, and experts."""
    model = tiny_model(name).requires_grad_(False)
    _share_modules(model)
    take_apart(model)
    found = [
        {
            site.name: statistics["weight"]
            for site, statistics in calibrate(
                model, windows % 40, linear_sites(model), NEEDS, lambda *_: None, limit, Failures()
            )
        }
        for limit in (2**32, 1)
    ]
    assert found[0].keys() == found[1].keys()
    for path, statistics in found[0].items():
        assert torch.equal(found[1][path].gram.raw, statistics.gram.raw), path
        assert torch.equal(found[1][path].fisher, statistics.fisher), path


def test_hidden_states_without_room_wait_in_files(windows, monkeypatch, tmp_path):
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    model = common.architecture("llama").build()
    once = collect(model, windows)
    monkeypatch.setattr(memory, "AMPLE", 0.0)
    for path, statistics in collect(model, windows, limit=1).items():
        assert torch.equal(statistics.gram.raw, once[path].gram.raw)
        assert torch.equal(statistics.gradient, once[path].gradient)
    assert list((tmp_path / "cache").iterdir()) == []  # which have no name


def test_a_model_whose_blocks_read_more_than_hidden_states_is_run_whole(windows):
    """The second block adds what the first one made of its inputs."""
    model = common.architecture("llama").build()
    first, second = model.model.layers[0], model.model.layers[1]
    first.mlp.register_forward_hook(lambda module, inputs, output: vars(second).__setitem__("noted", output))
    second.register_forward_hook(lambda module, inputs, output: output + module.noted.detach())
    once = collect(model, windows)
    for path, statistics in collect(model, windows, limit=1).items():
        assert torch.equal(statistics.gram.raw, once[path].gram.raw)
        assert torch.equal(statistics.gradient, once[path].gradient)


@pytest.mark.parametrize("limit", range(5_000, 30_000, 1_000))
def test_a_pass_holds_no_more_than_the_limit(limit):
    """Of what a pass holds: a Gram (n, n) for each distinct input, two vectors (n,) at most for each weight."""
    model = common.architecture("llama").build()
    sites = linear_sites(model)
    groups = shared_inputs(model, [site.name for site in sites], common.tokens(1, 4))
    for chosen in passes_of(sites, groups, NEEDS, limit, lambda site: site.name):
        grams = {groups[site.name]: site.weights[0].in_features ** 2 for site in chosen}
        vectors = sum(site.weights[0].in_features for site in chosen)
        held = STATISTIC_BYTES * (sum(grams.values()) + vectors)
        assert held <= limit or len(chosen) == 1, [site.name for site in chosen]


@pytest.mark.parametrize("needs", [{"gram"}, {"absolute", "fisher"}, NEEDS], ids=lambda n: "+".join(sorted(n)))
def test_what_is_said_to_be_held_is_what_the_sums_are(model, windows, needs):
    """Of all sites at once."""
    sites = linear_sites(model)
    found = collect(model, windows, sites, frozenset(needs)).values()
    kinds = ("absolute", "fisher", "gradient")
    kept = [tensor for own in found for kind in kinds if (tensor := getattr(own, kind)) is not None]
    kept += [own.gram.raw for own in found if own.gram is not None]
    groups = shared_inputs(model, [site.name for site in sites], windows[:1])
    own = {tensor.data_ptr(): tensor.nbytes for tensor in kept}
    assert held_by(sites, groups, frozenset(needs)).sums == sum(own.values())


def test_the_limit_cuts_runs_in_order():
    model = common.architecture("llama").build()
    sites = linear_sites(model)
    passes = passes_of(sites, {}, NEEDS, 12_000, lambda site: site.name)
    assert [site for chosen in passes for site in chosen] == sites
    assert all(passes)


def test_windows_in_batches_give_the_sums_of_each(monkeypatch):
    """More windows than one forward pass takes."""
    model = common.architecture("llama").build()
    windows = common.tokens(5, 16)
    once = collect(model, windows)
    monkeypatch.setattr("rankfront.search.factors.calibration.BATCH_TOKENS", 32)
    assert windows.numel() <= BATCH_TOKENS
    for path, statistics in collect(model, windows).items():
        torch.testing.assert_close(statistics.gram.raw, once[path].gram.raw, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics.fisher, once[path].fisher, rtol=1e-4, atol=1e-6)


def test_no_weight_gradient_is_formed_and_no_hook_is_left(model, windows):
    collect(model, windows)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tables_have_no_inputs_to_measure(windows):
    model = common.architecture("llama").build()
    assert "model.embed_tokens" not in collect(model, windows, sites=list(common.single_sites(model)))


def test_bfloat16_sums_are_kept_in_fp32(windows):
    model = common.architecture("llama").build().to(torch.bfloat16)
    for statistics in collect(model, windows).values():
        assert statistics.gram.raw.dtype == torch.float32
        assert statistics.absolute.dtype == torch.float32
        assert statistics.fisher.dtype == torch.float32


def test_an_interrupted_pass_leaves_no_hook(windows):
    model = common.architecture("llama").build()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(calibrate(model, windows, linear_sites(model), NEEDS, stop))
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Linear))
