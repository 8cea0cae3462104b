"""Build and train the embedded music model, MusicGen's layout in small, and its preference data: clips told by captions.

    OMP_NUM_THREADS=1 python scripts/assets/make_music.py --model assets/tiny-music --data assets/music

Three parts. The codec: transformers' EncodecModel trained as an autoencoder on synthesised clips (``rewards/clips.py``), then
codebooks by residual k-means of its latents, then the decoder once more on what the codebooks leave. The language model: a
small MusicgenForConditionalGeneration on the codec's codes; a share of its clips has one attribute wrong, on purpose, so that
it leaves something to align. Preferences: its own samples for training captions, better ones against worse ones, as codes.
Validation pairs and the held-out captions are of others (``part_of``). Everything is a function of the seed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from diffalign import _compat, rng  # noqa: F401  (before transformers: it mends a torchvision that does not fit torch)

# isort: split
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    EncodecConfig,
    EncodecModel,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)

from diffalign.methods import Context
from diffalign.models.musicgen import Inputs, MusicGen, load_denoiser, load_inputs
from diffalign.models.spec import ModelSpec
from diffalign.process import Delay
from diffalign.rewards.clips import FRAME, RATE, SAMPLES, Clip, Clips, every_clip, part_of, synthesise
from diffalign.sampling.music import CodeSampler
from diffalign.types import Memory

CODEBOOKS, WORDS, ROWS = 4, 32, 72  # ROWS: clips that are drawn at once
CODEC = {"sampling_rate": RATE, "audio_channels": 1, "normalize": False, "num_filters": 8, "num_residual_layers": 1,
         "num_lstm_layers": 1, "upsampling_ratios": [5, 4, 4], "hidden_size": 32, "codebook_size": WORDS, "codebook_dim": 32,
         "target_bandwidths": [CODEBOOKS * math.log2(WORDS) * RATE / 80 / 1000]}


def drawn_clips(count: int, seed: int, purpose: str, wrong: float = 0.0) -> tuple[list[str], Tensor]:
    """Captions and waveforms [count, SAMPLES]; a share of the clips has one attribute that the caption does not say."""
    random, every, captions, waves = rng.generator(seed, purpose), every_clip(), [], []
    for i in random.integers(len(every), size=count):
        played = other(every[i], random) if random.random() < wrong else every[i]
        captions.append(every[i].caption)
        waves.append(synthesise(played, float(random.uniform(0.4, 0.9))))
    return captions, torch.from_numpy(np.stack(waves))


def other(clip: Clip, random: np.random.Generator) -> Clip:
    """Another clip that differs in one attribute."""
    near = [x for x in every_clip() if sum(getattr(x, n) != getattr(clip, n) for n in ("tempo", "pitch", "instrument")) == 1]
    kind = ("tempo", "pitch", "instrument")[random.integers(3)]
    return [x for x in near if getattr(x, kind) != getattr(clip, kind)][random.integers(2)]


def fit(parameters, loss_at: Callable[[int], Tensor], steps: int, rate: float, what: str) -> None:
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    started, mean = time.monotonic(), 0.0
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if (step + 1) % 100 == 0:
            print(f"{what} step {step + 1}: loss {mean:.5f}, {time.monotonic() - started:.0f} s", flush=True)


# The codec.


def distortion(found: Tensor, wave: Tensor) -> Tensor:
    """Error as a share of the power, of the waves and of their differences: the latter weigh the harmonics, by which
    instruments differ, as much as the fundamental.
    """
    return sum(F.mse_loss(a, b) / b.square().mean() for a, b in ((found, wave), (found.diff(), wave.diff())))


def make_codec(steps: int, seed: int) -> EncodecModel:
    torch.manual_seed(seed)
    codec = EncodecModel(EncodecConfig(**CODEC))
    _, waves = drawn_clips(512, seed, "codec")

    def batch(step: int) -> Tensor:
        return waves[torch.from_numpy(rng.generator(seed, "codec batch", step).integers(len(waves), size=8))][:, None]

    def whole(step: int) -> Tensor:
        x = batch(step)
        return distortion(codec.decoder(codec.encoder(x)), x)

    fit([*codec.encoder.parameters(), *codec.decoder.parameters()], whole, steps, 3e-3, "codec")
    with torch.no_grad():
        latents = torch.cat([codec.encoder(part[:, None]) for part in waves.split(32)])
    fill_codebooks(codec, latents.transpose(1, 2).reshape(-1, latents.shape[1]), seed)

    def decoded(step: int) -> Tensor:
        x = batch(step)
        with torch.no_grad():
            codes = codec.encode(x).audio_codes[0]
            latent = codec.quantizer.decode(codes.transpose(0, 1))
        return distortion(codec.decoder(latent), x)

    fit(codec.decoder.parameters(), decoded, steps // 2, 1e-3, "decoder")
    return codec.eval()


def fill_codebooks(codec: EncodecModel, latents: Tensor, seed: int) -> None:
    """latents: [N, D]. Each codebook holds the k-means centres of what those before it left over."""
    rest = latents[torch.from_numpy(rng.permutation(len(latents), seed, "latents")[:20_000].copy())]
    for layer in codec.quantizer.layers:
        found = MiniBatchKMeans(WORDS, random_state=seed, batch_size=2048, n_init=3).fit(rest.numpy())
        layer.codebook.embed.copy_(torch.from_numpy(found.cluster_centers_))
        rest = rest - layer.codebook.embed[torch.from_numpy(found.labels_).long()]


@torch.no_grad()
def codes_of(codec: EncodecModel, waves: Tensor) -> Tensor:
    """[N, SAMPLES] -> [N, CODEBOOKS, T]."""
    return torch.cat([codec.encode(part[:, None]).audio_codes[0] for part in waves.split(64)])


# The language model.


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, an end token behind each prompt as T5's."""
    words = sorted({word for clip in every_clip() for word in clip.caption.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=16)


def make_model(codec: EncodecModel, words: int, seed: int) -> MusicgenForConditionalGeneration:
    """Untrained, around the codec."""
    torch.manual_seed(seed)
    text = T5Config(vocab_size=words, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0)
    decoder = MusicgenDecoderConfig(
        vocab_size=WORDS, num_codebooks=CODEBOOKS, hidden_size=64, ffn_dim=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, dropout=0.0, pad_token_id=WORDS, bos_token_id=WORDS, audio_channels=1)
    model = MusicgenForConditionalGeneration(MusicgenConfig(text_encoder=text, audio_encoder=codec.config, decoder=decoder))
    model.audio_encoder.load_state_dict(codec.state_dict())
    for config in (model.generation_config, model.decoder.generation_config):
        config.pad_token_id = config.bos_token_id = config.decoder_start_token_id = WORDS
    return model


def train(model: MusicgenForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, steps: int, wrong: float, seed: int,
          batch: int = 16) -> None:
    """Cross-entropy of all codes; the text encoder learns along."""
    captions, waves = drawn_clips(6000, seed, "music", wrong)
    codes, delay = codes_of(model.audio_encoder, waves), Delay(codebooks=CODEBOOKS, start_id=WORDS)
    ids = tokenizer(captions, return_tensors="pt")["input_ids"]  # all captions have five words

    def loss_at(step: int) -> Tensor:
        rows = torch.from_numpy(rng.generator(seed, "music batch", step).integers(len(codes), size=batch))
        columns = delay(codes[rows])
        logits = model(input_ids=ids[rows], attention_mask=torch.ones_like(ids[rows]), use_cache=False,
                       decoder_input_ids=columns[..., :-1].flatten(0, 1)).logits
        target = columns[..., 1:].flatten(0, 1)
        return F.cross_entropy(logits.transpose(1, 2), target, ignore_index=WORDS)

    model.train()
    fit([*model.decoder.parameters(), *model.text_encoder.parameters(), *model.enc_to_dec_proj.parameters()], loss_at, steps,
        3e-3, "music")
    model.eval()


# The preferences.


def samples(denoiser: MusicGen, inputs: Inputs, clips: list[Clip], each: int, seed: int) -> list[list[tuple[Tensor, float]]]:
    """(codes, score) of ``each`` samples for every clip's caption, by the base's own distribution."""
    ctx = Context(predict=lambda name, *args: denoiser(*args), process=denoiser.process, param=None, seed=seed, step=0,
                  memory=Memory())
    keys = torch.cartesian_prod(torch.arange(len(clips)), torch.arange(each))
    captions = [clips[i].caption for i in keys[:, 0].tolist()]
    sampler, parts = CodeSampler(frames=SAMPLES // FRAME), range(0, len(keys), ROWS)
    codes = torch.cat([sampler(ctx, "policy", inputs.cond(captions[at:at + ROWS]), keys[at:at + ROWS]) for at in parts])
    scores = torch.cat([Clips()(inputs.decode(codes[at:at + ROWS]).numpy(), captions[at:at + ROWS]) for at in parts])
    rows = list(zip(codes, scores.tolist(), strict=True))
    return [rows[at:at + each] for at in range(0, len(rows), each)]


def pairs(found: list[list[tuple[Tensor, float]]], clips: list[Clip]) -> list[dict]:
    """By the share of attributes that is heard: a caption's best sample against its worst, the second best against the second
    worst, and so on while they differ.
    """
    rows = []
    for clip, drawn in zip(clips, found, strict=True):
        ranked = sorted(drawn, key=lambda sample: -sample[1])
        rows += [{"prompt": clip.caption, "chosen": w.tolist(), "rejected": l.tolist()}
                 for (w, high), (l, low) in zip(ranked[:len(ranked) // 2], ranked[::-1]) if high > low]
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    codes = pa.list_(pa.list_(pa.int8()))
    schema = pa.schema([("prompt", pa.string()), ("chosen", codes), ("rejected", codes)])
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("assets/tiny-music"), help="a model that is there is kept")
    parser.add_argument("--data", type=Path, default=Path("assets/music"))
    parser.add_argument("--codec", type=Path, default=Path("outputs/tiny-codec"), help="a codec that is there is kept")
    parser.add_argument("--codec-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--each", type=int, default=128, help="samples of a training caption")
    parser.add_argument("--wrong", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.model / "model.safetensors").is_file():
        if not (args.codec / "model.safetensors").is_file():
            make_codec(args.codec_steps, args.seed).save_pretrained(args.codec)
        tokenizer = make_tokenizer()
        model = make_model(EncodecModel.from_pretrained(args.codec).eval(), len(tokenizer), args.seed)
        train(model, tokenizer, args.steps, args.wrong, args.seed)
        model.half().save_pretrained(args.model)
        tokenizer.save_pretrained(args.model)
    spec = ModelSpec(pretrained_model_name_or_path=str(args.model), lora=None)
    denoiser, inputs = load_denoiser(spec), load_inputs(spec)
    parts = {name: [clip for clip in every_clip() if part_of(clip) == name] for name in ("train", "validation", "heldout")}
    for i, (name, each) in enumerate((("train", args.each), ("validation", 16))):
        clips = parts[name]
        found = samples(denoiser, inputs, clips, each, args.seed + i)
        scores = [score for drawn in found for _, score in drawn]
        rows = pairs(found, clips)
        write_rows(args.data / f"{name}.parquet", rows)
        print(f"{name}: {len(scores)} samples, mean score {sum(scores) / len(scores):.3f}, {len(rows)} pairs", flush=True)
    for name in ("validation", "heldout"):
        (args.data / f"{name}_prompts.txt").write_text("".join(f"{clip.caption}\n" for clip in parts[name]))


if __name__ == "__main__":
    main()
