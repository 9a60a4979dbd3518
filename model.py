"""
The model: one decoder-only transformer that GPTConfig turns into GPT-2, Llama, Qwen, GPT-NeoX or
OPT.

Shapes: B sequences, T positions, C = n_embd, H query heads, K key/value heads, D = head_dim,
V = vocab_size. On disk a model is a Hugging Face folder (config.json, model.safetensors). If an
architecture of transformers computes the same function, the folder has that architecture's format
and transformers can load it.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.decoding import Decoding
from engine.errors import UserError, first_line, unknown
from engine.files import write_json
from engine.hub import model_folder
from engine.hugging_face import (
    config_to_hugging_face,
    read_fields,
    read_tensors,
    tensors_from_hugging_face,
    tensors_to_hugging_face,
    write_tensors,
)
from engine.loss import IGNORED, fused_linear_cross_entropy
from engine.tokenizer_files import write_tokenizer

SIZE_FIELDS = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_mlp')  # fields that growth may change
ACTIVATIONS = {'gelu': partial(F.gelu, approximate='tanh'), 'gelu_exact': F.gelu, 'relu': F.relu}


class Derived(int):
    """
    A default computed from other fields. dataclasses.replace() recomputes it from the new values
    of those fields, unless it is given as a plain int: replace(c, head_dim=int(c.head_dim), ...).
    """


@dataclass
class GPTConfig:
    """
    The architecture of a decoder. Raises UserError if a field has the wrong type, is out of range
    or contradicts another field.
    """

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: n_embd / n_head
    n_mlp: int = 0  # 0: 4 n_embd
    vocab_size: int = 50257
    block_size: int = 1024  # longest context, in tokens; with pos='learned', the rows of wpe
    norm: Literal['rms', 'layer'] = 'rms'
    norm_eps: float = 1e-5
    act: Literal['swiglu', 'gelu', 'gelu_exact', 'relu'] = 'swiglu'  # gelu: tanh approximation
    pos: Literal['rope', 'learned'] = 'rope'
    rope_theta: float = 1e4
    rope_scaling: tuple = ()  # Llama 3: factor, low_freq_factor, high_freq_factor, original context
    rotary_fraction: float = 1.0  # fraction of head_dim that RoPE rotates (GPT-NeoX: 0.25)
    qk_norm: bool = False  # RMSNorm on each head's queries and keys (Qwen3)
    parallel: bool = False  # attention and MLP read the same input (GPT-NeoX)
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool = False  # biases only in the query, key and value projections (Qwen2)
    tied: bool = False  # the output head shares the token embedding's matrix
    attn_scale_by_layer: bool = False  # divide attention logits by the layer number (Inheritune)
    init_std: float = 0.0  # 0: sqrt(2 / (5 n_embd)), as in the paper behind scaling.py
    channels: int = 0  # inputs are vectors of this size (time series); 0: inputs are token ids

    def __post_init__(self):
        for field in fields(self):  # validate: the values may come from a file
            value, kind = getattr(self, field.name), field.type
            if type(value) is Derived:
                setattr(self, field.name, 0)  # recomputed below
            elif choices := get_args(kind):
                if value not in choices:
                    raise unknown(field.name, value, choices)
            elif not isinstance(value, int | float if kind is float else kind):
                raise UserError(f'{field.name} is {value!r}, not {kind.__name__}')
            elif kind in (int, float) and not 0 <= value <= 1e30:  # this also rejects NaN
                raise UserError(f'{field.name} must be between 0 and 1e30, not {value!r}')
        if self.rope_scaling and not (
            len(self.rope_scaling) == 4 and all(0 < x < math.inf for x in self.rope_scaling)
        ):
            raise UserError(f'rope_scaling is not four positive numbers: {self.rope_scaling}')
        self.n_kv_head = self.n_kv_head or Derived(self.n_head)
        self.head_dim = self.head_dim or Derived(self.n_embd // max(1, self.n_head))
        self.n_mlp = self.n_mlp or Derived(4 * self.n_embd)
        for name in (*SIZE_FIELDS, 'head_dim', 'vocab_size', 'block_size'):
            # limits far above any real model: a damaged file fails here, not when it is built
            found, most = getattr(self, name), 1000 if name == 'n_layer' else 2**31 - 1
            if not 1 <= found <= most:
                raise UserError(f'{name} must be between 1 and {most:,}, not {found}')
        if self.n_head % self.n_kv_head:
            raise UserError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}')
        if not 0 < self.rotary_fraction <= 1 or not self.rope_theta:
            raise UserError('rotary_fraction must be above 0 and at most 1, rope_theta above 0')
        if self.pos == 'rope' and (rotated := int(self.head_dim * self.rotary_fraction)) % 2:
            raise UserError(f'RoPE rotates pairs of dimensions, but {rotated} are odd')

    def num_params(self, embedding=False, head=False):
        """
        N, the number of parameters in the layers and the final norm; `embedding` and `head` add
        theirs. A tied matrix counts once.
        """
        sizes = Counter()  # of a model with one layer: all layers are the same size
        for name, p in GPT.on_meta(replace(self, n_layer=1)).named_parameters():
            sizes[name.partition('.')[0]] += p.numel()
        total = self.n_layer * sizes['blocks'] + sizes['norm']
        if embedding:
            total += sizes['wte'] + sizes['wpe']
        if head and not (embedding and self.tied):
            total += sizes['lm_head'] or sizes['wte']
        return total

    @classmethod
    def named(cls, name, **changes):
        """
        The configuration for a name, with fields overridden by `changes`:

            gpt2-medium       a key of SIZES
            gpt2-mediumx16    the same with another number of layers (NAMExLAYERS)
            64x4              a small Llama (WIDTHxLAYERS); its heads have 16 dimensions
            gpt2-32x24        a small GPT-2 (gpt2-WIDTHxLAYERS); likewise

        Raises UserError for an unknown name or a width that is not a multiple of 16.
        """
        size, layers = re.fullmatch(r'(.*?)(?:x(\d+))?', name).groups()
        if size in SIZES:
            family, *numbers = SIZES[size].split()
            shape = FAMILIES[family] | dict(
                zip(('n_layer', 'n_head', 'n_embd', 'n_mlp'), map(int, numbers))
            )
        elif layers and (match := re.fullmatch(r'(gpt2-)?(\d+)', size)):
            width = int(match[2])
            if width % 16:
                raise UserError(f'{name}: the width must be a multiple of 16, the head dimension')
            shape = dict(n_embd=width, n_head=width // 16)
            if match[1]:
                # init_std=0 scales with the width; GPT-2's fixed 0.02 is its value at width 1,000
                shape |= FAMILIES['gpt2'] | dict(init_std=0.0)
            else:
                shape['n_mlp'] = 8 * round(width / 3)  # about 8/3 of the width, a multiple of 8
        else:
            raise unknown(
                'size', name, [*SIZES, 'WIDTHxLAYERS', 'gpt2-WIDTHxLAYERS', 'NAMExLAYERS']
            )
        if layers:
            shape['n_layer'] = int(layers)
        return cls(**shape | changes)


def all_params(config):
    """The number of all parameters, embeddings and head included; a tied matrix counts once."""
    return config.num_params(embedding=True, head=True)


# ----------------------------------------------------------------------------------------------
# the layers


def make_norm(config):
    """RMSNorm or LayerNorm over the residual stream."""
    if config.norm == 'rms':
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rotations(config, position):
    """
    RoPE's cos and sin at positions (T,): two float32 tensors (T, n), where 2n = rotary_fraction D.

    Llama 3's rope_scaling depends on how many full turns a pair of dimensions makes over the
    `original` context: below `low` turns its frequency is divided by `factor`, above `high` it is
    kept, and in between the two are interpolated linearly.
    """
    dim = int(config.head_dim * config.rotary_fraction)
    pair = torch.arange(0, dim, 2, device=position.device).float() / dim
    frequency = 1 / float(config.rope_theta) ** pair
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        turns = original * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = kept * frequency + (1 - kept) * frequency / factor
    angle = position.float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """
    Apply RoPE to the first 2n dimensions of x (B, H, T, D); cos, sin: (T, n) from `rotations`.
    Dimension i is paired with i + n, as in transformers, not with its neighbour.
    """
    n = cos.shape[-1]
    first, second, rest = x.split((n, n, x.shape[-1] - 2 * n), -1)
    rotated = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(rotated, -1).to(x.dtype)


class Attention(nn.Module):
    """
    Causal self-attention, (B, T, C) -> (B, T, C); grouped-query attention if n_kv_head < n_head.
    layer: the index of its block, from 0.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        bias = config.bias or config.qkv_bias
        self.q, self.k, self.v = (nn.Linear(C, heads * D, bias=bias) for heads in (H, K, K))
        self.o = nn.Linear(H * D, C, bias=config.bias)
        norm = partial(nn.RMSNorm, D, eps=config.norm_eps) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()
        self.scale = D**-0.5 / (layer + 1 if config.attn_scale_by_layer else 1)

    def project(self, x, rope):
        """
        Project x (B, T, C) to queries (B, H, T, D), keys and values (B, K, T, D). Queries and keys
        are normalised if qk_norm is set, then rotated by rope (cos, sin) unless it is None.
        """
        D = self.config.head_dim
        q, k, v = (p(x).unflatten(-1, (-1, D)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v

    def forward(self, x, rope, cache):
        """rope: (cos, sin) from `rotations` or None; cache: an engine.decoding.Decoding or None."""
        (q, k, v), mask = self.project(x, rope), None
        if cache is not None:
            (k, v), mask = cache.extend(self.layer, k, v), cache.mask
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            # a single query sees every key; is_causal would leave it only the first of a cache
            is_causal=mask is None and q.shape[2] > 1,
            scale=self.scale,
            enable_gqa=self.config.n_kv_head < self.config.n_head,
        )
        return self.o(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Feed-forward layer, (B, T, C) -> (B, T, C): down(silu(gate x) * up x) or down(act(up x))."""

    def __init__(self, config):
        super().__init__()
        linear = partial(nn.Linear, bias=config.bias)
        self.up = linear(config.n_embd, config.n_mlp)
        self.act = ACTIVATIONS.get(config.act)  # None: swiglu, which has a gate
        if self.act is None:
            self.gate = linear(config.n_embd, config.n_mlp)
        self.down = linear(config.n_mlp, config.n_embd)

    def forward(self, x):
        if self.act is None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """One pre-norm transformer layer, (B, T, C) -> (B, T, C): attention, MLP, two residuals."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.norm2, self.mlp = make_norm(config), MLP(config)
        self.parallel = config.parallel

    def forward(self, x, rope, cache):
        """rope, cache: as in Attention.forward."""
        attended = x + self.attn(self.norm1(x), rope, cache)
        return attended + self.mlp(self.norm2(x if self.parallel else attended))


# ----------------------------------------------------------------------------------------------
# the model


class Output(NamedTuple):
    """What GPT.forward returns; fields that do not apply to the call are None."""

    logits: Tensor  # (B, T, V); only if no targets were given
    loss: Tensor  # scalar; only if targets were given, like the last three
    hidden: Tensor  # (B, T, C), the residual stream after layer hidden_at
    data_loss: Tensor = None  # the cross-entropy term of the loss, detached
    divergence: Tensor = None  # T^2 KL between teacher and model, detached; 0 without a teacher
    count: Tensor = None  # number of targets that are not -100, over which the loss is averaged


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """
    The distribution to sample from, float32 (..., V), given logits (..., V). temperature 0: all
    mass on the largest logit. top_k: keep the k most likely tokens; 0: all. top_p (nucleus
    sampling): of these, keep the fewest whose total reaches this fraction of their mass.
    """
    if temperature < 1e-6:  # greedy; also avoids dividing by 0
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    p = (logits.float() / temperature).softmax(-1)
    if top_k or top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        ordered[..., top_k or p.shape[-1] :] = 0
        before = ordered.cumsum(-1) - ordered  # mass of the more likely tokens, itself excluded
        ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    return p / p.sum(-1, keepdim=True)


class GPT(nn.Module):
    """A decoder-only language model; its initial weights use torch's global random generator."""

    def __init__(self, config):
        super().__init__()
        self.config, device = config, torch.get_default_device()
        self.num_params = config.num_params
        V, C = config.vocab_size, config.n_embd
        # skip the initialisation of nn.Linear and nn.Embedding: init_weights would overwrite it
        with torch.device('meta'):
            embed = partial(nn.Embedding.from_pretrained, freeze=False)
            self.wte = embed(torch.empty(V, C))
            if config.channels:
                self.wte = nn.Linear(config.channels, C, bias=False)
            self.wpe = embed(torch.empty(config.block_size, C)) if config.pos == 'learned' else None
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
            self.norm = make_norm(config)
            self.lm_head = None if config.tied else nn.Linear(C, V, bias=False)
        if device.type != 'meta':
            self.to_empty(device=device)
            self.init_weights()

    @classmethod
    def on_meta(cls, config):
        """A model on the meta device: parameter names and shapes without storage."""
        with torch.device('meta'):
            return cls(config)

    @classmethod
    def from_state(cls, config, state):
        """A model whose parameters are the tensors of `state`, {name: tensor}, not copies."""
        model = cls.on_meta(config)
        model.load_state_dict(state, assign=True)
        return model

    @torch.no_grad()
    def init_weights(self):
        """
        Draw matrices and embeddings from a normal distribution with mean 0 and standard deviation
        init_std or sqrt(2 / (5 C)), divided by sqrt(2 n_layer) for the two matrices of a layer that
        write to the residual stream, as in GPT-2. Gains are 1, biases 0.
        """
        std = self.config.init_std or math.sqrt(2 / (5 * self.config.n_embd))
        for name, p in self.named_parameters():
            if p.ndim == 2:
                writes = name.endswith(('attn.o.weight', 'mlp.down.weight'))
                nn.init.normal_(p, 0.0, std / math.sqrt(2 * self.config.n_layer) if writes else std)
            else:
                nn.init.constant_(p, name.endswith('weight'))  # gains 1, biases 0

    def forward(self, idx, targets=None, hidden_at=None, cache=None, teacher=None):
        """
        Run the model on token ids idx (B, T) int64, or floats (B, T, channels); returns an Output.

        targets: (B, T) int64, -100 for positions excluded from the loss; then Output has the mean
        loss in nats and no logits. teacher: an engine.loss.Distillation, mixed into that loss.
        hidden_at: also return the residual stream after this layer, from 1. cache: an
        engine.decoding.Decoding; idx continues the positions it holds, and its keys and values are
        stored there. Raises ValueError for more than block_size positions.
        """
        x, hidden = self.residual_stream(idx, hidden_at=hidden_at, cache=cache)
        x = self.norm(x)
        if targets is None:
            return Output(F.linear(x, self.head_weight), None, hidden)
        loss, *parts = fused_linear_cross_entropy(x, self.head_weight, targets, teacher)
        return Output(None, loss, hidden, *parts, (targets != IGNORED).sum())

    def residual_stream(self, idx, layers=None, hidden_at=None, cache=None):
        """
        Two tensors (B, T, C): the residual stream after the first `layers` layers (None: all),
        before the final norm, and the one after layer `hidden_at`, from 1, or None.
        """
        T, read = idx.shape[1], 0 if cache is None else cache.length
        if read + T > self.config.block_size:
            raise ValueError(f'{read + T} positions, but block_size is {self.config.block_size}')
        at = torch.arange(T, device=idx.device) if cache is None else cache.begin(T)
        x, rope, hidden = self.wte(idx), None, None
        if self.wpe is None:
            rope = rotations(self.config, at)
        else:
            x = x + self.wpe(at)
        for i, block in enumerate(self.blocks[:layers], 1):
            x = block(x, rope, cache)
            if i == hidden_at:
                hidden = x
        return x, hidden

    @property
    def head_weight(self):
        """The (V, C) matrix that turns the last hidden state into logits."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=()):
        """
        Append up to `max_new_tokens` tokens to idx (B, T) int64; returns (B, T + new). Tokens are
        sampled from `probabilities` with torch's global generator. Generation ends early once every
        sequence has produced a token in `stop`; a sequence that has one goes on until then. When
        the context is full, generation continues from the last block_size / 2 tokens.
        """
        room = min(self.config.block_size, idx.shape[1] + max_new_tokens)
        decoding, stops = Decoding(self, len(idx), room), torch.tensor(stop, device=idx.device)
        done = torch.zeros_like(idx[:, 0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            p = probabilities(decoding.following(idx), temperature, top_k, top_p)
            idx = torch.cat((idx, torch.multinomial(p, 1)), 1)
            done |= torch.isin(idx[:, -1], stops)
            if done.all():
                break
        return idx

    def save(self, folder, tokenizer='', state=None, dtype=None):
        """
        Save the model as a Hugging Face folder: config.json, the weights and the tokenizer.

        tokenizer: 'bytes', the name of a tiktoken encoding, or a folder that has one; '': none.
        state: the full {name: tensor}, required if the model is sharded. dtype: of the saved
        weights; None: the model's. Raises UserError for weights that are not finite.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        dtype = dtype or self.wte.weight.dtype
        state = {name: tensor.to(dtype) for name, tensor in (state or self.state_dict()).items()}
        write_tensors(folder, tensors_to_hugging_face(self.config, state))
        content = config_to_hugging_face(self.config, dtype)
        if tokenizer:
            content |= write_tokenizer(tokenizer, folder)
        write_json(folder / 'config.json', content)


# ----------------------------------------------------------------------------------------------
# loading


def read_config(folder):
    """The GPTConfig of the model in a folder. Raises UserError for a missing or damaged one."""
    try:
        return GPTConfig(**read_fields(folder))
    except FileNotFoundError:
        raise UserError(
            f'{folder} holds no model (no config.json); of a run, give one stage'
        ) from None
    except UserError as error:
        raise UserError(f'{folder}: {error}') from None
    except Exception as error:  # damage takes many forms
        raise UserError(f'{folder} is damaged: {first_line(error)} in its config.json') from None


def load(name, device='cpu'):
    """
    Load a GPT from a Hugging Face folder or, by name, from the hub. All weights get the dtype of
    the token embedding. Raises UserError for a missing or damaged model.
    """
    folder = model_folder(name)
    config, tensors = read_config(folder), read_tensors(folder, device)
    try:
        state = tensors_from_hugging_face(config, tensors, GPT.on_meta(config).state_dict())
    except UserError as error:
        raise UserError(f'{folder}: {error}') from None
    dtype = state['wte.weight'].dtype
    return GPT.from_state(config, {own: tensor.to(dtype) for own, tensor in state.items()})


# ----------------------------------------------------------------------------------------------
# named sizes

QWEN = dict(tied=True, norm_eps=1e-6, rope_theta=1e6, vocab_size=151936)
LLAMA3 = dict(n_kv_head=8, vocab_size=128256, block_size=8192, rope_theta=5e5)
SMOLLM2 = dict(tied=True, vocab_size=49152, block_size=8192)
FAMILIES = {  # fields of GPTConfig that the sizes of a family share
    'gpt2': dict(norm='layer', act='gelu', pos='learned', bias=True, tied=True, init_std=0.02),
    'pythia': dict(
        norm='layer',
        act='gelu_exact',
        rotary_fraction=0.25,
        parallel=True,
        bias=True,
        vocab_size=50304,
        block_size=2048,
    ),
    'qwen2': QWEN | dict(n_kv_head=2, qkv_bias=True, block_size=131072),
    'qwen3': QWEN | dict(n_kv_head=8, head_dim=128, qk_norm=True, block_size=4096),
    'reuse': dict(vocab_size=32000),
    'let': dict(vocab_size=32000, block_size=1280),
    'llama': {},
    'llama3': LLAMA3,
    'llama3.2': LLAMA3 | dict(tied=True),
    'openllama': dict(vocab_size=32000, block_size=2048, norm_eps=1e-6),
    'smollm2-135m': SMOLLM2 | dict(n_kv_head=3, rope_theta=1e5),
    'smollm2-1.7b': SMOLLM2 | dict(rope_theta=1.3e5),
}
SIZES = {  # name: family, n_layer, n_head, n_embd, and n_mlp where it is not 4 n_embd
    # Progressive training, Table 6
    '1b': 'llama 18 16 2048 7168',
    '2b': 'llama 22 20 2560 8960',
    '4b': 'llama 27 25 3200 11200',
    '8b': 'llama 33 32 4096 14336',
    # Scaling laws of model reuse, Table 2
    '15m': 'reuse 9 4 320',
    '44m': 'reuse 12 8 480',
    '0.1b': 'reuse 15 8 640',
    '0.2b': 'reuse 21 8 832',
    '0.5b': 'reuse 26 16 1120',
    '1b-reuse': 'reuse 30 16 1504',
    # Late-to-Early Training, Table 3: target models
    '1.4b': 'let 24 32 2048 5461',
    '7b': 'let 32 32 4096 11008',
    # Inheritune: the reference of its low-data recipe
    'openllama-3b': 'openllama 26 32 3200 8640',
    # the teachers of Late-to-Early Training
    'smollm2-1.7b': 'smollm2-1.7b 24 32 2048',
    'llama-3.2-1b': 'llama3.2 16 32 2048',
    'smollm2-135m': 'smollm2-135m 30 9 576 1536',
    # GPT-2; Inheritune trains them without biases and with attn_scale_by_layer
    'gpt2': 'gpt2 12 12 768',
    'gpt2-medium': 'gpt2 24 16 1024',
    'gpt2-large': 'gpt2 36 20 1280',
    'gpt2-xl': 'gpt2 48 25 1600',
    # Chain-of-Learngene, Table 7: descendants (DesNets) and the checkpoints of their chains
    '51.47m': 'gpt2 8 8 512',
    '138m': 'gpt2 14 12 768',
    '220m': 'gpt2 18 14 896',
    '277m': 'gpt2 24 14 896',
    '380m': 'gpt2 26 16 1024',
    '537m': 'gpt2 30 18 1152',
    'pythia-70m': 'pythia 6 8 512',
    '113.63m': 'pythia 10 10 640',
    'pythia-160m': 'pythia 12 12 768',
    'pythia-410m': 'pythia 24 16 1024',
    'pythia-1b': 'pythia 16 8 2048',
    'pythia-1.4b': 'pythia 24 16 2048',
    # Chain-of-Learngene: an ancestor (AnsNet) that needs a bridge; the other is Qwen3-4B, below
    'meta-llama-3-8b': 'llama3 32 32 4096 14336',
    # Qwen2, which Late-to-Early Training fine-tunes on time series, and Qwen3
    'qwen2-0.5b': 'qwen2 24 14 896 4864',
    'qwen3-0.6b': 'qwen3 28 16 1024 3072',
    '1.09b': 'qwen3 28 16 1536 4608',
    'qwen3-1.7b': 'qwen3 28 16 2048 6144',
    'qwen3-4b': 'qwen3 36 32 2560 9728',
}
