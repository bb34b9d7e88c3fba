#!/bin/bash
# Submit a job from an environment that holds ray[default] alone, to a head with a token on this machine.
#   tests/thin_submitter.sh THIN_ENVIRONMENT
# The head runs in the environment of `python`. Make the thin one with `pip install "ray[default]==…"`,
# in the head's version. It takes about 300 MB.
set -euo pipefail
thin=$1/bin/ray
repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
full=$(dirname "$(command -v python)")
export HOME=$work RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
unset PYTHONPATH

"$full/python" - "$work/ports" <<'PYTHON'
import socket, sys
listeners = [socket.socket() for _ in range(4)]
for listener in listeners:
    listener.bind(("127.0.0.1", 0))
open(sys.argv[1], "w").write(" ".join(str(listener.getsockname()[1]) for listener in listeners) + "\n")
PYTHON
read -r port dashboard agent client < "$work/ports"

"$thin" get-auth-token --generate > /dev/null
chmod 600 "$HOME/.ray/auth_token"
# A process group of its own, so that this script ends this Ray and no other.
RAY_TMPDIR=$work PYTHONPATH=$repository setsid "$full/ray" start --head --block --node-ip-address=127.0.0.1 \
  --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --dashboard-agent-listen-port="$agent" \
  --ray-client-server-port="$client" --num-cpus=2 --disable-usage-stats > "$work/head.log" 2>&1 &
head=$!
trap 'kill -KILL -- "-$head"; wait "$head" || true; rm -rf "$work"' EXIT
address=http://127.0.0.1:$dashboard
for _ in $(seq 120); do
  "$thin" job list --address "$address" > /dev/null 2>&1 && break
  sleep 1
done

echo "packages on the submitter: $("$1/bin/python" -c 'import importlib.metadata as m; print(len(list(m.distributions())))')"
if "$1/bin/python" -I -c 'import rebeca_ray' 2> /dev/null; then
  echo "$1: holds rebeca_ray; give an environment with ray[default] alone" >&2
  exit 2
fi
cd "$repository"
"$thin" job submit --address "$address" --working-dir . -- \
  python jobs/generate_catalog.py --config jobs/configs/generate_stickers.yaml --dry-run | tee "$work/job.log"
grep -q '"num_images"' "$work/job.log"
grep -q 'succeeded' "$work/job.log"
uploaded=$(du -sb "$work"/ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_* | awk '{sum += $1} END {print sum}')
echo "upload: $uploaded bytes, unpacked"
[[ $uploaded -lt $((10 * 1024 * 1024)) ]]

# Without the token, nothing is accepted.
if RAY_AUTH_TOKEN_PATH=/dev/null "$thin" job list --address "$address" > /dev/null 2>&1; then
  echo "a submitter without the token was accepted" >&2
  exit 1
fi
echo "a submitter without the token was refused"
