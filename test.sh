#!/bin/sh
# Run the tests: sh test.sh [--slow] [pytest's options]
set -eu
cd "$(dirname "$0")"

# A python that has the packages is used, otherwise .venv is made.
packages='import torch, torchvision, tensorboardX, tqdm, PIL, scipy, matplotlib, pytest
assert torch.__version__ >= "2.6"'
python=
for candidate in .venv/bin/python python python3; do
    if "$candidate" -c "$packages" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    python=.venv/bin/python
    [ -x "$python" ] || python3 -m venv .venv
    echo "installing the packages into .venv: a minute or two, 5.5 GB"
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt \
        pycocotools onnx onnxscript onnxruntime pytest pytest-xdist
fi

marks='not slow'
if [ "${1:-}" = --slow ]; then
    marks=
    shift
fi
parallel=
if "$python" -c 'import xdist' 2>/dev/null; then
    parallel='-n auto --maxprocesses 8 --dist worksteal'
fi
exec "$python" -m pytest $parallel -m "$marks" "$@"
