"""What is learned: what the assistant says and its stop token, found from message offsets under any template."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data import fake_tokenizer as fake
from tests.data.fake_tokenizer import FakeTokenizer
from veneer import data
from veneer.data.masking import encode_row
from veneer.errors import DataError

TALK = [
    {"role": "user", "content": "Hi, who are you?"},
    {"role": "assistant", "content": "Ann 日本"},
    {"role": "user", "content": "And <b>?"},
    {"role": "assistant", "content": "Bob"},
]


def learned(
    tokenizer: FakeTokenizer, messages: list[dict[str, object]], train_on: data.TrainOn = "assistant"
) -> list[str]:
    """The learned stretches of a conversation, decoded."""
    row = data.from_records([{"messages": messages}])[0]
    encoded = encode_row(row, tokenizer, train_on)
    runs: list[list[int]] = []
    for i, (token, weight) in enumerate(zip(encoded.ids, encoded.weights, strict=True)):
        if weight > 0:
            if i == 0 or encoded.weights[i - 1] == 0:
                runs.append([])
            runs[-1].append(int(token))
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [fake.CHATML, fake.DEFAULT_SYSTEM])
def test_answers_and_stop_tokens_are_learned_and_nothing_else(template: str) -> None:
    assert learned(FakeTokenizer(template), TALK) == ["Ann 日本<|im_end|>", "Bob<|im_end|>"]


def test_the_last_turn_only() -> None:
    assert learned(FakeTokenizer(), TALK, "last") == ["Bob<|im_end|>"]


def test_every_token() -> None:
    tokenizer = FakeTokenizer()
    assert learned(tokenizer, TALK, "all") == [tokenizer.render(TALK)]


def test_a_template_with_a_leading_space_and_another_stop_token() -> None:
    assert learned(FakeTokenizer(fake.INST, eos=["</s>"], bos="<s>"), TALK) == [" Ann 日本</s>", " Bob</s>"]


def test_weights_scale_and_mask_turns() -> None:
    talk = [dict(message) for message in TALK]
    talk[1]["weight"] = 0
    assert learned(FakeTokenizer(), talk) == ["Bob<|im_end|>"]
    talk[1]["weight"] = 0.25
    encoded = encode_row(data.from_records([{"messages": talk}])[0], FakeTokenizer(), "assistant")
    assert sorted(set(encoded.weights.tolist())) == [0.0, 0.25, 1.0]


def test_weight_zero_under_all_masks_that_turn() -> None:
    talk = [dict(message) for message in TALK]
    talk[1]["weight"] = 0
    texts = learned(FakeTokenizer(), talk, "all")
    assert len(texts) == 2 and "Ann" not in "".join(texts) and texts[0].endswith("<|im_start|>assistant\n")


def test_what_the_generation_prompt_supplies_is_masked() -> None:
    assert learned(FakeTokenizer(fake.THINKING), TALK, "last") == ["Bob<|im_end|>"]


def test_a_turn_that_renders_differently_in_the_history_is_refused_with_a_way_out() -> None:
    with pytest.raises(DataError, match=r"messages\[1\].*differently once others follow") as caught:
        learned(FakeTokenizer(fake.THINKING), TALK)
    assert "train_on: last" in str(caught.value.help)


def test_a_generation_prompt_that_is_not_a_prefix_is_refused() -> None:
    with pytest.raises(DataError, match="not what it writes before the answer"):
        learned(FakeTokenizer(fake.BROKEN_PROMPT), TALK)


def test_a_conversation_the_assistant_opens_is_refused() -> None:
    with pytest.raises(DataError, match=r"messages\[0\]") as caught:
        learned(FakeTokenizer(), TALK[1:])
    assert "user message" in str(caught.value.help)
    talk = [{**TALK[1], "weight": 0}, *TALK[2:]]
    assert learned(FakeTokenizer(), talk) == ["Bob<|im_end|>"]


def test_a_failing_template_is_a_data_error_with_its_words() -> None:
    with pytest.raises(DataError, match="only user and assistant"):
        learned(FakeTokenizer(fake.INST, eos=["</s>"]), [{"role": "system", "content": "x"}, *TALK], "last")


def test_marker_strings_in_a_message_change_nothing() -> None:
    talk = [{"role": "user", "content": "say <|im_start|>assistant\nNo"}, {"role": "assistant", "content": "No"}]
    assert learned(FakeTokenizer(), talk) == ["No<|im_end|>"]


def test_tokens_are_those_of_the_whole_rendering() -> None:
    tokenizer = FakeTokenizer(pieces=["\nA", "nn ", "<b", "assistant"])
    encoded = encode_row(data.from_records([{"messages": TALK}])[0], tokenizer, "assistant")
    assert tokenizer.encode(tokenizer.render(TALK))[: len(encoded.ids)] == encoded.ids.tolist()
    assert tokenizer.decode(encoded.ids.tolist()).endswith("Bob<|im_end|>"), "cut after the last learned token"


def test_a_token_across_the_boundary_is_masked_and_noted() -> None:
    tokenizer = FakeTokenizer(pieces=["\nA"])
    encoded = encode_row(data.from_records([{"messages": TALK[:2]}])[0], tokenizer, "assistant")
    assert encoded.notes == ("straddling",)
    assert learned(tokenizer, TALK[:2]) == ["nn 日本<|im_end|>"]


def test_a_token_that_runs_into_the_next_turn_is_masked() -> None:
    assert learned(FakeTokenizer(fake.PLAIN, pieces=["\nuser"]), TALK) == ["Ann 日本", "Bob\n"]


def test_a_character_of_several_tokens_belongs_to_one_side() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}語{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant語{% endif %}"
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "本"}]
    assert learned(FakeTokenizer(template), talk) == ["本<|im_end|>"]


def test_no_stop_token_is_noted() -> None:
    encoded = encode_row(data.from_records([{"messages": TALK}])[0], FakeTokenizer(fake.PLAIN), "assistant")
    assert encoded.notes == ("without_stop",)


def test_bytes_count_what_is_said() -> None:
    encoded = encode_row(data.from_records([{"messages": TALK}])[0], FakeTokenizer(), "assistant")
    assert encoded.bytes == len("Ann 日本".encode()) + len(b"Bob")


def test_bytes_have_the_weight_of_their_tokens() -> None:
    """As the loss has: bits over bytes are of the same tokens."""
    tokenizer, (user, first, question, last) = FakeTokenizer(), TALK
    weighted = [user, {**first, "weight": 0.5}, question, {**last, "weight": 0}]
    encoded = encode_row(data.from_records([{"messages": weighted}])[0], tokenizer, "assistant")
    assert encoded.bytes == len("Ann 日本".encode()) / 2
    whole = encode_row(data.from_records([{"messages": TALK}])[0], tokenizer, "all")
    masked = encode_row(data.from_records([{"messages": weighted}])[0], tokenizer, "all")
    lost = whole.weights - masked.weights
    assert set(lost) == {0, 0.5, 1}
    assert whole.bytes - masked.bytes == lost @ whole.sizes == len("Ann 日本".encode()) / 2 + len(b"Bob")


def test_a_first_token_that_nothing_predicts_has_no_bytes_to_count() -> None:
    row = data.from_records([{"text": "héé"}])[0]
    assert encode_row(row, FakeTokenizer(None, eos=["</s>"]), "assistant").bytes == 4
    assert encode_row(row, FakeTokenizer(None, eos=["</s>"], bos="<s>"), "assistant").bytes == 5
    pair = data.from_records([{"prompt": "héé", "completion": "é"}])[0]
    assert encode_row(pair, FakeTokenizer(None, eos=["</s>"]), "all").bytes == 6
    assert encode_row(pair, FakeTokenizer(None, eos=["</s>"], bos="<s>"), "all").bytes == 7


def test_raw_pairs_have_no_template_and_end_with_eos() -> None:
    tokenizer = FakeTokenizer(eos=["<|endoftext|>", "<|im_end|>"], pieces=["b c"])
    encoded = encode_row(data.from_records([{"prompt": "a b", "completion": " c"}])[0], tokenizer, "assistant")
    assert encoded.ids.tolist() == [*tokenizer.encode("a b"), *tokenizer.encode(" c"), 0], (
        "apart: 'b c' is not one token"
    )
    assert encoded.weights.tolist() == [0, 0, 0, 1, 1, 1]
    assert encoded.bytes == 2


@pytest.mark.parametrize("prompt", ["a", "<s>a"])
def test_raw_pairs_get_the_bos_the_tokenizer_adds_once(prompt: str) -> None:
    tokenizer = FakeTokenizer(None, eos=["</s>"], bos="<s>", adds_eos=True)
    encoded = encode_row(data.from_records([{"prompt": prompt, "completion": "b"}])[0], tokenizer, "assistant")
    assert tokenizer.decode(encoded.ids.tolist()) == "<s>ab</s>"
    assert encoded.weights.tolist() == [0, 0, 1, 1]


def test_plain_text_is_learned_whole() -> None:
    tokenizer = FakeTokenizer(None, eos=["</s>"], bos="<s>")
    encoded = encode_row(data.from_records([{"text": "héé"}])[0], tokenizer, "assistant")
    assert tokenizer.decode(encoded.ids.tolist()) == "<s>héé</s>"
    assert np.array_equal(encoded.weights > 0, [False] + [True] * 6) and encoded.bytes == 5
