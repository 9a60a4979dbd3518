"""The model: exact sizes, causality, the cache, and folders that give back what was put in."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import same_weights

from engine.errors import UserError
from model import GPT, SIZES, GPTConfig, load, probabilities

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
    'inheritune': dict(norm='layer', act='gelu', pos='learned', attn_scale_by_layer=True),
    'opt': dict(norm='layer', act='relu', pos='learned', bias=True),
}


def small(**changes):
    """A float64 model whose gains are not 1, nor its biases 0, so that a forgotten one shows."""
    torch.manual_seed(0)
    shape = dict(n_layer=3, n_head=4, n_embd=32, n_mlp=40, vocab_size=61, block_size=24)
    model = GPT(GPTConfig(**shape | dict(init_std=0.2) | changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(params=SHAPES, name='model')
def any_model(request):
    return small(**SHAPES[request.param])


def tokens(batch=2, length=20):
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------
# shapes


def test_what_is_left_out_follows_what_it_derives_from():
    config = replace(GPTConfig(n_head=3, n_embd=60), n_head=5)
    assert (config.n_kv_head, config.head_dim, config.n_mlp) == (5, 12, 240)
    with pytest.raises(UserError, match='n_head=6 is not a multiple of n_kv_head=4'):
        replace(GPTConfig(n_head=4, n_embd=48, n_kv_head=4), n_head=6)


@pytest.mark.parametrize('name', SIZES)
def test_every_named_size_has_the_papers_parameter_count(name):
    with torch.device('meta'):
        model = GPT(GPTConfig.named(name))
    total = model.num_params(embedding=True, head=True)
    assert PAPER_N.get(name) == model.num_params() or TOTAL[name] == total
    assert total == sum(p.numel() for p in model.parameters())


def test_sizes_by_width_and_layers():
    tiny = GPTConfig.named('gpt2-32x24', vocab_size=257, block_size=128)
    assert (tiny.n_head, tiny.n_mlp, tiny.pos, tiny.norm) == (2, 128, 'learned', 'layer')
    config = GPTConfig.named('64x4')
    assert (config.n_embd, config.n_layer, config.n_head, config.n_mlp) == (64, 4, 4, 168)


@pytest.mark.parametrize(
    'name, changes',
    [
        ('8c', {}),
        ('gpt2x0', {}),
        ('60x2', {}),
        ('gpt2', dict(n_head=4, n_kv_head=3)),
        ('64x2', dict(head_dim=3)),
        ('64x2', dict(rope_theta=float('nan'))),  # a configuration may come from a damaged file
        ('64x2', dict(init_std=-1.0)),
        ('64x2', dict(channels=-1)),
    ],
)
def test_shapes_that_cannot_be_are_refused(name, changes):
    with pytest.raises(UserError):
        GPTConfig.named(name, **changes)


def test_weights_that_write_to_the_residual_stream_begin_smaller():
    block = GPT(GPTConfig.named('128x8', init_std=0.1)).blocks[0]
    assert block.mlp.up.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.1 / 4, rel=0.02)


# ----------------------------------------------------------------------------------------------
# the function


def test_loss_is_the_cross_entropy_of_the_logits(model):
    x, y = tokens(), tokens().roll(-1, 1)
    y[0, :5] = -100
    expected = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())
    assert model(x, y).logits is None and model(x).loss is None
    assert model(x, y).loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_no_position_sees_what_comes_after(model):
    x = tokens()
    changed = x.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 61
    before, after = model(x).logits, model(changed).logits
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_every_parameter_has_a_gradient(model):
    model(tokens(), tokens()).loss.backward()
    for name, p in model.named_parameters():
        if not name.endswith('k.bias'):  # without rotation, softmax sees no shift of all keys
            assert p.grad is not None and p.grad.abs().max() > 1e-12, name


# ----------------------------------------------------------------------------------------------
# generation


def test_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = logits.softmax(-1)
    first_two = p * torch.tensor([1, 1, 0, 0]) / p[0, :2].sum()
    for temperature in (0, 1e-300):  # in float32 both are nothing
        assert probabilities(logits, temperature).tolist() == [[1, 0, 0, 0]]
    for found, expected in (
        (probabilities(logits, temperature=0.5), (2 * logits).softmax(-1)),
        (probabilities(logits, top_k=2), first_two),
        (probabilities(logits, top_p=0.7), first_two),  # the first alone has 0.64
    ):
        torch.testing.assert_close(found, expected)


def test_cached_generation_is_the_uncached_one(model):
    x = expected = tokens(2, 5)
    for _ in range(19):
        expected = torch.cat((expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(model.generate(x, 19, temperature=0), expected)
    # beyond the context it goes on
    assert model.generate(x, 60, temperature=0).shape == (2, 65)


def test_generation_is_seeded_and_stops():
    model, x, samples = small(), tokens(1, 5), []
    for stop in (None, None, 'the last'):
        torch.manual_seed(3)
        how = dict(stop=samples[0][0, 7].item()) if stop else {}
        samples.append(model.generate(x, 10, top_k=5, **how))
    whole, again, stopped = samples
    assert torch.equal(whole, again) and torch.equal(stopped, whole[:, : stopped.shape[1]])
    assert stopped.shape[1] <= 8


# ----------------------------------------------------------------------------------------------
# folders


def test_saving_and_loading_is_exact(model, tmp_path):
    model.save(tmp_path)
    again = load(tmp_path)
    assert again.config == model.config and same_weights(again, model)
    assert {path.name for path in tmp_path.iterdir()} == {'config.json', 'model.safetensors'}
    assert torch.equal(model(tokens()).logits, again(tokens()).logits)


@pytest.mark.parametrize(
    'changes, words', [(dict(n_layer=2), 'model.layers.2'), (dict(n_mlp=41), 'shape')]
)
def test_tensors_that_do_not_match_the_configuration_are_listed(tmp_path, changes, words):
    small().save(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['nanofamily'] |= changes
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        load(tmp_path)
