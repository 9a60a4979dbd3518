"""
What makes a layer lazy? Three suspects: attention logits divided by the layer's number, as the
GPT-2 models of Inheritune are trained; learned positions; depth. One model of every combination,
several seeds, and the effect of each suspect with everything else equal. No paper's.

    python train.py config/lazy_layers_tiny.py
"""

from dataclasses import dataclass
from itertools import product
from statistics import mean
from typing import Literal

from configurator import Count, Positive
from engine.errors import UserError
from engine.report import by_label, interval
from engine.stage import Stage
from extras.attention import (
    kinds_of_laziness,
    observe_attention,
    observed,
    observed_panels,
    run_samples,
)


@dataclass
class LazyLayers:
    """What makes a layer lazy: models with and without each suspect, at equal steps."""

    width: Count = 32  # of all models
    depths: tuple[Count, ...] = (12, 24)  # layers
    positions: tuple[Literal['learned', 'rope'], ...] = ('learned', 'rope')
    scaling: tuple[Literal['by-layer', 'none'], ...] = ('by-layer', 'none')  # of attention logits
    tokens: Positive = 1.1e6  # training tokens of each model
    seeds: Count = 3  # runs of everything, each with its own initialisation and data order

    def stages(self, run):
        """For every seed every combination, from random initialisation."""
        if not (self.depths and self.positions and self.scaling) or run.parallel == 'fsdp':
            raise UserError('lazy_layers needs depths, positions and scaling, and no shards')
        for seed in range(self.seeds):
            for depth, positions, scaling in product(self.depths, self.positions, self.scaling):
                changes = dict(pos=positions, attn_scale_by_layer=scaling == 'by-layer', bias=False)
                config = run.model_config(f'gpt2-{self.width}x{depth}', **changes)
                variant = f'{depth}-{positions}-{scaling}'
                X = config.num_params(head=True)
                stage = Stage(f'{variant}-{seed}', config, self.tokens, X)
                stage.knobs = dict(seed=run.seed + seed)
                stage.labels = dict(variant=variant, seed=seed, depth=depth)
                stage.labels |= dict(positions=positions, scaling=scaling)
                if not run.dry_run:
                    samples = run_samples(run, config, 8)
                    stage.observe = observe_attention(samples, run.seed + seed)
                yield stage

    def summary(self, results):
        """Every combination: loss, ranks and lazy heads; the effect of each suspect; a picture."""
        measured = {result.name: measures(result) for result in results}
        records = []
        for variant, runs in by_label(results, 'variant').items():
            record = {'model': variant, 'seeds': len(runs)}
            for name in measured[runs[0].name]:
                record[name] = mean(measured[r.name][name] for r in runs)
            records.append(record)
        panels = observed_panels(by_label(results, 'variant'))
        return [records, self.effects(results, measured), ('lazy.png', panels)]

    def effects(self, results, measured):
        """
        Records of each suspect: by how much a measure is higher with its first value than with
        its last, all else equal: the mean, and its 95% interval over seeds.
        """
        suspects = dict(scaling=self.scaling, positions=self.positions, depth=self.depths)
        records = []
        for suspect, values in suspects.items():
            first, last = values[0], values[-1]
            if first == last:  # one value has no effect to show
                continue
            record = {'suspect': suspect, 'effect of': f'{first} instead of {last}'}
            for name in measured[results[0].name]:
                differences = []
                for runs in by_label(results, 'seed').values():
                    sides = by_label(runs, suspect)
                    with_first = mean(measured[r.name][name] for r in sides[first])
                    differences.append(
                        with_first - mean(measured[r.name][name] for r in sides[last])
                    )
                found = interval(differences)
                limits = f' ({found[0]:+.3f} to {found[1]:+.3f})' if found else ''
                record[name] = f'{mean(differences):+.3f}{limits}'
            records.append(record)
        return records


def measures(result):
    """
    {measure: value} of a finished model: its loss, the mean over layers of the largest rank before
    and after training, the same for the upper half, and the shares of lazy heads by kind.
    """
    seen = observed(result)
    before, after = seen[0][1], seen[-1][1]
    rank = after['rank'].max(1)
    found = {'val loss': result.val_loss, 'rank before': float(before['rank'].max(1).mean())}
    found |= {'rank after': float(rank.mean())}
    found['upper half'] = float(rank[len(rank) // 2 :].mean())
    for kind, heads in kinds_of_laziness(after).items():
        found[kind] = float(heads.mean())
    return found
