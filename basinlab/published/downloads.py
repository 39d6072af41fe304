"""Pictures by url, for lists whose pictures may not be passed on: parallel, resumable, and on its guard.

A list of urls is other people's input. So only http and https are followed, only to addresses that
``allowed`` takes (by default public ones), and to the very address that was checked, in redirects too;
proxies of the environment are not used, since behind one the check would mean nothing. What comes must be
a picture of sane size. Every url ends in a record:

* got: the picture is in the folder;
* gone: the server has it no more (404, 410), or has something there that is no picture of sane size;
* refused: not allowed to be asked for;
* failed: no answer, or the server's fault; tried again in the next run, the others are not.
"""

import hashlib
import io
import os
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import certifi
import pandas as pd
import urllib3
from PIL import Image
from tqdm.auto import tqdm

COLUMNS = ("url", "file", "status", "reason", "sha256")
RECORD = "record.csv"
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif"}
_NAT64 = ip_network("64:ff9b::/96")
Address = IPv4Address | IPv6Address


class _Gone(Exception):
    pass


class _Refused(Exception):
    pass


def is_public(address: Address) -> bool:
    """Whether ``address`` is one of the public internet; of an IPv6 address that stands for an IPv4 one, that one.

    >>> [is_public(ip_address(a)) for a in ("93.184.216.34", "127.0.0.1", "10.0.0.1", "::ffff:127.0.0.1", "224.0.0.1")]
    [True, False, False, False, False]
    """
    if isinstance(address, IPv6Address):
        low = IPv4Address(int(address) & 0xFFFFFFFF)
        address = address.ipv4_mapped or address.sixtofour or (low if address in _NAT64 else address)
    local = getattr(address, "is_site_local", False)
    return address.is_global and not (address.is_multicast or address.is_reserved or local)


def fetch(
    urls: Sequence[str],
    folder: str | Path,
    *,
    allowed: Callable[[Address], bool] = is_public,
    again: bool = False,
    workers: int = 8,
    timeout: float = 20,
    max_bytes: int = 20_000_000,
    least_side: int = 64,
    max_pixels: int = 50_000_000,
    progress: bool = True,
) -> pd.DataFrame:
    """Fetch pictures into ``folder``; the record, one row for each different url: url, file, status, reason, sha256.

    Args:
        folder: it also keeps the record, record.csv, written at least every few seconds: a killed run goes on.
        allowed: of an address that a host's name stands for, whether it may be asked; all of them must be.
        again: also try anew what is gone or was refused.
        timeout: seconds to connect and between two pieces; a whole picture has three times as many.
        least_side, max_pixels: of a picture, in pixels.

    Raises ValueError when the folder's record.csv is no record.
    """
    folder, urls = Path(folder), list(dict.fromkeys(urls))
    folder.mkdir(parents=True, exist_ok=True)
    record = {row["url"]: row for row in _read_record(folder / RECORD)}
    settled = {url for url, row in record.items() if _settled(row, folder, again)}
    waiting = [url for url in urls if url not in settled]
    get = lambda url: _fetched(url, folder, allowed, timeout, max_bytes, least_side, max_pixels)  # noqa: E731
    pool, written = ThreadPoolExecutor(workers), time.monotonic()
    try:
        jobs = [pool.submit(get, url) for url in waiting]
        bar = tqdm(as_completed(jobs), total=len(urls), initial=len(urls) - len(waiting), disable=not progress)
        for job in bar:
            row = job.result()
            record[row["url"]] = row
            if time.monotonic() - written > 2:
                _write_record(record, folder / RECORD)
                written = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        _write_record(record, folder / RECORD)
    return pd.DataFrame([record[url] for url in urls], columns=COLUMNS)


def _settled(row: dict, folder: Path, again: bool) -> bool:
    """Whether a row of the record stands: its picture is there unchanged, or there is none to be had."""
    if row["status"] != "got":
        return row["status"] in ("gone", "refused") and not again
    path = folder / Path(row["file"]).name
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]


def _read_record(path: Path) -> list[dict]:
    if not path.exists():
        return []
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return table[list(COLUMNS)].to_dict("records")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is no record of pictures ({error}): delete it, and all are fetched again") from error


def _write_record(record: dict[str, dict], path: Path) -> None:
    pd.DataFrame(record.values(), columns=COLUMNS).to_csv(path.with_suffix(".part"), index=False)
    os.replace(path.with_suffix(".part"), path)


def _fetched(url, folder, allowed, timeout, max_bytes, least_side, max_pixels) -> dict:
    """The row of the record for ``url``, after its picture is in ``folder``."""
    row = dict.fromkeys(COLUMNS, "") | {"url": url}
    try:
        content = _content(url, allowed, timeout, max_bytes)
        suffix = _SUFFIXES[_format(content, least_side, max_pixels)]
    except _Gone as error:
        return row | {"status": "gone", "reason": str(error)}
    except _Refused as error:
        return row | {"status": "refused", "reason": str(error)}
    except (urllib3.exceptions.HTTPError, OSError) as error:
        # also a name that does not resolve: it may be the network here that is down
        return row | {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:20]}{suffix}"
    path.with_suffix(".part").write_bytes(content)
    os.replace(path.with_suffix(".part"), path)
    return row | {"status": "got", "file": path.name, "sha256": hashlib.sha256(content).hexdigest()}


def _content(url: str, allowed: Callable[[Address], bool], timeout: float, max_bytes: int) -> bytes:
    """What ``url`` gives, after at most 5 redirects, each checked like the first."""
    end = time.monotonic() + 3 * timeout
    for _ in range(6):
        answer = _asked(url, allowed, timeout)
        try:
            if answer.status in (301, 302, 303, 307, 308) and "Location" in answer.headers:
                url = _joined(url, answer.headers["Location"])
                continue
            if answer.status in (404, 410):
                raise _Gone(f"status {answer.status}")
            if answer.status != 200:
                raise OSError(f"status {answer.status}")
            content = bytearray()
            # one piece as it comes, not decoded: no compression can blow up, and no slow drip can hold on
            while piece := answer.read1(1 << 16, decode_content=False):
                content += piece
                if len(content) > max_bytes:
                    raise _Gone(f"more than {max_bytes} bytes")
                if time.monotonic() > end:
                    raise OSError(f"not complete after {3 * timeout:g} s")
            return bytes(content)
        finally:
            answer.close()
    raise _Gone("more than 5 redirects")


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise _Refused(f"a redirect to what is no url: {error}") from error


def _asked(url: str, allowed: Callable[[Address], bool], timeout: float) -> urllib3.BaseHTTPResponse:
    """The answer of the host of ``url``, at an address that was checked."""
    try:
        parts = urlsplit(url)
        url.encode()
        port = parts.port
        host = parts.hostname.encode("ascii" if ":" in parts.hostname else "idna").decode() if parts.hostname else ""
    except ValueError as error:
        raise _Refused(f"no url: {error}"[:200]) from error
    if parts.scheme not in ("http", "https") or not host:
        raise _Refused(f"{parts.scheme or 'no'} scheme: only http and https are followed")
    if "@" in parts.netloc:
        raise _Refused("a name or password in the url")
    secure = parts.scheme == "https"
    port = port or (443 if secure else 80)
    found = dict.fromkeys(info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    for address in found:
        if not allowed(ip_address(address)):
            raise _Refused(f"{host} is {address}, which is not allowed")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    name = f"[{host}]" if ":" in host else host
    headers = {
        "Host": name if port == (443 if secure else 80) else f"{name}:{port}",
        "User-Agent": "basinlab (reference pictures for research)",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
    }
    limits = urllib3.Timeout(connect=timeout, read=timeout)
    for address in found:
        options = {"ssl_context": _context(), "server_hostname": host, "assert_hostname": host} if secure else {}
        kind = urllib3.HTTPSConnectionPool if secure else urllib3.HTTPConnectionPool
        pool = kind(address, port, timeout=limits, retries=False, **options)
        try:
            return pool.urlopen("GET", target, headers=headers, redirect=False, preload_content=False)
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as error:
            unreached = error
        except (ValueError, urllib3.exceptions.LocationValueError) as error:
            raise _Refused(f"no url: {error}"[:200]) from error
    raise unreached


def _context() -> ssl.SSLContext:
    """Certificates of the system and of certifi: on some systems Python finds none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _format(content: bytes, least_side: int, max_pixels: int) -> str:
    """The format of a picture, after it has been decoded."""
    try:
        with Image.open(io.BytesIO(content), formats=list(_SUFFIXES)) as picture:
            width, height = picture.size
            if min(width, height) < least_side or width * height > max_pixels:
                raise _Gone(f"{width} x {height} pixels")
            picture.load()
            return picture.format
    except _Gone:
        raise
    except Exception as error:  # decoders raise of all sorts for bytes that are no picture
        raise _Gone(f"no picture ({type(error).__name__})") from error
