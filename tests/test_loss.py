"""The loss of the pixels against loops over images and pixels in float64."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import metric
from measurement.cost import PeakOfTensors

# Shares are of few binary digits, so that share * pixels is exact.
WAYS = {
    'plain': {},
    'weights': {'weights': (0.5, 2.0, 1.0, 0.0, 1.25)},
    'one weight': {'weights': (0.25,)},
    'share': {'kept': 0.375},
    'whole share': {'kept': 1.0},
    'share, least': {'kept': 0.125, 'least': 40},
    'share, weights': {'kept': 0.5, 'weights': (0.5, 2.0, 1.0, 3.0, 1.25)},
    'threshold': {'below': 0.2},
    'threshold that few reach': {'below': 0.01, 'least': 25},
    'threshold that none reaches': {'below': 1e-9},
    'threshold, weights': {'below': 0.1, 'weights': (0.5, 2.0, 1.0, 3.0, 1.25)},
    'more than there are': {'below': 0.1, 'least': 10000},
}


def make_batch(n=4, size=(9, 12), n_classes=5):
    """Logits of some contrast; the last image has not one valid pixel."""
    draw = np.random.default_rng(11)
    logits = torch.from_numpy(3 * draw.standard_normal((n, n_classes, *size)))
    labels = torch.from_numpy(draw.integers(0, n_classes, (n, *size), np.uint8))
    labels[0, :4] = 255
    labels[1, :, 5] = 255
    labels[2, 2:] = 255
    labels[-1] = 255
    return logits, labels


def naive_loss(logits, labels, weights=(1.0,), kept=0.0, below=0.0, least=0):
    """Return what each image costs (b,) and the gradient (b, classes, h, w) of each."""
    logits, labels = logits.double().numpy(), labels.numpy()
    n, n_classes, h, w = logits.shape
    values, gradient = [], np.zeros(logits.shape)
    for b in range(n):
        pixels = []
        for y in range(h):
            for x in range(w):
                truth = int(labels[b, y, x])
                if truth == 255:
                    continue
                powers = [math.exp(v) for v in logits[b, :, y, x]]
                chances = [p / sum(powers) for p in powers]
                pixels.append((chances[truth], y, x, truth, chances))
        pixels.sort(key=lambda pixel: pixel[0])  # the hardest first
        times = 1.0
        if kept or below:
            if kept:
                n_kept = math.ceil(kept * len(pixels))
            else:
                n_kept = sum(chance < below for chance, *_ in pixels)
            pixels = pixels[:max(n_kept, least)]
            times = h * w / max(len(pixels), 1)
        value = 0.0
        for chance, y, x, truth, chances in pixels:
            weight = times * (weights[truth] if len(weights) > 1 else weights[0])
            value -= weight * math.log(chance)
            for c in range(n_classes):
                gradient[b, c, y, x] = weight * (chances[c] - (c == truth))
        values.append(value)
    return np.array(values), gradient


@pytest.mark.parametrize('way', list(WAYS))
def test_loss_and_gradient(way):
    """The values, and the gradient of every pixel: 0 where it is not kept."""
    logits, labels = make_batch()
    wanted, gradient = naive_loss(logits, labels, **WAYS[way])
    logits.requires_grad_()
    found = metric.PixelLoss(**WAYS[way])(logits, labels)
    assert found.shape == (4,)
    assert np.allclose(found.detach().numpy(), wanted, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert np.allclose(logits.grad.numpy(), gradient, rtol=1e-10, atol=1e-12)
    is_learned = (logits.grad != 0).any(1).numpy()
    assert np.array_equal(is_learned, (gradient != 0).any(1))
    assert found[-1] == 0 and (wanted[:-1] > 0).all() == ('none' not in way)


def test_ways_differ():
    """The cases above are not one case: each keeps another set or weighs it so."""
    logits, labels = make_batch()
    found = {way: tuple(naive_loss(logits, labels, **words)[0].round(6))
             for way, words in WAYS.items()}
    assert found['more than there are'] == found['whole share']  # all valid ones
    assert len(set(found.values())) == len(WAYS) - 1
    n_kept = {way: [(naive_loss(logits, labels, **WAYS[way])[1][b] != 0).any(0).sum()
                    for b in range(4)] for way in WAYS}
    n_valid = [60, 99, 24, 0]
    assert n_kept['plain'] == n_kept['whole share'] == n_valid
    assert n_kept['share'] == [23, 38, 9, 0]
    assert n_kept['share, least'] == [40, 40, 24, 0]
    assert n_kept['more than there are'] == n_valid
    assert n_kept['threshold that few reach'] == [25, 37, 24, 0]  # least, else more
    assert all(0 < k < n for k, n in
               zip(n_kept['threshold'][:3], n_valid[:3], strict=True))


@pytest.mark.parametrize('way', list(WAYS))
def test_division_of_the_batch_changes_nothing(way):
    logits, labels = make_batch()
    loss = metric.PixelLoss(**WAYS[way])
    whole = loss(logits, labels)
    for parts in (2, 4):
        found = torch.cat([loss(x, y) for x, y in zip(
            logits.chunk(parts), labels.chunk(parts), strict=True)])
        assert torch.allclose(found, whole, rtol=1e-13, atol=0)
    order = [2, 0, 3, 1]
    assert torch.allclose(loss(logits[order], labels[order]), whole[order], rtol=1e-13)


@pytest.mark.parametrize('n_rows', [1, 4, 64])
@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('small', [(3, 4), (9, 12), (1, 2)])
@pytest.mark.parametrize('way', ['plain', 'weights', 'share, weights', 'threshold'])
def test_logits_are_enlarged(way, small, align_corners, n_rows, monkeypatch):
    """As F.interpolate would, and the gradient comes back through it."""
    monkeypatch.setattr(metric, 'N_ROWS', n_rows)
    draw = torch.Generator().manual_seed(5)
    small = 3 * torch.randn(4, 5, *small, dtype=torch.float64, generator=draw)
    labels = make_batch()[1]
    one, other = (small.clone().requires_grad_() for _ in range(2))
    large = F.interpolate(one, labels.shape[1:], mode='bilinear',
                          align_corners=align_corners)
    wanted, gradient = naive_loss(large.detach(), labels, **WAYS[way])
    images = torch.tensor([1.0, 0.5, 2.0, -1.0], dtype=torch.float64)
    large.backward(torch.from_numpy(gradient) * images[:, None, None, None])
    found = metric.PixelLoss(**WAYS[way])(other, labels, align_corners)
    assert np.allclose(found.detach().numpy(), wanted, rtol=1e-12, atol=1e-12)
    (found * images).sum().backward()
    assert torch.allclose(other.grad, one.grad, rtol=1e-10, atol=1e-12)


def test_the_plain_loss_in_float32():
    """Within the rounding of float32 of what torch computes at the full size."""
    draw = torch.Generator().manual_seed(6)
    one = 4 * torch.randn(2, 21, 17, 23, generator=draw)
    labels = torch.randint(21, (2, 129, 177), generator=draw, dtype=torch.uint8)
    labels[:, 50:70] = 255
    other = one.clone().requires_grad_()
    one.requires_grad_()
    large = F.interpolate(one, labels.shape[1:], mode='bilinear', align_corners=True)
    wanted = F.cross_entropy(large, labels.long(), ignore_index=255,
                             reduction='none').sum((1, 2))
    found = metric.PixelLoss()(other, labels)
    assert torch.allclose(found, wanted, rtol=1e-5)
    wanted.sum().backward()
    found.sum().backward()
    assert (one.grad - other.grad).abs().max() < 1e-5 * one.grad.abs().max()


@pytest.mark.parametrize('way', ['plain', 'share, weights'])
def test_the_enlarged_logits_are_never_there(way):
    """Forward and backward together take less than they would (OHEM sorts pixels)."""
    logits = torch.zeros(1, 21, 33, 33, requires_grad=True)
    labels = torch.zeros(1, 500, 500, dtype=torch.uint8)
    with PeakOfTensors() as tensors:
        metric.PixelLoss(**WAYS[way])(F.pad(logits, (1, 0)), labels).sum().backward()
    pixels = 21 * labels.numel() * 4
    assert tensors.peak < (0.7 if way == 'plain' else 1.0) * pixels
    with PeakOfTensors() as tensors:
        large = F.interpolate(logits, labels.shape[1:], mode='bilinear')
        F.cross_entropy(large, labels.long()).backward()
    assert tensors.peak > 2 * pixels


@pytest.mark.parametrize('way', list(WAYS))
def test_float32_and_the_type_of_the_labels(way):
    logits, labels = make_batch()
    wanted, _ = naive_loss(logits.float(), labels, **WAYS[way])
    loss = metric.PixelLoss(**WAYS[way])
    found = loss(logits.float(), labels)
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), wanted, rtol=1e-5)
    assert torch.equal(found, loss(logits.float(), labels.long()))


def test_saturated_pixels_take_no_share():
    """Pixels of one loss (exactly 0 once they are learned) do not widen the share.

    Of 100 pixels 10 are hard; the other 90 cost the very same. Half of them are kept:
    whichever 40 of the 90, the mean is over 50.
    """
    logits = torch.zeros(1, 2, 10, 10, dtype=torch.float64)
    logits[:, 0] = 80.0             # the loss is 0 to the last bit
    logits[:, :, 0] = 0.0           # ln 2
    labels = torch.zeros(1, 10, 10, dtype=torch.uint8)
    found = metric.PixelLoss(kept=0.5)(logits, labels)
    assert math.isclose(found.item(), 100 * 10 * math.log(2) / 50)
    found = metric.PixelLoss(below=0.7, least=25)(logits, labels)
    assert math.isclose(found.item(), 100 * 10 * math.log(2) / 25)


@pytest.mark.parametrize('words', [{'kept': 1.0}, {'below': 0.7, 'least': 1000}])
def test_ignored_pixels_are_not_among_the_kept(words):
    """Also where a learned pixel costs as little as an ignored one: exactly nothing."""
    logits = torch.zeros(1, 2, 10, 10, dtype=torch.float64)
    logits[:, 0, 5:] = 800.0        # the loss is 0 to the last bit
    labels = torch.zeros(1, 10, 10, dtype=torch.uint8)
    labels[:, :, :3] = 255
    found = metric.PixelLoss(**words)(logits, labels)  # 35 pixels of ln 2 among 70
    assert math.isclose(found.item(), 100 * 35 * math.log(2) / 70)


@pytest.mark.parametrize('words', [
    {}, {'kept': 0.25}, {'below': 0.5, 'least': 3}, {'below': 0.5},
    {'weights': (1.0, 0.0, 0.0, 0.0, 0.0)}])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_seen(value, words):
    """OHEM must not drop the pixel that shows that a step is broken."""
    logits, labels = make_batch()
    logits[1, (int(labels[1, 3, 3]) + 1) % 5, 3, 3] = value
    found = metric.PixelLoss(**words)(logits, labels)
    assert found.isfinite().tolist() == [True, False, True, True]


def test_weights_are_no_part_of_a_checkpoint():
    """They are of settings, and move with the network."""
    loss = metric.PixelLoss((0.5, 2.0))
    assert not loss.state_dict()
    assert {b.device.type for b in loss.to('meta').buffers()} == {'meta'}
