"""POST requests of JSON with retries, whose responses are bounded in time and size."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

import requests
from requests.adapters import HTTPAdapter, Retry
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import InvalidHeader
from urllib3.response import BaseHTTPResponse

MAX_WAIT_SECONDS = 60.0
"""Longest wait before a retry, also where the server asks for a longer one."""
MAX_RESPONSE_BYTES = 16 * 2**20
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_current = threading.local()


class _Retry(Retry):
    """Retries by status and after lost connections; `Retry-After` is a bounded hint, not a reason to retry a 413."""

    RETRY_AFTER_STATUS_CODES = frozenset({429, 503})

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        """Seconds that the server asks for, at most `MAX_WAIT_SECONDS`; `None` where it asks for none."""
        try:
            seconds = super().get_retry_after(response)
        except (InvalidHeader, ValueError, OverflowError):
            return None
        return None if seconds is None else min(seconds, MAX_WAIT_SECONDS)


class _Deadline:
    """Ends the current attempt of a request: the timeout of a socket alone starts anew with every byte."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.passed = seconds, False
        self._timer: threading.Timer | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        self.stop()
        self.passed, self._socket = False, None
        self._timer = threading.Timer(self.seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, connection: socket.socket | None) -> None:
        self._socket = connection
        if self.passed:
            self._shut()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.passed = True
        self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # wakes the thread that reads


class _Bounded:
    """A connection under the deadline of its thread."""

    def request(self, *args: Any, **kwargs: Any) -> None:
        _current.deadline.start()
        super().request(*args, **kwargs)

    def getresponse(self, *args: Any, **kwargs: Any) -> Any:
        _current.deadline.watch(self.sock)
        return super().getresponse(*args, **kwargs)


class _BoundedHTTP(_Bounded, HTTPConnection):
    pass


class _BoundedHTTPS(_Bounded, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _BoundedHTTP


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _BoundedHTTPS


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
        return manager


def posting_session(concurrency: int, max_retries: int, backoff_seconds: float) -> requests.Session:
    """A session for `post_json`, for that many threads.

    Args:
        concurrency: connections that are kept.
        max_retries: max retries of a request whose server is busy, fails or is not reached.
        backoff_seconds: wait before the second retry; it doubles with each further one up to `MAX_WAIT_SECONDS`.
    """
    retry = _Retry(
        total=max_retries,
        backoff_factor=backoff_seconds,
        backoff_max=MAX_WAIT_SECONDS,
        status_forcelist=_RETRIED,
        allowed_methods={"POST"},
    )
    session, adapter = requests.Session(), _Adapter(pool_maxsize=concurrency, max_retries=retry)
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    return session


def post_json(session: requests.Session, url: str, body: Any, timeout: float) -> tuple[int, bytes]:
    """POST a body as JSON.

    Args:
        session: see `posting_session`.
        url: where to.
        body: what `json.dumps` takes.
        timeout: seconds within which an attempt must connect, and be answered in full.

    Returns:
        Status and content of the response.

    Raises:
        requests.RequestException: no response after all retries, or one that is too slow or too large.
    """
    _current.deadline = deadline = _Deadline(timeout)
    try:
        with session.post(url, json=body, timeout=timeout, stream=True) as response:
            content = bytearray()
            for part in response.iter_content(2**16):
                content += part
                if len(content) > MAX_RESPONSE_BYTES:
                    raise requests.RequestException(f"the response is larger than {MAX_RESPONSE_BYTES} bytes")
            if deadline.passed:  # a response without a length ends with its connection
                raise requests.Timeout(f"the response was not complete after {timeout} s")
            return response.status_code, bytes(content)
    except requests.RequestException as error:
        if deadline.passed:
            raise requests.Timeout(f"the response was not complete after {timeout} s") from error
        raise
    finally:
        deadline.stop()


__all__ = ["MAX_RESPONSE_BYTES", "MAX_WAIT_SECONDS", "post_json", "posting_session"]
