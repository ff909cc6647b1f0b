"""How fast the snippets are, beside torch's and transformers' own: ratios, never times.

    python -m bench.speed

Two programs run in turn, many times, on one thread, and the median of the pairs' ratios
is kept: what else the machine does hits both. Writes bench/measured.py, which the page
on speed shows. Fails where a snippet is slower than its limit below.
"""

import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from snippets.attention.dot_product import scaled_dot_product_attention
from snippets.attention.multi_head import MultiHeadAttention
from snippets.attention.transformer_block import TransformerBlock
from snippets.kv_cache.cache import DecoderLM, generate
from snippets.moe.layer import MoELayer, moe_parameter_counts
from snippets.regularization.l2 import AdamW

MEASURED = Path(__file__).with_name("measured.py")
TOKENS = [64, 256, 1024]
EXPERTS = [4, 8, 16, 32, 64]


def ratio(ours, theirs, pairs: int = 31) -> float:
    """The median of time(ours) / time(theirs), one after the other."""
    found = []
    for _ in range(pairs + 1):
        times = []
        for program in (ours, theirs):
            start = time.perf_counter()
            program()
            times.append(time.perf_counter() - start)
        found.append(times[0] / times[1])
    return statistics.median(found[1:])  # the first pair warms up


def trained(module, x):
    """One step's work, forward and backward."""

    def program():
        out = module(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    return program


def attention():
    q, k, v = (torch.randn(8, 4, 128, 32) for _ in range(3))
    return (
        lambda: scaled_dot_product_attention(q, k, v),
        lambda: F.scaled_dot_product_attention(q, k, v),
    )


def attention_in_three_lines():
    q, k, v = (torch.randn(8, 4, 128, 32) for _ in range(3))
    return (
        lambda: (q @ k.mT / math.sqrt(32)).softmax(dim=-1) @ v,
        lambda: F.scaled_dot_product_attention(q, k, v),
    )


def multi_head():
    x = torch.randn(8, 128, 128)
    ours = MultiHeadAttention(128, 4)
    theirs = nn.MultiheadAttention(128, 4, batch_first=True)
    return trained(ours, x), trained(lambda x: theirs(x, x, x, need_weights=False), x)


def block():
    x = torch.randn(8, 128, 128)
    theirs = nn.TransformerEncoderLayer(
        128, 4, 512, dropout=0.0, batch_first=True, norm_first=True
    )
    return trained(TransformerBlock(128, 4, 512), x), trained(theirs, x)


def adamw():
    def stepping(optimizer):
        parameters = [nn.Parameter(torch.randn(256, 256)) for _ in range(10)]
        for parameter in parameters:
            parameter.grad = torch.randn(256, 256)
        return optimizer(parameters, lr=1e-4).step

    return stepping(AdamW), stepping(torch.optim.AdamW)


def mixture():
    from transformers import MixtralConfig
    from transformers.models.mixtral import modeling_mixtral

    # Mixtral's experts have three matrices, ours two: as many weights, 2/3 as wide.
    config = MixtralConfig(
        hidden_size=128,
        intermediate_size=256,
        num_local_experts=8,
        num_experts_per_tok=2,
        experts_implementation="grouped_mm",  # the fastest of theirs
    )
    x = torch.randn(8, 64, 128)
    theirs = modeling_mixtral.MixtralSparseMoeBlock(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    return trained(MoELayer(128, 384, 8, 2), x), trained(theirs, x)


BESIDE = [  # ours, theirs, both programs, at most so many times as slow
    ("MultiHeadAttention", "nn.MultiheadAttention", multi_head, 1.0),
    ("TransformerBlock", "nn.TransformerEncoderLayer", block, 1.0),
    ("AdamW", "torch.optim.AdamW", adamw, 1.0),
    ("MoELayer", "MixtralSparseMoeBlock", mixture, 1.0),
    ("scaled_dot_product_attention", "torch's, fused", attention, None),
    ("its core, in three lines", "torch's, fused", attention_in_three_lines, None),
]


def recomputing_over_cache() -> list[float]:
    """Time to generate without a cache over the time with one, by new tokens."""
    model = DecoderLM(100, 128, 4, 4, 1040).eval()
    prompt = torch.randint(100, (1, 16))
    return [
        ratio(
            lambda n=n: generate(model, prompt, n, use_cache=False),
            lambda n=n: generate(model, prompt, n),
            pairs,
        )
        for n, pairs in zip(TOKENS, (9, 5, 1), strict=True)
    ]


def over_the_fewest_experts(dense: bool) -> list[float]:
    """Time of the layer over its time with the fewest experts, by their number."""
    x = torch.randn(1024, 64)

    def program(experts):
        layer = MoELayer(64, 256, experts, top_k=2).eval()

        def all_of_them():
            weights = layer.router.gate(x).softmax(dim=-1)  # (N, E)
            outputs = torch.stack([expert(x) for expert in layer.experts], dim=1)
            (weights[..., None] * outputs).sum(dim=1)

        return torch.no_grad()(all_of_them if dense else lambda: layer(x))

    fewest = program(EXPERTS[0])
    return [ratio(program(experts), fewest) for experts in EXPERTS]


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    beside = [
        (ours, theirs, round(ratio(*programs()), 2))
        for ours, theirs, programs, _ in BESIDE
    ]
    total = [moe_parameter_counts(64, 256, n, 2)[0] for n in EXPERTS]
    measured = {
        "tokens": TOKENS,
        "recomputing_over_cache": [round(r, 1) for r in recomputing_over_cache()],
        "experts": EXPERTS,
        "parameters": [round(count / total[0], 1) for count in total],
        "sparse": [round(r, 2) for r in over_the_fewest_experts(dense=False)],
        "dense": [round(r, 2) for r in over_the_fewest_experts(dense=True)],
    }
    lines = [f"# Written by make bench: torch {torch.__version__}, one thread."]
    lines += ["beside = [  # ours, theirs, the time of ours over that of theirs"]
    lines += [f'    ("{a}", "{b}", {r}),' for a, b, r in beside] + ["]"]
    lines += [f"{name} = {value}" for name, value in measured.items()]
    MEASURED.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")
    slow = [
        f"{ours}: {found} × the time of {theirs}, at most {limit}"
        for (ours, theirs, found), (*_, limit) in zip(beside, BESIDE, strict=True)
        if limit and found > limit
    ]
    print(*slow, sep="\n")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
