# ---
# title: "Lab: test-time scaling"
# description: What more samples are worth, when votes, judges or the truth pick.
# requires: [test-time/best-of-n, test-time/adaptive-compute, test-time/temperature]
# needs: [matplotlib, tqdm]
# ---

# %% [markdown]
# # Lab: test-time scaling
#
# A model that samples can be asked many times. Here five small networks add up numbers step by step, right in about half of the cases, and each problem gets up to 256 samples. One of them is nearly always right, as the binomial law says. What remains of that depends on who picks: votes help only if the ways of adding differ, a judge that errs at random has a ceiling, and a trained judge is fooled the more it sees. A vote that stops when it is sure needs half of the samples.
#
# ## The task
#
# A network adds one digit to a running total. Of the 540 sums below it learns six in ten, and guesses the others. A problem has two to six numbers, so its answer is a chain of such steps, in which each can fail.

# %%
import itertools
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from snippets.test_time.adaptive_compute import adaptive_majority_vote
from snippets.test_time.best_of_n import best_of_n, majority_vote, pass_at_k
from snippets.test_time.temperature import sample, softmax_with_temperature

torch.set_default_dtype(torch.float64)  # the same numbers on every processor
dice = [torch.Generator().manual_seed(seed) for seed in range(5)]  # five networks


def one_hot(*digits):  # (...) each, to (..., 10 for each)
    return F.one_hot(torch.stack(digits, dim=-1), 10).flatten(-2).double()


def layers(*widths):
    """Weights (5, in, out) and biases (5, 1, out) of five networks."""
    made = []
    for n, m in itertools.pairwise(widths):
        drawn = [torch.empty(n, m).uniform_(-1, 1, generator=g) / n**0.5 for g in dice]
        made += [torch.stack(drawn), torch.zeros(5, 1, m)]
    return [tensor.requires_grad_() for tensor in made]


def forward(network, x):  # (5, N, in) to (5, N, out)
    W1, b1, W2, b2 = network
    return torch.baddbmm(b2, torch.baddbmm(b1, x, W1).relu(), W2)


def train(network, loss, steps):
    optimizer = torch.optim.Adam(network, lr=0.01)
    for _ in tqdm(range(steps)):
        optimizer.zero_grad()
        (5 * loss(network)).backward()  # each of the five has its own mean
        optimizer.step()


ways = torch.cartesian_prod(torch.arange(100), torch.arange(1, 10))  # total, digit
inputs = one_hot(ways[:, 0] // 10, ways[:, 0] % 10, ways[:, 1])  # (900, 30)
sums = ways.sum(dim=1)
goals = torch.stack((sums // 10 % 10, sums % 10), dim=-1)  # tens and units
known = [torch.randperm(540, generator=g)[:324] for g in dice]
known = torch.stack(known)  # (5, 324) of the totals below 60
adder = layers(30, 64, 20)
train(
    adder,
    lambda network: F.cross_entropy(
        forward(network, inputs[known]).reshape(-1, 10), goals[known].flatten()
    ),
    100,
)
with torch.no_grad():
    logits = forward(adder, inputs.expand(5, -1, -1)).unflatten(-1, (2, 10))
hit = (logits.argmax(dim=-1) == goals).all(dim=-1)[:, :540]  # (5, 540)
learned = torch.zeros(5, 540, dtype=torch.bool).scatter(1, known, True)


def show(values):
    return f"{values.mean():.2f} ± {values.std():.2f}"


print(f"steps it learned: {show(hit[learned].view(5, -1).double().mean(1))} right")
print(f"steps it did not: {show(hit[~learned].view(5, -1).double().mean(1))} right")

# %% [markdown]
# ## The sampler
#
# It adds the numbers in a random order, or always as they are written. The order is its way of reasoning. Since every step is drawn from a table, the *law* of the answers is known exactly as well.


# %%
def draw_problems(count, seed):
    """Numbers to add, two to six: (count, 6), filled up with zeros."""
    dice = torch.Generator().manual_seed(seed)
    numbers = torch.randint(1, 10, (count, 6), generator=dice)
    return numbers * (torch.arange(6) < 2 + torch.arange(count)[:, None] % 5)


def draw(problems, n, temperature, shuffled=True, seed=0):
    """n answers to each problem by each network: (5, P, n)."""
    dice = torch.Generator().manual_seed(seed)
    numbers = problems[:, None].expand(5, -1, n, 6)
    if shuffled:
        order = torch.rand(numbers.shape, generator=dice).argsort(dim=-1)
        numbers = numbers.gather(-1, order)
    table = logits.view(5, 100, 9, 2, 10)
    network, total = torch.arange(5)[:, None, None], torch.zeros_like(numbers[..., 0])
    for digit in numbers.unbind(dim=-1):
        step = table[network, total, (digit - 1).clamp(min=0)]  # (5, P, n, 2, 10)
        tens, units = sample(step, temperature, generator=dice).unbind(dim=-1)
        total = torch.where(digit > 0, 10 * tens + units, total)
    return total


def law(problems, temperature):
    """The chance of each answer, over all orders: (5, P, 100)."""
    p = softmax_with_temperature(logits.view(5, 100, 9, 2, 10), temperature)
    table = (p[..., 0, :, None] * p[..., 1, None, :]).flatten(-2)  # (5, 100, 9, 100)
    found = []
    for row in problems.tolist():
        row = [number for number in row if number]
        done = [torch.eye(100)[:1].expand(5, 1, 100)]  # for each set of added numbers
        for members in range(1, 2 ** len(row)):
            last = [k for k in range(len(row)) if members >> k & 1]
            parts = [done[members ^ 1 << k] @ table[:, :, row[k] - 1] for k in last]
            done.append(sum(parts) / len(parts))
        found.append(done[-1][:, 0])
    return torch.stack(found, dim=1)


def share(rule, goals, size, *drawn):
    """How often a rule is right on blocks of N, for each network: (5,)."""
    found = []
    for rows in zip(*(t.unfold(-1, size, size).tolist() for t in drawn), strict=True):
        hits = [
            rule(*block) == goal
            for goal, *blocks in zip(goals, *rows, strict=True)
            for block in zip(*blocks, strict=True)
        ]
        found.append(sum(hits) / len(hits))
    return torch.tensor(found)


problems, others = draw_problems(200, seed=1), draw_problems(100, seed=2)
truth, other_truth = problems.sum(dim=1), others.sum(dim=1)

# %% [markdown]
# The temperature is chosen on the 100 other problems: the one at which a vote of 16 is right most often. Temperature 0 takes the likeliest digit each time, so in the order that is written it gives one answer: *greedy*.

# %%
print("       as written       random order")
print("       one     vote     one     vote     one of 16")
by_temperature = {}
for temperature in (0.0, 0.3, 0.5, 0.7, 1.0, 1.4):
    line = []
    for shuffled in (False, True):
        answers = draw(others, 64, temperature, shuffled)
        right = answers == other_truth[:, None]
        line.append(right.double().mean().item())
        line.append(
            share(majority_vote, other_truth.tolist(), 16, answers).mean().item()
        )
    line.append(right.unfold(-1, 16, 16).any(dim=-1).double().mean().item())
    by_temperature[temperature] = line
    print(f"τ = {temperature}", *(f"{value:6.2f}" for value in line), sep="  ")
temperature = max(by_temperature, key=lambda tau: by_temperature[tau][3])
print("chosen:", temperature)

# %% [markdown]
# ## One of N is right
#
# A problem with chance $p$ is solved by one of $N$ samples with chance $1-(1-p)^N$; the mean of that over the problems is the *coverage*. To put the mean $p$ into the formula is wrong: easy problems don't pay for hard ones. Votes have a law, too, if all wrong answers were the same one: the binomial.

# %%
sizes = (1, 4, 16, 64, 256)
goals = truth.tolist()
greedy = (draw(problems, 1, 0.0, shuffled=False)[..., 0] == truth).double().mean(dim=1)
answers = draw(problems, 256, temperature, seed=1)  # (5, 200, 256)
written = draw(problems, 256, temperature, shuffled=False, seed=1)
right = answers == truth[:, None]
chances = law(problems, temperature)  # (5, 200, 100)
p = chances.gather(-1, truth.expand(5, -1)[..., None])[..., 0]  # (5, 200)
limit = (chances.argmax(dim=-1) == truth).double().mean(dim=1)  # of the vote


def binomial(p, N):
    """More than half of N are right; a tie counts half."""
    counts = range(N // 2, N + 1)
    ways = [float(math.comb(N, k)) * p**k * (1 - p) ** (N - k) for k in counts]
    return sum(ways) - ways[0] / (2 if N % 2 == 0 else 1)


one, one_law, mean_law, agreed, agreed_law, vote, same = ({} for _ in range(7))
for N in tqdm(sizes):
    found = [[pass_at_k(256, c, N) for c in row] for row in right.sum(-1).tolist()]
    one[N] = torch.tensor(found).mean(dim=1)
    one_law[N] = (1 - (1 - p) ** N).mean(dim=1)
    mean_law[N] = 1 - (1 - p.mean(dim=1)) ** N
    agreed[N] = share(majority_vote, [True] * 200, N, right)  # wrong is one answer
    agreed_law[N] = binomial(p, N).mean(dim=1)
    vote[N] = share(majority_vote, goals, N, answers)
    same[N] = share(majority_vote, goals, N, written)
tables = {
    "one of N": one,
    "  1-(1-p)^N": one_law,
    "  mean p": mean_law,
    "two-way vote": agreed,
    "  binomial law": agreed_law,
    "vote": vote,
    "vote, as written": same,
}
print(f"{'N':16}", *(f"{N:5}" for N in sizes))
for name, line in tables.items():
    print(f"{name:16}", *(f"{line[N].mean():5.2f}" for N in sizes))
print(f"the vote's limit {show(limit)}, greedy {show(greedy)}")

for N in sizes:
    assert (one[N] - one_law[N]).abs().max() < 0.03
    assert (agreed[N] - agreed_law[N]).abs().max() < 0.08  # few votes, if N is large
    assert vote[N].mean() > agreed[N].mean() - 0.01
assert mean_law[4].mean() > one[4].mean() + 0.03
assert abs(one[1].mean() - (written == truth[:, None]).double().mean()) < 0.03
assert vote[256].mean() > same[256].mean() + 0.08
assert abs(same[256].mean() - greedy.mean()) < 0.03
assert one[256].mean() > vote[256].mean() + 0.03

# %% name="votes" lead="yes" alt="Accuracy over the number of samples, from 1 to 256. One of N climbs to the top along the solid line of its law; the dotted line of the mean p lies above it at 4. The vote over random orders climbs more slowly and ends below it. The vote with the order as written stays level, at the dashed line of greedy." caption="Accuracy over the number of samples; mean and standard deviation of five networks. Only the order of adding differs between the two votes."
_, axes = plt.subplots(figsize=(560 / 72, 320 / 72))
lines = {"one of N": one, "vote, random orders": vote, "vote, as written": same}
for n, (label, line) in enumerate(lines.items()):
    means = [line[N].mean() for N in sizes]
    spread = [line[N].std() for N in sizes]
    axes.errorbar(sizes, means, yerr=spread, marker="osD"[n], ls="", label=label)
laws = {"law": one_law, "law with the mean p": mean_law}
for n, (label, line) in enumerate(laws.items()):
    means = [line[N].mean() for N in sizes]
    axes.plot(sizes, means, ls=["-", ":"][n], color="C0", label=label)
axes.axhline(greedy.mean(), color="C3", ls="--", label="greedy")
axes.set_xscale("log", base=2)
axes.set_xticks(sizes, sizes)
axes.set(xlabel="N, samples", ylabel="right", ylim=(0, 1.02))
axes.legend(loc="lower right", ncols=2)

# %% [markdown]
# The laws hold. And what the vote gains comes from the order: as written, all samples take the same steps, and where the network is wrong about one they are wrong alike. A single sample is as good either way. Where the likeliest answer is wrong, no number of votes helps; that is the limit.
#
# ## A judge picks
#
# The *exact* judge adds up, and best of N is “one of N”. The *noisy* one also adds up, but errs in a tenth of its verdicts, anew each time. With $q$ the chance that it says yes, best of N has a law again, whose limit is the share of right answers among those it likes. The *trained* one is a network that sees numbers and answer, and has learned from graded samples for 200 other problems (Cobbe et al.).

# %%
error = 0.1
flipped = torch.rand(right.shape, generator=torch.Generator().manual_seed(4)) < error
verdict = (right ^ flipped).double()
good = p * (1 - error)  # right, and it says so
q = good + (1 - p) * error

lessons = draw_problems(200, seed=3)
given = draw(lessons, 16, temperature, seed=2)
graded = (given == lessons.sum(dim=1)[:, None]).double().flatten(1)


def describe(problems, answers):  # (P, 6), (5, P, n) to (5, P * n, 29)
    counts = F.one_hot(problems, 10)[:, None, :, 1:].sum(dim=2).double()
    counts = counts.expand(*answers.shape, 9)  # how often each number stands there
    return torch.cat((counts, one_hot(answers // 10, answers % 10)), -1).flatten(1, 2)


judge, x = layers(29, 64, 1), describe(lessons, given)
train(
    judge,
    lambda network: F.binary_cross_entropy_with_logits(
        forward(network, x)[..., 0], graded
    ),
    150,
)
with torch.no_grad():
    score = forward(judge, describe(problems, answers)).view(answers.shape)
verdicts = ((score > 0) == right).double().mean((1, 2))
print(f"the trained judge's verdicts: {show(verdicts)} right")

noisy, noisy_law, judged, weighed, liked = ({} for _ in range(5))
for N in tqdm(sizes):
    none = (1 - q) ** N  # it likes none, and takes the first
    noisy[N] = share(best_of_n, goals, N, answers, verdict)
    noisy_law[N] = ((1 - none) * good / q + none * p * error / (1 - q)).mean(dim=1)
    judged[N] = share(best_of_n, goals, N, answers, score)
    weighed[N] = share(majority_vote, goals, N, answers, score.sigmoid())
    liked[N] = score.unfold(-1, N, N).amax(dim=-1).sigmoid().mean()
tables = {
    "exact": one,
    "noisy": noisy,
    "  its law": noisy_law,
    "trained": judged,
    "  its score": liked,
    "  weighs a vote": weighed,
}
print(f"{'N':16}", *(f"{N:5}" for N in sizes))
for name, line in tables.items():
    print(f"{name:16}", *(f"{line[N].mean():5.2f}" for N in sizes))

peak = max(sizes, key=lambda N: judged[N].mean())
for N in sizes:
    assert (noisy[N] - noisy_law[N]).abs().max() < 0.05
assert noisy[256].mean() - noisy[64].mean() < 0.03 and noisy[256].mean() < 0.97
assert 1 < peak < 256 and judged[peak].mean() > judged[256].mean() + 0.1
assert liked[256] > liked[64] > liked[16]  # over-optimization
assert judged[peak].mean() + 0.05 < weighed[256].mean() < vote[256].mean() - 0.05

# %% name="judges" alt="Accuracy over the number of samples with three judges. Exact climbs to the top. Noisy climbs to a level below it and stays there, on the line of its law. Trained climbs until 4, then falls far below a single sample. As the weight of a vote it climbs and stays between the two." caption="Best of N with three judges, and a vote that the trained judge weighs."
_, axes = plt.subplots(figsize=(560 / 72, 320 / 72))
lines = {"exact": one, "noisy": noisy, "trained": judged, "trained, as a vote": weighed}
for n, (label, line) in enumerate(lines.items()):
    means = [line[N].mean() for N in sizes]
    spread = [line[N].std() for N in sizes]
    ls = ["", "", "-", "--"][n]
    axes.errorbar(sizes, means, yerr=spread, marker="osD^"[n], ls=ls, label=label)
for color, line in (("C0", one_law), ("C1", noisy_law)):
    axes.plot(sizes, [line[N].mean() for N in sizes], color=color)
axes.set_xscale("log", base=2)
axes.set_xticks(sizes, sizes)
axes.set(xlabel="N, samples", ylabel="right", ylim=(0, 1.02))
axes.legend(loc="lower right", ncols=2)

# %% [markdown]
# The trained judge is right in seven of ten verdicts, yet among many answers the one it likes best is mostly a wrong one, while its score rises. A vote that it weighs doesn't fall. The plain vote is better still: this judge adds less than it spoils.
#
# ## An adaptive budget
#
# A vote of 40, or one that stops when it is sure enough. The confidence is chosen on the other problems: the smallest that loses at most half a percentage point there.


# %%
def adaptive(answers, goals, confidence):
    """Accuracy and mean number of samples, for each network."""
    used = []

    def rule(block):
        answer, samples = adaptive_majority_vote(iter(block).__next__, 40, confidence)
        used.append(samples)
        return answer

    found = share(rule, goals, 40, answers)
    return found, torch.tensor(used).double().view(5, -1).mean(dim=1)


rehearsal = draw(others, 240, temperature, seed=3)
whole = share(majority_vote, other_truth.tolist(), 40, rehearsal).mean()
for confidence in (0.8, 0.9, 0.95, 0.99):
    found, used = adaptive(rehearsal, other_truth.tolist(), confidence)
    print(f"{confidence:4}: {found.mean() - whole:+.3f} with {used.mean():.0f} samples")
    if found.mean() > whole - 0.005:
        break
fixed = share(majority_vote, goals, 40, answers)
found, used = adaptive(answers, goals, confidence)
loss = fixed - found
fewer = share(majority_vote, goals, round(used.mean().item()), answers)
print(f"test: {show(found)} with {used.mean():.0f}, all 40 {show(fixed)}")
print(f"the same number for each problem: {show(fewer)}")
assert loss.mean() < 0.015 and used.mean() < 25
assert found.mean() > fewer.mean()

# Coverage needs an exact judge: it can stop at the first right answer.
stopped = ((1 - (1 - p) ** 16) / p).mean(dim=1)  # mean samples, of 16 at most

# Or the number of samples is set by the length of a problem, before any is drawn.
hint = law(others, temperature).gather(-1, other_truth.expand(5, -1)[..., None])[..., 0]
length, other_length = (problems > 0).sum(dim=1), (others > 0).sum(dim=1)
plan = dict.fromkeys(range(2, 7), 0)
for _ in range(16 * 5):  # each sample where it adds most, on the other problems
    adds = {
        k: (hint * (1 - hint) ** n)[:, other_length == k].mean()
        for k, n in plan.items()
    }
    plan[max(adds, key=adds.get)] += 1
planned = (1 - (1 - p) ** torch.tensor([plan[k] for k in length.tolist()])).mean(dim=1)
uniform = [(1 - (1 - p) ** n).mean().item() for n in range(1, 100)]
equal = next(n for n, c in enumerate(uniform, start=1) if c >= planned.mean())
print(f"by length {plan}: {show(planned)}, 16 each {show(one_law[16])}")
print(f"{equal} each are as good; stopped at the first right answer: {show(stopped)}")
assert stopped.mean() < 10 and equal < 32

# %% [markdown]
# Agreement among the votes tells which problems need more. Their length doesn't: a plan by length reaches what as many samples for each reach. With an exact judge, sampling can stop at the first right answer.
#
# ## Set against the papers

# %% results="yes"
rows = [
    (
        "vote of 40 against greedy",
        "Wang et al. 2022, abstract",
        "GSM8K: 17.9 points more",
        f"{100 * (fixed - greedy).mean():.0f} ± {100 * (fixed - greedy).std():.0f} "
        f"points more; 64 votes in one order: {show(same[64])}, greedy {show(greedy)}",
    ),
    (
        "best of N by a trained judge",
        "Cobbe et al. 2021, §5.1, figure 7a",
        "improves up to 400 samples, then falls",
        f"best at {peak}: {show(judged[peak])}, at 256 {show(judged[256])}",
    ),
    (
        "one of N right; votes",
        "Brown et al. 2024, abstract",
        "SWE-bench Lite: 15.9 % with 1, 56 % with 250; votes reach a plateau",
        f"{100 * one[1].mean():.0f} % with 1, {100 * one[256].mean():.0f} % with 256; "
        f"votes {100 * vote[64].mean():.0f} % with 64, {100 * vote[256].mean():.0f} % "
        "with 256",
    ),
    (
        "samples by difficulty",
        "Snell et al. 2024, abstract",
        "more than 4 times less compute than best of N",
        f"by length {equal / 16:.1f} times less; stopping at the first right one "
        f"{16 / stopped.mean():.1f} times",
    ),
    (
        "adaptive vote, of 40",
        "Aggarwal et al. 2023, abstract",
        "up to 7.9 times fewer samples, below 0.1 points lost",
        f"{40 / used.mean():.1f} times fewer, {100 * loss.mean():.1f} ± "
        f"{100 * loss.std():.1f} points lost",
    ),
]
print("| What | Paper | There | Here | Seeds |")
print("| --- | --- | --- | --- | --- |")
for cells in rows:
    print("| " + " | ".join(cells) + " | 5 |")

# %% [markdown]
# Votes beat greedy, coverage climbs on where votes and judges level off or fall, and the adaptive vote loses next to nothing: that agrees. The trained judge falls much earlier than Cobbe's. Difficulty by length saves nothing; Snell et al. estimate it from samples. The networks are tiny, and only the shape of the curves can be compared.
#
# ## Sources
#
# - X. Wang et al., *Self-Consistency Improves Chain of Thought Reasoning in Language Models*, 2022, [arXiv:2203.11171](https://arxiv.org/abs/2203.11171).
# - K. Cobbe et al., *Training Verifiers to Solve Math Word Problems*, 2021, [arXiv:2110.14168](https://arxiv.org/abs/2110.14168).
# - B. Brown et al., *Large Language Monkeys: Scaling Inference Compute with Repeated Sampling*, 2024, [arXiv:2407.21787](https://arxiv.org/abs/2407.21787).
# - C. Snell et al., *Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters*, 2024, [arXiv:2408.03314](https://arxiv.org/abs/2408.03314).
# - P. Aggarwal et al., *Let's Sample Step by Step: Adaptive-Consistency for Efficient Reasoning and Coding with LLMs*, 2023, [arXiv:2305.11860](https://arxiv.org/abs/2305.11860).
