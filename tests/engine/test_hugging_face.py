"""
Parity with transformers, in both directions: logits, loss and gradients of every family that is
read and written.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from test_model import small, tokens

from engine import hugging_face
from engine.errors import UserError
from engine.hugging_face import tensors_to_hugging_face
from model import load

transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL = dict(vocab_size=61, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
LLAMA3 = dict(
    rope_type='llama3',
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)


def theirs(name):
    """
    A randomly initialised model of transformers, with gains and biases that are not 1 and 0, in
    float64.
    """
    make = {
        'llama': lambda: transformers.LlamaConfig(**SMALL, hidden_size=32, intermediate_size=40),
        'llama grouped, tied': lambda: transformers.LlamaConfig(
            **SMALL,
            hidden_size=32,
            intermediate_size=40,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        'llama 3': lambda: transformers.LlamaConfig(
            **SMALL,
            hidden_size=32,
            intermediate_size=40,
            num_key_value_heads=1,
            rope_parameters=LLAMA3,
        ),
        'llama odd': lambda: transformers.LlamaConfig(
            **{**SMALL, 'num_attention_heads': 3},
            hidden_size=30,
            intermediate_size=41,
            head_dim=8,
            attention_bias=True,
            mlp_bias=True,
        ),
        'qwen2': lambda: transformers.Qwen2Config(
            **SMALL, hidden_size=32, intermediate_size=40, num_key_value_heads=2
        ),
        'qwen2 tied': lambda: transformers.Qwen2Config(
            **SMALL,
            hidden_size=32,
            intermediate_size=40,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        ),
        'mistral': lambda: transformers.MistralConfig(
            **SMALL,
            hidden_size=32,
            intermediate_size=40,
            num_key_value_heads=2,
            sliding_window=None,
        ),
        'qwen3': lambda: transformers.Qwen3Config(
            **SMALL, hidden_size=32, intermediate_size=40, num_key_value_heads=2, head_dim=16
        ),
        'qwen3 tied, odd': lambda: transformers.Qwen3Config(
            **{**SMALL, 'num_attention_heads': 5},
            hidden_size=24,
            intermediate_size=33,
            num_key_value_heads=5,
            head_dim=6,
            tie_word_embeddings=True,
        ),
        'pythia': lambda: transformers.GPTNeoXConfig(**SMALL, hidden_size=32, intermediate_size=40),
        'pythia half rotary, odd heads, sequential': lambda: transformers.GPTNeoXConfig(
            **{**SMALL, 'num_attention_heads': 3},
            hidden_size=24,
            intermediate_size=40,
            use_parallel_residual=False,
            hidden_act='gelu_new',
            rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5),
        ),
        'gpt2': lambda: transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64
        ),
        'gpt2 exact gelu, odd heads, untied': lambda: transformers.GPT2Config(
            vocab_size=61,
            n_embd=36,
            n_layer=2,
            n_head=3,
            n_inner=50,
            n_positions=40,
            activation_function='gelu',
            tie_word_embeddings=False,
            scale_attn_by_inverse_layer_idx=True,
        ),
        'opt': lambda: transformers.OPTConfig(
            vocab_size=61,
            hidden_size=32,
            ffn_dim=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        ),
    }
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make[name]()).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p)) if p.ndim > 1 else p.add_(0.2 * torch.randn_like(p))
    return model


NAMES = [
    'llama',
    'llama grouped, tied',
    'llama 3',
    'llama odd',
    'mistral',
    'qwen2',
    'qwen2 tied',
    'qwen3',
    'qwen3 tied, odd',
    'pythia',
    'pythia half rotary, odd heads, sequential',
    'gpt2',
    'gpt2 exact gelu, odd heads, untied',
    'opt',
]


@pytest.fixture(autouse=True)
def norms_in_double(monkeypatch):
    """
    transformers' RMSNorm works in float32 whatever the weights are; for the comparison in float64
    it must not.
    """

    def forward(self, x):
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    models = transformers.models
    for norm in (
        models.llama.modeling_llama.LlamaRMSNorm,
        models.mistral.modeling_mistral.MistralRMSNorm,
        models.qwen2.modeling_qwen2.Qwen2RMSNorm,
        models.qwen3.modeling_qwen3.Qwen3RMSNorm,
    ):
        monkeypatch.setattr(norm, 'forward', forward)


def compare(theirs, ours, tolerance):
    """Logits, loss and the gradient of every tensor."""
    x = tokens(2, 24)
    logits = [model(x).logits for model in (theirs, ours)]
    losses = [
        torch.nn.functional.cross_entropy(of_model[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        for of_model in logits
    ]
    assert (logits[0] - logits[1]).abs().max() <= tolerance and (
        losses[0] - losses[1]
    ).abs() <= tolerance
    for loss in losses:
        loss.backward()
    own = tensors_to_hugging_face(
        ours.config, {name: p.grad for name, p in ours.named_parameters()}
    )
    padding = theirs.get_input_embeddings().padding_idx
    for name, p in theirs.named_parameters():
        difference = (
            p.grad - own[name if name in own else 'embed_out.weight']
        ).abs()  # GPT-NeoX: saved as embed_out
        if (
            name.endswith('embed_tokens.weight') and padding is not None
        ):  # transformers gives OPT's padding token no gradient
            difference[padding] = 0
        assert difference.max() <= tolerance, name


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize('name', NAMES)
def test_their_model_in_ours_and_ours_back_in_theirs(tmp_path, name, dtype, tolerance):
    model = theirs(name).to(dtype)
    model.save_pretrained(tmp_path / 'theirs')
    ours = load(tmp_path / 'theirs')
    assert {p.dtype for p in ours.parameters()} == {dtype}
    compare(model, ours, tolerance)
    ours.save(tmp_path / 'ours')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', dtype=dtype).eval()
    kind = type(model).__name__.replace('Mistral', 'Llama')  # without a window the same function
    assert type(back).__name__ == kind
    for (one, a), (other, b) in zip(
        sorted(model.state_dict().items()), sorted(back.state_dict().items()), strict=True
    ):
        if 'embed_positions' in one:  # OPT's two rows before the first position are for padding
            a, b = a[2:], b[2:]
        assert one == other and torch.equal(a, b), one
    compare(back, load(tmp_path / 'ours'), tolerance)


@pytest.mark.parametrize('name', ['llama', 'pythia', 'opt', 'gpt2'])
def test_sharded_and_half_precision_folders(tmp_path, name):
    theirs(name).to(torch.bfloat16).save_pretrained(tmp_path / 'many', max_shard_size='10KB')
    assert len(list((tmp_path / 'many').glob('*.safetensors'))) > 1
    model = load(tmp_path / 'many')
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'many', dtype=torch.bfloat16)
    assert torch.equal(one.get_input_embeddings().weight, model.wte.weight)
    next((tmp_path / 'many').glob('*.safetensors')).unlink()
    with pytest.raises(UserError, match='cannot be read: FileNotFoundError'):
        load(tmp_path / 'many')


def test_openai_layout_of_gpt2_is_read(tmp_path):
    """The original files have no prefix, and carry the causal mask."""
    from safetensors.torch import save_file

    model = theirs('gpt2').float()
    model.save_pretrained(tmp_path)
    old = {
        k.removeprefix('transformer.'): v
        for k, v in load_file(tmp_path / 'model.safetensors').items()
    }
    save_file(old | {'h.0.attn.bias': torch.ones(1, 1, 4, 4)}, tmp_path / 'model.safetensors')
    compare(model, load(tmp_path), 1e-4)


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(model_type='mamba'), 'no model type that can be read .mamba.'),
        (dict(model_type='mistral', sliding_window=32), 'sliding window of 32 tokens'),
        (dict(hidden_act='gelu'), "hidden_act='gelu' cannot be read"),
        (dict(mlp_bias=True), 'attention or MLP alone'),
        (dict(rope_parameters=dict(rope_type='yarn', factor=2)), 'RoPE of type .yarn.'),
        (dict(num_attention_heads=3, head_dim=None), 'n_kv_head'),
        (dict(vocab_size=60), 'shape'),
        (dict(num_hidden_layers=2), 'surplus.*layers.2'),
    ],
)
def test_what_our_block_does_not_compute_is_refused(tmp_path, changes, words):
    theirs('llama').save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=words):
        load(tmp_path)


@pytest.mark.parametrize('name', ['opt', 'pythia'])
def test_a_pickle_is_read_without_running_what_is_in_it(tmp_path, name):
    model = theirs(name).float()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / 'model.safetensors')  # under the names of the hub
    (tmp_path / 'model.safetensors').unlink()
    torch.save(stored, tmp_path / 'pytorch_model.bin')
    compare(model, load(tmp_path), 1e-4)

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'harm'),)

    for content, words in (
        (dict(stored, more=Harmful()), 'Weights only load failed'),
        ([1, 2], 'other things than tensors'),
        (dict(step=3), 'other things than tensors'),
    ):
        torch.save(content, tmp_path / 'pytorch_model.bin')
        with pytest.raises(UserError, match=words):
            load(tmp_path)
    assert not (tmp_path / 'harm').exists()


def test_weights_are_saved_in_files_with_an_index(tmp_path, monkeypatch):
    model = small()
    model.save(tmp_path / 'one')
    monkeypatch.setattr(hugging_face, 'SHARD_BYTES', 20_000)
    model.save(tmp_path / 'many', dtype=torch.bfloat16)
    files = sorted(path.name for path in (tmp_path / 'many').glob('*.safetensors'))
    assert len(files) > 2 and files[0].startswith('model-00001-of-')
    assert max((tmp_path / 'many' / name).stat().st_size for name in files) < 25_000
    loaded = load(tmp_path / 'many')
    assert torch.equal(loaded.wte.weight, model.wte.weight.bfloat16())
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'many')
    assert read.dtype == torch.bfloat16
    assert torch.equal(read.get_input_embeddings().weight, loaded.wte.weight)
    (tmp_path / 'many' / files[1]).unlink()
    with pytest.raises(UserError, match=f'{files[1]} cannot be read: FileNotFoundError'):
        load(tmp_path / 'many')
    model.save(tmp_path / 'many')  # again: the index is whole
    monkeypatch.undo()
    model.save(tmp_path / 'many')
    assert [path.name for path in (tmp_path / 'many').glob('*.safetensors*')] == [
        'model.safetensors'
    ]
