"""Starts scripts many times in a second: torch is imported once, each run is a fork.

Each line of the standard input is an order in JSON, each answer a line: {"poll": pid}
asks for the exit status of a run, null while it runs; any other order starts one (see
conftest.Run) and gets its process number. The runs end with the standard input.
"""
import contextlib
import importlib
import json
import os
import signal
import sys

import ranked
import torch
from torch import nn

import config
import drawing
import eval  # noqa: F401 - so that the forks have it
import train  # noqa: F401


def import_early() -> None:
    """Make torch and others import what they import when they are first used."""
    torch.optim.SGD([torch.zeros(1)], lr=1)
    nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).to('meta')(
        torch.zeros(2, 1, 3, 3, device='meta'))
    drawing.new_figure(1, 1)


def become(order: dict) -> None:
    """Make this fork look like a fresh python that runs a script."""
    files = ((0, os.devnull, os.O_RDONLY), (1, order['out'], os.O_WRONLY),
             (2, order['error'], os.O_WRONLY))
    for number, name, flags in files:
        os.dup2(os.open(name, flags | os.O_CREAT | os.O_APPEND), number)
    if order['is_session']:
        os.setsid()
    os.environ.clear()
    os.environ.update(order['env'])
    os.chdir(order['cwd'])
    sys.argv = [order['script'], *order['words']]
    if order['change'] is not None:
        ranked.change(order['change'])


def serve() -> dict | None:
    """Answer the orders; in a fork, return the order that it is for."""
    children = set()
    for line in sys.stdin:
        order = json.loads(line)
        if 'poll' in order:
            pid, status = os.waitpid(order['poll'], os.WNOHANG)
            children.discard(pid)
            code = os.waitstatus_to_exitcode(status) if pid else None
            print(json.dumps(code), flush=True)
            continue
        child = os.fork()
        if not child:
            return order
        children.add(child)
        print(child, flush=True)
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return None


if __name__ == '__main__':
    import_early()
    order = serve()
    if order is not None:
        become(order)
        module, _, function = order['main'].partition(':')
        config.run(getattr(importlib.import_module(module), function))
