"""What networks cost: parameters, operations and memory; the paper's Table 1.

    python measure.py cost N_LAYERS=50          # of the network in settings
    python measure.py table1                    # of all heads, beside the paper's

Operations are counted by torch on the meta device, where nothing is computed:
convolutions and matrix products, not what is done pixel by pixel. One multiply-add is
two FLOPs; the paper calls multiply-adds FLOPs.
"""
import copy

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import dataset
import network
import runtime
import settings
from measurement.tables import align

# Table 1 of the paper: a name, the settings that differ, and what it prints of each:
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
# What the paper's figures are of.
PAPERS = {'N_LAYERS': (101,), 'STEM': ('auto', 'deep'), 'STAGE_NUM': (3,),
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


def count_parameters(net: nn.Module) -> int:
    """Count parameters, and bases also where they are moved by averaging."""
    bases = sum(m.mu.numel() for m in net.modules() if isinstance(m, network.EMAU)
                and not isinstance(m.mu, nn.Parameter))
    return sum(p.numel() for p in net.parameters()) + bases


def count_operations(net: network.Segmenter, size: int) -> tuple[int, int]:
    """Count the multiply-adds of backbone and head for one square image.

    Args:
        net: is moved to the meta device, where nothing is computed.
        size: side of the image in pixels.

    Returns:
        (backbone, head). Convolutions and matrix products count; FLOPs are twice that.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it takes 80 MB
    net = net.to('meta').eval()
    x = torch.zeros(1, 3, size, size, device='meta')
    with FlopCounterMode(display=False) as counter:
        feats = net.backbone(x)
    backbone = counter.get_total_flops() // 2
    with FlopCounterMode(display=False) as counter:
        net.head(feats)
    return backbone, counter.get_total_flops() // 2


def measure_cost(size: int) -> dict:
    """Print and return parameters, multiply-adds and FLOPs of backbone and head."""
    net = network.build(len(dataset.get_facts()['classes']), is_eval=True)
    counts = [count_parameters(net.backbone), count_parameters(net.head)]
    operations = count_operations(net, size)
    rows = {'backbone': (counts[0], operations[0]), 'head': (counts[1], operations[1]),
            'together': (sum(counts), sum(operations))}
    print(f'{size}x{size} image, output stride {net.stride}; bases are counted\n'
          f'{"":10}{"parameters":>14}{"multiply-adds":>16}{"FLOPs":>12}')
    for name, (n, macs) in rows.items():
        print(f'{name:10}{n / 1e6:12.3f} M{macs / 1e9:14.2f} G{macs / 5e8:10.2f} G')
    return {'size': size, **{name: {'parameters': n, 'multiply_adds': macs}
                             for name, (n, macs) in rows.items()}}


# -- Table 1 ---------------------------------------------------------------------------

class PeakOfTensors(TorchDispatchMode):
    """Inside it, `peak` is the most bytes that the tensors made so far held at a time.
    """

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
def peak_of_inference(net: network.Segmenter, has_head: bool, size: int,
                      device: torch.device) -> float:
    """Return the peak memory in MB of one image's inference, the weights included.

    Args:
        net: in evaluation mode, on the CPU.
        has_head: with the head, or the backbone alone.
        size: side of the image in pixels.
        device: on CUDA it is what torch has allocated, after a first pass, so that what
            its libraries keep for good is not in it; elsewhere the tensors alive.
    """
    parts = [net.backbone, net.head] if has_head else [net.backbone]
    weights = sum(t.numel() * t.element_size() for part in parts
                  for t in (*part.parameters(), *part.buffers()))
    parts = [copy.deepcopy(part).to(device) for part in parts]

    def infer():
        x = torch.zeros(1, 3, size, size, device=device)
        for part in parts:
            x = part(x)

    if device.type == 'cuda':
        infer()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) - weights
        infer()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with PeakOfTensors() as tensors:
        infer()
    return (weights + tensors.peak) / 1e6


def measure_table_1(size: int) -> dict:
    """Count and measure the heads of Table 1, and others, on the backbone in settings.

    Args:
        size: side of the image in pixels.

    Returns:
        `rows`, the first of them the backbone, with what was counted and measured and
        what the paper says; `markdown`, the table.
    """
    before = {k: v for k, v in runtime.snapshot().items() if k != 'RECIPE'}
    device, rows = runtime.pick_device(), []
    for name, values, paper in tqdm(TABLE_1, unit='head', disable=None):
        runtime.apply({**before, **values})
        net = network.build(len(dataset.get_facts()['classes']), is_eval=True)
        macs = count_operations(copy.deepcopy(net), size)
        is_papers = net.stride == 8 and size == 513 and all(
            getattr(settings, name) in wanted for name, wanted in PAPERS.items())
        if not rows:
            alone = peak_of_inference(net, False, size, device)
            rows.append({'name': f'ResNet-{settings.N_LAYERS}', 'settings': {},
                         'parameters': count_parameters(net.backbone),
                         'multiply_adds': macs[0], 'memory_MB': alone,
                         'paper': BACKBONE_1 if is_papers else None})
        peak = peak_of_inference(net, True, size, device)
        rows.append({'name': name, 'settings': values,
                     'parameters': count_parameters(net.head),
                     'multiply_adds': macs[1], 'memory_MB': peak - alone,
                     'paper': paper if is_papers else None})
    runtime.apply(before)
    text = write_table(rows, size, net.stride)
    print(text)
    return {'size': size, 'rows': rows, 'markdown': text}


def write_table(rows: list[dict], size: int, stride: int) -> str:
    """Return Table 1 in Markdown, aligned so that it reads well on a console too."""
    head = ['', 'parameters', 'paper', 'multiply-adds', 'paper', 'FLOPs', 'memory',
            'paper']
    lines, notes = [head], []
    for row in rows:
        macs, memory, parameters = row['paper'] or ('', '', '')
        sign = '+' if lines[1:] else ''
        ours = (row['parameters'] / 1e6, row['multiply_adds'] / 1e9)
        lines.append([row['name'], f'{sign}{ours[0]:.3f} M',
                      parameters and f'{sign}{parameters} M',
                      f'{sign}{ours[1]:.2f} G', macs and f'{sign}{macs} G',
                      f'{sign}{2 * ours[1]:.2f} G', f'{row["memory_MB"]:{sign}.0f} MB',
                      memory and f'{sign}{memory:g} MB'])
        if row['paper']:
            off = [100 * (a / b - 1) for a, b in zip(ours, (parameters, macs),
                                                     strict=True)]
            if max(map(abs, off)) > 1:
                notes.append(f'- {row["name"]}: {off[0]:+.1f} % parameters and '
                             f'{off[1]:+.1f} % operations against the paper: '
                             f'{WHY[row["name"]]}.')
    table = align(lines)
    intro = (f'One {size}x{size} image, output stride {stride}; below the '
             'backbone what each head adds to it, classifier and bases included. The '
             "paper's FLOPs are multiply-adds. Memory is the peak of inference in "
             'fp32, weights included; the paper does not say how it took its own.')
    return '\n\n'.join([intro, table, '\n'.join(notes)]).strip() + '\n'
