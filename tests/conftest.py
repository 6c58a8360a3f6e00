"""Small data sets, a tiny network, and the scripts as a user runs them."""
import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch: two would wait for each other

import numpy as np
import pytest
import torch
from PIL import Image

import config
import settings

HERE = Path(__file__).parents[1]
# A network that trains a step in hundredths of a second.
TINY = ('N_LAYERS=18 STEM=plain PRETRAINED=none STRIDE=16 BN_MOM=0.1 HEAD_CHANNELS=16 '
        'FC1_CHANNELS=16 N_BASES=4 CROP_SIZE=33 BATCH_SIZE=4 SCALES=0.75,1.0,1.5 '
        'LOG_EVERY=1 ITER_SAVE=1000 IMAGE_EVERY=0 PRECISION=fp32 DEVICE=cpu '
        'N_WORKERS=0').split()


@pytest.fixture(autouse=True)
def as_before():
    """Put settings and what a script changes in its process back after each test."""
    before = config.snapshot()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for name, value in before.items():
        setattr(settings, name, value)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_flush_denormal(False)
    torch.backends.cudnn.benchmark = False


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason='needs a CUDA device, none is here')
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(skip)


# -- data ------------------------------------------------------------------------------

def write_voc(root: Path, n_train: int = 6, n_val: int = 3, size=(40, 52)) -> Path:
    """Write a made-up data set in the VOC layout: blocks of colour, 21 classes."""
    draw = np.random.default_rng(0)
    for name in ('JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'):
        (root / name).mkdir(parents=True)
    ids = [f'pic_{i}' for i in range(n_train + n_val)]
    palette = list(range(256)) * 3
    for i, name in enumerate(ids):
        h, w = size[0] + i, size[1] - i
        label = np.kron(draw.integers(0, 4, (4, 4)), np.ones((20, 20)))[:h, :w]
        label = label.astype(np.uint8)
        image = (60 * label[..., None] + draw.integers(0, 50, (h, w, 3)))
        Image.fromarray(image.astype(np.uint8)).save(root / f'JPEGImages/{name}.jpg')
        label[:2] = 255
        mask = Image.fromarray(label, 'L').convert('L')
        mask = Image.frombytes('P', mask.size, label.tobytes())
        mask.putpalette(palette)
        mask.save(root / f'SegmentationClass/{name}.png')
    lists = root / 'ImageSets' / 'Segmentation'
    (lists / 'train.txt').write_text('\n'.join(ids[:n_train]) + '\n')
    (lists / 'val.txt').write_text('\n'.join(ids[n_train:]) + '\n')
    return root


@pytest.fixture
def voc(tmp_path) -> Path:
    """A made-up VOC folder of 6 + 3 pictures."""
    return write_voc(tmp_path / 'VOC2012')


@pytest.fixture
def tiny(voc, tmp_path) -> list[str]:
    """Words that train the tiny network on the made-up VOC folder."""
    return [*TINY, 'DATASET=voc', f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train',
            f'LOG_DIR={tmp_path / "log"}']


# -- scripts ---------------------------------------------------------------------------

class Zygote:
    """A process that forks the runs: see zygote.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / 'tests' / 'zygote.py')], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, 'PYTHONPATH': str(HERE)})
        atexit.register(self.process.communicate)

    def ask(self, order: dict) -> int | None:
        """Send an order and return its answer."""
        self.process.stdin.write(json.dumps(order) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@functools.cache
def get_zygote() -> Zygote:
    return Zygote()


class Run:
    """A script that runs in a process of its own, a fork of the zygote.

    Args:
        script: 'train.py', or a function as 'ranked:check'.
        words: of its command line.
        cwd: its folder.
        env: added to the environment.
        is_session: make it the leader of a process group.
        change: what ranked.change changes.
    """

    def __init__(self, script: str, *words, cwd=None, env=None, is_session=False,
                 change=None):
        self.folder = tempfile.TemporaryDirectory()
        out, error = (f'{self.folder.name}/{name}' for name in ('out', 'error'))
        main = script if ':' in script else f'{Path(script).stem}:main'
        self.pid = get_zygote().ask({
            'script': str(HERE / script), 'main': main, 'words': list(map(str, words)),
            'cwd': str(cwd or os.getcwd()), 'env': {**os.environ, **(env or {})},
            'out': out, 'error': error, 'is_session': is_session, 'change': change})
        self.returncode = None

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        if self.returncode is None:
            self.returncode = get_zygote().ask({'poll': self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> subprocess.CompletedProcess:
        """Wait for its end; kill it after so many seconds."""
        end = time.time() + timeout
        while self.poll() is None:
            if time.time() > end:
                self.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        out, error = (Path(self.folder.name, name).read_text()
                      for name in ('out', 'error'))
        return subprocess.CompletedProcess([], self.returncode, out, error)


def run_script(script: str, *words, cwd=None, timeout: float = 120
               ) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does."""
    return Run(script, *words, cwd=cwd).wait(timeout)


def run_python(script: str, *words, cwd=None) -> subprocess.CompletedProcess:
    """Run a script in a fresh python, which takes some seconds."""
    return subprocess.run([sys.executable, str(HERE / script), *map(str, words)],
                          cwd=cwd, text=True, capture_output=True, timeout=120,
                          stdin=subprocess.DEVNULL)


def run_ranks(n: int, script: str, *words, rank_words=((), ()), change=None
              ) -> list[subprocess.CompletedProcess]:
    """Run a script as n ranks, as torchrun would.

    Args:
        n: ranks; 1 is a run without a process group.
        script, words, change: see Run.
        rank_words: more words for some of the ranks.
    """
    if n == 1:
        return [Run(script, *words, change=change).wait()]
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(n):
        env = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(n),
               'LOCAL_WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1',
               'MASTER_PORT': str(port)}
        own = rank_words[rank] if rank < len(rank_words) else ()
        runs.append(Run(script, *words, *own, env=env, change=change))
    return [run.wait() for run in runs]


# -- what a run writes -----------------------------------------------------------------

def is_one_sentence(done: subprocess.CompletedProcess, *parts) -> bool:
    """Check status 2 and one line of error that has all the parts."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
    for part in parts:
        assert str(part) in lines[0]
    return True


def compare(one, other, where='') -> None:
    """Assert that two nests of dicts, lists and tensors are equal to the bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            compare(one[key], other[key], f'{where}.{key}')
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            compare(*pair, f'{where}[{i}]')
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def read(path: Path) -> dict:
    """Read a checkpoint."""
    return torch.load(path, weights_only=True)


def losses(folder: Path) -> dict[int, float]:
    """Return the losses of log.jsonl by their steps; {} if it is not there yet."""
    if not (folder / 'log.jsonl').exists():
        return {}
    lines = (folder / 'log.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row['step']: row['loss'] for row in rows if row['kind'] == 'train'}


def wait_for_step(run: Run, folder: Path, step: int = 1) -> None:
    """Wait until a run has logged a step, or has ended."""
    end = time.time() + 60
    while time.time() < end and run.poll() is None:
        if max(losses(folder), default=0) >= step:
            return
        time.sleep(0.02)
