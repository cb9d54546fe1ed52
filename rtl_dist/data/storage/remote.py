"""Bytes behind a URL, through fsspec: read in ranges, retried with back-off, failures named.

Nothing here keeps anything on disk; ``cache.py`` does.
"""

from __future__ import annotations

import logging
import posixpath
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rtl_dist.core.errors import RemoteError, RtlDistError, ShardError, UserError
from rtl_dist.core.urls import Redirects

LOG = logging.getLogger("rtl_dist")
T = TypeVar("T")

CHUNK = 16 << 20  # bytes asked for at a time; a broken connection loses at most this
SMALLEST_CHUNK = 1 << 20
ATTEMPTS = 8  # in a row without progress
FIRST_WAIT_S = 0.5  # doubled each time, so that all waits together are one to two minutes
TIMEOUT_S = 60  # for one range; a server that says nothing is asked again
_FIRST_ATTEMPTS = 5  # of the first contact: a mistyped host must not take minutes to be told
_SLOW_ATTEMPTS = 2
_AT_ONCE = 32
SILENCE_S = 20
_said_at: list[float] = [-SILENCE_S]
_NO_SUCH_RANGE = 416
_EXTRAS = (
    "install the extra: pip install 'rtl_dist[remote]' (in a checkout: pip install -e '.[remote]')"
)
# Whatever was opened stays. A forked process would else collect its parent's connections, and
# closing them there takes them out of the parent's event loop (they share its epoll), which then
# waits on them in vain.
_SYSTEMS: set[Any] = set()


def read_url(url: str, most: int, redirects: Redirects = "origin") -> bytes:
    """A small file, whole.

    Args:
        most: bytes that it may have.
        redirects: of HTTP, whether they are followed to other servers, too.

    Raises:
        ShardError: it is not there, may not be read, or is too large.
        RemoteError: the place cannot be reached.
    """
    system, path = _system_of(url, redirects)

    def read() -> bytes:
        # HTTP is asked for no more; a store need not know ranges of empty files, but tells sizes
        size = most if _is_http(url) else _size(system, path)
        if size > most:
            return b"x" * (most + 1)
        content: bytes = (
            _call(system, system.cat_file, path, start=0, end=most + 1)
            if _is_http(url)
            else _call(system, system.cat_file, path)
        )
        return content

    content = _retried(read, url, min(ATTEMPTS, _FIRST_ATTEMPTS), _SLOW_ATTEMPTS)
    if len(content) > most:
        raise ShardError(f"{url} has more than {most:,} bytes: it is none of ours; correct the URL")
    return content


def read_chunks(url: str, start: int, end: int, redirects: Redirects = "origin") -> Iterator[bytes]:
    """The bytes from ``start`` to ``end`` (exclusive), in pieces; a broken connection is taken up
    where it broke.

    Raises:
        ShardError: the file is not there, may not be read, or ends before ``end``.
        RemoteError: the place cannot be reached.
    """
    system, path = _system_of(url, redirects)
    chunk = CHUNK

    def read_range() -> bytes:
        nonlocal chunk
        stop = min(start + chunk, end)
        try:
            content: bytes = _call(system, system.cat_file, path, start=start, end=stop)
        except Exception as error:
            if _status(error) == _NO_SUCH_RANGE:
                raise ShardError(truncated) from error
            chunk = max(SMALLEST_CHUNK, chunk // 4)  # less to lose on a slow or broken line
            raise
        if len(content) == stop - start:
            return content
        if start + len(content) < end <= _size(system, path):
            raise OSError(f"{len(content)} bytes came where {stop - start} were asked for")
        raise ShardError(truncated)

    truncated = f"{url} is truncated: it ends before byte {end}; restore it"
    while start < end:
        content = _retried(read_range, url)
        start += len(content)
        chunk = min(CHUNK, 2 * chunk)
        yield content


def sizes_of(urls: Iterable[str], redirects: Redirects = "origin") -> dict[str, int | None]:
    """The size in bytes of each file, None where there is none.

    Raises:
        ShardError: one may not be read. RemoteError: a place cannot be reached.
    """
    urls = list(dict.fromkeys(urls))
    # HTTP has no listings, and elsewhere one is worth a thousand questions.
    folders = sorted({posixpath.dirname(url) for url in urls if not _is_http(url)})
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="rtl_dist sizes") as pool:
        listed = dict(zip(folders, pool.map(_list_folder, folders), strict=True))

        def size(url: str) -> int | None:
            folder, name = posixpath.split(url)
            sizes = listed.get(folder)
            return _size_or_none(url, redirects) if sizes is None else sizes.get(name)

        return dict(zip(urls, pool.map(size, urls), strict=True))


def size_of(url: str, redirects: Redirects = "origin") -> int:
    """Its size in bytes.

    Raises:
        ShardError: it is not there, or may not be read.
        RemoteError: the place cannot be reached.
    """
    system, path = _system_of(url, redirects)
    return _retried(lambda: _size(system, path), url)


def files_of(url: str) -> list[str]:
    """The URLs of all files below a folder, or that fit a pattern (``*``), sorted.

    Raises:
        UserError: the server does not list its files.
        ShardError: they may not be listed. RemoteError: the place cannot be reached.
    """
    if _is_http(url):
        raise UserError(f"{url}: what a web server holds cannot be listed; name each file")
    system, path = _system_of(url, "origin")

    def ask() -> list[str]:
        system.invalidate_cache()  # an earlier answer may be of before
        if "*" not in path:
            return list(_call(system, system.find, path))
        found = _call(system, system.glob, path, detail=True)
        return [name for name, entry in found.items() if entry["type"] == "file"]

    return sorted(map(system.unstrip_protocol, _retried(ask, url)))


def _size_or_none(url: str, redirects: Redirects) -> int | None:
    system, path = _system_of(url, redirects)

    def ask() -> int | None:
        try:
            return _size(system, path)
        except FileNotFoundError as error:
            if _is_missing(error, url):
                return None
            raise

    return _retried(ask, url)


def _list_folder(folder: str) -> dict[str, int] | None:
    """The size of each file in it by name; None if it may not be listed."""
    system, path = _system_of(folder, "origin")  # no HTTP

    def ask() -> dict[str, int] | None:
        system.invalidate_cache()  # an earlier answer may be of before the files were mended
        try:
            entries = _call(system, system.ls, path, detail=True)
        except FileNotFoundError:
            return {}
        except PermissionError:
            return None
        return {
            posixpath.basename(entry["name"].rstrip("/")): int(entry["size"] or 0)
            for entry in entries
        }

    return _retried(ask, folder)


def _size(system: Any, path: str) -> int:
    size = _call(system, system.info, path)["size"]
    if size is None:
        raise RemoteError(f"cannot read {path}: the server does not tell its size; use another")
    return int(size)


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _system_of(url: str, redirects: Redirects) -> tuple[Any, str]:
    """(fsspec file system, the path in it). fsspec keeps one for each process, also after a fork.

    Raises:
        UserError: it is no address, the scheme is unknown or needs a package that is not
            installed, or what it leads through (``zip://``) is not what it should be.
    """
    import fsspec

    try:
        if _is_http(url):
            from rtl_dist.data.storage.http import BoundedHTTP

            address = urlsplit(url)
            if not address.hostname or address.port == 0:
                raise ValueError("it names no server")
            system, path = BoundedHTTP(redirects=redirects, seconds=TIMEOUT_S), url
        else:
            system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"cannot read {url}: {error}; {_EXTRAS}") from error
    # Each kind of storage has exceptions of its own, none with a common base.
    except Exception as error:
        raise UserError(f"cannot read {url}: {_reason(error)}; correct the URL") from error
    _SYSTEMS.add(system)
    return system, path


def _call(system: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if system.async_impl:  # only these know of time-outs; the others are local
        kwargs["timeout"] = TIMEOUT_S
    return method(*args, **kwargs)


def _retried(
    action: Callable[[], T], url: str, attempts: int | None = None, slow: int | None = None
) -> T:
    """
    Args:
        attempts: how often it is tried; None: ``ATTEMPTS``.
        slow: how often where a try took all of its time, which is not better the next time; None:
            as often.
    """
    wait = FIRST_WAIT_S
    attempts = attempts or ATTEMPTS
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except RtlDistError:
            raise
        # Each kind of storage has exceptions of its own, none with a common base.
        except Exception as error:
            if _is_missing(error, url):
                raise ShardError(f"{url} is not there; restore it or correct data.path") from error
            if _is_refused(error):
                raise ShardError(
                    f"{url} may not be read: {_reason(error)}; check the credentials"
                ) from error
            is_slow = isinstance(error, TimeoutError)
            if attempt == attempts or (is_slow and slow and attempt >= slow):
                raise RemoteError(
                    f"cannot read {url}: {_reason(error)} ({attempt} attempts); check the URL"
                    " and the network, then start the same command again"
                ) from error
            if attempt > 1:  # once is nothing
                _say_seldom(f"{url}: {_reason(error)}; trying again for some minutes")
            time.sleep(wait * random.uniform(1, 2))  # many workers must not come back together
            wait *= 2
    raise AssertionError("unreachable")


def _say_seldom(text: str) -> None:
    """Many shards wait for the same server: one line for all of them."""
    now = time.monotonic()
    if now - _said_at[0] > SILENCE_S:
        _said_at[0] = now
        LOG.info("%s", text)


def _is_missing(error: BaseException, url: str) -> bool:
    if _status(error) in (404, 410):
        return True
    # fsspec's HTTP says "not found" of any failure to learn a size
    return isinstance(error, FileNotFoundError) and not (_is_http(url) and error.__cause__)


def _is_refused(error: BaseException) -> bool:
    no_credentials = "Credentials" in type(error).__name__  # botocore's, google.auth's
    return isinstance(error, PermissionError) or _status(error) in (401, 403) or no_credentials


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, which each kind of storage keeps elsewhere."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif hasattr(error, "status"):  # aiohttp
            status = error.status
        else:
            status = getattr(error, "code", None)  # gcsfs
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _reason(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
