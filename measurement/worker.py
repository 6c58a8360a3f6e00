"""A process for each implementation that is measured, so that none influences another.

    worker = Worker('step', {'baseline': 'released'}, config.snapshot(), n=2)
    worker.receive()                     # it is built
    worker.ask('time_call', 3)           # seconds of a call, over three calls
"""
import multiprocessing
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import dataset
import distributed
import settings
from config import UserError
from measurement import implementations


class Worker:
    """A process that runs one implementation of one part when it is asked to.

    Args:
        part: loader, step, evaluation, multi, or product (of two matrices).
        arguments: of the implementation; of a product its precision.
        values: settings.
        n: images of a call.
        size: side of the images that are evaluated, or of the matrices.
    """

    def __init__(self, part: str, arguments: dict, values: dict, n: int, size: int):
        context = multiprocessing.get_context('spawn')
        if sys.platform == 'linux':  # there a server imports torch once for all workers
            context = multiprocessing.get_context('forkserver')
            context.set_forkserver_preload([__name__])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, part, arguments, values, n, size), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the process's Benchmark and return its result."""
        self.pipe.send((method, arguments))
        return self.receive()

    def receive(self) -> Any:
        """Return the next result of the process, or raise its error."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            result = UserError('a process was ended, perhaps for want of memory: lower '
                               '--step-batch')
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def serve(pipe: Connection, *arguments: Any) -> None:
    """Build a Benchmark and call its methods until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other end
    try:
        benchmark = Benchmark(*arguments)
        pipe.send(None)
        while True:
            method, words = pipe.recv()
            pipe.send(getattr(benchmark, method)(*words))
    except (EOFError, BrokenPipeError):
        return
    except UserError as error:
        pipe.send(error)
    except Exception as error:
        if distributed.is_out_of_memory(error):
            pipe.send(UserError('out of memory: lower --step-batch'))
        else:
            pipe.send(RuntimeError(traceback.format_exc()))


class Benchmark:
    """What a worker's process holds; its arguments are those of Worker."""

    def __init__(self, part: str, arguments: dict, values: dict, n: int, size: int):
        vars(settings).update(values)
        self.device = distributed.pick_device()
        self.is_cuda = self.device.type == 'cuda'
        distributed.prepare_cpu(self.device)  # for the baselines too
        torch.backends.cudnn.benchmark = part == 'step'
        n_classes = len(dataset.get_dataset_info()['classes'])
        if part == 'product':
            self.run = make_product(self.device, size, **arguments)
        elif part == 'loader':
            torch.set_num_threads(1)
            data = dataset.open_split('train')
            self.run = implementations.make_loader(data, n, **arguments)
        elif part == 'step':
            self.run = implementations.make_step(n_classes, self.device, n, **arguments)
        else:
            images, labels = implementations.make_images(n, (size, size), n_classes)
            self.run = implementations.make_evaluation(
                n_classes, self.device, images, labels, part == 'multi', **arguments)
        # The peak of the memory does not count what building took.
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        elif Path('/proc/self/clear_refs').exists():
            Path('/proc/self/clear_refs').write_text('5')

    def time_call(self, n_calls: int) -> float:
        """Return the seconds of a call, over several calls."""
        if self.is_cuda:
            self.run()  # takes the memory again that the last turn gave back
        synchronize = getattr(torch, self.device.type).synchronize
        synchronize()
        start = time.perf_counter()
        for _ in range(n_calls):
            self.run()
        synchronize()
        seconds = (time.perf_counter() - start) / n_calls
        if self.is_cuda:
            torch.cuda.empty_cache()  # the next worker needs it
        return seconds

    def peak_memory(self) -> float | None:
        """Return GB: of tensors on CUDA, of the whole process on a CPU under Linux."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        status = Path('/proc/self/status')
        if not status.exists():
            return None
        return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1]) * 1024 / 1e9


def make_product(device: torch.device, side: int, precision: str) -> Callable:
    """Return a function that multiplies two square matrices."""
    dtype = distributed.DTYPES.get(precision, torch.float32)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return lambda: a @ b
