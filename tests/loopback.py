"""Serves an ASGI application on a free port of this machine, in a thread, until it is told to stop."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def serving(made: Callable[[int], Any]) -> Iterator[tuple[Any, Callable[[], None]]]:
    """(the application that `made` makes for the port, a function that stops serving it)."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)  # so that requests wait rather than fail until the thread serves
        served = made(listening.getsockname()[1])
        config = uvicorn.Config(served, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)

        def stop() -> None:
            server.should_exit = True
            thread.join(timeout=20)
            listening.close()

        thread.start()
        try:
            yield served, stop
        finally:
            stop()
