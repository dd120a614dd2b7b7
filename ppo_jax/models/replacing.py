"""A finished directory in the place of an older one."""

import os
import shutil
import uuid
from pathlib import Path


def swap(partial: Path, target: Path) -> None:
    """Puts the directory `partial` in the place of `target`; what was there is removed.

    Where that fails, `target` is as it was, and OSError is raised. Both lie in one directory.
    """
    old = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:8]}"
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    except BaseException:  # also where the user interrupts between the two
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
