"""The language model: whole = blocks = steps = packed, for every mixer and every switch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from model_cases import CASES, SMALL, VOCABULARY, config_of, differs, random_model, random_tokens, same_states
from torch._dynamo.testing import CompileCounterWithBackend

from llm_mlp.config import _merge
from llm_mlp.models import build_model, model_cost

T = 75  # longer than a chunk of 64, and than many blocks of 8


@pytest.fixture(params=CASES)
def model(request):
    return random_model(request.param)


# -- two paths, one answer ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_blocks_and_steps_are_the_whole(model):
    tokens = random_tokens(2, T)
    whole = model(tokens)
    assert whole.logits.shape == (2, T, VOCABULARY) and whole.logits.dtype == torch.float64
    for sizes in ([1, 7, 8, 40, T - 56], [64, T - 64]):
        state, parts = None, []
        for part in tokens.split(sizes, 1):
            out = model(part, state)
            state = out.state
            parts.append(out.logits)
        assert differs(torch.cat(parts, 1), whole.logits) < 1e-9
        same_states(state, whole.state)
    state, parts = model.init_state(2), []
    for token in tokens.unbind(1):
        parts.append(model.step(token, state))
    assert differs(torch.stack(parts, 1), whole.logits) < 1e-9
    same_states(state, whole.state)


@torch.no_grad()
def test_load_a_context_then_ask(model):
    """A context read at once, questions of several tokens and single tokens after it, in one state."""
    tokens = random_tokens(1, 50)
    whole = model(tokens).logits
    out = model(tokens[:, :31])
    before = {name: x.clone() for name, x in out.state.items()}
    question = model(tokens[:, 31:44], out.state)
    assert differs(question.logits, whole[:, 31:44]) < 1e-9
    same_states(out.state, before, 0)  # the loaded context can be asked again
    again = model(tokens[:, 31:44], out.state)
    assert torch.equal(again.logits, question.logits)
    state = again.state
    for t in range(44, 50):
        assert differs(model.step(tokens[:, t], state), whole[:, t]) < 1e-9
    # The other way: steps first, from a state with room, then several tokens at once.
    state = model.init_state(1, context=3)
    for t in range(9):
        model.step(tokens[:, t], state)
    assert differs(model(tokens[:, 9:], state).logits, whole[:, 9:]) < 1e-9


@torch.no_grad()
def test_packed_is_separate(model):
    bounds = [0, 0, 9, 30, 30, 100, 101, 101]
    tokens, cu = random_tokens(1, 101), torch.tensor(bounds)
    spans = list(zip(bounds, bounds[1:], strict=False))
    full = [n for n, (a, b) in enumerate(spans) if b > a]
    packed = model(tokens, cu_seqlens=cu)
    alone = [model(tokens[:, a:b]) for a, b in spans]
    assert differs(packed.logits, torch.cat([o.logits for o in alone], 1)) < 1e-9
    for n in full:
        same_states({k: x[n : n + 1] for k, x in packed.state.items()}, alone[n].state)
    # The state is carried on for the packed batch, its empty sequences included.
    more, second = random_tokens(1, 40, seed=1), [0, 5, 5, 20, 21, 21, 40, 40]
    on = model(more, packed.state, torch.tensor(second))
    for n, (a, b) in enumerate(zip(second, second[1:], strict=False)):
        if b > a:
            both = torch.cat([tokens[:, slice(*spans[n])], more[:, a:b]], 1)
            whole = model(both)
            assert differs(on.logits[:, a:b], whole.logits[:, both.shape[1] - (b - a) :]) < 1e-9
            same_states({k: x[n : n + 1] for k, x in on.state.items()}, whole.state)


@torch.no_grad()
def test_steps_in_a_pool(model):
    """Rows of a larger state, permuted; padding rows write nothing, and other rows do not change by a bit."""
    tokens = random_tokens(3, 12)
    pool = model(random_tokens(5, 11, seed=2)).state
    before = {k: x.clone() for k, x in pool.items()}
    rows = torch.tensor([3, -1, 0])
    used = torch.tensor([3, 0])
    whole = model(tokens[[0, 2]], {k: x[used] for k, x in before.items()})
    for t in range(12):
        logits = model.step(tokens[:, t], pool, rows)
        assert logits.isfinite().all()
        assert differs(logits[[0, 2]], whole.logits[:, t]) < 1e-9
    same_states({k: x[used] for k, x in pool.items()}, whole.state)
    for name, x in before.items():
        now = pool[name] if pool[name].shape == x.shape else pool[name][:, :, : x.shape[2]]
        assert torch.equal(now[[1, 2, 4]], x[[1, 2, 4]]), name


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "attention", "hybrid", "everything"])
def test_rows_of_different_lengths(case):
    """States of sequences of 3, 20 and 11 tokens in one batch go on together."""
    model, tokens = random_model(case), random_tokens(3, 20)
    lengths = [3, 20, 11]
    cu = torch.tensor([0, 3, 23, 34])
    state = model(torch.cat([tokens[n, :length] for n, length in enumerate(lengths)])[None], cu_seqlens=cu).state
    more = random_tokens(3, 13, seed=1)
    together = model(more[:, :6], {k: x.clone() for k, x in state.items()})
    own = {k: x.clone() for k, x in together.state.items()}
    steps = [model.step(more[:, t], own) for t in range(6, 13)]
    for n, length in enumerate(lengths):
        whole = model(torch.cat([tokens[n, :length], more[n]])[None]).logits[0]
        assert differs(together.logits[n], whole[length : length + 6]) < 1e-9
        assert differs(torch.stack(steps, 1)[n], whole[length + 6 :]) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_float32(case):
    """1e-4 where the choice of slots is equal; the choice may differ where two scores are within rounding."""
    model = random_model(case, torch.float32)
    tokens = random_tokens(2, T)
    whole = model(tokens)
    assert whole.logits.dtype == torch.float32
    state, parts = model.init_state(2), []
    for token in tokens.unbind(1):
        parts.append(model.step(token, state))
    blocks = model(tokens[:, 30:], model(tokens[:, :30]).state)
    choices = [name for name in state if name.endswith("units.scores")]
    equal = all(torch.allclose(s[n], whole.state[n], 1e-3, 1e-3) for s in (state, blocks.state) for n in choices)
    assert equal, "slots differ: choose another seed for this case"
    assert differs(torch.stack(parts, 1), whole.logits) < 1e-4
    assert differs(blocks.logits, whole.logits[:, 30:]) < 1e-4
    exact = copy.deepcopy(model).double()(tokens)
    if all(torch.allclose(exact.state[n].float(), whole.state[n], 1e-3, 1e-3) for n in choices):
        assert differs(exact.logits.float(), whole.logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_runs(case):
    """As bfloat16 weights and under autocast, whole and in steps: finite, near float32, states of the stated dtypes."""
    model, tokens = random_model(case, torch.float32), random_tokens(2, 40)
    exact = model(tokens).logits
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(tokens)
        on = model(tokens, cast.state)
    low = copy.deepcopy(model).bfloat16()
    out = low(tokens)
    state = low.init_state(2)
    assert {k: x.dtype for k, x in state.items()} == {k: x.dtype for k, x in out.state.items()}
    stepped = torch.stack([low.step(token, state) for token in tokens.unbind(1)], 1)
    for logits in (cast.logits, on.logits, out.logits, stepped):
        assert logits.dtype == torch.float32 and logits.isfinite().all()
    for logits in (cast.logits, out.logits, stepped):
        assert F.cosine_similarity(logits.flatten(), exact.flatten(), dim=0) > 0.98


# -- what the logits depend on -----------------------------------------------------------------------------------


@torch.no_grad()
def test_every_parameter_matters(model):
    tokens = random_tokens(1, 30)
    before = model(tokens).logits
    for name, p in model.named_parameters():
        kept = p.clone()
        p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=p.dtype)
        assert differs(model(tokens).logits, before) > 1e-6, name
        p.copy_(kept)
    assert torch.equal(model(tokens).logits, before)


def test_every_parameter_has_a_gradient(model):
    model.train()
    tokens = random_tokens(2, 30)
    torch.manual_seed(0)
    model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@torch.no_grad()
def test_only_the_past_matters(model):
    tokens = random_tokens(1, 70)
    before = model(tokens).logits
    for t in (0, 10, 63, 64):
        other = tokens.clone()
        other[:, t:] = (other[:, t:] + 1 + random_tokens(1, 70 - t, seed=4) % (VOCABULARY - 1)) % VOCABULARY
        after = model(other).logits
        assert differs(after[:, :t], before[:, :t]) < 1e-12 and differs(after[:, t], before[:, t]) > 1e-6


@torch.no_grad()
def test_the_distant_past_matters(model):
    """Through the state, and not only through the last few tokens."""
    tokens = random_tokens(1, 40)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCABULARY
    assert differs(model(other).logits[:, -1], model(tokens).logits[:, -1]) > 1e-9


# -- loss and what is returned -----------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_the_logits(model):
    tokens, targets = random_tokens(2, 30), random_tokens(2, 30, seed=1)
    targets[0, :7] = -100
    out = model(tokens, targets=targets)
    logits = model(tokens).logits
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert out.logits is None and abs(out.loss.item() - want.item()) < 1e-12
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(out.loss, parameters), torch.autograd.grad(want, parameters), strict=True):
        assert differs(a, b) < 1e-9 * max(1.0, b.abs().max().item())
    with torch.no_grad():
        each = model(tokens, targets=targets, reduction="none").loss
        assert each.shape == (2, 30)
        assert (
            differs(each, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 30))
            < 1e-12
        )
        assert abs(model(tokens, targets=targets, reduction="sum").loss.item() - each.sum().item()) < 1e-9


@torch.no_grad()
def test_which_logits(model):
    tokens = random_tokens(2, 20)
    every = model(tokens)
    last, none = model(tokens, logits="last"), model(tokens, logits="none")
    assert last.logits.shape == (2, 1, VOCABULARY) and differs(last.logits, every.logits[:, -1:]) < 1e-12
    assert none.logits is None and none.loss is None
    same_states(none.state, every.state, 0)
    cu = torch.tensor([0, 3, 20])
    packed = model(tokens[:1], cu_seqlens=cu)
    last = model(tokens[:1], cu_seqlens=cu, logits="last").logits
    assert last.shape == (1, 2, VOCABULARY) and differs(last, packed.logits[:, [2, 19]]) < 1e-12


@torch.no_grad()
def test_no_tokens(model):
    state = model(random_tokens(2, 11)).state
    out = model(random_tokens(2, 0), state)
    assert out.logits.shape == (2, 0, VOCABULARY)
    same_states(out.state, state, 0)
    fresh = model(random_tokens(2, 0))
    same_states(fresh.state, model.init_state(2), 0)


def test_soft_cap():
    """Logits are cap * tanh(raw / cap), so below the cap; cap 0 is the raw product."""
    raw_model, capped_model = random_model("no-cap"), random_model({"logit_cap": 1.5})
    capped_model.load_state_dict(raw_model.state_dict())
    tokens = random_tokens(1, 20)
    raw, capped = raw_model(tokens).logits, capped_model(tokens).logits
    assert raw.abs().max() > 1.5 > capped.abs().max()
    assert differs(capped, 1.5 * torch.tanh(raw / 1.5)) < 1e-12


# -- the state ---------------------------------------------------------------------------------------------------


def test_state_is_flat_named_and_batch_first(model):
    state = model(random_tokens(3, 10)).state
    empty = model.init_state(3)
    assert list(state) == list(empty)
    for name, x in state.items():
        assert isinstance(x, torch.Tensor) and x.shape[0] == 3 and x.dtype == empty[name].dtype, name
        _, layer, _ = name.split(".", 2)
        assert 0 <= int(layer) < model.config.n_layers
        if not (name.endswith((".keys", ".values")) and ".units." not in name):
            assert x.shape == empty[name].shape, name
    layers = {int(name.split(".")[1]) for name in state}
    assert layers == set(range(model.config.n_layers))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_of_another_dtype(dtype):
    model = random_model("hybrid", torch.float32)
    state = model.init_state(2, dtype=dtype)
    for name, x in state.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        want = torch.int64 if name.endswith("length") else wide if name.endswith(("fast_weights", "scores")) else dtype
        assert x.dtype == want, name
    tokens = random_tokens(2, 12)
    whole = model(tokens).logits
    logits = [model.step(token, state) for token in tokens.unbind(1)]
    limit = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert differs(torch.stack(logits, 1), whole) < limit * whole.abs().max()


# -- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "hybrid", "routing", "everything", "dropout"])
def test_activation_checkpointing(case):
    model, tokens = random_model(case).train(), random_tokens(2, 70)
    grads = []
    for mode in ("none", "selective", "full"):
        model.activation_checkpointing = mode
        torch.manual_seed(0)
        model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b, c in zip(*grads, strict=True):
        assert differs(a, b) < 1e-12 and differs(a, c) < 1e-12


@pytest.mark.parametrize("case", ["plain", "hybrid", "everything"])
def test_packed_layouts_share_their_programs(case):
    """Blocks compiled for one layout of packed sequences serve all others, with other numbers of them."""
    model, tokens = random_model(case), random_tokens(1, 64)
    # A single sequence has programs of its own: sizes of 1 are constants to the compiler.
    layouts = [torch.tensor(b) for b in ([0, 64], [0, 30, 64], [0, 7, 40, 41, 64], [0, 1, 2, 3, 60, 64])]
    wanted = []
    for cu_seqlens in layouts:
        model(tokens, cu_seqlens=cu_seqlens, targets=tokens).loss.backward()
        wanted.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    torch._dynamo.reset()
    programs = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(dynamic=False, backend=programs)
    counts = []
    for cu_seqlens, want in zip(layouts, wanted, strict=True):
        model(tokens, cu_seqlens=cu_seqlens, targets=tokens).loss.backward()
        for p, gradient in zip(model.parameters(), want, strict=True):
            assert differs(p.grad, gradient) < 1e-12
        model.zero_grad()
        counts.append(programs.frame_count)
    assert 0 < counts[1] == counts[-1]


def test_gradients_reach_an_earlier_block():
    """A state carried from one block of tokens to the next is differentiable: two blocks = whole."""
    model, tokens = random_model("hybrid"), random_tokens(1, 40)
    parameters = list(model.parameters())
    targets = tokens.roll(-1, 1)
    want = torch.autograd.grad(model(tokens, targets=targets, reduction="sum").loss, parameters)
    first = model(tokens[:, :19], targets=targets[:, :19], reduction="sum")
    second = model(tokens[:, 19:], first.state, targets=targets[:, 19:], reduction="sum")
    for a, b in zip(torch.autograd.grad(first.loss + second.loss, parameters), want, strict=True):
        assert differs(a, b) < 1e-9 * max(1.0, b.abs().max().item())


def test_dropout():
    model, tokens = random_model("dropout"), random_tokens(1, 20)
    plain = random_model("plain")
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens).logits, plain(tokens).logits)  # in eval mode it is off
    model.train()
    torch.manual_seed(0)
    a, b = model(tokens).logits, model(tokens).logits
    assert differs(a, b) > 1e-3


# -- a switched-off part is exactly the plain model --------------------------------------------------------------


@pytest.mark.parametrize(
    ("switched", "off"),
    [
        ({"ffn": {"activation": "adaptive"}}, ("ffn.shape",)),
        ({"perception": {"surprise": True}}, ("surprise_gain",)),
        ({"routing": {"last_layers": 1}}, ("routing.up",)),
        ({"perception": {"erase": "diagonal"}}, ("erase_diagonal",)),
        ({"dropout": 0.3}, ()),
        ({"perception": {"learned_slope": True}}, ("slope",)),
    ],
    ids=["adaptive", "surprise", "routing", "diagonal", "dropout", "slope"],
)
def test_switched_off_is_the_plain_model(switched, off):
    """The extra weights as they start, all others random: equal to the bit, forward and in steps."""
    base = {"perception": {"learned_slope": False}} if off == ("slope",) else {}
    model, start = random_model(_merge(base, switched)), build_model(config_of(_merge(base, switched))).double()
    plain = random_model(base, seed=1)
    extra = [name for name, _ in model.named_parameters() if name not in dict(plain.named_parameters())]
    assert bool(extra) == bool(off)
    assert all(any(part in name for part in off) or "routing.down" in name for name in extra)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in off):
                p.copy_(start.state_dict()[name])
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if n not in extra})
    tokens = random_tokens(2, 30)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    a, b = model.init_state(2), plain.init_state(2)
    assert torch.equal(model.step(tokens[:, 0], a), plain.step(tokens[:, 0], b))


def test_initial_values():
    """The last layers of all branches are zero: the model starts as embedding, norm and a zero head."""
    for case in CASES:
        model = build_model(config_of(case))
        assert all(p.isfinite().all() for p in model.parameters()), case
        for block in model.blocks:
            assert not block.mixer.out_proj.weight.any() and not block.ffn.down.weight.any()
        logits = model.eval()(random_tokens(1, 9)).logits
        assert case in ("tied", "everything") or not logits.any()
        assert logits.isfinite().all()
    a, b, c = (build_model(config_of("everything"), seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a) and not all(torch.equal(a[n], c[n]) for n in a)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    build_model(config_of("plain"), seed=1)
    assert torch.equal(torch.rand(3), want)


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [VOCABULARY, -1, 10**6])
def test_tokens_outside_the_vocabulary(bad):
    model, tokens = random_model("plain"), random_tokens(2, 5)
    tokens[1, 3] = bad
    with pytest.raises(ValueError, match=f"token {bad} is outside the vocabulary of {VOCABULARY}"):
        model(tokens)
    with pytest.raises(ValueError, match=f"token {bad} is outside the vocabulary"):
        model.step(tokens[:, 3], model.init_state(2))


@pytest.mark.parametrize("case", ["plain", "attention", "no-conv", "hybrid"])
def test_bad_calls(case):
    model, tokens = random_model(case), random_tokens(2, 5)
    with pytest.raises(ValueError, match=r"tokens have shape \(5,\), expected \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match="at least one token"):
        model(tokens[:, :0], logits="last")
    with pytest.raises(ValueError, match="batch must be 1"):
        model(tokens, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="cu_seqlens decreases"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 4, 2, 5]))
    with pytest.raises(ValueError, match="from 0 to T = 5"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("case", ["plain", "attention", "no-conv", "hybrid"])
@pytest.mark.parametrize("rows", [[1, 1], [0, 3], [0, -2]])
def test_bad_rows_of_a_pool(case, rows):
    """Refused before anything is written, whatever the mixer."""
    model = random_model(case)
    pool = model(random_tokens(3, 5)).state
    before = {k: x.clone() for k, x in pool.items()}
    with pytest.raises(ValueError, match="state_indices"):
        model.step(random_tokens(2), pool, torch.tensor(rows))
    same_states(pool, before, 0)


def test_the_last_of_an_empty_sequence():
    """There is no such token, and a neighbour's is no answer."""
    model = random_model("plain")
    with pytest.raises(ValueError, match="empty"):
        model(random_tokens(1, 5), cu_seqlens=torch.tensor([0, 0, 5]), logits="last")


def test_unknown_kind_of_logits():
    with pytest.raises(ValueError, match="lasst"):
        random_model("plain")(random_tokens(1, 5), logits="lasst")


# -- the small model is the size it says -------------------------------------------------------------------------


def test_small_models_differ_in_what_they_switch():
    """No case is the plain one by mistake."""
    plain = config_of("plain")
    assert all(config_of(case) != plain for case in CASES if case != "plain")
    assert model_cost(plain).parameters == sum(p.numel() for p in build_model(plain).parameters())
    assert SMALL["vocab_size"] == VOCABULARY
