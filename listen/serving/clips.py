"""Clips of requests: fetched from public addresses, decoded off the event loop, limited in bytes and length."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub.utils import httpx

from ..audio_listen import load_waveform
from ..sources_listen import URL_TIMEOUT

_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # gateways send these to the IPv4 address in the last 32 bits


class ClipLimits(NamedTuple):
    """What the clips of a request may be.

    Attributes:
        seconds: Length of all clips together at most.
        bytes: Of a clip at an address.
        private_addresses: Whether addresses inside the server's own network are fetched.
    """

    seconds: float = 600.0
    bytes: int = 25 * 2**20
    private_addresses: bool = False


class RequestClips:
    """The clips of one request. Compressed silence is small: the limit of length is that of all clips together.

    Args:
        rate: Rate in Hz at which clips are decoded.
        limits: See there.
    """

    def __init__(self, rate: int, limits: ClipLimits) -> None:
        self.rate, self.limits, self.seconds = rate, limits, 0.0

    async def decode(self, clip: Any) -> np.ndarray:
        """The samples `(samples,)` float32 of a file's bytes, of `{"data": base64}`, a data URI or a web address.

        Raises:
            ValueError: it cannot be fetched or decoded, or the request holds too much audio.
        """
        source = await fetch(clip, self.limits) if isinstance(clip, str) else clip
        left = self.limits.seconds - self.seconds
        waveform = await asyncio.to_thread(load_waveform, source, None, self.rate, left + 1)
        self.seconds += len(waveform) / self.rate
        if self.seconds > self.limits.seconds:
            raise ValueError(f"the request holds more than {self.limits.seconds:g} s of audio, the limit; send less")
        return waveform


async def fetch(address: str, limits: ClipLimits) -> Any:
    """What `decode` takes, for an address: bytes from the web, data URIs as they are. No file is opened.

    Raises:
        ValueError: another scheme, an address that is private, fails or redirects, or too many bytes.
    """
    scheme = address.partition(":")[0].lower()
    if scheme == "data":
        return address
    if scheme not in ("http", "https"):
        raise ValueError(f"{address[:80]!r} is not fetched; give an http(s) address, a data URI, or input_audio")
    try:
        async with asyncio.timeout(URL_TIMEOUT):
            if not limits.private_addresses:
                await _check_public(address)
            return await _get(address, limits.bytes)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"cannot fetch {address[:200]!r}: {reason}; check it, or send the clip itself") from error


async def _check_public(address: str) -> None:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        if host is None:
            raise ValueError("no host")
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except ValueError as error:  # of a port, of brackets, of a name
        raise ValueError(f"{address[:200]!r} is no address of a clip ({error}); check it") from error
    if not all(_is_public(entry[4][0]) for entry in found):
        raise ValueError(f"{host!r} is a private address, which this server does not fetch from")


def _is_public(address: str) -> bool:
    """Whether an IP address, and every IPv4 address that it carries inside, is one of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    every: list[Any] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        every += [inner for inner in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())) if inner is not None]
        if ip in _NAT64:
            every.append(ipaddress.IPv4Address(int(ip) % 2**32))
    return all(each.is_global and not each.is_multicast for each in every)


async def _get(address: str, limit: int) -> bytes:
    content = bytearray()
    async with httpx.AsyncClient(trust_env=False) as client, client.stream("GET", address) as response:
        if response.is_redirect:  # it could lead to a private address
            raise ValueError(f"{address[:200]!r} redirects, which is not followed; give the final address")
        response.raise_for_status()
        async for block in response.aiter_bytes():
            content += block
            if len(content) > limit:
                raise ValueError(f"the clip at {address[:200]!r} has more than {limit} bytes; give a shorter one")
    return bytes(content)


__all__ = ["ClipLimits", "RequestClips", "fetch"]
