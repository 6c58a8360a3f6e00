"""How fast the model in settings is loaded for, trained and evaluated here.

    python measure.py speed N_LAYERS=50          # ours beside others
    python measure.py options N_LAYERS=50        # what each of our options is worth

Each manner of a part lives in a process of its own, so that none leaves traces for
another, and they take turns, so that their ratios hold on a noisy machine; the first
calls, in which kernels are chosen, do not count. FLOPs are those of the convolutions
and matrix products that are done (fewer, with WINOGRAD), two for a multiply-add. They
are compared with what the device reaches in a product of two 4096 x 4096 matrices,
which takes its turn too.
"""
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dataset
import inference
import network
import runtime
import settings
from measurement import manners
from measurement.sides import EVAL_SIZE, PRODUCT, PRODUCTS, Side

PARTS = ('startup', 'loader', 'step', 'training', 'evaluation', 'multi')
OPTION_PARTS = ('loader', 'step', 'evaluation', 'multi')
LOADED = 32  # samples of a turn of the loader


# -- taking turns ----------------------------------------------------------------------

def compare(part: str, names: list[str], values: dict, n: int, rounds: int,
            operations: dict[str, float], has_memory: bool = True) -> dict:
    """Let manners take turns, and sum up what they did: see `summarise`.

    Args:
        part: loader, step, evaluation or multi.
        names: of the manners.
        values: settings.
        n: images of a call.
        rounds: turns of each.
        operations: FLOPs of an image; of manners that have them, products of matrices
            in the same precision take turns too.
        has_memory: add `GB` to each, the peak of its memory.
    """
    best = runtime.pick_precision(runtime.pick_device())
    precisions = {name: manners.precision_of(name, part, best) for name in operations}
    all_names = [*names, *(f'{kind} {precision}' for precision in
                           dict.fromkeys(precisions.values()) for kind in PRODUCTS)]
    sides, seconds = {}, {name: [] for name in all_names}
    try:
        for name in all_names:
            sides[name] = Side(part, name, values, n)
            sides[name].ask('build')
        with tqdm(total=len(sides) * (rounds + 1), desc=part, unit='turn', leave=False,
                  disable=None) as bar:
            for side in sides.values():
                side.warm_up()
                bar.update()
            for _ in range(rounds):
                for name, side in sides.items():
                    seconds[name].append(side.ask('call', side.times))
                    bar.update()
        result = summarise(seconds, n, operations, precisions)
        for name in names if has_memory else ():
            result[name]['GB'] = sides[name].ask('peak_memory')
    finally:
        for side in sides.values():
            side.close()
    return result


def summarise(seconds: dict[str, list[float]], n_images: int,
              operations: dict[str, float], precisions: dict[str, str]
              ) -> dict[str, dict[str, Any]]:
    """Return what the turns say of each side.

    Args:
        seconds: of a call, of each turn of each side.
        n_images: of a call.
        operations: FLOPs of an image, where they are known.
        precisions: of the manners whose operations are known.

    Returns:
        For each side images_per_s, the median; `range` of it; `ratios` to every other
        side: median, least and most of the ratio turn by turn; tflops and peak_tflops,
        share_of_peak where operations and products are known; seconds.
    """
    peaks = {}
    for name in list(seconds):
        kind, _, precision = name.partition(' ')
        if kind in PRODUCTS:
            speed = 2 * PRODUCT ** 3 / statistics.median(seconds[name]) / 1e12
            peaks[precision] = max(speed, peaks.get(precision, 0))
    sides = {name: runs for name, runs in seconds.items()
             if name.split()[0] not in PRODUCTS}
    result = {}
    for name, runs in sides.items():
        row = {'images_per_s': n_images / statistics.median(runs),
               'range': [n_images / max(runs), n_images / min(runs)],
               'seconds': runs, 'ratios': {}}
        for other, theirs in sides.items():
            if other == name:
                continue
            ratios = [b / a for a, b in zip(runs, theirs, strict=True)]
            row['ratios'][other] = [statistics.median(ratios), min(ratios), max(ratios)]
        if name in operations:
            row['tflops'] = operations[name] * row['images_per_s'] / 1e12
            peak = peaks.get(precisions[name])
            if peak:
                row |= {'peak_tflops': peak, 'share_of_peak': row['tflops'] / peak}
        result[name] = row
    return result


def count_flops(is_theirs: bool, n_classes: int, size: tuple[int, int],
                is_training: bool, has_winograd: bool = False) -> int:
    """Count the FLOPs of an image: of the network's convolutions and matrix products.

    Args:
        is_theirs: of torchvision's network, not of ours.
        n_classes: of the labels.
        size: (h, w) of the image.
        is_training: the backward pass too.
        has_winograd: ours computes convolutions by fewer products: count these.
    """
    from torch.utils.flop_counter import FlopCounterMode
    if is_theirs:
        net = manners.build_torchvision(n_classes)
        parts = [net.backbone, net.classifier]
    else:
        net = network.build(n_classes, is_eval=not is_training)
        parts = [net.backbone, net.head]
        if has_winograd:
            inference.fold(net, has_winograd=True)
    x = torch.zeros(2, 3, *size, device='meta')
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(is_training):
            for part in parts:
                x = part.to('meta').train(is_training)(x)
                x = x['out'] if isinstance(x, dict) else x
        if is_training:
            x.sum().backward()
    return counter.get_total_flops() // 2


# -- the parts -------------------------------------------------------------------------

def measure_loader(names: list[str], values: dict, rounds: int) -> dict:
    """Measure loading on one core, decoding alone beside it."""
    return compare('loader', [*names, 'decoding alone'], values, LOADED, rounds, {},
                   has_memory=False)


def measure_step(names: list[str], values: dict, rounds: int, batch: int,
                 n_classes: int) -> dict:
    """Measure the training step on random bytes."""
    values = {**values, **manners.OURS_ALONE}
    counted = {is_theirs: count_flops(is_theirs, n_classes, dataset.crop_size(), True)
               for is_theirs in {name.startswith('torchvision') for name in names}}
    operations = {name: counted[name.startswith('torchvision')] for name in names}
    return compare('step', names, values, batch, rounds, operations)


def measure_evaluation(part: str, names: list[str], values: dict, rounds: int,
                       n_images: int, n_classes: int) -> dict:
    """Measure predicting and scoring pictures, at a single scale or at many."""
    scales, times = ((1.0,), 1) if part == 'evaluation' else (settings.EVAL_SCALES, 2)
    net, counted = network.build(n_classes, is_eval=True), {}
    device = runtime.pick_device()
    best, is_cpu = runtime.pick_precision(device), device.type == 'cpu'
    kinds = {name: (name.startswith('torchvision'),
                    is_cpu and manners.has_winograd(name, part, best))
             for name in names}
    for is_theirs, has_winograd in {*kinds.values()}:
        sizes = [tuple(n if is_theirs else
                       inference.padded_size(n, net.stride, net.align_corners)
                       for n in inference.scaled_size(EVAL_SIZE, scale))
                 for scale in scales]
        counted[is_theirs, has_winograd] = times * sum(
            count_flops(is_theirs, n_classes, size, False, has_winograd)
            for size in sizes)
    operations = {name: counted[kind] for name, kind in kinds.items()}
    return compare(part, names, values, n_images, rounds, operations)


def measure_agreement(precisions: list[str], n_classes: int, device: torch.device
                      ) -> float:
    """Return the share of pixels that all precisions name alike, on 20 pictures."""
    folder, same = dataset.open_split('val'), []
    options = runtime.eval_options()
    predictors = [inference.Predictor(
        [manners.make_net(n_classes, torch.empty(0))], device, precision, **options)
        for precision in precisions]
    for index in range(0, len(folder), -(-len(folder) // 20)):
        image = torch.from_numpy(folder.read_image(index).copy()).permute(2, 0, 1)
        found = [predictor.predict_labels([image])[0] for predictor in predictors]
        same += [(found[0] == other).float().mean().item() for other in found[1:]]
    return statistics.mean(same)


# -- the whole of train.py -------------------------------------------------------------

def run_training(n_steps: int, batch: int, log_every: int) -> tuple[list[dict], str]:
    """Run train.py, from random weights and into a folder that goes away again.

    Returns:
        The rows of its log.jsonl, one every `log_every` steps, and its log.txt.

    Raises:
        ValueError: in its own sentence, where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        values = {**runtime.snapshot(), 'RECIPE': '', 'LOG_DIR': folder,
                  'PRETRAINED': 'none', 'INIT_FROM': '', 'CHECKPOINT': '', 'RESUME': '',
                  'RANKS': settings.RANKS or 1, 'BATCH_SIZE': batch,
                  'ITER_MAX': n_steps, 'LOG_EVERY': log_every, 'IMAGE_EVERY': 0,
                  'EVAL_EVERY': 0, 'ITER_SAVE': 1 << 40}
        words = [f'{name}={runtime.show_value(value)}'
                 for name, value in values.items()]
        done = subprocess.run([sys.executable, str(runtime.HERE / 'train.py'), *words],
                              text=True, capture_output=True)
        if done.returncode:
            last = (done.stderr.strip() or 'it gave no reason').splitlines()[-1]
            raise ValueError(f'train.py failed while it was measured: '
                             f'{last.removeprefix("error: ")}')
        rows = (Path(folder) / 'log.jsonl').read_text().splitlines()
        return list(map(json.loads, rows)), (Path(folder) / 'log.txt').read_text()


def measure_training(n_rows: int, batch: int, device: torch.device, n_classes: int
                     ) -> dict:
    """Measure train.py with its real loader, and what a full run would take.

    Returns:
        images_per_s, the median over the lines of the log but the first; `range`;
        waiting, the share of the time without data; hours of ITER_MAX steps of
        BATCH_SIZE at this speed; tflops.
    """
    every = 10 if device.type == 'cuda' else 1
    rows, _ = run_training((n_rows + 1) * every, batch, every)
    speeds = [row['images_per_s'] for row in rows[1:]]
    speed = statistics.median(speeds)
    flops = count_flops(False, n_classes, dataset.crop_size(), True)
    return {'images_per_s': speed, 'range': [min(speeds), max(speeds)],
            'steps_per_s': speed / batch, 'batch': batch,
            'waiting': statistics.mean(row['waiting_for_data'] for row in rows[1:]),
            'hours': settings.ITER_MAX * settings.BATCH_SIZE / speed / 3600,
            'tflops': flops * speed / 1e12}


def measure_startup(rounds: int, batch: int) -> dict:
    """Measure from the start of train.py to its first step, and of --help.

    Returns:
        Seconds, the medians.
    """
    steps, helps = [], []
    for _ in tqdm(range(rounds), 'startup', unit='run', leave=False, disable=None):
        began = time.perf_counter()
        subprocess.run([sys.executable, str(runtime.HERE / 'train.py'), '--help'],
                       stdout=subprocess.DEVNULL, check=True)
        helps.append(time.perf_counter() - began)
        text = run_training(1, batch, 1)[1]
        steps.append(float(re.search(r'first step begins ([\d.]+) s', text)[1]))
    return {'first_step_s': statistics.median(steps),
            'help_s': statistics.median(helps)}


# -- all of it -------------------------------------------------------------------------

def measure_part(part: str, is_options: bool, rounds: int, batch: int) -> dict:
    """Measure one part with the settings."""
    values = {k: v for k, v in runtime.snapshot().items() if k != 'RECIPE'}
    device = runtime.pick_device()
    precision = runtime.pick_precision(device)
    n_classes = len(dataset.get_facts()['classes'])
    if part == 'startup':
        return measure_startup(rounds, batch)
    if part == 'training':
        return measure_training(rounds, batch, device, n_classes)
    names = manners.list_manners(part, is_options, precision, device.type == 'cpu')
    if part == 'loader':
        return measure_loader(names, values, rounds)
    if part == 'step':
        return measure_step(names, values, rounds, batch, n_classes)
    result = measure_evaluation(part, names, values, rounds, n_pictures(device),
                                n_classes)
    is_half = precision != 'fp32'
    if settings.CHECKPOINT and part == 'evaluation' and is_half and not is_options:
        result['agreement'] = measure_agreement([precision, 'fp32'], n_classes, device)
    return result


def n_pictures(device: torch.device) -> int:
    """Return how many pictures are evaluated in a call: on a CPU one is enough."""
    return settings.EVAL_BATCH if device.type == 'cuda' else 1


def profile_part(part: str, batch: int, out: Path) -> dict:
    """Profile our step or evaluation with the settings: see `profile`."""
    values = {k: v for k, v in runtime.snapshot().items() if k != 'RECIPE'}
    device = runtime.pick_device()
    side = Side(part, f'ours {runtime.pick_precision(device)}', values,
                batch if part == 'step' else n_pictures(device))
    try:
        side.ask('build')
        side.warm_up()
        return side.ask('profile', out)
    finally:
        side.close()
