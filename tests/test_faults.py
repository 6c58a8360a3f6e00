"""What ends a run: signals, kill -9, a second run, a rank that dies; all go on."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import HERE, run_script
from test_scripts import compare, is_one_sentence, losses, read


def test_killed_at_random_moments(zygote, tiny, tmp_path):
    """kill -9 again and again, a save at every step: it always continues, bit for bit.
    """
    words = [*tiny, 'ITER_MAX=18', 'ITER_SAVE=10', 'KEEP=1']
    whole, cut, out = tmp_path / 'whole', tmp_path / 'cut', tmp_path / 'out'
    errors = tmp_path / 'out.err'
    assert zygote([*words, f'LOG_DIR={whole}'], out) == 0, errors.read_text()
    draw = random.Random(1)
    began = time.time()
    assert zygote([*words, f'LOG_DIR={tmp_path / "again"}'], out) == 0
    least = 0.3 * (time.time() - began) / 18
    n_kills, status = 0, -9
    while n_kills < 20:
        status = zygote([*words, f'LOG_DIR={cut}'], out, draw.uniform(least, 0.7))
        assert status in (0, -9), errors.read_text()
        if status == 0:  # it was finished: begin anew
            compare(read(cut / 'final.pth')['net'], read(whole / 'final.pth')['net'])
            cut = tmp_path / f'cut{n_kills}'
            continue
        n_kills += 1
    assert zygote([*words, f'LOG_DIR={cut}'], out) == 0, errors.read_text()
    for key in ('net', 'optimizer', 'step'):
        compare(read(cut / 'latest.pth')[key], read(whole / 'latest.pth')[key], key)
    assert losses(cut) == losses(whole)
    assert not list(cut.glob('*.tmp'))


@pytest.mark.parametrize('how, status', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group(how, status, tiny, tmp_path):
    """As schedulers and Ctrl-C do: loaders must not die before the step is saved."""
    words = [*tiny, 'ITER_MAX=200', 'ITER_SAVE=100000', 'N_WORKERS=2']
    log = tmp_path / 'log'
    run = subprocess.Popen([sys.executable, str(HERE / 'train.py'), *words],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           start_new_session=True)
    end = time.time() + 60
    while time.time() < end and not (log / 'log.jsonl').exists() or not losses(log):
        time.sleep(0.05)
    os.killpg(run.pid, how)
    out, error = run.communicate(timeout=60)
    assert run.returncode == status, error
    assert 'Traceback' not in error and 'stopped after step' in out
    saved = read(log / 'latest.pth')
    assert saved['step'] == max(losses(log))
    done = run_script('train.py', *words, f'ITER_MAX={saved["step"] + 2}',
                      'RESUME=force')
    assert done.returncode == 0, done.stderr


def test_two_runs_in_one_folder(tiny, tmp_path):
    words = [*tiny, 'ITER_MAX=1000', 'ITER_SAVE=100000']
    log = tmp_path / 'log'
    first = subprocess.Popen([sys.executable, str(HERE / 'train.py'), *words],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.time() + 60
        while time.time() < end and not (log / 'log.jsonl').exists():
            time.sleep(0.05)
        is_one_sentence(run_script('train.py', *words), 'another process writes into',
                        f'process {first.pid}', 'LOG_DIR')
    finally:
        first.kill()
        first.wait()
    words[-2:] = ['ITER_MAX=2', 'ITER_SAVE=100000']
    assert run_script('train.py', *words).returncode == 0  # a killed run locks nothing


@pytest.mark.slow
def test_zygote_runs_are_like_others(zygote, tiny, tmp_path):
    """What the kills are compared with is what `python train.py` does."""
    words = [*tiny, 'ITER_MAX=3']
    assert zygote([*words, f'LOG_DIR={tmp_path / "a"}'], tmp_path / 'out') == 0
    assert run_script('train.py', *words, f'LOG_DIR={tmp_path / "b"}').returncode == 0
    one, other = (torch.load(tmp_path / x / 'final.pth')['net'] for x in 'ab')
    compare(one, other)


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds the loaders in /proc')
def test_a_signal_to_every_process(tiny, tmp_path):
    """As Slurm does, loaders included, whatever group they are in."""
    words = [*tiny, 'ITER_MAX=100000', 'ITER_SAVE=1000000', 'N_WORKERS=2']
    log = tmp_path / 'log'
    run = subprocess.Popen([sys.executable, str(HERE / 'train.py'), *words],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.time() + 60
    while time.time() < end and not (log / 'log.jsonl').exists() or not losses(log):
        time.sleep(0.05)
    with open(f'/proc/{run.pid}/task/{run.pid}/children') as children:
        loaders = [int(pid) for pid in children.read().split()]
    assert len(loaders) >= 2
    for pid in (run.pid, *loaders):
        os.kill(pid, signal.SIGTERM)
    out, error = run.communicate(timeout=60)
    assert run.returncode == 75, error
    assert read(log / 'latest.pth')['step'] == max(losses(log))
