"""A roomy stack for tests that trace: under Python 3.11 it makes tracing in a test process up to four times cheaper.

Python 3.11 keeps its frames in pieces of 16 KiB, and gives a piece back to the system as soon as it is left. A loop
that happens to run at the rim of a piece then asks for memory at every call; how deep the stack lies decides, and
pytest-xdist lies deep. A frame that wants more than a piece gets one of its own size, in which all that it calls fits.
"""

from __future__ import annotations

from collections.abc import Callable

_SLOTS = 2**16  # of 8 bytes each


def _make() -> Callable[[Callable[[], object]], object]:
    # The display is never made; that it could be is why the frame is large.
    source = f'def roomy(call):\n    return call() if call is not None else ({"call, " * _SLOTS})\n'
    names: dict = {}
    exec(source, names)
    return names['roomy']


roomy = _make()
