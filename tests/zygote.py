"""Starts train.py many times in a second: torch is imported once, each run is a fork.

A line of JSON on the standard input, {"words": [...], "out": file}, starts a run; its
process number is printed, and its exit status when it has ended.
"""
import argparse
import json
import os
import sys
import traceback

import runtime
import train


def run(words, out):
    """Run train.py's main with its output in a file; never returns."""
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.argv = ['train.py', *words]
    try:
        status = train.main(argparse.Namespace(given=runtime.override(words)))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


for line in sys.stdin:
    child = os.fork()
    if not child:
        run(**json.loads(line))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
