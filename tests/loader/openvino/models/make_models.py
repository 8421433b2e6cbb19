"""Tiny models for the tests: right in form, random in content.

usage: make_models.py OUT [NAME ...]
Writes OUT/NAME, and OUT/torch/NAME that it was exported from. Needs torch, transformers, diffusers,
optimum-intel, nncf and openvino-tokenizers; nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import openvino as ov
import torch
from openvino_tokenizers import convert_tokenizer
from optimum.exporters.openvino import main_export
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(
    specials: list[str], single: str, pair: str | None = None, **roles
) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones after them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(specials)
    made.post_processor = processors.TemplateProcessing(
        single, pair, [(each, made.token_to_id(each)) for each in specials]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def strengthen(model: torch.nn.Module) -> None:
    """Weights so large that the input shows in the output."""
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.3)


def whisper(folder: Path):
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    end, start, english, translate, transcribe, plain = specials = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|translate|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    tokenizer = byte_tokenizer(
        specials, f"{start} {plain} $A {end}", bos_token=end, eos_token=end, pad_token=end
    )
    number = tokenizer.convert_tokens_to_ids
    ids = {
        "bos_token_id": number(end),
        "eos_token_id": number(end),
        "pad_token_id": number(end),
        "decoder_start_token_id": number(start),
    }
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_target_positions=64,
            init_std=0.5,
            **ids,
        )
    )
    model.generation_config = GenerationConfig(
        max_length=64,
        is_multilingual=True,
        lang_to_id={english: number(english)},
        task_to_id={"translate": number(translate), "transcribe": number(transcribe)},
        no_timestamps_token_id=number(plain),
        suppress_tokens=[],
        begin_suppress_tokens=[],
        **ids,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return "automatic-speech-recognition-with-past", tokenizer


def llava(folder: Path):
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = byte_tokenizer(
        ["<s>", "</s>", "<image>"],
        "<s> $A",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    tokenizer.chat_template = "{% for m in messages %}USER: {{ m['content'] }} A:{% endfor %}"
    number = tokenizer.convert_tokens_to_ids
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
                projection_dim=32,
                initializer_range=0.3,
                initializer_factor=10.0,
            ),
            text_config=LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=len(tokenizer),
                max_position_embeddings=512,
                initializer_range=0.3,
                bos_token_id=number("<s>"),
                eos_token_id=number("</s>"),
                pad_token_id=number("</s>"),
            ),
            image_token_index=number("<image>"),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    )
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return "image-text-to-text", tokenizer


def reranker(folder: Path):
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    # As XLM-RoBERTa has them: no token types, and positions that begin after the padding's.
    tokenizer = byte_tokenizer(
        ["<s>", "<pad>", "</s>"],
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=128,
    )
    model = XLMRobertaForSequenceClassification(
        XLMRobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=400,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            type_vocab_size=1,
            num_labels=1,
        )
    )
    strengthen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return "text-classification", tokenizer


def diffusion(folder: Path):
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = byte_tokenizer(
        ["<|startoftext|>", "<|endoftext|>"],
        "<|startoftext|> $A <|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=77,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=16,
    )
    strengthen(text)
    strengthen(unet)
    StableDiffusionPipeline(
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        vae=vae,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return "text-to-image", tokenizer


def speecht5(folder: Path):
    from transformers import (
        SpeechT5Config,
        SpeechT5FeatureExtractor,
        SpeechT5ForTextToSpeech,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    tokenizer = byte_tokenizer(
        ["<s>", "<pad>", "</s>"], "$A </s>", bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )
    model = SpeechT5ForTextToSpeech(
        SpeechT5Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_mel_bins=16,
            max_text_positions=64,
            max_speech_positions=64,
            speech_decoder_prenet_units=16,
            speech_decoder_postnet_units=16,
            speech_decoder_postnet_layers=2,
            speaker_embedding_dim=512,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    strengthen(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SpeechT5FeatureExtractor(num_mel_bins=16).save_pretrained(folder)
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=16,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
        )
    )
    strengthen(vocoder)
    vocoder.save_pretrained(folder / "vocoder")
    return "text-to-audio", tokenizer


MAKERS = (whisper, llava, reranker, diffusion, speecht5)


def main(out: Path, names: list[str]) -> None:
    for make in MAKERS:
        if names and make.__name__ not in names:
            continue
        torch.manual_seed(7)
        source, target = out / "torch" / make.__name__, out / make.__name__
        source.mkdir(parents=True)
        task, tokenizer = make(source)
        vocoder = source / "vocoder"
        extra = {"model_kwargs": {"vocoder": str(vocoder)}} if vocoder.exists() else {}
        main_export(str(source), target, task=task, stateful=True, **extra)
        inputs = 2 if make is reranker else 1
        both = convert_tokenizer(tokenizer, with_detokenizer=True, number_of_inputs=inputs)
        place = target / "tokenizer" if make is diffusion else target
        for graph, name in zip(both, ("tokenizer", "detokenizer"), strict=True):
            ov.save_model(graph, place / f"openvino_{name}.xml", compress_to_fp16=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
