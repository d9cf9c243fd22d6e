"""The encoder has the numbers of fair-esm's ESM-2 (random weights)."""

import pytest
import torch
from processive.backbones import TransformerConfig
from processive.models import HeadConfig
from processive.models.head import Head
from processive.sequences import PackedBatch

esm2 = pytest.importorskip("esm.model.esm2")
MASK, PAD = 32, 1


def ours_from(theirs):
    """fair-esm's tensors under our names."""
    own = {"embedding.weight": theirs["embed_tokens.weight"]}
    for suffix in ("weight", "bias"):
        own[f"norm.{suffix}"] = theirs[f"emb_layer_norm_after.{suffix}"]
        for i in range(3):
            there, here = f"layers.{i}", f"blocks.{i}"
            parts = [theirs[f"{there}.self_attn.{part}_proj.{suffix}"] for part in "qkv"]
            own[f"{here}.query_key_value.{suffix}"] = torch.cat(parts)
            own[f"{here}.out.{suffix}"] = theirs[f"{there}.self_attn.out_proj.{suffix}"]
            own[f"{here}.norm.{suffix}"] = theirs[f"{there}.self_attn_layer_norm.{suffix}"]
            own[f"{here}.feed_forward_norm.{suffix}"] = theirs[f"{there}.final_layer_norm.{suffix}"]
            own[f"{here}.feed_forward.up.{suffix}"] = theirs[f"{there}.fc1.{suffix}"]
            own[f"{here}.feed_forward.down.{suffix}"] = theirs[f"{there}.fc2.{suffix}"]
    head = {f"{name}.{suffix}": theirs[f"lm_head.{key}.{suffix}"] for name, key in
            (("dense", "dense"), ("norm", "layer_norm")) for suffix in ("weight", "bias")}  # fmt: skip
    return own, head | {"bias": theirs["lm_head.bias"]}


@pytest.mark.parametrize("token_dropout", [True, False])
def test_representations_and_logits_equal_fair_esm(token_dropout):
    from processive.backbones import build

    theirs = esm2.ESM2(num_layers=3, embed_dim=40, attention_heads=5, token_dropout=token_dropout).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    config = TransformerConfig(
        33, 40, 3, heads=5, direction="bidirectional", norm="layer", activation="gelu", bias=True,
        token_dropout=MASK if token_dropout else None,
    )  # fmt: skip
    network, head = build(config).eval(), Head(HeadConfig("esm"), width=40, vocabulary_size=33)
    backbone_weights, head_weights = ours_from(theirs.state_dict())
    network.load_state_dict(backbone_weights)
    head.load_state_dict(head_weights)

    sequences = [torch.randint(4, 24, (n,)) for n in (1, 17, 30, 8)]
    for sequence, masked in zip(sequences, ([], [3], [0, 5, 29], [7]), strict=True):
        sequence[masked] = MASK
    sequences = [torch.cat((torch.tensor([0]), s, torch.tensor([2]))) for s in sequences]
    batch = PackedBatch.from_sequences(sequences)
    padded, mask = batch.to_padded(PAD)
    with torch.no_grad():
        want = theirs(padded, repr_layers=range(4))
        layers = network.hidden_layers(batch)
        logits = head(layers[-1], network.embedding.weight)
    for number, layer in enumerate(layers):
        assert (layer - want["representations"][number][mask]).abs().max() <= 1e-4
    assert (logits - want["logits"][mask]).abs().max() <= 1e-4
    assert logits.std() > 0.1


def test_a_sequence_of_mask_tokens_alone_is_finite():
    from processive.backbones import build

    config = TransformerConfig(33, 8, 1, heads=2, direction="bidirectional", token_dropout=MASK)
    batch = PackedBatch.from_sequences([[MASK, MASK], [4, MASK]])
    assert build(config)(batch)[0].isfinite().all()
