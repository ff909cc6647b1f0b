"""LoRA against peft, against the plain sum of two matrices, and its own promises."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snippets.lora.lora import LoRALinear, inject_lora, lora_parameter_count


class Block(nn.Module):
    """Four linear layers under names, as a transformer has them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.mlp = nn.ModuleDict({"up": nn.Linear(6, 12), "down": nn.Linear(12, 6)})
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = self.norm(self.q_proj(x) * self.k_proj(x).tanh())
        return self.mlp["down"](self.mlp["up"](x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def layer(*, bias=True, rank=3, alpha=5.0, dtype=torch.float64):
    """A LoRA layer in the midst of its training: B is no longer zero."""
    ours = LoRALinear(nn.Linear(6, 4, bias=bias).to(dtype), rank, alpha)
    nn.init.normal_(ours.lora_A)
    nn.init.normal_(ours.lora_B)
    return ours


class Plain(nn.Module):
    """The same parameters; the update is made whole, and added to the weight."""

    def __init__(self, ours, scaling):
        super().__init__()
        self.base, self.lora_A, self.lora_B = ours.base, ours.lora_A, ours.lora_B
        self.scaling = scaling

    def forward(self, x):
        weight = self.base.weight + self.scaling * torch.einsum(
            "or,ri->oi", self.lora_B, self.lora_A
        )
        return F.linear(x, weight, self.base.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 6), (6,), (1, 6), (0, 6)])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 5.0), (8, 16.0)])
def test_it_is_the_layer_with_the_update_added(
    shape, rank, alpha, bias, agrees_with_gradients
):
    ours = layer(bias=bias, rank=rank, alpha=alpha)
    ours.base.requires_grad_(True)  # its gradients are compared as well
    agrees_with_gradients(
        ours,
        Plain(ours, alpha / rank),
        torch.randn(shape).double(),
        against="F.linear with W + (alpha / r) B A",
        atol=1e-12,
        modules=(ours, Plain(ours, alpha / rank)),
    )


def adapted_by_peft(reference_library, model, targets, rank, alpha):
    """peft's model with the base's and our weights."""
    peft = reference_library("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    return peft.get_peft_model(copy.deepcopy(model), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "up", "head"]])
def test_a_model_and_its_training_are_those_of_peft(
    targets, dtype, reference_library, agrees
):
    model = Model()
    theirs = adapted_by_peft(reference_library, model, targets, rank=2, alpha=6)
    names = inject_lora(model, targets, rank=2, alpha=6)
    for name in names:
        ours, other = (m.get_submodule(name) for m in (model, theirs.base_model.model))
        nn.init.normal_(ours.lora_B)
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(ours.lora_A)
            other.lora_B["default"].weight.copy_(ours.lora_B)
    model, theirs = model.to(dtype), theirs.to(dtype)

    x = torch.randn(5, 6, dtype=dtype)
    # peft adds the parts in another order; bfloat16 has 8 bits
    atol = 1e-6 if dtype == torch.float32 else 0.1
    agrees(model(x), theirs(x), "peft", atol)
    model(x).float().square().sum().backward()
    theirs(x).float().square().sum().backward()
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == sum(p.requires_grad for p in model.parameters())
    for name in names:
        ours, other = (m.get_submodule(name) for m in (model, theirs.base_model.model))
        for a, b in (("lora_A", other.lora_A), ("lora_B", other.lora_B)):
            found, expected = getattr(ours, a).grad, b["default"].weight.grad
            scale = expected.abs().max()
            bits = 1e-5 if dtype == torch.float32 else 0.05
            agrees(found / scale, expected / scale, "peft", bits)
        delta = other.get_delta_weight("default")
        agrees(ours.delta_weight().to(dtype), delta, "peft", atol / 10)


def test_a_merged_model_is_pefts_merged_model(reference_library, agrees):
    model = Model()
    theirs = adapted_by_peft(reference_library, model, ["q_proj", "down"], 2, 6)
    for name in inject_lora(model, ["q_proj", "down"], rank=2, alpha=6):
        ours = model.get_submodule(name)
        nn.init.normal_(ours.lora_B)
        other = theirs.base_model.model.get_submodule(name)
        other.lora_A["default"].weight.data = ours.lora_A.data.clone()
        other.lora_B["default"].weight.data = ours.lora_B.data.clone()
        ours.merge()
    theirs = theirs.merge_and_unload()
    for name in ("blocks.0.q_proj", "blocks.1.mlp.down"):
        merged = model.get_submodule(name).base.weight
        agrees(merged, theirs.get_submodule(name).weight, "peft", atol=1e-6)
    x = torch.randn(5, 6)
    agrees(model(x), theirs(x), "peft", atol=1e-5)


def test_training_starts_at_the_model_as_it_was():
    base = nn.Linear(6, 4)
    x = torch.randn(5, 6)
    before = base(x)
    ours = LoRALinear(base)
    assert torch.equal(ours(x), before)
    ours(x).square().sum().backward()
    assert not ours.lora_A.grad.any()  # B is zero: it has to move first
    assert ours.lora_B.grad.abs().min() > 0
    assert base.weight.grad is None and base.bias.grad is None


def test_a_starts_as_the_weight_of_a_linear_layer_does():
    ours = LoRALinear(nn.Linear(400, 300), rank=50)
    bound = 1 / 400**0.5
    assert 0.99 * bound < ours.lora_A.max() <= bound
    assert -bound <= ours.lora_A.min() < -0.99 * bound
    assert abs(ours.lora_A.std() / (bound / 3**0.5) - 1) < 0.02


def test_the_defaults_are_rank_8_and_alpha_16():
    ours = LoRALinear(nn.Linear(6, 4))
    assert ours.lora_A.shape == (8, 6) and ours.lora_B.shape == (4, 8)
    assert ours.scaling == 2.0
    model = Model()
    inject_lora(model, ["head"])
    assert model.head.lora_A.shape == (8, 6) and model.head.scaling == 2.0


def test_only_a_and_b_are_trained_and_the_rest_stays_bit_for_bit():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    inject_lora(model, ["q_proj", "head"], rank=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
    learned = {
        n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None
    }
    assert learned == {"lora_A", "lora_B"}
    after = {
        name.replace("base.", ""): value for name, value in model.state_dict().items()
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.head.lora_B.abs().min() > 0


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_update_has_the_rank_and_the_sum_is_full(rank):
    ours = LoRALinear(nn.Linear(20, 12).double(), rank)
    nn.init.normal_(ours.lora_B)
    assert torch.linalg.matrix_rank(ours.delta_weight()) == rank
    assert torch.linalg.matrix_rank(ours.base.weight + ours.delta_weight()) == 12


def test_alpha_over_r_scales_the_update():
    small, large = layer(rank=2, alpha=1.0), layer(rank=2, alpha=10.0)
    large.lora_A, large.lora_B = small.lora_A, small.lora_B
    torch.testing.assert_close(large.delta_weight(), 10 * small.delta_weight())
    torch.testing.assert_close(small.delta_weight(), small.lora_B @ small.lora_A / 2)


def test_merging_changes_no_output_and_unmerging_restores_the_weight():
    ours, x = layer(), torch.randn(5, 6).double()
    weight, bias, before = ours.base.weight.clone(), ours.base.bias.clone(), ours(x)
    identity = ours.base.weight
    ours.merge()
    assert ours.merged and ours.base.weight is identity
    torch.testing.assert_close(ours.base.weight, weight + ours.delta_weight())
    torch.testing.assert_close(ours(x), before)
    assert torch.equal(ours(x), ours.base(x))
    ours.unmerge()
    assert not ours.merged
    torch.testing.assert_close(ours.base.weight, weight, atol=1e-14, rtol=0)
    torch.testing.assert_close(ours(x), before)
    assert torch.equal(ours.base.bias, bias)
    assert ours.base.weight.grad_fn is None and not ours.base.weight.requires_grad


def test_merged_a_and_b_get_no_gradient():
    ours = layer()
    ours.merge()
    x = torch.randn(5, 6).double().requires_grad_()
    ours(x).sum().backward()
    assert ours.lora_A.grad is None and ours.lora_B.grad is None
    torch.testing.assert_close(x.grad, ours.base.weight.sum(0).expand(5, 6))


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused(refuses):
    ours = layer()
    with refuses(RuntimeError, "the update is not merged"):
        ours.unmerge()
    ours.merge()
    weight = ours.base.weight.clone()
    with refuses(RuntimeError, "the update is already merged"):
        ours.merge()
    assert torch.equal(ours.base.weight, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_in_half_precision_is_rounded_once(dtype):
    ours = layer(dtype=dtype, rank=4)
    exact = ours.base.weight.double() + 5 / 4 * (
        ours.lora_B.double() @ ours.lora_A.double()
    )
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert ours.delta_weight().dtype == torch.float32
            merged = copy.deepcopy(ours)
            merged.merge()
        assert merged.base.weight.dtype == dtype
        # float32 may fall on the other side of a tie, in no more than a few places
        assert (merged.base.weight == exact.to(dtype)).double().mean() > 0.9
        torch.testing.assert_close(
            merged.base.weight.double(), exact, atol=0, rtol=torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_runs_in_half_precision_and_under_autocast(dtype):
    ours = layer(dtype=torch.float32)
    x = torch.randn(5, 6)
    exact = Plain(ours, 5 / 3)(x)
    with torch.autocast("cpu", dtype):
        found = ours(x)
    half = copy.deepcopy(ours).to(dtype)(x.to(dtype))
    assert found.dtype == half.dtype == dtype
    for y in (found, half):
        torch.testing.assert_close(y.float(), exact, atol=0.1, rtol=0.05)


def test_a_state_that_was_saved_merged_is_loaded_merged():
    ours, other = layer(), layer()
    ours.merge()
    other.load_state_dict(ours.state_dict())
    assert other.merged is True
    x = torch.randn(5, 6).double()
    assert torch.equal(other(x), ours(x))
    ours.unmerge()
    other.load_state_dict(ours.state_dict())
    assert other.merged is False
    assert torch.equal(other(x), ours(x))


def test_the_state_has_the_names_of_the_api_and_loads_safely(tmp_path):
    ours, other = layer(), layer()
    names = {"base.weight", "base.bias", "lora_A", "lora_B", "_extra_state"}
    assert ours.state_dict().keys() == names
    torch.save(ours.state_dict(), tmp_path / "lora.pt")
    other.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True))
    assert torch.equal(other.delta_weight(), ours.delta_weight())


def test_dtype_and_device_follow_the_base():
    ours = LoRALinear(nn.Linear(6, 4, dtype=torch.bfloat16))
    assert ours.lora_A.dtype == ours.lora_B.dtype == torch.bfloat16
    ours = LoRALinear(nn.Linear(6, 4, device="meta"))
    assert ours.lora_A.is_meta and ours.lora_B.is_meta
    assert ours(torch.zeros(2, 6, device="meta")).shape == (2, 4)
    ours.merge()
    assert ours.base.weight.is_meta


def test_inputs_are_not_modified_and_need_not_be_contiguous():
    ours, x = layer(), torch.randn(6, 5).double().T
    before = x.clone()
    y = ours(x)
    assert y.is_contiguous() and torch.equal(x, before)
    torch.testing.assert_close(y, ours(x.contiguous()))


def test_it_compiles_merged_and_not(compiles):
    ours = layer(dtype=torch.float32)
    compiles(lambda x: ours(x), (torch.randn(4, 6),), (torch.randn(3, 6),))
    ours.merge()
    compiles(lambda x: ours(x), (torch.randn(4, 6),))


PATHS = ["blocks.0.q_proj", "blocks.1.q_proj"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], PATHS),
        ("q_proj", PATHS),
        ({"q_proj": 1}.keys(), PATHS),
        (["blocks.1.q_proj"], PATHS[1:]),
        (["head", "blocks.0.q_proj"], [PATHS[0], "head"]),
        (["mlp.up", "blocks.0.mlp.up"], None),
    ],
)
def test_just_the_layers_that_are_named_are_wrapped(targets, expected, refuses):
    model = Model()
    if expected is None:  # neither a last component nor a full path
        with refuses(
            ValueError, "targets must name layers of the model, ['mlp.up'] do not"
        ):
            inject_lora(model, targets)
        return
    plain = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert inject_lora(model, targets, rank=2, alpha=3.0) == expected
    for name, module in plain.items():
        found = model.get_submodule(name)
        if name in expected:
            assert isinstance(found, LoRALinear) and found.base is module
            assert found.lora_A.shape[0] == 2 and found.scaling == 1.5
        else:
            assert found is module


def test_a_part_of_a_name_is_no_match(refuses):
    for target in ("proj", "q_pro", "blocks.0", "q_proj.weight", ""):
        model = Model()
        with pytest.raises((ValueError, TypeError)):
            inject_lora(model, [target])
        assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_what_is_refused_leaves_the_model_as_it_was(refuses):
    for targets, error, message in (
        (["q_proj", "nothing"], ValueError, "name layers of the model, ['nothing'] do"),
        ([], None, ""),
        (["q_proj", "norm"], TypeError, "['blocks.0.norm', 'blocks.1.norm'] are none"),
        (["mlp"], TypeError, "['blocks.0.mlp', 'blocks.1.mlp'] are none"),
    ):
        model = Model()
        if error is None:
            assert inject_lora(model, targets) == []
            continue
        with pytest.raises(error) as raised:
            inject_lora(model, targets)
        assert message in str(raised.value)
        assert str(raised.value).startswith("targets must name ")
        assert all(p.requires_grad for p in model.parameters())
        assert type(model.blocks[0].q_proj) is nn.Linear
    model = Model()
    with refuses(ValueError, "rank=0 must be at least 1"):
        inject_lora(model, ["q_proj"], rank=0)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_call_leaves_the_first_one_learning():
    model = Model()
    inject_lora(model, ["q_proj"], rank=2)
    inject_lora(model, ["head"], rank=4)
    learn = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learn == {f"{n}.lora_{x}" for n in [*PATHS, "head"] for x in "AB"}
    with pytest.raises(TypeError, match="are none"):
        inject_lora(model, ["q_proj"])


def test_a_layer_that_stands_in_two_places_stays_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2] = model[0]
    assert inject_lora(model, ["0", "2"]) == ["0", "2"]
    assert model[0] is model[2]


def test_the_counts_are_those_of_the_matrices():
    assert lora_parameter_count(10_000, 10_000, 8) == 160_000
    ours = LoRALinear(nn.Linear(6, 4), rank=3)
    learned = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert lora_parameter_count(6, 4, 3) == learned == 30
    assert lora_parameter_count(1, 1, 1) == 2


def test_bad_sizes_are_refused(refuses):
    base = nn.Linear(6, 4)
    with refuses(TypeError, "base must be an nn.Linear, got Conv1d"):
        LoRALinear(nn.Conv1d(1, 1, 1))
    for rank in (0, -1):
        with refuses(ValueError, f"{rank=} must be at least 1"):
            LoRALinear(base, rank)
    for alpha in (0.0, -1.0, float("inf"), float("nan")):
        with refuses(ValueError, f"{alpha=} must be positive and finite"):
            LoRALinear(base, 2, alpha)
    assert base.weight.requires_grad  # what was refused has frozen nothing
    for sizes in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        names = zip(("in_features", "out_features", "rank"), sizes, strict=True)
        message = ", ".join(f"{name}={size}" for name, size in names)
        with refuses(ValueError, f"{message} must be at least 1"):
            lora_parameter_count(*sizes)
