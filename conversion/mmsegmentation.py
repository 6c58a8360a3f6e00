"""Checkpoints of mmsegmentation's EMANet: {state_dict, meta}, of mmcv or mmengine.

    python eval.py CHECKPOINT=emanet_r50.pth DATASET=cityscapes
"""
import ast
import re
from pathlib import Path
from typing import Any

import recipes
from config import UserError
from conversion.released import SETTINGS, read_architecture, rename_keys

# How keys begin there, and here.
KEYS = {
    'backbone.stem.7.': 'backbone.bn1.', 'backbone.stem.': 'backbone.conv1.',
    'decode_head.ema_in_conv.': 'head.fc0.',
    'decode_head.ema_mid_conv.conv.': 'head.emau.conv1.',
    'decode_head.ema_module.bases': 'head.emau.mu',
    'decode_head.ema_out_conv.conv.': 'head.emau.conv2.0.',
    'decode_head.ema_out_conv.bn.': 'head.emau.conv2.1.',
    'decode_head.bottleneck.': 'head.fc1.', 'decode_head.conv_cat.': 'head.conv_cat.',
    'decode_head.conv_seg.': 'head.classifier.',
    'auxiliary_head.convs.0.': 'aux.conv.',
    'auxiliary_head.conv_seg.': 'aux.classifier.'}
STRIDES = {(1, 1, 2, 4): 8, (1, 1, 1, 2): 16}  # by the dilations of the layers
# Options of a config that this project does not have.
UNSUPPORTED = (r'contract_dilation\W+False|multi_grid\W+\d|style\W+caffe|'
               r'to_rgb\W+False|\bmean\W+(?!123\.675)[\d.]+')


def is_checkpoint(content: dict[str, Any]) -> bool:
    """Return whether a file's content is a checkpoint of mmsegmentation."""
    state = content.get('state_dict')
    return isinstance(state, dict) and any('decode_head.' in str(key) for key in state)


def convert(content: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return a checkpoint of mmsegmentation's EMANet as checkpoint.load does.

    What the tensors do not show is read in the config, a text in `meta`; without one it
    is that of mmsegmentation's EMANets for crops of 512x1024. Names and colours of the
    classes come from `meta` too, and go into `run`.

    Raises:
        UserError: for another network, or an incomplete one.
    """
    state = rename_keys(content['state_dict'], {'module.': ''})
    meta = content.get('meta') if isinstance(content.get('meta'), dict) else {}
    text = str(meta.get('config') or meta.get('cfg') or '')  # of mmcv, of mmengine
    dilations = read_option(text, r'\bdilations\W+(\d(?:,\s*\d)+)', (1, 1, 2, 4))
    unsupported = re.search(UNSUPPORTED, text)
    wrong = ''
    if 'decode_head.ema_module.bases' not in state:
        wrong = 'another head than EMAHead'
    elif 'decode_head.conv_seg.weight' not in state:
        wrong = 'no classifier'
    elif unsupported:
        wrong = unsupported[0]
    elif dilations not in STRIDES:
        wrong = f'dilations={dilations}'
    if wrong:
        raise UserError(f'{path} is a network of mmsegmentation with {wrong}, which '
                        'this project does not have: evaluate it there')
    net = rename_keys(state, KEYS)
    if len(net) < len(state):
        raise UserError(f'{path} has two tensors for one place: get it again')
    aligned = r'\balign_corners\W+(True|False)'
    default = read_option(text, aligned, False)
    settings = {
        **SETTINGS, 'MULTI_GRID': (1, 1, 1), 'STRIDE': STRIDES[dilations],
        'MEAN': (0.485, 0.456, 0.406), 'STD': (0.229, 0.224, 0.225),  # 123.675 / 255
        **read_architecture(net, f'{path} looks like an EMANet of mmsegmentation'),
        'STAGE_NUM': read_option(text, r'decode_head.*?\bnum_stages\W+(\d+)', 3),
        'ALIGN_CORNERS': read_option(text, rf'decode_head.*?{aligned}', default)}
    return {'net': net, 'settings': settings,
            'run': read_classes(meta, len(net['head.classifier.weight'])),
            'step': meta.get('iter') or 0}


def read_option(text: str, pattern: str, default: Any) -> Any:
    """Return the literal that a pattern's group finds in a config, or a default."""
    match = re.search(pattern, text, re.DOTALL)
    return ast.literal_eval(f'({match[1]})') if match else default


def read_classes(meta: dict[str, Any], n_classes: int) -> dict[str, Any]:
    """Return names and palette of the classes in `meta`; empty if it has none."""
    dataset_meta = meta.get('dataset_meta')  # of mmengine; mmcv has CLASSES, PALETTE
    if isinstance(dataset_meta, dict):
        meta = {**meta, **dataset_meta}
    meta = {str(key).lower(): value for key, value in meta.items()}
    names, colours = meta.get('classes'), meta.get('palette')
    if not names or len(names) != n_classes:
        return {}
    palette = recipes.voc_palette()
    if colours and len(colours) == n_classes:
        palette = recipes.fill_palette(*colours)
    return {'classes': list(map(str, names)), 'palette': palette}
