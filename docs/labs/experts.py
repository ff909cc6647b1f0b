# ---
# title: "Lab: experts"
# description: Experts balanced or left alone, one or many, and what each is used for.
# requires: [moe/experts, moe/load-balancing, moe/specialization]
# needs: [scikit-learn, matplotlib, tqdm]
# ---

# %% [markdown]
# # Lab: experts
#
# Eight experts share a task that is too much for one. Left alone, five of them get hardly any tokens, and the network reads fewer digits right. With the balance loss all eight work. Where the task is easy, the idle ones aren't missed. Eight experts cost a fifth more operations than one and read far more; a dense network with as many parameters reads still more, for six times the operations.
#
# ## The task
#
# Eight people name scikit-learn's digits, and what one calls 3 another calls 7. A token is the 64 pixels of a digit, and who is asked, as eight zeros and ones. The answer is the name that this person gives. With one person the task is easy; that is the control.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from snippets.moe.layer import MoELayer
from snippets.moe.load_balancing import expert_load, load_balancing_loss

torch.set_default_dtype(torch.float64)  # the same numbers on every processor
pixels, digits = load_digits(return_X_y=True)
images, digits = torch.tensor(pixels) / 16, torch.tensor(digits)  # (N, 64), (N,)


def draw_data(seed, people):
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    names = torch.stack([torch.randperm(10) for _ in range(people)])
    return order[:1000], order[1000:], names  # to learn from, to test on


def ask(rows, who, names):
    tokens = torch.cat((images[rows], F.one_hot(who, len(names))), dim=1)
    return tokens, names[who, digits[rows]]


# %% [markdown]
# ## The networks
#
# A layer of $E$ experts with 16 hidden features each, then a linear classifier. Each token visits one expert ($k = 1$, as in Switch). The *dense* network has in the layer's place one network with $16 E$ hidden features, as many as all experts together. Adam takes 200 steps. In each, every digit is put to somebody drawn at random; in the test, new digits are put to everybody. $\alpha$ is the factor of the balance loss.


# %%
def train(seed, num_experts, alpha, people=8, sparse=True, steps=200):
    """A network's accuracy, cost and choice of experts on new digits."""
    learn, test, names = draw_data(seed, people)
    d_model, d_hidden = 64 + people, 16
    if sparse:
        layer = MoELayer(d_model, d_hidden, num_experts, top_k=1, renormalize=False)
    else:
        d_hidden *= num_experts
        up, down = nn.Linear(d_model, d_hidden), nn.Linear(d_hidden, d_model)
        layer = nn.Sequential(up, nn.ReLU(), down)
    head = nn.Linear(d_model, 10)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.02)
    for _ in range(steps):
        x, y = ask(learn, torch.randint(people, (len(learn),)), names)
        out, logits = layer(x) if sparse else (layer(x), None)
        loss = F.cross_entropy(head(out), y)
        if alpha:
            loss = loss + alpha * load_balancing_loss(logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows, who = test.repeat(people), torch.arange(people).repeat_interleave(len(test))
    x, y = ask(rows, who, names)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out, logits = layer(x) if sparse else (layer(x), None)
    found = {
        "accuracy": (head(out).argmax(dim=1) == y).double().mean().item(),
        "operations": counter.get_total_flops() / len(x),
        "parameters": sum(p.numel() for p in layer.parameters()),
    }
    if sparse:
        expert = logits.argmax(dim=1)
        load = expert_load(expert, num_experts) * num_experts  # 1: an even share
        found |= {"load": load.sort(descending=True).values}
        found |= {"expert": expert, "digit": digits[rows], "who": who}
    return found


def five(*given, **options):
    """What `train` finds, for five seeds each."""
    runs = [train(seed, *given, **options) for seed in range(5)]
    return {key: [run[key] for run in runs] for key in runs[0]}


def show(values, form=".3f"):
    values = torch.tensor([float(value) for value in values])
    return f"{values.mean():{form}} ± {values.std():{form}}"


def mean(values):
    return sum(map(float, values)) / len(values)


# %% [markdown]
# ## With and without the balance loss
#
# An expert with less than a tenth of an even share of the test tokens counts as dead.

# %%
runs = {}
for people, alpha in tqdm([(8, 0.0), (8, 0.01), (8, 0.1), (1, 0.0), (1, 0.1)]):
    runs[people, alpha] = five(8, alpha, people)


def dead(found):
    return [(load < 0.1).sum().item() for load in found["load"]]


def busiest(found):
    return [load.max().item() for load in found["load"]]


print("people  alpha   accuracy        dead of 8   busiest, times an even share")
for (people, alpha), found in runs.items():
    print(
        f"{people:6}  {alpha:<5}   {show(found['accuracy'])}   {show(dead(found), '.1f')}"
        f"   {show(busiest(found), '.1f')}"
    )
alone, little, balanced = (runs[8, alpha] for alpha in (0.0, 0.01, 0.1))
assert mean(dead(alone)) > 4 and mean(dead(little)) > 1 and mean(dead(balanced)) < 0.5
assert mean(balanced["accuracy"]) > mean(alone["accuracy"]) + 0.03
easy = mean(runs[1, 0.1]["accuracy"]) - mean(runs[1, 0.0]["accuracy"])
assert abs(easy) < 0.02 and mean(dead(runs[1, 0.0])) > 4

# %% name="load" lead="yes" alt="The share of the tokens of each of eight experts, the busiest first. Without the balance loss the first has several times an even share and the last five next to nothing. With a factor of 0.01 the curve is flatter, and still falls to nothing. With 0.1 it stays close to an even share." caption="Tokens of each expert, the busiest first, as multiples of an even share (thin line), with eight people. Mean and standard deviation over five seeds."
_, axes = plt.subplots(figsize=(560 / 72, 270 / 72))
for n, alpha in enumerate((0.0, 0.01, 0.1)):
    load = torch.stack(runs[8, alpha]["load"])  # (5, E)
    axes.errorbar(
        torch.arange(1, 9) + 0.08 * (n - 1),
        load.mean(dim=0),
        load.std(dim=0),
        marker="osD"[n],
        ls=("-", "--", ":")[n],
        label=f"α = {alpha:g}",
    )
axes.axhline(1, color="C4", lw=1)
axes.set(xlabel="expert, the busiest first", ylabel="share, 1 is even", ylim=(0, None))
axes.legend()

# %% [markdown]
# With eight people, $\alpha = 0.1$ is the smallest of the three that keeps all experts, and is used from here on. Without the loss five of eight die, and the network reads fewer names right. With a tenth of the factor three die, and nobody misses them; with one person nearly all do, and nobody misses those either.
#
# ## More experts
#
# `FlopCounterMode` counts the multiplications and additions of matrix products.

# %%
numbers = (1, 2, 4, 8, 16)
sparse = {n: balanced if n == 8 else five(n, 0.1) for n in tqdm(numbers)}
dense = {n: five(n, 0.0, sparse=False) for n in tqdm(numbers)}
print("              experts                                   dense")
print(" E  parameters   operations  accuracy         operations  accuracy")
for n in numbers:
    few, all_of = sparse[n], dense[n]
    print(
        f"{n:2} {few['parameters'][0]:11} {few['operations'][0]:12.0f}"
        f"  {show(few['accuracy'])} {all_of['operations'][0]:13.0f}"
        f"  {show(all_of['accuracy'])}"
    )
gain = mean(sparse[8]["accuracy"]) - mean(sparse[1]["accuracy"])
more = sparse[8]["operations"][0] / sparse[1]["operations"][0]
assert gain > 0.1 and more < 1.25
assert all(mean(dense[n]["accuracy"]) > mean(sparse[n]["accuracy"]) for n in (4, 8, 16))
assert dense[8]["operations"][0] > 6 * sparse[8]["operations"][0]

# %% name="experts" alt="Accuracy over operations for each token. The curve of the experts climbs almost straight up from one expert to four and then bends to the right, level. That of the dense networks climbs to the right and ends higher." caption="Accuracy on new digits against operations for each token, with one to sixteen experts and with dense networks as large. Mean and standard deviation over five seeds."
_, axes = plt.subplots(figsize=(560 / 72, 290 / 72))
for n, (name, found) in enumerate({"experts": sparse, "dense": dense}.items()):
    accuracy = torch.tensor([found[E]["accuracy"] for E in numbers])  # (5, 5)
    axes.errorbar(
        [found[E]["operations"][0] for E in numbers],
        accuracy.mean(dim=1),
        accuracy.std(dim=1),
        marker="os"[n],
        ls=("-", "--")[n],
        label=name,
    )
axes.set(xscale="log", xlabel="operations for each token", ylabel="accuracy")
axes.set_xticks([5000, 10000, 20000, 50000], ["5,000", "10,000", "20,000", "50,000"])
axes.minorticks_off()
axes.legend(loc="lower right")

# %% [markdown]
# Parameters grow with $E$, operations only with the router's part. The same parameters in a dense network read more. From eight experts to sixteen there is no gain in 200 steps; more steps weren't tried.
#
# ## What an expert is used for
#
# How many bits the chosen expert tells about the digit, and about who is asked; beside it the largest of 20 shuffles, which is chance.


# %%
def bits(a, b):
    """Mutual information of two classifications (N,)."""
    p = torch.zeros(int(a.max()) + 1, int(b.max()) + 1)
    p.index_put_((a, b), torch.tensor(1 / len(a)), accumulate=True)
    q = p.sum(dim=1, keepdim=True) * p.sum(dim=0)
    return (p * (p / q).log2()).nansum().item()


def told(found, key):
    return [bits(*pair) for pair in zip(found["expert"], found[key], strict=True)]


def chance(found, key):
    torch.manual_seed(0)
    pairs = zip(found["expert"], found[key], strict=True)
    return max(
        bits(expert, classes[torch.randperm(len(classes))])
        for expert, classes in pairs
        for _ in range(20)
    )


used = {
    "untrained": five(8, 0.0, steps=0),
    "α = 0": alone,
    "α = 0.1": balanced,
    "16 experts": sparse[16],
}
print("             the digit             who is asked")
for name, found in used.items():
    cells = [
        f"{show(told(found, key), '.1f')}, chance {chance(found, key):.2f}"
        for key in ("digit", "who")
    ]
    print(f"{name:10}   {'   '.join(cells)}")
    for key in ("digit", "who"):
        assert chance(found, key) < 0.05
most = math.log2(8)
print(f"at most {most:.0f} bits with 8 experts")
gains = [
    mean(told(balanced, key)) - mean(told(used["untrained"], key))
    for key in ("digit", "who")
]
assert gains[0] > 0.5 and gains[1] > 0.2

# %% [markdown]
# Trained and balanced experts specialize in both, more in what a token looks like than in whom it is for. Nothing in the loss asks for either.
#
# ## Set against the papers

# %% results="yes"
rows = [
    (
        "the busiest expert, times an even share, and the quality, without and with the loss",
        "Shazeer et al. 2017, table 6",
        "17.8, then 1.14; perplexity 39.8, then 35.6",
        f"{show(busiest(alone), '.1f')}, then {show(busiest(balanced), '.1f')}; accuracy "
        f"{show(alone['accuracy'], '.2f')}, then {show(balanced['accuracy'], '.2f')}",
    ),
    (
        "more experts at nearly the same operations",
        "Fedus et al. 2021 (Switch), §3.1",
        "64 experts reach T5-Base's quality in 7.5 times fewer steps",
        f"8 for 1: {more:.2f} times the operations, accuracy "
        f"{show(sparse[1]['accuracy'], '.2f')}, then {show(sparse[8]['accuracy'], '.2f')}",
    ),
    (
        "what the choice of an expert tells",
        "Jiang et al. 2024 (Mixtral), §5",
        "no obvious patterns by topic; some by syntax",
        f"{show(told(balanced, 'digit'), '.1f')} bits about the digit, "
        f"{show(told(balanced, 'who'), '.1f')} about who is asked",
    ),
]
print("| What | Paper | There | Here | Seeds |")
print("| --- | --- | --- | --- | --- |")
for cells in rows:
    print("| " + " | ".join(cells) + " | 5 |")

# %% [markdown]
# The need for the balance loss reproduces, where one expert is too few; so does capacity at a constant cost, up to eight experts. Mixtral's finding doesn't: in this task the experts take sides by digit and by person.
#
# ## Sources
#
# - N. Shazeer et al., *Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer*, 2017, [arXiv:1701.06538](https://arxiv.org/abs/1701.06538), appendix A.
# - W. Fedus, B. Zoph, N. Shazeer, *Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity*, 2021, [arXiv:2101.03961](https://arxiv.org/abs/2101.03961).
# - A. Q. Jiang et al., *Mixtral of Experts*, 2024, [arXiv:2401.04088](https://arxiv.org/abs/2401.04088).
