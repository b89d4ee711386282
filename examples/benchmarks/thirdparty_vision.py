"""Models of vision packages for `thirdparty.py`: classifiers, segmentation, transformers, video."""

from thirdparty_build import Package, case, floats, ids, image, lengths, listed, made, of_pytorchcv, plain, several

BY_SIZE = {
    # at least one of every family of pytorchcv, by the size of the image that it takes
    32: "resnet20_cifar10 resnet56_cifar10 resnet164bn_cifar10 preresnet20_cifar10 preresnet56_cifar10 preresnet164bn_cifar10"
    " resnext20_16x4d_cifar10 resnext20_32x2d_cifar10 resnext20_32x4d_cifar10 seresnet20_cifar10 seresnet56_cifar10"
    " seresnet164bn_cifar10 sepreresnet20_cifar10 sepreresnet56_cifar10 pyramidnet110_a48_cifar10 densenet40_k12_cifar10"
    " densenet40_k12_bc_cifar10 densenet40_k24_bc_cifar10 xdensenet40_2_k24_bc_cifar10 wrn16_10_cifar10"
    " wrn20_10_1bit_cifar10 wrn20_10_32bit_cifar10 ror3_56_cifar10 ror3_110_cifar10 rir_cifar10 msdnet22_cifar10"
    " resdropresnet20_cifar10 shakeshakeresnet20_2x16d_cifar10 shakeshakeresnet26_2x32d_cifar10 shakedropresnet20_cifar10"
    " fractalnet_cifar10 diaresnet20_cifar10 diaresnet56_cifar10 diapreresnet20_cifar10 diapreresnet56_cifar10 nin_cifar10",
    64: "resnestabc14 resnesta18 regnetx002 regnetx004 regnety002 regnety004 dicenet_wd5 dicenet_wd2 dicenet_w1"
    " efficientnet_b0 efficientnet_b1 efficientnet_b0b efficientnet_b0c efficientnet_edge_small_b resneta10 resnetabc14b",
    128: "scnet50 tresnet_m",
    224: "alexnet zfnet bn_vgg11 bninception resnet10 resnetbc14b resnet18_wd4 preresnet10 preresnetbc14b preresnet18_wd4"
    " resnext14_16x4d seresnet10 seresnetbc26b sepreresnet10 sepreresnetbc26b seresnext50_32x4d senet16 ibn_resnet50"
    " ibnb_resnet50 ibn_resnext50_32x4d ibn_densenet121 airnet50_1x64d_r2 airnext50_32x4d_r2 bam_resnet18 cbam_resnet18"
    " resattnet56 sknet50 diaresnet10 diapreresnet10 pyramidnet101_a360 diracnet18v2 sharesnet18 densenet121"
    " condensenet74_c4_g4 condensenet74_c8_g8 sparsenet121 peleenet wrn50_2 drnd22 dpn68 dpn68b darknet_ref darknet_tiny"
    " darknet53 channelnet revnet38 irevnet301 bagnet9 dla34 dla46c dla46xc msdnet22 fishnet99 espnetv2_wd2 espnetv2_w1"
    " hrnet_w18_small_v1 vovnet27s selecsls42 hardnet39ds hardnet68ds xdensenet121_2 squeezenet_v1_0 squeezenet_v1_1"
    " squeezeresnet_v1_0 squeezeresnet_v1_1 sqnxt23_w1 sqnxt23v5_w1 shufflenet_g1_w1 shufflenet_g2_w1 shufflenet_g3_w1"
    " shufflenet_g1_wd4 shufflenet_g3_wd4 shufflenetv2_wd2 shufflenetv2_w1 shufflenetv2b_wd2 shufflenetv2b_w1"
    " menet108_8x1_g3 menet128_8x1_g4 menet160_8x1_g8 mobilenet_w1 mobilenet_wd4 mobilenetb_w1 mobilenetb_wd4"
    " fdmobilenet_w1 fdmobilenet_wd4 mobilenetv2_wd4 mobilenetv2b_wd4 mobilenetv3_small_w1 mobilenetv3_large_w1 igcv3_wd2"
    " igcv3_wd4 ghostnet mnasnet_b1 mnasnet_a1 mnasnet_small darts proxylessnas_cpu proxylessnas_mobile fbnet_cb"
    " nasnet_4a1056 spnasnet mixnet_s mixnet_m isqrtcovresnet18 fastseresnet101b octresnet10_ad2 resnetd50b resnet10_cub"
    " seresnet10_cub mobilenet_wd4_cub fdmobilenet_wd4_cub proxylessnas_cpu_cub",
    299: "xception inceptionv3 inceptionv4 inceptionresnetv1 inceptionresnetv2",
    331: "pnasnet5large polynet",
    448: "ntsnet_cub",
}
DENSE = plain(  # for every pixel; the size has to be said
    "fcn8sd_resnetd50b_voc pspnet_resnetd50b_voc deeplabv3_resnetd50b_voc danet_resnetd50b_cityscapes cgnet_cityscapes"
    " dabnet_cityscapes ctxnet_cityscapes esnet_cityscapes edanet_cityscapes"
    " enet_cityscapes erfnet_cityscapes linknet_cityscapes segnet_cityscapes unet_cityscapes sqnet_cityscapes"
    " espcnet_cityscapes",
    image(96),
    in_size=(96, 96),
) | plain(
    "icnet_resnetd50b_cityscapes lednet_cityscapes fastscnn_cityscapes sinet_cityscapes fpenet_cityscapes"
    " bisenet_resnet18_celebamaskhq",
    image(256),
    in_size=(256, 256),
)
POSES = plain(
    "alphapose_fastseresnet101b_coco simplepose_resnet18_coco simplepose_resneta50b_coco simplepose_mobile_resnet18_coco"
    " simplepose_mobile_mobilenet_w1_coco simplepose_mobile_mobilenetv2b_w1_coco"
    " simplepose_mobile_mobilenetv3_small_w1_coco lwopenpose2d_mobilenet_cmupan_coco lwopenpose3d_mobilenet_cmupan_coco",
    image(128),
    in_size=(128, 128),
)
MELS = several(floats(2, 64, 120), lengths(120, 90))
PYTORCHCV = Package(
    "pytorchcv",
    image(224),
    {name: c for size, listed_ in BY_SIZE.items() for name, c in plain(listed_, image(size)).items()}
    | DENSE
    | POSES
    | plain("ibppose_coco", image(128), in_size=(128, 128))
    | plain("prnet", image(256))
    | plain("centernet_resnet18_voc", image(128), in_size=(128, 128))
    | plain("lffd20x5s320v2_widerface lffd25x8s560v1_widerface", image(256))
    | plain("pfpcnet", floats(1, 1, 320, 240))
    | plain("voca8flame", several(floats(2, 1, 16, 29), ids(8, 2)))
    | plain("nvpattexp116bazel76", several(floats(2, 8, 16, 29), ids(8, 2)))
    | plain("visemenet20", several(floats(36, 8, 195), floats(36, 76)))
    | plain("superpointnet", image(64, channels=1))
    | plain("jasper5x3 quartznet5x5_en_ls quartznet15x5_en jasperdr10x5_en", MELS, from_audio=False)
    | plain("raft_small raft_things", several(image(128), image(128)))
    | plain("propainter_rfc", several(floats(1, 4, 2, 64, 64), floats(1, 4, 1, 64, 64)))
    | plain(
        "propainter",
        several(
            floats(1, 4, 3, 64, 64),
            floats(1, 4, 1, 64, 64),
            floats(1, 4, 1, 64, 64),
            floats(1, 2, 4, 64, 64),
            lambda: 3,  # frames beside one another; the others are references
        ),
    ),
    find=of_pytorchcv,
)

VIDEO, SERIES = floats(1, 3, 4, 64, 64), floats(2, 3, 256)
FRAMES = {"image_patch_size": 16, "frames": 4, "frame_patch_size": 2}
STAGES = {"num_classes": 10, "dim": 32, "depth": (1, 1, 2, 1)}
VIT = made("vit.ViT")
VIT_PYTORCH = Package(
    "vit_pytorch",
    image(),
    plain(
        "deepvit.DeepViT jet_vit.JetViT jumbo_vit.JumboViT learnable_memory_vit.ViT mp3.ViT"
        " normalized_vit.nViT parallel_vit.ViT rvt.RvT simple_flash_attn_vit.SimpleViT simple_uvit.SimpleUViT"
        " simple_vit.SimpleViT simple_vit_attn_residual.SimpleViTAttnResidual attn_residual_with_dca_simple_vit.SimpleViT"
        " simple_vit_orthog_residual_update.SimpleViT simple_vit_with_patch_dropout.SimpleViT"
        " simple_vit_with_qk_norm.SimpleViT simple_vit_with_register_tokens.SimpleViT"
        " simple_vit_with_relative_proj_pos_bias.SimpleViT simple_vit_with_sparse_gating.SimpleViTWithSparseGating"
        " simple_vit_with_specialized_cls.SimpleViT simple_vit_with_value_residual.SimpleViT vaat.ViT vat.ViT"
        " vit.ViT vit_5.ViT vit_detpool.ViTDetPool vit_for_small_dataset.ViT vit_with_decorr.ViT"
        " vit_with_keel_post_ln.ViT vit_with_patch_dropout.ViT vit_with_patch_merger.ViT"
    )
    | {
        "ats_vit.ViT": case(max_tokens_per_depth=(12, 8)),
        "cait.CaiT": case(cls_depth=1),
        "cct.CCT": case(img_size=64, embedding_dim=64, num_layers=2, num_heads=4, mlp_ratio=2.0),
        "cct_3d.CCT": case(VIDEO, img_size=64, num_frames=4, embedding_dim=64, num_layers=2, num_heads=4, mlp_ratio=2.0),
        "cross_vit.CrossViT": case(
            sm_dim=32, lg_dim=64, sm_patch_size=8, sm_enc_heads=2, sm_enc_mlp_dim=64, lg_enc_depth=1, lg_enc_heads=2
        ),
        "crossformer.CrossFormer": case(image(224), dim=(32, 32, 64, 64), depth=(1, 1, 1, 1)),
        "cvt.CvT": case(s1_emb_dim=32, s2_emb_dim=64, s2_depth=1, s3_emb_dim=96, s3_depth=2),
        "efficient.ViT": case(transformer=made("simple_vit.Transformer")),
        "extractor.Extractor": case(vit=VIT),
        "levit.LeViT": case(image(128), image_size=128, dim=(32, 48, 64), mlp_mult=2, num_distill_classes=10),
        "levjepa.VideoTransformer": case(VIDEO, frames=4, block_causal=False),
        "levjepa_nd.NDTransformer": case(VIDEO, ndim=3, input_shape=(4, 64, 64), patch_size=(2, 16, 16)),
        "look_vit.LookViT": case(image(96), image_size=96, patch_size=16, highres_patch_size=12),
        "looped_vit.LoopedViT": case(pre_loop_depth=1, num_looped_blocks=1, post_loop_depth=1, loop_depth=2),
        "mae.MAE": case(encoder=made("vit.ViT", pool="mean"), decoder_dim=32),
        "max_vit.MaxViT": case(image(224), depth=(1, 1, 1, 1), dim=16, dim_head=8, dim_conv_stem=16),
        "max_vit_with_registers.MaxViT": case(image(224), depth=(1, 1, 1, 1), dim=16, dim_head=8, dim_conv_stem=16),
        "mobile_vit.MobileViT": case(
            image_size=(64, 64), patch_size=(2, 2), dims=[48, 64, 80], channels=[16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 96]
        ),
        "mp3.MP3": case(vit=made("mp3.ViT"), masking_ratio=0.5),
        "na_vit.NaViT": case(listed(floats(3, 32, 48), floats(3, 64, 32)), patch_size=16),
        "na_vit_nested_tensor.NaViT": case(listed(floats(3, 32, 48), floats(3, 64, 32)), patch_size=16),
        "na_vit_nested_tensor_3d.NaViT": case(listed(floats(3, 4, 32, 48)), patch_size=16, max_frames=4, frame_patch_size=2),
        "nest.NesT": case(image(64), patch_size=4, num_hierarchies=3, block_repeats=(1, 1, 2)),
        "pit.PiT": case(depth=(1, 1, 2), patch_size=8),
        "recorder.Recorder": case(vit=VIT),
        "regionvit.RegionViT": case(image(224), dim=(32, 64, 64, 96), depth=(1, 1, 1, 1)),
        "scalable_vit.ScalableViT": case(
            image(256),
            dim=32,
            depth=(1, 1, 1, 1),
            heads=(2, 4, 4, 8),
            reduction_factor=(8, 4, 2, 1),
            window_size=(64, 32, None, None),
        ),
        "sep_vit.SepViT": case(image(224), dim=16, depth=(1, 1, 1, 1), heads=(1, 2, 4, 8)),
        "simple_flash_attn_vit_3d.SimpleViT": case(VIDEO, **FRAMES),
        "simple_vit_1d.SimpleViT": case(SERIES, seq_len=256),
        "simple_vit_3d.SimpleViT": case(VIDEO, **FRAMES),
        "simple_vit_with_fft.SimpleViT": case(freq_patch_size=16),
        "simple_vit_with_hyper_connections.SimpleViT": case(num_residual_streams=2),
        "t2t.T2TViT": case(),
        "twins_svt.TwinsSVT": case(
            image(224), s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=48, s3_depth=1, s4_emb_dim=64, s4_depth=1
        ),
        "vaat.AST": case(floats(2, 2048)),
        "vat_siglip.SigLIP": case(image(56), image_size=56, patch_size=14),
        "vat.VAT": case(floats(1, 1, 3, 64, 64), vit=made("vat.ViT"), dim_action=8),
        "vit_1d.ViT": case(SERIES, seq_len=256),
        "vit_3d.ViT": case(VIDEO, **FRAMES),
        "vit_nd.ViTND": case(VIDEO, ndim=3, input_shape=(4, 64, 64), patch_size=(2, 16, 16)),
        "vit_nd_pope.ViTND": case(VIDEO, ndim=3, input_shape=(4, 64, 64), patch_size=(2, 16, 16)),
        "vit_nd_rotary.ViTND": case(VIDEO, ndim=3, input_shape=(4, 64, 64), patch_size=(2, 16, 16)),
        "vivit.ViViT": case(VIDEO, spatial_depth=1, temporal_depth=1, **FRAMES),
        "vivit.ViViT#factorized": case(VIDEO, spatial_depth=1, temporal_depth=1, variant="factorized_self_attention", **FRAMES),
        "vivit_with_moss.ViViT": case(VIDEO, spatial_depth=1, temporal_depth=1, **FRAMES),
        "wwt.WWT": case(num_slots=4),
        "xcit.XCiT": case(cls_depth=1),
        "learnable_memory_vit.Adapter": case(vit=made("learnable_memory_vit.ViT")),
        "accept_video_wrapper.AcceptVideoWrapper": case(VIDEO, image_net=VIT),
        "dino.Dino": case(net=VIT, image_size=64, num_classes_K=64, projection_hidden_size=64),
    },
    shared={
        "image_size": 64,
        "patch_size": 16,
        "num_classes": 10,
        "dim": 64,
        "depth": 2,
        "heads": 4,
        "mlp_dim": 128,
        "dim_head": 16,
    },
)

SMP = Package(
    "segmentation_models_pytorch",
    image(64),
    plain("Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus UPerNet Segformer")
    | {
        "PAN": case(image(128)),
        "DPT": case(image(96), encoder_name="tu-vit_tiny_patch16_224", dynamic_img_size=True),
        "Unet#scse": case(decoder_attention_type="scse"),
        "Unet#timm-efficientnet": case(encoder_name="timm-efficientnet-b0"),
        "Unet#mit": case(encoder_name="mit_b0"),
        "Unet#mobileone": case(encoder_name="mobileone_s0"),
        "Unet#tu": case(encoder_name="tu-mobilenetv3_small_100"),
        "FPN#densenet": case(encoder_name="densenet121"),
        "Unet#aux": case(aux_params={"classes": 4, "pooling": "avg"}),
        "Unet#vgg": case(encoder_name="vgg11_bn"),
        "Unet#dpn": case(encoder_name="dpn68"),
        "UnetPlusPlus#se_resnet": case(encoder_name="se_resnet50"),
        "Linknet#mobilenet": case(encoder_name="mobilenet_v2"),
        "PAN#resnext": case(image(128), encoder_name="resnext50_32x4d"),
    },
    shared={"encoder_name": "resnet18", "encoder_weights": None, "in_channels": 3, "classes": 2},
)
PYTORCHVIDEO = Package(
    "pytorchvideo.models",
    floats(1, 3, 8, 64, 64),
    {
        "x3d.create_x3d": case(floats(1, 3, 4, 160, 160), input_clip_length=4, input_crop_size=160, model_num_class=10),
        "resnet.create_resnet": case(model_num_class=10, stem_dim_out=16, head_pool_kernel_size=(2, 2, 2), model_depth=50),
        "csn.create_csn": case(model_num_class=10, stem_dim_out=16, head_pool_kernel_size=(1, 2, 2)),
        "r2plus1d.create_r2plus1d": case(model_num_class=10, head_pool_kernel_size=(1, 2, 2)),
        "slowfast.create_slowfast": case(  # the slow pathway first
            listed(floats(1, 3, 2, 64, 64), floats(1, 3, 8, 64, 64)),
            model_num_class=10,
            head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2)),
        ),
        "vision_transformers.create_multiscale_vision_transformers": case(
            floats(1, 3, 8, 64, 64),
            spatial_size=64,
            temporal_size=8,
            depth=2,
            patch_embed_dim=32,
            num_heads=1,
            head_num_classes=10,
        ),
    },
)
KORNIA = Package(
    "kornia",
    image(64, channels=1),
    {
        "feature.HardNet": case(floats(4, 1, 32, 32)),
        "feature.HardNet8": case(floats(4, 1, 32, 32)),
        "feature.HyNet": case(floats(4, 1, 32, 32)),
        "feature.SOSNet": case(floats(4, 1, 32, 32)),
        "feature.TFeat": case(floats(4, 1, 32, 32)),
        "models.vit.VisionTransformer": case(image(64), image_size=64, patch_size=16, embed_dim=64, depth=2, num_heads=4),
    },
    shared={"pretrained": False},
)
