"""Batches from the cache equal encoding in the loop, and are functions of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffalign import rng
from diffalign.data.cache import Cache
from diffalign.data.offline import Offline, fixed_batches

from .test_cache import build, direct
from .toy import ToyEncoders, jsonl, pairs, picture, spec


def source(cache, **options):
    return Offline(cache, **{"seed": 3, "train_batch_size": 4, "prefetch": False, **options})


def ragged(folder):
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i, (16 + 8 * i, 16)))
    return jsonl(folder / "d.jsonl", [
        {"prompt": "a", "images": ["0.png", "1.png", "2.png"], "scores": [1, 3, 2]},
        {"prompt": "b", "images": ["3.png", "0.png"], "scores": [0, 1]}])


def test_batches_equal_encoding_in_the_loop(tmp_path):
    """x0 = mean + std * normal("posterior"; row, visit, candidate), bit for bit; text, keys and labels of the same rows."""
    report, encoders = build(pairs(tmp_path, 9, sizes=((16, 16), (24, 16))), tmp_path)
    offline = source(Cache(report.manifest), gradient_accumulation_steps=2)
    batches = [batch for step in range(5) for batch in offline.take(step)]
    seen = set()
    for batch in batches:
        assert batch.x0.shape == (4, 2, 4, 4, 4) and batch.x0.dtype == torch.float32 and batch.soft is None
        assert batch.utility.tolist() == [[1, 0]] * 4 and batch.valid.all() and batch.key.dtype == torch.int64
        for b, (row, visit) in enumerate(batch.key.tolist()):
            seen.add((row, visit))
            for k, seed in enumerate((row, row + 1000)):
                data = picture(seed, (16, 16) if row % 2 == 0 else (24, 16))
                mean, std = (torch.from_numpy(x) for x in direct(data, encoders))
                noise = rng.normal(3, "posterior", torch.tensor([[row, visit, k]]), (4, 4, 4))[0]
                assert torch.equal(batch.x0[b, k], mean + std * noise)
            tokens, pooled = encoders.encode_prompts([f"prompt {row % 3}"])
            assert torch.equal(batch.cond.tokens[b], tokens[0]) and torch.equal(batch.cond.pooled[b], pooled[0])
    assert len(seen) == 40 and {visit for _, visit in seen} == {0, 1, 2, 3, 4}


def test_losses_from_the_cache_equal_losses_in_the_loop(tmp_path):
    """The same DPO loss, bit for bit, from a cached batch and from one encoded on the spot."""
    from diffalign.likelihood import DenoisingELBO
    from diffalign.methods import Context, Preference
    from diffalign.objectives import Pairwise
    from diffalign.process import Eps, VariancePreserving
    from diffalign.types import Batch, Memory

    report, encoders = build(pairs(tmp_path, 4), tmp_path)
    (batch,) = source(Cache(report.manifest)).take(0)
    means, stds = zip(*(direct(picture(seed), encoders) for row in batch.key[:, 0].tolist() for seed in (row, row + 1000)),
                      strict=True)
    keys = torch.tensor([[row, visit, k] for row, visit in batch.key.tolist() for k in (0, 1)])
    x0 = torch.tensor(np.stack(means)) + torch.tensor(np.stack(stds)) * rng.normal(3, "posterior", keys, (4, 4, 4))
    live = Batch(x0=x0.view(4, 2, 4, 4, 4), cond=batch.cond, utility=batch.utility, valid=batch.valid, key=batch.key)

    def predict(name, xt, t, cond):
        return xt * (0.9 if name == "policy" else 0.7) + cond.tokens.mean((1, 2)).view(-1, 1, 1, 1)
    process = VariancePreserving(torch.linspace(0.999, 0.005, 1000))
    context = Context(predict=predict, process=process, param=Eps(), seed=5, memory=Memory(), step=0)
    method = Preference(estimator=DenoisingELBO(), objective=Pairwise(beta=100.0))
    assert torch.equal(method.loss(batch, context).per_group, method.loss(live, context).per_group)


def test_a_step_does_not_depend_on_ranks_or_micro_batches(tmp_path):
    cache = Cache(build(pairs(tmp_path, 13, sizes=((16, 16), (32, 16))), tmp_path, aspect_ratio_buckets=True)[0].manifest)
    assert sum(len(members) > 0 for members in cache.members) == 2

    def rows(step, world, size, accumulation):
        ranks = [source(cache, train_batch_size=size, gradient_accumulation_steps=accumulation, rank=rank, world=world)
                 for rank in range(world)]
        parts = [(b.key, b.x0.flatten(1), b.cond.extra["time_ids"]) for rank in ranks for b in rank.take(step)]
        return [torch.cat(part) for part in zip(*parts, strict=True)]
    for step in (0, 1, 7):
        one = rows(step, 1, 12, 1)
        for world, size, accumulation in ((1, 4, 3), (2, 6, 1), (2, 2, 3), (3, 1, 4), (4, 3, 1)):
            for a, b in zip(one, rows(step, world, size, accumulation), strict=True):
                assert torch.equal(a, b)


def test_prefetching_changes_nothing(tmp_path):
    cache = Cache(build(pairs(tmp_path, 7), tmp_path)[0].manifest)
    ahead, plain = source(cache, prefetch=True), source(cache)
    for step in (0, 1, 2, 9, 3, 3, 4):
        assert torch.equal(ahead.take(step)[0].x0, plain.take(step)[0].x0)
        assert torch.equal(ahead.take(step)[0].key, plain.take(step)[0].key)


def test_ragged_groups_are_padded(tmp_path):
    cache = Cache(build(ragged(tmp_path), tmp_path)[0].manifest)
    offline = source(cache, train_batch_size=2)
    (batch,) = offline.take(0)
    assert offline.k == 3 and offline.groups == 2 and offline.elements == 4 * 4 * 4 and offline.boundary(1)
    assert offline.identity == cache.identity
    by_row = {row: i for i, row in enumerate(batch.key[:, 0].tolist())}
    a, b = by_row[0], by_row[1]
    assert batch.utility[a].tolist() == [1, 3, 2] and batch.utility[b].tolist() == [0, 1, 0]
    assert batch.valid[a].tolist() == [True] * 3 and batch.valid[b].tolist() == [True, True, False]
    assert not batch.x0[b, 2].any() and batch.x0[b, 1].any()


def test_unpaired_groups_of_one(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "image": f"{i}.png", "label": i % 2} for i in range(4)])
    (batch,) = source(Cache(build(path, tmp_path)[0].manifest)).take(0)
    assert batch.k == 1 and sorted(batch.utility.flatten().tolist()) == [-1, -1, 1, 1]


def test_soft_labels(tmp_path):
    """Probability 0.8 that jpg_1 is better: utility (0, 1), soft 0.8; hard rows of the same set are certain."""
    import datasets
    datasets.Dataset.from_dict({
        "jpg_0": [picture(i) for i in range(3)], "jpg_1": [picture(10 + i) for i in range(3)], "label_0": [0.2, 1.0, 0.5],
        "caption": ["a", "b", "c"]}).to_parquet(str(tmp_path / "t.parquet"))
    (batch,) = source(Cache(build(tmp_path / "t.parquet", tmp_path, ties="soft")[0].manifest), train_batch_size=3).take(0)
    got = {row: (soft, utility) for (row, _), soft, utility in
           zip(batch.key.tolist(), batch.soft.tolist(), batch.utility.tolist(), strict=True)}
    assert got == {0: (pytest.approx(0.8), [0, 1]), 1: (1.0, [1, 0]), 2: (0.5, [0.5, 0.5])}


def test_time_ids(tmp_path):
    """Each candidate's own size and crop: 40 x 20 becomes 32 x 16 with 8 columns off the left; 21 x 16 -> 5 spare, left 2,
    mirrored left 21 - 2 - 16 = 3. Only SDXL has them."""
    (tmp_path / "w.png").write_bytes(picture(0, (40, 20)))
    (tmp_path / "l.png").write_bytes(picture(1, (21, 16)))
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": "w.png", "rejected": "l.png"}])
    cache = Cache(build(path, tmp_path, random_flip=True)[0].manifest)
    offline, flips = source(cache, train_batch_size=16, random_flip=True), 0
    (batch,) = offline.take(0)
    assert batch.cond.extra["time_ids"].shape == (16, 2, 6) and batch.cond.extra["time_ids"].dtype == torch.float32
    drawn = rng.uniform(3, "flip", batch.key) < 0.5
    for b in range(16):
        left = 3 if drawn[b] else 2
        flips += left == 3
        assert batch.cond.extra["time_ids"][b].tolist() == [[20, 40, 0, 8, 16, 16], [16, 21, 0, left, 16, 16]]
        mean, std = (torch.from_numpy(x.copy()) for x in cache.latent(cache.groups[0].images[1], bool(drawn[b])))
        noise = rng.normal(3, "posterior", torch.tensor([[0, int(batch.key[b, 1]), 1]]), (4, 4, 4))[0]
        assert torch.equal(batch.x0[b, 1], mean + std * noise)  # winner and loser are mirrored together
    assert 3 <= flips <= 13
    plain = Cache(build(path, tmp_path, encoders=ToyEncoders(family="sd", text="text-sd"))[0].manifest)
    (batch,) = source(plain, train_batch_size=1).take(0)
    assert batch.cond.extra == {} and batch.cond.pooled is None
    with pytest.raises(ValueError, match="random_flip needs a cache"):
        source(plain, random_flip=True)


def test_caption_dropout_is_keyed_and_whole(tmp_path):
    cache = Cache(build(pairs(tmp_path, 50, prompts=50), tmp_path)[0].manifest)
    dropped = []
    for step in range(8):
        (batch,) = source(cache, train_batch_size=50, caption_dropout=0.25).take(step)
        empty = (batch.cond.tokens == 0).flatten(1).all(1)
        assert torch.equal(empty, (batch.cond.pooled == 0).all(1))
        assert torch.equal(empty, rng.uniform(3, "caption_dropout", batch.key) < 0.25)
        dropped.append(empty.float().mean())
    assert abs(torch.stack(dropped).mean() - 0.25) < 3 * (0.25 * 0.75 / 400) ** 0.5


def test_fixed_batches(tmp_path):
    path = pairs(tmp_path, 11, sizes=((16, 16), (32, 16)))
    cache = Cache(build(path, tmp_path, aspect_ratio_buckets=True, random_flip=True)[0].manifest)
    batches = fixed_batches(cache, 4, 2, seed=1)
    assert [batch.groups for batch in batches] == [4, 2, 4, 1] * 2 and len(batches) == 8  # 6 square and 5 wide groups
    keys = torch.cat([batch.key for batch in batches]).tolist()
    assert sorted(map(tuple, keys)) == [(row, visit) for row in range(11) for visit in (0, 1)]
    assert torch.equal(batches[0].x0, fixed_batches(cache, 4, 2, seed=1)[0].x0)
    assert not torch.equal(batches[0].x0, batches[4].x0)
    with pytest.raises(IndexError):
        batches[8]


def test_validation_share(tmp_path):
    path = pairs(tmp_path, 40, prompts=20)
    train, held = (Cache(build(path, tmp_path, part=part, validation_share=0.3)[0].manifest)
                   for part in ("train", "validation"))
    prompts = [{cache.prompt(group.prompt) for group in cache.groups} for cache in (train, held)]
    assert len(train) + len(held) == 40 and not prompts[0] & prompts[1] and all(prompts)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_real_encoders(tmp_path, family):
    """A tiny pipeline's own VAE and text encoders: the cached batch equals encoding in the loop bit for bit (one at a time, as
    the same convolution in another batch may round differently)."""
    from diffalign.models.load import encoder_facts, load_encoders
    from diffalign.models.spec import ModelSpec

    from ..models import tiny
    model = ModelSpec(pretrained_model_name_or_path=str(tiny.make(family, tmp_path)))
    encoders, facts = load_encoders(model), encoder_facts(model)
    size = facts.default_resolution
    path = pairs(tmp_path, 4, sizes=((size, size), (2 * size, size)))
    report, _ = build(path, tmp_path, encoders=encoders, facts=facts, resolution=size, encode_batch_size=1)
    batches = source(Cache(report.manifest), train_batch_size=2, gradient_accumulation_steps=2).take(0)
    for batch in batches:
        assert ("time_ids" in batch.cond.extra) == (family == "sdxl")
        for b, (row, visit) in enumerate(batch.key.tolist()):
            for k, seed in enumerate((row, row + 1000)):
                data = picture(seed, (size, size) if row % 2 == 0 else (2 * size, size))
                mean, std = (torch.from_numpy(x) for x in direct(data, encoders, size))
                noise = rng.normal(3, "posterior", torch.tensor([[row, visit, k]]), tuple(mean.shape))[0]
                assert torch.equal(batch.x0[b, k], mean + std * noise)
            tokens, pooled = encoders.encode_prompts([f"prompt {row % 3}"])
            assert torch.equal(batch.cond.tokens[b], tokens[0])
            assert batch.cond.pooled is None if pooled is None else torch.equal(batch.cond.pooled[b], pooled[0])
    dropped = source(Cache(report.manifest), caption_dropout=0.999).take(0)[0].cond.tokens[0]
    assert torch.equal(dropped, encoders.unconditional()[0][0])


def test_spec_refuses_contradictions():
    with pytest.raises(ValueError, match="not both"):
        spec("x", validation="y", validation_share=0.1)
    with pytest.raises(ValueError, match="max_train_samples must be at least 1"):
        spec("x", max_train_samples=0)
