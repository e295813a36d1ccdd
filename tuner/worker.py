"""Child processes that may crash or hang without taking the search with them.

A candidate kernel can abort the compiler, poison the CUDA context or never return. So compiling and measuring run in
children; a call that dies or outlives its time ends as `WorkerDied`, the child is replaced, and the search goes on with
one more rejected candidate. Children are forked from a server that has imported PyTorch, which takes seconds, and has
never touched a GPU.
"""

import itertools
import math
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from fp4suite import registry

START_S = 120.0  # importing torch, triton and cutlass on a busy machine
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", f"{__package__}.measure"])  # not Triton: its import asks whether to interpret


class WorkerDied(RuntimeError):
    """The child ended or was ended: `reason` is one word ("crash", "timeout"), the message says more."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class StartFailed(RuntimeError):
    """The child did not come up: something is wrong with the installation, not with a candidate."""


class RemoteError(RuntimeError):
    """The call raised: `kind` is the exception's type name, the message its text."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """One child that runs functions by reference, one at a time. Started with the first call and after each death."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self._environment = environment or {}
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._deadline = 0.0
        self._allowed = 0.0
        self._outcome: tuple[bool, Any] | None = None
        self._up = False

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """`function(*args)` in the child. Raises WorkerDied, or RemoteError for what the function raised."""
        self.start(function, *args, timeout=timeout)
        while not self.advance(self.pipe.poll(self.remaining)):
            pass
        return self.result()

    def start(self, function: Callable[..., Any], *args: Any, timeout: float) -> None:
        """Begin a call; `advance` until it has ended, then `result`. Its time runs from when the child is up."""
        fresh = self._ensure()
        self._allowed = timeout
        self._deadline = time.monotonic() + (START_S if fresh else timeout)
        self._outcome = None
        self.pipe.send((function, args))

    def wake(self) -> None:
        """Start the child before there is a call, so that it imports meanwhile."""
        self._ensure()

    @property
    def pipe(self) -> Connection:
        """Readable when there is something for `advance` to see."""
        assert self._pipe is not None, "no call was started"
        return self._pipe

    @property
    def remaining(self) -> float:
        """Seconds until the running call is overdue, at least 0."""
        return max(0.0, self._deadline - time.monotonic())

    def advance(self, readable: bool) -> bool:
        """Whether the call has ended.

        Raises WorkerDied if the child ended or is overdue, StartFailed if that was before it was up.
        """
        if not readable:
            if self.remaining == 0:
                self.close()
                if not self._up:
                    raise StartFailed(f"a worker process was not ready within {START_S:.0f} s")
                raise WorkerDied("timeout", f"no answer within {self._allowed:.0f} s")
            return False
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            process = self._process
            assert process is not None
            process.join(10)
            code = process.exitcode
            self.close()
            how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            if not self._up:
                raise StartFailed(f"a worker process ended with {how} before it was ready") from None
            raise WorkerDied("crash", f"the process ended with {how}") from None
        if message is None:
            self._up = True
            self._deadline = time.monotonic() + self._allowed
            return False
        self._outcome = message
        return True

    def result(self) -> Any:
        """What the call that has ended returned. Raises RemoteError for what it raised."""
        assert self._outcome is not None, "no call has ended"
        ok, value = self._outcome
        if ok:
            return value
        raise RemoteError(*value)

    def close(self) -> None:
        """End the child, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def kill(self) -> None:
        """End the child from another thread than the one that calls: there, the running call ends as WorkerDied."""
        process = self._process
        if process is not None:
            process.kill()

    def _ensure(self) -> bool:
        """Start the child unless it runs; True if it is new."""
        if self._process is not None and self._process.is_alive():
            return False
        self.close()
        self._up = False
        self._pipe, theirs = _context.Pipe()
        environment = dict(os.environ) | self._environment  # the server's is as old as the server
        process = _context.Process(target=_serve, args=(theirs, registry.KERNELS, environment), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        return True


def run_all(
    calls: Iterable[tuple[Callable[..., Any], tuple[Any, ...]]],
    jobs: int,
    timeout: float,
    environment: dict[str, str] | None = None,
    patience: Callable[[], float] = lambda: math.inf,
) -> Iterator[tuple[int, Any]]:
    """Run calls on `jobs` children; yields (index, result) as they end, the result being an exception where one came.

    The exception is a WorkerDied or a RemoteError. Children are ended when the iterator is closed, and when the seconds
    that `patience` still gives are none: the rest is then left out.
    """
    waiting = iter(enumerate(calls))
    idle = [Worker(environment) for _ in range(jobs)]
    busy: dict[int, Worker] = {}
    try:
        while True:
            while idle and (job := next(waiting, None)) is not None:
                index, (function, args) = job
                busy[index] = idle.pop()
                busy[index].start(function, *args, timeout=timeout)
            if not busy:
                return
            left = patience()
            if left <= 0:
                return
            overdue = min(w.remaining for w in busy.values())
            ready = multiprocessing.connection.wait([w.pipe for w in busy.values()], min(left, overdue))
            for index, worker in list(busy.items()):
                outcome: Any
                try:
                    if not worker.advance(worker.pipe in ready):
                        continue
                    outcome = worker.result()
                except (WorkerDied, RemoteError) as e:
                    outcome = e
                del busy[index]
                idle.append(worker)
                yield index, outcome
    finally:
        for worker in (*idle, *busy.values()):
            worker.close()


@dataclass(frozen=True, slots=True)
class Call:
    """Of a Pool: what its caller waits for, and what a thread of the pool does."""

    future: "Future[Any]"
    run: Callable[[Worker], None]


class Pool:
    """`jobs` children that run calls in the background. Futures end with what the call returned or raised, as `call`'s
    do. Children start when there is something to do.
    """

    def __init__(self, jobs: int, timeout: float, environment: dict[str, str] | None = None) -> None:
        self._timeout = timeout
        self._closed = False
        self._past = float("-inf")
        self._order = itertools.count()  # among calls of one turn
        self._waiting: queue.PriorityQueue[tuple[float, int, Callable[[Worker], None] | None]] = queue.PriorityQueue()
        self._workers = [Worker(environment) for _ in range(jobs)]
        self._threads = [threading.Thread(target=self._work, args=(w,), daemon=True) for w in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, turn: float, function: Callable[..., Any], *args: Any) -> "Call":
        """Run `function(*args)` in a child; calls of a lower turn come first, then those that were submitted first."""
        future: Future[Any] = Future()
        begun = threading.Lock()

        def run(worker: Worker) -> None:
            if not begun.acquire(blocking=False):
                return  # it had another turn as well
            try:
                future.set_result(worker.call(function, *args, timeout=self._timeout))
            except Exception as e:  # whatever it is, who waits for the future raises it again
                future.set_exception(e)

        call = Call(future, run)
        self.hasten(call, turn)
        return call

    def hasten(self, call: "Call", turn: float) -> None:
        """Give a call an earlier turn; it is run once. This also brings back one that was left behind."""
        self._waiting.put((turn, next(self._order), call.run))

    def leave_behind(self, turn: float) -> None:
        """Do not begin calls of turns between 0 and this one any more; their futures do not end."""
        self._past = turn

    def close(self) -> None:
        """End all children, whatever they do; calls that have not begun never will, and their futures never end."""
        self._closed = True
        for _ in self._threads:
            self._waiting.put((float("-inf"), next(self._order), None))
        while any(thread.is_alive() for thread in self._threads):
            for worker in self._workers:
                worker.kill()
            for thread in self._threads:
                thread.join(0.05)

    def _work(self, worker: Worker) -> None:
        try:
            while not self._closed:
                turn, _, run = self._waiting.get()
                if run is not None and not self._closed and not 0 <= turn < self._past:
                    run(worker)
        finally:
            worker.close()


def _serve(pipe: Connection, kernels: list[registry.Kernel], environment: dict[str, str]) -> None:
    """The child's loop. Ctrl-C is the parent's to handle; an orphan ends with its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    registry.KERNELS[:] = kernels  # a parent may have registered kernels of its own
    pipe.send(None)  # up: torch is imported
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except Exception as e:  # not swallowed: the parent raises it again
            answer = (False, (type(e).__name__, str(e)))
        pipe.send(answer)
