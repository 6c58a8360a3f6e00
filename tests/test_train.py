"""What a training step does in the rare cases, on a tiny network."""
import math

import pytest
import torch

import checkpoint
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

        def places(self, step):
            assert step == 1
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
