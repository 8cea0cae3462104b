"""A denoiser turned into a reward of noisy latents: the Latent Reward Model (LPO, arXiv 2502.01051; lpo_lrm.md 2a).

What is kept of the denoiser is its trunk: of a UNet everything but the up blocks, of a DiT the first three quarters of its
layers (SD3-Medium: 18 of 24, as in the paper). The score is exp(tau) * cosine(visual feature, text feature).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import rng
from ..errors import ModelError
from ..process import Parameterization, Process
from ..types import Cond, carried
from .base import Adapter, Denoiser, unwrap
from .folder import check_weights, content, read_json, weight_files
from .load import FAMILIES, download, encoder_facts, inspect, load_encoders, loading
from .spec import LATENT_REWARD, ModelSpec

FORMAT, CONFIG, WEIGHTS = 1, "config.json", "model.safetensors"
TAU = 2.6592  # log of CLIP's first temperature, 14.285
SPREAD = 0.02  # standard deviation of the visual projection's first weights
SHARE = 0.75  # of a DiT's layers


# --- what is kept of a denoiser, and which features are read from it ----------------------------------------------------

class _UNetTrunk:
    """Last layer of each down block before its downsampler, and the mid block: SD 1.5 4800 channels, SDXL 3520."""

    @staticmethod
    def cut(unet: nn.Module) -> None:
        """The up blocks go: diffusers' own forward then returns what the mid block gave."""
        unet.up_blocks, unet.conv_norm_out, unet.conv_out = nn.ModuleList(), None, nn.Identity()

    @staticmethod
    def widths(config: dict[str, Any]) -> list[int]:
        return [*config["block_out_channels"], config["block_out_channels"][-1]]

    @staticmethod
    def taps(unet: nn.Module) -> list[tuple[nn.Module, Callable]]:
        def layer(block):  # (hidden, outputs of the layers and of the downsampler)
            return lambda output: output[1][len(block.resnets) - 1].mean((2, 3))

        return [*((block, layer(block)) for block in unet.down_blocks), (unet.mid_block, lambda output: output.mean((2, 3)))]

    @staticmethod
    def idle(unet: nn.Module) -> tuple[str, ...]:
        return ()


class _DiTTrunk:
    """The picture's tokens after the last kept layer, averaged: SD3-Medium 1536 channels. The pooling is ours."""

    @staticmethod
    def cut(transformer: nn.Module) -> None:
        blocks = transformer.transformer_blocks
        transformer.transformer_blocks = blocks[:max(1, int(SHARE * len(blocks)))]
        transformer.norm_out, transformer.proj_out = _Tokens(), _Narrow(_patch(transformer.config))

    @staticmethod
    def widths(config: dict[str, Any]) -> list[int]:
        return [config["num_attention_heads"] * config["attention_head_dim"]]

    @staticmethod
    def taps(transformer: nn.Module) -> list[tuple[nn.Module, Callable]]:
        return [(transformer.norm_out, lambda output: output.mean(1))]

    @staticmethod
    def idle(transformer: nn.Module) -> tuple[str, ...]:
        """The text stream of the last kept layer leads nowhere."""
        last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
        return tuple(f"{last}.{name}" for name in ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "ff_context"))


class _Tokens(nn.Module):
    """In the place of a DiT's last norm: hands on the tokens."""

    def forward(self, tokens: Tensor, _: Tensor) -> Tensor:
        return tokens


class _Narrow(nn.Module):
    """In the place of a DiT's last projection: as many channels as its unpatching wants; nobody reads them."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[..., :1].expand(*tokens.shape[:-1], self.width)


def _patch(config) -> int:
    return config.patch_size**2 * (config.out_channels or config.in_channels)


TRUNKS = {"UNet2DConditionModel": _UNetTrunk, "SD3Transformer2DModel": _DiTTrunk}


# --- what it is, as its config.json says -------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Facts:
    """model: the pipeline it was made of, as a recipe names it, and base, the identity of that one's denoiser. vae, text:
    identities of its encoders. latent_channels, spatial_factor, scaling_factor, shift_factor: of the latents it reads.
    guidance_scale: of the visual feature enhancement. scheduler, trunk: the denoiser's configurations.
    """

    family: str
    model: dict[str, Any]
    base: str
    vae: str
    text: str
    latent_channels: int
    spatial_factor: int
    scaling_factor: float
    shift_factor: float | None
    guidance_scale: float
    scheduler: dict[str, Any]
    trunk: dict[str, Any]

    @property
    def adapter(self) -> type[Adapter]:
        return FAMILIES[self.family]

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(**self.model, lora=None)

    @property
    def process(self) -> Process:
        """Its noise schedule. The adapter wants some module; it is not asked anything."""
        return self.adapter.assemble(nn.Linear(1, 1), self.scheduler).process


def read_facts(folder: Path | str) -> Facts:
    """From config.json and the headers of the weights. Raises ModelError for what is no latent reward model."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; a latent reward model is the folder {LATENT_REWARD}/ that "
                         "`diffalign train` writes with likelihood.kind=latent_reward")
    tree = read_json(folder / CONFIG, str(folder))
    if tree.pop("_class_name", None) != "LatentReward" or tree.pop("format", None) != FORMAT:
        raise ModelError(f"{folder}: {CONFIG} is not that of a latent reward model (LatentReward, format {FORMAT})")
    names = {f.name for f in fields(Facts)}
    if tree.keys() != names or tree["family"] not in FAMILIES:
        wrong = sorted(tree.keys() ^ names) or [f"family {str(tree['family'])[:40]}"]
        raise ModelError(f"{folder}: {CONFIG} is damaged or of another version ({wrong[0]})")
    check_weights(weight_files(folder, None, str(folder)), str(folder))
    return Facts(**tree)


def identity(folder: Path | str) -> dict[str, str]:
    """JSON-ready facts that pin its scores. Raises ModelError."""
    facts = read_facts(folder)
    return {"weights": content(Path(folder).expanduser() / WEIGHTS), "vae": facts.vae, "text": facts.text, "base": facts.base}


def check_latents(folder: Path | str, spec: ModelSpec, *, same_latents: bool = False) -> None:
    """Raises ModelError unless the latents of the pipeline ``spec`` are those that the model in ``folder`` was trained on.

    same_latents: the user's word that another VAE file has the same latent space, as SD 2.1's and SD 1.5's.
    """
    facts, found = read_facts(folder), encoder_facts(spec)
    name = spec.pretrained_model_name_or_path
    for what in ("latent_channels", "spatial_factor", "scaling_factor", "shift_factor"):
        ours, theirs = getattr(facts, what), getattr(found, what)
        if ours != theirs:
            raise ModelError(f"{folder}: was trained on latents with {what} {ours}, those of {name} have {theirs}; train a "
                             "latent reward model on this base")
    if facts.vae != found.identity["vae"] and not same_latents:
        raise ModelError(f"{folder}: was trained on the latents of another VAE than that of {name}; train one on this base, "
                         "or set same_latents=true if you know that the two VAEs share their latent space")
    pipeline, adapter = inspect(spec)
    theirs = adapter.assemble(nn.Linear(1, 1), pipeline.config("scheduler")).process
    if not _same_schedule(facts.process, theirs):
        raise ModelError(f"{folder}: was trained on another noise schedule than that of {name}; train one on this base")


def check_texts(folder: Path | str, spec: ModelSpec) -> None:
    """Raises ModelError unless the pipeline's text encoders are those that the model was trained with."""
    if read_facts(folder).text != encoder_facts(spec).identity["text"]:
        raise ModelError(f"{folder}: was trained with other text encoders than those of {spec.pretrained_model_name_or_path}")


def _same_schedule(a: Process, b: Process) -> bool:
    if type(a) is not type(b):
        return False
    grids = [process.coefficients(process.grid())[0] for process in (a, b)]
    return len(grids[0]) == len(grids[1]) and torch.allclose(*grids, atol=1e-4)


# --- the module -----------------------------------------------------------------------------------------------------

class LatentReward(nn.Module):
    """s(x_t, c, t) = exp(tau) * <V, T> / (|V| |T|), in logits.

    V = W_v [g(h_1), ..., g(h_L), g(m_0) + guidance_scale * (g(m_c) - g(m_0))]: g is the mean over places, h_i the trunk's
    features with the prompt, m its last feature with the prompt and with the empty one (visual feature enhancement; 1 is
    none and costs no second pass). T: the pooled prompt, through one more projection where the family's encoder has none (SD
    1.x; first the identity). tau is not clamped. The text encoders stay frozen, so that their states are cached like those
    of any other training; the paper trains them for the UNets, and not for SD3.

    empty: one row, the *encoded* empty prompt, whatever the pipeline has in its place (SDXL: zeros). SDXL is told the sizes
    of an uncropped picture: the true ones differ inside a pair and would give it away.
    """

    def __init__(self, adapter: Adapter, facts: Facts, empty: Cond):
        super().__init__()
        trunk = TRUNKS[adapter.module_class]
        self.adapter, self.facts = adapter, facts
        self.trunk, self._taps = adapter.module, trunk.taps
        text = empty.pooled.shape[-1]
        self.visual = nn.Linear(sum(trunk.widths(facts.trunk)), text, bias=False)
        self.text = nn.Identity() if adapter.pooled_is_projected else nn.Linear(text, text, bias=False)
        self.tau = nn.Parameter(torch.tensor(TAU))
        self.register_buffer("empty_tokens", empty.tokens)
        self.register_buffer("empty_pooled", empty.pooled)

    @torch.no_grad()
    def reset(self, seed: int, projection: Tensor | None = None) -> None:
        """First weights of what the denoiser does not have. projection: [text, text] of the text feature, or the identity."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.visual.weight.copy_(torch.randn(self.visual.weight.shape) * SPREAD)
        if isinstance(self.text, nn.Linear):
            self.text.weight.copy_(torch.eye(len(self.text.weight)) if projection is None else projection)

    def forward(self, xt: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """xt [N, *S], t [N], tokens [N, L, D], pooled [N, D'] -> scores [N] float32."""
        visual = self.features(xt, t, tokens, pooled)
        with torch.autocast(xt.device.type, enabled=False):
            cosine = F.cosine_similarity(self.visual(visual), self.text(pooled.float()), dim=-1)
            return self.tau.exp() * cosine

    def features(self, xt: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """[N, width] float32, the last feature enhanced."""
        n, scale = len(xt), self.facts.guidance_scale
        if scale == 1:
            return torch.cat(self._run(xt, t, tokens, pooled), dim=1)
        found = self._run(xt.repeat(2, 1, 1, 1), t.repeat(2), self._beside(tokens, self.empty_tokens),
                          self._beside(pooled, self.empty_pooled))
        with_prompt, without = found[-1][:n], found[-1][n:]
        return torch.cat([*(h[:n] for h in found[:-1]), without + scale * (with_prompt - without)], dim=1)

    def _beside(self, prompts: Tensor, empty: Tensor) -> Tensor:
        return torch.cat([prompts, empty.to(prompts.dtype).expand_as(prompts)])

    def _run(self, xt: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> list[Tensor]:
        """Every tapped feature, averaged over places: [N, C_i] float32 each."""
        height, width = (self.facts.spatial_factor * side for side in xt.shape[2:])
        sizes = carried(torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32), xt.device)
        cond = Cond(tokens=tokens, pooled=pooled, extra={"time_ids": sizes.expand(len(xt), 6)})
        with _listening(self._taps(self.trunk)) as found:
            self.adapter.run(self.trunk, xt, t, cond)
        return [value.float() for value in found]

    def enable_gradient_checkpointing(self) -> None:
        self.trunk.enable_gradient_checkpointing()

    def save_pretrained(self, folder: Path | str, safe_serialization: bool = True, dtype: torch.dtype | None = None) -> None:
        """config.json and model.safetensors. dtype: of what is written; null keeps float32."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().to(dtype or value.dtype).contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        tree = {"_class_name": "LatentReward", "format": FORMAT, **asdict(self.facts)}
        (folder / CONFIG).write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _listening(taps: Sequence[tuple[nn.Module, Callable]]) -> Iterator[list[Tensor]]:
    """What ``read(output)`` gives for every (module, read), in the order in which the modules run."""
    found: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _, __, output, read=read: found.append(read(output)))
               for module, read in taps]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(kw_only=True)
class Scorer:
    """A latent reward model in a denoiser's place: called like one, it gives scores [N] instead of a prediction.

    It has no attention to put a LoRA on: all its weights are trained.
    """

    module: nn.Module
    family: str
    param: Parameterization
    process: Process
    identity: str
    component: str = LATENT_REWARD
    lora_targets: tuple[str, ...] = ()
    dtype: torch.dtype = field(default=torch.float32)

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.run(self.module, xt, t, cond)

    def run(self, module: nn.Module, xt: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return module(xt, t, cond.tokens, cond.pooled)

    def idle(self) -> tuple[str, ...]:
        model = unwrap(self.module)
        return tuple(f"trunk.{name}" for name in TRUNKS[model.adapter.module_class].idle(model.trunk))


# --- made of a denoiser, or read from a folder ------------------------------------------------------------------------

def from_denoiser(denoiser: Denoiser, spec: ModelSpec, *, guidance_scale: float = 7.5, seed: int = 0,
                  text_projection: str | None = None) -> Scorer:
    """A latent reward model to be trained. The denoiser's own module becomes its trunk: what is not needed is dropped.

    spec: where the denoiser came from; its text encoders are loaded once for the empty prompt. seed: of the visual
    projection. text_projection: folder, or hub id with @revision, of a CLIP whose ``text_projection.weight`` the text feature
    starts with (SD 1.x: openai/clip-vit-large-patch14). Raises ModelError.
    """
    found, (folder, adapter) = encoder_facts(spec), inspect(spec)
    with torch.no_grad():
        tokens, pooled = load_encoders(spec).encode_prompts([""])
    module = unwrap(denoiser.module)
    config = {name: value for name, value in dict(module.config).items() if name not in ("_name_or_path",)}
    facts = Facts(family=found.family, model=_named(spec), base=denoiser.identity, vae=found.identity["vae"],
                  text=found.identity["text"], latent_channels=found.latent_channels, spatial_factor=found.spatial_factor,
                  scaling_factor=found.scaling_factor, shift_factor=found.shift_factor, guidance_scale=guidance_scale,
                  scheduler=folder.config("scheduler"), trunk=json.loads(json.dumps(config, default=str)))
    device = next(module.parameters()).device
    TRUNKS[adapter.module_class].cut(module)
    with torch.random.fork_rng(devices=[]):  # torch draws first weights that are overwritten below
        model = LatentReward(denoiser, facts, Cond(tokens=tokens, pooled=pooled))
    model.reset(rng.integer(seed, "latent_reward"), None if text_projection is None else _projection(text_projection))
    return _scorer(model.to(device), denoiser)


def load_scorer(folder: Path | str, device: str | torch.device = "cpu") -> Scorer:
    """A trained one, float32, without gradients. Raises ModelError."""
    from safetensors.torch import load_file

    facts, folder = read_facts(folder), Path(folder).expanduser()
    with loading(str(folder)):
        state = {name: value.float() for name, value in load_file(folder / WEIGHTS).items()}
        with torch.device("meta"):
            model = build(facts, Cond(tokens=state["empty_tokens"], pooled=state["empty_pooled"]))
    missing = sorted(model.state_dict().keys() ^ state.keys())
    if missing:
        raise ModelError(f"{folder}: {len(missing)} tensors are missing or unknown, first {missing[0]}; the weights do not "
                         f"belong to {CONFIG}")
    with loading(str(folder)):
        model.load_state_dict(state, assign=True)
    model = model.to(device).eval().requires_grad_(False)
    return _scorer(model, model.adapter)


def build(facts: Facts, empty: Cond) -> LatentReward:
    """The module by its configuration, on the current default device, with whatever weights that gives."""
    import diffusers

    trunk = getattr(diffusers, facts.adapter.module_class).from_config(facts.trunk)
    TRUNKS[facts.adapter.module_class].cut(trunk)
    with torch.device("cpu"):  # where noise schedules live
        adapter = facts.adapter.assemble(trunk, facts.scheduler)
    return LatentReward(adapter, facts, empty)


def _scorer(model: LatentReward, adapter: Denoiser) -> Scorer:
    return Scorer(module=model, family=adapter.family, param=adapter.param, process=adapter.process, identity=adapter.identity)


def _named(spec: ModelSpec) -> dict[str, Any]:
    names = ("pretrained_model_name_or_path", "revision", "variant", "pretrained_vae_model_name_or_path", "fuse_lora")
    return {name: getattr(spec, name) for name in names if getattr(spec, name) is not None}


def _projection(source: str) -> Tensor:
    """``text_projection.weight`` of a CLIP, read alone."""
    from safetensors import safe_open

    name, _, revision = source.partition("@")
    folder = Path(name) if Path(name).is_dir() else download(name, revision or None, ["model.safetensors"])
    file = weight_files(folder, None, name)[0]
    check_weights([file], name)
    with safe_open(file, framework="pt") as handle:
        if "text_projection.weight" not in handle.keys():
            raise ModelError(f"{source}: {file.name} has no text_projection.weight; name a CLIP with a projection")
        return handle.get_tensor("text_projection.weight").float()
