"""A web address -> its bytes, within limits of size and time, and from allowed hosts only.

With a list of hosts, the address comes from a client, and its name must not lead into this machine's network: every IP address
of the name is checked, and the connection goes to a checked address. Knows no pictures.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from functools import partial
from typing import Any

from runtime import __version__
from runtime.errors import PictureError

MOST_BYTES = 64 << 20  # of a download
CONNECT_SECONDS, FETCH_SECONDS = 10, 30


def is_web_address(text: str) -> bool:
    """Whether a text is an http or https address."""
    return text.lower().startswith(("http://", "https://"))


def fetch(url: str, hosts: Collection[str] | None) -> bytes:
    """Read a web address, within limits of size and time; redirects stay with http and https.

    With `hosts`, only from these, redirects included, and only where their IP addresses are public or are themselves among
    `hosts`; proxies are not used then, since they resolve names themselves. Raises PictureError.
    """
    opener = urllib.request.OpenerDirector()
    if hosts is None:
        own: list[Any] = [urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler]
        own.append(urllib.request.HTTPRedirectHandler)
    else:
        check_host(url, hosts)
        own = [partial(_Http, hosts), partial(_Https, hosts), partial(_Redirects, hosts)]
    for handler in (*own, urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": f"internvl-openvino/{__version__}"})
    deadline = time.monotonic() + FETCH_SECONDS
    data = bytearray()
    try:
        with opener.open(request, timeout=CONNECT_SECONDS) as answer:
            while piece := answer.read1(1 << 16):
                data += piece
                if len(data) > MOST_BYTES:
                    raise PictureError(f"{url} is larger than {MOST_BYTES >> 20} MB: fetch it and scale it down first")
                if time.monotonic() > deadline:
                    raise PictureError(f"{url} took longer than {FETCH_SECONDS} s: fetch it first and give the file")
    except urllib.error.HTTPError as error:
        raise PictureError(f"{url} cannot be fetched (HTTP {error.code} {error.reason})") from None
    except PictureError:
        raise
    except Exception as error:  # name resolution, TLS, broken answers, bad addresses
        raise PictureError(f"{url} cannot be fetched ({getattr(error, 'reason', None) or error})") from None
    return bytes(data)


def check_host(url: str, hosts: Collection[str]) -> None:
    """Raise PictureError unless an address is on one of these hosts."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if host not in hosts:
        raise PictureError(f"media are not fetched from {host or 'there'}: send the data itself")


def connect(host: str, port: int, timeout: float | None, hosts: Collection[str]) -> socket.socket:
    """A connection to a host whose IP addresses are all public, or are themselves among `hosts`.

    The name is resolved once: a second look-up may return another address. Raises PictureError, OSError.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for _, _, _, _, place in found:
        if not (_is_public(str(place[0])) or place[0] in hosts):
            raise PictureError(f"media are not fetched from {host}: it is at {place[0]}, which is no public address")
    failed: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in found:
        made = socket.socket(family, kind, protocol)
        made.settimeout(timeout)
        try:
            made.connect(place)
            return made
        except OSError as error:
            made.close()
            failed = error
    raise failed


def _is_public(address: str) -> bool:
    """Whether an IP address is public."""
    found = ipaddress.ip_address(address.partition("%")[0])
    found = getattr(found, "ipv4_mapped", None) or found
    return found.is_global and not found.is_multicast


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed hosts only."""

    def __init__(self, hosts: Collection[str]):
        self._hosts = hosts

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        check_host(newurl, self._hosts)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, *, hosts: Collection[str], **how: Any):
        super().__init__(host, **how)
        self._hosts = hosts

    def connect(self) -> None:
        self.sock = connect(self.host, self.port, self.timeout, self._hosts)


class _SafeConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, hosts: Collection[str]):
        super().__init__()
        self._hosts = hosts

    def http_open(self, req: Any) -> Any:
        return self.do_open(_Connection, req, hosts=self._hosts)  # type: ignore[arg-type]


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, hosts: Collection[str]):
        super().__init__()
        self._hosts = hosts

    def https_open(self, req: Any) -> Any:
        return self.do_open(_SafeConnection, req, hosts=self._hosts)  # type: ignore[arg-type]
