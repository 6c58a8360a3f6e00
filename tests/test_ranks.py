"""Several ranks train as one process would: gloo on the CPU."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HERE, TINY, run_script, write_voc
from test_scripts import compare, is_one_sentence, losses, read


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    root = write_voc(tmp_path_factory.mktemp('ranks') / 'VOC2012', 11, 5)
    return [*TINY, 'DATASET=voc', f'DATA_ROOT={root}', 'TRAIN_SPLIT=train',
            'CROP_SIZE=65', 'BATCH_SIZE=4', 'DROPOUT=0', 'LR=0.002', 'LR_POWER=0',
            'ITER_MAX=10', 'ITER_SAVE=30', 'SCALES=1.0,1.5']


@pytest.fixture(scope='module')
def alone(train, words, tmp_path_factory):
    """The log of one process in float64, that others are compared with."""
    log = tmp_path_factory.mktemp('alone') / 'log'
    train(1, words, log, double=True)
    return log


@pytest.fixture(scope='module')
def train(zygote):
    """A function that trains with n ranks, see ranked.py; returns final.pth."""
    def run(n, words, log, **options):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        places = [{'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(n),
                   'LOCAL_WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1',
                   'MASTER_PORT': str(port)} for rank in range(n)] if n > 1 else [{}]
        out = log.parent / 'out'
        status = zygote([*words, f'LOG_DIR={log}'], out, None, places, options)
        assert status == 0, Path(f'{out}.err').read_text()
        return read(log / 'final.pth')
    return run


def check_same(one, other, tolerance, least=1e-6):
    """Compare weights, running statistics and bases, relative to their size."""
    assert one['net'].keys() == other['net'].keys()
    for name, tensor in one['net'].items():
        if tensor.is_floating_point():
            scale = tensor.norm().clamp(min=least)
            error = (tensor - other['net'][name]).norm() / scale
            assert error < tolerance, (name, error)


def check_losses(one, other, tolerance):
    one, other = losses(one), losses(other)
    assert one.keys() == other.keys() and len(one) == 10
    for step, loss in one.items():
        assert abs(loss - other[step]) < tolerance * abs(loss), step


def test_two_ranks_are_one_process(train, alone, words, tmp_path):
    found = train(2, words, tmp_path / 'log', double=True)
    check_losses(alone, tmp_path / 'log', 1e-9)
    check_same(read(alone / 'final.pth'), found, 1e-8)
    text = (tmp_path / 'log/log.txt').read_text()
    assert '2 at a time on each of 2 ranks' in text and text.count(' cpu (') == 2


@pytest.mark.slow  # in float64 it is shown exactly
def test_two_ranks_in_single_precision(train, words, tmp_path):
    """At a low rate: float32's noise grows tenfold a step in a tiny random network."""
    words = [*words, 'LR=1e-6']
    found = [train(n, words, tmp_path / f'log{n}') for n in (1, 2)]
    check_losses(tmp_path / 'log1', tmp_path / 'log2', 1e-5)
    check_same(*found, 1e-5, least=0.01)  # biases, which start at 0, are tiny still


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['all', 'valid'])
def test_ranks_and_accumulation(norm, train, words, tmp_path):
    words = [*words, f'LOSS_NORM={norm}', 'CLIP_GRAD=2', 'AUX_WEIGHT=0.4']
    found = [train(n, [*words, f'ACCUMULATE={4 // n}'], tmp_path / f'log{n}',
                   double=True, bn_eval=True) for n in (1, 2)]
    check_losses(tmp_path / 'log1', tmp_path / 'log2', 1e-9)
    check_same(*found, 1e-8)


@pytest.mark.slow
def test_four_ranks(train, alone, words, tmp_path):
    found = train(4, words, tmp_path / 'log', double=True)
    check_losses(alone, tmp_path / 'log', 1e-9)
    check_same(read(alone / 'final.pth'), found, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('first, then', [(1, 2), (2, 1)])
def test_the_number_of_ranks_may_change(first, then, train, alone, words,
                                         tmp_path):
    log = tmp_path / 'log'
    train(first, [*words, 'ITER_MAX=4'], log, double=True)
    found = train(then, [*words, 'RESUME=force'], log, double=True)
    check_losses(alone, log, 1e-9)
    check_same(read(alone / 'final.pth'), found, 1e-8)


def test_resumed_with_as_many_ranks_it_is_the_same_to_the_bit(train, words, tmp_path):
    whole = train(2, words, tmp_path / 'whole')
    train(2, [*words, 'ITER_MAX=4'], tmp_path / 'cut')
    found = train(2, [*words, 'RESUME=force'], tmp_path / 'cut')
    compare(whole['net'], found['net'])
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'cut')


def test_evaluation_is_shared(words, tmp_path):
    log = tmp_path / 'log'
    done = run_script('train.py', *words, 'ITER_MAX=2', f'LOG_DIR={log}')
    assert done.returncode == 0, done.stderr
    found = []
    for n in (1, 2):
        done = run_script('eval.py', f'LOG_DIR={log}', f'RANKS={n}', 'DEVICE=cpu')
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('mIoU') == 1
        assert f'processes: {n}' in done.stdout
        found.append(json.loads((log / 'eval/voc_val_final.json').read_text()))
    assert found[0]['confusion'] == found[1]['confusion']
    assert found[0]['n_images'] == found[1]['n_images'] == 5


def test_sigterm_to_the_launcher(words, tmp_path):
    log = tmp_path / 'log'
    words = [*words, 'RANKS=2', 'ITER_MAX=1000', 'ITER_SAVE=100000', 'EVAL_EVERY=3',
             'N_WORKERS=1', f'LOG_DIR={log}']
    run = subprocess.Popen([sys.executable, str(HERE / 'train.py'), *words],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 100
    while time.time() < end and not ((log / 'log.jsonl').exists()
                                     and len(losses(log)) > 3):
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, error = run.communicate(timeout=100)
    assert run.returncode == 75, error
    assert out.count('stopped after step') == 1
    step = read(log / 'latest.pth')['step']
    assert step == max(losses(log))
    done = run_script('train.py', *words, f'ITER_MAX={step + 1}', 'RESUME=force',
                      'RANKS=1')
    assert done.returncode == 0, done.stderr
    assert f'after step {step}' in done.stdout


def test_a_rank_that_dies(alone, words, tmp_path):
    """torchrun starts all ranks again, and they go on from the last checkpoint."""
    log = tmp_path / 'log'
    options = json.dumps({'die': str(tmp_path / 'died'), 'double': True})
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone',
         '--nproc-per-node=2', '--max-restarts=2', str(HERE / 'tests/ranked.py'),
         options, *words, 'ITER_SAVE=20', f'LOG_DIR={log}'], text=True,
        capture_output=True, timeout=200,
        env={**os.environ, 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'died').exists() and 'resuming' in done.stdout
    check_same(read(alone / 'final.pth'), read(log / 'final.pth'), 1e-8)
    check_losses(alone, log, 1e-9)


def test_what_ranks_cannot_do_is_one_sentence(words, tmp_path):
    words = [*words, f'LOG_DIR={tmp_path}']
    is_one_sentence(run_script('train.py', *words, 'RANKS=-1'), 'RANKS=-1')
    is_one_sentence(run_script('train.py', *words, 'RANKS=3'), 'a multiple of 3')
