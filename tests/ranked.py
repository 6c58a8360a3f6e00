"""Runs train.py's main as one of several ranks, with what a test wants changed.

    torchrun ... tests/ranked.py OPTIONS NAME=VALUE ...

OPTIONS is JSON: `double` computes in float64, `bn_eval` keeps batch norms in evaluation
mode, `die` is a file: where it is not there yet, rank 1 makes it at step 4 and kills
itself. After every step all ranks' buffers, the bases among them, must be bit-equal.
"""
import argparse
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import network
import runtime
import train

build, train_step = network.build, train.Session.train_step


def change(options):
    """Change this process as the options say."""
    if options.get('double'):
        torch.set_default_dtype(torch.float64)

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
        for name, buffer in session.raw.named_buffers():
            assert session.team.is_alike(buffer.double()), name
        mark = Path(options.get('die', __file__))
        if session.step == 4 and session.team.rank == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    network.build, train.Session.train_step = build_changed, step_and_look


if __name__ == '__main__':
    change(json.loads(sys.argv[1]))
    given = runtime.override(sys.argv[2:])
    sys.exit(train.main(argparse.Namespace(given=given)))
