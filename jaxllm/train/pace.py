"""What long work does now and then."""

from __future__ import annotations

import time

_SECONDS = 30.0


class Pace:
    """Tells when something is due that is done every half minute, the first time after the first one."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _SECONDS

    def is_due(self) -> bool:
        """Tell whether it is time; if so, the next time is counted from now."""
        if time.monotonic() <= self._next:
            return False
        self._next = time.monotonic() + _SECONDS
        return True
