# ---
# title: "Lab: deep nets"
# description: Forty layers, and what lets them learn, changed one thing at a time.
# requires: [foundations/linear, attention/residual]
# needs: [scikit-learn, matplotlib, tqdm]
# ---

# %% [markdown]
# # Lab: deep nets
#
# A network of forty layers has to learn scikit-learn's handwritten digits. As `nn.Linear` starts it, it learns nothing. Larger first weights, normalization and residual connections each let the gradient through to the first layer. Yet a gradient that arrives isn't enough: with larger weights and normalization together, forty layers still learn far worse than ten. Residual connections are what lets forty layers learn.
#
# ## The task

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tqdm import tqdm

from snippets.attention.residual import Residual
from snippets.foundations.linear import kaiming_uniform_bound

torch.set_default_dtype(torch.float64)  # the same numbers on every processor
pixels, classes = load_digits(return_X_y=True)
images, classes = torch.tensor(pixels) / 16, torch.tensor(classes)  # (1797, 64)
torch.manual_seed(0)
order = torch.stack([torch.randperm(len(images)) for _ in range(5)])  # a row a seed
training, validation, test = order.split([600, 300, 897], dim=1)
sizes = [part.shape[1] for part in (training, validation, test)]
print("{} to learn from, {} to choose the rate by, {} to test on".format(*sizes))

# %% [markdown]
# ## The network, and what can be switched on
#
# A layer is an activation and a matrix of 32 by 32. A [residual connection](../attention/residual.md) goes around each layer; normalization scales what the layer reads. The first weights are one draw, times one of three factors: [`nn.Linear`'s](../foundations/linear.md) has the variance $1/(3n)$ for $n$ inputs, Glorot's, in a square layer, $1/n$, and He's $2/n$. There are no biases. Five networks, a seed each, are trained side by side.

# %%
leaks = {"nn.Linear": 5**0.5, "Glorot": 1.0, "He": 0.0}  # the a of He's formula


def start(depth, weights):
    """First, deep and last weights of five networks."""
    torch.manual_seed(1)
    drawn = []
    for shape in ((64, 32), (depth, 32, 32), (32, 10)):
        bound = kaiming_uniform_bound(shape[-2], leaks[weights])
        drawn.append(torch.empty(5, *shape).uniform_(-bound, bound))
    return drawn


def layer(x, weight, norm, activation):
    return activation(F.layer_norm(x, x.shape[-1:]) if norm else x) @ weight


def states(net, x, norm=False, skip=False, activation=torch.relu):
    """What enters the first layer and leaves each one, (..., 32), and the logits."""
    first, deep, last = net
    held = [x @ first]
    for weight in deep.unbind(-3):
        branch = lambda x, w=weight: layer(x, w, norm, activation)  # noqa: E731
        held.append((Residual(branch) if skip else branch)(held[-1]))
    return held, layer(held[-1], last, norm, activation)  # (..., 10)


def losses(logits, digits):
    """Cross-entropy of each network: (..., 5, N, 10) to (..., 5)."""
    right = classes[digits].expand(logits.shape[:-1])[..., None]
    return -logits.log_softmax(dim=-1).gather(-1, right).mean(dim=(-2, -1))


torch.testing.assert_close(start(40, "Glorot")[1], 3**0.5 * start(40, "nn.Linear")[1])
torch.testing.assert_close(start(40, "He")[1], 6**0.5 * start(40, "nn.Linear")[1])

# %% [markdown]
# ## What reaches the first layer
#
# Before any training, the loss is differentiated with respect to the state behind each layer. The figure shows its length, compared with that at the last layer.

# %%
settings = {
    "nn.Linear": ("nn.Linear", {}),
    "Glorot": ("Glorot", {}),
    "He": ("He", {}),
    "normalization": ("nn.Linear", {"norm": True}),
    "residual": ("nn.Linear", {"skip": True}),
    "He, normalization": ("He", {"norm": True}),
    "He, residual": ("He", {"skip": True}),
    "all three": ("He", {"norm": True, "skip": True}),
}


def arriving(weights, depth=40, **options):
    """Powers of ten by which the gradient changes down to each state: (depth + 1, 5)."""
    x, digits = images[training].requires_grad_(), training
    held, logits = states(start(depth, weights), x, **options)
    found = torch.autograd.grad(losses(logits, digits).sum(), held)
    sizes = torch.stack([gradient.norm(dim=(1, 2)) for gradient in found])
    return (sizes / sizes[-1]).log10()


arrives = {name: arriving(w, **options) for name, (w, options) in settings.items()}
for weights in ("nn.Linear", "Glorot"):
    arrives[f"tanh, {weights}"] = arriving(weights, activation=torch.tanh)
print(f"{'':20} power of ten of what arrives")
for name, powers in arrives.items():
    print(f"{name:20} {powers[0].mean():6.1f} ± {powers[0].std():.1f}")

for name, share in {"nn.Linear": 1 / 6, "Glorot": 1 / 2, "He": 1}.items():
    assert abs(arrives[name][0].mean() - 40 * math.log10(share) / 2) < 1.2
for name in ("He", "normalization", "He, normalization", "all three"):
    assert arrives[name][0].abs().max() < 2
assert arrives["residual"][0].min() > 0 and arrives["residual"][0].max() < 3
assert arrives["He, residual"][0].min() > 5
assert arrives["tanh, nn.Linear"][0].max() < -7
assert arrives["tanh, Glorot"][0].abs().max() < 2

# %% name="gradients" lead="yes" alt="Length of the gradient behind each of forty layers, on a logarithmic scale, in straight lines from the last layer down to the first. With nn.Linear's weights it falls to the bottom of the chart, with Glorot's less than half as far. With He's weights it stays level. Residual connections let it rise a little; with He's weights on top it rises far." caption="The gradient on its way from the last layer, on the right, to the first, before training. Mean of five networks."
_, axes = plt.subplots(figsize=(560 / 72, 300 / 72))
shown = {
    "He, residual": "--",
    "residual": "-",
    "He": ":",
    "Glorot": "-.",
    "nn.Linear": "-",
}
for name, dash in shown.items():
    axes.plot(range(41), arrives[name].mean(dim=1), ls=dash, label=name)
axes.set(xlabel="behind layer", ylabel="power of ten", xlim=(0, 40))
axes.legend(loc="lower right")

# %% [markdown]
# A ReLU layer passes on half of the mean square. So He's factor keeps the gradient level, Glorot's halves its square at each layer, and `nn.Linear`'s leaves a sixth; forty times over, that is what the table shows. For tanh, Glorot's weights are right. With residual connections the small weights of `nn.Linear` are, and He's blow the gradient up.
#
# ## Forty layers, trained
#
# Gradient descent with momentum 0.9 takes 150 steps on 64 digits each, with four learning rates, a factor of ten apart. The rate that gets the most validation digits right counts.

# %%
rates = (1e-4, 1e-3, 1e-2, 1e-1)


def train(depth, weights, rates, steps, **options):
    """Trained networks: five for each learning rate, (rates, 5, ...)."""
    net = [w.expand(len(rates), *w.shape).clone() for w in start(depth, weights)]
    speeds = [torch.zeros_like(w) for w in net]
    torch.manual_seed(2)
    for _ in range(steps):
        batch = training[:, torch.randint(600, (64,))]  # (5, 64)
        net = [w.requires_grad_() for w in net]
        loss = losses(states(net, images[batch], **options)[1], batch).sum()
        gradients = torch.autograd.grad(loss, net)
        net = [w.detach() for w in net]
        for w, speed, gradient in zip(net, speeds, gradients, strict=True):
            speed.mul_(0.9).add_(gradient)
            for n, rate in enumerate(rates):
                w[n] -= rate * speed[n]
    return net


def accuracies(net, digits, **options):
    _, logits = states(net, images[digits], **options)
    return (logits.argmax(dim=-1) == classes[digits]).double().mean(dim=-1)


def measure(depth, weights, rates=rates, steps=150, **options):
    """Best rate, and of its five networks training loss and test accuracy."""
    net = train(depth, weights, rates, steps, **options)
    best = accuracies(net, validation, **options).mean(dim=1).argmax()
    net = [part[best] for part in net]
    loss = losses(states(net, images[training], **options)[1], training)
    return rates[best], loss, accuracies(net, test, **options)


found = {}
for name, (weights, options) in tqdm(settings.items()):
    if name != "He, residual":  # its gradient explodes
        found[name] = measure(40, weights, **options)
print(f"{'':20} rate     training loss   test accuracy")
for name, (rate, loss, right) in found.items():
    print(
        f"{name:20} {rate:<8} {loss.mean():.2f} ± {loss.std():.2f}"
        f"     {right.mean():.2f} ± {right.std():.2f}"
    )

chance = math.log(10)
for name in ("nn.Linear", "Glorot"):
    assert (found[name][1] - chance).abs().max() < 0.05
assert found["residual"][2].mean() > 0.5
assert found["all three"][2].mean() > 0.85
for name in ("He", "normalization", "He, normalization"):
    assert found[name][1].mean() < chance - 0.02 and found[name][2].mean() < 0.4

# %% [markdown]
# Of the single changes, only the residual connections make forty layers useful in this time. Where the gradient arrives by He's weights or by normalization, learning has begun, slowly. The normalized network's best rate is the smallest tried; with He's weights it is not, and the result is no better.
#
# ## Fewer layers, more steps
#
# Is it the depth? The network with He's weights and normalization has a level gradient at any depth. It is trained with ten layers, with and without the residual connections. Is it the time? Without them it is trained once more, three times as long.

# %%
depths, long = (10, 40), 450
plain, skips, longer = {}, {}, {}
for depth in tqdm(depths):
    for runs, name in ((plain, "He, normalization"), (skips, "all three")):
        weights, options = settings[name]
        runs[depth] = found[name] if depth == 40 else measure(depth, weights, **options)
    rate = plain[depth][0]
    longer[depth] = measure(depth, "He", rates=(rate,), steps=long, norm=True)
curves = {"plain": plain, "residual": skips}
print("training loss  10 layers     40 layers")
for name, runs in curves.items():
    cells = (f"{loss.mean():.2f} ± {loss.std():.2f}" for _, loss, _ in runs.values())
    print(f"{name:14}", "   ".join(cells))
learned = {depth: int((loss < 0.3).sum()) for depth, (_, loss, _) in longer.items()}
for depth, count in learned.items():
    print(f"{depth} plain layers, {long} steps: loss below 0.3 in {count} of 5")

assert plain[10][1].max() < 0.6 and plain[40][1].min() > 1.5
assert learned == {10: 5, 40: 0}
for depth in depths:
    assert skips[depth][1].mean() < plain[depth][1].mean() / 2
assert skips[40][1].max() < plain[10][1].min()
assert skips[40][2].mean() < skips[10][2].mean() + 0.01  # no gain in accuracy

# %% [markdown]
# With residual connections, forty layers learn more in 150 steps than ten layers learn without. Those ten learn the training digits in 450 steps, all five networks. Of the plain networks of forty layers none does, though the gradient arrives. That is slow learning, no proof of a limit. What happens in 450 steps is only counted: so long a training depends on how a processor rounds.
#
# ## Set against the papers


# %% results="yes"
def span(values, digits=2):
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


rows = [
    (
        "plain networks with normalization, training loss with 10 and with 40 layers",
        "He et al. 2015 (Deep Residual Learning), fig. 1 and §4.1",
        "CIFAR-10: 56 layers have a higher training error than 20; "
        "on ImageNet 3 times the steps did not change that",
        "; ".join(span(loss) for _, loss, _ in plain.values())
        + f"; in {long} steps {learned[10]} and {learned[40]} of 5 are below 0.3",
    ),
    (
        "the same with residual connections, test error",
        "He et al. 2015 (Deep Residual Learning), table 6",
        "CIFAR-10: 8.75 % with 20 layers, 6.97 % with 56, 6.43 % with 110",
        "; ".join(f"{span(100 - 100 * right, 1)} %" for _, _, right in skips.values())
        + " with 10 and 40 layers",
    ),
    (
        "deep ReLU networks from Glorot's and from He's weights, training loss",
        "He et al. 2015 (Delving Deep), fig. 3",
        "30 layers: from Glorot's the learning stalls, from He's it converges",
        f"40 layers: {span(found['Glorot'][1])} "
        f"and {span(found['He'][1])}; chance is {chance:.2f}",
    ),
    (
        "tanh, gradient at the first of 40 layers, power of ten",
        "Glorot and Bengio 2010, fig. 7",
        "5 layers: smaller from layer to layer with the usual weights "
        "(nn.Linear's), not with theirs",
        f"{span(arrives['tanh, nn.Linear'][0], 1)} with the usual ones, "
        f"{span(arrives['tanh, Glorot'][0], 1)} with theirs",
    ),
]
print("| What | Paper | There | Here | Seeds |")
print("| --- | --- | --- | --- | --- |")
for cells in rows:
    print("| " + " | ".join(cells) + " | 5 |")

# %% [markdown]
# Deeper plain networks train worse, and more steps don't make up for it: that agrees. That depth wins accuracy once there are residual connections does not reproduce: on 600 digits, in 150 steps, forty layers are no better than ten. From Glorot's weights the learning stalls; from He's it has only begun.
#
# The papers normalize over the batch and train convolutions; this lab normalizes over the features and has none.
#
# ## Sources
#
# - K. He, X. Zhang, S. Ren, J. Sun, *Deep Residual Learning for Image Recognition*, 2015, [arXiv:1512.03385](https://arxiv.org/abs/1512.03385).
# - K. He, X. Zhang, S. Ren, J. Sun, *Delving Deep into Rectifiers*, 2015, [arXiv:1502.01852](https://arxiv.org/abs/1502.01852).
# - X. Glorot, Y. Bengio, [*Understanding the difficulty of training deep feedforward neural networks*](https://proceedings.mlr.press/v9/glorot10a.html), 2010, AISTATS.
