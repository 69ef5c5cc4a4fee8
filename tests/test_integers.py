"""Weights and factors in 8 or 4 bits: rounding, packing, kernels, export, and a search that counts bytes."""

import json
import multiprocessing

import common
import pytest
import torch
from common import save_folder
from launching import make_run, measured, small_data, verify_here
from safetensors import safe_open
from test_method_laws import make_sample, make_weight
from torch import nn
from transformers import AutoModelForCausalLM

from rankfront.methods import Grid, Option, get_method
from rankfront.methods._integers import rounded
from rankfront.methods._packed_integers import restored
from rankfront.methods._sizes import group_size, padded_width
from rankfront.methods._storage import integer_storage
from rankfront.methods.integer_matrix import FEW_TOKENS, IntegerMatrix
from rankfront.methods.layers import replacement
from rankfront.search import Plan, Study
from rankfront.search.measure.runner import JobRunner
from rankfront.search.output.export import export

BITS = [8, 4]
SHAPES = [(48, 64), (40, 72), (16, 16), (33, 130), (5, 576)]
each_bits = pytest.mark.parametrize("bits", BITS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def layer_of(name, shape, option=None):
    """The layer of a method at its level, on a weight and sample of that shape."""
    method, site = get_method(name), common.linear_site(*shape)
    option = option or Option.of(name, bits=method.bits)
    prepared = method.prepare(
        site, {"weight": make_weight(shape)}, {"weight": make_sample(shape).statistics()}, [option]
    )
    factors = method.truncate(prepared, option)["weight"]
    return replacement(nn.Linear(shape[1], shape[0]), factors.kind, factors.tensors, factors.settings)


@each_bits
@each_shape
def test_every_value_is_at_most_half_a_step_off(bits, shape):
    weight = make_weight(shape)
    found = rounded(weight, bits)
    size = shape[1] if bits == 8 else group_size(shape[1])
    for start in range(0, shape[1], size):
        part = weight[:, start : start + size]
        span = part.abs().amax(1) * 2 / 254 if bits == 8 else (part.amax(1) - part.amin(1)) / 15
        off = (restored(found, bits, shape[1])[:, start : start + size] - part).abs()
        coarse = part.abs().amax(1) * 2**-8  # scales and zeros in bf16
        assert (off <= (span / 2 * 1.01 + coarse)[:, None] + 1e-7).all()


@each_shape
def test_four_bits_stand_for_what_a_loop_says(shape):
    m, n = shape
    found = rounded(make_weight(shape), 4)
    size, whole = group_size(n), restored(found, 4, n)
    for i, j in ((0, 0), (m - 1, n - 1), (m // 2, n // 3), (1, 1)):
        byte = int(found.integers[i, j // 2])
        q = byte >> 4 if j % 2 else byte & 15
        scale, zero = found.scales[j // size, i].tolist()
        assert float(whole[i, j]) == pytest.approx((q - 8) * scale + zero, rel=1e-6, abs=1e-9)


@each_bits
@each_shape
@pytest.mark.parametrize("kind", ["plain", "outlier"])
def test_carrying_errors_on_beats_the_nearest(bits, shape, kind):
    """Inputs are correlated, so what one column loses the following can make good."""
    weight, gram = make_weight(shape).double(), make_sample(shape, kind).statistics().gram

    def error(found):
        lost = weight - restored(found, bits, shape[1]).double()
        return float((gram.times_gram(lost) * lost).sum())

    assert error(rounded(weight, bits, gram)) < 0.98 * error(rounded(weight, bits))


@each_bits
@pytest.mark.parametrize("shape", [(48, 64), (40, 72)])
def test_the_second_factor_makes_good_what_rounding_the_first_lost(bits, shape):
    """Against both factors of svd-llm rounded each on its own."""
    weight, statistics = make_weight(shape), {"weight": make_sample(shape).statistics()}
    site, rank = common.linear_site(*shape), 16
    name, gram = f"svd-llm-int{bits}", statistics["weight"].gram
    option, plain = Option.of(name, rank=rank, bits=bits), Option.of("svd-llm", rank=rank)
    ours = get_method(name).prepare(site, {"weight": weight}, statistics, [option])
    base = get_method("svd-llm").prepare(site, {"weight": weight}, statistics, [plain])
    tensors = get_method("svd-llm").truncate(base, plain)["weight"].tensors
    apart = [
        restored(rounded(tensors[side], bits), bits, tensors[side].shape[1]).double() for side in ("left", "right")
    ]
    lost = weight.double() - apart[0] @ apart[1]
    exact = get_method("svd-llm").error(base, plain)
    without = float((gram.times_gram(lost) * lost).sum())
    assert get_method(name).error(ours, option) - exact < 0.95 * (without - exact)


@pytest.mark.parametrize("shape", [(48, 64), (40, 72), (33, 130)])
@pytest.mark.parametrize("kind", ["plain", "outlier"])
@pytest.mark.parametrize("rank", [2, 8, 24])
def test_a_correction_is_the_best_of_its_rank_for_either_rounding(shape, kind, rank):
    """Against the singular values of (W − Q) Xᵀ, XᵀX = C, with Q by GPTQ and to the nearest."""
    weight, sample = make_weight(shape), make_sample(shape, kind)
    statistics, option = sample.statistics(), Option.of("lqer-int4", rank=rank, bits=4)
    prepared = get_method("lqer-int4").prepare(
        common.linear_site(*shape), {"weight": weight}, {"weight": statistics}, [option]
    )
    squares = []
    for weighting in (statistics.gram, None):
        lost = weight.double() - restored(rounded(weight, 4, weighting), 4, shape[1]).double()
        squares.append(torch.linalg.svdvals(lost @ sample.x.T).square())
    best = min(squares, key=lambda each: float(each[rank:].sum()))
    noise = 1e-3 * float(best.sum())  # of the factors, on 8 bits
    assert get_method("lqer-int4").error(prepared, option) == pytest.approx(
        float(best[rank:].sum()), rel=0.01, abs=noise
    )


def test_a_correction_takes_what_of_the_bytes_the_four_bits_leave():
    site, grid = common.linear_site(256, 512), Grid((0.2, 0.28, 0.35, 0.45, 0.9), 8)
    offered = get_method("lqer-int4").options(site, grid)
    assert list(offered) == [0.35, 0.45, 0.9]
    for keep, option in offered.items():
        share = get_method("lqer-int4").storage(site, option).bytes(2) / site.storage.bytes(2)
        assert share == pytest.approx(keep, abs=0.02)


@each_bits
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low_rank", [False, True])
def test_packed_kernels_give_what_the_restored_matrix_does(bits, shape, dtype, low_rank):
    """One token, as many as the kernels are given, and one more: and a row of a batch is what it is alone."""
    option = Option.of(f"svd-llm-int{bits}", rank=5, bits=bits) if low_rank else None
    layer = layer_of(f"svd-llm-int{bits}" if low_rank else f"rtn-int{bits}", shape, option).to(dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for tokens in (1, FEW_TOKENS[bits], FEW_TOKENS[bits] + 1):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
        expected = nn.functional.linear(x.float(), layer.matrix(), layer.bias.float())
        with torch.no_grad():
            found = layer(x[None])[0]
            assert (found.float() - expected).norm() <= tolerance * expected.norm()
            assert found.dtype == dtype
            assert layer(x[:0]).shape == (0, shape[0])


def shifted(tensor):
    """A copy that begins 8 bytes after where kernels may read."""
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = 8 + -room.data_ptr() % 64
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def multiply_misaligned():
    for bits in (8, 4):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = rounded(torch.randn(48, 64), bits)
            built = IntegerMatrix(shifted(found.integers), found.scales.to(dtype), bits, 64)
            loaded = IntegerMatrix(found.integers, found.scales.to(dtype), bits, 64)
            loaded.integers = shifted(found.integers)  # as loading puts it in place
            for tokens in (1, 3, 4, 5, 16):
                x = torch.randn(tokens, 64).to(dtype)
                for matrix in (built, loaded):
                    with torch.inference_mode():
                        torch.testing.assert_close(matrix(shifted(x)), matrix(x))


def test_memory_that_is_not_aligned_is_read_all_the_same():
    """As tensors of a safetensors file are, mapped into memory. Without a copy the kernel ends the process, so this
    runs in a fork."""
    process = multiprocessing.get_context("fork").Process(target=multiply_misaligned)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_long_inputs_do_not_overflow_in_half_precision():
    """Sums of integers pass the largest fp16 long before what they stand for does."""
    weight = 0.02 * make_weight((16, 4096)) / make_weight((16, 4096)).std()
    found = rounded(weight, 8)
    matrix = IntegerMatrix(found.integers, found.scales.half(), 8, 4096)
    x = 32 * torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, y = x @ matrix.matrix().T, matrix(x.half())
    assert (x @ found.integers[:, :4096].float().T).abs().max() > torch.finfo(torch.float16).max
    assert (y.float() - expected).norm() < 0.01 * expected.norm()


@each_bits
@pytest.mark.parametrize("shape", [(48, 192), (33, 130)])
def test_what_was_just_rounded_can_be_run(bits, shape):
    """Without the store between, and again after other integers were loaded into the same module."""
    x = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(0))
    matrix = None
    for seed in (0, 1):
        found = rounded(make_weight(shape) * (1 + seed), bits)
        fresh = IntegerMatrix(found.integers, found.scales, bits, shape[1])
        matrix = matrix or fresh
        matrix.load_state_dict(fresh.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(matrix(x), x @ matrix.matrix().T, rtol=1e-3, atol=1e-3)


@each_bits
def test_gradients_reach_the_inputs_however_few_tokens(bits):
    layer = layer_of(f"rtn-int{bits}", (48, 64))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.matrix().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


@each_bits
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (40, 72), (7, 600), (3, 16)])
def test_storage_is_exact(bits, rows, columns):
    storage = integer_storage(rows, columns, bits)
    found = rounded(make_weight((rows, columns)), bits)
    assert storage.bytes(2) == found.integers.nbytes + 2 * found.scales.numel()
    assert storage.parameters == found.integers.numel() * 8 // bits + found.scales.numel()
    assert storage.buffers == found.integers.numel() * 8 // bits
    assert padded_width(columns, bits) >= columns


def test_rounding_is_the_option_at_the_kept_fraction_nearest_its_bits():
    site = common.linear_site(256, 256)
    for name, keep in (("gptq-int8", 0.5), ("gptq-int4", 0.3)):
        found = get_method(name).options(site, Grid((0.3, 0.5, 0.9)))
        assert list(found) == [keep]
        assert get_method(name).storage(site, found[keep]).bytes(2) < 1.2 * keep * site.storage.bytes(2)


@each_bits
@pytest.mark.parametrize("form", ["factored", "dense"])
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_tied_table_is_rounded_once_and_stays_tied(name, text_file, tmp_path, monkeypatch, bits, form):
    """Integers on disk are those that were measured, bit for bit, and take the bytes that were claimed."""
    verify_here(monkeypatch)
    data = small_data(save_folder(name, tmp_path / "model"), text_file)
    data["space"] = {"methods": [f"rtn-int{bits}"], "keep": [0.5], "include": ["*", "lm_head"]}
    resident = JobRunner(Study(data).setup())
    chosen = {s.name: next(iter(c.options.values())) for s, c in resident.compressed.space.choices.items()}
    assert "lm_head" in chosen
    row = measured(resident, Plan.of(chosen))
    ids = common.tokens(2, 24, seed=3)
    with torch.no_grad():
        expected = resident.compressed.model(input_ids=ids, use_cache=False).logits
        held = {name: tensor.clone() for name, tensor in resident.compressed.model.state_dict().items()}
        verified = export(resident.setup, row, tmp_path / form, form)
        if form == "factored":
            assert verified.parameters == row.attributes["parameter_count"]
            assert verified.bytes == row.attributes["bytes"]
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / form)
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
    if form == "factored":
        state = loaded.state_dict()
        integers = [name for name in held if name.endswith(".integers")]
        assert len(integers) > 7
        assert all(torch.equal(state[name], held[name]) for name in integers)
        table, head = (module.stored for module in (loaded.get_input_embeddings(), loaded.get_output_embeddings()))
        assert table.integers.data_ptr() == head.integers.data_ptr()
        assert table.scales is head.scales
        with safe_open(tmp_path / form / "model.safetensors", "pt") as file:
            names = list(file.keys())
            assert sum(file.get_tensor(name).nbytes for name in names) == row.attributes["bytes"]
            assert (
                sum("stored" in name for name in names) == 2 * len(resident.compressed.layers) - 2
            )  # of the table, once


def test_a_search_of_values_and_bytes_finds_what_is_best_in_either(model_folder, text_file, tmp_path):
    """Eight bits store no fewer values and are on the menu for their bytes; low ranks are there for their values."""
    data = small_data(model_folder, text_file, trials=20, sampler="rankfront", anchors=[0.6])
    data["space"] = {"methods": ["svd-llm", "gptq-int8", "svd-llm-int8"], "keep": [0.4, 0.6, 0.8], "rank_multiple": 2}
    data["objectives"] = {"divergence": {}, "block_parameters": {}, "bytes": {}}
    study = make_run(data, tmp_path / "ours")
    assert set(study.menu()["method"]) == {"dense", "svd-llm", "gptq-int8", "svd-llm-int8"}
    used = {option.method for row in study.front() for option in row.plan.by_site.values()}
    assert used == {"svd-llm", "gptq-int8", "svd-llm-int8"}
    data["search"] |= {"sampler": "random"}
    assert study.hypervolume() > make_run(data, tmp_path / "random").hypervolume()


def test_a_search_that_counts_bytes_finds_what_rounding_is_worth(model_folder, text_file, tmp_path):
    """Eight bits lose next to nothing: at half of the bytes the front holds them, and not a factorisation."""
    data = small_data(model_folder, text_file)
    data["space"] = {"methods": ["svd-llm", "gptq-int8", "svd-llm-int8"], "keep": [0.3, 0.5, 0.7], "rank_multiple": 2}
    data["objectives"] = {"divergence": {}, "bytes": {}}
    data["search"] |= {"trials": 10, "sampler": "rankfront", "anchors": [0.5]}
    study = Study(data, tmp_path / "run")
    study.launch()
    frame = study.menu()
    assert {"gptq-int8", "svd-llm-int8", "svd-llm"} <= set(frame["method"])
    dense = next(row for row in study.rows() if not row.plan.choices)
    rows = [row for row in study.rows() if row.state == "complete" and row.plan.choices]
    methods = {row.number: {option.method for _, option in row.plan.choices} for row in rows}
    assert any(methods.get(row.number, set()) & {"gptq-int8", "svd-llm-int8"} for row in study.front())
    whole = [row for row in rows if methods[row.number] == {"gptq-int8"}]
    assert whole
    best = min(whole, key=lambda row: row.attributes["bytes"])
    resident = JobRunner(study.setup())
    options = {site.name: own for site, own in resident.compressed.space.wanted().items()}
    largest = {
        site: max((o for o in own if o.method == "svd-llm"), key=lambda o: o["rank"]) for site, own in options.items()
    }
    uniform = measured(resident, Plan.of(largest))  # which the search has left out: the menu says that bits beat it
    assert uniform.attributes["bytes"] >= best.attributes["bytes"]
    assert best.values["divergence"] < uniform.values["divergence"]
    assert best.attributes["bytes"] < dense.attributes["bytes"]
    answer = study.answer(f"bytes<={int(0.8 * dense.attributes['bytes'])}")
    assert answer.figures["bytes"] <= 0.8 * dense.attributes["bytes"]
    json.dumps(answer.figures)
