"""A MusicGen of a few thousand random weights, in transformers' own layout."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)

WORDS, CODEBOOKS, RATE, HOP = 8, 4, 400, 8
PROMPT = ["<pad>", "</s>", "<unk>", "a", "b", "c", "d"]


def stock(seed=0, **options):
    """dropout is left at the class's 0.1, which the adapter must switch off."""
    torch.manual_seed(seed)
    codec = EncodecConfig(sampling_rate=RATE, audio_channels=1, num_filters=2, num_lstm_layers=1, upsampling_ratios=[4, 2],
                          hidden_size=8, codebook_size=WORDS, codebook_dim=8, target_bandwidths=[0.6])
    text = T5Config(vocab_size=len(PROMPT), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    decoder = MusicgenDecoderConfig(**{"vocab_size": WORDS, "num_codebooks": CODEBOOKS, "hidden_size": 16, "ffn_dim": 24,
                                       "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
                                       "pad_token_id": WORDS, "bos_token_id": WORDS, "audio_channels": 1,
                                       "initializer_factor": 0.5, **options})
    model = MusicgenForConditionalGeneration(MusicgenConfig(text_encoder=text, audio_encoder=codec, decoder=decoder))
    for layer in model.audio_encoder.quantizer.layers:  # the class starts them at zero
        layer.codebook.embed.normal_()
    for config in (model.generation_config, model.decoder.generation_config):
        config.pad_token_id = config.bos_token_id = config.decoder_start_token_id = WORDS
    return model.eval()


def make(folder, seed=0, **options):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(PROMPT)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    stock(seed, **options).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                            model_max_length=6).save_pretrained(folder)
    return folder
