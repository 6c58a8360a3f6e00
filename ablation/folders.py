"""The folders of a study: which ones experiments need, and how they are made.

    python ablate.py make bases heads runs/study --seeds 1,2,3

A study is a folder with plan.json and a copy of the project for each variant and seed.
"""
import ast
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import config
import logger
import recipes
from ablation.experiments import EXPERIMENTS, HALF, SCALES

PLAN = 'plan.json'
LINKED = ('data', 'models')  # shared by all copies
# Left out of a copy: these folders of the project, these files and folders anywhere,
RESULTS = ('logdir', 'runs', 'predictions')
NOT_COPIED = ('.git', '.venv', 'venv', '__pycache__', '.pytest_cache', '.ruff_cache')
WEIGHTS = ('.pth', '.pt2', '.onnx')
# and folders with such a file: environments, studies, LOG_DIRs, other copies.
MARKS = ('pyvenv.cfg', PLAN, 'log.jsonl', 'ablate.py')
PATHS = {'DATA_ROOT', 'MODEL_DIR', 'PRETRAINED', 'INIT_FROM'}
PER_FOLDER = ('SEED', 'LOG_DIR', 'RESUME', 'CHECKPOINT')


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings.py of a folder without executing it.

    Raises:
        UserError: if it holds more than literals.
    """
    file = folder / 'settings.py'
    try:
        body = ast.parse(file.read_text(encoding='utf-8')).body
        return {node.targets[0].id: ast.literal_eval(node.value) for node in body
                if isinstance(node, ast.Assign)}
    except (OSError, ValueError, SyntaxError) as error:
        raise config.UserError(f'{file} cannot be read ({error}): lines of NAME = '
                               'literal are expected, so correct it') from None


def differences(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the values that differ from the base."""
    return {name: value for name, value in values.items() if base.get(name) != value}


def make_paths_absolute(values: dict[str, Any], parent: Path) -> dict[str, Any]:
    """Make the paths among settings absolute, where they exist relative to `parent`.

    Paths below the linked folders of the project stay as they are.
    """
    values = dict(values)
    for name in PATHS & values.keys():
        if not values[name]:
            continue
        path = Path(values[name])
        is_linked = parent == config.ROOT and values[name].split('/')[0] in LINKED
        if (parent / path).exists() and not is_linked:
            values[name] = str(parent / path)
    return values


def usual_stages(values: dict[str, Any]) -> int:
    """Return the EM iterations at evaluation; 0 for a head without iterations."""
    if values['HEAD'] not in ('ema', 'ema_mmseg'):
        return 0
    return values['EVAL_STAGE_NUM'] or values['STAGE_NUM']


def plan_folders(names: list[str], base: dict[str, Any], seeds: tuple[int, ...]
                 ) -> dict[str, dict[str, Any]]:
    """List the folders that experiments need; variants with equal settings share one.

    Returns:
        For each folder's name its `values` (all settings), `seed`, and `serves` (pairs
        of experiment and variant).
    """
    folders = {}
    wanted = [(seed, name, label) for seed in seeds for name in names
              for label in EXPERIMENTS[name]['variants']]
    for seed, experiment, label in wanted:
        variant = EXPERIMENTS[experiment]['variants'][label]
        values = {**base, **variant, 'SEED': seed}
        for setting, value in variant.items():
            if value == HALF:
                values[setting] = base[setting] // 2
        folder = folders.setdefault(name_folder(values, base), {
            'values': values, 'seed': seed, 'serves': []})
        folder['serves'].append([experiment, label])
    return folders


def name_folder(values: dict[str, Any], base: dict[str, Any]) -> str:
    """Name a folder after its head and the settings that differ from the baseline."""
    head = 'emanet' if values['HEAD'] == 'ema' else values['HEAD']
    separator = '_' if head[-1].isdigit() else ''
    parts = [f'{head}{separator}{values["N_LAYERS"]}']
    named = {'HEAD', 'N_LAYERS', 'SEED'}
    if usual_stages(values):
        parts += [values['EM_UPDATE'], values['EM_NORM'],
                  f'{values["STAGE_NUM"]}stages']
        named |= {'EM_UPDATE', 'EM_NORM', 'STAGE_NUM'}
    for name, value in differences(values, base).items():
        if name not in named:
            short = re.sub('^(em|n)_', '', name.lower())
            text = config.format_value(value).lower()
            parts.append(f'{short}_{re.sub("[^a-z0-9.+-]", "-", text)}')
    return '.'.join([*parts, f'seed{values["SEED"]}'])


def make(names: list[str], root: Path, scale: str, seeds: tuple[int, ...],
         overrides: dict[str, Any]) -> tuple[int, int]:
    """Make the folders of experiments; those that exist are left alone.

    Args:
        names, root, seeds: the experiments, where to make them, and for which seeds.
        scale: a key of SCALES; '' is that of the folders that exist, or paper.
        overrides: settings for all folders; none: those of the folders that exist.

    Returns:
        How many folders were made, and how many existed.

    Raises:
        UserError: for wrong names, or if what exists has other settings.
    """
    plan = read_plan(root) if (root / PLAN).exists() else {}
    scale = config.check_name(scale or plan.get('scale', 'paper'), SCALES, 'scale')
    overrides = make_paths_absolute(overrides, Path.cwd()) or plan.get('words', {})
    check_overrides(names, overrides)
    recipe = overrides.get('RECIPE') or SCALES[scale]
    base = {**make_paths_absolute(read_settings(config.ROOT), config.ROOT),
            **recipes.RECIPES[recipe]['settings'], **overrides,
            'RECIPE': '', 'LOG_DIR': 'logdir'}
    check_equal(root, plan.get('base', base), base)
    folders = plan_folders(names, base, seeds)
    missing = [name for name in folders if not (root / name).exists()]
    for name, folder in folders.items():
        if name not in missing:
            check_equal(root / name, read_settings(root / name), folder['values'])
    if not plan:
        changed = differences(base, read_settings(config.ROOT))
        plan = {'scale': scale, 'recipe': recipe, 'words': overrides, 'base': base,
                'differs': list(changed), 'folders': {}}
    plan['folders'] = add_entries(plan['folders'], folders, missing)
    root.mkdir(parents=True, exist_ok=True)
    logger.write_text(root / PLAN, logger.to_json(plan, 1))
    for name in missing:
        copy_project(root / name, folders[name]['values'])
    return len(missing), len(folders) - len(missing)


def add_entries(entries: dict[str, dict], folders: dict[str, dict], missing: list[str]
                ) -> dict[str, dict]:
    """Add folders to the entries of a plan.json, with the source of the new ones."""
    entries, source = dict(entries), describe_source()
    for name, folder in folders.items():
        entry = entries.setdefault(name, {'seed': folder['seed'], 'serves': []})
        entry['serves'] += [pair for pair in folder['serves']
                            if pair not in entry['serves']]
        if name in missing:
            entry['source'] = source
    return entries


def check_overrides(names: list[str], overrides: dict[str, Any]) -> None:
    """Check the experiments' names, and that overrides do not set what is varied."""
    for name in names:
        config.check_name(name, EXPERIMENTS, 'experiment')
        for variant in EXPERIMENTS[name]['variants'].values():
            for setting in overrides.keys() & variant:
                raise config.UserError(f'{setting} is what {name} varies, so it cannot '
                                       'be set for all folders: leave it out')
    for setting in overrides.keys() & PER_FOLDER:
        raise config.UserError(f'{setting} is set in each folder: give seeds as '
                               '--seeds 1,2,3, and leave the others out')


def check_equal(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Check that what exists has the settings that are wanted now."""
    for name, value in old.items():
        if name in new and value != new[name]:
            raise config.UserError(
                f'{folder} was made with {name} = {value!r}, now it is '
                f'{new[name]!r}, so nothing was made: give the same scale and '
                'settings, or another folder')


def read_plan(root: Path) -> dict[str, Any]:
    """Read the plan.json of a study, its settings with tuples as in settings.py.

    Raises:
        UserError: if there is none.
    """
    if not (root / PLAN).is_file():
        raise config.UserError(f'{root} has no {PLAN}: give a folder that `python '
                               'ablate.py make` has made')
    plan = json.loads((root / PLAN).read_text(encoding='utf-8'))
    for key in ('base', 'words'):
        plan[key] = {name: tuple(value) if isinstance(value, list) else value
                     for name, value in plan[key].items()}
    return plan


def describe_source() -> str:
    """Return the commit of the project, with -dirty if files have changed since."""
    try:
        return logger.run_git('describe', '--always', '--dirty')
    except OSError:  # no git on this machine
        return ''


def copy_project(folder: Path, values: dict[str, Any]) -> None:
    """Copy the project with other settings, without data, results and environments.

    Its data/ and models/ are links. It appears when it is complete.

    Raises:
        UserError: if the folder exists or cannot be made.
    """
    folder = folder.resolve()
    if folder.exists():
        raise config.UserError(f'{folder} exists: give a new folder, or remove it')
    temporary = folder.with_name(f'.{folder.name}.part')

    def list_ignored(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if is_ignored(Path(parent, name), temporary)]

    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a copy that was interrupted
        shutil.copytree(config.ROOT, temporary, symlinks=True, ignore=list_ignored)
        text = (config.ROOT / 'settings.py').read_text(encoding='utf-8')
        logger.write_text(temporary / 'settings.py',
                          config.rewrite_settings(text, values))
        for name in LINKED:
            (config.ROOT / name).mkdir(exist_ok=True)
            os.symlink((config.ROOT / name).resolve(), temporary / name)
        os.replace(temporary, folder)
    except OSError as error:
        raise config.UserError(f'cannot make {folder} ({error}): give a folder that '
                               'can be written') from None


def is_ignored(path: Path, target: Path) -> bool:
    """Return whether a copy of the project into `target` leaves out a path."""
    if path.parent == config.ROOT and path.name in (*LINKED, *RESULTS):
        return True
    if path.name in NOT_COPIED or path.suffix in WEIGHTS:
        return True
    return (target.is_relative_to(path)
            or any((path / mark).exists() for mark in MARKS))
