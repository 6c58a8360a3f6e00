"""Several ranks train as one process would: gloo on the CPU."""
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import (
    HERE,
    TINY,
    Run,
    compare,
    losses,
    read,
    run_ranks,
    run_script,
    wait_for_step,
    write_voc,
)


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    root = write_voc(tmp_path_factory.mktemp('ranks') / 'VOC2012', 11, 5)
    return [*TINY, 'DATASET=voc', f'DATA_ROOT={root}', 'TRAIN_SPLIT=train',
            'CROP_SIZE=65', 'BATCH_SIZE=4', 'DROPOUT=0', 'LR=0.002', 'LR_POWER=0',
            'ITER_MAX=5', 'SCALES=1.0,1.5']


@pytest.fixture(scope='module')
def alone(words, tmp_path_factory):
    """The log of one process in float64, that others are compared with."""
    log = tmp_path_factory.mktemp('alone') / 'log'
    train(1, words, log, double=True)
    return log


def train(n, words, log, rank_words=(), **change):
    """Train with n ranks, see ranked.py; return final.pth."""
    for done in run_ranks(n, 'train.py', *words, f'LOG_DIR={log}',
                          rank_words=rank_words, change=change):
        assert done.returncode == 0, done.stderr
    return read(log / 'final.pth')


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
    assert one.keys() == other.keys() and len(one) == 5
    for step, loss in one.items():
        assert abs(loss - other[step]) < tolerance * abs(loss), step


def test_two_ranks_are_one_process(alone, words, tmp_path):
    found = train(2, words, tmp_path / 'log', double=True)
    check_losses(alone, tmp_path / 'log', 1e-9)
    check_same(read(alone / 'final.pth'), found, 1e-8)
    text = (tmp_path / 'log/log.txt').read_text()
    assert '2 at a time on each of 2 ranks' in text and text.count(' cpu (') == 2


@pytest.mark.slow  # in float64 it is shown exactly
def test_two_ranks_in_single_precision(words, tmp_path):
    """At a low rate: float32's noise grows tenfold a step in a tiny random network."""
    words = [*words, 'LR=1e-6']
    found = [train(n, words, tmp_path / f'log{n}') for n in (1, 2)]
    check_losses(tmp_path / 'log1', tmp_path / 'log2', 1e-5)
    check_same(*found, 1e-5, least=0.01)  # biases, which start at 0, are tiny still


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['all', 'valid'])
def test_ranks_and_accumulation(norm, words, tmp_path):
    words = [*words, f'LOSS_NORM={norm}', 'CLIP_GRAD=2', 'AUX_WEIGHT=0.4']
    found = [train(n, [*words, f'ACCUMULATE={4 // n}'], tmp_path / f'log{n}',
                   double=True, bn_eval=True) for n in (1, 2)]
    check_losses(tmp_path / 'log1', tmp_path / 'log2', 1e-9)
    check_same(*found, 1e-8)


@pytest.mark.slow
def test_four_ranks(alone, words, tmp_path):
    found = train(4, words, tmp_path / 'log', double=True)
    check_losses(alone, tmp_path / 'log', 1e-9)
    check_same(read(alone / 'final.pth'), found, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize('first, then', [(1, 2), (2, 1)])
def test_the_number_of_ranks_may_change(first, then, alone, words, tmp_path):
    log = tmp_path / 'log'
    train(first, [*words, 'ITER_MAX=2'], log, double=True)
    found = train(then, [*words, 'RESUME=force'], log, double=True)
    check_losses(alone, log, 1e-9)
    check_same(read(alone / 'final.pth'), found, 1e-8)


@pytest.mark.slow
def test_resumed_with_as_many_ranks_it_is_the_same_to_the_bit(words, tmp_path):
    whole = train(2, words, tmp_path / 'whole')
    train(2, [*words, 'ITER_MAX=2'], tmp_path / 'cut')
    found = train(2, [*words, 'RESUME=force'], tmp_path / 'cut')
    compare(whole['net'], found['net'])
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'cut')


# -- ranks that differ -----------------------------------------------------------------

@pytest.fixture(scope='module')
def unlike(words, tmp_path_factory):
    """The folder of a run whose ranks have other precisions and numbers of threads."""
    folder = tmp_path_factory.mktemp('unlike')
    train(2, [*words, 'ITER_MAX=2', 'PRETRAINED=IMAGENET1K_V1'], folder / 'log',
          rank_words=(['PRECISION=fp16'], ['PRECISION=bf16']), threads=True,
          fetch=str(folder))
    return folder


def test_unlike_ranks_agree_on_a_precision(unlike):
    run = read(unlike / 'log' / 'final.pth')['run']
    assert run['precision'] == 'fp32'
    text = (unlike / 'log' / 'log.txt').read_text()
    assert 'the ranks would take bf16 and fp16, so all of them compute in fp32' in text
    one, other = losses(unlike / 'log').values()
    assert other < 2 * one


def test_one_rank_of_a_host_downloads(unlike):
    found = sorted(p.name for p in unlike.iterdir() if p.name[-1].isdigit())
    assert found == ['fetched_0', 'read_1']
    assert 'loaded by rank 0' in (unlike / 'log' / 'log.txt').read_text()


def test_tensors_are_compared_by_their_bits():
    """Whatever the number of threads; and a single bit that differs is found."""
    for done in run_ranks(2, 'ranked:compare_tensors'):
        assert done.returncode == 0, done.stderr


# -- ranks that RANKS or torchrun starts -----------------------------------------------

def test_evaluation_is_shared(alone):
    found = []
    for n in (1, 2):
        done = run_script('eval.py', f'LOG_DIR={alone}', f'RANKS={n}', 'DEVICE=cpu')
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('mIoU') == 1
        assert f'processes: {n}' in done.stdout
        found.append(json.loads((alone / 'eval/voc_val_final.json').read_text()))
    assert found[0]['confusion'] == found[1]['confusion']
    assert found[0]['n_images'] == found[1]['n_images'] == 5


@pytest.mark.slow
def test_sigterm_to_the_launcher(words, tmp_path):
    log = tmp_path / 'log'
    words = [*words, 'ITER_MAX=1000', 'ITER_SAVE=100000', 'EVAL_EVERY=3',
             f'LOG_DIR={log}']
    run = Run('train.py', *words, 'RANKS=2', 'N_WORKERS=1')
    wait_for_step(run, log, 4)
    run.send_signal(signal.SIGTERM)
    done = run.wait()
    assert done.returncode == 75, done.stderr
    assert done.stdout.count('stopped after step') == 1
    step = read(log / 'latest.pth')['step']
    assert step == max(losses(log))
    done = run_script('train.py', *words, f'ITER_MAX={step + 1}', 'RESUME=force')
    assert done.returncode == 0, done.stderr
    assert f'after step {step}' in done.stdout


@pytest.mark.slow
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
