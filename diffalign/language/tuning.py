"""SFT, DPO and GRPO of a language model by TRL's trainers with PEFT. The only module that imports TRL.

The adapter is merged after each stage, so that the next one's reference, the same network with its adapter off, is the stage
before and not the model of the beginning.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .. import _compat  # noqa: F401  (trl imports transformers)
from ..errors import ConfigError, DataError
from .rewriter import TOKENIZER, Rewriter
from .spec import DpoSpec, GrpoSpec, Tuning

MODEL, CHECKPOINTS = "model", "checkpoints"
STATE = "trainer_state.json"  # what transformers writes last into a checkpoint


def trl() -> Any:
    """The library, told to be quiet. Raises ConfigError where it is missing."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub.constants as hub
        import trl as library
    except ImportError as error:
        raise ConfigError(f'prompt rewriters are trained by TRL: pip install "diffalign[text]" ({error})') from None
    hub.HF_HUB_DISABLE_TELEMETRY = True  # the variable was read when the hub's client was imported, long ago
    return library


@contextmanager
def _quietly():
    """Without the bars that datasets shows for each step of the preparation, and without notices of coming versions."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@_quietly()
def sft(source: Rewriter, rows: Sequence[dict], spec: Tuning, folder: Path, *, seed: int, cpu: bool) -> dict[str, Any]:
    """rows: prompt and completion -> ``folder``/model, the merged model. Goes on from TRL's last checkpoint if there is one.
    Returns facts. Raises UserError children.
    """
    library = trl()
    table = [{"prompt": source.messages(row["prompt"]), "completion": source.messages(row["prompt"], row["completion"])[-1:]}
             for row in rows]
    options = library.SFTConfig(**_common(spec, folder, seed, cpu), packing=False)
    return _train(library.SFTTrainer, options, source, table, spec, folder)


@_quietly()
def dpo(source: Rewriter, rows: Sequence[dict], spec: DpoSpec, folder: Path, *, seed: int, cpu: bool) -> dict[str, Any]:
    """rows: prompt, chosen and rejected; else as ``sft``. The reference is ``source``."""
    library = trl()
    table = [{"prompt": source.messages(row["prompt"]),
              **{side: source.messages(row["prompt"], row[side])[-1:] for side in ("chosen", "rejected")}} for row in rows]
    try:
        options = library.DPOConfig(**_common(spec, folder, seed, cpu), beta=spec.beta, loss_type=list(spec.loss_type),
                                    loss_weights=None if spec.loss_weights is None else list(spec.loss_weights),
                                    label_smoothing=spec.label_smoothing)
        return _train(library.DPOTrainer, options, source, table, spec, folder)
    except ValueError as error:
        if "loss" not in str(error) and "smoothing" not in str(error):
            raise
        raise ConfigError(f"dpo.loss_type: TRL refuses it ({str(error).splitlines()[0][:200]})") from None


@_quietly()
def grpo(source: Rewriter, prompts: Sequence[str], reward: Callable[[list[str], list[str]], Sequence[float | None]],
         spec: GrpoSpec, folder: Path, *, seed: int, cpu: bool) -> dict[str, Any]:
    """Online: ``spec.generations`` answers of the model to each prompt, as long and as hot as ``source`` says, are compared by
    ``reward(prompts, answers)``, a number each, None for what it cannot score; else as ``sft``. The reference is ``source``.
    """
    library = trl()
    common = _common(spec, folder, seed, cpu)
    del common["max_length"]  # answers have their own limit
    try:
        options = library.GRPOConfig(**common, num_generations=spec.generations, max_completion_length=source.max_new_tokens,
                                     temperature=source.temperature, top_k=source.top_k, top_p=source.top_p, beta=spec.beta)
    except ValueError as error:
        if "num_generations" not in str(error):
            raise
        raise ConfigError(f"generations: TRL refuses it ({str(error).splitlines()[0][:200]})") from None

    def judged(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        return list(reward([said[-1]["content"] for said in prompts], [said[-1]["content"] for said in completions]))

    return _train(partial(library.GRPOTrainer, reward_funcs=judged), options, source,
                  [{"prompt": source.messages(prompt)} for prompt in prompts], spec, folder)


def _common(spec: Tuning, folder: Path, seed: int, cpu: bool) -> dict[str, Any]:
    return {"output_dir": str(folder / CHECKPOINTS), "num_train_epochs": spec.epochs, "learning_rate": spec.learning_rate,
            "per_device_train_batch_size": spec.batch_size, "gradient_accumulation_steps": spec.gradient_accumulation_steps,
            "warmup_steps": spec.warmup, "lr_scheduler_type": spec.lr_scheduler, "max_length": spec.max_length,
            "gradient_checkpointing": spec.gradient_checkpointing, "bf16": spec.precision == "bf16", "use_cpu": cpu,
            "save_strategy": "steps", "save_steps": spec.checkpointing_steps, "save_total_limit": 2, "seed": seed,
            "logging_steps": spec.logging_steps, "report_to": "none", "disable_tqdm": True}


def _train(trainer_class: Callable, options: Any, source: Rewriter, table: list[dict], spec: Tuning,
           folder: Path) -> dict[str, Any]:
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    if options.n_gpu > 1:
        raise ConfigError("TRL trains in a process for each GPU, and here one sees several: run it as `accelerate launch "
                          "-m diffalign prompts train ...`, or let one be seen (CUDA_VISIBLE_DEVICES=0)")
    AcceleratorState._reset_state()  # the run's own may be of another precision; process groups are kept
    tokenizer, model = source.tokenizer(), source.model()
    before = {"pad_token_id": model.config.pad_token_id, "generation": model.generation_config.pad_token_id}
    lora = LoraConfig(r=spec.lora.rank, lora_alpha=spec.lora.alpha or spec.lora.rank, lora_dropout=spec.lora.dropout,
                      target_modules=list(spec.lora.target_modules), task_type="CAUSAL_LM")
    _check_layers(model, spec, source)
    _check_tokens(tokenizer, table)
    trainer = trainer_class(model=model, args=options, train_dataset=Dataset.from_list(table), processing_class=tokenizer,
                            peft_config=lora)
    trainer.remove_callback(PrinterCallback)  # what it would print is in stage.json
    result = trainer.train(resume_from_checkpoint=_last(Path(options.output_dir)))
    if trainer.accelerator.is_main_process:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.config.pad_token_id, merged.generation_config.pad_token_id = before["pad_token_id"], before["generation"]
        _save(merged, source, folder)
    trainer.accelerator.wait_for_everyone()
    log = [{key: entry[key] for key in entry if isinstance(entry[key], (int, float))} for entry in trainer.state.log_history]
    return {"rows": len(table), "steps": int(trainer.state.global_step), "loss": float(result.training_loss), "log": log}


def _last(folder: Path) -> str | None:
    """The newest checkpoint that is whole: a run may have been killed while it wrote one."""
    whole = {int(file.parent.name.rpartition("-")[2]): file.parent for file in folder.glob(f"checkpoint-*/{STATE}")}
    return str(whole[max(whole)]) if whole else None


def _check_layers(model: Any, spec: Tuning, source: Rewriter) -> None:
    ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    lost = [name for name in spec.lora.target_modules if name not in ends]
    if len(lost) == len(spec.lora.target_modules):
        raise ConfigError(f"lora.target_modules: {source.pretrained_model_name_or_path} has no layer called {lost[0]}; it has "
                          f"{', '.join(sorted(ends - {''}))[:200]}")


def _check_tokens(tokenizer: Any, table: Sequence[dict]) -> None:
    """A template that writes the begin token which the tokenizer adds too would teach two of them."""
    if tokenizer.bos_token_id in (None, tokenizer.eos_token_id):
        return
    for row in table:
        said = [*row["prompt"], *row.get("completion", row.get("chosen", ()))]
        ids = list(tokenizer.apply_chat_template(said, return_dict=True)["input_ids"])
        if ids.count(tokenizer.bos_token_id) > 1:
            text = row["prompt"][-1]["content"][:60]
            raise DataError(f'the begin token {tokenizer.bos_token} stands more than once in the messages of "{text}"; take '
                            "literal template text out of the prompts")


def _save(model: Any, source: Rewriter, folder: Path) -> None:
    """Written aside and renamed: ``folder``/model is whole or absent. The tokenizer's files are the source's own."""
    aside, target = folder / f".{MODEL}.tmp", folder / MODEL
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    for pattern in TOKENIZER:
        for file in source.folder.glob(pattern):
            shutil.copyfile(file, aside / file.name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
