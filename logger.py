"""The log of a run: console, log.txt, log.jsonl, TensorBoard; environment and lock.

    log = Logger('logdir')
    log.log_metrics(kind='train', step=10, loss=0.5)    # a line of log.jsonl
"""
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tqdm import tqdm

from config import ROOT, UserError, format_value

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Logger:
    """Writes to the console, log.txt, log.jsonl (a row of numbers a line), TensorBoard.

    Args:
        folder: is made if it is not there.
        step: rows after this step, of a run that was cut off, are removed.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, folder: str, step: int = 0):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.text = open(self.folder / 'log.txt', 'a', buffering=1)
        except OSError as error:
            raise UserError(f'cannot write into LOG_DIR={folder} ({error}): give a '
                            'folder that can be written') from None
        rows = self.folder / 'log.jsonl'
        if rows.exists():
            kept = [line for line in rows.read_text().splitlines(True)
                    if is_row_until(line, step)]
            write_text(rows, ''.join(kept))
        self.rows = open(rows, 'a', buffering=1)
        self.writer = SummaryWriter(folder, purge_step=step + 1)

    def info(self, text: str, is_shown: bool = True) -> None:
        """Write a line to log.txt, and to the console."""
        if is_shown:
            tqdm.write(text)
            sys.stdout.flush()
        self.text.write(text + '\n')

    def log_metrics(self, **values) -> None:
        """Write numbers to log.jsonl and TensorBoard; `kind` and `step` are required.
        """
        self.rows.write(to_json(values) + '\n')
        for name, value in values.items():
            if name not in ('kind', 'step') and not isinstance(value, list):
                self.writer.add_scalar(f'{values["kind"]}/{name}', value,
                                       values['step'])

    def log_settings(self, values: dict[str, Any], text: str) -> None:
        """Write the settings to TensorBoard: as text, and as hyper-parameters."""
        self.writer.add_text('settings', f'```\n{text}\n```')
        hyper = {name: value if isinstance(value, (bool, int, float, str)) else
                 format_value(value) for name, value in values.items()}
        metrics = dict.fromkeys(('validation/mIoU', 'train/loss'), 0.0)
        for summary in hparams(hyper, metrics)[:2]:  # the third marks the run's end
            self.writer.file_writer.add_summary(summary)


class NullLogger:
    """The logger of every rank but the first: accepts any call and writes nothing."""

    def __init__(self, folder: str):
        self.folder, self.writer = Path(folder), self

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **values: None


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON in which a number that is not finite is null."""
    def clean(x):
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(clean(value), indent=indent)


def is_row_until(line: str, step: int) -> bool:
    """Return whether a line of log.jsonl is complete and of a step up to `step`."""
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


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return command, host, device, versions and state of the source, as text."""
    if device.type == 'cuda':
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = (f'{platform.processor() or platform.machine()}, '
                       f'{torch.get_num_threads()} threads')
    try:
        source = run_git('rev-parse', '--short', 'HEAD')
        if source and run_git('status', '--porcelain', '-uno'):
            source += ', changed'
    except OSError:  # no git on this machine
        source = ''
    packages = ('torchvision', 'numpy', 'pillow')
    return {'command': ' '.join(sys.argv), 'host': platform.node(),
            'device': device_name, 'python': platform.python_version(),
            'torch': str(torch.__version__),
            **{name: package_version(name) for name in packages},
            'source': source or 'not under git',
            'started': time.strftime('%Y-%m-%d %H:%M:%S')}


def run_git(*words: str) -> str:
    """Return what a git command in the project's folder prints; '' if it fails."""
    done = subprocess.run(['git', '-C', str(ROOT), *words], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout.strip()


def package_version(package: str) -> str:
    """Return the version of an installed package without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:  # it was installed under another name
        return 'unknown'


def lock_folder(folder: str | Path, name: str = 'LOG_DIR') -> TextIO:
    """Keep other processes of this project out of a folder while this one runs.

    Args:
        folder: is made if it is not there.
        name: of the setting or option that gave it, for the messages.

    Returns:
        The open file that holds the lock.

    Raises:
        UserError: if another process has the lock, or the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / 'lock', 'a+')
    except OSError as error:
        raise UserError(f'cannot write into {name}={folder} ({error}): give a folder '
                        'that can be written') from None
    if fcntl is None:
        return file
    try:  # of this process alone: its children do not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f'another process writes into {name}={folder} ('
                        f'{file.read().strip()}): wait for its end, or give another '
                        'folder') from None
    except OSError as error:  # as on some network file systems
        print(f'note: {folder} cannot be locked ({error}): make sure that one process '
              'at a time writes there')
        return file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}\n')
    file.flush()
    return file
