"""Tells filesystems of this host alone from those that other hosts may share."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Every process that can reach a file on these sees its locks and its memory maps.
_LOCAL = frozenset(
    [
        *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "nilfs2"),
        *("reiserfs", "tmpfs", "ramfs", "rootfs", "overlay", "aufs", "apfs", "hfsplus", "ntfs3"),
        *("exfat", "vfat", "msdos"),
    ]
)
_MOUNTINFO = Path("/proc/self/mountinfo")


def is_shared(path: Path) -> bool:
    """Whether other hosts may see `path`, because its filesystem is not known to be local.

    On a system without /proc/self/mountinfo every path counts as local.
    """
    try:
        mountinfo = _MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    kind = filesystem_type(mountinfo, os.path.realpath(path))
    return kind is not None and kind not in _LOCAL


def filesystem_type(mountinfo: str, path: str) -> str | None:
    """The type of the filesystem that holds a path, such as "ext4"; None where it is not listed.

    Mounts are followed from the root down, as the kernel does: the longest mount point that
    matches could be hidden under a later mount.

    Args:
        mountinfo: the text of /proc/self/mountinfo.
        path: absolute and without symbolic links.
    """
    mounts: dict[tuple[str, str], tuple[str, str]] = {}
    ids: set[str] = set()
    for line in mountinfo.splitlines():
        fields, _, about = line.partition(" - ")
        number, parent, _, _, point = fields.split(" ")[:5]
        mounts[parent if parent != number else "", _unescaped(point)] = number, about.split(" ")[0]
        ids.add(number)
    roots = [parent for parent, point in mounts if point == "/" and parent not in ids]
    if not roots:
        return None
    inside, kind = roots[0], None
    names = [name for name in path.split("/") if name]
    for depth in range(len(names) + 1):
        here = "/" + "/".join(names[:depth])
        while (inside, here) in mounts:  # one mount may cover another on the same point
            inside, kind = mounts[inside, here]
    return kind


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
