"""Generation: speculative decoding changes nothing but the speed; conversations."""

from dataclasses import replace

import pytest
import torch
from conftest import call, refuses, succeeds, train_tokenizer
from test_model import SHAPES, small, tokens

from engine.errors import UserError
from expand import grow
from model import GPT, GPTConfig, probabilities
from sample import Sampling, conversation_encoder, generate, speculate

GREEDY = Sampling(temperature=0)


def test_a_continuation_ends_before_the_first_end():
    model, prompts = small(), tokens(3, 7)
    together = generate(model, prompts, 6, GREEDY)
    assert torch.equal(together[1], generate(model, prompts[1:2], 6, GREEDY)[0])
    for place in (2, 4):  # each of several ends
        ends = (60, together[1][place].item())
        (found,) = generate(model, prompts[1:2], 6, GREEDY._replace(stop=ends))
        expected = together[1].tolist()
        assert found.tolist() == expected[: min(map(expected.index, {*ends} & {*expected}))]


@pytest.mark.parametrize('shape', ['llama', 'qwen3', 'neox', 'gpt2'])
@pytest.mark.parametrize('draft_tokens', [1, 3, 8])
def test_greedy_speculation_is_greedy_decoding_token_for_token(shape, draft_tokens):
    draft = small(**SHAPES[shape])
    model = grow(draft, replace(draft.config, n_layer=5), 'fpi', 'stack')  # agrees sometimes
    for prompt in (tokens()[:1, :n] for n in (5, 1)):
        (expected,) = generate(model, prompt, 19, GREEDY)
        found, drafted, accepted = speculate(model, draft, prompt, 19, draft_tokens, GREEDY)
        assert torch.equal(found, expected) and drafted >= accepted
        again, drafted, accepted = speculate(model, model, prompt, 19, draft_tokens, GREEDY)
        rounds = -(-19 // (draft_tokens + 1))
        assert torch.equal(again, expected) and drafted == accepted == 19 - rounds


def test_sampled_speculation_has_the_models_distribution():
    """Two tokens after a prompt: their frequencies against the model's own probabilities."""
    torch.manual_seed(0)
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=5, block_size=8, init_std=0.7)
    model, draft = GPT(config), GPT(config)
    prompt, n, sampling = torch.tensor([[1, 2]]), 2000, Sampling(0.9, top_k=4)

    def after(*ids):
        return probabilities(model(torch.tensor([[1, 2, *ids]])).logits[0, -1], 0.9, 4)

    expected = torch.stack([after()[a] * after(a) for a in range(5)])
    counts, drafted, accepted = torch.zeros(5, 5), 0, 0
    for _ in range(n):
        (a, b), proposed, taken = speculate(model, draft, prompt, 2, 2, sampling)
        counts[a, b] += 1
        drafted, accepted = drafted + proposed, accepted + taken
    assert 0.05 < accepted / drafted < 0.95  # both branches were taken
    assert (n * (counts / n - expected) ** 2 / expected.clamp(min=1e-3)).sum() < 60


def test_speculation_stops_at_the_end_and_refuses_what_cannot_be():
    model, prompt = small(), tokens()[:1, :2]
    end = generate(model, prompt, 3, GREEDY)[0][2].item()
    sampling = GREEDY._replace(stop=(end,))
    found, *_ = speculate(model, model, prompt, 10, sampling=sampling)
    assert torch.equal(found, generate(model, prompt, 10, sampling)[0]) and len(found) < 3
    with pytest.raises(UserError, match='25 tokens do not fit'):
        speculate(model, model, tokens()[:1, :5], 20)


def test_command_line(tmp_path):
    for name in ('16x1', '16x2'):
        GPT(GPTConfig.named(name, vocab_size=257, block_size=64)).save(tmp_path / name, 'bytes')
    line = f'sample.py --model={tmp_path}/16x2 --max_new_tokens'
    out = succeeds(f'{line}=20 --draft={tmp_path}/16x1 --prompt=ab --samples=2 --stop=False')
    assert out.count('--- ') == 2 and '| drafted' in out
    refuses(f'{line}=2 --tokenizer=byte', 'did you mean bytes')
    refuses(f'{line}=0', 'at least 1')


def test_a_conversation_follows_the_models_template(tmp_path):
    """Every answer is to the whole conversation; a model without a template gets an instruction."""
    pytest.importorskip('transformers')
    GPT(GPTConfig.named('16x1', vocab_size=257, block_size=256)).save(tmp_path, 'bytes')
    turns = zip(('user', 'assistant', 'user'), ('Hi', 'Ho', 'Why?'))
    messages = [dict(role=role, content=content) for role, content in turns]
    assert bytes(i for i in conversation_encoder(tmp_path)(messages) if i < 256) == b'Hi\nHoWhy?\n'
    template = '{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}[assistant: '
    (tmp_path / 'chat_template.jinja').write_text(template)
    expected = '[user: Hi][assistant: Ho][user: Why?][assistant: '
    assert bytes(conversation_encoder(tmp_path)(messages)).decode() == expected
    line = f'sample.py --model={tmp_path} --chat --max_new_tokens=5 --temperature=0'
    chat = call(line, 'Hi\nWhy?\n')
    assert chat.returncode == 0 and chat.stdout.count('> ') >= 3, chat.stderr
    (tmp_path / 'chat_template.jinja').write_text('{{ nobody.here }}')
    assert 'gives no text (UndefinedError)' in call(line, 'Hi\n').stderr


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    GPT(GPTConfig.named('16x1', vocab_size=400, block_size=32)).save(tmp_path / 'model', 'bytes')
    other = train_tokenizer(tmp_path / 'other', vocab_size=300)
    line = f'sample.py --model={tmp_path}/model --tokenizer={other}'
    refuses(line, 'has another tokenizer than')
