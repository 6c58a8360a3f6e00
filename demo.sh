#!/bin/sh
# Try everything on a machine without data or GPU: make an environment, draw the data
# set `shapes`, train a small EMANet from scratch, evaluate it, draw what it sees.
#   sh demo.sh                               minutes on two CPU cores
#   sh demo.sh SEED=2 LOG_DIR=logdir/demo2   any other settings on top
set -eu
cd "$(dirname "$0")"

# A python that has the packages is used, otherwise .venv is made.
packages='import torch, torchvision, tensorboardX, tqdm, PIL, matplotlib
assert torch.__version__ >= "2.6"'
python=
for candidate in .venv/bin/python python python3; do
    if "$candidate" -c "$packages" 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    python=.venv/bin/python
    [ -x "$python" ] || python3 -m venv .venv
    echo "installing the packages into .venv: a minute or two, 5.5 GB"
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi

"$python" prepare.py shapes
"$python" train.py RECIPE=demo LOG_DIR=logdir/demo "$@"
"$python" eval.py RECIPE=demo LOG_DIR=logdir/demo --pictures 12 "$@"
