"""
The model: GPT-2, Llama and their close kin in one file, told apart by the switches of GPTConfig.

Shapes: B sequences, T positions, C = n_embd, H query heads, K key/value heads, D = head_dim,
F = n_mlp, V vocabulary. On disk a model is a Hugging Face folder (config.json, model.safetensors)
of the architecture its configuration equals, so transformers opens what we save.
"""

import math
import re
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from engine.decoding import Decoding
from engine.errors import UserError, unknown
from engine.files import read_json, write_json
from engine.hub import model_folder
from engine.hugging_face import (
    config_from_hugging_face,
    config_to_hugging_face,
    tensors_from_hugging_face,
    tensors_to_hugging_face,
)
from engine.loss import IGNORED, fused_linear_cross_entropy
from engine.tokenizer_files import write_tokenizer
from engine.weights import check_finite, check_numbers, read_tensors, write_tensors

SIZE_FIELDS = ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'n_mlp')  # what growth may change
MAX_LAYERS = 1000  # many more than any model has: a damaged file is noticed before it is built
CHOICES = {
    'norm': ('rms', 'layer'),
    'act': ('swiglu', 'gelu', 'gelu_exact', 'relu'),
    'pos': ('rope', 'learned'),
}


class Derived(int):
    """A number that follows from others; replace() computes it again, int(it) given to it stays."""


@dataclass
class GPTConfig:
    """The shape of a decoder. Raises UserError when the numbers do not fit together."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: n_embd / n_head
    n_mlp: int = 0  # 0: 4 n_embd
    vocab_size: int = 50257
    block_size: int = 1024  # longest context: learned positions, or the range of RoPE's tables
    norm: str = 'rms'  # rms or layer
    norm_eps: float = 1e-5
    act: str = 'swiglu'  # swiglu, gelu (tanh approximation), gelu_exact or relu
    pos: str = 'rope'  # rope or learned
    rope_theta: float = 1e4
    rope_scaling: tuple = ()  # Llama 3: factor, low and high frequency factor, original context
    rotary_fraction: float = 1.0  # share of each head that RoPE rotates (GPT-NeoX: 0.25)
    qk_norm: bool = False  # RMSNorm on each head's queries and keys (Qwen3)
    parallel: bool = False  # attention and MLP read the same input (GPT-NeoX)
    bias: bool = False  # biases in linear layers and LayerNorm
    qkv_bias: bool = False  # biases of queries, keys and values alone (Qwen2)
    tied: bool = False  # the head is the token embedding
    attn_scale_by_layer: bool = False  # attention logits / layer number, from 1 (Inheritune)
    init_std: float = 0.0  # 0: sqrt(2 / (5 n_embd)), as in the scaling laws of model reuse
    channels: int = 0  # inputs are vectors of so many numbers (a time series); 0: tokens

    def __post_init__(self):
        for field in fields(self):  # a configuration may come from a file
            value, kind = getattr(self, field.name), field.type
            if type(value) is Derived:
                setattr(self, field.name, 0)
            elif type(value) is not kind and not (kind is float and type(value) is int):
                raise UserError(f'{field.name} is {value!r}, not {kind.__name__}')
            if kind is float:
                if not 0 <= value <= 1e30:  # neither NaN nor what no tensor holds
                    raise UserError(f'{field.name} must be between 0 and 1e30, not {value!r}')
                setattr(self, field.name, float(value))
        numbers = [x for x in self.rope_scaling if isinstance(x, int | float) and 0 < x < math.inf]
        if len(numbers) != len(self.rope_scaling) or len(numbers) not in (0, 4):
            found = str(self.rope_scaling)[:80]
            raise UserError(f'rope_scaling is four positive numbers or none, not {found}')
        self.n_kv_head = self.n_kv_head or Derived(self.n_head)
        self.head_dim = self.head_dim or Derived(self.n_embd // max(1, self.n_head))
        self.n_mlp = self.n_mlp or Derived(4 * self.n_embd)
        for name in (*SIZE_FIELDS, 'head_dim', 'vocab_size', 'block_size', 'channels'):
            least, most = int(name != 'channels'), MAX_LAYERS if name == 'n_layer' else 2**31 - 1
            found = getattr(self, name)
            if not least <= found <= most:
                raise UserError(f'{name} must be between {least} and {most:,}, not {found}')
        if self.n_head % self.n_kv_head:
            raise UserError(f'n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}')
        if not 0 < self.rotary_fraction <= 1:
            raise UserError(f'rotary_fraction is a share of a head, not {self.rotary_fraction}')
        if not self.rope_theta:
            raise UserError('rope_theta must be above 0')
        if self.pos == 'rope' and self.rotary_dim % 2:
            raise UserError(f'RoPE rotates pairs of dimensions, but {self.rotary_dim} are odd')
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)

    def num_params(self, embedding=False, head=False):
        """N: parameters of layers and final norm; embeddings and head on request, tied once."""
        C, F, biases = self.n_embd, self.n_mlp, int(self.bias)
        queries, keys = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        attention = (queries + 2 * keys) * (C + int(self.bias or self.qkv_bias))
        attention += (queries + biases) * C + 2 * self.head_dim * self.qk_norm
        up = 2 if self.act == 'swiglu' else 1
        mlp = up * F * (C + biases) + (F + biases) * C
        norm = C * (1 + (biases if self.norm == 'layer' else 0))
        total = self.n_layer * (attention + mlp + 2 * norm) + norm
        tokens = C * (self.channels or self.vocab_size)
        if embedding:
            total += tokens + C * self.block_size * (self.pos == 'learned')
        if head and not self.tied:
            total += C * self.vocab_size
        elif head and not embedding:
            total += tokens
        return total

    @property
    def rotary_dim(self):
        """Dimensions of each head that RoPE rotates."""
        return int(self.head_dim * self.rotary_fraction)

    @classmethod
    def named(cls, name, **changes):
        """
        The configuration of a named size, with fields overridden by `changes`; or WIDTHxLAYERS,
        a small Llama with heads of 16 (64x4), or with gpt2- before it a small GPT-2 (gpt2-32x24);
        or NAMExLAYERS, a named size of another depth (gpt2-mediumx16). Raises UserError for an
        unknown name.
        """
        size, _, depth = name.rpartition('x')
        if match := re.fullmatch(r'(gpt2-)?(\d+)x(\d+)', name):
            width, layers = int(match[2]), int(match[3])
            if width % 16 or not width:
                raise UserError(f'{name}: the width must be a multiple of 16, the head dimension')
            shape = dict(n_embd=width, n_layer=layers, n_head=width // 16)
            if match[1]:
                shape |= FAMILIES['gpt2'] | dict(init_std=0.0)  # by the width: 0.02 at 1,000
            else:
                shape['n_mlp'] = 8 * round(width / 3)  # 8/3 of the width, in eights
        elif name in SIZES or size in SIZES and re.fullmatch('[1-9][0-9]*', depth):
            family, *numbers = SIZES.get(name) or SIZES[size]
            shape = FAMILIES[family] | dict(zip(('n_embd', 'n_mlp', 'n_layer', 'n_head'), numbers))
            if name not in SIZES:
                shape['n_layer'] = int(depth)
        else:
            ways = ('WIDTHxLAYERS', 'gpt2-WIDTHxLAYERS', 'NAMExLAYERS')
            raise unknown('size', name, [*SIZES, *ways])
        return cls(**{**shape, **changes})


def all_params(config):
    """Parameters of a model of this shape with embeddings and head, a tied one once."""
    return config.num_params(embedding=True, head=True)


# ----------------------------------------------------------------------------------------------
# the layers


def make_norm(config, dim):
    """RMSNorm or LayerNorm over the last dimension."""
    if config.norm == 'rms':
        return nn.RMSNorm(dim, eps=config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.bias)


def stretch(frequency, factor, low, high, original):
    """
    Llama 3's RoPE frequencies for a context stretched by `factor`: dimensions that rotate less
    than `low` times over the `original` context are slowed down by the factor, those above
    `high` are kept, with a smooth transition between.
    """
    turns = original * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rotate(x, cos, sin):
    """
    Rotate 2n dimensions by position, in pairs (i, i+n): x (B, H, T, D), cos and sin (T, n), or
    (B, 1, T, n) where sequences are at positions of their own.
    """
    n = cos.shape[-1]
    first, second, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.cat(rotated, -1).to(x.dtype)
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


class Attention(nn.Module):
    """Causal self-attention, grouped queries if n_kv_head < n_head: (B, T, C) -> (B, T, C)."""

    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        C, D = config.n_embd, config.head_dim
        bias = config.bias or config.qkv_bias
        self.q = nn.Linear(C, config.n_head * D, bias=bias)
        self.k = nn.Linear(C, config.n_kv_head * D, bias=bias)
        self.v = nn.Linear(C, config.n_kv_head * D, bias=bias)
        self.o = nn.Linear(config.n_head * D, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.scale = D**-0.5
        if config.attn_scale_by_layer:
            self.scale /= layer + 1

    def project(self, x, rope):
        """Of x (B, T, C): rotated queries (B, H, T, D) and keys (B, K, T, D), and the values."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q, k, v = (part(x).view(heads).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v

    def forward(self, x, rope, cache):
        B, T, _ = x.shape
        (q, k, v), mask = self.project(x, rope), None
        if cache is not None:
            (k, v), mask = cache.extend(self.layer, k, v), cache.mask
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and T > 1,
            scale=self.scale,
            enable_gqa=self.config.n_kv_head < self.config.n_head,
        )
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C): down(silu(gate x) * up x), or down(act(up x))."""

    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_mlp, bias=config.bias)
        if config.act == 'swiglu':
            self.gate = nn.Linear(config.n_embd, config.n_mlp, bias=config.bias)
        self.down = nn.Linear(config.n_mlp, config.n_embd, bias=config.bias)
        self.act = config.act

    def forward(self, x):
        if self.act == 'swiglu':
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.act == 'relu':
            return self.down(F.relu(self.up(x)))
        approximate = 'tanh' if self.act == 'gelu' else 'none'
        return self.down(F.gelu(self.up(x), approximate=approximate))


class Block(nn.Module):
    """One layer: (B, T, C) -> (B, T, C), each part normalised first and added to the stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = make_norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.norm2, self.mlp = make_norm(config, config.n_embd), MLP(config)
        self.parallel = config.parallel

    def forward(self, x, rope, cache):
        if self.parallel:
            return x + self.attn(self.norm1(x), rope, cache) + self.mlp(self.norm2(x))
        x = x + self.attn(self.norm1(x), rope, cache)
        return x + self.mlp(self.norm2(x))


# ----------------------------------------------------------------------------------------------
# the model


class Output(NamedTuple):
    """What a forward pass returns; fields that were not asked for are None."""

    logits: torch.Tensor | None  # (B, T, V), without targets
    loss: torch.Tensor | None  # a scalar, with targets
    hidden: torch.Tensor | None  # (B, T, C), with hidden_at
    data_loss: torch.Tensor | None = None  # the cross entropy within the loss, detached
    divergence: torch.Tensor | None = None  # the divergence from a teacher, detached
    count: torch.Tensor | None = None  # targets that are not -100: the terms of the mean


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """
    The distribution to sample from, float32 (..., V). temperature 0: all on the largest logit;
    top_k: only the k most likely tokens, 0 for all; top_p: the fewest that hold this much.
    """
    logits = logits.float()
    if temperature < 1e-6:  # nothing else is likely
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p  # those before it are enough
        p = p.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0)
    return p / p.sum(-1, keepdim=True)


class GPT(nn.Module):
    """A decoder-only language model, initialised from torch's random state."""

    def __init__(self, config):
        super().__init__()
        self.config, device = config, torch.get_default_device()
        V, C = config.vocab_size, config.n_embd
        with torch.device('meta'):  # nn.Linear's own initialisation would be overwritten
            embed = partial(nn.Embedding.from_pretrained, freeze=False)  # and nn.Embedding's, too
            self.wte = embed(torch.empty(V, C))
            if config.channels:
                self.wte = nn.Linear(config.channels, C, bias=False)
            learned = config.pos == 'learned'
            self.wpe = embed(torch.empty(config.block_size, C)) if learned else None
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
            self.norm = make_norm(config, C)
            self.lm_head = None if config.tied else nn.Linear(C, V, bias=False)
        if device.type != 'meta':
            self.to_empty(device=device)
            self.init_weights()

    @classmethod
    def on_meta(cls, config):
        """A model without memory, for its names and shapes; without RoPE's tables, too."""
        with torch.device('meta'):
            return cls(config)

    @classmethod
    def from_state(cls, config, state, device='cpu'):
        """A model that takes over the tensors {name: tensor}."""
        model = cls.on_meta(config)
        model.load_state_dict(state, assign=True)
        model.build_rope(device)
        return model

    @torch.no_grad()
    def init_weights(self):
        """
        Matrices and embeddings ~ N(0, std), std = init_std or sqrt(2 / (5 C)); the two that write
        to the residual stream smaller by sqrt(2 n_layer), as in GPT-2; gains 1, biases 0.
        """
        std = self.config.init_std or math.sqrt(2 / (5 * self.config.n_embd))
        for name, p in self.named_parameters():
            if name.endswith(('attn.o.weight', 'mlp.down.weight')):
                nn.init.normal_(p, 0.0, std / math.sqrt(2 * self.config.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, 0.0, std)
            elif name.endswith('.bias'):
                nn.init.zeros_(p)
            else:
                assert 'norm' in name, f'no initialisation for {name}'
                nn.init.ones_(p)
        self.build_rope(self.wte.weight.device)

    def build_rope(self, device):
        """Tables cos, sin (block_size, rotary_dim / 2), float32, not saved."""
        if self.config.pos == 'rope':
            rotary_dim = self.config.rotary_dim
            pair = torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim
            position = torch.arange(self.config.block_size, device=device).float()
            frequency = 1 / self.config.rope_theta**pair
            if self.config.rope_scaling:
                frequency = stretch(frequency, *self.config.rope_scaling)
            angle = torch.outer(position, frequency)
            self.register_buffer('cos', angle.cos(), persistent=False)
            self.register_buffer('sin', angle.sin(), persistent=False)

    def forward(self, idx, targets=None, hidden_at=None, cache=None, teacher=None):
        """
        idx (B, T) int64, or with `channels` float (B, T, channels) -> Output. targets (B, T),
        -100 for positions excluded from the loss: the mean cross entropy in nats, and no logits.
        hidden_at=k: also the residual stream after layer k, from 1. cache: the T positions follow
        those it holds, and are added to it. teacher: an engine.loss.Distillation.
        """
        x, hidden = self.residual_stream(idx, hidden_at=hidden_at, cache=cache)
        x = self.norm(x)
        if targets is None:
            return Output(F.linear(x, self.head_weight), None, hidden)
        losses = fused_linear_cross_entropy(x, self.head_weight, targets, teacher)
        loss, data_loss, divergence = losses
        return Output(None, loss, hidden, data_loss, divergence, (targets != IGNORED).sum())

    def residual_stream(self, idx, layers=None, hidden_at=None, cache=None):
        """(the stream (B, T, C) after the first `layers` layers or all; after `hidden_at`)."""
        T = idx.shape[1]
        end = T if cache is None else cache.length + T
        if end > self.config.block_size:
            raise ValueError(f'{end} positions, but block_size is {self.config.block_size}')
        at = slice(0, T) if cache is None else cache.begin(T)
        x, rope, hidden = self.wte(idx), None, None
        if self.wpe is None:
            rope = self.cos[at], self.sin[at]
        else:
            x = x + self.wpe.weight[at]
        for i, block in enumerate(self.blocks[:layers], 1):
            x = block(x, rope, cache)
            if i == hidden_at:
                hidden = x
        if cache is not None:
            cache.length = end
        return x, hidden

    @property
    def head_weight(self):
        """The (V, C) matrix that turns the last hidden state into logits."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def num_params(self, embedding=False, head=False):
        """GPTConfig.num_params of the model's shape."""
        return self.config.num_params(embedding, head)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=None):
        """
        Continue idx (B, T) by up to `max_new_tokens` tokens, sampled as in `probabilities` from
        torch's random state; returns (B, T + new). Ends early when every sequence has produced
        the token `stop`. When the context is full, generation continues from its later half.
        """
        room = min(self.config.block_size, idx.shape[1] + max_new_tokens)
        decoding, seen = Decoding(self, len(idx), room), 0
        done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if decoding.cache.length + idx.shape[1] - seen > self.config.block_size:
                decoding.cache.length = 0
                seen = max(0, idx.shape[1] - max(1, self.config.block_size // 2))
            logits = decoding.read(idx[:, seen:])[:, -1]
            seen = idx.shape[1]
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1)
            idx = torch.cat((idx, token), 1)
            if stop is not None:
                done |= token[:, 0] == stop
                if done.all():
                    break
        return idx

    def save(self, folder, tokenizer='', state=None, dtype=None):
        """
        Write config.json, the weights and the tokenizer as the Hugging Face architecture that the
        configuration equals. tokenizer: `bytes`, a tiktoken encoding, or the folder of another;
        state: the whole tensors, if this model holds shards of them; dtype: of the weights in the
        file, None for the model's.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state is None else state
        dtype = dtype or self.wte.weight.dtype
        state = {name: tensor.detach().to(dtype) for name, tensor in state.items()}
        for name, tensor in state.items():
            check_finite(name, tensor)  # float16 has a small range
        write_tensors(folder, tensors_to_hugging_face(self.config, state))
        write_config(folder, self.config, dtype, tokenizer)


def write_config(folder, config, dtype, tokenizer=''):
    """Write a model's config.json, and the tokenizer that it is to be used with."""
    content = config_to_hugging_face(config, str(dtype).removeprefix('torch.'))
    if tokenizer:
        content |= write_tokenizer(tokenizer, folder)
    write_json(Path(folder) / 'config.json', content)


# ----------------------------------------------------------------------------------------------
# loading


def read_config(folder):
    """The GPTConfig of the model in a folder. Raises UserError for a missing or damaged one."""
    try:
        return GPTConfig(**config_from_hugging_face(read_json(Path(folder) / 'config.json')))
    except FileNotFoundError:
        raise UserError(f'{folder} is not a model folder (it has no config.json)') from None
    except UserError as error:
        raise UserError(f'{folder}: {error}') from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f'{type(error).__name__} {error} in its config.json'
        raise UserError(f'{folder} is damaged: {reason}') from None


def load(name, device='cpu'):
    """
    The model in a Hugging Face folder, or of that name on the hub, in the dtype of its embeddings.
    Raises UserError for a missing or damaged model.
    """
    folder = model_folder(name)
    config = read_config(folder)
    tensors = read_tensors(folder, device)
    template = GPT.on_meta(config).state_dict()
    try:
        for stored, tensor in tensors.items():
            check_numbers(stored, tensor.dtype)
        state = tensors_from_hugging_face(config, tensors, template)
        for own, tensor in state.items():
            check_finite(own, tensor)
    except UserError as error:
        raise UserError(f'{folder}: {error}') from None
    dtype = state['wte.weight'].dtype
    return GPT.from_state(config, {name: t.to(dtype) for name, t in state.items()}, device)


# ----------------------------------------------------------------------------------------------
# named sizes

QWEN = dict(tied=True, norm_eps=1e-6, rope_theta=1e6, vocab_size=151936)
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
    'qwen2': QWEN | dict(n_kv_head=2, head_dim=64, qkv_bias=True, block_size=131072),
    'qwen3': QWEN | dict(n_kv_head=8, head_dim=128, qk_norm=True, block_size=4096),
    'reuse': dict(vocab_size=32000),
    'let': dict(vocab_size=32000, block_size=1280),
    'llama': {},
    'smollm2': dict(
        n_kv_head=3, head_dim=64, tied=True, rope_theta=1e5, vocab_size=49152, block_size=8192
    ),
    'openllama': dict(vocab_size=32000, block_size=2048, norm_eps=1e-6),
    'smollm2-1.7b': dict(
        n_kv_head=32, head_dim=64, tied=True, rope_theta=1.3e5, vocab_size=49152, block_size=8192
    ),
    'llama3.2': dict(n_kv_head=8, tied=True, vocab_size=128256, block_size=8192, rope_theta=5e5),
    'llama3': dict(n_kv_head=8, vocab_size=128256, block_size=8192, rope_theta=5e5),
}
SIZES = {  # name: (family, n_embd, n_mlp, n_layer, n_head); an MLP of 0 is 4 n_embd
    # Progressive training, Table 6
    '1b': ('llama', 2048, 7168, 18, 16),
    '2b': ('llama', 2560, 8960, 22, 20),
    '4b': ('llama', 3200, 11200, 27, 25),
    '8b': ('llama', 4096, 14336, 33, 32),
    # Scaling laws of model reuse, Table 2
    '15m': ('reuse', 320, 0, 9, 4),
    '44m': ('reuse', 480, 0, 12, 8),
    '0.1b': ('reuse', 640, 0, 15, 8),
    '0.2b': ('reuse', 832, 0, 21, 8),
    '0.5b': ('reuse', 1120, 0, 26, 16),
    '1b-reuse': ('reuse', 1504, 0, 30, 16),
    # Late-to-Early Training, Table 3: target models
    '1.4b': ('let', 2048, 5461, 24, 32),
    '7b': ('let', 4096, 11008, 32, 32),
    # Inheritune: the reference of its low-data recipe
    'openllama-3b': ('openllama', 3200, 8640, 26, 32),
    # the teachers of Late-to-Early Training
    'smollm2-1.7b': ('smollm2-1.7b', 2048, 8192, 24, 32),
    'llama-3.2-1b': ('llama3.2', 2048, 8192, 16, 32),
    'smollm2-135m': ('smollm2', 576, 1536, 30, 9),
    # GPT-2; Inheritune trains them without biases and with attn_scale_by_layer
    'gpt2': ('gpt2', 768, 0, 12, 12),
    'gpt2-medium': ('gpt2', 1024, 0, 24, 16),
    'gpt2-large': ('gpt2', 1280, 0, 36, 20),
    'gpt2-large-32': ('gpt2', 1280, 0, 32, 20),
    'gpt2-xl': ('gpt2', 1600, 0, 48, 25),
    # Chain-of-Learngene, Table 7: descendants, and the chains they lie in
    '51.47m': ('gpt2', 512, 0, 8, 8),
    '138m': ('gpt2', 768, 0, 14, 12),
    '220m': ('gpt2', 896, 0, 18, 14),
    '277m': ('gpt2', 896, 0, 24, 14),
    '380m': ('gpt2', 1024, 0, 26, 16),
    '537m': ('gpt2', 1152, 0, 30, 18),
    'pythia-70m': ('pythia', 512, 0, 6, 8),
    '113.63m': ('pythia', 640, 0, 10, 10),
    'pythia-160m': ('pythia', 768, 0, 12, 12),
    'pythia-410m': ('pythia', 1024, 0, 24, 16),
    'pythia-1b': ('pythia', 2048, 0, 16, 8),
    'pythia-1.4b': ('pythia', 2048, 0, 24, 16),
    # the ancestors of the bridges of Chain-of-Learngene, beside Qwen3-4B
    'meta-llama-3-8b': ('llama3', 4096, 14336, 32, 32),
    # what Late-to-Early Training fine-tunes on time series, and Qwen3
    'qwen2-0.5b': ('qwen2', 896, 4864, 24, 14),
    'qwen3-0.6b': ('qwen3', 1024, 3072, 28, 16),
    '1.09b': ('qwen3', 1536, 4608, 28, 16),
    'qwen3-1.7b': ('qwen3', 2048, 6144, 28, 16),
    'qwen3-4b': ('qwen3', 2560, 9728, 36, 32),
}
