"""A process for each manner that is measured: it works when it is told to.

So none leaves traces for another, neither in the allocator nor in a library's choices,
and its memory is its own.
"""
import contextlib
import math
import multiprocessing
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dataset
import inference
import runtime
from measurement import manners

EVAL_SIZE = (513, 513)  # (h, w) of the pictures that are evaluated, as in Table 1
PRODUCT = 4096          # side of the matrices whose product shows the device's peak
ENOUGH = 0.5            # seconds that each turn of a manner takes at least
# What the turns of a process are compared with, and are no manner themselves.
PRODUCTS = ('product', 'convolution')


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
        self.name, self.times = name, 1  # calls of a turn
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, part, name, values, n),
                                     daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, what: str, *words: Any) -> Any:
        """Return what the process answers: see `serve`.

        Raises:
            ValueError: in a sentence, where the manner cannot be.
            RuntimeError: with the process's traceback, for a fault of the code.
        """
        try:
            self.pipe.send((what, words))
            kind, answer = self.pipe.recv()
        except (EOFError, OSError):
            raise ValueError(f'the process of {self.name!r} was ended, perhaps for '
                             'want of memory, as all that take turns are in it at a '
                             'time: lower --step-batch') from None
        if kind == 'sentence':
            raise ValueError(f'{self.name}: {answer}')
        if kind == 'fault':
            raise RuntimeError(f'{self.name}: {answer}')
        return answer

    def warm_up(self) -> None:
        """Call it twice, and find out how many calls a turn takes."""
        self.ask('call', 1)
        self.times = how_often(self.ask('call', 1))

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def how_often(seconds: float) -> int:
    """Return how many calls of so many seconds make a turn."""
    return min(max(math.ceil(ENOUGH / seconds), 1), 1000)


# What a side's process holds: its function, its device, and how to make it again.
here: dict[str, Any] = {}


def serve(pipe, part: str, name: str, values: dict, n: int) -> None:
    """Be a side's process: do what is asked until the other end of the pipe is gone.

    `build`, `call`, `peak_memory` and `profile` are the functions below.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end
    todo = {'build': lambda: build(part, name, values, n), 'call': call,
            'peak_memory': peak_memory, 'profile': profile}
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, words = pipe.recv()
            try:
                pipe.send(('answer', todo[what](*words)))
            except Exception as error:
                sentence = runtime.explain(error)
                if runtime.is_out_of_memory(error):
                    sentence = (f'the memory does not hold it ('
                                f'{str(error).splitlines()[0]}): lower --step-batch')
                pipe.send(('sentence', sentence) if sentence else
                          ('fault', traceback.format_exc()))


def build(part: str, name: str, values: dict, n: int) -> None:
    """Make the function of a side."""
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
    is_cuda = here['device'].type == 'cuda'
    if is_cuda:  # its memory was given back at the end of the turn before
        here['run']()
    synchronise()
    began = time.perf_counter()
    for _ in range(n):
        here['run']()
    synchronise()
    seconds = (time.perf_counter() - began) / n
    if is_cuda:
        torch.cuda.empty_cache()
    return seconds


def synchronise() -> None:
    """Wait for the device."""
    if here['device'].type in ('cuda', 'mps'):
        getattr(torch, here['device'].type).synchronize()


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
    import resource  # Windows has none
    unit = 1 if sys.platform == 'darwin' else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def profile(out: Path, n_calls: int = 3) -> dict:
    """Write a trace of some calls of a side, and return the kinds of operation by time.

    Args:
        out: the trace, for chrome://tracing or ui.perfetto.dev.

    Returns:
        ms of a call, and `kinds`: of each its name, ms, share and number a call.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    is_cuda = here['device'].type == 'cuda'
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(n_calls):
            here['run']()
        synchronise()
    found.export_chrome_trace(str(out))
    kinds = []
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:  # kernels count to what started them
            taken = (event.self_device_time_total if is_cuda else
                     event.self_cpu_time_total) / 1e3 / n_calls
            kinds.append({'kind': event.key.removeprefix('aten::'), 'ms': taken,
                          'calls': event.count / n_calls})
    total = sum(kind['ms'] for kind in kinds)
    kinds = [{**kind, 'share': kind['ms'] / (total or 1)} for kind in kinds]
    return {'ms': total, 'kinds': sorted(kinds, key=lambda kind: -kind['ms'])}
