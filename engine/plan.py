"""
What a run costs, before it starts: memory, what is chosen by it, and the data of the dry run.
"""

from typing import Any, NamedTuple

from engine.errors import UserError
from engine.loss import LOGITS
from engine.optimizer import stable_steps
from engine.stage import Result, Stage


def estimate_memory(config, knobs, micro_batch_size, shards=1):
    """
    (bytes of the training state, bytes of the activations) on one GPU: float32 weights and
    gradients and AdamW's state, each cut into `shards`; what a compiled bfloat16 step keeps for
    its backward pass, and one chunk of logits. An estimate, for planning: on an H100 it was 1.03
    to 1.4 times what was measured (docs/benchmarks.md).
    """
    attention = 4 * (config.n_head + config.n_kv_head) * config.head_dim
    per_layer = 10 * config.n_embd + attention + 6 * config.n_mlp
    at_work = 0
    if knobs.recompute:
        at_work = per_layer  # the layer that is computed again keeps everything
        per_layer = 4 * config.n_embd  # the residual stream
    n_params, n_layers_params = all_params(config), config.num_params()
    state = 16 * n_params / shards
    if shards > 1:  # whole: two blocks, the one at work and the one being fetched, and the head
        state += 2 * 8 * n_layers_params / config.n_layer + 8 * (n_params - n_layers_params)
    tokens = micro_batch_size * config.block_size
    head = (
        6 * min(tokens * config.vocab_size, LOGITS['cuda']) + 10 * config.vocab_size * config.n_embd
    )
    return state, tokens * (config.n_layer * per_layer + at_work) + head


def all_params(config):
    """Parameters of a model of this shape with embeddings and head, a tied one once."""
    return config.num_params(embedding=True, head=True)


def saved_state_bytes(config):
    """Bytes of one saved state: weights and AdamW's two moments."""
    return 12 * all_params(config)


def choose_strategy(knobs, config, hardware):
    """'ddp' or 'fsdp': the knob, or ddp while a replica with one sequence fits. UserError."""
    if hardware.world_size == 1 and knobs.parallel == 'fsdp':
        raise UserError('parallel=fsdp needs several processes: start them with torchrun')
    if knobs.parallel != 'auto':
        return knobs.parallel
    fits = sum(estimate_memory(config, knobs, 1)) < hardware.memory
    return 'ddp' if hardware.world_size == 1 or fits else 'fsdp'


def choose_micro_batch(knobs, config, hardware):
    """Sequences per process at once: the knob, or the largest divisor of its share that fits."""
    share = knobs.batch_size // hardware.world_size
    if knobs.micro_batch_size:
        if share % knobs.micro_batch_size:
            raise UserError(
                f'micro_batch_size {knobs.micro_batch_size} does not divide the {share} sequences '
                'of a process'
            )
        return knobs.micro_batch_size
    sharded = choose_strategy(knobs, config, hardware) == 'fsdp'
    shards = hardware.world_size if sharded else 1
    limit = 2**17 if hardware.device.type == 'cuda' else 2**13  # tokens; more gains nothing
    for size in range(min(share, limit // config.block_size), 1, -1):
        memory = sum(estimate_memory(config, knobs, size, shards))
        if share % size == 0 and memory < hardware.memory:
            return size
    return 1


def room_for(hardware, stage):
    """The hardware with the memory that a stage's teacher leaves to train."""
    taken = stage.teacher_params * hardware.dtype.itemsize
    return hardware._replace(memory=hardware.memory - taken)


def check_memory(name, config, knobs, hardware):
    """Raise UserError where a stage of this shape needs more memory than there is."""
    shards = hardware.world_size if knobs.parallel != 'ddp' else 1
    needed, found = sum(estimate_memory(config, knobs, 1, shards)), hardware.memory
    if needed > found:
        where = 'each of the GPUs' if hardware.device.type == 'cuda' else 'each process'
        raise UserError(
            f'{name}: {all_params(config):,} parameters need {needed / 1e9:.1f} GB to be trained '
            f'on {where}, which has {found / 1e9:.1f} GB free: use a smaller size or more GPUs; '
            '--dry_run=True shows the plan, --toy=True runs it small, --anyway=True tries it'
        )


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
    for stage, knobs, steps, result in planned:
        saved_state = saved_state_bytes(stage.config)
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
