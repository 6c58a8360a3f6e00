"""The scripts as a user runs them, with tiny numbers."""
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    HERE,
    Run,
    compare,
    is_one_sentence,
    losses,
    read,
    run_python,
    run_script,
    wait_for_step,
)
from PIL import Image

import checkpoint
import config
import settings
import train

SCRIPTS = ('prepare', 'train', 'eval', 'predict', 'measure', 'ablate')


def test_train_and_eval(tiny, voc, tmp_path):
    words = [*tiny, 'ITER_MAX=14', 'LR=0.02']
    done = run_script('train.py', *words, 'IMAGE_EVERY=7', 'EVAL_EVERY=10',
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = tmp_path / 'log'
    steps = losses(log)
    assert list(steps) == list(range(1, 15))
    assert np.mean([steps[s] for s in range(11, 15)]) < 0.8 * steps[1]
    names = {p.name for p in log.iterdir()}
    assert {'latest.pth', 'best.pth', 'final.pth', 'settings.txt', 'log.txt',
            'log.jsonl'} <= names
    assert any('tfevents' in n for n in names)
    recorded = {}
    exec((log / 'settings.txt').read_text(), recorded)
    assert recorded['LR'] == 0.02 and recorded['SCALES'] == (0.75, 1.0, 1.5)
    text = (log / 'settings.txt').read_text().splitlines()
    changed = [a for a, b in zip(text, (HERE / 'settings.py').read_text().splitlines(),
                                 strict=True) if a != b]
    assert all('=' in line for line in changed) and len(changed) < 30
    assert 'trained from scratch' in (log / 'log.txt').read_text()
    assert set(read(log / 'final.pth')) == {'net', 'step', 'settings', 'run'}
    assert 0 < read(log / 'best.pth')['run']['best'] <= 1

    # eval.py knows from the checkpoint what training was given.
    done = run_script('eval.py', f'LOG_DIR={log}', '--pictures', 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'tvmonitor' in done.stdout and 'mIoU' in done.stdout
    result = json.loads((log / 'eval' / 'voc_val_final.json').read_text())
    assert result['n_images'] == 3 and len(result['confusion']) == 21
    assert result['mIoU_low'] <= result['mIoU'] <= result['mIoU_high']
    valid = sum((np.asarray(Image.open(voc / f'SegmentationClass/pic_{i}.png')) < 21
                 ).sum() for i in (6, 7, 8))
    assert np.sum(result['confusion']) == valid
    assert (log / 'eval' / 'voc_val_final.png').exists()

    # A finished run stays finished.
    done = run_script('train.py', *words, cwd=tmp_path)
    assert done.returncode == 0 and 'finished' in done.stdout
    check_clean(log)


def check_clean(log):
    """Check that clean.sh removes only what a run wrote."""
    (log / 'notes.txt').write_text('mine')
    (log / 'my.pth').write_text('mine')
    (log / 'eval' / 'x_submit').mkdir()
    (log / 'eval' / 'x_submit' / 'a.png').write_text('packed')
    (log / 'eval' / 'mine').mkdir()
    (log / 'eval' / 'mine' / 'a.png').write_text('mine')

    def clean(*words, answer=''):
        return subprocess.run(['sh', str(HERE / 'clean.sh'), *words, str(log)],
                              input=answer, text=True, capture_output=True)

    assert clean(answer='n\n').returncode == 1 and (log / 'final.pth').exists()
    assert clean().returncode == 1 and (log / 'final.pth').exists()
    assert clean('--yes').returncode == 0
    assert sorted(p.name for p in log.rglob('*')) == ['a.png', 'eval', 'mine', 'my.pth',
                                                      'notes.txt']


@pytest.mark.parametrize('workers', [
    0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_exact(workers, tiny, tmp_path):
    """Stopped by SIGTERM, by SIGKILL and by Ctrl-C: all equal to the bit."""
    words = [*tiny, 'ITER_MAX=10', 'ITER_SAVE=40', 'LOG_EVERY=2',
             f'N_WORKERS={workers}']
    whole, log = tmp_path / 'whole', tmp_path / 'cut'
    done = run_script('train.py', *words, f'LOG_DIR={whole}')
    assert done.returncode == 0, done.stderr
    for how, step, status in ((signal.SIGTERM, 2, 75), (signal.SIGKILL, 6, -9),
                              (signal.SIGINT, 8, 130)):
        run = Run('train.py', *words, f'LOG_DIR={log}')
        wait_for_step(run, log, step)
        run.send_signal(how)
        done = run.wait()
        assert done.returncode == status, done.stderr
        assert 'Traceback' not in done.stderr
        if status > 0:
            assert 'stopped after step' in done.stdout
    done = run_script('train.py', *words, f'LOG_DIR={log}')
    assert done.returncode == 0, done.stderr
    assert 'resuming' in done.stdout
    assert losses(log) == losses(whole)
    assert list(losses(log)) == [2, 4, 6, 8, 10]
    assert len((log / 'log.jsonl').read_text().splitlines()) == 5
    one, other = read(log / 'latest.pth'), read(whole / 'latest.pth')
    for key in ('net', 'optimizer', 'scaler', 'step'):
        compare(one[key], other[key], key)
    assert not list(log.glob('*.tmp'))


def test_resume_with_other_settings_or_a_damaged_file(tiny, tmp_path):
    words = [*tiny, 'ITER_MAX=3', 'ITER_SAVE=1', 'KEEP=2']
    done = run_script('train.py', *words)
    assert done.returncode == 0, done.stderr
    latest = tmp_path / 'log' / 'latest.pth'
    assert {p.name for p in latest.parent.glob('step_*')} == {'step_2.pth',
                                                              'step_3.pth'}
    whole, before = latest.read_bytes(), read(latest)
    latest.write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'log' / 'step_3.pth').unlink()
    done = run_script('train.py', *words)
    assert done.returncode == 0, done.stderr
    assert 'damaged' in done.stdout and 'step_2.pth after step 2' in done.stdout
    compare(read(latest)['net'], before['net'])

    again = [*words, 'ITER_MAX=4', 'LR=0.5']
    is_one_sentence(run_script('train.py', *again), 'LR = 0.009 then, 0.5 now',
                    'ITER_MAX', 'RESUME=force', 'clean.sh')
    done = run_script('train.py', *again, 'RESUME=force')
    assert done.returncode == 0 and 'step 4/4' in done.stdout, done.stderr


def test_non_finite_loss_stops_before_the_update(tiny, tmp_path):
    done = run_script('train.py', *tiny, 'ITER_MAX=6', 'LR=1e38', 'LOG_EVERY=3',
                      'LOSS_NORM=valid', 'ITER_SAVE=10')
    is_one_sentence(done, 'not finite at step', 'pic_', 'CLIP_GRAD')
    saved = read(tmp_path / 'log' / 'latest.pth')
    assert all(v.isfinite().all() for v in saved['net'].values())


def test_in_an_empty_folder(tmp_path):
    """`python train.py` and `python eval.py` exactly as a newcomer types them."""
    is_one_sentence(run_python('train.py', cwd=tmp_path), 'prepare.py', 'sh demo.sh')
    is_one_sentence(run_python('eval.py', cwd=tmp_path), 'final.pth', 'train')
    assert not list(tmp_path.iterdir())


def test_scripts_start_without_what_takes_long_to_import():
    slow = {'torch._dynamo', 'torchvision', 'matplotlib', 'scipy', 'onnx'}
    code = f'import {", ".join(SCRIPTS)}, sys; print(*{slow} & sys.modules.keys())'
    done = subprocess.run([sys.executable, '-c', code], cwd=HERE, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0 and not done.stdout.split(), done.stdout + done.stderr


@pytest.mark.parametrize('name', SCRIPTS)
def test_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', '--help'])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    text = capsys.readouterr().out
    assert end.value.code == 0 and f'python {name}.py' in text
    if name != 'prepare':
        assert 'BATCH_SIZE = 16' in text and 'RECIPE=demo' in text


def fail(script, words, capsys, monkeypatch):
    """Run a script's main in this process; return its end as of a process."""
    monkeypatch.setattr(sys, 'argv', [script, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        config.run(importlib.import_module(Path(script).stem).main)
    return subprocess.CompletedProcess([], end.value.code, *capsys.readouterr())


@pytest.mark.parametrize('script, words, parts', [
    ('train.py', ['N_LAYER=50'], ['did you mean N_LAYERS?']),
    ('train.py', ['LR=fast'], ['LR=fast', 'a number']),
    ('train.py', ['RECIPE=dem'], ['did you mean demo?']),
    ('eval.py', ['hello'], ['NAME=VALUE']),
    ('train.py', ['DATASET=vocc'], ['vocc', 'shapes']),
    ('train.py', ['ACCUMULATE=3'], ['ACCUMULATE=3']),
    ('train.py', ['EM_UPDATE=back_propagation'], ['gradient']),
    ('train.py', ['DEVICE=cuda:99'], ['DEVICE=cuda:99']),
    ('train.py', ['PRECISION=fp8'], ['PRECISION=fp8', 'bf16']),
    ('train.py', ['RANKS=-1'], ['RANKS=-1']),
    ('train.py', ['EVAL_EVERY=1', 'EVAL_MODE=wide'], ['EVAL_MODE=multi'])])
def test_wrong_words(script, words, parts, tiny, capsys, monkeypatch):
    done = fail(script, [*tiny, *words], capsys, monkeypatch)
    is_one_sentence(done, *parts)


def break_image_missing(voc):
    (voc / 'JPEGImages/pic_2.jpg').unlink()
    return 'train.txt', 'pic_2.jpg'


def break_mask_size(voc):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(
        voc / 'SegmentationClass/pic_2.png')
    return 'pic_2', '9x9'


def break_mask_rgb(voc):
    Image.fromarray(np.zeros((42, 50, 3), np.uint8)).save(
        voc / 'SegmentationClass/pic_2.png')
    return 'pic_2.png', 'mode RGB'


def break_mask_value(voc):
    label = np.zeros((42, 50), np.uint8)
    label[3, 4:6] = 77
    Image.fromarray(label).save(voc / 'SegmentationClass/pic_2.png')
    return 'pic_2.png', 'value 77 at 2 pixels', '0 to 20'


def break_mask_truncated(voc):
    path = voc / 'SegmentationClass/pic_2.png'
    path.write_bytes(path.read_bytes()[:-40])
    return 'pic_2.png', 'cannot be decoded'


def break_image_truncated(voc):
    path = voc / 'JPEGImages/pic_2.jpg'
    path.write_bytes(path.read_bytes()[:400])
    return 'pic_2.jpg', 'cannot be decoded'


def break_list_empty(voc):
    (voc / 'ImageSets/Segmentation/train.txt').write_text('\n')
    return 'train.txt', 'empty'


def break_list_missing(voc):
    (voc / 'ImageSets/Segmentation/train.txt').unlink()
    return 'train.txt', 'val'


IN_LISTS = [break_image_missing, break_list_empty, break_list_missing]
IN_FILES = [break_mask_size, break_mask_rgb, break_mask_value, break_mask_truncated,
            break_image_truncated]


@pytest.mark.parametrize('fault', IN_LISTS + IN_FILES)
def test_bad_data_is_one_sentence(fault, tiny, voc, capsys, monkeypatch):
    parts = fault(voc)
    words = [*tiny, 'ITER_MAX=6', 'BATCH_SIZE=6']
    is_one_sentence(fail('train.py', words, capsys, monkeypatch), *parts)


@pytest.mark.parametrize('fault', [
    break_image_truncated,
    *(pytest.param(fault, marks=pytest.mark.slow) for fault in IN_FILES[:-1])])
def test_bad_data_in_a_loader_process_is_one_sentence(fault, tiny, voc):
    parts = fault(voc)
    done = run_script('train.py', *tiny, 'ITER_MAX=6', 'BATCH_SIZE=6', 'N_WORKERS=1')
    is_one_sentence(done, *parts)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bad_checkpoints_are_one_sentence(tiny, tmp_path, capsys, monkeypatch):
    def refuses(*parts, words=()):
        given = [*tiny, f'CHECKPOINT={bad}', *words]
        done = fail('eval.py', given, capsys, monkeypatch)
        is_one_sentence(done, *parts)

    good, bad = tmp_path / 'good.pth', tmp_path / 'bad.pth'
    with monkeypatch.context() as patch:
        for name, value in config.apply_overrides(tiny).items():
            patch.setattr(settings, name, value)
        checkpoint.save(train.Session(21, torch.device('cpu')).state_dict(True), good)
    refuses('there is no checkpoint')

    data = good.read_bytes()
    bad.write_bytes(data[:len(data) // 3])
    refuses('damaged')
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    bad.write_bytes(flipped)
    refuses('damaged')
    with open(bad, 'wb') as f:
        pickle.dump({'net': Malice(tmp_path / 'was_run')}, f)
    refuses('run code')
    torch.save({'net': Malice(tmp_path / 'was_run')}, bad)
    refuses('run code')
    assert not (tmp_path / 'was_run').exists()

    content = read(good)
    content['settings']['N_LAYERS'] = 50
    torch.save(content, bad)
    refuses('another architecture')
    torch.save({'net': {'conv.weight': torch.zeros(3)}}, bad)
    refuses('another architecture')
    refuses('21 classes', 'shapes has 10',
            words=['DATASET=shapes', f'CHECKPOINT={good}'])
