"""Tar shards give the rows that a table gives; a broken one is a sentence, and what may be a pickle stays shut."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
import tempfile
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.data.cache import Cache
from diffalign.data.columns import Tally, detect_layout, read_pictures, read_rows
from diffalign.data.images import MAX_BYTES
from diffalign.errors import DataError

from .test_cache import build
from .toy import picture, spec


def tar(path: Path, files: list[tuple[str, bytes | str]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            content = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def pair(i: int, label: str = "1") -> list[tuple[str, bytes | str]]:
    """As the published shards of Pick-a-Pic: names with a kind."""
    return [(f"{i:04d}.original_prompt.txt", f"prompt {i % 3}"), (f"{i:04d}.jpg_0.jpg", picture(i, format="JPEG")),
            (f"{i:04d}.jpg_1.jpg", picture(i + 1000, format="JPEG")), (f"{i:04d}.label_0.txt", label)]


def read(path, tally=None, **options):
    return list(read_rows(spec(path, **options), tally if tally is not None else Tally()))


def facts(rows):
    return [(row.id, row.prompt, row.utility, row.soft, [image.read() for image in row.images]) for row in rows]


@pytest.fixture
def parted(tmp_path):
    """Six pairs in three shards of a folder, and in one parquet file."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        tar(folder / f"pairs-{shard:03d}.tar", [file for i in (2 * shard, 2 * shard + 1) for file in pair(i, str(i % 2))])
    table = {"caption": [f"prompt {i % 3}" for i in range(6)], "label_0": [float(i % 2) for i in range(6)],
             "jpg_0": [picture(i, format="JPEG") for i in range(6)],
             "jpg_1": [picture(i + 1000, format="JPEG") for i in range(6)]}
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "pairs.parquet"))
    return tmp_path


@pytest.mark.parametrize("path", ["shards", "shards/pairs-{000..002}.tar", "shards/pairs-*.tar", "shards/pairs-00[0-2].tar"])
def test_shards_are_the_table(parted, path):
    """The same rows, hence the same records, file by file and byte by byte, and the same identity."""
    tally = Tally()
    rows = read(parted / path, tally)
    assert facts(rows) == facts(read(parted / "pairs.parquet")) and (tally.layout, tally.rows) == ("pickapic", 6)
    assert [row.where for row in rows[1:3]] == ["pairs-000.tar sample 0001", "pairs-001.tar sample 0002"]
    assert rows[0].images[1].where == "pairs-000.tar sample 0000, jpg_1"
    reports = [build(source, parted / name)[0] for name, source in (("a", parted / path), ("b", parted / "pairs.parquet"))]
    assert reports[0].groups == 6 and Cache(reports[0].manifest).identity == Cache(reports[1].manifest).identity
    kept = [{file.relative_to(parted / name / "cache"): file.read_bytes() for file in (parted / name).rglob("*.arrow")}
            for name in "ab"]
    assert kept[0] == kept[1] and len(kept[0]) == 7


def test_one_shard_and_the_other_readers(parted):
    path = parted / "shards" / "pairs-001.tar"
    assert [row.prompt for row in read(path)] == ["prompt 2", "prompt 0"]
    assert detect_layout(spec(path)) == "pickapic"
    assert [row.id for row in read_pictures(spec(parted / "shards"))] == list(range(6))


def test_a_shard_that_changed_is_read_again(parted):
    source = parted / "shards" / "pairs-{000..002}.tar"
    first = build(source, parted)[0]
    again, encoders = build(source, parted)
    assert encoders.calls == [] and again.manifest == first.manifest
    tar(parted / "shards" / "pairs-002.tar", [file for i in (4, 5, 6) for file in pair(i)])
    assert build(source, parted)[0].groups == 7


def test_splits_of_a_folder(tmp_path):
    tar(tmp_path / "train-000.tar", pair(0))
    tar(tmp_path / "test-000.tar", pair(1))
    assert [read(tmp_path, split=split)[0].prompt for split in ("train", "test")] == ["prompt 0", "prompt 1"]
    with pytest.raises(DataError, match="has no split 'validation'; there are train, test"):
        read(tmp_path, split="validation")


@pytest.mark.parametrize("files,layout,want", [
    ([("a.jpg", picture(0)), ("a.txt", "a cat\n"), ("a.cls", "1")], "unpaired", ("a cat", (1.0,))),
    ([("a.png", picture(0)), ("a.json", '{"caption": "ü", "label": false}')], "unpaired", ("ü", (-1.0,))),
    ([("a.jpg_0", picture(0)), ("a.jpg_1", picture(1)), ("a.label_0", "0"), ("a.caption", "c")], "pickapic",
     ("c", (0.0, 1.0))),
    ([("x/y/a.chosen.PNG", picture(0)), ("x/y/a.rejected.webp", picture(1)), ("x/y/a.prompt.txt", "\ufeffp")],
     "chosen_rejected", ("p", (1.0, 0.0))),
    ([("a.jpg_0.jpg", picture(0)), ("a.jpg_1.jpg", picture(1)), ("a.json", '{"prompt": "p", "score_0": 1, "score_1": 2.5}'),
      ("a.mp4", b"\xff" * 9), ("a.clip.msgpack", b"\xff"), ("a.jpg_0.md5", b"\xff")], "pickapic_scored", ("p", (1.0, 2.5)))])
def test_names_of_files_are_columns(tmp_path, files, layout, want):
    tally = Tally()
    (row,) = read(tar(tmp_path / "t.tar", files), tally)
    assert (tally.layout, row.prompt, row.utility) == (layout, *want)


def test_a_file_wins_over_the_json(tmp_path):
    path = tar(tmp_path / "t.tar", [*pair(0), ("0000.json", '{"label_0": 0, "user": 7}')])
    assert [(row.utility, row.user) for row in read(path)] == [((1.0, 0.0), "7")]


def test_bad_samples_are_named(tmp_path):
    path = tar(tmp_path / "t.tar", [*pair(0), *pair(1)[:3], *pair(2)[1:], ("0003.json", "{"), ("0004.json", "[1]"),
                                    *pair(5)[:3], ("0005.label_0.txt", b"\xff"), *pair(6)])
    with pytest.raises(DataError, match="t.tar sample 0001: label_0: missing or empty. Mend the row, or set data.bad_rows"):
        read(path)
    tally = Tally()
    assert [row.id for row in read(path, tally, bad_rows="skip")] == [0, 6]
    assert [message.split(" (")[0] for message in tally.bad] == [
        "t.tar sample 0001: label_0: missing or empty", "t.tar sample 0002: prompt: missing or empty",
        "t.tar sample 0003: json: no JSON object", "t.tar sample 0004: json: a JSON object is needed, got list",
        "t.tar sample 0005: label_0.txt: not UTF-8 text"]


def test_what_is_not_there_or_no_archive(tmp_path):
    for name in ("t.tar", "t-*.tar", "t-{0..3}.tar", "t-{0..99999999999}.tar"):
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / name)
    with pytest.raises(DataError, match=r"the range \{5\.\.1\} counts down; write \{1\.\.5\}"):
        read(tmp_path / "t-{5..1}.tar")
    (tmp_path / "t.tar").write_bytes(b"no archive" * 99)
    with pytest.raises(DataError, match="t.tar: cannot be read as a data set"):
        read(tmp_path / "t.tar")
    whole = tar(tmp_path / "u.tar", [*pair(0), *pair(1)]).read_bytes()
    (tmp_path / "u.tar").write_bytes(whole[:whole.index(b"0001.jpg_0") + 600])
    with pytest.raises(DataError, match="u.tar sample 0000, or what follows it: cannot be read as a data set .unexpected end"):
        read(tmp_path / "u.tar")
    tar(tmp_path / "v.tar", [*pair(0), pair(0)[-1]])
    with pytest.raises(DataError, match="v.tar sample 0000: two files called 'label_0.txt'"):
        read(tmp_path / "v.tar")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pyd", "pickle", "pkl", "PTH", "pt", "ckpt", "npy", "npz", "bin", "joblib"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_pickle_is_refused_by_name(tmp_path, kind, folder, monkeypatch):
    """Also in a folder, which ``datasets`` would read by decoders of its own; and before a byte of it is read."""
    path = tar(tmp_path / "t.tar", [*pair(0), (f"0000.extra.{kind}", pickle.dumps(Bomb(tmp_path / "ran"))), *pair(1)])
    opened, plain = [], tarfile.TarFile.extractfile

    def watched(self, member):
        if member.name.endswith(kind):
            opened.append(member.name)
        return plain(self, member)
    monkeypatch.setattr(tarfile.TarFile, "extractfile", watched)
    with pytest.raises(DataError, match=rf"t.tar: holds 0000.extra.{kind}, and .{kind.lower()} can be a pickle"):
        read(tmp_path if folder else path, bad_rows="skip")
    assert not opened and not (tmp_path / "ran").exists()


def test_nothing_leaves_the_archive(tmp_path):
    """Names that lead out, links and devices: nothing is written, and a path in a JSON is no file beside the shard."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "t.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("../../out.jpg_0.jpg", "/etc/out.jpg_1.jpg", "../../out.caption.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"x"))
        for name, kind in (("a", tarfile.SYMTYPE), ("b", tarfile.LNKTYPE), ("c", tarfile.CHRTYPE)):
            entry = tarfile.TarInfo(f"{name}.jpg_0.jpg")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError):
        read(path)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "in" / "x.png").write_bytes(picture(0))
    tar(path, [("a.json", json.dumps({"prompt": "p", "chosen": "x.png", "rejected": "../in/x.png"}))])
    with pytest.raises(DataError, match="a, chosen|a: chosen: the data set holds paths; say with data.image_root"):
        read(path)


def test_nothing_of_an_archive_is_lost_unsaid(tmp_path):
    """Where tarfile would stop without a word: a header damaged or cut off, no end mark, a second archive behind the first.
    Not for data that is skipped either."""
    whole = tar(tmp_path / "t.tar", [*pair(0), *pair(1)]).read_bytes()
    at = whole.index(b"0001.")
    damaged = bytearray(whole)
    damaged[at + 150] ^= 1  # in the header's own checksum
    for content, why in ((damaged, "bad checksum: the archive is damaged, or cut"), (whole[:at], "empty header: the archive"),
                         (whole[:at + 100], "truncated header: the archive"), (whole + whole, "something follows its end")):
        (tmp_path / "u.tar").write_bytes(content)
        with pytest.raises(DataError, match=f"u.tar.*: cannot be read as a data set .{why}"):
            read(tmp_path / "u.tar", bad_rows="skip")
    (tmp_path / "u.tar").write_bytes(whole[:at] + bytes(1024))  # the shortest end mark
    assert [row.prompt for row in read(tmp_path / "u.tar")] == ["prompt 0"]


def test_a_link_is_named_and_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "t.tar"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        tar(path, pair(0))
        with tarfile.open(path, "a") as archive:
            entry = tarfile.TarInfo("0001.jpg_0.jpg")
            entry.type, entry.linkname = kind, "0000.jpg_0.jpg"
            archive.addfile(entry)
        tally = Tally()
        assert len(read(path, tally, bad_rows="skip")) == 1
        assert tally.bad[0].startswith("t.tar sample 0001: jpg_0.jpg: a link, which is not followed; write the file itself")
    entry.type, entry.size = tarfile.REGTYPE, MAX_BYTES + 1  # the header alone: reading on would fail otherwise
    path.write_bytes(entry.tobuf())
    with pytest.raises(DataError, match="t.tar sample 0001: jpg_0.jpg is larger than 1 GiB"):
        read(path)


def test_broken_archives_are_sentences(tmp_path):
    """Bytes flipped, cut and inserted: rows or a DataError, never another error."""
    whole, rng = tar(tmp_path / "t.tar", [file for i in range(3) for file in pair(i)]).read_bytes(), random.Random(0)
    for _ in range(80):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.choice([rng.randrange(len(content)), rng.randrange(0, len(content), 512) + rng.randrange(160)])
            at = min(at, len(content) - 1)
            content[at:at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
        (tmp_path / "u.tar").write_bytes(bytes(content))
        try:
            read(tmp_path / "u.tar", bad_rows="skip")
        except DataError:
            pass


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\ufeff"), min_size=1, max_size=20)
KEYS = st.text("abcXYZ0123_-/ü", min_size=1, max_size=12).filter(
    lambda key: "//" not in key and not key.startswith("/") and key[-1] != "/" and not key.split("/")[-1].startswith("__"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(TEXTS, st.sampled_from([0, 1, 0.25]), st.permutations(range(4))), min_size=1, max_size=5),
       st.lists(KEYS, min_size=5, max_size=5, unique=True), st.integers(1, 3))
def test_any_order_of_a_sample_gives_its_row(rows, keys, shards):
    """However files lie in a sample and samples in shards, a row is what was written."""
    with tempfile.TemporaryDirectory() as folder:
        per = -(-len(rows) // shards)
        for shard in range(-(-len(rows) // per)):
            files = []
            for i, (text, label, order) in list(enumerate(rows))[shard * per:(shard + 1) * per]:
                own = [(f"{keys[i]}.caption.txt", text), (f"{keys[i]}.label_0.txt", str(label)),
                       (f"{keys[i]}.jpg_0.jpg", bytes([i])), (f"{keys[i]}.jpg_1.jpg", b"x")]
                files += [own[j] for j in order]
            tar(Path(folder) / f"t-{shard}.tar", files)
        found = read(Path(folder) / "t-*.tar")
    assert [(row.prompt, row.images[0].data) for row in found] == [(text, bytes([i])) for i, (text, *_) in enumerate(rows)]
    assert [row.utility for row in found] == [(1.0, 0.0) if label > 0.5 else (0.0, 1.0) for _, label, _ in rows]
