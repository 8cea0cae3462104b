"""A Stable Audio pipeline of a few thousand random weights, saved in diffusers' own layout."""

import json

import torch
from diffusers import AutoencoderOobleck, EDMDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

RATE, HOP, FRAMES = 64, 4, 12  # clips of 48 samples, 0.75 s
WORDS = ["<pad>", "</s>", "<unk>", "a", "b", "c", "d"]


def make(folder, seed=0):
    """The solver of the real checkpoint needs torchsde: the pipeline is made with another, and its file then replaced."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vae = AutoencoderOobleck(encoder_hidden_size=8, downsampling_ratios=[2, 2], channel_multiples=[1, 2], decoder_channels=4,
                             decoder_input_channels=4, audio_channels=2, sampling_rate=RATE)
    transformer = StableAudioDiTModel(
        sample_size=FRAMES, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        num_key_value_attention_heads=1, cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=16,
        cross_attention_input_dim=8)
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    pipe = StableAudioPipeline(
        vae=vae, transformer=transformer, scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
        text_encoder=T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                          model_max_length=6),
        projection_model=StableAudioProjectionModel(text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=512))
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "CosineDPMSolverMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(
        {"_class_name": "CosineDPMSolverMultistepScheduler", "prediction_type": "v_prediction", "sigma_min": 0.3,
         "sigma_max": 500, "solver_order": 2}))
    pipe.set_progress_bar_config(disable=True)
    return pipe
