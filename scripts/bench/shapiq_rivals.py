"""shapiq's approximators on a table of utilities, for estimators.py, in an environment of its own.

    python shapiq_rivals.py utilities.npy --budgets 100,200 --seeds 20

The table holds u(code), bit i of the code is player i. Prints one JSON object: the version, and the
Shapley values of every approximator, budget and seed; one that refuses a budget gives none.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

import numpy as np
import shapiq  # pyright: ignore[reportMissingImports]

_SV = {"index": "SV", "max_order": 1}
SETTINGS = {
    "RegressionMSR, linear": {"index": "SV", "proxy_model": "linear"},
    "ProxySHAP, linear, adjusted": {**_SV, "proxy_model": "linear", "adjustment": True},
    "ProxySHAP, LightGBM, adjusted": {**_SV, "proxy_model": "lightgbm", "adjustment": True},
    "OddSHAP": {},
    "KernelSHAP, paired": {"pairing_trick": True},
    "LeverageSHAP": {},
    "SVARM": {},
}
"""Defaults but for these; with the default proxy (XGBoost) the first two were worse."""


def values(name: str, num_players: int, game, budget: int, seed: int) -> list[float]:  # noqa: ANN001
    kind = getattr(shapiq.approximator, name.split(",")[0])
    found = kind(num_players, random_state=seed, **SETTINGS[name]).approximate(budget, game)
    return [float(found[(i,)]) for i in range(num_players)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table")
    parser.add_argument("--budgets", required=True)
    parser.add_argument("--seeds", type=int, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    table = np.load(args.table)
    num_players = len(table).bit_length() - 1
    empty = table[0]

    def game(coalitions: np.ndarray) -> np.ndarray:
        """Normalised, as shapiq wants it: the empty coalition is worth 0."""
        return table[np.asarray(coalitions, dtype=bool) @ (1 << np.arange(num_players))] - empty

    answer: dict[str, dict[str, list[list[float]]]] = {}
    for name in SETTINGS:
        answer[name] = {}
        for budget in args.budgets.split(","):
            try:
                answer[name][budget] = [
                    values(name, num_players, game, int(budget), seed) for seed in range(args.seeds)
                ]
            except Exception as error:
                print(f"{name} at {budget}: {type(error).__name__}: {error}", file=sys.stderr)
    print(json.dumps({"version": shapiq.__version__, "values": answer}))


if __name__ == "__main__":
    main()
