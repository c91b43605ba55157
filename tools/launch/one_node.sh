#!/usr/bin/env bash
# Pretraining on all GPUs of one machine (or on N processes: PROCESSES=N). Arguments go to tools/pretrain.py:
#
#   tools/launch/one_node.sh configs/pretrain/base_800ep.yaml data.path=/data/images run.dir=runs/base
#
# A process that dies is started again with all others, from the newest checkpoint, up to RESTARTS times. The same
# command continues a run that was stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
PROCESSES=${PROCESSES:-gpu}
RESTARTS=${RESTARTS:-3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}  # seconds to save in after SIGTERM
if [ -x .venv/bin/python ]; then PYTHON=${PYTHON:-.venv/bin/python}; else PYTHON=${PYTHON:-python}; fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS" \
    tools/pretrain.py "$@" run.resume=auto
