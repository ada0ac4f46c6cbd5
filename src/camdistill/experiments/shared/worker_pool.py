"""Runs jobs on several processes of one thread each; a process that dies costs its own job."""

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, NamedTuple, TypeVar

import torch

from camdistill.errors import UserError

JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")
TRIES = 2  # a job that kills its process twice would kill the next one too


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: Connection


class _Mistake(NamedTuple):
    """A user's mistake that a worker found."""

    message: str


class WorkerPool(Generic[JobT, ResultT]):
    """Processes that do jobs; they start with the first job and end with the `with` block.

    Args:
        work: Does a job; of a module, so that another process finds it. Jobs and results are sent
            through pipes.
        count: Processes; with 0, jobs are done in this one, in their order.
    """

    def __init__(self, work: Callable[[JobT], ResultT], count: int) -> None:
        self._work = work
        self._count = count
        self._waiting: deque[tuple[JobT, int]] = deque()
        self._at: dict[_Worker, tuple[JobT, int]] = {}
        self._idle: list[_Worker] = []

    def __enter__(self) -> "WorkerPool[JobT, ResultT]":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._at, *self._idle):
            worker.pipe.close()
            worker.process.terminate()
            worker.process.join()
        self._at, self._idle = {}, []

    def results(self, jobs: Sequence[JobT]) -> Iterator[tuple[JobT, ResultT]]:
        """Jobs with their results, in the order in which they are done.

        Raises:
            UserError: What the work raised as such, or a job killed its process twice.
            RuntimeError: The work raised something else; its process printed the traceback.
        """
        if self._count == 0:
            for job in jobs:
                yield job, self._work(job)
            return
        self._waiting.extend((job, 1) for job in jobs)
        failed: Exception | None = None
        while self._at or (self._waiting and failed is None):
            if failed is None:
                self._hand_out()
            pipes: dict[object, _Worker] = {worker.pipe: worker for worker in self._at}
            for ready in wait([worker.pipe for worker in self._at]):
                worker = pipes[ready]
                job, tries = self._at.pop(worker)
                try:
                    answer = worker.pipe.recv()
                except (EOFError, OSError):
                    grave = self._bury(worker, job, tries)
                    failed = failed or grave
                    continue
                self._idle.append(worker)
                if isinstance(answer, _Mistake):
                    failed = failed or UserError(answer.message)
                else:
                    yield job, answer
        if failed is not None:  # what the other processes had begun is done
            self._waiting.clear()
            raise failed

    def _hand_out(self) -> None:
        while self._waiting and (self._idle or len(self._at) < self._count):
            self._give(self._idle.pop() if self._idle else self._start_worker())

    def _give(self, worker: _Worker) -> None:
        job, tries = self._waiting.popleft()
        self._at[worker] = job, tries
        # One that died while it was idle is found out when its answer is awaited.
        with contextlib.suppress(OSError):
            worker.pipe.send(job)

    def _bury(self, worker: _Worker, job: JobT, tries: int) -> Exception | None:
        """Lets the job of a process that died be done again; what to raise if that won't help."""
        worker.pipe.close()
        worker.process.join()
        if worker.process.exitcode == 1:  # Python's, after it printed the traceback
            return RuntimeError("a run failed in its process; its traceback stands above")
        if tries == TRIES:
            return UserError(
                f"the process of a run was killed {TRIES} times (exit code "
                f"{worker.process.exitcode}); if memory is short, take fewer --workers. What is "
                "done is kept: the same command goes on"
            )
        self._waiting.appendleft((job, tries + 1))
        return None

    def _start_worker(self) -> _Worker:
        context = multiprocessing.get_context("spawn")  # a fork of threads hangs
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(self._work, there), daemon=True)
        with _without_interrupts():
            process.start()
        there.close()
        return _Worker(process, here)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start here ignore Ctrl-C, which reaches the whole group: they are ended."""
    if threading.current_thread() is not threading.main_thread():  # it has no signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _serve(work: Callable[[JobT], ResultT], pipe: Connection) -> None:
    """A process: takes jobs until the pipe is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
        answer: ResultT | _Mistake
        try:
            answer = work(job)
        except UserError as error:
            answer = _Mistake(str(error))
        except KeyboardInterrupt:
            return
        with contextlib.suppress(OSError):  # the first process was killed: nobody waits
            pipe.send(answer)
