"""How fast the network in settings is loaded for, trained and evaluated here.

    python measure.py speed N_LAYERS=50          # ours beside others
    python measure.py options N_LAYERS=50        # what each of our options is worth

Every implementation runs in a process of its own, and they take turns, so that ratios
hold on a noisy machine; the first calls, in which kernels are chosen, do not count. A
product of two matrices in the device's best precision takes its turn too: what the
device reaches there is the peak of which each row gives the share.
"""
import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import config
import dataset
import distributed
import inference
import loader
import settings
from config import UserError
from measurement.implementations import BASELINES, list_implementations
from measurement.worker import Worker

PARTS = ('loader', 'step', 'training', 'evaluation', 'multi')
OPTION_PARTS = ('step', 'evaluation')
N_LOADED = 32         # samples of a call of the loader
TURN_SECONDS = 0.5    # a turn is as many calls as take this long
CUDA_PRODUCT = 8192   # side of the matrices whose product is measured
CPU_PRODUCT = 4096


def measure_part(part: str, args: argparse.Namespace) -> dict:
    """Measure one part of PARTS with the settings.

    Args:
        part: what to measure; the implementations are those of list_implementations.
        args: the command line of measure.py.

    Returns:
        A row for each implementation: see summarise; for training: measure_training.
    """
    device = distributed.pick_device()
    if part == 'training':
        return measure_training(args.rounds, args.step_batch, device)
    n_images = {'loader': N_LOADED, 'step': args.step_batch}.get(part, 1)
    if part in ('evaluation', 'multi') and device.type == 'cuda':
        n_images = settings.EVAL_BATCH
    precision = distributed.pick_precision(device)
    compared = list_implementations(part, args.what == 'options', args.compile,
                                    precision)
    side = CUDA_PRODUCT if device.type == 'cuda' else CPU_PRODUCT
    values, workers = config.snapshot(), {}
    try:
        for name, arguments in compared.items():
            workers[name] = Worker(part, arguments, values, n_images, args.size)
        if part != 'loader':
            product = {'precision': precision}
            workers['product'] = Worker('product', product, values, 1, side)
        for worker in workers.values():
            worker.receive()
        seconds = take_turns(part, workers, args.rounds)
        product_turns = seconds.pop('product', None)
        rows = summarise(seconds, n_images)
        if product_turns:
            peak = 2 * side ** 3 / statistics.median(product_turns) / 1e12
            for name, row in rows.items():
                row['memory_GB'] = workers[name].ask('peak_memory')
                flops = count_image_flops(part, compared[name]['baseline'], args.size)
                row['tflops'] = flops * row['images_per_s'] / 1e12
                row['share_of_peak'] = row['tflops'] / peak
    finally:
        for worker in workers.values():
            worker.close()
    return rows


def take_turns(part: str, workers: dict[str, Worker], rounds: int
               ) -> dict[str, list[float]]:
    """Return the seconds of a call, of each turn of each worker."""
    seconds, n_calls = {name: [] for name in workers}, {}
    n_turns = len(workers) * (rounds + 1)
    with tqdm(total=n_turns, desc=part, leave=False, disable=None) as bar:
        for name, worker in workers.items():
            worker.ask('time_call', 1)
            once = worker.ask('time_call', 1)
            n_calls[name] = min(math.ceil(TURN_SECONDS / once), 1000)
            bar.update()
        for _ in range(rounds):
            for name, worker in workers.items():
                seconds[name].append(worker.ask('time_call', n_calls[name]))
                bar.update()
    return seconds


def summarise(seconds: dict[str, list[float]], n_images: int) -> dict[str, dict]:
    """Return what the turns say of each implementation.

    Args:
        seconds: of a call, of each turn, by name.
        n_images: of a call.

    Returns:
        For each name images_per_s, the median; `range`, the least and the most;
        `ratios` to the others: median, least and most of the ratio turn by turn;
        `seconds`.
    """
    rows = {}
    for name, turns in seconds.items():
        ratios = {}
        for other, others in seconds.items():
            if other != name:
                found = [b / a for a, b in zip(turns, others, strict=True)]
                ratios[other] = [statistics.median(found), min(found), max(found)]
        rows[name] = {'images_per_s': n_images / statistics.median(turns),
                      'range': [n_images / max(turns), n_images / min(turns)],
                      'ratios': ratios, 'seconds': turns}
    return rows


# -- FLOPs -----------------------------------------------------------------------------

def count_image_flops(part: str, baseline: str, size: int = 0) -> int:
    """Count the FLOPs of a crop in a step, or of a square image in an evaluation."""
    n_classes = len(dataset.get_dataset_info()['classes'])
    is_eval = part != 'step'
    with torch.device('meta'):
        net = BASELINES[baseline](n_classes, is_eval).train(not is_eval)
    if part == 'step':
        return count_flops(net, loader.crop_size())
    scales = settings.EVAL_SCALES if part == 'multi' else (1.0,)
    total = 0
    for scale in scales:
        h, w = inference.scaled_size((size, size), scale)
        total += count_flops(net, (
            inference.padded_size(h, net.stride, net.align_corners),
            inference.padded_size(w, net.stride, net.align_corners)))
    return 2 * total if part == 'multi' else total  # flipped too


def count_flops(net: nn.Module, size: tuple[int, int]) -> int:
    """Count the FLOPs of the convolutions and matrix products for an image.

    Args:
        net: on the meta device; in training mode the backward pass counts too.
        size: (h, w) of the image.
    """
    x = torch.zeros(2, 3, *size, device='meta')
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(net.training):
            logits = net(x)
        if net.training:
            logits.sum().backward()
    return counter.get_total_flops() // 2


# -- train.py as it is -----------------------------------------------------------------

def run_training(n_steps: int, batch: int, log_every: int) -> list[dict]:
    """Run train.py from random weights, and return the rows of its log.jsonl.

    Raises:
        UserError: with its own message, if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        values = {**config.snapshot(), 'RECIPE': '', 'LOG_DIR': folder,
                  'PRETRAINED': 'none', 'INIT_FROM': '', 'CHECKPOINT': '', 'RESUME': '',
                  'RANKS': settings.RANKS or 1, 'BATCH_SIZE': batch,
                  'ITER_MAX': n_steps, 'LOG_EVERY': log_every, 'IMAGE_EVERY': 0,
                  'EVAL_EVERY': 0, 'ITER_SAVE': 1 << 40}
        words = [f'{name}={config.format_value(value)}'
                 for name, value in values.items()]
        done = subprocess.run([sys.executable, str(config.ROOT / 'train.py'), *words],
                              text=True, capture_output=True)
        if done.returncode:
            reason = (done.stderr.strip() or 'it gave no reason').splitlines()[-1]
            raise UserError('train.py failed while it was measured: '
                            f'{reason.removeprefix("error: ")}')
        rows = (Path(folder) / 'log.jsonl').read_text().splitlines()
        return [json.loads(row) for row in rows]


def measure_training(rounds: int, batch: int, device: torch.device) -> dict:
    """Measure train.py with its real loader, and how long a full run would take.

    Returns:
        images_per_s, the median over the lines of the log but the first; `range`;
        waiting, the share of the time without data; hours of ITER_MAX steps of
        BATCH_SIZE at this speed; tflops; startup_s, what the run takes besides steps.
    """
    log_every, start = 10 if device.type == 'cuda' else 1, time.perf_counter()
    rows = run_training((rounds + 1) * log_every, batch, log_every)
    seconds = time.perf_counter() - start
    speeds = [row['images_per_s'] for row in rows]
    startup = seconds - sum(batch * log_every / speed for speed in speeds)
    speed = statistics.median(speeds[1:])
    return {'images_per_s': speed, 'range': [min(speeds[1:]), max(speeds[1:])],
            'waiting': statistics.mean(row['waiting_for_data'] for row in rows[1:]),
            'hours': settings.ITER_MAX * settings.BATCH_SIZE / speed / 3600,
            'tflops': count_image_flops('step', '') * speed / 1e12,
            'startup_s': startup, 'batch': batch}
