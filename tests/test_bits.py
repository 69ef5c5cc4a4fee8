"""Treatments with their matrices in 8 or 4 bits: laws over families and bits, `space.bits`, exports, predictions."""

import json

import common
import pytest
import torch
from launching import make_run, measured, small_data, verify_here
from safetensors.torch import load_file
from test_joint import World
from test_method_laws import make_sample, make_weight
from torch import nn

from rankfront.methods import INTEGER_BITS, Grid, InputError, Option, Storage, get_method, measured_as, narrowed
from rankfront.methods._fitted import matrix_of
from rankfront.methods._integers import rounded
from rankfront.methods._packed_integers import restored
from rankfront.methods.layers import empty_replacement, replacement
from rankfront.search import Plan, Study
from rankfront.search.factors.joint_rounding import add_rounding
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.setup import make_space
from rankfront.search.output.export import export

SHAPES = [(48, 64), (40, 136)]
SINGLE = ("svd", "svd-llm", "kfac-svd", "fwsvd", "lrt", "oats", "sltrain", "cospadi", "compot")
JOINT = ("lama", "vo-svd", "nystrom")
each_bits = pytest.mark.parametrize("bits", INTEGER_BITS)
WHITENED = ("svd-llm", "sltrain", "cospadi", "compot")  # which minimise the error of the outputs
each_whitened = pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in WHITENED for shape in SHAPES])
each_single = pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in SINGLE for shape in SHAPES])


def treated(name, shape, bits=None):
    """Method, option at about half of the weight, factors, the weight and its inputs (tokens, n)."""
    method = get_method(name) if bits is None else narrowed(name, bits)
    site, weight, sample = common.linear_site(*shape), make_weight(shape), make_sample(shape)
    option = method.options(site, Grid((0.6,), 8))[0.6]
    statistics = {"weight": sample.statistics()}
    prepared = method.prepare(site, {"weight": weight}, statistics, [option])
    return method, option, method.truncate(prepared, option)["weight"], weight, sample


@each_bits
@each_single
def test_what_is_stored_is_what_was_claimed(name, shape, bits):
    """To the byte: what is rounded, its scales, and what stays as it is."""
    method, option, factors, _, _ = treated(name, shape, bits)
    assert factors.storage == method.storage(common.linear_site(*shape), option)
    sizes = {str(dtype): 0 for dtype in (torch.int8, torch.uint8, torch.float32)}
    for tensor in factors.tensors.values():
        sizes[str(tensor.dtype)] = sizes.get(str(tensor.dtype), 0) + tensor.numel()
    assert sizes.pop("torch.float32") == factors.storage.values
    assert sum(sizes.values()) == (factors.storage.integer_bits + factors.storage.index_bits) // 8
    assert factors.settings["bits"] == bits
    assert option["bits"] == bits


@each_bits
@each_single
def test_it_runs_as_its_matrix_says(name, shape, bits):
    """One token and many, and after its tensors were loaded into an empty layer: bit for bit."""
    _, _, factors, _, _ = treated(name, shape, bits)
    dense = nn.Linear(shape[1], shape[0])
    layer = replacement(dense, factors.kind, factors.tensors, factors.settings)
    empty = empty_replacement(dense, factors.kind, factors.settings)
    empty.load_state_dict(layer.state_dict())
    assert layer.state_dict().keys() == {*factors.tensors, "bias"}
    for tokens in (1, 40):
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            y, expected = layer(x), nn.functional.linear(x, layer.matrix(), dense.bias)
            assert (y - expected).norm() <= 1e-4 * expected.norm()
            assert torch.equal(empty(x), y)


@each_whitened
def test_error_falls_with_bits(name, shape):
    errors = []
    for bits in (4, 8, None):
        _, _, factors, weight, sample = treated(name, shape, bits)
        errors.append(float(((weight.double() - matrix_of(factors, *shape).double()) @ sample.x.T).norm()))
    assert errors[0] >= errors[1] * 0.999
    assert errors[1] == pytest.approx(errors[2], rel=0.02)


@each_bits
@each_whitened
def test_it_is_no_worse_than_rounding_every_matrix_by_itself(name, shape, bits):
    """To the nearest value, in the outputs' error."""
    _, _, factors, weight, sample = treated(name, shape, bits)
    _, _, plain, _, _ = treated(name, shape)
    nearest = {
        key: restored(rounded(tensor, bits), bits, tensor.shape[1]) if f"{key}.integers" in factors.tensors else tensor
        for key, tensor in plain.tensors.items()
    }
    dense = nn.Linear(shape[1], shape[0], bias=False)
    apart = replacement(dense, plain.kind, nearest, plain.settings).matrix()

    def error(matrix):
        return float(((weight - matrix).double() @ sample.x.T).norm())

    assert error(matrix_of(factors, *shape)) <= error(apart) * 1.0001


@each_bits
def test_methods_without_dense_matrices_have_no_bits(bits):
    assert narrowed("tucker", bits) is None
    assert narrowed("drop-block", bits) is None
    assert narrowed("gptq-int8", bits) is None
    with pytest.raises(InputError, match=f"'tucker-int{bits}'"):
        get_method(f"tucker-int{bits}")


def test_levels_say_their_bits():
    with pytest.raises(InputError, match="has bits=4"):
        get_method("nystrom-int4").check(Option.of("nystrom-int4", neurons=8, bits=8))
    with pytest.raises(InputError, match="neurons"):
        get_method("nystrom-int4").check(Option.of("nystrom-int4", bits=4))
    get_method("nystrom-int4").check(Option.of("nystrom-int4", bits=4, neurons=8))


# -- sites of several weights


@pytest.fixture(scope="module")
def world(tmp_path_factory, text_file):
    return World("llama", tmp_path_factory.mktemp("llama"), text_file)


@each_bits
@pytest.mark.parametrize("name", JOINT)
def test_joint_treatments_hold_all_their_matrices_so(world, name, bits):
    """Storage as claimed, and the same function up to rounding, which matters less the more bits there are."""
    method = narrowed(name, bits)
    site, *_ = [site for site, _ in world.treated(name)]
    plain = get_method(name).options(site, Grid((0.5,), 2))[0.5]
    option = Option.of(method.name, **dict(plain.level), bits=bits)
    prepared = method.prepare(site, world.weights(site), world.statistics[site], [option])
    whole = get_method(name).truncate(
        get_method(name).prepare(site, world.weights(site), world.statistics[site], [plain]), plain
    )
    factors = method.truncate(prepared, option)
    stored, dense = (sum((each.storage for each in own.values()), Storage(0)) for own in (factors, whole))
    assert stored - dense == method.storage(site, option) - get_method(name).storage(site, plain)  # biases apart
    for role, own in factors.items():
        size = next((w.out_features, w.in_features) for w in site.weights if w.role == role)
        assert "weight.integers" in own.tensors
        one, other = matrix_of(own, *size), matrix_of(whole[role], *size)
        assert (one - other).norm() <= {8: 0.02, 4: 0.2}[bits] * other.norm()


def test_the_down_projection_is_rounded_for_the_neurons_that_are_left(world):
    site, *_ = [site for site, _ in world.treated("nystrom")]
    method = get_method("nystrom")
    plain = method.options(site, Grid((0.5,), 2))[0.5]
    prepared = method.prepare(site, world.weights(site), world.statistics[site], [plain])
    gram = world.statistics[site]["down"].gram.raw
    kept = prepared["order"][: plain["neurons"]].tolist()
    found = method.reads(site, prepared, plain, "down", gram)
    for i, row in enumerate(kept):
        for j, column in enumerate(kept):
            assert float(found[i, j]) == float(gram[row, column])


def test_the_output_projection_is_rounded_for_the_dimensions_that_are_left(world):
    """Of inputs z, what reaches it after the values were made thin."""
    site, *_ = [site for site, _ in world.treated("vo-svd")]
    method, heads = get_method("vo-svd"), site.heads
    plain = method.options(site, Grid((0.5,), 2))[0.5]
    prepared = method.prepare(site, world.weights(site), world.statistics[site], [plain])
    z = torch.randn(50, heads.queries * heads.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_head = z.unflatten(1, (heads.queries, heads.width))
    thin = []
    for query in range(heads.queries):
        basis = prepared["basis"][: plain["width"], query * heads.keys // heads.queries].double()
        thin.append(by_head[:, query] @ basis.T)
    expected = torch.cat(thin, 1).T @ torch.cat(thin, 1)
    torch.testing.assert_close(method.reads(site, prepared, plain, "output", z.T @ z), expected)


def test_what_rounding_does_to_joint_sites_adds_up(world):
    """Shares of what it does to each weight, beside what the treatment does in all bits."""
    joint, *_ = [site for site, _ in world.treated("nystrom")]
    option = Option.of("nystrom-int4", neurons=joint.anchor.in_features // 2, bits=4)
    plain = measured_as(joint, option)
    alone = [common.Site(weight.path, (weight,)) for weight in joint.weights]
    whole = Option.of("gptq-int4", bits=4)
    wanted = {joint: [plain, option], **{site: [whole] for site in alone}}
    found = {joint.name: {plain.label: (1.0,), option.label: (1.0,)}}
    found |= {site.name: {whole.label: (0.5,)} for site in alone}
    add_rounding(found, wanted)
    assert found[joint.name] == {plain.label: (1.0,), option.label: (pytest.approx(1.0 + 3 * 0.5 * 0.5),)}
    del found[alone[0].name]
    add_rounding(found, wanted)
    assert found[joint.name] == {plain.label: (1.0,)}


# -- studies


def study_of(root, text, **space):
    data = small_data(common.save_folder("llama", root / "model"), text)
    data["space"] |= {"methods": ["svd-llm", "nystrom", "drop-block"], "keep": [0.4, 0.7]} | space
    data["objectives"] = {"perplexity": {}, "bytes": {}}
    return data


def test_bits_are_choices_of_every_site(tmp_path, text_file):
    rule = [{"match": "*.down_proj", "bits": [16, 8]}, {"match": "*.1.*", "bits": [16]}]
    data = study_of(tmp_path, text_file, bits=[16, 8, 4], include=["*", "*embed_tokens", "lm_head"], rule=rule)
    choices = make_space(Study(data).setup()).choices
    methods = {site.name: set(own.methods) for site, own in choices.items()}
    every = {"svd-llm", "svd-llm-int8", "svd-llm-int4", "gptq-int8", "gptq-int4"}
    assert methods["model.layers.0.self_attn.q_proj"] == every
    assert methods["model.layers.0.mlp.down_proj"] == {"svd-llm", "svd-llm-int8", "gptq-int8"}
    assert methods["model.layers.1.self_attn.q_proj"] == {"svd-llm"}
    assert methods["model.embed_tokens"] == {"rtn-int8", "rtn-int4"}
    assert any({"nystrom", "nystrom-int8", "nystrom-int4"} <= own for own in methods.values())


def test_bits_alone_are_a_search(tmp_path, text_file):
    data = study_of(tmp_path, text_file, methods=["dense"], bits=[16, 8, 4])
    methods = {name for own in make_space(Study(data).setup()).choices.values() for name in own.methods}
    assert methods == {"gptq-int8", "gptq-int4"}


@pytest.mark.parametrize("bits", [[3], [], [16, 2]])
def test_bits_that_no_kernel_has_are_refused(tmp_path, text_file, bits):
    with pytest.raises(InputError, match=r"kernels read 16 .*, 8 and 4"):
        Study(study_of(tmp_path, text_file, bits=bits))


def test_a_study_over_bits_is_searched_and_exported(tmp_path, text_file, monkeypatch):
    """Its bytes are those of the file, and the reloaded model is the same."""
    verify_here(monkeypatch)
    data = study_of(tmp_path, text_file, bits=[16, 8, 4], methods=["svd-llm", "nystrom", "vo-svd", "sltrain"])
    data["search"] |= {"trials": 6, "sampler": "rankfront"}
    study = make_run(data, tmp_path / "run")
    used = {option.method for row in study.front() for _, option in row.plan.choices}
    assert any("-int" in name for name in used)
    menu = study.menu()
    assert {"nystrom-int4", "vo-svd-int8", "svd-llm-int4", "sltrain-int8", "gptq-int4"} <= set(menu["method"])


METHODS = ["svd-llm", "sltrain", "cospadi", "nystrom", "vo-svd"]
NAMES = ("svd-llm-int4", "sltrain-int8", "cospadi-int4", "gptq-int4", "nystrom-int4", "vo-svd-int8")


def test_bytes_of_a_plan_are_those_of_its_file(tmp_path, text_file, monkeypatch):
    """But for rotary planes that lama keeps: they are counted in bits, as a mask, and stored in a byte each."""
    verify_here(monkeypatch)
    data = study_of(tmp_path, text_file, methods=METHODS, bits=[8, 4], keep=[0.5])
    resident = JobRunner(Study(data).setup())
    plan = common.plan_with(resident, NAMES)
    assert {option.method for _, option in plan.choices} == set(NAMES)
    row = measured(resident, plan)
    export(resident.setup, row, tmp_path / "out", "factored")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == row.attributes["bytes"]
    assert Plan.from_json((tmp_path / "out" / "plan.json").read_text(encoding="utf-8")) == plan
    kinds = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["rankfront"]["modules"]
    assert {spec.get("bits") for spec in kinds.values()} == {8, 4}


def test_right_factors_in_integers_are_not_joined(tmp_path, text_file, monkeypatch):
    """Though all of a block read the same input, and one product would be faster."""
    verify_here(monkeypatch)
    monkeypatch.setattr("rankfront.search.measure.joining.faster", lambda *_: True)
    resident = JobRunner(Study(study_of(tmp_path, text_file, bits=[16, 8], keep=[0.5])).setup())
    wanted = {site.name: options for site, options in resident.compressed.space.wanted().items()}
    names = [f"model.layers.0.self_attn.{role}_proj" for role in "qkv"]
    chosen = {name: next(o for o in wanted[name] if o.method == "svd-llm-int8") for name in names}
    row = measured(resident, Plan.of(chosen, resident.setup.origin()))
    export(resident.setup, row, tmp_path / "out", "factored")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["rankfront"]
    assert config["joined"] == []
    assert set(config["modules"]) == set(names)


@each_bits
@each_single
def test_integers_are_put_back_as_what_they_stand_for(name, shape, bits):
    _, _, factors, _, _ = treated(name, shape, bits)
    layer = replacement(nn.Linear(shape[1], shape[0]), factors.kind, factors.tensors, factors.settings)
    matrix = layer.matrix()
    assert not layer.in_full
    layer.make_full()
    assert layer.in_full
    assert torch.equal(layer.matrix(), matrix)
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, matrix, layer.bias), rtol=1e-4, atol=1e-5)
