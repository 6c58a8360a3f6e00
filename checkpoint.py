"""Checkpoints: saved atomically, loaded soundly, and never able to run code.

    python eval.py CHECKPOINT=logdir/step_30000.pth

Ours hold {net, optimizer, scaler, step, settings, run}: tensors and plain literals. The
released EMANet checkpoints {net, step} load by the same call, and so do those of
mmsegmentation's EMANet, {state_dict, meta}: see conversion/.
"""
import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import config
import recipes
import settings
from config import UserError
from conversion import mmsegmentation, released

# What the tensors mean: on loading, these win over settings.py.
ARCHITECTURE = (
    'N_LAYERS', 'STEM', 'STRIDE', 'MULTI_GRID', 'MEAN', 'STD', 'HEAD', 'HEAD_CHANNELS',
    'FC1_CHANNELS', 'N_BASES', 'STAGE_NUM', 'EM_LAMBDA', 'EM_KERNEL', 'EM_NORM',
    'EM_UPDATE', 'EM_GRADIENT', 'EM_CONV1', 'AUX_WEIGHT', 'PSA_GRID', 'ALIGN_CORNERS')

# Of this command line and machine: never taken from training.
NOT_INHERITED = ('CHECKPOINT', 'LOG_DIR', 'RESUME', 'DEVICE', 'RANKS', 'N_WORKERS',
                 'EVAL_IMAGES')

# What training did before there was a setting for it.
LEGACY_DEFAULTS = {
    'CROP_WIDTH': 0, 'INIT_FROM': '', 'LR_END': 0.0, 'DECAY_ALL': False,
    'CLASS_WEIGHTS': (1.0,), 'OHEM_KEPT': 0.0, 'OHEM_BELOW': 0.0, 'OHEM_MIN': 100000,
    'AUX_WEIGHT': 0.0, 'PSA_GRID': (33, 33), 'ALIGN_CORNERS': True}

# Earlier names of the last convolution of a head.
LEGACY_KEYS = {'head.fc2.': 'head.classifier.', 'head.classify.': 'head.classifier.',
               'aux.classify.': 'aux.classifier.'}

# Names of PASCAL Context's classes that mmsegmentation spells otherwise.
SPELLINGS = {'bedclothes': 'bedcloth', 'cloth': 'clothes', 'table': 'diningtable'}

CLASSIFIERS = ('head.classifier', 'aux.classifier')


# -- writing ---------------------------------------------------------------------------

def save(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that `path` is always whole: the old one or the new one.

    Args:
        content: tensors and plain literals in dicts and lists.
        path: its folder must be there.

    Raises:
        UserError: if the disk does not take it; the file at `path` stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f'could not write {path} ({error}): make room or set another '
                        'LOG_DIR; the last checkpoint is as it was') from error
    with contextlib.suppress(OSError):  # make the new name itself durable
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove_old(folder: str | Path, keep: int) -> None:
    """Remove all step_N.pth of a folder but the last `keep`."""
    for path in list_steps(folder)[max(keep, 0):]:
        path.unlink(missing_ok=True)  # another rank may have removed it


def list_steps(folder: str | Path) -> list[Path]:
    """Return the step_N.pth of a folder, the newest first."""
    files = [p for p in Path(folder).glob('step_*.pth')
             if re.fullmatch(r'step_\d+', p.stem)]
    return sorted(files, key=lambda p: -int(p.stem[5:]))


# -- reading ---------------------------------------------------------------------------

def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project, the released EMANet code or mmsegmentation.

    Args:
        path: of the file.

    Returns:
        `net` with the keys of our network; `settings` with those that the checkpoint
        knows; `step`; `run`; and optimizer and scaler if the file has them.

    Raises:
        UserError: for a file that is missing, damaged, unsafe or no such checkpoint.
            Nothing in the file is executed.
    """
    path = Path(path)
    content = read_file(path)
    is_dict = isinstance(content, dict)
    if (is_dict and is_state_dict(content.get('state_dict'))
            and mmsegmentation.is_checkpoint(content)):
        content = mmsegmentation.convert(content, path)
    if not (is_dict and is_state_dict(content.get('net'))):
        what = type(content).__name__
        if is_dict:
            what = ', '.join(map(str, list(content)[:4])) or 'an empty one'
        raise UserError(f'{path} is no EMANet checkpoint: a dictionary with net, the '
                        f'tensors, is expected, found {what}')
    if released.is_checkpoint(content):
        content = released.convert(content, path)
    content['net'] = released.rename_keys(content['net'], LEGACY_KEYS)
    if content.get('settings'):
        content['settings'] = {**LEGACY_DEFAULTS, **content['settings']}
    return {'settings': {}, 'run': {}, 'step': 0, **content}


def read_file(path: Path) -> Any:
    """Read a file of torch.save that holds tensors and plain literals.

    Raises:
        UserError: for a file that is missing, damaged, or could run code.
    """
    if not path.is_file():
        raise UserError(f'there is no checkpoint {path}: train first, or give the file '
                        'as CHECKPOINT=path')
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # torch does not check the sums
                    raise OSError('a checksum differs')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of other pickle protocols
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        if holds_objects(path, error):
            raise UserError(
                f'{path} holds more than tensors and plain values, so loading it could '
                'run code: it was not opened; take a checkpoint that was saved as a '
                'state dict, or save its state_dict and meta by themselves if you '
                'trust it') from None
        raise UserError(describe_damage(path, error)) from None
    except Exception as error:  # a broken file can fail in any layer below
        raise UserError(describe_damage(path, error)) from None


def holds_objects(path: Path, error: pickle.UnpicklingError) -> bool:
    """Return whether a file was refused for its objects, not for damage."""
    with open(path, 'rb') as f:
        is_pickle = f.read(1) == b'\x80'  # its first byte since protocol 2
    names_code = re.search('global|reduce|class', str(error), re.IGNORECASE)
    return bool(names_code) or (is_pickle and 'truncated' not in str(error))


def is_state_dict(state: Any) -> bool:
    """Return whether something is a dictionary of names and tensors."""
    return isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor)
        for key, value in state.items())


def describe_damage(path: Path, error: Exception) -> str:
    """Return the sentence for a file that cannot be read."""
    size = path.stat().st_size
    return (f'{path} is damaged or no checkpoint ({size} bytes, '
            f'{type(error).__name__}): get it again or take another one')


def find_checkpoints() -> list[Path]:
    """Return the files that settings name: those of CHECKPOINT, or the last of LOG_DIR.
    """
    folder = Path(settings.LOG_DIR)
    if settings.CHECKPOINT:
        if Path(settings.CHECKPOINT).exists():  # its name may hold a comma
            return [Path(settings.CHECKPOINT)]
        return [Path(part.strip()) for part in settings.CHECKPOINT.split(',')]
    files = [p for p in (folder / 'final.pth', folder / 'latest.pth') if p.exists()]
    return [max(files, key=lambda p: p.stat().st_mtime, default=folder / 'final.pth')]


def load_newest(folder: str | Path) -> tuple[dict[str, Any] | None, Path | None, list]:
    """Read the newest sound checkpoint of a run: latest.pth, else the last step_N.pth.

    Returns:
        (content, path, notes); content is None if no run has saved.

    Raises:
        UserError: if there are checkpoints and none is sound.
    """
    files = [Path(folder) / 'latest.pth', *list_steps(folder)]
    files = [path for path in files if path.exists()]
    notes = []
    for path in files:
        try:
            return load(path), path, notes
        except UserError as error:
            notes.append(str(error))
    if files:
        raise UserError(f'none of the {len(files)} checkpoints in {folder} can be '
                        f'read ({notes[0]}): run `sh clean.sh {folder}` to start over')
    return None, None, notes


def load_net(net: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load tensors into a network, strictly: every one must be there and fit.

    Raises:
        UserError: names what differs.
    """
    own = net.state_dict()
    missing = [k for k in own if k not in state
               and not k.endswith('num_batches_tracked')]
    unexpected = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or unexpected or shapes:
        parts = []
        if shapes:
            k = shapes[0]
            parts.append(f'{len(shapes)} tensors of another shape ({k}: '
                         f'{tuple(state[k].shape)}, expected {tuple(own[k].shape)})')
        if missing:
            parts.append(f'{len(missing)} missing ({missing[0]})')
        if unexpected:
            parts.append(f'{len(unexpected)} unexpected ({unexpected[0]})')
        raise UserError(f'{path} is of another architecture than the settings: '
                        f'{"; ".join(parts)}; set DATASET, N_LAYERS, HEAD, AUX_WEIGHT '
                        'and the widths to what it was trained with')
    counters = {k: own[k] for k in own if k not in state}
    net.load_state_dict({**state, **counters}, strict=True)


def use_checkpoint_architecture(recorded: dict[str, Any]) -> list[str]:
    """Take architecture settings from the checkpoint.

    Args:
        recorded: the checkpoint's settings.

    Returns:
        A line for each setting that differed.
    """
    lines = []
    for name in ARCHITECTURE:
        old = getattr(settings, name)
        if name not in recorded or recorded[name] == old:
            continue
        if (name, old) != ('STEM', 'auto'):
            lines.append(f'{name} = {recorded[name]!r} as in the checkpoint, not '
                         f'{old!r}')
        setattr(settings, name, recorded[name])
    return lines


def apply_checkpoint_settings(content: dict[str, Any], overrides: dict[str, Any]
                              ) -> list[str]:
    """Set the settings that a checkpoint is to be used with.

    The overrides of training come first, then those of this command line; architecture
    settings are always the checkpoint's.

    Args:
        content: of load().
        overrides: values of this command line.

    Returns:
        Lines that say which settings are not this folder's.
    """
    trained = {name: value for name, value in content['run'].get('given', {}).items()
               if name not in NOT_INHERITED and hasattr(settings, name)}
    kept = {name: getattr(settings, name) for name in NOT_INHERITED}
    # The recipe of training may set those in `kept` too, so they are given again.
    config.apply_settings({**trained, **kept, **overrides})
    words = [f'{name}={config.format_value(value)}' for name, value in trained.items()
             if name not in overrides]
    lines = [f'as in training: {" ".join(words)}'] if words else []
    return lines + use_checkpoint_architecture(content['settings'])


def load_all(paths: list[Path], overrides: dict[str, Any]
             ) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """Read checkpoints one after another, with the settings of each while it is used.

    Afterwards the settings are those of the first.

    Args:
        paths: of the checkpoints.
        overrides: values of this command line.

    Yields:
        (path, content, lines): see load and apply_checkpoint_settings.
    """
    before, first = config.snapshot(), {}
    for path in paths:
        config.apply_settings(before)
        content = load(path)
        lines = apply_checkpoint_settings(content, overrides)
        first = first or config.snapshot()
        yield path, content, lines
    config.apply_settings(first)


# -- classes ---------------------------------------------------------------------------

def get_classes(content: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return names and palette (768 numbers) of the classes that a checkpoint predicts.

    If the checkpoint does not say, they are those of the data set in settings, or of
    the first data set with as many classes, or numbers.
    """
    run, n = content['run'], count_classes(content['net'])
    if run.get('classes'):
        return list(run['classes']), list(run['palette'])
    known = recipes.DATASETS
    for info in (known.get(settings.DATASET, known['voc']), *known.values()):
        if len(info['classes']) == n:
            return list(info['classes']), info['palette']
    return [f'class {i}' for i in range(n)], recipes.voc_palette()


def count_classes(state: dict[str, Tensor]) -> int:
    """Return how many classes a network's tensors predict; 0 if that is unclear."""
    return next((len(state[f'{name}.weight']) for name in CLASSIFIERS
                 if f'{name}.weight' in state), 0)


def reorder_classes(content: dict[str, Any], classes: Sequence[str], path: str | Path
                    ) -> list[str]:
    """Put the rows of a checkpoint's classifiers into the order of a data set.

    Names are compared without case, spaces and signs. A checkpoint without names is
    taken to have the order of the data set.

    Returns:
        A line for the log, if the order was another one.

    Raises:
        UserError: if the names differ, unless the data set has the name of that of
            training: then its classes were renamed.
    """
    own, wanted = ([re.sub(r'[\W_]', '', name.lower()) for name in names]
                   for names in (content['run'].get('classes', ()), classes))
    own = [name if name in wanted else SPELLINGS.get(name, name) for name in own]
    if not own or own == wanted:
        return []
    if sorted(own) != sorted(wanted) or len(set(own)) < len(own):
        if content['settings'].get('DATASET') == settings.DATASET:
            return []
        others = ', '.join([name for name in own if name not in wanted][:3] or own[:3])
        raise UserError(f'{path} predicts other classes than those of the data set '
                        f'{settings.DATASET}, {others} among them: give the DATASET '
                        'that it was trained on')
    rows = [own.index(name) for name in wanted]
    content['net'].update({key: value[rows] for key, value in content['net'].items()
                           if key.rpartition('.')[0] in CLASSIFIERS})
    return [f'{path}: its classes are put into the order of {settings.DATASET}']
