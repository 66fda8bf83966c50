"""A backoff by which two attempts are made, however slow the machine is."""


class TwoAttempts:
    """Waits a moment after the first failure, and after the second one for longer than any budget."""

    def __init__(self, *_: float, **__: float) -> None:
        self._waits = iter((0.1, 3600.0))

    def next_seconds(self) -> float:
        return next(self._waits)
