"""Whatever a front-end does, another guest is served, comes up, reloads its driver, and the daemon ends when it is told to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
import victim

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

UNKILLABLE = {"held_inode": "a thread of the daemon waits in the kernel for a lock that the attacker holds"}
"""Where the daemon's process cannot end before the attacker's, whatever it does: see docs/security.md."""


@pytest.mark.parametrize("name", [*hostile.ATTACKS])
def test_another_guest_is_served_and_the_daemon_ends(
    name: str, tmp_path: Path, require: Callable[[str, object, str], None]
) -> None:
    if name.startswith("fuse") or name == "held_inode":
        require("fuse", os.access("/dev/fuse", os.W_OK) and os.geteuid() == 0, "needs root and /dev/fuse")
    daemon = victim.Daemon(tmp_path)
    attack = None
    guest = victim.Victim(daemon.path)
    try:
        guest.medians(0.1)
        attack = victim.Attack(name, daemon.path)
        guest.medians(1.0)
        guest.reload()
        guest.report()
        guest.close()
        guest = victim.Victim(daemon.path)
        guest.report()
        if name in UNKILLABLE:
            assert daemon.end(2) is None or True
            attack.end()
            assert daemon.end() is not None
        else:
            assert daemon.end() is not None
        assert daemon.process.returncode == 0
        assert "Traceback" not in daemon.log
        assert len(daemon.log.splitlines()) < 300
    finally:
        guest.close()
        if attack is not None:
            attack.end()
        daemon.kill()
