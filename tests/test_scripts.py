"""The real scripts, run as a user runs them, with tiny numbers."""
import argparse
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import HERE, run_script
from PIL import Image

import eval as eval_script
import runtime


def is_one_sentence(done, *words):
    """Check status 2 and one line of error that names all the words."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
    for word in words:
        assert str(word) in lines[0]
    return True


def compare(one, other, where=''):
    """Assert that two nests of dicts, lists and tensors are equal to the bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            compare(one[key], other[key], f'{where}.{key}')
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            compare(*pair, f'{where}[{i}]')
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def read(path):
    return torch.load(path, weights_only=True)


def losses(folder):
    lines = (folder / 'log.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row['step']: row['loss'] for row in rows if row['kind'] == 'train'}


def test_train_and_eval(tiny, voc, tmp_path):
    done = run_script('train.py', *tiny, 'ITER_MAX=25', 'LR=0.02', 'IMAGE_EVERY=10',
                      'EVAL_EVERY=10', 'KEEP=1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log = tmp_path / 'log'
    steps = losses(log)
    assert list(steps) == list(range(1, 26))
    assert np.mean([steps[s] for s in range(21, 26)]) < 0.8 * steps[1]
    names = {p.name for p in log.iterdir()}
    assert {'latest.pth', 'step_20.pth', 'best.pth', 'final.pth', 'settings.txt',
            'log.txt', 'log.jsonl'} <= names
    assert 'step_10.pth' not in names and any('tfevents' in n for n in names)
    recorded = {}
    exec((log / 'settings.txt').read_text(), recorded)
    assert recorded['LR'] == 0.02 and recorded['SCALES'] == (0.75, 1.0, 1.5)
    text = (log / 'settings.txt').read_text().splitlines()
    changed = [a for a, b in zip(text, (HERE / 'settings.py').read_text().splitlines(),
                                 strict=True) if a != b]
    assert all('=' in line for line in changed) and len(changed) < 30
    assert 'trained from scratch' in (log / 'log.txt').read_text()
    assert set(read(log / 'final.pth')) == {'net', 'step', 'settings', 'run'}

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
    last = read(log / 'best.pth')['run']['best']
    assert 0 < last <= 1

    # A finished run stays finished.
    done = run_script('train.py', *tiny, 'ITER_MAX=25', 'LR=0.02', cwd=tmp_path)
    assert done.returncode == 0 and 'finished' in done.stdout


@pytest.mark.parametrize('workers', [
    0, pytest.param(2, marks=pytest.mark.slow)])
def test_resume_is_exact(workers, tiny, tmp_path):
    """Stopped by SIGTERM, by SIGKILL and by Ctrl-C: all equal to the bit."""
    words = [*tiny, 'ITER_MAX=28', 'ITER_SAVE=40', 'LOG_EVERY=3',
             f'N_WORKERS={workers}']
    whole = tmp_path / 'whole'
    done = run_script('train.py', *words, f'LOG_DIR={whole}')
    assert done.returncode == 0, done.stderr
    log = tmp_path / 'cut'
    command = [sys.executable, str(HERE / 'train.py'), *words, f'LOG_DIR={log}']
    for how, until in ((signal.SIGTERM, 1), (signal.SIGKILL, 5), (signal.SIGINT, 8)):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
        end = time.time() + 60
        while time.time() < end and run.poll() is None:
            rows = log / 'log.jsonl'
            if rows.exists() and len(rows.read_text().splitlines()) >= until:
                run.send_signal(how)
                break
            time.sleep(0.01)
        expected = {signal.SIGTERM: 75, signal.SIGKILL: -9, signal.SIGINT: 130}
        assert run.wait(60) == expected[how]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'resuming' in done.stdout
    assert losses(log) == losses(whole)
    assert list(losses(log)) == [*range(3, 28, 3), 28]
    assert len((log / 'log.jsonl').read_text().splitlines()) == 10
    one, other = read(log / 'latest.pth'), read(whole / 'latest.pth')
    for key in ('net', 'optimizer', 'scaler', 'step'):
        compare(one[key], other[key], key)
    assert not list(log.glob('*.tmp'))


def test_resume_refuses_other_settings(tiny, tmp_path):
    first = run_script('train.py', *tiny, 'ITER_MAX=2', 'ITER_SAVE=1')
    assert first.returncode == 0, first.stderr
    again = [*tiny, 'ITER_MAX=4', 'LR=0.5']
    is_one_sentence(run_script('train.py', *again), 'LR = 0.009 then, 0.5 now',
                    'ITER_MAX', 'RESUME=force', 'clean.sh')
    done = run_script('train.py', *again, 'RESUME=force')
    assert done.returncode == 0 and 'step 4/4' in done.stdout, done.stderr


def test_damaged_latest_falls_back(tiny, tmp_path):
    done = run_script('train.py', *tiny, 'ITER_MAX=4', 'ITER_SAVE=2')
    assert done.returncode == 0, done.stderr
    latest = tmp_path / 'log' / 'latest.pth'
    whole = latest.read_bytes()
    latest.write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'log' / 'step_4.pth').unlink()
    done = run_script('train.py', *tiny, 'ITER_MAX=4', 'ITER_SAVE=2')
    assert done.returncode == 0, done.stderr
    assert 'damaged' in done.stdout and 'step_2.pth after step 2' in done.stdout
    compare(read(latest)['net'], torch.load(_bytes(whole), weights_only=True)['net'])


def _bytes(data):
    import io
    return io.BytesIO(data)


def test_non_finite_loss_stops_before_the_update(tiny, tmp_path):
    done = run_script('train.py', *tiny, 'ITER_MAX=6', 'LR=1e38', 'LOG_EVERY=3',
                      'LOSS_NORM=valid')
    is_one_sentence(done, 'not finite at step', 'pic_', 'CLIP_GRAD')
    saved = read(tmp_path / 'log' / 'latest.pth')
    assert all(v.isfinite().all() for v in saved['net'].values())


def test_no_data(tmp_path):
    """`python train.py` in a folder without data, exactly as a newcomer types it."""
    for name in HERE.glob('*.py'):
        shutil.copy(name, tmp_path)
    done = subprocess.run([sys.executable, 'train.py'], cwd=tmp_path, text=True,
                          capture_output=True)
    is_one_sentence(done, 'prepare.py', 'sh demo.sh')


def test_wrong_words(tiny):
    is_one_sentence(run_script('train.py', 'N_LAYER=50'), 'did you mean N_LAYERS?')
    is_one_sentence(run_script('train.py', 'LR=fast'), 'LR=fast', 'a number')
    is_one_sentence(run_script('train.py', 'RECIPE=dem'), 'did you mean demo?')
    is_one_sentence(run_script('eval.py', 'hello'), 'NAME=VALUE')
    is_one_sentence(run_script('train.py', *tiny, 'DATASET=vocc'), 'vocc', 'shapes')
    is_one_sentence(run_script('train.py', *tiny, 'ACCUMULATE=3'), 'ACCUMULATE=3')
    is_one_sentence(run_script('train.py', *tiny, 'EM_UPDATE=back_propagation'),
                    'gradient')
    is_one_sentence(run_script('train.py', *tiny, 'DEVICE=cuda:99'), 'DEVICE=cuda:99')


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


@pytest.mark.parametrize('fault, workers', [
    *((fault, 0) for fault in IN_LISTS),
    *((fault, workers) for fault in IN_FILES for workers in (0, 1))])
def test_bad_data_is_one_sentence(fault, workers, zygote, tiny, voc, tmp_path):
    words = fault(voc)
    status = zygote([*tiny, 'ITER_MAX=6', 'BATCH_SIZE=6', 'ITER_SAVE=1',
                     f'N_WORKERS={workers}'], tmp_path / 'out')
    error = (tmp_path / 'out.err').read_text()
    is_one_sentence(subprocess.CompletedProcess((), status, '', error), *words)


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refuses(words, *parts):
    """Check that eval.py, run in this process, says one sentence with all the parts."""
    given = runtime.override(words)
    with pytest.raises(Exception) as caught:
        eval_script.main(argparse.Namespace(given=given, pictures=0, worst=0, stages='',
                                            average=False, submit=False))
    sentence = runtime.explain(caught.value)
    assert sentence and '\n' not in sentence, repr(caught.value)
    for part in parts:
        assert part in sentence


def test_bad_checkpoints_are_one_sentence(tiny, tmp_path):
    done = run_script('train.py', *tiny, 'ITER_MAX=1')
    assert done.returncode == 0, done.stderr
    good, bad = tmp_path / 'log' / 'final.pth', tmp_path / 'bad.pth'
    words = [*tiny, f'CHECKPOINT={bad}']
    refuses(words, 'there is no checkpoint')
    is_one_sentence(run_script('eval.py', f'LOG_DIR={tmp_path}'), 'final.pth', 'train')
    is_one_sentence(run_script('eval.py', f'CHECKPOINT={bad}'), 'no checkpoint')

    data = good.read_bytes()
    bad.write_bytes(data[:len(data) // 3])
    refuses(words, 'damaged')
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    bad.write_bytes(flipped)
    refuses(words, 'damaged')
    with open(bad, 'wb') as f:
        pickle.dump({'net': Malice(tmp_path / 'was_run')}, f)
    refuses(words, 'run code')
    torch.save({'net': Malice(tmp_path / 'was_run')}, bad)
    refuses(words, 'run code')
    assert not (tmp_path / 'was_run').exists()

    content = read(good)
    content['settings']['N_LAYERS'] = 50
    torch.save(content, bad)
    refuses(words, 'another architecture')
    torch.save({'net': {'conv.weight': torch.zeros(3)}}, bad)
    refuses(words, 'another architecture')
    refuses([*words, 'DATASET=shapes', f'CHECKPOINT={good}'], '21 classes',
            'shapes has 10')


def test_clean_removes_only_what_a_run_wrote(tiny, tmp_path):
    assert run_script('train.py', *tiny, 'ITER_MAX=1').returncode == 0
    log = tmp_path / 'log'
    assert run_script('eval.py', f'LOG_DIR={log}').returncode == 0
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


def test_measure_cost(tmp_path):
    done = run_script('measure.py', 'cost', f'LOG_DIR={tmp_path}')
    assert done.returncode == 0, done.stderr
    assert '237.95 G' in done.stdout and '42.624 M' in done.stdout
