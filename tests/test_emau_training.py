"""The EM attention unit while it trains: bases, gradients, precision and state."""
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import run_ranks
from test_emau import EPS, make_images, make_unit, naive_iterate, near, project
from torch.utils.checkpoint import checkpoint

from emau import EMAU


def mean_of_last_bases(unit, x, **words):
    """The mean over images of mu^(T), (1, c, k), from the loops."""
    mu0 = unit.mu.detach().numpy()[0].T
    last = [naive_iterate(project(unit, image), mu0, **words)[0] for image in x.numpy()]
    return torch.from_numpy(np.mean(last, 0).T[None])


# -- the update of the bases, eq. 15 ---------------------------------------------------

@pytest.mark.parametrize('momentum', [0.9, 0.25])
@pytest.mark.parametrize('renorm', [False, True])
def test_moving_average(momentum, renorm):
    unit, x = make_unit(momentum=momentum, renorm=renorm), make_images(b=3)
    for _ in range(2):  # the second starts from what the first has left
        mean = mean_of_last_bases(unit, x)
        if renorm:
            mean = mean / (EPS + mean.square().sum(1, keepdim=True).sqrt())
        expected = momentum * unit.mu + (1 - momentum) * mean
        before = unit.mu.clone()
        unit(x)
        assert near(unit.mu, expected, 1e-10)
        assert not near(unit.mu, before, 1e-3)


def test_moving_average_over_two_forwards():
    unit, x = make_unit(auto_update=False), make_images(b=3)
    expected = 0.9 * unit.mu + 0.1 * mean_of_last_bases(unit, x)
    before = unit.mu.clone()
    unit(x[:1])  # one image, then two: the mean is over images, not over forwards
    unit(x[1:])
    assert torch.equal(unit.mu, before)
    unit.update_bases()
    assert near(unit.mu, expected, 1e-10)
    expected = 0.9 * unit.mu + 0.1 * mean_of_last_bases(unit, x[:2])
    unit(x[:2])
    unit.update_bases()  # nothing of the batch before is in it
    assert near(unit.mu, expected, 1e-10)


@pytest.mark.parametrize('is_finite', [False, torch.tensor(False)])
def test_moving_average_is_withheld(is_finite):
    unit, x = make_unit(auto_update=False), make_images()
    before = unit.mu.clone()
    unit(x * math.nan)
    unit.update_bases(is_finite)
    assert torch.equal(unit.mu, before)
    expected = 0.9 * unit.mu + 0.1 * mean_of_last_bases(unit, x)
    unit(x)
    unit.update_bases(torch.tensor(True))
    assert near(unit.mu, expected, 1e-10)


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


def test_usage_is_the_mean_responsibility():
    unit = make_unit(bases=4, stages=2, auto_update=False)
    x = make_images(b=3)
    _, zs = unit(x, return_z=True)
    unit(x[:1])  # a second part of the batch
    unit.update_bases()
    each = zs[-1].mean(1)                                          # (3, k)
    assert near(unit.usage, (each.sum(0) + each[0]) / 4)
    assert unit.usage_sum.abs().max() == 0
    before = unit.usage.clone()
    unit(x)
    unit.update_bases(False)
    assert torch.equal(unit.usage, before)


def update_as_rank():
    """Update the bases with one rank's share of the images; the words name the folder.
    """
    folder = Path(sys.argv[1])
    dist.init_process_group('gloo')
    given = torch.load(folder / 'in.pth')
    unit = EMAU(4, 3, auto_update=False)
    unit.load_state_dict(given['state'])
    share = given['x'][:1] if dist.get_rank() == 0 else given['x'][1:]
    for part in share.split(2):
        unit(part)
    unit.update_bases()
    torch.save({'mu': unit.mu, 'usage': unit.usage},
               folder / f'{dist.get_rank()}.pth')
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_are_one_process(tmp_path):
    x = make_images(b=5).float()
    unit = EMAU(4, 3, auto_update=False)
    torch.save({'x': x, 'state': unit.state_dict()}, tmp_path / 'in.pth')
    for done in run_ranks(2, 'test_emau_training:update_as_rank', tmp_path):
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    alone = EMAU(4, 3)
    alone.load_state_dict(unit.state_dict())
    alone(x)
    for name in ('mu', 'usage'):
        assert torch.equal(one[name], two[name])
        assert near(one[name], getattr(alone, name), 1e-6)
        assert not near(one[name], getattr(unit, name), 1e-3)


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
    expected = gradients_by_hand(unit, x.detach(), weights, n_detached)
    actual = (x.grad, unit.conv1.weight.grad, unit.conv2[0].weight.grad)
    for a, b in zip(actual, expected, strict=False):
        assert near(a, b, 1e-9)
    other = gradients_by_hand(unit, x.detach(), weights, 2 - n_detached)
    assert not near(actual[1], other[1], 1e-4)


def test_back_propagation_trains_the_bases():
    unit = make_unit(update='back_propagation', gradient='full').eval()
    assert 'mu' in dict(unit.named_parameters())
    x, weights = make_images(), torch.randn(2, 4, 2, 3).double()
    (unit(x) * weights).sum().backward()
    expected = gradients_by_hand(unit, x, weights, 0)[3]
    assert expected.abs().max() > 1e-6 and near(unit.mu.grad, expected, 1e-9)
    before = unit.mu.detach().clone()
    unit.train()(x)
    unit.update_bases()
    assert torch.equal(unit.mu, before)  # only the optimizer moves them


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


# -- used alone, in a loop of one's own ------------------------------------------------

KERNELS, GRADIENTS = ('exp_dot', 'dot', 'euclidean'), ('none', 'last', 'full')
UPDATES = ('moving_average', 'never', 'back_propagation')
CASES = [case for case in itertools.product(KERNELS, GRADIENTS, UPDATES)
         if case[1] == 'full' or case[2] != 'back_propagation']


def train_unit(kernel, gradient, update, auto_update, apply=None):
    """Take two steps of SGD; return the gradients of both and the unit."""
    unit = make_unit(kernel=kernel, gradient=gradient, update=update,
                     auto_update=auto_update)
    optimizer = torch.optim.SGD([p for p in unit.parameters() if p.requires_grad], 0.1)
    gradients, weights = [], make_images(seed=5)
    for seed in (1, 2):
        x = make_images(seed=seed).requires_grad_()
        y = unit(x) if apply is None else apply(unit, x)
        optimizer.zero_grad()
        (y * weights).sum().backward()
        gradients += [x.grad, *(p.grad.clone() for p in unit.parameters()
                                if p.grad is not None)]
        optimizer.step()
        if not auto_update:
            unit.update_bases()
    return gradients, unit


@pytest.mark.parametrize('kernel, gradient, update', CASES)
def test_its_own_update_leaves_the_gradients_right(kernel, gradient, update):
    actual, unit = train_unit(kernel, gradient, update, True)
    expected, other = train_unit(kernel, gradient, update, False)
    # x, conv2 and its batch norm; and conv1; and the bases
    n = 4 + 2 * (gradient != 'none') + (update == 'back_propagation')
    assert len(actual) == len(expected) == 2 * n
    assert all(map(torch.equal, actual, expected))
    assert torch.equal(unit.mu, other.mu)
    start = make_unit(kernel=kernel, gradient=gradient, update=update).mu
    assert near(unit.mu.detach(), start.detach(), 1e-4) == (update == 'never')


@pytest.mark.parametrize('auto_update', [True, False])
@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('gradient, update', [
    ('none', 'moving_average'), ('last', 'moving_average'), ('full', 'moving_average'),
    ('full', 'back_propagation'), ('full', 'never')])
def test_activation_checkpointing(gradient, update, use_reentrant, auto_update):
    """The bases move once a step, and the gradients are those of a plain step."""
    def apply(unit, x):
        return checkpoint(unit, x, use_reentrant=use_reentrant)

    actual, unit = train_unit('exp_dot', gradient, update, auto_update, apply)
    expected, other = train_unit('exp_dot', gradient, update, auto_update)
    assert all(map(torch.equal, actual, expected)) and len(actual) == len(expected)
    assert torch.equal(unit.mu, other.mu) and torch.equal(unit.usage, other.usage)


# -- precision and state ---------------------------------------------------------------

@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.05),
                                              (torch.float16, 0.01)])
def test_autocast_keeps_the_bases_in_float32(dtype, tolerance):
    x = make_images(b=2, c=16, h=5, w=5).float()
    exact, unit = (make_unit(16, 8).float() for _ in range(2))
    expected = exact(x)
    with torch.autocast('cpu', dtype):
        y, zs = unit(x, return_z=True)
    assert unit.mu.dtype == torch.float32
    assert all(z.dtype == torch.float32 for z in zs)
    assert (y.float() - expected).abs().max() < tolerance * expected.abs().max()
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
