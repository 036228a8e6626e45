"""`lpserve exhaustive`: every set of a few removed layers, scored."""

from __future__ import annotations

import argparse
import time
from typing import Any

from lpserve.cli.arguments import add_engine_flags, add_window_flags, window_values

_HELP = """\
Score every set of up to --max-removed layers: ground truth, against which searches and estimates of
layer values can be held. Masks are scored in the order of their shared prefixes and kept as Parquet
segments, about 3 bytes for each window and mask; killing it loses nothing, and the same command
goes on.

  lpserve exhaustive --demo --max-removed 3
  lpserve exhaustive --model Llama-2-7b --calibration c4.txt --num-windows 4 --max-removed 4 \\
                     --pool ray --engines auto --out game

From Python: lpserve.read_exhaustive("game") gives arrays, and
lpserve.shapiq_game.LayerGame.from_exhaustive("game") a game for shapiq.
"""


def add_exhaustive(commands: Any) -> None:
    """Define `lpserve exhaustive`."""
    command = commands.add_parser(
        "exhaustive",
        help="score every set of a few removed layers",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_exhaustive)
    add = command.add_argument
    add("--demo", action="store_true", help="the bundled 12-layer model and text")
    add("--model", metavar="DIR", help="checkpoint folder, or a .gguf file")
    add_window_flags(command)
    add("--max-removed", type=int, required=True, metavar="R", help="every set of 1..R layers")
    add("--utility", help="whose metric is scored beside the NLL: neg_kl, say (neg_nll)")
    add("--out", metavar="DIR", help="folder of the game (exhaustive)")
    add_engine_flags(command)


def _exhaustive(arguments: argparse.Namespace) -> int:
    from lpserve.exhaustive.family import SmallRemovals
    from lpserve.exhaustive.game import NEAR, optima
    from lpserve.exhaustive.score import ExhaustiveConfig, exhaustive
    from lpserve.model.players import kinds_of, player_label
    from lpserve.scoring.open import players_of

    config = ExhaustiveConfig(**window_values(arguments, ("max_removed", "utility", "out")))
    players = players_of(config)
    family = SmallRemovals(len(players), config.max_removed)
    shared = family.skip_layer_forwards / family.layer_forwards
    print(
        f"{family.count:,} masks, {family.layer_forwards:,} layer-forwards in one trie: "
        f"{shared:.1f} times fewer than one by one",
        flush=True,
    )
    started = time.monotonic()
    result = exhaustive(config)
    seconds = time.monotonic() - started
    print(f"\n{'remove':>6}  {'ppl':>11}  {f'within {NEAR:.0%}':>18}  {kinds_of(players)}")
    for best in optima(result.folder):
        near = f"{best.near:,} of {best.sets:,}"
        layers = ", ".join(player_label(players[player]) for player in best.removed)
        print(f"{best.num_removed:>6}  {best.ppl:>11.4g}  {near:>18}  {layers}")
    size = sum(path.stat().st_size for path in (result.folder / "segments").iterdir())
    print(
        f"\n{result.masks_new:,} masks scored in {seconds:.0f} s with "
        f"{result.work.layer_forwards:,} layer-forwards; {family.count:,} masks in "
        f"{result.folder / 'segments'}, {size:,} bytes"
    )
    return 0
