"""Names of the ports through which parts read, and of the sets of writers that a question may ask about."""

from __future__ import annotations

from typing import Literal

HeadPort = Literal["Q", "K", "V"]
Port = Literal["Q", "K", "V", "gate", "up", "in", "unembed"]
Writers = Literal["heads", "all"]

HEAD_PORTS: tuple[HeadPort, ...] = ("Q", "K", "V")
PORTS: tuple[Port, ...] = (*HEAD_PORTS, "gate", "up", "in", "unembed")
