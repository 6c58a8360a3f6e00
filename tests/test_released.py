"""Checkpoints of the released EMANet code: {net, step}."""
import pytest
import torch

import checkpoint
import network
import settings
from config import UserError
from conversion import released

KEYS = {'backbone.conv1': 'extractor.0', 'backbone.bn1': 'extractor.1',
          'backbone.layer1': 'extractor.4', 'backbone.layer2': 'extractor.5',
          'backbone.layer3': 'extractor.6', 'backbone.layer4': 'extractor.7',
          'head.fc0': 'fc0', 'head.emau': 'emau', 'head.fc1': 'fc1.0',
          'head.classifier': 'fc2'}


def as_released(state):
    """Our keys in the released code's names, by FACTS section 5."""
    renamed = {}
    for key, value in state.items():
        start = next(p for p in KEYS if key.startswith(p + '.'))
        renamed[KEYS[start] + key[len(start):]] = value
    return renamed


def build(device='meta', **values):
    for name, value in values.items():
        setattr(settings, name, value)
    with torch.device(device):
        return network.build(5)


@pytest.mark.parametrize('depth, stem, fc1', [
    (18, 'deep', 0), (34, 'plain', 24), (50, 'deep', 24), (101, 'deep', 24),
    (152, 'plain', 0)])
def test_architecture_is_read_off_the_shapes(depth, stem, fc1):
    choice = dict(N_LAYERS=depth, STEM=stem, HEAD_CHANNELS=32, FC1_CHANNELS=fc1,
                  N_BASES=6, HEAD='ema')
    state = build(**choice).state_dict()
    theirs = as_released(state)
    assert 'extractor.5.0.downsample.0.weight' in theirs and 'emau.mu' in theirs
    assert ('fc1.0.conv.weight' in theirs) == bool(fc1)
    content = released.convert({'net': theirs, 'step': 3}, 'x.pth')
    unit = dict(MULTI_GRID=(1, 2, 4), STAGE_NUM=3, EM_LAMBDA=1.0, EM_KERNEL='exp_dot',
                EM_NORM='l2', EM_GRADIENT='none', EM_UPDATE='moving_average',
                EM_CONV1='auto', AUX_WEIGHT=0.0)  # of the released code
    assert content['settings'] == {**choice, **unit} and content['step'] == 3
    assert list(content['net']) == list(state)
    assert all(content['net'][key] is state[key] for key in state)


def test_a_released_file_loads(tmp_path):
    net = build('cpu', N_LAYERS=18, STEM='deep', HEAD_CHANNELS=8, FC1_CHANNELS=0,
                N_BASES=3)
    theirs = as_released(net.state_dict())
    old = {k: v for k, v in theirs.items() if not k.endswith('num_batches_tracked')}
    assert len(theirs) - len(old) == 25  # of PyTorch before 0.4.1
    torch.save({'net': old, 'step': 30000}, tmp_path / 'final.pth')
    settings.N_LAYERS, settings.HEAD_CHANNELS, settings.N_BASES = 101, 512, 64
    settings.FC1_CHANNELS = 256
    content = checkpoint.load(tmp_path / 'final.pth')
    assert content['step'] == 30000 and checkpoint.count_classes(content['net']) == 5
    lines = checkpoint.use_checkpoint_architecture(content['settings'])
    assert len(lines) == 4
    fresh = network.build(5)
    assert not torch.equal(fresh.head.emau.mu, net.head.emau.mu)
    checkpoint.load_net(fresh, content['net'], 'final.pth')
    state = fresh.state_dict()
    assert all(torch.equal(value, state[k]) for k, value in net.state_dict().items())


@pytest.mark.parametrize('key', ['emau.mu', 'fc0.conv.weight', 'extractor.6.'])
def test_an_incomplete_released_file(key):
    state = as_released(build(N_LAYERS=18, STEM='plain').state_dict())
    state = {k: v for k, v in state.items() if not k.startswith(key)}
    with pytest.raises(UserError, match='x.pth looks like a released .* incomplete'):
        released.convert({'net': state}, 'x.pth')
