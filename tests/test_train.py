"""What a training step does in the rare cases, on a tiny network."""
import math
import sys
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import eval as evaluation
import metrics
import settings
import train
from config import UserError
from training import monitor

TINY = dict(N_LAYERS=18, STEM='plain', STRIDE=16, HEAD_CHANNELS=8, FC1_CHANNELS=8,
            N_BASES=4, CROP_SIZE=33, BATCH_SIZE=2, ITER_MAX=50, BN_MOM=0.1,
            PRECISION='fp32', DEVICE='cpu')


@pytest.fixture
def session(monkeypatch):
    return make_session(monkeypatch)


def make_session(monkeypatch, device='cpu', **values):
    for name, value in {**TINY, **values}.items():
        monkeypatch.setattr(settings, name, value)
    return train.Session(5, torch.device(device))


def make_batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (2, 3, 33, 33), dtype=torch.uint8, generator=draw)
    return images, torch.randint(5, (2, 33, 33), dtype=torch.uint8, generator=draw)


def weights(session):
    return {k: v.clone() for k, v in session.model.state_dict().items()
            if 'running' not in k and 'num_batches' not in k}


def momenta(session):
    return [state['momentum_buffer'].clone()
            for state in session.optimizer.state.values()]


def test_poly_rate(monkeypatch):
    for name, value in dict(LR=0.009, LR_EVERY=10, ITER_MAX=30, LR_POWER=0.9).items():
        monkeypatch.setattr(settings, name, value)
    assert [train.poly_lr(s) for s in (1, 9)] == [0.009, 0.009]
    assert math.isclose(train.poly_lr(10), 0.009 * (2 / 3) ** 0.9)
    assert train.poly_lr(10) == train.poly_lr(19) != train.poly_lr(20)
    assert math.isclose(train.poly_lr(20), 0.009 * (1 / 3) ** 0.9)
    assert train.poly_lr(30) == 0


def test_groups(session):
    groups = session.optimizer.param_groups
    assert [g['weight_decay'] for g in groups] == [1e-4, 0, 0]
    assert [g['lr_mult'] for g in groups] == [1, 1, 2]
    names = {id(p): n for n, p in session.model.named_parameters()}
    kinds = [{names[id(p)] for p in g['params']} for g in groups]
    assert all(session.model.get_parameter(n).ndim == 4 for n in kinds[0])
    assert all(n.endswith('weight') and session.model.get_parameter(n).ndim == 1
               for n in kinds[1])
    assert all(n.endswith('bias') for n in kinds[2])
    frozen = {'head.emau.conv1.weight', 'head.emau.conv1.bias'}
    assert set().union(*kinds) == set(names.values()) - frozen
    session.train_step(*make_batch())
    assert math.isclose(groups[2]['lr'], 2 * groups[0]['lr'])


def test_non_finite_step_changes_nothing(session, monkeypatch):
    session.train_step(*make_batch())
    before, bases = weights(session), session.model.head.emau.mu.clone()
    session.model.head.classifier.bias.data[0] = math.nan
    before['head.classifier.bias'][0] = math.nan
    session.train_step(*make_batch(1))
    session.model.head.classifier.bias.data[0] = 0.0
    before['head.classifier.bias'][0] = 0.0
    session.train_step(*make_batch(2))  # sound again, but the run is to stop
    assert int(session.first_nonfinite_step) == 2
    for name, value in weights(session).items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(session.model.head.emau.mu, bases)

    class Names:  # stands for the loader, its sampler and the data
        ids = ['a', 'b']

        def sample_indices(self, step, is_whole):
            assert step == 1 and is_whole
            return [(0, 1), (0, 0)]

    loader = SimpleNamespace(batch_sampler=Names())
    with pytest.raises(UserError, match=r'step 2.*b, a'):
        monitor.check_finite(session, loader, Names())


def test_first_step_in_fp16_may_overflow(monkeypatch):
    """A withheld first step leaves no uninitialised momentum, weights or bases."""
    session = make_session(monkeypatch, PRECISION='fp16')
    session.scaler._init_scale = 2.0 ** 24
    before, bases = weights(session), session.model.head.emau.mu.clone()
    session.train_step(*make_batch())
    assert session.scaler.get_scale() == 2.0 ** 23 and int(session.n_withheld) == 1
    for name, value in weights(session).items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(session.model.head.emau.mu, bases)
    for state in session.optimizer.state.values():
        assert not state['momentum_buffer'].any()
    while int(session.n_withheld):
        assert session.step < 30
        losses, _ = session.train_step(*make_batch(session.step))
    assert losses.isfinite().all() and int(session.first_nonfinite_step) == 0
    assert any(not torch.equal(v, before[k]) for k, v in weights(session).items())


def test_gradients_that_always_overflow_in_fp16_stop_the_run(monkeypatch):
    assert monitor.MAX_WITHHELD == 50
    monkeypatch.setattr(monitor, 'MAX_WITHHELD', 3)
    session = make_session(monkeypatch, PRECISION='fp16')
    session.scaler._init_scale = 16.0
    session.train_step(*make_batch())
    assert int(session.n_withheld) == 0
    session.model.head.classifier.bias.register_hook(lambda grad: grad * math.inf)
    for _ in range(2):
        session.train_step(*make_batch())
        monitor.check_finite(session, None, None)
    session.train_step(*make_batch())
    with pytest.raises(UserError, match=r'since step 2, so 3 steps .* scale is 2 now'):
        monitor.check_finite(session, None, None)


def test_without_a_fused_optimizer_the_host_skips_the_step(monkeypatch):
    """As on MPS, whose kernels know no found_inf."""
    session = make_session(monkeypatch)
    session.is_fused = False
    groups = train.group_parameters(session.model)
    session.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=False)
    before = weights(session)
    session.train_step(*make_batch())
    after, momentum = weights(session), momenta(session)
    name = 'head.classifier.bias'
    assert not torch.equal(before[name], after[name])
    bias = session.model.head.classifier.bias
    handle = bias.register_hook(lambda grad: grad * math.nan)
    session.train_step(*make_batch())
    handle.remove()
    assert int(session.first_nonfinite_step) == 2
    for name, value in weights(session).items():
        assert torch.equal(value, after[name]), name
    assert all(map(torch.equal, momentum, momenta(session)))


def test_resuming_in_another_memory_format(monkeypatch, tmp_path):
    first = make_session(monkeypatch)
    for i in range(3):
        first.train_step(*make_batch(i))
    checkpoint.save(first.state_dict(), tmp_path / 'latest.pth')
    found = []
    for is_last in (True, False):
        session = make_session(monkeypatch, CHANNELS_LAST=is_last)
        session.load_state_dict(checkpoint.load(tmp_path / 'latest.pth'), 'latest.pth')
        session.train_step(*make_batch(9))
        found.append(weights(session))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


def test_resuming_in_another_precision(monkeypatch, tmp_path):
    checkpoint.save(make_session(monkeypatch).state_dict(), tmp_path / 'latest.pth')
    session = make_session(monkeypatch, PRECISION='fp16')
    session.load_state_dict(checkpoint.load(tmp_path / 'latest.pth'), 'latest.pth')
    assert session.train_step(*make_batch())[0].isfinite().all()


@pytest.mark.slow
def test_compiled_steps_are_the_same(monkeypatch):
    found = []
    for is_compiled in (False, True):
        session = make_session(monkeypatch, COMPILE=is_compiled, DROPOUT=0.0)
        found.append([session.train_step(*make_batch(i))[0] for i in range(3)])
    for plain, compiled in zip(*found, strict=True):
        assert torch.allclose(plain, compiled, rtol=1e-3)


# -- the rate's end, decay on everything -----------------------------------------------

def test_rate_falls_to_its_end(monkeypatch):
    for name, value in dict(LR=0.01, LR_END=1e-4, LR_EVERY=1, ITER_MAX=4,
                            LR_POWER=0.9).items():
        monkeypatch.setattr(settings, name, value)
    # 0.75, 0.5 and 0.25 to the power of 0.9, worked out by hand
    wanted = [1e-4 + 0.0099 * power for power in (0.771891, 0.535887, 0.287175, 0)]
    found = [train.poly_lr(s) for s in (1, 2, 3, 4)]
    assert all(math.isclose(a, b, rel_tol=1e-5)
               for a, b in zip(found, wanted, strict=True))
    assert train.poly_lr(0) == 0.01 and train.poly_lr(4) == 1e-4
    monkeypatch.setattr(settings, 'LR_END', 0.01)
    assert all(math.isclose(train.poly_lr(s), 0.01) for s in range(5))


@pytest.mark.parametrize('is_all', [False, True])
def test_decay_of_a_step_without_gradient(is_all, monkeypatch):
    """No pixel is valid, so all that moves a weight is its decay."""
    session = make_session(monkeypatch, DECAY_ALL=is_all, WEIGHT_DECAY=0.125, LR=0.5,
                           ITER_MAX=50, BIAS_LR=2.0)
    for p in session.model.parameters():
        if p.ndim == 1:
            p.data.fill_(3.0)  # biases start at 0, where decay does not show
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    images, labels = make_batch()
    session.train_step(images, torch.full_like(labels, 255))
    kinds = set()
    for name, p in session.model.named_parameters():
        if not p.requires_grad:
            wanted = 1.0
        elif p.ndim == 4:
            wanted = 1 - 0.5 * 0.125
        else:
            times = 2.0 if name.endswith('bias') else 1.0
            wanted = 1 - 0.5 * times * 0.125 * is_all
        kinds.add(wanted)
        assert torch.allclose(p, wanted * before[name], rtol=1e-6, atol=0), name
    assert kinds == ({1.0, 0.9375, 0.875} if is_all else {1.0, 0.9375})


# -- the second head -------------------------------------------------------------------

def test_second_head_adds_its_share(monkeypatch):
    """loss + 0.4 * the cross-entropy of layer3's head; the rest starts the same."""
    images, labels = make_batch()
    labels[0, :9] = 255
    alone = make_session(monkeypatch, DROPOUT=0.0)
    both = make_session(monkeypatch, DROPOUT=0.0, AUX_WEIGHT=0.4)
    for name, value in weights(alone).items():
        assert torch.equal(value, both.model.state_dict()[name]), name
    with torch.no_grad():
        feats = both.model.backbone(both.model.normalise(images))
        small = both.model.aux(feats)
        assert small.shape[:2] == (2, 5) and small.shape[2:] == feats[2].shape[2:]
        big = torch.nn.functional.interpolate(small, (33, 33), mode='bilinear',
                                              align_corners=True).log_softmax(1)
        aux = [sum(-big[b, int(labels[b, y, x]), y, x].item()
                   for y in range(33) for x in range(33) if labels[b, y, x] != 255)
               for b in range(2)]
        one, other = alone.model(images, labels)[0], both.model(images, labels)[0]
    assert torch.allclose(other, one + 0.4 * torch.tensor(aux), rtol=1e-5)
    assert (other > 1.2 * one).all()


def test_second_head_alone_reaches_layer3(monkeypatch):
    """With the first head cut off, layer3 and all below learn from the second."""
    session = make_session(monkeypatch, AUX_WEIGHT=0.4)
    session.model.head.classifier.weight.data.zero_()
    losses, _ = session.model(*make_batch())
    losses.sum().backward()
    grads = {n: p.grad.abs().sum().item() for n, p in session.model.named_parameters()
             if p.grad is not None}
    assert grads['backbone.layer3.1.conv2.weight'] > 0
    assert grads['backbone.layer1.0.conv1.weight'] > 0
    assert grads['aux.conv.conv.weight'] > 0 and grads['aux.classifier.bias'] > 0
    assert all(v == 0 for n, v in grads.items()
               if n.startswith(('backbone.layer4.', 'head.fc0.')))
    groups = [{id(p) for p in g['params']} for g in session.optimizer.param_groups]
    for name, place in (('aux.conv.conv.weight', 0), ('aux.conv.bn.weight', 1),
                        ('aux.classifier.weight', 0), ('aux.classifier.bias', 2)):
        assert id(session.model.get_parameter(name)) in groups[place], name


def test_second_head_is_not_asked_at_inference(monkeypatch):
    session = make_session(monkeypatch, AUX_WEIGHT=0.4)
    net = session.model.eval()
    wanted = net(make_batch()[0])
    for p in net.aux.parameters():
        p.data.fill_(math.nan)
    assert torch.equal(net(make_batch()[0]), wanted) and wanted.isfinite().all()


def test_second_head_is_in_the_checkpoint(voc, monkeypatch, tmp_path):
    """It is trained on, and a network without it does not take the file in silence."""
    made = {'AUX_WEIGHT': 0.4, 'DATASET': 'voc', 'DATA_ROOT': str(voc)}
    for name, value in {**TINY, **made}.items():
        monkeypatch.setattr(settings, name, value)
    session = train.Session(21, torch.device('cpu'))
    session.train_step(*make_batch())
    path = tmp_path / 'latest.pth'
    checkpoint.save(session.state_dict(), path)
    content = checkpoint.load(path)
    assert {'aux.conv.conv.weight', 'aux.conv.bn.running_var', 'aux.classifier.weight',
            'aux.classifier.bias'} <= set(content['net'])

    monkeypatch.setattr(settings, 'AUX_WEIGHT', 0.0)
    plain = train.Session(21, torch.device('cpu'))
    with pytest.raises(UserError, match=r'unexpected \(aux\.'):
        checkpoint.load_net(plain.model, content['net'], path)
    checkpoint.save(plain.state_dict(), tmp_path / 'plain.pth')
    (net,), _, lines = evaluation.load_networks([path], (), {})
    assert any(line.startswith('AUX_WEIGHT = 0.4') for line in lines)
    for name, value in net.state_dict().items():
        assert torch.equal(value, content['net'][name]), name
    with pytest.raises(UserError, match=r'missing \(aux\.'):
        checkpoint.load_net(net, checkpoint.load(tmp_path / 'plain.pth')['net'], path)

    again = train.Session(21, torch.device('cpu'))  # AUX_WEIGHT is 0.4 again
    again.load_state_dict(content, path)
    for one in (session, again):
        one.train_step(*make_batch(1))
    for name, value in weights(session).items():
        assert torch.equal(value, weights(again)[name]), name


# -- other settings -------------------------------------------------------------------

def test_settings_reach_the_loss(monkeypatch):
    """OHEM's loss is a mean over what it keeps, so LOSS_NORM=all leaves that mean."""
    images, labels = make_batch()
    labels[0, :20] = 255
    session = make_session(monkeypatch, OHEM_BELOW=1e-6, OHEM_MIN=50, DROPOUT=0.0,
                           CLASS_WEIGHTS=(3.0, 2.0, 0.5, 4.0, 0.25))
    losses, small = session.train_step(images, labels)
    big = torch.nn.functional.interpolate(small, (33, 33), mode='bilinear',
                                          align_corners=True).log_softmax(1)
    for b in range(2):
        pixels = sorted(((-big[b, t, y, x].item(), t)
                         for y in range(33) for x in range(33)
                         if (t := int(labels[b, y, x])) != 255), reverse=True)[:50]
        wanted = sum(loss * (3.0, 2.0, 0.5, 4.0, 0.25)[t] for loss, t in pixels) / 50
        assert math.isclose(losses[b].item(), wanted, rel_tol=1e-5)


# -- cuDNN's search --------------------------------------------------------------------

@pytest.mark.parametrize('is_exact', [False, True])
def test_cudnn_searches_while_training_only(is_exact, tiny, monkeypatch):
    """Crops have one size; images that are validated have many."""
    cudnn, found = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, 'benchmark', False)
    monkeypatch.setattr(torch, 'are_deterministic_algorithms_enabled', lambda: is_exact)
    train_step = train.Session.train_step
    for owner, name, do in ((train.Session, 'train_step', train_step),
                            (metrics, 'evaluate', metrics.evaluate)):
        def note(*args, name=name, do=do):
            found.append((name, cudnn.benchmark))
            return do(*args)
        monkeypatch.setattr(owner, name, note)
    monkeypatch.setattr(sys, 'argv', ['train.py', *tiny, 'ITER_MAX=2', 'EVAL_EVERY=1'])
    assert train.main() == 0
    assert found == [('train_step', not is_exact), ('evaluate', False)] * 2


def test_kernels_are_those_of_the_device_after_resuming(monkeypatch):
    """A checkpoint of a device without fused kernels must not switch them off here."""
    session = make_session(monkeypatch)
    content = session.state_dict()
    for group in content['optimizer']['param_groups']:
        group['fused'] = False
    session.load_state_dict(content, 'latest.pth')
    assert all(group['fused'] for group in session.optimizer.param_groups)


@pytest.mark.parametrize('head', ['deeplabv3', 'deeplabv3plus'])
def test_deeplab_with_one_image_at_a_time_is_one_sentence(head, monkeypatch):
    with pytest.raises(UserError, match='needs two images or more'):
        make_session(monkeypatch, HEAD=head, BATCH_SIZE=2, ACCUMULATE=2)
