"""The Ray cluster: joining it, what an engine needs, how many fit, and nodes that come and go.

One engine is one actor. An actor's GPUs are always on one node, which is what tensor parallelism
wants; an engine larger than a node (`pipeline_parallel_size`) gets a placement group with a bundle
for each GPU, which vLLM's Ray executor takes over, as few nodes as can be.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lpserve.engine.registry import engine_kind
from lpserve.errors import InputError, RunInterrupted, typed_first_line
from lpserve.types import EngineSpec

WATCH_S = 2.0
"""Seconds between two looks at which nodes are there."""
_ANSWER_S = 5.0  # for a cluster to take a connection
_PROCESS_BYTES = 1 << 30
_WEIGHTS_FACTOR = 1.3


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """The resources that one engine takes of the cluster."""

    cpus: float
    gpus: int
    memory_bytes: int
    """Reserved on a node without GPUs, for the weights; 0: nothing is reserved."""
    nodes: int = 1
    """Nodes that its GPUs are spread over, in equal parts."""

    @property
    def spread(self) -> bool:
        return self.nodes > 1

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU"]
        if self.gpus:
            where = f" on {self.nodes} nodes" if self.spread else ""
            parts.append(f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}{where}")
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / 2**30:.1f} GiB of memory")
        return " and ".join(parts)


def connect() -> bool:
    """Join the Ray cluster that `RAY_ADDRESS` or this machine names, else start one here.

    Returns whether it is this process's to end.

    Raises:
        InputError: `RAY_ADDRESS` names a cluster that cannot be joined.
        RunInterrupted: SIGTERM came meanwhile.
    """
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    main = threading.current_thread() is threading.main_thread()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        _join(quiet)
    except SystemExit:  # Ray's own way to end on SIGTERM
        raise RunInterrupted("interrupted before anything was scored") from None
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    return True


def _join(quiet: dict[str, Any]) -> None:
    named = os.environ.get("RAY_ADDRESS")
    if not named and _left_behind():
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    try:
        ray.init(address="auto", **quiet)
    except Exception as error:
        if named:
            raise InputError(
                f"no Ray cluster at RAY_ADDRESS={named}: {typed_first_line(error)}"
            ) from None
        if not isinstance(error, ConnectionError):
            raise InputError(
                f"the Ray cluster here cannot be joined: {typed_first_line(error)}"
            ) from None
        ray.init(include_dashboard=False, **quiet)


def _left_behind() -> bool:
    """Whether the address that Ray would join is that of a cluster that has ended.

    Ray would try for many minutes where the machine's own address has changed since, as after a
    reboot.
    """
    path = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        host, _, port = path.read_text(encoding="utf-8").strip().rpartition(":")
    except OSError:
        return False
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S):
            return False
    except (OSError, ValueError):
        return True


def needs_of(spec: EngineSpec) -> Needs:
    """What an engine of this spec takes of the cluster that is joined."""
    wants = engine_kind(spec.kind).resources(spec)
    memory_bytes = 0
    if wants.weight_bytes:
        workers = wants.ranks * wants.stages
        memory_bytes = int(_WEIGHTS_FACTOR * wants.weight_bytes) + workers * _PROCESS_BYTES
    on_gpu = wants.may_use_gpu and _largest("GPU") > 0
    return _placed(wants.ranks, wants.stages, on_gpu=on_gpu, memory_bytes=memory_bytes)


def _placed(ranks: int, stages: int, *, on_gpu: bool, memory_bytes: int) -> Needs:
    if not on_gpu:
        return Needs(cpus=float(ranks * stages), gpus=0, memory_bytes=memory_bytes)
    gpus = ranks * stages
    nodes = 1 if gpus <= _largest("GPU") else stages
    return Needs(cpus=1.0, gpus=gpus, memory_bytes=0, nodes=nodes)


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _largest(resource: str) -> float:
    return max((node.get(resource, 0.0) for node in _nodes()), default=0.0)


def capacity(needs: Needs) -> int:
    """How many engines the present nodes can hold if nothing else runs on them."""
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus / needs.nodes, "memory": needs.memory_bytes}
    if needs.spread:
        wanted["CPU"] = 0.0
    held = sum(
        int(min(node.get(kind, 0.0) // amount for kind, amount in wanted.items() if amount))
        for node in _nodes()
    )
    return held // needs.nodes


def check_room(needs: Needs) -> None:
    """Raise InputError where not one engine fits on the present nodes."""
    if capacity(needs):
        return
    largest = {"GPU": _largest("GPU"), "CPU": _largest("CPU"), "memory": _largest("memory") / 2**30}
    raise InputError(
        f"an engine needs {needs}, and no node of the Ray cluster has room for it (the largest: "
        f"{largest['CPU']:g} CPU, {largest['GPU']:g} GPUs, {largest['memory']:.1f} GiB): lower "
        "tensor_parallel_size or pipeline_parallel_size, or add nodes"
    )


class Place:
    """The resources reserved for one engine, until `release`, and the options of its actor."""

    def __init__(self, needs: Needs) -> None:
        self._group: PlacementGroup | None = None
        self.options: dict[str, Any] = {"num_cpus": needs.cpus, "num_gpus": needs.gpus}
        if needs.memory_bytes:
            self.options["memory"] = needs.memory_bytes
        if needs.spread:
            bundles = [{"GPU": 1.0} for _ in range(needs.gpus)]
            bundles[0]["CPU"] = needs.cpus
            self._group = placement_group(bundles, strategy="PACK")
            self.options["num_gpus"] = 0  # vLLM's workers take the bundles' GPUs
            self.options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=self._group,
                placement_group_bundle_index=0,
                placement_group_capture_child_tasks=True,
            )

    def num_nodes(self) -> int:
        """Over how many nodes the resources are spread, once they are reserved."""
        if self._group is None:
            return 1
        return len(set(placement_group_table(self._group)["bundles_to_node_id"].values()))

    def release(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)


class Watcher:
    """Watches for nodes that come or go, on a thread of its own, so that nobody waits for Ray.

    Args:
        changed: called from that thread with the nodes' ids and the number of engines that they
            can hold, whenever nodes came or went.
    """

    def __init__(self, needs: Needs, changed: Callable[[frozenset[str], int], None]) -> None:
        self._needs, self._changed = needs, changed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lpserve-nodes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        before = None
        while not self._stop.wait(WATCH_S):
            try:
                now = frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
                engines = capacity(self._needs)
            except Exception:  # the cluster's head does not answer: units will say so
                continue
            if now != before:
                self._changed(now, engines)
            before = now
