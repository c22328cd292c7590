"""`balloon serve`, steered: each line on standard input is a target in MiB for all guests."""

from __future__ import annotations

import asyncio
import sys
import threading

from balloon import cli
from balloon.serve import Server


class Steered(Server):
    """A server that takes targets from standard input."""

    async def run(self) -> None:
        """Serve, and listen to standard input meanwhile."""
        threading.Thread(target=self._listen, args=(asyncio.get_running_loop(),), daemon=True).start()
        await super().run()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(self.set_target, int(line) << 20)


cli.Server = Steered  # type: ignore[misc]
sys.exit(cli.main(sys.argv[1:]))
