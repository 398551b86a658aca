"""Trust: whether nobody else decides what lies in a folder whose programs we are about to run, or whose data we keep.

As ssh's StrictModes: it and all above it belong to us or to root, and no other may write there. Only the standard
library is used, for scripts/inv, too.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def doubt(folder: Path, root: Path) -> str:
    """Say who else decides what lies in this folder, whether it exists or not; "" where nobody does.

    root: the checkout. Whoever owns it, or may write to it, writes what runs here anyway: in a container that is often
    another user than ours. Whoever owns / is root, by whatever number.
    """
    home = root.stat()
    trusted = {os.geteuid(), home.st_uid, Path("/").stat().st_uid}
    for start in (folder, Path(os.path.realpath(folder))):  # a link on the way may be another's
        within = [place for place in (start, *start.parents) if root in place.parents]
        for place in within or (start, *start.parents):
            try:
                found = place.stat()
            except OSError:
                continue  # what is not there yet, we make; what we may not look at, we cannot use
            if found.st_uid not in trusted:
                return f"{place} belongs to another user ({found.st_uid})"
            each_keeps_his = found.st_mode & stat.S_ISVTX and place != start  # as in /tmp
            mode = found.st_mode & ~(home.st_mode if within else 0)
            is_open = mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _is_alone(found))
            if is_open and not each_keeps_his:
                return f"others may write to {place} ({stat.filemode(found.st_mode)})"
    return ""


def _is_alone(found: os.stat_result) -> bool:
    """Tell whether the group is the owner's own, as most systems make one for each user, with a umask of 002."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    users = {user.pw_name for user in pwd.getpwall() if user.pw_gid == found.st_gid}
    return group.gr_name == owner.pw_name and users.union(group.gr_mem) <= {owner.pw_name}
