"""An ACE-Step pipeline of a few thousand random weights in diffusers' own layout."""

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

RATE, HOP, CHANNELS = 64, 4, 4  # 16 latents a second
WORDS = ["<|endoftext|>", "<unk>", *"abcd", *(str(n) for n in range(10)), "en", "de"]


def make(folder, seed=0, **options):
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pipe = AceStepPipeline(
        vae=AutoencoderOobleck(encoder_hidden_size=8, downsampling_ratios=[2, 2], channel_multiples=[1, 2], decoder_channels=4,
                               decoder_input_channels=CHANNELS, audio_channels=2, sampling_rate=RATE),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                                            num_attention_heads=2, num_key_value_heads=1, head_dim=4)),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", unk_token="<unk>"),
        transformer=_transformer(**options), condition_encoder=_condition_encoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _transformer(**options):
    transformer = AceStepTransformer1DModel(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        in_channels=3 * CHANNELS, audio_acoustic_hidden_dim=CHANNELS, sliding_window=4, encoder_hidden_size=8, **options)
    with torch.no_grad():
        for p in transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return transformer


def _condition_encoder():
    encoder = AceStepConditionEncoder(
        hidden_size=8, intermediate_size=16, text_hidden_dim=8, timbre_hidden_dim=CHANNELS, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4, sliding_window=4)
    encoder.silence_latent.normal_()
    return encoder
