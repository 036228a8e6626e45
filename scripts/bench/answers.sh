#!/usr/bin/env bash
# Every table about values, intervals and plans, one file each, in the folder OUT:
#
#     scripts/bench/answers.sh OUT
#
# SEEDS (20), MOST (largest budget on the exact games, 800) and LARGE (largest budget on the synthetic
# ones, 2000, at least 500) shorten it; hours with the defaults. SHAPIQ names a Python with shapiq 1.8,
# for its approximators. The bundled model's exact game is scored first (a few minutes), the 16-layer
# GPT-2's lies in games/.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: scripts/bench/answers.sh OUT}
seeds=${SEEDS:-20} most=${MOST:-800} large=${LARGE:-2000}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=. OMP_NUM_THREADS=1
mkdir -p "$out"
bench() { "$python" "scripts/bench/$1.py" "${@:2}"; }

rivals=()
if [ -n "${SHAPIQ:-}" ]; then rivals=(--shapiq "$SHAPIQ"); fi
bench estimators --save "$out/demo12.npz" --seeds "$seeds" --most "$most" "${rivals[@]}" \
  --out "$out/estimators.md"
gpt2=scripts/bench/games/gpt2-16.npz
bench estimators --game "$gpt2" --max-removed 6 --utility neg_nll --seeds "$seeds" --most "$most" \
  --out "$out/estimators_gpt2.md"
bench plan_rivals --game "$out/demo12.npz" --seeds "$seeds" --most "$most" --out "$out/rivals.md"
bench plan_rivals --game "$gpt2" --max-removed 6 --seeds "$seeds" --most "$most" \
  --out "$out/rivals_gpt2.md"
bench fidelity --game "$out/demo12.npz" --seeds "$seeds" --out "$out/fidelity.md"
bench fidelity --game "$gpt2" --max-removed 6 --seeds "$seeds" --out "$out/fidelity_gpt2.md"
bench large_games --seeds "$((seeds < 5 ? seeds : 5))" --most "$large" --out "$out/large_games.md"
