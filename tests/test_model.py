"""The model: exact sizes, causality, the cache, and folders that give back what was put in."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from engine.decoding import Decoding
from engine.errors import UserError
from model import GPT, SIZES, GPTConfig, load

PAPER_N = {
    '15m': 14_751_680,
    '44m': 44_248_800,
    '0.1b': 98_323_840,
    '0.2b': 232_623_040,
    '0.5b': 521_889_760,
    '1b-reuse': 1_085_859_424,
}
TOTAL = {  # all parameters, tied ones once
    'gpt2': 124_439_808,
    'gpt2-medium': 354_823_168,
    'gpt2-large': 774_030_080,
    'gpt2-xl': 1_557_611_200,
    '51.47m': 51_475_968,  # 51.47M with GPT-2's own vocabulary
    '138m': 138_615_552,
    '220m': 219_567_488,
    '277m': 277_440_128,
    '380m': 380_015_616,
    '537m': 537_284_736,
    '1b': 1_300_641_792,
    '2b': 2_348_029_440,
    '4b': 4_330_780_800,
    '8b': 8_439_877_632,
    '1.4b': 1_339_082_752,
    '7b': 6_738_415_616,
    'openllama-3b': 3_426_473_600,
    'smollm2-135m': 134_515_008,
    'smollm2-1.7b': 1_711_376_384,
    'llama-3.2-1b': 1_235_814_400,
    'pythia-70m': 70_426_624,
    '113.63m': 113_625_600,
    'pythia-160m': 162_322_944,
    'pythia-410m': 405_334_016,
    'pythia-1b': 1_011_781_632,
    'pythia-1.4b': 1_414_647_808,
    'meta-llama-3-8b': 8_030_261_248,
    'qwen2-0.5b': 494_032_768,
    'qwen3-0.6b': 596_049_920,
    '1.09b': 1_092_252_160,
    'qwen3-1.7b': 1_720_574_976,
    'qwen3-4b': 4_022_468_096,
}

SHAPES = {  # small models that between them use every switch
    'llama': {},
    'grouped': dict(n_kv_head=2),
    'one key head': dict(n_kv_head=1, tied=True),
    'qwen2': dict(qkv_bias=True, n_kv_head=2),
    'qwen3': dict(qk_norm=True, n_kv_head=2, head_dim=12),
    'neox': dict(norm='layer', act='gelu_exact', rotary_fraction=0.5, parallel=True, bias=True),
    'gpt2': dict(norm='layer', act='gelu', pos='learned', bias=True, tied=True),
    'inheritune': dict(
        norm='layer', act='gelu', pos='learned', tied=True, attn_scale_by_layer=True
    ),
    'opt': dict(norm='layer', act='relu', pos='learned', bias=True),
}


def small(**changes):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            **{
                **dict(
                    n_layer=3,
                    n_head=4,
                    n_embd=32,
                    n_mlp=40,
                    vocab_size=61,
                    block_size=24,
                    init_std=0.2,
                ),
                **changes,
            }
        )
    ).double()
    with torch.no_grad():  # gains and biases that are not 1 and 0, so that a forgotten one shows
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(params=SHAPES, name='model')
def any_model(request):
    return small(**SHAPES[request.param])


def tokens(batch=2, length=20):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def test_what_is_left_out_follows_what_it_derives_from():
    config = dataclasses.replace(GPTConfig(n_head=3, n_embd=60), n_head=5)
    assert (config.n_kv_head, config.head_dim, config.n_mlp) == (5, 12, 240)
    given = GPTConfig(n_head=4, n_embd=48, n_kv_head=4)
    with pytest.raises(UserError, match='n_head=6 is not a multiple of n_kv_head=4'):
        dataclasses.replace(given, n_head=6)


@pytest.mark.parametrize('name', SIZES)
def test_every_named_size_has_the_papers_parameter_count(name):
    with torch.device('meta'):
        model = GPT(GPTConfig.named(name))
    if name in PAPER_N:
        assert model.num_params() == PAPER_N[name]
    else:
        assert model.num_params(embedding=True, head=True) == TOTAL[name]
    assert model.num_params(True, True) == sum(p.numel() for p in model.parameters())


def test_sizes_by_width_and_layers():
    tiny = GPTConfig.named('gpt2-32x24', vocab_size=257, block_size=128)
    assert (tiny.n_head, tiny.n_mlp, tiny.pos, tiny.norm) == (2, 128, 'learned', 'layer')
    assert tiny.tied and tiny.init_std == 0  # by the width
    medium, shallow = GPTConfig.named('gpt2-medium'), GPTConfig.named('gpt2-mediumx16')
    assert shallow == dataclasses.replace(medium, n_layer=16)
    config = GPTConfig.named('64x4', vocab_size=257)
    assert (
        config.n_embd,
        config.n_layer,
        config.n_head,
        config.head_dim,
        config.n_mlp,
        config.vocab_size,
    ) == (64, 4, 4, 16, 168, 257)


@pytest.mark.parametrize(
    'make',
    [
        lambda: GPTConfig.named('8c'),
        lambda: GPTConfig.named('gpt2x0'),
        lambda: GPTConfig.named('gpt3x12'),
        lambda: GPTConfig.named('60x2'),
        lambda: GPTConfig(n_head=4, n_kv_head=3),
        lambda: GPTConfig(norm='batch'),
        lambda: GPTConfig(n_layer=0),
        lambda: GPTConfig(n_head=2, head_dim=3),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make):
    with pytest.raises(UserError):
        make()


def test_loss_is_the_cross_entropy_of_the_logits(model):
    x, y = tokens(), tokens().roll(-1, 1)
    y[0, :5] = -100
    assert model(x, y).logits is None and model(x).loss is None
    expected = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(
        model(x, y).loss, expected.to(model(x, y).loss.dtype), atol=1e-6, rtol=0
    )


def test_no_position_sees_what_comes_after(model):
    x = tokens()
    changed = x.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    before, after = model(x).logits, model(changed).logits
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.allclose(
        before[:, 12:], after[:, 12:]
    )


def test_hidden_state_of_the_last_layer_gives_the_logits(model):
    out = model(tokens(), hidden_at=3)
    torch.testing.assert_close(F.linear(model.norm(out.hidden), model.head_weight), out.logits)
    assert not torch.allclose(model(tokens(), hidden_at=1).hidden, out.hidden)


def test_every_parameter_has_a_gradient(model):
    model(tokens(), tokens()).loss.backward()
    for name, p in model.named_parameters():
        if not name.endswith(
            'k.bias'
        ):  # without rotation, softmax does not see a shift of all keys
            assert p.grad is not None and p.grad.abs().max() > 1e-12, name


def test_grouped_queries_equal_repeated_keys():
    grouped = small(n_kv_head=2)
    full = GPT(dataclasses.replace(grouped.config, n_kv_head=4)).double()
    state = grouped.state_dict()
    for name in list(state):
        if '.k.' in name or '.v.' in name:
            state[name] = state[name].view(2, 8, -1).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(full(tokens()).logits, grouped(tokens()).logits)


def test_cached_generation_is_the_uncached_one(model):
    x = tokens(2, 5)
    expected = x
    for _ in range(19):
        expected = torch.cat((expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(x, 19, temperature=0), expected)
    assert model.generate(x, 60, temperature=0).shape == (
        2,
        65,
    )  # beyond the context: goes on from its later half


def test_text_read_in_pieces_has_the_logits_of_the_whole():
    model = GPT(GPTConfig.named('16x2', vocab_size=61, block_size=64)).double()
    x, decoding = tokens(2, 60), Decoding(model, 2, 60)
    parts = [decoding.read(part) for part in x.split([20, 1, 39], 1)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, 1), model(x).logits)


def test_generation_stops_and_is_seeded():
    model, x = small(), tokens(2, 5)
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        samples.append(model.generate(x, 10, top_k=5))
    one, two = samples
    assert torch.equal(one, two) and torch.equal(
        model.generate(x, 3, top_k=1), model.generate(x, 3, temperature=0)
    )
    first = model.generate(x[:1], 1, temperature=0)[0, -1].item()
    assert model.generate(x[:1], 10, temperature=0, stop=first).shape[1] == 6


def test_saving_and_loading_is_exact(model, tmp_path):
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.config == model.config and {p.name for p in tmp_path.iterdir()} == {
        'config.json',
        'model.safetensors',
    }
    for (name, a), (other, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


@pytest.mark.parametrize(
    'damage, word',
    [
        (lambda f: (f / 'config.json').unlink(), 'config.json'),
        (lambda f: (f / 'model.safetensors').unlink(), 'safetensors'),
        (lambda f: (f / 'config.json').write_text('{'), 'damaged'),
        (lambda f: (f / 'model.safetensors').write_bytes(b''), 'damaged'),
        (
            lambda f: (f / 'model.safetensors').write_bytes(
                (f / 'model.safetensors').read_bytes()[:-100]
            ),
            'damaged',
        ),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, word):
    small().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=word):
        load(tmp_path)


def test_tensors_that_do_not_match_the_configuration_are_listed(tmp_path):
    small().save(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['nanofamily']['n_layer'] = 2
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='model.layers.2'):
        load(tmp_path)
    config['nanofamily'] |= dict(n_layer=3, n_mlp=41)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='shape'):
        load(tmp_path)


@pytest.mark.parametrize(
    'odd',
    [
        dict(rope_theta=float('nan')),
        dict(rope_theta=10**31),
        dict(init_std=-1.0),
        dict(rope_theta=0),
        dict(channels=-1),
    ],
)
def test_numbers_that_no_model_can_have_are_refused(odd):
    """A configuration may come from a damaged file."""
    (name,) = odd
    with pytest.raises(UserError, match=name):
        GPTConfig.named('16x2', vocab_size=257, block_size=16, **odd)
