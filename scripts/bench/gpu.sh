#!/usr/bin/env bash
# Both shapes on one GPU, each within ten minutes: scripts/bench/gpu.sh [OUT_FOLDER]
# Needs torch, transformers, safetensors and numpy; nothing is downloaded. With vLLM installed its
# paths are measured too. PYTHON=... names an interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
out="${1:-gpu-results}"
mkdir -p "$out"
for shape in llama-2-7b llama-3-8b; do
  PYTHONPATH=. timeout 600 "${PYTHON:-python3}" scripts/bench/gpu.py \
    --shape "$shape" --out "$out/$shape.md" || echo "gpu.sh: $shape ended with $?" >&2
done
