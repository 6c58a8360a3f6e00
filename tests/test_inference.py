"""Predicting: folded, batched, at several scales, mirrored, by windows and blocks."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

import inference
import network
import runtime
import settings


def make_net(n_classes=5, seed=0, **values):
    """A small network whose batch norms have lived: random statistics and weights."""
    for name, value in {**dict(HEAD_CHANNELS=16, FC1_CHANNELS=8, N_BASES=4, STRIDE=8),
                        **values}.items():
        setattr(settings, name, value)  # put back after each test
    torch.manual_seed(seed)
    net = network.build(n_classes, is_eval=True)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.3, 0.7)
            nn.init.normal_(m.bias, 0, 0.1)
    return net


@pytest.mark.parametrize('depth', [18, 50])
@pytest.mark.parametrize('stem', ['deep', 'plain'])
@pytest.mark.parametrize('fc1', [0, 8])
def test_folded_network_is_the_same(depth, stem, fc1):
    net = make_net(N_LAYERS=depth, STEM=stem, FC1_CHANNELS=fc1).double()
    image = torch.randint(256, (3, 40, 57), dtype=torch.uint8)
    before = inference.predict_logits(net, image)
    folded = inference.fold(copy.deepcopy(net))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    after = inference.predict_logits(folded, image)
    assert (after - before).abs().max() < 1e-9 * before.abs().max()
    assert torch.equal(before, inference.predict_logits(net, image))  # left alone


def test_folded_in_bf16():
    net = make_net(N_LAYERS=18, STEM='plain')
    image = torch.randint(256, (3, 40, 57), dtype=torch.uint8)
    before = inference.predict_logits(net, image)
    folded = inference.fold(copy.deepcopy(net), 'bf16')
    convs = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.dtype == torch.bfloat16 for m in convs)
    assert folded.head.emau.mu.dtype == torch.float32
    with runtime.autocast(torch.device('cpu'), 'bf16'):
        after = inference.predict_logits(folded, image)
    assert after.dtype == torch.float32
    assert (after - before).abs().max() < 0.05 * (before.max() - before.min())


# -- fewer products --------------------------------------------------------------------

@pytest.mark.parametrize('points', [inference.POINTS, (0, 1, -1, 0.5), (3, 1, -2, 5)])
def test_winograd_in_one_dimension(points):
    """Against the sum that defines a convolution, whatever the points."""
    before, kernel, after = inference.winograd_matrices(points)
    x, g = np.random.default_rng(0).normal(size=(2, 5))
    found = after @ ((kernel @ g[:3]) * (before @ x))
    assert np.allclose(found, [x[i:i + 3] @ g[:3] for i in range(3)], atol=1e-12)


def test_bf16_holds_the_transforms_exactly():
    conv = inference.WinogradConv2d(nn.Conv2d(1, 1, 3, padding=1).double())
    for matrix in (conv.before, conv.after):
        assert torch.equal(matrix.bfloat16().double(), matrix)


@pytest.mark.parametrize('dilation', [1, 2, 4])
@pytest.mark.parametrize('size', [(1, 1), (2, 7), (12, 24), (13, 37), (65, 33)])
def test_a_convolution_by_fewer_products(dilation, size, monkeypatch):
    """It equals torch's, in parts of any size, for either memory order."""
    torch.manual_seed(0)
    for has_bias in (True, False):
        conv = nn.Conv2d(3, 4, 3, padding=dilation, dilation=dilation, bias=has_bias)
        fewer = inference.WinogradConv2d(conv.double())
        for part in (1, inference.PART):
            monkeypatch.setattr(inference, 'PART', part)
            for n, order in ((1, torch.channels_last), (2, torch.contiguous_format)):
                x = torch.randn(n, 3, *size).double().contiguous(memory_format=order)
                with torch.no_grad():
                    assert near(fewer(x), conv(x), 1e-12)


def test_rounding_of_fewer_products():
    """Some 1e-6 in float32, four to five times a plain convolution's in bfloat16; the
    error is the root mean square to that of the output."""
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 256, 3, padding=2, dilation=2)
    x = torch.randn(1, 256, 33, 33).relu()
    for dtype, most, factor in ((torch.float32, 1.5e-6, 10),
                                (torch.bfloat16, 1.5e-2, 5)):
        fewer = inference.WinogradConv2d(conv).to(dtype)
        plain = copy.deepcopy(conv).to(dtype)
        rounded = x.to(dtype)
        with torch.no_grad():
            exact = copy.deepcopy(conv).double()(rounded.double())
            errors = [((run(rounded).double() - exact).square().mean()
                       / exact.square().mean()).sqrt().item() for run in (plain, fewer)]
        assert errors[1] < min(most, factor * errors[0])


def count_winograd(predictor):
    return sum(isinstance(m, inference.WinogradConv2d)
               for net in predictor.nets for m in net.modules())


@pytest.mark.parametrize('depth, stride, n', [(18, 8, 7), (50, 8, 9), (50, 16, 9)])
def test_which_convolutions_take_fewer_products(depth, stride, n):
    """Those of 256 channels or more, unless strided or dilated by 8 and more: 3 of
    layer3 (6 with bottlenecks), of layer4 the first block's 2 (1), fc0 and fc1."""
    net = make_net(N_LAYERS=depth, STEM='plain', STRIDE=stride, HEAD_CHANNELS=512,
                   FC1_CHANNELS=256)
    assert count_winograd(make_predictor(net)) == n
    assert count_winograd(make_predictor(net, precision='fp16')) == 0
    assert count_winograd(make_predictor(net, has_winograd=False)) == 0
    assert count_winograd(make_predictor(net, device='meta')) == 0


@pytest.mark.parametrize('options', [{}, dict(use_flip=True, scales=(0.5, 1.25),
                                              window=(40, 24))])
def test_fewer_products_predict_the_same(options):
    net = make_net(N_LAYERS=18, STEM='plain', HEAD_CHANNELS=256, FC1_CHANNELS=256)
    for image in make_images((41, 56), (65, 65)):
        plain, fewer = (make_predictor(net.double(), has_winograd=has, **options)
                        for has in (False, True))
        assert count_winograd(fewer) and near(fewer.predict([image])[0],
                                              plain.predict([image])[0])


@pytest.mark.slow  # a compiler is at work
def test_fewer_products_beside_a_compiler():
    net = make_net(N_LAYERS=18, STEM='plain', HEAD_CHANNELS=256, FC1_CHANNELS=256)
    compiled, eager = (make_predictor(net, is_compiled=has) for has in (True, False))
    assert count_winograd(compiled)
    for image in make_images((41, 56), (65, 65)):
        assert near(compiled.predict([image])[0], eager.predict([image])[0], 1e-5)


def test_the_setting_of_fewer_products():
    assert runtime.eval_options()['has_winograd'] is True
    settings.WINOGRAD = False
    assert runtime.eval_options()['has_winograd'] is False


def test_normalising_leaves_the_picture_alone():
    net = make_net(N_LAYERS=18, STEM='plain')
    for images in (torch.randint(256, (2, 3, 9, 9), dtype=torch.uint8),
                   torch.randint(256, (2, 3, 9, 9)).float()):
        kept = images.clone()
        found = net.normalise(images)
        assert torch.equal(images, kept)
        expected = (kept.double() / 255 - torch.tensor(settings.MEAN).view(3, 1, 1)
                    ) / torch.tensor(settings.STD).view(3, 1, 1)
        assert torch.allclose(found.double(), expected, atol=1e-5)


# -- the Predictor ---------------------------------------------------------------------

SIZES = [(1, 1), (1, 40), (33, 1), (40, 57), (41, 56), (65, 65), (7, 150)]


def make_images(*sizes):
    torch.manual_seed(3)
    return [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]


def make_predictor(net, **options):
    """A predictor of a copy: folding changes the network."""
    return inference.Predictor([copy.deepcopy(net)], **options)


@pytest.fixture
def net():
    """A small network in float64, in which "the same" means to 1e-10."""
    return make_net(N_LAYERS=18, STEM='plain').double()


def near(a, b, tolerance=1e-10):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance


@pytest.mark.parametrize('options', [
    {}, dict(use_flip=True), dict(scales=(0.5, 1.25)), dict(window=(24, 32)),
    dict(scales=(0.5, 1.25), use_flip=True, window=(40, 24))])
def test_every_size_gets_its_own(net, options):
    images = make_images(*SIZES)
    found = make_predictor(net, batch=3, **options).predict(images)
    labels = make_predictor(net, batch=3, **options).predict_labels(images)
    for image, own, label in zip(images, found, labels, strict=True):
        assert own.shape == (1, 5, *image.shape[1:])
        assert near(own.sum(1), torch.ones(1, *image.shape[1:]).double())
        assert torch.equal(label, own.argmax(1))


def test_plain_prediction_is_the_padded_network(net):
    for image in make_images(*SIZES):
        wanted = inference.predict_logits(net, image)
        assert near(make_predictor(net).predict([image])[0][0], wanted.softmax(0))


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


@pytest.mark.parametrize('n', [1, 2, 3, 7])
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


def test_networks_average_as_probabilities():
    nets = [make_net(N_LAYERS=18, STEM='plain', STRIDE=stride).double()
            for stride in (8, 16, 8)]
    nets[2].head.fc2.weight.data.neg_()
    images = make_images((40, 57), (33, 20))
    wanted = [sum(inference.predict_logits(net, image).softmax(0) for net in nets) / 3
              for image in images]
    mean = inference.Predictor([copy.deepcopy(net) for net in nets], is_averaged=True)
    for own, label, right in zip(mean.predict(images), mean.predict_labels(images),
                                 wanted, strict=True):
        assert near(own[0], right)
        assert torch.equal(label[0], own[0].argmax(0))


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
def test_places_of_windows(size, window, step, starts):
    found = inference.places(size, window, step)
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
    assert inference.cut_windows((60, 83), (32, 40), 0.5) == [
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


def test_repeated_sizes_are_computed_once(net):
    image = make_images((2, 3))[0]
    predictor = make_predictor(net, scales=(0.9, 1.0, 1.1, 2.0))
    sizes = []
    predictor.nets[0].register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape))
    found = predictor.predict([image])[0]
    assert len(sizes) == 2
    one, two = (make_predictor(net, scales=(s,)).predict([image])[0] for s in (1, 2))
    assert near(found, (3 * one + two) / 4)


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
    half = make_predictor(net.float(), precision='bf16').predict([image])[0]
    assert single.dtype == half.dtype == torch.float32
    assert near(single.double(), exact, 1e-5) and near(half.double(), exact, 0.05)
    assert not near(half, single, 1e-6)
