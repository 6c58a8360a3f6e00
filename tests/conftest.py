"""Small data sets and a tiny network for the tests; nothing is downloaded."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch: two would wait for each other

import numpy as np
import pytest
import torch
from PIL import Image

import runtime
import settings

HERE = Path(__file__).parents[1]
# A network that trains a step in hundredths of a second.
TINY = ('N_LAYERS=18 STEM=plain PRETRAINED=none STRIDE=16 BN_MOM=0.1 HEAD_CHANNELS=16 '
        'FC1_CHANNELS=16 N_BASES=4 CROP_SIZE=33 BATCH_SIZE=4 SCALES=0.75,1.0,1.5 '
        'LOG_EVERY=1 ITER_SAVE=10 IMAGE_EVERY=0 PRECISION=fp32 DEVICE=cpu '
        'N_WORKERS=0').split()


@pytest.fixture(autouse=True)
def as_before():
    """Put every setting back after each test."""
    before = runtime.snapshot()
    yield
    for name, value in before.items():
        setattr(settings, name, value)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason='needs a CUDA device, none is here')
        for item in items:
            if 'gpu' in item.keywords:
                item.add_marker(skip)


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


def run_script(script: str, *words: str, cwd=None, timeout: float = 120
               ) -> subprocess.CompletedProcess:
    """Run a script of the project as a user does."""
    return subprocess.run([sys.executable, str(HERE / script), *map(str, words)],
                          cwd=cwd, text=True, capture_output=True, timeout=timeout,
                          stdin=subprocess.DEVNULL)


@pytest.fixture
def tiny(voc, tmp_path) -> list[str]:
    """Words that train the tiny network on the made-up VOC folder."""
    return [*TINY, 'DATASET=voc', f'DATA_ROOT={voc}', 'TRAIN_SPLIT=train',
            f'LOG_DIR={tmp_path / "log"}']


class Zygote:
    """Runs train.py's main in forks of one process: see zygote.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / 'tests' / 'zygote.py')], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, 'PYTHONPATH': str(HERE)})

    def __call__(self, words, out, seconds=None, places=({},), options=None) -> int:
        """Run it, kill it after so many seconds, and return its exit status."""
        order = {'words': list(map(str, words)), 'out': str(out), 'places': places,
                 'options': options}
        self.process.stdin.write(json.dumps(order) + '\n')
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())


@pytest.fixture(scope='module')
def zygote():
    """A function that runs train.py, and kills it if wanted."""
    zygote = Zygote()
    yield zygote
    zygote.process.kill()
