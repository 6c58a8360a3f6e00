"""Checkpoints: saved atomically, loaded soundly, and never able to run code.

    python eval.py CHECKPOINT=logdir/step_30000.pth

Ours hold {net, optimizer, scaler, step, settings, run}: tensors and plain literals. The
released EMANet checkpoints {net, step} load by the same call, and so do those of
mmsegmentation's EMANet, {state_dict, meta}.
"""
import ast
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

import recipes
import runtime
import settings

# What the tensors mean: on loading, these win over settings.py.
ARCHITECTURE = (
    'N_LAYERS', 'STEM', 'STRIDE', 'MULTI_GRID', 'MEAN', 'STD', 'HEAD', 'HEAD_CHANNELS',
    'FC1_CHANNELS', 'N_BASES', 'STAGE_NUM', 'EM_LAMBDA', 'EM_KERNEL', 'EM_NORM',
    'EM_UPDATE', 'EM_GRADIENT', 'EM_CONV1', 'AUX_WEIGHT', 'PSA_GRID', 'ALIGN_CORNERS')

# Of this command line and machine: never taken over from training.
NOT_TAKEN_OVER = ('CHECKPOINT', 'LOG_DIR', 'RESUME', 'DEVICE', 'RANKS', 'N_WORKERS',
                  'EVAL_IMAGES')

# What training did before there was a setting for it.
BEFORE = {'CROP_WIDTH': 0, 'INIT_FROM': '', 'LR_END': 0.0, 'DECAY_ALL': False,
          'CLASS_WEIGHTS': (1.0,), 'OHEM_KEPT': 0.0, 'OHEM_BELOW': 0.0,
          'OHEM_MIN': 100000, 'AUX_WEIGHT': 0.0, 'PSA_GRID': (33, 33),
          'ALIGN_CORNERS': True}

# What the released code is, whatever this folder's settings say.
RELEASED = {'MULTI_GRID': (1, 2, 4), 'STAGE_NUM': 3, 'EM_LAMBDA': 1.0,
            'EM_KERNEL': 'exp_dot', 'EM_NORM': 'l2', 'EM_GRADIENT': 'none',
            'EM_UPDATE': 'moving_average', 'EM_CONV1': 'auto'}

# How the keys of others begin, and ours.
RELEASED_KEYS = {
    'extractor.0.': 'backbone.conv1.', 'extractor.1.': 'backbone.bn1.',
    'extractor.4.': 'backbone.layer1.', 'extractor.5.': 'backbone.layer2.',
    'extractor.6.': 'backbone.layer3.', 'extractor.7.': 'backbone.layer4.',
    'fc1.0.': 'head.fc1.', '': 'head.'}
MMSEG_KEYS = {
    'backbone.stem.7.': 'backbone.bn1.', 'backbone.stem.': 'backbone.conv1.',
    'decode_head.ema_in_conv.': 'head.fc0.',
    'decode_head.ema_mid_conv.conv.': 'head.emau.conv1.',
    'decode_head.ema_module.bases': 'head.emau.mu',
    'decode_head.ema_out_conv.conv.': 'head.emau.conv2.0.',
    'decode_head.ema_out_conv.bn.': 'head.emau.conv2.1.',
    'decode_head.bottleneck.': 'head.fc1.', 'decode_head.conv_cat.': 'head.conv_cat.',
    'decode_head.conv_seg.': 'head.fc2.', 'auxiliary_head.convs.0.': 'aux.conv.',
    'auxiliary_head.conv_seg.': 'aux.classify.'}

# Names of PASCAL Context's classes that mmsegmentation spells otherwise.
SPELLINGS = {'bedclothes': 'bedcloth', 'cloth': 'clothes', 'table': 'diningtable'}

CLASSIFIERS = ('head.fc2', 'head.classify', 'aux.classify')

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
    """Read a checkpoint of this project, the released EMANet code or mmsegmentation.

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
                'state dict, or save its state_dict and meta by themselves if you '
                'trust it') from None
        raise ValueError(damage(path, error)) from None
    except Exception as error:  # a broken file can fail in any layer below
        raise ValueError(damage(path, error)) from None
    is_dict = isinstance(content, dict)
    if is_dict and holds_tensors(content.get('state_dict')) and any(
            'decode_head.' in str(key) for key in content['state_dict']):
        content = convert_mmseg(content, path)
    if not (is_dict and holds_tensors(content.get('net'))):
        found = type(content).__name__
        if is_dict:
            found = ', '.join(map(str, list(content)[:4])) or 'an empty one'
        raise ValueError(f'{path} is no EMANet checkpoint: a dictionary with net, the '
                         f'tensors, is expected, found {found}')
    if any(str(key).startswith('extractor.') for key in content['net']):
        net, found = convert_released(content['net'], path)
        content = {'net': net, 'settings': found, 'step': content.get('step', 0)}
    if content.get('settings'):
        content['settings'] = {**BEFORE, **content['settings']}
    return {'settings': {}, 'run': {}, 'step': 0, **content}


def holds_tensors(state: Any) -> bool:
    """Tell whether something is a state dict."""
    return isinstance(state, dict) and all(isinstance(value, Tensor)
                                           for value in state.values())


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
        Lines that tell which settings are not this folder's.
    """
    trained = {name: value for name, value in content['run'].get('given', {}).items()
               if name not in NOT_TAKEN_OVER and hasattr(settings, name)}
    kept = {name: getattr(settings, name) for name in NOT_TAKEN_OVER}
    runtime.apply({**trained, **kept, **given})  # training's recipe may set them too
    words = [f'{name}={runtime.show_value(value)}' for name, value in trained.items()
             if name not in given]
    lines = [f'as in training: {" ".join(words)}'] if words else []
    return lines + adopt_architecture(content['settings'])


def load_each(paths: list[Path], given: dict[str, Any]
              ) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """Read checkpoints one after another, each with its own settings set: take_over.

    When all have been read, the settings are those of the first.

    Args:
        paths: of the checkpoints.
        given: values of this command line.

    Yields:
        (path, content, lines): see load and take_over.
    """
    before, first = runtime.snapshot(), {}
    for path in paths:
        runtime.apply(before)
        content = load(path)
        lines = take_over(content, given)
        first = first or runtime.snapshot()
        yield path, content, lines
    runtime.apply(first)


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
    return next((len(state[f'{name}.weight']) for name in CLASSIFIERS
                 if f'{name}.weight' in state), 0)


def sort_classes(content: dict[str, Any], classes: Sequence[str], path: str | Path
                 ) -> list[str]:
    """Put the rows of a checkpoint's classifiers into the order of a data set.

    Names are compared without case, spaces and signs. A checkpoint that tells none is
    taken to have the order of the data set.

    Returns:
        A line for the log, where the order was another one.

    Raises:
        ValueError: in a sentence, where the names are others, unless the data set is
            called as that of training: then its classes were renamed.
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
        raise ValueError(f'{path} predicts other classes than those of the data set '
                         f'{settings.DATASET}, {others} among them: give the '
                         'DATASET that it was trained on')
    rows = [own.index(name) for name in wanted]
    content['net'].update({key: value[rows] for key, value in content['net'].items()
                           if key.rpartition('.')[0] in CLASSIFIERS})
    return [f'{path}: its classes are put into the order of {settings.DATASET}']


# -- other formats ---------------------------------------------------------------------

def rename(state: dict[str, Tensor], table: dict[str, str]) -> dict[str, Tensor]:
    """Return tensors under other names; `table` says how keys begin, theirs and ours.
    """
    renamed = {}
    for key, value in state.items():
        old = next((old for old in table if key.startswith(old)), '')
        renamed[table.get(old, '') + key[len(old):]] = value
    return renamed


def read_shapes(net: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """Return the settings that tensors with our names tell; `kind` is for the message.
    """
    try:
        n = 1 + max(int(k.split('.')[2]) for k in net if 'backbone.layer3.' in k)
        is_basic = 'backbone.layer1.0.conv3.weight' not in net
        stem, fc1 = (net.get(key) for key in ('backbone.conv1.0.weight',
                                              'head.fc1.conv.weight'))
        return {
            'N_LAYERS': ({2: 18, 6: 34} if is_basic else {6: 50, 23: 101, 36: 152})[n],
            'STEM': 'plain' if stem is None else {64: 'deep', 32: 'v1c'}[len(stem)],
            'HEAD': 'ema_mmseg' if 'head.conv_cat.conv.weight' in net else 'ema',
            'HEAD_CHANNELS': len(net['head.fc0.conv.weight']),
            'FC1_CHANNELS': 0 if fc1 is None else len(fc1),
            'N_BASES': net['head.emau.mu'].shape[2],
            'AUX_WEIGHT': 0.4 if any(key.startswith('aux.') for key in net) else 0.0}
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f'{kind} but is incomplete ({error}): get it again') from None


def convert_released(state: dict[str, Tensor], path: str | Path
                     ) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of the released code under our names, and their settings.

    The output stride stays a matter of this folder's settings.

    Raises:
        ValueError: where a key that tells the architecture is missing.
    """
    net = rename(state, RELEASED_KEYS)
    shapes = read_shapes(net, f'{path} looks like a released EMANet checkpoint')
    return net, {**RELEASED, **shapes}


def convert_mmseg(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return a checkpoint of mmsegmentation's EMANet as load() does.

    What its tensors do not tell is read in the config, a text in `meta`; without one it
    is what mmsegmentation's EMANets for crops of 512x1024 have. The names and colours
    of the classes come from there too, into `run`.

    Raises:
        ValueError: in a sentence, for another network, or an incomplete one.
    """
    state = rename(content['state_dict'], {'module.': ''})
    meta = content.get('meta') if isinstance(content.get('meta'), dict) else {}
    config = str(meta.get('config') or meta.get('cfg') or '')  # of mmcv, of mmengine

    def read(pattern, usual):
        match = re.search(pattern, config, re.DOTALL)
        return ast.literal_eval(f'({match[1]})') if match else usual

    rates = read(r'\bdilations\W+(\d(?:,\s*\d)+)', (1, 1, 2, 4))
    stride = {(1, 1, 2, 4): 8, (1, 1, 1, 2): 16}.get(rates)
    odd = re.search(r'contract_dilation\W+False|multi_grid\W+\d|style\W+caffe|'
                    r'to_rgb\W+False|\bmean\W+(?!123\.675)[\d.]+', config)
    wrong = ('another head than EMAHead' if 'decode_head.ema_module.bases' not in state
             else odd[0] if odd else f'dilations={rates}' * (not stride))
    if wrong:
        raise ValueError(f'{path} is a network of mmsegmentation with {wrong}, which '
                         'this project does not have: evaluate it there')
    net, aligned = rename(state, MMSEG_KEYS), r'\balign_corners\W+(True|False)'
    if len(net) < len(state):
        raise ValueError(f'{path} has two tensors for one place: get it again')
    found = {
        **RELEASED, 'MULTI_GRID': (1, 1, 1), 'STRIDE': stride,
        'MEAN': (0.485, 0.456, 0.406), 'STD': (0.229, 0.224, 0.225),  # 123.675 / 255
        **read_shapes(net, f'{path} looks like an EMANet of mmsegmentation'),
        'STAGE_NUM': read(r'decode_head.*?\bnum_stages\W+(\d+)', 3),
        'ALIGN_CORNERS': read(rf'decode_head.*?{aligned}', read(aligned, False))}
    said = meta.get('dataset_meta')  # of mmengine; mmcv has CLASSES and PALETTE here
    said = {str(key).lower(): value for key, value in {
        **meta, **(said if isinstance(said, dict) else {})}.items()}
    names, colours, n = said.get('classes'), said.get('palette'), n_classes_of(net)
    run = {}
    if names and len(names) == n:
        run = {'classes': list(map(str, names)), 'palette': recipes.voc_palette()}
        if colours and len(colours) == n:
            run['palette'] = recipes.fill_palette(*colours)
    return {'net': net, 'settings': found, 'run': run, 'step': meta.get('iter') or 0}
