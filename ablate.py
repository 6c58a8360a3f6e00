"""Make, run and report ablations: one folder an experiment, as one would by hand.

    python ablate.py list
    python ablate.py make bases iterations runs/study --scale laptop --seeds 1,2,3
    python ablate.py make heads runs/heads --scale short DATA_ROOT=/data/VOC2012
    python ablate.py run runs/study --jobs 2         # the same command goes on
    python ablate.py run runs/heads --devices cuda:0,cuda:1
    python ablate.py report runs/study/results.json --out docs/ablations.md

`make` copies this folder for each variant and seed, rewrites the lines of settings.py
that differ and links the weights and data; NAME=VALUE words hold for all of them. `run`
trains and evaluates what is not finished, and keeps all results in DIR/results.json.
"""
import runtime
from ablation.experiments import EXPERIMENTS, SCALES


def add_options(parser) -> None:
    parser.add_argument('--scale', default='', metavar='|'.join(SCALES),
                        help="make: on which recipe (paper, or that of DIR's folders)")
    parser.add_argument('--seeds', default='1', metavar='S,S,...',
                        help='make: a folder for each of these (1)')
    parser.add_argument('--jobs', type=int, default=0, metavar='N',
                        help='run: so many folders at a time (1, or one a device)')
    parser.add_argument('--devices', default='', metavar='D,D,...',
                        help='run: where, as in cuda:0,cuda:1; otherwise as settings '
                             'say')
    parser.add_argument('--again', action='store_true',
                        help='run: try again what has failed')
    parser.add_argument('--out', default='docs/ablations.md', metavar='FILE',
                        help='report: the Markdown file (docs/ablations.md); its '
                             'pictures go to a folder of its name')


if __name__ == '__main__':
    names = f'\nexperiments: {", ".join(EXPERIMENTS)}'
    args = runtime.read_command_line(__doc__ + names, add_options,
                                     'list|make|run|report')

import argparse
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import recipes
from ablation import running

SOURCES = ('.py', '.md', '.sh', '.toml', '.txt')  # files that are copied
MAKING = '.making'  # folder below DIR: a copy that is not whole, and the lock of `make`
PATHS = ('DATA_ROOT', 'MODEL_DIR', 'PRETRAINED', 'INIT_FROM', 'CACHE')
NOT_SHARED = ('SEED', 'LOG_DIR', 'RESUME', 'CHECKPOINT')  # a folder has its own
OF_THE_DATA = ('DATA_ROOT', 'TRAIN_SPLIT', 'VAL_SPLIT', 'CACHE')  # mean one data set


# -- what is to be made ----------------------------------------------------------------

def resolve(recipe: str, words: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a recipe with words on top, of which RECIPE is ''."""
    runtime.apply({**running.read_settings(runtime.HERE), 'RECIPE': ''})
    runtime.apply({**words, 'RECIPE': recipe})
    return {**runtime.snapshot(), 'RECIPE': '', 'LOG_DIR': 'logdir'}


def anchor(values: dict[str, Any], words: dict[str, Any]) -> dict[str, Any]:
    """Make the relative paths among settings absolute, but for what will be linked.

    Args:
        values: all settings.
        words: those of the command line, whose paths are of the working directory.
    """
    values = dict(values)
    for name in PATHS:
        path = Path(values[name])
        is_word = (name == 'PRETRAINED' and '/' not in values[name]
                   and not path.is_file())
        if not path.parts or is_word or name not in words and (
                path.parts[0] in ('data', 'models')):
            continue
        values[name] = str((Path.cwd() if name in words else runtime.HERE) / path)
    return values


def plan_folders(names: list[str], scale: str, seeds: tuple[int, ...],
                 words: dict[str, Any]) -> tuple[dict, dict[str, dict]]:
    """Decide which folders experiments need; equal ones are made once.

    Args:
        names: of the experiments.
        scale: a key of SCALES.
        seeds: of the runs.
        words: settings for all folders; RECIPE takes the place of the scale's.

    Returns:
        The settings of the baseline, and for each folder's name its `values` (all
        settings), `seed`, `serves` (pairs of experiment and variant) and `after`, the
        folder whose weights it starts from, or ''.

    Raises:
        ValueError: in a sentence.
    """
    recipe = words.get('RECIPE', '') or SCALES[scale]
    runtime.known(recipe, recipes.RECIPES, 'recipe')
    for experiment in names:
        check_words(experiment, scale, words)
    base, folders = anchor(resolve(recipe, words), words), {}
    for seed in seeds:
        for experiment in names:
            about, before, n_stages = EXPERIMENTS[experiment], '', 0
            for label, variant in about['variants'].items():
                start = base
                if 'recipe' in variant:
                    start = anchor(resolve(variant['recipe'], words), words)
                    n_stages += 1
                    if before:
                        start['INIT_FROM'] = f'../{before}/logdir/final.pth'
                    elif 'INIT_FROM' not in words:
                        start['INIT_FROM'] = ''
                values = {**start, **variant.get('settings', {}), 'SEED': seed}
                if 'halved' in variant:
                    values[variant['halved']] = start[variant['halved']] // 2
                name = name_folder(values, start, n_stages)
                folder = folders.setdefault(
                    name, {'values': values, 'seed': seed, 'serves': [],
                           'after': before})
                if folder['values'] != values:
                    raise ValueError(f'{experiment}, {label}: another variant with '
                                     f'other settings is called {name} too: make the '
                                     'two in different folders')
                folder['serves'].append([experiment, label])
                before = name if about.get('chain') else ''
    return base, folders


def check_words(experiment: str, scale: str, words: dict[str, Any]) -> None:
    """Raise where words set what is varied, or do not suit all stages of a chain."""
    stages = EXPERIMENTS[experiment]['variants'].values()
    for name in words:
        if any(name in variant.get('settings', {}) for variant in stages):
            raise ValueError(f'{name} is what {experiment} varies, so a word for all '
                             'its folders would make them something else than they are '
                             'called: leave it out')
    if not EXPERIMENTS[experiment].get('chain'):
        return
    useless = f'--scale {scale}' * (scale != 'paper') or 'RECIPE' * ('RECIPE' in words)
    if useless:
        raise ValueError(f'{experiment} has recipes of its own, so {useless} says '
                         'nothing: take --scale paper without a RECIPE, and words to '
                         'make it small, as in ITER_MAX=100')
    names = dict.fromkeys(resolve(stage['recipe'], words)['DATASET']
                          for stage in stages)
    given = {**running.read_settings(runtime.HERE), **words}
    for name in OF_THE_DATA:
        if given[name] and len(names) > 1:
            raise ValueError(
                f'{experiment} trains on {" and ".join(names)}, so {name}='
                f'{given[name]} cannot hold for all its stages: leave it out and '
                'prepare or link these data sets below data/, which all folders share')


def name_folder(values: dict[str, Any], base: dict[str, Any], stage: int = 0) -> str:
    """Name a folder after its head and what differs from the baseline.

    Args:
        values: all settings.
        base: those of the baseline.
        stage: of a chain, from 1; 0 is no chain.
    """
    head = 'emanet' if values['HEAD'] == 'ema' else values['HEAD']
    parts = [f'{head}{"_" * head[-1].isdigit()}{values["N_LAYERS"]}']
    told = {'HEAD', 'N_LAYERS', 'SEED', 'INIT_FROM'}
    if values['HEAD'] in running.ITERATE:
        parts += [values['EM_UPDATE'], values['EM_NORM'],
                  f'{values["STAGE_NUM"]}stages']
        told |= {'EM_UPDATE', 'EM_NORM', 'STAGE_NUM'}
    parts += [f'stage{stage}'] * bool(stage)
    for name, value in values.items():
        if name not in told and value != base[name]:
            short = re.sub('^(em|n)_', '', name.lower())
            text = runtime.show_value(value).replace(',', '-')
            parts.append(f'{short}_{re.sub("[^a-z0-9.+-]", "-", text.lower())}')
    return '.'.join([*parts, f'seed{values["SEED"]}'])


# -- make ------------------------------------------------------------------------------

def make(names: list[str], root: Path, scale: str, seeds: tuple[int, ...],
         words: dict[str, Any]) -> None:
    """Make the folders of experiments; those that are there already are left alone.

    Args:
        names: of the experiments.
        root: folder that they are made in.
        scale, seeds, words: see plan_folders; '' and no words are those of the folders
            that are there, or the scale `paper`.

    Raises:
        ValueError, OSError: in a sentence, before anything is written.
    """
    plan = running.read_plan(root) if (root / running.PLAN).exists() else {}
    scale = scale or plan.get('scale', 'paper')
    for name in names:
        runtime.known(name, EXPERIMENTS, 'experiment')
    for name in NOT_SHARED:
        if name in words:
            raise ValueError(f'{name} is set in each folder: give seeds as --seeds 1,2,'
                             '3, and leave the others out')
    if not words:
        words = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in plan.get('words', {}).items()}
    base, folders = plan_folders(names, runtime.known(scale, SCALES, 'scale'), seeds,
                                 words)
    study = {'scale': scale, 'recipe': words.get('RECIPE', '') or SCALES[scale],
             'words': {name: base.get(name) if name in PATHS else value
                       for name, value in words.items()},
             'base': base}
    if plan:
        check_study(root, plan, running.as_read(study))
    for name, folder in folders.items():
        if (root / name).exists():
            check_same(root / name, folder['values'])
    lock = runtime.lock(root / MAKING, 'DIR')
    if (root / running.PLAN).exists() and running.read_plan(root) != plan:
        raise ValueError(f'another `make` has just changed {root}: give the same '
                         'command again')
    n_made, entries = 0, plan.get('folders', {})
    for name, folder in folders.items():
        if not (root / name).exists():
            make_folder(root / name, folder['values'])
            n_made += 1
        serves = entries.get(name, {'serves': []})['serves']
        serves += [pair for pair in folder['serves'] if pair not in serves]
        entries[name] = {'seed': folder['seed'], 'after': folder['after'],
                         'serves': serves}
    # What of settings.py was changed is told as it was when the first folder was made.
    study['differs'] = plan['differs'] if plan else list(
        running.differences(base, running.read_settings(runtime.HERE)))
    study['sources'] = {**plan.get('sources', {}), **find_commit()}
    running.write_json(root / running.PLAN, {**study, 'folders': entries})
    lock.close()
    chains = [name for name in names if EXPERIMENTS[name].get('chain')]
    told = ([f'{scale} scale, recipe {study["recipe"]}'] * (len(chains) < len(names))
            + [f'{name} with its own recipes' for name in chains])
    print(f'{root}: {n_made} folders made, {len(folders) - n_made} were there; '
          f'{", ".join(told)}\n'
          f'next: python ablate.py run {shlex.quote(str(root))}')


def check_study(root: Path, plan: dict[str, Any], study: dict[str, Any]) -> None:
    """Raise where the folders that are there have another scale, words or baseline."""
    for key in ('scale', 'recipe', 'words'):
        if plan[key] != study[key]:
            raise ValueError(f'{root} was made with {key} {plan[key]}, now it is '
                             f'{study[key]}: give the same scale and words, or another '
                             'folder')
    old, new = plan['base'], study['base']
    for name in {**old, **new}:
        if old.get(name) != new.get(name):
            raise ValueError(f'{root} was made with {name} = {old.get(name)!r}, now it '
                             f'is {new.get(name)!r}: put settings.py or recipes.py '
                             'back, or give another folder')


def check_same(folder: Path, values: dict[str, Any]) -> None:
    """Raise where a folder that is there has other settings than it would get."""
    there = running.read_settings(folder)
    for name in {**values, **there}:
        if there.get(name) != values.get(name):
            raise ValueError(
                f'{folder} is there with {name} = {there.get(name)!r}, but '
                f'{values.get(name)!r} is wanted, so nothing was made: move it away, '
                'or give another folder')


def make_folder(folder: Path, values: dict[str, Any]) -> None:
    """Copy this folder with other settings; it appears when it is whole.

    Args:
        folder: is made.
        values: all settings.
    """
    here, temporary = runtime.HERE, folder.parent / MAKING / 'copy'
    shutil.rmtree(temporary, ignore_errors=True)  # of a make that was killed
    temporary.mkdir()
    for path in sorted(here.iterdir()):
        if path.is_file() and (path.suffix in SOURCES or path.name == '.gitignore'):
            shutil.copy2(path, temporary)
        elif (path.is_dir() and path.name not in running.NOT_COPIED
              and any(path.glob('*.py'))):
            shutil.copytree(path, temporary / path.name, ignore=shutil.ignore_patterns(
                '__pycache__', '.*', '*.pth'))
    (temporary / 'settings.py').write_text(runtime.rewrite_settings(
        (here / 'settings.py').read_text(encoding='utf-8'), values), encoding='utf-8')
    (temporary / 'models').mkdir()
    for path in sorted((here / 'models').glob('*')):
        if path.suffix == '.pth':
            os.symlink(path.resolve(), temporary / 'models' / path.name)
        elif path.suffix in SOURCES:
            shutil.copy2(path, temporary / 'models')
    os.symlink((here / 'data').resolve(), temporary / 'data')  # it may come later
    os.replace(temporary, folder)


def find_commit() -> dict[str, str]:
    """Return the hash of this folder's source with its commit, where it is one."""
    def git(*words):
        return subprocess.run(['git', '-C', str(runtime.HERE), *words], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                              ).stdout.strip()
    try:
        commit = git('log', '-1', '--format=%h', '--', '.')
        is_changed = git('status', '--porcelain', '--', '*.py', ':!settings.py')
    except OSError:  # no git on this machine
        return {}
    if is_changed or not commit:
        return {}
    return {running.hash_source(runtime.HERE): commit}


# -- the command line ------------------------------------------------------------------

def show_list() -> None:
    """Print the experiments with their variants, and the scales."""
    for name, about in EXPERIMENTS.items():
        print(f'{name}: {about["about"]}')
        for label, variant in about['variants'].items():
            words = [f'{key}={runtime.show_value(value)}'
                     for key, value in variant.get('settings', {}).items()]
            words += [f'{key}={variant[key]}' for key in ('recipe', 'halved')
                      if key in variant]
            print(f'    {label:32} {" ".join(words) or "the baseline"}')
    print('\nscales (--scale), which differ by their recipe only:')
    for scale, recipe in SCALES.items():
        print(f'    {scale:7} RECIPE={recipe}: '
              f'{recipes.RECIPES.get(recipe, {}).get("about", "")}')


def main(args: argparse.Namespace) -> int | None:
    """Do what the first word says."""
    what, *others = args.others or ['']
    runtime.known(what, ('list', 'make', 'run', 'report'), 'command')
    if args.given and what != 'make':
        raise ValueError(f'{what} takes no settings, but {", ".join(args.given)} was '
                         'given: words are for make, then each folder has them in its '
                         'settings.py')
    if what == 'list':
        return show_list()
    if what == 'make':
        if len(others) < 2 or others[-1] in EXPERIMENTS:
            raise ValueError(f'make {" ".join(others)}: names of experiments and then '
                             'a folder are expected, as in make bases runs/bases; '
                             '`python ablate.py list` shows the names')
        *names, root = others
        if '=' in root:
            raise ValueError(f'{root} is no setting, nor a folder, as it has a =: '
                             'settings are in capitals, as in LR=0.5, and the folder '
                             'comes last')
        seeds = runtime.parse_value('--seeds', args.seeds, (1, 2, 3))
        return make(names, Path(root), args.scale, tuple(dict.fromkeys(seeds)),
                    args.given)
    if what == 'run':
        if len(others) != 1:
            raise ValueError(f'run {" ".join(others)}: one folder is expected, that '
                             'of make')
        devices = [name.strip() for name in args.devices.split(',') if name.strip()]
        if args.jobs < 0:
            raise ValueError(f'--jobs {args.jobs}: 1 or more is expected')
        return running.run(Path(others[0]), args.jobs or len(devices) or 1, devices,
                           args.again)
    from ablation import report  # matplotlib is slow
    if not others:
        raise ValueError('report: files of results are expected, as in '
                         'runs/study/results.json')
    return report.report([Path(file) for file in others], Path(args.out))


if __name__ == '__main__':
    runtime.run(main, args)
