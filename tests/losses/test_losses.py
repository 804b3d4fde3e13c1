"""The loss modules: the reference's numbers, Matryoshka, and the contract of a plug-in."""

import json
from pathlib import Path

import pytest
import torch
from loss_batches import retrieval_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedtune.data.records import Format
from embedtune.errors import InputError
from embedtune.losses import (
    CoSENT,
    Distillation,
    Embeddings,
    InfoNCE,
    ListwiseKL,
    Loss,
    Matryoshka,
    Target,
    functional,
    infonce,
)
from embedtune.losses.contract import require_parts
from embedtune.losses.similarity import cosine_similarity
from embedtune.training.choose_loss import default_loss

# Values computed by running the reference implementation (RAG-Retrieval) in float64.
REFERENCE = json.loads((Path(__file__).parent / "reference_losses.json").read_text())
DIMS = REFERENCE["mrl_dims"]
TOLERANCE = 1e-10


def inputs(*names):
    return [
        torch.tensor(REFERENCE["inputs"][name], dtype=torch.float64).requires_grad_()
        for name in names
    ]


def assert_reference(name, leaves, loss):
    expected = REFERENCE["expected"][name]
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert loss.item() == pytest.approx(expected["loss"], rel=0, abs=TOLERANCE)
    norms = [gradient.norm().item() for gradient in gradients]
    assert min(norms) > 0
    assert norms == pytest.approx(expected["grad_norms"], rel=0, abs=TOLERANCE)
    for gradient, row in zip(gradients, expected["grad_first_row"], strict=True):
        assert gradient[0].tolist() == pytest.approx(row, rel=0, abs=TOLERANCE)


@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize("mrl", [False, True])
@pytest.mark.parametrize("name", ["pair_in_batch", "triplet_in_batch", "pair_kl_over_batch"])
def test_losses_equal_the_reference(name, mrl, temperature):
    query, positive, negative = inputs("query", "positive", "negative")
    loss = InfoNCE(temperature)
    embeddings, target = Embeddings(query, positive), Target()
    leaves = [query, positive]
    if name == "triplet_in_batch":
        embeddings = Embeddings(query, positive, negative)
        leaves.append(negative)
    elif name == "pair_kl_over_batch":
        loss = ListwiseKL("batch", temperature, temperature)
        scores = torch.tensor(REFERENCE["inputs"]["scores"], dtype=torch.float64)
        target = Target(scores=scores, list_index=torch.arange(len(query)))
    if mrl:
        loss, name = Matryoshka(loss, DIMS), f"{name}_mrl"
    name += "" if temperature == 0.02 else f"@T={temperature}"
    assert_reference(name, leaves, loss(embeddings, target)["loss"])


@pytest.mark.parametrize("name", ["cosine", "similarity_mse", "rank_hinge"])
def test_distillation_terms_equal_the_reference_at_each_width(name):
    (student,) = inputs("student")
    teacher = torch.tensor(REFERENCE["inputs"]["teacher"], dtype=torch.float64)
    for dim in DIMS if name != "cosine" else [None]:
        dims = DIMS if dim is None else [dim]
        parts = Distillation(mrl_dims=dims)(Embeddings(student), Target(teacher=teacher))
        suffix = "" if dim is None else f"@{dim}"
        assert_reference(f"distill_{name}{suffix}", [student], parts[name])


def test_the_weighted_distillation_equals_the_reference():
    (student,) = inputs("student")
    teacher = torch.tensor(REFERENCE["inputs"]["teacher"], dtype=torch.float64)
    loss = Distillation(mrl_dims=DIMS, cosine_weight=10.0)
    parts = loss(Embeddings(student), Target(teacher=teacher))
    assert_reference("distill_total", [student], parts["loss"])


def test_every_reference_value_is_tested():
    tested = {
        f"{name}{mrl}{temperature}"
        for name in ("pair_in_batch", "triplet_in_batch", "pair_kl_over_batch")
        for mrl in ("", "_mrl")
        for temperature in ("", "@T=0.1")
    } | {"distill_cosine", "distill_total"}
    tested |= {f"distill_{n}@{d}" for n in ("similarity_mse", "rank_hinge") for d in DIMS}
    assert tested == set(REFERENCE["expected"])


# --- Batches of the smallest size -----------------------------------------------------------


@pytest.mark.parametrize("dims", [None, [4, 16]])
def test_distillation_of_one_text_is_its_cosine_alone(dims):
    student, teacher = torch.randn(2, 1, 16).unbind()
    student.requires_grad_()
    parts = Distillation(mrl_dims=dims)(Embeddings(student), Target(teacher=teacher))
    expected = 100 * functional.distill_cosine(student, teacher)
    torch.testing.assert_close(parts["loss"], expected, rtol=1e-5, atol=1e-5)
    parts["loss"].backward()
    assert student.grad.abs().max() > 0


def test_distillation_averages_its_last_two_terms_over_the_widths():
    student, teacher = torch.randn(5, 16), torch.randn(5, 24)
    target = Target(teacher=torch.nn.functional.pad(teacher, (0, 0)))
    alone = [Distillation(mrl_dims=[d], cosine_weight=0.0) for d in (4, 16)]
    together = Distillation(mrl_dims=[4, 16], cosine_weight=0.0)
    student = torch.nn.functional.pad(student, (0, 8))
    losses = [loss(Embeddings(student), target)["loss"] for loss in alone]
    found = together(Embeddings(student), target)["loss"]
    torch.testing.assert_close(found, torch.stack(losses).mean())


# --- Identity-aware targets -----------------------------------------------------------------


def test_duplicates_and_known_positives_change_the_loss():
    query, positive, negative = torch.randn(3, 2, 8).unbind()
    target = Target(
        query_id=torch.tensor([1, 2]),
        positive_id=torch.tensor([10, 20]),
        negative_id=torch.tensor([30, 10]),  # the second query's negative is the first's positive
        known_positive_id=torch.tensor([[10, 0], [20, 30]]),  # the first's negative, the second's
        positive_query_id=torch.tensor([1, 2]),
        own=torch.arange(2),
    )
    embeddings = Embeddings(query, positive, negative)
    loss = InfoNCE(0.1)
    similarity = cosine_similarity(query, torch.cat([positive, negative]))
    masked = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool()
    expected = functional.info_nce(similarity, 0.1, known=masked)
    torch.testing.assert_close(loss(embeddings, target)["loss"], expected)
    assert not torch.allclose(loss(embeddings, Target())["loss"], expected)
    wrapped = Matryoshka(loss, [8])(embeddings, target)["loss"]
    torch.testing.assert_close(wrapped, expected)


@pytest.mark.parametrize("multi_positive", [False, True])
def test_the_text_of_a_query_is_neither_its_negative_nor_another_positive(multi_positive):
    embeddings = Embeddings(*torch.randn(3, 3, 8).unbind())
    target = Target(
        query_id=torch.tensor([1, 2, 3]),  # the queries with the prompts of their rows
        query_text_id=torch.tensor([10, 20, 30]),
        positive_id=torch.tensor([11, 10, 30]),  # the second is the first query, the third itself
        negative_id=torch.tensor([20, 10, 31]),
        known_positive_id=torch.tensor([[11], [10], [30]]),
        positive_query_id=torch.tensor([1, 2, 3]),
        own=torch.arange(3),
    )
    loss = InfoNCE(0.1, in_batch_positives=True, multi_positive=multi_positive)
    logits = cosine_similarity(embeddings.query, torch.cat(embeddings[1:])) / 0.1
    kept = [0, 2, 3, 5], [0, 1, 2, 5], [0, 1, 2, 3, 4, 5]
    expected = [
        row[these].logsumexp(0) - row[own]
        for own, (row, these) in enumerate(zip(logits, kept, strict=True))
    ]
    if multi_positive:  # the hard negative of the second query is its positive, too
        negatives = logits[1, [0, 2, 5]].logsumexp(0)
        expected[1] = torch.nn.functional.softplus(negatives - logits[1, [1, 4]]).mean()
    torch.testing.assert_close(loss(embeddings, target)["loss"], torch.stack(expected).mean())


# --- Matryoshka and plug-ins ----------------------------------------------------------------


class Distance(Loss):
    """A user's loss, which knows nothing of shared similarities."""

    def forward(self, embeddings, target):
        return {"loss": (embeddings.query - embeddings.positive).square().mean()}


@pytest.mark.parametrize("loss", [InfoNCE(0.1), Distance()], ids=["shared", "plug-in"])
def test_matryoshka_is_the_weighted_mean_over_cut_embeddings(loss):
    embeddings = Embeddings(*torch.randn(2, 6, 16, dtype=torch.float64).requires_grad_().unbind())
    parts = Matryoshka(loss, [16, 4, 8], weights=[1.0, 2.0, 5.0])(embeddings, Target())
    alone = [loss(embeddings.cut(d), Target())["loss"] for d in (16, 4, 8)]
    expected = (alone[0] + 2 * alone[1] + 5 * alone[2]) / 8
    torch.testing.assert_close(parts["loss"], expected)
    torch.testing.assert_close(parts["loss/4"], alone[1])
    found, wanted = (
        torch.autograd.grad(x, embeddings.query, retain_graph=True)[0]
        for x in (parts["loss"], expected)
    )
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(found, wanted)


def test_matryoshka_of_the_full_width_alone_is_the_loss():
    embeddings = Embeddings(*torch.randn(2, 6, 16).unbind())
    loss = InfoNCE()
    wrapped = Matryoshka(loss, [16])(embeddings, Target())["loss"]
    torch.testing.assert_close(wrapped, loss(embeddings, Target())["loss"])


# --- Speed and memory -----------------------------------------------------------------------


@pytest.fixture
def in_blocks(monkeypatch):
    """Blocks of three queries."""
    monkeypatch.setattr(infonce, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(infonce, "MIN_BLOCK_ROWS", 3)


def info_nce_at_once(loss, embeddings, target):
    """From whole matrices of similarities and masks."""
    documents = infonce.candidates(embeddings)
    ids = torch.cat([i for i in (target.positive_id, target.negative_id) if i is not None])
    known = functional.known_positive_mask(
        target.query_id,
        ids,
        target.never_negative_id(),
        target.positive_query_id,
        target.own,
    )
    assert known.any()
    return functional.info_nce(
        cosine_similarity(embeddings.query, documents),
        loss.temperature,
        in_batch_positives=loss.in_batch_positives,
        own=target.own,
        num_positives=len(embeddings.positive),
        known=known,
        left_out=target.query_text_id[:, None] == ids,
        multi_positive=loss.multi_positive,
    )


@pytest.mark.parametrize("multi_positive", [False, True])
@pytest.mark.parametrize("in_batch_positives", [False, True])
@pytest.mark.parametrize(("m", "k"), [(7, 0), (7, 2), (11, 0), (11, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.usefixtures("in_blocks")
def test_info_nce_in_blocks_equals_that_of_whole_matrices(
    m, k, in_batch_positives, multi_positive, dtype, tolerance
):
    embeddings, target = retrieval_batch(m=m, k=k, dtype=dtype)
    loss = InfoNCE(0.1, in_batch_positives, multi_positive)
    dims = [16, 4, 9]
    at_once = [info_nce_at_once(loss, embeddings.cut(d), target) for d in dims]
    found = Matryoshka(loss, dims)(embeddings, target)
    parts = [found[f"loss/{d}"] for d in dims]
    torch.testing.assert_close(parts, at_once, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(loss(embeddings, target)["loss"], at_once[0])
    leaves = [e for e in embeddings if e is not None]
    gradients = torch.autograd.grad(found["loss"], leaves)
    expected = torch.autograd.grad(sum(at_once) / 3, leaves)
    assert min(g.abs().max() for g in expected) > 1e-3
    torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return result


@pytest.mark.usefixtures("in_blocks")
def test_no_matrix_of_all_queries_and_documents_is_made():
    embeddings, target = retrieval_batch(b=100, m=100, k=2, width=4)
    with Largest() as largest:
        Matryoshka(InfoNCE(), [2, 4])(embeddings, target)["loss"].backward()
    assert 3 * 300 <= largest.elements <= 300 * 4  # the documents are the largest


def kept_for_backward(loss, embeddings, target):
    """Return the bytes of the distinct tensors that autograd keeps, beside the embeddings."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(embeddings, target)["loss"]
    for leaf in embeddings:
        if leaf is not None:
            storages.pop(leaf.untyped_storage().data_ptr(), None)
    value.backward()
    return sum(storage.nbytes() for storage in storages.values())


EIGHT = [2, 4, 6, 8, 10, 12, 14, 16]


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("multi_positive", [False, True])
def test_info_nce_keeps_no_matrix_a_width(k, multi_positive):
    embeddings, target = retrieval_batch(b=128, m=128, k=k, dtype=torch.float32)
    loss = Matryoshka(InfoNCE(multi_positive=multi_positive), EIGHT)
    matrix = 128 * 128 * (1 + k) * 4
    assert 0 < kept_for_backward(loss, embeddings, target) < 2 * matrix


def test_distillation_keeps_half_a_matrix_a_width():
    student, teacher = torch.randn(2, 128, 16).unbind()
    embeddings, target = Embeddings(student.requires_grad_()), Target(teacher=teacher)
    kept = [
        kept_for_backward(Distillation(dims), embeddings, target) for dims in (EIGHT, EIGHT[-1:])
    ]
    matrix = 128 * 128 * 4
    assert 0 < kept[1] < 2 * matrix  # the teacher's order, 8 bytes a pair, and 4 a pair
    assert kept[0] - kept[1] < 4 * matrix


# --- Mistakes -------------------------------------------------------------------------------


def test_wrong_hyper_parameters_are_refused():
    for wrong in (
        lambda: InfoNCE(temperature=0.0),
        lambda: ListwiseKL(temperature=-1.0),
        lambda: ListwiseKL(teacher_temperature=-1.0),
        lambda: ListwiseKL(teacher_temperature=0.0),
        lambda: CoSENT(scale=0.0),
        lambda: Matryoshka(InfoNCE(), [4, 8], weights=[1.0]),
        lambda: default_loss(Format.DISTILL, temperature=0.1),
        lambda: Matryoshka(InfoNCE(), [32])(Embeddings(*torch.randn(2, 3, 16).unbind()), Target()),
    ):
        with pytest.raises(InputError, match=r"expected|none"):
            wrong()


@pytest.mark.parametrize(
    ("dims", "found"), [([], r"found \[\]"), ([0, 8], r"found \[0, 8\]"), ([8, 17], "found 17")]
)
@pytest.mark.parametrize(
    "with_widths", [Distillation, lambda dims: Matryoshka(Distillation(), dims)]
)
def test_widths_that_an_embedding_does_not_have_are_refused(with_widths, dims, found):
    with pytest.raises(InputError, match=rf"dims: expected (different )?widths .*{found}"):
        with_widths(dims)(Embeddings(torch.randn(4, 16)), Target(teacher=torch.randn(4, 16)))


def test_teacher_temperature_depends_on_what_is_compared():
    assert ListwiseKL("batch").teacher_temperature == ListwiseKL().temperature == 0.05
    assert ListwiseKL("batch", teacher_temperature=0.5).teacher_temperature == 0.5
    lists = ListwiseKL("list", temperature=0.1)
    assert lists.teacher_temperature is None
    assert lists.derive_teacher_temperature(0.3) == pytest.approx(0.1 * 0.3 / 0.15)
    assert lists.derive_teacher_temperature(0.0) == 1.0  # of scores that are all the same


def scored_batch(scores: torch.Tensor) -> tuple[Embeddings, Target]:
    draw = torch.Generator().manual_seed(1)
    query, positive = (torch.randn(n, 8, generator=draw) for n in (3, 12))
    target = Target(
        scores=scores,
        list_index=torch.arange(3).repeat_interleave(4),
        own=torch.tensor([0, 4, 8]),
        query_id=torch.arange(1, 4),
        positive_id=torch.arange(11, 23),
        positive_query_id=torch.arange(1, 4).repeat_interleave(4),
        known_positive_id=torch.arange(11, 23).view(3, 4),
    )
    return Embeddings(query=query, positive=positive), target


def test_scores_of_any_scale_ask_for_the_same():
    """Logits, percents and cosines that are a line through each other."""
    scores = torch.randn(12, generator=torch.Generator().manual_seed(2))
    losses = []
    for scale, shift in ((1.0, 0.0), (0.05, 0.6), (30.0, -100.0)):
        loss, scaled = ListwiseKL(), scores * scale + shift
        loss.derive_teacher_temperature(float(scaled.view(3, 4).std(dim=1, correction=0).mean()))
        losses.append(loss(*scored_batch(scaled))["loss"])
    assert torch.allclose(torch.stack(losses), losses[0].expand(3), rtol=1e-4)


def test_texts_that_a_list_of_the_query_has_are_no_negatives_of_it():
    """A text that lies in two lists, and the list of an equal query."""
    loss = ListwiseKL(teacher_temperature=0.1)
    embeddings, target = scored_batch(torch.rand(12, generator=torch.Generator().manual_seed(3)))
    own = embeddings.positive
    assert own is not None

    def gradients(**more: torch.Tensor) -> torch.Tensor:
        """Which lists' texts have a gradient from the first query alone, ``[3]``."""
        query = embeddings.query.clone().requires_grad_()
        positive = own.clone().requires_grad_()
        given = embeddings._replace(query=query, positive=positive)
        first = loss(given, target._replace(**more))["loss"]
        (of_query,) = torch.autograd.grad(first, query, create_graph=True)
        (found,) = torch.autograd.grad(of_query[0].sum(), positive)
        return found.view(3, 4, -1).abs().sum(dim=(1, 2)) > 1e-9

    assert gradients().tolist() == [True, True, True]
    equal = torch.tensor([1, 1, 3])
    same_query = equal, equal.repeat_interleave(4)
    assert gradients(query_id=same_query[0], positive_query_id=same_query[1]).tolist() == [
        True,
        False,
        True,
    ]
    shared = torch.arange(11, 23).view(3, 4)
    shared[2] = shared[0]
    assert gradients(positive_id=shared.flatten(), known_positive_id=shared).tolist() == [
        True,
        True,
        False,
    ]
    text = torch.tensor([13, 98, 99])  # the first query is a text of its own list
    assert gradients(query_text_id=text).tolist() == [True, True, True]
    lies_alone = torch.arange(11, 23).view(3, 4)
    lies_alone[1] = 97
    text = torch.tensor([97, 98, 99])
    found = gradients(positive_id=lies_alone.flatten(), query_text_id=text).tolist()
    assert found == [True, False, True]


def test_lists_need_a_teacher_temperature():
    with pytest.raises(InputError, match="teacher_temperature: expected a number"):
        ListwiseKL()(*scored_batch(torch.rand(12)))


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (torch.ones((), requires_grad=True), "found a Tensor"),
        ({"total": 1.0}, r"found \['total'\]"),
        ({"loss": 1.0}, "found float in it"),
        ({"loss": torch.ones(3, requires_grad=True)}, r"of the shape \[3\]"),
        ({"loss": torch.tensor(0.5)}, "does not depend on the embeddings"),
        ({"loss": torch.ones((), requires_grad=True), "lr": 1.0}, 'a part called "lr"'),
        ({"loss": torch.ones((), requires_grad=True), "a": torch.ones(2)}, '"a", which is no scal'),
        ({"loss": torch.ones((), requires_grad=True), "b": "2"}, '"b", which is no scalar'),
    ],
)
def test_a_loss_that_returns_something_else_is_named(returned, found):
    class Own(Loss):
        pass

    with pytest.raises(InputError, match=rf"model\.loss: expected Own\.forward .*{found}"):
        require_parts(Own(), returned)
    with torch.no_grad():  # nothing is learnt
        assert require_parts(Own(), {"loss": torch.tensor(0.5)})


class Doubled(InfoNCE):
    """Has a formula of its own, and the widths of its parent."""

    def forward(self, embeddings, target):
        return {"loss": 2 * super().forward(embeddings, target)["loss"]}


class DoubledAtWidths(InfoNCE):
    def at_widths(self, embeddings, target, dims):
        return [2 * loss for loss in super().at_widths(embeddings, target, dims)]


@pytest.mark.parametrize("kind", [Doubled, DoubledAtWidths])
def test_a_subclass_is_learnt_at_every_width(kind):
    batch = retrieval_batch()
    once, twice = (Matryoshka(loss, [4, 16])(*batch) for loss in (InfoNCE(), kind()))
    assert {k: v.item() for k, v in twice.items()} == {
        k: pytest.approx(2 * v.item()) for k, v in once.items()
    }


def test_a_loss_that_returns_something_else_is_named_at_a_width():
    class Own(Loss):
        def forward(self, embeddings, target):
            return embeddings.query.sum()

    with pytest.raises(InputError, match=r"expected Own\.forward .* found a Tensor"):
        Matryoshka(Own(), [4])(*retrieval_batch())


@pytest.mark.parametrize("name", ["cosine_weight", "similarity_weight", "rank_weight", "margin"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_below_0_are_refused(name, value):
    with pytest.raises(InputError, match=rf"{name}: expected a number from 0 on, found"):
        Distillation(**{name: value})
    with pytest.raises(InputError, match="weights: expected 2 numbers from 0 on"):
        Matryoshka(InfoNCE(), [4, 8], weights=[2.0, value])
