"""The catalogue of models: one row per model, which every command, table and test reads.

A model is one file, with its class and mathematics, and one row here. The row is not in the model's file because that
file imports torch, which `itm-fast train --help` must not wait for.
"""

from __future__ import annotations

from dataclasses import replace

from ._entry import RECIPES, Entry
from ._options import DEEPEST, MOST, Option, size

RECONSTRUCTED = "reconstructed from the abstract: the equations are not public to us"

_SIM_DIM = size(256, "size of the similarity vectors", "S")
_STEPS = Option(3, "reasoning steps", "K", flag="sgr_steps", least=1, most=DEEPEST)
_SGR_STEPS = replace(_STEPS, help="reasoning steps; 0 scores the global similarity vector alone", least=0)
_T2I = Option(9.0, "inverse temperature of words attending to regions", "X")
_I2T = Option(4.0, "inverse temperature of regions attending to words", "X")
_IMAGE_ENCODER = Option("basic", "image encoder", choices=("basic", "weight_norm"))
_LONG = {"num_epochs": 40, "lr_update": 30}

_ROWS = (
    Entry(
        "sgr",
        "SGR",
        "sgraf:SGRAF",
        "SGRAF, AAAI 2021",
        "paper and published code",
        ("module_name", "SGR"),
        {"sim_dim": _SIM_DIM, "sgr_step": _SGR_STEPS},
        differs={"f30k": _LONG},
    ),
    Entry(
        "saf",
        "SAF",
        "sgraf:SGRAF",
        "SGRAF, AAAI 2021",
        "paper and published code",
        ("module_name", "SAF"),
        {"sim_dim": _SIM_DIM, "sgr_step": replace(_SGR_STEPS, help=None)},  # the published code reads it for SAF too
    ),
    Entry(
        "scan",
        "SCAN",
        "scan:SCAN",
        "SCAN, ECCV 2018",
        "paper and published code",
        ("cross_attn", None),
        {
            "raw_feature_norm": Option(
                "clipped_l2norm",
                "normalisation of the affinities",
                choices=("clipped_l2norm", "l2norm", "clipped_l1norm", "l1norm", "clipped", "softmax", "no_norm"),
            ),
            "agg_func": Option("LogSumExp", "pooling of the cosines", choices=("LogSumExp", "Mean", "Max", "Sum")),
            "lambda_softmax": Option(9.0, "inverse temperature of the attention", "X", above=0),
            "lambda_lse": Option(6.0, "inverse temperature of LogSumExp", "X", above=0),
            "precomp_enc_type": _IMAGE_ENCODER,
        },
        "cross_attn",
        ("t2i", "i2t"),
        differs={
            "f30k": {"lr_update": 15},
            "coco": {"learning_rate": 5e-4},
            "i2t": {"lambda_softmax": 4.0, "lambda_lse": 5.0},
            "coco i2t": {"lambda_lse": 20.0},
        },
    ),
    Entry(
        "imram",
        "IMRAM",
        "imram:IMRAM",
        "IMRAM, CVPR 2020",
        "paper and published code",
        ("system", "IMRAM"),
        {
            "model_mode": Option(
                "full_IMRAM",
                "words attend to regions (text), regions to words (image), or both",
                choices=("text_IMRAM", "image_IMRAM", "full_IMRAM"),
            ),
            "iteration_step": Option(3, "steps of attention", "K", least=1, most=DEEPEST),
            "lambda_softmax": Option(9.0, "inverse temperature of the attention", "X", above=0),
            "no_IMRAM_norm": Option(True),  # both published scripts set it
        },
        also="model_mode",
        differs={
            "f30k": {"model_mode": "image_IMRAM", "iteration_step": 1, "lr_update": 15},
            "coco": {"model_mode": "text_IMRAM", "lambda_softmax": 11.0, "learning_rate": 5e-4},
        },
    ),
    Entry(
        "rcar",
        "RCAR",
        "rcar:RCAR",
        "RCAR, IEEE TIP 2023",
        "paper and published code; trained by Adam, without the warm-up epochs of the mean loss",
        ("system", "RCAR"),
        {
            "sim_dim": _SIM_DIM,
            "self_regulator": Option(
                "coop_rcar",
                "coop_rcar regulates attention and aggregation, only_rar aggregation alone, only_rcr attention alone",
                choices=("coop_rcar", "only_rar", "only_rcr"),
            ),
            "rcar_step": Option(2, "steps of coop_rcar", "N", least=1, most=DEEPEST),
            "rar_step": Option(3, "steps of only_rar", "N", least=1, most=DEEPEST),
            "rcr_step": Option(2, "steps of only_rcr", "N", least=1, most=DEEPEST),
            "t2i_smooth": Option(10.0, "first inverse temperature of words attending to regions", "X", above=0),
            "i2t_smooth": Option(3.0, "first inverse temperature of regions attending to words", "X", above=0),
        },
        "attn_type",
        ("t2i", "i2t"),
        also="self_regulator",
        differs={
            "f30k": {"num_epochs": 40, "lr_update": 30, "learning_rate": 5e-4},
            "coco": {"num_epochs": 25, "lr_update": 15, "learning_rate": 5e-4},
            "i2t": {"rar_step": 2, "rcr_step": 3},
        },
    ),
    Entry(
        "cmcan",
        "CMCAN",
        "cmcan:CMCAN",
        "CMCAN, AAAI 2022",
        "paper and published code; with SPLIT_boxes.npy the neighbours of regions are those of its adj.py, without it "
        "there are none; no published checkpoint has been tried",
        ("system", "CMCAN"),
        {
            "sim_dim": _SIM_DIM,
            "self_layers": Option(3, "steps of both graphs", "K", least=1, most=DEEPEST),
        },
        also="self_layers",
        differs={"f30k": {"num_epochs": 60, "lr_update": 40}},
    ),
    Entry(
        "shan",
        "SHAN",
        "shan:SHAN",
        "SHAN, IJCAI 2021",
        "the paper's 17 equations; what they leave open is an option, each with a stated default",
        ("system", "SHAN"),
        {
            "gate": Option("scalar", "whether a gate is a number or a vector", choices=("scalar", "vector")),
            "gate_sharing": Option(False, "use one gate for both modalities (default: each has its own)"),
            "affinity": Option(
                "cosine", "affinity of projected vectors; the paper prints dot", choices=("cosine", "dot")
            ),
            "pooling": Option("mean", "pooling of the local cosines", choices=("mean", "sum")),
            "lambda_softmax": Option(15.0, "inverse temperature of the attention", "X", above=0),
            "mu1": Option(0.3, "weight of the regions in the local term", "X", least=0, most=1),
            "mu2": Option(0.5, "weight of the image in the global-to-local term", "X", least=0, most=1),
            "projection_bias": Option(False, "add biases to the projections of the affinity (default: none)"),
            "word_vectors": Option(
                None,
                "pretrained word vectors, kept fixed, in addition to the learned ones of --word-dim: GloVe or word2vec "
                "text, word2vec binary, or a .npy array with a row for every word of the vocabulary (default: none)",
                "FILE",
            ),
            "vector_dim": Option(0, least=0, most=MOST),
        },
        "alignment",
        ("full", "t2i", "i2t"),
        differs={"f30k": {"lr_update": 15}, "coco": {"num_epochs": 30, "lr_update": 15, "learning_rate": 5e-4}},
    ),
    Entry(
        "hgan",
        "HGAN",
        "hgan:HGAN",
        "HGAN, IEEE TMM 2023",
        RECONSTRUCTED,
        ("system", "HGAN"),
        {
            "graph_layers": Option(2, "layers of the feature graphs", "N", least=0, most=DEEPEST),
            "granularities": Option([1, 4, 16], "numbers of channel groups", "C"),
            "levels": Option(
                [1.0, 1.0, 1.0],
                "weights of the local-local, global-local and global-global similarity",
                "X",
                count=3,
            ),
            "lambda_t2i": _T2I,
            "lambda_i2t": _I2T,
            "lambda_global": Option(1.0, "inverse temperature of global vectors attending to locals", "X"),
            "share_local": Option(0.5, "weight of t2i in the local-local term; i2t has the rest", "X"),
            "share_global": Option(0.5, "weight of the image in the global-local term; the caption has the rest", "X"),
        },
    ),
    Entry(
        "tshsr",
        "TSHSR",
        "tshsr:TSHSR",
        "TSHSR, 2022",
        RECONSTRUCTED,
        ("system", "TSHSR"),
        {
            "sim_dim": _SIM_DIM,
            "context_nodes": Option([4, 1], "number of context nodes at each level", "C"),
            "sgr_step": _STEPS,
            "lambda_t2i": _T2I,
            "lambda_i2t": _I2T,
        },
        differs={"f30k": _LONG},
    ),
    Entry(
        "bfan",
        "BFAN",
        "bfan:BFAN",
        "BFAN, ACM MM 2019",
        "published code",
        ("system", "BFAN"),
        {
            "focal_type": Option("equal", "which regions and words share the attention", choices=("equal", "prob")),
            "lambda_softmax": Option(20.0, "inverse temperature of the attention", "X", above=0),
            "precomp_enc_type": _IMAGE_ENCODER,
        },
        also="focal_type",
        differs={"f30k": {"num_epochs": 15, "lr_update": 15}, "coco": {"lr_update": 15, "learning_rate": 5e-4}},
    ),
    Entry(
        "chan",
        "CHAN",
        "chan:CHAN",
        "CHAN, CVPR 2023",
        "published code, with the GRU; it trains as SCAN does",
        ("system", "CHAN"),
        {
            "coding_type": Option(
                "VHACoding",
                "what is coded by what it finds: words by their largest region (VHA), regions by their largest word "
                "(THA), or regions by a softmax over words (VSA)",
                choices=("VHACoding", "THACoding", "VSACoding"),
            ),
            "pooling_type": Option(
                "LSEPooling",
                "pooling of what is found",
                choices=("LSEPooling", "MeanPooling", "MaxPooling", "SumPooling"),
            ),
            "belta": Option(0.1, "temperature of LSEPooling", "X", above=0),
            "alpha": Option(0.1, above=0),
            "precomp_enc_type": Option("basic", choices=("basic", "selfattention")),
        },
        also="coding_type",
        differs={
            recipe: {"num_epochs": 25, "lr_update": 15, "learning_rate": 5e-4, "margin": 0.05} for recipe in RECIPES
        },
    ),
    Entry(
        "naaf",
        "NAAF",
        "naaf:NAAF",
        "NAAF, CVPR 2022",
        "published code",
        ("system", "NAAF"),
        {
            "lambda_softmax": Option(20.0, "inverse temperature of the attention", "X", above=0),
            "thres": Option(0.0),
            "thres_safe": Option(0.0),
            "intra_lambda": Option(5.0, above=0),
            "alpha": Option(2.0, above=0),
            "mode": Option("", choices=("", "train_online", "train", "test")),
            "precomp_enc_type": _IMAGE_ENCODER,
            "precomp_enc_text_type": Option("basic", choices=("basic", "GloVe")),
        },
        also="thres_safe",
        differs={
            "f30k": {"num_epochs": 20, "lr_update": 10, "learning_rate": 5e-4},
            "coco": {"num_epochs": 20, "lr_update": 10, "learning_rate": 5e-4, "batch_size": 256},
        },
    ),
    Entry(
        "maxsim",
        "MaxSim",
        "maxsim:MaxSim",
        "ColBERT, SIGIR 2020",
        "the pair score of ColBERT, ColPali and FILIP, with SCAN's encoders",
        ("system", "MaxSim"),
        {
            "maxsim": Option(
                "t2i",
                "each word takes its largest region (t2i), each region its largest word (i2t), or both",
                choices=("t2i", "i2t", "both"),
            ),
            "agg_func": Option("Mean", "pooling of what is taken", choices=("Mean", "Sum")),
            "precomp_enc_type": _IMAGE_ENCODER,
        },
    ),
    Entry(
        "dual",
        "DualEncoder",
        "dual_encoder:DualEncoder",
        "none",
        "the cosine of the mean region and the mean word, to hold the others against",
        ("system", "DualEncoder"),
    ),
)
CATALOGUE = {row.name: row for row in _ROWS}
# Pair scorers without a model: name -> module and class, options. Their models have other encoders than ours.
_ALIGNMENT = (
    "maxsim:Alignment",
    {"aggregation": Option("MrSw", choices=("MrSw", "MwSr", "symm", "MrAVGw"))},
)
ALONE: dict[str, tuple[str, dict[str, Option]]] = {
    "gsmn": (
        "gsmn:StructuredMatching",
        {
            "num_block": Option(16, least=1, most=MOST),
            "lambda_softmax": Option(20.0, above=0),
            "is_sparse": Option(False),
        },
    ),
    "laps": ("maxsim:MaxMean", {"i2t": Option(True), "scan": Option(True)}),
    "laps_slim": (
        "laps:SlimmedMaxMean",
        {
            "embed_size": size(1024, "", "D"),
            "num_patches": Option(196, least=1, most=MOST),
            "sparse_ratio": Option(0.5, above=0, most=1),
            "aggr_ratio": Option(0.4, above=0, most=1),
            "has_cls": Option(True),
        },
    ),
    "teran": _ALIGNMENT,
    "aladin": _ALIGNMENT,
}
