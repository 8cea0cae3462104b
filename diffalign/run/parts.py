"""A recipe's parts, made: what is checked beforehand, then caches, method, weight bank and source."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from .. import data
from ..config import OF_PICTURES, Evaluation, Recipe, check_layout
from ..data.prompts import read_prompts
from ..data.sources import Online, Sampled, Stored
from ..data.stepwise import Stepwise, StepwiseSource
from ..errors import ConfigError, first_line
from ..evaluate.monitor import MonitorSpec, with_defaults
from ..likelihood import CodeLikelihood, DenoisingELBO, LatentScores, MaskedELBO, Transitions
from ..methods import Context, Preference, Probe
from ..models.base import Denoiser, compile_blocks, enable_gradient_checkpointing, narrow_norms, uncompile
from ..models.latent_reward import from_denoiser
from ..models.load import encoder_facts, inspect, is_distilled, load_encoders
from ..models.load import load_denoiser as load_picture_denoiser
from ..models.load import model_identity as picture_identity
from ..models.weights import WeightBank
from ..objectives import title_of
from ..objectives.sft import winners
from ..rewards import Reward, columns_of, judged, subject_of
from ..rewards import check as check_reward
from ..sampling.scheduler import make_scheduler
from ..train import is_sharding_asked, make_accelerator
from ..train.spec import TrainSpec
from ..types import Memory
from ..world import world_of
from .optimised import training_rewards

PROBE = 64  # winners that a gated reference is measured on
_OF_PICTURES = ("height", "width", "negative_prompt", "scheduler", "timestep_spacing")  # of the section evaluate
FEW = 8  # timesteps of a schedule that only a distilled model can draw with
RACE = 10  # passes of each kind that decide train.compile=auto


def accelerator_to_draw(cpu: bool, output_dir: Path | str):
    """Of the commands that draw or score. In full float32, whatever training used: what is scored here must be what is scored
    there."""
    return make_accelerator(TrainSpec(cpu=cpu, mixed_precision="no", allow_tf32=False), Path(output_dir))


def is_text(recipe: Recipe | Evaluation) -> bool:
    """Whether the model is a language model, of text or of codec tokens, of which the likelihood tells."""
    return isinstance(getattr(recipe, "likelihood", None), MaskedELBO | CodeLikelihood)


def is_audio(recipe: Recipe | Evaluation) -> bool:
    """Whether the model is a pipeline of sounds. Raises ModelError."""
    return not is_text(recipe) and inspect(recipe.model)[1].audio


def check_audio(recipe: Recipe) -> None:
    """Options of pictures, for a pipeline of sounds. Raises ConfigError."""
    if not is_audio(recipe):
        return
    for section, names in OF_PICTURES.items():
        part = getattr(recipe, section)
        name = next((name for name in names if name not in ("image_root", "variant", "distilled")
                     and getattr(part, name) != getattr(type(part), name)), None)
        if name is not None:
            raise ConfigError(f"{section}.{name}: is of pictures, and this model makes sounds; leave it out")
    if recipe.monitor is not None:
        raise ConfigError("monitor: draws pictures, and this model makes sounds; set it to null")
    if not isinstance(recipe.source, Stored) or not isinstance(recipe.likelihood, DenoisingELBO):
        raise ConfigError("source.kind: sounds are trained from stored pairs with likelihood.kind=denoising; leave both at "
                          "their defaults")


def base_identity(recipe: Recipe) -> str:
    """Hash of the model that training starts from. Raises ModelError."""
    return language_model(recipe).model_identity(recipe.model) if is_text(recipe) else picture_identity(recipe.model)


def denoiser_of(recipe: Recipe, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Denoiser:
    """The model that training starts from. Raises ModelError."""
    load = language_model(recipe).load_denoiser if is_text(recipe) else load_picture_denoiser
    return load(recipe.model, dtype=dtype, device=device)


def language_model(recipe: Recipe):
    """The module that loads it. Imported when a recipe needs it: a second's worth of transformers' models."""
    return import_module(f"..models.{'masked_lm' if isinstance(recipe.likelihood, MaskedELBO) else 'musicgen'}", __package__)


def check_before(recipe: Recipe) -> None:
    """What can be refused from the recipe and the headers of its files, before anything is decoded or loaded."""
    check_layout(recipe, data.detect_layout(recipe.data))
    check_audio(recipe)
    _check_distilled(recipe)
    check_evaluate(recipe)
    check_monitor(recipe)
    _check_sharded(recipe)
    judge = getattr(recipe.source, "judge", None)
    check_judge("source.judge.reward" if judge else "source.reward", getattr(judge or recipe.source, "reward", None),
                given=("t",) if judge else ())
    if hasattr(judge, "check_for"):
        judge.check_for(recipe.model)


def _check_sharded(recipe: Recipe) -> None:
    """Passes through weights that are cut are collective: all processes must make the same, through the whole model."""
    if not is_sharding_asked():
        return
    if recipe.monitor is not None:
        raise ConfigError("monitor: cannot draw with weights that FSDP2 has cut; set monitor=null and evaluate afterwards, or "
                          "train with configs/accelerate/ddp.yaml")
    if isinstance(recipe.likelihood, LatentScores):
        raise ConfigError("likelihood: a latent reward model runs a part of the model only, which FSDP2 cannot cut; train it "
                          "with configs/accelerate/ddp.yaml")


def identity_of(recipe: Recipe) -> dict[str, str]:
    """Hashes of what a run depends on besides its data: one with another base or judge must not continue it."""
    judge = getattr(recipe.source, "judge", None)
    return {"base": base_identity(recipe), **({"judge": judge.identity()} if hasattr(judge, "identity") else {})}


def _check_distilled(recipe: Recipe) -> None:
    """A model that was not distilled has learned nothing of drawing in four steps; training it there would only blur it."""
    places = (("likelihood.times", getattr(recipe.likelihood, "times", None)), ("likelihood", recipe.likelihood),
              ("source.sampler", recipe.source.sampler))
    name = next((name for name, part in places if 0 < len(getattr(part, "timesteps", None) or ()) <= FEW), None)
    if name is not None and not is_distilled(recipe.model):
        raise ConfigError(f"{name}.timesteps: a few-step schedule, but as far as its files tell "
                          f"{recipe.model.pretrained_model_name_or_path} was not distilled; use a model that was, name its "
                          "LoRA in model.fuse_lora, or set model.distilled=true")


def made_by(recipe: Recipe | Evaluation) -> str:
    """What the model draws, as rewards call it: "pictures" or "clips". Raises ModelError."""
    return "clips" if is_text(recipe) or is_audio(recipe) else "pictures"


def check_judge(option: str, reward: Reward | None, given: tuple[str, ...] = (), subject: str = "pictures") -> None:
    """A reward for pictures (or another ``subject``) that are drawn from prompts alone, with the columns ``given``. Raises
    UserError children.
    """
    if reward is None:
        return
    if subject_of(reward) != subject:
        raise ConfigError(f'{option}: reward "{reward.name}" scores {subject_of(reward)}, and this model makes {subject}; '
                          f"choose a reward of {subject}")
    check_reward(reward, subject)
    missing = [name for name in columns_of(reward) if name not in given]
    if missing:
        raise ConfigError(f'{option}: reads a column "{missing[0]}" beside picture and prompt, which prompts alone '
                          "do not have; choose another reward")


def check_evaluate(recipe: Recipe | Evaluation) -> None:
    """A wrong judge, prompt file or scheduler is found before training, not after."""
    spec = recipe.evaluate
    if spec is not None:
        read_prompts(spec.prompts)
        subject = made_by(recipe)
        check_judge("evaluate.judge", spec.judge, subject=subject)
        check_judge("evaluate.training_reward", spec.training_reward, subject=subject)
        for name, reward in spec.rewards.items():
            check_judge(f"evaluate.rewards.{name}", reward, subject=subject)
        if is_text(recipe):
            from .codes import frames_of  # a second's worth of transformers' models

            frames_of(recipe.model, spec.seconds)
            return
        if spec.seconds is not None and subject == "pictures":
            raise ConfigError("evaluate.seconds: is of clips, and this model makes pictures; leave it out")
        wrong = next((name for name in _OF_PICTURES if subject == "clips" and getattr(spec, name) is not None), None)
        if wrong is not None:
            raise ConfigError(f"evaluate.{wrong}: is of pictures, and this model makes sounds; leave it out")
        folder, _ = inspect(recipe.model)
        if spec.scheduler or spec.timestep_spacing:
            make_scheduler(folder.config("scheduler"), spec.scheduler, spec.timestep_spacing, spec.num_inference_steps)


def monitor_spec(recipe: Recipe) -> MonitorSpec | None:
    """The section, with what it takes from others."""
    if recipe.monitor is None:
        return None
    evaluate = recipe.evaluate
    return with_defaults(recipe.monitor, prompts=evaluate.prompts if evaluate else None,
                         judge=evaluate.judge if evaluate else None)


def monitored_rewards(recipe: Recipe) -> tuple[tuple[Reward, float], ...]:
    """What was optimised, with weights, as the monitor measures it."""
    if recipe.monitor.reward is not None:
        return ((recipe.monitor.reward, 1.0),)
    return training_rewards(recipe) or ()


def check_monitor(recipe: Recipe) -> None:
    """A wrong prompt file or reward is found before training."""
    spec = monitor_spec(recipe)
    if spec is None:
        return
    if spec.prompts is None:
        raise ConfigError("monitor.prompts: is missing, and there is no evaluate.prompts to take; name a file of prompts")
    read_prompts(spec.prompts, "evaluate.prompts" if recipe.monitor.prompts is None else "monitor.prompts")
    check_judge("monitor.judge", spec.judge)
    for reward, _ in monitored_rewards(recipe):
        check_judge("monitor.reward", reward)
    if spec.early_stop is not None and spec.judge is None:
        raise ConfigError("monitor.early_stop: watches the held-out judge, and there is none; set monitor.judge")


def caches(recipe: Recipe, accelerator, say: Callable[[str], None]):
    """The caches of training and held-out data (or None), built where missing; the encoders are freed afterwards. Text and
    audio have none: they are read into memory.
    """
    if is_text(recipe) or is_audio(recipe):
        return _in_memory(recipe, accelerator.device, say)
    spec, world, facts = recipe.data, world_of(accelerator), encoder_facts(recipe.model)
    resolution = spec.resolution or facts.default_resolution
    caches, loaded = [], []

    def encoders():
        if not loaded:
            loaded.append(load_encoders(recipe.model, accelerator.device))
        return loaded[0]

    for part in ("train", "validation") if data.has_validation(spec) else ("train",):
        report = data.encode(spec, encoders, cache_dir=cache_dir(recipe), resolution=resolution, seed=recipe.seed, part=part,
                             facts=facts, world=world, progress=accelerator.is_main_process)
        say(report.summary())
        for name in report.bad:
            say(f"  skipped {name}")
        caches.append(data.Cache(report.manifest))
    loaded.clear()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return (*caches, None)[:2]


def _in_memory(recipe: Recipe, device, say: Callable[[str], None]):
    """Text, codec tokens and audio latents are held in memory by every process."""
    spec, found = recipe.data, []
    if isinstance(recipe.likelihood, CodeLikelihood):
        read, how, unit = data.read_clips, language_model(recipe).load_inputs(recipe.model, device), "frames"
    elif is_text(recipe):
        read, how, unit = data.read_texts, language_model(recipe).load_tokens(recipe.model, chat=spec.chat_template), "tokens"
    else:
        read, how, unit = data.read_sounds, load_encoders(recipe.model, device), "seconds"
    for part in ("train", "validation") if data.has_validation(spec) else ("train",):
        rows = read(spec, how, part=part, seed=recipe.seed)
        report = rows.report
        say(f"{part}: {report['groups']} groups of {report['rows']} rows ({report['ties']} ties, {report['bad_rows']} bad), "
            f"the longest has {report['longest']:.6g} {unit}")
        for name in report["bad"]:
            say(f"  skipped {name}")
        found.append(rows)
    return (*found, None)[:2]


def cache_dir(recipe: Recipe) -> Path:
    return Path(recipe.data.cache_dir) if recipe.data.cache_dir else Path(recipe.output_dir).parent / "cache"


def method_of(recipe: Recipe) -> Preference:
    return Preference.of(recipe.likelihood, recipe.objective, recipe.reference)


def sets_of(recipe: Recipe, method: Preference) -> tuple[str, ...]:
    """The weight sets of the method and of the source that draws its candidates."""
    return tuple(dict.fromkeys((*method.reads, *filter(None, (getattr(recipe.source, "weights", None),)))))


def precision_of(recipe: Recipe) -> tuple[torch.dtype, torch.dtype]:
    """What the denoiser is computed in, and what its base is stored in: a LoRA's frozen base in what it is computed in."""
    forward = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.train.mixed_precision, torch.float32)
    return forward, torch.float32 if recipe.model.lora is None else forward


def base_of(recipe: Recipe, accelerator) -> Denoiser:
    """The model that training starts from, as it computes."""
    denoiser = denoiser_of(recipe, dtype=precision_of(recipe)[1], device=accelerator.device)
    _attention(denoiser, recipe)
    if recipe.train.mixed_precision == "bf16":
        narrow_norms(denoiser)
    return denoiser


def bank_of(recipe: Recipe, method: Preference, accelerator, cache, measured: bool = False) -> WeightBank:
    """The denoiser with its weight sets. measured: nothing asks for the reference, whose errors come with the batches."""
    forward, _ = precision_of(recipe)
    denoiser = base_of(recipe, accelerator)
    if isinstance(recipe.likelihood, LatentScores):
        denoiser = from_denoiser(denoiser, recipe.model, guidance_scale=recipe.likelihood.guidance_scale, seed=recipe.seed,
                                 text_projection=recipe.likelihood.text_projection)
    bank = WeightBank.build(denoiser, recipe.model.lora, reads=sets_of(recipe, method), seed=recipe.seed,
                            forward_dtype=forward, rule=recipe.reference, measured=measured)
    if recipe.train.gradient_checkpointing:
        enable_gradient_checkpointing(denoiser, selective=recipe.train.gradient_checkpointing == "selective")
    if getattr(recipe.reference, "gate", None) is not None:
        bank.divergence = _divergence(recipe, cache, accelerator)
    return bank


def _divergence(recipe: Recipe, cache, accelerator) -> Callable[[WeightBank, str], float]:
    """For gated references: every process measures the same winners; their mean is one number for all."""
    size = max(1, 2 * recipe.train.train_batch_size)
    batches = data.fixed_batches(cache, size, seed=recipe.seed)[:-(-PROBE // size)]
    if not any(len(winners(batch)[0]) for batch in batches):
        raise ConfigError(f"reference.gate: the first {PROBE} groups hold no winner to measure divergence on; set it to null")
    probe = Probe(batches)
    world = world_of(accelerator)

    def measure(bank: WeightBank, name: str) -> float:
        value = probe(context(recipe, bank, accelerator), name, device=accelerator.device)
        return float(world.sum(torch.tensor([value], dtype=torch.float64, device=accelerator.device))) / world.size
    return measure


def context(recipe: Recipe, bank: WeightBank, accelerator) -> Context:
    """For passes outside a training step."""
    def predict(*args):
        with accelerator.autocast():
            return bank.predict(*args)

    denoiser = bank.denoiser
    return Context(predict=predict, process=denoiser.process, param=denoiser.param, seed=recipe.seed, step=0, memory=Memory())


def compiled(recipe: Recipe, bank: WeightBank, stored: data.Offline, accelerator) -> str | None:
    """Compile the denoiser's blocks, tried on passes of the first micro-batch's size. Returns why they stay as they are."""
    def attempt():
        batch = stored.take(0)[0].to(accelerator.device)
        t = torch.full((batch.groups * batch.k,), 0.5, device=accelerator.device)
        bank.denoiser.module.train()
        raw = context(recipe, bank, accelerator).predict("policy", batch.x0.flatten(0, 1), t, batch.cond.rows(batch.k))
        loss = raw.float().square().mean()
        loss.backward()
        for parameter in bank.trainable().values():
            parameter.grad = None
        loss.item()  # waits for the device

    problem = compile_blocks(bank.denoiser, attempt, race=RACE if recipe.train.compile == "auto" else 0)
    # each process has a clock and a compiler of its own: where one stays, all do
    problem = next(filter(None, world_of(accelerator).gather(problem or "")), None)
    if problem is not None:
        uncompile(bank.denoiser)
    return problem


def stored_of(recipe: Recipe, cache, world) -> data.Offline:
    """What lies on disk. Raises ConfigError when its groups are too small for the objective."""
    spec = recipe.train
    stored = data.Offline(cache, seed=recipe.seed, train_batch_size=spec.train_batch_size, rank=world.rank, world=world.size,
                          gradient_accumulation_steps=spec.gradient_accumulation_steps,
                          caption_dropout=recipe.data.caption_dropout, random_flip=recipe.data.random_flip)
    k = recipe.source.k or stored.k
    if k < recipe.objective.min_k:
        raise ConfigError(f"objective: {title_of(recipe.objective)} compares {recipe.objective.min_k} candidates, but "
                          f"{recipe.data.path} has {k} a group; use objective.kind=sft or another data set")
    return stored


def source_of(recipe: Recipe, stored: data.Offline, bank: WeightBank, accelerator):
    """The source: what lies on disk, or groups that hold samples of the model."""
    spec, device = recipe.source, accelerator.device
    if isinstance(spec, Stored):
        return stored
    if isinstance(spec, Stepwise):
        world = world_of(accelerator)
        return StepwiseSource(stored, spec, lambda: context(recipe, bank, accelerator), _decoder(recipe, device),
                              device=device, pairs=recipe.train.train_batch_size,
                              most=lambda n: max(map(int, world.gather(str(n)))))
    empty = stored.unconditional()

    def draw(cond, keys, shape):
        nothing = empty.rows(len(keys)).to(device) if spec.sampler.guidance_scale != 1 else None
        if nothing is not None:  # the same sizes and crops as the sample's own
            nothing = dataclasses.replace(nothing, extra=cond.to(device).extra)
        ctx = context(recipe, bank, accelerator)
        return tuple(x.cpu() for x in spec.sampler(ctx, spec.weights, cond.to(device), keys, shape, nothing))

    return Sampled(stored, spec, draw, _score(recipe, device) if isinstance(spec, Online) else None,
                   levels=spec.sampler.levels(bank.denoiser.process) if isinstance(recipe.likelihood, Transitions) else None)


def _score(recipe: Recipe, device) -> Callable:
    """Latents and prompts -> scores of the recipe's reward."""
    decode = _decoder(recipe, device)

    def score(x0, prompts):
        with torch.no_grad():
            return judged(recipe.source.reward, list(decode(x0).cpu()), prompts)
    return score


def _decoder(recipe: Recipe, device) -> Callable:
    """Latents [N, *S] -> pictures [N, 3, H, W] in [0, 1]. The VAE is loaded when first asked, and stays in memory."""
    loaded = []

    def decode(x0):
        if not loaded:  # a judge of latents never asks
            loaded.append(load_encoders(recipe.model, device))
        parts = x0.split(recipe.data.encode_batch_size)
        return (torch.cat([loaded[0].decode(part.to(device)) for part in parts]) + 1) / 2
    return decode


def _attention(denoiser: Denoiser, recipe: Recipe) -> None:
    if not recipe.train.enable_xformers_memory_efficient_attention:
        return
    try:
        denoiser.module.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, RuntimeError) as error:  # RuntimeError: it has no kernel for this card
        raise ConfigError("train.enable_xformers_memory_efficient_attention: xformers cannot be used here "
                          f"({first_line(error)}); run `pip install 'diffalign[xformers]'` on a machine with CUDA, or set it "
                          "to false") from None
