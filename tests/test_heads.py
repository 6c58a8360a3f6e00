"""The other heads: their size and cost counted by hand, their arithmetic against loops
and torchvision, their relation to the EM attention unit, and training with each."""
import math
import re

import pytest
import torch
import torch.nn.functional as F
from test_network import (
    TINY,
    choose,
    count_multiply_adds,
    count_parameters,
    resize,
)
from torch import nn
from torchvision.models.segmentation import deeplabv3

import heads
import inference
import network
import train
from config import UserError
from emau import EMAU
from prediction import deploy
from training import memory

assert choose  # a fixture
ALL = ('ema', 'ema_mmseg', 'fcn', 'deeplabv3', 'deeplabv3plus', 'psanet', 'nonlocal',
       'a2')
N_IN = [256, 512, 1024, 2048]
FINE, N = 129 * 129, 65 * 65  # pixels at stride 4 and 8 of a 513x513 image
GRID = 33 * 33


def conv(n_in, n_out, kernel=1, bn=True, bias=False):
    """Parameters of a convolution, and of the batch norm after it."""
    return n_in * n_out * kernel ** 2 + 2 * n_out * bn + n_out * bias


ASPP = 2 * conv(2048, 256) + 3 * conv(2048, 256, 3) + conv(5 * 256, 256)
ASPP_MACS = N * (2048 * 256 * (1 + 27) + 1280 * 256) + 2048 * 256
PSA = 2 * (conv(2048, 512) + conv(512, 512) + 512 * 65 * 65) + conv(1024, 2048)
PSA_MACS = (2 * (N * 2048 * 512 + GRID * 512 * (512 + 65 * 65)) + GRID * 1024 * 2048
            + 2 * GRID * GRID * 512)
HAND = {  # parameters and multiply-adds of a head on ResNet-50..152, 21 classes
    'fcn': (conv(2048, 512, 3) + conv(512, 21, 1, False, True),
            N * (2048 * 512 * 9 + 512 * 21)),
    'deeplabv3': (ASPP + conv(256, 21, 1, False, True), ASPP_MACS + N * 256 * 21),
    'deeplabv3plus': (
        ASPP + conv(256, 48) + conv(304, 256, 3) + conv(256, 256, 3)
        + conv(256, 21, 1, False, True),
        ASPP_MACS + FINE * (256 * 48 + (304 + 256) * 256 * 9 + 256 * 21)),
    'psanet': (PSA + conv(4096, 512, 3) + conv(512, 21, 1, False, True),
               PSA_MACS + N * (4096 * 512 * 9 + 512 * 21)),
    'nonlocal': (
        conv(2048, 512, 3) + 3 * conv(512, 256, 1, False, True) + conv(256, 512)
        + conv(512, 256, 3) + conv(256, 21, 1, False, True),
        N * (2048 * 512 * 9 + 4 * 512 * 256 + 512 * 256 * 9 + 256 * 21)
        + 2 * N * N * 256),
    'a2': (
        conv(2048, 512, 3) + conv(512, 128, 1, False, True)
        + 2 * conv(512, 64, 1, False, True) + conv(128, 512)
        + conv(512, 256, 3) + conv(256, 21, 1, False, True),
        N * (2048 * 512 * 9 + 2 * 512 * 128 + 2 * 512 * 64 + 2 * 128 * 64
             + 512 * 256 * 9 + 256 * 21)),
    'ema_mmseg': (
        conv(2048, 512, 3) + conv(512, 512, 1, False, True) + 512 * 64
        + conv(512, 512) + conv(512, 256, 3) + conv(2304, 256, 3)
        + conv(256, 21, 1, False, True),
        N * (2048 * 512 * 9 + 2 * 512 * 512 + 7 * 512 * 64 + (512 + 2304) * 256 * 9
             + 256 * 21)),
}


@pytest.mark.parametrize('name', list(HAND))
def test_size_and_cost(name, choose):
    choose(HEAD=name, HEAD_CHANNELS=512, FC1_CHANNELS=256, N_BASES=64, STAGE_NUM=3,
           EVAL_STAGE_NUM=0, PSA_GRID=(33, 33))
    with torch.device('meta'):
        head = network.build_head(N_IN, 21, 8).eval()
        feats = [torch.empty(1, c, side, side)
                 for c, side in zip(N_IN, (129, 65, 65, 65), strict=True)]
        side = 129 if name == 'deeplabv3plus' else 65
        assert head(feats).shape == (1, 21, side, side)
    bases = head.emau.mu.numel() if name == 'ema_mmseg' else 0
    assert (count_parameters(head) + bases,
            count_multiply_adds(head, feats)) == HAND[name]


def test_counts_of_the_paper():
    """FACTS section 4; PSANet without the concatenation, its convolutions only, is what
    the paper's Table 1 prints: 18.5 M and 56.3 G."""
    for name, millions, billions in (('deeplabv3', 15.541, 63.43),
                                     ('deeplabv3plus', 16.844, 85.17)):
        parameters, macs = HAND[name]
        assert round(parameters / 1e6, 3) == pytest.approx(millions, abs=1e-9)
        assert round(macs / 1e9, 2) == billions
    with torch.device('meta'):
        head = heads.PSAHead(N_IN, 21, concat=False)
    assert round(count_parameters(head) / 1e6, 1) == 18.5
    convolutions = (HAND['psanet'][1] - N * 2048 * 512 * 9 - 2 * GRID * GRID * 512)
    assert round(convolutions / 1e9, 1) == 56.3


def test_size_of_mmsegmentations_network(choose):
    choose(N_LAYERS=50, STEM='v1c', HEAD='ema_mmseg', HEAD_CHANNELS=512, N_BASES=64,
           FC1_CHANNELS=256, AUX_WEIGHT=0.4, MULTI_GRID=(1, 1, 1), STRIDE=8)
    with torch.device('meta'):
        net = network.build(19)
    assert round(count_parameters(net) / 1e6, 3) == 42.350  # its bases are no parameter


# -- arithmetic ------------------------------------------------------------------------

def randomise(module):
    """Give batch norms statistics and weights that are not 0 and 1."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight.data, m.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (m.bias.data, m.running_mean):
                tensor.normal_(0, 0.3)
    return module.double().eval()


@pytest.mark.parametrize('stride, rates', [(8, (12, 24, 36)), (16, (6, 12, 18))])
def test_aspp_is_torchvisions(stride, rates):
    torch.manual_seed(0)
    ours = randomise(heads.ASPP(5, 4, stride, 0.1))
    theirs = deeplabv3.ASPP(5, rates, 4).double().eval()
    state = dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True))
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, 40, 27, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)


def test_deeplab_pools_two_images_or_more():
    head = heads.DeepLabV3Head([2, 2, 2, 3], 2, 16, 4)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        head([torch.randn(1, 3, 5, 5)] * 4)
    assert head([torch.randn(2, 3, 5, 5)] * 4).shape == (2, 2, 5, 5)
    assert head.eval()([torch.randn(1, 3, 5, 5)] * 4).shape == (1, 2, 5, 5)


def test_memory_of_deeplab_on_ranks_with_one_crop_each(choose):
    """Its batch norm is over all ranks, but one rank estimates the memory."""
    choose(**TINY, HEAD='deeplabv3plus')
    assert memory.estimate_memory(3, 'fp32', world_size=2) > 0
    choose(BATCH_SIZE=1)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        memory.estimate_memory(3, 'fp32')


def test_deeplabv3plus_sees_the_features_of_stride_4():
    torch.manual_seed(0)
    head = randomise(heads.DeepLabV3PlusHead([3, 4, 5, 6], 2, 8, 4))
    fine, x = torch.randn(1, 3, 17, 13).double(), torch.randn(1, 6, 9, 7).double()
    y = head([fine, None, None, x])
    assert y.shape == (1, 2, 17, 13)
    changed = fine.clone()
    changed[..., 8, 6] += 1
    moved = (head([changed, None, None, x]) - y).abs().sum(1)[0]
    assert (moved > 0).sum() == 25 and moved[6:11, 4:9].min() > 0  # two 3x3


@pytest.mark.parametrize('align_corners', [True, False])
def test_deeplabv3plus_resizes_in_the_convention_of_settings(align_corners, choose):
    choose(**TINY, HEAD='deeplabv3plus', ALIGN_CORNERS=align_corners)
    torch.manual_seed(0)
    head = randomise(network.build_head([3, 4, 5, 6], 2, 8))
    fine, x = torch.randn(1, 3, 17, 14).double(), torch.randn(1, 6, 9, 7).double()
    wide = resize(head.aspp(x), (17, 14), align_corners)
    expected = head.classifier(head.refine(torch.cat([wide, head.reduce(fine)], 1)))
    assert torch.allclose(head([fine, None, None, x]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', ['deeplabv3plus', 'psanet'])
@pytest.mark.parametrize('align_corners', [True, False])
def test_one_convention_in_the_whole_network(name, align_corners, choose, monkeypatch):
    choose(**TINY, HEAD=name, PSA_GRID=(3, 4), ALIGN_CORNERS=align_corners)
    interpolate, seen = F.interpolate, []

    def watch(*args, **options):
        seen.append(options['align_corners'])
        return interpolate(*args, **options)

    monkeypatch.setattr(F, 'interpolate', watch)
    with torch.no_grad():
        network.build(2, is_eval=True)(torch.zeros(1, 3, 33, 40))
    assert len(seen) > 1 and set(seen) == {align_corners}


@pytest.mark.parametrize('align_corners', [True, False])
@pytest.mark.parametrize('size', [(3, 4), (6, 7)])
def test_psa_is_what_its_authors_say(size, align_corners, choose):
    torch.manual_seed(1)
    rows, columns, channels = 3, 4, 5
    choose(**{**TINY, 'HEAD_CHANNELS': channels}, HEAD='psanet',
           PSA_GRID=(rows, columns), ALIGN_CORNERS=align_corners)
    head = randomise(network.build_head([6, 6, 6, 6], 2, 8))
    x = torch.randn(2, 6, *size).double()
    seen = []
    head.project.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = head([None, None, None, x])
    pixels = [(y, x) for y in range(rows) for x in range(columns)]
    for branch, is_collect, actual in ((head.collect, True, seen[0][:, :channels]),
                                       (head.distribute, False, seen[0][:, channels:])):
        feats = resize(branch.reduce(x), (rows, columns), align_corners)
        maps = branch.attend(feats).detach()    # (b, offsets, rows, columns)
        for b in range(2):
            for target in pixels:
                total, weights = 0, 0
                for source in pixels:
                    # collect: the target's own map, read at the source; distribute: the
                    # source's map, read at the target
                    here, there = (target, source) if is_collect else (source, target)
                    offset = ((there[0] - here[0] + rows - 1) * (2 * columns - 1)
                              + there[1] - here[1] + columns - 1)
                    weight = math.exp(maps[b, offset, here[0], here[1]])
                    total = total + weight * feats[b, :, source[0], source[1]]
                    weights += weight
                assert torch.allclose(actual[b, :, target[0], target[1]],
                                      total / weights, rtol=0, atol=1e-10)
    both = resize(head.project(seen[0]), size, align_corners)
    expected = head.classifier(head.conv(torch.cat([x, both], 1)))
    assert torch.allclose(logits, expected, rtol=0, atol=1e-10)


def test_non_local_is_attention():
    torch.manual_seed(0)
    unit = heads.NonLocal(6)
    x = torch.randn(2, 6, 3, 4)
    assert torch.equal(unit(x), x)  # its authors start it as the identity
    unit = randomise(unit)
    x = x.double()
    y = unit(x)
    for b in range(2):
        q, k, v = (layer(x)[b].flatten(1).T for layer in (unit.query, unit.key,
                                                          unit.value))
        expected = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1)[0]
        expected = x[b] + unit.out(expected.T.reshape(1, 3, 3, 4))[0]
        assert torch.allclose(y[b], expected, rtol=0, atol=1e-10)


def test_double_attention_is_equation_16():
    torch.manual_seed(0)
    unit = randomise(heads.DoubleAttention(8, 3))
    x = torch.randn(2, 8, 3, 4).double()
    y = unit(x)
    for b in range(2):
        phi, theta, rho = (layer(x)[b].flatten(1)                 # (c or k, n)
                           for layer in (unit.phi, unit.theta, unit.rho))
        gathered = phi @ (theta.exp() / theta.exp().sum(1, keepdim=True)).T
        mixed = gathered @ (rho.exp() / rho.exp().sum(0, keepdim=True))
        expected = x[b] + unit.out(mixed.reshape(1, 2, 3, 4))[0]
        assert torch.allclose(y[b], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name, method', [('nonlocal', 'attend'), ('a2', 'gather'),
                                          ('psanet', 'mix')])
def test_attention_is_computed_in_full_precision(name, method, choose, monkeypatch):
    choose(**TINY, HEAD=name, PSA_GRID=(3, 4))
    net = network.build(2, is_eval=True)
    owner = net.head if name == 'psanet' else net.head.unit
    compute, seen = getattr(owner, method), []

    def watch(*tensors):
        out = compute(*tensors)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(owner, method, watch)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        net(torch.zeros(1, 3, 33, 33, dtype=torch.uint8))
    assert seen and set(seen) == {torch.float32}


# -- relations to the EM attention unit, sections 5.4 and 6.2.2 ------------------------

def test_non_local_is_e_and_r_with_pixels_as_bases():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 5).double()                            # (b, n, c)
    unit = EMAU(5, bases=12, stages=1, norm='none', conv1='absent').double()
    mu = x.transpose(1, 2)                                        # K = N
    attended = unit.reconstruct(unit.e_step(x, mu), mu)
    assert torch.allclose(attended, heads.NonLocal.attend(x, x, x), rtol=0, atol=1e-12)
    with_m = unit.reconstruct(unit.e_step(x, mu), unit.m_step(x, unit.e_step(x, mu)))
    assert not torch.allclose(attended, with_m, atol=1e-2)        # A_M is what it lacks


# -- with each head --------------------------------------------------------------------

class Shallow(nn.Module):
    """A backbone of four convolutions, called as ResNet is."""
    channels = [8, 8, 12, 16]

    def __init__(self, n_layers, stem, stride, *others):
        super().__init__()
        self.layers = nn.ModuleList()
        n_in = 3
        for n_out, step in zip(self.channels, (4, 2, stride // 8, 1), strict=True):
            conv = nn.Conv2d(n_in, n_out, 5, step, 2)
            self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU()))
            n_in = n_out

    def forward(self, x):
        feats = []
        for layer in self.layers:
            x = layer(x)
            feats.append(x)
        return feats


def test_psanet_can_be_exported(choose, monkeypatch, tmp_path):
    monkeypatch.setattr(network, 'ResNet', Shallow)
    choose(**TINY, HEAD='psanet', PSA_GRID=(3, 4))
    net = randomise(network.build(5, is_eval=True)).float()
    images = torch.randint(256, (2, 3, 41, 30), dtype=torch.uint8)
    deploy.export(net, tmp_path / 'model.pt2', images[0, :, :35], {
        'classes': ['a', 'b', 'c', 'd', 'e'], 'palette': [0, 0, 0], 'settings': {}})
    program = torch.export.load(str(tmp_path / 'model.pt2')).module()
    expected = torch.stack([inference.predict_logits(net, image).softmax(0)
                            for image in images])
    assert (program(images) - expected).abs().max() < 1e-4


@pytest.mark.parametrize('name', ALL)
def test_every_head_trains(name, choose, monkeypatch):
    """Each trains beside an auxiliary head, and the loss falls."""
    monkeypatch.setattr(network, 'ResNet', Shallow)
    choose(**TINY, HEAD=name, PSA_GRID=(3, 4), AUX_WEIGHT=0.4, LR=0.02, LR_EVERY=1,
           RECIPE='', SEED=1)
    choose(BATCH_SIZE=4, ITER_MAX=50)
    session = train.Session(3, torch.device('cpu'))
    before = {k: p.detach().clone() for k, p in session.model.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4, 5, 5), dtype=torch.uint8, generator=draw)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :33, :33]
    images = (80 * labels[:, None].expand(-1, 3, -1, -1)
              + torch.randint(40, (4, 3, 33, 33), dtype=torch.uint8, generator=draw))
    losses = [session.train_step(images, labels)[0].mean().item() for _ in range(30)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    still = [k for k, p in session.model.named_parameters()
             if torch.equal(p, before[k])]
    # no gradient reaches conv1, as released, nor biases that a softmax or a batch norm
    # cancels
    cancelled = (r'head\.(emau\.conv1|unit\.(theta|key|value|phi)\.bias).*|'
                 r'backbone\.layers\..\.0\.bias')
    assert all(re.fullmatch(cancelled, k) for k in still), still
    side = 9 if name == 'deeplabv3plus' else 5
    net = session.model.eval()
    with torch.no_grad():
        assert net.head(net.backbone(net.normalise(images))).shape[2:] == (side, side)
        assert net(images[:1, :, :, :25]).shape == (1, 3, 33, 25)


@pytest.mark.parametrize('values, sentence', [
    (dict(HEAD='pspnet'), 'HEAD=pspnet is none of ema, ema_mmseg, fcn'),
    (dict(HEAD='deeplabv3', FC1_CHANNELS=0), 'FC1_CHANNELS=0, but HEAD=deep'),
    (dict(HEAD='a2', N_BASES=0), 'N_BASES=0: the A2 block'),
    (dict(HEAD='psanet', PSA_GRID=(33,)), 'PSA_GRID=33: rows and columns'),
    (dict(HEAD='psanet', PSA_GRID=(1, 5)), 'PSA_GRID=1,5: rows and columns')])
def test_impossible_heads_are_refused(values, sentence, choose):
    choose(**{**TINY, **values})
    with torch.device('meta'), pytest.raises(UserError, match=sentence):
        network.build(2)
