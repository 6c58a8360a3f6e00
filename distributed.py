"""Devices, precision and seeds; the process group, its launcher, sync batch norm.

    python train.py RANKS=2 DEVICE=cpu        # two processes share every batch
"""
import contextlib
import ctypes
import inspect
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.nn.functional import all_reduce

import settings
from config import EXIT_CTRL_C, EXIT_STOPPED, EXIT_USER, UserError

DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


# -- devices ---------------------------------------------------------------------------

def list_devices() -> list[str]:
    """Return the devices that DEVICE names; auto is CUDA, then MPS, then CPU."""
    name = settings.DEVICE
    if name == 'auto':
        if torch.cuda.is_available():
            name = 'cuda'
        elif torch.backends.mps.is_available():
            name = 'mps'
        else:
            name = 'cpu'
    if name == 'cuda':
        return [f'cuda:{i}' for i in range(torch.cuda.device_count())] or [name]
    if name.startswith('cuda:'):
        return [f'cuda:{i}' for i in name[5:].split(',')]
    return [name]


def pick_device() -> torch.device:
    """Return the device of this process, that of its local rank.

    Raises:
        UserError: if there are fewer GPUs than ranks, or the device cannot be used.
    """
    names, n_ranks = list_devices(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if names[0].startswith('cuda') and n_ranks > len(names):
        raise UserError(f'{n_ranks} ranks were started on this machine, but there are '
                        f'{len(names)} GPUs ({", ".join(names)}): start fewer')
    name = names[int(os.environ.get('LOCAL_RANK', 0)) % len(names)]
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'DEVICE={name} cannot be used here '
                        f'({str(error).splitlines()[0]}): take auto or cpu') from error
    return device


def prepare_cpu(device: torch.device) -> None:
    """Make computing on a CPU fast: flush denormal numbers, keep freed memory.

    Responsibilities far from a basis underflow to denormal numbers, with which a CPU
    computes some thirty times more slowly; they become 0.
    """
    if device.type == 'cpu':
        torch.set_flush_denormal(True)
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system and gets them again, page by page,
    in every step. The peak memory of the process is some percent higher with it. On
    systems without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):  # macOS, Windows, musl
        return
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    # an older glibc takes no more than 32 MB here
    if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25):
        mallopt(trim_threshold, (1 << 31) - 1)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch found no memory, on the device or on the host."""
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "can't allocate memory" in str(error))


@contextlib.contextmanager
def explain_out_of_memory(device: torch.device, what: str, advice: str
                          ) -> Iterator[None]:
    """Turn an out-of-memory error of a block into a UserError.

    Args:
        device: that the block computes on.
        what: the memory does not hold, for the message.
        advice: what the user can do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ['no reason given'])[0]
        raise UserError(f'the memory of {device} does not hold {what} ({reason}): '
                        f'{advice}') from error


# -- precision and seeds ---------------------------------------------------------------

def has_native_bf16(device: torch.device) -> bool:
    """Return whether a device computes matrix products in bfloat16 in hardware."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == 'cpu' and Path('/proc/cpuinfo').exists():
        flags = set(Path('/proc/cpuinfo').read_text().split())
        return bool(flags & {'avx512_bf16', 'amx_bf16', 'bf16'})
    return False


def pick_precision(device: torch.device, group: 'ProcessGroup | None' = None) -> str:
    """Return fp32, bf16 or fp16 of the setting PRECISION, the same on all ranks.

    auto is bf16 where the device has it, otherwise fp16 on CUDA and fp32 elsewhere.
    Where the ranks would choose differently, GPUs take fp16 if each of them would take
    bf16 or fp16; everything else takes fp32.

    Args:
        device: of this process.
        group: the ranks that must agree.

    Raises:
        UserError: for an unknown precision, or one that the device does not have.
    """
    name = settings.PRECISION
    if name == 'auto':
        if has_native_bf16(device):
            name = 'bf16'
        else:
            name = 'fp16' if device.type == 'cuda' else 'fp32'
    if name not in ('fp32', *DTYPES):
        raise UserError(f'PRECISION={name} is none of auto, fp32, bf16, fp16')
    if name == 'fp16' and device.type == 'mps':
        raise UserError('PRECISION=fp16 needs a gradient scaler that torch does not '
                        'have on MPS: take bf16 or fp32')
    names = set(group.all_gather_text(name)) if group else {name}
    if len(names) == 1:
        return name
    return 'fp16' if device.type == 'cuda' and names == set(DTYPES) else 'fp32'


def autocast(device: torch.device, precision: str
             ) -> contextlib.AbstractContextManager:
    """Return the context that computes in a precision; fp32 changes nothing."""
    if precision == 'fp32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def set_seed(*numbers: int) -> None:
    """Seed torch's generators with a function of some numbers (seed, step, rank)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


# -- the process group -----------------------------------------------------------------

class ProcessGroup:
    """The processes that share a run, as torchrun started them.

    With a world size of 1 every method does nothing.

    Args:
        device: of this process; NCCL connects GPUs, gloo everything else.
    """

    def __init__(self, device: torch.device | None = None):
        self.rank = int(os.environ.get('RANK', 0))
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.is_main = self.rank == 0
        self.is_local_main = int(os.environ.get('LOCAL_RANK', 0)) == 0
        self.cpu_group = None  # connects the processes without their GPUs
        if self.world_size == 1:
            return
        timeout = timedelta(hours=6)  # while one rank validates, saves or downloads
        if device is not None and device.type == 'cuda':
            torch.cuda.set_device(device)
            dist.init_process_group('nccl')
            self.cpu_group = dist.new_group(backend='gloo', timeout=timeout)
        else:
            dist.init_process_group('gloo', timeout=timeout)
            self.cpu_group = dist.group.WORLD

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place, and return it."""
        if self.world_size > 1:
            is_cpu = tensor.device.type == 'cpu'
            dist.all_reduce(tensor, group=self.cpu_group if is_cpu else None)
        return tensor

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.cpu_group)
        return int(tensor)

    def all_gather_text(self, text: str) -> list[str]:
        """Return the texts of all ranks, in the order of the ranks."""
        texts = [text] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(texts, text, group=self.cpu_group)
        return texts

    def is_identical(self, tensors: Iterable[Tensor]) -> bool:
        """Return whether all ranks hold the same tensors, by the sums of their bits.

        Sums of integers do not depend on the order, so not on the number of threads.
        """
        if self.world_size == 1:
            return True
        dtypes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        low = torch.stack([t.detach().contiguous().view(dtypes[t.itemsize]).sum()
                           for t in tensors])
        high = low.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        return torch.equal(low, high)

    def barrier(self) -> None:
        """Wait until all ranks are here; unlike NCCL's, for hours."""
        if self.world_size > 1:
            dist.barrier(group=self.cpu_group)

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run a block on the first rank of each host, then on the others."""
        if not self.is_local_main:
            self.barrier()
        yield
        if self.is_local_main:
            self.barrier()

    def destroy(self) -> None:
        """Leave the group when all ranks have finished."""
        if self.world_size > 1:
            self.barrier()
            dist.destroy_process_group()


def launch() -> int | None:
    """Start this command again as several ranks, if settings ask for more than one.

    Returns:
        The exit status of the ranks; None if this process does the work itself.

    Raises:
        UserError: for more ranks than there are devices.
    """
    if 'RANK' in os.environ:
        return None
    n_ranks = count_ranks()
    if n_ranks == 1:
        return None
    logging.getLogger('torch.distributed').setLevel(logging.CRITICAL)
    n_threads = max((os.cpu_count() or 1) // n_ranks, 1)
    os.environ.setdefault('OMP_NUM_THREADS', str(n_threads))
    options = {}
    if 'signals_to_handle' in LaunchConfig.__dataclass_fields__:
        options['signals_to_handle'] = 'SIGTERM,SIGINT'  # not SIGHUP: nohup must hold
    launch_config = LaunchConfig(
        run_id=str(os.getpid()), min_nodes=1, max_nodes=1, nproc_per_node=n_ranks,
        max_restarts=0, rdzv_backend='c10d', rdzv_endpoint='localhost:0',
        monitor_interval=0.2, **options)
    try:
        elastic_launch(launch_config, sys.executable)(*sys.argv)
    except SignalException as stop:
        is_term = stop.sigval == signal.SIGTERM
        return EXIT_STOPPED if is_term else 128 + stop.sigval
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return EXIT_USER if EXIT_USER in codes else max(1, *codes)
    return 0


def count_ranks() -> int:
    """Return how many processes RANKS and DEVICE ask for.

    Raises:
        UserError: for more ranks than there are devices.
    """
    if settings.RANKS < 0:
        raise UserError(f'RANKS={settings.RANKS}: 0 or more is expected')
    names = list_devices()
    n_ranks = settings.RANKS or len(names)
    is_cuda = names[0].startswith('cuda')
    if n_ranks > 1 and is_cuda and not dist.is_nccl_available():  # as on Windows
        n_ranks = settings.RANKS or 1
    if n_ranks > 1 and names[0] == 'mps':
        raise UserError(f'RANKS={n_ranks}: there is one MPS device, set RANKS=0 or 1')
    if is_cuda and n_ranks > len(names):
        raise UserError(f'RANKS={n_ranks}, but there are {len(names)} GPUs ('
                        f'{", ".join(names)}): set RANKS=0 for one process a GPU')
    return n_ranks


class StopSignals:
    """Notes SIGTERM and Ctrl-C, so that the loop can finish its step and save.

    `exit_status` is 0 until a signal comes. A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.exit_status = 0
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)
        if 'RANK' in os.environ and hasattr(signal, 'SIGHUP'):
            signal.signal(signal.SIGHUP, self._handle)  # its launcher is stopped

    def _handle(self, number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.exit_status = EXIT_CTRL_C if number == signal.SIGINT else EXIT_STOPPED
        if hasattr(signal, 'SIGCHLD'):  # loaders that end with us must not raise now
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# -- the network over several ranks ----------------------------------------------------

def wrap_ddp(model: nn.Module) -> nn.Module:
    """Return the model in DistributedDataParallel, its buffers left alone."""
    ddp = nn.parallel.DistributedDataParallel
    names = inspect.signature(ddp.__init__).parameters
    name = 'broadcast_buffers'
    if 'forward_sync_buffers' in names:  # its name since torch 2.12 or so
        name = 'forward_sync_buffers'
    return ddp(model, gradient_as_bucket_view=True, **{name: False})


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batch of all ranks, for devices without SyncBatchNorm.

    The arithmetic is that of torch.nn.SyncBatchNorm, which is for GPUs. Every rank must
    have as many images of the same size.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> the same."""
        if not self.training:
            return super().forward(x)
        full = x if x.dtype == torch.float64 else x.float()
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(full.sum((0, 2, 3))) / n                 # (c,)
        centred = full - mean[:, None, None]
        var = all_reduce(centred.square().sum((0, 2, 3))) / n      # (c,)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def convert_sync_batchnorm(net: nn.Module, device_type: str) -> nn.Module:
    """Return the network with batch norms over the images of all ranks."""
    if device_type == 'cuda':
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CPUSyncBatchNorm  # the tensors stay the same
    return net
