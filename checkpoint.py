"""Checkpoints: saved atomically, loaded soundly, and never able to run code.

    python eval.py CHECKPOINT=logdir/step_30000.pth

Ours hold {net, optimizer, scaler, step, settings, run}: tensors and plain literals. The
released EMANet checkpoints {net, step} load by the same call.
"""
import contextlib
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import recipes
import runtime
import settings

# What the tensors mean: on loading, these win over settings.py.
ARCHITECTURE = (
    'N_LAYERS', 'STEM', 'STRIDE', 'MULTI_GRID', 'MEAN', 'STD', 'HEAD', 'HEAD_CHANNELS',
    'FC1_CHANNELS', 'N_BASES', 'STAGE_NUM', 'EM_LAMBDA', 'EM_KERNEL', 'EM_NORM',
    'EM_UPDATE', 'EM_GRADIENT', 'EM_CONV1', 'AUX_WEIGHT')

# Of this command line and machine: never taken over from training.
NOT_TAKEN_OVER = ('CHECKPOINT', 'LOG_DIR', 'RESUME', 'DEVICE', 'RANKS', 'N_WORKERS',
                  'EVAL_IMAGES')

# What training did before there was a setting for it.
BEFORE = {'CROP_WIDTH': 0, 'INIT_FROM': '', 'LR_END': 0.0, 'DECAY_ALL': False,
          'CLASS_WEIGHTS': (1.0,), 'OHEM_KEPT': 0.0, 'OHEM_BELOW': 0.0,
          'OHEM_MIN': 100000, 'AUX_WEIGHT': 0.0}


# -- writing ---------------------------------------------------------------------------

def save(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that `path` is always whole: the old one or the new one.

    Args:
        content: tensors and plain literals in dicts and lists.
        path: its folder must be there.

    Raises:
        OSError: in a sentence, where the disk does not take it; the file that was at
            `path` is as it was.
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
        raise OSError(f'could not write {path} ({error}): make room or set another '
                      'LOG_DIR; the last checkpoint is as it was') from error
    with contextlib.suppress(OSError):  # make the new name itself durable
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove_old(folder: str | Path, keep: int) -> None:
    """Remove all step_N.pth of a folder but the last `keep`."""
    for path in list_steps(folder)[max(keep, 0):]:
        path.unlink()


def list_steps(folder: str | Path) -> list[Path]:
    """Return the step_N.pth of a folder, the newest first."""
    files = [p for p in Path(folder).glob('step_*.pth')
             if re.fullmatch(r'step_\d+', p.stem)]
    return sorted(files, key=lambda p: -int(p.stem[5:]))


# -- reading ---------------------------------------------------------------------------

def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this project or of the released EMANet code.

    Args:
        path: of the file.

    Returns:
        `net` with the keys of our network; `settings` with those that the checkpoint
        knows; `step`; `run`; and optimizer and scaler where the file has them.

    Raises:
        FileNotFoundError, ValueError: in a sentence. Nothing in the file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}: train first, or give '
                                'the file as CHECKPOINT=path')
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:  # torch itself does not look
                    raise OSError('a checksum differs')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of other pickle protocols
            content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, 'rb') as f:
            is_pickle = f.read(1) == b'\x80'  # its first byte since protocol 2
        if re.search('global|reduce|class', str(error), re.IGNORECASE) or (
                is_pickle and 'truncated' not in str(error)):
            raise ValueError(
                f'{path} holds more than tensors and plain values, so loading it could '
                'run code: it was not opened; take a checkpoint that was saved as a '
                'state dict') from None
        raise ValueError(damage(path, error)) from None
    except Exception as error:  # a broken file can fail in any layer below
        raise ValueError(damage(path, error)) from None
    net = content.get('net') if isinstance(content, dict) else None
    if not (isinstance(net, dict)
            and all(isinstance(value, Tensor) for value in net.values())):
        found = type(content).__name__
        if isinstance(content, dict):
            found = ', '.join(map(str, list(content)[:4])) or 'an empty one'
        raise ValueError(f'{path} is no EMANet checkpoint: a dictionary with net, the '
                         f'tensors, is expected, found {found}')
    if any(str(key).startswith('extractor.') for key in content['net']):
        net, found = convert_released(content['net'], path)
        content = {'net': net, 'settings': found, 'step': content.get('step', 0)}
    if content.get('settings'):
        content['settings'] = {**BEFORE, **content['settings']}
    return {'settings': {}, 'run': {}, 'step': 0, **content}


def damage(path: Path, error: Exception) -> str:
    """Return the sentence for a file that cannot be read."""
    size = path.stat().st_size
    return (f'{path} is damaged or no checkpoint ({size} bytes, '
            f'{type(error).__name__}): get it again or take another one')


def find_checkpoints() -> list[Path]:
    """Return the files that settings name: those of CHECKPOINT, or the last of LOG_DIR.
    """
    folder = Path(settings.LOG_DIR)
    if settings.CHECKPOINT:
        whole = Path(settings.CHECKPOINT)
        return [whole] if whole.exists() else [
            Path(part.strip()) for part in settings.CHECKPOINT.split(',')]
    there = [p for p in (folder / 'final.pth', folder / 'latest.pth') if p.exists()]
    return [max(there, key=lambda p: p.stat().st_mtime, default=folder / 'final.pth')]


def load_newest(folder: str | Path) -> tuple[dict[str, Any] | None, Path | None, list]:
    """Read the newest sound checkpoint of a run: latest.pth, else the last step_N.pth.

    Returns:
        (content, path, notes); content is None where no run has saved.

    Raises:
        ValueError: where there are checkpoints and none is sound.
    """
    files = [Path(folder) / 'latest.pth', *list_steps(folder)]
    files = [path for path in files if path.exists()]
    notes = []
    for path in files:
        try:
            return load(path), path, notes
        except ValueError as error:
            notes.append(str(error))
    if files:
        raise ValueError(f'none of the {len(files)} checkpoints in {folder} can be '
                         f'read ({notes[0]}): run `sh clean.sh {folder}` to start over')
    return None, None, notes


def load_net(net: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load tensors into a network; every one must be there and fit.

    Raises:
        ValueError: in a sentence that names what differs.
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
        raise ValueError(f'{path} is of another architecture than the settings: '
                         f'{"; ".join(parts)}; set DATASET, N_LAYERS, HEAD, AUX_WEIGHT '
                         'and the widths to what it was trained with')
    counters = {k: own[k] for k in own if k not in state}
    net.load_state_dict({**state, **counters}, strict=True)


def adopt_architecture(found: dict[str, Any]) -> list[str]:
    """Set the settings that give the tensors their meaning to the checkpoint's.

    Args:
        found: the checkpoint's settings.

    Returns:
        A line for each setting that differed.
    """
    lines = []
    for name in ARCHITECTURE:
        if name in found and found[name] != getattr(settings, name):
            old = getattr(settings, name)
            if (name, old) != ('STEM', 'auto'):
                lines.append(f'{name} = {found[name]!r} as in the checkpoint, '
                             f'not {old!r}')
            setattr(settings, name, found[name])
    return lines


def take_over(content: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Set the settings that a checkpoint is to be used with.

    What training was given on its command line holds here too, then the words of this
    command line come on top, and the meaning of the tensors is the checkpoint's.

    Args:
        content: of load().
        given: values of this command line.

    Returns:
        A line for each setting that is not this folder's.
    """
    trained = {name: value for name, value in content['run'].get('given', {}).items()
               if name not in NOT_TAKEN_OVER and hasattr(settings, name)}
    kept = {name: getattr(settings, name) for name in NOT_TAKEN_OVER}
    runtime.apply({**trained, **kept, **given})  # training's recipe may set them too
    lines = [f'{name} = {runtime.show_value(value)} as in training'
             for name, value in trained.items() if name not in given]
    return lines + adopt_architecture(content['settings'])


def describe_classes(content: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return names and palette (768 numbers) of the classes that a checkpoint predicts.

    Of one that does not tell, they are those of the data set in settings, or of the
    first one with as many classes, or numbers.
    """
    run, n = content['run'], n_classes_of(content['net'])
    if run.get('classes'):
        return list(run['classes']), list(run['palette'])
    known = recipes.DATASETS
    for facts in (known.get(settings.DATASET, known['voc']), *known.values()):
        if len(facts['classes']) == n:
            return list(facts['classes']), facts['palette']
    return [f'class {i}' for i in range(n)], recipes.voc_palette()


def n_classes_of(state: dict[str, Tensor]) -> int:
    """Return how many classes a network's tensors predict; 0 where that is unclear."""
    return len(state['head.fc2.weight']) if 'head.fc2.weight' in state else 0


def convert_released(state: dict[str, Tensor], path: str | Path
                     ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rename the released code's keys to ours and read the architecture off the shapes.

    Args:
        state: keys extractor.*, fc0.*, emau.*, fc1.0.*, fc2.*
        path: for the message.

    Returns:
        (state, settings): depth, stem and widths, and the released code's unit; the
        output stride stays a matter of settings.

    Raises:
        ValueError: where a key that tells the architecture is missing.
    """
    layers = {4: 'layer1', 5: 'layer2', 6: 'layer3', 7: 'layer4'}

    def rename(key):
        if match := re.fullmatch(r'extractor\.([4-7])\.(.+)', key):
            return f'backbone.{layers[int(match[1])]}.{match[2]}'
        for old, new in (('extractor.0.', 'backbone.conv1.'),
                         ('extractor.1.', 'backbone.bn1.'), ('fc1.0.', 'head.fc1.')):
            if key.startswith(old):
                return new + key[len(old):]
        return 'head.' + key

    deep = {6: 50, 23: 101, 36: 152}  # blocks of layer3 -> depth
    try:
        n = 1 + max(int(k.split('.')[2]) for k in state if k.startswith('extractor.6.'))
        is_basic = 'extractor.4.0.conv3.weight' not in state
        fc0, mu = state['fc0.conv.weight'], state['emau.mu']
        fc1 = state.get('fc1.0.conv.weight')
        found = {'N_LAYERS': {2: 18, 6: 34}[n] if is_basic else deep[n],
                 'STEM': 'deep' if 'extractor.0.0.weight' in state else 'plain',
                 'HEAD': 'ema', 'HEAD_CHANNELS': len(fc0), 'N_BASES': mu.shape[2],
                 'FC1_CHANNELS': 0 if fc1 is None else len(fc1),
                 # what the released code is, whatever this folder's settings say
                 'MULTI_GRID': (1, 2, 4), 'STAGE_NUM': 3, 'EM_LAMBDA': 1.0,
                 'EM_KERNEL': 'exp_dot', 'EM_NORM': 'l2', 'EM_GRADIENT': 'none',
                 'EM_UPDATE': 'moving_average', 'EM_CONV1': 'auto',
                 'AUX_WEIGHT': 0.0}
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f'{path} looks like a released EMANet checkpoint but is '
                         f'incomplete ({error}): get it again') from None
    return {rename(k): v for k, v in state.items()}, found
