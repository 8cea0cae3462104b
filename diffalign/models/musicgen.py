"""MusicGen: a folder of transformers' MusicgenForConditionalGeneration in; a policy over codec tokens, its text states and its
codec out. Only safetensors and JSON are read.

Prompts go through the frozen T5 once, when data are read; what is trained is the decoder and the projection of the text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _compat  # noqa: F401  (before transformers)

# isort: split
from transformers import EncodecModel, MusicgenForConditionalGeneration, PreTrainedTokenizerFast, T5EncoderModel

from ..errors import DataError, ModelError
from ..process import Delay
from ..types import Cond
from .folder import check_weights, content, digest, read_json, weight_files
from .load import folder_of, loading
from .lora import write_peft
from .spec import LANGUAGE_MODEL, ModelSpec

MODEL_TYPE = "musicgen"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")
_DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "dropout_rate")
LONGEST_PROMPT = 512  # tokens, where the tokenizer names no limit: what T5 was trained on


class MusicLM(MusicgenForConditionalGeneration):
    """The stock model with what the loop and its checkpoints ask for. source: the folder it was read from."""

    source: Path | None = None

    def enable_gradient_checkpointing(self) -> None:
        """By diffusers' name for it."""
        self.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def save_pretrained(self, folder: Path | str, safe_serialization: bool = True) -> None:
        """As the stock class saves and loads it, with the tokenizer's files."""
        folder = Path(folder)
        super().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = [MusicgenForConditionalGeneration.__name__]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in FILES:
            if self.source is not None and (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)


@dataclass(kw_only=True)
class MusicGen:
    """The policy (``models.base.Denoiser``): xt [N, C, S] int64, delayed columns -> logits [N, C, S, V] of the next ones.

    cond: tokens [N, L, D], the states of the frozen T5; extra ``text`` [N, L] bool, which are no padding. t is not read.
    """

    module: nn.Module
    process: Delay
    identity: str = "unsaved"
    dtype: torch.dtype = field(init=False)

    family = MODEL_TYPE
    component = LANGUAGE_MODEL
    param = None
    lora_targets = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __post_init__(self):
        self.dtype = next(self.module.parameters()).dtype
        _without_dropout(self.module)

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.run(self.module, xt, t, cond)

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        states = cond.tokens.to(self.dtype)
        logits = module(decoder_input_ids=xt.flatten(0, 1), encoder_outputs=(states,), attention_mask=cond.extra["text"],
                        use_cache=False).logits
        return logits.view(*xt.shape, -1)

    def idle(self) -> tuple[str, ...]:
        """Frozen: prompts and clips went through them when the data were read."""
        return ("text_encoder", "audio_encoder")

    def save_lora(self, folder: Path | str, metadata: dict[str, str]) -> None:
        """As ``PeftModel.from_pretrained(MusicgenForConditionalGeneration, folder)`` reads it."""
        write_peft(self, folder, metadata)


def _without_dropout(module: nn.Module) -> None:
    """MusicGen's layers call dropout as a function, which no change of nn.Dropout modules reaches."""
    for layer in module.modules():
        for name in _DROPOUTS:
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What turns rows into the policy's inputs: tokenizer, frozen T5 and codec, all float32 on ``device``.

    codebooks, words: C and V. rate: Hz that the codec reads. longest: frames of a clip at most. longest_prompt: tokens.
    """

    tokenizer: PreTrainedTokenizerFast
    text_encoder: nn.Module
    codec: nn.Module
    codebooks: int
    words: int
    longest: int
    longest_prompt: int
    device: torch.device

    @property
    def rate(self) -> int:
        return self.codec.config.sampling_rate

    @torch.no_grad()
    def states(self, prompt: str) -> np.ndarray:
        """[L, D] float32. Raises DataError for a prompt that is empty or longer than the model reads."""
        ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        if not ids:
            raise DataError("the prompt is empty")
        if len(ids) > self.longest_prompt:
            raise DataError(f"the prompt has {len(ids)} tokens, and the model's text encoder reads {self.longest_prompt}; "
                            "shorten it")
        return self.text_encoder(torch.tensor([ids], device=self.device)).last_hidden_state[0].cpu().numpy()

    def checked(self, codes: np.ndarray) -> np.ndarray:
        """codes: [C, T] of whole numbers -> int32. Raises DataError for what the model cannot have made."""
        if codes.ndim != 2 or codes.shape[0] != self.codebooks:
            found = codes.shape[0] if codes.ndim == 2 else f"an array of {codes.ndim} axes in place of"
            raise DataError(f"the codes have {found} codebooks, and the model has {self.codebooks}; encode the clip with the "
                            "model's own codec")
        if not 1 <= codes.shape[1] <= self.longest:
            raise DataError(f"the clip has {codes.shape[1]} frames; the model takes 1 to {self.longest}")
        if codes.min() < 0 or codes.max() >= self.words:
            raise DataError(f"a code is {int(codes.min() if codes.min() < 0 else codes.max())}; they run from 0 to "
                            f"{self.words - 1}")
        return codes.astype(np.int32)

    @torch.no_grad()
    def encode(self, wave: np.ndarray) -> np.ndarray:
        """wave: [samples] float32 at ``rate`` -> [C, T] codes of the codec, with as many codebooks as the model has."""
        bandwidths = self.codec.config.target_bandwidths
        found = self.codec.encode(torch.from_numpy(wave).to(self.device)[None, None], bandwidth=max(bandwidths))
        if len(found.audio_codes) != 1:
            raise DataError("the codec cuts clips into chunks, which MusicGen's does not; take chunk_length_s out of its "
                            "config")
        return self.checked(found.audio_codes[0, 0, :self.codebooks].cpu().numpy())

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """[N, C, T] -> [N, samples] float32 on the CPU."""
        return self.codec.decode(codes[None].to(self.device), [None]).audio_values[:, 0].cpu()

    def cond(self, prompts: Sequence[str]) -> Cond:
        """One row a prompt, on the CPU."""
        return padded_states([self.states(prompt) for prompt in prompts])


def padded_states(states: Sequence[np.ndarray], k: int | None = None) -> Cond:
    """States [L, D] of B prompts, filled up with zeros. k: candidates of a group, for a batch; None for rows."""
    tokens = np.zeros((len(states), max(len(one) for one in states), states[0].shape[1]), np.float32)
    text = np.zeros(tokens.shape[:2], bool)
    for i, one in enumerate(states):
        tokens[i, :len(one)], text[i, :len(one)] = one, True
    mask = torch.from_numpy(text)
    return Cond(tokens=torch.from_numpy(tokens),
                extra={"text": mask if k is None else mask[:, None].repeat(1, k, 1)})


def load_denoiser(spec: ModelSpec, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> MusicGen:
    """Raises ModelError for everything that is wrong with the folder or hub id."""
    folder, config = inspect(spec)
    module = _loaded(MusicLM, folder, spec, dtype)
    module.source = folder
    decoder = config["decoder"]
    return MusicGen(module=module.to(device).eval(), identity=model_identity(spec),
                    process=Delay(codebooks=decoder["num_codebooks"], start_id=decoder["pad_token_id"]))


def load_inputs(spec: ModelSpec, device: str | torch.device = "cpu") -> Inputs:
    """Tokenizer, text encoder and codec of the folder. Raises ModelError."""
    folder, config = inspect(spec)
    with loading(spec.pretrained_model_name_or_path):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    module = _loaded(MusicgenForConditionalGeneration, folder, spec, torch.float32)
    text_encoder, codec = module.text_encoder, module.audio_encoder
    if not isinstance(text_encoder, T5EncoderModel) or not isinstance(codec, EncodecModel):
        raise ModelError(f"{spec.pretrained_model_name_or_path}: text encoder and codec are {type(text_encoder).__name__} and "
                         f"{type(codec).__name__}; supported are T5EncoderModel and EncodecModel")
    decoder, limit = config["decoder"], tokenizer.model_max_length
    if codec.config.num_quantizers < decoder["num_codebooks"] or codec.config.codebook_size != decoder["vocab_size"]:
        raise ModelError(f"{spec.pretrained_model_name_or_path}: the codec has {codec.config.num_quantizers} codebooks of "
                         f"{codec.config.codebook_size}, the decoder {decoder['num_codebooks']} of {decoder['vocab_size']}; "
                         "they do not belong together")
    return Inputs(tokenizer=tokenizer, text_encoder=text_encoder.to(device).eval(), codec=codec.to(device).eval(),
                  codebooks=decoder["num_codebooks"], words=decoder["vocab_size"], device=torch.device(device),
                  longest=decoder["max_position_embeddings"] - decoder["num_codebooks"],
                  longest_prompt=limit if limit < 10**6 else LONGEST_PROMPT)


def _loaded(cls: type, folder: Path, spec: ModelSpec, dtype: torch.dtype) -> Any:
    name = spec.pretrained_model_name_or_path
    with loading(name):
        module, info = cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True,
                                           output_loading_info=True)
    lost = sorted(info["missing_keys"])
    if lost:
        raise ModelError(f"{name}: lacks {len(lost)} weights, first {lost[0]}; the files do not belong to its config.json")
    return module


def model_identity(spec: ModelSpec) -> str:
    """Hex SHA-256 of configuration, weights and tokenizer. Raises ModelError."""
    folder, _ = inspect(spec)
    files = [folder / "config.json", folder / "tokenizer.json", *_weights(folder, spec)]
    return digest([], *(f"{file.name} {content(file)}" for file in files))


def inspect(spec: ModelSpec) -> tuple[Path, dict[str, Any]]:
    """The folder and its config.json, the decoder's defaults filled in. Raises ModelError."""
    name = spec.pretrained_model_name_or_path
    path = folder_of(spec, ["config.json", "generation_config.json", "model*.safetensors", *FILES])
    config = read_json(path / "config.json", name)
    if config.get("model_type") != MODEL_TYPE:
        raise ModelError(f"{name}: model_type is {str(config.get('model_type'))[:40]!r}; likelihood.kind=codes trains "
                         f"{MODEL_TYPE!r}, transformers' MusicGen")
    decoder = {"num_codebooks": 4, "vocab_size": 2048, "pad_token_id": 2048, "max_position_embeddings": 2048,
               "audio_channels": 1, **(config.get("decoder") or {})}
    if decoder["audio_channels"] != 1:
        raise ModelError(f"{name}: a stereo MusicGen, whose codebooks are delayed in twos; only the mono ones are supported")
    if decoder["pad_token_id"] != decoder["vocab_size"]:
        raise ModelError(f"{name}: config.json: decoder.pad_token_id is {decoder['pad_token_id']}; the delay pattern needs "
                         f"the first number that is no code, {decoder['vocab_size']}")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(f"{name}: tokenizer.json is missing; copy it from the model's own repository")
    _weights(path, spec)
    return path, {**config, "decoder": decoder}


def _weights(folder: Path, spec: ModelSpec) -> list[Path]:
    files = weight_files(folder, None, spec.pretrained_model_name_or_path)
    check_weights(files, spec.pretrained_model_name_or_path)
    return files
