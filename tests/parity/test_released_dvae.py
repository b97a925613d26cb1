"""Our dVAE against OpenAI's modules, of the same weights: the same numbers to the last bit."""

import math

import dall_e
import pytest
import torch
import torch.nn.functional as F

from stage1_dvae.config import DVAEConfig
from stage1_dvae.likelihood import map_pixels, unmap_pixels
from stage1_dvae.model import DVAE

SIZES = [(16, 64, 32), (16, 512, 64), (64, 64, 32), (64, 512, 64)]  # hidden, vocabulary, image


def copies(hidden: int, vocab: int, size: int) -> tuple[torch.nn.Module, torch.nn.Module, DVAE]:
    """Their two halves with random weights and biases, and our dVAE with a copy of both."""
    torch.manual_seed(0)
    sizes = {"n_hid": hidden, "n_blk_per_group": 2, "vocab_size": vocab}
    encoder, decoder = dall_e.Encoder(**sizes), dall_e.Decoder(n_init=24, **sizes)
    with torch.no_grad():
        for name, p in [*encoder.named_parameters(), *decoder.named_parameters()]:
            if name.endswith("b"):
                p.normal_(std=0.1)
        mean = encoder(dall_e.map_pixels(torch.rand(1, 3, size, size))).mean((0, 2, 3))
        encoder.blocks.output.conv.b -= mean  # else a few codes win everywhere
        decoder.blocks.input.w.normal_()  # else a one-hot input hardly shows in the picture
    ours = DVAE(DVAEConfig(image_size=size, vocab_size=vocab, hidden=hidden, codebook_width=24))
    ours.encoder.load_state_dict(encoder.state_dict(), strict=True)
    ours.decoder.load_state_dict(decoder.state_dict(), strict=True)
    return encoder, decoder, ours


@pytest.mark.parametrize(("hidden", "vocab", "size"), SIZES)
@torch.no_grad()
def test_codes_and_pictures_are_theirs_bit_for_bit(hidden, vocab, size):
    encoder, decoder, ours = copies(hidden, vocab, size)
    pixels = torch.rand(2, 3, size, size)

    logits = encoder(dall_e.map_pixels(pixels))
    torch.testing.assert_close(ours.logits(pixels), logits, rtol=0, atol=0)
    codes = logits.argmax(1)
    assert len(codes.unique()) > 9
    assert torch.equal(ours.encode(pixels), codes)

    one_hot = F.one_hot(codes, num_classes=vocab).permute(0, 3, 1, 2).float()
    stats = decoder(one_hot).float()
    torch.testing.assert_close(ours.decoder(one_hot), stats, rtol=0, atol=0)
    torch.testing.assert_close(ours.decoder.look_up(codes), stats, rtol=0, atol=0)
    picture = dall_e.unmap_pixels(torch.sigmoid(stats[:, :3]))
    assert picture.std() > 0.01
    torch.testing.assert_close(ours.decode(codes), picture, rtol=0, atol=0)


@torch.no_grad()
def test_relaxed_codes_decode_to_theirs_bit_for_bit():
    _, decoder, ours = copies(16, 64, 32)
    relaxed = torch.randn(2, 64, 4, 4).softmax(1)
    torch.testing.assert_close(ours.decoder(relaxed), decoder(relaxed), rtol=0, atol=0)


def test_gradients_are_theirs():
    encoder, _, ours = copies(16, 64, 32)
    mapped = map_pixels(torch.rand(1, 3, 32, 32))
    for half in (encoder, ours.encoder):
        half(mapped).square().mean().backward()
    theirs = dict(encoder.named_parameters())
    for name, p in ours.encoder.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-5, atol=1e-8)


def test_pixels_are_mapped_as_theirs():
    pixels = torch.rand(2, 3, 5, 7)
    torch.testing.assert_close(map_pixels(pixels), dall_e.map_pixels(pixels), rtol=0, atol=0)
    torch.testing.assert_close(unmap_pixels(pixels), dall_e.unmap_pixels(pixels), rtol=0, atol=0)


def test_weights_begin_with_the_released_spread():
    torch.manual_seed(0)
    sizes = {"n_hid": 16, "n_blk_per_group": 2, "vocab_size": 512}
    theirs = {"encoder": dall_e.Encoder(**sizes), "decoder": dall_e.Decoder(n_init=24, **sizes)}
    ours = DVAE(DVAEConfig(image_size=32, vocab_size=512, hidden=16, codebook_width=24))
    for side, half in theirs.items():
        reference = half.state_dict()
        for name, w in getattr(ours, side).state_dict().items():
            other = reference.pop(name)
            assert w.shape == other.shape
            if name.endswith("b"):
                assert not w.any()
                assert not other.any()
                continue
            std = 1 / math.sqrt(w[0].numel())
            within = 5 * std / math.sqrt(2 * w.numel())  # five standard errors of a measured spread
            assert w.std().item() == pytest.approx(std, abs=within), name
            assert other.std().item() == pytest.approx(std, abs=within), name
            assert w.mean().item() == pytest.approx(0, abs=5 * std / math.sqrt(w.numel())), name
        assert not reference
