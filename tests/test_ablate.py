"""ablate.py: folders that are made, run and reported.

Except in the last test, the project is a small one whose train.py and eval.py only
write what the real ones do.
"""
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HERE, TINY

import ablate
import config
import recipes
from ablation import folders, report, running
from ablation.experiments import EXPERIMENTS, FIGURE_4, HALF, SCALES

TRAIN = '''
import fcntl, json, os, pathlib, signal, sys, time
import settings as s

signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
root, log = pathlib.Path('..'), pathlib.Path(s.LOG_DIR)
log.mkdir(exist_ok=True)
lock = open(log / 'lock', 'a+')
fcntl.lockf(lock, fcntl.LOCK_EX)
with open('calls', 'a') as file:
    print('train', *sys.argv[1:], os.environ.get('OMP_NUM_THREADS'), file=file)
if (root / 'no_data').exists():
    sys.exit('error: no data')
(log / 'log.txt').touch()
if s.EM_UPDATE == 'never' and not (root / 'mended').exists():
    sys.exit('a line\\nerror: not finite\\nerror: another rank has ended')
with open(log / 'log.jsonl', 'w') as file:
    for step in range(1, s.ITER_MAX + 1):
        print(json.dumps({'kind': 'train', 'step': step, 'loss': 1 / step,
                          'images_per_s': 2.0}), file=file)
while (root / 'wait').exists():
    time.sleep(0.02)
(log / 'final.pth').touch()
'''
EVAL = '''
import json, pathlib, sys
import settings as s

with open('calls', 'a') as file:
    print('eval', *sys.argv[1:], file=file)
out = pathlib.Path(s.LOG_DIR, 'eval')
out.mkdir()
stages = [0]
if '--stages' in sys.argv:
    stages = map(int, sys.argv[sys.argv.index('--stages') + 1].split(','))
for t in stages:
    (out / f'T{t}.json').write_text(json.dumps({
        'checkpoint': 'logdir/final.pth', 'step': s.ITER_MAX, 'stages': t,
        'n_images': 3, 'averaged': [], 'mIoU': s.SEED / 10 + t / 100, 'pAcc': 0.5,
        'IoU': [0.25, None], 'precision': 'fp32',
        'environment': {'device': 'a stand-in', 'host': 'mine'}}))
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project in place of this one."""
    root = tmp_path / 'project'
    for name, text in (('train.py', TRAIN), ('eval.py', EVAL), ('ablate.py', ''),
                       ('test.sh', 'sh'), ('README.md', 'x'), ('mine/new.py', 'x')):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copy(HERE / 'settings.py', root)
    monkeypatch.setattr(config, 'ROOT', root)
    return root


@pytest.fixture
def call(monkeypatch):
    """A function that calls ablate.py's main in this process."""
    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['ablate.py', *map(str, words)])
        return ablate.main()
    return call


def read(file):
    return json.loads(Path(file).read_text())


def read_calls(folder):
    return (folder / 'calls').read_text().splitlines()


def wait_for(*files):
    end = time.time() + 30
    while not all(file.exists() for file in files) and time.time() < end:
        time.sleep(0.02)


def test_experiments_hold_known_settings():
    defaults = config.snapshot()
    for name, about in EXPERIMENTS.items():
        assert set(about.get('paper', {})) <= set(about['variants']), name
        for variant in about['variants'].values():
            for key, value in variant.items():
                assert value == HALF or type(value) is type(defaults[key]), (name, key)


@pytest.mark.parametrize('scale', SCALES)
def test_every_variant_has_a_folder(scale):
    recipe = recipes.RECIPES[SCALES[scale]]['settings']
    base = {**config.snapshot(), **recipe}
    planned = folders.plan_folders(list(EXPERIMENTS), base, (1, 2))
    several = [folder['values'] for folder in planned.values()]
    assert len({repr(values) for values in several}) == len(planned) >= 80
    served = [(*pair, folder['seed']) for folder in planned.values()
              for pair in folder['serves']]
    assert sorted(served) == sorted((name, label, seed) for name in EXPERIMENTS
                                    for label in EXPERIMENTS[name]['variants']
                                    for seed in (1, 2))
    for name in planned:
        assert re.fullmatch('[a-z0-9_.+-]+', name) and len(name) < 120
    half, = (folder['values'] for folder in planned.values() if folder['seed'] == 1
             and ['heads', 'EMANet, no fc1, half the channels'] in folder['serves'])
    assert half['HEAD_CHANNELS'] == base['HEAD_CHANNELS'] // 2


def test_figure_4_is_a_triangle():
    assert {t: min(row) for t, row in FIGURE_4.items()} == {t: t for t in range(1, 9)}
    assert all(max(row) == 8 and len(row) == 9 - t for t, row in FIGURE_4.items())
    # what the paper's text says of it
    assert FIGURE_4[3][3] == 78.52 and FIGURE_4[1][1] == 77.34
    assert max(FIGURE_4, key=lambda t: FIGURE_4[t][8]) == 3


def test_made_folders_differ_by_settings_only(project, call, tmp_path):
    root = tmp_path / 'study'
    call('make', 'bases', root, 'LR=0.5', '--seeds', '7')
    one = root / 'emanet50.moving_average.l2.3stages.seed7'
    other = root / 'emanet50.back_propagation.l2.3stages.gradient_full.seed7'
    done = subprocess.run(['diff', '-r', one, other], text=True, capture_output=True)
    lines = done.stdout.splitlines()
    assert lines.pop(0).split() == ['diff', '-r', str(one / 'settings.py'),
                                    str(other / 'settings.py')]
    old, new = ([line[2:] for line in lines if line[0] == sign] for sign in '<>')
    assert [line.split('#')[0].strip() for line in new] == [
        "EM_UPDATE = 'back_propagation'", "EM_GRADIENT = 'full'"]
    for before, after in zip(old, new, strict=True):  # comments are kept
        assert before.partition('#')[2] == after.partition('#')[2] != ''
    assert folders.read_settings(one) == {
        **folders.read_settings(project), **recipes.RECIPES['voc_r50']['settings'],
        'SEED': 7, 'LR': 0.5}


def test_copy_leaves_out_what_is_big(project, call, tmp_path):
    left_out = ['logdir/log.txt', 'runs/a/b.py', '.git/HEAD', '.venv/lib/x.py',
                'predictions/a.png', 'study/plan.json', 'log2/log.jsonl', 'big.pth',
                'env/pyvenv.cfg', 'mine/__pycache__/x.pyc', 'old/ablate.py']
    shared = ['data/voc/list.txt', 'models/resnet50.pth']
    for name in left_out + shared:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text('x')
    for copy in (tmp_path / 'new' / 'copy', project / 'inside'):
        call('copy', copy, 'STAGE_NUM=5')
        assert [name for name in left_out if (copy / name).exists()] == []
        for name in ('train.py', 'test.sh', 'README.md', 'mine/new.py'):
            assert (copy / name).is_file()
        for name in ('data', 'models'):
            assert (copy / name).is_symlink()
            assert (copy / name).resolve() == project / name
        assert folders.read_settings(copy) == {**folders.read_settings(project),
                                               'STAGE_NUM': 5}
        with pytest.raises(config.UserError, match='exists: give a new folder'):
            call('copy', copy)


def test_relative_paths_hold_in_the_copies(project, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'voc').mkdir()
    file = project / 'settings.py'
    file.write_text(file.read_text().replace("DIR = 'models'", "DIR = '../voc'"))
    call('copy', 'copy', 'DATA_ROOT=voc', 'PRETRAINED=none')
    values = folders.read_settings(tmp_path / 'copy')
    assert values['DATA_ROOT'] == str(tmp_path / 'voc')
    assert (tmp_path / 'voc').samefile(values['MODEL_DIR'])
    assert values['PRETRAINED'] == 'none'


def test_make_adds_and_never_overwrites(project, call, tmp_path, capsys):
    root = tmp_path / 'it is mine'
    call('make', 'loss', root, 'LR=0.5', '--scale', 'laptop')
    assert f"ablate.py run '{root}'" in capsys.readouterr().out
    first = root / 'emanet18.moving_average.l2.3stages.seed1'
    (first / 'README.md').write_text('mine')
    call('make', 'bias_rate', root, '--seeds', '1,2')
    assert '3 folders made, 1 existed' in capsys.readouterr().out
    assert (first / 'README.md').read_text() == 'mine'
    plan = read(root / 'plan.json')
    assert plan['folders'][first.name]['serves'] == [
        ['loss', 'all pixels of the crops'], ['bias_rate', 'twice']]
    assert len(plan['folders']) == 5
    for name in plan['folders']:  # the words of the first time hold
        assert folders.read_settings(root / name)['LR'] == 0.5
    call('make', 'bias_rate', root, 'LR=0.5')
    assert read(root / 'plan.json') == plan


@pytest.mark.parametrize('file, line, words, part', [
    ('project', 'LR = 0.1', [], 'LR = 0.009, now it is 0.1'),
    ('study/emanet50.moving_average.l2.3stages.seed1', 'LR = 0.1', [], '0.1, now it'),
    ('study/emanet50.moving_average.l2.3stages.seed1', 'LR = oops', [], 'cannot be'),
    ('project', 'LR = 0.009', ['LR=0.5'], 'LR = 0.009, now it is 0.5'),
    ('project', 'LR = 0.009', ['--scale', 'laptop'], "'voc', now it is 'shapes'")])
def test_make_refuses_other_settings(file, line, words, part, project, call, tmp_path):
    call('make', 'loss', tmp_path / 'study')
    names = sorted(os.listdir(tmp_path / 'study'))
    file = tmp_path / file / 'settings.py'
    file.write_text(file.read_text().replace('LR = 0.009', line))
    with pytest.raises(config.UserError, match=part):
        call('make', 'bias_rate', tmp_path / 'study', *words)
    assert sorted(os.listdir(tmp_path / 'study')) == names


@pytest.mark.parametrize('words, part', [
    (['make', 'bass', 'x'], 'did you mean bases?'), (['lst'], 'did you mean list?'),
    (['make', 'bases', 'x', '--scale', 'laptopp'], 'did you mean laptop?'),
    (['make', 'bases', 'x', 'SEED=2'], '--seeds'),
    (['make', 'bases', 'x', '--seeds', '1,a'], '--seeds=1,a'),
    (['make', 'bases', 'x', 'EM_UPDATE=never'], 'EM_UPDATE is what bases varies'),
    (['make', 'bases', 'heads'], 'then a folder'), (['copy'], 'one folder'),
    (['run', 'x'], 'x has no plan.json'), (['run', 'x', '--jobs', '-1'], '--jobs -1'),
    (['run', 'x', 'LR=2'], 'run takes no settings'),
    (['report'], 'files of results'), (['report', 'x.json'], 'x.json holds no results'),
    (['report', 'x.json', '--out', 'docs'], 'ends in .md'),
    (['report', 'a/r.json', 'b/r.json'], 'different names')])
def test_wrong_words(words, part, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(config.UserError) as caught:
        call(*words)
    assert part in str(caught.value) and os.listdir(tmp_path) == []


def test_run_finishes_all_and_then_nothing(project, call, tmp_path, monkeypatch,
                                           capsys):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    root = tmp_path / 'study'
    call('make', 'heads', root, 'ITER_MAX=200', 'BATCH_SIZE=4', 'DATA_ROOT=/x')
    names = list(read(root / 'plan.json')['folders'])
    assert call('run', root, '--jobs', '4', '--devices', 'cuda:0,cuda:1') == 0
    devices = set()
    for name in names:
        trained, evaluated = map(str.split, read_calls(root / name))
        stages = ['--stages', '1,2,3,4,5,6,7,8'] if name.startswith('ema') else []
        assert trained == ['train', trained[1], str(max(os.cpu_count() // 4, 1))]
        assert evaluated == ['eval', *stages, trained[1]]
        devices.add(trained[1])
    assert devices == {'DEVICE=cuda:0', 'DEVICE=cuda:1'}
    assert f'{names[0]}: mIoU 13.00 (' in capsys.readouterr().out
    results = read(root / 'results.json')
    assert [run['name'] for run in results['runs']] == names
    assert (results['recipe'], results['n_planned']) == ('voc_r50', len(names))
    assert results['base']['BATCH_SIZE'] == 4 and 'DATA_ROOT' not in results['base']
    first, last = results['runs'][0], results['runs'][-1]
    assert first['mIoU'] == {str(t): round(0.1 + t / 100, 2) for t in range(1, 9)}
    assert (last['settings'], last['serves']) == ({'HEAD': 'a2'}, [['heads', 'A2']])
    assert (last['mIoU'], last['IoU'], last['stages']) == ({'0': 0.1}, [0.25, None], 0)
    assert (last['error'], last['step'], last['seconds']) == (None, 200, 200 * 4 / 2)
    assert 60 <= len(last['loss']) < 120 and last['loss'][1] == [4, 0.25]
    assert last['environment'] == {'device': 'a stand-in', 'precision': 'fp32',
                                   'torch': None, 'python': None}
    assert call('run', root) == 0 and read(root / 'results.json') == results
    assert all(len(read_calls(root / name)) == 2 for name in names)


def test_a_failing_folder_does_not_stop_the_others(project, call, tmp_path, capsys):
    root = tmp_path / 'study'
    call('make', 'bases', root, 'ITER_MAX=4')
    names = list(read(root / 'plan.json')['folders'])
    bad = 'emanet50.never.l2.3stages.seed1'
    (root / 'no_data').touch()  # fails before the training: retried by the next run
    assert call('run', root) == 1 and read(root / 'results.json')['runs'] == []
    assert f'  {bad}: no data\n' in capsys.readouterr().err
    (root / 'no_data').unlink()
    for n_calls, words in ((2, []), (2, []), (3, ['--again'])):
        assert call('run', root, *words) == 1 and len(read_calls(root / bad)) == n_calls
        assert capsys.readouterr().err.endswith(f'  {bad}: not finite\n')
        runs = read(root / 'results.json')['runs']
        assert {run['name'] for run in runs} == {*names}
        assert {run['name'] for run in runs if run['error'] == 'not finite'} == {bad}
    (root / 'mended').touch()
    shutil.rmtree(root / names[0])  # a folder that was removed
    assert call('run', root, '--again') == 1
    assert f'{names[0]}: the folder is missing: run the same' in capsys.readouterr().err
    runs = read(root / 'results.json')['runs']
    assert [(run['name'], run['error']) for run in runs] == [
        (name, None) for name in names[1:]]


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 75),
                                            (signal.SIGKILL, -9)])
def test_a_run_that_is_stopped_continues(number, status, project, call, tmp_path,
                                         capsys):
    root = tmp_path / 'study'
    call('make', 'loss', root, 'ITER_MAX=3')
    made = [root / name for name in read(root / 'plan.json')['folders']]
    (root / 'wait').touch()

    def run():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # CI may ignore it
        return running.run(root, 2, [], False)

    process = multiprocessing.get_context('fork').Process(
        target=config.run, args=(run,))
    process.start()
    wait_for(*(folder / 'logdir' / 'log.jsonl' for folder in made))
    with pytest.raises(config.UserError, match='another process writes into DIR'):
        call('run', root)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == status and not list(root.glob('*/result.json'))
    n_trainings = 2
    if number == signal.SIGKILL:  # the scripts continue, and no others start beside
        n_trainings = 1
        assert call('run', root) == 1
        assert capsys.readouterr().err.count(': another process writes into') == 2
        (root / 'wait').unlink()
        wait_for(*(folder / 'logdir' / 'final.pth' for folder in made))
    (root / 'wait').unlink(missing_ok=True)
    assert call('run', root) == 0
    for folder in made:
        assert [line.split()[0] for line in read_calls(folder)] == [
            *['train'] * n_trainings, 'eval']


def make_run(seed, label, miou, experiment='normalisation', error=None, **settings):
    """Return a run as results.json has it."""
    mious = miou if isinstance(miou, dict) else {} if error else {3: miou}
    return {'name': f'{label}{seed}', 'seed': seed, 'serves': [[experiment, label]],
            'settings': settings, 'source': 'abc', 'error': error, 'step': 30,
            'stages': settings.get('STAGE_NUM', 3),
            'mIoU': {str(t): value / 100 for t, value in mious.items()}, 'pAcc': {},
            'IoU': [], 'n_images': 5, 'loss': [[10, 2.0 * seed], [20, 1.0]],
            'validation': [[20, 0.3]], 'seconds': 1800.0,
            'environment': {'device': 'my CPU'}}


@pytest.fixture
def study(tmp_path):
    """Results with known means, deviations and intervals."""
    runs = [make_run(seed, label, miou, **settings) for label, mious, settings in (
        ('L2', (50, 51, 52), {}),
        ('none', (53, 53, 56), {'EM_NORM': 'none'}),            # +3 +2 +4
        ('LayerNorm', (49, 50, 48), {'EM_NORM': 'layer_norm'}))  # -1 -1 -4
        for seed, miou in zip((1, 2, 3), mious, strict=True)]
    runs.append(make_run(4, 'none', 0, error='it was not finite', EM_NORM='none'))
    runs += [make_run(1, f'T = {t}', {e: 40 + t + e / 10 for e in range(1, 9)},
                      'iterations', **({'STAGE_NUM': t} if t != 3 else {}))
             for t in (3, 1)]
    file = tmp_path / 'tiny.json'
    file.write_text(json.dumps({  # removed settings do no harm
        'scale': 'laptop', 'recipe': 'ablation_laptop', 'n_planned': 20, 'runs': runs,
        'base': {'LR': 0.5, 'WINOGRAD': True, 'EVAL_SCALES_WIDE': [0.5, 1.0]}}))
    return file


def test_report(study, call, tmp_path):
    out = tmp_path / 'docs' / 'found.md'
    call('report', study, '--out', out)
    text = out.read_text()
    for line in (
            'LR=0.5 WINOGRAD=true EVAL_SCALES_WIDE=0.5,1.0',
            '| variant | mIoU | seed 1 | seed 2 | seed 3 | seed 4 | difference to L2 | '
            'paper |',
            '| L2 | 51.00 ± 1.00 | 50.00 | 51.00 | 52.00 | - |  | 78.52 |',
            # 4.3027 = t of 2 degrees of freedom; 3 -+ 4.3027 * 1 / sqrt(3)
            '| none | 54.00 ± 1.73 | 53.00 | 53.00 | 56.00 | failed | '
            '**+3.00 (+0.52 .. +5.48)** | - |',
            '| LayerNorm | 49.00 ± 1.00 | 49.00 | 50.00 | 48.00 | - | '
            '-2.00 (-6.30 .. +2.30) | - |',
            '- none, seed 4, failed after step 30: it was not finite',
            '| T = 1 | 41.10 | 41.10 | -2.20 | 77.34 |',  # one seed: no interval
            '| T = 3, paper |  |  | 78.52 | 78.80 | 78.86 | 78.88 | 78.89 | 78.88 |',
            '![iterations, tiny: mIoU, training loss, validation]'
            '(found/tiny_iterations.png)'):
        assert f'\n{line}\n' in text, line
    assert '11 of 20 runs are finished, 1 failed; 6.0 hours of training on my' in text
    assert (tmp_path / 'docs' / 'found' / 'tiny_normalisation.png').is_file()
    out.write_text(f'Before.\n{text}After.\n'.replace('43.30', 'old'))
    call('report', study, '--out', out)  # the text around the tables is kept
    assert out.read_text() == f'Before.\n{text}After.\n'
    out.write_text('no marks')
    with pytest.raises(config.UserError, match='put both where the tables belong'):
        call('report', study, '--out', out)


def test_differences_are_paired_by_seed():
    mean, low, high = report.paired_difference({1: 5.0, 2: 7.0, 9: 99.0},
                                               {1: 4.0, 2: 5.0, 3: 0.0})
    assert mean == 1.5  # of 1 and 2; 12.706 = t of 1 degree of freedom
    assert high - mean == pytest.approx(12.706 * 0.70711 / 2 ** 0.5, abs=1e-3)
    assert mean - low == pytest.approx(high - mean)
    infinity = float('inf')
    assert report.paired_difference({1: 5.0}, {1: 4.0}) == (1, -infinity, infinity)
    assert report.paired_difference({1: 5.0}, {2: 4.0}) is None


def test_figures_show_the_numbers(study):
    normalisation, iterations = report.group_runs('tiny', read(study))
    assert list(normalisation.variants) == ['L2', 'LayerNorm', 'none']
    scores, loss, validation = report.draw(normalisation).axes
    assert [sorted(line.get_xdata()) for line in scores.lines] == [
        pytest.approx(mious) for mious in ([50, 51, 52], [48, 49, 50], [53, 53, 56])]
    assert list(loss.lines[0].get_ydata()) == [4, 1]  # means of 2, 4, 6 and of 1, 1, 1
    assert list(validation.lines[0].get_ydata()) == [30]
    scores = report.draw(iterations).axes[0]
    assert [line.get_label() for line in scores.lines] == ['T = 1', 'T = 3']
    assert list(scores.lines[1].get_ydata()) == pytest.approx(
        [43.1, 43.2, 43.3, 43.4, 43.5, 43.6, 43.7, 43.8])


def test_the_kept_study_makes_the_kept_report(tmp_path, monkeypatch):
    """docs/ablations.md is what `report` makes of the JSON beside it."""
    monkeypatch.setattr('matplotlib.figure.Figure.savefig',
                        lambda self, path, **options: path.touch())
    kept = HERE / 'docs' / 'ablations'
    text = (HERE / 'docs' / 'ablations.md').read_text(encoding='utf-8')
    assert '68.51 ± 0.89' in text
    out = tmp_path / 'ablations.md'
    out.write_text(text.replace('68.51 ± 0.89', '99.99'), encoding='utf-8')
    report.report([kept / 'camvid.json', kept / 'shapes.json'], out)
    assert out.read_text(encoding='utf-8') == text
    figures = {path.name for path in (tmp_path / 'ablations').iterdir()}
    assert figures == {path.name for path in kept.glob('*.png')} and len(figures) == 8


def test_make_run_and_report_in_earnest(voc, call, tmp_path):
    root = tmp_path / 'study'
    call('make', 'loss', root, *TINY, f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train',
         'DATASET=voc', 'ITER_MAX=2', 'EVAL_IMAGES=1')
    _, other = read(root / 'plan.json')['folders']
    shutil.rmtree(root / other)
    assert call('run', root) == 1  # for the other
    run, = read(root / 'results.json')['runs']
    assert run['error'] is None and run['step'] == 2 and len(run['loss']) == 2
    assert list(run['mIoU']) == list('12345678') and len(run['IoU']) == 21
    assert run['environment']['torch'] and run['settings'] == {} and run['seconds'] > 0
    call('report', root / 'results.json', '--out', tmp_path / 'report.md')
    assert f'| all pixels of the crops | {100 * run["mIoU"]["3"]:.2f} |' in (
        tmp_path / 'report.md').read_text()
