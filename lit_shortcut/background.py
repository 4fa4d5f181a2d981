"""Background threads: this project's only idiom for threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Pool of ``threads`` that returns results of jobs in the order of submission."""

    def __init__(self, threads: int = 1) -> None:
        self._threads, self._jobs = ThreadPoolExecutor(threads), deque[Future[Result]]()

    def submit(self, job: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Queue ``job(*arguments)``; return its future, for jobs that need the result of this one."""
        self._jobs.append(future := self._threads.submit(job, *arguments))
        return future

    def results(self, leave: int = 0) -> Iterator[Result]:
        """Yield results, oldest first, until at most ``leave`` jobs are left; wait for running jobs.

        If a job raised an exception, raise it in place of its result.
        """
        while len(self._jobs) > leave:
            yield self._jobs.popleft().result()

    def close(self, *, cancel: bool = False) -> None:
        """Wait for all jobs; ``cancel`` drops jobs that have not begun."""
        self._threads.shutdown(cancel_futures=cancel)
