"""`make attacks`: what a good guest notices of each attack, as a table.

Medians of a guest that reports a page and reads its configuration, before and during the attack, and how long the daemon took to end
on SIGTERM while the attack went on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import hostile
import victim

LIMIT = 3.0


def measure(name: str, seconds: float, folder: Path) -> str:
    """Return the row of one attack."""
    daemon = victim.Daemon(folder)
    attack = None
    try:
        guest = victim.Victim(daemon.path)
        guest.medians(0.5)
        quiet = guest.medians(seconds)
        guest.worst = 0.0
        try:
            attack = victim.Attack(name, daemon.path)
        except RuntimeError as error:
            return f"| {name} | {str(error)[-300:]!r} | | | | | | | |"
        try:
            cpu, start = daemon.cpu_seconds, time.monotonic()
            noisy = guest.medians(seconds)
            cpu = (daemon.cpu_seconds - cpu) / (time.monotonic() - start)
        except Exception as error:
            return f"| {name} | not served: {error!r} | | | | | |"
        ratios = [during / before for during, before in zip(noisy, quiet, strict=True)]
        ended = daemon.end(5)
        verdict = "yes" if max(ratios) <= LIMIT and ended is not None and ended <= 1 else "NO"
        cells = [
            name,
            *(f"{quiet[n] * 1e6:.0f} | {noisy[n] * 1e6:.0f} | {ratios[n]:.1f}" for n in range(2)),
            f"{guest.worst * 1e3:.0f}",
            f"{cpu:.0%}",
            "does not end" if ended is None else f"{ended:.2f}",
            verdict,
        ]
        guest.close()
        return f"| {' | '.join(cells)} |"
    finally:
        if attack is not None:
            attack.end()
        daemon.kill()


def main(arguments: list[str]) -> int:
    """Print the table of the attacks that are named, or of all."""
    out = sys.stdout
    out.write(
        "| attack | kick to call, quiet (µs) | attacked (µs) | ratio | GET_CONFIG, quiet (µs) | attacked (µs) | ratio "
    )
    out.write(
        "| longest wait (ms) | CPU of the daemon | SIGTERM (s) | within 3 x and 1 s |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for name in arguments or hostile.ATTACKS:
        with tempfile.TemporaryDirectory(prefix="attack-") as folder:
            out.write(measure(name, 4.0, Path(folder)) + "\n")
            out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
