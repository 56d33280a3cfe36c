"""The torch paths on a CUDA device: the same answers as the float64 reference on the CPU."""

import pytest
import torch

from llm_mlp.config import ModelConfig, OptimizerConfig, build
from llm_mlp.models import build_model
from llm_mlp.models.capture import CapturedGradients, CapturedStep
from llm_mlp.ops import memorise, perceive
from llm_mlp.ops.float8 import linear_float8
from llm_mlp.train.float8 import use_float8
from llm_mlp.train.optim import make_optimizers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
FLOAT8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no float8 matrix units"
)


def inputs(T, dtype, device, G=2, F=64, m=4, V=16, B=2):
    generator = torch.Generator().manual_seed(0)
    q, k, e = (torch.randn(B, T, G, F, generator=generator, dtype=torch.float64) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    e = k * 1.9 * torch.rand(B, T, G, 1, generator=generator, dtype=torch.float64)
    q = q / q.norm(dim=-1, keepdim=True)
    w = torch.randn(B, T, G, m, V, generator=generator, dtype=torch.float64)
    decay = -0.2 * torch.rand(B, T, G, m, generator=generator, dtype=torch.float64)
    decay[:, T // 2, 0] = -torch.inf
    return [x.to(dtype).to(device) for x in (q, k, e, w)] + [decay.float().to(device)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-3), (torch.bfloat16, 3e-2)])
def test_perceive_matches_reference(dtype, limit):
    ins = inputs(200, dtype, "cuda")
    y, state, residual = perceive(*ins, return_residual=True)
    wide = [x.double().cpu() for x in ins]
    for got, want in zip((y, state, residual), perceive(*wide, return_residual=True, backend="reference"), strict=True):
        error = (got.double().cpu() - want).norm() / want.norm()
        assert error < limit


@pytest.mark.parametrize("activation", ["relu2", "softmax"])
def test_memorise_matches_reference(activation):
    q, k, _, w, _ = inputs(150, torch.float32, "cuda")
    score = torch.randint(0, 6, q.shape[:3]).float().cuda()
    sink = torch.zeros(q.shape[2], device="cuda")
    y, units = memorise(q * 8, k * 8, w, score, sink, block=32, slots=8, activation=activation)
    again, after = memorise(q * 8, k * 8, w, score, sink, units, block=32, slots=8, activation=activation)
    wide = [x.double().cpu() for x in (q * 8, k * 8, w, score, sink)]
    y64, units64 = memorise(*wide, block=32, slots=8, activation=activation, backend="reference")
    again64, after64 = memorise(*wide, units64, block=32, slots=8, activation=activation, backend="reference")
    for got, want in ((y, y64), (again, again64), (after.keys, after64.keys), (after.values, after64.values)):
        assert (got.double().cpu() - want).norm() / want.norm() < 2e-3
    assert torch.equal(after.scores.cpu().double(), after64.scores)


@pytest.mark.parametrize("mixers", [["perception"], ["attention"], ["perception", "attention"]])
def test_model_whole_is_stepwise(mixers):
    config = build(ModelConfig, {"preset": "demo", "pattern": mixers, "attention": {"heads": 3, "head_dim": 64}})
    model = build_model(config, device="cuda").double().randomize_().eval()
    tokens = torch.randint(config.vocab_size, (2, 300), device="cuda")
    with torch.no_grad():
        out = model(tokens[:, :280])
        state = out.state
        steps = [model.step(tokens[:, t], state) for t in range(280, 300)]
        whole = model(tokens).logits
    assert (torch.stack(steps, 1) - whole[:, 280:]).abs().max() < 1e-9


def test_compiled_block_trains_like_eager():
    config = build(ModelConfig, {"preset": "demo", "n_layers": 2})
    tokens = torch.randint(config.vocab_size, (2, 512), device="cuda")
    gradients = []
    for compiled in (False, True):
        model = build_model(config, device="cuda").randomize_()
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False)
        model(tokens, targets=tokens).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, eager in gradients[0].items():
        difference = (gradients[1][name] - eager).norm() / eager.norm().clamp(min=1e-8)
        assert difference < 5e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_steps_are_steps(dtype):
    """A CUDA graph over a part of a pool, across the end of a block, and a pool that building it leaves alone."""
    config = build(ModelConfig, {"preset": "demo", "pattern": ["perception"]})
    model = build_model(config, device="cuda").randomize_().to(dtype).eval()
    tokens = torch.randint(config.vocab_size, (3, 300), device="cuda")
    with torch.no_grad():
        state = model(tokens[:, :250], logits="none").state
    pool = {name: torch.cat([t, t]) for name, t in state.items()}
    rows = torch.tensor([4, -1, 0], device="cuda")
    other = {name: t.clone() for name, t in pool.items()}
    step = CapturedStep(model, pool, 3, rows)
    assert all(torch.equal(pool[name], t) for name, t in other.items())
    for t in range(250, 262):
        got, want = step(tokens[:, t]), model.step(tokens[:, t], other, rows)
        assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert all(torch.equal(pool[name], t) for name, t in other.items())
    with pytest.raises(ValueError, match="cannot hold a state that grows"):
        config = build(ModelConfig, {"preset": "demo-transformer"})
        model = build_model(config, device="cuda").eval()
        CapturedStep(model, model.init_state(2), 2)


@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=FLOAT8)])
def test_gradients_in_a_graph(fp8):
    model = build_model(build(ModelConfig, {"preset": "demo"}), device="cuda").randomize_()
    if fp8:
        use_float8(model)
    data = torch.randint(model.config.vocab_size, (3, 2, 257), device="cuda")

    def plain(i):
        with torch.autocast("cuda", torch.bfloat16):
            loss = 0.5 * model(data[i, :, :-1], targets=data[i, :, 1:], reduction="sum").loss
        loss.backward()
        return loss.item()

    losses = [plain(0), plain(1)]
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    captured = CapturedGradients(model, 2, 256, lambda: torch.autocast("cuda", torch.bfloat16))
    assert all(not p.grad.any() for p in model.parameters())  # capturing leaves no gradient
    captured(data[2, :, :-1], data[2, :, 1:])
    captured.clear()
    got = [captured(data[i, :, :-1], data[i, :, 1:], 0.5).item() for i in (0, 1)]
    assert got == pytest.approx(losses, rel=1e-3 if fp8 else 1e-5)
    for p, w in zip(model.parameters(), want, strict=True):
        # Sums in another order put a number on the other side of the border between two float8 codes.
        assert (p.grad - w).norm() <= (2e-2 if fp8 else 1e-3) * w.norm()


@FLOAT8
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [4096, 100])
def test_float8_products(compiled, rows):
    """Each of the three against float64; the bounds are those of tests/ops/test_float8.py, and 2^-8 for the sums, which
    the matrix units add up in fewer bits than float32 has."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (
        torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().cuda()
        for shape in ((rows, 1024), (4096, 1024), (rows, 4096))
    )
    ins = x.float().requires_grad_(), w.float().requires_grad_()
    torch._dynamo.reset()
    run = torch.compile(linear_float8, fullgraph=True, dynamic=False) if compiled else linear_float8
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        y = run(*ins)
    dx, dw = torch.autograd.grad(y, ins, g)
    x, w, g = (t.double() for t in (x, w, g))
    rounded = 2**-4 * (2 / 3) ** 0.5 + 2**-8
    for got, want, limit in ((y, x @ w.T, rounded), (dx, g @ w, rounded), (dw, g.T @ x, 2**-8)):
        assert (got.detach().double() - want).norm() < limit * want.norm()


@FLOAT8
@pytest.mark.parametrize("mode", ["none", "full"])
def test_blocks_with_float8_compile_whole(mode):
    """No graph break in a block, and gradients near those of bfloat16."""
    config = build(ModelConfig, {"preset": "demo", "n_layers": 2})
    tokens = torch.randint(config.vocab_size, (2, 512), device="cuda")
    gradients = []
    for fp8 in (False, True):
        torch._dynamo.reset()
        model = build_model(config, device="cuda").randomize_()
        model.activation_checkpointing = mode
        if fp8:
            use_float8(model)
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = model(tokens, targets=tokens).loss
        loss.backward()
        gradients.append([p.grad for block in model.blocks for p in (block.ffn.up.weight, block.ffn.down.weight)])
    for plain, found in zip(*gradients, strict=True):
        assert 0 < (found - plain).norm() < 0.2 * plain.norm()


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_in_8_bits_steps_as_in_full(name):
    """By the fused kernel and by Muon on the device: the first step to rounding, ten steps nearly."""
    config = build(ModelConfig, {"preset": "demo", "n_layers": 1})
    found = []
    for state in ("same", "8bit"):
        model = build_model(config, device="cuda").randomize_()
        optimizers = make_optimizers(model, OptimizerConfig(name=name, state=state))
        start, ends = [p.detach().clone() for p in model.parameters()], []
        for step in range(10):
            generator = torch.Generator("cuda").manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            for o in optimizers:
                o.step()
            ends.append([p.detach().clone() for p in model.parameters()])
        found.append(ends)
    for step, limit in ((0, 1e-3), (9, 0.05)):
        for first, a, b in zip(start, found[0][step], found[1][step], strict=True):
            assert (a - b).norm() <= limit * (a - first).norm()
