"""Who is at fault, as exception types.

::

    BalloonError
     +- ConfigError(ValueError)      the embedder asked for something impossible
     +- StateError(RuntimeError)     right call, wrong moment
     +- GuestError                   the driver broke the standard: queue, head, section
     |   +- RingError                the ring is corrupt: the device needs a reset
     |   +- PayloadError             one buffer makes no sense: counted and acknowledged
     +- PeerError                    the vhost-user front-end broke its protocol
     +- ReclaimError(OSError)        the kernel refused
"""

from __future__ import annotations

__all__ = [
    "BalloonError",
    "ConfigError",
    "GuestError",
    "PayloadError",
    "PeerError",
    "ReclaimError",
    "RingError",
    "StateError",
]


class BalloonError(Exception):
    """The root of everything that this library raises on purpose."""


class ConfigError(BalloonError, ValueError):
    """The embedder asked for something that cannot be."""


class StateError(BalloonError, RuntimeError):
    """The call is right, the moment is not."""


class GuestError(BalloonError):
    """The driver in the guest broke the standard.

    `queue` is the queue's index or None, `head` the head of the chain or None, `section` the section of
    the standard that the driver broke.
    """

    def __init__(
        self, message: str, *, queue: int | None = None, head: int | None = None, section: str = ""
    ) -> None:
        where = "" if queue is None else f"queue {queue}"
        if head is not None:
            where += f"{', ' if where else ''}head {head}"
        text = f"{where}: {message}" if where else message
        super().__init__(f"{text} ({section})" if section else text)
        self.queue = queue
        self.head = head
        self.section = section


class RingError(GuestError):
    """The ring itself is corrupt: the device needs a reset."""


class PayloadError(GuestError):
    """One buffer makes no sense; it was counted and acknowledged, and the device goes on."""


class PeerError(BalloonError):
    """The vhost-user front-end broke the protocol; its connection has to be closed."""


class ReclaimError(BalloonError, OSError):
    """The kernel refused to take memory back."""
