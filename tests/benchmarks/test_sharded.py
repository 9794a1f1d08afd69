"""What is counted of sharded models: by hand, in closed form, and by ranks that are there."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.architectures import next_token_loss
from benchmarks.sharded import __main__ as command
from benchmarks.sharded import formulas, measured, pieces, shadow, tables
from benchmarks.sharded.dry import dry_run
from benchmarks.sharded.formulas import Hardware, Traffic, counted, traffic
from benchmarks.sharded.meter import Counts, Meter
from benchmarks.sharded.models import SHAPES, Shape, batch, made, sharded
from tests import processes  # noqa: F401 (makes the server that ranks are forked from)

TINY = Shape(width=16, layers=2, heads=2, vocabulary=23, length=8, sequences=2)
DEEP = Shape(width=8, layers=3, heads=2, vocabulary=11, length=4)

SMALL = Shape(width=16, layers=1, heads=2, vocabulary=23, length=8, sequences=2)

# --- the meter ------------------------------------------------------------------------------------


def test_the_meter_counts_what_is_allocated_inside_and_what_is_left():
    outside = torch.ones(1000)
    meter = Meter()

    def work():
        first = outside + 1  # 4,000 bytes
        second = first.view(10, 100) * 2  # beside it
        del first
        third = torch.zeros(500)  # in the place of the first
        work.kept = third
        return second.sum() + third.sum()

    with meter:
        found = pieces.counted(meter, work)
        assert found.left == 2000
        assert 8000 <= found.peak < 8100
        assert pieces.counted(meter, lambda: outside.view(10, 100)).peak == 0
    assert found.touched == sum(map(sum, ((4000, 4000), (4000, 4000), (2000,), (4000, 4)))) + (
        2000 + 4 + 3 * 4
    )
    assert found.operations == 6


def test_the_meter_counts_operations_of_matrix_products_and_collectives_in_order():
    with dry_run(4) as meter:
        a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
        a @ b
        dist.all_reduce(torch.empty(6, device="meta"))
        every = torch.empty(40, device="meta")
        dist.all_gather_into_tensor(every, torch.empty(10, device="meta"))
        dist.reduce_scatter_tensor(torch.empty(10, device="meta"), every)
    assert meter.counts.flops == 2 * 3 * 5 * 7
    assert meter.counts.collectives == [("sum", 24), ("gather", 160), ("scatter", 160)]


def test_a_streamed_product_leaves_nothing_behind():
    """What it saves must not hold its graph: no garbage collector would ever find that."""
    with dry_run(2) as meter:
        model = sharded(made(TINY, "meta"), 2)
        operator = pieces.operator_of(model, batch(TINY, "meta"), 0)
        vectors = torch.empty(2, operator.parameters.size_here, device="meta")
        with operator.frozen():
            operator.matmat(vectors)
            assert pieces.counted(meter, lambda: operator.matmat(vectors)).left == 0


# --- closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, DEEP, *SHAPES.values()])
def test_the_shapes_are_those_of_the_model(shape):
    model = made(shape, "meta")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    root = [tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("blocks.")]
    block = [tuple(p.shape) for p in model.blocks[0].parameters()]
    assert sorted(root) == sorted(shape.root_shapes)
    assert sorted(block) == sorted(shape.block_shapes)


def test_the_large_models_have_the_size_of_their_names():
    assert math.isclose(SHAPES["1B"].parameters, 1e9, rel_tol=0.02)
    assert math.isclose(SHAPES["10B"].parameters, 1e10, rel_tol=0.02)


@pytest.mark.parametrize("shape", [TINY, DEEP])
def test_the_operations_of_a_forward_pass_are_those_that_torch_counts(shape):
    model, (x, y) = made(shape), batch(shape)
    counter = FlopCounterMode(display=False)
    # Fused attention is counted as it is written out; that has no second derivative.
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        next_token_loss(model(x), y)
    assert formulas.forward_flops(shape) == counter.get_total_flops()


def test_shards_are_padded_to_the_largest():
    assert formulas.padded([(5, 3), (2,)], 2) == 4 * (6 * 3 + 2)
    assert formulas.padded([(5, 3), (2,)], 4) == 4 * (8 * 3 + 4)


@pytest.mark.parametrize(
    ("shape", "ranks", "batches"), [(SMALL, 1, 1), (SMALL, 3, 2), (DEEP, 8, 1)]
)
def test_the_closed_forms_are_what_the_package_does(shape, ranks, batches):
    with dry_run(ranks) as meter:
        model, data = sharded(made(shape, "meta"), ranks), [batch(shape, "meta")] * batches
        for case, budget in measured.CASES.items():
            parts, operator = pieces.products(model, data, budget, meter)
            operator.release()
            for piece, counts in parts.items():
                expected = traffic(piece, shape, ranks, kept=case == "kept", batches=batches)
                assert counted(counts) == expected, (case, piece)


def test_seconds_are_the_longer_of_arithmetic_and_memory_and_then_the_rings():
    counts = Counts([("gather", 400), ("sum", 40)])
    counts.work.update({(1000, 10): 2, (0, 60): 3})
    hardware = Hardware(flops=100, memory=20, link=95, latency=0.5, call=0.25)
    found = formulas.seconds(counts, 4, hardware)
    assert found["compute"] == 2 * (0.25 + 10) + 3 * (0.25 + 3)
    assert formulas.received(counts, 4) == 0.75 * (400 + 80)
    assert found["link"] == pytest.approx(360 / 95 + 2 * 0.5)
    assert found["total"] == found["compute"] + found["link"]
    assert formulas.seconds(counts, 1, hardware)["link"] == 0


# --- solves ---------------------------------------------------------------------------------------


def diagonal(size, k):
    values = torch.cat([torch.linspace(9, 5, k), torch.linspace(1, 0, size - k)])
    return lambda vectors: vectors * values


def test_a_solve_that_is_said_to_be_larger_finds_the_same_and_is_more_careful():
    found = shadow.solved(diagonal(400, 3), 400, 400, 3)
    larger = shadow.solved(diagonal(400, 3), 400, 10**10, 3)
    for each in (found, larger):
        assert each.eigenvalues == pytest.approx([9, 7, 5], rel=1e-5)
        assert each.read[0].shape == (12, 12)
    assert larger.products >= found.products


def test_a_simulated_refresh_takes_the_products_of_the_solve_that_it_replays():
    k = 3
    solution = shadow.solved(diagonal(400, k), 400, TINY.parameters, k)
    found = measured.dry(TINY, 4, k, dict.fromkeys(measured.CASES, solution.read)).counts
    vector = 4 * TINY.parameters / 4
    for case, parts in found.items():
        block = traffic("two products", TINY, 4, kept=case == "kept")
        assert parts["refresh"].flops > solution.products * block.flops / 2 * 0.99
        # Three sums a product, beside a few at its beginning and its end.
        assert 3 * solution.products <= parts["solve"].number("sum") <= 3 * solution.products + 12
        held = formulas.vectors_of_a_solve(k) * vector
        assert held <= parts["solve"].peak <= held + 3 * vector
        assert parts["step"].number("sum") == 2
        assert parts["step"].payload("sum") == 4 * k + 3 * 8  # coefficients, and the state
        assert parts["refresh"].peak > parts["solve"].peak


# --- ranks that are there -------------------------------------------------------------------------


@pytest.mark.distributed
def test_real_ranks_do_what_simulated_ones_do():
    """Collective by collective: kinds, bytes and order; and what they compute and hold."""
    k = 1
    ranks = measured.real(SMALL, 2, k, measured.Start(), rounds=0)
    dry = measured.dry(SMALL, 2, k, ranks[0].read)
    for case, parts in ranks[0].counts.items():
        for name, counts in parts.items():
            expected = dry.counts[case][name]
            assert counts.number("sum"), (case, name)
            assert measured.alike(counts, expected, in_order=name != "refresh"), (case, name)
            # A thread of gloo may let go of a buffer late: what is held then is on one rank.
            peak = min(of.counts[case][name].peak for of in ranks)
            assert peak == pytest.approx(expected.peak, rel=0.1), (case, name)
            # The other rank has a row less of the embedding to compute with.
            assert ranks[1].counts[case][name].collectives == counts.collectives


def test_other_collectives_are_told():
    some, others = Counts([("sum", 8), ("gather", 4)]), Counts([("gather", 4), ("sum", 8)])
    assert measured.alike(some, others, in_order=False)
    assert not measured.alike(some, others, in_order=True)
    assert not measured.alike(some, Counts([("sum", 8), ("gather", 5)]), in_order=False)
    more = Counts([("sum", 8), ("gather", 4)])
    more.work[6, 1] += 1
    assert not measured.alike(some, more, in_order=True)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_what_it_has_counted(tmp_path, capsys):
    output = tmp_path / "sharded.json"
    options = ["--quick", "--ranks", "4", "--k", "2", "--check", "--link", "1e9"]
    status = command.main([*options, "--data-root", str(tmp_path), "--output", str(output)])
    assert status == 0
    result = json.loads(output.read_text())
    product = result["simulated"]["small"]["ranks"]["4"]["streamed"]["product"]
    own = traffic("product", command._QUICK, 4, kept=False)
    assert Traffic(**{name: product[name] for name in vars(own)}) == own
    assert product["seconds"]["link"] == pytest.approx(
        product["received"] / 1e9 + 30e-6 * (own.gathers + own.scatters + own.sums)
    )
    assert tables.simulated(result) in capsys.readouterr().out
