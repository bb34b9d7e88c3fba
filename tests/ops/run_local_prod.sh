#!/usr/bin/env bash
# Run a small production on this machine: S3, Triton, a Ray cluster of two nodes with a token, Prometheus.
# Three nights are submitted, each with a fault, while a consumer reads. It ends with a table, and 1 if a line failed.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
[[ -x $python ]] || python=python
export OMP_NUM_THREADS=1 RAY_worker_niceness=0
exec "$python" -m tests.ops.local_prod "$@"
