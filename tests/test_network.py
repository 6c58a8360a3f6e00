"""Size, cost, geometry, loss and upsampling of the whole network."""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import inference
import network
import settings
import train
from backbone import ResNet

TINY = dict(N_LAYERS=18, STEM='plain', STRIDE=8, EVAL_STRIDE=0, HEAD_CHANNELS=16,
            FC1_CHANNELS=8, N_BASES=4, DROPOUT=0.0, PRECISION='fp32', BATCH_SIZE=2,
            ACCUMULATE=1, ITER_MAX=10, COMPILE=False, CLIP_GRAD=0.0, BN_MOM=0.1)


@pytest.fixture
def choose(monkeypatch):
    """Set settings for one test."""
    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setattr(settings, name, value)
    return set_all


class Small(nn.Module):
    """A backbone of one convolution, for what does not depend on the backbone."""

    def __init__(self, stride):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride, 2)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return [self.bn(self.conv(x))]


def build_small(n_classes, is_eval=False):
    head = network.EMAHead(6, n_classes, 4, 3, 0.0, bases=2, auto_update=False)
    net = network.Segmenter(Small(settings.STRIDE), head, settings.STRIDE,
                            settings.MEAN, settings.STD)
    return net.train(not is_eval)


def count_parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def count_multiply_adds(call, *args):
    """Two of the counter's operations are one multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*args)
    return counter.get_total_flops() / 2


def build_meta(n_classes=21):
    with torch.device('meta'):
        return network.build(n_classes, is_eval=True)


def meta_images(h=513, w=513):
    return torch.empty(1, 3, h, w, device='meta')


# -- parameters and cost, FACTS sections 2 and 4 ---------------------------------------

@pytest.mark.parametrize('depth, n_parameters, cost', [(101, 53.774, 237.95),
                                                       (50, 34.781, 157.93)])
def test_released_network(depth, n_parameters, cost, choose):
    choose(N_LAYERS=depth, STEM='deep', STRIDE=8, HEAD='ema', HEAD_CHANNELS=512,
           FC1_CHANNELS=256, N_BASES=64, STAGE_NUM=3, EVAL_STRIDE=0, EVAL_STAGE_NUM=0)
    net = build_meta()
    assert round(count_parameters(net) / 1e6, 3) == n_parameters
    assert round(count_multiply_adds(net, meta_images()) / 1e9, 2) == cost


@pytest.mark.parametrize('channels, n_parameters, cost', [(512, 10.008, 43.102),
                                                          (256, 4.873, 20.997)])
def test_heads_of_table_1(channels, n_parameters, cost, choose):
    choose(N_LAYERS=18, STEM='deep', HEAD='ema', HEAD_CHANNELS=channels, FC1_CHANNELS=0,
           N_BASES=64, STAGE_NUM=3, EVAL_STAGE_NUM=0)
    with torch.device('meta'):
        head = network.EMAHead(2048, 21, channels, 0, bases=64, stages=3)
        feats = torch.empty(1, 2048, 65, 65)
    n = count_parameters(head) + head.emau.mu.numel()
    assert round(n / 1e6, 3) == n_parameters
    assert round(count_multiply_adds(head, [feats]) / 1e9, 3) == cost
    built = build_meta().head  # the same from settings, but for the backbone's width
    assert type(built.fc1) is nn.Identity and built.dropout.p == 0
    n_less = (2048 - 512) * channels * 9
    assert count_parameters(head) - count_parameters(built) == n_less


# -- geometry --------------------------------------------------------------------------

@pytest.mark.parametrize('depth', [18, 101])
@pytest.mark.parametrize('stride, grid, first, others, last', [
    (8, (1, 2, 4), 1, 2, (2, 8, 16)),
    (16, (1, 2, 4), 1, 1, (1, 4, 8)),
    (8, (1, 1, 1), 1, 2, (2, 4, 4)),
    (16, (1, 1, 1), 1, 1, (1, 2, 2))])
def test_dilations_and_strides(depth, stride, grid, first, others, last):
    with torch.device('meta'):
        net = ResNet(depth, 'plain', stride, grid)
    n1, n2, n3, n4 = {18: (2, 2, 2, 2), 101: (3, 4, 23, 3)}[depth]
    expected = [[1] * n1, [1] * n2, [first] + [others] * (n3 - 1), list(last[:n4])]
    strides = (1, 2, 1 if stride == 8 else 2, 1)
    layers = (net.layer1, net.layer2, net.layer3, net.layer4)
    for layer, dilations, layer_stride in zip(layers, expected, strides, strict=True):
        assert len(layer) == len(dilations)
        for i, (block, dilation) in enumerate(zip(layer, dilations, strict=True)):
            convs = [m for n, m in block.named_modules()
                     if isinstance(m, nn.Conv2d) and 'downsample' not in n]
            wide = [m for m in convs if m.kernel_size == (3, 3)]
            assert len(wide) == (2 if depth < 50 else 1)
            assert all(m.dilation == m.padding == (dilation,) * 2 for m in wide)
            step = layer_stride if i == 0 else 1
            assert wide[0].stride == (step, step)
            assert all(m.stride == (1, 1) for m in convs if m is not wide[0])
            if block.downsample is not None:
                assert i == 0 and block.downsample[0].stride == (step, step)


@pytest.mark.parametrize('depth, channels', [(18, (64, 128, 256, 512)),
                                             (50, (256, 512, 1024, 2048))])
@pytest.mark.parametrize('stem', ['deep', 'plain'])
@pytest.mark.parametrize('stride, sides', [(8, (129, 65, 65, 65)),
                                           (16, (129, 65, 33, 33))])
def test_feature_sizes(depth, channels, stem, stride, sides):
    with torch.device('meta'):
        net = ResNet(depth, stem, stride)
    feats = net(meta_images(513, 257))
    assert [tuple(f.shape) for f in feats] == [
        (1, c, side, (side + 1) // 2) for c, side in zip(channels, sides, strict=True)]
    assert tuple(net.channels) == channels
    feats = net(meta_images(500, 377))  # rounded up
    assert feats[-1].shape[2:] == (math.ceil(500 / stride), math.ceil(377 / stride))


def test_bn_momentum_reaches_every_batch_norm(choose):
    choose(**{**TINY, 'BN_MOM': 0.0123, 'N_LAYERS': 50, 'STEM': 'deep'})
    with torch.device('meta'):
        norms = [m for m in network.build(5).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 53 + 2 + 3  # of the backbone, the deep stem and the head
    assert {m.momentum for m in norms} == {0.0123}


@pytest.mark.parametrize('words, message', [
    ((20, 'deep', 8), 'no ResNet has 20 layers'), ((50, 'wide', 8), "not 'wide'"),
    ((50, 'deep', 32), 'not 32'),
    ((50, 'deep', 8, (1, 2)), 'multi_grid has 2 factors')])
def test_impossible_backbones_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        ResNet(*words)


# -- build -----------------------------------------------------------------------------

def test_build_for_evaluation(choose):
    choose(**{**TINY, 'STRIDE': 16, 'EVAL_STRIDE': 8, 'STAGE_NUM': 2,
              'EVAL_STAGE_NUM': 5})
    with torch.device('meta'):
        here, there = network.build(5), network.build(5, is_eval=True)
    assert (here.stride, there.stride) == (16, 8)
    assert here.training and not there.training
    assert here.backbone(meta_images(65, 65))[-1].shape[2:] == (5, 5)
    assert there.backbone(meta_images(65, 65))[-1].shape[2:] == (9, 9)
    assert (here.head.emau.stages, here.head.emau.eval_stages) == (2, 5)
    choose(EVAL_STRIDE=0)
    assert build_meta(5).stride == 16


def test_settings_reach_the_unit(choose):
    choose(**TINY, EM_LAMBDA=0.5, EM_KERNEL='euclidean', EM_NORM='layer_norm',
           EM_UPDATE='never', EM_GRADIENT='last', EM_MOM=0.75, EM_RENORM=True,
           EM_CONV1='absent')
    unit = build_meta(5).head.emau
    assert (unit.lambd, unit.kernel, unit.norm, unit.update, unit.gradient,
            unit.momentum, unit.renorm, unit.conv1, unit.auto_update) == (
        0.5, 'euclidean', 'layer_norm', 'never', 'last', 0.75, True, None, False)
    assert unit.mu.shape == (1, 16, 4)


# -- upsampling and normalising --------------------------------------------------------

def resize(x, size, align_corners=True):
    """Bilinear resizing of (b, c, h, w) by two matrices of triangular weights."""
    matrices = []
    for n_in, n_out in zip(x.shape[2:], size, strict=True):
        at = torch.arange(n_out).double()
        at = (at * (n_in - 1) / (n_out - 1) if align_corners
              else ((at + 0.5) * n_in / n_out - 0.5).clamp(0, n_in - 1))
        distances = (at[:, None] - torch.arange(n_in)).abs()
        matrices.append((1 - distances).clamp(0))
    return matrices[0] @ x @ matrices[1].T


def naive_losses(small, labels, ignored=255):
    """Cross-entropy summed over each image's valid pixels, from small logits."""
    losses = []
    big = resize(torch.as_tensor(small).double(), labels.shape[1:]).numpy()
    for logits, label in zip(big, labels, strict=True):
        total = 0.0
        for i in range(label.shape[0]):
            for j in range(label.shape[1]):
                if label[i, j] != ignored:
                    scores = logits[:, i, j]
                    total += math.log(sum(math.exp(s) for s in scores))
                    total -= scores[label[i, j]]
        losses.append(total)
    return np.array(losses)


@pytest.mark.parametrize('align_corners', [True, False])
def test_upsampling(align_corners):
    small = torch.randn(2, 4, 3, 4).double()
    net = network.Segmenter(nn.Identity(), lambda feats: small, 8, (0.5,) * 3, (1,) * 3,
                            align_corners=align_corners)
    logits = net(torch.zeros(2, 3, 17, 22).double())
    assert (logits - resize(small, (17, 22), align_corners)).abs().max() < 1e-12


def test_normalise_is_exact_in_float64():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    net = network.Segmenter(nn.Identity(), nn.Identity(), 8, mean, std)
    images = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    expected = np.array([[(v / 255 - mean[c]) / std[c] for v in range(256)]
                       for c in range(3)])
    for cast in (net.double, lambda: net.half().double()):
        found = cast().normalise(images)
        assert found.dtype == torch.float64
        assert np.abs(found.numpy() - expected[None, :, None]).max() < 1e-13
    found = net.float().normalise(images)
    assert np.abs(found.numpy() - expected[None, :, None]).max() < 1e-6
    assert not net.state_dict()  # the constants are of settings, not of checkpoints


# -- the loss --------------------------------------------------------------------------

def make_batch(n=2, side=17, n_classes=5):
    """Bytes and labels, the share of ignored pixels not the same in each image."""
    draw = np.random.default_rng(3)
    images = torch.from_numpy(draw.integers(0, 256, (n, 3, side, side), np.uint8))
    labels = torch.from_numpy(draw.integers(0, n_classes, (n, side, side), np.uint8))
    labels[0, :7] = 255
    labels[-1, :, 3] = 255
    return images, labels


@pytest.mark.parametrize('loss_norm', ['all', 'valid'])
def test_training_loss(loss_norm, choose):
    choose(**TINY, LOSS_NORM=loss_norm)
    session = train.Session(5, torch.device('cpu'))
    images, labels = make_batch()
    losses, small = session.train_step(images, labels)
    sums = naive_losses(small.double().numpy(), labels.numpy())
    n = labels.numel() if loss_norm == 'all' else int((labels != 255).sum())
    assert n == 2 * 17 * 17 if loss_norm == 'all' else n == 2 * 17 * 17 - 7 * 17 - 17
    assert abs(losses.mean().item() - sums.sum() / n) < 1e-5
    assert not losses.requires_grad and not small.requires_grad


def test_training_loss_of_a_batch_without_labels(choose):
    choose(**TINY, LOSS_NORM='valid')
    session = train.Session(5, torch.device('cpu'))
    images, labels = make_batch()
    losses, _ = session.train_step(images, labels.fill_(255))
    assert torch.equal(losses, torch.zeros(2))
    assert all(p.isfinite().all() for p in session.model.parameters())


@pytest.mark.parametrize('loss_norm', ['all', 'valid'])
def test_accumulation_is_one_batch(loss_norm, choose, monkeypatch):
    monkeypatch.setattr(network, 'build', build_small)
    images, labels = make_batch(4)
    results = []
    for parts in (1, 2):
        choose(**{**TINY, 'BATCH_SIZE': 4, 'ACCUMULATE': parts, 'LOSS_NORM': loss_norm})
        session = train.Session(5, torch.device('cpu'))
        session.model.double()
        for module in session.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # otherwise a part's statistics are not the batch's
        start = {k: v.clone() for k, v in session.model.state_dict().items()}
        losses, logits = session.train_step(images, labels)
        results.append((losses, logits, session.model.state_dict()))
    one, two = results
    assert torch.allclose(one[0], two[0], rtol=1e-12)
    assert torch.allclose(one[1], two[1], rtol=1e-9)
    moved = {k for k, v in one[2].items() if not torch.equal(v, start[k])}
    assert {'head.emau.mu', 'head.classifier.weight', 'backbone.conv.weight'} <= moved
    for key, value in one[2].items():
        change = (value - start[key]).double().abs().max()
        assert (value - two[2][key]).double().abs().max() <= 1e-8 * change, key


# -- inference -------------------------------------------------------------------------

@pytest.mark.parametrize('stride', [8, 16])
@pytest.mark.parametrize('align_corners', [True, False])
def test_padded_size(stride, align_corners):
    for size in range(1, 70):
        expected = next(n for n in range(size, 200)
                        if n % stride == int(align_corners))
        assert inference.padded_size(size, stride, align_corners) == expected


@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('stride', [8, 16])
@pytest.mark.parametrize('h, w', [(17, 30), (18, 33), (33, 17)])
def test_predict_is_the_network_on_a_padded_image(stride, h, w, align_corners, choose):
    choose(**{**TINY, 'STRIDE': stride})
    torch.manual_seed(0)
    net = build_small(5, is_eval=True).double()
    net.align_corners = align_corners
    image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    size = [next(n for n in range(s, 99) if n % stride == int(align_corners))
            for s in (h, w)]
    padded = np.zeros((1, 3, *size))  # 0 is the mean
    for c in range(3):
        padded[0, c, :h, :w] = (image[c].numpy() / 255 - settings.MEAN[c]
                                ) / settings.STD[c]
    with torch.no_grad():
        small = net.head(net.backbone(torch.from_numpy(padded)))
    expected = resize(small, size, align_corners)[0, :, :h, :w]
    logits = inference.predict_logits(net, image)
    assert logits.shape == (5, h, w)
    assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9)
    probs = inference.Predictor([net]).predict([image])[0][0]
    assert torch.allclose(probs, expected.softmax(0))


@pytest.mark.parametrize('align_corners', [True, False])
def test_batches_and_blocks_in_either_convention(align_corners, choose):
    choose(**TINY)
    torch.manual_seed(0)
    net = build_small(5, is_eval=True).double()
    net.align_corners = align_corners
    predictor = inference.Predictor([copy.deepcopy(net)], batch=3)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8)
              for size in ((40, 57), (38, 60), (1, 9))]
    for image, probs in zip(images, predictor.predict(images), strict=True):
        expected = inference.predict_logits(net, image).softmax(0)
        assert (probs[0] - expected).abs().max() < 1e-10
    image, n_covered = images[0].repeat(1, 4, 3), torch.zeros(160, 171)
    for rows, columns, part in predictor.predict_blocks(image, 6000, 16):
        n_covered[rows, columns] += 1
        assert part.shape[2:] == n_covered[rows, columns].shape
    assert (n_covered == 1).all()
