"""Stages and results: what a model cost, with all that it was made from."""

from engine.stage import Origin, Result, Stage, describe
from model import GPTConfig


def test_a_result_survives_a_move_and_counts_its_ancestors(tmp_path):
    Result('a', str(tmp_path), flops=12.0, val_loss=1.5, before={'those before': 30.0}).write()
    moved = tmp_path.rename(tmp_path.parent / 'moved')
    read = Result.of(moved)
    assert read.total_flops == 42.0 and read.folder == str(moved) and read.val_loss == 1.5
    assert sum(Stage('b', None, 10, 1.0, parent=read).before.values()) == 42.0


def test_an_ancestor_that_two_parents_share_counts_once():
    ancestor = Result('ancestor', 'ancestor', flops=100.0)
    before = Stage('any', None, 10, 1.0, also=(ancestor,)).before
    small, large = (Result(name, name, flops=7.0, before=before) for name in ('small', 'large'))
    made = Stage('made', None, 10, 1.0, parent=small, also=(large,))
    assert sum(made.before.values()) == 100 + 7 + 7


def test_a_stage_is_described_by_its_fields():
    stage = Stage('b', GPTConfig.named('16x2'), 10, 1.0)
    assert describe(stage) == '2 layers of width 16, random initialisation'
    stage.origin = Origin('growth', ('a',), dict(width='aki', noise=0.1))
    stage.teaching = dict(objective='let', teacher='t', lambda0=0.1)
    expected = '2 layers of width 16, growth of a (width aki, noise 0.1)'
    assert describe(stage) == f'{expected}, objective let (teacher t, lambda0 0.1)'
