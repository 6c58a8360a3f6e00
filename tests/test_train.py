"""What a training step does in the rare cases, on a tiny network."""
import math

import pytest
import torch

import checkpoint
import runtime
import settings
import train

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
    return {k: v.clone() for k, v in session.raw.state_dict().items()
            if 'running' not in k and 'num_batches' not in k}


def test_poly_rate(monkeypatch):
    for name, value in dict(LR=0.009, LR_EVERY=10, ITER_MAX=30, LR_POWER=0.9).items():
        monkeypatch.setattr(settings, name, value)
    assert [train.poly_rate(s) for s in (1, 9)] == [0.009, 0.009]
    assert math.isclose(train.poly_rate(10), 0.009 * (2 / 3) ** 0.9)
    assert train.poly_rate(10) == train.poly_rate(19) != train.poly_rate(20)
    assert math.isclose(train.poly_rate(20), 0.009 * (1 / 3) ** 0.9)
    assert train.poly_rate(30) == 0


def test_groups(session):
    groups = session.optimizer.param_groups
    assert [g['weight_decay'] for g in groups] == [1e-4, 0, 0]
    assert [g['times'] for g in groups] == [1, 1, 2]
    names = {id(p): n for n, p in session.raw.named_parameters()}
    kinds = [{names[id(p)] for p in g['params']} for g in groups]
    assert all(session.raw.get_parameter(n).ndim == 4 for n in kinds[0])
    assert all(n.endswith('weight') and session.raw.get_parameter(n).ndim == 1
               for n in kinds[1])
    assert all(n.endswith('bias') for n in kinds[2])
    frozen = {'head.emau.conv1.weight', 'head.emau.conv1.bias'}
    assert set().union(*kinds) == set(names.values()) - frozen
    session.train_step(*make_batch())
    assert math.isclose(groups[2]['lr'], 2 * groups[0]['lr'])


def test_non_finite_step_changes_nothing(session, monkeypatch):
    session.train_step(*make_batch())
    before, bases = weights(session), session.raw.head.emau.mu.clone()
    session.raw.head.fc2.bias.data[0] = math.nan
    before['head.fc2.bias'][0] = math.nan
    session.train_step(*make_batch(1))
    session.raw.head.fc2.bias.data[0] = 0.0
    before['head.fc2.bias'][0] = 0.0
    session.train_step(*make_batch(2))  # sound again, but the run is to stop
    assert int(session.first_bad) == 2
    for name, value in weights(session).items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(session.raw.head.emau.mu, bases)

    class Names:
        ids = ['a', 'b']

        def places(self, step, is_whole):
            assert step == 1 and is_whole
            return [(0, 1), (0, 0)]

    with pytest.raises(ValueError, match=r'step 2.*b, a'):
        train.check_sound(session, Names(), Names())


def test_first_step_in_fp16_may_overflow(monkeypatch):
    """A withheld first step leaves no uninitialised momentum, weights or bases."""
    session = make_session(monkeypatch, PRECISION='fp16')
    session.scaler._init_scale = 2.0 ** 40
    before, bases = weights(session), session.raw.head.emau.mu.clone()
    session.train_step(*make_batch())
    assert session.scaler.get_scale() < 2.0 ** 40
    for name, value in weights(session).items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(session.raw.head.emau.mu, bases)
    for state in session.optimizer.state.values():
        assert not state['momentum_buffer'].any()
    for i in range(30):
        losses, _ = session.train_step(*make_batch(i))
    assert losses.isfinite().all() and int(session.first_bad) == 0
    assert any(not torch.equal(v, before[k]) for k, v in weights(session).items())


def test_resuming_in_another_memory_format(monkeypatch, tmp_path):
    first = make_session(monkeypatch)
    for i in range(3):
        first.train_step(*make_batch(i))
    checkpoint.save(first.state(), tmp_path / 'latest.pth')
    found = []
    for is_last in (True, False):
        session = make_session(monkeypatch, CHANNELS_LAST=is_last)
        session.restore(checkpoint.load(tmp_path / 'latest.pth'), 'latest.pth')
        session.train_step(*make_batch(9))
        found.append(weights(session))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=1e-6), name


def test_resuming_in_another_precision(monkeypatch, tmp_path):
    checkpoint.save(make_session(monkeypatch).state(), tmp_path / 'latest.pth')
    session = make_session(monkeypatch, PRECISION='fp16')
    session.restore(checkpoint.load(tmp_path / 'latest.pth'), 'latest.pth')
    assert session.train_step(*make_batch())[0].isfinite().all()


@pytest.mark.parametrize('name, value', [
    ('LR', -1.0), ('SEED', -1), ('DROPOUT', 2.0), ('BN_MOM', -1.0), ('MEAN', (0.5,)),
    ('STD', (0.0, 0.0, 0.0)), ('N_WORKERS', -1), ('HEAD_CHANNELS', 0),
    ('RESUME', 'yes'),
    ('MULTI_GRID', (0, 0)), ('SCALES', (0.0,)), ('LOSS_NORM', 'mean'), ('ITER_MAX', 0)])
def test_settings_out_of_range_are_refused(name, value, monkeypatch):
    monkeypatch.setattr(settings, name, value)
    with pytest.raises(ValueError, match=name):
        train.check_settings()


@pytest.mark.slow
def test_compiled_steps_are_the_same(monkeypatch):
    found = []
    for is_compiled in (False, True):
        session = make_session(monkeypatch, COMPILE=is_compiled, DROPOUT=0.0)
        found.append([session.train_step(*make_batch(i))[0] for i in range(3)])
    for plain, compiled in zip(*found, strict=True):
        assert torch.allclose(plain, compiled, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_steps_on_a_gpu(precision, monkeypatch):
    """The same losses as on the CPU, and a step that is not finite is withheld."""
    found = []
    for device in ('cpu', 'cuda'):
        session = make_session(monkeypatch, device, DROPOUT=0.0,
                               PRECISION='fp32' if device == 'cpu' else precision)
        found.append([session.train_step(*make_batch(i))[0].cpu() for i in range(3)])
    for cpu, gpu in zip(*found, strict=True):
        assert torch.allclose(cpu, gpu, rtol=1e-3 if precision == 'fp32' else 0.05)
    before = weights(session)
    session.raw.head.fc2.bias.data[0] = before['head.fc2.bias'][0] = math.nan
    session.train_step(*make_batch(4))
    for name, value in weights(session).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


# -- the rate's end, decay on everything -----------------------------------------------

def test_rate_falls_to_its_end(monkeypatch):
    for name, value in dict(LR=0.01, LR_END=1e-4, LR_EVERY=1, ITER_MAX=4,
                            LR_POWER=0.9).items():
        monkeypatch.setattr(settings, name, value)
    # 0.75, 0.5 and 0.25 to the power of 0.9, worked out by hand
    wanted = [1e-4 + 0.0099 * power for power in (0.771891, 0.535887, 0.287175, 0)]
    found = [train.poly_rate(s) for s in (1, 2, 3, 4)]
    assert all(math.isclose(a, b, rel_tol=1e-5)
               for a, b in zip(found, wanted, strict=True))
    assert train.poly_rate(0) == 0.01 and train.poly_rate(4) == 1e-4
    monkeypatch.setattr(settings, 'LR_END', 0.01)
    assert all(math.isclose(train.poly_rate(s), 0.01) for s in range(5))


@pytest.mark.parametrize('is_all', [False, True])
def test_decay_of_a_step_without_gradient(is_all, monkeypatch):
    """No pixel is valid, so all that moves a weight is its decay."""
    session = make_session(monkeypatch, DECAY_ALL=is_all, WEIGHT_DECAY=0.125, LR=0.5,
                           ITER_MAX=50, BIAS_LR=2.0)
    for p in session.raw.parameters():
        if p.ndim == 1:
            p.data.fill_(3.0)  # biases start at 0, where decay does not show
    before = {n: p.detach().clone() for n, p in session.raw.named_parameters()}
    images, labels = make_batch()
    session.train_step(images, torch.full_like(labels, 255))
    kinds = set()
    for name, p in session.raw.named_parameters():
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
        assert torch.equal(value, both.raw.state_dict()[name]), name
    with torch.no_grad():
        feats = both.raw.backbone(both.raw.normalise(images))
        small = both.raw.aux(feats)
        assert small.shape[:2] == (2, 5) and small.shape[2:] == feats[2].shape[2:]
        big = torch.nn.functional.interpolate(small, (33, 33), mode='bilinear',
                                              align_corners=True).log_softmax(1)
        aux = [sum(-big[b, int(labels[b, y, x]), y, x].item()
                   for y in range(33) for x in range(33) if labels[b, y, x] != 255)
               for b in range(2)]
        one, other = alone.raw(images, labels)[0], both.raw(images, labels)[0]
    assert torch.allclose(other, one + 0.4 * torch.tensor(aux), rtol=1e-5)
    assert (other > 1.2 * one).all()


def test_second_head_alone_reaches_layer3(monkeypatch):
    """With the first head cut off, layer3 and all below learn from the second."""
    session = make_session(monkeypatch, AUX_WEIGHT=0.4)
    session.raw.head.fc2.weight.data.zero_()
    losses, _ = session.raw(*make_batch())
    losses.sum().backward()
    grads = {n: p.grad.abs().sum().item() for n, p in session.raw.named_parameters()
             if p.grad is not None}
    assert grads['backbone.layer3.1.conv2.weight'] > 0
    assert grads['backbone.layer1.0.conv1.weight'] > 0
    assert grads['aux.conv.conv.weight'] > 0 and grads['aux.classify.bias'] > 0
    assert all(v == 0 for n, v in grads.items()
               if n.startswith(('backbone.layer4.', 'head.fc0.')))
    groups = [{id(p) for p in g['params']} for g in session.optimizer.param_groups]
    for name, place in (('aux.conv.conv.weight', 0), ('aux.conv.bn.weight', 1),
                        ('aux.classify.weight', 0), ('aux.classify.bias', 2)):
        assert id(session.raw.get_parameter(name)) in groups[place], name


def test_second_head_is_not_asked_at_inference(monkeypatch):
    session = make_session(monkeypatch, AUX_WEIGHT=0.4)
    net = session.raw.eval()
    wanted = net(make_batch()[0])
    for p in net.aux.parameters():
        p.data.fill_(math.nan)
    assert torch.equal(net(make_batch()[0]), wanted) and wanted.isfinite().all()


def test_second_head_is_in_the_checkpoint(voc, monkeypatch, tmp_path):
    """It is trained on, and a network without it does not take the file in silence."""
    import eval as evaluation
    made = {'AUX_WEIGHT': 0.4, 'DATASET': 'voc', 'DATA_ROOT': str(voc)}
    for name, value in {**TINY, **made}.items():
        monkeypatch.setattr(settings, name, value)
    session = train.Session(21, torch.device('cpu'))
    session.train_step(*make_batch())
    path = tmp_path / 'latest.pth'
    checkpoint.save(session.state(), path)
    content = checkpoint.load(path)
    assert {'aux.conv.conv.weight', 'aux.conv.bn.running_var', 'aux.classify.weight',
            'aux.classify.bias'} <= set(content['net'])

    monkeypatch.setattr(settings, 'AUX_WEIGHT', 0.0)
    plain = train.Session(21, torch.device('cpu'))
    with pytest.raises(ValueError, match=r'unexpected \(aux\.'):
        checkpoint.load_net(plain.raw, content['net'], path)
    checkpoint.save(plain.state(), tmp_path / 'plain.pth')
    (net,), _, lines = evaluation.load_networks([path], (), {})
    assert any(line.startswith('AUX_WEIGHT = 0.4') for line in lines)
    for name, value in net.state_dict().items():
        assert torch.equal(value, content['net'][name]), name
    with pytest.raises(ValueError, match=r'missing \(aux\.'):
        checkpoint.load_net(net, checkpoint.load(tmp_path / 'plain.pth')['net'], path)

    again = train.Session(21, torch.device('cpu'))  # AUX_WEIGHT is 0.4 again
    again.restore(content, path)
    for one in (session, again):
        one.train_step(*make_batch(1))
    for name, value in weights(session).items():
        assert torch.equal(value, weights(again)[name]), name


# -- a whole network to start from -----------------------------------------------------

@pytest.fixture
def stage(voc, monkeypatch, tmp_path):
    """Settings of a run on the made-up folder, and the weights of a stage before it."""
    for name, value in dict(
            **TINY, DATASET='voc', DATA_ROOT=str(voc), TRAIN_SPLIT='train',
            PRETRAINED='none', N_WORKERS=0, LOG_DIR=str(tmp_path / 'log'),
            INIT_FROM=str(tmp_path / 'before' / 'final.pth')).items():
        monkeypatch.setattr(settings, name, value)
    (tmp_path / 'before').mkdir()
    before = train.Session(21, torch.device('cpu'))
    before.train_step(*make_batch())
    checkpoint.save(before.state(is_final=True), settings.INIT_FROM)
    monkeypatch.setattr(settings, 'SEED', 5)
    return checkpoint.load(settings.INIT_FROM)


def sentence_of(error):
    """Return what a user reads: one sentence, raised on purpose."""
    text = runtime.explain(error)
    assert text and '\n' not in text, repr(error)
    return text


def test_starts_from_a_whole_network(stage, monkeypatch, tmp_path):
    """Every tensor, the bases and the statistics too; and nothing else of that run."""
    session, *_ = train.start({})
    found = session.raw.state_dict()
    assert found.keys() == stage['net'].keys() and len(found) > 100
    for name, value in found.items():
        assert torch.equal(value, stage['net'][name]), name
    assert session.step == 0 and not session.optimizer.state
    assert settings.STEM == 'plain'
    text = (tmp_path / 'log' / 'log.txt').read_text()
    assert f'all weights of {settings.INIT_FROM}' in text and 'scratch' not in text
    monkeypatch.setattr(settings, 'INIT_FROM', '')
    other = train.Session(21, torch.device('cpu')).raw.state_dict()
    assert not torch.equal(other['head.fc2.weight'], found['head.fc2.weight'])


def test_stem_is_taken_from_the_first_network(stage, monkeypatch):
    monkeypatch.setattr(settings, 'STEM', 'auto')
    session, *_ = train.start({})
    assert settings.STEM == session.raw.backbone.stem == 'plain'


def test_a_resumed_run_does_not_start_again(stage, monkeypatch, tmp_path):
    """The file of the stage before may be gone by then."""
    session, _, _, log = train.start({})
    session.train_step(*make_batch(1))
    checkpoint.save(session.state(), log.folder / 'latest.pth')
    (tmp_path / 'before' / 'final.pth').unlink()
    again, *_ = train.start({})
    assert again.step == 1
    for name, value in weights(session).items():
        assert torch.equal(value, weights(again)[name]), name
    assert again.weights == session.weights != ''


def test_first_network_that_is_not_there(stage, monkeypatch, tmp_path):
    monkeypatch.setattr(settings, 'INIT_FROM', str(tmp_path / 'nowhere.pth'))
    with pytest.raises(FileNotFoundError) as caught:
        train.start({})
    assert 'nowhere.pth' in sentence_of(caught.value)
    assert 'INIT_FROM' in sentence_of(caught.value)
    assert not (tmp_path / 'log').exists()


@pytest.mark.parametrize('name, value', [('HEAD_CHANNELS', 12), ('N_LAYERS', 34),
                                         ('AUX_WEIGHT', 0.4), ('STEM', 'deep')])
def test_first_network_of_another_architecture(name, value, stage, monkeypatch,
                                               tmp_path):
    monkeypatch.setattr(settings, name, value)
    with pytest.raises(ValueError, match='another architecture') as caught:
        train.start({})
    assert settings.INIT_FROM in sentence_of(caught.value)
    assert not (tmp_path / 'log').exists()


def test_first_network_of_other_classes(stage, monkeypatch, tmp_path):
    checkpoint.save(train.Session(5, torch.device('cpu')).state(True),
                    settings.INIT_FROM)
    with pytest.raises(ValueError) as caught:
        train.start({})
    text = sentence_of(caught.value)
    assert 'head.fc2' in text and '(5, 8, 1, 1), expected (21, 8, 1, 1)' in text


# -- settings of the loss --------------------------------------------------------------

@pytest.mark.parametrize('words, wrong', [
    (dict(OHEM_KEPT=0.5, OHEM_BELOW=0.7), 'OHEM_KEPT=0.5 and OHEM_BELOW=0.7'),
    (dict(OHEM_KEPT=0.5, LOSS_NORM='valid'), 'LOSS_NORM=valid'),
    (dict(OHEM_BELOW=0.7, LOSS_NORM='valid'), 'LOSS_NORM=valid'),
    (dict(OHEM_BELOW=0.7, OHEM_MIN=33 * 33), 'OHEM_MIN=1089, .* 1089 pixels'),
    (dict(OHEM_KEPT=0.5, OHEM_MIN=100000), 'OHEM_MIN=100000'),
    (dict(OHEM_KEPT=0.5, CROP_WIDTH=50, OHEM_MIN=33 * 50), '1650 pixels'),
    (dict(OHEM_KEPT=1.5), 'OHEM_KEPT=1.5'), (dict(OHEM_KEPT=-0.5), 'OHEM_KEPT=-0.5'),
    (dict(OHEM_BELOW=2.0), 'OHEM_BELOW=2.0'), (dict(OHEM_MIN=-1), 'OHEM_MIN=-1'),
    (dict(LR_END=-0.1), 'LR_END=-0.1'), (dict(AUX_WEIGHT=-0.4), 'AUX_WEIGHT=-0.4'),
    (dict(CROP_WIDTH=-1), 'CROP_WIDTH=-1'),
    (dict(CLASS_WEIGHTS=(1.0, -1.0)), 'CLASS_WEIGHTS=1.0,-1.0'),
    (dict(CLASS_WEIGHTS=(1.0, 2.0)), 'CLASS_WEIGHTS has 2 numbers for 5 classes')])
def test_settings_of_the_loss_that_are_refused(words, wrong, monkeypatch):
    base = {'OHEM_MIN': 100} if words.keys() & {'OHEM_KEPT', 'OHEM_BELOW'} else {}
    with pytest.raises(ValueError, match=wrong) as caught:
        make_session(monkeypatch, **{**base, **words})
    sentence_of(caught.value)


@pytest.mark.parametrize('words', [
    dict(OHEM_MIN=100000), dict(OHEM_KEPT=0.5, OHEM_MIN=33 * 33 - 1),
    dict(OHEM_BELOW=0.7, OHEM_MIN=33 * 33, CROP_WIDTH=34),
    dict(OHEM_KEPT=1.0, OHEM_MIN=0)])
def test_settings_of_the_loss_that_are_allowed(words, monkeypatch):
    for name, value in {**TINY, **words}.items():
        monkeypatch.setattr(settings, name, value)
    train.check_settings()


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
