"""The Python that a reader of a card loads the model with. A test runs what is written here."""

from qlora_core.model_card.facts import ADAPTER, Facts
from qlora_core.model_card.markdown import literal

DTYPES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}


def loading_code(facts: Facts) -> str:
    """Loads the tokenizer and the model, and lets it answer."""
    parts = [_of_adapter(facts) if facts.what == ADAPTER else _of_merged(facts), _answering(facts)]
    return "\n\n".join(parts)


def in_4_bits(facts: Facts) -> bool:
    """Whether one plain configuration of bitsandbytes holds the base as it was held in training."""
    config = facts.config
    return config.method == "qlora" and config.quantize_modules == "all" and not config.int8_modules


def _of_adapter(facts: Facts) -> str:
    config, dtype = facts.config, DTYPES[facts.info.get("compute_dtype", "bf16")]
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if in_4_bits(facts) else "")
    base = facts.base.hub_id or facts.base.name
    lines = ["import torch", "from peft import PeftModel", f"from transformers import {names}", ""]
    remark = "" if facts.base.hub_id else "  # a folder of the publisher: put your copy's path here"
    lines += [f"base_id = {literal(base)}{remark}", f"adapter_id = {literal(facts.repo_id)}"]
    options = [f"dtype={dtype}"]
    if facts.base.hub_id and facts.base.revision:
        options.append(f"revision={literal(facts.base.revision)}")
    if in_4_bits(facts):
        lines += [
            "quantization = BitsAndBytesConfig(  # as in training; leave it out for 16 bits, which answer a little otherwise",
            f'    load_in_4bit=True, bnb_4bit_quant_type="{config.quant_type}", bnb_4bit_use_double_quant={config.double_quant},',
            f"    bnb_4bit_compute_dtype={dtype},",
            ")",
        ]
        options.append("quantization_config=quantization")
    lines += [
        "tokenizer = AutoTokenizer.from_pretrained(adapter_id)",
        f"base = AutoModelForCausalLM.from_pretrained(base_id, {', '.join(options)})",
        "model = PeftModel.from_pretrained(base, adapter_id)",
    ]
    return "\n".join(lines)


def _of_merged(facts: Facts) -> str:
    return "\n".join([
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model_id = {literal(facts.repo_id)}",
        "tokenizer = AutoTokenizer.from_pretrained(model_id)",
        'model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto")',
    ])  # fmt: skip


def _answering(facts: Facts) -> str:
    if has_chat_template(facts):
        asked = [
            'messages = [{"role": "user", "content": "Hello"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ").to(model.device)",
        ]
    else:
        asked = ['inputs = tokenizer("Hello", return_tensors="pt").to(model.device)']
    return "\n".join([
        *asked,
        "answer = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ])  # fmt: skip


def has_chat_template(facts: Facts) -> bool:
    """Whether the tokenizer that is published writes conversations as training did."""
    from qlora_core.data.detection import TEXT

    if facts.dataset.form == TEXT:
        return False
    folder = facts.run.adapter
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return '"chat_template"' in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    except OSError:
        return False
