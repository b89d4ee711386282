"""Models of other fields for `thirdparty.py`: medical images, super-resolution, graphs, time series, brain signals."""

import torch
from thirdparty_build import Package, case, floats, graph, ids, image, lengths, plain, several

VOLUME = floats(1, 1, 32, 32, 32)
UNET = {"channels": (8, 16, 32), "strides": (2, 2)}
CODER = {"channels": (8, 16, 32), "strides": (2, 2, 2)}
KL = {"in_channels": 1, "out_channels": 1, "channels": (16, 32), "num_res_blocks": 1, "norm_num_groups": 8}
ATTENDING = {"attention_levels": (False, True)}
STEPS = lengths(5)
MONAI = Package(
    "monai.networks.nets",
    floats(1, 1, 64, 64),
    {
        "AHNet": case(floats(1, 1, 128, 128), upsample_mode="transpose"),
        "AttentionUnet": case(**UNET),
        "AutoEncoder": case(inter_channels=[16, 16], **CODER),
        "AutoencoderKL": case(**KL, **ATTENDING),
        "BasicUNet": case(features=(8, 8, 16, 32, 32, 8)),
        "BasicUNetPlusPlus": case(features=(8, 8, 16, 32, 32, 8), deep_supervision=True),
        "Classifier": case(in_shape=(1, 64, 64), classes=3, **UNET),
        "ControlNet": case(
            several(floats(1, 1, 32, 32), STEPS, floats(1, 1, 64, 64)),
            in_channels=1,
            channels=(16, 32),
            num_res_blocks=1,
            norm_num_groups=8,
            num_head_channels=8,
            conditioning_embedding_num_channels=(8, 16),
            **ATTENDING,
        ),
        "Critic": case(in_shape=(1, 64, 64), **UNET),
        "Discriminator": case(in_shape=(1, 64, 64), **UNET),
        "DAF3D": case(VOLUME, in_channels=1, out_channels=2),
        "DecoderOnlyTransformer": case(
            ids(20, 2, 12), num_tokens=20, max_seq_len=16, attn_layers_dim=32, attn_layers_depth=2, attn_layers_heads=4
        ),
        "DenseNet": case(init_features=16, growth_rate=8, block_config=(2, 2, 2)),
        "DenseNet121": case(init_features=16, growth_rate=8),
        "DiffusionModelUNet": case(several(floats(1, 1, 32, 32), STEPS), num_head_channels=8, **KL, **ATTENDING),
        "DiffusionModelUNet#context": case(
            several(x=floats(1, 1, 32, 32), timesteps=STEPS, context=floats(1, 3, 12)),
            num_head_channels=8,
            with_conditioning=True,
            cross_attention_dim=12,
            **KL,
            **ATTENDING,
        ),
        "DynUNet": case(
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            filters=[8, 16, 32],
            res_block=True,
            deep_supervision=True,
            deep_supr_num=1,
        ),
        "EfficientNetBN": case(image(64), model_name="efficientnet-b0", pretrained=False, in_channels=3, num_classes=5),
        "FlexibleUNet": case(image(64), backbone="efficientnet-b0", in_channels=3, out_channels=2),
        "FullyConnectedNet": case(floats(2, 12), in_channels=12, out_channels=3, hidden_channels=(24, 16)),
        "VarFullyConnectedNet": case(
            floats(2, 12), in_channels=12, out_channels=3, latent_size=4, encode_channels=(24, 16), decode_channels=(16, 24)
        ),
        "Generator": case(floats(2, 10), latent_shape=(10,), start_shape=(16, 4, 4), channels=(16, 8, 1), strides=(2, 2, 1)),
        "GlobalNet": case(floats(1, 1, 32, 32), image_size=[32, 32], num_channel_initial=4, depth=2),
        "HighResNet": case(VOLUME, spatial_dims=3),
        "HoVerNet": case(floats(1, 3, 256, 256), mode="fast", in_channels=3),
        "HyenaNDUNETR": case(VOLUME, hyena_stages=(True, False, False, False), feature_size=12, spatial_dims=3),
        "LocalNet": case(floats(1, 1, 32, 32), num_channel_initial=4, extract_levels=(0, 1, 2)),
        "RegUNet": case(floats(1, 1, 32, 32), num_channel_initial=4, depth=2),
        "MaskedAutoEncoderViT": case(
            img_size=64,
            patch_size=16,
            hidden_size=32,
            mlp_dim=64,
            num_layers=2,
            num_heads=4,
            decoder_hidden_size=32,
            decoder_mlp_dim=64,
            decoder_num_layers=1,
            decoder_num_heads=4,
        ),
        "MedNeXtSmall": case(spatial_dims=2, in_channels=1, out_channels=2),
        "MedNeXt": case(init_filters=8, encoder_expansion_ratio=2, bottleneck_expansion_ratio=2, decoder_expansion_ratio=2),
        "MILModel": case(
            floats(2, 3, 3, 64, 64), num_classes=2, mil_mode="att_trans", pretrained=False, backbone="resnet18", trans_blocks=1
        ),
        "PatchDiscriminator": case(channels=8, num_layers_d=2),
        "MultiScalePatchDiscriminator": case(num_d=2, num_layers_d=1, channels=8),
        "Quicknat": case(num_classes=3, num_filters=8, num_channels=1),
        "Regressor": case(in_shape=(1, 64, 64), out_shape=(2,), **UNET),
        "ResNet": case(
            floats(1, 1, 64, 64), block="bottleneck", layers=[1, 1, 1, 1], block_inplanes=[8, 16, 32, 64], n_input_channels=1
        ),
        "restormer.Restormer": case(dim=16, num_blocks=(1, 1, 1), heads=(1, 2, 4), num_refinement_blocks=1),
        "SegResNet": case(),
        "SegResNetDS": case(init_filters=8, dsdepth=2),
        "SegResNetVAE": case(input_image_size=(64, 64), vae_nz=16),
        "SENet": case(
            floats(1, 1, 64, 64), block="se_bottleneck", layers=(1, 1, 1, 1), groups=4, reduction=4, inplanes=32, num_classes=3
        ),
        "SEResNet50": case(floats(1, 1, 64, 64), layers=(1, 1, 1, 1), num_classes=3, spatial_dims=2, in_channels=1),
        "SPADENet": case(
            several(floats(1, 3, 32, 32), floats(1, 1, 32, 32)),
            label_nc=3,
            input_shape=[32, 32],
            channels=[16, 8],
            z_dim=8,
            spade_intermediate_channels=8,
        ),
        "SPADEAutoencoderKL": case(
            several(floats(1, 1, 32, 32), floats(1, 3, 32, 32)), label_nc=3, spade_intermediate_channels=8, **KL, **ATTENDING
        ),
        "SPADEDiffusionModelUNet": case(
            several(floats(1, 1, 32, 32), STEPS, floats(1, 3, 32, 32)),
            label_nc=3,
            spade_intermediate_channels=8,
            num_head_channels=8,
            **KL,
            **ATTENDING,
        ),
        "SwinUNETR": case(floats(1, 1, 64, 64, 64), feature_size=12, spatial_dims=3),
        "SwinUNETR#v2": case(floats(1, 1, 64, 64, 64), feature_size=12, spatial_dims=3, use_v2=True),
        "TorchVisionFCModel": case(
            image(64), model_name="resnet18", num_classes=3, in_channels=512, use_conv=True, pool=("avg", {"kernel_size": 2})
        ),
        "UNet": case(num_res_units=2, **UNET),
        "UNETR": case(VOLUME, img_size=(32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=64, num_heads=4, spatial_dims=3),
        "VNet": case(VOLUME, spatial_dims=3),
        "VQVAE": case(
            channels=(16, 32),
            num_res_layers=1,
            num_res_channels=(16, 32),
            downsample_parameters=((2, 4, 1, 1),) * 2,
            upsample_parameters=((2, 4, 1, 1, 0),) * 2,
            num_embeddings=16,
            embedding_dim=8,
        ),
        "VarAutoEncoder": case(floats(1, 1, 32, 32), in_shape=(1, 32, 32), latent_size=4, **CODER),
        "ViT": case(img_size=64, patch_size=16, hidden_size=32, mlp_dim=64, num_layers=2, num_heads=4, classification=True),
        "ViTAutoEnc": case(img_size=64, patch_size=16, hidden_size=32, mlp_dim=64, num_layers=2, num_heads=4),
        "VoxelMorphUNet": case(
            floats(1, 2, 32, 32),
            in_channels=2,
            unet_out_channels=8,
            channels=(8, 8, 16, 16, 16, 16),
            final_conv_channels=(8, 8),
        ),
    },
    shared={"spatial_dims": 2, "in_channels": 1, "out_channels": 2},
)

SWIN = {"embed_dim": 24, "window_size": 8, "num_heads": [2, 2], "depths": [2, 2]}
SPANDREL = Package(
    "spandrel.architectures",
    image(32),
    {
        "ATD.ATD": case(embed_dim=24, depths=(2, 2), num_heads=(2, 2), category_size=64, num_tokens=16),
        "CRAFT.CRAFT": case(image(32), embed_dim=24, depths=[1, 1], num_heads=[2, 2]),
        "Compact.Compact": case(num_feat=16, num_conv=3),
        "DAT.DAT": case(embed_dim=24, depth=[2, 2], num_heads=[2, 2], split_size=[2, 4], img_size=32),
        "DCTLSA.DCTLSA": case(nf=20),
        "DITN.DITN": case(dim=24, ITL_blocks=1, SAL_blocks=1),
        "DRCT.DRCT": case(
            embed_dim=24,
            depths=(2, 2),
            num_heads=(2, 2),
            window_size=8,
            gc=8,
            img_size=32,
            upsampler="pixelshuffle",  # without which it returns what it is given
            upscale=2,
        ),
        "DRUNet.DRUNet": case(in_nc=3, out_nc=3, nc=[8, 16, 24, 32], nb=1),
        "DnCNN.DnCNN": case(in_nc=3, out_nc=3, nc=16, nb=4),
        "ESRGAN.ESRGAN": case(num_filters=16, num_blocks=2),
        "FBCNN.FBCNN": case(image(32), nc=[8, 16, 24, 512], nb=1),
        "FDAT.FDAT": case(embed_dim=24, num_groups=1, num_heads=2),
        "FFTformer.FFTformer": case(dim=16, num_blocks=[1, 1, 1], num_refinement_blocks=1),
        "GFPGAN.GFPGAN": case(image(64), out_size=64, num_style_feat=32, channel_multiplier=0.125, narrow=0.125, num_mlp=2),
        "GRL.GRL": case(
            embed_dim=24,
            depths=[2, 2],
            num_heads_window=[2, 2],
            num_heads_stripe=[2, 2],
            window_size=8,
            stripe_size=[8, 8],
            img_size=32,
        ),
        "HAT.HAT": case(img_size=32, squeeze_factor=6, **SWIN),
        "HVICIDNet.HVICIDNet": case(image(32), channels=[8, 8, 16, 32], heads=[1, 2, 4, 8]),
        "KBNet.KBNet_l": case(dim=48, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1),
        "KBNet.KBNet_s": case(width=16, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
        "LaMa.LaMa": case(in_nc=4, inputs=several(floats(1, 3, 32, 32), floats(1, 1, 32, 32))),
        "MMRealSR.MMRealSR": case(
            num_in_ch=3, num_out_ch=3, num_feat=16, num_block=1, num_grow_ch=8, num_feats=[8, 16, 24, 32]
        ),
        "MixDehazeNet.MixDehazeNet": case(image(64), embed_dims=[8, 16, 24, 16, 8]),
        "MoESR.MoESR": case(dim=16, n_blocks=2, n_block=1),
        "MoSR.MoSR": case(dim=16, n_block=2),
        "NAFNet.NAFNet": case(width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
        "OmniSR.OmniSR": case(num_feat=16),
        "PLKSR.PLKSR": case(dim=16, n_blocks=2),
        "PLKSR.RealPLKSR": case(dim=16, n_blocks=2),
        "RCAN.RCAN": case(n_resgroups=1, n_resblocks=2, n_feats=16, reduction=4),
        "RGT.RGT": case(embed_dim=24, depth=[2, 2], num_heads=[2, 2], split_size=[8, 8], img_size=32),
        "RealCUGAN.UpCunet2x": case(),
        "RealCUGAN.UpCunet4x": case(),
        "RestoreFormer.RestoreFormer": case(
            image(64), ch=32, ch_mult=(1, 2), resolution=64, num_res_blocks=1, n_embed=32, embed_dim=16
        ),
        "RetinexFormer.RetinexFormer": case(n_feat=16, stage=1),
        "SAFMN.SAFMN": case(image(32), dim=16, n_blocks=2),
        "SAFMNBCIE.SAFMNBCIE": case(image(32), dim=16, n_blocks=2, num_layers=2),
        "SCUNet.SCUNet": case(image(64), dim=64, config=[1, 1, 1, 1, 1, 1, 1]),
        "SPAN.SPAN": case(num_in_ch=3, num_out_ch=3, feature_channels=16),
        "SeemoRe.SeemoRe": case(num_experts=3, num_layers=2, embedding_dim=16),
        "SwiftSRGAN.SwiftSRGAN": case(num_channels=16, num_blocks=2),
        "Swin2SR.Swin2SR": case(img_size=32, upsampler="pixelshuffle", upscale=2, **SWIN),
        "SwinIR.SwinIR": case(img_size=32, upsampler="pixelshuffle", upscale=2, **SWIN),
        "SwinIR.SwinIR#nearest": case(img_size=32, upsampler="nearest+conv", upscale=4, **SWIN),
        "Uformer.Uformer": case(image(128), img_size=128, embed_dim=8, depths=[1] * 9),
    },
)

MOLECULE = several(ids(9, 8), floats(8, 3))
TORCH_GEOMETRIC = Package(
    "torch_geometric.nn.models",
    graph(),
    plain("GCN GraphSAGE GIN GAT EdgeCNN", num_layers=2)
    | {
        "GCN#batch_norm": case(num_layers=3, norm="batch_norm", jk="cat"),
        "GAT#v2": case(num_layers=2, v2=True, heads=4),
        "GraphSAGE#lstm": case(num_layers=2, jk="lstm"),
        "PNA": case(
            num_layers=2, aggregators=["mean", "max"], scalers=["identity", "amplification"], deg=torch.tensor([0, 4, 5, 3])
        ),
        "AttentiveFP": case(
            several(floats(12, 16), ids(12, 2, 30), floats(30, 4), lambda: torch.arange(12) // 6),
            edge_dim=4,
            num_layers=2,
            num_timesteps=2,
        ),
        "DimeNet": case(MOLECULE, num_blocks=1, num_bilinear=4, num_spherical=3, num_radial=4, out_channels=1),
        "GraphUNet": case(depth=2),
        "LINKX": case(num_nodes=12, num_layers=2),
        "LightGCN": case(ids(12, 2, 30), num_nodes=12, embedding_dim=16, num_layers=2),
        "MLP": case(floats(12, 16), num_layers=3),
        "NeuralFingerprint": case(num_layers=2),
        "PMLP": case(num_layers=2),
        "Polynormer": case(
            several(floats(12, 16), ids(12, 2, 30), lambda: torch.zeros(12, dtype=torch.long)), local_layers=2, global_layers=1
        ),
        "RECT_L": case(graph()),
        "SGFormer": case(several(floats(12, 16), ids(12, 2, 30), lambda: torch.zeros(12, dtype=torch.long)), gnn_num_layers=2),
        "SchNet": case(MOLECULE, hidden_channels=32, num_filters=32, num_interactions=2, num_gaussians=8),
        "SignedGCN": case(several(floats(12, 16), ids(12, 2, 20), ids(12, 2, 10)), num_layers=2),
        "ViSNet": case(
            several(ids(9, 8), floats(8, 3), lambda: torch.zeros(8, dtype=torch.long)),
            hidden_channels=32,
            num_layers=2,
            num_heads=4,
            num_rbf=8,
        ),
    },
    shared={"in_channels": 16, "hidden_channels": 32, "out_channels": 5},
)

SERIES = floats(4, 3, 48)
TSAI = Package(
    "tsai.models.all",
    SERIES,
    plain(
        "FCN FCNPlus InceptionTime InceptionTimePlus XceptionTime XceptionTimePlus MLP OmniScaleCNN ResCNN ResNet ResNetPlus"
        " RNN LSTM GRU RNNPlus LSTMPlus GRUPlus LSTM_FCN GRU_FCN LSTM_FCNPlus TCN TransformerModel XCM XCMPlus"
        " xresnet1d18 xresnet1d18plus mWDN RNNAttention LSTMAttention GRUAttention"
    )
    | {
        "MLSTM_FCNPlus": case(c_in=3, c_out=4, seq_len=48),
        "PatchTST": case(pred_dim=8, patch_len=8, stride=4, n_layers=2, d_model=32, n_heads=4, d_ff=64),
        "TSPerceiver": case(n_latents=16, d_latent=32, n_layers=1),
        "TSSequencerPlus": case(d_model=32, depth=2),
        "TST": case(n_layers=2, d_model=32, n_heads=4, d_ff=64),
        "TSTPlus": case(n_layers=2, d_model=32, n_heads=4, d_ff=64),
        "TSiTPlus": case(d_model=32, depth=2, n_heads=4),
        "ConvTranPlus": case(d_model=16, n_heads=8, dim_ff=32),
        "TransformerLSTMPlus": case(d_model=32, nhead=4, dim_feedforward=64, num_encoder_layers=1),
        "gMLP": case(patch_size=1, d_model=32, d_ffn=64, depth=2),
    },
    shared={"c_in": 3, "c_out": 4, "seq_len": 48},
)

BRAINDECODE = Package(
    "braindecode.models",
    floats(2, 8, 1000),
    plain(
        "ATCNet AttentionBaseNet BDTCN BIOT CTNet ContraWR Deep4Net DeepSleepNet EEGConformer EEGITNet EEGInceptionERP"
        " EEGInceptionMI EEGNeX EEGNet EEGSimpleConv EEGTCNet FBCNet FBLightConvNet FBMSNet HybridNet IFNet MEDFormer MSVTNet"
        " SCCNet SPARCNet SSTDPN ShallowFBCSPNet SincShallowNet SyncNet TCFormer TCN TIDNet TSception PBT"
    )
    | {
        "CBraMod": case(n_layer=2, dim_feedforward=64),
        "SleepStagerChambon2018": case(floats(2, 2, 3000), n_chans=2, n_times=3000, sfreq=100),
        "SleepStagerBlanco2020": case(floats(2, 2, 3000), n_chans=2, n_times=3000, sfreq=100),
        "USleep": case(floats(2, 2, 3000), n_chans=2, n_times=3000, sfreq=100, depth=4),
        "AttnSleep": case(floats(2, 1, 3000), n_chans=1, n_times=3000, sfreq=100),
    },
    shared={"n_chans": 8, "n_outputs": 4, "n_times": 1000, "sfreq": 250},
)

WINDOWS = lambda: (  # noqa: E731
    {
        "insample_y": torch.randn(2, 24, 1),
        "insample_mask": torch.ones(2, 24, 1),
        "futr_exog": None,
        "hist_exog": None,
        "stat_exog": None,
    },
)
PANEL = lambda: (WINDOWS()[0] | {"insample_y": torch.randn(2, 24, 3), "insample_mask": torch.ones(2, 24, 3)},)  # noqa: E731
NEURALFORECAST = Package(
    "neuralforecast.models",
    WINDOWS,
    plain("MLP NBEATS NHITS DLinear NLinear KAN DeepNPTS BiTCN")
    | {
        "TCN": case(encoder_hidden_size=16, decoder_hidden_size=16, inference_input_size=24),
        "LSTM": case(encoder_hidden_size=16, decoder_hidden_size=16),
        "GRU": case(encoder_hidden_size=16, decoder_hidden_size=16),
        "DilatedRNN": case(encoder_hidden_size=16, decoder_hidden_size=16),
        "TiDE": case(hidden_size=32, decoder_output_dim=8),
        "TFT": case(hidden_size=16, n_head=4),
        "PatchTST": case(hidden_size=32, n_heads=4, linear_hidden_size=48, patch_len=8, stride=4, encoder_layers=2),
        "VanillaTransformer": case(hidden_size=32, n_head=4, conv_hidden_size=32),
        "Informer": case(hidden_size=32, n_head=4, conv_hidden_size=32),
        "Autoformer": case(hidden_size=32, n_head=4, conv_hidden_size=32),
        "FEDformer": case(hidden_size=32, n_head=8, conv_hidden_size=32, modes=4),
        "TimesNet": case(hidden_size=16, conv_hidden_size=16, top_k=2),
        "xLSTM": case(encoder_hidden_size=16, decoder_hidden_size=16),
        "iTransformer": case(PANEL, n_series=3, hidden_size=32, n_heads=4, d_ff=64),
        "TSMixer": case(PANEL, n_series=3, ff_dim=16),
        "TSMixerx": case(PANEL, n_series=3, ff_dim=16),
        "MLPMultivariate": case(PANEL, n_series=3, hidden_size=32),
        "SOFTS": case(PANEL, n_series=3, hidden_size=32, d_core=16, d_ff=64),
        "StemGNN": case(PANEL, n_series=3),
        "TimeMixer": case(PANEL, n_series=3, d_model=16, d_ff=32),
        "RMoK": case(PANEL, n_series=3),
        "TimeXer": case(PANEL, n_series=3, patch_len=8, hidden_size=32, n_heads=4, d_ff=64),
    },
    shared={"h": 8, "input_size": 24},
)
