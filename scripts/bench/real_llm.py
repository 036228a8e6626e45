"""lpserve and its rivals on a real LLM: sets chosen on one text, held out on another.

    scripts/real-model
    PYTHONPATH=. python scripts/bench/real_llm.py --model models/SmolLM2-135M-Instruct \\
        --heldout wikitext2-test.txt --folder models/real_llm --out real_llm.md

For every seed (of windows and searches alike) `lpserve run --goal plan --settle` and every rival of
`lpserve baselines` choose sets on windows of the bundled calibration text. The sets of the sizes in
`SIZES` are then scored on the held-out text by the protocols that papers use, and on the bundled
tasks. Work counts layer-forwards in the trie of each batch and a head as `HEAD_COST` layers, as
`lpserve baselines` does; races count too.

It takes hours on a few cores and goes on where it was stopped: every score is in a store in the
folder, and every step that has ended, with the held-out scores, in the file `--steps`. With
`--table` the table is made of the steps that have ended.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from probes import machine_lines, publish

from lpserve.analysis.analyse import analyse
from lpserve.analysis.build_plan import make_plan
from lpserve.analysis.record import read_record
from lpserve.config import EngineConfig, RunConfig
from lpserve.data.protocols import PROTOCOLS, protocol_windows
from lpserve.data.tokenizer import load_tokenizer
from lpserve.data.windows import TokenWindows
from lpserve.demo import FOLDER as DEMO
from lpserve.evaluation.evaluate import evaluate
from lpserve.evaluation.settings import EvalConfig
from lpserve.masks import from_keys, full_mask, without
from lpserve.plan.layer_sets import LayerSet
from lpserve.rivals.accounting import Spent
from lpserve.rivals.compare import CompareConfig, Comparison, compare
from lpserve.rivals.proposer import Ask
from lpserve.rivals.registry import OVERLAP
from lpserve.runner.run import run
from lpserve.scoring.session import ScoringSession
from lpserve.store.store import Store

SIZES = (3, 6, 9, 12)
NUM_WINDOWS, LENGTH = 10, 128
RIVALS = ("greedy", "evopress", "oneshot", "shortgpt", "angular", "taylor", "last")
TASKS = ("dracula_last_word", "dracula_continuation")
OURS = ("lpserve", "lpserve, settled")


class Steps:
    """What has ended, in one file: steps with their figures, and held-out scores of sets. It is
    small, and with it another machine goes on where this one stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        data = json.loads(path.read_text()) if path.exists() else {}
        self.done: dict[str, Any] = data.get("steps", {})
        self.heldout: dict[str, dict[str, Any]] = data.get("heldout", {})
        """Measure -> layers removed (`3 7`) -> losses of windows, or an accuracy."""

    def do(self, name: str, step: Callable[[], dict[str, Any]]) -> None:
        """Do a step unless it has ended; its seconds are those of the last try."""
        if name in self.done:
            return
        started = time.perf_counter()
        found = step()
        self.done[name] = {**found, "step_seconds": round(time.perf_counter() - started)}
        self.write()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)

    def write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        data = {"steps": self.done, "heldout": self.heldout}
        temporary.write_text(json.dumps(data, separators=(",", ":")) + "\n")
        temporary.replace(self._path)


# -- choosing --------------------------------------------------------------------------------------


def common(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Keys of a run and of a comparison."""
    return {
        "model": str(args.model),
        "calibration": {"sherlock": str(DEMO / "calibration.txt")},
        "heldout": {"dracula": str(DEMO / "heldout.txt")},
        "num_windows": NUM_WINDOWS,
        "heldout_windows": 2,  # these are not the held-out windows of the table
        "length": LENGTH,
        "max_removed": max(SIZES),
        "seed": seed,
        "window_seed": seed,
        "progress_s": 60.0,
    }


def ours(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """lpserve's sets by size, before and after their races, and what both took."""
    folder = args.folder / f"seed-{seed}" / "run"
    config = RunConfig(
        **common(args, seed),
        goal="plan",
        budget=args.budget,
        settle=0.9,
        max_windows=args.max_windows,
        out=str(folder),
    )
    result = run(config)
    record = read_record(folder)
    unsettled = make_plan(replace(record, settlements=()), analyse(record))
    spent, tokens = _search_cost(folder, record.masks_MP)
    raced = _race_cost(folder)
    races = {e.num_removed: e.settlement for e in result.outcome.plan.plans}
    return {
        "sets": {
            "lpserve": {r: unsettled.entry(r).removed for r in SIZES},
            "lpserve, settled": {r: result.outcome.plan.entry(r).removed for r in SIZES},
        },
        "costs": {
            "lpserve": [spent.masks, tokens, spent.forwards],
            "lpserve, settled": [
                spent.masks,
                tokens + raced[0],
                spent.forwards + raced[1],
            ],
        },
        "calibration": {
            "lpserve": {r: unsettled.entry(r).calibration_ppl for r in SIZES},
            "lpserve, settled": {r: result.outcome.plan.entry(r).calibration_ppl for r in SIZES},
        },
        "races": {r: [s.outcome, s.windows, len(s.ties)] for r, s in races.items() if s},
        "full_ppl": result.outcome.plan.full_calibration_ppl,
    }


def _search_cost(folder: Path, masks_MP: np.ndarray) -> tuple[Spent, int]:
    """What the rounds of a run took, and their tokens."""
    rounds = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "round":
            rounds[event["round"]] = event["masks"]
    spent, start = Spent(NUM_WINDOWS), 0
    for _, count in sorted(rounds.items()):
        spent.add(Ask(masks_MP[start : start + count]))
        start += count
    assert start == len(masks_MP)
    spent.forwards += OVERLAP.forwards(masks_MP.shape[1])
    return spent, spent.tokens(np.full(NUM_WINDOWS, LENGTH))


def _race_cost(folder: Path) -> tuple[int, float]:
    """Tokens and layer-forwards of a run's races: what its store holds of windows that are neither
    calibration nor held out."""
    with np.load(folder / "windows.npz") as data:
        known: set[str] = set()
        for prefix in ("", "heldout_"):
            tokens, scored = data[f"{prefix}tokens"], data[f"{prefix}scored"]
            known |= set(TokenWindows.from_tokens(tokens, scored, name="w").window_hashes)
        players = json.loads((folder / "plan.json").read_text())["num_players"]
    masks: dict[tuple[str, ...], set[bytes]] = defaultdict(set)
    with Store(folder / "scores.sqlite") as store:
        for scores in store.read_all():
            if not known & set(scores.windows.window_hashes):
                masks[tuple(scores.windows.window_hashes)] |= set(scores.mask_keys)
    tokens, forwards = 0, 0.0
    for windows, keys in masks.items():
        spent = Spent(NUM_WINDOWS)
        spent.add(Ask(from_keys(sorted(keys), players)))
        forwards += spent.forwards * len(windows) / NUM_WINDOWS
        tokens += len(keys) * len(windows) * LENGTH
    return tokens, forwards


def theirs(
    args: argparse.Namespace, seed: int, rivals: tuple[str, ...], budget: int
) -> dict[str, Any]:
    """Rivals' sets by size, and what they took."""
    name = rivals[0] if len(rivals) == 1 else "rivals"
    out = args.folder / f"seed-{seed}" / name
    found: Comparison = compare(
        CompareConfig(**common(args, seed), rivals=rivals, budget=budget, out=str(out))
    )
    sets: dict[str, dict[int, list[int]]] = {rival: {} for rival in rivals}
    for one in found.found:
        if one.num_removed in SIZES:
            sets[one.rival][one.num_removed] = list(one.removed)
    ppl: dict[str, dict[int, float]] = {rival: {} for rival in rivals}
    for one in found.found:
        if one.num_removed in SIZES:
            ppl[one.rival][one.num_removed] = one.calibration_ppl
    costs = {c.rival: [c.masks, c.tokens, c.layer_forwards] for c in found.costs}
    return {
        "sets": sets,
        "calibration": ppl,
        "costs": costs,
        "full_ppl": found.full_calibration_ppl,
    }


# -- held out --------------------------------------------------------------------------------------


def chosen(steps: Steps) -> dict[tuple[int, str, int], tuple[int, ...]]:
    """(seed, rival, size) -> layers removed, of the steps that have ended."""
    found = {}
    for name, step in steps.done.items():
        if name.startswith("seed-"):
            seed = int(name.split("-")[1].split("/")[0])
            for rival, by_size in step["sets"].items():
                for size, removed in by_size.items():
                    found[seed, rival, int(size)] = tuple(removed)
    return found


def held_out(args: argparse.Namespace, steps: Steps) -> dict[str, dict[tuple[int, ...], Any]]:
    """Measure -> layers removed -> sums over windows `float64[N]` of losses, or accuracies; what is
    known already is not scored again."""
    sets = sorted({(), *chosen(steps).values()})
    players = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    cuts = _cuts(args)
    fresh = {
        name: [s for s in sets if _text(s) not in steps.heldout.get(name, {})] for name in cuts
    }
    if any(fresh.values()):
        engine = EngineConfig(model=str(args.model), progress_s=60.0)
        store = args.folder / "heldout.sqlite"
        longest = max(cut.length for cut in cuts.values())
        with ScoringSession(engine, cuts["gptq-2048"], store=store, longest=longest) as session:
            for name, cut in cuts.items():
                masks = [without(players, s) if s else full_mask(players) for s in fresh[name]]
                if not masks:
                    continue
                nll_MN = session.score(np.array(masks), cut, stage=name)["nll"]
                rows = [[round(float(nll), 4) for nll in row] for row in nll_MN]
                known = steps.heldout.setdefault(name, {})
                known.update(zip(map(_text, fresh[name]), rows, strict=True))
                steps.write()
    unknown = [s for s in sets if s and _text(s) not in steps.heldout.get(f"{TASKS[-1]} acc", {})]
    if unknown:
        evaluated = evaluate(
            EvalConfig(
                model=str(args.model),
                progress_s=60.0,
                sets=tuple(LayerSet(_text(s), s) for s in unknown),
                tasks=TASKS,
                include_path=str(DEMO / "tasks"),
                out=str(args.folder / "tasks"),
            )
        )
        for result in evaluated.results:
            if result.measure.endswith(" acc"):
                text = _text(tuple(map(int, result.removed)))
                steps.heldout.setdefault(result.measure, {})[text] = result.value
        steps.write()
    found: dict[str, dict[tuple[int, ...], Any]] = {
        f"tokens of {name}": {(): cut.num_tokens_N.astype(np.float64)} for name, cut in cuts.items()
    }
    for name, by_set in steps.heldout.items():
        found[name] = {
            tuple(map(int, text.split())): np.array(value) if name in cuts else value
            for text, value in by_set.items()
        }
    return found


def _text(removed: tuple[int, ...]) -> str:
    return " ".join(map(str, removed))


def _cuts(args: argparse.Namespace) -> dict[str, TokenWindows]:
    """Protocol -> its windows that are scored, spread evenly over the text."""
    tokenizer = load_tokenizer(str(args.model))
    cuts = {}
    for name, count in (("llm-pruner-128", args.short), ("gptq-2048", args.long)):
        protocol = replace(PROTOCOLS[name], bos="none")  # SmolLM2's tokenizer adds none
        windows = protocol_windows(str(args.heldout), tokenizer, protocol, name=name).windows
        rows = np.linspace(0, windows.num_windows - 1, min(count, windows.num_windows)).astype(int)
        cuts[name] = windows.select(np.unique(rows))
    return cuts


# -- the table -------------------------------------------------------------------------------------


def tables(args: argparse.Namespace, steps: Steps) -> list[str]:
    """Markdown: held-out perplexities, tasks, costs."""
    sets = chosen(steps)
    measured = held_out(args, steps)
    seeds = sorted({seed for seed, _, _ in sets})
    rivals = [r for r in (*OURS, *RIVALS, "paper") if any(rival == r for _, rival, _ in sets)]
    lines = []
    lines += _calibration_table(steps, rivals)
    for name in ("llm-pruner-128", "gptq-2048"):
        if name not in measured:  # not scored yet
            continue
        tokens_N, nll = measured[f"tokens of {name}"][()], measured[name]
        whole = np.exp(nll[()].sum() / tokens_N.sum())
        lines += [
            f"Perplexity on the held-out text, `{name}`, {len(tokens_N)} windows spread evenly "
            f"over it; whole model {whole:.2f}. Mean over seeds +- their standard deviation; in "
            "brackets the loss beyond `lpserve, settled`, in standard errors of its mean over "
            "windows (sums over seeds, paired): above 2 it is worse.",
            "",
            f"| search | {' | '.join(f'{r} removed' for r in SIZES)} |",
            "|---|" + "---:|" * len(SIZES),
        ]
        for rival in rivals:
            cells = [_cell(sets, nll, tokens_N, seeds, rival, size) for size in SIZES]
            lines.append(f"| {rival} | {' | '.join(cells)} |")
        lines.append("")
    for name, by_set in measured.items():
        if name.endswith(" acc"):
            lines += [
                f"Accuracy on `{name.removesuffix(' acc')}`; whole model {by_set[()]:.3f}.",
                "",
                f"| search | {' | '.join(f'{r} removed' for r in SIZES)} |",
                "|---|" + "---:|" * len(SIZES),
            ]
            for rival in rivals:
                cells = []
                for size in SIZES:
                    of = [by_set[sets[s, rival, size]] for s in seeds if (s, rival, size) in sets]
                    cells.append(_spread(of, 3) if of else "-")
                lines.append(f"| {rival} | {' | '.join(cells)} |")
            lines.append("")
    return [*lines, *_cost_table(steps, rivals)]


def _calibration_table(steps: Steps, rivals: list[str]) -> list[str]:
    """Perplexities on the windows that the sets were chosen on."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    whole = []
    for name, step in steps.done.items():
        if name.startswith("seed-"):
            whole.append(step["full_ppl"])
            for rival, by_size in step["calibration"].items():
                for size, ppl in by_size.items():
                    found[rival, int(size)].append(ppl)
    lines = [
        f"Perplexity on the calibration windows, which chose the sets; whole model "
        f"{np.mean(whole):.2f}. Races settle on further windows.",
        "",
        f"| search | {' | '.join(f'{r} removed' for r in SIZES)} |",
        "|---|" + "---:|" * len(SIZES),
    ]
    for rival in rivals:
        cells = [_spread(found[rival, r], 2) if found[rival, r] else "-" for r in SIZES]
        lines.append(f"| {rival} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(
    sets: dict[tuple[int, str, int], tuple[int, ...]],
    nll: dict[tuple[int, ...], Any],
    tokens_N: np.ndarray,
    seeds: list[int],
    rival: str,
    size: int,
) -> str:
    here = [seed for seed in seeds if (seed, rival, size) in sets]
    if not here:
        return "-"
    total = tokens_N.sum()
    text = _spread([float(np.exp(nll[sets[s, rival, size]].sum() / total)) for s in here], 2)
    both = [s for s in here if (s, OURS[1], size) in sets]
    if rival == OURS[1] or not both:
        return text
    gap_N = sum(nll[sets[s, rival, size]] - nll[sets[s, OURS[1], size]] for s in both)
    gap_N = np.asarray(gap_N) - 0.0
    error = float(gap_N.std(ddof=1) * np.sqrt(len(gap_N)))
    return f"{text} ({gap_N.sum() / error:+.1f})" if error else f"{text} (same)"


def _spread(values: list[float], digits: int) -> str:
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def _cost_table(steps: Steps, rivals: list[str]) -> list[str]:
    costs: dict[str, list[list[float]]] = defaultdict(list)
    for name, step in steps.done.items():
        if name.startswith("seed-"):
            for rival, cost in step["costs"].items():
                costs[rival].append(cost)
    greedy = np.mean([cost[2] for cost in costs["greedy"]]) if costs["greedy"] else np.nan
    lines = [
        f"What the searches took for all sizes up to {max(SIZES)}, mean over seeds.",
        "",
        "| search | masks | tokens | layer-forwards | of greedy's |",
        "|---|---:|---:|---:|---:|",
    ]
    for rival in rivals:
        masks, tokens, forwards = np.mean(costs[rival], axis=0)
        share = f"{forwards / greedy:.0%}"
        lines.append(f"| {rival} | {masks:,.0f} | {tokens:,.0f} | {forwards:,.0f} | {share} |")
    seconds = "; ".join(f"{name} {step['step_seconds']:.0f} s" for name, step in steps.done.items())
    return [*lines, "", f"Steps, each with all that it scored and stored: {seconds}."]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="lpserve and its rivals on a real LLM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint folder (`scripts/real-model`)")
    add("--heldout", type=Path, required=True, help="held-out text, WikiText-2's test split say")
    add("--folder", type=Path, required=True, help="where scores and steps are kept")
    add("--seeds", type=int, default=3)
    add("--budget", type=int, default=100, help="lpserve's masks")
    add("--max-windows", type=int, default=40, help="of lpserve's races, those before included")
    add("--rival-budget", type=int, default=300, help="masks of each rival; greedy takes 295")
    add("--paper-budget", type=int, default=1000, help="masks of the paper's pipeline")
    add("--short", type=int, default=128, help="held-out windows of 128 tokens")
    add("--long", type=int, default=8, help="held-out windows of 2048 tokens")
    add("--steps", type=Path, help="what has ended, to go on from (FOLDER/steps.json)")
    add("--table", action="store_true", help="no search: the table of those that have ended")
    add("--out", type=Path, help="markdown file to write to")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    steps = Steps(args.steps or args.folder / "steps.json")
    if not args.table:
        for seed in range(args.seeds):
            steps.do(f"seed-{seed}/lpserve", lambda seed=seed: ours(args, seed))
            steps.do(
                f"seed-{seed}/rivals",
                lambda seed=seed: theirs(args, seed, RIVALS, args.rival_budget),
            )
        for seed in range(args.seeds):
            steps.do(
                f"seed-{seed}/paper",
                lambda seed=seed: theirs(args, seed, ("paper",), args.paper_budget),
            )
    head = ["# A real LLM", "", f"- date: {date.today()}", *machine_lines(2)]
    about = (
        f"{args.model.name}, float32; sets chosen on {NUM_WINDOWS} windows of {LENGTH} tokens of "
        f"the bundled text (Sherlock Holmes), held out on {args.heldout.name}. lpserve: "
        f"{args.budget} masks, races on up to {args.max_windows} windows; rivals at most "
        f"{args.rival_budget} masks, the paper's pipeline {args.paper_budget:,}."
    )
    publish([*head, "", about, "", *tables(args, steps)], args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
