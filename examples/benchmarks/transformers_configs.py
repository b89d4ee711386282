"""Small configurations of transformers models, each with the arguments of one call. Nothing is downloaded.

Caches are switched off: a pruned program is captured for one call, and a cache is the business of the class.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]
CONFIGS: dict[str, Callable[[], Built]] = {}
BY_DEFAULT: dict[str, Callable[[], Built]] = {}  # the same models by the defaults of their configurations
WORDS, LENGTH, BATCH = 60, 12, 2
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": WORDS}


def entry(name: str, config: str, model: str, inputs: Callable[[Any], dict[str, Any]], **options: Any) -> None:
    def build(**options: Any) -> Built:
        made = getattr(hf, config)(**options)
        made._experts_implementation = "eager"  # the grouped kernel knows no double precision
        network = getattr(hf, model)(made).eval()
        return network, inputs(made)

    CONFIGS[name] = functools.partial(build, **options)
    BY_DEFAULT[name] = build


def tokens(config: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, WORDS, (BATCH, LENGTH), generator=generator)}


def uncached(config: Any) -> dict[str, Any]:
    return tokens(config) | {"use_cache": False}


def both(config: Any) -> dict[str, Any]:
    ids = tokens(config)["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": ids[:, :7].contiguous(), "use_cache": False}


def pixels(config: Any) -> dict[str, Any]:
    size = config.image_size if isinstance(getattr(config, "image_size", None), int) else 64
    return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))}


# -- encoders of text ----------------------------------------------------------------------------------------------
ENCODERS = {"max_position_embeddings": 40, **SMALL}
entry("bert", "BertConfig", "BertForMaskedLM", tokens, **ENCODERS)
entry("roberta", "RobertaConfig", "RobertaForSequenceClassification", tokens, **ENCODERS)
entry("electra", "ElectraConfig", "ElectraForPreTraining", tokens, embedding_size=16, **ENCODERS)
entry("albert", "AlbertConfig", "AlbertForMaskedLM", tokens, embedding_size=16, **ENCODERS)
entry(
    "deberta-v2",
    "DebertaV2Config",
    "DebertaV2ForSequenceClassification",
    tokens,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    **ENCODERS,
)
entry(
    "distilbert",
    "DistilBertConfig",
    "DistilBertForSequenceClassification",
    tokens,
    dim=32,
    n_layers=2,
    n_heads=4,
    hidden_dim=48,
    vocab_size=WORDS,
    max_position_embeddings=40,
)

# -- decoders ------------------------------------------------------------------------------------------------------
DECODERS = {"max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SMALL}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8, **DECODERS}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS}
entry("gpt2", "GPT2Config", "GPT2LMHeadModel", uncached, n_positions=40, **GPT)
entry("gpt-neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", uncached, rotary_pct=0.5, **DECODERS)
entry("bloom", "BloomConfig", "BloomForCausalLM", uncached, hidden_size=32, n_layer=2, n_head=4, vocab_size=WORDS)
entry(
    "opt",
    "OPTConfig",
    "OPTForCausalLM",
    uncached,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=48,
    vocab_size=WORDS,
    max_position_embeddings=40,
    word_embed_proj_dim=32,
)
entry("llama", "LlamaConfig", "LlamaForCausalLM", uncached, **GROUPED)
entry("mistral", "MistralConfig", "MistralForCausalLM", uncached, sliding_window=8, **GROUPED)
entry("qwen2", "Qwen2Config", "Qwen2ForCausalLM", uncached, **{k: v for k, v in GROUPED.items() if k != "head_dim"})
entry("qwen3", "Qwen3Config", "Qwen3ForCausalLM", uncached, **GROUPED)
entry("phi3", "Phi3Config", "Phi3ForCausalLM", uncached, **{k: v for k, v in GROUPED.items() if k != "head_dim"})
entry("gemma2", "Gemma2Config", "Gemma2ForCausalLM", uncached, query_pre_attn_scalar=8, sliding_window=8, **GROUPED)
entry("gemma3", "Gemma3TextConfig", "Gemma3ForCausalLM", uncached, query_pre_attn_scalar=8, sliding_window=8, **GROUPED)
entry("mixtral", "MixtralConfig", "MixtralForCausalLM", uncached, num_local_experts=4, **GROUPED)
entry(
    "qwen2-moe",
    "Qwen2MoeConfig",
    "Qwen2MoeForCausalLM",
    uncached,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
    **{k: v for k, v in GROUPED.items() if k != "head_dim"},
)
entry(
    "mamba",
    "MambaConfig",
    "MambaForCausalLM",
    uncached,
    hidden_size=32,
    num_hidden_layers=2,
    state_size=4,
    vocab_size=WORDS,
    time_step_rank=4,
)

# -- encoders with decoders ----------------------------------------------------------------------------------------
entry(
    "t5",
    "T5Config",
    "T5ForConditionalGeneration",
    both,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    vocab_size=WORDS,
)
entry(
    "bart",
    "BartConfig",
    "BartForConditionalGeneration",
    both,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    vocab_size=WORDS,
    max_position_embeddings=40,
)


def speech(config: Any) -> dict[str, Any]:
    features = torch.randn(BATCH, 8, 40, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": tokens(config)["input_ids"][:, :5], "use_cache": False}


entry(
    "whisper",
    "WhisperConfig",
    "WhisperForConditionalGeneration",
    speech,
    num_mel_bins=8,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    vocab_size=WORDS,
    max_source_positions=20,
    max_target_positions=20,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)


def waveform(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 800, generator=torch.Generator().manual_seed(0))}


entry(
    "wav2vec2",
    "Wav2Vec2Config",
    "Wav2Vec2ForCTC",
    waveform,
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=4,
    **SMALL,
)

# -- vision --------------------------------------------------------------------------------------------------------
VISION = {"image_size": 32, "patch_size": 8, **{k: v for k, v in SMALL.items() if k != "vocab_size"}}
entry("vit", "ViTConfig", "ViTForImageClassification", pixels, **VISION)
entry("deit", "DeiTConfig", "DeiTForImageClassification", pixels, **VISION)
entry("dinov2", "Dinov2Config", "Dinov2ForImageClassification", pixels, **VISION)
entry(
    "swin",
    "SwinConfig",
    "SwinForImageClassification",
    pixels,
    image_size=32,
    patch_size=2,
    embed_dim=16,
    depths=[1, 2],
    num_heads=[2, 4],
    window_size=4,
)
entry(
    "convnext",
    "ConvNextConfig",
    "ConvNextForImageClassification",
    pixels,
    image_size=32,
    hidden_sizes=[8, 16, 24, 32],
    depths=[1, 1, 2, 1],
)
entry(
    "segformer",
    "SegformerConfig",
    "SegformerForSemanticSegmentation",
    pixels,
    image_size=64,
    hidden_sizes=[8, 16, 24, 32],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 2, 3, 4],
    decoder_hidden_size=16,
)


def detr() -> Built:
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage4"])
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
    )
    images = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return hf.DetrForObjectDetection(config).eval(), {"pixel_values": images, "pixel_mask": torch.ones(BATCH, 64, 64).long()}


CONFIGS["detr"] = detr


def detr_by_default() -> Built:
    backbone = hf.ResNetConfig(out_features=["stage4"])
    config = hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, num_labels=91
    )
    images = torch.randn(1, 3, 480, 640, generator=torch.Generator().manual_seed(0))
    return hf.DetrForObjectDetection(config).eval(), {"pixel_values": images, "pixel_mask": torch.ones(1, 480, 640).long()}


BY_DEFAULT["detr"] = detr_by_default


def clip() -> Built:
    text = {"max_position_embeddings": 20, **SMALL, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    ids = torch.randint(3, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2
    return hf.CLIPModel(config).eval(), {"input_ids": ids, **pixels(config.vision_config)}


CONFIGS["clip"] = clip


def clip_by_default() -> Built:
    config = hf.CLIPConfig()
    ids = torch.randint(3, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = config.text_config.eos_token_id
    return hf.CLIPModel(config).eval(), {"input_ids": ids, **pixels(config.vision_config)}


BY_DEFAULT["clip"] = clip_by_default


def blip() -> Built:
    text = {"max_position_embeddings": 20, **SMALL, "encoder_hidden_size": 32, "bos_token_id": 1, "pad_token_id": 0}
    config = hf.BlipConfig(text_config=text, vision_config=VISION, projection_dim=16, image_text_hidden_size=16)
    return hf.BlipForConditionalGeneration(config).eval(), {**tokens(config), **pixels(config.vision_config)}


CONFIGS["blip"] = blip


def sam() -> Built:
    vision = {**VISION, "image_size": 64, "output_channels": 16, "mlp_dim": 48, "num_pos_feats": 8, "global_attn_indexes": [1]}
    prompt = {"hidden_size": 16, "image_embedding_size": 8, "image_size": 64, "patch_size": 8, "mask_input_channels": 8}
    mask = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 4, "iou_head_hidden_dim": 16, "num_hidden_layers": 2}
    config = hf.SamConfig(vision_config=vision | {"window_size": 4}, prompt_encoder_config=prompt, mask_decoder_config=mask)
    points = torch.rand(BATCH, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 64
    images = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.ones(BATCH, 1, 2).long()
    return hf.SamModel(config).eval(), {"pixel_values": images, "input_points": points, "input_labels": labels}


CONFIGS["sam"] = sam


def llava() -> Built:
    vision = hf.CLIPVisionConfig(**VISION, projection_dim=16)
    text = hf.LlamaConfig(**{**GROUPED, "vocab_size": WORDS + 4})
    config = hf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORDS,
        vision_feature_layer=-1,
    )
    ids = torch.randint(3, WORDS, (1, LENGTH + 16), generator=torch.Generator().manual_seed(0))
    ids[:, 2:18] = WORDS
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return hf.LlavaForConditionalGeneration(config).eval(), {"input_ids": ids, "pixel_values": images, "use_cache": False}


CONFIGS["llava"] = llava
