"""The divergences against their formulas, and the chunked driver against a dense float64 form."""

import math
import re
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsd_lib import divergence as dv
from rlsd_lib.divergence import Divergence, divergence

N, T, V, H, H_T = 3, 5, 13, 4, 6

DISTANCES = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    *(Divergence("jsd", alpha=a) for a in (None, 0.0, 0.1, 0.5, 1.0)),
    *(
        Divergence(kind, top_k=k, add_tail=tail)
        for kind in ("forward_kl", "reverse_kl", "jsd")
        for k, tail in [(4, True), (3, False), (V, True)]
    ),
]
TOP1 = [Divergence("teacher_top1"), Divergence("student_top1")]
EVERY = [*DISTANCES, *TOP1]


def naive(spec: Divergence, p_t: Tensor, p_s: Tensor) -> Tensor:
    """Dense textbook form on probabilities (..., V), sharing no line with the module."""
    if spec.kind == "teacher_top1":
        return -torch.log((p_s * one_hot_max(p_t)).sum(-1))
    if spec.kind == "student_top1":
        return (p_t * one_hot_max(p_s)).sum(-1) / (p_s * one_hot_max(p_s)).sum(-1)
    if spec.top_k:
        order = p_s.detach().argsort(-1, descending=True)
        p_t, p_s = (cut(x.gather(-1, order), spec) for x in (p_t, p_s))
    a = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(spec.kind, spec.alpha)
    a = 0.5 if a is None else a
    if a in (0.0, 1.0):
        p, q = (p_s, p_t) if a else (p_t, p_s)
        return (p * (p / q).log()).sum(-1)
    m = a * p_t + (1 - a) * p_s
    return (a * p_t * (p_t / m).log() + (1 - a) * p_s * (p_s / m).log()).sum(-1)


def one_hot_max(p: Tensor) -> Tensor:
    return (p == p.amax(-1, keepdim=True)).to(p.dtype)


def cut(p: Tensor, spec: Divergence) -> Tensor:
    kept, rest = p[..., : spec.top_k], p[..., spec.top_k :].sum(-1, keepdim=True)
    if not spec.add_tail:
        return kept / kept.sum(-1, keepdim=True)
    return torch.cat([kept, rest], -1) if spec.top_k < p.shape[-1] else kept


def world(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Two models with different widths, biases, and a ragged mask."""
    g = torch.Generator().manual_seed(seed)
    rand = partial(torch.randn, generator=g, dtype=dtype)
    tensors = {
        "student_hidden": rand(N, T, H),
        "student_head": rand(V, H),
        "teacher_hidden": rand(N, T, H_T),
        "teacher_head": rand(V, H_T),
        "student_bias": rand(V),
        "teacher_bias": rand(V),
    }
    mask = torch.arange(T) < torch.tensor([[5], [2], [3]])
    return {**{k: x.requires_grad_() for k, x in tensors.items()}, "mask": mask}


def dense(spec: Divergence, w: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    def probabilities(who: str) -> Tensor:
        hidden, head, bias = (w[f"{who}_{x}"].double() for x in ("hidden", "head", "bias"))
        return ((hidden @ head.T + bias) / temperature).softmax(-1)

    return naive(spec, probabilities("teacher").detach(), probabilities("student")) * w["mask"]


def grads(values: Tensor, w: dict[str, Tensor]) -> list[Tensor]:
    weights = torch.linspace(0.3, 2, values.numel()).view_as(values).to(values.dtype)
    student = [w[f"student_{x}"] for x in ("hidden", "head", "bias")]
    return list(torch.autograd.grad((values * weights).sum(), student))


def assert_equal_to(actual: Tensor, expected: Tensor, rel: float = 1e-6, case: object = "") -> None:
    scale = expected.abs().max().item()
    assert (actual - expected).abs().max().item() <= rel * scale, case


def grad_of(logits: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]


def log_probs(seed: int, scale: float = 1.0, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*(shape or (4, V)), generator=g, dtype=torch.float64)
    return logits.log_softmax(-1)


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_value_and_gradient_equal_the_dense_form(spec):
    w = world()
    for temperature in (1.0, 0.6, 2.5):
        actual, expected = (
            divergence(spec, **w, temperature=temperature),
            dense(spec, w, temperature),
        )
        assert actual.dtype == torch.float64
        assert_equal_to(actual, expected, case=temperature)
        for pair in zip(grads(actual, w), grads(expected, w), strict=True):
            assert_equal_to(*pair, case=temperature)


def test_float32_agrees_with_the_float64_reference():
    for spec in EVERY:
        w = world(dtype=torch.float32)
        actual, expected = divergence(spec, **w), dense(spec, w)
        assert actual.dtype == torch.float32
        assert_equal_to(actual.double(), expected, case=spec)
        for pair in zip(grads(actual, w), grads(expected, w), strict=True):
            assert_equal_to(*pair, rel=2e-6, case=spec)


def test_gradcheck():
    w = world()
    student = [w[f"student_{x}"] for x in ("hidden", "head", "bias")]
    rest = {k: x.detach() for k, x in w.items() if not k.startswith("student")}
    for spec in EVERY:

        def f(hidden: Tensor, head: Tensor, bias: Tensor, spec: Divergence = spec) -> Tensor:
            return divergence(spec, hidden, head, student_bias=bias, **rest, chunk_size=4)

        assert torch.autograd.gradcheck(f, student), spec


def test_chunks_do_not_change_the_result():
    w = world()
    for spec in EVERY:
        whole = divergence(spec, **w, chunk_size=N * T)
        wanted = grads(whole, w)
        for size in (1, 3, 7, 10, 1000):
            chunked = divergence(spec, **w, chunk_size=size)
            assert_equal_to(chunked, whole, rel=1e-12, case=(spec, size))
            for pair in zip(grads(chunked, w), wanted, strict=True):
                assert_equal_to(*pair, rel=1e-12, case=(spec, size))


def test_masked_positions_are_zero_whatever_stands_there():
    w = world()
    spoilt = {k: x.detach().clone() for k, x in w.items()}
    for who in ("student", "teacher"):
        spoilt[f"{who}_hidden"][~w["mask"]] = torch.nan
        for part in ("hidden", "head", "bias"):
            spoilt[f"{who}_{part}"].requires_grad_()
    for spec in EVERY:
        clean, other = divergence(spec, **w), divergence(spec, **spoilt)
        assert (other[~w["mask"]] == 0).all(), spec
        assert torch.equal(clean, other), spec
        ours, theirs = grads(clean, w), grads(other, spoilt)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), spec
        assert (theirs[0][~w["mask"]] == 0).all(), spec


def test_padding_on_either_side_changes_nothing():
    w, spec = world(), DISTANCES[0]
    for left, right in [(2, 0), (0, 3), (1, 1)]:
        padded = dict(w)
        for name in ("student_hidden", "teacher_hidden"):
            padded[name] = torch.nn.functional.pad(w[name], (0, 0, left, right), value=7.0)
        padded["mask"] = torch.nn.functional.pad(w["mask"].long(), (left, right))
        inner = divergence(spec, **padded)[:, left : left + T]
        assert torch.equal(inner, divergence(spec, **w))


def test_masked_positions_are_not_computed(monkeypatch):
    seen = []
    original = Divergence.__call__

    def spy(self, log_p_t, log_p_s):
        seen.append(len(log_p_s))
        return original(self, log_p_t, log_p_s)

    monkeypatch.setattr(Divergence, "__call__", spy)
    divergence(Divergence(), **world(), chunk_size=4)
    assert seen == [4, 4, 2]


def test_nothing_selected_keeps_the_graph_and_gives_zero_gradients():
    w = world()
    w["mask"] = torch.zeros(N, T)
    values = divergence(Divergence(), **w)
    assert torch.equal(values, torch.zeros(N, T, dtype=torch.float64))
    assert all((g == 0).all() for g in grads(values, w))


def test_the_teacher_never_gets_a_gradient():
    for spec in EVERY:
        w = world()
        divergence(spec, **w).sum().backward()
        assert all(x.grad is None for k, x in w.items() if k.startswith("teacher")), spec
        log_p_t, log_p_s = log_probs(0).requires_grad_(), log_probs(1).requires_grad_()
        spec(log_p_t, log_p_s).sum().backward()
        assert log_p_t.grad is None and log_p_s.grad is not None, spec


def test_a_shared_head_gets_the_student_gradient_only():
    w = world()
    w |= {"teacher_head": w["student_head"], "teacher_hidden": w["student_hidden"] + 1.0}
    w["teacher_bias"] = w["student_bias"]
    live = grads(divergence(Divergence("reverse_kl"), **w), w)
    frozen = {k: x.detach() if k.startswith("teacher") else x for k, x in w.items()}
    for a, b in zip(live, grads(divergence(Divergence("reverse_kl"), **frozen), w), strict=True):
        assert torch.equal(a, b)


def test_frozen_head_and_no_bias():
    w = {k: x for k, x in world().items() if not k.endswith("bias")}
    w["student_head"] = w["student_head"].detach()
    divergence(Divergence(), **w).sum().backward()
    assert w["student_hidden"].grad.abs().sum() > 0


def test_half_precision_inputs_are_computed_in_float32_also_under_autocast():
    low = {
        k: x.detach().bfloat16().requires_grad_() if k != "mask" else x for k, x in world().items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = divergence(Divergence("jsd"), **low)
        gradients = grads(values, low)
    assert values.dtype == torch.float32
    assert_equal_to(values.double(), dense(Divergence("jsd"), low))
    assert {g.dtype for g in gradients} == {torch.bfloat16}


# --- what the functions mean ---------------------------------------------------------------------


def test_temperature_divides_the_logits():
    w = world()
    scaled = w | {k: w[k] / 0.5 for k in w if k.endswith("bias") or k.endswith("hidden")}
    for spec in (Divergence(), Divergence("jsd", top_k=3, add_tail=True)):
        assert_equal_to(divergence(spec, **w, temperature=0.5), divergence(spec, **scaled))


def test_top1_gradients_are_their_formulas():
    """Teacher's: -grad log P_S(v_T*). Student's: -w grad log P_S(v_S*), w = P_T / P_S at v_S*."""
    log_p_t, logits = log_probs(0), log_probs(1).requires_grad_()
    log_p_s = logits.log_softmax(-1)
    row = torch.arange(len(logits))
    v_t, v_s = log_p_t.argmax(-1), log_p_s.argmax(-1)

    grad = partial(grad_of, logits)
    assert_equal_to(grad(dv.teacher_top1(log_p_t, log_p_s)), grad(-log_p_s[row, v_t]))
    weight = (log_p_t - log_p_s)[row, v_s].exp().detach()
    student = grad(dv.student_top1(log_p_t, log_p_s))
    assert_equal_to(student, grad(-weight * log_p_s[row, v_s]))
    # The other reading of A.3: weight * grad P_S is the forward KL's v_S* term, shorter by P_S.
    p_s = log_p_s.exp()[row, v_s]
    forward_term = grad(-log_p_t.exp()[row, v_s] * log_p_s[row, v_s])
    assert_equal_to(grad(-weight * p_s), forward_term)
    assert_equal_to(student * p_s.detach()[:, None], forward_term)


def test_top1_losses_still_sharpen_a_student_that_equals_its_teacher():
    for spec in TOP1:
        logits = log_probs(3).requires_grad_()
        value = spec(log_probs(3), logits.log_softmax(-1))
        (step,) = torch.autograd.grad(value.sum(), logits)
        top = logits.argmax(-1, keepdim=True)
        assert (step.gather(-1, top) < 0).all()
    assert torch.allclose(value, torch.ones_like(value))


def test_kl_gradients_are_the_papers():
    """Proposition 1's g(r), and Eq. 17's reverse-KL row as an expectation over the student."""
    log_p_t, logits = log_probs(0), log_probs(1).requires_grad_()
    log_p_s = logits.log_softmax(-1)
    p_t, delta = log_p_t.exp(), log_p_t - log_p_s.detach()

    grad = partial(grad_of, logits)
    assert_equal_to(grad(dv.forward_kl(log_p_t, log_p_s)), grad(-p_t * log_p_s))
    expected = grad(-log_p_s.exp().detach() * delta * log_p_s)
    assert_equal_to(grad(dv.reverse_kl(log_p_t, log_p_s)), expected)


def test_what_a_teacher_says_by_itself_equals_the_dense_form():
    """K_t between two references, and the entropy: in chunks, 0 outside the mask, no gradient."""
    w = world()
    hidden, head, bias = (w[f"teacher_{x}"] for x in ("hidden", "head", "bias"))
    wrong, mask = hidden.flip(0) + 1, w["mask"]
    for temperature, size in [(1.0, None), (0.7, 1), (2.0, 4)]:
        p, q = (((x @ head.T + bias) / temperature).softmax(-1).detach() for x in (hidden, wrong))
        options = {"bias": bias, "temperature": temperature, "chunk_size": size}
        spoilt, other = (x.masked_fill(~mask[..., None], torch.nan) for x in (hidden, wrong))
        contrast = dv.teacher_contrast(spoilt, other, head, mask, **options)
        assert_equal_to(contrast, (p * (p / q).log()).sum(-1) * mask, case=temperature)
        entropy = dv.teacher_entropy(spoilt, head, mask, **options)
        assert_equal_to(entropy, -(p * p.log()).sum(-1) * mask, case=temperature)
        assert (contrast[~mask] == 0).all() and (entropy[~mask] == 0).all()
        assert not contrast.requires_grad and not entropy.requires_grad


def test_alpha_ends_are_set_and_not_limits():
    log_p_t, log_p_s = log_probs(0), log_probs(1)
    jsd = partial(dv.generalised_jsd, log_p_t, log_p_s)
    assert torch.equal(jsd(0.0), dv.forward_kl(log_p_t, log_p_s))
    assert torch.equal(jsd(1.0), dv.reverse_kl(log_p_t, log_p_s))
    tiny = 1e-6
    assert jsd(tiny).max() < 1e-4
    assert torch.allclose(jsd(tiny) / tiny, jsd(0.0), rtol=1e-3)
    assert torch.allclose(jsd(1 - tiny) / tiny, jsd(1.0), rtol=1e-3)


def test_impossible_tokens_contribute_nothing():
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    log_p, log_q = p.log().requires_grad_(), q.log()
    assert dv.kl(log_p, log_q).item() == pytest.approx(0.5 * math.log(2))
    assert torch.isfinite(torch.autograd.grad(dv.kl(log_p, log_q), log_p)[0]).all()
    assert dv.kl(log_q, log_p).item() == math.inf


def test_token_clip_bounds_a_token_and_silences_it():
    plain, w = divergence(Divergence(), **world()), world()
    bound = plain[w["mask"]].median().item()
    clipped = divergence(Divergence(token_clip=bound), **w)
    assert torch.equal(clipped, plain.clamp(max=bound))
    hidden, _, _ = grads(clipped, w)
    assert (hidden[plain > bound] == 0).all()
    assert hidden[w["mask"] & (plain < bound)].abs().sum(-1).min() > 0


seeds = st.integers(0, 2**31)
scales = st.sampled_from([0.0, 1e-3, 1.0, 8.0])


@settings(deadline=None, max_examples=100)
@given(seed=seeds, scale=scales, spec=st.sampled_from(DISTANCES))
def test_distances_are_non_negative_and_zero_for_equals(seed, scale, spec):
    log_p_t, log_p_s = log_probs(seed, scale), log_probs(seed + 1, scale)
    assert (spec(log_p_t, log_p_s) >= -1e-12).all()
    assert (spec(log_p_t, log_p_t).abs() <= 1e-12).all()


@settings(deadline=None, max_examples=100)
@given(seed=seeds, spec=st.sampled_from([s for s in DISTANCES if s.top_k in (None, V)]))
def test_full_distances_are_positive_for_unequals(seed, spec):
    assert (spec(log_probs(seed), log_probs(seed + 1)) > 1e-6).all()


@settings(deadline=None, max_examples=100)
@given(seed=seeds, scale=scales, alpha=st.floats(0.01, 0.99))
def test_jsd_swaps_its_arguments_with_alpha(seed, scale, alpha):
    p, q = log_probs(seed, scale), log_probs(seed + 1, scale)
    swapped = dv.generalised_jsd(q, p, 1 - alpha)
    assert torch.allclose(dv.generalised_jsd(p, q, alpha), swapped, atol=1e-12)
    assert torch.allclose(dv.generalised_jsd(p, q), dv.generalised_jsd(q, p), atol=1e-12)
    assert (dv.generalised_jsd(p, q) <= math.log(2) + 1e-12).all()


@settings(deadline=None, max_examples=150)
@given(
    seed=seeds,
    scale=scales,
    k=st.integers(1, V),
    kind=st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
)
def test_a_tail_bucket_gives_a_lower_bound_that_closes(seed, scale, k, kind):
    log_p_t, log_p_s = log_probs(seed, scale), log_probs(seed + 1, scale)
    top = log_p_s.topk(k, -1).indices
    mass = dv.on_support(log_p_t, top, add_tail=True).exp().sum(-1)
    assert torch.allclose(mass, torch.ones_like(mass))
    full = Divergence(kind)(log_p_t, log_p_s)
    bound = Divergence(kind, top_k=k, add_tail=True)(log_p_t, log_p_s)
    assert (bound <= full + 1e-12).all()
    if k == V:
        assert torch.allclose(bound, full, atol=1e-12)


def test_a_tail_far_below_rounding_keeps_its_value():
    """1 - sum(top-k) is 0 in float32 here, and its logarithm would be -inf."""
    p = torch.tensor([0.0, -1.0, -60.0, -61.0]).log_softmax(-1)
    tail = dv.on_support(p, torch.tensor([0, 1]), add_tail=True)[-1]
    assert tail.item() == pytest.approx(torch.logsumexp(p[2:].double(), 0).item(), rel=1e-6)


def test_agrees_with_trl_where_the_definitions_coincide():
    trl = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    student, teacher = (3 * log_probs(i, 1.0, 50, 40) for i in (0, 1))
    log_p_s, log_p_t = student.log_softmax(-1), teacher.log_softmax(-1)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        theirs = trl.compute_full_logit_self_distillation_loss(
            student, teacher, distillation_alpha=alpha
        )
        assert_equal_to(Divergence("jsd", alpha=alpha)(log_p_t, log_p_s), theirs)
        for tail in (True, False):
            theirs = trl.compute_topk_self_distillation_loss(
                student,
                teacher,
                distillation_topk=10,
                distillation_alpha=alpha,
                distillation_add_tail=tail,
            )
            ours = Divergence("jsd", alpha=alpha, top_k=10, add_tail=tail)(log_p_t, log_p_s)
            assert_equal_to(ours, theirs)


def test_differs_from_trl_where_the_tail_is_below_its_floor():
    """TRL holds the tail's mass at 1e-7 or above; here it has the value it has."""
    trl = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    log_p = torch.tensor([0.0, -1.0, -30.0], dtype=torch.float64).log_softmax(-1)
    theirs = trl.add_tail_bucket(log_p[:2])[-1].exp().item()
    ours = dv.on_support(log_p, torch.tensor([0, 1]), add_tail=True)[-1].exp().item()
    assert theirs == pytest.approx(1e-7, rel=1e-3)
    assert ours == pytest.approx(log_p[2].exp().item(), rel=1e-9)


# --- errors --------------------------------------------------------------------------------------


def test_a_wrong_specification_says_what_to_do():
    for options, words in [
        ({"kind": "foward_kl"}, "Did you mean 'forward_kl'"),
        ({"kind": "jsd", "alpha": 1.5}, "alpha=1.5"),
        ({"kind": "jsd", "alpha": math.nan}, "alpha=nan"),
        ({"kind": "reverse_kl", "alpha": 0.5}, "use kind='jsd'"),
        ({"kind": "teacher_top1", "top_k": 5}, "means nothing for 'teacher_top1'"),
        ({"top_k": 0}, "top_k=0: expected at least 1"),
        ({"add_tail": True}, "without top_k"),
        ({"token_clip": 0.0}, "token_clip=0.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            Divergence(**options)


def test_a_wrong_call_says_what_to_do():
    inputs = {k: x for k, x in world().items() if not k.endswith("bias")}
    for spec, change, words in [
        (Divergence(top_k=V + 1), {}, "top_k=14: expected at most the vocabulary's 13"),
        (Divergence(), {"temperature": 0.0}, "temperature=0.0"),
        (Divergence(), {"chunk_size": 0}, "chunk_size=0"),
        (Divergence(), {"teacher_head": torch.zeros(V + 2, H_T)}, "(13, 15) tokens"),
        (Divergence(), {"teacher_hidden": torch.zeros(N, T + 1, H_T)}, "teacher_hidden"),
        (Divergence(), {"student_head": torch.zeros(H, V)}, "student_head"),
        (Divergence(), {"mask": torch.ones(N, T - 1)}, "mask"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            divergence(spec, **inputs | change)


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
    import resource, sys, torch
    from rlsd_lib.divergence import Divergence, divergence

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, vocabulary, width, spec = 2048, 150_000, 256, Divergence(sys.argv[2])
    hidden_s, hidden_t = torch.randn(2, 1, tokens, width)
    head_s, head_t = torch.randn(2, vocabulary, width) / width**0.5
    hidden_s.requires_grad_(), head_s.requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.argv[1] == "dense":
        log_p_t = (hidden_t @ head_t.T).log_softmax(-1)
        values = spec(log_p_t, (hidden_s @ head_s.T).log_softmax(-1))
    else:
        values = divergence(spec, hidden_s, head_s, hidden_t, head_t, torch.ones(1, tokens))
    values.sum().backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def added_mib(form: str, kind: str) -> int:
    """Peak resident memory that forward and backward add to the inputs' own."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), form, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_peak_memory_is_far_below_the_dense_form(kind):
    """Vocabulary 150,000, 2,048 tokens, forward and backward. The dense one needs 13 GB free."""
    chunked, dense_form = added_mib("chunked", kind), added_mib("dense", kind)
    assert chunked * 4 < dense_form, f"{kind}: dense {dense_form} MiB, chunked {chunked} MiB"
