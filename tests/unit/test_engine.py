"""What one update does to a model."""

import math

import pytest
import torch
from torch import nn

from dalle.engine import PATIENCE, Engine
from dalle.errors import DalleError
from dalle.optim import AdamW, Average
from dalle.powersgd import PowerSGD
from tests import tiny


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def engine(model=None, *, clip=None, precision="fp32", limit=None, every=1) -> Engine:
    model = model or net()
    optimizer = AdamW(model, betas=(0.9, 0.96), weight_decay=4.5e-2, variance_limit=limit)
    return Engine(model, optimizer, Average(model.parameters(), 0.9, every), clip=clip, precision=precision)


def pull(engine: Engine, *vectors, scale=1.0):
    """A loss whose gradient is `scale` times ones, for every parameter."""
    engine.backward(scale * sum(p.sum() for p in engine.parameters), 1)


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    return {
        f"{f}:{n}": part.values.clone() for f, group in engine.state().items() for n, part in group.items()
    }


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batches_add_up_to_the_batch(parts):
    torch.manual_seed(1)
    x, y = torch.randn(6, 5), torch.randn(6, 1)
    whole, split = engine(clip=0.1), engine(clip=0.1)
    for step in range(1, 4):
        whole.backward((whole.model(x) - y).square().mean(), 1)
        for some_x, some_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            split.backward((split.model(some_x) - some_y).square().mean(), parts)
        norms = [e.update(1e-2, step)["grad_norm"] for e in (whole, split)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for a, b in zip(whole.parameters, split.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_do_not_leak_into_the_next_update():
    twice = engine()
    for step in (1, 2):
        pull(twice)
        assert twice.update(1e-2, step)["grad_norm"] == pytest.approx(math.sqrt(22))


@pytest.mark.parametrize(
    ("clip", "norm"), [(None, 3 * math.sqrt(22)), (4.0, 4.0), (1000.0, 3 * math.sqrt(22))]
)
def test_the_gradients_norm_is_clipped_and_reported_as_it_was(clip, norm):
    clipped, seen = engine(clip=clip), []
    clipped.optimizer.register_step_pre_hook(
        lambda *_: seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in clipped.parameters)))
    )
    pull(clipped, scale=3.0)
    assert clipped.update(1e-2, 1)["grad_norm"] == pytest.approx(3 * math.sqrt(22))
    assert seen == [pytest.approx(norm, rel=1e-5)]


def test_backward_passes_round_fp32_operands_where_forward_passes_do():
    for precision in ("fp32", "bf16", "fp16"):
        one, seen = engine(precision=precision), []
        torch.set_float32_matmul_precision("highest")

        def forward(one=one, seen=seen):
            weight = one.parameters[0] * 1.0
            weight.register_hook(lambda _: seen.append(torch.backends.mkldnn.matmul.fp32_precision))
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return weight.sum()

        one.backward(one.run(forward), 1)
        assert seen == [seen[0]] * 2
        assert (seen[0] == "bf16") == (precision == "bf16")


def test_what_several_machines_left_unsent_is_kept_until_an_update_is_made():
    plain, owing = engine(), engine()
    owing.compression = PowerSGD(None, matrices={"0.weight": 1}, rank=1, factors="fp32")
    left = torch.arange(15.0).view(3, 5)
    owing.compression.load("0.weight", (3, 5), 0, 15, left, machines=2)
    pull(owing, scale=math.inf)
    owing.update(1e-2, 1)
    assert torch.equal(owing.state()["errors"]["0.weight"].values.view(3, 5), left / 2)
    for each in (plain, owing):
        pull(each)
    plain.named["0.weight"].grad += left / 2
    norms = [each.update(1e-2, 2)["grad_norm"] for each in (plain, owing)]
    assert norms[0] == pytest.approx(norms[1])
    assert "errors" not in owing.state()
    for a, b in zip(plain.parameters, owing.parameters, strict=True):
        assert torch.equal(a, b)


def test_the_step_size_is_that_of_the_update():
    still, moved = engine(), engine()
    for each, lr in ((still, 0.0), (moved, 0.25)):
        before = [p.detach().clone() for p in each.parameters]
        pull(each)
        each.update(lr, 1)
        # Adam's first update is lr·sign(g); vectors are not decayed
        assert (before[1] - each.parameters[1]).tolist() == pytest.approx([lr] * 3)


def test_the_variance_limit_holds_for_clipped_gradients():
    limited = engine(nn.Linear(1, 1, bias=False), clip=4.0, limit=5.0)
    for step in range(1, 30):
        pull(limited, scale=50.0)
        limited.update(1e-3, step)
        expected = min(16 * (1 - 0.96**step), 5.0)
        assert limited.state()["moments"]["weight/exp_avg_sq"].values.item() == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments(poison, clip):
    hit, spared = engine(clip=clip), engine(clip=clip)
    for each in (hit, spared):
        pull(each)
        each.update(1e-2, 1)
    before = everything(hit)
    pull(hit)
    hit.parameters[2].grad[0, 1] = poison
    health = hit.update(1e-2, 2)
    assert health["dropped_updates"] == 1
    assert not math.isfinite(health["grad_norm"])
    after = everything(hit)
    assert_equal(
        {k: v for k, v in before.items() if not k.startswith("average")},
        {k: v for k, v in after.items() if not k.startswith("average")},
    )
    for each in (hit, spared):
        pull(each)
        assert each.update(1e-2, 3)["dropped_updates"] == 0
    assert_equal(
        {k: v for k, v in everything(hit).items() if not k.startswith("average")},
        {k: v for k, v in everything(spared).items() if not k.startswith("average")},
    )


def test_the_average_takes_in_the_weights_when_it_is_time_whatever_became_of_the_update():
    one = engine(every=2)
    begun = one.average.weights[0].clone()
    for step, scale in ((1, 1.0), (2, math.nan)):
        pull(one, scale=scale)
        one.update(0.1, step)
    assert one.dropped == 1
    expected = torch.lerp(begun, one.parameters[0].detach(), 1 - 2 / 11)
    torch.testing.assert_close(one.average.weights[0], expected)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_after_a_few_dropped_updates_in_a_row_the_culprit_is_named(poison, clip):
    sick = engine(clip=clip, precision="bf16")

    def update(step):
        pull(sick)
        sick.parameters[2].grad[0, 1] = poison
        return sick.update(1e-2, step)

    assert [update(t)["dropped_updates"] for t in range(1, PATIENCE)] == list(range(1, PATIENCE))
    with pytest.raises(
        DalleError, match=rf"in {PATIENCE} updates in a row, first in 2\.weight \(1 param"
    ) as caught:
        update(PATIENCE)
    assert "precision=fp32" in str(caught.value)


def test_a_sound_update_in_between_forgives_the_dropped_ones():
    shaky = engine()
    for step in range(1, 3 * PATIENCE):
        pull(shaky)
        if step % PATIENCE:
            shaky.parameters[0].grad[0, 0] = math.nan
        shaky.update(1e-2, step)


def test_finite_gradients_of_an_infinite_norm_are_dropped_and_reported():
    huge = engine()
    for step in range(1, PATIENCE):
        pull(huge, scale=3e38)
        assert huge.update(1e-2, step)["grad_norm"] == math.inf
    pull(huge, scale=3e38)
    with pytest.raises(DalleError, match="in its norm alone: start another --run with a lower") as caught:
        huge.update(1e-2, PATIENCE)
    assert "precision" not in str(caught.value)  # it runs in fp32 already


def test_averaged_weights_are_lent_and_the_trained_ones_return():
    lent = engine()
    start = [p.detach().clone() for p in lent.parameters]
    for step in range(1, 4):
        pull(lent)
        lent.update(0.1, step)
    trained = [p.detach().clone() for p in lent.parameters]
    with lent.averaged() as model:
        assert not model.training
        assert torch.is_inference_mode_enabled()
        for p, average, first, last in zip(
            model.parameters(), lent.average.weights, start, trained, strict=True
        ):
            assert torch.equal(p, average)
            assert not torch.equal(p, last)
            assert ((p < first) & (p > last)).all()  # between the start and the end of a straight road
    assert lent.model.training
    for p, last in zip(lent.parameters, trained, strict=True):
        assert torch.equal(p, last)


def test_the_trained_weights_return_from_an_error_too():
    lent = engine()
    pull(lent)
    lent.update(0.1, 1)
    before = everything(lent)
    with pytest.raises(KeyboardInterrupt), lent.averaged():
        raise KeyboardInterrupt
    assert_equal(before, everything(lent))
    assert lent.model.training


def test_training_goes_on_after_averaged():
    plain, lent = engine(), engine()
    for step in range(1, 4):
        for each in (plain, lent):
            pull(each)
            each.update(0.1, step)
        with lent.averaged() as model:
            model(torch.ones(2, 5))
    assert_equal(everything(plain), everything(lent))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_saved_continues_bit_exactly(layout):
    def fresh(seed):
        torch.manual_seed(seed)
        return engine(
            nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 1, 3)).to(memory_format=layout), clip=1.0
        )

    def train(each, steps):
        for step in steps:
            torch.manual_seed(step)
            each.backward(each.model(torch.randn(2, 3, 7, 5)).square().mean(), 1)
            each.update(0.1, step)

    straight, resumed = fresh(0), fresh(1)
    train(straight, range(1, 4))
    resumed.load(tiny.Kept(straight))
    assert_equal(everything(straight), everything(resumed))
    train(straight, range(4, 6))
    train(resumed, range(4, 6))
    assert_equal(everything(straight), everything(resumed))


def test_forward_passes_run_in_the_chosen_precision():
    x = torch.ones(2, 5)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        each = engine(precision=precision)
        with each.arithmetic():
            assert each.model(x).dtype == dtype
        with each.averaged() as model:
            assert model(x).dtype == dtype
        assert all(p.dtype == torch.float32 for p in each.parameters)


def test_a_parameter_without_a_gradient_is_left_alone_though_it_had_one_before():
    one = engine()
    pull(one)
    one.update(0.1, 1)
    before = [p.detach().clone() for p in one.parameters]
    one.backward(sum(p.sum() for p in one.parameters[1:]), 1)
    one.update(0.1, 2)
    same = [torch.equal(p, old) for p, old in zip(one.parameters, before, strict=True)]
    assert same == [True, False, False, False]
