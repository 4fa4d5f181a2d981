"""Work in the background: the one idiom for threads in this project."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Runs jobs in ``threads`` of its own and hands back their results in the order the jobs were submitted."""

    def __init__(self, threads: int = 1) -> None:
        self._threads, self._jobs = ThreadPoolExecutor(threads), deque[Future[Result]]()

    def submit(self, job: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Queue ``job(*arguments)``; return its future, for jobs that need the result of this one."""
        self._jobs.append(future := self._threads.submit(job, *arguments))
        return future

    def results(self, leave: int = 0) -> Iterator[Result]:
        """Yield results, oldest first, until at most ``leave`` jobs are left; wait for those that still run.

        An exception of a job is raised in its turn.
        """
        while len(self._jobs) > leave:
            yield self._jobs.popleft().result()

    def close(self, *, cancel: bool = False) -> None:
        """Wait for all jobs; ``cancel`` drops those that have not begun."""
        self._threads.shutdown(cancel_futures=cancel)
