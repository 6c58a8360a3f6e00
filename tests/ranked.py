"""What the tests change in a run or a rank, and functions that ranks run.

    torchrun ... tests/ranked.py OPTIONS NAME=VALUE ...     # train.py, changed

OPTIONS is JSON, see `change`.
"""
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import config
import distributed
import network
import train
from training import weights

build, train_step = network.build, train.Session.train_step


def change(options: dict) -> None:
    """Change this process.

    Args:
        options: `double` computes in float64. `deterministic` forbids operations that
            are not. `bn_eval` keeps batch norms in evaluation mode. `threads`: each
            rank computes with one more than the rank before it. `fetch`, a folder:
            loading weights only notes there who fetched them. `die`, a file: where it
            is not there yet, rank 1 makes it at step 4 and kills itself. After every
            step all ranks' buffers, the bases among them, must be bit-equal.
    """
    if options.get('double'):
        torch.set_default_dtype(torch.float64)
    if options.get('deterministic'):
        torch.use_deterministic_algorithms(True)
    if options.get('threads'):
        torch.set_num_threads(1 + int(os.environ['RANK']))

    def build_changed(*args, **values):
        net = build(*args, **values)
        if options.get('bn_eval'):
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.train = lambda mode=True: None
        return net

    def step_and_look(session, images, labels):
        found = train_step(session, images, labels)
        for name, buffer in session.model.named_buffers():
            assert session.group.is_identical([buffer]), name
        mark = Path(options.get('die', __file__))
        if session.step == 4 and session.group.rank == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    network.build, train.Session.train_step = build_changed, step_and_look
    if 'fetch' in options:
        weights.load_weights = lambda *_: fetch(Path(options['fetch']))


def fetch(folder: Path) -> str:
    """Stand in for a download that takes a while; every rank notes what it did."""
    file, rank = folder / 'weights', os.environ['RANK']
    if file.exists():
        (folder / f'read_{rank}').touch()
    else:
        (folder / f'fetched_{rank}').touch()
        time.sleep(0.5)
        file.touch()
    return f'loaded by rank {rank}'


def compare_tensors() -> None:
    """As one of two ranks with unlike threads, compare equal and unlike tensors."""
    group = distributed.ProcessGroup()
    torch.set_num_threads(1 + group.rank)
    torch.manual_seed(0)
    tensors = [torch.randn(1 << 20), torch.randn(9, 9).bfloat16(), torch.tensor(3),
               torch.tensor([True, False])]
    assert group.is_identical(tensors)
    for tensor in tensors:
        before = tensor.clone()
        if group.rank == 1:  # the smallest difference there is
            bits = tensor.view(-1).view(torch.int8)
            bits[0] ^= 1
        assert not group.is_identical(tensors)
        tensor.copy_(before)
    assert group.is_identical(tensors)
    group.destroy()


if __name__ == '__main__':
    change(json.loads(sys.argv[1]))
    del sys.argv[1]
    config.run(train.main)
