"""Work that a thread does while the program goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Check = Callable[[], None]  # raises where the work is no longer wanted


class Unwanted(Exception):
    """Ends work of which nobody waits for the end."""


class Background:
    """A piece of work. It is given a `Check`, to be called between its parts."""

    def __init__(self, work: Callable[[Check], None]) -> None:
        self._work = work
        self._error: Exception | None = None
        self._is_wanted = True
        self._thread = threading.Thread(target=self._run, daemon=True, name="background")

    @contextmanager
    def running(self) -> Iterator[None]:
        """It has ended behind the context: by itself, or on an error or an interrupt here at its next check."""
        self._thread.start()
        try:
            yield
        except BaseException:
            self._is_wanted = False
            raise
        finally:
            self._thread.join()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return not self._thread.is_alive()

    def wait(self) -> Exception | None:
        """Until it has ended; what it failed by."""
        self._thread.join()
        return self._error

    def _run(self) -> None:
        try:
            self._work(self._check)
        except Exception as error:  # told to whoever waits
            self._error = error

    def _check(self) -> None:
        if not self._is_wanted:
            raise Unwanted
