"""Templates by name and typed in: written as their models know them, in a sandbox, with errors that name their line."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import CHATML, tokenizer_folder

from qlora_core import templates
from qlora_core.config import TEMPLATES, TrainConfig
from qlora_core.data.rows import Example, Message
from qlora_core.errors import ConfigError, DatasetError
from qlora_core.tokens import EVERYTHING, LAST_RESPONSE, end_token, load_tokenizer, prompt_ids, render, template_name

TALK = Example(
    4,
    (
        Message("system", "Be brief."),
        Message("user", "One?"),
        Message("assistant", "First."),
        Message("user", "Two?"),
        Message("assistant", "Second."),
    ),
)
WRITTEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nFirst.<|im_end|>\n"
    "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nSecond.<|im_end|>\n",
    "zephyr": "<|system|>\nBe brief.<|im_end|>\n<|user|>\nOne?<|im_end|>\n<|assistant|>\nFirst.<|im_end|>\n"
    "<|user|>\nTwo?<|im_end|>\n<|assistant|>\nSecond.<|im_end|>\n",
    "mistral": "<|im_start|>[INST] Be brief.\n\nOne? [/INST] First.<|im_end|>[INST] Two? [/INST] Second.<|im_end|>",
    # The tokenizer has no <|eot_id|>, so its own end token ends a turn.
    "llama3": "<|im_start|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|im_end|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne?<|im_end|><|start_header_id|>assistant<|end_header_id|>\n\nFirst.<|im_end|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|im_end|><|start_header_id|>assistant<|end_header_id|>\n\nSecond.<|im_end|>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("model"), chat_template=CHATML)


def learnt(rendered: Any, tokenizer: Any) -> str:
    return tokenizer.decode([int(t) for t, on in zip(rendered.token_ids, rendered.supervised, strict=True) if on])


@pytest.mark.parametrize("name", WRITTEN)
def test_a_named_template_is_written_as_its_models_know_it(folder: Path, name: str) -> None:
    tokenizer = load_tokenizer(folder, name)
    rendered = render(TALK, tokenizer)
    assert rendered.text == WRITTEN[name]
    assert learnt(rendered, tokenizer).replace(" ", "") == "First.<|im_end|>Second.<|im_end|>"
    assert rendered.end_supervised(len(rendered.token_ids))


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_gives_generation_the_prompt_of_training(folder: Path, name: str) -> None:
    tokenizer = load_tokenizer(folder, name)
    rendered, prompt = render(TALK, tokenizer), prompt_ids(TALK, tokenizer)
    assert rendered.token_ids[: len(prompt)].tolist() == prompt
    assert rendered.supervised[len(prompt)] and template_name(tokenizer, name)


def test_loss_on_the_last_response_or_on_everything(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, "chatml")
    assert learnt(render(TALK, tokenizer, loss_on=LAST_RESPONSE), tokenizer) == "Second.<|im_end|>"
    assert render(TALK, tokenizer, loss_on=EVERYTHING).supervised.all()


def test_a_template_of_ones_own_is_used(folder: Path) -> None:
    own = "{% for m in messages %}{{ m.role }}> {{ m.content }}{{ eos_token }}{% endfor %}"
    own += "{% if add_generation_prompt %}assistant> {% endif %}"
    tokenizer = load_tokenizer(folder, own)
    assert render(TALK, tokenizer).text.endswith("assistant> Second.<|im_end|>")
    assert template_name(tokenizer, own) == "a chat template of your own"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}\n{{ m.role }", "template, line 2"),
        ("\n\n{% if messages %}", "template, line 3"),
        ("{{ 'always the same' }}", "never uses 'messages'"),
    ],
)
def test_a_template_that_does_not_parse_names_its_line(folder: Path, template: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_tokenizer(folder, template)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages }}\n{{ messages[9].content.missing }}", "line 4: the chat template refuses the row: line 2:"),
        ("{{ messages }}\n\n{{ 1 / 0 }}", "line 3: division by zero"),
        ("{{ messages }}{{ raise_exception('no system prompt') }}", "no system prompt"),
        # What a sandbox is for.
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages }}{{ ''.__class__.__base__ }}{{ cycler.__init__.__globals__.os.popen('id').read() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{% for i in range(10000000) %}{{ messages }}{% endfor %}", "refuses"),
        ("{{ messages | dictsort }}", "refuses"),
        ("{{ messages }}{{ cycler() }}", "refuses"),
        # It learns where nothing is said.
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves the response out",
        ),
    ],
)
def test_a_template_that_fails_on_a_row_says_where_and_reaches_nothing(folder: Path, template: str, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        render(TALK, load_tokenizer(folder, template))


def test_a_name_that_is_no_template_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="template is 'chatlm'; choose one of model, alpaca"):
        TrainConfig(template="chatlm")
    assert TrainConfig(template=templates.ALPACA).template == templates.ALPACA


def test_generation_is_told_the_end_that_the_template_teaches(tmp_path: Path) -> None:
    """With a template of another family the response ends with its mark, which need not be the model's end token."""
    other = tokenizer_folder(tmp_path, chat_template=CHATML)
    settings = json.loads((other / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    for template, end in (("chatml", "<|im_end|>"), ("zephyr", "<|endoftext|>"), ("alpaca", "<|endoftext|>")):
        tokenizer = load_tokenizer(other, template)
        assert tokenizer.convert_ids_to_tokens(end_token(TALK, tokenizer)) == end
