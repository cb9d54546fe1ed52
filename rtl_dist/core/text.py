"""Numbers and names as people read them."""

from __future__ import annotations

import difflib
import reprlib
import shlex
import unicodedata
from collections.abc import Iterable, Sequence

_AND_MORE = " and {:,} more"
# What a terminal obeys, or has no sign for: controls, marks that turn the direction, halves of
# characters, ends of lines.
_NOT_SHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # of emoji and of several scripts; they move no cursor
_MOST_COMPARED = 100  # letters of a name that is looked for among the known ones


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else "a number of more than 40 digits"


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxdict = 3, 5, 5, 5
_BRIEF.maxstring = _BRIEF.maxother = 100


def brief(value: object) -> str:
    """A value as an error shows it, whatever it holds: on one line, cut where it is long."""
    shown = _BRIEF.repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def shown(text: str) -> str:
    """A name from outside as one line of a terminal: what cannot be printed (line feeds, escape
    codes, marks that turn the direction, bytes that are no UTF-8) is escaped as Python does.

    Everything that is printed and was chosen by others goes through this: or a file's name could
    say what we say.
    """
    if text.isprintable():
        return text
    return "".join(one if is_showable(one) else _escaped(one) for one in text)


def shown_lines(text: str) -> str:
    """``shown`` of each line of what may have several."""
    return "\n".join(map(shown, text.split("\n")))


def is_showable(text: str) -> bool:
    """Whether ``shown`` leaves it as it is."""
    return all(unicodedata.category(one) not in _NOT_SHOWN or one in _JOINERS for one in text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode()


def command(*words: object) -> str:
    """A command of ours as it can be pasted into a shell, whatever is in its paths."""
    return shlex.join(["rtl-dist", *map(str, words)])


def and_more(count: int, form: str = _AND_MORE) -> str:
    """What stands behind the shown part of a list of which ``count`` are not shown; may be nothing.

    Args:
        form: other words for it, with ``{:,}`` for the count.
    """
    return form.format(count) if count > 0 else ""


def shorten(names: Sequence[str], most: int = 5, form: str = _AND_MORE) -> str:
    """At most so many of the names and how many more there are, for an error message."""
    return ", ".join(map(shown, names[:most])) + and_more(len(names) - most, form)


def did_you_mean(name: str, known: Iterable[str], form: str = "{}") -> str:
    """``; did you mean X?`` for the nearest known name, upper or lower case; nothing where none is
    near. To stand behind the message that there is no such name.

    Args:
        form: how X is written, with ``{}`` or ``{!r}`` for the name.
    """
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {shown(form.format(near))}?"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like one that is not known, upper or lower case; None: none is near."""
    if len(name) > _MOST_COMPARED:
        return None
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return lower[near[0]] if near else None


def readable_size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration(seconds: float) -> str:
    """A time for reading: ``42 s``, ``3 min 07 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
