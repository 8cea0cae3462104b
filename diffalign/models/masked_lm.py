"""Masked diffusion language models of LLaDA's kind: a folder of safetensors and JSON in, a denoiser and a tokenizer out.

transformers' ``LlamaForCausalLM`` carries the architecture (RMS norm, rotary positions, SwiGLU, no biases); LLaDA differs in
the names of its weights and configuration, and in that every token sees every other. None of the Python files that come with a
LLaDA checkpoint is read. Names and options follow LLaDA's published modeling file; real weights were not available here.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _compat  # noqa: F401  (before transformers)

# isort: split
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..errors import DataError, ModelError
from ..process import Masking
from ..types import Cond
from .folder import check_weights, content, digest, read_json, weight_files
from .load import folder_of, loading
from .lora import write_peft, write_tensors
from .spec import LANGUAGE_MODEL, ModelSpec

MODEL_TYPE = "llada"
# LLaDA's name of a module -> Llama's
_NAMES = (("model.transformer.wte", "model.embed_tokens"), ("model.transformer.ln_f", "model.norm"),
          ("model.transformer.ff_out", "lm_head"))
_BLOCK = "model.transformer.blocks."
_BLOCK_NAMES = {"q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj",
                "attn_out": "self_attn.o_proj", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
                "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}
# what LLaDA's options must be for Llama to compute the same; the second of each is LLaDA's value where it is absent
_NEEDED = {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True, "alibi": False,
           "include_bias": False, "include_qkv_bias": False, "attention_layer_norm": False, "block_group_size": 1,
           "weight_tying": False, "scale_logits": False, "input_emb_norm": False}
_SIZES = ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size", "max_sequence_length")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class MaskedLM(LlamaForCausalLM):
    """Llama without its causal mask. forward: ids [N, L] int64, attended [N, L] bool, wanted [N, L] bool -> logits [M, V] of
    the M wanted places, row by row: those of all places would not fit into memory at LLaDA's 126,464 words.
    source: the folder it was read from.
    """

    source: Path | None = None

    def forward(self, ids: Tensor, attended: Tensor, wanted: Tensor) -> Tensor:
        # a mask with four axes is used as it is: transformers adds no causal one to it
        hidden = self.model(input_ids=ids, attention_mask=attended[:, None, None].expand(-1, 1, ids.shape[1], -1),
                            use_cache=False).last_hidden_state
        return self.lm_head(hidden[wanted])

    def enable_gradient_checkpointing(self) -> None:
        """By diffusers' name for it."""
        self.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def save_pretrained(self, folder: Path | str, safe_serialization: bool = True) -> None:
        """In LLaDA's own layout: weights by its names, config.json and tokenizer as they were; none of its Python files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        for name in ("config.json", *FILES):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)

    def save_weights(self, folder: Path) -> None:
        state = {_theirs(name): x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        write_tensors(folder / "model.safetensors", state, {"format": "pt"})


@dataclass(kw_only=True)
class LLaDA:
    """The denoiser (``models.base.Denoiser``): xt [N, L] int64 with mask tokens -> logits [M, V] of those, row by row.

    cond.extra: ``attended`` [N, L]. t is not read: the number of masks tells the noise level.
    """

    module: nn.Module
    process: Masking
    identity: str = "unsaved"
    dtype: torch.dtype = field(init=False)

    family = MODEL_TYPE
    component = LANGUAGE_MODEL
    param = None
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self):
        self.dtype = next(self.module.parameters()).dtype

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.run(self.module, xt, t, cond)

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return module(xt, cond.extra["attended"], xt == self.process.mask_id)

    def idle(self) -> tuple[str, ...]:
        return ()

    def save_lora(self, folder: Path | str, metadata: dict[str, str]) -> None:
        """As ``PeftModel.from_pretrained(LLaDA's own model, folder)`` reads it: layers by LLaDA's names."""
        write_peft(self, folder, metadata, _theirs)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Text <-> token ids. mask_id, end_id: the mask and the end of an answer. longest: tokens that the model reads at most.

    chat: prompts go into the tokenizer's chat template, as an instruction-tuned model expects them.
    """

    tokenizer: PreTrainedTokenizerFast
    mask_id: int
    end_id: int
    longest: int
    chat: bool = False

    def prompt(self, text: str) -> list[int]:
        """Raises DataError for a prompt that holds the mask token."""
        if self.chat:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                      tokenize=False)
        return self._ids("the prompt", text, add_special_tokens=not self.chat)

    def answer(self, text: str) -> list[int]:
        """With the end token behind it. Raises DataError for an answer that is empty or holds the mask token."""
        ids = self._ids("an answer", text, add_special_tokens=False)
        if not ids:
            raise DataError("an answer is empty, so it has no token whose likelihood could change")
        return [*ids, self.end_id]

    def text(self, ids: list[int]) -> str:
        """An answer's text, up to its first end token."""
        end = ids.index(self.end_id) if self.end_id in ids else len(ids)
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True)

    def _ids(self, what: str, text: str, **options) -> list[int]:
        ids = self.tokenizer(text, verbose=False, **options)["input_ids"]
        if self.mask_id in ids:
            token = self.tokenizer.convert_ids_to_tokens(self.mask_id)
            raise DataError(f"{what} holds the mask token {token!r}, which stands "
                            "for what the model has to find out")
        return ids


def load_denoiser(spec: ModelSpec, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> LLaDA:
    """LLaDA's weights in transformers' Llama. Raises ModelError for everything that is wrong with the folder or hub id."""
    folder, config = inspect(spec)
    name = spec.pretrained_model_name_or_path
    with loading(name):
        with torch.device("meta"):
            module = MaskedLM(_llama(config))
        state = {_ours(key): x.to(dtype) for file in _weights(folder, spec) for key, x in load_file(file).items()}
        found = module.load_state_dict(state, strict=False, assign=True)
        module.model.rotary_emb = LlamaRotaryEmbedding(module.config)
    lost = sorted(found.missing_keys) + sorted(found.unexpected_keys)
    if lost:
        what = "lacks" if found.missing_keys else "holds unknown"
        raise ModelError(f"{name}: {what} {len(lost)} weights, first {_theirs(lost[0])}; the files do not belong to its "
                         "config.json")
    module.source = folder
    return LLaDA(module=module.to(device).eval(), process=Masking(mask_id=load_tokens(spec).mask_id),
                 identity=model_identity(spec))


def load_tokens(spec: ModelSpec, *, chat: bool = False) -> Tokens:
    """The tokenizer of the folder. Raises ModelError, also where no mask or end token is known."""
    folder, config = inspect(spec)
    name = spec.pretrained_model_name_or_path
    with loading(name):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    mask = config.get("mask_token_id", tokenizer.mask_token_id)
    end = config.get("eos_token_id", tokenizer.eos_token_id)
    for what, number in (("mask_token", mask), ("eos_token", end)):
        if not isinstance(number, int) or not 0 <= number < _words(config) or tokenizer.convert_ids_to_tokens(number) is None:
            raise ModelError(f"{name}: the tokenizer has no {what.replace('_', ' ')} ({what}_id in config.json, or {what} in "
                             "tokenizer_config.json); a masked diffusion model cannot work without one")
    if mask == end:
        raise ModelError(f"{name}: mask_token_id and eos_token_id are both {mask}; they must differ")
    if chat and not tokenizer.chat_template:
        raise ModelError(f"{name}: its tokenizer has no chat template; set data.chat_template to false")
    return Tokens(tokenizer=tokenizer, mask_id=mask, end_id=end, longest=config["max_sequence_length"], chat=chat)


def model_identity(spec: ModelSpec) -> str:
    """Hex SHA-256 of configuration, weights and tokenizer. Raises ModelError."""
    folder, _ = inspect(spec)
    files = [folder / "config.json", folder / "tokenizer.json", *_weights(folder, spec)]
    return digest([], *(f"{file.name} {content(file)}" for file in files))  # the folder's own name says nothing


def inspect(spec: ModelSpec) -> tuple[Path, dict[str, Any]]:
    """The folder and its config.json, checked against what Llama can carry. Raises ModelError."""
    name = spec.pretrained_model_name_or_path
    path = folder_of(spec, ["config.json", "model*.safetensors", *FILES])
    if (path / "model_index.json").is_file():
        raise ModelError(f"{name}: is a diffusers pipeline, which draws pictures; likelihood.kind=masked trains a masked "
                         "diffusion language model")
    config = read_json(path / "config.json", name)
    if config.get("model_type") != MODEL_TYPE:
        raise ModelError(f"{name}: model_type is {str(config.get('model_type'))[:40]!r}; supported is {MODEL_TYPE!r}, a "
                         "masked diffusion language model")
    for option, needed in _NEEDED.items():
        if (config.get(option) or False) != needed and option in config:
            raise ModelError(f"{name}: config.json: {option} is {config[option]!r}; only {needed!r} is supported")
    for option in _SIZES:
        if not isinstance(config.get(option), int) or isinstance(config[option], bool) or config[option] < 1:
            raise ModelError(f"{name}: config.json: {option} must be a whole number above 0, got "
                             f"{str(config.get(option))[:40]}")
    if config["d_model"] % config["n_heads"]:
        raise ModelError(f"{name}: config.json: d_model {config['d_model']} is no multiple of n_heads {config['n_heads']}")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(f"{name}: tokenizer.json is missing; copy it from the model's own repository")
    return path, config


def _words(config: dict[str, Any]) -> int:
    return config.get("embedding_size") or config["vocab_size"]


def _llama(config: dict[str, Any]) -> LlamaConfig:
    """LLaDA's options by Llama's names. ``sdpa``: takes the mask of booleans."""
    return LlamaConfig(
        vocab_size=_words(config), hidden_size=config["d_model"], intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"], num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"], hidden_act="silu",
        max_position_embeddings=config["max_sequence_length"], rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=config.get("rope_theta", 10000.0), tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        use_cache=False, attn_implementation="sdpa")


def _weights(folder: Path, spec: ModelSpec) -> list[Path]:
    files = weight_files(folder, None, spec.pretrained_model_name_or_path)
    check_weights(files, spec.pretrained_model_name_or_path)
    return files


def _ours(name: str) -> str:
    """"model.transformer.blocks.3.ff_proj.weight" -> "model.layers.3.mlp.gate_proj.weight"."""
    if name.startswith(_BLOCK):
        number, module, rest = name[len(_BLOCK):].split(".", 2)
        return f"model.layers.{number}.{_BLOCK_NAMES.get(module, module)}.{rest}"
    return next((ours + name[len(theirs):] for theirs, ours in _NAMES if name.startswith(theirs + ".")), name)


def _theirs(name: str) -> str:
    """The inverse of ``_ours``, for weights and for what a LoRA adds to their modules."""
    block = re.match(r"model\.layers\.(\d+)\.(.*)", name)
    if block:
        for theirs, ours in _BLOCK_NAMES.items():
            if block[2].startswith(ours + "."):
                return f"{_BLOCK}{block[1]}.{theirs}{block[2][len(ours):]}"
    return next((theirs + name[len(ours):] for theirs, ours in _NAMES if name.startswith(ours + ".")), name)



def new_folder(folder: Path, tokenizer: Tokenizer, sizes: dict[str, Any], *, mask: str, end: str, seed: int) -> None:
    """A small untrained model in LLaDA's layout: to train from nothing, and for tests. sizes: of ``_SIZES``, and others of
    LLaDA's options; the vocabulary is the tokenizer's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, mask_token=mask)
    whole.save_pretrained(folder)
    config = {"model_type": MODEL_TYPE, "architectures": ["LLaDAModelLM"], **_NEEDED, **sizes, "vocab_size": len(whole),
              "embedding_size": len(whole), "mask_token_id": whole.mask_token_id, "eos_token_id": whole.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = MaskedLM(_llama(config))
    module.save_weights(folder)
