#!/bin/sh
# Show the curves and pictures of the runs below a folder: sh tensorboard.sh [LOG_DIR]
set -eu
for python in .venv/bin/python python python3; do
    if "$python" -c 'import tensorboard' 2>/dev/null; then break; fi
    python=
done
if [ -z "$python" ]; then
    echo "error: TensorBoard is not installed: pip install tensorboard" >&2
    exit 2
fi
exec "$python" -m tensorboard.main --logdir "${1:-logdir}" --port "${PORT:-6006}"
