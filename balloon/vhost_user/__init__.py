"""vhost-user, the back-end's side: bytes and fds in, bytes and actions out.

`messages` is the codec, `backend` the state machine. Neither holds an fd, a clock or a thread, and neither
ever waits: `balloon.session` has the socket.
"""

from __future__ import annotations

from balloon.vhost_user.actions import (
    Action,
    MapRegion,
    MapTable,
    NotifyConfig,
    Quiesce,
    Reply,
    Rest,
    SetCall,
    SetChannel,
    SetErr,
    SetKick,
    SignalErr,
    Start,
    UnmapRegion,
    Waiting,
    Warn,
)
from balloon.vhost_user.backend import Backend
from balloon.vhost_user.messages import Header, Message, ProtocolFeature, Request

__all__ = [
    "Action",
    "Backend",
    "Header",
    "MapRegion",
    "MapTable",
    "Message",
    "NotifyConfig",
    "ProtocolFeature",
    "Quiesce",
    "Reply",
    "Request",
    "Rest",
    "SetCall",
    "SetChannel",
    "SetErr",
    "SetKick",
    "SignalErr",
    "Start",
    "UnmapRegion",
    "Waiting",
    "Warn",
]
