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
from sample import Sampling, conversation_encoder, generate, speculate

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


def test_a_continuation_ends_before_the_first_end():
    model, prompts = small(), tokens(3, 7)
    together = generate(model, prompts, 6, GREEDY)
    assert torch.equal(together[1], generate(model, prompts[1:2], 6, GREEDY)[0])
    end = together[1][2].item()
    found = generate(model, prompts, 6, GREEDY._replace(stop=(end,)))[1].tolist()
    assert found == together[1].tolist()[: together[1].tolist().index(end)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('draft_tokens', [1, 3, 8])
def test_greedy_speculation_is_greedy_decoding_token_for_token(shape, draft_tokens):
    draft = small(**SHAPES[shape])
    model = grow(
        draft, dataclasses.replace(draft.config, n_layer=5), 'fpi', 'stack'
    )  # a relative: agrees sometimes
    for prompt in (tokens()[:1, :n] for n in (5, 1, 4)):
        (expected,) = generate(model, prompt, 19, GREEDY)
        found, drafted, accepted = speculate(model, draft, prompt, 19, draft_tokens, GREEDY)
        assert torch.equal(found, expected) and drafted >= accepted
        again, drafted, accepted = speculate(model, model, prompt, 19, draft_tokens, GREEDY)
        rounds = -(-19 // (draft_tokens + 1))
        assert torch.equal(again, expected) and drafted == accepted == 19 - rounds


def test_sampled_speculation_has_the_models_distribution():
    """
    Two tokens after a prompt: frequencies over many samples against the model's own
    probabilities.
    """
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=5, block_size=8, init_std=0.7)
    model, draft = GPT(config), GPT(config)
    prompt, n, sampling = torch.tensor([[1, 2]]), 4000, Sampling(0.9, top_k=4)
    first = probabilities(model(prompt).logits[0, -1], 0.9, 4)
    expected = torch.stack(
        [
            first[a] * probabilities(model(torch.tensor([[1, 2, a]])).logits[0, -1], 0.9, 4)
            for a in range(5)
        ]
    )
    counts, drafted, accepted = torch.zeros(5, 5), 0, 0
    for _ in range(n):
        (a, b), proposed, taken = speculate(model, draft, prompt, 2, 2, sampling)
        counts[a, b] += 1
        drafted, accepted = drafted + proposed, accepted + taken
    assert 0.05 < accepted / drafted < 0.95  # both branches were taken
    assert (counts / n - expected).abs().max() < 0.03 and (
        (counts / n - expected) ** 2 / expected.clamp(min=1e-3)
    ).sum() * n < 60


def test_speculation_stops_at_the_end_and_refuses_what_cannot_be():
    model = small()
    prompt = tokens()[:1, :2]
    end = generate(model, prompt, 3, GREEDY)[0][2].item()
    sampling = GREEDY._replace(stop=(end,))
    found, *_ = speculate(model, model, prompt, 10, sampling=sampling)
    assert torch.equal(found, generate(model, prompt, 10, sampling)[0]) and len(found) < 3
    with pytest.raises(UserError, match='25 tokens do not fit'):
        speculate(model, model, tokens()[:1, :5], 20)


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
    for argument, word in (
        ('--tokenizer=byte', 'did you mean bytes'),
        ('--max_new_tokens=0', 'at least 1'),
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
    assert long.returncode == 0  # the end of it is read
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
