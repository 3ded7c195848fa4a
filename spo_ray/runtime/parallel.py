"""Independent calls in parallel threads; an interrupt or a failure does not wait for the other calls."""

import queue
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.2


def run_parallel(calls: Mapping[str, Callable[[], T]], limit: int) -> dict[str, T]:
    """Run the calls, at most ``limit`` at a time, and return their results by name.

    Raises the first failure, or Ctrl-C, at once: no further call starts, and calls under way are abandoned in their
    daemon threads. (An executor of the standard library would wait for them.)
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in calls:
        waiting.put(name)
    results: dict[str, T] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results[name] = calls[name]()
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(limit, len(calls)))]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not errors:
            for thread in threads:
                thread.join(POLL_S)
    except BaseException as error:
        errors.append(error)
    if errors:
        raise errors[0]
    return {name: results[name] for name in calls}
