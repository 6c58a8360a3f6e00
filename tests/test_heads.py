"""The rival heads: their size and cost counted by hand, their arithmetic beside loops
and torchvision's, their relation to the EM attention unit, and training with each."""
import math
import re
from types import SimpleNamespace

import pytest
import test_export
import torch
import torch.nn.functional as F
from test_network import TINY, choose, count_multiply_adds, count_parameters
from torch import nn
from torchvision.models.segmentation import deeplabv3

import heads
import network
import settings
import train
from network import EMAU
from prediction import deploy

assert choose  # a fixture
RIVALS = ('fcn', 'deeplabv3', 'deeplabv3plus', 'psanet', 'nonlocal', 'a2')
ALL = ('ema', 'ema_mmseg', *RIVALS)
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


def test_the_papers_counts():
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


def test_mmsegmentations_model(choose):
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
    with pytest.raises(ValueError, match='two images or more at a time'):
        head([torch.randn(1, 3, 5, 5)] * 4)
    assert head([torch.randn(2, 3, 5, 5)] * 4).shape == (2, 2, 5, 5)
    assert head.eval()([torch.randn(1, 3, 5, 5)] * 4).shape == (1, 2, 5, 5)


def test_deeplab_on_ranks_with_one_crop_each(choose):
    """Batch norm is over all ranks; the estimate of memory, made by one, must not mind.
    """
    choose(**TINY, HEAD='deeplabv3plus')
    session = train.Session(3, torch.device('cpu'))
    session.team = SimpleNamespace(world=2)  # of 2 crops
    assert train.estimate_memory(session) > 0
    session.team, settings.BATCH_SIZE = SimpleNamespace(world=1), 1
    with pytest.raises(ValueError, match='two images or more at a time'):
        train.estimate_memory(session)


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


@pytest.mark.parametrize('size', [(3, 4), (6, 7)])
def test_psa_is_what_its_authors_say(size):
    torch.manual_seed(1)
    rows, columns, channels = 3, 4, 5
    head = randomise(heads.PSAHead([6, 6, 6, 6], 2, (rows, columns), channels))
    x = torch.randn(2, 6, *size).double()
    seen = []
    head.project.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = head([None, None, None, x])
    places = [(y, x) for y in range(rows) for x in range(columns)]
    for branch, is_collect, found in ((head.collect, True, seen[0][:, :channels]),
                                      (head.distribute, False, seen[0][:, channels:])):
        feats = F.interpolate(branch.reduce(x), (rows, columns), mode='bilinear',
                              align_corners=True)
        maps = branch.attend(feats).detach()    # (b, offsets, rows, columns)
        for b in range(2):
            for target in places:
                total, weights = 0, 0
                for source in places:
                    # collect: the target's own map, read at the source; distribute: the
                    # source's map, read at the target
                    here, there = (target, source) if is_collect else (source, target)
                    offset = ((there[0] - here[0] + rows - 1) * (2 * columns - 1)
                              + there[1] - here[1] + columns - 1)
                    weight = math.exp(maps[b, offset, here[0], here[1]])
                    total = total + weight * feats[b, :, source[0], source[1]]
                    weights += weight
                assert torch.allclose(found[b, :, target[0], target[1]],
                                      total / weights, rtol=0, atol=1e-10)
    assert logits.shape == (2, 2, *size)


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
        wanted = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1)[0]
        wanted = x[b] + unit.out(wanted.T.reshape(1, 3, 3, 4))[0]
        assert torch.allclose(y[b], wanted, rtol=0, atol=1e-10)


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
        wanted = x[b] + unit.out(mixed.reshape(1, 2, 3, 4))[0]
        assert torch.allclose(y[b], wanted, rtol=0, atol=1e-10)


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
    attended = unit.reconstruct(unit.expect(x, mu), mu)
    assert torch.allclose(attended, heads.NonLocal.attend(x, x, x), rtol=0, atol=1e-12)
    with_m = unit.reconstruct(unit.expect(x, mu), unit.maximise(x, unit.expect(x, mu)))
    assert not torch.allclose(attended, with_m, atol=1e-2)        # A_M is what it lacks


def test_a2_is_one_iteration_with_learned_bases():
    """With shared theta and rho the A2 block's distribution is A_E and A_R; its
    gathering is A_M where the maps are softmaxed over the bases before the pixels."""
    torch.manual_seed(0)
    unit = EMAU(5, bases=3, stages=1, norm='none', conv1='absent', gradient='full',
                update='back_propagation').double()
    x = torch.randn(2, 5, 3, 4).double()
    pixels = x.flatten(2).transpose(1, 2)                         # (b, n, c)
    seen = []
    unit.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    unit(x)
    seen[0].square().sum().backward()
    shared = unit.mu.detach().clone().requires_grad_()            # theta = rho
    rho = pixels @ shared
    block = heads.DoubleAttention
    mixed = block.distribute(block.gather(pixels, rho.log_softmax(2)), rho)
    wanted = mixed.transpose(1, 2).unflatten(2, (3, 4)).relu()
    wanted.square().sum().backward()
    assert torch.allclose(seen[0], wanted, rtol=0, atol=1e-5)     # EPS of A_M
    assert torch.allclose(unit.mu.grad, shared.grad, rtol=1e-4, atol=1e-4)
    assert shared.grad.abs().max() > 0.1
    as_published = block.distribute(block.gather(pixels, rho), rho)
    assert not torch.allclose(mixed, as_published, atol=1e-2)


# -- used with each --------------------------------------------------------------------

@pytest.mark.parametrize('name', ['ema_mmseg', 'psanet'])
def test_heads_can_be_exported(name, tmp_path):
    net = test_export.make_net(HEAD=name, PSA_GRID=(3, 4))
    deploy.export(net, tmp_path / 'model.pt2', test_export.draw(3, 50, 61),
                  test_export.METADATA)  # compares with the network
    program = torch.export.load(str(tmp_path / 'model.pt2')).module()
    images = test_export.draw(2, 3, 41, 30)  # another number and size
    wanted = test_export.predict_plainly(net, images)
    assert (program(images) - wanted).abs().max() < 1e-4


# -- training with each ----------------------------------------------------------------

@pytest.mark.parametrize('name', ALL)
def test_every_head_trains(name, choose):
    """Called as the EM head is, beside an auxiliary one; the loss falls."""
    choose(**TINY, HEAD=name, PSA_GRID=(3, 4), AUX_WEIGHT=0.4, LR=0.02, LR_EVERY=1,
           RECIPE='', SEED=1)
    settings.BATCH_SIZE, settings.ITER_MAX = 4, 50
    session = train.Session(3, torch.device('cpu'))
    before = {k: p.detach().clone() for k, p in session.raw.named_parameters()}
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4, 5, 5), dtype=torch.uint8, generator=draw)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :33, :33]
    images = (80 * labels[:, None].expand(-1, 3, -1, -1)
              + torch.randint(40, (4, 3, 33, 33), dtype=torch.uint8, generator=draw))
    losses = [session.train_step(images, labels)[0].mean().item() for _ in range(12)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    still = [k for k, p in session.raw.named_parameters()
             if torch.equal(p, before[k])]
    # what no gradient reaches: conv1 as released, and biases that a softmax or a batch
    # norm cancels
    cancelled = r'head\.(emau\.conv1|unit\.(theta|key|value|phi)\.bias).*'
    assert all(re.fullmatch(cancelled, k)
               for k in still), still
    side = 9 if name == 'deeplabv3plus' else 5
    net = session.raw.eval()
    with torch.no_grad():
        assert net.head(net.backbone(net.normalise(images))).shape[2:] == (side, side)
        assert net(images[:1, :, :, :25]).shape == (1, 3, 33, 25)


def test_heads_that_cannot_be(choose):
    for values, sentence in (
            (dict(HEAD='pspnet'), 'HEAD=pspnet is none of ema, ema_mmseg, fcn'),
            (dict(HEAD='deeplabv3', FC1_CHANNELS=0), 'FC1_CHANNELS=0, but HEAD=deep'),
            (dict(HEAD='a2', N_BASES=0), 'N_BASES=0: the A2 block'),
            (dict(HEAD='psanet', PSA_GRID=(33,)), 'PSA_GRID=33: rows and columns'),
            (dict(HEAD='psanet', PSA_GRID=(1, 5)), 'PSA_GRID=1,5: rows and columns')):
        choose(**{**TINY, **values})
        with pytest.raises(ValueError, match=sentence):
            network.build(2)
        choose(FC1_CHANNELS=8, PSA_GRID=(33, 33))
