"""INPUT of ``rtl-dist predict``, whatever it is, to the images that it means, in order."""

from __future__ import annotations

import glob
import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path

from rtl_dist.core.errors import DataError, UserError
from rtl_dist.core.text import and_more, shorten, shown
from rtl_dist.core.urls import Redirects, is_url, secret_in
from rtl_dist.data.format.description import DESCRIPTION
from rtl_dist.data.format.tar_reader import walk
from rtl_dist.data.storage.remote import files_of, size_of
from rtl_dist.inference.listing import ListingWriter
from rtl_dist.inference.written import Written
from rtl_dist.prepare.image_file import may_be_image
from rtl_dist.prepare.indexing.local_copy import local_copy
from rtl_dist.prepare.patterns import without_braces
from rtl_dist.prepare.sources.csv_table import Row, file_column_of, open_table
from rtl_dist.prepare.sources.items import IMAGE_SUFFIXES
from rtl_dist.prepare.sources.layout import TABLES
from rtl_dist.prepare.sources.listed_files import ListedFiles
from rtl_dist.prepare.sources.walk import walk_files

STDIN = "-"
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LISTS = (".txt", ".lst", ".list")
_ROWS_TRIED = 5
_NAMED = 3  # of what is passed over


class Finder:
    """Puts what is found into a listing, and remembers what it passed over."""

    def __init__(
        self,
        listing: ListingWriter,
        folder: Path,
        *,
        written: Written | None = None,
        stdin: Iterable[bytes] = (),
        file_column: str | None = None,
        redirects: Redirects = "origin",
    ) -> None:
        """
        Args:
            folder: where tars behind URLs are kept meanwhile.
            written: what is no input, as the predict itself writes it; None: what is in ``folder``.
            stdin: the lines of the list that ``-`` means.
            file_column: of tables; None: it is found.
            redirects: of URLs, whether they are followed to other servers, too.
        """
        self._listing, self._folder, self._stdin = listing, folder, stdin
        self._written = Written(folder) if written is None else written
        self._file_column, self._redirects = file_column, redirects
        self._passed_over: list[str] = []
        self._num_passed_over = 0
        self._notes: list[str] = []
        self._had_table = False

    def find(self, words: Sequence[str]) -> list[str]:
        """Lists all that the words mean: files, folders, patterns, URLs, tables, tars and ``-``.

        Returns:
            what was guessed or passed over: a line each, to be said.

        Raises:
            UserError: a word means nothing, or is not what it should be.
            DataError: a tar or a table is damaged, or there is no image at all.
        """
        if list(words).count(STDIN) > 1:
            raise UserError("- is given twice: there is one list on stdin")
        if len(words) == 1 and words[0].lower().endswith(_LISTS) and os.path.isfile(words[0]):
            raise UserError(
                f"{shown(words[0])} is no image: if it lists images, one a line, give it on stdin,"
                f" as in: predict MODEL - < {shown(words[0])}"
            )
        for word in words:
            before = self._listing.count
            for name in [word] if word == STDIN else without_braces(word, what="inputs"):
                self._find(name)
            if self._listing.count == before:
                raise DataError(self._nothing_in(word))
        if self._file_column is not None and not self._had_table:
            raise UserError("--file-column was given, but no INPUT is a table: leave it out")
        if self._num_passed_over:
            self._notes.append(f"passed over, as no images by their names: {self._others()}")
        return self._notes

    def _find(self, word: str) -> None:
        if word == STDIN:
            for line in _lines(self._stdin):
                self._find_listed(line)
        elif is_url(word):
            self._find_url(word)
        elif os.path.lexists(word):
            self._written.refuse(word)
            self._find_local(word)
        elif any(one in word for one in "*?["):
            matches = sorted(glob.glob(word, recursive=True))
            if not matches:
                raise UserError(f"{shown(word)} fits no file: correct the pattern")
            for match in matches:
                if "**" not in word or not os.path.isdir(match):  # what is in it fits too
                    self._find_match(match)
        else:
            raise UserError(
                f"no such input: {shown(word)}; give files, folders, patterns, .csv tables, .tar"
                " files, URLs, or - for a list on stdin"
            )

    def _find_local(self, path: str) -> None:
        lower = path.lower()
        if os.path.isdir(path):
            self._find_in_folder(path)
        elif lower.endswith(TABLES):
            self._find_in_table(Path(path))
        elif lower.endswith(_TARS):
            self._find_in_tar(path, path)
        else:
            self._listing.add_file(path)

    def _find_match(self, path: str) -> None:
        """What fits a pattern, or lies in a folder: not all need be images."""
        lower = path.lower()
        if self._written.has(path):
            return
        if os.path.isdir(path) or lower.endswith((*TABLES, *_TARS)):
            self._find_local(path)
        elif lower.endswith(IMAGE_SUFFIXES) or may_be_image(Path(path)):
            self._listing.add_file(path)
        else:
            self._pass_over(path)

    def _find_listed(self, line: str) -> None:
        """A line of a list: what is not there is an input that cannot be read."""
        if is_url(line):
            self._find_url(line)
        elif line.lower().endswith((*TABLES, *_TARS)) or os.path.isdir(line):
            self._find_local(line)
        elif not self._written.has(line):
            self._listing.add_file(line)

    def _find_url(self, url: str) -> None:
        if url.startswith(("file://", "local://")):
            self._find(url.split("://", 1)[1])
            return
        if reason := secret_in(url):
            raise UserError(reason)
        path = url.split("?")[0]
        if path.endswith("/") or "*" in path:
            for file in files_of(url):
                if file.lower().endswith(IMAGE_SUFFIXES):
                    self._listing.add_url(file)
                elif file.lower().endswith(_TARS):
                    self._find_in_tar(self._fetched(file), file)
                else:
                    self._pass_over(file)
        elif path.lower().endswith(_TARS):
            self._find_in_tar(self._fetched(url), url)
        else:
            self._listing.add_url(url)

    def _fetched(self, url: str) -> str:
        """The local copy of a tar; it stays until all is predicted, also for the next start."""
        path = self._folder / f"{sha256(url.encode()).hexdigest()[:16]}.fetched"
        if path.is_file() and path.stat().st_size == size_of(url, self._redirects):
            return str(path)
        with local_copy(url, self._folder, self._redirects) as copy:
            with suppress(FileNotFoundError):
                path.unlink()  # of an earlier start: it is another by now
            os.link(copy, path)
        return str(path)

    def _find_in_folder(self, folder: str) -> None:
        if os.path.isfile(os.path.join(folder, DESCRIPTION)):
            raise UserError(
                f"{shown(folder)} is a data set: say which of its splits with --split (to predict"
                " its pictures), or give a folder of images"
            )
        odd: list[tuple[Path, str]] = []
        for file in walk_files(Path(folder), Path(folder), odd):
            if self._written.has(str(file)):
                continue
            if file.name.lower().endswith(TABLES):  # of this folder, most likely: not of others
                self._pass_over(str(file))
            else:
                self._find_match(str(file))
        self._notes += [f"passed over: {shown(str(path))} {what}" for path, what in odd[:_NAMED]]
        if len(odd) > _NAMED:
            self._notes.append(f"passed over: {len(odd) - _NAMED:,} more such links and devices")

    def _find_in_tar(self, path: str, name: str) -> None:
        """Members that are images by their names, in the tar's order."""
        try:
            status = os.stat(path)
            stamp = "" if is_url(name) else str(status.st_mtime_ns)
            self._listing.add_tar(path, f"{name} {status.st_size} {stamp}")
            for member in walk(Path(path)):
                base = member.name.rpartition("/")[2]
                where = f"{name}/{member.name}"
                if base.startswith(".") or not base.lower().endswith(IMAGE_SUFFIXES):
                    self._pass_over(where)
                elif member.oddity:
                    self._listing.add_fault(where, f"is {member.oddity}, not a plain file")
                else:
                    self._listing.add_member(where, member.offset, member.size)
        except OSError as error:
            raise DataError(f"{shown(name)} cannot be read: {error.strerror}") from error
        except DataError as error:
            what = str(error).partition(", or train on it")[0]
            raise DataError(f"{shown(name)} {what}") from error

    def _find_in_table(self, path: Path) -> None:
        self._had_table = True
        files = ListedFiles(path.parent)
        with open_table(path) as (header, rows):
            tried = list(islice(rows, _ROWS_TRIED))
            named = [name for name in header if name]
            column = file_column_of(path, named, tried, self._file_column, files.is_file)
            for row in chain(tried, rows):
                self._find_in_row(row, column, files)
        self._notes += files.notes
        if column != "file" and self._file_column is None:
            self._notes.append(f"column {column!r} of {path.name} is taken for the images' files")

    def _find_in_row(self, row: Row, column: str, files: ListedFiles) -> None:
        written = row.cells[column]
        if is_url(written):
            self._find_url(written)
        elif not written:
            self._listing.add_fault(row.where, f"has nothing in column `{column}`")
        elif os.path.isabs(written) and os.path.isfile(written):
            self._listing.add_file(written)
        else:
            try:
                found = files.find(written)
            except DataError as error:
                self._listing.add_fault(written, str(error))
            else:
                self._listing.add_file(str(files.root / found), written)

    def _pass_over(self, name: str) -> None:
        self._num_passed_over += 1
        if len(self._passed_over) < _NAMED:
            self._passed_over.append(name)

    def _others(self) -> str:
        return shorten(self._passed_over) + and_more(self._num_passed_over - len(self._passed_over))

    def _nothing_in(self, word: str) -> str:
        what = (
            "the list on stdin names nothing" if word == STDIN else f"{shown(word)} holds no image"
        )
        others = f" (but {self._others()})" if self._num_passed_over else ""
        return f"{what}{others}: there is nothing to predict"


def _lines(stdin: Iterable[bytes]) -> Iterator[str]:
    """Of a list, in lines or (``find -print0``) behind NULs.

    Raises:
        UserError: it is UTF-16, whose zeros would end names.
    """
    for number, line in enumerate(stdin):
        if number == 0 and line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise UserError("the list on stdin is UTF-16: write it in UTF-8")
        line = line.removeprefix(BOM_UTF8) if number == 0 else line
        for name in line.split(b"\0"):
            if name := name.strip(b"\r\n"):
                yield os.fsdecode(name)
