"""Which ranks share a machine, and whether machines may write one file at a time."""

import os
import re
from pathlib import Path

from reshard.distributed import Ranks

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MOUNTS = Path("/proc/self/mountinfo")
# File systems whose clients keep their page caches the same, by their documentation.
COHERENT = frozenset(("lustre", "gpfs", "ceph", "gfs2", "ocfs2"))


def machine() -> str:
    """What tells this machine from others: ranks in several containers of one share its cache."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`, which need not exist yet.

    `mounts` is the text of /proc/self/mountinfo (proc(5)): the fifth field is a mount point, and
    the first one after the dash a type. Of those on one path the last one is seen.
    """
    resolved, found = os.path.realpath(path), (0, "")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), before.split()[4])
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= found[0]:
            found = len(point), after.split()[0]
    return found[1]


def machines_apart(ranks: Ranks, target: Path, shared_files: str) -> tuple[int, ...]:
    """The number of each rank's machine, where no two machines may write one file; else ().

    Two that write one page of a file at a time may undo each other's bytes where a file system does
    not keep its clients' caches the same: NFS says so, and of others it is not known.
    """
    if ranks.world == 1:
        return ()
    try:
        # Names of mounts are bytes, as those of files are.
        mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
        coherent = file_system(target, mounts) in COHERENT
    except OSError:
        coherent = False
    found = ranks.gather((machine(), coherent))
    names = [name for name, _ in found]
    apart = shared_files == "never" or not all(same for _, same in found)
    if shared_files == "always" or len(set(names)) == 1 or not apart:
        return ()
    return tuple(names.index(name) for name in names)
