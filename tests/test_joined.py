"""Right factors on one input as one product: the same results, nothing stored twice, alone where that is asked for."""

import copy

import pytest
import torch
from common import save_folder, tokens
from launching import measured, small_data, verify_here
from torch import nn
from transformers import AutoModelForCausalLM

from rankfront.methods.joined import MOVES, Joined
from rankfront.methods.layers_low_rank import LowRankLinear
from rankfront.objectives import Clock, make_objective
from rankfront.search.measure import joining
from rankfront.search.measure.joining import Together, join_faster, separate
from rankfront.search.measure.runner import JobRunner
from rankfront.search.measure.timing import Stopwatches
from rankfront.search.output import export as exporting
from rankfront.search.plans.plan import Plan
from rankfront.search.study import Study


@pytest.fixture(autouse=True)
def never_joined():
    """Here they are."""


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(12, 4), (6, 3), (6, 5)]  # out_features, rank
WIDTH = 10


def members_of(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(1)
    return [
        LowRankLinear(torch.randn(m, r, dtype=dtype), torch.randn(r, WIDTH, dtype=dtype), torch.randn(m, dtype=dtype))
        for m, r in shapes
    ]


def run(members, x):
    return [member(x) for member in members]


@pytest.fixture
def products(monkeypatch):
    """How many rows every matrix product of a joined group had."""
    rows = []
    true = nn.functional.linear

    def counted(x, weight, bias=None):
        rows.append(len(weight))
        return true(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (2, 7, WIDTH)])
def test_joined_they_give_what_they_give_alone(dtype, shape, products):
    """With one product of all ranks instead of three."""
    members, x = members_of(dtype), torch.randn(shape).to(dtype)
    alone = run(members, x)
    products.clear()
    Joined(members)
    exact = dtype == torch.float32
    torch.testing.assert_close(run(members, x), alone, rtol=1e-5 if exact else 0.02, atol=1e-5 if exact else 0.1)
    assert products == [12, 12, 6, 6]


def test_every_input_has_its_own_product(products):
    """In the order of the calls or not, and an input is let go of after the last of them."""
    members, inputs = members_of(), [torch.randn(2, WIDTH) for _ in range(2)]
    expected = [run(members, x) for x in inputs]
    joined = Joined(members)
    assert joined._product is None
    torch.testing.assert_close([run(members, x) for x in inputs], expected)
    assert joined._product is None
    for place in (1, 0, 2):
        for x, outputs in zip(inputs, expected, strict=True):
            torch.testing.assert_close(members[place](x), outputs[place])
    products.clear()
    torch.testing.assert_close(members[2](inputs[0]), expected[0][2])
    assert products == [12, 6]


def test_nothing_is_stored_twice():
    members = members_of()
    before = [m.right.detach().clone() for m in members]
    rights = [m.right for m in members]
    joined = Joined(members)
    assert all(m.right is right for m, right in zip(members, rights, strict=True))
    torch.testing.assert_close([m.right.data for m in members], before, rtol=0, atol=0)
    assert {m.right.untyped_storage().data_ptr() for m in members} == {joined._whole.untyped_storage().data_ptr()}
    joined.part_ways()
    assert len({m.right.untyped_storage().data_ptr() for m in members}) == len(members)
    torch.testing.assert_close([m.right.data for m in members], before, rtol=0, atol=0)
    assert all(m.joined is None for m in members)


def test_a_factor_that_several_have_is_there_once(products):
    members = members_of(shapes=[(12, 4), (6, 4)])
    members[1].right = members[0].right
    x = torch.randn(3, WIDTH)
    alone = run(members, x)
    products.clear()
    Joined(members)
    torch.testing.assert_close(run(members, x), alone)
    assert products == [4, 12, 6]
    assert members[1].right is members[0].right


def test_changes_in_place_are_seen():
    members, x = members_of(), torch.randn(3, WIDTH)
    Joined(members)
    run(members, x)
    with torch.no_grad():
        members[1].right.mul_(2)
    bias = members[1].bias
    expected = nn.functional.linear(nn.functional.linear(x, members[1].right), members[1].left, bias)
    torch.testing.assert_close(run(members, x)[1], expected)


@pytest.mark.parametrize("who", ["input", "factor"])
def test_gradients_flow_as_without(who):
    gradients = []
    for joining_them in (False, True):
        members, x = members_of(), torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
        if joining_them:
            Joined(members)
        x.requires_grad_(who == "input")
        for member in members:
            member.right.requires_grad_(who == "factor")
        sum(y.square().sum() for y in run(members, x)).backward()
        gradients.append([x.grad] if who == "input" else [member.right.grad for member in members])
    torch.testing.assert_close(*gradients)


def test_long_inputs_run_alone_where_that_is_faster(products):
    members = members_of()
    Joined(members, most=4)
    for count, expected in ((4, [12, 12, 6, 6]), (5, [4, 12, 3, 6, 5, 6])):
        products.clear()
        run(members, torch.randn(count, WIDTH))
        assert products == expected


def test_what_was_moved_is_gathered_again_and_at_last_left_alone(products):
    members = members_of()
    Joined(members)
    for move in range(MOVES + 2):
        dtype = (torch.bfloat16, torch.float32)[move % 2]
        for member in members:
            member.to(dtype)
        products.clear()
        run(members, torch.randn(2, WIDTH, dtype=dtype))
        assert products == ([12, 12, 6, 6] if move < MOVES else [4, 12, 3, 6, 5, 6])


def test_members_on_unlike_dtypes_run_alone():
    members, x = members_of(), torch.randn(2, WIDTH)
    Joined(members)
    members[2].to(torch.float64)
    torch.testing.assert_close(members[2](x.double()).float(), members_of()[2](x))
    torch.testing.assert_close(members[0](x), members_of()[0](x))


def test_within_inference_mode_and_after():
    members, x = members_of(), torch.randn(2, WIDTH)
    alone = run(members, x)
    Joined(members)
    for member in members:
        member.to(torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close([y.float() for y in run(members, x.double())], alone)
    x64 = x.double().requires_grad_()
    members[0](x64).sum().backward()
    assert x64.grad is not None


def test_a_copy_is_joined_by_itself(products):
    members, x = nn.ModuleList(members_of()), torch.randn(2, WIDTH)
    Joined(list(members))
    twin = copy.deepcopy(members)
    with torch.no_grad():
        twin[0].right.zero_()
    products.clear()
    torch.testing.assert_close(run(members, x), run(members_of(), x))
    torch.testing.assert_close(twin[0](x), twin[0].bias.expand(2, -1))
    assert products[:4] == [12, 12, 6, 6]


def test_compiled_they_run_alone():
    members, x = nn.ModuleList(members_of()), torch.randn(2, WIDTH)
    alone = run(members, x)
    Joined(list(members))
    compiled = torch.compile(lambda x: run(members, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), alone)


# -- where it is faster


@pytest.fixture
def ratios(monkeypatch):
    """What one product takes of separate ones, by tokens; what was timed."""
    found, asked = {1: 0.5, 128: 0.5}, []

    def compared(ours, theirs, x, prepack):
        assert (ours.together, theirs.together) == (True, False)
        asked.append(([(m.out_features, m.rank) for m in ours.members], tuple(x.shape)))
        return found[x.shape[1]]

    monkeypatch.setattr("rankfront.search.measure.timing.compared", compared)
    return found, asked


INPUTS = {"q": "q", "k": "q", "v": "q", "up": "up"}


def joined_now(modules, tmp_path):
    lengths, watches = make_objective("latency", {}), Stopwatches(tmp_path, "cpu", torch.float32)
    return join_faster(modules, INPUTS, lengths, watches)


@pytest.mark.parametrize(
    ("decode", "prefill", "most"),
    [(0.5, 0.5, None), (0.5, 1.1, joining.FEW), (1.1, 0.5, "alone"), (0.99, 0.5, "alone")],
)
def test_they_are_joined_where_that_was_measured_to_be_faster(ratios, tmp_path, decode, prefill, most):
    found, asked = ratios
    found |= {1: decode, 128: prefill}
    members = members_of()
    modules = dict(zip("qkv", members, strict=True)) | {"up": members_of()[0]}
    done = joined_now(modules, tmp_path)
    assert done == ([] if most == "alone" else [{"modules": ["q", "k", "v"], "most": most}])
    assert [(m.joined is not None, m.joined and m.joined.most) for m in members] == [
        (bool(done), most if done else None)
    ] * 3
    assert modules["up"].joined is None
    assert asked[0] == (SHAPES, (1, 1, WIDTH))
    before = len(asked)
    separate(members)
    assert joined_now(modules, tmp_path) == done
    assert len(asked) == before  # kept on disk


def test_what_is_timed_is_what_runs(products):
    like = torch.zeros(0, dtype=torch.float32)
    for together, expected in ((False, [4, 12, 3, 6]), (True, [7, 12, 6])):
        timed = copy.deepcopy(Together([(12, 4, WIDTH), (6, 3, WIDTH)], like, together))
        products.clear()
        timed(torch.ones(1, 1, WIDTH))
        assert products == expected


def test_groups_that_change_are_joined_anew(ratios, tmp_path):
    modules = dict(zip("qkv", members_of(), strict=True))
    joined_now(modules, tmp_path)
    first = modules["q"].joined
    joined_now(modules, tmp_path)
    assert modules["q"].joined is first
    modules["k"] = members_of()[1]
    joined_now(modules, tmp_path)
    assert modules["q"].joined is modules["k"].joined is not first
    modules |= {"k": nn.Linear(WIDTH, 6), "v": nn.Linear(WIDTH, 6)}
    assert joined_now(modules, tmp_path) == []
    assert modules["q"].joined is None


# -- in studies and exports


SPLIT = {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}
KNOWN = {"llama": SPLIT, "qwen2": SPLIT, "gpt2": {("q_proj", "k_proj", "v_proj")}}


@pytest.fixture
def made(architecture, text_file, tmp_path, monkeypatch):
    """A resident model of every architecture, all sites at a low rank, with one product always faster."""
    monkeypatch.setenv("RANKFRONT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rankfront.search.measure.timing.compared", lambda *_: 0.5)
    data = small_data(save_folder(architecture.name, tmp_path / "model"), text_file)
    data["space"] |= {"methods": ["svd"], "keep": [0.5]}
    resident = JobRunner(Study(data, run=tmp_path / "run").setup())
    plan = Plan.of({site.name: options[0] for site, options in resident.compressed.space.wanted().items()})
    return resident, plan


def test_joined_a_model_says_the_same(architecture, made):
    resident, plan = made
    resident.compressed.apply(plan)
    ids = tokens(2, 9)
    with torch.inference_mode():
        alone = resident.compressed.model(input_ids=ids).logits
        names = list(resident.compressed.model.state_dict())
        held = make_objective("resident_bytes", {}).value(resident.subject(plan, Clock()))
        done = resident.timed.join()
        torch.testing.assert_close(resident.compressed.model(input_ids=ids).logits, alone, rtol=1e-4, atol=1e-4)
    assert list(resident.compressed.model.state_dict()) == names
    assert make_objective("resident_bytes", {}).value(resident.subject(plan, Clock())) == held
    groups = {tuple(path.rsplit(".", 1)[1] for path in group["modules"]) for group in done}
    if architecture.name in KNOWN:
        assert groups == KNOWN[architecture.name]
    resident.compressed.apply(Plan(()))
    resident.timed.join()
    with torch.inference_mode():
        resident.compressed.model(input_ids=ids)


def test_an_export_runs_as_joined_as_it_was_here(made, tmp_path, monkeypatch):
    """And again when what was loaded is saved once more; files have every factor by itself."""
    verify_here(monkeypatch)
    resident, plan = made
    row = measured(resident, plan)
    out = tmp_path / "out"
    exporting.export(resident.setup, row, out, "factored")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    resident.compressed.apply(plan)
    done = resident.timed.join()
    assert loaded.config.rankfront["joined"] == done
    for group in done:
        members = [loaded.get_submodule(path) for path in group["modules"]]
        assert members[0].joined is not None
        assert [m.joined for m in members] == [members[0].joined] * len(members)
    ids = tokens(2, 9)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.inference_mode():
        torch.testing.assert_close(again(input_ids=ids).logits, loaded(input_ids=ids).logits)
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, resident.compressed.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    assert list(again.state_dict()) == list(loaded.state_dict())
    assert [*map(torch.equal, again.state_dict().values(), loaded.state_dict().values())].count(False) == 0
