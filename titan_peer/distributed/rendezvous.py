"""The endpoint where the launchers of a job's machines meet; it is checked before anything waits for it."""

from __future__ import annotations

import datetime
import socket
import sys
import threading
from contextlib import suppress

import torch.distributed as dist

from titan_peer.common.errors import UserError

PORT_SECONDS = 5  # in which a running rendezvous answers


def check_port(endpoint: str, nodes: str) -> str:
    """The rendezvous endpoint to use: on a single machine, a port that is in use is replaced by a free one.

    Raises:
        UserError: it is not an endpoint, or its port on this machine is used by something that is not a rendezvous.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(
            f"RDZV_ENDPOINT = {endpoint}: must be HOST:PORT, with a port from 1 to 65535 (0: any, on one machine)"
        )
    if port == "0" or not _is_this_machine(host) or not _is_taken(int(port)):
        return endpoint
    if nodes == "1":
        print(f"RDZV_ENDPOINT = {endpoint}: port {port} is in use; a free one is taken", file=sys.stderr)
        return "localhost:0"
    if not _is_rendezvous(host, int(port)):
        raise UserError(
            f"RDZV_ENDPOINT = {endpoint}: port {port} of this machine is in use by another program; "
            "give a free port, the same on all machines"
        )
    return endpoint


def _is_rendezvous(host: str, port: int) -> bool:
    """Whether another launcher of the job answers there, such as one that was started earlier on this machine."""
    answers = threading.Event()

    def ask() -> None:
        with suppress(RuntimeError, OSError):
            dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=PORT_SECONDS))
            answers.set()

    # in a thread of its own, since it waits far longer than its timeout for a program that does not answer
    threading.Thread(target=ask, daemon=True).start()
    return answers.wait(PORT_SECONDS)


def _is_this_machine(host: str) -> bool:
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise UserError(f"RDZV_ENDPOINT: the host {host} is not known ({error.strerror})") from None
    return any(_can_bind(str(address), 0) for address in addresses)


def _is_taken(port: int) -> bool:
    return not _can_bind("", port)


def _can_bind(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # ports of connections that have just ended are free
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
