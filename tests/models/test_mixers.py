"""The mixers, the FFN and the block against plain loops written from the model's equations."""

from __future__ import annotations

import math

import pytest
import torch
from model_cases import CASES, config_of, differs, random_model, random_tokens
from op_cases import naive_memorise, naive_perceive
from torch import Tensor

from llm_mlp.models import LM, MIXERS, build_model
from llm_mlp.models.mixer import Mixer, linear


def normed(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def naive_perception(model: LM, layer: int, x: Tensor) -> Tensor:
    """Architecture, section 3, on the normed input ``[B, T, D]``."""
    c, eps = model.config.perception, model.config.norm_eps
    p = {name: t.detach() for name, t in model.blocks[layer].mixer.named_parameters()}
    B, T, _ = x.shape
    G, m, R, F, V, r = c.groups, c.heads_per_group, c.read_width, c.features, c.value_width, c.gate_rank
    channels = 2 * G * R + G * m * V
    rows = x @ p["in_proj.weight"].T
    u, low = rows[..., :channels], rows[..., channels:]
    gates = [
        name for name, on in (("erase", c.erase != "none"), ("write", c.write_gate), ("output", c.output_gate)) if on
    ]
    gate = {}
    for i, name in enumerate(gates):
        up = p[f"{name}_up.weight"], p[f"{name}_up.bias"]
        gate[name] = sigmoid(low[..., i * r : (i + 1) * r] @ up[0].T + up[1])
    if c.conv_width:
        K = c.conv_width
        y = torch.zeros_like(u)
        for t in range(T):
            for i in range(K):
                if t - (K - 1) + i >= 0:
                    y[:, t] += p["conv"][:, i] * u[:, t - (K - 1) + i]
        u = y
    u = u * sigmoid(u * (p["slope"] if c.learned_slope else 1))
    q, k = (u[..., i * G * R : (i + 1) * G * R].reshape(B, T, G, R) for i in (0, 1))
    v = u[..., 2 * G * R :].reshape(B, T, G, m, V)
    w = 2 * gate["write"].reshape(B, T, G, m, V) * v if c.write_gate else v

    def phi(z: Tensor) -> Tensor:
        if F == R:
            return unit(z)
        z = torch.stack([normed(z[:, :, g], eps) @ p["first_layer"][g] for g in range(G)], 2)
        return unit(z * sigmoid(z * (p["first_slope"] if c.learned_slope else 1)))

    qf, kf = phi(q), phi(k)
    if c.erase == "none":
        e = torch.zeros_like(kf)
    elif c.erase == "free":
        e = c.erase_max * gate["erase"].reshape(B, T, G, F) * kf
    else:
        e = c.erase_max * gate["erase"][..., None] * kf
        if c.erase == "diagonal":
            d = torch.exp(p["erase_diagonal"])
            e = e * d / d.max(-1, keepdim=True).values
    H = G * m
    log_alpha = torch.zeros(B, T, H, dtype=x.dtype)
    if c.decay or c.block:
        heads = x @ p["head_proj.weight"].T + p["head_proj.bias"]
    if c.decay:
        log_alpha = -torch.exp(p["log_rate"]) * torch.log1p(torch.exp(heads[..., :H]))
    y, _, residual = naive_perceive(qf, kf, e, w, log_alpha.reshape(B, T, G, m))
    if c.block:
        share = sigmoid(heads[..., H * c.decay :]).reshape(B, T, G, m, 1)
        read, _ = naive_memorise(
            normed(q, eps) * p["units_gain"][0],
            normed(k, eps) * p["units_gain"][1],
            w,
            residual.sum(-1),
            p["sink"],
            block=c.block,
            slots=c.slots,
            activation=c.read,
        )
        y = y + share * read
    y = normed(y, eps)
    if c.surprise:
        wrong = residual.sqrt()
        s = wrong / (wrong + w.square().sum(-1).sqrt() + 1e-6)
        y = y * (1 + p["surprise_gain"].reshape(G, m) * s)[..., None]
    y = y.reshape(B, T, H * V)
    if c.output_gate:
        y = y * gate["output"]
    return y @ p["out_proj.weight"].T


def naive_attention(model: LM, layer: int, x: Tensor) -> Tensor:
    """Softmax attention, one query at a time; RoPE rotates the pairs (i, i + d/2)."""
    c = model.config.attention
    mixer = model.blocks[layer].mixer
    B, T, D = x.shape
    d = c.head_dim
    q, k, v = ((x @ w.detach().T).reshape(B, T, c.heads, d) for w in mixer.qkv.weight.split(D))

    def rotated(z: Tensor) -> Tensor:
        z = normed(z, model.config.norm_eps) if c.qk_norm else z
        out = torch.zeros_like(z)
        for t in range(T):
            for i in range(d // 2):
                angle = t * c.rope_theta ** (-2 * i / d)
                a, b = z[:, t, :, i], z[:, t, :, i + d // 2]
                out[:, t, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[:, t, :, i + d // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    q, k = rotated(q), rotated(k)
    y = torch.zeros_like(v)
    for t in range(T):
        z = torch.exp(torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) / math.sqrt(d))
        y[:, t] = torch.einsum("bhs,bshd->bhd", z / z.sum(-1, keepdim=True), v[:, : t + 1])
    return y.reshape(B, T, D) @ mixer.out_proj.weight.detach().T


NAIVE = {"perception": naive_perception, "attention": naive_attention}


def naive_logits(model: LM, tokens: Tensor) -> Tensor:
    config = model.config
    eps = config.norm_eps
    x = normed(model.embedding.weight[tokens], eps)
    outputs: list[Tensor] = []  # of the embedding and of every layer before this one's own input
    for i, block in enumerate(model.blocks):
        inputs = x
        if i >= config.n_layers - config.routing.last_layers and config.routing.last_layers:
            z = normed(x, eps) @ block.routing.down.weight.T
            z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            shares = z @ block.routing.up.weight.T + block.routing.up.bias
            assert shares.shape[-1] == len(outputs)
            for j, earlier in enumerate(outputs):
                x = x + shares[..., j : j + 1] * earlier
        outputs.append(inputs)
        x = x + NAIVE[config.mixer(i)](model, i, normed(x, eps))
        z = normed(x, eps)
        u = z @ block.ffn.up.weight.T
        hidden = u.clamp(min=0) ** 2
        if config.ffn.activation == "adaptive":
            shape = torch.tanh(z @ block.ffn.shape.weight.T + block.ffn.shape.bias)
            shape = shape.repeat_interleave(config.ffn.hidden // config.ffn.adaptive_groups, -1)
            hidden = hidden + shape * (-u).clamp(min=0) ** 2
        x = x + hidden @ block.ffn.down.weight.T
    logits = normed(x, eps) @ (model.embedding if config.tie_embeddings else model.head).weight.T
    return config.logit_cap * torch.tanh(logits / config.logit_cap) if config.logit_cap else logits


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_is_the_equations(case):
    """Every mixer alone and the whole model, with all weights random."""
    model = random_model(case)
    x = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i, block in enumerate(model.blocks):
        assert differs(block.mixer(x)[0], NAIVE[model.config.mixer(i)](model, i, x)) < 1e-9
    tokens = random_tokens(2, 21)
    assert differs(model(tokens).logits, naive_logits(model, tokens)) < 1e-9


def test_hostile_tokens_stay_bounded():
    """Scalar and diagonal erase are contractive: one token repeated, or two alternating, over 4,096 steps."""
    for erase in ("scalar", "diagonal"):
        model = random_model({"perception": {"erase": erase, "decay": False, "block": 0, "slots": 0}}, torch.float32)
        with torch.no_grad():
            for block in model.blocks:
                block.mixer.erase_up.bias.fill_(20.0)  # erase as much as allowed
            for tokens in (torch.zeros(1, 4096, dtype=torch.long), torch.arange(4096)[None] % 2):
                out = model(tokens)
                assert out.logits.isfinite().all()
                weights = [x for name, x in out.state.items() if name.endswith("fast_weights")]
                assert all(x.abs().max() < 1e3 for x in weights)


def test_half_lives_at_the_start():
    """exp(log decay * half-life) = 1/2: log-spaced in a group from 8 to 4096 * 2^(4 l / L) tokens."""
    fields = {"n_layers": 4, "perception": {"heads_per_group": 5}}
    model = build_model(config_of(fields))
    for i, block in enumerate(model.blocks):
        softplus_of_zero = math.log(2)
        log_alpha = -block.mixer.log_rate.double().exp().view(2, 5) * softplus_of_zero
        lives = math.log(0.5) / log_alpha
        want = torch.logspace(math.log10(8), math.log10(4096 * 2**i), 5, dtype=torch.float64)
        assert ((lives - want).abs() / want).max() < 1e-5
        assert not block.mixer.head_proj.weight.any()
        assert (block.mixer.head_proj.bias[10:] == -1).all()
        assert torch.allclose(block.mixer.erase_up.bias, torch.tensor(-math.log(3)))
        assert (block.mixer.output_up.bias == 1).all() and not block.mixer.write_up.bias.any()


def test_every_mixer_keeps_the_contract():
    assert set(MIXERS) == {"perception", "attention"}
    for name, kind in MIXERS.items():
        assert issubclass(kind, Mixer)
        config = config_of({"pattern": [name]})
        mixer = kind(config, 0).double()
        mixer.init_weights()
        assert all(p.isfinite().all() for p in mixer.parameters())
        state = mixer.init_state(3, dtype=torch.float64, device="cpu", context=5)
        y, after = mixer(torch.randn(3, 4, 32, dtype=torch.float64), state)
        assert y.shape == (3, 4, 32) and list(after) == list(state)
        assert all(x.shape[0] == 3 for x in after.values())
        for weight, rows in mixer.fused_rows.items():
            assert sum(rows) == mixer.get_parameter(weight).shape[0]
    for method, arguments in (("forward", (None,)), ("step", (None, {})), ("init_weights", ())):
        with pytest.raises(NotImplementedError, match=method):
            getattr(Mixer(), method)(*arguments)


def test_fused_rows_are_named_parameters():
    model = random_model("hybrid")
    names = dict(model.named_parameters())
    fused = model.fused_rows()
    assert set(fused) == {"blocks.0.mixer.in_proj.weight", "blocks.1.mixer.qkv.weight", "blocks.2.mixer.in_proj.weight"}
    assert all(sum(rows) == names[name].shape[0] for name, rows in fused.items())


@torch.no_grad()
@pytest.mark.parametrize("rows", [512, 513])
@pytest.mark.parametrize("bias", [False, True])
def test_a_single_row_times_a_matrix(rows, bias):
    """The split product that decoding uses = the plain one."""
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(rows, 256, generator=g), torch.randn(256, generator=g)
    b = torch.randn(rows, generator=g) if bias else None
    for shape in ((256,), (1, 256), (1, 1, 256)):
        got = linear(x.view(shape), weight, b)
        want = torch.nn.functional.linear(x.view(shape).double(), weight.double(), None if b is None else b.double())
        assert got.shape == want.shape and differs(got.double(), want) < 1e-4
