"""Work on chunks in other processes, its results in order.

Each process has a pipe of its own, so that it ends when the process that started it is gone, however that was.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..errors import ProcessiveError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext  # the first is not on Windows
else:
    ForkServerContext = SpawnContext = Any

Given = TypeVar("Given")
Result = TypeVar("Result")


def map_in_order(work: Callable[[Given], Result], items: Iterable[Given], *, workers: int) -> Iterator[Result]:
    """Yield ``work(item)`` for each item, in the order of the items, which are read only a little ahead.

    Item ``i`` goes to process ``i % workers``; with one worker no process is started. ``work``, the items and the
    results are pickled.

    Raises:
        ProcessiveError: a process ended by itself (the system ends one when memory runs out).
        Exception: what ``work`` raised.
    """
    if workers < 2:
        yield from map(work, items)
        return
    context = _context()
    pipes, processes = [], []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        sent = taken = 0
        for item in items:
            pipe = pipes[sent % workers]
            result = _receive(pipe) if sent >= workers else None  # the process rests until it has the next item
            _send(pipe, item)
            sent += 1
            if sent > workers:
                taken += 1
                yield cast(Result, result)
        for number in range(taken, sent):
            yield cast(Result, _receive(pipes[number % workers]))
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join()


def _context() -> ForkServerContext | SpawnContext:
    """How processes are started: forked from one that has no threads and has imported this package, where there is."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__package__])
    return context


def _serve(pipe: Connection, work: Callable[[Given], Result]) -> None:
    """Answer items until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[bool, object] = (True, work(item))
        except Exception as error:
            answer = (False, error)
        try:
            pipe.send(answer)
        except OSError:
            return


def _send(pipe: Connection, item: object) -> None:
    try:
        pipe.send(item)
    except OSError:
        raise _ended() from None


def _receive(pipe: Connection) -> object:
    try:
        well, result = pipe.recv()
    except (EOFError, OSError):
        raise _ended() from None
    if not well:
        raise result
    return cast(object, result)


def _ended() -> ProcessiveError:
    return ProcessiveError("A worker process ended by itself, perhaps for want of memory. Use fewer workers.")
