"""Chat templates by name, or typed in: how a conversation is written. Jinja in a sandbox; knows no tokenizer and no row."""

import re
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_core.errors import ConfigError

MODEL = "model"
# The prompt of Stanford Alpaca (Taori et al. 2023) as a chat template, later turns appended. As such it is saved
# with the adapter, so that inference uses what training used.
ALPACA = (
    "{{ bos_token or '' }}Below is an instruction that describes a task"
    "{% if messages[0].input %}, paired with an input that provides further context{% endif %}. "
    "Write a response that appropriately completes the request."
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'user' %}"
    "{{ '\\n\\n### Instruction:\\n' }}{{ message.content }}"
    "{% if message.input %}{{ '\\n\\n### Input:\\n' }}{{ message.input }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
    "{% else %}{{ '\\n\\n' }}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
# OpenAI's ChatML, as Qwen and SmolLM write it, without a system prompt of its own.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
LLAMA3 = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# https://docs.mistral.ai/guides/tokenization/ (v1): the system prompt stands before the first question.
MISTRAL = (
    "{{ bos_token or '' }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content ~ '\n\n' %}"
    "{% elif message.role == 'user' %}[INST] {{ ns.system }}{{ message.content }} [/INST]{% set ns.system = '' %}"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
    "{% else %}{{ raise_exception('the Mistral template knows system, user and assistant, not ' ~ message.role) }}{% endif %}"
    "{% endfor %}"
)
# https://huggingface.co/HuggingFaceH4/zephyr-7b-beta
ZEPHYR = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_NAMED = {"alpaca": ALPACA, "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "zephyr": ZEPHYR}
# The mark that ends a turn in templates that have one of their own.
_END_MARKS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
NAMES = {
    "alpaca": "Alpaca template",
    "chatml": "ChatML template",
    "llama3": "Llama-3 template",
    "mistral": "Mistral template",
    "zephyr": "Zephyr template",
}


def template_text(template: str, tokenizer: Any) -> str:
    """The Jinja text of a template by name, of one typed in, or of the model's own (Alpaca's where it has none).

    Where the model has no token for a named template's end of turn, its own end token stands there: pieces of text would
    never stop a generation. Raises ConfigError for a Jinja text that does not parse.
    """
    if template == MODEL:
        return tokenizer.chat_template or ALPACA
    if template not in _NAMED:
        check(template)
        return template
    text, mark = _NAMED[template], _END_MARKS.get(template, "")
    if mark and mark not in tokenizer.get_vocab():
        text = text.replace(mark, "{{ eos_token }}")
    return text


def check(template: str) -> None:
    """Raises ConfigError with the line where a Jinja text does not parse, or never writes a message."""
    # transformers knows two tags more, which change nothing of what is written.
    plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", template)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        environment.parse(plain)
    except TemplateSyntaxError as error:
        raise ConfigError(f"template, line {error.lineno}: {error.message}") from None
    if "messages" not in template:
        raise ConfigError("template: never uses 'messages', so every row would look the same; see the built-in ones")


def error_text(error: Exception) -> str:
    """What a template said while it was filled, with its line where that can be told."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    reason = re.sub(r"\s+", " ", str(error)) or type(error).__name__
    return f"line {line}: {reason}" if line else reason
