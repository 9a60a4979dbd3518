"""
Growth operators: exact where they are said to be exact, on shapes drawn at random; gradients,
symmetry, and where what comes from.
"""

import dataclasses
import random

import pytest
import torch
from test_model import SHAPES, small, tokens

from engine.errors import UserError
from expand import DEPTH, check_growth, grow, identity, repeated
from model import GPT, GPTConfig

DRAWS = 250


def draw(seed, integer=False, **fixed):
    """
    A random shape and a larger one that it can be grown to; every width by its own ratio, or all
    by a whole one.
    """
    rng = random.Random(seed)
    while True:
        kv, per_group = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
        pos = rng.choice(['rope', 'learned'])
        config = GPTConfig(
            **{
                **dict(
                    n_layer=rng.randint(1, 3),
                    n_head=kv * per_group,
                    n_kv_head=kv,
                    head_dim=rng.choice([4, 8]),
                    n_embd=rng.choice([8, 12, 15, 20]),
                    n_mlp=rng.choice([7, 12, 16]),
                    vocab_size=61,
                    block_size=24,
                    norm=rng.choice(['rms', 'layer']),
                    act=rng.choice(['swiglu', 'gelu', 'gelu_exact', 'relu']),
                    pos=pos,
                    rotary_fraction=rng.choice([1.0, 0.5]),
                    qk_norm=rng.random() < 0.3,
                    parallel=rng.random() < 0.3,
                    bias=rng.random() < 0.5,
                    tied=rng.random() < 0.5,
                    attn_scale_by_layer=rng.random() < 0.3,
                    init_std=0.3,
                ),
                **fixed,
            }
        )
        n = rng.choice([1, 2, 3])
        if integer:
            target = dataclasses.replace(
                config,
                n_head=n * config.n_head,
                n_kv_head=n * kv,
                n_embd=n * config.n_embd,
                n_mlp=n * config.n_mlp,
            )
        else:
            new_kv = rng.choice([kv, kv + 1, 2 * kv, 3 * kv])
            target = dataclasses.replace(
                config,
                n_kv_head=new_kv,
                n_head=new_kv * rng.choice([per_group, per_group + 1, 2 * per_group]),
                n_embd=config.n_embd + rng.randint(0, 2 * config.n_embd),
                n_mlp=config.n_mlp + rng.randint(0, 2 * config.n_mlp),
                vocab_size=rng.choice([61, 64]),
                n_layer=config.n_layer + rng.randint(0, 3),
            )
        try:
            check_growth(config, target, 'lossless', 'identity')
        except UserError:  # some query head would be lost: another draw
            continue
        return config, target


def model_of(config, seed=0):
    """
    A float64 model with gains and biases that are not 1 and 0, and two outlier dimensions in its
    residual stream.
    """
    torch.manual_seed(seed)
    model = GPT(config).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn_like(p))
        model.wte.weight[:, :2] *= 10
    return model


def error(model, grown):
    return (grown(tokens()).logits[..., :61] - model(tokens()).logits).abs().max().item()


# ----------------------------------------------------------------------------------------------
# exactness


@pytest.mark.parametrize('noise', [0.0, 0.3])
def test_lossless_and_identity_keep_the_function_for_any_shape(noise):
    widths = set()
    for seed in range(DRAWS):
        config, target = draw(seed)
        model = model_of(config)
        grown = grow(model, target, 'lossless', 'identity', noise, seed)
        assert error(model, grown) < 1e-10, (seed, config, target)
        widths.add(target.n_embd / config.n_embd)
    assert len(widths) > 50


@pytest.mark.parametrize(
    'width, noise', [('fpi', 0.0), ('fpi', 0.3), ('clone', 0.0), ('clone', 0.3)]
)
def test_whole_copies_keep_the_function(width, noise):
    for seed in range(200):
        config, target = draw(seed, integer=True)
        assert (
            error(model_of(config), grow(model_of(config), target, width, 'identity', noise, seed))
            < 1e-10
        ), (seed, config, target)


@pytest.mark.parametrize('norm', ['rms', 'layer'])
def test_plain_duplication_at_a_fraction_is_not_exact(norm):
    """
    The control: outlier dimensions weigh twice in the norm, and that is what `lossless` mends.
    """
    config = GPTConfig(
        n_layer=2,
        n_head=4,
        head_dim=4,
        n_embd=16,
        n_mlp=16,
        vocab_size=61,
        block_size=24,
        norm=norm,
        init_std=0.3,
    )
    model = model_of(config)
    target = dataclasses.replace(config, n_embd=20)
    assert (
        error(model, grow(model, target, 'fpi')) > 0.05
        and error(model, grow(model, target, 'lossless')) < 1e-10
    )


def test_clone_is_refused_where_it_is_not_exact():
    config = small().config
    with pytest.raises(UserError, match='clone needs whole multiples, not n_mlp 40 -> 50'):
        grow(small(), dataclasses.replace(config, n_mlp=50), 'clone')


def test_identity_layers_are_bit_exact_in_function_and_gradient():
    for shape in SHAPES.values():
        if shape.get('attn_scale_by_layer'):
            continue  # exact too, but rescaled queries round
        model = small(**shape)
        deep = grow(model, dataclasses.replace(model.config, n_layer=5), depth='identity')
        assert torch.equal(deep(tokens()).logits, model(tokens()).logits)
        for m in (model, deep):
            m(tokens(), tokens()).loss.backward()
        kept = [place for place in range(5) if place not in repeated(identity(3, 5))]
        for old, new in enumerate(kept):
            for (name, a), b in zip(
                model.blocks[old].named_parameters(), deep.blocks[new].parameters()
            ):
                assert torch.equal(a.grad, b.grad), name


# ----------------------------------------------------------------------------------------------
# symmetry


def distances_after_a_step(width, noise, optimizer_class):
    """Largest difference between the copies of a unit after one step: {what: distance}."""
    model = model_of(
        GPTConfig(
            n_layer=2,
            n_head=2,
            head_dim=8,
            n_embd=16,
            n_mlp=12,
            vocab_size=61,
            block_size=24,
            init_std=0.3,
        )
    )
    target = dataclasses.replace(model.config, n_head=4, n_kv_head=4, n_embd=32, n_mlp=24)
    big = grow(model, target, width, noise=noise)
    optimizer = optimizer_class(big.parameters(), lr=1e-2)
    big(tokens(), tokens().roll(-1, 1)).loss.backward()
    optimizer.step()
    block, old = big.blocks[0], 16
    pairs = {
        'neurons': block.mlp.up.weight.chunk(2),
        'heads': block.attn.v.weight.chunk(2),
        'residual': (big.wte.weight[:, :old], big.wte.weight[:, old:]),
    }
    return {what: (a - b).abs().max().item() for what, (a, b) in pairs.items()}


@pytest.mark.parametrize('optimizer_class', [torch.optim.SGD, torch.optim.Adam])
def test_copies_stay_copies_without_noise_and_part_with_it(optimizer_class):
    for width in ('fpi', 'lossless', 'clone'):
        assert max(distances_after_a_step(width, 0.0, optimizer_class).values()) < 1e-12
        assert min(distances_after_a_step(width, 0.3, optimizer_class).values()) > 1e-6


# ----------------------------------------------------------------------------------------------
# depth maps


def layers(old, new, depth):
    return DEPTH[depth](old, new)


def test_layer_maps():
    assert layers(3, 6, 'stack') == [0, 1, 2, 0, 1, 2] and layers(3, 5, 'stack') == [0, 1, 2, 0, 1]
    assert layers(18, 22, 'bert2bert') == [*range(18), 14, 15, 16, 17]
    assert layers(2, 7, 'bert2bert') == [0, 1, 0, 1, 0, 1, 1]
    assert layers(3, 6, 'interleave') == [0, 0, 1, 1, 2, 2]
    for old, new, duplicated in (
        (18, 22, [2, 6, 11, 15]),
        (22, 27, [2, 6, 11, 15, 19]),
        (27, 33, [2, 6, 11, 15, 20, 24]),
    ):
        assert layers(old, new, 'interleave') == sorted([*range(old), *duplicated])
    for old, new, added in (
        (18, 22, [5, 10, 16, 21]),
        (22, 27, [5, 10, 16, 21, 26]),
        (27, 33, [5, 10, 16, 21, 27, 32]),
    ):
        assert repeated(identity(old, new)) == added


@pytest.mark.parametrize('depth', DEPTH)
def test_every_layer_is_used_and_the_count_is_right(depth):
    for old in range(1, 8):
        for new in range(old, 20):
            assert len(layers(old, new, depth)) == new and set(layers(old, new, depth)) == set(
                range(old)
            )


# ----------------------------------------------------------------------------------------------
# the rest


def test_vocabulary_padding_keeps_the_old_logits_and_adds_the_mean():
    model = small()
    padded = grow(model, dataclasses.replace(model.config, vocab_size=64))
    torch.testing.assert_close(
        padded(tokens()).logits[..., :61], model(tokens()).logits, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(padded.wte.weight[61:], model.wte.weight.mean(0).expand(3, -1))


def test_half_precision_rounds_once():
    model = small(n_embd=48, n_head=4, head_dim=8).to(torch.bfloat16)
    target = dataclasses.replace(model.config, n_embd=80)
    grown, exact = (
        grow(model, target, 'lossless').state_dict(),
        grow(model.double(), target, 'lossless').state_dict(),
    )
    for name in grown:
        assert grown[name].dtype == torch.bfloat16 and torch.equal(
            grown[name], exact[name].to(torch.float32).to(torch.bfloat16)
        ), name


def test_noise_depends_on_the_seed_alone():
    model = small()
    target = dataclasses.replace(model.config, n_mlp=80)
    one, two, other = (
        grow(model, target, 'fpi', noise=0.1, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    name = 'blocks.0.mlp.down.weight'
    assert torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name])
