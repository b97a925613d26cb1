"""Which gradients fp16 loses, counted by octave."""

import json
import math

import pytest
import torch

from dalle.audit import Octaves, Resblock, count, describe, facts, own_scale
from stage2_prior.loss import losses
from tests import tiny


def values(n: int = 20_000) -> torch.Tensor:
    """Of octaves from 2^-70 to 2^30, and away from the borders between them."""
    random = torch.Generator().manual_seed(0)
    octave = torch.randint(-70, 30, (n,), generator=random)
    sign = torch.randint(2, (n,), generator=random) * 2.0 - 1
    return sign * torch.ldexp(1.1 + 0.8 * torch.rand(n, generator=random), octave)


@pytest.mark.parametrize("log2_scale", [-3, 0, 7, 24, 40])
def test_the_shares_are_those_of_a_cast_to_fp16(log2_scale):
    octaves, grads = Octaves(), values()
    octaves.add(torch.cat([grads, torch.zeros(99)]))  # what is 0 in fp32 too is not lost
    cast = (grads.double() * 2.0**log2_scale).half()
    denormal = (cast != 0) & (cast.abs() < torch.finfo(torch.float16).smallest_normal)
    lost = octaves.lost(log2_scale)
    found = (lost.zero, lost.denormal, lost.overflow)
    expected = [mask.float().mean().item() for mask in (cast == 0, denormal, cast.isinf())]
    assert found == pytest.approx(expected, abs=1e-6)
    assert all(share > 0 for share in found)


def test_the_largest_and_the_middle_octave():
    octaves = Octaves()
    assert octaves.largest is octaves.median is None
    octaves.add(torch.tensor([0.0, -0.3, 0.4, 0.26, 1.0, 70.0, -2.0]))
    assert (octaves.largest, octaves.median) == (6, -2)
    octaves.add(torch.tensor([math.inf, math.nan]))
    assert octaves.largest == 128


def test_gradients_are_counted_at_both_ends_of_every_branch_and_of_its_matrices():
    model = tiny.prior()
    tokens, codes = tiny.batch(model, 4)

    def loss(part):
        text, image = losses(model, tokens[part], codes[part])
        return text + image

    found = count(model.resblocks(), [lambda: loss(slice(2)), lambda: loss(slice(2, 4))])
    assert list(found) == list(model.resblocks())
    assert all(p.grad is None for layer in model.layers for p in layer.parameters())
    once = count(model.resblocks(), [lambda: loss(slice(2))])

    seen = {}

    def keep_gradient(key):
        def hook(module, inputs, output):
            output.register_hook(lambda grad: seen.update({key: grad}))

        return hook

    for name, ends in model.resblocks().items():
        for module in ends:
            module.register_forward_hook(keep_gradient((name, module)))
    loss(slice(2)).backward()
    for name, ends in model.resblocks().items():
        activations = torch.cat([seen[name, module] for module in ends])
        matrices = [p.grad for module in ends for p in module.parameters() if p.ndim > 1]
        octaves = once[name].activations
        assert int(octaves.counts.sum()) == int(activations.count_nonzero())
        assert octaves.largest == math.floor(math.log2(activations.abs().max()))
        assert int(once[name].weights.counts.sum()) == sum(int(m.count_nonzero()) for m in matrices)
        assert (found[name].activations.counts - octaves.counts).min() >= 0
        assert found[name].activations.counts.sum() > octaves.counts.sum()


def a_resblock(*octaves: int) -> Resblock:
    resblock = Resblock()
    resblock.activations.add(torch.tensor([1.5 * 2.0**octave for octave in octaves]))
    resblock.weights.add(torch.tensor([2.0 ** octaves[0]]))
    return resblock


def test_one_scale_is_bound_by_the_largest_of_all_and_its_own_by_the_clamps():
    early, late, flat = a_resblock(3, 0), a_resblock(-37, -38), a_resblock(20)
    assert [own_scale(r) for r in (early, late, flat)] == [12, 24, 7]
    said = facts({"early": early, "late": late})
    assert said["one_log2_scale"] == 12
    assert said["resblocks"]["late"]["one_scale"]["activations"] == {
        "zero": 0.5, "denormal": 0.5, "overflow": 0.0,
    }  # fmt: skip
    assert said["resblocks"]["late"]["own_scale"]["activations"]["denormal"] == 0.0
    assert json.loads(json.dumps(said)) == said


def test_the_table_has_a_line_for_every_resblock():
    said = {"run": "R", "pictures": 64, **facts({"early": a_resblock(3), "late": a_resblock(-50)})}
    lines = describe(said).splitlines()
    early, late = (next(line.split() for line in lines if line.startswith(n)) for n in ("early", "late"))
    assert early[:3] == ["early", "3", "3"]
    assert late[3:8] == ["2^12", "100.0%", "(0.0%)", "100.0%", "(0.0%)"]
    assert late[8] == "2^24"
    silent = {"run": "R", "pictures": 1, **facts({"early": a_resblock(3), "silent": Resblock()})}
    assert "none" in describe(silent)
