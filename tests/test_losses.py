"""The loss of the pixels against loops over images and pixels in float64."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import PixelLoss

# The shares have few binary digits, so that share * pixels is exact.
WAYS = {
    'plain': {},
    'weights': {'weights': (0.5, 2.0, 1.0, 0.0, 1.25)},
    'share': {'ohem_kept': 0.375},
    'whole share': {'ohem_kept': 1.0},
    'share, min': {'ohem_kept': 0.125, 'ohem_min': 40},
    'share, weights': {'ohem_kept': 0.5, 'weights': (0.5, 2.0, 1.0, 3.0, 1.25)},
    'threshold': {'ohem_below': 0.2},
    'threshold that few reach': {'ohem_below': 0.01, 'ohem_min': 25},
    'threshold that none reaches': {'ohem_below': 1e-9},
    'threshold, weights': {'ohem_below': 0.1, 'weights': (0.5, 2.0, 1.0, 3.0, 1.25)},
    'more than there are': {'ohem_below': 0.1, 'ohem_min': 10000},
}
# How many pixels of each image have a gradient: valid are 60, 99, 24 and none.
N_KEPT = {'plain': [60, 99, 24, 0], 'share': [23, 38, 9, 0],
          'share, min': [40, 40, 24, 0], 'threshold that few reach': [25, 37, 24, 0],
          'more than there are': [60, 99, 24, 0]}


def make_batch(n=4, size=(9, 12), n_classes=5):
    """Logits of some contrast; the last image has no valid pixel."""
    rng = np.random.default_rng(11)
    logits = torch.from_numpy(3 * rng.standard_normal((n, n_classes, *size)))
    labels = torch.from_numpy(rng.integers(0, n_classes, (n, *size), np.uint8))
    labels[0, :4] = 255
    labels[1, :, 5] = 255
    labels[2, 2:] = 255
    labels[-1] = 255
    return logits, labels


def naive_loss(logits, labels, weights=(1.0,), ohem_kept=0.0, ohem_below=0.0,
               ohem_min=0):
    """Return the loss of each image (b,) and its gradient (b, classes, h, w)."""
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
                probs = [p / sum(powers) for p in powers]
                pixels.append((probs[truth], y, x, truth, probs))
        pixels.sort(key=lambda pixel: pixel[0])  # the hardest first
        factor = 1.0
        if ohem_kept or ohem_below:
            if ohem_kept:
                n_kept = math.ceil(ohem_kept * len(pixels))
            else:
                n_kept = sum(prob < ohem_below for prob, *_ in pixels)
            pixels = pixels[:max(n_kept, ohem_min)]
            factor = h * w / max(len(pixels), 1)
        value = 0.0
        for prob, y, x, truth, probs in pixels:
            weight = factor * (weights[truth] if len(weights) > 1 else weights[0])
            value -= weight * math.log(prob)
            for c in range(n_classes):
                gradient[b, c, y, x] = weight * (probs[c] - (c == truth))
        values.append(value)
    return np.array(values), gradient


@pytest.mark.parametrize('way', list(WAYS))
def test_loss_and_gradient(way):
    logits, labels = make_batch()
    expected, gradient = naive_loss(logits, labels, **WAYS[way])
    loss = PixelLoss(**WAYS[way])
    logits.requires_grad_()
    values = loss(logits, labels)
    assert np.allclose(values.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    values.sum().backward()
    assert np.allclose(logits.grad.numpy(), gradient, rtol=1e-10, atol=1e-12)
    has_gradient = (logits.grad != 0).any(1)
    assert np.array_equal(has_gradient, (gradient != 0).any(1))
    if way in N_KEPT:
        assert has_gradient.sum((1, 2)).tolist() == N_KEPT[way]
    assert values[-1] == 0 and (expected[:-1] > 0).all() == ('none' not in way)

    rounded = loss(logits.float(), labels)
    assert rounded.dtype == torch.float32
    assert np.allclose(rounded.detach().numpy(), expected, rtol=1e-5)
    assert torch.equal(rounded, loss(logits.float(), labels.long()))
    order = [2, 0, 3, 1]  # the division of the batch changes nothing
    parts = [loss(logits[[i]], labels[[i]]) for i in order]
    assert torch.allclose(torch.cat(parts), values[order], rtol=1e-13, atol=0)


@pytest.mark.parametrize('n_rows', [4, 64])
@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('size', [(3, 4), (9, 12), (1, 2)])
@pytest.mark.parametrize('way', ['plain', 'share, weights', 'threshold'])
def test_logits_are_upsampled(way, size, align_corners, n_rows, monkeypatch):
    """As by F.interpolate, with any number of rows at a time; with its gradient."""
    monkeypatch.setattr(losses, 'N_ROWS', n_rows)
    generator = torch.Generator().manual_seed(5)
    small = 3 * torch.randn(4, 5, *size, dtype=torch.float64, generator=generator)
    labels = make_batch()[1]
    one, other = (small.clone().requires_grad_() for _ in range(2))
    large = F.interpolate(one, labels.shape[1:], mode='bilinear',
                          align_corners=align_corners)
    expected, gradient = naive_loss(large.detach(), labels, **WAYS[way])
    factors = torch.tensor([1.0, 0.5, 2.0, -1.0], dtype=torch.float64)
    large.backward(torch.from_numpy(gradient) * factors[:, None, None, None])
    values = PixelLoss(**WAYS[way])(other, labels, align_corners)
    assert np.allclose(values.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    (values * factors).sum().backward()
    assert torch.allclose(other.grad, one.grad, rtol=1e-10, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            self.n = max(self.n, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize('way', ['plain', 'share, weights'])
def test_the_upsampled_logits_are_never_in_memory(way):
    logits = torch.zeros(1, 21, 33, 33, requires_grad=True)
    labels = torch.zeros(1, 500, 500, dtype=torch.uint8)
    with LargestTensor() as largest:
        PixelLoss(**WAYS[way])(logits, labels).sum().backward()
    assert largest.n == 64 * 21 * 500  # a block of rows


def test_ohem_with_pixels_of_equal_loss():
    """The share is exact, and ignored pixels are not in it."""
    logits = torch.zeros(1, 2, 10, 10, dtype=torch.float64)
    logits[:, 0, :, 1:] = 800.0     # 90 pixels whose loss is exactly 0
    labels = torch.zeros(1, 10, 10, dtype=torch.uint8)
    for options, n_kept in (({'ohem_kept': 0.5}, 50),
                            ({'ohem_below': 0.7, 'ohem_min': 25}, 25)):
        value = PixelLoss(**options)(logits, labels)
        assert math.isclose(value.item(), 100 * 10 * math.log(2) / n_kept)
    labels[:, :, 5:] = 255          # as low as an ignored pixel
    for options in ({'ohem_kept': 1.0}, {'ohem_below': 0.7, 'ohem_min': 1000}):
        value = PixelLoss(**options)(logits, labels)
        assert math.isclose(value.item(), 100 * 10 * math.log(2) / 50)


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('options', [
    {}, {'ohem_kept': 0.25}, {'ohem_below': 0.5},
    {'weights': (1.0, 0.0, 0.0, 0.0, 0.0)}])
def test_a_loss_that_is_not_finite_is_seen(options, value):
    """OHEM must not drop the pixel that shows that a step is broken."""
    logits, labels = make_batch()
    logits[1, (int(labels[1, 3, 3]) + 1) % 5, 3, 3] = value
    is_finite = PixelLoss(**options)(logits, labels).isfinite()
    assert is_finite.tolist() == [True, False, True, True]


def test_weights_are_not_in_a_checkpoint():
    loss = PixelLoss((0.5, 2.0))
    assert not loss.state_dict()
    assert {b.device.type for b in loss.to('meta').buffers()} == {'meta'}
