"""The decoder under muP: golden numbers, the standard decoder at the base width, and the coordinate check."""

import numpy as np
import pytest
import torch

from clbench.interfaces import UserError
from clbench.models.decoder import build_decoder
from clbench.training.optimizer_state import Adam

BASE = {"name": "m", "vocab": 16, "depth": 2, "context": 8, "rotary": 0.25}


def decoder(width, mup, seed=0, **options):
    return build_decoder(**(BASE | {"width": width, "heads": max(1, width // 8), "mup": mup, "seed": seed} | options))


def optimizer_of(model):
    return Adam(model, (0.9, 0.95), 0.1, 1.0)


def rates_of(model, rate=3e-3):
    """Name -> rate and weight decay, as `segments.train` has them."""
    groups = optimizer_of(model).param_groups
    found = {id(p): (rate * g.get("share", 1.0), g["weight_decay"]) for g in groups for p in g["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters()}


def test_golden_numbers():
    model = decoder(64, 16, vocab=512)
    rates = rates_of(model)
    assert rates["layers.0.attention.query_key_value.weight"] == pytest.approx((7.5e-4, 0.4))
    assert rates["layers.1.mlp.dense_4h_to_h.weight"] == pytest.approx((7.5e-4, 0.4))
    assert rates["embed_in.weight"] == rates["embed_out.weight"] == (3e-3, 0.1)
    assert rates["layers.0.mlp.dense_h_to_4h.bias"] == rates["final_layer_norm.weight"] == (3e-3, 0.0)
    assert len(optimizer_of(model).params) == len(rates) == sum(len(g["params"]) for g in optimizer_of(model).param_groups)
    base = decoder(16, 16, vocab=512)
    for name, ratio in (("embed_in", 1.0), ("embed_out", 1.0)):
        pair = [dict(m.named_parameters())[f"{name}.weight"].std().item() for m in (model, base)]
        assert pair[0] / pair[1] == pytest.approx(ratio, rel=0.05)
    wide, narrow = (m.layers[0].mlp["dense_h_to_4h"].weight.std().item() for m in (model, base))
    assert wide / narrow == pytest.approx(0.5, rel=0.1)


def test_the_base_width_is_the_standard_decoder_to_the_last_bit():
    one, other = decoder(16, 16), decoder(16, None)
    tokens = torch.randint(0, 16, (4, 9), generator=torch.Generator().manual_seed(0))
    assert one.rate_shares() == {} and [len(g["params"]) for g in optimizer_of(one).param_groups] == [10, 18]
    for (name, p), (same, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert name == same and torch.equal(p, q)
    assert torch.equal(one.loss(tokens), other.loss(tokens))
    assert "mup" not in other.identity and one.identity["mup"] == 16
    wide, plain = decoder(32, 16), decoder(32, None)
    plain.load_state_dict(wide.state_dict())
    torch.testing.assert_close(2 * wide(tokens[:, :8]), plain(tokens[:, :8]))


def slope(mup):
    """Of log |change of the logits| in three steps of Adam over log width."""
    widths, changes = (16, 32, 64, 128), []
    tokens = torch.randint(0, 16, (8, 9), generator=torch.Generator().manual_seed(1))
    for width in widths:
        found = []
        for seed in range(3):
            model = decoder(width, mup, seed)
            optimizer = optimizer_of(model)
            before = model(tokens[:, :8]).detach()
            for _ in range(3):
                for group in optimizer.param_groups:
                    group["lr"] = 3e-3 * group.get("share", 1.0)
                optimizer.zero_grad()
                model.loss(tokens).mean().backward()
                optimizer.step()
            found.append(float((model(tokens[:, :8]) - before).detach().abs().mean()))
        changes.append(np.mean(found))
    return np.polyfit(np.log(widths), np.log(changes), 1)[0]


def test_coordinate_check():
    """The logits of wide decoders move as far as those of narrow ones; in the standard parametrisation they move further."""
    assert abs(slope(16)) < 0.15
    assert slope(None) > 0.3


def test_mistakes():
    for options, message in (
        ({"mup": 0}, "model.mup is a width from 1"),
        ({"mup": 16, "tied": True}, "needs model.tied=false"),
    ):
        with pytest.raises(UserError, match=message):
            decoder(**({"width": 16} | options))
    with pytest.raises(UserError, match=r"model\.mup is for random weights"):
        decoder(16, 16, weights="somewhere")
