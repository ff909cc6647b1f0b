"""Router and sparse layer against transformers, and token by token in plain Python."""

import math
import multiprocessing
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from snippets.moe.layer import MoELayer, TopKRouter, moe_parameter_counts

LOOP = "a loop over tokens and experts"
MIXTRAL = "transformers.models.mixtral.modeling_mixtral"
SWITCH = "transformers.models.switch_transformers.modeling_switch_transformers"

# N, d_model, d_hidden, E, k
SIZES = [
    (5, 4, 6, 3, 1),
    (7, 4, 6, 6, 2),
    (7, 6, 4, 5, 5),
    (1, 3, 2, 4, 3),
    (40, 8, 3, 2, 1),
    (3, 1, 1, 1, 1),
]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
renormalized = pytest.mark.parametrize(
    "renormalize", [True, False], ids=["over the chosen", "over all"]
)
sizes_from_values = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.13",
    reason="torch.compile may not trace sizes that depend on values",
)
low_precision = pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])


def route(logits, top_k, renormalize):
    """One token: the chosen experts and their weights, with no softmax of torch."""
    values = logits.tolist()
    chosen = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
    exps = [(logit - logits.max().detach()).exp() for logit in logits]
    total = sum(exps[i] for i in (chosen if renormalize else range(len(values))))
    return chosen, [exps[i] / total for i in chosen]


def routed_one_by_one(router, x):
    logits = x @ router.gate.weight.to(x.dtype).T
    routes = [route(row, router.top_k, router.renormalize) for row in logits]
    weights = [torch.stack(weights) for _, weights in routes]
    return logits, torch.stack(weights), torch.tensor([chosen for chosen, _ in routes])


def computed_one_by_one(layer, x):
    outputs = []
    logits, weights, indices = routed_one_by_one(layer.router, x)
    for token, row, chosen in zip(x, weights, indices.tolist(), strict=True):
        output = torch.zeros_like(token)
        for weight, i in zip(row, chosen, strict=True):
            W_1, b_1, W_2, b_2 = (p.to(x.dtype) for p in layer.experts[i].parameters())
            hidden = (W_1 @ token + b_1).clamp(min=0)
            output = output + weight * (W_2 @ hidden + b_2)
        outputs.append(output)
    return torch.stack(outputs), logits


def with_chosen_rows(router, rows):
    """Sets the gate so that token x has the logits x @ rows.T."""
    with torch.no_grad():
        router.gate.weight.copy_(torch.as_tensor(rows))
    return router


# --- the router -----------------------------------------------------------------------


@renormalized
@sizes
def test_routes_are_those_of_a_loop_over_tokens(
    size, renormalize, randomize, agrees_with_gradients
):
    N, d_model, _, E, k = size
    router = randomize(TopKRouter(d_model, E, k, renormalize=renormalize)).double()
    x = torch.randn(N, d_model, dtype=torch.float64)
    assert torch.equal(router(x)[2], routed_one_by_one(router, x)[2])
    agrees_with_gradients(
        lambda x: router(x)[:2],
        lambda x: routed_one_by_one(router, x)[:2],
        x,
        against=LOOP,
        atol=1e-12,
        modules=(router, router),
    )


@sizes
def test_routes_are_those_of_mixtral(
    size, randomize, reference_library, agrees_with_gradients
):
    N, d_model, _, E, k = size
    config = {"num_experts_per_tok": k, "num_local_experts": E, "hidden_size": d_model}
    theirs = reference_library(MIXTRAL).MixtralTopKRouter(SimpleNamespace(**config))
    ours = randomize(TopKRouter(d_model, E, k))
    x = torch.randn(N, d_model)
    weight = ours.gate.weight

    def reference(x):
        return functional_call(theirs, {"weight": weight}, x)

    assert torch.equal(ours(x)[2], reference(x)[2])
    agrees_with_gradients(
        lambda x: ours(x)[:2],
        lambda x: reference(x)[:2],
        x,
        against="transformers' MixtralTopKRouter",
        atol=1e-5,
        modules=(ours, ours),
    )


def switch_config(reference_library, d_model, d_ff, num_experts):
    library = reference_library("transformers")
    return library.SwitchTransformersConfig(
        d_model=d_model,
        d_ff=d_ff,
        num_experts=num_experts,
        expert_capacity=1000,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
    )


def test_routes_without_renormalizing_are_those_of_switch(
    randomize, reference_library, agrees_with_gradients
):
    config = switch_config(reference_library, 8, 6, 5)
    theirs = reference_library(SWITCH).SwitchTransformersTop1Router(config)
    ours = randomize(TopKRouter(8, 5, 1, renormalize=False))
    x = torch.randn(20, 8)

    def reference(x):
        parameters = {"classifier.weight": ours.gate.weight}
        chosen, weights, logits = functional_call(theirs, parameters, x[None])
        return logits[0], weights[0], chosen[0].argmax(dim=-1, keepdim=True)

    assert torch.equal(ours(x)[2], reference(x)[2])
    agrees_with_gradients(
        lambda x: ours(x)[:2],
        lambda x: reference(x)[:2],
        x,
        against="transformers' SwitchTransformersTop1Router",
        atol=1e-5,
        modules=(ours, ours),
    )


@sizes
def test_weights_are_positive_fall_and_sum_to_one(size, randomize):
    N, d_model, _, E, k = size
    router = randomize(TopKRouter(d_model, E, k).double())
    _, weights, indices = router(torch.randn(N, d_model).double())
    assert weights.shape == indices.shape == (N, k)
    assert (weights > 0).all() and (weights.diff(dim=1) <= 0).all()
    torch.testing.assert_close(
        weights.sum(dim=1), torch.ones(N).double(), atol=1e-12, rtol=0
    )
    assert all(len(set(row)) == k for row in indices.tolist())


def test_top_k_before_and_after_the_softmax_is_the_same_once_renormalized(randomize):
    router = randomize(TopKRouter(8, 10, 3).double())
    logits, weights, indices = router(torch.randn(30, 8).double())
    after = logits.softmax(dim=-1).gather(1, indices)
    assert after.sum(dim=1).max() < 0.999
    after = after / after.sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights, after, atol=1e-12, rtol=0)


def test_without_renormalizing_weights_are_the_probabilities_among_all(randomize):
    router = randomize(TopKRouter(8, 10, 3, renormalize=False).double())
    logits, weights, indices = router(torch.randn(30, 8).double())
    probabilities = logits.softmax(dim=-1).gather(1, indices)
    torch.testing.assert_close(weights, probabilities, atol=1e-12, rtol=0)


def test_it_renormalizes_and_adds_no_noise_by_default(randomize):
    for module in (TopKRouter(8, 10, 2), MoELayer(8, 4, 10, 2).router):
        router, x = randomize(module), torch.randn(5, 8)
        assert router.training and all(map(torch.equal, router(x), router(x)))
        torch.testing.assert_close(router(x)[1].sum(dim=1), torch.ones(5))


@pytest.mark.parametrize("E", [2, 16, 17, 64, 300])
def test_of_equal_logits_the_lower_index_comes_first(E):
    router = with_chosen_rows(TopKRouter(3, E, 2), torch.zeros(E, 3))
    _, weights, indices = router(torch.randn(5, 3))
    assert torch.equal(indices, torch.tensor([[0, 1]] * 5))
    assert (weights == 0.5).all()


def test_a_tie_at_the_edge_takes_the_lower_index():
    rows = torch.tensor([[1.0], [3.0], [2.0], [2.0], [2.0]])
    for top_k, expected in enumerate([[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]], start=1):
        router = with_chosen_rows(TopKRouter(1, 5, top_k), rows)
        assert router(torch.ones(1, 1))[2].tolist() == [expected]


@sizes
def test_the_weight_of_a_single_renormalized_expert_is_one_and_trains_no_gate(
    size, randomize
):
    N, d_model, _, E, _ = size
    router = randomize(TopKRouter(d_model, E, 1))
    _, weights, _ = router(torch.randn(N, d_model))
    assert (weights == 1).all()
    (weights * torch.randn(N, 1)).sum().backward()
    assert (router.gate.weight.grad == 0).all()


def test_switch_keeps_the_gradient_of_the_gate(randomize):
    router = randomize(TopKRouter(4, 6, 1, renormalize=False).double())
    x = torch.randn(9, 4, dtype=torch.float64)
    logits, weights, indices = router(x)
    (weights**2).sum().backward()
    # d p_i / d logit_j = p_i (1[i = j] - p_j)
    p = logits.softmax(dim=-1).detach()
    chosen = F.one_hot(indices[:, 0], 6)
    of_logits = 2 * weights.detach() ** 2 * (chosen - p)
    torch.testing.assert_close(
        router.gate.weight.grad, of_logits.T @ x, atol=1e-12, rtol=0
    )
    assert router.gate.weight.grad.abs().min() > 1e-4


def test_huge_logits_do_not_overflow():
    rows = torch.tensor([[3e4], [1e4], [-3e4]])
    for renormalize in (True, False):
        router = TopKRouter(1, 3, 2, renormalize=renormalize)
        _, weights, _ = with_chosen_rows(router, rows)(torch.ones(1, 1))
        assert weights.tolist() == [[1, 0]]


def test_a_nan_stays_with_its_token(randomize):
    layer = randomize(MoELayer(4, 6, 5, 2))
    x = torch.randn(3, 4)
    x[1, 2] = torch.nan
    _, weights, _ = layer.router(x)
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()
    output, _ = layer(x)
    assert output[1].isnan().all() and output[[0, 2]].isfinite().all()


# --- noise ----------------------------------------------------------------------------


def noisy_router(randomize, **options):
    return randomize(TopKRouter(8, 6, 2, noisy=True, **options)).double()


@renormalized
def test_noise_is_that_of_equation_four(renormalize, randomize, agrees_with_gradients):
    router = noisy_router(randomize, renormalize=renormalize)

    def reference(x):
        torch.manual_seed(1)
        normal = torch.randn(20, 6, dtype=torch.float64)
        scale = (1 + (x @ router.noise.weight.T).exp()).log()
        noisy = x @ router.gate.weight.T + normal * scale
        weights = [torch.stack(route(row, 2, renormalize)[1]) for row in noisy]
        return noisy, torch.stack(weights)

    def ours(x):
        torch.manual_seed(1)
        return router(x)[:2]

    agrees_with_gradients(
        ours,
        reference,
        torch.randn(20, 8, dtype=torch.float64),
        against="Shazeer et al., eq. 3 to 5",
        atol=1e-10,
        modules=(router, router),
    )


def test_noise_is_drawn_anew_in_training_and_absent_in_evaluation(randomize):
    router = noisy_router(randomize)
    x = torch.randn(50, 8, dtype=torch.float64)
    first, second = router(x), router(x)
    assert not torch.isclose(first[0], second[0]).any()
    assert not torch.equal(first[2], second[2])
    router.eval()
    assert all(map(torch.equal, router(x), router(x)))
    assert torch.equal(router(x)[0], x @ router.gate.weight.T)


def test_the_choice_and_the_weights_are_made_of_the_noisy_logits(randomize):
    router = noisy_router(randomize)
    logits, weights, indices = router(torch.randn(50, 8, dtype=torch.float64))
    best, chosen = logits.topk(2)
    assert torch.equal(indices, chosen)
    torch.testing.assert_close(weights, best.softmax(dim=-1), atol=1e-12, rtol=0)


def test_without_noise_there_is_nothing_to_learn_about_it():
    names = [name for name, _ in TopKRouter(8, 6, 2).named_parameters()]
    assert names == ["gate.weight"]
    names = [name for name, _ in TopKRouter(8, 6, 2, True).named_parameters()]
    assert names == ["gate.weight", "noise.weight"]


def test_a_layer_hands_its_options_to_the_router():
    for given in ((4, True, False), (3, False, True)):
        router = MoELayer(8, 5, 6, *given).router
        expected = given[0], given[1], given[2]
        assert (router.top_k, router.noise is not None, router.renormalize) == expected
        assert router.gate.weight.shape == (6, 8)


def test_the_noise_of_a_layer_is_that_of_its_router(randomize):
    layer = randomize(MoELayer(8, 5, 6, 2, noisy=True))
    x = torch.randn(9, 8)
    assert not torch.allclose(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


# --- precision, device, compilation of the router -------------------------------------


@low_precision
@pytest.mark.parametrize("noisy", [False, True])
@renormalized
def test_autocast_changes_no_route(renormalize, noisy, low, randomize):
    router = randomize(TopKRouter(8, 6, 2, noisy, renormalize))
    x = torch.randn(50, 8)
    torch.manual_seed(1)
    expected = router(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", low):
        assert (x @ x.T).dtype == low
        found = router(x)
    assert all(map(torch.equal, found, expected))
    assert found[0].dtype == found[1].dtype == torch.float32


@low_precision
@pytest.mark.parametrize("noisy", [False, True])
@renormalized
def test_a_router_of_low_precision_is_as_exact_as_its_weights(
    renormalize, noisy, low, randomize
):
    router = randomize(TopKRouter(64, 6, 2, noisy, renormalize)).to(low)
    x = torch.randn(50, 64, dtype=low)
    torch.manual_seed(1)
    logits, weights, indices = router(x)
    assert logits.dtype == weights.dtype == torch.float32
    torch.manual_seed(1)
    exact = x.double() @ router.gate.weight.double().T
    if noisy:
        scale = F.softplus(x.double() @ router.noise.weight.double().T)
        exact += scale * torch.randn(50, 6).double()
    rows = [route(row, 2, renormalize) for row in exact]
    assert indices.tolist() == [chosen for chosen, _ in rows]
    # 24 bits of sums of 64 products of order 1
    torch.testing.assert_close(logits.double(), exact, atol=2e-5, rtol=0)
    expected = torch.stack([torch.stack(weights) for _, weights in rows])
    torch.testing.assert_close(weights.double(), expected, atol=2e-5, rtol=0)


def test_logits_that_bfloat16_could_not_tell_apart_are_told_apart():
    router = with_chosen_rows(TopKRouter(1, 2, 1), [[240.0], [240.375]])
    x = torch.ones(1, 1)
    low = [row.bfloat16() for row in router.gate.weight]
    assert torch.equal(*low)
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x)[2].item() == 1


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_autocast_of_another_device_rounds_nothing_either():
    class NoFloat16(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            assert getattr(made, "dtype", None) != torch.float16
            return made

    def check():
        # torch can imagine a tensor on a GPU of Apple's without having one, but no
        # brackets behind it. Once set, they stay broken: hence a process of its own.
        torch.Tensor.__getitem__ = lambda x, index: x.narrow(1, 0, index[1].stop)
        router = TopKRouter(4, 3, 3)
        autocast = torch.autocast("mps", torch.float16)
        with FakeTensorMode(), torch.device("mps"), autocast:
            x = torch.empty(2, 4)
            assert (x @ x.mT).dtype == torch.float16
            with NoFloat16():
                functional_call(router, {"gate.weight": torch.empty(3, 4)}, x)

    # For which tests run a line, mutation tests look at this process alone.
    TopKRouter(4, 3, 3)(torch.randn(2, 4))
    process = multiprocessing.get_context("fork").Process(target=check)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_the_router_follows_the_device_of_its_tokens():
    found = TopKRouter(4, 3, 2, noisy=True).to("meta")(torch.empty(5, 4, device="meta"))
    assert [x.shape for x in found] == [(5, 3), (5, 2), (5, 2)]
    assert {x.device.type for x in found} == {"meta"}


@pytest.mark.parametrize("noisy", [False, True])
@renormalized
def test_results_of_the_router_are_contiguous(renormalize, noisy, randomize):
    router = randomize(TopKRouter(8, 6, 2, noisy, renormalize)).double()
    x = torch.randn(8, 5, dtype=torch.float64).T
    assert not x.is_contiguous()
    torch.manual_seed(1)
    found = router(x)
    torch.manual_seed(1)
    expected = router(x.contiguous())
    assert all(y.is_contiguous() for y in found)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("noisy", [False, True])
@renormalized
def test_the_router_compiles_to_one_graph(renormalize, noisy, randomize, compiles):
    router = randomize(TopKRouter(8, 6, 2, noisy, renormalize))
    compiles(router, *[(torch.randn(n, 8),) for n in (5, 7)])


# --- the layer ------------------------------------------------------------------------


@renormalized
@sizes
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(
    size, renormalize, randomize, agrees_with_gradients
):
    layer = randomize(MoELayer(*size[1:], renormalize=renormalize)).double()
    agrees_with_gradients(
        layer,
        lambda x: computed_one_by_one(layer, x),
        torch.randn(size[:2], dtype=torch.float64),
        against=LOOP,
        atol=1e-10,
        modules=(layer, layer),
    )


# Sums of some ten products of order 1: 24 bits of each in float32, 8 in bfloat16. The
# loop computes the rounded weights in float64.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-1)]
)
@renormalized
def test_lower_precisions(
    renormalize, dtype, tolerance, randomize, agrees_with_gradients
):
    layer = randomize(MoELayer(4, 6, 6, 2, renormalize=renormalize)).to(dtype)
    x = torch.randn(9, 4, dtype=dtype)
    output, logits = layer(x)
    assert output.dtype == dtype and logits.dtype == torch.float32
    agrees_with_gradients(
        lambda x: layer(x)[0],
        lambda x: computed_one_by_one(layer, x.double())[0].to(dtype),
        x,
        against=LOOP,
        atol=tolerance,
        rtol=tolerance,
        modules=(layer, layer),
    )


@sizes
def test_with_all_experts_chosen_it_is_the_dense_mixture(
    size, randomize, agrees_with_gradients
):
    N, d_model, d_hidden, E, _ = size
    layer = randomize(MoELayer(d_model, d_hidden, E, E)).double()

    def dense(x):
        logits = x @ layer.router.gate.weight.T
        outputs = torch.stack([expert(x) for expert in layer.experts])  # (E, N, d)
        return torch.einsum("ne,end->nd", logits.softmax(dim=-1), outputs), logits

    agrees_with_gradients(
        layer,
        dense,
        torch.randn(N, d_model, dtype=torch.float64),
        against="the dense mixture",
        atol=1e-10,
        modules=(layer, layer),
    )


def padded(tokens, value):
    """The tokens with one feature more, which is `value` for each."""
    return F.pad(tokens, (0, 1), value=value)


def without_biases(expert):
    """The matrices of an expert for tokens whose last feature is 1, biases inside."""
    first, _, second = expert
    one = torch.zeros(1, first.in_features + 1)
    one[0, -1] = 1  # a hidden feature that is always 1: it carries the second bias
    first = torch.cat([torch.cat([first.weight, first.bias[:, None]], dim=1), one])
    second = torch.cat([second.weight, second.bias[:, None]], dim=1)
    return first, F.pad(second, (0, 0, 0, 1))


@sizes
def test_outputs_and_gradients_are_those_of_mixtral(
    size, randomize, reference_library, agrees_with_gradients
):
    N, d_model, d_hidden, E, k = size
    mixtral = reference_library(MIXTRAL)
    config = reference_library("transformers").MixtralConfig(
        hidden_size=d_model + 1,
        intermediate_size=d_hidden + 1,
        num_local_experts=E,
        num_experts_per_tok=k,
        hidden_act="relu",
        experts_implementation="eager",
    )
    block = mixtral.MixtralSparseMoeBlock(config)
    layer = randomize(MoELayer(d_model, d_hidden, E, k))

    def reference(x):
        first, second = zip(*map(without_biases, layer.experts), strict=True)
        # Mixtral's experts are down(act(gate(x)) * up(x)): up gives 1 for each.
        up = torch.zeros(d_hidden + 1, d_model + 1)
        up[:, -1] = 1
        parameters = {
            "gate.weight": padded(layer.router.gate.weight, 0),
            "experts.gate_up_proj": torch.stack([torch.cat([w, up]) for w in first]),
            "experts.down_proj": torch.stack(second),
        }
        return functional_call(block, parameters, padded(x, 1))[..., :-1]

    agrees_with_gradients(
        lambda x: layer(x)[0],
        reference,
        torch.randn(2, N, d_model),
        against="transformers' MixtralSparseMoeBlock",
        atol=1e-5,
        rtol=1e-5,
        modules=(layer, layer),
    )


def test_outputs_and_gradients_are_those_of_switch(
    randomize, reference_library, agrees_with_gradients
):
    config = switch_config(reference_library, 8 + 1, 6 + 1, 5)
    block = reference_library(SWITCH).SwitchTransformersSparseMLP(config)
    layer = randomize(MoELayer(8, 6, 5, 1, renormalize=False))

    class Classifier(nn.Module):
        gate = layer.router.gate

        def forward(self, x):
            return self.gate(x[..., :-1])

    block.router.classifier = Classifier()

    def reference(x):
        parameters = {}
        for i, expert in enumerate(layer.experts):
            wi, wo = without_biases(expert)
            parameters |= {f"experts.expert_{i}.wi.weight": wi}
            parameters |= {f"experts.expert_{i}.wo.weight": wo}
        return functional_call(block, parameters, padded(x, 1))[..., :-1]

    agrees_with_gradients(
        lambda x: layer(x)[0],
        reference,
        torch.randn(2, 20, 8),
        against="transformers' SwitchTransformersSparseMLP",
        atol=1e-5,
        rtol=1e-5,
        modules=(layer, layer),
    )


@pytest.fixture
def rows_seen():
    """rows_seen(layer): a list that each expert's call fills with how many rows."""

    def watch(layer):
        seen = [[] for _ in layer.experts]
        for expert, calls in zip(layer.experts, seen, strict=True):
            expert.register_forward_hook(
                lambda module, inputs, output, calls=calls: calls.append(len(inputs[0]))
            )
        return seen

    return watch


@sizes
def test_an_expert_computes_the_tokens_that_chose_it_and_no_others(
    size, randomize, rows_seen
):
    N, d_model, _, E, k = size
    layer = randomize(MoELayer(*size[1:]))
    seen, x = rows_seen(layer), torch.randn(N, d_model)
    layer(x)
    _, _, indices = layer.router(x)
    assert seen == [[count] for count in indices.flatten().bincount(minlength=E)]
    assert sum(sum(calls) for calls in seen) == N * k  # no visit is lost or added


def test_experts_without_tokens_compute_nothing_and_get_gradients_of_zero(
    randomize, rows_seen
):
    layer = randomize(MoELayer(2, 5, 4, 2))
    with_chosen_rows(layer.router, [[0.0, 0], [2, 1], [-1, -1], [1, 2]])
    seen = rows_seen(layer)
    layer(torch.ones(7, 2))[0].sum().backward()
    assert seen == [[0], [7], [0], [7]]
    for i, expert in enumerate(layer.experts):
        zero = [bool((p.grad == 0).all()) for p in expert.parameters()]
        assert zero == [i in (0, 2)] * 4


def test_an_expert_with_nan_weights_harms_only_the_tokens_that_chose_it(randomize):
    layer = randomize(MoELayer(4, 6, 5, 2))
    for parameter in layer.experts[3].parameters():
        nn.init.constant_(parameter, torch.nan)
    x = torch.randn(40, 4)
    chose = (layer.router(x)[2] == 3).any(dim=1)
    assert 0 < chose.sum() < 40
    assert torch.equal(layer(x)[0].isnan().all(dim=1), chose)
    assert torch.equal(layer(x)[0].isnan().any(dim=1), chose)


def test_equal_experts_make_the_layer_one_of_them(randomize):
    layer = randomize(MoELayer(4, 6, 5, 3).double())
    for expert in layer.experts:
        expert.load_state_dict(layer.experts[0].state_dict())
    x = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], layer.experts[0](x), atol=1e-12, rtol=0)


def test_each_token_is_computed_by_itself_and_keeps_its_place(randomize):
    layer = randomize(MoELayer(4, 6, 5, 2).double())
    x = torch.randn(3, 8, 4, dtype=torch.float64)
    output, logits = layer(x)
    alone = [layer(token) for token in x.reshape(-1, 4)]
    torch.testing.assert_close(
        output.reshape(-1, 4), torch.stack([y for y, _ in alone]), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        logits, torch.cat([y for _, y in alone]), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_any_leading_dimensions_are_kept(shape, randomize):
    layer = randomize(MoELayer(4, 6, 5, 2))
    output, logits = layer(torch.randn(shape))
    assert output.shape == shape and output.is_contiguous()
    assert logits.shape == (math.prod(shape) // 4, 5)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 3, 4)])
def test_without_tokens_nothing_is_computed(shape, randomize, rows_seen):
    layer = randomize(MoELayer(4, 6, 5, 2))
    seen, x = rows_seen(layer), torch.randn(shape, requires_grad=True)
    output, logits = layer(x)
    assert output.shape == shape and logits.shape == (0, 5)
    assert seen == [[0]] * 5
    (output.sum() + logits.sum()).backward()
    assert x.grad.shape == shape
    assert all((p.grad == 0).all() for p in layer.parameters())


def test_non_contiguous_tokens_work_and_are_not_modified(randomize):
    layer = randomize(MoELayer(4, 6, 5, 2).double())
    x = torch.randn(4, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    copy = x.clone(memory_format=torch.contiguous_format)
    assert not x.is_contiguous() and layer(x)[0].is_contiguous()
    torch.testing.assert_close(layer(x)[0], layer(copy)[0], atol=1e-12, rtol=0)
    assert torch.equal(x, copy)


@low_precision
def test_under_autocast_experts_are_rounded_and_routes_are_not(low, randomize):
    layer = randomize(MoELayer(8, 6, 5, 2))
    x = torch.randn(40, 8)
    exact, logits = layer(x)
    with torch.autocast("cpu", low):
        output, found = layer(x)
    assert output.dtype == low and torch.equal(found, logits)
    # 8 bits (bfloat16) or 11 of sums of ten products of order 1
    bits = {torch.bfloat16: 2**-4, torch.float16: 2**-7}[low]
    torch.testing.assert_close(output.float(), exact, atol=bits, rtol=bits)
    assert (output.float() - exact).abs().max() > 1e-4


def test_what_experts_found_is_summed_in_float32():
    layer = MoELayer(1, 1, 3, 3).bfloat16()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for expert, found in zip(layer.experts, (256.0, 1.0, 1.0), strict=True):
            expert[2].bias.fill_(found)
    # A third of 258 is 86. Thirds rounded to bfloat16 give 85.5 and less.
    assert layer(torch.zeros(1, 1, dtype=torch.bfloat16))[0].item() == 86


@sizes_from_values
@renormalized
def test_the_layer_compiles_to_one_graph(renormalize, randomize, compiles):
    layer = randomize(MoELayer(8, 6, 5, 2, renormalize=renormalize))
    compiles(layer, *[(torch.randn(2, n, 8),) for n in (5, 7)])


@sizes_from_values
def test_a_compiled_layer_serves_other_routes_and_trains(randomize, compiles):
    layer = randomize(MoELayer(2, 5, 4, 1, renormalize=False).double())
    signs = torch.tensor([[[1, 1]], [[-1, -1]], [[1, -1]]])
    calls = [(torch.rand(6, 2).double() * sign,) for sign in signs]
    routes = [layer.router(x)[2].flatten().tolist() for (x,) in calls]
    assert len(set(map(tuple, map(set, routes)))) == 3
    compiles(layer, *calls)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for (x,) in calls:
        gradients = []
        for function in (compiled, layer):
            layer.zero_grad()
            (function(x)[0] ** 2).sum().backward()
            gradients.append([p.grad for p in layer.parameters()])
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_names_are_those_of_the_modules_and_so_is_a_seeds_draw():
    torch.manual_seed(3)
    ours = MoELayer(4, 6, 3, 2).state_dict()
    torch.manual_seed(3)
    theirs = {"router.gate": nn.Linear(4, 3, bias=False)}
    for i in range(3):
        theirs |= {f"experts.{i}.0": nn.Linear(4, 6), f"experts.{i}.2": nn.Linear(6, 4)}
    theirs = {
        f"{name}.{key}": value
        for name, module in theirs.items()
        for key, value in module.state_dict().items()
    }
    assert list(ours) == list(theirs)
    assert all(map(torch.equal, ours.values(), theirs.values()))


# --- what it costs --------------------------------------------------------------------


@sizes
def test_counts_are_those_of_the_parameters(size):
    _, d_model, d_hidden, E, k = size
    layer = MoELayer(*size[1:])
    counts = moe_parameter_counts(d_model, d_hidden, E, k)
    used = [layer.router, *layer.experts[:k]]
    expected = sum(p.numel() for p in layer.parameters())
    assert counts == (expected, sum(p.numel() for m in used for p in m.parameters()))


def test_counts_of_a_larger_layer():
    assert moe_parameter_counts(64, 256, 64, 2) == (2_121_728, 70_272)


@pytest.mark.parametrize("E", [2, 8, 64, 256])
def test_operations_of_the_experts_do_not_grow_with_their_number(E):
    layer, x = MoELayer(16, 32, E, 2), torch.randn(50, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    router = 50 * 2 * 16 * E
    assert counter.get_total_flops() == 50 * 2 * (2 * 2 * 16 * 32) + router


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 2, 3, 2), "d_model must be at least 1, got 0"),
        ((-1, 2, 3, 2), "d_model must be at least 1, got -1"),
        ((4, 0, 3, 2), "d_hidden must be at least 1, got 0"),
        ((4, 2, 0, 2), "num_experts must be at least 1, got 0"),
        ((4, 2, 3, 0), "top_k must be in 1..3, got 0"),
        ((4, 2, 3, -1), "top_k must be in 1..3, got -1"),
        ((4, 2, 3, 4), "top_k must be in 1..3, got 4"),
    ],
)
def test_sizes_that_can_not_be_are_refused(size, message, refuses):
    for make in (MoELayer, moe_parameter_counts):
        with refuses(ValueError, message):
            make(*size)
    if "d_hidden" not in message:
        with refuses(ValueError, message):
            TopKRouter(size[0], *size[2:])


@pytest.mark.parametrize("shape", [(), (4,), (3, 5), (2, 3, 4), (0,)])
def test_the_router_refuses_other_shapes(shape, refuses):
    with refuses(ValueError, f"x must be (N, 4), got {shape}"):
        TopKRouter(4, 3, 2)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 4, 8)])
def test_the_layer_refuses_another_width(shape, refuses):
    with refuses(ValueError, f"x must be (..., 4), got {shape}"):
        MoELayer(4, 6, 3, 2)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tokens_that_are_no_floats_are_refused(dtype, refuses):
    for module in (TopKRouter(4, 3, 2), MoELayer(4, 6, 3, 2)):
        with refuses(TypeError, f"x must be a float tensor, got {dtype}"):
            module(torch.zeros(2, 4, dtype=dtype))
