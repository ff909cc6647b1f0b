"""Early stopping against torch's plateau scheduler and a naive replay."""

import math
import random

import pytest
import torch
from torch import nn

from snippets.regularization.early_stopping import EarlyStopping


def stopped_at(metrics, **options):
    """The position of the first metric that stops, or None."""
    stopper = EarlyStopping(**options)
    return next((n for n, metric in enumerate(metrics) if stopper.step(metric)), None)


def noisy_metrics(seed, length=40):
    chooser = random.Random(seed)
    # Few values, so that ties and steps of just min_delta are common
    return [
        chooser.choice([*range(10 - n // 8), math.nan]) / 4 + 2 for n in range(length)
    ]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("min_delta", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("patience", [1, 2, 5, 8])
def test_it_stops_where_torchs_scheduler_would_lower_the_rate(
    patience, min_delta, mode
):
    for seed in range(20):
        metrics = noisy_metrics(seed)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            mode=mode,
            patience=patience - 1,  # that many bad epochs are allowed, the next acts
            threshold=min_delta,
            threshold_mode="abs",
        )
        ours = EarlyStopping(patience, min_delta, mode)
        for metric in metrics:
            plateau.step(metric)
            stop = ours.step(metric)
            assert ours.best == plateau.best
            assert stop == (optimizer.param_groups[0]["lr"] < 1)
            if stop:
                break
            assert ours.num_bad_steps == plateau.num_bad_epochs


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [1, 3, 6])
def test_it_stops_where_a_look_back_at_the_whole_history_says_so(patience, mode):
    for seed in range(20):
        metrics = [m for m in noisy_metrics(seed) if not math.isnan(m)]
        pick = min if mode == "min" else max
        expected = None
        for n in range(len(metrics)):
            first_best = metrics.index(pick(metrics[: n + 1]))
            if n - first_best >= patience:
                expected = n
                break
        assert stopped_at(metrics, patience=patience, mode=mode) == expected


def test_five_epochs_by_hand():
    stopper = EarlyStopping(patience=3)
    answers = [stopper.step(metric) for metric in (1.0, 0.9, 0.95, 0.9, 0.91)]
    assert answers == [False, False, False, False, True]
    assert stopper.best == 0.9 and stopper.num_bad_steps == 3


def test_the_defaults_are_five_bad_steps_and_lower_is_better():
    assert stopped_at([3, 2, 2, 2, 2, 2, 2]) == 6
    assert stopped_at([3, 2, 2, 2, 2, 2, 1.999]) is None


def test_a_gain_of_min_delta_is_not_enough():
    assert stopped_at([1.0, 0.75], patience=1, min_delta=0.25) == 1
    assert stopped_at([1.0, 0.75, 0.5], patience=3, min_delta=0.25) is None
    assert stopped_at([1.0, 1.25], patience=1, min_delta=0.25, mode="max") == 1
    # Small gains add up: each is measured from the best, not from the last.
    assert stopped_at([1.0, 0.9, 0.7], patience=2, min_delta=0.25) is None


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [math.nan, None])
def test_nan_and_infinitely_bad_metrics_are_no_improvement(mode, bad):
    stopper = EarlyStopping(patience=2, mode=mode)
    bad = stopper.best if bad is None else bad
    model = nn.Linear(1, 1)
    assert not stopper.step(bad, model)
    assert stopper.step(bad, model)
    assert math.isinf(stopper.best) and stopper.best_state is None
    assert not stopper.step(0.0, model) and stopper.best == 0


def test_it_goes_on_saying_stop_until_something_improves():
    stopper = EarlyStopping(patience=1)
    assert [stopper.step(m) for m in (1, 2, 3, 0, 1)] == [
        False, True, True, False, True,
    ]  # fmt: skip


def test_the_best_weights_come_back_not_the_last():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    stopper = EarlyStopping(patience=2)
    best = None
    for metric in (0.5, 0.3, 0.4, 0.6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        model(torch.randn(4, 3))  # moves the running statistics too
        stopper.step(metric, model)
        if metric == 0.3:
            best = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(model[0].weight, best["0.weight"])
    stopper.restore(model)
    assert model.state_dict().keys() == best.keys()
    assert all(torch.equal(v, best[name]) for name, v in model.state_dict().items())


def test_training_on_after_restoring_leaves_the_kept_weights_alone():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping()
    stopper.step(1.0, model)
    kept = model.weight.detach().clone()
    stopper.restore(model)
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(stopper.best_state["weight"], kept)
    stopper.restore(model)
    assert torch.equal(model.weight, kept)


def test_an_improvement_without_a_model_drops_the_old_weights(refuses):
    model = nn.Linear(2, 2)
    stopper = EarlyStopping()
    stopper.step(1.0, model)
    stopper.step(0.5)
    assert stopper.best_state is None
    message = "restore needs a step that improved and had the model"
    with refuses(RuntimeError, message):
        stopper.restore(model)


def test_a_worse_step_without_a_model_keeps_the_weights():
    model = nn.Linear(2, 2)
    stopper = EarlyStopping()
    stopper.step(1.0, model)
    stopper.step(2.0)
    assert stopper.best_state.keys() == {"weight", "bias"}


def test_a_tensor_is_taken_by_value():
    metric = torch.tensor(1.0)
    stopper = EarlyStopping(patience=1)
    stopper.step(metric)
    metric.fill_(0.0)  # as when a running sum is reused
    assert stopper.best == 1.0 and isinstance(stopper.best, float)
    assert not stopper.step(torch.tensor(0.5, dtype=torch.bfloat16))


@pytest.fixture
def every_warning():
    # torch warns of a tensor with a graph that becomes a number, but only once.
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def test_a_loss_that_carries_a_graph_is_taken_by_value(every_warning):
    loss = torch.ones(3, requires_grad=True).sum()
    stopper = EarlyStopping()
    stopper.step(loss)
    assert stopper.best == 3.0 and isinstance(stopper.best, float)


@pytest.mark.parametrize("kept_compiled", [True, False])
@pytest.mark.parametrize("restored_compiled", [True, False])
def test_weights_move_between_a_model_and_its_compiled_self(
    kept_compiled, restored_compiled
):
    model, stopper = nn.Linear(2, 2), EarlyStopping()
    compiled = torch.compile(model, backend="eager")
    kept = model.weight.detach().clone()
    stopper.step(1.0, compiled if kept_compiled else model)
    assert stopper.best_state.keys() == {"weight", "bias"}
    nn.init.zeros_(model.weight)
    stopper.restore(compiled if restored_compiled else model)
    assert torch.equal(model.weight, kept)


def test_an_empty_container_has_weights_too():
    model, stopper = nn.Sequential(), EarlyStopping()
    stopper.step(1.0, model)
    stopper.restore(model)
    assert stopper.best_state == {}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("restart", range(5))
def test_after_a_restart_it_goes_on_as_if_there_had_been_none(restart, mode, tmp_path):
    metrics, model = [3.0, 2.0, 2.5, math.nan, 2.2], nn.Linear(2, 2)
    whole, parts = (EarlyStopping(3, 0.1, mode) for _ in range(2))
    for n, metric in enumerate(metrics):
        if n == restart:
            torch.save(parts.state_dict(), tmp_path / "checkpoint")
            parts = EarlyStopping()
            parts.load_state_dict(torch.load(tmp_path / "checkpoint"))
        nn.init.constant_(model.weight, n)
        assert whole.step(metric, model) == parts.step(metric, model)
        assert whole.best == parts.best
    for stopper in (whole, parts):
        stopper.restore(model)
        assert (model.weight == (1 if mode == "min" else 0)).all()


@pytest.mark.parametrize("change", ["more", "less"])
def test_a_state_with_other_keys_is_refused_and_changes_nothing(change, refuses):
    stopper, state = EarlyStopping(), EarlyStopping(patience=2).state_dict()
    names = list(state)
    state.pop("best") if change == "less" else state.update(cooldown=1)
    with refuses(ValueError, f"state_dict must have {names}, got {list(state)}"):
        stopper.load_state_dict(state)
    assert stopper.patience == 5


def test_a_state_is_not_changed_by_what_follows():
    stopper, model = EarlyStopping(), nn.Linear(2, 2)
    stopper.step(2.0, model)
    state = stopper.state_dict()
    kept = state["best_state"]["weight"].clone()
    nn.init.zeros_(model.weight)
    stopper.step(1.0, model)
    assert state["best"] == 2.0 and torch.equal(state["best_state"]["weight"], kept)


def test_restoring_before_a_step_is_refused(refuses):
    message = "restore needs a step that improved and had the model"
    with refuses(RuntimeError, message):
        EarlyStopping().restore(nn.Linear(1, 1))


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_below_one_is_refused(patience, refuses):
    with refuses(ValueError, f"patience must be at least 1, got {patience}"):
        EarlyStopping(patience=patience)


@pytest.mark.parametrize("patience", [math.nan, math.inf, 2.0, 2.5, True, "3", None])
def test_patience_that_is_no_int_is_refused(patience, refuses):
    with refuses(TypeError, f"patience must be an int, got {patience!r}"):
        EarlyStopping(patience=patience)


@pytest.mark.parametrize("min_delta", [-0.1, math.nan, math.inf])
def test_a_min_delta_that_is_negative_or_not_finite_is_refused(min_delta, refuses):
    with refuses(ValueError, f"min_delta must be finite and >= 0, got {min_delta}"):
        EarlyStopping(min_delta=min_delta)


@pytest.mark.parametrize("mode", ["maximum", "", None])
def test_another_mode_is_refused(mode, refuses):
    with refuses(ValueError, f"mode must be 'min' or 'max', got {mode!r}"):
        EarlyStopping(mode=mode)
