"""Whatever happens to the bytes of a tar or an index: a DataError, or the truth; never a hang."""

import io
import json
import shutil
import tarfile
import zlib

import numpy as np
import pytest
from foreign_shards import indexed, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pack_images import image_bytes

from rtl_dist.core.errors import DataError, RtlDistError
from rtl_dist.data.format.dataset import check_index, open_dataset
from rtl_dist.data.format.reader import SampleReader
from rtl_dist.data.format.tar_reader import walk

few = settings(
    max_examples=120,
    derandomize=True,
    database=None,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
more = settings(few, max_examples=400)
# (where, the byte that is put there), where as a fraction of the file
damage = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4
)
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def whole_tar(folder, form):
    path = folder / f"whole-{form}.tar"
    if not path.exists():
        members = []
        for i, key in enumerate(("a", "n" * 120, "ü", "d/e")):
            if form == tarfile.USTAR_FORMAT:
                key = key[:50]
            members += [(f"{key}.png", image_bytes(i, (3, 2), "PNG")), (f"{key}.cls", str(i % 2))]
        write_tar(path, members, form)
        path.write_bytes(path.read_bytes()[: _end_of_members(path) + 1024])  # most of it was zeros
    return path.read_bytes()


def _end_of_members(path):
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
        return last.offset_data + -(-last.size // 512) * 512


def damaged(content, places):
    content = bytearray(content)
    for where, byte in places:
        content[int(where * len(content))] = byte
    return bytes(content)


def by_tarfile(path):
    """offset -> content of each plain file, as Python reads the tar."""
    with tarfile.open(path) as tar:
        return {m.offset_data: tar.extractfile(m).read() for m in tar if m.isreg() and not m.sparse}


def check_indexed_or_refused(path, out):
    shutil.rmtree(out, ignore_errors=True)
    try:
        dataset, report = indexed(
            path, out=out, allow_missing_classes=True, skip_decode=True, image="png"
        )
    except RtlDistError:
        assert not (out / "dataset.json").exists()
        return None
    truth = by_tarfile(path)
    split = dataset.split("train")
    reader = SampleReader(split)
    for i in range(split.num_samples):
        try:
            content = reader.read(i)
        except DataError as error:  # damaged in the tar already, and known by its own checksum
            assert "PNG" in str(error)  # noqa: PT017 - some samples fail, most must not
        else:
            assert content == truth[int(split.index["offset"][i])]
    reader.close()
    assert {m.offset for m in walk(path) if not m.oddity} == set(truth)
    return split.num_samples + len(report.left_out)


@few
@given(formats, damage)
def test_damaged_bytes(tmp_path, form, places):
    path = tmp_path / "x.tar"
    whole = whole_tar(tmp_path, form)
    path.write_bytes(damaged(whole, places))
    check_indexed_or_refused(path, tmp_path / "out")


@more
@given(formats, st.floats(0, 1, exclude_max=True), st.integers(0, 255))
def test_one_damaged_header_byte_loses_no_sample_silently(tmp_path, form, where, byte):
    """In a plain header; the bodies of PAX and long-name records have no checksum to fail."""
    whole = whole_tar(tmp_path, form)
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    with tarfile.open(path) as tar:
        headers = [m.offset_data - 512 for m in tar]
    at = headers[int(where * len(headers))] + int(where * 512 * len(headers)) % 512
    changed = bytearray(whole)
    changed[at] = byte
    path.write_bytes(changed)
    try:
        names = [m.name for m in walk(path)]
    except DataError:
        assert changed != whole
        return
    assert len(names) == 8


@few
@given(formats, st.floats(0, 1))
def test_cut_anywhere(tmp_path, form, where):
    whole = whole_tar(tmp_path, form)
    path = tmp_path / "x.tar"
    path.write_bytes(whole[: int(where * len(whole))])
    seen = check_indexed_or_refused(path, tmp_path / "out")
    assert seen == (4 if where * len(whole) >= len(whole) - 512 else None)


@more
@given(st.binary(max_size=3000), st.booleans(), formats)
def test_any_bytes_as_a_tar(tmp_path, content, after_a_header, form):
    path = tmp_path / "x.tar"
    if after_a_header:
        content = whole_tar(tmp_path, form)[:512] + content
    path.write_bytes(content)
    try:
        members = list(walk(path))
    except DataError:
        return
    assert {m.offset for m in members if not m.oddity} == set(by_tarfile(path))


@more
@given(
    st.sampled_from(sorted(tarfile.SUPPORTED_TYPES)) | st.binary(min_size=1, max_size=1),
    st.integers(-(1 << 62), 1 << 62) | st.integers(0, 4000),
    st.binary(max_size=700)
    | st.lists(
        st.builds(
            "{} {}={}\n".format,
            st.integers(0, 60),
            st.sampled_from(["path", "size", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "GNU.sparse.minor", "hdrcharset", "linkpath"]),
            st.sampled_from(["", "1", "0", "-1", "1,2", "x", "BINARY", "9" * 30, "nan"]),
        ),
        max_size=5,
    ).map(lambda records: "".join(records).encode()),
)  # fmt: skip
def test_headers_that_pass_their_checksum(tmp_path, kind, size, body):
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, size
    path = tmp_path / "x.tar"
    content = header.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)
    path.write_bytes(content + whole_tar(tmp_path, tarfile.GNU_FORMAT))
    try:
        members = list(walk(path))
    except DataError:
        return
    size = path.stat().st_size
    assert all(0 <= m.offset <= m.offset + m.size <= size for m in members if not m.oddity)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    labels = ['{"label": ["x", "y"]}', '{"label": ["y"]}']
    for name, extension, contents in (("one", "cls", "01"), ("many", "json", labels)):
        members = []
        for i, label in enumerate(contents):
            members += [(f"{i}.jpg", image_bytes(i)), (f"{i}.{extension}", label)]
        indexed(write_tar(folder / name / "train.tar", members), out=folder / name)
    return folder


def read_all(folder):
    """Everything that training reads: (images, labels, class names)."""
    opened = open_dataset(folder)
    split = opened.split("train")
    check_index(opened, "train")
    reader = SampleReader(split)
    numbers = np.arange(split.num_samples)
    images = [zlib.crc32(reader.read(i)) for i in numbers]
    reader.close()
    return images, split.labels(numbers).tolist(), opened.classes


@more
@given(
    st.sampled_from(["dataset.json", "index/train.npy", "index/train.labels.npy"]),
    damage,
    st.none() | st.floats(0, 1),
)
def test_a_damaged_description_or_index(dataset, tmp_path, name, places, cut):
    source = dataset / ("many" if name.endswith("labels.npy") else "one")
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    content = damaged((copy / name).read_bytes(), places)
    (copy / name).write_bytes(content if cut is None else content[: int(cut * len(content))])
    try:
        found = read_all(copy)
    except DataError:
        return
    assert found == read_all(source)


values = st.sampled_from(
    [None, -1, 0, 1.5, "x", "", [], {}, [1], True, 1 << 70, "../../etc/passwd"]
)


@more
@given(st.integers(0, 60), values)
def test_a_changed_value_in_the_description(dataset, tmp_path, number, value):
    """Changed and fingerprinted anew, as by someone who edits it with care."""
    from rtl_dist.data.format.description import fingerprint_of

    source = dataset / "one"
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    content = json.loads((copy / "dataset.json").read_text())
    places = list(_places_of(content))
    where, key = places[number % len(places)]
    where[key] = value
    if content.get("fingerprint") is not value:
        content["fingerprint"] = fingerprint_of(content)
    (copy / "dataset.json").write_text(json.dumps(content))
    try:
        images, labels, _ = read_all(copy)
    except DataError:
        return
    assert (images, labels) == read_all(source)[:2]


def _places_of(content):
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places_of(content[key])


def test_a_numpy_header_that_asks_for_too_much(dataset, tmp_path):
    shutil.copytree(dataset / "one", tmp_path / "copy")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|O", "fortran_order": False, "shape": (1 << 60,)}
    )
    (tmp_path / "copy/index/train.npy").write_bytes(header.getvalue() + b"cos\nsystem\n")
    with pytest.raises(DataError):
        read_all(tmp_path / "copy")
