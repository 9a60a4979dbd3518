"""What a run would cost before it starts: memory per GPU, and the data of the dry run."""

from typing import Any, NamedTuple

from engine.optimizer import stable_steps
from engine.stage import Result, Stage


def estimate_memory(config, knobs, micro_batch_size, shards=1):
    """
    (bytes of the training state, bytes of the activations) on one GPU: float32 weights and
    gradients and AdamW's state, each cut into `shards`; what a compiled bfloat16 step keeps for
    its backward pass, and one chunk of logits. An estimate, for planning.
    """
    attention = 4 * (config.n_head + config.n_kv_head) * config.head_dim
    per_layer = 10 * config.n_embd + attention + 6 * config.n_mlp
    at_work = 0
    if knobs.recompute != 'none':
        at_work = per_layer  # the layer that is computed again keeps everything
        products = (per_layer - 10 * config.n_embd) // 2 if knobs.recompute == 'selective' else 0
        per_layer = 4 * config.n_embd + products  # the residual stream, and half the products
    n_params, n_layers_params = all_params(config), config.num_params()
    state = (12 if knobs.optimizer_dtype == 'bfloat16' else 16) * n_params / shards
    if shards > 1:  # whole: two blocks, the one at work and the one being fetched, and the head
        state += 2 * 8 * n_layers_params / config.n_layer + 8 * (n_params - n_layers_params)
    tokens = micro_batch_size * config.block_size
    head = 10 * min(tokens * config.vocab_size, 2**27) + 10 * config.vocab_size * config.n_embd
    return state, tokens * (config.n_layer * per_layer + at_work) + head


def all_params(config):
    """Parameters of a model of this shape with embeddings and head, a tied one once."""
    return config.num_params(embedding=True, head=True)


def saved_state_bytes(config, knobs):
    """Bytes of one saved state: weights and AdamW's two moments."""
    return (8 if knobs.optimizer_dtype == 'bfloat16' else 12) * all_params(config)


class PlannedStage(NamedTuple):
    """A stage as the dry run sees it."""

    stage: Stage
    knobs: Any  # the general knobs as they hold for it
    steps: int
    result: Result  # as it would be, without its loss


def totals(run, planned):
    """The sums of a plan, as a dict: FLOPs, disk, unique tokens, and the family against scratch."""
    parents = [p.stage.parent.name for p in planned if p.stage.parent]
    sums = dict(flops=0.0, disk=0, saved_states=0, drawn=0, family=0.0, baseline=0.0, alone=0.0)
    sums['host'] = 0  # bytes of a model and of the one that it grows from
    weights = {p.stage.name: 4 * all_params(p.stage.config) for p in planned}
    for stage, knobs, steps, result in planned:
        saved_state = saved_state_bytes(stage.config, knobs)
        grown_from = weights.get(stage.parent.name, 0) if stage.parent else 0
        sums['host'] = max(sums['host'], weights[stage.name] + grown_from)
        sums['flops'] += result.flops
        kept = 1 + (steps // knobs.keep_every if knobs.keep_every else 0)
        sums['disk'] += 4 * all_params(stage.config) * kept
        if stable_steps(steps, knobs) > 0:
            sums['disk'] += saved_state  # the state at the end of a stable phase is kept
        largest = (1 + run.keep_states) * saved_state
        sums['saved_states'] = max(sums['saved_states'], largest)
        sums['drawn'] = max(sums['drawn'], result.position)
        if stage.name not in parents:
            sums['alone'] += result.total_flops
        if stage.baseline_flops and (stage.parent or not sums['family']):
            sums['family'] = result.total_flops
            sums['baseline'] = stage.baseline_flops
    sums['unique'] = min(sums['drawn'], run.unique_tokens or sums['drawn'])
    # some stages are trained once for several; of a trunk and its branches the family's sums tell
    family = any(p.stage.also_spent for p in planned)
    sums['shared'] = not family and len(set(parents)) < len(parents)
    return sums
