"""Starts train.py many times in a second: torch is imported once, each run is a fork.

A line of JSON on the standard input, {"words": [...], "out": file}, starts a run; its
process number is printed, and its exit status when it has ended. "places" may hold the
environment of each of several ranks, "options" what ranked.py changes.
"""
import argparse
import json
import os
import sys
import traceback

import ranked

import runtime
import train


def run(words, out, place, options):
    """Run train.py with its output in `out`, its errors in `out`.err; never returns."""
    for number, name in ((1, out), (2, f'{out}.err')):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ['train.py', *words]
    os.environ.update(place)
    status = 1
    try:
        if options is not None:
            ranked.change(options)
        runtime.run(train.main, argparse.Namespace(given=runtime.override(words)))
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    order = json.loads(line)
    children = []
    for place in order.get('places', [{}]):
        child = os.fork()
        if not child:
            run(order['words'], order['out'], place, order.get('options'))
        children.append(child)
    print(children[0], flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(next((code for code in codes if code), 0), flush=True)
