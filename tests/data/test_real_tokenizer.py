"""The same rules with a byte-level BPE of the `tokenizers` library behind the base's own tokenizer class."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteLevel

from tests.data import fake_tokenizer as fake
from tests.data.test_masking import TALK, learned
from veneer import data
from veneer.data.masking import encode_row
from veneer.models.tokenizer import Tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|endoftext|>\n\n' + m['content'] | trim "
    "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|endoftext|>\n\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n\n' }}{% endif %}"
)


def tokenizer(template: str, *, trims: bool) -> Tokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = ByteLevel()
    texts = ["Hi, who are you? Ann 日本 And Bob", "### assistant:\n\n### user:\n\n system"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in fake.SPECIALS])
    fast.post_processor = processors.ByteLevel(trim_offsets=trims)
    return Tokenizer(fast, {"eos_token": "<|im_end|>", "bos_token": "<s>"}, template)


@pytest.mark.parametrize("trims", [True, False])
@pytest.mark.parametrize("template", [fake.CHATML, LLAMA3, PLAIN])
def test_answers_and_stop_tokens_under_a_real_tokenizer(template: str, trims: bool) -> None:
    real = tokenizer(template, trims=trims)
    row = data.from_records([{"messages": TALK}])[0]
    encoded = encode_row(row, real, "assistant")
    assert not encoded.notes
    assert real.encode(real.render(TALK))[: len(encoded.ids)] == encoded.ids.tolist()
    said = real.decode(encoded.ids[encoded.weights > 0].tolist(), skip_special=False)
    assert said == "Ann 日本<|im_end|>Bob<|im_end|>"
    assert encode_row(row, real, "last").bytes == 3


def test_the_fake_agrees_with_itself() -> None:
    assert learned(fake.FakeTokenizer(), TALK) == ["Ann 日本<|im_end|>", "Bob<|im_end|>"]


def test_raw_rows_under_a_real_tokenizer() -> None:
    real = tokenizer(fake.CHATML, trims=True)
    dataset = data.encode(data.from_records([{"prompt": "Hi,", "completion": " Ann"}]), real, max_length=20)
    assert real.decode(dataset.tokens.tolist(), skip_special=False) == "Hi, Ann<|im_end|>"
