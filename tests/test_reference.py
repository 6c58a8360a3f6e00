"""The numbers of the released implementation, in ../shared/reference if it exists."""
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import inference
import network
import settings
import train

REFERENCE = Path(__file__).parents[2] / 'shared' / 'reference'
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(),
                                reason=f'no reference numbers in {REFERENCE}')


@pytest.fixture(scope='module', autouse=True)
def two_threads():
    """These networks are large enough for a second thread, if no other test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if 'PYTEST_XDIST_WORKER' in os.environ else 2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def expected():
    return np.load(REFERENCE / 'expected.npz')


@pytest.fixture(scope='module')
def make_weights():
    spec = importlib.util.spec_from_file_location('make_weights',
                                                  REFERENCE / 'make_weights.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make


@pytest.fixture(scope='module',
                params=[50, pytest.param(101, marks=pytest.mark.slow)])
def released(request, make_weights, tmp_path_factory):
    """Depth and path of a checkpoint in the released format."""
    path = tmp_path_factory.mktemp('released') / f'reference{request.param}.pth'
    torch.save({'net': make_weights(request.param), 'step': 1}, path)
    return request.param, path


@pytest.mark.parametrize('stride', [8, 16])
def test_evaluation_logits(released, stride, expected, monkeypatch):
    depth, path = released
    if f'eval_{depth}_{stride}_image' not in expected:
        pytest.skip(f'the reference has no numbers for depth {depth} at {stride}')
    monkeypatch.setattr(settings, 'N_LAYERS', 18)  # the checkpoint's depth is taken
    content = checkpoint.load(path)
    for name, value in content['settings'].items():
        monkeypatch.setattr(settings, name, value)
    assert settings.N_LAYERS == depth
    monkeypatch.setattr(settings, 'STRIDE', stride)
    net = network.build(21, is_eval=True)
    checkpoint.load_net(net, content['net'], path)
    image = torch.from_numpy(expected[f'eval_{depth}_{stride}_image']).permute(2, 0, 1)
    h, w = image.shape[1:]
    theirs = expected[f'eval_{depth}_{stride}_argmax']
    assert theirs.shape == (inference.padded_size(h, stride),
                            inference.padded_size(w, stride))
    with torch.inference_mode():
        x = F.pad(net.normalise(image[None]),
                  (0, theirs.shape[1] - w, 0, theirs.shape[0] - h))
        logits = net(x)[0]
    every4 = expected[f'eval_{depth}_{stride}_logits_every4']
    error = np.abs(logits[:, ::4, ::4].numpy() - every4).max() / np.ptp(every4)
    assert error < 2e-5
    assert (logits.argmax(0).numpy() == theirs).mean() > 0.9999
    cut = inference.predict_logits(net, image)
    assert torch.allclose(cut, logits[:, :h, :w], atol=1e-5 * np.ptp(every4))


def is_close(ours, theirs, tolerance=1e-6):
    return np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize('stride, n_steps', [
    (8, 2), pytest.param(8, 20, marks=pytest.mark.slow),
    pytest.param(16, 20, marks=pytest.mark.slow)])
def test_training_steps(stride, n_steps, expected, make_weights, monkeypatch, tmp_path):
    """Losses and bases of the first steps, and all weights after the last, the 20th."""
    for name, value in dict(
            N_LAYERS=50, STEM='deep', STRIDE=stride, DROPOUT=0.0, ITER_MAX=30,
            BATCH_SIZE=2, PRECISION='fp32', CHANNELS_LAST=True).items():
        monkeypatch.setattr(settings, name, value)
    path = tmp_path / 'reference50.pth'
    torch.save({'net': make_weights(50), 'step': 1}, path)
    session = train.Session(21, torch.device('cpu'))
    checkpoint.load_net(session.model, checkpoint.load(path)['net'], path)
    session.model.double()
    images = torch.from_numpy(expected['train_images']).permute(0, 3, 1, 2)
    labels = torch.from_numpy(expected['train_labels'])
    unit, prefix = session.model.head.emau, f'train_{stride}_'
    for step in range(1, n_steps + 1):
        chosen = [0, 1] if step % 2 else [2, 3]  # the numbers' order, not its README's
        losses, _ = session.train_step(images[chosen], labels[chosen])
        assert is_close(losses, expected[prefix + 'image_losses'][step - 1])
        assert is_close(losses.mean(), expected[prefix + 'losses'][step - 1])
        if step == 1:
            assert is_close(unit.mu[0], expected[prefix + 'bases_first'])
    assert unit.conv1.weight.grad is None
    if n_steps == 20:
        assert is_close(unit.mu[0], expected[prefix + 'bases_last'])
        check_weights(session.model.state_dict(), expected, prefix + 'after/')


def check_weights(state, expected, prefix):
    """Compare 64 numbers of each tensor that the reference has."""
    keys = [key for key in expected.files if key.startswith(prefix)]
    assert len(keys) >= 10
    for key in keys:
        name = key[len(prefix):]
        flat = state[rename(name)].flatten().double()
        sample = flat[::max(len(flat) // 64, 1)][:64].numpy()
        assert is_close(sample, expected[key]), name


def rename(key):
    """Return our name of a released key, independently of conversion/released.py."""
    parts = key.split('.')
    if parts[0] == 'extractor':
        ours = {'0': ['conv1'], '1': ['bn1'], '4': ['layer1'], '5': ['layer2'],
                '6': ['layer3'], '7': ['layer4']}[parts[1]]
        return '.'.join(['backbone', *ours, *parts[2:]])
    if parts[0] == 'fc1':
        return '.'.join(['head', 'fc1', *parts[2:]])
    if parts[0] == 'fc2':
        return '.'.join(['head', 'classifier', *parts[1:]])
    return 'head.' + key
