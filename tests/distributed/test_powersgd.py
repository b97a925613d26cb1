"""Compressed reduction between two machines, against its definition in double precision."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dalle.low_rank import Matrix, compressed
from dalle.minifloat import SIGNED
from dalle.overlap import InTurn
from dalle.powersgd import PowerSGD
from dalle.precision import fp32_products
from tests.distributed.machines import on_machines

pytestmark = pytest.mark.distributed

RANK, STEPS, LARGE = 4, 5, 4.0
# Name, shape of the parameter, the share held: wide, tall, with ragged ends, three matrices in one, too small
# to save, a bias.
SHARES = {
    "wide": ((12, 40), 0, 480),
    "tall": ((48, 10), 0, 480),
    "ragged": ((30, 21), 10, 521),  # whole rows 1 to 24 of 30: rank 4·24/30 = 3
    "three": ((36, 20), 95, 575),  # whole rows 5 to 32 of 36: of the first matrix 7, of the last 9
    "small": ((3, 3), 0, 9),
    "bias": ((17,), 0, 17),
}
MATRICES = {"wide": 1, "tall": 1, "ragged": 1, "three": 3, "small": 1}
RANKS = {"wide": [4], "tall": [4], "ragged": [3], "three": [2, 4, 3]}
ROWS = {"wide": [(0, 12)], "tall": [(0, 48)], "ragged": [(1, 25)], "three": [(5, 12), (12, 24), (24, 33)]}


@dataclass
class Share:
    name: str
    parameter: torch.Tensor
    grad: torch.Tensor
    offset: int


def shares(machine: int, step: int) -> list[Share]:
    """Gradients of one machine: something common to all and something of its own."""
    random = torch.Generator().manual_seed(step)
    own = torch.Generator().manual_seed(100 * (machine + 1) + step)
    made = []
    for name, (shape, offset, numel) in SHARES.items():
        common = torch.randn(shape, generator=random)
        grad = (0.3 * common + 0.1 * torch.randn(shape, generator=own)).flatten()[offset:][:numel]
        made.append(Share(name, torch.empty(shape), grad.clone(), offset))
    return made


def reducer(**options) -> PowerSGD:
    return PowerSGD(dist.group.WORLD, matrices=MATRICES, rank=RANK, **{"factors": "fp32", **options})


def seen(powersgd: PowerSGD) -> dict[str, torch.Tensor]:
    """The error sums of each parameter, one matrix after another."""
    found: dict[str, list[torch.Tensor]] = {}
    for matrix, error in powersgd._errors.items():
        found.setdefault(matrix.name, []).append(powersgd._seen(error))
    return {name: torch.cat(errors) for name, errors in found.items()}


def course(machine: int, spoil=None, early=False, **options) -> dict[str, list]:
    """Some updates: what came out, the errors after each, and the receipts.

    With `early` the means are found in several blocks before all gradients are there, wherever they may be.
    """
    powersgd = reducer(**options)
    out, errors, receipts = [], [], []
    for step in range(1, STEPS + 1):
        pieces = shares(machine, step)
        if spoil is not None:
            spoil(powersgd, pieces, machine, step)
        if early and powersgd.early:
            in_turn = InTurn()
            for block in (pieces[:2], pieces[2:3], pieces[3:]):
                in_turn.begin(powersgd.exchange(block))
            in_turn.finish()
        receipts.append(powersgd.reduce(pieces, step))
        out.append({p.name: p.grad for p in pieces})
        errors.append(seen(powersgd))
    return {"out": out, "errors": errors, "receipts": receipts}


def nan_in_a_gradient(powersgd, pieces, machine, step):
    if machine == 1 and step == 3:
        pieces[0].grad[5] = math.nan


def overflow_of_a_factor(powersgd, pieces, machine, step):
    if machine == 1 and step == 3:
        pieces[0].grad[:] = 2e38  # times Gaussian numbers it is too large for fp32


def overflow_of_the_other_factor(powersgd, pieces, machine, step):
    if machine == 1 and step == 3:  # P holds these numbers, Q the norm of all of them
        pieces[0].grad.view(12, 40)[:, 0] = 1.2e38


def large(powersgd, pieces, machine, step):
    for piece in pieces:  # sums over a row or a column then lie beyond 16, where 1-6-9 ends
        piece.grad *= LARGE


def sum_that_is_not_finite(powersgd, pieces, machine, step):
    if machine == 1 and step == 3:
        wide = next(matrix for matrix in powersgd._errors if matrix.name == "wide")
        powersgd._errors[wide][7] = math.inf


def infinite_bias(powersgd, pieces, machine, step):
    if machine == 0 and step == 2:
        pieces[-1].grad[0] = math.inf


def saved_and_loaded(machine: int) -> dict[str, dict]:
    powersgd, again = reducer(factors="16bit"), reducer(factors="16bit")
    for step in range(1, 4):
        powersgd.reduce(shares(machine, step), step)
    before = seen(powersgd)
    sums = powersgd.sums()
    pieces = shares(machine, 4)
    for piece in pieces:
        if piece.name in sums:
            offset, total = sums[piece.name]
            whole = torch.zeros(piece.parameter.numel(), dtype=torch.uint16)
            whole[offset : offset + total.numel()] = total
            shape, numel = tuple(piece.parameter.shape), piece.grad.numel()
            again.load(piece.name, shape, piece.offset, numel, whole.view(shape), machines=2)
    resumed = shares(machine, 4)
    norms = [p.reduce(each, 4).norm for p, each in ((powersgd, pieces), (again, resumed))]
    return {
        "before": before, "sums": {name: SIGNED.unpack(total) for name, (_, total) in sums.items()},
        "gone on": {p.name: p.grad for p in pieces}, "resumed": {p.name: p.grad for p in resumed},
        "norms": norms, "errors": (seen(powersgd), seen(again)),
    }  # fmt: skip


CASES = {
    "fp32": {},
    "16bit": {"factors": "16bit"},
    "large": {"factors": "16bit", "spoil": large},
    "late": {"start": 3, "sample": 2},
    "forgetful": {"feedback": False},
    "gradient": {"spoil": nan_in_a_gradient},
    "factor P": {"spoil": overflow_of_a_factor},
    "factor Q": {"spoil": overflow_of_the_other_factor},
    "sum": {"spoil": sum_that_is_not_finite},
    "bias": {"spoil": infinite_bias},
}


def everything(machine: int) -> dict[str, dict]:
    cases = {case: course(machine, **options) for case, options in CASES.items()}
    early = {f"{case}, early": course(machine, early=True, **options) for case, options in CASES.items()}
    return {**cases, **early, "saved": saved_and_loaded(machine)}


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Both machines' results of everything, from one start of two processes."""
    return on_machines(2, tmp_path_factory.mktemp("machines"), everything)


def rows(name: str, flat: torch.Tensor) -> np.ndarray:
    """The whole rows of a share."""
    shape, offset, _ = SHARES[name]
    first, last = ROWS[name][0][0], ROWS[name][-1][1]
    return flat[first * shape[1] - offset : last * shape[1] - offset].double().numpy().reshape(-1, shape[1])


def definition(steps=STEPS, feedback=True) -> list[dict[str, tuple[np.ndarray, list[np.ndarray]]]]:
    """What comes out, and both errors after it: the projection on the columns of mean(E)·Q₀."""
    errors: dict[str, list[np.ndarray]] = {}
    course = []
    for step in range(1, steps + 1):
        both, now = [shares(machine, step) for machine in (0, 1)], {}
        for i, name in enumerate(SHARES):
            if name not in RANKS:
                continue
            gradients = [rows(name, pieces[i].grad) for pieces in both]
            e = [g + old for g, old in zip(gradients, errors.get(name, (0.0, 0.0)), strict=True)]
            matrices = compressed(name, *SHARES[name], RANK, MATRICES[name])
            lows = []
            for (first, last), rank, matrix in zip(ROWS[name], RANKS[name], matrices, strict=True):
                mean = ((e[0] + e[1]) / 2)[first - ROWS[name][0][0] :][: last - first]
                turn = mean.shape[0] > mean.shape[1]
                mean = mean.T if turn else mean
                q0 = matrix.projection(0).double().numpy()
                assert q0.shape == (max(mean.shape), rank)
                basis = np.linalg.svd(mean @ q0, full_matrices=False)[0]
                low = basis @ (basis.T @ mean)
                lows.append(low.T if turn else low)
            low = np.concatenate(lows)
            errors[name] = [each - low for each in e] if feedback else [0.0, 0.0]
            now[name] = low, errors[name]
        course.append(now)
    return course


def agree(machines, case: str) -> None:
    one, other = (machine[case]["out"] for machine in machines)
    for step, (a, b) in enumerate(zip(one, other, strict=True)):
        for name in a:
            assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), (case, step, name)


@pytest.mark.parametrize("case", CASES)
def test_means_found_before_all_gradients_are_there_are_the_same_bit_for_bit(machines, case):
    for machine in machines:
        after, early = machine[case], machine[f"{case}, early"]
        for kind in ("out", "errors"):
            for a, b in zip(after[kind], early[kind], strict=True):
                for name in a:
                    assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), (kind, name)
        for a, b in zip(after["receipts"], early["receipts"], strict=True):
            assert a.norm == pytest.approx(b.norm, rel=1e-6)
            assert (a.bytes, a.plain_bytes, a.cosine) == (b.bytes, b.plain_bytes, b.cosine)


def test_factors_are_products_of_whole_operands_beside_a_pass_that_rounds_its_own():
    """Or they would differ between updates that are exchanged early and those that are not."""
    seen = []

    def work():
        seen.append(torch.get_float32_matmul_precision())
        yield
        seen.append(torch.get_float32_matmul_precision())

    with fp32_products("rounded"):
        for _ in PowerSGD(None, matrices={}, rank=1)._timed(work()):
            seen.append(torch.get_float32_matmul_precision())
    assert seen == ["highest", "medium", "highest"]


@pytest.mark.parametrize(("case", "tolerance"), [("fp32", 1e-5), ("16bit", 2e-2)])
def test_a_reduction_is_the_projection_of_the_mean_and_the_rest_waits(machines, case, tolerance):
    for step, expected in enumerate(definition()):
        for name, (low, errors) in expected.items():
            for machine, error in zip(machines, errors, strict=True):
                got = rows(name, machine[case]["out"][step][name])
                np.testing.assert_allclose(got, low, atol=tolerance * np.abs(low).max())
                held = machine[case]["errors"][step][name].double().numpy()
                np.testing.assert_allclose(held, error.reshape(-1), atol=tolerance * np.abs(low).max())


def test_factors_may_be_larger_than_their_format_in_16_bits(machines):
    """They travel times a power of two, so that the same bits come out, but for the scale."""
    for plain, large in zip(machines[0]["16bit"]["out"], machines[0]["large"]["out"], strict=True):
        for name in RANKS:
            assert torch.equal(large[name], LARGE * plain[name])


def test_without_feedback_every_step_is_a_projection_of_its_own_gradient(machines):
    for step, expected in enumerate(definition(feedback=False)):
        for name, (low, _) in expected.items():
            got = rows(name, machines[0]["forgetful"]["out"][step][name])
            np.testing.assert_allclose(got, low, atol=1e-5)


@pytest.mark.parametrize("case", ["fp32", "16bit", "late", "forgetful", "saved"])
def test_both_machines_end_with_the_same_bits(machines, case):
    if case == "saved":
        for kind in ("gone on", "resumed"):
            one, other = (machine[case][kind] for machine in machines)
            assert all(torch.equal(one[name], other[name]) for name in one)
    else:
        agree(machines, case)


@pytest.mark.parametrize("case", ["fp32", "16bit"])
def test_biases_small_matrices_and_ragged_ends_are_averaged_in_full(machines, case):
    for step in range(STEPS):
        a, b = ({p.name: p.grad for p in shares(machine, step + 1)} for machine in (0, 1))
        out = machines[0][case]["out"][step]
        whole, head, tail = slice(None), slice(0, 11), slice(515, None)
        parts = [("small", whole), ("bias", whole), ("ragged", head), ("ragged", tail)]
        for name, part in [*parts, ("three", slice(0, 5)), ("three", slice(565, None))]:
            torch.testing.assert_close(out[name][part], (a[name] + b[name])[part] / 2, rtol=1e-6, atol=1e-7)


# Numbers that an update sends: r·(rows + columns) for each matrix, and all others.
FACTORS = 4 * (12 + 40) + 4 * (48 + 10) + 3 * (24 + 21) + 2 * (7 + 20) + 4 * (12 + 20) + 3 * (9 + 20)
REST = 9 + 17 + 521 - 24 * 21 + 575 - 28 * 20


@pytest.mark.parametrize(("case", "size", "tolerance"), [("fp32", 4, 1e-5), ("16bit", 2, 2e-3)])
def test_bytes_follow_the_formula_and_the_norm_comes_from_q(machines, case, size, tolerance):
    for machine in machines:
        for out, receipt in zip(machine[case]["out"], machine[case]["receipts"], strict=True):
            assert receipt.bytes == size * FACTORS + 4 * REST
            assert receipt.plain_bytes == 4 * (480 + 480 + 521 + 575 + 9 + 17)
            norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in out.values()))
            assert receipt.norm == pytest.approx(norm, rel=tolerance)


def test_before_the_start_everything_is_averaged_in_full(machines):
    for step in range(3):
        a, b = ({p.name: p.grad for p in shares(machine, step + 1)} for machine in (0, 1))
        for name, grad in machines[0]["late"]["out"][step].items():
            torch.testing.assert_close(grad, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7)
        assert not machines[0]["late"]["errors"][step]
        receipt = machines[0]["late"]["receipts"][step]
        assert receipt.bytes == receipt.plain_bytes
    assert machines[0]["late"]["receipts"][3].bytes == 4 * (FACTORS + REST)


def test_sampled_receipts_hold_the_cosine_with_the_true_mean_and_the_time_of_a_plain_one(machines):
    receipts = machines[0]["late"]["receipts"]
    assert [receipt.plain_seconds is not None for receipt in receipts] == [False, True, False, True, False]
    assert [receipt.cosine is not None for receipt in receipts] == [False, False, False, True, False]
    a, b = ({p.name: p.grad for p in shares(machine, 4)} for machine in (0, 1))
    true = np.concatenate([rows(name, (a[name] + b[name]) / 2).ravel() for name in RANKS])
    got = np.concatenate([rows(name, machines[0]["late"]["out"][3][name]).ravel() for name in RANKS])
    assert receipts[3].cosine == pytest.approx(
        true @ got / np.linalg.norm(true) / np.linalg.norm(got), rel=1e-4
    )
    assert receipts[3].cosine < 0.99


def norms(machines, case):
    for machine in machines:
        yield [receipt.norm for receipt in machine[case]["receipts"]]


def test_a_gradient_that_is_not_finite_drops_the_update_and_enters_no_sum(machines):
    for each in norms(machines, "gradient"):
        assert [math.isfinite(norm) for norm in each] == [True, True, False, True, True]
    agree(machines, "gradient")
    clean, hit = (machines[1][case]["errors"] for case in ("fp32", "gradient"))
    # In the third update the hit machine goes on from its sum alone, the other one from its sum and gradient.
    expected = definition()
    own = expected[1]["wide"][1][1]
    other = expected[1]["wide"][1][0] + rows("wide", shares(0, 3)[0].grad)
    mean = (own + other) / 2
    q0 = Matrix("wide", *SHARES["wide"], RANK).projection(0).double().numpy()
    basis = np.linalg.svd(mean @ q0, full_matrices=False)[0]
    left = own - basis @ (basis.T @ mean)
    np.testing.assert_allclose(hit[2]["wide"].double().numpy(), left.reshape(-1), atol=1e-5)
    assert torch.equal(hit[2]["tall"], clean[2]["tall"])  # another matrix is not touched by it


@pytest.mark.parametrize("case", ["factor P", "factor Q"])
def test_where_a_factor_is_not_finite_finite_sums_are_kept_as_they_are(machines, case):
    for each in norms(machines, case):
        assert [math.isfinite(norm) for norm in each][:3] == [True, True, False]
    for number, machine in enumerate(machines):
        before, after = (machine[case]["errors"][step]["wide"] for step in (1, 2))
        gradient = shares(number, 3)[0].grad
        if number == 1 and case == "factor P":
            gradient[:] = 2e38
        elif number == 1:
            gradient.view(12, 40)[:, 0] = 1.2e38
        torch.testing.assert_close(after, before + gradient)


def test_only_a_sum_that_is_itself_not_finite_begins_again_at_zero(machines):
    for each in norms(machines, "sum"):
        assert [math.isfinite(norm) for norm in each] == [True, True, False, True, True]
    sound, hit = (machine["sum"]["errors"] for machine in machines)
    torch.testing.assert_close(sound[2]["wide"], sound[1]["wide"] + shares(0, 3)[0].grad)
    assert not hit[2]["wide"].any()
    assert torch.equal(hit[2]["tall"], machines[1]["fp32"]["errors"][2]["tall"])
    assert hit[3]["wide"].isfinite().all()


def test_what_is_averaged_in_full_drops_the_update_too(machines):
    for each in norms(machines, "bias"):
        assert [math.isfinite(norm) for norm in each] == [True, False, True, True, True]
    for machine in machines:
        for name in RANKS:
            assert torch.equal(machine["bias"]["errors"][-1][name], machine["fp32"]["errors"][-1][name])


def test_saved_sums_are_those_over_the_machines_and_a_resumed_run_goes_on_bit_exactly(machines):
    one, other = (machine["saved"] for machine in machines)
    for name, total in one["sums"].items():
        torch.testing.assert_close(total, one["before"][name] + other["before"][name], rtol=2**-9, atol=1e-8)
        assert torch.equal(total, other["sums"][name])
    for machine in (one, other):
        assert machine["norms"][0] == machine["norms"][1]
        assert all(torch.equal(machine["gone on"][name], grad) for name, grad in machine["resumed"].items())
        gone_on, resumed = machine["errors"]
        assert all(torch.equal(gone_on[name], error) for name, error in resumed.items())
