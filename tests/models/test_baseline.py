"""The transformer twin is the independent model of the same design in transformers (nanochat's), weight for weight."""

from __future__ import annotations

import pytest
import torch
from model_cases import VOCABULARY, random_model, random_tokens

transformers = pytest.importorskip("transformers")


def test_the_baseline_is_the_independent_model():
    ours = random_model({"pattern": ["attention"], "n_layers": 3})
    c = ours.config
    config = transformers.NanoChatConfig(
        vocab_size=VOCABULARY,
        hidden_size=c.d_model,
        intermediate_size=c.ffn.hidden,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.attention.heads,
        max_position_embeddings=64,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.attention.rope_theta},
        final_logit_softcapping=c.logit_cap,
        hidden_act="relu2",
        attn_implementation="eager",
    )
    theirs = transformers.NanoChatForCausalLM(config).double().eval()

    def turned(weight: torch.Tensor) -> torch.Tensor:
        """It rotates the other way round, which is the same with the halves of a head's channels exchanged."""
        heads = weight.unflatten(0, (c.attention.heads, 2, c.attention.head_dim // 2))
        return heads.flip(1).flatten(0, 2)

    weights = {"model.embed_tokens.weight": ours.embedding.weight, "lm_head.weight": ours.head.weight}
    for i, block in enumerate(ours.blocks):
        q, k, v = block.mixer.qkv.weight.chunk(3)
        for name, value in (
            ("self_attn.q_proj", turned(q)),
            ("self_attn.k_proj", turned(k)),
            ("self_attn.v_proj", v),
            ("self_attn.o_proj", block.mixer.out_proj.weight),
            ("mlp.fc1", block.ffn.up.weight),
            ("mlp.fc2", block.ffn.down.weight),
        ):
            weights[f"model.layers.{i}.{name}.weight"] = value
    theirs.load_state_dict({name: t.detach() for name, t in weights.items()}, strict=True)
    tokens = random_tokens(2, 40)
    with torch.no_grad():
        expected = theirs(tokens).logits
        # Its norms run in float32 whatever the dtype.
        assert (ours(tokens).logits - expected).abs().max() < 1e-4 * expected.abs().max()
