"""The EM attention unit against float64 loops over every pixel and every basis.

Its training is in test_emau_training.py.
"""
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE

import emau
import network
from emau import EMAU

EPS = 1e-6


# -- the reference: one image, plain loops ---------------------------------------------

def naive_expect(x, mu, kernel, lambd):
    """x (n, c), mu (k, c) -> z (n, k)."""
    z = np.zeros((len(x), len(mu)))
    for n in range(len(x)):
        for k in range(len(mu)):
            dot = sum(a * b for a, b in zip(x[n], mu[k], strict=True))
            gap = sum((a - b) ** 2 for a, b in zip(x[n], mu[k], strict=True))
            z[n, k] = {'exp_dot': math.exp(lambd * dot), 'dot': max(dot, 0) + EPS,
                       'euclidean': math.exp(-lambd * gap)}[kernel]
        z[n] /= sum(z[n])
    return z


def naive_maximise(x, z, norm):
    """x (n, c), z (n, k) -> mu (k, c)."""
    mu = np.zeros((z.shape[1], x.shape[1]))
    for k in range(len(mu)):
        share = sum(z[:, k])
        for n in range(len(x)):
            mu[k] += z[n, k] / (EPS + share) * x[n]
        if norm == 'l2':
            mu[k] /= EPS + math.sqrt(sum(v * v for v in mu[k]))
        if norm == 'layer_norm':
            mean = sum(mu[k]) / len(mu[k])
            variance = sum((v - mean) ** 2 for v in mu[k]) / len(mu[k])
            mu[k] = (mu[k] - mean) / math.sqrt(variance + 1e-5)
    return mu


def naive_iterate(x, mu, kernel='exp_dot', lambd=1.0, norm='l2', stages=3):
    """Return the last bases (k, c) and the responsibilities of each stage."""
    zs = []
    for _ in range(stages):
        zs.append(naive_expect(x, mu, kernel, lambd))
        mu = naive_maximise(x, zs[-1], norm)
    return mu, zs


def pixels_of(image):
    """(c, h, w) -> list of the pixels in reading order (n, c)."""
    _, h, w = image.shape
    return np.array([[v for v in image[:, i, j]] for i in range(h) for j in range(w)])


def project(unit, image):
    """conv1 of an image (c, h, w), pixel by pixel: (n, c)."""
    x = pixels_of(image)
    if unit.conv1 is None:
        return x
    weight = unit.conv1.weight.detach().numpy()[:, :, 0, 0]
    bias = unit.conv1.bias.detach().numpy()
    return np.array([weight @ pixel + bias for pixel in x])


def naive_forward(unit, image, stages, **choice):
    """The whole unit in evaluation mode: image (c, h, w) -> (c, h, w)."""
    mu0 = unit.mu.detach().numpy()[0].T
    mu, zs = naive_iterate(project(unit, image), mu0, stages=stages, **choice)
    weight = unit.conv2[0].weight.detach().numpy()[:, :, 0, 0]
    bn = unit.conv2[1]
    mean, var = bn.running_mean.numpy(), bn.running_var.numpy()
    gain, shift = bn.weight.detach().numpy(), bn.bias.detach().numpy()
    out = np.zeros_like(image)
    w = image.shape[2]
    for n in range(len(zs[-1])):
        mixture = sum(zs[-1][n, k] * mu[k] for k in range(len(mu)))
        y = weight @ np.maximum(mixture, 0)
        y = (y - mean) / np.sqrt(var + bn.eps) * gain + shift
        i, j = divmod(n, w)
        out[:, i, j] = np.maximum(y + image[:, i, j], 0)
    return out, mu, zs


def make_unit(channels=4, bases=3, seed=0, **words):
    """A float64 unit whose batch norm and bias are not the trivial ones."""
    torch.manual_seed(seed)
    unit = EMAU(channels, bases, **words).double()
    bn = unit.conv2[1]
    for tensor in (bn.running_mean, bn.weight.data, bn.bias.data):
        tensor.normal_()
    bn.running_var.uniform_(0.5, 2)
    return unit


def make_images(b=2, c=4, h=2, w=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, c, h, w, generator=generator, dtype=torch.float64)


def near(a, b, tolerance=1e-12):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64),
                          torch.as_tensor(b, dtype=torch.float64),
                          rtol=tolerance, atol=tolerance)


# -- the steps -------------------------------------------------------------------------

def test_dot_kernel_shares_a_distant_pixel_evenly():
    unit = make_unit(kernel='dot')
    z = unit.e_step(torch.tensor([[[1., 0, 0, 0]]]), -torch.eye(4)[None, :, [0, 0, 1]])
    assert near(z, torch.full((1, 1, 3), 1 / 3), 1e-6)


def test_epsilon_is_added_to_both_denominators():
    one = torch.ones(1, 1, 1).double()
    plain, l2 = make_unit(1, 1, norm='none'), make_unit(1, 1, norm='l2')
    assert near(plain.m_step(one, EPS * one), one / 2)       # EPS / (EPS + EPS)
    assert near(l2.normalise(EPS * one), one / 2)
    assert near(l2.normalise(3 * EPS * one), one * 3 / 4)
    dead = torch.zeros(1, 2, 1).double()                     # it has no pixels
    assert near(l2.m_step(torch.randn(1, 2, 1).double(), dead), 0 * one)


@pytest.mark.parametrize('kernel', ['exp_dot', 'dot', 'euclidean'])
@pytest.mark.parametrize('norm', ['l2', 'layer_norm', 'none'])
def test_iterations(kernel, norm):
    unit = make_unit(kernel=kernel, norm=norm, stages=4)
    x = make_images().flatten(2).transpose(1, 2)
    mus, zs = unit.iterate(x, unit.stages)
    assert len(mus) == len(zs) == 4
    for b in range(2):
        mu, expected = naive_iterate(x[b].numpy(), unit.mu.numpy()[0].T, kernel, 1.0,
                                     norm, 4)
        assert near(mus[-1][b], mu.T, 1e-10)
        assert near(torch.stack(zs)[:, b], np.array(expected), 1e-10)
    assert all((z >= 0).all() and near(z.sum(2), torch.ones(2, 6)) for z in zs)


@pytest.mark.parametrize('words', [
    dict(), dict(kernel='dot'), dict(kernel='euclidean', lambd=0.5), dict(norm='none'),
    dict(norm='layer_norm'), dict(lambd=3.0), dict(conv1='absent')])
@pytest.mark.parametrize('stages', [1, 3])
def test_whole_forward(words, stages):
    unit = make_unit(stages=stages, **words).eval()
    if unit.conv1 is not None:
        assert unit.conv1.bias.abs().max() > 0
    x = make_images()
    y, zs = unit(x, return_z=True)
    choice = {k: v for k, v in words.items() if k != 'conv1'}
    for b in range(2):
        expected, _, expected_zs = naive_forward(unit, x[b].numpy(), stages, **choice)
        assert near(y[b], expected, 1e-10)
        assert near(torch.stack(zs)[:, b], np.array(expected_zs), 1e-10)


def test_stages_of_training_and_evaluation():
    x = make_images()
    unit = make_unit(stages=2, eval_stages=5, update='never')
    assert len(unit(x, return_z=True)[1]) == 2
    y, zs = unit.eval()(x, return_z=True)
    assert len(zs) == 5
    assert near(y[0], naive_forward(unit, x[0].numpy(), 5)[0], 1e-10)
    assert not near(y[0], naive_forward(unit, x[0].numpy(), 2)[0], 1e-6)
    assert len(make_unit(stages=2).eval()(x, return_z=True)[1]) == 2


def test_initial_bases_are_of_unit_length():
    mu = EMAU(512, 64).mu
    assert mu.shape == (1, 512, 64)
    assert near(mu.norm(dim=1), torch.ones(1, 64), 1e-5)
    assert abs(mu.mean()) < 1e-3


def test_initial_convolutions():
    unit = EMAU(256, 8)
    for conv in (unit.conv1, unit.conv2[0]):
        assert conv.kernel_size == (1, 1)
        assert abs(conv.weight.std().item() / math.sqrt(2 / 256) - 1) < 0.02
    assert unit.conv2[0].bias is None


# -- limits ----------------------------------------------------------------------------

def test_large_lambda_is_a_step_of_k_means():
    unit = make_unit(2, 2, kernel='euclidean', norm='none', lambd=1e4, stages=1)
    mu = torch.tensor([[[0., 10], [0, 10]]]).double()           # (0, 0) and (10, 10)
    x = torch.tensor([[[1., 1], [3, -1], [9, 11], [20, 12], [4.9, 5.0]]]).double()
    z = unit.e_step(x, mu)
    assert near(z[0], [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0]])
    expected = torch.tensor([[8.9 / 3, 14.5], [5.0 / 3, 11.5]])
    assert near(unit.m_step(x, z)[0], expected, 1e-6)


def test_large_lambda_is_a_step_of_spherical_k_means():
    unit = make_unit(2, 2, kernel='exp_dot', norm='l2', lambd=1e4, stages=1)
    mu = torch.eye(2)[None].double()
    x = torch.tensor([[[5., 1], [3, 2], [0, 1], [1, 3]]]).double()
    z = unit.e_step(x, mu)
    assert near(z[0], [[1, 0], [1, 0], [0, 1], [0, 1]])
    one, two = np.array([8, 3]) / math.hypot(8, 3), np.array([1, 4]) / math.hypot(1, 4)
    assert near(unit.m_step(x, z)[0], np.array([one, two]).T, 1e-5)


def test_input_is_not_changed():
    unit, x = make_unit(), make_images()
    before = x.clone()
    unit(x)
    assert torch.equal(x, before)


# -- use -------------------------------------------------------------------------------

@pytest.mark.parametrize('words', [
    dict(kernel='cosine'), dict(norm='l1'), dict(update='ema'), dict(gradient='first'),
    dict(conv1='yes'), dict(stages=0), dict(eval_stages=-1), dict(bases=0),
    dict(kernel='dot', lambd=2.0)])
def test_impossible_choices_are_refused(words):
    with pytest.raises(ValueError) as caught:
        EMAU(4, **{'bases': 3, **words})
    assert str(list(words.values())[-1]) in str(caught.value)


@pytest.mark.parametrize('gradient', ['none', 'last'])
def test_back_propagation_needs_the_whole_gradient(gradient):
    with pytest.raises(ValueError, match=f"gradient='{gradient}'"):
        EMAU(4, 3, update='back_propagation', gradient=gradient)


def test_the_file_is_used_alone(tmp_path):
    shutil.copy(HERE / 'emau.py', tmp_path)
    code = ('import torch, emau; unit = emau.EMAU(8, bases=3); '
            'print(emau.__file__, *unit(torch.randn(2, 8, 5, 4)).shape)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, text=True,
                          capture_output=True, env={'PYTHONPATH': ''}, timeout=100)
    assert done.stdout.split() == [str(tmp_path / 'emau.py'), '2', '8', '5', '4'], (
        done.stderr)
    assert network.EMAU is emau.EMAU


def test_ema_head():
    torch.manual_seed(0)
    head = network.EMAHead(6, 5, channels=4, fc1_channels=3, bases=2).double().eval()
    x = torch.randn(2, 6, 4, 4).double()
    a = F.conv2d(x, head.fc0.conv.weight, padding=1) / math.sqrt(1 + 1e-5)
    y = head.emau(a.relu())
    y = (F.conv2d(y, head.fc1.conv.weight, padding=1) / math.sqrt(1 + 1e-5)).relu()
    y = F.conv2d(y, head.classifier.weight, head.classifier.bias)
    assert near(head([None, x]), y, 1e-10)
    assert isinstance(head.dropout, torch.nn.Dropout2d) and head.dropout.p == 0.1
