"""A GGUF file becomes a model folder with the same logits and its tokenizer."""

import numpy as np
import pytest
import torch
from conftest import succeeds
from test_model import small

from engine.hugging_face import tensors_to_hugging_face
from engine.tokenizer_files import byte_letters
from model import load

gguf = pytest.importorskip('gguf')
pytest.importorskip('accelerate')
transformers = pytest.importorskip('transformers')

GGUF_NAMES = {
    'model.layers': 'blk',
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm',
    'self_attn.o_proj': 'attn_output',
    'self_attn.': 'attn_',
    'mlp.': 'ffn_',
    '_proj': '',
}


def write_gguf(path, model):
    """A model as an unquantised GGUF file, with a tokenizer of bytes."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), 'llama')
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
        for theirs, short in GGUF_NAMES.items():
            name = name.replace(theirs, short)
        if '_q.' in name or '_k.' in name:  # llama.cpp rotates neighbours, not halves
            heads = config.n_head if '_q.' in name else config.n_kv_head
            tensor = tensor.view(heads, 2, -1, config.n_embd).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(name, tensor.detach().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model():
    return small(n_kv_head=2, vocab_size=258, rope_theta=500.0).float()


def test_a_gguf_file_becomes_a_model_folder(tmp_path, model):
    write_gguf(tmp_path / 'small.gguf', model)
    succeeds(f'-m extras.from_gguf {tmp_path}/small.gguf {tmp_path}/model')
    made, x = load(tmp_path / 'model'), torch.randint(256, (2, 20))
    assert torch.allclose(made(x).logits, model(x).logits, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
    chat = [dict(role='user', content='Hello')]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == 'Hello'
    assert tokenizer('<|endoftext|>ab').input_ids == [257, 256]
