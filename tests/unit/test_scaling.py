"""The rule of the gradient scales, and what an engine has of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle import engine as engine_module
from dalle.engine import PATIENCE, PATIENCE_WITH_SCALES, Engine
from dalle.errors import DalleError
from dalle.optim import AdamW, Average
from dalle.scaling import Rule, Scaling
from stage2_prior.loss import losses
from tests import tiny
from tests.oracles import scales_of_the_paper

BLOCKS = [f"layers.{i}.{branch}" for i in range(3) for branch in ("attention", "mlp")]


def engine(*, seed=0, micro_batches=1, clip=None) -> Engine:
    model = tiny.prior(seed)
    optimizer = AdamW(model, betas=(0.9, 0.96), weight_decay=0.0)
    scaling = Scaling(model, micro_batches)
    average = Average(model.parameters(), 0.9, 1)
    return Engine(model, optimizer, average, clip=clip, precision="fp16", scaling=scaling)


def backward(engine: Engine, seed: int, parts: int = 1):
    for tokens, codes in zip(*(t.chunk(parts) for t in tiny.batch(engine.model, 4, seed)), strict=True):
        text, image = losses(engine.model, tokens, codes)
        engine.backward(text + image, parts)


def train(engine: Engine, seeds) -> None:
    for seed in seeds:
        backward(engine, seed)
        engine.update(1e-3, seed + 1)


def log2_scales(engine: Engine) -> list[float]:
    return [math.log2(scale) for scale in engine.scaling.rule.scales]


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"{f}/{n}": t for f, group in tiny.Kept(engine).files.items() for n, t in group.items()}


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    return {piece.name: piece.grad for piece in engine.pieces()}


# Long stretches of one kind, so that clamps and rests are met.
histories = st.lists(st.tuples(st.booleans(), st.integers(1, 1500)), max_size=8)


@settings(max_examples=40)
@given(history=histories)
def test_the_rule_is_the_papers(history):
    seen = [bad for bad, times in history for _ in range(times)]
    rule = Rule(2)
    for bad in seen:
        rule.adapt([bad, False])
    sick, sound = scales_of_the_paper(seen), scales_of_the_paper([False] * len(seen))
    assert rule.scales == pytest.approx([sick[-1], sound[-1]], rel=1e-9)
    assert rule.overflows == [sum(seen), 0]


def test_a_scale_shrinks_once_in_125_updates():
    rule = Rule(1)
    seen = []
    for _ in range(400):
        rule.adapt([True])
        seen.append(math.log2(rule.scales[0]))
    falls = [i for i, (a, b) in enumerate(zip([13.0, *seen], seen, strict=False)) if b < a]
    assert falls == [0, 125, 250, 375]
    assert seen[-1] == pytest.approx(11)


def test_scales_stay_within_the_clamps():
    rule = Rule(2)
    for _ in range(20_000):
        rule.adapt([True, False])
    assert rule.scales == [2.0**7, 2.0**24]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_an_inf_in_one_resblock_shrinks_its_scale_and_drops_the_update(block, poison):
    hit = engine(clip=1.0)
    train(hit, range(2))
    before, scales = everything(hit), log2_scales(hit)
    backward(hit, 2)
    names = [n for n, _ in hit.model.named_parameters() if n.startswith((f"{block}.", f"{block}_norm."))]
    assert len(names) == 6
    gradients(hit)[names[-1]].view(-1)[3] = poison
    assert hit.update(1e-3, 3)["dropped_updates"] == 1
    assert hit.scaling.overflowed == [block]
    expected = [-0.5 if name == block else 1 / 1000 for name in BLOCKS]
    assert [b - a for a, b in zip(scales, log2_scales(hit), strict=True)] == pytest.approx(expected)
    after = everything(hit)
    kept = [n for n in before if n.startswith(("weights", "moments"))]
    assert all(torch.equal(before[n], after[n]) for n in kept)
    backward(hit, 3)
    assert hit.update(1e-3, 4)["dropped_updates"] == 0
    assert hit.per_resblock()["overflows"] == [float(name == block) for name in BLOCKS]


def test_every_parameter_of_a_resblock_tells_of_it_and_no_other():
    scaling = Scaling(tiny.prior())
    for name, p in tiny.prior().named_parameters():
        gradient = torch.zeros_like(p)
        gradient.view(-1)[-1] = math.nan
        assert scaling.update([(name, gradient), ("norm.weight", torch.ones(12))])
        owner = [block for block in BLOCKS if name.startswith((f"{block}.", f"{block}_norm."))]
        assert scaling.overflowed == owner, name
        assert scaling.outside == (not owner), name


def test_pieces_in_several_parts_and_none_at_all():
    scaling = Scaling(tiny.prior())
    assert not scaling.update([])
    broken, empty = torch.tensor([1.0, math.inf]), torch.zeros(0)
    assert scaling.update([("layers.1.mlp.up.weight", broken), ("layers.1.mlp.down.weight", empty)])
    assert scaling.overflowed == ["layers.1.mlp"]


def test_what_another_process_saw_counts_here(monkeypatch):
    """Its flags reach this one by the one exchange; the gradients here are all finite."""
    exchanged = []

    def all_reduce(flags, op):
        exchanged.append(op)
        flags[2] = 1

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    here = engine()
    before = everything(here)
    backward(here, 0)
    assert here.update(1e-3, 1)["dropped_updates"] == 1
    assert exchanged == [torch.distributed.ReduceOp.MAX]
    assert here.scaling.overflowed == [BLOCKS[2]]
    after = everything(here)
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("weights"))


def test_the_scales_make_up_for_the_division_by_micro_batches():
    """At these scales nothing over- or underflows, so the gradients are the same to rounding."""
    whole, parts = engine(), engine(micro_batches=2)
    ratio = (parts.model.layers[1].mlp.up.boundary.scale / whole.model.layers[1].mlp.up.boundary.scale).item()
    assert ratio == 2
    assert log2_scales(parts) == log2_scales(whole)
    backward(parts, 0, parts=2)
    gathered = {n: g.clone() for n, g in gradients(parts).items()}
    exact = tiny.prior()
    for tokens, codes in zip(*(t.chunk(2) for t in tiny.batch(exact, 4, 0)), strict=True):
        (sum(losses(exact, tokens, codes)) / 2).backward()
    for name, p in exact.named_parameters():
        assert (gathered[name] - p.grad).norm() <= 0.02 * p.grad.norm(), name


def test_what_is_saved_continues_bit_exactly():
    straight, resumed = engine(), engine(seed=1)
    train(straight, range(2))
    backward(straight, 2)
    gradients(straight)["layers.2.attention.out.bias"][0] = math.inf
    straight.update(1e-3, 3)
    resumed.load(tiny.Kept(straight))
    assert log2_scales(resumed) == log2_scales(straight)
    for each in (straight, resumed):
        train(each, range(3, 6))
        backward(each, 6)
        gradients(each)["layers.2.attention.out.bias"][0] = math.inf
        each.update(1e-3, 7)  # in its rest: it may not be divided again
    one, other = everything(straight), everything(resumed)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert resumed.per_resblock()["overflows"] == [0, 0, 0, 0, 2, 0]
    assert resumed.scaling.rule.scales[4] == pytest.approx(2 ** (13 - 0.5 + 5 / 1000))


def test_a_state_without_scales_resumes_with_fresh_ones():
    saved = engine()
    train(saved, range(2))
    without = tiny.Kept(saved)
    del without.files["scaling"]
    resumed = engine(seed=1)
    resumed.load(without)
    assert log2_scales(resumed) == [13.0] * 6


def overflow_for_ever(engine: Engine, name: str, limit: int) -> int:
    """Updates until the run is stopped."""
    for step in range(1, limit + 1):
        backward(engine, 0)
        gradients(engine)[name].view(-1)[0] = math.inf
        try:
            engine.update(1e-3, step)
        except DalleError as error:
            engine.complaint = str(error)
            return step
    return 0


def test_a_run_that_skips_for_ever_stops_and_names_the_resblock(monkeypatch):
    assert PATIENCE_WITH_SCALES == 500  # long enough for a scale to fall to a quarter
    monkeypatch.setattr(engine_module, "PATIENCE_WITH_SCALES", 2 * PATIENCE)
    sick = engine()
    assert overflow_for_ever(sick, "layers.1.mlp.up.weight", 3 * PATIENCE) == 2 * PATIENCE
    assert "resblock layers.1.mlp, whose scale is 2^12.5" in sick.complaint
    assert "precision=" in sick.complaint


@pytest.mark.parametrize("name", ["norm.weight", "text_head.bias", "layers.1.mlp.up.weight"])
def test_it_stops_soon_where_no_scale_can_mend_it(name):
    sick = engine()
    sick.scaling.rule.scales[3] = 2.0**7  # of layers.1.mlp: as low as it goes
    assert overflow_for_ever(sick, name, 2 * PATIENCE) == PATIENCE
    assert name in sick.complaint


def test_runs_without_scales_have_nothing_of_them():
    model = tiny.prior()
    optimizer = AdamW(model, betas=(0.9, 0.96), weight_decay=0.0)
    for precision in ("fp32", "bf16"):
        plain = Engine(model, optimizer, Average(model.parameters(), 0.9, 1), clip=None, precision=precision)
        assert plain.per_resblock() == {}
        assert "scaling" not in plain.state()
    assert all(getattr(module, "boundary", None) is None for module in model.modules())


def test_other_scales_that_can_still_fall_do_not_mend_one_that_cannot():
    scaling, broken = Scaling(tiny.prior()), torch.tensor([math.inf])
    scaling.rule.scales[3] = 2.0**7
    for hit, mendable in (((1,), True), ((1, 3), False), ((3, 5), False)):
        scaling.update([(f"{BLOCKS[i]}_norm.bias", broken) for i in hit])
        assert scaling.overflowed == [BLOCKS[i] for i in hit]
        assert scaling.mendable == mendable


def test_of_several_resblocks_the_first_is_named():
    scaling, broken = Scaling(tiny.prior()), torch.tensor([math.inf])
    scaling.rule.scales[5] = 2.0**20
    scaling.update([(f"{BLOCKS[i]}_norm.bias", broken) for i in (5, 2, 3)])
    assert scaling.describe_overflow() == f"resblock {BLOCKS[2]} and 2 more, whose scale is 2^12.5"


def test_smaller_scales_do_not_mend_a_norm_that_is_infinite_by_itself():
    """Of every gradient fp32 holds the square, of their sum it does not."""
    sick = engine()
    for step in range(1, PATIENCE + 1):
        backward(sick, 0)
        for name in ("layers.0.mlp.up.bias", "layers.1.mlp.up.bias"):
            gradients(sick)[name][0] = 1.8e19
        if step < PATIENCE:
            assert sick.update(1e-3, step)["grad_norm"] == math.inf
            assert sick.scaling.overflowed == []
    with pytest.raises(DalleError, match="in its norm alone"):
        sick.update(1e-3, PATIENCE)
