"""The EM attention unit against float64 loops over every pixel and every basis."""
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import network
from network import EMAU

EPS = 1e-6
HERE = Path(__file__).parents[1]


# -- the reference: one image, plain loops ---------------------------------------------

def naive_expect(x, mu, kernel, scale):
    """x (n, c), mu (k, c) -> z (n, k)."""
    z = np.zeros((len(x), len(mu)))
    for n in range(len(x)):
        for k in range(len(mu)):
            dot = sum(a * b for a, b in zip(x[n], mu[k], strict=True))
            gap = sum((a - b) ** 2 for a, b in zip(x[n], mu[k], strict=True))
            z[n, k] = {'exp_dot': math.exp(scale * dot), 'dot': max(dot, 0) + EPS,
                       'euclidean': math.exp(-scale * gap)}[kernel]
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


def naive_iterate(x, mu, kernel='exp_dot', scale=1.0, norm='l2', stages=3):
    """Return the last bases (k, c) and the responsibilities of each stage."""
    zs = []
    for _ in range(stages):
        zs.append(naive_expect(x, mu, kernel, scale))
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


def mean_of_last_bases(unit, x, **words):
    """The mean over images of mu^(T), (1, c, k), from the loops."""
    mu0 = unit.mu.detach().numpy()[0].T
    last = [naive_iterate(project(unit, image), mu0, **words)[0] for image in x.numpy()]
    return torch.from_numpy(np.mean(last, 0).T[None])


def near(a, b, tolerance=1e-12):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64),
                          torch.as_tensor(b, dtype=torch.float64),
                          rtol=tolerance, atol=tolerance)


# -- the steps -------------------------------------------------------------------------

@pytest.mark.parametrize('kernel, scale', [('exp_dot', 1.0), ('exp_dot', 2.5),
                                           ('dot', 1.0), ('euclidean', 1.0),
                                           ('euclidean', 0.3)])
def test_expect(kernel, scale):
    unit = make_unit(kernel=kernel, scale=scale)
    x, mu = torch.randn(2, 6, 4).double(), torch.randn(2, 4, 3).double()
    z = unit.expect(x, mu)
    wanted = [naive_expect(a, b.T, kernel, scale) for a, b in zip(x.numpy(), mu.numpy(),
                                                                  strict=True)]
    assert near(z, np.array(wanted))
    assert (z >= 0).all() and near(z.sum(2), torch.ones(2, 6))


def test_dot_kernel_shares_evenly_a_pixel_that_is_far_from_all():
    unit = make_unit(kernel='dot')
    z = unit.expect(torch.tensor([[[1., 0, 0, 0]]]), -torch.eye(4)[None, :, [0, 0, 1]])
    assert near(z, torch.full((1, 1, 3), 1 / 3), 1e-6)


@pytest.mark.parametrize('norm', ['l2', 'layer_norm', 'none'])
def test_maximise(norm):
    unit = make_unit(norm=norm)
    x, z = torch.randn(2, 6, 4).double(), torch.rand(2, 6, 3).double()
    mu = unit.maximise(x, z)
    wanted = [naive_maximise(a, b, norm).T for a, b in zip(x.numpy(), z.numpy(),
                                                           strict=True)]
    assert near(mu, np.array(wanted))


def test_epsilon_is_added_to_both_denominators():
    one = torch.ones(1, 1, 1).double()
    plain, l2 = make_unit(1, 1, norm='none'), make_unit(1, 1, norm='l2')
    assert near(plain.maximise(one, EPS * one), one / 2)       # EPS / (EPS + EPS)
    assert near(l2.normalise(EPS * one), one / 2)
    assert near(l2.normalise(3 * EPS * one), one * 3 / 4)
    dead = torch.zeros(1, 2, 1).double()                       # no pixel is its own
    assert near(l2.maximise(torch.randn(1, 2, 1).double(), dead), 0 * one)


def test_reconstruct():
    unit = make_unit()
    z, mu = torch.rand(2, 6, 3).double(), torch.randn(2, 4, 3).double()
    y = unit.reconstruct(z, mu)
    for b in range(2):
        for n in range(6):
            for c in range(4):
                wanted = sum(float(z[b, n, k] * mu[b, c, k]) for k in range(3))
                assert abs(float(y[b, n, c]) - wanted) < 1e-12


@pytest.mark.parametrize('kernel', ['exp_dot', 'dot', 'euclidean'])
@pytest.mark.parametrize('norm', ['l2', 'layer_norm', 'none'])
def test_iterations(kernel, norm):
    unit = make_unit(kernel=kernel, norm=norm, stages=4)
    x = make_images().flatten(2).transpose(1, 2)
    mus, zs = unit.iterate(x, unit.stages)
    mu = mus[-1]
    assert len(zs) == 4
    for b in range(2):
        wanted_mu, wanted_zs = naive_iterate(x[b].numpy(), unit.mu.numpy()[0].T, kernel,
                                             1.0, norm, 4)
        assert near(mu[b], wanted_mu.T, 1e-10)
        for z, wanted in zip(zs, wanted_zs, strict=True):
            assert near(z[b], wanted, 1e-10)


@pytest.mark.parametrize('words', [
    dict(), dict(kernel='dot'), dict(kernel='euclidean', scale=0.5), dict(norm='none'),
    dict(norm='layer_norm'), dict(scale=3.0), dict(conv1='absent')])
@pytest.mark.parametrize('stages', [1, 3])
def test_whole_forward(words, stages):
    unit = make_unit(stages=stages, **words).eval()
    if unit.conv1 is not None:
        assert unit.conv1.bias.abs().max() > 0  # the loop's bias is a real one
    x = make_images()
    y, zs = unit(x, return_z=True)
    choice = {k: v for k, v in words.items() if k != 'conv1'}
    for b in range(2):
        wanted, _, wanted_zs = naive_forward(unit, x[b].numpy(), stages, **choice)
        assert near(y[b], wanted, 1e-10)
        assert near(torch.stack(zs)[:, b], np.array(wanted_zs), 1e-10)


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


# -- properties ------------------------------------------------------------------------

@pytest.mark.parametrize('kernel', ['exp_dot', 'dot', 'euclidean'])
def test_responsibilities_are_shares(kernel):
    _, zs = make_unit(kernel=kernel)(make_images(b=3), return_z=True)
    assert len(zs) == 3
    for z in zs:
        assert z.shape == (3, 6, 3)
        assert (z >= 0).all() and near(z.sum(2), torch.ones(3, 6))


def test_permuted_pixels_permute_the_output():
    unit, x = make_unit().eval(), make_images(h=3, w=4)
    order = torch.randperm(12)
    moved = x.flatten(2)[:, :, order].unflatten(2, (3, 4))
    assert near(unit(moved).flatten(2), unit(x).flatten(2)[:, :, order], 1e-10)
    assert not near(unit(moved), unit(x), 1e-3)


def test_images_do_not_see_each_other():
    unit, x = make_unit().eval(), make_images(b=3)
    assert near(unit(x)[1:2], unit(x[1:2]), 1e-12)


def test_responsibilities_lie_on_their_pixels():
    unit = make_unit(conv1='absent', bases=2, stages=2).eval()
    unit.mu.copy_(torch.eye(4)[None, :, :2])
    x = torch.zeros(1, 4, 3, 5).double()
    x[0, 1] = 4                       # everything is like basis 1 ...
    x[0, :2, 2, 1] = torch.tensor([4., 0]).double()  # ... but row 2, column 1
    _, zs = unit(x, return_z=True)
    assert len(zs) == 2
    for z in zs:
        maps = z.unflatten(1, (3, 5))[0]              # (h, w, k)
        assert maps[2, 1, 0] > 0.9 and maps[2, 1, 1] < 0.1
        rest = maps[..., 0].clone()
        rest[2, 1] = 0
        assert rest.max() < 0.1


def test_large_lambda_is_a_step_of_k_means():
    unit = make_unit(2, 2, kernel='euclidean', norm='none', scale=1e4, stages=1)
    mu = torch.tensor([[[0., 10], [0, 10]]]).double()           # (0, 0) and (10, 10)
    x = torch.tensor([[[1., 1], [3, -1], [9, 11], [20, 12], [4.9, 5.0]]]).double()
    z = unit.expect(x, mu)
    assert near(z[0], [[1, 0], [1, 0], [0, 1], [0, 1], [1, 0]])
    wanted = torch.tensor([[8.9 / 3, 14.5], [5.0 / 3, 11.5]])
    assert near(unit.maximise(x, z)[0], wanted, 1e-6)


def test_large_lambda_is_a_step_of_spherical_k_means():
    unit = make_unit(2, 2, kernel='exp_dot', norm='l2', scale=1e4, stages=1)
    mu = torch.eye(2)[None].double()
    x = torch.tensor([[[5., 1], [3, 2], [0, 1], [1, 3]]]).double()
    z = unit.expect(x, mu)
    assert near(z[0], [[1, 0], [1, 0], [0, 1], [0, 1]])
    one, two = np.array([8, 3]) / math.hypot(8, 3), np.array([1, 4]) / math.hypot(1, 4)
    assert near(unit.maximise(x, z)[0], np.array([one, two]).T, 1e-5)


# -- the update of the bases, eq. 15 ---------------------------------------------------

@pytest.mark.parametrize('momentum', [0.9, 0.25])
@pytest.mark.parametrize('renorm', [False, True])
def test_moving_average(momentum, renorm):
    unit, x = make_unit(momentum=momentum, renorm=renorm), make_images(b=3)
    for _ in range(2):  # the second starts from what the first has left
        mean = mean_of_last_bases(unit, x)
        if renorm:
            mean = mean / (EPS + mean.square().sum(1, keepdim=True).sqrt())
        wanted = momentum * unit.mu + (1 - momentum) * mean
        before = unit.mu.clone()
        unit(x)
        assert near(unit.mu, wanted, 1e-10)
        assert not near(unit.mu, before, 1e-3)


def test_moving_average_over_two_forwards():
    unit, x = make_unit(auto_update=False), make_images(b=3)
    wanted = 0.9 * unit.mu + 0.1 * mean_of_last_bases(unit, x)
    before = unit.mu.clone()
    unit(x[:1])  # one image, then two: the mean is over images, not over forwards
    unit(x[1:])
    assert torch.equal(unit.mu, before)
    unit.update_bases()
    assert near(unit.mu, wanted, 1e-10)
    wanted = 0.9 * unit.mu + 0.1 * mean_of_last_bases(unit, x[:2])
    unit(x[:2])
    unit.update_bases()  # nothing of the batch before is in it
    assert near(unit.mu, wanted, 1e-10)


@pytest.mark.parametrize('is_sound', [False, torch.tensor(False)])
def test_moving_average_is_withheld(is_sound):
    unit, x = make_unit(auto_update=False), make_images()
    before = unit.mu.clone()
    unit(x * math.nan)
    unit.update_bases(is_sound)
    assert torch.equal(unit.mu, before)
    wanted = 0.9 * unit.mu + 0.1 * mean_of_last_bases(unit, x)
    unit(x)
    unit.update_bases(torch.tensor(True))
    assert near(unit.mu, wanted, 1e-10)


def test_update_without_images_leaves_the_bases():
    unit = make_unit(auto_update=False)
    before = unit.mu.clone()
    unit.eval()(make_images())
    unit.update_bases()
    assert torch.equal(unit.mu, before)


def test_bases_are_fixed_at_evaluation_and_without_update():
    x = make_images()
    for unit in (make_unit().eval(), make_unit(update='never')):
        before = unit.mu.clone()
        unit(x)
        assert torch.equal(unit.mu, before)
    unit.update_bases()
    assert torch.equal(unit.mu, before)


def test_two_ranks_are_one_process(tmp_path):
    x = make_images(b=5).float()
    unit = EMAU(4, 3, auto_update=False)
    torch.save({'x': x, 'state': unit.state_dict()}, tmp_path / 'in.pth')
    code = '''
import os, sys, time, torch
import torch.distributed as dist
from network import EMAU
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank,
                        world_size=2)
given = torch.load(f'{folder}/in.pth')
unit = EMAU(4, 3, auto_update=False)
unit.load_state_dict(given['state'])
mine = given['x'][:1] if rank == 0 else given['x'][1:]
for part in mine.split(2):
    unit(part)
unit.update_bases()
torch.save(unit.mu, f'{folder}/{rank}.pth')
while not all(os.path.exists(f'{folder}/{r}.pth') for r in (0, 1)):
    time.sleep(0.01)
os._exit(0)  # torch 2.6 now and then hangs when it takes a file store down
'''
    ranks = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path), str(rank)],
                              cwd=HERE, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, 'OMP_NUM_THREADS': '1'})
             for rank in (0, 1)]
    try:
        for rank in ranks:
            _, error = rank.communicate(timeout=100)
            assert rank.returncode == 0, error
    finally:
        for rank in ranks:
            rank.kill()
    one, two = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    assert torch.equal(one, two)
    alone = EMAU(4, 3)
    alone.load_state_dict(unit.state_dict())
    alone(x)
    assert near(one, alone.mu, 1e-6)
    assert not near(one, unit.mu, 1e-3)


# -- gradients -------------------------------------------------------------------------

def test_no_gradient_reaches_conv1_by_default():
    unit, x = make_unit(), make_images().requires_grad_()
    assert not unit.conv1.weight.requires_grad and not unit.conv1.bias.requires_grad
    weights = torch.randn(2, 4, 2, 3).double()
    before = [p.clone() for p in unit.conv1.parameters()]
    y = unit(x)
    (y * weights).sum().backward()
    assert unit.conv1.weight.grad is None and unit.conv1.bias.grad is None
    assert unit.conv2[0].weight.grad.abs().sum() > 0
    assert near(x.grad, weights * (y > 0))  # the residual's gradient, and no other
    assert all(map(torch.equal, before, unit.conv1.parameters()))


def gradients_by_hand(unit, x, weights, n_detached, stages=3):
    """Gradients of (x, conv1.weight, mu) where the first stages are taken as given."""
    x = x.clone().requires_grad_()
    w1, b1, mu0, w2 = (p.detach().clone().requires_grad_() for p in (
        unit.conv1.weight, unit.conv1.bias, unit.mu, unit.conv2[0].weight))
    bn = unit.conv2[1]
    feats = torch.einsum('oc,bchw->bhwo', w1[:, :, 0, 0], x) + b1
    feats = feats.reshape(len(x), -1, x.shape[1])
    mu = mu0[0].T.expand(len(x), -1, -1)                           # (b, k, c)
    for t in range(stages):
        z = torch.einsum('bnc,bkc->bnk', feats, mu).exp()
        z = z / z.sum(2, keepdim=True)
        raw = torch.einsum('bnk,bnc->bkc', z / (EPS + z.sum(1, keepdim=True)), feats)
        mu = raw / (EPS + raw.square().sum(2, keepdim=True).sqrt())
        if t < n_detached:
            mu = mu.detach()
    y = torch.einsum('bnk,bkc->bcn', z, mu).reshape(x.shape).relu()
    y = torch.einsum('oc,bchw->bohw', w2[:, :, 0, 0], y)
    mean, var, gain, shift = (v.detach().view(1, -1, 1, 1) for v in (
        bn.running_mean, bn.running_var, bn.weight, bn.bias))
    y = ((y - mean) / (var + bn.eps).sqrt() * gain + shift + x).relu()
    (y * weights).sum().backward()
    return x.grad, w1.grad, w2.grad, mu0.grad


@pytest.mark.parametrize('gradient, n_detached', [('full', 0), ('last', 2)])
def test_gradient_through_the_iterations(gradient, n_detached):
    unit = make_unit(gradient=gradient).eval()  # so that batch norm is a given line
    assert unit.conv1.weight.requires_grad
    x, weights = make_images().requires_grad_(), torch.randn(2, 4, 2, 3).double()
    (unit(x) * weights).sum().backward()
    wanted = gradients_by_hand(unit, x.detach(), weights, n_detached)
    found = (x.grad, unit.conv1.weight.grad, unit.conv2[0].weight.grad)
    for a, b in zip(found, wanted, strict=False):
        assert near(a, b, 1e-9)
    other = gradients_by_hand(unit, x.detach(), weights, 2 - n_detached)
    assert not near(found[1], other[1], 1e-4)


def test_back_propagation_trains_the_bases():
    unit = make_unit(update='back_propagation', gradient='full').eval()
    assert 'mu' in dict(unit.named_parameters())
    x, weights = make_images(), torch.randn(2, 4, 2, 3).double()
    (unit(x) * weights).sum().backward()
    wanted = gradients_by_hand(unit, x, weights, 0)[3]
    assert wanted.abs().max() > 1e-6 and near(unit.mu.grad, wanted, 1e-9)
    before = unit.mu.detach().clone()
    unit.train()(x)
    unit.update_bases()
    assert torch.equal(unit.mu, before)  # only the optimizer moves them


@pytest.mark.parametrize('gradient', ['none', 'last'])
def test_back_propagation_wants_the_whole_gradient(gradient):
    with pytest.raises(ValueError, match="gradient='?" + gradient):
        EMAU(4, 3, update='back_propagation', gradient=gradient)


def test_conv1_choices():
    with pytest.raises(ValueError, match="conv1='trained'.*gradient='none'"):
        EMAU(4, 3, conv1='trained', gradient='none')
    fixed = make_unit(conv1='fixed', gradient='full')
    fixed(make_images()).sum().backward()
    assert fixed.conv1.weight.grad is None
    trained = make_unit(conv1='trained', gradient='last')
    trained(make_images()).sum().backward()
    assert trained.conv1.weight.grad.abs().sum() > 0
    absent = make_unit(conv1='absent')
    assert not any('conv1' in key for key in absent.state_dict())


@pytest.mark.parametrize('words', [
    dict(kernel='cosine'), dict(norm='l1'), dict(update='ema'), dict(gradient='first'),
    dict(conv1='yes'), dict(stages=0), dict(eval_stages=-1), dict(bases=0),
    dict(kernel='dot', scale=2.0)])
def test_what_cannot_be_is_refused(words):
    with pytest.raises(ValueError) as caught:
        EMAU(4, **{'bases': 3, **words})
    assert str(list(words.values())[-1]) in str(caught.value)


# -- precision and state ---------------------------------------------------------------

@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.05),
                                              (torch.float16, 0.01)])
def test_autocast_keeps_the_bases_in_float32(dtype, tolerance):
    x = make_images(b=2, c=16, h=5, w=5).float()
    exact, unit = (make_unit(16, 8).float() for _ in range(2))
    wanted = exact(x)
    with torch.autocast('cpu', dtype):
        y, zs = unit(x, return_z=True)
    assert unit.mu.dtype == torch.float32
    assert all(z.dtype == torch.float32 for z in zs)
    assert (y.float() - wanted).abs().max() < tolerance * wanted.abs().max()
    assert (unit.mu - exact.mu).abs().max() < tolerance * exact.mu.abs().max()
    # The very same projected features give bases that are right to float32.
    with torch.autocast('cpu', dtype):
        feats = exact.conv1(x)
    unit = make_unit(16, 8, conv1='absent').float()
    exact = make_unit(16, 8, conv1='absent')
    unit.mu.copy_(exact.mu)
    with torch.autocast('cpu', dtype):
        unit(feats)
    exact(feats.double())
    assert near(unit.mu, exact.mu, 1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('update', ['moving_average', 'back_propagation', 'never'])
def test_cast_module_keeps_the_bases_in_float32(dtype, update):
    gradient = 'full' if update == 'back_propagation' else 'none'
    unit = EMAU(4, 3, update=update, gradient=gradient)
    before = unit.mu.detach().clone()
    unit.to(dtype)
    assert unit.conv2[0].weight.dtype == dtype
    assert unit.mu.dtype == torch.float32 and torch.equal(unit.mu, before)
    assert (unit.mu.to(dtype) != unit.mu).any()  # a detour through dtype would show
    assert unit(make_images().to(dtype)).dtype == dtype
    assert EMAU(4, 3).double().mu.dtype == torch.float64


def test_float16_of_a_cast_module_updates_as_float32():
    x = make_images().half()
    unit = make_unit(conv1='absent').float().half()
    exact = make_unit(conv1='absent').float().double()
    unit(x)
    exact(x.double())
    assert near(unit.mu, exact.mu, 1e-6)


def test_huge_activations_stay_finite():
    unit = make_unit(conv1='absent').float().half()
    unit.conv2[1].reset_parameters()
    x = make_images(h=4, w=4).sign().half() * 6e4
    with torch.no_grad():
        for _ in range(3):
            y, zs = unit(x, return_z=True)
    assert y.isfinite().all() and y.max() >= 6e4
    assert all(near(z.sum(2), torch.ones(2, 16), 1e-5) for z in zs)
    lengths = unit.mu.norm(dim=1)
    assert unit.mu.isfinite().all() and (lengths > 0.7).all() and (lengths < 1.01).all()


def test_state_holds_the_bases_and_nothing_transient():
    unit, x = make_unit(auto_update=False), make_images()
    keys = set(unit.state_dict())
    assert keys == {'mu', 'conv1.weight', 'conv1.bias', 'conv2.0.weight',
                    *(f'conv2.1.{name}' for name in (
                        'weight', 'bias', 'running_mean', 'running_var',
                        'num_batches_tracked'))}
    unit(x)
    assert set(unit.state_dict()) == keys
    assert unit.state_dict()['mu'].shape == (1, 4, 3)
    trained = make_unit(update='back_propagation', gradient='full')
    trained.load_state_dict(unit.state_dict())
    assert torch.equal(trained.mu, unit.mu)


def test_the_unit_does_not_spoil_its_input():
    unit, x = make_unit(), make_images()
    before = x.clone()
    unit(x)
    assert torch.equal(x, before)


def test_head_is_fc0_unit_fc1_fc2():
    torch.manual_seed(0)
    head = network.EMAHead(6, 5, channels=4, fc1_channels=3, bases=2).double().eval()
    x = torch.randn(2, 6, 4, 4).double()
    a = F.conv2d(x, head.fc0.conv.weight, padding=1) / math.sqrt(1 + 1e-5)
    y = head.emau(a.relu())
    y = (F.conv2d(y, head.fc1.conv.weight, padding=1) / math.sqrt(1 + 1e-5)).relu()
    y = F.conv2d(y, head.fc2.weight, head.fc2.bias)
    assert near(head([None, x]), y, 1e-10)
    assert isinstance(head.dropout, torch.nn.Dropout2d) and head.dropout.p == 0.1
