"""
Parity with transformers, in both directions: logits, loss and gradients of every family that is
read and written.
"""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import small, tokens

from engine import hugging_face
from engine.errors import UserError
from engine.hugging_face import tensors_to_hugging_face
from model import load

transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
GPT2 = dict(n_embd=32, n_layer=3, n_head=4, n_positions=64)
LLAMA3 = dict(rope_type='llama3', rope_theta=500.0, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
HALF = dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=0.5)
MODELS = {  # name: (class of the configuration, its fields)
    'llama': ('Llama', SIZES),
    'llama grouped, tied': (
        'Llama',
        SIZES | dict(num_key_value_heads=2, tie_word_embeddings=True),
    ),
    'llama 3': ('Llama', SIZES | dict(num_key_value_heads=1, rope_parameters=LLAMA3)),
    'llama odd': (
        'Llama',
        SIZES
        | dict(num_attention_heads=3, hidden_size=30, intermediate_size=41, head_dim=8)
        | dict(attention_bias=True, mlp_bias=True),
    ),
    'mistral': ('Mistral', SIZES | dict(num_key_value_heads=2, sliding_window=None)),
    'qwen2': ('Qwen2', SIZES | dict(num_key_value_heads=2)),
    'qwen3': ('Qwen3', SIZES | dict(num_key_value_heads=2, head_dim=16)),
    'pythia': ('GPTNeoX', SIZES),
    'pythia half rotary, odd heads, sequential': (
        'GPTNeoX',
        SIZES
        | dict(num_attention_heads=3, hidden_size=24, use_parallel_residual=False)
        | dict(hidden_act='gelu_new', rope_parameters=HALF),
    ),
    'gpt2': ('GPT2', GPT2),
    'gpt2 exact gelu, odd heads, untied': (
        'GPT2',
        dict(n_embd=36, n_layer=2, n_head=3, n_inner=50, n_positions=40)
        | dict(activation_function='gelu', tie_word_embeddings=False)
        | dict(scale_attn_by_inverse_layer_idx=True),
    ),
    'opt': (
        'OPT',
        dict(hidden_size=32, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4)
        | dict(max_position_embeddings=64, word_embed_proj_dim=32),
    ),
}


def theirs(name, **changes):
    """
    A randomly initialised model of transformers, with gains and biases that are not 1 and 0, in
    float64.
    """
    kind, fields = MODELS[name]
    config = getattr(transformers, f'{kind}Config')(vocab_size=61, **fields | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.1 if p.ndim > 1 else 0.2) * torch.randn_like(p))
    return model


@pytest.fixture(autouse=True)
def norms_in_double(monkeypatch):
    """
    transformers' RMSNorm works in float32 whatever the weights are; for the comparison in float64
    it must not.
    """

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

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
    x, found = tokens(2, 24), []
    for model in (theirs, ours):
        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        found.append((logits, loss))
    for a, b in zip(*found):
        assert (a - b).abs().max() <= tolerance
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    own = tensors_to_hugging_face(ours.config, gradients)
    padding = theirs.get_input_embeddings().padding_idx
    for name, p in theirs.named_parameters():  # GPT-NeoX's head is saved as embed_out
        difference = (p.grad - own[name if name in own else 'embed_out.weight']).abs()
        if name.endswith('embed_tokens.weight') and padding is not None:
            difference[padding] = 0  # transformers gives OPT's padding token no gradient
        assert difference.max() <= tolerance, name


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize('name', MODELS)
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
    states = (sorted(m.state_dict().items()) for m in (model, back))
    for (one, a), (other, b) in zip(*states, strict=True):
        skip = 2 if 'embed_positions' in one else 0  # OPT's first two rows are for padding
        assert one == other and torch.equal(a[skip:], b[skip:]), one
    compare(back, load(tmp_path / 'ours'), tolerance)


def test_weights_are_saved_in_files_with_an_index(tmp_path, monkeypatch):
    model = small()
    monkeypatch.setattr(hugging_face, 'SHARD_BYTES', 20_000)
    model.save(tmp_path, dtype=torch.bfloat16)
    files = sorted(path.name for path in tmp_path.glob('*.safetensors'))
    assert len(files) > 2 and files[0].startswith('model-00001-of-')
    assert max((tmp_path / name).stat().st_size for name in files) < 25_000
    assert torch.equal(load(tmp_path).wte.weight, model.wte.weight.bfloat16())
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.dtype == torch.bfloat16
    monkeypatch.undo()
    model.save(tmp_path)  # again, in one: no file of the others stays
    assert [path.name for path in tmp_path.glob('*.safetensors*')] == ['model.safetensors']


def test_openai_layout_of_gpt2_is_read(tmp_path):
    """The original files have no prefix, and carry the causal mask."""
    model = theirs('gpt2').float()
    model.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    old = {name.removeprefix('transformer.'): tensor for name, tensor in load_file(path).items()}
    save_file(old | {'h.0.attn.bias': torch.ones(1, 1, 4, 4)}, path)
    compare(model, load(tmp_path), 1e-4)


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'pythia'])
def test_a_head_in_the_file_counts_whatever_the_configuration_says(tmp_path, name):
    model = theirs(name, tie_word_embeddings=False).float()
    model.save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=True)
    assert not load(tmp_path).config.tied
    compare(model, load(tmp_path), 1e-4)


def edit(folder, **fields):
    """Change fields of a folder's config.json."""
    content = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    'name, changes, words',
    [
        ('llama', dict(model_type='mamba'), 'no model type that can be read .mamba.'),
        ('llama', dict(model_type='mistral', sliding_window=32), 'sliding window of 32 tokens'),
        ('llama', dict(hidden_act='gelu'), "hidden_act='gelu' cannot be read"),
        ('llama', dict(mlp_bias=True), 'attention or MLP alone'),
        ('llama', dict(rope_parameters=dict(rope_type='yarn', factor=2)), 'RoPE of type .yarn.'),
        ('llama', dict(num_attention_heads=3, head_dim=None), 'n_kv_head'),
        ('llama', dict(vocab_size=60), 'shape'),
        ('llama', dict(num_hidden_layers=2), 'surplus.*layers.2'),
        ('opt', dict(_remove_final_layer_norm=True), '_remove_final_layer_norm=True cannot be'),
    ],
)
def test_what_our_block_does_not_compute_is_refused(tmp_path, name, changes, words):
    theirs(name).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_a_pickle_is_read_without_running_what_is_in_it(tmp_path):
    model = theirs('opt').float()
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
        (dict(step=3), 'other things than tensors'),
    ):
        torch.save(content, tmp_path / 'pytorch_model.bin')
        with pytest.raises(UserError, match=words):
            load(tmp_path)
    assert not (tmp_path / 'harm').exists()
