"""The dry run: what a run would train, and what it would cost in compute, memory and disk."""
from evaluate import count, human, table
from optimizer import stable_steps


def estimate_memory(config, knobs, micro_batch_size, shards=1):
    """
    (bytes of the training state, bytes of the activations) on one GPU: float32 weights and gradients, AdamW's moments, each cut
    into `shards`; what a compiled bfloat16 step keeps for its backward pass, and the logits of a chunk. An estimate, for planning.
    """
    attention = 2 * (2 * config.n_head + 2 * config.n_kv_head) * config.head_dim
    per_layer, again = 10 * config.n_embd + attention + 6 * config.n_mlp, 0
    if knobs.recompute != 'none':   # the residual stream, and half of what the matrix products give
        again = per_layer   # of the layer at work
        per_layer = 4 * config.n_embd + (per_layer - 10 * config.n_embd) // 2 * (knobs.recompute == 'selective')
    n_params = config.num_params(embedding=True, head=True)
    state = (12 if knobs.optimizer_dtype == 'bfloat16' else 16) * n_params / shards
    if shards > 1:   # the block at work and the one that is fetched, embeddings and head: whole, with their gradients
        state += 2 * 8 * config.num_params() / config.n_layer + 8 * (n_params - config.num_params())
    tokens = micro_batch_size * config.block_size
    head = 10 * min(tokens * config.vocab_size, 2 ** 27) + (4 + 2 + 4) * config.vocab_size * config.n_embd
    return state, tokens * (config.n_layer * per_layer + again) + head


def print_plan(run, stages):
    """Print the plan of `run`; stages: (Stage, its knobs, its optimizer steps, its pretended Result) in order of training."""
    rows = [['stage', 'from', 'N', 'all parameters', 'tokens', 'steps', 'batch', 'max LR', 'FLOPs', 'GPU-hours',
             'GPU memory', '+ a sequence', 'disk']]
    flops = disk = largest = drawn = family = baseline = alone = 0
    parents = [stage.parent.name for stage, _, _, _ in stages if stage.parent]

    def gpu_hours(amount):
        return f'{amount / (run.gpu_tflops * 1e12) / 3600:,.0f}'
    for stage, knobs, steps, result in stages:
        n_params = stage.config.num_params(embedding=True, head=True)
        state, sequence = estimate_memory(stage.config, knobs, 1)
        rows.append([stage.name, stage.start, f'{stage.config.num_params():,}', f'{n_params:,}', count(stage.tokens),
                     f'{steps:,}', str(knobs.batch_size), f'{knobs.learning_rate:g}', human(result.flops),
                     gpu_hours(result.flops), human(state) + 'B', human(sequence) + 'B', human(4 * n_params) + 'B'])
        held = 8 if knobs.optimizer_dtype == 'bfloat16' else 12   # bytes a parameter in a state
        flops, disk, drawn = flops + result.flops, disk + 4 * n_params, max(drawn, result.position)
        disk += held * n_params * (stable_steps(steps, knobs) > 0)   # the state at the end of a stable phase stays
        largest = max(largest, held * n_params)
        if stage.name not in parents:
            alone += result.total_flops
        if stage.baseline_flops and (stage.parent or not family):   # along the family, not the models it is compared with
            family, baseline = result.total_flops, stage.baseline_flops
    unique = min(drawn, run.unique_tokens or drawn)
    print(table(rows))
    print(f'\nthis run: {human(flops)}FLOPs, {gpu_hours(flops)} GPU-hours at {run.gpu_tflops:g} TFLOP/s')
    if baseline:
        print(f'the family: {human(family)}FLOPs; every size from scratch: {human(baseline)}FLOPs; '
              f'saved: {1 - family / baseline:.1%}')
    if alone > flops and len(set(parents)) < len(parents):
        print(f'stages that several others go on from are trained once: each of those alone would make {human(alone)}FLOPs, '
              f'{1 - flops / alone:.1%} are saved')
    config, knobs = max(((stage.config, knobs) for stage, knobs, _, _ in stages), key=lambda pair: pair[0].num_params())
    replica, shard = (estimate_memory(config, knobs, 1, shards)[0] for shards in (1, 8))
    print(f'memory of a GPU for the largest, before activations: {human(replica)}B for a replica (ddp), {human(shard)}B for a '
          'shard on each of 8 GPUs (fsdp): chosen when a replica does not fit')
    print(f'disk: {human(disk)}B to keep (models, states of stable phases), {human((1 + run.keep_states) * largest)}B for saved '
          f'states, {human(2 * unique)}B of tokens ({count(drawn)} drawn, {count(unique)} different, from {run.data})')
