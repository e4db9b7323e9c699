"""Ports for clusters of the tests."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """Return a port that nobody listens on, on any address.

    It is below those that the kernel gives to whoever asks for any (32,768 on), as every process of
    a cluster does: one of these may be taken before the process that it was chosen for listens.
    """
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("a hundred ports are taken")
