"""The loss of each sample: what it equals, and that it does not depend on the batch around it."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from rtl_dist.config import OptimConfig
from rtl_dist.optim.losses import make_loss

CPU = torch.device("cpu")
COUNTS = (10, 20, 30, 40)


def loss_of(task="single_label", *, counts=COUNTS, label_smoothing=0.0, **optim):
    config = OptimConfig(label_smoothing=label_smoothing, **optim)
    return make_loss(config, task=task, class_counts=counts, device=CPU)


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(12) % 4


@pytest.fixture
def mixed(labels) -> torch.Tensor:
    """Labels as mixup leaves them."""
    one_hot = F.one_hot(labels, 4).float()
    return 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)


@pytest.fixture
def several() -> torch.Tensor:
    """Multi-label: 0/1 for each class."""
    return torch.randint(0, 2, (12, 4), generator=torch.Generator().manual_seed(1)).float()


# --- cross-entropy ---------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["labels", "mixed"])
def test_cross_entropy_is_torch_s(scores, kind, smoothing, request):
    wanted = request.getfixturevalue(kind)
    expected = F.cross_entropy(scores, wanted, reduction="none", label_smoothing=smoothing)
    for name in ("auto", "cross_entropy"):
        loss = loss_of(loss=name, label_smoothing=smoothing)
        torch.testing.assert_close(loss(scores, wanted), expected)


def test_a_class_s_weight_scales_its_samples(scores, labels, mixed):
    plain, weighted = loss_of(), loss_of(class_weights="balanced")
    weight = torch.tensor([100 / (4 * n) for n in COUNTS])
    torch.testing.assert_close(weighted(scores, labels), plain(scores, labels) * weight[labels])
    of_sample = 0.7 * weight[labels] + 0.3 * weight[labels.roll(1)]
    torch.testing.assert_close(weighted(scores, mixed), plain(scores, mixed) * of_sample)


def test_balanced_weights_average_1_and_survive_an_empty_class():
    loss = loss_of(class_weights="balanced")
    labels = torch.tensor([c for c, n in enumerate(COUNTS) for _ in range(n)])
    even = loss(torch.zeros(100, 4), labels)
    torch.testing.assert_close(even.mean(), torch.tensor(4.0).log())
    per_class = torch.zeros(4).index_add(0, labels, even)
    torch.testing.assert_close(per_class, per_class.mean().expand(4))  # each class counts alike
    empty = loss_of(counts=(5, 0), class_weights="balanced")
    assert torch.isfinite(empty(torch.zeros(2, 2), torch.tensor([0, 1]))).all()


# --- logit adjustment ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_logit_adjustment_is_the_loss_of_shifted_scores(scores, labels, mixed, loss):
    shift = 1.5 * torch.tensor([n / 100 for n in COUNTS]).log()
    adjusted, plain = loss_of(loss=loss, logit_adjustment=1.5), loss_of(loss=loss)
    for wanted in (labels, mixed):
        torch.testing.assert_close(adjusted(scores, wanted), plain(scores + shift, wanted))
        even = loss_of(loss=loss, logit_adjustment=1.5, counts=(7, 7, 7, 7))
        torch.testing.assert_close(even(scores, wanted), plain(scores, wanted))


def test_logit_adjustment_asks_more_of_rare_classes_and_survives_an_empty_one():
    scores = torch.zeros(4, 4)
    losses = loss_of(logit_adjustment=1.0)(scores, torch.arange(4))
    assert losses.tolist() == sorted(losses.tolist(), reverse=True)
    torch.testing.assert_close(losses, -torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    empty = loss_of(logit_adjustment=1.0, counts=(5, 0))
    assert torch.isfinite(empty(torch.zeros(2, 2), torch.tensor([0, 1]))).all()


# --- a yes or no for each class --------------------------------------------------------------


def test_bce_of_one_label_takes_the_others_for_no(scores, labels, mixed):
    loss = loss_of(loss="bce")
    one_hot = F.one_hot(labels, 4).float()
    for wanted, given in ((one_hot, labels), (one_hot, one_hot), (mixed, mixed)):
        expected = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").mean(1)
        torch.testing.assert_close(loss(scores, given), expected)


def test_bce_of_one_label_is_smoothed_over_the_classes(scores, labels):
    smooth = F.one_hot(labels, 4) * 0.8 + 0.2 / 4
    expected = F.binary_cross_entropy_with_logits(scores, smooth, reduction="none").mean(1)
    loss = loss_of(loss="bce", label_smoothing=0.2)
    torch.testing.assert_close(loss(scores, labels), expected)


@pytest.mark.parametrize("name", ["auto", "bce"])
def test_bce_of_several_labels_is_smoothed_towards_a_half(scores, several, name):
    expected = F.binary_cross_entropy_with_logits(scores, several * 0.8 + 0.1, reduction="none")
    loss = loss_of("multi_label", loss=name, label_smoothing=0.2)
    torch.testing.assert_close(loss(scores, several), expected.mean(1))


def test_bce_weighs_positives(scores, labels, several):
    weight = torch.tensor([100 / (4 * n) for n in COUNTS])

    def expected(wanted):
        losses = F.binary_cross_entropy_with_logits(
            scores, wanted, pos_weight=weight, reduction="none"
        )
        return losses.mean(1)

    loss = loss_of("multi_label", class_weights="balanced")
    torch.testing.assert_close(loss(scores, several), expected(several))
    loss = loss_of(loss="bce", class_weights="balanced")
    torch.testing.assert_close(loss(scores, labels), expected(F.one_hot(labels, 4).float()))


# --- focal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_several_labels_is_torchvision_s(scores, several, gamma):
    expected = sigmoid_focal_loss(scores, several, alpha=-1, gamma=gamma, reduction="none")
    loss = loss_of("multi_label", loss="focal", focal_gamma=gamma)
    torch.testing.assert_close(loss(scores, several), expected.mean(1))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_is_its_formula(scores, labels, mixed, gamma, smoothing):
    loss = loss_of(loss="focal", focal_gamma=gamma, label_smoothing=smoothing)
    p = scores.double().softmax(1)
    for given, wanted in ((labels, F.one_hot(labels, 4)), (mixed, mixed)):
        q = wanted.double() * (1 - smoothing) + smoothing / 4
        expected = -(q * (1 - p) ** gamma * p.log()).sum(1)
        torch.testing.assert_close(loss(scores, given).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_with_gamma_0_is_cross_entropy(scores, labels, mixed, smoothing):
    focal = loss_of(loss="focal", focal_gamma=0.0, label_smoothing=smoothing)
    plain = loss_of(loss="cross_entropy", label_smoothing=smoothing)
    for wanted in (labels, mixed):
        assert torch.equal(focal(scores, wanted), plain(scores, wanted))
    almost = loss_of(loss="focal", focal_gamma=1e-7, label_smoothing=smoothing)  # the formula's own
    torch.testing.assert_close(almost(scores, labels), plain(scores, labels))


def test_focal_is_weighted_by_class_too(scores, labels):
    weight = torch.tensor([100 / (4 * n) for n in COUNTS])[labels]
    weighted = loss_of(loss="focal", class_weights="balanced")
    plain = loss_of(loss="focal")
    torch.testing.assert_close(weighted(scores, labels), plain(scores, labels) * weight)


# --- all of them -----------------------------------------------------------------------------

KINDS = [
    {"loss": "cross_entropy"},
    {"loss": "cross_entropy", "class_weights": "balanced"},
    {"loss": "cross_entropy", "logit_adjustment": 1.0},
    {"loss": "bce", "class_weights": "balanced"},
    {"loss": "focal"},
    {"loss": "focal", "focal_gamma": 0.5},
    {"loss": "focal", "focal_gamma": 1.0, "logit_adjustment": 1.0},
]
BINARY_KINDS = [kind for kind in KINDS if "cross" not in kind["loss"] and len(kind) < 3]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_sample_s_loss_does_not_depend_on_its_batch(scores, labels, mixed, kind, smoothing):
    loss = loss_of(label_smoothing=smoothing, **kind)
    for wanted in (labels, mixed):
        whole = loss(scores, wanted)
        assert whole.shape == (12,)
        parts = [loss(scores[a:b], wanted[a:b]) for a, b in ((0, 1), (1, 7), (7, 12))]
        assert torch.equal(torch.cat(parts), whole)
    one_hot = loss(scores, F.one_hot(labels, 4).float())
    torch.testing.assert_close(one_hot, loss(scores, labels))


@pytest.mark.parametrize("kind", BINARY_KINDS, ids=str)
def test_nor_with_several_labels(scores, several, kind):
    loss = loss_of("multi_label", label_smoothing=0.1, **kind)
    parts = [loss(scores[a:b], several[a:b]) for a, b in ((0, 1), (1, 7), (7, 12))]
    assert torch.equal(torch.cat(parts), loss(scores, several))


def extreme_scores() -> torch.Tensor:
    """Right beyond doubt, wrong beyond doubt, and neither."""
    right = F.one_hot(torch.arange(4), 4) * 2e4 - 1e4
    return torch.cat([right, -right, torch.full((2, 4), 1e4), torch.full((2, 4), -1e4)])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_finite_at_extreme_scores(labels, mixed, kind, smoothing):
    for wanted in (labels, mixed):
        scores = extreme_scores().requires_grad_()
        losses = loss_of(label_smoothing=smoothing, **kind)(scores, wanted)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert scores.grad.isfinite().all()
        assert (scores.grad != 0).any()


@pytest.mark.parametrize("kind", BINARY_KINDS, ids=str)
def test_gradients_are_finite_with_several_labels(several, kind):
    scores = extreme_scores().requires_grad_()
    losses = loss_of("multi_label", **kind)(scores, several)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert scores.grad.isfinite().all()
    assert (scores.grad != 0).any()
