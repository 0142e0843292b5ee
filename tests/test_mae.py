"""The masked autoencoder: against a naive version, masks, what must not leak, positions, weights, operations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import PatchEmbed

from clbench.interfaces import UserError
from clbench.models.mae import build_mae, draws, positions, split_rows
from clbench.streams import rng
from clbench.streams.tokens.mae_images import augmented, with_keys

SIDE, PATCH = 8, 2
SHAPE = {"patch": PATCH, "width": 16, "depth": 2, "heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}


def build(image=SIDE, **options):
    return build_mae(**({"name": "small", "image": image} | SHAPE | options))


def rows(number, seed=0, side=SIDE):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (number, side, side, 3)).astype(np.uint8)
    return torch.from_numpy(with_keys(images, rng.bits(seed, np.arange(number))))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.integers(1, 70))
def test_draws_are_those_of_the_counter(keys, number):
    found = draws(torch.from_numpy(np.array(keys, np.uint64).view(np.int64)), number)
    for key, line in zip(keys, found, strict=True):
        np.testing.assert_array_equal(line.numpy().view(np.uint64), rng.bits(key, np.arange(number)))


def test_rows_hold_pixels_and_key():
    image = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    made = with_keys(image, np.array([2**63 + 5], np.uint64))
    x, keys = split_rows(torch.from_numpy(made), 4)
    assert keys.tolist() == [5 - 2**63] and x.shape == (1, 3, 4, 4)
    assert x[0, 2, 1, 3].item() == pytest.approx(image[0, 1, 3, 2] / 127.5 - 1)
    for wrong in (torch.zeros(1, 48, dtype=torch.uint8), torch.zeros(1, 56), torch.zeros(56, dtype=torch.uint8)):
        with pytest.raises(UserError, match="reads"):
            split_rows(wrong, 4)


def naive(model, one):
    """Loss of one row, patch by patch, with loops."""
    pixels, key = one[:-8].reshape(SIDE, SIDE, 3).numpy().astype(np.float64), int(one[-8:].numpy().view("<u8")[0])
    order = sorted(range(16), key=lambda p: rng.bits(key, np.arange(16)).view(np.int64)[p])
    seen, hidden = sorted(order[:4]), sorted(order[4:])
    embed, x = model.patch_embed.proj, torch.tensor(pixels / 127.5 - 1).float()
    patches = [x[r : r + 2, c : c + 2] for r in range(0, SIDE, 2) for c in range(0, SIDE, 2)]
    tokens = [model.cls_token[0, 0] + model.pos_embed[0, 0]]
    for p in seen:
        value = (embed.weight * patches[p].permute(2, 0, 1)).sum((1, 2, 3)) + embed.bias
        tokens.append(value + model.pos_embed[0, 1 + p])
    x = torch.stack(tokens)[None]
    for block in model.blocks:
        x = block(x)
    small = model.decoder_embed(model.norm(x))[0]
    full = [small[0] + model.decoder_pos_embed[0, 0]]
    for p in range(16):
        token = small[1 + seen.index(p)] if p in seen else model.mask_token[0, 0]
        full.append(token + model.decoder_pos_embed[0, 1 + p])
    x = torch.stack(full)[None]
    for block in model.decoder_blocks:
        x = block(x)
    drawn = model.decoder_pred(model.decoder_norm(x))[0, 1:]
    total = 0.0
    for p in hidden:
        wanted = patches[p].double().reshape(-1)
        wanted = (wanted - wanted.mean()) / (wanted.var(unbiased=True) + 1e-6) ** 0.5
        total += float((drawn[p].double() - wanted).square().mean())
    return total / len(hidden)


def test_loss_equals_a_naive_version():
    model = build(seed=4)
    with torch.no_grad():
        model.mask_token += 0.3  # tokens and biases that are not small
        model.cls_token -= 0.2
        model.patch_embed.proj.bias += 0.1
        found = model.loss(rows(3))
        assert found.shape == (3, 1) and found.dtype == torch.float32
        assert found[:, 0].tolist() == pytest.approx([naive(model, one) for one in rows(3)], rel=1e-5)


def test_loss_by_hand():
    """A decoder that draws zeros: the loss of normalised patches is (n - 1) / n, of plain ones the mean square."""
    model = build()
    torch.nn.init.zeros_(model.decoder_pred.weight)
    with torch.no_grad():
        assert model.loss(rows(5)).flatten().tolist() == pytest.approx([11 / 12] * 5, rel=1e-4)
        grey = with_keys(np.full((1, SIDE, SIDE, 3), 255, np.uint8), np.zeros(1, np.uint64))
        assert model.loss(torch.from_numpy(grey)).item() == 0  # a flat patch has nothing to draw
        plain = build(target="pixels")
        torch.nn.init.zeros_(plain.decoder_pred.weight)
        assert plain.loss(torch.from_numpy(grey)).item() == pytest.approx(1.0)


def test_masks_are_even_and_of_the_right_size():
    model = build()
    keys = torch.from_numpy(rng.bits(7, np.arange(4000)).view(np.int64))
    seen, hidden = model.masks(keys)
    assert seen.shape == (4000, 4) and hidden.shape == (4000, 12)
    both = torch.cat([seen, hidden], 1).sort(1).values
    assert (both == torch.arange(16)).all()
    share = torch.bincount(hidden.flatten(), minlength=16) / 4000
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5
    pairs = np.zeros((16, 16))
    for a, b in ((i, j) for i in range(4) for j in range(4) if i != j):
        np.add.at(pairs, (seen[:, a].numpy(), seen[:, b].numpy()), 1)
    expected = 4000 * 4 * 3 / (16 * 15)  # any two patches are seen together equally often
    off = pairs[~np.eye(16, dtype=bool)]
    assert abs(off - expected).max() < 6 * expected**0.5
    assert torch.equal(seen[:5], model.masks(keys[:5])[0])


def changed(one, model, which, value):
    """The same image with the pixels of its seen or hidden patches set."""
    images, keys = one[:, :-8].reshape(-1, SIDE, SIDE, 3).clone(), split_rows(one, SIDE)[1]
    for i, places in enumerate(model.masks(keys)[which]):
        for p in places.tolist():
            r, c = divmod(p, SIDE // PATCH)
            images[i, PATCH * r : PATCH * r + PATCH, PATCH * c : PATCH * c + PATCH] = value
    return torch.cat([images.reshape(len(one), -1), one[:, -8:]], 1)


def test_hidden_pixels_do_not_reach_the_encoder():
    model = build()
    one = rows(4)
    other = changed(one, model, 1, 200)
    assert not torch.equal(one, other)
    with torch.no_grad():
        found = [model.encode(x, model.masks(keys)[0]) for x, keys in (split_rows(r, SIDE) for r in (one, other))]
    assert torch.equal(*found)


def test_seen_pixels_are_no_target():
    """With a decoder that draws a constant only the targets matter: changing what is seen changes nothing."""
    model = build(target="pixels")
    torch.nn.init.zeros_(model.decoder_pred.weight)
    one = rows(4)
    with torch.no_grad():
        assert torch.equal(model.loss(one), model.loss(changed(one, model, 0, 0)))
        assert not torch.equal(model.loss(one), model.loss(changed(one, model, 1, 0)))


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_no_row_depends_on_its_mates(number, seed):
    model, many = build(), rows(8, seed)
    with torch.no_grad():
        assert torch.allclose(model.loss(many)[:number], model.loss(many[:number]), atol=1e-5)
        assert torch.allclose(model.features(many)[:number], model.features(many[:number]), atol=1e-5)


def test_features_do_not_depend_on_the_mask():
    model = build()
    one = rows(2)
    other = torch.cat([one[:, :-8], one[:, -8:].flip(1)], 1)
    with torch.no_grad():
        assert torch.equal(model.features(one), model.features(other)) and model.features(one).shape == (2, 16)
        assert not torch.equal(model.loss(one), model.loss(other))
        tokens = model.encode(split_rows(one, SIDE)[0])
        assert torch.equal(build(pool="class").features(one), tokens[:, 0])


def test_positions():
    found = positions(8, 3)
    assert found.shape == (1, 10, 8) and not found[0, 0].any()
    at = found[0, 1 + 5]  # row 1, column 2
    assert at.tolist() == pytest.approx(
        [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)], rel=1e-6
    )
    model = build()
    assert not model.pos_embed.requires_grad and "pos_embed" not in dict(model.named_parameters())
    assert isinstance(model.patch_embed, PatchEmbed)


def test_overfits_a_small_batch():
    model, few = build(width=32, depth=2, decoder_width=32), rows(4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = model.loss(few).mean().item()
    for _ in range(250):
        optimizer.zero_grad()
        loss = model.loss(few).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first


def test_weights_are_drawn_from_the_seed():
    made = [build(seed=seed) for seed in (0, 0, 1)]
    ids = [model.identity["state_sha256"] for model in made]
    assert ids[0] == ids[1] != ids[2] and not made[0].pretrained
    weight = made[0].blocks[0].mlp.fc1.weight
    edge = (6 / (16 + 64)) ** 0.5
    assert weight.abs().max() <= edge and weight.std().item() == pytest.approx(edge / 3**0.5, rel=0.1)
    assert made[0].norm.weight.eq(1).all() and not made[0].blocks[1].attn.qkv.bias.any()
    assert made[0].identity["parameters"] == sum(p.numel() for p in made[0].parameters())


def test_weights_from_a_file(tmp_path):
    model = build(seed=5)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, str(tmp_path / "m.safetensors"))
    again = build(weights=str(tmp_path / "m.safetensors"))
    assert again.pretrained and again.identity["state_sha256"] == model.identity["state_sha256"]
    assert build(weights="m.safetensors", data_root=str(tmp_path)).identity["source"] == "m.safetensors"
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")  # as the published files are
    assert build(weights=str(tmp_path / "m.pth")).identity["state_sha256"] == model.identity["state_sha256"]
    lacking = {name: value for name, value in model.state_dict().items() if name != "mask_token"}
    torch.save(lacking, tmp_path / "encoder.pth")
    with pytest.raises(UserError, match="missing mask_token"):
        build(weights=str(tmp_path / "encoder.pth"))
    with pytest.raises(UserError, match="not found"):
        build(weights="nothing.pth")
    with pytest.raises(UserError, match="the model wants"):
        build(weights=str(tmp_path / "m.pth"), width=32)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 18}, "multiple of 4"),
        ({"heads": 3}, "model.heads=3"),
        ({"patch": 3}, "not a multiple of model.patch=3"),
        ({"mask": 1.0}, "model.mask"),
        ({"mask": 0.99}, "leaves 0 of 16"),
        ({"mask": 0.0}, "model.mask"),
        ({"depth": 0}, "model.depth"),
        ({"decoder_depth": True}, "model.decoder_depth"),
        ({"target": "edges"}, "normalised or pixels"),
        ({"pool": "max"}, "mean or class"),
        ({"image": None}, "no stream of images"),
    ],
)
def test_shapes_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        build(**options)


def test_patch_follows_the_image():
    assert [build(image=side, patch=None).shape.patch for side in (8, 32, 64)] == [2, 4, 8]


def test_operations_are_counted():
    """A model without attention terms to speak of: six for every weight and token."""
    model = build(image=8, depth=1, mask=0.5)
    s = model.shape
    encoder = 6 * 12 * 16**2 * (1 + 8) + 12 * 9**2 * 16
    decoder = 6 * 12 * 8**2 * (1 + 16) + 12 * 17**2 * 8
    ends = 6 * (16 * 12 * 16 + 9 * 16 * 8 + 8 * 12 * 8)
    assert s.seen == 8 and model.flops_per_token(1) == encoder + decoder + ends
    assert model.feature_flops == 2 * (12 * 16**2 * 17 + 2 * 17**2 * 16 + 16 * 12 * 16)


def test_views():
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3)).astype(np.uint8)
    keys = rng.bits(3, np.arange(300))
    assert augmented(images, keys, "none") is images
    flipped = augmented(images, keys, "flip")
    turned = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(flipped, images, strict=True)])
    kept = np.array([np.array_equal(a, b) for a, b in zip(flipped, images, strict=True)])
    assert (turned ^ kept).all() and 100 < turned.sum() < 200
    cropped = augmented(images, keys, "crop")
    assert cropped.dtype == np.uint8 and cropped.shape == images.shape
    assert np.array_equal(cropped[7:9], augmented(images[7:9], keys[7:9], "crop"))
    flat = np.full((4, 8, 8, 3), 9, np.uint8)
    assert np.array_equal(augmented(flat, keys[:4], "crop"), flat)
