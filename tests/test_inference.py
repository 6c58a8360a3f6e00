"""Predicting: fused, batched, at several scales, flipped, by windows and blocks."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

import inference
import network
import settings


def make_net(n_classes=5, seed=0, **values):
    """Return a small network whose batch norms have random statistics and weights."""
    for name, value in {**dict(HEAD_CHANNELS=16, FC1_CHANNELS=8, N_BASES=4, STRIDE=8),
                        **values}.items():
        setattr(settings, name, value)  # put back after each test
    torch.manual_seed(seed)
    return randomise(network.build(n_classes, is_eval=True))


def randomise(net):
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.3, 0.7)
            nn.init.normal_(m.bias, 0, 0.1)
    return net


@pytest.mark.parametrize('depth, stem, fc1', [(18, 'plain', 0), (50, 'deep', 8)])
def test_fused_network_is_the_same(depth, stem, fc1):
    net = make_net(N_LAYERS=depth, STEM=stem, FC1_CHANNELS=fc1).double()
    image = torch.randint(256, (3, 40, 57), dtype=torch.uint8)
    before = inference.predict_logits(net, image)
    fused = inference.fuse_batch_norms(copy.deepcopy(net))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    after = inference.predict_logits(fused, image)
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
    assert torch.equal(before, inference.predict_logits(net, image))  # left alone


# -- the Predictor ---------------------------------------------------------------------

SIZES = [(1, 1), (1, 40), (33, 1), (40, 57), (41, 56), (7, 150)]


class TinyBackbone(nn.Sequential):
    """Three strided convolutions: features of 12 channels at stride 8."""

    def __init__(self):
        layers = []
        for n, n_out in ((3, 8), (8, 12), (12, 12)):
            layers += [nn.Conv2d(n, n_out, 3, 2, 1, bias=False),
                       nn.BatchNorm2d(n_out), nn.ReLU()]
        super().__init__(*layers)

    def forward(self, x):
        return [super().forward(x)]


def make_tiny(seed=0):
    """Return a network in float64, in which "the same" means to 1e-10."""
    torch.manual_seed(seed)
    head = network.EMAHead(12, 5, channels=16, fc1_channels=8, bases=4)
    net = network.Segmenter(TinyBackbone(), head, 8, settings.MEAN, settings.STD)
    with torch.no_grad():  # responsibilities and classes that differ
        head.emau.conv1.weight.mul_(30)
        head.classifier.weight.mul_(30)
    return randomise(net).eval().double()


@pytest.fixture
def net():
    return make_tiny()


def make_images(*sizes):
    torch.manual_seed(3)
    return [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]


def make_predictor(net, **options):
    """Return a predictor of a copy: fusing changes the network."""
    return inference.Predictor([copy.deepcopy(net)], **options)


def near(a, b, tolerance=1e-10):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance


def test_plain_prediction_is_the_padded_network(net):
    images, predictor = make_images(*SIZES), make_predictor(net, batch=3)
    labels = predictor.predict_labels(images)
    for image, probs, label in zip(images, predictor.predict(images), labels,
                                   strict=True):
        expected = inference.predict_logits(net, image).softmax(0)
        assert near(probs[0], expected) and near(expected.sum(0), expected.new_ones(
            image.shape[1:]))
        assert torch.equal(label[0], expected.argmax(0))


def test_one_scale_and_one_window_change_nothing(net):
    """Exactly: to the last bit."""
    for image in make_images(*SIZES[3:]):
        plain = make_predictor(net).predict([image])[0]
        h, w = image.shape[1:]
        for same in (dict(scales=(1.0,)), dict(scales=(1.0, 1.0)),
                     dict(window=(h, w)), dict(window=(h + 1, 2 * w)),
                     dict(window=(0, w)), dict(window=(10 * h, 0), step=0.1)):
            assert torch.equal(make_predictor(net, **same).predict([image])[0], plain)
        several = dict(scales=(0.5, 1.25), use_flip=True)
        plain = make_predictor(net, **several).predict([image])[0]
        windows = dict(window=(2 * h, 2 * w), **several)
        assert torch.equal(make_predictor(net, **windows).predict([image])[0], plain)


@pytest.mark.parametrize('options', [{}, dict(scales=(0.5, 1.0, 1.25))])
def test_the_flip_of_a_flipped_image(net, options):
    predictor = make_predictor(net, use_flip=True, **options)
    for image in make_images(*SIZES[3:]):
        there = predictor.predict([image])[0]
        back = predictor.predict([image.flip(2)])[0].flip(3)
        # at other scales the resizing rounds left and right differently
        assert near(there, back, 1e-12) if options else torch.equal(there, back)
        if not options:  # and it is the mean of the two views
            one, other = (inference.predict_logits(net, x).softmax(0)
                          for x in (image, image.flip(2)))
            assert near(there[0], (one + other.flip(2)) / 2)
            assert not near(there[0], one, 1e-4)


@pytest.mark.parametrize('n', [1, 3, 7])
def test_equal_networks_average_to_one(net, n):
    """Exactly, also where 1 / n is no binary fraction."""
    images = make_images(*SIZES[3:])
    one = make_predictor(net).predict(images)
    mean = inference.Predictor([copy.deepcopy(net) for _ in range(n)],
                               is_averaged=True)
    each = inference.Predictor([copy.deepcopy(net) for _ in range(n)])
    for own, together, apart in zip(one, mean.predict(images), each.predict(images),
                                    strict=True):
        assert torch.equal(own, together)
        assert apart.shape[0] == n and all(torch.equal(own[0], x) for x in apart)


def test_scales_by_hand(net):
    """Resize the picture and the result by an interpolation of one's own."""
    def interpolate(x, size):
        for axis, n in ((1, size[0]), (2, size[1])):
            old = x.shape[axis]
            place = ((np.arange(n) + 0.5) * old / n - 0.5).clip(0, old - 1)
            low = place.astype(int).clip(0, max(old - 2, 0))
            high = (low + 1).clip(0, old - 1)
            share = (place - low).reshape([-1 if i == axis else 1 for i in range(3)])
            x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
        return x

    image = make_images((40, 57))[0]
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (settings.MEAN, settings.STD))
    wanted = 0
    for size in ((20, 28), (40, 57), (70, 100)):
        x = interpolate((image.numpy() / 255 - mean) / std, size)
        tall, wide = (next(n for n in range(s, 999) if n % 8 == 1) for s in size)
        padded = np.zeros((3, tall, wide))
        padded[:, :size[0], :size[1]] = x
        with torch.no_grad():
            logits = net(torch.from_numpy(padded)[None])[0, :, :size[0], :size[1]]
        wanted = wanted + interpolate(logits.softmax(0).numpy(), (40, 57)) / 3
    found = make_predictor(net, scales=(0.5, 1.0, 1.75)).predict([image])[0][0]
    assert near(found, torch.from_numpy(wanted), 1e-9)


@pytest.mark.parametrize('size, window, step, starts', [
    (100, 40, 0.5, [0, 20, 40, 60]), (101, 40, 0.5, [0, 15, 30, 46, 61]),
    (100, 99, 0.5, [0, 1]), (100, 100, 0.5, [0]), (100, 101, 0.5, [0]),
    (100, 0, 0.5, [0]), (100, 50, 1.0, [0, 50]), (5, 1, 0.3, [0, 1, 2, 3, 4])])
def test_window_starts(size, window, step, starts):
    found = inference.window_starts(size, window, step)
    assert found == starts
    if 0 < window < size:
        steps = np.diff(found)
        assert steps.max() <= max(np.ceil(window * step), 1)
        covered = np.zeros(size, int)
        for start in found:
            covered[start:start + window] += 1
            assert start + window <= size
        assert covered.min() >= 1


def test_windows_are_averaged_with_counts(net):
    image = make_images((60, 83))[0]
    x = net.normalise(image[None])
    total, counts = torch.zeros(5, 60, 83).double(), torch.zeros(60, 83)
    for top in (0, 14, 28):          # 32 high, at most 16 apart
        for left in (0, 14, 29, 43):  # 40 wide, at most 20 apart
            part = x[:, :, top:top + 32, left:left + 40]
            part = torch.nn.functional.pad(part, (0, 1, 0, 1))  # to 33 and 41
            with torch.no_grad():
                found = net(part)[0, :, :32, :40].softmax(0)
            total[:, top:top + 32, left:left + 40] += found
            counts[top:top + 32, left:left + 40] += 1
    predictor = make_predictor(net, window=(32, 40), step=0.5, batch=4)
    assert inference.make_windows((60, 83), (32, 40), 0.5) == [
        (slice(a, a + 32), slice(b, b + 40)) for a in (0, 14, 28)
        for b in (0, 14, 29, 43)]
    assert near(predictor.predict([image])[0][0], total / counts)


@pytest.mark.parametrize('batch, options', [
    (2, {}), (3, {}), (16, {}),
    (3, dict(scales=(0.5, 1.5), use_flip=True, window=(33, 41)))])
def test_a_batch_is_each_by_itself(net, batch, options):
    """Sizes that are padded alike share a batch; none sees the padding of another."""
    images = make_images((40, 57), (41, 52), (57, 40), (34, 50), (41, 57), (39, 53))
    together = make_predictor(net, batch=batch, **options)
    alone = make_predictor(net, **options)
    sizes = []
    together.nets[0].register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape))
    for image, found in zip(images, together.predict(images), strict=True):
        assert near(found, alone.predict([image])[0])
    assert max(size[0] for size in sizes) > 1
    if not options:
        assert sum(size[0] for size in sizes) == 6
        assert {tuple(s[2:]) for s in sizes} == {(41, 57), (57, 41)}


def test_several_numbers_of_iterations_at_once(net):
    images = make_images((40, 57), (41, 56), (20, 20))
    wanted = []
    for t in (1, 2, 5):
        net.set_stages((t,))
        wanted.append(make_predictor(net).predict(images))
    net.set_stages((1, 2, 5))
    several = make_predictor(net, batch=2)
    backbones = []
    several.nets[0].backbone.register_forward_hook(lambda *_: backbones.append(1))
    found = several.predict(images)
    assert len(backbones) == 2  # one for each size, not for each T
    for i in range(3):
        assert near(found[i], torch.cat([wanted[t][i] for t in range(3)]))
    assert not near(found[0][0], found[0][2], 1e-8)
    with pytest.raises(ValueError, match='no EM iterations'):
        net.head = nn.Identity()
        net.set_stages((1, 2))


def test_blocks_cover_every_pixel_once(net):
    image = make_images((150, 230))[0]
    predictor = make_predictor(net)
    whole = predictor.predict([image])[0]
    (rows, columns, one), = predictor.predict_blocks(image, 150 * 230, 16)
    assert (rows, columns) == (slice(0, 150), slice(0, 230)) and torch.equal(one, whole)
    times, found = torch.zeros(150, 230), torch.zeros_like(whole)
    sizes = []
    predictor.nets[0].register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape))
    for rows, columns, part in predictor.predict_blocks(image, 8000, 16):
        times[rows, columns] += 1
        found[:, :, rows, columns] = part
        top, left = max(rows.start - 16, 0), max(columns.start - 16, 0)
        block = image[:, top:rows.stop + 16, left:columns.stop + 16]
        wanted = predictor.predict([block])[0]
        assert near(part, wanted[:, :, rows.start - top:rows.stop - top,
                                 columns.start - left:columns.stop - left])
    assert (times == 1).all()
    sizes = sizes[::2]  # the test's own ones are between
    assert len(sizes) > 4 and max((h - 8) * (w - 8) for *_, h, w in sizes) <= 8000


def test_predictor_in_bf16_and_fp32():
    net = make_net(N_LAYERS=18, STEM='plain')
    image = make_images((40, 57))[0]
    exact = make_predictor(net.double()).predict([image])[0]
    single = make_predictor(net.float(), precision='fp32').predict([image])[0]
    predictor = make_predictor(net.float(), precision='bf16')
    half = predictor.predict([image])[0]
    assert predictor.nets[0].backbone.conv1.weight.dtype == torch.bfloat16
    assert predictor.nets[0].head.emau.mu.dtype == torch.float32
    assert single.dtype == half.dtype == torch.float32
    assert near(single.double(), exact, 1e-5) and near(half.double(), exact, 0.05)
    assert not near(half, single, 1e-6)
