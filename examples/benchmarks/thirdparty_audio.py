"""Models of audio packages for `thirdparty.py`: speech, separation, synthesis."""

from thirdparty_build import Package, case, floats, ids, lengths, made, several

WAVE = floats(2, 1, 2000)
FEATURES = several(floats(2, 40, 32), lengths(40, 30))
WAV2VEC2 = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 32,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "aux_num_out": None,
}
TORCHAUDIO = Package(
    "torchaudio.models",
    WAVE,
    {
        "Conformer": case(FEATURES, input_dim=32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=5),
        "Conformer#group_norm": case(
            FEATURES,
            input_dim=32,
            num_heads=4,
            ffn_dim=64,
            num_layers=2,
            depthwise_conv_kernel_size=5,
            use_group_norm=True,
            convolution_first=True,
        ),
        "ConvTasNet": case(
            enc_num_feats=32, msk_num_feats=16, msk_num_hidden_feats=32, msk_num_layers=2, msk_num_stacks=2, enc_kernel_size=16
        ),
        "DeepSpeech": case(floats(2, 1, 20, 16), n_feature=16, n_hidden=32),
        "Emformer": case(
            several(floats(2, 18, 32), lengths(16, 14)),
            input_dim=32,
            num_heads=4,
            ffn_dim=64,
            num_layers=2,
            segment_length=4,
            right_context_length=2,
        ),
        "HDemucs": case(floats(1, 2, 16384), sources=["a", "b"], channels=8),
        "rnnt.emformer_rnnt_model": case(
            several(floats(1, 20, 16), lengths(16), lambda: ids(20, 1, 5)().int(), lambda: lengths(5)().int()),
            input_dim=16,
            encoding_dim=32,
            num_symbols=20,
            segment_length=8,
            right_context_length=4,
            time_reduction_input_dim=16,
            time_reduction_stride=2,
            transformer_num_heads=4,
            transformer_ffn_dim=64,
            transformer_num_layers=2,
            transformer_dropout=0.0,
            transformer_activation="gelu",
            transformer_left_context_length=8,
            transformer_max_memory_size=0,
            transformer_weight_init_scale_strategy="depthwise",
            transformer_tanh_on_mem=True,
            symbol_embedding_dim=32,
            num_lstm_layers=2,
            lstm_layer_norm=True,
            lstm_layer_norm_epsilon=1e-3,
            lstm_dropout=0.0,
        ),
        "squim.squim_objective_model": case(
            floats(1, 4000),
            feat_dim=16,
            win_len=32,
            d_model=16,
            nhead=4,
            hidden_dim=16,
            num_blocks=1,
            rnn_type="LSTM",
            chunk_size=8,
        ),
        "Tacotron2": case(
            several(ids(20, 1, 6), lengths(6), floats(1, 8, 5), lengths(5)),
            n_mels=8,
            n_symbol=20,
            symbol_embedding_dim=16,
            encoder_embedding_dim=16,
            decoder_rnn_dim=32,
            attention_rnn_dim=32,
            prenet_dim=16,
            postnet_embedding_dim=16,
            attention_hidden_dim=16,
        ),
        "Wav2Letter": case(floats(1, 1, 4000)),
        "Wav2Letter#mfcc": case(floats(1, 13, 100), input_type="mfcc", num_features=13),
        "wav2vec2.model.wav2vec2_model": case(floats(2, 800), **WAV2VEC2),
        "wav2vec2.model.wav2vec2_model#layer_norm": case(
            floats(2, 800), **WAV2VEC2 | {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True, "aux_num_out": 12}
        ),
        "wav2vec2.model.wavlm_model": case(floats(2, 800), encoder_num_buckets=16, encoder_max_distance=32, **WAV2VEC2),
        "WaveRNN": case(
            several(floats(2, 1, 16), floats(2, 1, 16, 8)),
            upsample_scales=[2, 2],
            n_classes=16,
            hop_length=4,
            n_res_block=2,
            n_rnn=32,
            n_fc=32,
            n_freq=16,
            n_hidden=16,
            n_output=16,
        ),
    },
)

SPEECHBRAIN = Package(
    "speechbrain",
    floats(2, 40, 32),
    {
        "lobes.models.ECAPA_TDNN.ECAPA_TDNN": case(channels=[32, 32, 32, 32, 96], attention_channels=16, lin_neurons=24),
        "lobes.models.ECAPA_TDNN.ECAPA_TDNN#no_context": case(
            channels=[32, 32, 32, 32, 96], attention_channels=16, lin_neurons=24, global_context=False
        ),
        "lobes.models.ECAPA_TDNN.Classifier": case(floats(2, 1, 32), lin_blocks=1, lin_neurons=24, out_neurons=10),
        "lobes.models.Xvector.Xvector": case(tdnn_channels=[32, 32, 32, 32, 64], lin_neurons=32, in_channels=32),
        "lobes.models.ResNet.ResNet": case(
            floats(2, 40, 32), channels=[16, 16, 32, 32], block_sizes=[1, 1, 1, 1], lin_neurons=24
        ),
        "lobes.models.CRDNN.CRDNN": case(
            input_shape=(2, 40, 32), cnn_channels=[8, 16], rnn_layers=1, rnn_neurons=32, dnn_neurons=32
        ),
        "lobes.models.ESPnetVGG.ESPnetVGG": case(input_shape=(2, 40, 32), cnn_channels=[8, 16], rnn_layers=1, rnn_neurons=32),
        "lobes.models.ContextNet.ContextNet": case(
            input_shape=(2, 40, 32), out_channels=32, conv_channels=[32] * 3, strides=[1, 2, 1], num_blocks=3, num_layers=2
        ),
        "lobes.models.VanillaNN.VanillaNN": case(input_shape=(2, 40, 32), dnn_neurons=48),
        "lobes.models.GatedNN.GatedNN": case(input_shape=(2, 40, 32), neurons=48),
        "lobes.models.RNNLM.RNNLM": case(ids(20, 2, 12), output_neurons=20, embedding_dim=16, rnn_neurons=32, dnn_neurons=24),
        "lobes.models.Cnn14.Cnn14": case(floats(1, 64, 64), mel_bins=64, emb_dim=64),
        "lobes.models.conv_tasnet.MaskNet": case(floats(2, 16, 50), N=16, B=12, H=24, P=3, X=2, R=2, C=2),
        "lobes.models.conv_tasnet.MaskNet#cln": case(floats(2, 16, 50), N=16, B=12, H=24, P=3, X=2, R=2, C=2, norm_type="cLN"),
        "lobes.models.dual_path.SepformerWrapper": case(
            floats(1, 1600),
            encoder_out_nchannels=16,
            masknet_chunksize=20,
            masknet_numlayers=1,
            intra_numlayers=1,
            inter_numlayers=1,
            intra_nhead=4,
            inter_nhead=4,
            intra_dffn=32,
            inter_dffn=32,
        ),
        "lobes.models.HifiGAN.HifiganGenerator": case(
            floats(1, 16, 20),
            in_channels=16,
            out_channels=1,
            resblock_type="1",
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            resblock_kernel_sizes=[3, 7],
            upsample_kernel_sizes=[8, 8],
            upsample_initial_channel=32,
            upsample_factors=[4, 4],
        ),
        "lobes.models.HifiGAN.DiscriminatorP": case(floats(1, 1, 2000), period=3),
        "lobes.models.DiffWave.DiffWave": case(
            several(floats(1, 1, 512), lengths(3), floats(1, 8, 2)),
            input_channels=8,
            residual_layers=2,
            residual_channels=16,
            dilation_cycle_length=2,
            total_steps=10,
        ),
        "lobes.models.EnhanceResnet.EnhanceResnet": case(floats(1, 4000), channel_counts=[8, 8, 16], dense_nodes=32),
        "lobes.models.MetricGAN.EnhancementGenerator": case(
            several(floats(2, 20, 32), lengths(1, 1)), input_size=32, hidden_size=200
        ),
        "lobes.models.MetricGAN.MetricDiscriminator": case(floats(1, 2, 60, 60)),
        "lobes.models.FastSpeech2.PostNet": case(floats(2, 20, 8), n_mel_channels=8, postnet_embedding_dim=16),
        "lobes.models.FastSpeech2.DurationPredictor": case(
            several(floats(2, 20, 16), floats(2, 20, 1)), in_channels=16, out_channels=24, kernel_size=3
        ),
        "lobes.models.beats.TransformerSentenceEncoderLayer": case(
            floats(10, 2, 32), embedding_dim=32, ffn_embedding_dim=64, num_attention_heads=4
        ),
        "lobes.models.convolution.ConvolutionFrontEnd": case(
            input_shape=(2, 40, 32), num_layers_per_block=1, out_channels=[8, 16, 16]
        ),
        "lobes.models.transformer.Conformer.ConformerEncoder": case(
            several(src=floats(2, 20, 32), pos_embs=floats(1, 39, 32)),
            num_layers=2,
            d_model=32,
            d_ffn=64,
            nhead=4,
            kernel_size=5,
        ),
        "lobes.models.transformer.Branchformer.BranchformerEncoder": case(
            several(src=floats(2, 20, 32), pos_embs=floats(1, 39, 32)),
            num_layers=2,
            d_model=32,
            nhead=4,
            kernel_size=5,
            csgu_linear_units=48,
        ),
        "lobes.models.transformer.Transformer.TransformerEncoder": case(
            floats(2, 20, 32), num_layers=2, nhead=4, d_ffn=64, d_model=32
        ),
        "lobes.models.transformer.Transformer.TransformerDecoder": case(
            several(floats(2, 12, 32), floats(2, 20, 32)), num_layers=2, nhead=4, d_ffn=64, d_model=32
        ),
        "lobes.models.transformer.TransformerLM.TransformerLM": case(
            lambda: ids(19, 2, 12)() + 1, vocab=20, d_model=32, nhead=4, num_encoder_layers=2, d_ffn=64
        ),
        "lobes.models.transformer.TransformerASR.TransformerASR": case(
            several(floats(2, 20, 32), lambda: ids(19, 2, 6)() + 1),
            tgt_vocab=20,
            input_size=32,
            d_model=32,
            nhead=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            d_ffn=64,
        ),
        "lobes.models.transformer.TransformerASR.TransformerASR#conformer": case(
            several(floats(2, 20, 32), lambda: ids(19, 2, 6)() + 1),
            tgt_vocab=20,
            input_size=32,
            d_model=32,
            nhead=4,
            num_encoder_layers=2,
            num_decoder_layers=2,
            d_ffn=64,
            normalize_before=True,
            encoder_module="conformer",
            attention_type="RelPosMHAXL",
            kernel_size=5,
        ),
        "lobes.models.transformer.TransformerSE.CNNTransformerSE": case(
            floats(2, 20, 32), d_model=32, output_size=32, nhead=4, num_layers=2, d_ffn=64
        ),
        "lobes.models.resepformer.ResourceEfficientSeparator": case(
            floats(2, 32, 40),
            input_dim=32,
            unit=32,
            segment_size=10,
            layer=1,
            mem_type="av",
            seg_model=made("lobes.models.resepformer.SBTransformerBlock_wnormandskip", num_layers=1, d_model=32, nhead=4),
            mem_model=made("lobes.models.resepformer.SBTransformerBlock_wnormandskip", num_layers=1, d_model=32, nhead=4),
        ),
        "nnet.RNN.LiGRU": case(input_shape=(2, 40, 32), hidden_size=24),
        "nnet.RNN.GRU": case(input_shape=(2, 40, 32), hidden_size=24),
        "nnet.CNN.SincConv": case(floats(2, 400), out_channels=8, kernel_size=11, in_channels=1),
        "nnet.attention.MultiheadAttention": case(several(*[floats(2, 10, 32)] * 3), nhead=4, d_model=32),
    },
    shared={"input_size": 32},
)

SEPARATION = {"n_src": 2, "bn_chan": 16, "kernel_size": 16, "n_filters": 32, "n_repeats": 2}
ASTEROID = Package(
    "asteroid.models",
    floats(1, 1, 1600),
    {
        "ConvTasNet": case(n_blocks=2, hid_chan=32, skip_chan=16),
        "ConvTasNet#cln": case(n_blocks=2, hid_chan=32, skip_chan=16, norm_type="cLN", mask_act="relu"),
        "DPRNNTasNet": case(hid_size=16, chunk_size=20),
        "DPTNet": case(n_heads=4, ff_hid=16, chunk_size=20, n_filters=32),
        "LSTMTasNet": case(hid_size=16, n_layers=2),
        "SuDORMRFNet": case(num_blocks=2, upsampling_depth=3, kernel_size=21),
        "SuDORMRFImprovedNet": case(num_blocks=2, upsampling_depth=3, kernel_size=21),
        "DeMask": case(hidden_dims=(32,), n_filters=64, kernel_size=64, stride=32),
        "DCCRNet": case(architecture="mini", stft_n_filters=512),
        "DCUNet": case(floats(1, 1, 16384), architecture="mini", fix_length_mode="pad"),
        "FasNetTAC": case(floats(1, 2, 3200), enc_dim=16, feature_dim=16, hidden_dim=16, n_layers=1, tac_hidden_dim=24),
    },
    shared=SEPARATION,
)
ENCODEC = Package(
    "encodec",
    floats(1, 1, 3200),
    {
        "modules.SEANetEncoder": case(n_filters=8, dimension=32, ratios=[4, 2]),
        "modules.SEANetDecoder": case(floats(1, 32, 40), n_filters=8, dimension=32, ratios=[4, 2]),
        "model.EncodecModel": case(
            encoder=made("modules.SEANetEncoder", n_filters=8, dimension=32, ratios=[4, 2]),
            decoder=made("modules.SEANetDecoder", n_filters=8, dimension=32, ratios=[4, 2]),
            quantizer=made("quantization.ResidualVectorQuantizer", dimension=32, n_q=2, bins=16),
            target_bandwidths=[6.0],
            sample_rate=24000,
            channels=1,
        ),
    },
)
DEMUCS = Package(
    "demucs",
    floats(1, 2, 8192),
    {
        "demucs.Demucs": case(sources=["a", "b"], channels=8, depth=3),
        "hdemucs.HDemucs": case(floats(1, 2, 16384), sources=["a", "b"], channels=8),
        "htdemucs.HTDemucs": case(
            sources=["a", "b"], channels=8, depth=3, nfft=512, t_layers=1, bottom_channels=32, t_heads=4, segment=1
        ),
    },
)
