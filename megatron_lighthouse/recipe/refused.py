"""What several checks refuse, said at once: the first does not hide the others. Imports nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Refused:
    """What was refused so far."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def ask[**Given, Answer](self, check: Callable[Given, Answer], *given: Given.args, **named: Given.kwargs) -> Answer | None:
        """What `check` answers; None where it raises ValueError, which is kept."""
        try:
            return check(*given, **named)
        except ValueError as error:
            self.said.append(str(error))
            return None

    def end(self) -> None:
        """Raises ValueError where something was refused: all of it, each on lines of its own."""
        raise_all(self.said)


def raise_all(said: Iterable[str]) -> None:
    """Raises ValueError where anything is said: each once, on lines of its own."""
    if found := [*dict.fromkeys(said)]:
        raise ValueError("\n".join(found))
