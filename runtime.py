"""The process around a script: command line, device, precision, seeds, log and errors.

    python train.py RECIPE=demo STAGE_NUM=5 LR=0.02     # NAME=VALUE of settings.py
"""
import argparse
import ast
import contextlib
import difflib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recipes
import settings

BEGAN = time.perf_counter()  # about when the process did: nothing slow is imported yet
HERE = Path(__file__).resolve().parent
ROOMS = ('preparation', 'prediction', 'measurement', 'ablation')  # each of one script
EXIT_USER = 2       # a sentence was printed: change something, then try again
EXIT_STOPPED = 75   # SIGTERM: the step is saved, the same command goes on from it
EXIT_CTRL_C = 130
# These may differ between a run and its continuation: they do not change the result.
FREE = ('RECIPE', 'RESUME', 'LOG_DIR', 'DATA_ROOT', 'CACHE', 'MODEL_DIR', 'DEVICE',
        'RANKS', 'CHANNELS_LAST', 'COMPILE', 'WINOGRAD', 'RECOMPUTE', 'N_WORKERS',
        'LOG_EVERY', 'IMAGE_EVERY', 'EVAL_EVERY', 'ITER_SAVE', 'KEEP', 'CHECKPOINT',
        'VAL_SPLIT', 'EVAL_STRIDE', 'EVAL_STAGE_NUM', 'EVAL_MODE', 'EVAL_SCALES',
        'EVAL_SCALES_WIDE', 'EVAL_FLIP', 'EVAL_WINDOW', 'EVAL_STEP', 'EVAL_BATCH',
        'EVAL_IMAGES')


# -- settings --------------------------------------------------------------------------

def snapshot() -> dict[str, Any]:
    """Return all settings as they are now, in the order of settings.py."""
    return {name: value for name, value in vars(settings).items() if name.isupper()}


def parse_value(name: str, text: str, default: Any) -> Any:
    """Read one value, typed as its default is.

    Args:
        name: of the setting, for the message.
        text: what stands after the first '='.
        default: bool: true, false, 1 or 0. int: 6e5 too. tuple: 0.5,1.0 in brackets or
            without. str: taken as it is.

    Raises:
        ValueError: in a sentence.
    """
    try:
        if isinstance(default, bool):
            return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
        if isinstance(default, int):
            number = float(text)
            if number != int(number):
                raise ValueError
            return int(text) if re.fullmatch(r'[+-]?\d+', text) else int(number)
        if isinstance(default, float):
            if not math.isfinite(float(text)):
                raise ValueError
            return float(text)
        if isinstance(default, tuple):
            parts = [p.strip() for p in text.strip('()[] ').split(',') if p.strip()]
            if not parts:
                raise ValueError
            return tuple(parse_value(name, part, default[0]) for part in parts)
        return text
    except (KeyError, ValueError, OverflowError):
        kind = {bool: 'true or false is', int: 'a whole number is',
                float: 'a number is', tuple: 'numbers with commas between are'}
        raise ValueError(f'{name}={text}: {kind[type(default)]} expected, as in '
                         f'{name}={show_value(default)}') from None


def show_value(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, tuple):
        return ','.join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def override(words: list[str]) -> dict[str, Any]:
    """Apply NAME=VALUE words to settings: the recipe first, then the rest in order.

    Returns:
        The values of the words, the recipe's own settings not among them.

    Raises:
        ValueError: in a sentence, for an unknown name or recipe or a wrong type.
    """
    defaults, given = snapshot(), {}
    for word in words:
        name, equals, text = word.partition('=')
        if not equals:
            raise ValueError(f'{word!r} is not understood: settings are given as '
                             'NAME=VALUE, options start with --, see --help')
        default = defaults[known(name, defaults, 'setting')]
        given[name] = parse_value(name, text, default)
    apply({**({'RECIPE': settings.RECIPE} if settings.RECIPE else {}), **given})
    return given


def apply(values: dict[str, Any]) -> None:
    """Set settings from a mapping; the settings of its RECIPE are set before it."""
    recipe = values.get('RECIPE', '')
    if recipe:
        recipe = recipes.RECIPES[known(recipe, recipes.RECIPES, 'recipe')]['settings']
    for name, value in {**(recipe or {}), **values}.items():
        setattr(settings, known(name, snapshot(), 'setting'), value)


def known(name: str, names: Any, what: str) -> str:
    """Return the name if it is among the names, else raise "did you mean"."""
    if name in names:
        return name
    near = difflib.get_close_matches(name.upper() if what == 'setting' else name,
                                     list(names), n=1, cutoff=0.5)
    hint = f'did you mean {near[0]}?' if near else f'--help lists every {what}'
    raise ValueError(f'there is no {what} {name}: {hint}')


def eval_options() -> dict[str, Any]:
    """Return how settings want images to be seen, as arguments of a Predictor.

    Raises:
        ValueError: in a sentence.
    """
    mode, window, step = settings.EVAL_MODE, settings.EVAL_WINDOW, settings.EVAL_STEP
    modes = {'single': (1.0,), 'multi': settings.EVAL_SCALES,
             'wide': settings.EVAL_SCALES_WIDE}
    if mode not in modes:
        raise ValueError(f'EVAL_MODE={mode} is none of {", ".join(modes)}')
    if min(modes[mode]) <= 0 or max(modes[mode]) > 16:
        raise ValueError(f'EVAL_SCALES={show_value(modes[mode])}: numbers above 0, and '
                         'at most 16, are expected')
    if len(window) > 2 or min(window) < 0:
        raise ValueError(f'EVAL_WINDOW={show_value(window)}: one side or height,width '
                         'in pixels is expected, as in 513, or 0 for the whole image')
    if not 0 < step <= 1:
        raise ValueError(f'EVAL_STEP={step}: a share of the window above 0, and at '
                         'most 1, is expected')
    if settings.EVAL_BATCH < 1 or settings.EVAL_IMAGES < 0:
        raise ValueError(f'EVAL_BATCH={settings.EVAL_BATCH} and EVAL_IMAGES='
                         f'{settings.EVAL_IMAGES}: at least 1 and 0 are expected')
    return {'scales': modes[mode], 'use_flip': settings.EVAL_FLIP,
            'window': (window * 2)[:2], 'step': step, 'batch': settings.EVAL_BATCH,
            'channels_last': settings.CHANNELS_LAST, 'is_compiled': settings.COMPILE,
            'has_winograd': settings.WINOGRAD}


def rewrite_settings(text: str, values: dict[str, Any]) -> str:
    """Put values into the text of a settings.py; lines that stay equal stay verbatim.

    Args:
        text: of a settings.py.
        values: of the names to set; names that the text does not have are left out.
    """
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign):
            continue
        name = node.targets[0].id
        if name in values and values[name] != ast.literal_eval(node.value):
            line, row = f'{name} = {values[name]!r}', node.lineno - 1
            comment = lines[row].encode()[node.end_col_offset:].decode().strip()
            lines[row] = f'{line:<27} {comment}'.rstrip()
    return '\n'.join(lines) + '\n'


def settings_text() -> str:
    """Return the settings of this run in the spelling and order of settings.py."""
    return rewrite_settings((HERE / 'settings.py').read_text(), snapshot())


# -- command line and errors -----------------------------------------------------------

def read_command_line(doc: str, add_options: Callable | None = None,
                      others: str = '') -> argparse.Namespace:
    """Read options and NAME=VALUE words, and apply the words to settings.

    Called before torch is imported, so that --help answers at once. Exits with status
    2 and a sentence where a word is wrong.

    Args:
        doc: the script's docstring.
        add_options: called with the parser, adds what is special to the script.
        others: what words that do not begin with NAME= are, as 'PICTURE'; '' is that
            the script takes none.

    Returns:
        The options; `given` holds the values of the words, `others` the other words.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f'%(prog)s [options] {f"{others} ... " * bool(others)}[NAME=VALUE ...]',
        epilog='settings and their defaults:\n' + ''.join(
            f'  {line}\n' for line in (HERE / 'settings.py').read_text().splitlines()
            if re.match(r'[A-Z]|# --', line)) + '\nrecipes:\n' + ''.join(
            f'  RECIPE={name:18} {recipe["about"]}\n'
            for name, recipe in recipes.RECIPES.items()))
    if add_options:
        add_options(parser)
    parser.add_argument('words', nargs='*', metavar='NAME=VALUE',
                        help='override a setting of settings.py')
    args = parser.parse_intermixed_args()
    args.others = [word for word in args.words
                   if others and not re.match('[A-Z][A-Z0-9_]*=', word)]
    try:
        args.given = override([word for word in args.words if word not in args.others])
    except ValueError as error:
        sys.exit(fail(str(error)))
    return args


def fail(sentence: str) -> int:
    """Print an error and return the exit status for it."""
    if int(os.environ.get('RANK', 0)):
        time.sleep(3)  # an error of all ranks is the first one's to tell
    print(f'error: {sentence}', file=sys.stderr, flush=True)
    return EXIT_USER


def run(main: Callable[[argparse.Namespace], int | None], args: argparse.Namespace
        ) -> None:
    """Run a script's main and exit; an error that a user can cause is one sentence."""
    try:
        status = main(args) or 0
    except KeyboardInterrupt:
        status = EXIT_CTRL_C
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        sentence = explain(error)
        if sentence is None and is_lost(error):
            time.sleep(3)  # the rank that failed tells why
            print('error: another rank has ended', file=sys.stderr)
        elif sentence is None:
            traceback.print_exc()
        status = 1 if sentence is None else fail(sentence)
    sys.exit(status)


def is_lost(error: Exception) -> bool:
    """Tell whether a collective operation failed because another rank is gone."""
    signs = ('Connection closed', 'Connection reset', 'NCCL', 'gloo')
    return (int(os.environ.get('WORLD_SIZE', 1)) > 1 and isinstance(error, RuntimeError)
            and any(sign in str(error) for sign in signs))


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether torch found no memory, on the device or on the host."""
    import torch
    return (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "can't allocate memory" in str(error))


def explain(error: Exception) -> str | None:
    """Return the sentence of an error that our own code raised on purpose, else None.

    On purpose is: a ValueError or OSError from a `raise` statement in this folder,
    also one that came out of a loader process as text.
    """
    if not isinstance(error, (ValueError, OSError)):
        return None
    if 'in DataLoader worker' in str(error):
        frames = re.findall(r'File "([^"]+)", line \d+, in .+\n +(.*)', str(error))
        file, code = frames[-1] if frames else ('', '')
        sentence = str(error).strip().splitlines()[-1].partition(': ')[2]
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        file, code, sentence = frame.filename, frame.line or '', str(error)
    folder = Path(file).resolve().parent
    is_ours = folder == HERE or folder.parent == HERE and folder.name in ROOMS
    return sentence if is_ours and code.startswith('raise ') else None


class Signals:
    """Remembers SIGTERM and Ctrl-C, so that the loop can end its step and save.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.exit_status = 0
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        if 'RANK' in os.environ and hasattr(signal, 'SIGHUP'):
            signal.signal(signal.SIGHUP, self._note)  # its launcher is stopped

    def _note(self, number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.exit_status = EXIT_CTRL_C if number == signal.SIGINT else EXIT_STOPPED
        if hasattr(signal, 'SIGCHLD'):  # loaders that die with us must not raise now
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# -- device and precision --------------------------------------------------------------

def list_devices() -> list[str]:
    """Return the devices that settings name: auto is CUDA, then MPS, then CPU."""
    import torch
    name = settings.DEVICE
    if name == 'auto':
        has_mps = torch.backends.mps.is_available()
        name = 'cuda' if torch.cuda.is_available() else 'mps' if has_mps else 'cpu'
    if name == 'cuda':
        return [f'cuda:{i}' for i in range(torch.cuda.device_count())] or [name]
    if name.startswith('cuda:'):
        return [f'cuda:{i}' for i in name[5:].split(',')]
    return [name]


def pick_device():
    """Return the torch.device of this process: that of its local rank."""
    import torch
    names, n = list_devices(), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if names[0].startswith('cuda') and n > len(names):
        raise ValueError(f'{n} ranks were started on this machine, but there are '
                         f'{len(names)} GPUs ({", ".join(names)}): start fewer')
    name = names[int(os.environ.get('LOCAL_RANK', 0)) % len(names)]
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'DEVICE={name} cannot be used here '
                         f'({str(error).splitlines()[0]}): take auto or cpu') from error
    return device


def has_native_bf16(device) -> bool:
    """Tell whether a device computes matrix products in bfloat16 in hardware."""
    import torch
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == 'cpu' and Path('/proc/cpuinfo').exists():
        flags = set(Path('/proc/cpuinfo').read_text().split())
        return bool(flags & {'avx512_bf16', 'amx_bf16', 'bf16'})
    return False


def pick_precision(device) -> str:
    """Return fp32, bf16 or fp16 of the setting PRECISION.

    auto: bf16 where the device has it, otherwise fp16 on CUDA and fp32 elsewhere.
    """
    name = settings.PRECISION
    if name == 'auto':
        if has_native_bf16(device):
            return 'bf16'
        return 'fp16' if device.type == 'cuda' else 'fp32'
    if name not in ('fp32', 'bf16', 'fp16'):
        raise ValueError(f'PRECISION={name} is none of auto, fp32, bf16, fp16')
    if name == 'fp16' and device.type == 'mps':
        raise ValueError('PRECISION=fp16 needs a gradient scaler that torch does not '
                         'have on MPS: take bf16 or fp32')
    return name


def autocast(device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context that computes in a precision; fp32 changes nothing."""
    import torch
    if precision == 'fp32':
        return contextlib.nullcontext()
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float16
    return torch.autocast(device.type, dtype)


def seed(*numbers: int) -> None:
    """Seed torch's generators, as a function of some numbers (seed, step, rank)."""
    import numpy as np
    import torch
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on a CPU have freed, for the next ones.

    It would hand large blocks back to the system and get them again, page by page, in
    every step. The peak of the process's memory is some percent higher with it. Other
    systems go on as they do.
    """
    import ctypes
    try:
        mallopt = ctypes.CDLL('libc.so.6').mallopt
    except (OSError, AttributeError):  # macOS, Windows, musl
        return
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    # an older glibc takes no more than 32 MB here
    if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 1 << 25):
        mallopt(trim_threshold, (1 << 31) - 1)


# -- ranks -----------------------------------------------------------------------------

class Team:
    """The processes that share the work, as torch's launcher started them.

    Alone, with a world of 1, every method does nothing.

    Args:
        device: of this process; NCCL joins GPUs, gloo everything else.
    """

    def __init__(self, device=None):
        self.rank = int(os.environ.get('RANK', 0))
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        self.is_first = self.rank == 0
        self.is_local_first = int(os.environ.get('LOCAL_RANK', 0)) == 0
        self.hosts = None  # the group in which processes talk without their devices
        if self.world > 1:
            from datetime import timedelta

            import torch.distributed as dist
            is_cuda = device is not None and device.type == 'cuda'
            if is_cuda:
                import torch
                torch.cuda.set_device(device)
            patience = timedelta(hours=6)  # while one rank packs, saves or downloads
            if is_cuda:
                dist.init_process_group('nccl')
                self.hosts = dist.new_group(backend='gloo', timeout=patience)
            else:
                dist.init_process_group('gloo', timeout=patience)
                self.hosts = dist.group.WORLD

    def add(self, tensor):
        """Sum a tensor over the ranks, in place, and return it."""
        if self.world > 1:
            import torch.distributed as dist
            is_cpu = tensor.device.type == 'cpu'
            dist.all_reduce(tensor, group=self.hosts if is_cpu else None)
        return tensor

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.world > 1:
            import torch
            import torch.distributed as dist
            tensor = torch.tensor(number)
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.hosts)
            return int(tensor)
        return number

    def gather(self, text: str) -> list[str]:
        """Return the texts of all ranks, in their order."""
        texts = [text] * self.world
        if self.world > 1:
            import torch.distributed as dist
            dist.all_gather_object(texts, text, group=self.hosts)
        return texts

    def is_alike(self, tensor) -> bool:
        """Tell whether all ranks hold the very same tensor, of 4 or 8 bytes a number.
        """
        if self.world > 1:
            import torch
            import torch.distributed as dist
            bits = tensor.detach().view(torch.int64 if tensor.itemsize == 8 else
                                        torch.int32)
            low, high = bits.clone(), bits.clone()
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
            return torch.equal(low, high)
        return True

    def leave(self) -> None:
        """Part from the others, at the end of the work."""
        if self.world > 1:
            import torch.distributed as dist
            dist.barrier(group=self.hosts)
            dist.destroy_process_group()


def launch() -> int | None:
    """Hand this very command to torch's launcher, where it wants several processes.

    Returns:
        The exit status of the processes; none where this process is to do the work.
    """
    if 'RANK' in os.environ:
        return None
    if settings.RANKS < 0:
        raise ValueError(f'RANKS={settings.RANKS}: 0 or more is expected')
    names = list_devices()
    n = settings.RANKS or len(names)
    if n > 1 and names[0].startswith('cuda'):
        import torch.distributed as dist
        if not dist.is_nccl_available():  # as on Windows
            n = settings.RANKS or 1
    if n == 1:
        return None
    if names[0] == 'mps':
        raise ValueError(f'RANKS={n}: there is one MPS device, set RANKS=0 or 1')
    if names[0].startswith('cuda') and n > len(names):
        raise ValueError(f'RANKS={n}, but there are {len(names)} GPUs ('
                         f'{", ".join(names)}): set RANKS=0 for one process a GPU')
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    logging.getLogger('torch.distributed').setLevel(logging.CRITICAL)
    os.environ.setdefault('OMP_NUM_THREADS', str(max((os.cpu_count() or 1) // n, 1)))
    config = LaunchConfig(run_id=str(os.getpid()), min_nodes=1, max_nodes=1,
                          nproc_per_node=n, max_restarts=0,
                          rdzv_backend='c10d', rdzv_endpoint='localhost:0',
                          monitor_interval=0.2,
                          # not SIGHUP: nohup is to hold for the launcher too
                          **({'signals_to_handle': 'SIGTERM,SIGINT'} if
                             'signals_to_handle' in LaunchConfig.__dataclass_fields__
                             else {}))
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except SignalException as stop:
        return EXIT_STOPPED if stop.sigval == signal.SIGTERM else 128 + stop.sigval
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return EXIT_USER if EXIT_USER in codes else max(1, *codes)
    return 0


# -- log -------------------------------------------------------------------------------

def describe_environment(device) -> dict[str, str]:
    """Return versions, device and state of the source, as text."""
    import torch

    def git(*words):
        done = subprocess.run(['git', '-C', str(HERE), *words], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return done.stdout.strip()

    name = (torch.cuda.get_device_name(device) if device.type == 'cuda' else
            f'{platform.processor() or platform.machine()}, '
            f'{torch.get_num_threads()} threads')
    try:
        source = git('rev-parse', '--short', 'HEAD')
        source += ', changed' if source and git('status', '--porcelain', '-uno') else ''
    except OSError:  # no git on this machine
        source = ''
    return {'command': ' '.join(sys.argv), 'host': platform.node(), 'device': name,
            'python': platform.python_version(), 'torch': str(torch.__version__),
            **{name: version_of(name) for name in ('torchvision', 'numpy', 'pillow')},
            'source': source or 'not under git',
            'started': time.strftime('%Y-%m-%d %H:%M:%S')}


def version_of(package: str) -> str:
    """Return the version of an installed package without importing it."""
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version(package)
    except PackageNotFoundError:  # it came under another name
        return 'unknown'


def lock(folder: str | Path, name: str = 'LOG_DIR'):
    """Keep other processes of this project out of a folder as long as this one lives.

    Args:
        folder: is made if it is not there.
        name: of what gave it, for the messages.

    Returns:
        The open file that holds the lock.

    Raises:
        OSError, ValueError: in a sentence, where another has it, or the folder cannot
            be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / 'lock', 'a+')
    except OSError as error:
        raise OSError(f'cannot write into {name}={folder} ({error}): give a folder '
                      'that can be written') from None
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:  # of this process alone: its children do not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f'another process writes into {name}={folder} ('
                         f'{file.read().strip()}): wait for its end, or give another '
                         'folder') from None
    except OSError as error:  # as on some network file systems
        print(f'note: {folder} cannot be locked ({error}): take care that one process '
              'at a time writes there')
        return file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}\n')
    file.flush()
    return file


class Log:
    """The console, `log.txt`, `log.jsonl` with a row of numbers a line, TensorBoard.

    Args:
        folder: is made if it is not there.
        step: rows after this step, of a run that was cut off, are taken out.
    """

    def __init__(self, folder: str, step: int = 0):
        from tensorboardX import SummaryWriter
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.text = open(self.folder / 'log.txt', 'a', buffering=1)
        except OSError as error:
            raise OSError(f'cannot write into LOG_DIR={folder} ({error}): give a '
                          'folder that can be written') from None
        rows = self.folder / 'log.jsonl'
        if rows.exists():
            kept = [line for line in rows.read_text().splitlines(True)
                    if is_row_until(line, step)]
            write_text(rows, ''.join(kept))
        self.rows = open(rows, 'a', buffering=1)
        self.board = SummaryWriter(folder, purge_step=step + 1)

    def line(self, text: str, is_shown: bool = True) -> None:
        """Write a line to log.txt, and to the console."""
        if is_shown:
            from tqdm import tqdm
            tqdm.write(text)
            sys.stdout.flush()
        self.text.write(text + '\n')

    def row(self, **values) -> None:
        """Write a row of numbers to log.jsonl; `train/loss` and such to TensorBoard."""
        self.rows.write(as_json(values) + '\n')
        for name, value in values.items():
            if name not in ('kind', 'step') and not isinstance(value, list):
                self.board.add_scalar(f'{values["kind"]}/{name}', value, values['step'])


    def describe(self, values: dict[str, Any], text: str) -> None:
        """Put the settings into TensorBoard: as text, and as its hyper-parameters."""
        from tensorboardX.summary import hparams
        self.board.add_text('settings', f'```\n{text}\n```')
        shown = {name: value if isinstance(value, (bool, int, float, str)) else
                 show_value(value) for name, value in values.items()}
        metrics = dict.fromkeys(('validation/mIoU', 'train/loss'), 0.0)
        for summary in hparams(shown, metrics)[:2]:  # the third says that it ended
            self.board.file_writer.add_summary(summary)


class Silence:
    """The log of every rank but the first: takes anything, writes nothing."""

    def __init__(self, folder: str):
        self.folder, self.board = Path(folder), self

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **values: None


def as_json(value: Any, indent: int | None = None) -> str:
    """Return JSON in which a number that is not finite is null."""
    def clean(x):
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(clean(value), indent=indent)


def is_row_until(line: str, step: int) -> bool:
    """Tell whether a line of log.jsonl is whole and of a step up to `step`."""
    try:
        return json.loads(line).get('step', 0) <= step
    except ValueError:
        return False


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)
