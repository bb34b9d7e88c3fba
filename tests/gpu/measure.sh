#!/usr/bin/env bash
# Test and measure rebeca_ray on this machine's NVIDIA GPU, in at most ten minutes, without Ray and downloads.
#     tests/gpu/measure.sh [--out FOLDER]      writes gpu-<device>.json, by default to tests/bench/results
#     tests/gpu/measure.sh --tiny              tries everything on a CPU with tiny models, in two to four minutes
# It needs torch, diffusers, transformers, pydantic, botocore, pyarrow, fsspec, aiohttp, rich and pytest.
cd "$(dirname "$0")/../.." && exec env PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" -m tests.gpu.measure "$@"
