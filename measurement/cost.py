"""What networks cost: parameters, operations and memory; the paper's Table 1.

    python measure.py cost N_LAYERS=50          # of the network in settings
    python measure.py table1                    # of all heads, beside the paper's

Everything is counted on torch's meta device, where nothing is computed. Operations are
those of convolutions and matrix products, not what is done pixel by pixel. One
multiply-add is two FLOPs; the paper calls multiply-adds FLOPs.
"""
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import config
import dataset
import network
import settings
from measurement.tables import format_table

# Table 1 of the paper: a name, the settings that differ, and the paper's numbers:
# billions of multiply-adds, MB of memory and millions of parameters, of the head alone.
TABLE_1 = (
    ('EMANet(256)', {'HEAD': 'ema', 'HEAD_CHANNELS': 256, 'FC1_CHANNELS': 0},
     (21.1, 12.3, 4.87)),
    ('EMANet(512)', {'HEAD': 'ema', 'HEAD_CHANNELS': 512, 'FC1_CHANNELS': 0},
     (43.1, 22.1, 10.0)),
    ('DeepLabV3', {'HEAD': 'deeplabv3', 'FC1_CHANNELS': 256}, (63.4, 66.0, 15.5)),
    ('DeepLabV3+', {'HEAD': 'deeplabv3plus', 'FC1_CHANNELS': 256}, (84.1, 99.3, 16.3)),
    ('PSANet', {'HEAD': 'psanet', 'HEAD_CHANNELS': 512}, (56.3, 59.4, 18.5)),
    # not in the paper's table
    ('EMANet, as released', {'HEAD': 'ema', 'HEAD_CHANNELS': 512, 'FC1_CHANNELS': 256},
     None),
    ("EMANet, mmseg's", {'HEAD': 'ema_mmseg', 'HEAD_CHANNELS': 512,
                         'FC1_CHANNELS': 256}, None),
    ('FCN', {'HEAD': 'fcn', 'HEAD_CHANNELS': 512}, None),
    ('Non-local', {'HEAD': 'nonlocal', 'HEAD_CHANNELS': 512, 'FC1_CHANNELS': 256},
     None),
    ('A2', {'HEAD': 'a2', 'HEAD_CHANNELS': 512, 'FC1_CHANNELS': 256}, None))
BACKBONE_1 = (190.6, 2603.0, 42.6)
# The paper's numbers belong to networks with these settings.
PAPER_SETTINGS = {
    'N_LAYERS': (101,), 'STEM': ('auto', 'deep'), 'STAGE_NUM': (3,),
    'EVAL_STAGE_NUM': (0, 3), 'N_BASES': (64,), 'PSA_GRID': ((33, 33),),
    'EM_CONV1': ('auto', 'fixed'), 'DATASET': ('voc', 'coco_voc')}
WHY = {  # a difference of more than 1 % to the paper
    'DeepLabV3+': 'ours has what its authors describe, image pooling, 48 channels of '
                  'layer1 and two 3x3 convolutions; without the image pooling it is '
                  '16.25 M and 84.90 G, so the paper may have left that out',
    'PSANet': 'ours has what its authors describe, the features beside the output of '
              'the attention in the last 3x3 convolution; without them it is 18.50 M, '
              'and 56.34 G if the products with the attention (1.21 G) are left out, '
              'which is what the paper prints'}
INTRO = ('One {0}x{0} image, output stride {1}. Below the backbone: what each head '
         "adds to it, classifier and bases included. The paper's FLOPs are "
         'multiply-adds. Memory is the peak of the tensors alive in an inference in '
         'fp32, weights included; the paper does not say how it measured its own.')


def build_on_meta(n_classes: int, is_eval: bool = True) -> network.Segmenter:
    """Build the network of settings.py without memory for its weights."""
    with torch.device('meta'):
        return network.build(n_classes, is_eval)


def count_parameters(net: nn.Module) -> int:
    """Count parameters, and the bases, which are none if they are averaged."""
    bases = sum(m.mu.numel() for m in net.modules() if isinstance(m, network.EMAU)
                and not isinstance(m.mu, nn.Parameter))
    return sum(p.numel() for p in net.parameters()) + bases


def count_operations(net: network.Segmenter, size: int) -> tuple[int, int]:
    """Count the multiply-adds of backbone and head for one square image.

    Args:
        net: on the meta device, in evaluation mode.
        size: side of the image in pixels.

    Returns:
        (backbone, head), convolutions and matrix products; FLOPs are twice that.
    """
    x = torch.zeros(1, 3, size, size, device='meta')
    with FlopCounterMode(display=False) as counter:
        feats = net.backbone(x)
    backbone = counter.get_total_flops() // 2
    with FlopCounterMode(display=False) as counter:
        net.head(feats)
    return backbone, counter.get_total_flops() // 2


class PeakOfTensors(TorchDispatchMode):
    """Inside it, `peak` is the most bytes that tensors made so far held at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, n) for key, (ref, n) in self.alive.items()
                      if not ref.expired()}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return result


@torch.inference_mode()
def peak_of_inference(parts: list[nn.Module], size: int) -> float:
    """Return the peak memory in MB of one image's inference, with the weights.

    Args:
        parts: applied one after the other: the backbone, or backbone and head; on any
            device, in evaluation mode.
        size: side of the image in pixels.
    """
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    device = tensors[0].device
    with PeakOfTensors() as found:
        x = torch.zeros(1, 3, size, size, device=device)
        for part in parts:
            x = part(x)
    return (weights + found.peak) / 1e6


def measure_cost(size: int) -> dict:
    """Print and return parameters and multiply-adds of backbone and head."""
    net = build_on_meta(len(dataset.get_dataset_info()['classes']))
    parameters = [count_parameters(net.backbone), count_parameters(net.head)]
    operations = count_operations(net, size)
    rows = {'backbone': (parameters[0], operations[0]),
            'head': (parameters[1], operations[1]),
            'together': (sum(parameters), sum(operations))}
    print(f'{size}x{size} image, output stride {net.stride}; bases are counted\n'
          f'{"":10}{"parameters":>14}{"multiply-adds":>16}{"FLOPs":>12}')
    for name, (n, macs) in rows.items():
        print(f'{name:10}{n / 1e6:12.3f} M{macs / 1e9:14.2f} G{macs / 5e8:10.2f} G')
    return {'size': size, **{name: {'parameters': n, 'multiply_adds': macs}
                             for name, (n, macs) in rows.items()}}


# -- Table 1 ---------------------------------------------------------------------------

def measure_table_1(size: int) -> dict:
    """Count what the heads of Table 1, and others, cost on the backbone in settings.

    Args:
        size: side of the image in pixels.

    Returns:
        `rows`, the first of them the backbone, each with what was counted and what the
        paper says; `markdown`, the table.
    """
    before, rows = config.snapshot(), []
    for name, values, paper in TABLE_1:
        config.apply_settings({**before, 'RECIPE': '', **values})
        net = build_on_meta(len(dataset.get_dataset_info()['classes']))
        macs = count_operations(net, size)
        is_comparable = net.stride == 8 and size == 513 and all(
            getattr(settings, key) in wanted for key, wanted in PAPER_SETTINGS.items())
        if not rows:
            backbone_MB = peak_of_inference([net.backbone], size)
            rows.append({'name': f'ResNet-{settings.N_LAYERS}', 'settings': {},
                         'parameters': count_parameters(net.backbone),
                         'multiply_adds': macs[0], 'memory_MB': backbone_MB,
                         'paper': BACKBONE_1 if is_comparable else None})
        peak = peak_of_inference([net.backbone, net.head], size)
        rows.append({'name': name, 'settings': values,
                     'parameters': count_parameters(net.head),
                     'multiply_adds': macs[1], 'memory_MB': peak - backbone_MB,
                     'paper': paper if is_comparable else None})
    vars(settings).update(before)
    text = format_table_1(rows, size, net.stride)
    print(text)
    return {'size': size, 'rows': rows, 'markdown': text}


def format_table_1(rows: list[dict], size: int, stride: int) -> str:
    """Return Table 1 in Markdown, with a note on each difference to the paper."""
    cells, notes = [], []
    for row in rows:
        sign = '+' if cells else ''
        million, billion = row['parameters'] / 1e6, row['multiply_adds'] / 1e9
        paper = ['', '', '']
        if row['paper']:
            macs, memory, parameters = row['paper']
            paper = [f'{sign}{parameters} M', f'{sign}{macs} G', f'{sign}{memory:g} MB']
            off = (100 * (million / parameters - 1), 100 * (billion / macs - 1))
            if max(map(abs, off)) > 1:
                notes.append(f'- {row["name"]}: {off[0]:+.1f} % parameters and '
                             f'{off[1]:+.1f} % operations against the paper: '
                             f'{WHY[row["name"]]}.')
        cells.append([row['name'], f'{sign}{million:.3f} M', paper[0],
                      f'{sign}{billion:.2f} G', paper[1], f'{sign}{2 * billion:.2f} G',
                      f'{row["memory_MB"]:{sign}.0f} MB', paper[2]])
    header = ['', 'parameters', 'paper', 'multiply-adds', 'paper', 'FLOPs', 'memory',
              'paper']
    parts = [INTRO.format(size, stride), format_table(header, cells)]
    if notes:
        parts.append('\n'.join(notes))
    return '\n\n'.join(parts) + '\n'
