"""
Text token by token. What was read is kept as keys and values, so that a token costs one position;
and on a GPU the pass for it is a CUDA graph, replayed: starting its hundreds of kernels one by one
takes many times as long as they run.
"""

import torch

MOST_RECORDED = 16  # tokens at once; a recording costs three passes, and prompts differ in length


class Cache:
    """Keys and values of up to `room` positions. Setting `length` back forgets the last ones."""

    def __init__(self, config, batch, room, device, dtype):
        shape = (config.n_layer, batch, config.n_kv_head, room, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0  # positions filled
        self.at = None  # in a recording the positions that are added, (T,)
        self.mask = None  # which positions the added ones (T) see, where not the usual ones

    def begin(self, count):
        """The positions of the next `count` tokens, (count,), which every layer then adds."""
        device, start = self.k.device, self.length
        self.mask = None
        if self.at is not None:
            self.mask = torch.arange(self.k.shape[3], device=device) <= self.at[:, None]
            return self.at
        if 1 < count and start:  # SDPA's is_causal aligns top left; these need bottom right
            shape = (count, start + count)
            self.mask = torch.ones(shape, dtype=torch.bool, device=device).tril(start)
        return torch.arange(start, start + count, device=device)

    def extend(self, layer, k, v):
        """Add (B, K, T, D) to a layer; returns views (B, K, S, D) of all that may be seen."""
        if self.at is not None:  # all the room, and a mask: shapes that stay
            self.k[layer].index_copy_(2, self.at, k)
            self.v[layer].index_copy_(2, self.at, v)
            return self.k[layer], self.v[layer]
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class Decoding:
    """
    A model reading on, up to `room` positions, with its cache. On a GPU, outside autocast, the pass
    over a few tokens is recorded once for each number of them.
    """

    def __init__(self, model, batch, room):
        self.model = model
        weight, dtype = model.wte.weight, model.wte.weight.dtype
        autocast = torch.is_autocast_enabled(weight.device.type)
        if autocast:
            dtype = torch.get_autocast_dtype(weight.device.type)
        self.cache = Cache(model.config, batch, room, weight.device, dtype)
        self.records = weight.is_cuda and not autocast
        self.seen = 0  # tokens, of those that following() is given
        self.recorded = {}  # tokens at once: a recording

    @torch.no_grad()
    def read(self, idx):
        """The logits (B, T, V) of the tokens idx (B, T), which follow what was read."""
        cache, count = self.cache, idx.shape[1]
        if not self.records or count > MOST_RECORDED:
            logits = self.model(idx, cache=cache).logits
            cache.length += count
            return logits
        if count not in self.recorded:
            self.recorded[count] = self.record(idx)
        graph, tokens, places, logits = self.recorded[count]
        tokens.copy_(idx)
        torch.arange(cache.length, cache.length + count, out=places)
        graph.replay()
        cache.length += count
        return logits.clone()

    def following(self, idx):
        """
        The logits (B, V) of what follows idx (B, T), of which all but the end was read before. Of
        more than the context holds, its later half is read anew.
        """
        longest = self.model.config.block_size
        if self.cache.length + idx.shape[1] - self.seen > longest:
            self.cache.length, self.seen = 0, max(0, idx.shape[1] - max(1, longest // 2))
        logits = self.read(idx[:, self.seen :])[:, -1]
        self.seen = idx.shape[1]
        return logits

    def record(self, idx):
        """Record the pass over so many tokens; the first of two loads what it needs."""
        cache, tokens = self.cache, idx.clone()
        start = cache.length
        cache.at = places = torch.arange(start, start + idx.shape[1], device=idx.device)
        aside = torch.cuda.Stream(idx.device)  # which need not be the current one
        aside.wait_stream(torch.cuda.current_stream(idx.device))
        with torch.cuda.stream(aside):
            self.model(tokens, cache=cache)
        torch.cuda.current_stream(idx.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        how = dict(stream=aside, capture_error_mode='thread_local')  # others may load data
        with torch.cuda.graph(graph, **how):
            logits = self.model(tokens, cache=cache).logits
        cache.at = None
        return graph, tokens, places, logits
