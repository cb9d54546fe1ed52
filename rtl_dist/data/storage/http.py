"""HTTP as fsspec has it, but bounded: no more is read than was asked for, and from nowhere else.

A server may send without end, compress gigabytes of zeros, or send on to another one. So a body
comes as it is (``identity``) and in pieces, of which what is too much is left; and a redirect is
followed to the same origin only, unless the caller trusts where it leads. No cookies are kept, and
``.netrc`` has credentials for each host by itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem
from yarl import URL

from rtl_dist.core.errors import RemoteError, UserError
from rtl_dist.core.urls import Redirects

_MOST_REDIRECTS = 10
_PIECE = 1 << 16
_PLAIN = ("", "identity")
_REDIRECTS = (301, 302, 303, 307, 308)


async def _client(**options: Any) -> aiohttp.ClientSession:
    # as curl does: .netrc and proxies by what the environment says
    return aiohttp.ClientSession(
        trust_env=True, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(), **options
    )


class BoundedHTTP(HTTPFileSystem):
    """``cat_file`` and ``info`` of files behind http:// and https:// URLs.

    redirects: ``origin``: they are followed within a server; ``any``: to wherever they lead.
    seconds: after which a request is given up.
    """

    def __init__(self, *, redirects: Redirects, seconds: float) -> None:
        super().__init__(get_client=_client)
        self._redirects, self._timeout = redirects, aiohttp.ClientTimeout(total=seconds)

    async def _cat_file(
        self, url: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """The bytes from ``start`` to ``end``, both given; fewer where the file ends before.

        Raises:
            UserError, RemoteError: as ``_answer``; and whatever aiohttp raises.
        """
        assert start is not None
        assert end is not None
        headers = {"Range": f"bytes={start}-{end - 1}"}
        content = bytearray()
        async with self._answer("GET", url, headers) as response:
            self._raise_not_found_for_status(response, url)
            _require_plain(response, url)
            # a server that knows no ranges sends all of it
            skip = 0 if response.status == 206 else start
            async for piece in response.content.iter_chunked(_PIECE):
                content += piece[skip:]
                skip = max(0, skip - len(piece))
                if len(content) >= end - start:
                    break
        return bytes(content[: end - start])

    async def _info(self, url: str, **_: Any) -> dict[str, Any]:
        """``size`` is None where the server does not tell. Raises as ``_cat_file``."""
        size = None
        with suppress(aiohttp.ClientError, FileNotFoundError):  # some know no HEAD
            size = await self._told_size("HEAD", url)
        if size is None:
            size = await self._told_size("GET", url)
        return {"name": url, "size": size, "type": "file"}

    async def _told_size(self, method: str, url: str) -> int | None:
        async with self._answer(method, url, {}) as response:
            self._raise_not_found_for_status(response, url)
            _require_plain(response, url)
            return response.content_length

    @asynccontextmanager
    async def _answer(
        self, method: str, url: str, headers: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """
        Raises:
            UserError: it is at another server. RemoteError: the redirects do not end.
        """
        session = await self.set_session()
        headers = {"Accept-Encoding": "identity"} | headers
        target = self.encode_url(url)
        for _ in range(_MOST_REDIRECTS):
            async with session.request(
                method, target, headers=headers, allow_redirects=False, timeout=self._timeout
            ) as response:
                if response.status not in _REDIRECTS or "Location" not in response.headers:
                    yield response
                    return
                onward = target.join(_location(response, url))
            self._require_allowed(target, onward, url)
            target = onward
        raise RemoteError(f"cannot read {url}: its redirects do not end; correct the URL")

    def _require_allowed(self, target: URL, onward: URL, url: str) -> None:
        where = str(onward.with_path("/").with_user(None)) if onward.host else f"{onward.scheme}:"
        is_downgrade = target.scheme == "https" and onward.scheme != "https"
        if onward.scheme not in ("http", "https") or is_downgrade:
            raise RemoteError(f"cannot read {url}: it redirects to {where}, which is not followed")
        is_upgrade = (target.host, target.port, onward.port) == (onward.host, 80, 443)
        if self._redirects == "origin" and target.origin() != onward.origin() and not is_upgrade:
            raise UserError(
                f"{url} redirects to another server, {where}: if that is where the data should come"
                " from, set data.redirects=any (commands: --redirects any), or give its own URL"
            )


def _location(response: aiohttp.ClientResponse, url: str) -> URL:
    try:
        return URL(response.headers["Location"])
    except ValueError as error:
        raise RemoteError(f"cannot read {url}: it redirects to no address ({error})") from error


def _require_plain(response: aiohttp.ClientResponse, url: str) -> None:
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in _PLAIN:
        raise RemoteError(
            f"cannot read {url}: the server sends it compressed ({encoding[:20]!r}), though it was"
            " asked not to; have it send files as they are"
        )
