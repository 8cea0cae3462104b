"""RELIABILITY E7: a cache is never half-true. Built once, resumed after a kill, missed by whatever changes."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.data import encoding, ledger, store
from diffalign.data.buckets import apply, plan
from diffalign.data.cache import Cache, short
from diffalign.data.columns import ImageRef
from diffalign.data.encoding import encode
from diffalign.data.images import decode, pixels
from diffalign.data.store import Store, intact
from diffalign.errors import DataError, ResourceError, UserError
from diffalign.world import Single

from .. import ranks
from .toy import Together, ToyEncoders, jsonl, pairs, picture, spec

ALONE = Single()


def build(path, folder, *, encoders=None, resolution=16, seed=0, part="train", facts=None, world=ALONE,
          **options):
    encoders = encoders or ToyEncoders()
    report = encode(spec(path, **options), lambda: encoders, cache_dir=folder / "cache", resolution=resolution, seed=seed,
                    part=part, facts=facts or encoders, world=world, progress=False)
    return report, encoders


def direct(data: bytes, encoders, resolution=16):
    """(mean, std) [C, h, w] as encoding in the loop would give."""
    image = decode(data, "test", 10**6)
    cut = apply(image, plan((image.height, image.width), (resolution, resolution), "test"))
    return [x[0].numpy() for x in encoders.encode_images(torch.from_numpy(pixels([cut])))]


def shards(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.arrow"))}


def test_the_cache_holds_what_the_encoders_say(tmp_path):
    report, encoders = build(pairs(tmp_path, 6, sizes=((16, 16), (40, 20))), tmp_path)
    assert (report.groups, report.images, report.prompts, report.encoded_images, report.encoded_prompts) == (6, 12, 3, 12, 3)
    cache = Cache(report.manifest)
    assert (len(cache), cache.k, cache.soft, cache.family) == (6, 2, False, "sdxl")
    for i, group in enumerate(cache.groups):
        assert (group.row, group.utility, cache.prompt(group.prompt)) == (i, (1.0, 0.0), f"prompt {i % 3}")
        for image, seed in zip(group.images, (i, i + 1000), strict=True):
            mean, std = cache.latent(image)
            want = direct(picture(seed, (16, 16) if i % 2 == 0 else (40, 20)), encoders)
            np.testing.assert_array_equal(mean, want[0])
            np.testing.assert_array_equal(std, want[1])
            assert not mean.flags.owndata and not mean.flags.writeable  # a view of the mapped file
        tokens, pooled = cache.text(group.prompt)
        want = encoders.encode_prompts([cache.prompt(group.prompt)])
        np.testing.assert_array_equal(tokens, want[0][0].numpy())
        np.testing.assert_array_equal(pooled, want[1][0].numpy())
    assert not cache.unconditional()[0].any()
    # 40 x 20 to 16 x 16: scaled to 32 x 16, (32 - 16)/2 = 8 columns cut on the left
    assert cache.size(cache.groups[1].images[0]) == [20, 40, 0, 8, 8]


def test_everything_is_encoded_once(tmp_path):
    """Six rows over two pictures and one prompt: two latents and one text, in one batch each."""
    path = pairs(tmp_path, 1)
    path.write_text(path.read_text() * 6)
    report, encoders = build(path, tmp_path)
    assert (report.groups, report.images, report.prompts) == (6, 2, 1)
    assert encoders.calls == [("images", 4), ("prompts", 4)]  # 2 and 1, in whole batches
    again, fresh = build(path, tmp_path, encoders=ToyEncoders())
    assert fresh.calls == [] and (again.encoded_images, again.groups) == (0, 6)


def test_encoders_are_not_loaded_for_a_whole_cache(tmp_path):
    path = pairs(tmp_path)
    build(path, tmp_path)
    report = encode(spec(path), lambda: pytest.fail("loaded"), facts=ToyEncoders(), cache_dir=tmp_path / "cache",
                    resolution=16, seed=0, progress=False)
    assert report.groups == 6


@pytest.mark.parametrize("change,images,prompts", [
    ({"encoders": ToyEncoders(vae="vae-2")}, 12, 0), ({"encoders": ToyEncoders(text="text-2")}, 0, 3),
    ({"resolution": 8}, 12, 0), ({"cache_dtype": "float16"}, 12, 3), ({"center_crop": False}, 12, 0),
    ({"random_flip": True}, 12, 0), ({"seed": 1}, 0, 0), ({"max_train_samples": 2}, 0, 0)])
def test_what_changes_misses_and_nothing_else(tmp_path, change, images, prompts):
    """Pictures of 40 x 20, so that another place of the crop is another crop."""
    path = pairs(tmp_path, sizes=((40, 20),))
    first, _ = build(path, tmp_path)
    report, _ = build(path, tmp_path, **change)
    assert report.encoded_prompts == prompts
    assert report.encoded_images == images if "center_crop" not in change else 8 <= report.encoded_images <= 12
    assert (Cache(first.manifest).identity == Cache(report.manifest).identity) == (change == {"seed": 1})


def test_mirrored_latents_are_of_the_mirrored_picture(tmp_path):
    report, encoders = build(pairs(tmp_path, 1), tmp_path, random_flip=True)
    cache = Cache(report.manifest)
    image = cache.groups[0].images[0]
    np.testing.assert_allclose(cache.latent(image, True)[0], cache.latent(image)[0][..., ::-1], atol=1e-6)
    assert not np.array_equal(cache.latent(image, True)[0], cache.latent(image)[0])


def test_a_changed_picture_is_noticed(tmp_path):
    path = pairs(tmp_path)
    first = Cache(build(path, tmp_path)[0].manifest)
    (tmp_path / "pictures" / "chosen2.png").write_bytes(picture(77))
    report, encoders = build(path, tmp_path, encoders=ToyEncoders())
    assert report.encoded_images == 1 and Cache(report.manifest).identity != first.identity


def test_identity_is_of_the_content(tmp_path):
    """A copied folder, another batch size, other names: the same data, hence the same identity."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = build(pairs(tmp_path / "a"), tmp_path / "a")[0]
    two = build(pairs(tmp_path / "b", name="other.jsonl"), tmp_path / "b", encode_batch_size=3)[0]
    assert Cache(one.manifest).identity == Cache(two.manifest).identity


@pytest.mark.parametrize("options,identity", [
    ({}, "de507f4d91eca00a5cd03060469f46fc83cb8680acf4133a93c94cc786e8d304"),
    ({"aspect_ratio_buckets": True, "random_flip": True}, "5b848386cb6bb70565c2256036014cd24e3e45df6e3fe86d7b248405eee5866d")])
def test_identities_stay(tmp_path, options, identity):
    """Computed by the version whose index lay in memory: checkpoints hold them. Two shapes, and a row that is left out."""
    path = pairs(tmp_path, 8, sizes=((16, 16), (32, 16)))
    (tmp_path / "pictures" / "chosen4.png").write_bytes(b"junk")
    cache = Cache(build(path, tmp_path, bad_rows="skip", **options)[0].manifest)
    assert (len(cache), cache.identity) == (7, identity)
    rows = [[cache.groups[i].row for i in members] for members in cache.members if members]
    assert rows == ([[0, 2, 6], [1, 3, 5, 7]] if options else [[0, 1, 2, 3, 5, 6, 7]])


def test_the_identity_of_lists_and_soft_labels_stays(tmp_path):
    for name in "xyz":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    path = jsonl(tmp_path / "t.jsonl", [{"prompt": "p", "images": ["x.png", "y.png"], "scores": [1, 1]},
                                        {"prompt": "ü", "images": ["x.png", "y.png", "z.png"], "scores": [1, 0.1, 3]}])
    cache = Cache(build(path, tmp_path, ties="soft")[0].manifest)
    assert cache.identity == "dc29a59989e74cb2db04ce8786f65b4192f6b062c43d01cdc0b03f78f6518636"
    assert [(group.soft, len(group.utility)) for group in cache.groups] == [(0.5, 2), (None, 3)]
    assert (cache.k, cache.soft) == (3, True)


def test_an_older_index_is_built_anew_and_nothing_encoded(tmp_path):
    path = pairs(tmp_path)
    report, _ = build(path, tmp_path)
    content = json.loads(report.manifest.read_text())
    del content["sha256"], content["index"], content["shards"]
    report.manifest.write_text(json.dumps({**content, "sha256": short(content, 64)}))
    with pytest.raises(DataError, match="no whole cache manifest; run the same command again to build it"):
        Cache(report.manifest)
    again, encoders = build(path, tmp_path, encoders=ToyEncoders())
    assert encoders.calls == [] and Cache(again.manifest).identity == content["identity"]


def test_damage_in_the_shards_of_another_set_does_not_matter(tmp_path):
    """Two data sets in one store: a set looks at its own shards alone."""
    (tmp_path / "other").mkdir()
    first = build(pairs(tmp_path), tmp_path)[0]
    own = set((tmp_path / "cache").glob("latents-*/*.arrow"))
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": "p", "chosen": "v.png", "rejected": "w.png"}])
    for name in "vw":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    second = build(other, tmp_path)[0]
    (victim,) = set((tmp_path / "cache").glob("latents-*/*.arrow")) - own
    victim.write_bytes(b"")
    assert Cache(first.manifest).latent(0)
    with pytest.raises(DataError, match=victim.name):
        Cache(second.manifest)
    assert build(other, tmp_path)[0].renewed == [victim.name]


def test_a_full_disk_while_rows_are_noted(tmp_path, monkeypatch):
    path, setup = pairs(tmp_path, 100), ledger._SETUP
    for pages in (4, 30):  # too few for the tables, or for the rows
        monkeypatch.setattr(ledger, "_SETUP", f"PRAGMA max_page_count={pages};" + setup)
        with pytest.raises(ResourceError, match="cannot write the cache .database or disk is full.; free some space or set"):
            build(path, tmp_path, encoders=ToyEncoders())
        assert not list((tmp_path / "cache" / "sets").iterdir())


def test_float16(tmp_path):
    full, half = (Cache(build(pairs(tmp_path), tmp_path, cache_dtype=dtype)[0].manifest) for dtype in ("float32", "float16"))
    assert half.latent(0)[0].dtype == np.float16 and half.text(0)[0].dtype == np.float16
    np.testing.assert_allclose(half.latent(0)[0].astype(np.float32), full.latent(0)[0], rtol=1e-3, atol=1e-4)


def test_bad_rows(tmp_path):
    path = pairs(tmp_path, 6)
    (tmp_path / "pictures" / "chosen1.png").write_bytes(b"no picture")
    (tmp_path / "pictures" / "rejected2.png").unlink()
    (tmp_path / "pictures" / "chosen3.png").write_bytes(picture(3)[:-30])
    (tmp_path / "pictures" / "chosen4.png").write_bytes(picture(1004))
    with pytest.raises(DataError, match=r"line 2, chosen \(pictures/chosen1.png\): it is no picture.*data.bad_rows=skip"):
        build(path, tmp_path)
    report, _ = build(path, tmp_path, bad_rows="skip")
    assert (report.groups, report.bad_rows, report.identical) == (2, 3, 1)
    assert [message.split(",")[0] for message in report.bad] == [f"pairs.jsonl line {i}" for i in (2, 3, 4)]
    assert [group.row for group in Cache(report.manifest).groups] == [0, 5]
    assert "3 bad rows skipped" in report.summary() and "1 groups of identical pictures" in report.summary()
    (tmp_path / "pictures" / "rejected2.png").write_bytes(picture(1002))  # mended: the earlier build is no longer trusted
    assert build(path, tmp_path, bad_rows="skip")[0].groups == 3


def test_a_latent_that_is_not_finite_is_named(tmp_path):
    path = pairs(tmp_path, 5)
    from PIL import Image
    Image.new("RGB", (16, 16), "white").save(tmp_path / "pictures" / "rejected3.png")
    with pytest.raises(DataError, match=r"pairs.jsonl line 4, rejected .*latent is not finite"):
        build(path, tmp_path, encoders=ToyEncoders(broken=True))
    report, _ = build(path, tmp_path, encoders=ToyEncoders(broken=True), bad_rows="skip")
    assert (report.groups, report.bad_rows) == (4, 1) and "line 4" in report.bad[0]


def test_nothing_left(tmp_path):
    (tmp_path / "x.png").write_bytes(picture(0))
    (tmp_path / "y.png").write_bytes(picture(1))
    tied = jsonl(tmp_path / "t.jsonl", [{"prompt": "p", "images": ["x.png", "y.png"], "scores": [1, 1]}] * 3)
    with pytest.raises(DataError, match="t.jsonl: all 3 rows are ties.*data.ties=soft"):
        build(tied, tmp_path)
    report, _ = build(tied, tmp_path, ties="soft")
    cache = Cache(report.manifest)
    assert cache.soft and cache.groups[0].soft == 0.5 and cache.groups[0].utility == (1.0, 1.0)
    same = jsonl(tmp_path / "s.jsonl", [{"prompt": "p", "chosen": "x.png", "rejected": "x.png"}])
    with pytest.raises(DataError, match="1 hold the same picture twice"):
        build(same, tmp_path)
    with pytest.raises(DataError, match="the data set is empty"):
        build(jsonl(tmp_path / "e.jsonl", []), tmp_path)


def test_a_damaged_shard_is_renewed(tmp_path):
    path = pairs(tmp_path)
    clean = build(path, tmp_path)[0]
    before = shards(tmp_path / "cache")
    (victim,) = (tmp_path / "cache").glob("latents-*/*.arrow")
    for damage in (lambda data: data[:-7], lambda data: data[:900] + bytes([data[900] ^ 4]) + data[901:], lambda data: b""):
        victim.write_bytes(damage(before[str(victim.relative_to(tmp_path / "cache"))]))
        with pytest.raises(DataError, match=r"a part of the cache is missing or damaged \(" + victim.name):
            Cache(clean.manifest)
        report, encoders = build(path, tmp_path, encoders=ToyEncoders())
        assert report.encoded_images == 12 and report.encoded_prompts == 0
        assert shards(tmp_path / "cache") == before


def test_every_flipped_bit_of_every_file_is_seen(tmp_path):
    """RELIABILITY E2, C5: 1,000 single-bit flips, all detected by the hash in the name."""
    build(pairs(tmp_path, 3), tmp_path)
    files, rng = sorted((tmp_path / "cache").rglob("*.arrow")), np.random.default_rng(0)
    assert len(files) >= 6
    for i in range(1000):
        path = files[i % len(files)]
        data = bytearray(path.read_bytes())
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        copy = tmp_path / f"{i}-{path.name.split('-', path.name.count('-') - 1)[-1]}"
        copy.write_bytes(bytes(data))
        assert not intact(copy)
        copy.unlink()


def test_damage_under_an_open_cache_is_seen_when_read(tmp_path):
    """The size and hash were right at opening; the record's own checksum finds it, names the file and sets it aside."""
    path = pairs(tmp_path, 3)
    report, _ = build(path, tmp_path)
    cache = Cache(report.manifest)
    (victim,) = (tmp_path / "cache").glob("latents-*/*.arrow")
    data = victim.read_bytes()
    at = data.index(np.ascontiguousarray(cache._latents._open(0)["mean"][2]).tobytes())
    with victim.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    cache.latent(0), cache.latent(1)
    with pytest.raises(DataError, match=victim.name + ": this part of the cache is damaged"):
        cache.latent(2)
    assert not victim.exists()
    assert build(path, tmp_path, encoders=ToyEncoders())[0].encoded_images == 6


def test_a_manifest_is_whole_or_none(tmp_path):
    path = pairs(tmp_path)
    manifest = build(path, tmp_path)[0].manifest
    text = manifest.read_text()
    for bad in ("", "[]", "{}", text[:-9], text.replace('"groups": 6', '"groups": 7')):
        manifest.write_text(bad)
        with pytest.raises(DataError, match="no whole cache manifest"):
            Cache(manifest)
        assert build(path, tmp_path)[0].encoded_images == 0
        assert manifest.read_text() == text.replace('"encoded_images": 12', '"encoded_images": 0').replace(
            '"encoded_prompts": 3', '"encoded_prompts": 0') or Cache(manifest).report["groups"] == 6


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_share_the_work(tmp_path, world):
    """Each rank encodes its own records; all reach the same cache as one process would, and the same error."""
    path = pairs(tmp_path, 10, sizes=((16, 16), (40, 20)))
    (tmp_path / "pictures" / "chosen4.png").write_bytes(b"junk")
    alone = Cache(build(path, tmp_path / "alone", bad_rows="skip")[0].manifest)

    def together(**options):
        encoders, ends = [ToyEncoders() for _ in range(world)], [None] * world

        def work(rank):
            try:
                ends[rank.rank] = build(path, tmp_path / "shared", encoders=encoders[rank.rank], world=rank, **options)[0]
            except DataError as error:
                ends[rank.rank] = str(error)
        Together(world).run(work)
        return ends, encoders

    ends, _ = together()
    assert len(set(ends)) == 1 and "line 5, chosen (pictures/chosen4.png): it is no picture" in ends[0]
    ends, encoders = together(bad_rows="skip")
    assert [(end.groups, end.bad_rows) for end in ends] == [(9, 1)] * world
    assert Cache(ends[0].manifest).identity == alone.identity
    assert not list((tmp_path / "shared").rglob("looks-*"))


def test_no_file_is_read_by_every_process(tmp_path, monkeypatch):
    """Once by the process that hashes it, once by the one that encodes it; one process reads it once."""
    reads, read = Counter(), ImageRef.read
    monkeypatch.setattr(ImageRef, "read", lambda ref: (reads.update([ref.path.name]), read(ref))[1])
    path = pairs(tmp_path, 10)
    build(path, tmp_path / "alone")
    assert set(reads.values()) == {1} and len(reads) == 20
    reads.clear()
    Together(4).run(lambda rank: build(path, tmp_path / "shared", world=rank))
    assert set(reads.values()) == {2} and len(reads) == 20
    assert not list((tmp_path / "shared").rglob("looks-*"))


def test_looks_that_are_swept_away_meanwhile(tmp_path):
    """Pictures are then looked at anew."""
    path, ends = pairs(tmp_path, 4), []
    alone = Cache(build(path, tmp_path / "alone")[0].manifest)
    gone = []

    def sweep():
        gone.extend(file.unlink() for file in (tmp_path / "shared").rglob("looks-*"))
    Together(2, sweep).run(lambda rank: ends.append(build(path, tmp_path / "shared", world=rank)[0]))
    assert gone and [Cache(end.manifest).identity for end in ends] == [alone.identity] * 2


def test_processes_that_do_not_see_the_same_take_one_turn(tmp_path, monkeypatch):
    """A cache that one process finds and another does not (it was built this moment): all build, and none waits for ever."""
    path, found, ends = pairs(tmp_path, 4), encoding._Job.found, []
    first = build(path, tmp_path)[0]
    before = shards(tmp_path / "cache")
    monkeypatch.setattr(encoding._Job, "found", lambda job: found(job) if job.world.rank else None)
    Together(2).run(lambda rank: ends.append(build(path, tmp_path, world=rank)[0]))
    assert [end.manifest for end in ends] == [first.manifest] * 2 and {end.encoded_images for end in ends} == {0}
    assert shards(tmp_path / "cache") == before


def test_a_source_that_changes_meanwhile_has_one_name(tmp_path, monkeypatch):
    """As a data set of the hub, whose commit each process would otherwise ask for by itself."""
    path, asked, ends = pairs(tmp_path, 4), count(), []
    monkeypatch.setattr(encoding, "_source", lambda *args: (["a data set", next(asked)], True))
    Together(2).run(lambda rank: ends.append(build(path, tmp_path, world=rank)[0]))
    assert len({end.manifest for end in ends}) == 1 and next(asked) == 1


@pytest.mark.parametrize("owner, name", [(encoding._Job, "__init__"), (ledger.Ledger, "__enter__"), (encoding, "_scan"),
                                         (encoding, "_write_set")])
def test_an_error_of_one_process_ends_all(tmp_path, monkeypatch, owner, name):
    """A disk that only one of them cannot write to, whenever it is met: the first that comes here has the error."""
    path, real, ends, calls = pairs(tmp_path, 4), getattr(owner, name), {}, count()

    def failing(*args):
        if next(calls) == 0:
            raise ResourceError("the disk of one is full")
        return real(*args)

    def work(rank):
        try:
            build(path, tmp_path, world=rank)
        except UserError as error:
            ends[rank.rank] = str(error)
    monkeypatch.setattr(owner, name, failing)
    Together(2).run(work)
    assert ends == dict.fromkeys((0, 1), "the disk of one is full")
    monkeypatch.setattr(owner, name, real)
    assert build(path, tmp_path)[0].groups == 4


def test_a_live_ledger_is_not_swept(tmp_path, monkeypatch):
    """However long its process waits for the others; what a killed one left is."""
    monkeypatch.setattr(store, "STALE_SECONDS", -1)
    left = tmp_path / ".tmp-left"
    left.write_bytes(b"")
    with ledger.Ledger(tmp_path) as known:
        assert known.queue("text", b"key")
        store.sweep(tmp_path)
        assert not left.exists() and len(list(tmp_path.glob(".tmp-*"))) == 1 and known.knows("text", b"key")
    assert not list(tmp_path.iterdir())


def test_a_file_that_changes_between_hashing_and_encoding_is_refused(tmp_path, monkeypatch):
    path, seen, read = pairs(tmp_path, 2), Counter(), ImageRef.read

    def fickle(ref):
        seen.update([ref.path.name])
        return read(ref) + (b"more" if ref.path.name == "chosen1.png" and seen["chosen1.png"] == 2 else b"")
    monkeypatch.setattr(ImageRef, "read", fickle)
    ends = []

    def work(rank):
        try:
            build(path, tmp_path / "shared", world=rank)
        except DataError as error:
            ends.append(str(error))
    Together(2).run(work)
    assert len(ends) == 2 and all("chosen1.png has changed while it was encoded" in end for end in ends)


def test_two_builds_at_once(tmp_path):
    path = pairs(tmp_path, 40)
    running = [ranks.start(slowly, tmp_path, 0.002, said=tmp_path / f"said-{n}.txt") for n in range(2)]
    for n, process in enumerate(running):
        process.join(120)
        assert process.exitcode == 0, (tmp_path / f"said-{n}.err").read_text()
    report, encoders = build(path, tmp_path, encoders=ToyEncoders())
    assert encoders.calls == [] and report.groups == 40
    assert all(intact(file) for file in (tmp_path / "cache").rglob("*.arrow"))


def slowly(folder: Path, delay: float) -> None:
    """Builds ``folder``'s cache, in shards of one batch."""
    class Slow(ToyEncoders):
        def encode_images(self, pixels):
            time.sleep(delay)
            return super().encode_images(pixels)
    store.SHARD_BYTES = 1
    encode(spec(str(folder / "pairs.jsonl")), Slow, cache_dir=str(folder / "cache"), resolution=16, seed=0, progress=False)


def test_a_killed_build_goes_on(tmp_path, monkeypatch):
    """SIGKILL in the middle: whole shards stay, only the others are encoded, and the files equal an undisturbed build's."""
    from diffalign.data import store
    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    path = pairs(tmp_path, 60)
    (tmp_path / "clean").mkdir()
    build(path, tmp_path / "clean")
    written = 0
    for _ in range(3):
        process = ranks.start(slowly, tmp_path, 0.05, said=tmp_path / "said.txt")
        deadline, target = time.monotonic() + 120, written + 6
        while (written := len(list((tmp_path / "cache").glob("latents-*/*.arrow")))) < target and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
        written = len(list((tmp_path / "cache").glob("latents-*/*.arrow")))
        assert not list((tmp_path / "cache").glob("sets/*.json"))  # no manifest before the end
    assert 18 <= written < 30
    left = list((tmp_path / "cache" / "sets").glob(".tmp-*"))
    assert len(left) == 3  # what the killed ones had noted; swept away once no other build can be at it
    for file in left:
        os.utime(file, (0, 0))
    report, encoders = build(path, tmp_path, encoders=ToyEncoders())
    assert report.encoded_images == 120 - 4 * written and not list((tmp_path / "cache" / "sets").glob(".tmp-*"))
    latents = [{path.name for path in (tmp_path / base / "cache").glob("latents-*/*.arrow")} for base in ("", "clean")]
    assert latents[0] == latents[1] and len(latents[0]) == 30  # names are hashes of the content


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    from diffalign.data import store

    def full(fd):
        raise OSError(28, "No space left on device")
    path = pairs(tmp_path)
    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(ResourceError, match="cannot write the cache .No space left on device.; free some space"):
        build(path, tmp_path)
    monkeypatch.undo()
    assert not list((tmp_path / "cache").rglob(".tmp-*")) and build(path, tmp_path)[0].groups == 6


def test_the_cache_folder_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ResourceError, match="cannot make the cache folder"):
        build(pairs(tmp_path), tmp_path)


def test_stores_see_each_other(tmp_path):
    build(pairs(tmp_path), tmp_path)
    (folder,) = (tmp_path / "cache").glob("latents-*")
    with ledger.Ledger(tmp_path) as known:
        assert len(Store(folder, "latent", known).names) == 1 and known.count("latent") == 12
    assert not list(tmp_path.glob(".tmp-*"))
