"""ablate.py: folders that are made, run and reported.

Where only the running is looked at, train.py and eval.py of the folders are stand-ins
that need no torch.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HERE, TINY, run_script
from PIL import Image

import ablate
import recipes
import runtime
from ablation import report, running
from ablation.experiments import EXPERIMENTS, FIGURE_4, SCALES

TRAIN = '''
import json, os, pathlib, signal, sys, time
import settings as s

log = pathlib.Path(s.LOG_DIR)
log.mkdir(exist_ok=True)
with open('calls', 'a') as f:
    print(json.dumps([*sys.argv, os.environ.get('OMP_NUM_THREADS')]), file=f)
for number, status in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
    signal.signal(number, lambda *_, status=status: sys.exit(status))
if s.INIT_FROM and not os.path.isfile(s.INIT_FROM):
    sys.exit('error: INIT_FROM is not there')
is_bad = s.EM_UPDATE == 'never' and not os.path.exists('../mended')
if is_bad and os.path.exists('../early'):
    sys.exit('error: no data')
(log / 'log.txt').touch()
for step in range(1, s.ITER_MAX + 1):
    if is_bad and (step == 3 or os.path.exists('../collapse')):
        print('error: not finite', file=sys.stderr)
        print('error: another rank has ended', file=sys.stderr)
        sys.exit(2)
    with open(log / 'log.jsonl', 'a') as f:
        print(json.dumps({'kind': 'train', 'step': step, 'loss': 1 / step,
                          'images_per_s': 2.0}), file=f)
    while os.path.exists('../wait'):
        time.sleep(0.05)
(log / 'final.pth').write_text('weights')
'''
EVAL = '''
import json, pathlib, sys
import settings as s

with open('calls', 'a') as f:
    print(json.dumps(sys.argv), file=f)
out = pathlib.Path(s.LOG_DIR, 'eval')
out.mkdir()
stages = [s.EVAL_STAGE_NUM or s.STAGE_NUM] if s.HEAD in ('ema', 'ema_mmseg') else [0]
if '--stages' in sys.argv:
    stages = json.loads(f"[{sys.argv[sys.argv.index('--stages') + 1]}]")
for t in stages:
    (out / f'voc_val_final_T{t}.json').write_text(json.dumps({
        'checkpoint': 'logdir/final.pth', 'step': s.ITER_MAX, 'stages': t,
        'n_images': 3, 'averaged': [], 'mIoU': s.SEED / 10 + t / 100, 'pAcc': 0.5,
        'IoU': [0.25, None], 'precision': 'fp32',
        'environment': {'device': 'a stand-in', 'torch': 'none'},
        'settings': {k: v for k, v in vars(s).items() if k.isupper()}}))
'''


@pytest.fixture
def no_torch(tmp_path, monkeypatch):
    """Let every script fail that imports torch."""
    (tmp_path / 'poison').mkdir()
    (tmp_path / 'poison' / 'torch.py').write_text('raise ImportError("torch!")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'poison'))


def make(root, *words, stand_in=True):
    """Make folders, and put stand-ins into them."""
    done = run_script('ablate.py', 'make', *words[:1], root, *words[1:])
    assert done.returncode == 0, done.stderr
    for name in read(root / 'plan.json')['folders'] if stand_in else ():
        (root / name / 'train.py').write_text(TRAIN)
        (root / name / 'eval.py').write_text(EVAL)
    return done


def run(root, *words):
    return run_script('ablate.py', 'run', root, *words)


def start(root, *words):
    """Start `run` and return it."""
    return subprocess.Popen([sys.executable, str(HERE / 'ablate.py'), 'run', str(root),
                             *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def read(file):
    return json.loads(Path(file).read_text())


def steps(folder):
    """Return the steps of all rows of training that a folder has logged."""
    return [row['step'] for row in running.read_rows(Path(folder))]


def calls(folder):
    file = Path(folder, 'calls')
    return [json.loads(line) for line in file.read_text().splitlines()
            ] if file.exists() else []


def until(condition, seconds=60):
    """Wait for something."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'nothing came'
        time.sleep(0.02)


def is_sentence(done, *parts):
    """Check that a script ended with one sentence."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    for part in parts:
        assert part in done.stderr


# -- the data --------------------------------------------------------------------------

def test_experiments_hold_known_settings():
    defaults = runtime.snapshot()
    for name, about in EXPERIMENTS.items():
        assert set(about) <= {'about', 'paper_says', 'plot', 'chain', 'variants'}
        assert about['plot'] in ('lines', 'matrix', 'dots'), name
        for label, variant in about['variants'].items():
            assert set(variant) <= {'settings', 'recipe', 'halved', 'paper',
                                    'paper_note'}
            assert ('recipe' in variant) == bool(about.get('chain')), (name, label)
            assert '|' not in label and variant.get('recipe', 'demo') in recipes.RECIPES
            for key, value in variant.get('settings', {}).items():
                assert type(value) is type(defaults[key]), (name, label, key)


def test_scales_differ_by_their_recipe_only():
    assert set(SCALES) == {'paper', 'short', 'laptop'}
    assert set(SCALES.values()) <= set(recipes.RECIPES)
    plans = [ablate.plan_folders(['bases', 'heads'], scale, (1,), {})
             for scale in SCALES]
    for (base, folders), recipe in zip(plans, SCALES.values(), strict=True):
        for key, value in recipes.RECIPES[recipe]['settings'].items():
            assert base[key] == value
        assert base['RECIPE'] == '' and base['LOG_DIR'] == 'logdir'
        assert ([folder['serves'] for folder in folders.values()] ==
                [folder['serves'] for folder in plans[0][1].values()])


@pytest.mark.parametrize('scale', SCALES)
def test_no_two_settings_share_a_name(scale):
    names = [name for name, about in EXPERIMENTS.items()
             if scale == 'paper' or not about.get('chain')]
    _, folders = ablate.plan_folders(names, scale, (1, 2), {})
    assert len(folders) >= 80
    assert len({repr(folder['values']) for folder in folders.values()}) == len(folders)
    served = [(*pair, folder['seed']) for folder in folders.values()
              for pair in folder['serves']]
    assert sorted(served) == sorted((name, label, seed) for name in names for label in
                                    EXPERIMENTS[name]['variants'] for seed in (1, 2))
    for name in folders:
        assert re.fullmatch('[a-z0-9_.+-]+', name) and len(name) < 120


def test_figure_4_is_a_triangle():
    assert {t: min(row) for t, row in FIGURE_4.items()} == {t: t for t in range(1, 9)}
    assert all(max(row) == 8 and len(row) == 9 - t for t, row in FIGURE_4.items())
    # what the paper's text says of it
    assert FIGURE_4[3][3] == 78.52 and FIGURE_4[1][1] == 77.34
    assert max(FIGURE_4, key=lambda t: FIGURE_4[t][8]) == 3


@pytest.mark.parametrize('scale', SCALES)
def test_half_the_channels_at_every_scale(scale):
    base, folders = ablate.plan_folders(['heads'], scale, (1,), {})
    label = 'EMANet, no fc1, half the channels'
    values, = (folder['values'] for folder in folders.values()
               if ['heads', label] in folder['serves'])
    assert running.differences(values, base) == {
        'HEAD_CHANNELS': base['HEAD_CHANNELS'] // 2, 'FC1_CHANNELS': 0}
    if scale == 'paper':  # EMANet(256)
        recipe = recipes.RECIPES['voc_r101_emanet256']
        assert running.differences(values, base) == {
            name: value for name, value in recipe['settings'].items()
            if name != 'DATASET'}
        assert EXPERIMENTS['heads']['variants'][label]['paper'] == 100 * recipe['mIoU']


def test_rows_of_several_networks_say_of_which():
    for label, variant in EXPERIMENTS['heads']['variants'].items():
        has_note = 'ResNet-' in variant.get('paper_note', '')
        assert ('paper' in variant) == has_note, label


def test_list(no_torch):
    done = run_script('ablate.py', 'list')
    assert done.returncode == 0, done.stderr
    for name, about in EXPERIMENTS.items():
        assert f'{name}: ' in done.stdout
        for label in about['variants']:
            assert f'    {label} ' in done.stdout
    for recipe in SCALES.values():
        assert f'RECIPE={recipe}' in done.stdout
    assert 'EM_UPDATE=back_propagation EM_GRADIENT=full' in done.stdout
    assert 'FC1_CHANNELS=0 halved=HEAD_CHANNELS' in done.stdout
    assert 'recipe=voc_test_r101_coco' in done.stdout


# -- make ------------------------------------------------------------------------------

def test_made_folders_differ_by_settings_only(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'bases', 'LR=0.5', 'DATASET=folder', '--seeds', '7', stand_in=False)
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
    values = running.read_settings(one)
    assert (values['SEED'], values['LR'], values['DATASET']) == (7, 0.5, 'folder')
    assert values['RECIPE'] == '' and values['LOG_DIR'] == 'logdir'
    # settings.py and nothing else is changed against this folder either
    for path in (path for path in one.rglob('*.py') if path.name != 'settings.py'):
        assert path.read_bytes() == (HERE / path.relative_to(one)).read_bytes()
    assert {path.name for path in HERE.glob('*.py')} == {
        path.name for path in one.glob('*.py')}
    assert [path.name for path in root.glob('.making/*')] == ['lock']
    # so both have the hash of this folder's source, which another file changes
    assert (running.hash_source(one) == running.hash_source(other)
            == running.hash_source(HERE))
    for name in ('train.py', 'ablation/more.py'):
        before = running.hash_source(one)
        with open(one / name, 'a') as file:
            file.write('# mine')
        assert running.hash_source(one) != before


def test_settings_that_cannot_be_read_are_named(no_torch, tmp_path):
    make(tmp_path / 'a', 'loss')
    file = sorted((tmp_path / 'a').glob('*seed1'))[0] / 'settings.py'
    text = file.read_text()
    for bad in ('LR = oops', 'LR = ='):
        file.write_text(text.replace('LR = 0.009 ', bad + ' '))
        is_sentence(run(tmp_path / 'a'), str(file), 'a NAME = literal a line')


def test_what_is_copied_and_linked(no_torch, tmp_path):
    """Made from a folder with everything in it that must not be copied."""
    make(tmp_path / 'a', 'loss', stand_in=False)
    home = next((tmp_path / 'a').glob('*seed1'))
    junk = ['logdir/log.txt', 'runs/old/train.py', '.git/HEAD', 'docs/a.png', 'big.pth',
            '__pycache__/x.pyc', 'tests/__pycache__/x.pyc', '.venv/lib/x.py',
            'predictions/a.png', 'study/plan.json', 'models/mine.tar']
    kept = ['mine/new.py', 'mine/deep/er.py', 'notes.txt']
    assert (home / 'data').is_symlink()  # also where the data are still to come
    (home / 'data').unlink()
    for name in (*junk, *kept, 'models/resnet50.pth', 'data/voc/list.txt'):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text('x')
    done = subprocess.run([sys.executable, home / 'ablate.py', 'make', 'loss', 'b'],
                          cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    for made in (tmp_path / 'b').glob('*seed1'):
        assert [name for name in junk if (made / name).exists()] == []
        assert [name for name in kept if not (made / name).exists()] == []
        for name in ('models/resnet50.pth', 'data'):
            assert (made / name).is_symlink()
            assert (made / name).resolve() == (home / name).resolve()


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'weights.pth').touch()
    words = {'DATA_ROOT': 'voc', 'MODEL_DIR': '../m', 'PRETRAINED': 'weights.pth',
             'INIT_FROM': '/x/y.pth'}
    base, _ = ablate.plan_folders(['bases'], 'paper', (1,), words)
    assert base['DATA_ROOT'] == str(tmp_path / 'voc')
    assert base['MODEL_DIR'] == str(tmp_path / '../m')
    assert base['PRETRAINED'] == str(tmp_path / 'weights.pth')
    assert base['INIT_FROM'] == '/x/y.pth' and base['CACHE'] == ''
    base, _ = ablate.plan_folders(['bases'], 'paper', (1,), {'PRETRAINED': 'none'})
    assert base['PRETRAINED'] == 'none'
    assert base['MODEL_DIR'] == 'models' and base['DATA_ROOT'] == ''  # linked


def test_make_adds_and_never_overwrites(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'loss', 'LR=0.5', stand_in=False)
    first = root / 'emanet50.moving_average.l2.3stages.seed1'
    (first / 'mine').write_text('kept')
    (root / '.making' / 'copy').mkdir()  # as a make that was killed leaves it
    (root / '.making' / 'copy' / 'train.py').touch()
    done = make(root, 'bias_rate', '--seeds', '1,2', stand_in=False)
    assert '3 folders made, 1 were there' in done.stdout
    assert (first / 'mine').read_text() == 'kept'
    plan = read(root / 'plan.json')
    assert len(plan['folders']) == 5
    assert [path.name for path in root.glob('.making/*')] == ['lock']
    assert plan['folders'][first.name]['serves'] == [
        ['loss', 'all pixels of the crops'], ['bias_rate', 'twice']]
    for name in plan['folders']:  # the words of the first time hold on
        assert running.read_settings(root / name)['LR'] == 0.5
    before = (root / 'plan.json').read_text()
    make(root, 'bias_rate', 'LR=0.5', stand_in=False)
    assert (root / 'plan.json').read_text() == before


def test_folders_that_are_there_with_other_settings(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'loss', stand_in=False)
    names = sorted(os.listdir(root))
    for words, parts in ((('loss', 'bases', root, 'LR=0.5'), ('was made with',)),
                         (('bases', root, '--scale', 'laptop'), ('scale paper',))):
        is_sentence(run_script('ablate.py', 'make', *words), str(root), *parts)
    file = root / 'emanet50.moving_average.l2.3stages.seed1' / 'settings.py'
    file.write_text(file.read_text().replace('\nLR = 0.009', '\nLR = 0.1  '))
    is_sentence(run_script('ablate.py', 'make', 'bases', root), 'LR = 0.1, but 0.009',
                'nothing was made')
    assert sorted(os.listdir(root)) == names


def test_two_makes_at_once(no_torch, tmp_path, monkeypatch):
    root = tmp_path / 'study'
    lock = runtime.lock(root / '.making')
    is_sentence(run_script('ablate.py', 'make', 'loss', root), 'another process writes',
                str(root))
    assert os.listdir(root) == ['.making']
    lock.close()
    # another one ends before we have the lock
    monkeypatch.setattr(running, 'read_plan', lambda root: {'sources': {'a': 'b'}})
    monkeypatch.setattr(runtime, 'lock', lambda *args: (root / 'plan.json').touch())
    with pytest.raises(ValueError, match='another `make` has just changed'):
        ablate.make(['loss'], root, '', (1,), {})


def test_the_baseline_is_that_of_the_plan(no_torch, tmp_path):
    """settings.py is changed after `make`."""
    make(tmp_path / 'a', 'loss', stand_in=False)
    home, root = next((tmp_path / 'a').glob('*seed1')), tmp_path / 'it is mine'

    def call(*words):
        return subprocess.run([sys.executable, home / 'ablate.py', *words], text=True,
                              capture_output=True)

    done = call('make', 'loss', root, 'ITER_MAX=1', 'LR=0.5')
    assert done.returncode == 0 and f"ablate.py run '{root}'" in done.stdout
    plan = read(root / 'plan.json')
    assert plan['base'] == running.as_read(
        ablate.resolve('voc_r50', {'ITER_MAX': 1, 'LR': 0.5}))
    assert plan['differs'] == ['ITER_MAX', 'LR']  # from home's settings.py
    for name in plan['folders']:
        (root / name / 'train.py').write_text(TRAIN)
        (root / name / 'eval.py').write_text(EVAL)
    file = home / 'settings.py'
    file.write_text(file.read_text().replace('\nLR_POWER = 0.9', '\nLR_POWER = 0.8'))
    is_sentence(call('make', 'bias_rate', root), 'LR_POWER = 0.9, now it is 0.8')
    assert call('run', root).returncode == 0
    results = read(root / 'results.json')
    assert [run['settings'] for run in results['runs']] == [{}, {'LOSS_NORM': 'valid'}]
    assert results['base'] == {'ITER_MAX': 1, 'LR': 0.5}
    (root / 'plan.json').write_text('{"base": {}}')
    is_sentence(call('run', root), 'of an older ablate.py')


def test_the_commit_of_the_source(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *words],
                       cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    monkeypatch.setattr(runtime, 'HERE', tmp_path)
    (tmp_path / 'train.py').write_text('a')
    (tmp_path / '.gitignore').write_text('runs/')
    assert ablate.find_commit() == {}
    git('init')
    git('add', '.')
    git('commit', '-m', 'first')
    (known, commit), = ablate.find_commit().items()
    assert known == running.hash_source(tmp_path) and re.fullmatch('[0-9a-f]+', commit)
    (tmp_path / 'settings.py').write_text('LR = 1')  # is not of the source
    assert ablate.find_commit() == {known: commit}
    for name in ('train.py', 'new.py'):
        (tmp_path / name).write_text('b')
        assert ablate.find_commit() == {} and running.hash_source(tmp_path) != known
        (tmp_path / 'train.py').write_text('a')
    (tmp_path / 'runs').mkdir()
    monkeypatch.setattr(runtime, 'HERE', tmp_path / 'runs')  # under it, but not of it
    (tmp_path / 'runs' / 'train.py').write_text('c')
    assert ablate.find_commit() == {}


@pytest.mark.parametrize('words, parts', [
    (['make', 'bass', 'x'], ['no experiment bass', 'did you mean bases?']),
    (['make', 'bases', 'x', '--scale', 'laptopp'], ['did you mean laptop?']),
    (['make', 'bases', 'x', 'BATCHSIZE=4'], ['did you mean BATCH_SIZE?']),
    (['make', 'bases', 'x', 'LR=fast'], ['LR=fast', 'number']),
    (['make', 'bases', 'x', 'RECIPE=dem'], ['did you mean demo?']),
    (['make', 'bases', 'x', 'SEED=2'], ['SEED', '--seeds']),
    (['make', 'bases', 'x', '--seeds', '1,a'], ['--seeds=1,a']),
    (['make', 'bases', 'x', 'EM_UPDATE=never'], ['EM_UPDATE is what bases varies']),
    (['make', 'bases'], ['then a folder']), (['make', 'bases', 'heads'], ['then a']),
    (['make', 'voc_test_r101', 'x', '--scale', 'laptop'], ['--scale paper']),
    (['make', 'voc_test_r101', 'x', 'RECIPE=demo'], ['so RECIPE says nothing']),
    *((['make', 'voc_test_r152', 'x', f'{name}=/a'],
       ['trains on coco_voc and voc', f'{name}=/a cannot', 'below data/'])
      for name in ('DATA_ROOT', 'TRAIN_SPLIT', 'VAL_SPLIT', 'CACHE')),
    (['make', 'bases', 'loss', 'lr=0.5'], ['lr=0.5 is no setting', 'LR=0.5']),
    (['run', 'x'], ['x has no plan.json']), (['run'], ['one folder']),
    (['run', 'x', '--jobs', '-1'], ['--jobs -1']),
    (['run', 'x', 'LR=2'], ['run takes no settings']),
    (['report', 'x.json', '--out', 'docs'], ['docs: a Markdown file', 'docs.md']),
    (['report'], ['files of results']), (['report', 'x.json'], ['x.json is not there']),
    (['lst'], ['did you mean list?'])])
def test_wrong_words(words, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['ablate.py', *words])
    with pytest.raises(SystemExit) as caught:
        runtime.run(ablate.main, runtime.read_command_line(
            'About.', ablate.add_options, 'WORDS'))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and os.listdir(tmp_path) == []
    assert error.startswith('error: ') and error.count('\n') == 1
    for part in parts:
        assert part in error


def test_two_variants_of_one_name_are_refused(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, 'new', {'about': '', 'plot': 'dots', 'variants': {
        'a': {'settings': {'CLASS_WEIGHTS': (1.0, 2.0)}},
        'b': {'settings': {'CACHE': '1.0-2.0', 'CLASS_WEIGHTS': (1.0,)}}}})
    monkeypatch.setattr(ablate, 'name_folder', lambda values, base, stage: 'same')
    with pytest.raises(ValueError, match='new, b: another variant .* called same too'):
        ablate.plan_folders(['new'], 'paper', (1,), {})


# -- run, with stand-ins ---------------------------------------------------------------

def test_run_finishes_all_and_then_nothing(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'heads', 'ITER_MAX=200', 'BATCH_SIZE=4', '--seeds', '1,2')
    names = list(read(root / 'plan.json')['folders'])
    done = run(root, '--jobs', '6', '--devices', 'cuda:0,cuda:1')
    assert done.returncode == 0, done.stderr
    devices = set()
    for name in names:
        trained, evaluated = calls(root / name)
        has_unit = name.startswith('ema')
        devices.add(trained[1])
        assert trained[0] == 'train.py' and evaluated[0] == 'eval.py'
        stages = ['--stages', '1,2,3,4,5,6,7,8'] * has_unit
        assert evaluated[1:] == stages + trained[1:2]
        assert steps(root / name) == list(range(1, 201))
        assert re.search(rf'^{re.escape(name)}: mIoU \d\d.00', done.stdout, re.M)
    assert devices == {'DEVICE=cuda:0', 'DEVICE=cuda:1'}
    results = read(root / 'results.json')
    assert [result['name'] for result in results['runs']] == names
    assert results['recipe'] == 'voc_r50' and results['n_planned'] == len(names)
    result = results['runs'][-1]
    assert result['name'].endswith('seed2') and result['seed'] == 2
    assert result['settings'] == {'HEAD': 'a2'}
    assert result['serves'] == [['heads', 'A2']]
    assert result['mIoU'] == {'0': 0.2} and result['IoU'] == [0.25, None]
    assert result['stages'] == 0
    files = running.hash_source(root / names[-1])
    assert result['source'] == f'files {files}' != running.hash_source(HERE)
    assert result['error'] is None and result['step'] == 200
    assert result['seconds'] == 200 * 4 / 2
    assert len(result['loss']) == 60 and result['loss'][-1][0] == 200
    assert len(json.dumps(result)) < 6000
    first = results['runs'][0]
    assert first['mIoU'] == {str(t): round(0.1 + t / 100, 2) for t in range(1, 9)}
    assert first['environment'] == {'device': 'a stand-in', 'torch': 'none',
                                    'precision': 'fp32'}
    (root / 'results.json').unlink()
    done = run(root)
    assert done.returncode == 0 and read(root / 'results.json') == results
    assert all(len(calls(root / name)) == 2 for name in names)
    plan = read(root / 'plan.json')
    running.write_results(root, {**plan, 'sources': {files: 'abc'}})
    result = read(root / 'results.json')['runs'][-1]
    assert result['source'] == f'abc (files {files})'


def test_a_failing_folder_does_not_stop_the_others(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'bases', 'ITER_MAX=4')
    bad = 'emanet50.never.l2.3stages.seed1'
    for n_tries, words in ((1, ()), (1, ()), (2, ['--again'])):
        done = run(root, *words)
        assert done.returncode == 1
        assert re.search(f'not finite:\n    {re.escape(bad)}\n$', done.stderr)
        found = {r['name']: r for r in read(root / 'results.json')['runs']}
        assert {name for name in found if found[name]['error']} == {bad}
        assert found[bad]['error'] == 'not finite'  # not what the other rank said
        assert found[bad]['step'] == 2
        assert found[bad]['mIoU'] == {} and len(found[bad]['loss']) >= 2
        assert len(found) == 3 and len(calls(root / bad)) == n_tries
    (root / 'mended').touch()
    assert run(root, '--again').returncode == 0
    assert not [r for r in read(root / 'results.json')['runs'] if r['error']]


def test_what_fails_before_it_trains_is_tried_each_time(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'bases', 'ITER_MAX=2')
    (root / 'early').touch()
    assert 'no data' in run(root).stderr
    bad = root / 'emanet50.never.l2.3stages.seed1'
    (root / 'early').rename(root / 'collapse')  # before its first row
    for _ in range(2):  # but that is settled
        done = run(root)
        assert done.returncode == 1 and 'not finite' in done.stderr
        assert len(calls(bad)) == 2 and steps(bad) == []
    (root / 'mended').touch()
    assert run(root).returncode == 1
    assert run(root, '--again').returncode == 0


@pytest.mark.parametrize('said, sentence', [
    ('a\nerror: first\nerror: second\nerror: another rank has ended\n', 'first'),
    ('error: another rank has ended\nerror: true\n', 'true'),
    ('Traceback\nKeyError: 3\nerror: another rank has ended\n\n', 'KeyError: 3'),
    ('error: another rank has ended\n', 'it ended without a word'),
    ('', 'it ended without a word')])
def test_the_true_sentence_is_told(said, sentence, tmp_path):
    (tmp_path / 'settings.py').write_text('LR = 1\n')
    (tmp_path / 'run.log').write_text(f'error: of before\n{said}')
    job = running.Job(tmp_path, '', 0)
    job.began_at = len('error: of before\n')
    assert job.last_words() == sentence


@pytest.mark.parametrize('is_at_work', [True, False])
def test_a_folder_that_is_removed_is_skipped(is_at_work, no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'bases', 'ITER_MAX=3')
    names = list(read(root / 'plan.json')['folders'])
    for name in ('wait', 'mended'):
        (root / name).touch()
    process = start(root)
    until(lambda: steps(root / names[0]))
    (root / names[not is_at_work]).rename(tmp_path / 'away')
    if is_at_work:  # its process is told to stop, then the others go on
        until(lambda: (root / names[1] / 'calls').exists())
    (root / 'wait').unlink()
    out, error = process.communicate(timeout=60)
    gone = names[not is_at_work]
    assert process.returncode == 1 and 'Traceback' not in error
    assert out.count(f'{gone}: skipped, the folder is gone: run the same') == 1
    assert '1 of 3 folders are not finished' in error and gone in error
    assert [run['name'] for run in read(root / 'results.json')['runs']] == [
        name for name in names if name != gone]
    (tmp_path / 'away').rename(root / gone)
    assert run(root).returncode == 0


def test_a_chain_is_run_in_order(no_torch, tmp_path):
    root = tmp_path / 'study'
    done = make(root, 'voc_test_r152', 'ITER_MAX=2', '--seeds', '1,2')
    assert 'were there; voc_test_r152 with its own recipes\n' in done.stdout
    assert run(root, '--jobs', '5').returncode == 0
    for seed in (1, 2):
        names = [f'emanet152.moving_average.l2.3stages.stage{i}.seed{seed}'
                 for i in (1, 2, 3)]
        several = [running.read_settings(root / name) for name in names]
        assert [values['INIT_FROM'] for values in several] == [
            '', *(f'../{name}/logdir/final.pth' for name in names[:2])]
        assert [values['LR'] for values in several] == [0.009, 0.001, 0.0001]
        assert [values['DATASET'] for values in several] == ['coco_voc', 'voc', 'voc']
        ends = [(root / name / 'result.json').stat().st_mtime_ns for name in names]
        assert ends == sorted(ends)


def test_a_chain_waits_for_what_failed(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'voc_test_r101', 'ITER_MAX=4', 'EM_UPDATE=never')
    done = run(root)
    assert done.returncode == 1 and 'not finite' in done.stderr
    assert done.stderr.count('which is not finished') == 2
    assert [len(calls(path)) for path in sorted(root.glob('*seed1'))] == [1, 0, 0]


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_are_passed_on(number, status, no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'loss', 'ITER_MAX=3')
    (root / 'wait').touch()
    process = start(root, '--jobs', '2')
    folders = sorted(root.glob('*seed1'))
    until(lambda: all(steps(folder) for folder in folders))
    is_sentence(run(root), 'another process writes into', str(root))
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == status and 'Traceback' not in error
    assert 'the same command goes on' in out
    assert not list(root.glob('*/result.json'))
    (root / 'wait').unlink()
    assert run(root).returncode == 0
    assert [[call[0] for call in calls(folder)] for folder in folders] == [
        ['train.py', 'train.py', 'eval.py']] * 2


def test_waits_for_a_train_that_still_writes(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'loss', 'ITER_MAX=2')
    folder = root / 'emanet50.moving_average.l2.3stages.seed1'
    lock = runtime.lock(folder / 'logdir')
    process = start(root)
    line = process.stdout.readline() + process.stdout.readline()
    assert f'{folder.name}: waits for the train.py that writes there' in line
    assert not calls(folder)
    lock.close()
    process.communicate(timeout=30)
    assert process.returncode == 0 and len(calls(folder)) == 2


def test_threads_are_divided(no_torch, tmp_path, monkeypatch):
    root = tmp_path / 'study'
    make(root, 'loss', 'ITER_MAX=1')
    folders = sorted(root.glob('*seed1'))
    monkeypatch.delenv('OMP_NUM_THREADS')
    (folders[1] / 'result.json').write_text('{"error": "", "source": ""}')
    assert run(root, '--jobs', '1').returncode == 0
    (folders[1] / 'result.json').unlink()
    assert run(root, '--jobs', '999').returncode == 0
    assert [calls(folder)[0][-1] for folder in folders] == [None, '1']


def test_what_make_adds_is_run_too(no_torch, tmp_path):
    root = tmp_path / 'study'
    make(root, 'loss', 'ITER_MAX=2')
    (root / 'wait').touch()
    process = start(root)
    until(lambda: [path for path in root.glob('*seed1') if steps(path)])
    make(root, 'loss', '--seeds', '2')
    (root / 'wait').unlink()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(read(root / 'results.json')['runs']) == 4


def test_scores_of_another_kind_are_not_taken(tmp_path):
    values = {**runtime.snapshot(), 'ITER_MAX': 9}
    where = tmp_path / 'logdir' / 'eval'
    where.mkdir(parents=True)
    right = {'checkpoint': 'logdir/final.pth', 'step': 9, 'stages': 3, 'averaged': [],
             'settings': values}
    wrong = [{'checkpoint': 'logdir/best.pth'}, {'step': 8}, {'averaged': ['a', 'b']},
             *({'settings': {**values, **other}} for other in (
                 {'EVAL_FLIP': True}, {'EVAL_STRIDE': 16}, {'EVAL_IMAGES': 2}))]
    for i, other in enumerate(wrong):
        (where / f'{i}.json').write_text(json.dumps({**right, **other, 'stages': i}))
    assert running.read_scores(tmp_path, values) == {}
    (where / 'right.json').write_text(json.dumps(right))
    assert list(running.read_scores(tmp_path, values)) == [3]


@pytest.mark.parametrize('t', [0, 3])  # as eval.py writes it, and as it once did
def test_a_head_without_iterations_has_one_score(t, tmp_path):
    values = {**runtime.snapshot(), 'ITER_MAX': 9, 'HEAD': 'fcn', 'EVAL_STAGE_NUM': 5}
    (tmp_path / 'logdir' / 'eval').mkdir(parents=True)
    (tmp_path / 'logdir' / 'eval' / 'a.json').write_text(json.dumps({
        'checkpoint': 'logdir/final.pth', 'step': 9, 'stages': t, 'averaged': [],
        'settings': values}))
    assert list(running.read_scores(tmp_path, values)) == [0]
    assert running.usual_stages(values) == 0 and running.wanted_stages(values) == []


def test_thinning():
    assert running.thin([(1, 2.0), (2, 3.0)]) == [[1, 2.0], [2, 3.0]]
    points = [(i, float(i)) for i in range(1, 121)]
    thinned = running.thin(points)
    assert len(thinned) == 60 and thinned[0] == [2, 1.5] and thinned[-1] == [120, 119.5]
    thinned = running.thin(points[:101])
    assert len(thinned) == 60 and thinned[-1][0] == 101 and running.thin([]) == []


def test_last_step(tmp_path):
    assert running.last_step(tmp_path) == 0
    (tmp_path / 'logdir').mkdir()
    rows = ''.join(f'{{"kind": "train", "step": {i}, "x": "{"y" * 300}"}}\n'
                   for i in range(1, 99))
    for end in ('', '{"kind": "train", "st', '1'):
        (tmp_path / 'logdir' / 'log.jsonl').write_text(rows + end)
        assert running.last_step(tmp_path) == 98


# -- run, in earnest -------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != 'linux', reason='children die with `run` there')
def test_killed_in_the_middle(voc, tmp_path):
    """kill -9 of `run` when one folder is finished; `run` again repeats nothing."""
    root, n = tmp_path / 'study', 40
    make(root, 'loss', *TINY, f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train', 'DATASET=voc',
         f'ITER_MAX={n}', 'ITER_SAVE=100000', stand_in=False)
    folder, other = (root / name for name in read(root / 'plan.json')['folders'])
    (other / 'train.py').write_text(TRAIN)
    (other / 'eval.py').write_text(EVAL)
    process = start(root, '--jobs', '2')
    until(lambda: (other / 'result.json').exists() and len(steps(folder)) > 2, 100)
    process.kill()
    process.communicate()
    log = folder / 'logdir'
    until((log / 'latest.pth').exists)  # train.py has saved the step it was in
    until(lambda: running.is_free(log))
    n_before = len(steps(folder))
    assert 2 < n_before < n and not (log / 'final.pth').exists()
    done = run(root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'resuming logdir/latest.pth after step {n_before}' in (
        log / 'log.txt').read_text()
    assert steps(folder) == list(range(1, n + 1))
    printed = re.findall(r'^step (\d+)/', (folder / 'run.log').read_text(), re.M)
    assert [int(step) for step in printed] == list(range(1, n + 1))
    assert len(calls(other)) == 2 and steps(other) == steps(folder)
    results = read(root / 'results.json')['runs']
    assert [sorted(result['mIoU']) for result in results] == [list('12345678')] * 2
    assert all(0 < miou < 1 for miou in results[0]['mIoU'].values())
    assert len(results[0]['IoU']) == 21 and results[0]['environment']['torch']
    assert results[1]['settings'] == {'LOSS_NORM': 'valid'}


def test_a_rival_head_in_earnest(voc, tmp_path):
    root = tmp_path / 'study'
    make(root, 'loss', *TINY, f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train', 'DATASET=voc',
         'ITER_MAX=1', 'HEAD=fcn', stand_in=False)
    names = list(read(root / 'plan.json')['folders'])
    shutil.rmtree(root / names[1])
    done = run(root)
    assert done.stderr.startswith('1 of 2 folders') and names[1] in done.stderr
    result, = read(root / 'results.json')['runs']
    assert result['error'] is None and result['stages'] == 0
    assert list(result['mIoU']) == ['0'] and 0 <= result['mIoU']['0'] < 1


@pytest.mark.slow
def test_each_stage_starts_from_the_weights_before(voc, tmp_path):
    """The first stage is trained by hand, and the folder of folders is moved."""
    root = tmp_path / 'study'
    make(root, 'voc_test_r101', *TINY, f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train',
         'DATASET=voc', 'ITER_MAX=3', stand_in=False)
    root = root.rename(tmp_path / 'moved')
    names = list(read(root / 'plan.json')['folders'])
    done = subprocess.run([sys.executable, 'train.py'], cwd=root / names[0], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    weights = (root / names[0] / 'logdir' / 'final.pth').read_bytes()
    done = run(root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (root / names[0] / 'logdir' / 'final.pth').read_bytes() == weights
    logs = [(root / name / 'logdir' / 'log.txt').read_text() for name in names]
    assert 'network: all weights of' not in logs[0]
    for log, before in zip(logs[1:], names, strict=False):
        assert f'network: all weights of ../{before}/logdir/final.pth' in log
    assert [steps(root / name) for name in names] == [[1, 2, 3]] * 3


# -- report ----------------------------------------------------------------------------

def result(seed, label, miou, experiment='normalisation', error=None, **settings):
    """Return a result as results.json has it."""
    mious = miou if isinstance(miou, dict) else {} if error else {3: miou}
    return {'name': f'{label}{seed}', 'seed': seed, 'serves': [[experiment, label]],
            'settings': settings, 'source': 'abc', 'error': error, 'step': 30,
            'stages': settings.get('STAGE_NUM', 3),
            'mIoU': {str(t): value / 100 for t, value in mious.items()}, 'pAcc': {},
            'IoU': [], 'n_images': 5, 'loss': [[10, 2.0], [20, 1.0]], 'seconds': 1800.0,
            'validation': [[20, 0.3]], 'environment': {'device': 'my CPU'}}


@pytest.fixture
def study(tmp_path):
    """A study with known means, deviations and intervals."""
    runs = [result(seed, label, miou, **settings) for label, mious, settings in (
        ('L2', (50, 51, 52), {}),
        ('none', (53, 53, 56), {'EM_NORM': 'none'}),            # +3 +2 +4
        ('LayerNorm', (49, 50, 48), {'EM_NORM': 'layer_norm'}))  # -1 -1 -4
        for seed, miou in zip((1, 2, 3), mious, strict=True)]
    runs.append(result(4, 'none', 0, error='the loss was not finite', EM_NORM='none'))
    runs += [result(1, f'T = {t}', {e: 40 + t + e / 10 for e in range(1, 9)},
                    'iterations', **({'STAGE_NUM': t} if t != 3 else {}))
             for t in (3, 1)]
    file = tmp_path / 'voc_tiny.json'
    file.write_text(json.dumps({'scale': 'laptop', 'recipe': 'ablation_laptop',
                                'words': {}, 'base': {'LR': 0.5, 'DATA_ROOT': '/x'},
                                'n_planned': 20, 'runs': runs}))
    return file


def test_report(no_torch, study, tmp_path):
    out = tmp_path / 'docs' / 'found.md'
    out.parent.mkdir()
    done = run_script('ablate.py', 'report', study, '--out', out)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    for line in (
            '| variant | mIoU | seed 1 | seed 2 | seed 3 | seed 4 | difference to L2 | '
            'paper |',
            '| L2 | 51.00 ± 1.00 | 50.00 | 51.00 | 52.00 | - |  | 78.52 |',
            # 4.3027 = t of 2 degrees of freedom; 3 -+ 4.3027 * 1 / sqrt(3)
            '| none | 54.00 ± 1.73 | 53.00 | 53.00 | 56.00 | failed | '
            '+3.00 (+0.52 .. +5.48) | - |',
            '| LayerNorm | 49.00 ± 1.00 | 49.00 | 50.00 | 48.00 | - | '
            '-2.00 (-6.30 .. +2.30) | - |',
            '- none, seed 4, failed after step 30: the loss was not finite',
            'Told apart from L2 by the spread over seeds: none (better, 3 seeds). Not '
            'told apart: LayerNorm (3 seeds).',
            '| T = 1 | 41.10 | 41.10 | -2.20 | 77.34 |',  # one seed: no interval
            '| T = 3 | 43.30 | 43.30 |  | 78.52 |',
            '| *T = 3, paper* |  |  | *78.52* | *78.80* | *78.86* | *78.88* | *78.89* '
            '| *78.88* |',
            '![iterations, voc_tiny: mIoU over the iterations in training and at '
            'evaluation](found/voc_tiny_iterations.png)'):
        assert f'\n{line}\n' in text, line
    assert ('11 of 20 runs are finished, 1 failed: each is told below its table; '
            '6.0 hours') in text
    assert text.count('The column `paper` is of VOC val: ResNet-50 from') == 1
    assert 'my CPU' in text and '\nLR=0.5\n' in text
    pictures = re.findall(r'\]\((.+\.png)\)', text)
    assert len(pictures) == 4
    for name in pictures:
        file = out.parent / name
        assert file.stat().st_size < 60000 and Image.open(file).size[0] > 500
        assert Image.open(file).info.keys() <= {'transparency'}


def test_report_keeps_the_prose_and_is_stable(study, tmp_path):
    out = tmp_path / 'docs.md'
    out.write_text('# Mine\n\nBefore.\n<!-- ablate: voc_tiny normalisation -->\nold\n'
                   '<!-- end -->\nAfter.\n\n<!-- ablate: other bases -->\nOther.\n'
                   '<!-- end -->\nEnd.\n')
    report.report([study], out)
    text = out.read_text()
    assert text.startswith('# Mine\n\nBefore.\n'
                           '<!-- ablate: voc_tiny normalisation -->\nWhat is done')
    assert '\nold\n' not in text and text.count('ablate: voc_tiny normalisation') == 1
    assert ('<!-- end -->\nAfter.\n\n<!-- ablate: other bases -->\nOther.\n<!-- end -->'
            '\nEnd.\n\n## voc_tiny\n\n<!-- ablate: voc_tiny study -->\n') in text
    assert '### voc_tiny: iterations\n\n<!-- ablate: voc_tiny iterations -->' in text
    files = [out, *(tmp_path / 'docs').glob('*')]
    before = [file.read_bytes() for file in files]
    report.report([study], out)
    assert [file.read_bytes() for file in files] == before and len(files) == 5


@pytest.mark.parametrize('text', [
    '<!-- ablate: s e -->\nold\n<!-- end -->',  # its last line has no end
    '<!-- ablate: s e -->  \nold\n  <!-- end --> \n',
    'Before.\n\n<!-- ablate: s e --> \n<!-- end -->\nAfter.'])
def test_marks_are_found(text):
    found = report.put(text, 's', 'e', 'new\n')
    assert found == re.sub('<!-- ablate(.|\n)*<!-- end -->',
                           '<!-- ablate: s e -->\nnew\n<!-- end -->',
                           text).replace('  <', '<').replace('> \n', '>\n') + (
        '\n' * text.endswith('<!-- end -->'))
    assert report.put(found, 's', 'e', 'new\n') == found


def test_no_difference_to_another_variant(study):
    content = report.read_study(study)
    content['runs'] = [run for run in content['runs'] if run['settings']]
    normalisation, iterations = report.sort_runs('s', content)
    for experiment in (normalisation, iterations):
        assert experiment.baseline == ''
        text = report.describe_experiment(experiment, 'x')
        assert 'No variant that was run has the settings of the baseline' in text
        assert 'difference to' not in text
        assert report.draw_dots(experiment).axes


def test_no_variant_is_told_apart(study):
    content = report.read_study(study)
    content['runs'] = [run for run in content['runs'] if run['settings'] != {
        'EM_NORM': 'none'}]
    assert report.verdict(report.sort_runs('s', content)[0]) == (
        'No variant is told apart from L2 by the spread over seeds: LayerNorm (3 '
        'seeds).')


def test_results_of_the_first_ablate(study):
    """Heads without iterations had stages 3, and there was no source."""
    content = report.read_study(study)
    content['runs'] = [
        {**result(1, 'EMANet', {t: 50 + t for t in range(1, 9)}, 'heads'),
         'source': ''},
        {**result(1, 'FCN', 48.5, 'heads', HEAD='fcn'), 'source': ''},
        {**result(2, 'A2', 49, 'heads', HEAD='a2'), 'stages': 0, 'mIoU': {'0': 0.49}}]
    study.write_text(json.dumps(content))
    out = study.with_name('docs.md')
    report.report([study], out)
    text = out.read_text()
    for line in ('| EMANet | 53.00 | 53.00 | - |  | 78.52 (ResNet-50) |',
                 '| FCN | 48.50 | 48.50 | - | -4.50 | - |',
                 '| A2 | 49.00 | - | 49.00 | - | 77.41 (ResNet-50) |'):
        assert f'\n{line}\n' in text, line
    assert '; source abc; ' in text


def test_report_of_a_chain(study):
    content = report.read_study(study)
    recipes_of = [f'voc_test_r101{end}' for end in ('_coco', '_trainaug', '')]
    chain = [result(1, label, 60, 'voc_test_r101', N_LAYERS=101, LR=rate, **more)
             for label, rate, more in (
                 ('COCO', 0.009, {}), ('trainaug', 0.001, {'INIT_FROM': '../a/b.pth'}),
                 ('trainval', 0.0001, {'TRAIN_SPLIT': 'trainval'}))]
    for runs, is_mixed in ((chain, False), (chain + content['runs'], True)):
        content['runs'] = runs
        study.write_text(json.dumps(content))
        out = study.with_name(f'docs{is_mixed}.md')
        report.report([study], out)
        text = out.read_text()
        assert ('recipe `ablation_laptop`' in text) == is_mixed
        assert ('What all runs but the chains have in common' in text) == is_mixed
        assert 'voc_test_r101 with its own recipes; ' in text
        assert [text.count(f'recipe `{name}`, and in all') for name in recipes_of] == [
            1, 1, 1]
        assert '\nLR=0.0001 N_LAYERS=101 TRAIN_SPLIT=trainval\n' in text
        assert '../a' not in text and 'INIT_FROM' not in text


def test_two_studies_in_one_report(study, tmp_path):
    other = tmp_path / 'another.json'
    shutil.copy(study, other)
    report.report([study, other], tmp_path / 'docs.md')
    text = (tmp_path / 'docs.md').read_text()
    for name in ('voc_tiny', 'another'):
        for experiment in ('study', 'normalisation', 'iterations'):
            assert text.count(f'<!-- ablate: {name} {experiment} -->') == 1
    assert text.count('<!-- end -->') == 6


def test_the_kept_study_makes_the_kept_report(tmp_path):
    """docs/ablations.md is what `report` makes of the JSON beside it."""
    if not (HERE / 'docs').is_dir():
        pytest.skip('docs/ is not here: a copied folder leaves it out')
    kept = HERE / 'docs' / 'ablations'
    shutil.copytree(kept, tmp_path / 'ablations')
    shutil.copy(HERE / 'docs' / 'ablations.md', tmp_path)
    pictures = sorted(path.name for path in kept.glob('*.png'))
    for name in pictures:
        (tmp_path / 'ablations' / name).unlink()
    text = (HERE / 'docs' / 'ablations.md').read_text(encoding='utf-8')
    study = json.loads((kept / 'shapes.json').read_text())
    assert len(study['runs']) == 60 and '68.51 ± 0.89' in text
    (tmp_path / 'ablations.md').write_text(text.replace('68.51 ± 0.89', '99.99'))
    files = [tmp_path / 'ablations' / f'{name}.json' for name in ('camvid', 'shapes')]
    report.report(files, tmp_path / 'ablations.md')
    assert (tmp_path / 'ablations.md').read_text(encoding='utf-8') == text
    assert sorted(path.name for path in (tmp_path / 'ablations').glob('*.png')
                  ) == pictures
    assert len(pictures) == 16


@pytest.mark.parametrize('change, part', [
    (lambda file, out: out.write_text('<!-- ablate: voc_tiny study -->\nx\n'),
     'has no <!-- end -->'),
    (lambda file, out: out.write_text('<!-- ablate: voc_tiny study -->\n<!-- ablate: a '
                                      'b -->\n<!-- end -->\n'), 'has no <!-- end -->'),
    (lambda file, out: file.write_text('{"runs": [3]}'), 'holds no results'),
    (lambda file, out: file.write_text('nothing'), 'holds no results'),
    (lambda file, out: file.write_text(file.read_text().replace('"iterations"',
                                                                '"iteration"')),
     'did you mean iterations?')])
def test_a_report_that_cannot_be_made(change, part, study, tmp_path):
    out = tmp_path / 'docs.md'
    change(study, out)
    before = out.read_text() if out.exists() else ''
    with pytest.raises(ValueError) as caught:
        report.report([study], out)
    assert part in str(caught.value) and runtime.explain(caught.value)
    assert (out.read_text() if out.exists() else '') == before
    assert not (tmp_path / 'docs').exists()


def test_pairs_are_of_the_same_seed():
    mean, low, high = report.compare({1: 5.0, 2: 7.0, 9: 99.0},
                                     {1: 4.0, 2: 5.0, 3: 0.0})
    assert mean == 1.5  # of 1 and 2; 12.706 = t of 1 degree of freedom
    assert high - mean == pytest.approx(12.706 * 0.70711 / 2 ** 0.5, abs=1e-3)
    assert mean - low == pytest.approx(high - mean)
    assert report.compare({1: 5.0}, {1: 4.0}) == (1, -float('inf'), float('inf'))
    assert report.compare({1: 5.0}, {2: 4.0}) is None


def test_pictures_show_the_numbers(study):
    normalisation, iterations = report.sort_runs('voc_tiny', report.read_study(study))
    assert list(normalisation.variants) == ['L2', 'LayerNorm', 'none']  # as in the data
    axes = report.draw_dots(normalisation).axes[0]
    dots = [sorted(line.get_xdata()) for line in axes.lines if line.get_marker() == 'o']
    assert dots == [pytest.approx(mious) for mious in (
        [50, 51, 52], [48, 49, 50], [53, 53, 56])]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        'L2', 'LayerNorm', 'none']

    axes = report.draw_lines(iterations).axes[0]
    lines = [line for line in axes.lines if line.get_marker() == 'None']
    assert [line.get_label() for line in lines] == ['T = 1', 'T = 3']
    assert lines[1].get_ydata() == pytest.approx([43 + t / 10 for t in range(1, 9)])
    circles = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == 'o']
    assert [list(xy) for xy in circles] == [pytest.approx([1, 41.1]),
                                            pytest.approx([3, 43.3])]

    ours, paper = report.draw_matrix(iterations).axes
    assert [text.get_text() for text in ours.texts] == [
        f'{40 + t + e / 10:.2f}' for t in (1, 3) for e in range(1, 9)]
    assert [label.get_text() for label in ours.get_yticklabels()] == ['1', '3']
    assert [text.get_text() for text in paper.texts] == [
        f'{x:.2f}' for row in FIGURE_4.values() for x in row.values()]
    places = [text.get_position() for text in paper.texts]
    assert all(x >= y for x, y in places) and len(set(places)) == 36

    loss, scores = report.draw_curves(normalisation).axes
    assert list(loss.lines[0].get_ydata()) == [2, 1] and loss.get_yscale() == 'log'
    assert list(scores.lines[0].get_ydata()) == [30]


def test_rows_are_of_the_training(study):
    """EVAL_STAGE_NUM=5 among the words: the score that counts is at 5 for all."""
    content = report.read_study(study)
    for run in content['runs']:
        run['stages'] = 5
    _, iterations = report.sort_runs('s', content)
    ours = report.draw_matrix(iterations).axes[0]
    assert [label.get_text() for label in ours.get_yticklabels()] == ['1', '3']
    assert len(ours.texts) == 16


def test_a_mean_is_of_all_seeds(study):
    content = report.read_study(study)
    losses = {1: [[10, 1.0], [20, 2.0], [30, 9.0]], 2: [[10, 3.0], [20, 4.0]], 3: []}
    for run in content['runs']:
        if run['serves'] == [['normalisation', 'L2']]:
            run['loss'] = losses[run['seed']]
        if run['serves'] == [['iterations', 'T = 1']]:
            run['serves'] = [['normalisation', 'none']]
    normalisation, _ = report.sort_runs('s', content)
    line = report.draw_curves(normalisation).axes[0].lines[0]
    assert [list(xy) for xy in line.get_xydata()] == [[10, 2], [20, 3]]
    lines = {line.get_label(): line for line in report.draw_lines(normalisation).axes[
        0].lines}  # one seed of three has been evaluated with more than 3
    assert list(lines['none'].get_xdata()) == [3]
