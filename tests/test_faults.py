"""What ends a run: signals, kill -9, a second run; all go on where they were."""
import os
import random
import signal
import time

import pytest
from conftest import (
    Run,
    compare,
    is_one_sentence,
    losses,
    read,
    run_python,
    run_script,
    wait_for_step,
)


@pytest.mark.slow
def test_killed_at_random_moments(tiny, tmp_path):
    """kill -9 again and again, a save at every step: it always continues, bit for bit.
    """
    words = [*tiny, 'ITER_MAX=18', 'ITER_SAVE=10', 'KEEP=1']
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    done = run_script('train.py', *words, f'LOG_DIR={whole}')
    assert done.returncode == 0, done.stderr
    draw = random.Random(1)
    n_kills = 0
    while n_kills < 20:
        run = Run('train.py', *words, f'LOG_DIR={cut}')
        time.sleep(draw.uniform(0.05, 1.5))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            n_kills += 1
        done = run.wait()
        assert done.returncode in (0, -9), done.stderr
        if done.returncode == 0:  # it was finished: begin anew
            compare(read(cut / 'final.pth')['net'], read(whole / 'final.pth')['net'])
            cut = tmp_path / f'cut{n_kills}'
    done = run_script('train.py', *words, f'LOG_DIR={cut}')
    assert done.returncode == 0, done.stderr
    for key in ('net', 'optimizer', 'step'):
        compare(read(cut / 'latest.pth')[key], read(whole / 'latest.pth')[key], key)
    assert losses(cut) == losses(whole)
    assert not list(cut.glob('*.tmp'))


@pytest.mark.parametrize('number, status', [
    (signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group(number, status, tiny, tmp_path):
    """As schedulers and Ctrl-C do: loaders must not die before the step is saved."""
    words, log = [*tiny, 'ITER_MAX=1000', 'ITER_SAVE=100000'], tmp_path / 'log'
    run = Run('train.py', *words, 'N_WORKERS=2', is_session=True)
    wait_for_step(run, log)
    os.killpg(run.pid, number)
    done = run.wait()
    assert done.returncode == status, done.stderr
    assert 'Traceback' not in done.stderr and 'stopped after step' in done.stdout
    saved = read(log / 'latest.pth')
    assert saved['step'] == max(losses(log))
    done = run_script('train.py', *words, f'ITER_MAX={saved["step"] + 1}',
                      'RESUME=force')
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds the loaders in /proc')
def test_a_signal_to_every_process(tiny, tmp_path):
    """As Slurm does, loaders included, whatever group they are in."""
    words, log = [*tiny, 'ITER_MAX=100000', 'ITER_SAVE=1000000'], tmp_path / 'log'
    run = Run('train.py', *words, 'N_WORKERS=2')
    wait_for_step(run, log)
    with open(f'/proc/{run.pid}/task/{run.pid}/children') as children:
        loaders = [int(pid) for pid in children.read().split()]
    assert len(loaders) >= 2
    for pid in (run.pid, *loaders):
        os.kill(pid, signal.SIGTERM)
    done = run.wait()
    assert done.returncode == 75, done.stderr
    assert read(log / 'latest.pth')['step'] == max(losses(log))


def test_two_runs_in_one_folder(tiny, tmp_path):
    words, log = [*tiny, 'ITER_MAX=1000', 'ITER_SAVE=100000'], tmp_path / 'log'
    first = Run('train.py', *words)
    wait_for_step(first, log)
    is_one_sentence(run_script('train.py', *words), 'another process writes into',
                    f'process {first.pid}', 'LOG_DIR')
    first.send_signal(signal.SIGKILL)
    assert first.wait().returncode == -9
    done = run_script('train.py', *words, 'ITER_MAX=1')
    assert done.returncode == 0, done.stderr  # a killed run locks nothing


@pytest.mark.slow
def test_forked_runs_are_like_others(tiny, tmp_path):
    """What the tests run is what `python train.py` and `python eval.py` run."""
    found = []
    for run in (run_script, run_python):
        log = tmp_path / run.__name__
        for script, words in (('train.py', [*tiny, 'ITER_MAX=3']), ('eval.py', [])):
            done = run(script, *words, f'LOG_DIR={log}')
            assert done.returncode == 0, done.stderr
        found.append((read(log / 'final.pth')['net'], losses(log),
                      (log / 'eval' / 'voc_val_final.csv').read_text()))
    compare(*found)
