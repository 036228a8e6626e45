"""`lpserve speed`: pruned checkpoints in use, beside the dense one."""

from __future__ import annotations

import argparse
from typing import Any

from lpserve.cli.arguments import option

_HELP = """\
Latency, throughput and memory of checkpoints in transformers and vLLM, each in a fresh process with
the same random prompts; the first checkpoint is what the others are compared with.

  lpserve speed Llama-2-7b pruned-6 pruned-12 --engines transformers,vllm
"""


def add_speed(commands: Any) -> None:
    """Define `lpserve speed`."""
    command = commands.add_parser(
        "speed",
        help="latency, throughput and memory of pruned checkpoints in use",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_speed)
    add = command.add_argument
    add("models", nargs="+", metavar="DIR", help="checkpoint folders, the dense one first")
    add("--engines", help="transformers (default), vllm, or both with a comma")
    add("--dtype", help="bfloat16 (default), float16, float32")
    add("--device", help="auto (default) or cpu")
    add("--prompt-tokens", type=int, help="tokens of a prompt (128)")
    add("--new-tokens", type=int, help="tokens to generate (64)")
    add("--batch", type=int, help="requests of the batch (16)")
    add("--repeats", type=int, help="timed repeats, of which the median is reported (3)")
    add(
        "--vllm-option",
        action="append",
        metavar="KEY=VALUE",
        type=option,
        help="any argument of vllm.LLM, such as enforce_eager=true",
    )


def _speed(arguments: argparse.Namespace) -> int:
    from lpserve.evaluation.speed import SpeedConfig, measure, table

    keys = ("dtype", "device", "prompt_tokens", "new_tokens", "batch", "repeats")
    values: dict[str, Any] = {
        k: getattr(arguments, k) for k in keys if getattr(arguments, k) is not None
    }
    if arguments.engines:
        values["engines"] = tuple(e.strip() for e in arguments.engines.split(",") if e.strip())
    config = SpeedConfig(
        models=tuple(arguments.models), vllm_options=dict(arguments.vllm_option or []), **values
    )
    speeds = measure(config)
    print("\n".join(table(speeds)))
    print(
        f"\n{config.prompt_tokens} prompt and {config.new_tokens} new tokens, batch of "
        f"{config.batch}, {config.dtype}, {speeds[0].device}, {speeds[0].threads} threads; medians "
        f"of {config.repeats}"
    )
    return 0
