"""What a strategy returns. Importable without torch."""

from collections.abc import Callable


class Handle:
    """What a strategy returns: it knows how to take the strategy back."""

    def __init__(self):
        self._undos: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Take everything back, the last change first. A second call does nothing.

        Raises RuntimeError if another strategy was applied on top in the meantime: undo that one first.
        """
        while self._undos:
            self._undos[-1]()
            self._undos.pop()
