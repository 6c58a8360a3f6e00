"""Checkpoints of the released EMANet code: {net, step}.

    python eval.py CHECKPOINT=path/to/released.pth
"""
from pathlib import Path
from typing import Any

from torch import Tensor

from config import UserError

# How keys begin there, and here.
KEYS = {
    'extractor.0.': 'backbone.conv1.', 'extractor.1.': 'backbone.bn1.',
    'extractor.4.': 'backbone.layer1.', 'extractor.5.': 'backbone.layer2.',
    'extractor.6.': 'backbone.layer3.', 'extractor.7.': 'backbone.layer4.',
    'fc1.0.': 'head.fc1.', 'fc2.': 'head.classifier.', '': 'head.'}
# The settings of the released code, whatever this folder's settings say. The output
# stride is not among them.
SETTINGS = {'MULTI_GRID': (1, 2, 4), 'STAGE_NUM': 3, 'EM_LAMBDA': 1.0,
            'EM_KERNEL': 'exp_dot', 'EM_NORM': 'l2', 'EM_GRADIENT': 'none',
            'EM_UPDATE': 'moving_average', 'EM_CONV1': 'auto'}


def is_checkpoint(content: dict[str, Any]) -> bool:
    """Return whether a file's content is a checkpoint of the released code."""
    return any(str(key).startswith('extractor.') for key in content['net'])


def convert(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return a checkpoint of the released code as checkpoint.load does.

    Raises:
        UserError: if a tensor that shows the architecture is missing.
    """
    net = rename_keys(content['net'], KEYS)
    shapes = read_architecture(net, f'{path} looks like a released EMANet checkpoint')
    return {'net': net, 'settings': {**SETTINGS, **shapes},
            'step': content.get('step', 0)}


def rename_keys(state: dict[str, Tensor], prefixes: dict[str, str]
                ) -> dict[str, Tensor]:
    """Return tensors under new keys.

    Args:
        state: the tensors.
        prefixes: how keys begin, old and new; the first that fits is replaced.
    """
    renamed = {}
    for key, value in state.items():
        old = next((old for old in prefixes if key.startswith(old)), '')
        renamed[prefixes.get(old, '') + key[len(old):]] = value
    return renamed


def read_architecture(net: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """Return the settings that show in the shapes of tensors.

    Args:
        net: tensors with the keys of our network.
        kind: what the file looks like, for the message.

    Raises:
        UserError: if a tensor is missing.
    """
    try:
        n_blocks = 1 + max(int(k.split('.')[2]) for k in net if 'backbone.layer3.' in k)
        is_bottleneck = 'backbone.layer1.0.conv3.weight' in net
        depths = {6: 50, 23: 101, 36: 152} if is_bottleneck else {2: 18, 6: 34}
        stem, fc1 = (net.get(key) for key in ('backbone.conv1.0.weight',
                                              'head.fc1.conv.weight'))
        return {
            'N_LAYERS': depths[n_blocks],
            'STEM': 'plain' if stem is None else {64: 'deep', 32: 'v1c'}[len(stem)],
            'HEAD': 'ema_mmseg' if 'head.conv_cat.conv.weight' in net else 'ema',
            'HEAD_CHANNELS': len(net['head.fc0.conv.weight']),
            'FC1_CHANNELS': 0 if fc1 is None else len(fc1),
            'N_BASES': net['head.emau.mu'].shape[2],
            'AUX_WEIGHT': 0.4 if any(key.startswith('aux.') for key in net) else 0.0}
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f'{kind} but is incomplete ({error}): get it again') from None
