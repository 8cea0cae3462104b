"""An AudioLDM2 pipeline of random weights with few channels, its front end at the true 16 kHz, in diffusers' own layout."""

import torch
from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel, AutoencoderKL, DDIMScheduler
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

RATE, HOP, FRAMES, MELS, CHANNELS = 16_000, 160, 4, 8, 4  # latents [4, 4, 2]: clips of 16 frames of a mel spectrogram, 0.16 s
WORDS = "abcd"


def make(folder, seed=0):
    torch.manual_seed(seed)
    pipe = AudioLDM2Pipeline(
        vae=AutoencoderKL(in_channels=1, out_channels=1, down_block_types=["DownEncoderBlock2D"] * 3,
                          up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=(4, 4, 8), norm_num_groups=2,
                          latent_channels=CHANNELS, sample_size=64, scaling_factor=0.5),
        text_encoder=_clap(), tokenizer=_roberta(), text_encoder_2=_t5(), tokenizer_2=_t5_tokenizer(),
        projection_model=AudioLDM2ProjectionModel(text_encoder_dim=8, text_encoder_1_dim=12, langauge_model_dim=8),
        language_model=GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=32, n_embd=8, n_layer=1, n_head=2,
                                                  max_new_tokens=4, bos_token_id=0, eos_token_id=0)),
        feature_extractor=ClapFeatureExtractor(sampling_rate=RATE, feature_size=8, nb_max_samples=RATE),
        unet=_unet(), vocoder=_vocoder(),
        scheduler=DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # the texts' dropout
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet():
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=FRAMES, in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2, attention_head_dim=2, cross_attention_dim=([None, 8, 12], [None, 8, 12]))
    with torch.no_grad():
        for p in unet.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return unet


def _clap():
    return ClapModel(ClapConfig(
        text_config={"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "projection_dim": 8,
                     "num_attention_heads": 2, "max_position_embeddings": 12, "pad_token_id": 1},
        audio_config={"hidden_size": 8, "num_mel_bins": 8, "spec_size": 32, "window_size": 2, "patch_size": 4,
                      "patch_stride": 4, "patch_embeds_hidden_size": 4, "depths": [1, 1], "num_attention_heads": [1, 1],
                      "num_hidden_layers": 2, "projection_dim": 8, "num_classes": 2}, projection_dim=8))


def _roberta():
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS, *(f"Ġ{word}" for word in WORDS)]
    return RobertaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)


def _t5():
    return T5EncoderModel(T5Config(vocab_size=16, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def _t5_tokenizer():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -1.0) for word in WORDS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=6)


def _vocoder():
    return SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=MELS, sampling_rate=RATE, upsample_initial_channel=32, upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]],
        normalize_before=False))
