"""Rows of every form become the same conversations; what cannot be read so is told, and what is not read is counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import CHATML, alpaca, tokenizer_folder, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data.detection import ALPACA, BY_HAND, MESSAGES, SHAREGPT, TEXT, columns_text, detect, parse_columns
from qlora_core.data.formats import read_rows, row_of
from qlora_core.data.inspection import inspect
from qlora_core.data.rows import Example, Message, Problem
from qlora_core.errors import DatasetError
from qlora_core.tokens import load_tokenizer, prompt_ids, render

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
HI = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def read(folder: Path, rows: list[Any], **options: Any) -> list[Example | Problem]:
    return list(read_rows(write_rows(folder / "rows.jsonl", rows), **options)[1])


def turns(example: Example | Problem) -> list[tuple[str, str]]:
    assert isinstance(example, Example), example
    return [(message.role, message.content) for message in example.messages]


def test_sharegpt_speakers_become_roles_and_all_turns_stay(tmp_path: Path) -> None:
    talk = [("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    row = {"conversations": [{"from": who, "value": text} for who, text in talk], "system": "Be brief.", "id": 7}
    (example,) = read(tmp_path, [row])
    assert turns(example) == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
    ]  # fmt: skip
    assert example.form == SHAREGPT and example.columns == {"id": 7}


def test_openai_tool_calls_and_answers_are_kept(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "dry."}]},
    ]
    (example,) = read(tmp_path, [{"messages": messages, "tools": [WEATHER]}])
    assert turns(example)[1:] == [("assistant", ""), ("tool", ""), ("assistant", "It is \ndry.")]
    assert json.loads(example.messages[1].tool_calls) == [{"name": "weather", "arguments": {"city": "Bern"}}]
    assert json.loads(example.tools) == [WEATHER]
    assert "tool_call_id of messages" in example.columns, "what is not read is counted"


def test_sharegpt_function_calls_become_tool_calls(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "Dry."},
        ],
        "tools": json.dumps([WEATHER]),
    }
    (example,) = read(tmp_path, [row])
    assert [message.role for message in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert "weather" in example.messages[1].tool_calls and example.tools


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no prompt"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "not text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "wrong type"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [1]}]}, "wrong type"),
        ({"messages": "[1"}, "not JSON"),
        ({"messages": HI, "tools": "[{'name': 'f'}]"}, "not JSON"),
        ({"messages": [*HI, {"role": "assistant", "content": "x", "tool_calls": "[{'name': 'f'}]"}]}, "not JSON"),
        ({"text": "  "}, "empty text"),
        ({"text": "a", "deep": nested(200)}, "nested too deeply"),
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "tools": [nested(200)],
            },
            "nested too deeply",
        ),
        ({"instruction": "a", "output": "b", "system": 3}, "wrong type"),
    ],
)
def test_what_no_conversation_can_be_made_of_is_told(tmp_path: Path, row: dict[str, Any], kind: str) -> None:
    (problem,) = read(tmp_path, [row])
    assert isinstance(problem, Problem) and problem.kind == kind and problem.line == 1


@given(names=st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_a_column_of_any_name_can_be_chosen(names: list[str]) -> None:
    columns = dict(zip(("prompt", "response"), names, strict=True))
    assert parse_columns(columns_text(columns)) == columns


def test_names_with_commas_stand_in_quotes(tmp_path: Path) -> None:
    columns = {"prompt": "question, short", "response": "answer", "input": 'a "b", c=d '}
    text = 'prompt="question, short", response=answer, input="a ""b"", c=d "'
    assert parse_columns(text) == columns and columns_text(columns) == text
    assert parse_columns('prompt=6" pipe, response=a=b,') == {"prompt": '6" pipe', "response": "a=b"}
    (row,) = read(tmp_path, [{name: "x" for name in columns.values()}], columns=text)
    assert turns(row) == [("user", "x"), ("assistant", "x")]


def test_input_is_empty_only_where_there_is_one(tmp_path: Path) -> None:
    without = {"instruction": "a", "output": "b"}
    assert inspect(write_rows(tmp_path / "rows.jsonl", [without, without])).empty_fields == {}
    assert inspect(write_rows(tmp_path / "rows.jsonl", [without | {"input": ""}])).empty_fields == {"input": 1}


def test_the_evaluation_file_is_read_by_the_same_columns(tmp_path: Path) -> None:
    rows = [{"text": "t", "q": f"question {n}", "a": "answer"} for n in range(3)]
    path, columns = write_rows(tmp_path / "rows.jsonl", rows), "prompt=q, response=a"

    def shared(rows: list[Any]) -> int | None:
        found = inspect(path, columns=columns, eval_path=write_rows(tmp_path / "eval.jsonl", rows))
        return found.eval_rows_also_here

    assert shared(rows[:2]) == 2
    assert shared([{"prompt": "question 1", "completion": "answer"}]) == 1
    with pytest.raises(DatasetError, match="no row has a column 'q'"):
        shared([{"z": "question 1"}])


HALF = r'"\ud800"'


@pytest.mark.parametrize(
    "row",
    [
        {"messages": f'[{{"role": "user", "content": {HALF}}}, {{"role": "assistant", "content": "b"}}]'},
        {"messages": f'[{{"role": "user", "content": "a", "x": {HALF}}}, {{"role": "assistant", "content": "b"}}]'},
        {"messages": HI, "tools": f'[{{"name": {HALF}}}]'},
        {"messages": [*HI, {"role": "assistant", "tool_calls": f'{{"name": "f", "arguments": {{"a": {HALF}}}}}'}]},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": f'{{"a": {HALF}}}'}]}]},
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": f'{{"name": "f", "arguments": {{"a": {HALF}}}}}'},
            ]
        },
    ],
)
def test_half_a_character_in_json_inside_of_a_text_is_told(tmp_path: Path, row: dict[str, Any]) -> None:
    report = inspect(write_rows(tmp_path / "rows.jsonl", [row, row]))
    assert [(problem.line, problem.kind) for problem in report.problems] == [
        (1, "control character"),
        (2, "control character"),
    ]


def test_conversational_prompt_and_completion_are_joined(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    assert turns(read(tmp_path, [row])[0]) == [("user", "a"), ("assistant", "b")]


def test_system_and_context_columns_are_used(tmp_path: Path) -> None:
    first, second = read(
        tmp_path, [alpaca(1) | {"system": "Be kind."}, {"instruction": "a", "context": "b", "response": "c"}]
    )
    assert turns(first)[0] == ("system", "Be kind.") and second.input == "b"


# --- detection and columns ---------------------------------------------------------------------------------------------


def test_the_form_is_that_of_most_rows_and_the_reason_is_told(tmp_path: Path) -> None:
    rows = [{"text": "a"}, *(alpaca(n) for n in range(3))]
    report = inspect(write_rows(tmp_path / "rows.jsonl", rows))
    assert report.form == ALPACA and report.detection.reason.startswith(
        "3 of the first 4 rows looked at have 'instruction'"
    )
    assert [(problem.line, problem.kind) for problem in report.problems] == [(1, "mixed formats")]


@pytest.mark.parametrize(
    ("row", "proposal"),
    [
        ({"question": "a", "answer": "b", "id": 1}, {"prompt": "question", "response": "answer"}),
        ({"Query": "a", "Solution": "b", "system_prompt": "c"},
         {"prompt": "Query", "response": "Solution", "system": "system_prompt"}),
        ({"dialogue": [{"role": "user", "content": "a"}]}, {"messages": "dialogue"}),
        ({"article": "a"}, {"text": "article"}),
        ({"x": 1, "y": 2}, {}),
    ],
)  # fmt: skip
def test_other_names_are_proposed_and_never_taken_unasked(
    tmp_path: Path, row: dict[str, Any], proposal: dict[str, str]
) -> None:
    report = inspect(write_rows(tmp_path / "rows.jsonl", [row]))
    assert (report.rows, report.form, report.detection.proposal) == (0, None, proposal)
    assert report.problems[0].kind == "unknown columns"


def test_columns_chosen_by_hand_are_read(tmp_path: Path) -> None:
    rows = [{"q": "a", "ctx": "b", "a": "c", "sys": "d", "id": 1}, {"q": "e", "a": "f"}, {"q": "g"}]
    columns = "prompt=q, response = a, input=ctx, system=sys"
    first, second, third = read(tmp_path, rows, columns=columns)
    assert turns(first) == [("system", "d"), ("user", "a"), ("assistant", "c")] and first.input == "b"
    assert first.form == BY_HAND and first.columns == {"id": 1}
    assert turns(second) == [("user", "e"), ("assistant", "f")]
    assert isinstance(third, Problem) and third.kind == "no response"
    (text,) = read(tmp_path, [{"body": "all of it"}], columns="text=body")
    assert text.is_text and text.reference == "all of it"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("prompt=q", "makes no row"),
        ("prompt=q, answer=a", "'answer=a' is no role=column"),
        ("prompt=q, prompt=b, response=a", "given twice"),
        ("text=q, system=a", "makes no row"),
        ("nonsense", "no role=column"),
        ("messages=q, prompt=a, response=a", "makes no row"),
        ("prompt=q, response=a, tools=q", "makes no row"),
        ("prompt=q, response=q", "reads one column twice"),
        ("prompt=q, response=gone", "no row has a column 'gone'; there are 'q', 'a'"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(columns: str, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        detect([{"q": "x", "a": "y"}], columns=columns)


@given(st.text())
def test_any_text_for_columns_is_read_or_refused(text: str) -> None:
    try:
        assert parse_columns(text)
    except DatasetError as error:
        assert str(error)


# --- what is written is what is read -------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
CALLS = st.builds(
    lambda name, value: json.dumps([{"name": name, "arguments": {"a": value}}], ensure_ascii=False),
    WORDS,
    st.integers(),
)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    form = draw(st.sampled_from([ALPACA, MESSAGES, TEXT]))
    if form == TEXT:
        return Example(1, (Message("text", draw(WORDS)),), form=form)
    system = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
    if form == ALPACA:
        pair = Message("user", draw(WORDS)), Message("assistant", draw(WORDS))
        return Example(1, (*system, *pair), draw(st.just("") | WORDS), form)
    talk = [
        part
        for _ in range(draw(st.integers(1, 3)))
        for part in (
            Message("user", draw(WORDS)),
            Message("assistant", draw(WORDS), draw(st.just("") | CALLS)),
            *([Message("tool", draw(WORDS))] if draw(st.booleans()) else []),
        )
    ]
    tools = json.dumps([WEATHER], ensure_ascii=False) if draw(st.booleans()) else ""
    return Example(1, (*system, *talk), form=form, tools=tools)


@settings(max_examples=500, deadline=None)
@given(example=conversations(), mixed=st.booleans())
def test_a_written_row_is_read_as_the_same_example(
    tmp_path_factory: pytest.TempPathFactory, example: Example, mixed: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    (again,) = read_rows(write_rows(path, [row_of(example, MESSAGES if mixed else example.form)]))[1]
    if mixed and example.input:  # where forms meet, Alpaca's input stands where chat templates put it
        assert again.text == example.text.replace(example.input, f"\n{example.input}", 1) or example.input in again.text
    else:
        assert again.digest() == example.digest()


# --- tokens of what is new ---------------------------------------------------------------------------------------------


def test_a_plain_text_is_learnt_whole_with_its_end(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path, chat_template=CHATML))
    example = Example(3, (Message("text", "The quick brown fox"),))
    rendered = render(example, tokenizer)
    assert rendered.text == "The quick brown fox<|im_end|>" and rendered.supervised.all()
    assert rendered.end_supervised(len(rendered.token_ids))
    with pytest.raises(DatasetError, match="line 3: is plain text.*score to none"):
        prompt_ids(example, tokenizer)


def test_a_template_that_leaves_a_tool_call_out_refuses_the_row(tmp_path: Path) -> None:
    calling = (
        Message("user", "Weather?"),
        Message("assistant", "One moment.", '[{"name": "weather", "arguments": {}}]'),
    )
    silent = load_tokenizer(tokenizer_folder(tmp_path / "silent", chat_template=CHATML))
    with pytest.raises(DatasetError, match="leaves out the call of the tool 'weather'"):
        render(Example(1, calling), silent)
    writes = CHATML.replace(
        "{{ message.content }}<|im_end|>",
        "{{ message.content }}{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}<|im_end|>",
    )
    asked = (Message("user", "Is the weather a tool?"), Message("assistant", "", calling[1].tool_calls))
    with pytest.raises(DatasetError, match="leaves out the call of the tool 'weather'"):
        render(Example(1, asked), silent)  # that the prompt has the word says nothing of the call
    with pytest.raises(DatasetError, match="leaves out the tool 'weather'"):
        render(Example(1, (Message("user", "Hi"), Message("assistant", "No.")), tools=json.dumps([WEATHER])), silent)
    rendered = render(Example(1, calling), load_tokenizer(tokenizer_folder(tmp_path / "writes", chat_template=writes)))
    assert '{"name": "weather", "arguments": {}}' in rendered.text


def test_what_a_response_answers_is_told_with_all_turns_before_it() -> None:
    one = Example(1, (Message("user", "Triage."), Message("assistant", "ok")), input="My parcel is late.")
    assert one.asked == "Triage.\n\nMy parcel is late."
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Why?"), ("assistant", "So.")]
    many = Example(1, tuple(Message(role, text) for role, text in turns))
    assert many.asked == "system: Be short.\n\nuser: Hi\n\nassistant: Hello.\n\nuser: Why?" and many.reference == "So."
