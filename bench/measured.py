# Written by make bench: torch 2.13.0+cpu, one thread.
beside = [  # ours, theirs, the time of ours over that of theirs
    ("MultiHeadAttention", "nn.MultiheadAttention", 0.85),
    ("TransformerBlock", "nn.TransformerEncoderLayer", 0.94),
    ("AdamW", "torch.optim.AdamW", 0.98),
    ("MoELayer", "MixtralSparseMoeBlock", 0.89),
    ("scaled_dot_product_attention", "torch's, fused", 2.59),
    ("its core, in three lines", "torch's, fused", 1.21),
]
tokens = [64, 256, 1024]
recomputing_over_cache = [2.2, 5.9, 33.1]
experts = [4, 8, 16, 32, 64]
parameters = [1.0, 2.0, 4.0, 8.0, 16.0]
sparse = [1.01, 1.18, 1.34, 1.81, 2.77]
dense = [0.99, 1.88, 3.56, 6.92, 14.33]
