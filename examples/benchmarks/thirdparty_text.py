"""Models of packages of transformers, with text and tables, for `thirdparty.py`."""

from typing import Any

import torch
from thirdparty_build import Package, case, floats, ids, image, made, plain, several

WORDS = ids(100, 2, 16)


def layers(kind: str = "Decoder", **options: Any) -> Any:
    return made(kind, **{"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16} | options)


def worded(**options: Any) -> Any:
    return case(attn_layers=layers(**options))


X_TRANSFORMERS = Package(
    "x_transformers",
    WORDS,
    {
        "TransformerWrapper": worded(),
        "TransformerWrapper#encoder": worded(kind="Encoder"),
        "TransformerWrapper#prefix": worded(kind="PrefixDecoder"),
        "TransformerWrapper#rotary": worded(rotary_pos_emb=True),
        "TransformerWrapper#alibi": worded(alibi_pos_bias=True),
        "TransformerWrapper#t5": worded(rel_pos_bias=True),
        "TransformerWrapper#dynamic": worded(dynamic_pos_bias=True, dynamic_pos_bias_log_distance=False),
        "TransformerWrapper#glu": worded(ff_glu=True, ff_swish=True, use_rmsnorm=True),
        "TransformerWrapper#qk_norm": worded(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
        "TransformerWrapper#talking": worded(attn_pre_talking_heads=True, attn_post_talking_heads=True),
        "TransformerWrapper#mem_kv": worded(attn_num_mem_kv=4),
        "TransformerWrapper#one_kv": worded(attn_one_kv_head=True),
        "TransformerWrapper#kv_heads": worded(attn_kv_heads=2),
        "TransformerWrapper#gated": worded(attn_gate_values=True, attn_head_scale=True),
        "TransformerWrapper#topk": worded(attn_sparse_topk=4),
        "TransformerWrapper#residual_attn": worded(residual_attn=True),
        "TransformerWrapper#gate_residual": worded(gate_residual=True),
        "TransformerWrapper#sandwich": worded(sandwich_coef=1),
        "TransformerWrapper#macaron": worded(macaron=True),
        "TransformerWrapper#shift": worded(shift_tokens=1),
        "TransformerWrapper#hyper": worded(num_residual_streams=2),
        "TransformerWrapper#flash": worded(attn_flash=True),
        "TransformerWrapper#cope": worded(attn_use_cope=True),
        "TransformerWrapper#memory": case(attn_layers=layers(), num_memory_tokens=4),
        "TransformerWrapper#pooled": case(attn_layers=layers("Encoder"), average_pool_embed=True, logits_dim=10),
        "TransformerWrapper#cls": case(attn_layers=layers("Encoder"), use_cls_token=True, logits_dim=10),
        "TransformerWrapper#tied": case(attn_layers=layers(), tie_embedding=True, scaled_sinu_pos_emb=True),
        "TransformerWrapper#softmaxes": case(attn_layers=layers(), mixture_of_softmax=True),
        "ContinuousTransformerWrapper": case(floats(2, 16, 24), attn_layers=layers("Encoder"), dim_in=24, dim_out=12),
        "ViTransformerWrapper": case(image(), attn_layers=layers("Encoder"), num_classes=10, num_register_tokens=2),
        "XTransformer": case(
            several(WORDS, WORDS),
            dim=64,
            enc_num_tokens=100,
            enc_depth=2,
            enc_heads=4,
            enc_max_seq_len=32,
            dec_num_tokens=100,
            dec_depth=2,
            dec_heads=4,
            dec_max_seq_len=32,
        ),
        "AutoregressiveWrapper": case(net=made("TransformerWrapper", attn_layers=layers())),
        "ContinuousAutoregressiveWrapper": case(
            floats(2, 16, 24), net=made("ContinuousTransformerWrapper", attn_layers=layers(), dim_in=24, dim_out=24)
        ),
        "NonAutoregressiveWrapper": case(
            ids(100, 2, 32),
            net=made("TransformerWrapper", attn_layers=layers("Encoder")),
            mask_id=99,
            no_replace_prob=0.0,  # these two would throw coins in Python on every call
            random_token_prob=0.0,
        ),
        "XLAutoregressiveWrapper": case(net=made("TransformerWrapper", attn_layers=layers(), max_mem_len=16)),
        "XValTransformerWrapper": case(several(WORDS, floats(2, 16)), attn_layers=layers(), numerical_token_id=3),
        "MultiInputTransformerWrapper": case(
            lambda: ({"a": torch.randint(100, (2, 16)), "b": torch.randint(50, (2, 16))},),
            attn_layers=layers(),
            num_tokens={"a": 100, "b": 50},
        ),
        "NeoMLP": case(floats(2, 5), dim_in=5, dim_hidden=7, dim_out=5, dim_model=32, depth=2),
        "BeliefStateWrapper": case(
            forward_decoder=made("TransformerWrapper", attn_layers=layers()),
            backward_decoder=made("TransformerWrapper", attn_layers=layers()),
        ),
        "Encoder": case(floats(2, 16, 64), dim=64, depth=2, heads=4),
        "Decoder": case(floats(2, 16, 64), dim=64, depth=2, heads=4),
        "CrossAttender": case(several(x=floats(2, 16, 64), context=floats(2, 12, 64)), dim=64, depth=2, heads=4),
        "Attention": case(floats(2, 16, 64), dim=64, heads=4, dim_head=16),
        "FeedForward": case(floats(2, 16, 64), dim=64, glu=True),
        "AttentionPool": case(floats(2, 16, 64), dim=64, heads=4, dim_head=16),
    },
    shared={"num_tokens": 100, "max_seq_len": 32, "image_size": 64, "patch_size": 16},
)

TOKENS = lambda: torch.randint(1, 100, (2, 16))  # noqa: E731
PAIR = several(image(64, 2), TOKENS)
TEXT = {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
SEEN = {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 16, "layers": 2}
BLOCKS = {"width": 64, "heads": 4, "layers": 2, "mlp_ratio": 2.0}


def clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, inputs: Any = PAIR, **options: Any) -> Any:
    return case(inputs, embed_dim=32, vision_cfg=SEEN | (vision or {}), text_cfg=TEXT | (text or {}), **options)


OPEN_CLIP = Package(
    "open_clip",
    image(),
    {
        "CLIP": clip(),
        "CLIP#quick_gelu": clip(quick_gelu=True),
        "CLIP#resnet": clip({"layers": [1, 1, 1, 1], "width": 16, "head_width": 8}),
        "CLIP#timm": clip(
            {"timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
        ),
        "CLIP#pooled": clip({"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 4}),
        "CLIP#dict": clip(output_dict=True, init_logit_bias=-10.0),
        "CustomTextCLIP": clip(),
        "CustomTextCLIP#siglip": clip(
            {
                "image_size": 224,
                "timm_model_name": "vit_tiny_patch16_224",
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            },
            {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
            several(image(224), TOKENS),
            init_logit_bias=-10.0,
        ),
        "CustomTextCLIP#eva_like": clip(
            {"ls_init_value": 0.1, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
        ),
        "CoCa": case(
            PAIR,
            embed_dim=32,
            multimodal_cfg=TEXT | {"width": 32, "dim_head": 16, "attn_pooler_heads": 4, "n_queries": 4},
            text_cfg=TEXT | {"embed_cls": True, "output_tokens": True, "width": 32},
            vision_cfg=SEEN
            | {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 4, "output_tokens": True},
        ),
        "modified_resnet.ModifiedResNet": case(layers=[1, 1, 1, 1], output_dim=32, heads=4, image_size=64, width=16),
        "transformer.VisionTransformer": case(image_size=64, patch_size=16, output_dim=32, **BLOCKS),
        "transformer.VisionTransformer#sincos": case(
            image_size=64, patch_size=16, output_dim=32, pos_embed_type="sin_cos_2d", pool_type="avg", **BLOCKS
        ),
        "transformer.TextTransformer": case(
            TOKENS, context_length=16, vocab_size=100, width=64, heads=4, layers=2, output_dim=32
        ),
        "transformer.TextTransformer#cls": case(
            TOKENS, context_length=16, vocab_size=100, width=64, heads=4, layers=2, output_dim=32, embed_cls=True
        ),
        "transformer.MultimodalTransformer": case(several(floats(2, 8, 64), floats(2, 16, 64)), context_length=16, **BLOCKS),
        "transformer.Transformer": case(floats(2, 16, 64), **BLOCKS),
        "transformer.CustomTransformer": case(floats(2, 16, 64), block_types="CustomResidualAttentionBlock", **BLOCKS),
        "transformer.ResidualAttentionBlock": case(floats(2, 16, 64), d_model=64, n_head=4),
        "transformer.CustomResidualAttentionBlock": case(
            floats(2, 16, 64), d_model=64, n_head=4, qk_norm=True, scale_attn_inner=True, scale_attn=True, scale_fc=True
        ),
        "transformer.AttentionalPooler": case(floats(2, 16, 64), d_model=64, context_dim=64, n_head=4, n_queries=4),
        "transformer.Attention": case(floats(2, 16, 64), dim=64, num_heads=4),
        "timm_model.TimmModel": case(model_name="resnet10t", embed_dim=32, image_size=64),
        "timm_model.TimmModel#attn": case(model_name="resnet10t", embed_dim=32, image_size=64, pool="abs_attn"),
    },
)
TABULAR = Package(
    "tab_transformer_pytorch",
    several(ids(5, 2, 3), floats(2, 4)),
    plain(
        "TabTransformer FTTransformer", categories=(5, 6, 7), num_continuous=4, dim=32, dim_out=2, depth=2, heads=4, dim_head=8
    ),
)
SMALL = {
    "conformer": Package(
        "conformer",
        floats(2, 24, 64),
        {"ConformerBlock": case(dim=64, dim_head=16, heads=4), "Conformer": case(dim=64, depth=2, dim_head=16, heads=4)},
    ),
    "perceiver-pytorch": Package(
        "perceiver_pytorch",
        floats(1, 16, 16, 3),
        {
            "Perceiver": case(
                num_freq_bands=4, depth=2, max_freq=10.0, num_latents=16, latent_dim=64, input_channels=3, num_classes=10
            ),
            "PerceiverIO": case(
                several(data=floats(2, 20, 32), queries=floats(2, 8, 32)),
                depth=2,
                dim=32,
                queries_dim=32,
                logits_dim=10,
                num_latents=16,
                latent_dim=64,
            ),
        },
    ),
    "iTransformer": Package(
        "iTransformer",
        floats(2, 24, 7),
        {
            "iTransformer": case(num_variates=7, lookback_len=24, depth=2, dim=64, pred_length=(4, 8), heads=4, dim_head=16),
            "iTransformer2D": case(
                num_variates=7, num_time_tokens=4, lookback_len=24, depth=2, dim=64, pred_length=(4, 8), heads=4, dim_head=16
            ),
        },
    ),
    "rtdl": Package(
        "rtdl_revisiting_models",
        floats(2, 6),
        {
            "MLP": case(d_in=6, d_out=2, n_blocks=2, d_block=32, dropout=0.1),
            "ResNet": case(
                d_in=6, d_out=2, n_blocks=2, d_block=32, d_hidden=48, d_hidden_multiplier=None, dropout1=0.1, dropout2=0.0
            ),
            "FTTransformer": case(
                several(floats(2, 6), ids(3, 2, 2)),
                n_cont_features=6,
                cat_cardinalities=[3, 4],
                d_out=2,
                n_blocks=2,
                d_block=32,
                attention_n_heads=4,
                attention_dropout=0.1,
                ffn_d_hidden=48,
                ffn_d_hidden_multiplier=None,
                ffn_dropout=0.1,
                residual_dropout=0.0,
            ),
        },
    ),
    "torchxrayvision": Package(
        "torchxrayvision",
        floats(1, 1, 64, 64),
        {
            "models.DenseNet": case(num_classes=10, growth_rate=8, block_config=(2, 2, 2), num_init_features=16),
            "autoencoders.ResNetAE": case(floats(1, 1, 224, 224), weights=None),
        },
    ),
}
