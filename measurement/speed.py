"""How fast the model in settings is loaded for, trained and evaluated here.

    python measure.py speed N_LAYERS=50          # ours beside others
    python measure.py options N_LAYERS=50        # what each of our options is worth

Each manner of a part lives in a process of its own, so that none leaves traces for
another, and they take turns, so that their ratios hold on a noisy machine; the first
calls, in which kernels are chosen, do not count. FLOPs are those of convolutions and
matrix products, two for a multiply-add. They are compared with what the device reaches
in a product of two 4096 x 4096 matrices, which takes its turn too.
"""
import json
import multiprocessing
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import dataset
import inference
import network
import runtime
import settings
from measurement import manners

PARTS = ('startup', 'loader', 'step', 'training', 'evaluation', 'multi')
OPTION_PARTS = ('loader', 'step', 'evaluation', 'multi')
EVAL_SIZE = (513, 513)  # (h, w) of the pictures that are evaluated, as in Table 1
PRODUCT = 4096          # side of the matrices whose product shows the device's peak
ENOUGH = 0.5            # seconds that each turn of a manner takes at least
LOADED = 32             # samples of a turn of the loader
# What the turns of a process are compared with, and are no manner themselves.
PRODUCTS = ('product', 'convolution')


# -- taking turns ----------------------------------------------------------------------

class Side:
    """A process in which one manner does its work when it is told to.

    Args:
        part: loader, step, evaluation or multi.
        name: of the manner.
        values: settings.
        n: images of a call.
    """

    def __init__(self, part: str, name: str, values: dict, n: int):
        spawn = multiprocessing.get_context('spawn')
        self.pool = ProcessPoolExecutor(1, mp_context=spawn)
        self.times = 1  # calls of a turn
        self.built = self.pool.submit(build, part, name, values, n)

    def take_turn(self) -> float:
        """Return the seconds of a call, over the calls of a turn."""
        return self.pool.submit(call, self.times).result()

    def warm_up(self) -> None:
        """Call it twice, and find out how many calls a turn takes."""
        self.built.result()
        self.take_turn()
        self.times = min(max(round(ENOUGH / self.take_turn()), 1), 100)

    def peak_memory(self) -> dict[str, float]:
        """Return GB of memory: see `peak_memory` below."""
        return self.pool.submit(peak_memory).result()

    def close(self) -> None:
        """End the process."""
        self.pool.shutdown(cancel_futures=True)


# What a side's process holds: its function, its device, and how to make it again.
here: dict[str, Any] = {}


def build(part: str, name: str, values: dict, n: int) -> None:
    """Make the function of a side, in its process."""
    runtime.apply(values)
    device = runtime.pick_device()
    if name.startswith('ours') or name == manners.KEPT:
        runtime.keep_freed_memory()
    if part == 'loader':
        torch.set_num_threads(1)
    here.update(device=device, is_compiled=name.endswith('compiled'),
                make=lambda: make_run(part, name, n, device))
    here['run'] = here['make']()
    forget_peak()


def make_run(part: str, name: str, n: int, device: torch.device) -> Callable:
    """Return the function of a manner, or of a product, that works on n images."""
    n_classes = len(dataset.get_facts()['classes'])
    if name.split()[0] in PRODUCTS:
        return make_product(*name.split(), device)
    if part == 'loader':
        return manners.make_loading(name, dataset.open_split('train'), n)
    if part == 'step':
        return manners.make_step(name, n_classes, device, n)
    pictures = manners.make_pictures(n, EVAL_SIZE, n_classes)
    return manners.make_evaluation(name, part, n_classes, device, *pictures)


def make_product(kind: str, precision: str, device: torch.device) -> Callable:
    """Return a function that multiplies two square matrices.

    As a product or as a 1x1 convolution, for which a CPU has another library, and which
    may be the faster one.
    """
    dtype = inference.DTYPES.get(precision, torch.float32)
    a, b = torch.randn(2, PRODUCT, PRODUCT, device=device).to(dtype)
    if kind == 'product':
        return lambda: a @ b
    image, weight = (x.contiguous(memory_format=torch.channels_last) for x in
                     (a.view(1, PRODUCT, -1, 64), b[:, :, None, None]))
    return lambda: F.conv2d(image, weight)


def call(n: int) -> float:
    """Return the seconds of a call of a side, over n calls."""
    began = time.perf_counter()
    for _ in range(n):
        here['run']()
    if here['device'].type == 'cuda':
        torch.cuda.synchronize(here['device'])
    return (time.perf_counter() - began) / n


def forget_peak() -> None:
    """Begin to look for the peak of this process's memory anew, where that is known."""
    if here['device'].type == 'cuda':
        torch.cuda.reset_peak_memory_stats(here['device'])
    elif Path('/proc/self/clear_refs').exists():
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory() -> dict[str, float]:
    """Return the peak of a side's memory in GB.

    Returns:
        `tensors`: on CUDA what torch has allocated; elsewhere the tensors alive, of a
        second copy that is made and called twice (unless it is compiled). `process`,
        but on CUDA: the resident memory, of which some is libraries.
    """
    device = here['device']
    if device.type == 'cuda':
        return {'tensors': torch.cuda.max_memory_allocated(device) / 1e9}
    found = {'process': resident_memory()}
    if not here['is_compiled']:
        here['run'] = None
        from measurement.cost import PeakOfTensors  # not in the process's memory
        with PeakOfTensors() as tensors:
            run = here['make']()
            tensors.peak = 0  # building is no part of it
            run()
            run()
        found['tensors'] = tensors.peak / 1e9
    return found


def resident_memory() -> float:
    """Return the largest resident memory of this process, in GB."""
    status = Path('/proc/self/status')
    if status.exists():
        peak = re.search(r'VmHWM:\s+(\d+) kB', status.read_text())
        return int(peak[1]) * 1024 / 1e9
    unit = 1 if sys.platform == 'darwin' else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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
    sides = {name: Side(part, name, values, n) for name in all_names}
    seconds = {name: [] for name in all_names}
    try:
        with tqdm(total=len(sides) * (rounds + 1), desc=part, unit='turn', leave=False,
                  disable=None) as bar:
            for side in sides.values():
                side.warm_up()
                bar.update()
            for _ in range(rounds):
                for name, side in sides.items():
                    seconds[name].append(side.take_turn())
                    bar.update()
        result = summarise(seconds, n, operations, precisions)
        for name in names if has_memory else ():
            result[name]['GB'] = sides[name].peak_memory()
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
            ratios = [b / a for a, b in zip(runs, theirs, strict=True)]
            row['ratios'][other] = [statistics.median(ratios), min(ratios), max(ratios)]
        if name in operations:
            row['tflops'] = operations[name] * row['images_per_s'] / 1e12
            peak = peaks.get(precisions[name])
            if peak:
                row |= {'peak_tflops': peak, 'share_of_peak': row['tflops'] / peak}
        result[name] = row
    return result


def count_flops(name: str, n_classes: int, size: tuple[int, int], is_training: bool
                ) -> int:
    """Count the FLOPs of an image in a manner: of convolutions and matrix products.

    Args:
        name: of the manner.
        n_classes: of the labels.
        size: (h, w) of the image.
        is_training: the backward pass too.
    """
    from torch.utils.flop_counter import FlopCounterMode
    if name.startswith('torchvision'):
        net = manners.build_torchvision(n_classes)
        parts = [net.backbone, nn.Sequential(net.classifier)]
    else:
        net = network.build(n_classes, is_eval=not is_training)
        parts = [net.backbone, net.head]
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
    operations = {name: count_flops(name, n_classes, dataset.crop_size(), True)
                  for name in names}
    return compare('step', names, values, batch, rounds, operations)


def measure_evaluation(part: str, names: list[str], values: dict, rounds: int,
                       n_images: int, n_classes: int) -> dict:
    """Measure predicting and scoring pictures, at a single scale or at many."""
    scales, times = ((1.0,), 1) if part == 'evaluation' else (settings.EVAL_SCALES, 2)
    net = network.build(n_classes, is_eval=True)
    operations = {}
    for name in names:
        is_ours = not name.startswith('torchvision')
        sizes = [tuple(inference.padded_size(n, net.stride, net.align_corners)
                       if is_ours else n for n in
                       inference.scaled_size(EVAL_SIZE, scale)) for scale in scales]
        operations[name] = times * sum(count_flops(name, n_classes, size, False)
                                       for size in sizes)
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
    return statistics.mean(same) if same else 1.0


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
        waiting, the share of the time without data; hours of ITER_MAX steps of the
        batch; tflops.
    """
    every = 10 if device.type == 'cuda' else 1
    rows, _ = run_training((n_rows + 1) * every, batch, every)
    speeds = [row['images_per_s'] for row in rows[1:]]
    speed = statistics.median(speeds)
    flops = count_flops('ours', n_classes, dataset.crop_size(), True)
    return {'images_per_s': speed, 'range': [min(speeds), max(speeds)],
            'steps_per_s': speed / batch, 'batch': batch,
            'waiting': statistics.mean(row['waiting_for_data'] for row in rows[1:]),
            'hours': settings.ITER_MAX * batch / speed / 3600,
            'tflops': flops * speed / 1e12}


def measure_startup(rounds: int) -> dict:
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
        text = run_training(1, 1, 1)[1]
        steps.append(float(re.search(r'first step begins ([\d.]+) s', text)[1]))
    return {'first_step_s': statistics.median(steps),
            'help_s': statistics.median(helps)}


# -- the profile -----------------------------------------------------------------------

def profile(part: str, name: str, n: int, device: torch.device, out: Path,
            n_calls: int = 3) -> dict:
    """Write a trace of some calls and return the kinds of operation by their time.

    Args:
        part, name: step or evaluation, and the manner.
        n: images of a call.
        out: the trace, for chrome://tracing or ui.perfetto.dev.

    Returns:
        ms of a call, and `kinds`: of each its name, ms, share and number a call.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    run, is_cuda = make_run(part, name, n, device), device.type == 'cuda'
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    run()
    run()
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(n_calls):
            run()
        if is_cuda:
            torch.cuda.synchronize(device)
    found.export_chrome_trace(str(out))
    kinds = []
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:  # kernels count to what started them
            taken = (event.self_device_time_total if is_cuda else
                     event.self_cpu_time_total) / 1e3 / n_calls
            kinds.append({'kind': event.key.removeprefix('aten::'), 'ms': taken,
                          'calls': event.count / n_calls})
    total = sum(kind['ms'] for kind in kinds)
    kinds = [{**kind, 'share': kind['ms'] / total} for kind in kinds]
    return {'ms': total, 'kinds': sorted(kinds, key=lambda kind: -kind['ms'])}


# -- all of it -------------------------------------------------------------------------

def measure_part(part: str, is_options: bool, rounds: int, batch: int) -> dict:
    """Measure one part with the settings."""
    values = {k: v for k, v in runtime.snapshot().items() if k != 'RECIPE'}
    device = runtime.pick_device()
    precision = runtime.pick_precision(device)
    n_classes = len(dataset.get_facts()['classes'])
    if part == 'startup':
        return measure_startup(rounds)
    if part == 'training':
        return measure_training(rounds, batch, device, n_classes)
    names = manners.list_manners(part, is_options, precision)
    if part == 'loader':
        return measure_loader(names, values, rounds)
    if part == 'step':
        return measure_step(names, values, rounds, batch, n_classes)
    result = measure_evaluation(part, names, values, rounds, n_pictures(device),
                                n_classes)
    if settings.CHECKPOINT and part == 'evaluation' and not is_options:
        result['agreement'] = measure_agreement(
            list(dict.fromkeys([precision, 'fp32'])), n_classes, device)
    return result


def n_pictures(device: torch.device) -> int:
    """Return how many pictures are evaluated in a call: on a CPU one is enough."""
    return settings.EVAL_BATCH if device.type == 'cuda' else 1


def in_fresh_process(run: Callable, *values):
    """Return run(*values) of a process of its own."""
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(run, *values).result()


def profile_part(part: str, values: dict, batch: int, out: Path) -> dict:
    """Profile our step or evaluation with the given settings, in a process of its own.
    """
    runtime.apply(values)
    device = runtime.pick_device()
    runtime.keep_freed_memory()
    name = f'ours {runtime.pick_precision(device)}'
    return profile(part, name, batch if part == 'step' else n_pictures(device), device,
                   out)
