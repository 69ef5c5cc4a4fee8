"""The front against brute force, hypervolume against closed forms, constraints and the knee."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rankfront.methods import InputError
from rankfront.search.attributes import INTERRUPTED
from rankfront.search.constraint import Constraint
from rankfront.search.optimise.accuracy import calibration
from rankfront.search.plans.plan import Plan
from rankfront.search.storage.front import Box, Row, box_of, dense_row, frame, front_of, hypervolume, knee
from rankfront.search.storage.picking import holds, meeting

AXES = ("perplexity", "parameters", "latency")


def make_rows(points, **attributes):
    return [
        Row(
            i,
            "complete",
            "random",
            "{}",
            str(i),
            dict(zip(AXES, map(float, point), strict=False)),
            dict(attributes),
        )
        for i, point in enumerate(points)
    ]


def unit_box(dimensions):
    axes = AXES[:dimensions]
    return Box(dict.fromkeys(axes, 0.0), dict.fromkeys(axes, 1.0))


def random_points(count, dimensions, seed, levels=None):
    points = np.random.default_rng(seed).random((count, dimensions))
    return points if levels is None else np.round(points * levels) / levels


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def union(points):
    """Volume of the union of the boxes [p, 1], by inclusion and exclusion."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            corner = np.max(chosen, axis=0)
            total -= (-1) ** size * float(np.prod(np.clip(1 - corner, 0, None)))
    return total


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("levels", [None, 4], ids=["distinct", "ties"])
@pytest.mark.parametrize("seed", range(4))
def test_front_is_what_nothing_dominates(dimensions, levels, seed):
    """Of equal points one stays."""
    points = [tuple(point) for point in random_points(40, dimensions, seed, levels)]
    expected = {p for p in points if not any(dominates(q, p) for q in points)}
    found = [tuple(row.values.values()) for row in front_of(make_rows(points))]
    assert set(found) == expected
    assert len(found) == len(expected)
    assert found == sorted(found)


def noisy_rows(points, spread):
    return make_rows(points, notes={"latency_spread": spread})


def test_latencies_within_their_spread_count_as_equal():
    """The second is no faster than noise and more perplexed; the third is faster beyond doubt."""
    points = [(20, 0.5, 0.80), (21, 0.5, 0.78), (22, 0.5, 0.70)]
    assert [row.number for row in front_of(noisy_rows(points, 0.03))] == [0, 2]
    assert [row.number for row in front_of(noisy_rows(points, 0.01))] == [0, 1, 2]
    assert [row.number for row in front_of(noisy_rows(points, 0.2))] == [0]


def test_the_larger_spread_of_two_decides():
    rows = [noisy_rows([(20, 0.5, 0.80)], 0.0)[0], replace(noisy_rows([(21, 0.5, 0.78)], 0.03)[0], number=1)]
    assert [row.number for row in front_of(rows)] == [0]
    assert [row.number for row in front_of(rows[::-1])] == [0]


def test_what_is_smaller_stays_however_noisy_the_latency():
    points = [(20, 0.9, 0.80), (21, 0.8, 0.81), (22, 0.7, 0.79)]
    assert [row.number for row in front_of(noisy_rows(points, 0.5))] == [0, 1, 2]


def test_a_chain_of_small_gains_does_not_vanish():
    """Each is within noise of the next, and the first is not of the last: some of them stay, none within noise."""
    points = [(20 + i, 0.5, 0.9 - 0.02 * i) for i in range(10)]
    found = front_of(noisy_rows(points, 0.03))
    assert [row.number for row in found] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("seed", range(4))
def test_no_member_is_as_good_as_another(seed):
    points = random_points(60, 3, seed)
    found = [tuple(row.values.values()) for row in front_of(noisy_rows(points, 0.1))]
    assert found
    for a, b in itertools.permutations(found, 2):
        assert not (a[0] <= b[0] and a[1] <= b[1] and a[2] <= b[2] + 0.1)
    exact = {tuple(row.values.values()) for row in front_of(make_rows(points))}
    for p in exact:
        assert any(q[0] <= p[0] and q[1] <= p[1] and q[2] <= p[2] + 0.2 for q in found)


def test_front_is_of_complete_rows_only():
    rows = make_rows([(1, 1)])
    rows += [Row(9, state, "", None, None) for state in ("failed", "running", "waiting")]
    assert [row.number for row in front_of(rows)] == [0]
    assert front_of(rows[1:]) == []
    assert front_of([]) == []


def test_hypervolume_of_a_staircase():
    """Σ (x_{i+1} − x_i)(1 − y_i), with x_{N+1} = 1."""
    points = [(0.1, 0.8), (0.3, 0.5), (0.6, 0.2)]
    expected = (0.3 - 0.1) * 0.2 + (0.6 - 0.3) * 0.5 + (1 - 0.6) * 0.8
    assert hypervolume(make_rows(points), unit_box(2)) == pytest.approx(expected)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_hypervolume_is_the_volume_of_the_union(dimensions, seed):
    points = random_points(7, dimensions, seed)
    assert hypervolume(make_rows(points), unit_box(dimensions)) == pytest.approx(union(points))


def test_hypervolume_of_a_grid_in_three_dimensions():
    points = random_points(6, 3, 9, levels=10)
    cells = (np.stack(np.meshgrid(*[np.arange(10)] * 3, indexing="ij"), -1).reshape(-1, 3) + 0.5) / 10
    covered = (cells[:, None] >= points[None]).all(-1).any(-1).mean()
    assert hypervolume(make_rows(points), unit_box(3)) == pytest.approx(covered)


@pytest.mark.parametrize(
    ("points", "share"),
    [
        ([], 0.0),
        ([(0, 0)], 1.0),
        ([(-1, -5)], 1.0),
        ([(0.5, 0.5)], 0.25),
        ([(0.5, 2)], 0.0),
        ([(1, 0)], 0.0),
        ([(0.5, 0.5), (0.7, 0.7), (0.5, 0.5)], 0.25),
        ([(0.5, 0.5), (3, 0)], 0.25),
        ([(-1, 0.5)], 0.5),
    ],
)
def test_hypervolume_is_a_share_of_the_box(points, share):
    assert hypervolume(make_rows(points), unit_box(2)) == pytest.approx(share)


def test_hypervolume_is_in_units_of_the_box():
    box = Box({"perplexity": 10.0, "parameters": 0.0}, {"perplexity": 100.0, "parameters": 1.0})
    assert hypervolume(make_rows([(55, 0.5)]), box) == pytest.approx(0.25)


def test_a_logarithmic_axis_is_measured_in_logarithms():
    box = Box({"perplexity": 10.0, "parameters": 0.0}, {"perplexity": 1000.0, "parameters": 1.0}, {"perplexity"})
    assert hypervolume(make_rows([(100, 0.5)]), box) == pytest.approx(0.25)
    assert box.unit(np.array([[5.0, 0.5], [10, 0.5], [1000, 2]])) == pytest.approx(
        np.array([[0, 0.5], [0, 0.5], [1, 2]])
    )


def test_a_dominated_row_adds_no_hypervolume():
    points = [tuple(p) for p in random_points(20, 2, 3)]
    box = unit_box(2)
    rows = make_rows(points)
    assert hypervolume(front_of(rows), box) == pytest.approx(hypervolume(rows, box))


def test_the_box_is_what_objectives_state():
    dense = make_rows([(20.0, 1.0, 1.0)])[0]
    box = box_of({"perplexity": {}, "parameters": {}, "latency": {}}, dense)
    assert box.ideal == {"perplexity": 20.0, "parameters": 0.0, "latency": 0.0}
    assert box.reference == {"perplexity": 200.0, "parameters": 1.1, "latency": 1.1}
    assert box.logarithmic == {"perplexity"}
    assert hypervolume([dense], box) == pytest.approx((0.1 / 1.1) ** 2)


def test_the_dense_row_has_the_dense_plan():
    """All of the blocks are kept by a plan that treats the embedding alone, too."""
    rows = make_rows([(1, 1), (2, 2)], block_parameters=1.0)
    dense = replace(rows[1], plan_key=Plan(()).key)
    assert dense_row([rows[0], dense]) is dense
    assert dense_row(rows) is None


# -- how well predictions held


def predicted_rows(predicted, measured, sizes, dense=None):
    """Complete rows of a divergence that was predicted, in order; the dense model's perplexity before them."""
    name = "divergence" if dense is None else "perplexity"
    rows = [
        Row(i, "complete", "", "{}", str(i), {name: m, "parameters": s}, {"predicted": p, "block_parameters": s})
        for i, (p, m, s) in enumerate(zip(predicted, measured, sizes, strict=True))
    ]
    first = Row(-1, "complete", "", "{}", Plan(()).key, {name: dense or 0.0, "parameters": 1.0})
    return [first, *rows]


def ladder(count, seed):
    """Sizes from 0.9 to 0.4, by how much (30%) each plan is off a divergence that size decides, and that divergence."""
    sizes = np.linspace(0.9, 0.4, count)
    own = np.random.default_rng(seed).normal(0, 0.3, count)
    return sizes, own, 0.1 * np.exp(8 * (0.9 - sizes))


@pytest.mark.parametrize("seed", range(4))
def test_size_alone_is_no_good_prediction(seed):
    """It orders plans of all sizes well, and says nothing of those of one size."""
    sizes, own, by_size = ladder(40, seed)
    blind = calibration(predicted_rows(by_size * np.exp(-own), by_size * np.exp(own), sizes), "divergence")
    told = calibration(predicted_rows(by_size * np.exp(0.8 * own), by_size * np.exp(own), sizes), "divergence")
    assert min(blind.spearman, told.spearman) > 0.8
    assert told.at_size > 0.8
    assert blind.at_size < 0


def test_the_correlation_at_a_size_is_the_partial_one():
    """(r_pm − r_ps r_ms) / √((1 − r_ps²)(1 − r_ms²)) of rank correlations; those of shuffled sizes as they are."""
    sizes, own, by_size = ladder(30, 0)
    predicted, measured = by_size * np.exp(np.roll(own, 1)), by_size * np.exp(own)
    rank = [[stats.spearmanr(a, b).statistic for b in (measured, sizes)] for a in (predicted, measured)]
    (both, with_size), (_, measured_with) = rank
    expected = (both - with_size * measured_with) / np.sqrt((1 - with_size**2) * (1 - measured_with**2))
    assert calibration(predicted_rows(predicted, measured, sizes), "divergence").at_size == pytest.approx(expected)
    equal = calibration(predicted_rows(predicted, measured, np.full(30, 0.5)), "divergence")
    assert equal.at_size == pytest.approx(equal.spearman)


@pytest.mark.parametrize("count", [8, 50, 400])
def test_rank_correlations_are_scipys_with_and_without_equals(count):
    random = np.random.default_rng(count)
    for values in (random.integers(1, count // 2, (2, count)).astype(float), random.uniform(1, 2, (2, count))):
        found = calibration(predicted_rows(*values, np.full(count, 0.5)), "divergence")
        assert found.spearman == pytest.approx(stats.spearmanr(*values).statistic)
        assert found.kendall == pytest.approx(stats.kendalltau(*values).statistic)


def test_there_is_none_where_nothing_is_left_to_tell():
    sizes, own, by_size = ladder(40, 0)
    few = calibration(predicted_rows(by_size[:7], by_size[:7] * np.exp(own[:7]), sizes[:7]), "divergence")
    assert few.at_size is None
    ordered = calibration(predicted_rows(by_size, 1.1 * by_size, sizes), "divergence")
    assert ordered.spearman == pytest.approx(1.0)
    assert ordered.at_size is None
    assert "not to be told" in str(ordered)
    assert "at a size" not in ordered.brief


@pytest.mark.parametrize("dense", [None, 20.0])
def test_predictions_are_poor_where_recent_ones_miss(dense):
    """By the logarithm of divergence, as of perplexity's excess over dense; what was long ago is forgiven."""
    sizes, _, by_size = ladder(40, 0)

    def of(factors):
        predicted = by_size * factors
        made = (predicted, by_size) if dense is None else (dense * np.exp(predicted), dense * np.exp(by_size))
        return calibration(predicted_rows(*made, sizes, dense), "divergence" if dense is None else "perplexity")

    turns = np.where(np.arange(40) % 2, 1.5, 1 / 1.5)
    assert of(turns).spearman > 0.9
    assert of(turns).poor
    assert of(turns).error == pytest.approx(np.log(1.5))
    assert not of(np.where(np.arange(40) < 20, turns, 1.1)).poor
    assert of(np.where(np.arange(40) < 20, 1.1, turns)).poor
    assert not of(turns**0.5).poor
    assert "poor" in str(of(turns))
    assert "poor" not in str(of(turns**0.5))


def test_what_noise_decides_is_no_miss():
    """A few thousandths of a nat, or a perplexity below the dense model's."""
    measured = 20 * np.exp(np.array([-0.003, 0.001, 0.004, 0.008, 0.012, 0.0005, 0.006, 0.002, 0.4, 0.5]))
    predicted = 20 * np.exp(np.array([0.002, 0.005, 0.012, 0.002, 0.004, 0.007, 0.0001, 0.01, 0.4, 0.5]))
    rows = predicted_rows(predicted, measured, np.linspace(0.99, 0.8, 10), 20.0)
    assert calibration(rows, "perplexity").error == pytest.approx(0.0)


@pytest.mark.parametrize("seed", range(4))
def test_knee_is_nearest_to_the_ideal(seed):
    points = random_points(15, 3, seed)
    rows = make_rows(points)
    nearest = min(rows, key=lambda row: sum(value**2 for value in row.values.values()))
    assert knee(rows, unit_box(3)) is nearest


def test_knee_of_nothing_is_refused():
    with pytest.raises(InputError, match="launch"):
        knee([], unit_box(2))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("parameters<=0.8", ("parameters", "<=", 0.8)),
        (" parameters <= 0.8 ", ("parameters", "<=", 0.8)),
        ("perplexity<30", ("perplexity", "<", 30.0)),
        ("block_parameters>=.5", ("block_parameters", ">=", 0.5)),
        ("bytes>1e6", ("bytes", ">", 1e6)),
        ("latency<=+1.05", ("latency", "<=", 1.05)),
    ],
)
def test_constraints_parse(text, parsed):
    found = Constraint.parse(text)
    assert (found.figure, found.operator, found.bound) == parsed
    assert Constraint.parse(str(found)) == found


@pytest.mark.parametrize(
    "text", ["", "parameters", "parameters<=", "<=0.8", "parameters=0.8", "a<=1<=2", "a<=e", "a<=1-2"]
)
def test_what_is_no_constraint(text):
    with pytest.raises(InputError, match="does not read as FIGURE<=NUMBER") as caught:
        Constraint.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("operator", "at", "below", "above"),
    [
        ("<=", True, True, False),
        ("<", False, True, False),
        (">=", True, False, True),
        (">", False, False, True),
    ],
)
def test_constraints_hold(operator, at, below, above):
    for value, within in ((0.5, at), (0.4, below), (0.6, above)):
        constraint, (row,) = Constraint("parameters", operator, 0.5), make_rows([(1, value)])
        assert holds(row, constraint) == within
        assert (constraint.missed(value) == 0) == within


def test_constraints_reach_other_figures():
    (row,) = make_rows([(1, 0.9)], block_parameters=0.5, notes={"latency_decode": 0.8})
    assert holds(row, Constraint.parse("block_parameters<=0.5"))
    assert holds(row, Constraint.parse("latency_decode<=0.8"))


@pytest.mark.parametrize("figure", ["parametres", "seconds", "split", "notes"])
def test_what_is_no_figure_is_refused_with_the_choices(figure):
    (row,) = make_rows([(1, 0.9)], block_parameters=0.5, seconds={"apply": 1.0}, split="abc", notes={})
    with pytest.raises(InputError, match="unknown figure") as caught:
        holds(row, Constraint(figure, "<=", 1.0))
    assert "parameters" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_meeting_every_constraint():
    rows = make_rows([(10, 0.9), (20, 0.7), (30, 0.5)])
    constraints = [Constraint.parse("parameters<=0.8"), Constraint.parse("perplexity<=25")]
    assert [row.number for row in meeting(rows, constraints)] == [1]
    assert meeting(rows, []) == rows


def test_the_closest_is_named_where_none_meets():
    rows = make_rows([(10, 0.9), (20, 0.7), (30, 0.55)])
    with pytest.raises(
        InputError, match=r"no trial meets parameters<=0\.5; the closest is trial 2 with parameters=0\.55"
    ):
        meeting(rows, [Constraint.parse("parameters<=0.5")])
    with pytest.raises(InputError, match="the closest is trial 1 with") as caught:
        meeting(rows, [Constraint.parse("parameters<=0.6"), Constraint.parse("perplexity<=18")])
    assert "\n" not in str(caught.value)


def test_nothing_to_meet_is_refused():
    with pytest.raises(InputError, match="launch"):
        meeting([], [])


def test_the_frame_is_flat():
    rows = make_rows([(10, 0.9), (20, 0.95)], seconds={"apply": 1.5}, notes={"latency_spread": 0.1}, tokens=64)
    rows.append(Row(2, "failed", "tpe", None, None, failure="RuntimeError: no"))
    table = frame(rows)
    assert list(table["pareto"]) == [True, False, False]
    assert table["seconds.apply"][0] == 1.5
    assert table["notes.latency_spread"][1] == 0.1
    assert table["perplexity"][1] == 20
    assert table["failure"][2] == "RuntimeError: no"
    assert not any(isinstance(value, dict) for value in table.to_numpy().flatten())


def test_failed_trials_count_unless_interrupted():
    assert Row(0, "failed", "", None, None, failure="RuntimeError: no").counts
    assert not Row(0, "failed", "", None, None, failure=INTERRUPTED).counts
    assert not Row(0, "running", "", None, None).counts
    assert make_rows([(1, 1)])[0].counts


def test_a_trial_without_a_plan_says_so():
    with pytest.raises(InputError, match="trial 3 has no plan"):
        _ = Row(3, "failed", "", None, None).plan
