"""Servers for what is downloaded."""

from collections.abc import Callable, Iterator

import pytest
from serving import Server


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], Server]]:
    started: list[Server] = []

    def start(content: bytes) -> Server:
        started.append(Server(content))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()
