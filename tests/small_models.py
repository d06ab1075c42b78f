"""Every architecture, narrow and shallow: what makes a published variant small enough to run often."""

PYRAMID = dict(depths=[1, 2, 1, 1], img_size=64)
METAFORMER = dict(embed_dims=[16, 16, 32, 32], depths=[2, 1, 1, 1], img_size=64, head_dim=8)
SMALL = {
    "deit": ("deit_tiny_patch16_224", dict(embed_dim=32, num_heads=2, depth=2, img_size=64)),
    "evit": (
        "evit_small_r07_fuse",
        dict(embed_dim=32, num_heads=2, depth=4, drop_loc=[1, 2], img_size=96),
    ),
    "evit without fusion": (
        "evit_small_r07_drop",
        dict(embed_dim=32, num_heads=2, depth=4, drop_loc=[1, 2], img_size=96),
    ),
    "dhvt": ("dhvt_tiny_cifar_patch4", dict(embed_dim=32, num_heads=2, depth=2, img_size=32)),
    "dilateformer": (
        "dilateformer_tiny",
        PYRAMID | dict(embed_dim=24, num_heads=[3, 6, 6, 6], img_size=60),
    ),
    "dfvt": (
        "dfvt_tiny",
        PYRAMID | dict(embed_dim=16, num_heads=[1, 2, 2, 2], window_size=3),
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        PYRAMID | dict(embed_dim=16, num_heads=[1, 2, 2, 2], window_size=3),
    ),
    "swinv2": (
        "swinv2_tiny_patch4_window8_256",
        PYRAMID | dict(embed_dim=16, num_heads=[1, 2, 2, 2], window_size=4),
    ),
    "pvt": (
        "pvt_tiny_256",
        PYRAMID | dict(embed_dims=[16, 16, 32, 32], num_heads=[1, 1, 2, 2]),
    ),
    "dfformer": ("dfformer_s18", METAFORMER),
    "cdfformer": ("cdfformer_s18", METAFORMER),
    "gfformer": ("gfformer_s18", METAFORMER),
    "afno": ("dfformer_s18_afno", METAFORMER),
    "mixed": (
        "dfformer_s18",
        METAFORMER
        | dict(
            mixers=["dilated", "shifted_window(window_size=3)", "spatial_reduction", "head_token"],
            feed_forward="daff",
        ),
    ),
    "swin_mlp": (
        "swin_mlp_tiny_c6_patch4_window8_256",
        PYRAMID | dict(embed_dim=16, num_heads=[1, 2, 2, 2], window_size=4),
    ),
    "dpvt": (
        "dpvt_tiny_256",
        PYRAMID | dict(embed_dims=[16, 16, 32, 32], num_heads=[1, 1, 2, 2]),
    ),
    "deit_dge": (
        "deit_dge_s124_tiny_patch16_256",
        dict(embed_dim=32, num_heads=2, depth=2, img_size=96),
    ),
    "pvt_dge": (
        "pvt_dge_s124_tiny_256",
        PYRAMID | dict(embed_dims=[16, 16, 32, 32], num_heads=[1, 1, 2, 2]),
    ),
}
