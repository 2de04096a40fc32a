"""Processes that take turns: what one does to the heap or the caches of its libraries does not reach the others."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Side:
    """A process that does what it is asked to."""

    def __init__(self, build: Callable[[], Any]) -> None:
        spawned = multiprocessing.get_context("spawn")
        self.requests, theirs = spawned.Pipe()
        self.process = spawned.Process(target=_serve, args=(theirs, build), daemon=True)
        self.process.start()
        theirs.close()  # or its end would not be noticed here

    def ask(self, what: str, *arguments: Any) -> Any:
        self.requests.send((what, arguments))
        return self.requests.recv()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()
        self.process.join()


def _serve(requests: Connection, build: Callable[[], Any]) -> None:
    side = build()
    while True:
        try:
            what, arguments = requests.recv()
        except EOFError:
            return
        requests.send(getattr(side, what)(*arguments))
