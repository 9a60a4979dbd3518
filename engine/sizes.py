"""The named sizes of the papers, GPT-2, Pythia and Qwen3, as fields of model.GPTConfig."""


def llama(n_embd, n_mlp, n_layer, n_head, **more):
    """The fields of a Llama."""
    return dict(n_embd=n_embd, n_mlp=n_mlp, n_layer=n_layer, n_head=n_head, **more)


def reuse(n_embd, n_layer, n_head):
    """A base model of the scaling laws of model reuse: a Llama with Llama's 32,000 tokens."""
    return llama(n_embd, 4 * n_embd, n_layer, n_head, vocab_size=32000)


def gpt2(n_embd, n_layer, n_head):
    """The fields of a GPT-2."""
    shape = dict(n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    return shape | dict(
        norm='layer', act='gelu', pos='learned', bias=True, tied=True, init_std=0.02
    )


def pythia(n_embd, n_layer, n_head):
    """The fields of a Pythia (GPT-NeoX)."""
    shape = dict(n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    switches = dict(norm='layer', act='gelu_exact', rotary_fraction=0.25, parallel=True, bias=True)
    return shape | switches | dict(vocab_size=50304, block_size=2048)


def qwen3(n_embd, n_mlp, n_layer, n_head):
    """The fields of a Qwen3."""
    shape = llama(n_embd, n_mlp, n_layer, n_head, n_kv_head=8, head_dim=128)
    switches = dict(qk_norm=True, tied=True, norm_eps=1e-6, rope_theta=1e6)
    return shape | switches | dict(vocab_size=151936, block_size=4096)


SIZES = {
    # Progressive training, Table 6
    '1b': llama(2048, 7168, 18, 16),
    '2b': llama(2560, 8960, 22, 20),
    '4b': llama(3200, 11200, 27, 25),
    '8b': llama(4096, 14336, 33, 32),
    # Scaling laws of model reuse, Table 2
    '15m': reuse(320, 9, 4),
    '44m': reuse(480, 12, 8),
    '0.1b': reuse(640, 15, 8),
    '0.2b': reuse(832, 21, 8),
    '0.5b': reuse(1120, 26, 16),
    '1b-reuse': reuse(1504, 30, 16),
    # Late-to-Early Training, Table 3: target models
    '1.4b': llama(2048, 5461, 24, 32, vocab_size=32000, block_size=1280),
    '7b': llama(4096, 11008, 32, 32, vocab_size=32000, block_size=1280),
    # Inheritune: the reference of its low-data recipe
    'openllama-3b': llama(3200, 8640, 26, 32, vocab_size=32000, block_size=2048, norm_eps=1e-6),
    # GPT-2; Inheritune trains them without biases and with attn_scale_by_layer
    'gpt2': gpt2(768, 12, 12),
    'gpt2-medium': gpt2(1024, 24, 16),
    'gpt2-large': gpt2(1280, 36, 20),
    'gpt2-large-32': gpt2(1280, 32, 20),
    'gpt2-xl': gpt2(1600, 48, 25),
    # Chain-of-Learngene, Table 7: descendants, and the chains they lie in
    '138m': gpt2(768, 14, 12),
    '220m': gpt2(896, 18, 14),
    '277m': gpt2(896, 24, 14),
    '380m': gpt2(1024, 26, 16),
    '537m': gpt2(1152, 30, 18),
    'pythia-70m': pythia(512, 6, 8),
    '113.63m': pythia(640, 10, 10),
    'pythia-160m': pythia(768, 12, 12),
    'pythia-410m': pythia(1024, 24, 16),
    'pythia-1b': pythia(2048, 16, 8),
    'pythia-1.4b': pythia(2048, 24, 16),
    'qwen3-0.6b': qwen3(1024, 3072, 28, 16),
    '1.09b': qwen3(1536, 4608, 28, 16),
    'qwen3-1.7b': qwen3(2048, 6144, 28, 16),
    'qwen3-4b': qwen3(2560, 9728, 36, 32),
}
