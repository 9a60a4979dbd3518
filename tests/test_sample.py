"""
Generation: sampling filters, batches, and speculative decoding that changes nothing but the
speed.
"""

import dataclasses
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_command, train_tokenizer
from test_model import SHAPES, small, tokens

from engine.errors import UserError
from expand import grow
from model import GPT, GPTConfig, probabilities
from sample import Sampling, Speculation, conversation_encoder, generate, speculate

GREEDY = Sampling(temperature=0)


def test_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    p = logits.softmax(-1)
    torch.testing.assert_close(probabilities(logits), p)
    for temperature in (0, 1e-300):  # in float32 both are nothing
        assert probabilities(logits, temperature).tolist() == [[1, 0, 0, 0]]
    torch.testing.assert_close(probabilities(logits, temperature=0.5), (2 * logits).softmax(-1))
    torch.testing.assert_close(
        probabilities(logits, top_k=2), p * torch.tensor([1, 1, 0, 0]) / p[0, :2].sum()
    )
    torch.testing.assert_close(
        probabilities(logits, top_p=0.7), p * torch.tensor([1, 1, 0, 0]) / p[0, :2].sum()
    )  # the first alone has 0.64
    assert probabilities(logits, top_p=1e-6).tolist() == [[1, 0, 0, 0]]
    torch.testing.assert_close(probabilities(logits, top_k=99), p)


def test_prompts_of_different_lengths_are_continued_as_if_alone():
    model, prompts = small(), [tokens()[0, :n] for n in (3, 7, 3, 1)]
    together = generate(model, prompts, 6, GREEDY)
    for prompt, found in zip(prompts, together):
        assert torch.equal(found, generate(model, [prompt], 6, GREEDY)[0])
    end = together[1][2].item()
    assert (
        generate(model, prompts, 6, GREEDY._replace(stop=(end,)))[1].tolist()
        == together[1].tolist()[: together[1].tolist().index(end)]
    )


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('draft_tokens', [1, 3, 8])
def test_greedy_speculation_is_greedy_decoding_token_for_token(shape, draft_tokens):
    draft = small(**SHAPES[shape])
    model = grow(
        draft, dataclasses.replace(draft.config, n_layer=5), 'fpi', 'stack'
    )  # a relative: agrees sometimes
    prompts = [tokens()[0, :n] for n in (5, 1, 4)]  # each is somewhere else, from the beginning
    plain = generate(model, prompts, 19, GREEDY)
    for prompt, expected in zip(prompts, plain):
        found, stats = speculate(model, draft, prompt[None], 19, draft_tokens, GREEDY)
        assert torch.equal(found, expected)
        assert stats.drafted >= stats.accepted and len(stats.divergences) == stats.drafted
        again, alike = speculate(model, model, prompt[None], 19, draft_tokens, GREEDY)
        assert torch.equal(again, expected)
        assert alike.acceptance_rate == 1.0 and alike.rounds == -(-19 // (draft_tokens + 1))


def test_sampled_speculation_has_the_models_distribution():
    """
    Two tokens after a prompt: frequencies over many samples against the model's own
    probabilities.
    """
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=5, block_size=8, init_std=0.7)
    model, draft = GPT(config), GPT(config)
    prompt, n, sampling = torch.tensor([1, 2]), 4000, Sampling(0.9, top_k=4)
    first = probabilities(model(prompt[None]).logits[0, -1], 0.9, 4)
    expected = torch.stack(
        [
            first[a] * probabilities(model(torch.tensor([[1, 2, a]])).logits[0, -1], 0.9, 4)
            for a in range(5)
        ]
    )
    counts, stats = torch.zeros(5, 5), Speculation()
    for _ in range(n):
        (a, b), one = speculate(model, draft, prompt[None], 2, draft_tokens=2, sampling=sampling)
        counts[a, b] += 1
        stats.add(one)
    assert 0.05 < stats.acceptance_rate < 0.95  # both branches were taken
    assert (counts / n - expected).abs().max() < 0.03 and (
        (counts / n - expected) ** 2 / expected.clamp(min=1e-3)
    ).sum() * n < 60


def test_speculation_stops_at_the_end_and_refuses_what_cannot_be():
    model = small()
    prompts = [tokens()[0, :n] for n in (5, 2, 4)]
    end = generate(model, prompts, 3, GREEDY)[1][2].item()  # of the second, its third
    sampling = GREEDY._replace(stop=(end,))
    plain = generate(model, prompts, 10, sampling)
    found = [speculate(model, model, prompt[None], 10, sampling=sampling)[0] for prompt in prompts]
    assert all(map(torch.equal, found, plain)) and len(found[1]) < 3
    with pytest.raises(UserError, match='25 tokens do not fit'):
        speculate(model, model, prompts[0][None], 20)


def test_command_line(tmp_path):
    for name, layers in (('draft', 1), ('model', 2)):
        GPT(GPTConfig.named(f'16x{layers}', vocab_size=257, block_size=64)).save(
            tmp_path / name, 'bytes'
        )
    process = run_command(
        'sample.py',
        f'--model={tmp_path}/model',
        f'--draft={tmp_path}/draft',
        '--prompt=ab',
        '--samples=2',
        '--max_new_tokens=20',
        '--stop=False',
    )
    assert (
        process.returncode == 0
        and process.stdout.count('--- ') == 2
        and '| drafted' in process.stdout
    ), process.stderr
    (tmp_path / 'prompts').write_text('one\nthree\n')
    process = run_command(
        'sample.py',
        f'--model={tmp_path}/model',
        f'--prompts={tmp_path}/prompts',
        '--max_new_tokens=5',
        '--temperature=0',
    )
    assert '--- 1\none' in process.stdout and '--- 2\nthree' in process.stdout, process.stderr
    for argument, word in (
        ('--tokenizer=byte', 'did you mean bytes'),
        ('--max_new_tokens=0', 'at least 1'),
        ('--prompts=no', 'no file'),
    ):
        process = run_command('sample.py', f'--model={tmp_path}/model', argument)
        assert (
            process.returncode == 2 and word in process.stderr and process.stderr.count('\n') == 1
        ), process.stderr


def test_a_conversation_follows_the_models_template(tmp_path):
    """Every answer is to the whole conversation; a model without a template gets an instruction."""
    pytest.importorskip('transformers')
    GPT(GPTConfig.named('16x1', vocab_size=257, block_size=256)).save(tmp_path, 'bytes')
    messages = [dict(role='user', content='Hi'), dict(role='assistant', content='Ho')]
    messages.append(dict(role='user', content='Why?'))
    assert bytes(i for i in conversation_encoder(tmp_path)(messages) if i < 256) == b'Hi\nHoWhy?\n'
    template = '{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}[assistant: '
    (tmp_path / 'chat_template.jinja').write_text(template)
    expected = '[user: Hi][assistant: Ho][user: Why?][assistant: '
    assert bytes(conversation_encoder(tmp_path)(messages)).decode() == expected
    knobs = ('--chat=True', '--max_new_tokens=5', '--temperature=0')
    process = run_command('sample.py', f'--model={tmp_path}', *knobs, input='Hi\nWhy?\n')
    assert process.returncode == 0, process.stderr
    assert process.stdout.count('> ') >= 3
    long = run_command('sample.py', f'--model={tmp_path}', *knobs, input='x' * 300)
    assert long.returncode == 2 and 'do not fit the context of 256' in long.stderr
    (tmp_path / 'chat_template.jinja').write_text('{{ nobody.here }}')
    command = [sys.executable, 'sample.py', f'--model={tmp_path}', *knobs]
    broken = subprocess.run(command, cwd=ROOT, input=b'\xff\n', capture_output=True)  # no UTF-8
    assert broken.returncode == 2 and broken.stderr.count(b'\n') == 1
    assert b'gives no text (UndefinedError)' in broken.stderr


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    pytest.importorskip('tokenizers')
    GPT(GPTConfig.named('16x1', vocab_size=400, block_size=32)).save(tmp_path / 'model', 'bytes')
    other = train_tokenizer('byte-level', tmp_path / 'other', 300)
    process = run_command('sample.py', f'--model={tmp_path}/model', f'--tokenizer={other}')
    assert process.returncode == 2 and 'has another tokenizer than' in process.stderr
