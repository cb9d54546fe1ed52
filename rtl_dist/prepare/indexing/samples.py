"""Which members make a sample, by webdataset's rule, and which of them are its image and label."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from webdataset.tariterators import base_plus_ext

from rtl_dist.core.errors import DataError
from rtl_dist.data.format.tar_reader import Member

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json", "txt", "label")  # in the order they are looked for
# webdataset passes over these, such as __index__/...
_META = re.compile(r"__[^/]*__($|/)")


class ChoiceNeededError(Exception):
    """A sample can be understood in several ways: ``option`` says which, of ``candidates``."""

    def __init__(self, option: str, candidates: tuple[str, ...]) -> None:
        super().__init__(option, candidates)
        self.option, self.candidates = option, candidates


@dataclass(slots=True)
class Sample:
    """Neighbouring members of one key."""

    key: str
    """What webdataset calls them together."""
    members: dict[str, Member] = field(default_factory=dict)
    """By extension, in lower case; of those that came twice, the last."""
    repeated: list[str] = field(default_factory=list)
    """Extensions that came twice."""
    odd: list[Member] = field(default_factory=list)
    """What is no plain file."""


def grouped(members: Iterable[Member]) -> Iterator[Sample]:
    """Samples in the tar's order, with the keys that webdataset gives them.

    Links, devices and sparse files do not end a sample; one that belongs to no sample beside it
    comes as a ``Sample`` without members.
    """
    current: Sample | None = None
    waiting: list[Sample] = []  # odd members, until it is known whether their sample follows
    for member in members:
        if _META.match(member.name):
            continue
        key, extension = base_plus_ext(member.name)
        if member.oddity:
            if current is not None and current.key == key:
                current.odd.append(member)
            else:
                waiting.append(Sample(key or member.name, odd=[member]))
            continue
        if key is None:  # no extension: nothing that webdataset would see
            continue
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = Sample(key)
            for odd in waiting:
                if odd.key == key:
                    current.odd += odd.odd
                else:
                    yield odd
            waiting.clear()
        extension = extension.lower()
        if extension in current.members:
            current.repeated.append(extension)
        current.members[extension] = member
    if current is not None:
        yield current
    yield from waiting


def image_of(sample: Sample, asked: tuple[str, ...]) -> str:
    """The extension of the image member: the first of ``asked`` that is there, or the only one.

    Raises:
        DataError: there is none, or it cannot be used.
        ChoiceNeededError: there are several, and none was asked for.
    """
    _check_whole(sample)
    if asked:
        found = [extension for extension in asked if extension in sample.members]
    else:
        found = [e for e in sample.members if e.rsplit(".", 1)[-1] in IMAGE_KINDS]
        if len(found) > 1:
            raise ChoiceNeededError("--image", tuple(sorted(found)))
    if not found:
        wanted = " or ".join(f".{extension}" for extension in asked) or "image"
        raise DataError(f"has no {wanted}{_held_by(sample)}")
    return found[0]


def label_of(sample: Sample, asked: str | None) -> str:
    """The extension of the label member: ``asked``, or the first of ``LABEL_EXTENSIONS``.

    Raises:
        DataError: there is none.
    """
    for extension in (asked,) if asked else LABEL_EXTENSIONS:
        if extension in sample.members:
            return extension
    wanted = f".{asked}" if asked else "label (.cls, .json, .txt or .label)"
    raise DataError(f"has no {wanted}{_held_by(sample)}")


def _check_whole(sample: Sample) -> None:
    if sample.odd:
        odd = sample.odd[0]
        raise DataError(f"its member {odd.name} is {odd.oddity}, not a plain file")
    if sample.repeated:
        raise DataError(f"has two members .{sample.repeated[0]}")


def _held_by(sample: Sample) -> str:
    return f"; it holds {', '.join(f'.{extension}' for extension in sample.members)}"
