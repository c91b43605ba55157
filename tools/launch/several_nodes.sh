#!/usr/bin/env bash
# Pretraining on several machines: start this on each of them, with the same arguments, within a few minutes.
#
#   NODES=8 HEAD=node0:29400 JOB=base tools/launch/several_nodes.sh configs/pretrain/base_800ep.yaml \
#       data.path=/data/images run.dir=/shared/runs/base
#
# HEAD is one of the machines and a free port there. run.dir lies on storage that all of them see. A process or a
# machine that dies and comes back within RESTARTS attempts makes all of them go on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${NODES:?NODES=number of machines}" "${HEAD:?HEAD=host:port of one of them}"
PROCESSES=${PROCESSES:-gpu}
RESTARTS=${RESTARTS:-3}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}  # seconds to save in after SIGTERM
# After a restart processes must not find the addresses of those that died (see engine/distribution.py).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ -x .venv/bin/python ]; then PYTHON=${PYTHON:-.venv/bin/python}; else PYTHON=${PYTHON:-python}; fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$NODES" --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-mae}" tools/pretrain.py "$@" run.resume=auto
