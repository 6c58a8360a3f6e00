"""What only a CUDA device shows; all of it is skipped where there is none.

    sh test.sh tests/test_gpu.py
"""
import gc
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_reference
import torch
import torch.distributed as dist
from conftest import HERE, compare, losses, read
from test_train import make_batch, make_session, weights

import checkpoint
import config
import distributed
import inference
import network
import settings
import train
from training import memory

pytestmark = pytest.mark.gpu
CUDA = torch.device('cuda')
CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def without_tf32():
    """Compute float32 in full, so that it can be compared with the CPU."""
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = False
    yield
    for part, value in zip(parts, before, strict=True):
        part.allow_tf32 = value


def take_steps(monkeypatch, device, n=3, **values):
    """Return a session and the losses (2,) of its first steps, on the CPU."""
    session = make_session(monkeypatch, device, DROPOUT=0.0, **values)
    return session, [session.train_step(*make_batch(i))[0].cpu() for i in range(n)]


def check_close(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=tolerance)


# -- a step ----------------------------------------------------------------------------

@pytest.mark.parametrize('precision, tolerance', [('fp32', 1e-3), ('bf16', 0.05),
                                                  ('fp16', 0.05)])
def test_steps_are_those_of_the_cpu(precision, tolerance, monkeypatch):
    _, wanted = take_steps(monkeypatch, 'cpu')
    session, found = take_steps(monkeypatch, 'cuda', PRECISION=precision)
    check_close(found, wanted, tolerance)
    bias = session.model.head.classifier.bias
    before, bases = weights(session), session.model.head.emau.mu.clone()
    with torch.no_grad():
        bias[0] = before['head.classifier.bias'][0] = math.nan
    session.train_step(*make_batch(4))  # is withheld
    assert int(session.first_nonfinite_step) == 4
    assert torch.equal(session.model.head.emau.mu, bases)
    for name, value in weights(session).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_the_scaler_withholds_a_step_in_fp16(monkeypatch):
    session = make_session(monkeypatch, 'cuda', PRECISION='fp16')
    session.scaler._init_scale = 2.0 ** 30
    before = weights(session)
    session.train_step(*make_batch())
    assert session.scaler.get_scale() == 2.0 ** 29 and int(session.n_withheld) == 1
    for name, value in weights(session).items():
        assert torch.equal(value, before[name]), name
    while int(session.n_withheld):
        assert session.step < 30
        session.train_step(*make_batch(session.step))
    assert int(session.first_nonfinite_step) == 0


def test_channels_last_is_the_same(monkeypatch):
    found = []
    for is_last in (False, True):
        session, step_losses = take_steps(monkeypatch, 'cuda', CHANNELS_LAST=is_last)
        found.append(step_losses)
        weight = session.model.backbone.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == is_last
    check_close(*found, 1e-3)


def test_compiled_steps_are_the_same(monkeypatch):
    _, wanted = take_steps(monkeypatch, 'cuda')
    _, found = take_steps(monkeypatch, 'cuda', COMPILE=True)
    # TF32 convolutions, and other kernels: 1.5e-3 was seen on an H200
    check_close(found, wanted, 5e-3)


def test_bf16_is_taken_where_the_hardware_has_it(monkeypatch):
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert distributed.has_native_bf16(CUDA) == has_bf16
    monkeypatch.setattr(settings, 'PRECISION', 'auto')
    assert distributed.pick_precision(CUDA) == ('bf16' if has_bf16 else 'fp16')


# -- memory ----------------------------------------------------------------------------

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_memory_is_estimated(precision, monkeypatch):
    gc.collect()  # sessions of other tests
    others = torch.cuda.memory_allocated()
    session = make_session(monkeypatch, 'cuda', N_LAYERS=50, STRIDE=8, CROP_SIZE=257,
                           BATCH_SIZE=4, HEAD_CHANNELS=512, FC1_CHANNELS=256,
                           PRECISION=precision)
    estimate = memory.estimate_memory(5, precision)
    images = torch.zeros(4, 3, 257, 257, dtype=torch.uint8)
    labels = torch.zeros(4, 257, 257, dtype=torch.uint8)
    session.train_step(images, labels)
    torch.cuda.reset_peak_memory_stats()
    session.train_step(images, labels)
    found = (torch.cuda.max_memory_allocated() - others) / 1e9
    assert 0.5 < found / estimate < 2, (found, estimate)


def test_out_of_memory_is_a_sentence(tiny, monkeypatch):
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    limit = torch.cuda.memory_reserved() + 500e6
    torch.cuda.set_per_process_memory_fraction(limit / total)
    monkeypatch.setattr(sys, 'argv', [
        'train.py', *tiny, 'DEVICE=cuda:0', 'CROP_SIZE=513', 'BATCH_SIZE=16',
        'ITER_MAX=1'])
    try:
        with pytest.raises(config.UserError, match='cuda:0 does not hold .*ACCUMULATE'):
            train.main()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# -- the evaluation --------------------------------------------------------------------

def test_predictions_are_exact_and_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    net = make_session(monkeypatch).model.eval()
    images = [torch.randint(256, (3, 50, 61), dtype=torch.uint8)]
    found = []
    for device in (CPU, CUDA, CUDA):
        predictor = inference.Predictor([net.to(device)], device, 'fp32',
                                        scales=(0.5, 1), use_flip=True)
        found.append(predictor.predict(images)[0].cpu())
    assert torch.equal(found[1], found[2])
    assert torch.allclose(found[0], found[1], atol=1e-4)


@pytest.mark.skipif(not test_reference.REFERENCE.is_dir(), reason='no reference')
def test_logits_are_the_reference(monkeypatch, tmp_path):
    expected = np.load(test_reference.REFERENCE / 'expected.npz')
    make = test_reference.make_weights.__wrapped__()
    path = tmp_path / 'reference50.pth'
    torch.save({'net': make(50), 'step': 1}, path)
    content = checkpoint.load(path)
    for name, value in {**content['settings'], 'STRIDE': 8}.items():
        monkeypatch.setattr(settings, name, value)
    net = network.build(21, is_eval=True)
    checkpoint.load_net(net, content['net'], path)
    image = torch.from_numpy(expected['eval_50_8_image']).permute(2, 0, 1)
    logits = inference.predict_logits(net.to(CUDA), image).cpu().numpy()
    wanted = expected['eval_50_8_logits_every4']
    found = logits[:, ::4, ::4]
    wanted = wanted[:, :found.shape[1], :found.shape[2]]
    assert np.abs(found - wanted).max() < 1e-4 * np.ptp(wanted)


# -- ranks and whole runs --------------------------------------------------------------

@pytest.fixture
def nccl(monkeypatch):
    """A process group of one rank."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'tcp://127.0.0.1:{free.getsockname()[1]}'
    torch.cuda.set_device(0)
    dist.init_process_group('nccl', init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_rank_of_nccl_is_the_plain_network(nccl, monkeypatch):
    """DDP and SyncBatchNorm change neither the losses nor the gradients."""
    found = []
    for is_wrapped in (False, True):
        model = make_session(monkeypatch, DROPOUT=0.0).model
        if is_wrapped:
            model = distributed.convert_sync_batchnorm(model, 'cuda')
            n_synced = sum(isinstance(module, torch.nn.SyncBatchNorm)
                           for module in model.modules())
            assert n_synced > 10
        model.to(CUDA)
        wrapped = distributed.wrap_ddp(model) if is_wrapped else model
        images, labels = make_batch()
        batch_losses, _ = wrapped(images.to(CUDA), labels.to(CUDA))
        batch_losses.mean().backward()
        found.append((batch_losses.detach(), model.head.classifier.weight.grad.clone(),
                      model.backbone.layer4[0].conv1.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() < 1e-3 * one.norm()


def train_alone(words, **change):
    """Run train.py in a fresh python, changed as tests/ranked.py says."""
    done = subprocess.run(
        [sys.executable, str(HERE / 'tests' / 'ranked.py'), json.dumps(change), *words],
        text=True, capture_output=True, timeout=300,
        env={**os.environ, 'CUBLAS_WORKSPACE_CONFIG': ':4096:8'})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_resume_is_exact(precision, tiny, tmp_path):
    words = [*tiny, 'DEVICE=cuda:0', f'PRECISION={precision}', 'LR_POWER=0']
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    train_alone([*words, 'ITER_MAX=4', f'LOG_DIR={whole}'], deterministic=True)
    train_alone([*words, 'ITER_MAX=2', f'LOG_DIR={cut}'], deterministic=True)
    train_alone([*words, 'ITER_MAX=4', f'LOG_DIR={cut}', 'RESUME=force'],
                deterministic=True)
    assert losses(whole) == losses(cut)
    for key in ('net', 'optimizer', 'scaler'):
        compare(read(whole / 'latest.pth')[key], read(cut / 'latest.pth')[key], key)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two CUDA devices')
def test_two_gpus_are_one(tiny, tmp_path):
    found = []
    for devices in ('cuda:0', 'cuda:0,1'):
        log = Path(tmp_path, devices)
        words = [*tiny, 'ITER_MAX=3', 'DROPOUT=0', 'LR=1e-6']
        done = subprocess.run(
            [sys.executable, str(HERE / 'train.py'), *words, f'DEVICE={devices}',
             'RANKS=0', f'LOG_DIR={log}'], text=True, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(list(losses(log).values()))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
