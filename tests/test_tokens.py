"""Tokens and loss mask: the model learns exactly the responses and to stop, and sees the prompts that it will be given."""

from pathlib import Path
from typing import Any

import pytest
from helpers import CHATML, FUZZED, tokenizer_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.config import TEMPLATES
from qlora_core.data.rows import Example, Message
from qlora_core.errors import DatasetError, ModelError
from qlora_core.tokens import (
    Refused,
    RenderedExample,
    load_tokenizer,
    prompt_ids,
    render,
    render_many,
    template_name,
)

END = "<|im_end|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("model"), chat_template=CHATML)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("chatml"), chat_template=CHATML))


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("alpaca")))


def tokenizer_with(folder: Path, template: str) -> Any:
    return load_tokenizer(tokenizer_folder(folder, chat_template=template))


def conversation(*contents: str, system: str | None = None, line: int = 1) -> Example:
    """Turns of user and assistant alternately, after the system prompt if there is one."""
    messages = [Message("user" if i % 2 == 0 else "assistant", content) for i, content in enumerate(contents)]
    return Example(line, tuple([Message("system", system)] * (system is not None) + messages))


def learnt(rendered: RenderedExample, tokenizer: Any) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    runs: list[list[int]] = []
    for i, (token, supervised) in enumerate(zip(rendered.token_ids, rendered.supervised, strict=True)):
        if supervised:
            if i == 0 or not rendered.supervised[i - 1]:
                runs.append([])
            runs[-1].append(int(token))
    return [tokenizer.decode(run) for run in runs]


def test_only_the_response_and_its_end_token_are_learnt(chatml: Any) -> None:
    rendered = render(conversation("Hi", "Hello there"), chatml)
    assert learnt(rendered, chatml) == [f"Hello there{END}"]
    assert rendered.text == chatml.decode(rendered.token_ids.tolist())
    assert rendered.end_supervised(len(rendered.token_ids))
    assert rendered.supervised_tokens(len(rendered.token_ids)) == sum(rendered.supervised)


def test_end_token_is_learnt_where_it_is_also_the_padding(chatml: Any) -> None:
    assert chatml.pad_token_id == chatml.eos_token_id
    rendered = render(conversation("Hi", "Hello"), chatml)
    learnt_ids = [token for token, on in zip(rendered.token_ids, rendered.supervised, strict=True) if on]
    assert learnt_ids[-1] == chatml.eos_token_id


def test_every_response_of_a_conversation_is_learnt(chatml: Any, alpaca: Any) -> None:
    example = conversation("one?", "first", "two?", "second", "three?", "third", system="Be brief.")
    for tokenizer in (chatml, alpaca):
        rendered = render(example, tokenizer)
        assert learnt(rendered, tokenizer) == [f"{text}{END}" for text in ("first", "second", "third")]
        assert rendered.text.count("Be brief.") == 1


def test_default_system_prompt_of_the_template_is_in_prompt_and_training_text(chatml: Any) -> None:
    example = conversation("Hi", "Hello")
    rendered = render(example, chatml)
    assert rendered.text.startswith("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi")
    assert chatml.decode(prompt_ids(example, chatml)) == rendered.text.partition("Hello")[0]
    assert "You are helpful." not in render(conversation("Hi", "Hello", system="x"), chatml).text


def test_alpaca_template_is_the_published_prompt(alpaca: Any, chatml: Any) -> None:
    plain = Example(1, (Message("user", "Name a colour."), Message("assistant", "Red")))
    assert render(plain, alpaca).text == (
        "<|im_start|>Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\nRed<|im_end|>"
    )
    with_input = Example(1, plain.messages, input="Not blue.")
    assert render(with_input, alpaca).text == (
        "<|im_start|>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Input:\nNot blue.\n\n### Response:\nRed<|im_end|>"
    )
    assert learnt(render(with_input, alpaca), alpaca) == ["Red<|im_end|>"]
    assert "Name a colour.\n\nNot blue.<|im_end|>" in render(with_input, chatml).text
    assert (template_name(alpaca), template_name(chatml)) == ("Alpaca template", "the model's chat template")


def test_row_without_a_special_beginning_starts_with_the_prompt_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    tokenizer.bos_token = None
    assert render(conversation("a", "b"), tokenizer).text.startswith("Below is")


def test_cut_row_loses_its_end_and_what_lies_beyond_the_cut(chatml: Any) -> None:
    whole = render(conversation("Hi", "fox " * 50), chatml)
    assert not whole.end_supervised(60)
    assert whole.supervised_tokens(60) == sum(whole.supervised[:60]) > 0
    last = max(i for i, on in enumerate(whole.supervised) if on)
    assert not whole.end_supervised(last)
    assert whole.end_supervised(last + 1)


def test_prompt_longer_than_the_limit_leaves_nothing_to_learn(chatml: Any) -> None:
    assert render(conversation("word " * 50, "Hello"), chatml).supervised_tokens(20) == 0


def test_template_without_an_end_token_gets_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(
        tmp_path,
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}",
    )
    rendered = render(conversation("Hi", "Hello"), tokenizer)
    assert rendered.text.startswith("user: Hi\nassistant: Hello")
    assert rendered.token_ids[-1] == tokenizer.eos_token_id
    assert rendered.supervised[-1] and rendered.end_supervised(len(rendered.token_ids))


def test_conversation_that_ends_with_the_user_learns_the_responses_before(chatml: Any) -> None:
    rendered = render(conversation("Hi", "Hello", "Bye"), chatml)
    assert learnt(rendered, chatml) == [f"Hello{END}"]
    assert rendered.text.rstrip().endswith(f"Bye{END}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.missing }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_template_that_refuses_a_row_names_its_line(tmp_path: Path, template: str) -> None:
    with pytest.raises(DatasetError, match="line 17: the chat template refuses"):
        render(conversation("Hi", "Hello", line=17), tokenizer_with(tmp_path, template))


def test_template_that_hides_where_a_response_begins_is_refused(tmp_path: Path) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DatasetError, match="line 3: .*does not show where a response begins"):
        render(conversation("Hi", "Hello", line=3), tokenizer_with(tmp_path, template))


def test_white_space_of_a_response_is_learnt_though_offsets_are_trimmed(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, chat_template=CHATML, trim_offsets=True))
    example = conversation("Hi", "def f():\n\n\n    return 1\n\n")
    assert learnt(render(example, tokenizer), tokenizer) == [example.reference + END]


@pytest.mark.parametrize("response", ["\n\nHello", " Hello", "\n", "\n\n\n"])
def test_response_that_begins_with_white_space_is_no_part_of_the_prompt(chatml: Any, response: str) -> None:
    """The template's own newline and the response's would be one token in a text that is encoded as a whole."""
    example = conversation("Hi", response, "and?", response)
    rendered, prompt = render(example, chatml), prompt_ids(example, chatml)
    assert learnt(rendered, chatml) == [response + END] * 2
    assert list(rendered.token_ids[: len(prompt)]) == prompt


def test_tokenizer_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)
    folder = tokenizer_folder(tmp_path / "endless")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no end token"):
        load_tokenizer(folder)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)
SPACED = st.lists(st.sampled_from(["\n", " ", "\t", "fox", "é", "😀"]), min_size=1, max_size=6).map("".join)


@settings(max_examples=FUZZED, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS | SPACED), min_size=1, max_size=3))
def test_learnt_text_is_the_responses_whatever_they_hold(
    chatml: Any, alpaca: Any, turns: list[tuple[str, str]]
) -> None:
    example = conversation(*(text for turn in turns for text in turn))
    rendered = render(example, chatml)
    assert "".join(learnt(rendered, chatml)) == "".join(response + END for _, response in turns)
    assert chatml.decode(rendered.token_ids.tolist()) == rendered.text


@settings(max_examples=FUZZED, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS | SPACED), min_size=1, max_size=3))
def test_prompt_has_the_same_tokens_in_training_and_generation(
    chatml: Any, alpaca: Any, turns: list[tuple[str, str]]
) -> None:
    example = conversation(*(text for turn in turns for text in turn))
    for tokenizer in (chatml, alpaca):
        rendered, prompt = render(example, tokenizer), prompt_ids(example, tokenizer)
        assert list(rendered.token_ids[: len(prompt)]) == prompt
        assert rendered.supervised[len(prompt)]
        assert all(rendered.supervised[len(prompt) : -1])


ROLES = st.sampled_from(["system", "user", "assistant", "tool", "text"])


@settings(max_examples=FUZZED, deadline=None)
@given(
    messages=st.lists(st.builds(Message, ROLES, TEXTS | SPACED | st.just("")), min_size=1, max_size=5),
    extra=st.just("") | TEXTS,
    name=st.sampled_from(TEMPLATES),
    loss_on=st.sampled_from(["all_responses", "last_response", "everything"]),
)
def test_any_conversation_is_rendered_or_refused_in_words_alone_and_in_a_batch(
    folder: Path, messages: list[Message], extra: str, name: str, loss_on: str
) -> None:
    example, other = Example(7, tuple(messages), extra), conversation("Hi", "Hello")
    if not example.is_text and not any(message.role == "assistant" for message in messages):
        return  # reading refuses such a row
    tokenizer = load_tokenizer(folder, name)
    first, found, last = render_many([other, example, other], tokenizer, loss_on=loss_on)
    assert first.text == last.text and (first.token_ids == last.token_ids).all()
    if isinstance(found, Refused):
        assert found.line == 7 and "line 7" in found.problem
        return
    alone = render(example, tokenizer, loss_on=loss_on)
    assert (alone.token_ids == found.token_ids).all() and (alone.supervised == found.supervised).all()
    assert len(found.token_ids) == len(found.supervised) == len(found.spans)
    assert found.supervised.any() and found.end_position < len(found.token_ids)
