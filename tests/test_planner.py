"""Findings and recommendation: what is warned of, with which numbers and remedy, and what is chosen on which machine."""

from dataclasses import replace

import pytest
from helpers import CHATML, alpaca, tokenizer_folder, write_rows

from qlora_core import config as settings
from qlora_core.config import TrainConfig
from qlora_core.data.formats import read_rows
from qlora_core.data.rows import Example, Message
from qlora_core.data.sample import MARKS, RowFacts, marks_in, sample
from qlora_core.memory import GIB
from qlora_core.planner.facts import Device, Facts, length_for, rank_for
from qlora_core.planner.findings import NOTE, STOP, WARN, findings
from qlora_core.planner.fitting import (
    RankChoice,
    full_fine_tuning_bytes,
    planned,
    rank_for_memory,
    rule_of_thumb_bytes,
    with_settings,
)
from qlora_core.planner.recommendation import recommend
from qlora_core.targets import Architecture, Layer
from qlora_core.tokens import load_tokenizer

CPU = Device("the CPU", 16 * GIB, is_gpu=False, has_bf16=True)
H100 = Device("H100 80GB", 80 * GIB, is_gpu=True, has_bf16=True)
L4 = Device("L4", 24 * GIB, is_gpu=True, has_bf16=True)
T4 = Device("T4", 16 * GIB, is_gpu=True, has_bf16=False)
LICENCE = "apache-2.0"


def shape(hidden: int, layers: int, inner: int, vocabulary: int, key_value: int) -> Architecture:
    """A Llama of these sizes, with heads of 64."""
    parts = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, key_value),
        "self_attn.v_proj": (hidden, key_value),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    body = [Layer(f"model.layers.{i}.{name}", *size) for i in range(layers) for name, size in parts.items()]
    weights = sum(layer.elements for layer in body)
    head = Layer("lm_head", hidden, vocabulary, is_head=True)
    return Architecture(
        model_type="llama", layers=(*body, head), parameters=weights + 2 * vocabulary * hidden,
        vocabulary=vocabulary, hidden_size=hidden, layer_count=layers,
        attention_heads=hidden // 64, key_value_heads=key_value // 64, head_dim=64, intermediate_size=inner,
        fusable=True,
    )  # fmt: skip


LLAMA_8B = shape(4096, 32, 14_336, 128_256, 1024)
LLAMA_70B = shape(8192, 80, 28_672, 128_256, 1024)
SMALL = shape(576, 30, 1536, 49_152, 192)


def rows_of(*tokens: int, first: int | None = 10) -> RowFacts:
    count = len(tokens)
    ends = tuple(length - 1 for length in tokens)
    return RowFacts(tuple(range(1, count + 1)), tokens, (first,) * count, ends, {}, ())


def facts(*, device: Device = CPU, train_rows: int = 1000, rows: RowFacts | None = None, **changed) -> Facts:
    """A run that nothing is to be said of, but for what is changed: fields of Facts, or of TrainConfig."""
    of_facts = {name: changed.pop(name) for name in list(changed) if name in Facts.__dataclass_fields__}
    known = Facts(
        config=TrainConfig(**{"dataset_license": LICENCE, **changed}),
        device=device,
        train_rows=train_rows,
        eval_rows=100,
        free_disk_bytes=500 * GIB,
        rows=rows_of(*[100] * train_rows) if rows is None else rows,
        architecture=SMALL,
        positions=8192,
    )
    return replace(known, **of_facts)


def only(known: Facts):
    (finding,) = findings(known)
    return finding


def test_nothing_is_said_where_nothing_is_wrong():
    assert findings(facts()) == []
    assert findings(facts(device=H100)) == []


@pytest.mark.parametrize(
    ("train_rows", "fits"), [(100, 8), (4999, 8), (5000, 16), (49_999, 16), (50_000, 32), (200_000, 64), (10**7, 64)]
)
def test_rank_fits_the_rows(train_rows, fits):
    few = rows_of(*[100] * 100)
    assert rank_for(train_rows) == fits
    finding = only(facts(train_rows=train_rows, rows=few, rank=fits + 1))
    assert (finding.severity, finding.remedy) == (WARN, {"rank": fits})
    assert f"{train_rows:,} rows" in finding.title and str(fits + 1) in finding.title
    assert findings(facts(train_rows=train_rows, rows=few, rank=fits)) == []


@pytest.mark.parametrize(
    ("changed", "severity", "title", "remedy"),
    [
        ({"lora_alpha": 64}, WARN, "scaled by 8", {"lora_alpha": 16.0}),
        ({"lora_alpha": 2}, WARN, "scaled by 0.25", {"lora_alpha": 16.0}),
        ({"use_rslora": True}, NOTE, "scaled by 5.66", {"lora_alpha": 5.6}),
        ({"lora_dropout": 0.2}, WARN, "dropout is 0.2", {"lora_dropout": 0.05}),
        ({"target_modules": ("q_proj",)}, WARN, "Query and value", {"target_modules": "all-linear"}),
        ({"compute_dtype": "fp32"}, WARN, "fp32", {"compute_dtype": "auto"}),
        ({"learning_rate": 5e-3}, WARN, "0.005", {"learning_rate": 1e-3}),
        ({"learning_rate": 1e-6}, WARN, "1e-06", {"learning_rate": 1e-3}),
        ({"num_epochs": 8}, WARN, "8 passes over 1,000 rows", {"num_epochs": 3.0, "max_steps": None}),
        ({"max_steps": 1000}, WARN, "8 passes", {"num_epochs": 3.0, "max_steps": None}),
        ({"dataset_license": None}, NOTE, "unknown", {}),
        ({"dataset_license": "CC-BY-NC-4.0"}, WARN, "non-commercial (cc-by-nc-4.0)", {}),
        ({"eval_rows_also_trained": 25}, WARN, "25 evaluation rows are also trained on", {}),
        ({"eval_rows": 10, "eval_data": "e.jsonl"}, NOTE, "Only 10 evaluation rows", {}),
        ({"eval_rows": 10}, NOTE, "Only 10 evaluation rows", {"eval_fraction": 0.03}),
        ({"free_disk_bytes": 5 * 1024**2}, STOP, "disk is too small", {"keep_checkpoints": 1}),
        ({"free_disk_bytes": GIB // 4}, WARN, "too small for a merged", {"keep_checkpoints": 1}),
    ],
)  # fmt: skip
def test_each_finding_has_its_number_and_its_remedy(changed, severity, title, remedy):
    known = facts(**changed)
    finding = only(known)
    assert finding.severity == severity and title in finding.title and finding.remedy == remedy
    assert bool(finding.remedy) == bool(finding.remedy_label)
    if remedy and "free_disk_bytes" not in changed and "eval_fraction" not in remedy:
        mended = replace(known, config=settings.replace(known.config, **remedy))
        assert findings(mended) == [], "the remedy mends it"


def test_few_evaluation_rows_name_the_interval_they_leave():
    assert "from 24% to 76%" in only(facts(eval_rows=10)).why


def test_fp32_is_right_where_a_cpu_has_nothing_better():
    assert findings(facts(device=replace(CPU, has_bf16=False), compute_dtype="fp32")) == []


def test_a_gpu_without_bf16_is_told_what_it_will_do():
    finding = only(facts(device=T4))
    assert finding.severity == NOTE and "fp16" in finding.why and "T4" in finding.why


def test_of_a_fused_matrix_groups_take_all_three_and_say_so():
    gpt2 = replace(SMALL, layers=(Layer("h.0.attn.c_attn", 64, 192), Layer("h.0.mlp.c_fc", 64, 256)))
    finding = only(facts(architecture=gpt2, target_modules="query-value"))
    assert finding.severity == NOTE and "one matrix here, c_attn" in finding.title and "all three" in finding.why


LONG = rows_of(*[4000] * 1000)


def on_a_card(gib: float, **changed):
    card = replace(H100, name="a small card", memory_bytes=round(gib * GIB))
    return facts(device=card, architecture=LLAMA_8B, rows=LONG, **{"max_seq_length": 4096, "method": "lora", **changed})


def test_a_run_that_does_not_fit_is_told_what_is_there_and_what_makes_it_fit():
    known = on_a_card(16)
    finding = only(known)
    assert (finding.severity, finding.remedy) == (WARN, {"method": "qlora"})
    assert "does not fit" in finding.title and "a small card has 16.0" in finding.why
    assert planned(replace(known, config=settings.replace(known.config, **finding.remedy))).fits
    assert findings(replace(known, device=replace(H100, memory_bytes=80 * GIB))) == []


def test_a_setting_that_makes_it_not_fit_is_given_back_to_the_planner():
    kept = only(on_a_card(16, method="qlora", activation_checkpointing="none"))
    assert kept.remedy == {"activation_checkpointing": "auto"}
    budget = only(on_a_card(16, method="qlora", token_budget=500_000, rows_per_step=128))
    assert budget.remedy == {"token_budget": None}
    mixed = only(on_a_card(12, method="qlora", quantize_modules="attention"))
    assert mixed.remedy == {"quantize_modules": "all", "int8_modules": ()}


def test_where_nothing_would_make_it_fit_no_button_says_so():
    finding = only(on_a_card(4))
    assert finding.severity == WARN and finding.remedy == {}


def test_a_budget_that_a_person_sets_counts_and_is_named():
    """ "fit in 12 GB" """
    assert planned(on_a_card(80, method="qlora", memory_budget_gib=12.0)).estimate.needed_bytes <= 12 * GIB
    finding = only(on_a_card(80, memory_budget_gib=12.0))
    assert "12.0 GiB of a small card may be used" in finding.why and finding.remedy == {"method": "qlora"}


def test_slower_steps_are_told_with_the_way_around_them():
    finding = only(on_a_card(21))
    assert finding.severity == NOTE and "25 of 32 layers" in finding.why
    assert finding.remedy == {"method": "qlora"}
    assert findings(replace(on_a_card(21), config=settings.replace(on_a_card(21).config, **finding.remedy))) == []
    assert only(on_a_card(10, method="qlora")).remedy == {}


def test_the_rank_for_a_memory_is_the_highest_that_fits_and_no_more_than_the_rows_bear():
    few, many = on_a_card(80, train_rows=1000), on_a_card(80, train_rows=300_000)
    assert rank_for_memory(few) == RankChoice(256, 8) and rank_for_memory(few).rank == 8
    assert rank_for_memory(many).rank == 64
    tight = replace(many, config=settings.replace(many.config, method="qlora", memory_budget_gib=8.0))
    largest = rank_for_memory(tight).largest
    assert 4 <= largest < 64
    assert planned(with_settings(tight, rank=largest)).fits and not planned(with_settings(tight, rank=2 * largest)).fits
    assert rank_for_memory(on_a_card(2)).rank is None


def test_what_others_would_need_is_the_published_arithmetic():
    """780 GB for 65B in full (QLoRA paper); 24krd for square matrices alone."""
    giant = replace(LLAMA_8B, parameters=65_000_000_000)
    assert full_fine_tuning_bytes(giant) == 780 * 10**9
    config = TrainConfig(method="lora", rank=16)
    assert rule_of_thumb_bytes(LLAMA_8B, config) == 2 * LLAMA_8B.parameters + 24 * 224 * 16 * 4096
    thumb = rule_of_thumb_bytes(LLAMA_8B, settings.replace(config, method="qlora"))
    assert thumb == pytest.approx(0.52 * LLAMA_8B.parameters + 24 * 224 * 16 * 4096, abs=1)


# Rows


def test_rows_without_a_token_to_learn_from_are_listed_and_all_of_them_stop():
    some = RowFacts((3, 5, 9), (50, 600, 50), (10, 520, 10), (49, 599, 49), {}, ())
    bare = next(f for f in findings(facts(rows=some, train_rows=3)) if "teach nothing" in f.title)
    assert bare.severity == WARN and "line 5" in bare.why and bare.remedy == {"max_seq_length": 640}
    every = findings(facts(rows=rows_of(50, 60, first=None), train_rows=2))[0]
    assert (every.severity, every.remedy) == (STOP, {}) and "lines 1, 2" in every.why


def test_rows_that_are_cut_are_counted_with_a_length_that_holds_them():
    finding = findings(facts(rows=rows_of(*[100] * 96, 700, 700, 700, 700), train_rows=100))[0]
    assert "4 rows (4.0%)" in finding.title and finding.remedy == {"max_seq_length": 704}
    assert findings(facts(rows=rows_of(600, 600), train_rows=2, positions=512))[0].remedy == {}, (
        "the model holds no more"
    )


def test_ends_that_are_not_learnt_are_told():
    known = facts(rows=RowFacts((1, 2), (50, 60), (10, 10), (None, 59), {}, ()), train_rows=2)
    finding = only(known)
    assert finding.severity == WARN and "end of 1 response" in finding.title and "line 1" in finding.why


def test_rows_that_the_template_refuses_stop_unless_they_may_be_left_out():
    refused = replace(rows_of(100, 100), refused=("line 3: the model's chat template refuses the row: roles",))
    assert only(facts(rows=refused, train_rows=3)).severity == STOP
    assert only(facts(rows=refused, train_rows=3, skip_bad_rows=True)).severity == WARN


def test_a_finding_on_a_sample_says_so():
    finding = findings(facts(rows=rows_of(*[600] * 50), train_rows=9000))[0]
    assert finding.why.startswith("Of the first 50 rows looked at")
    assert not findings(facts(rows=rows_of(*[600] * 50), train_rows=50))[0].why.startswith("Of the first")


MARKED = {
    "Alpaca (### Instruction:)": "Below is …\n\n### Instruction:\nSay a.",
    "ChatML (<|im_start|>)": "<|im_start|>user\nSay a.<|im_end|>",
    "Llama 2 ([INST])": "[INST] Say a. [/INST]",
    "Llama 3 (<|start_header_id|>)": "<|start_header_id|>user<|end_header_id|>\n\nSay a.<|eot_id|>",
    "Gemma (<start_of_turn>)": "<start_of_turn>user\nSay a.<end_of_turn>",
    "Phi (<|assistant|>)": "<|user|>\nSay a.<|assistant|>",
    "Human:/Assistant:": "Human: Say a.\n\nAssistant: a",
}


@pytest.mark.parametrize("name", MARKS)
def test_marks_of_every_template_are_seen(name):
    assert marks_in(Example(1, (Message("user", MARKED[name]), Message("assistant", "a")))) == [name]
    plain = "The [list] of <b> tags; # heading\nHuman: beings\n## Instruction manual"
    assert marks_in(Example(1, (Message("user", plain), Message("assistant", "a")))) == []


def test_several_templates_in_one_file_are_worse_than_one():
    one = only(facts(rows=replace(rows_of(100, 100), marks={"ChatML": (2,)}), train_rows=2))
    assert "1 row with marks" in one.title and "wrapped twice" in one.why and "line 2" in one.why
    both = only(facts(rows=replace(rows_of(100, 100), marks={"ChatML": (2,), "Gemma": (1, 2)}), train_rows=2))
    assert "2 prompt templates are mixed" in both.title and "Gemma in 2 rows" in both.why


def test_a_sample_of_rows_has_what_the_findings_need(tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "chatml", chat_template=CHATML))
    path = write_rows(tmp_path / "rows.jsonl", [alpaca(1), {"bad": 1}, alpaca(2, input="[INST] x [/INST]")])
    found = sample((row for row in read_rows(path)[1] if isinstance(row, Example)), tokenizer)
    assert found.lines == (1, 3) and found.marks == {"Llama 2 ([INST])": (3,)} and found.refused == ()
    for length, first, end in zip(found.tokens, found.first_supervised, found.end_supervised, strict=True):
        assert 0 < first < end < length
    whole, end = max(found.tokens), found.end_supervised[0]
    assert found.endless_lines(whole) == [] and 1 in found.endless_lines(end)
    assert found.bare_lines(found.first_supervised[0]) == [1, 3]


# Recommendation


def test_lora_is_chosen_where_the_16_bit_base_fits_and_qlora_where_4_bits_do():
    def method(device: Device, architecture: Architecture) -> str | None:
        return recommend(facts(device=device, architecture=architecture, rows=rows_of(*[200] * 1000))).method

    assert [method(device, LLAMA_8B) for device in (H100, L4, T4)] == ["lora", "lora", "qlora"]
    assert method(H100, LLAMA_70B) == "qlora" and method(L4, LLAMA_70B) is None
    assert method(CPU, SMALL) == "lora"


def test_neither_names_the_size_that_would_fit():
    found = recommend(facts(device=L4, architecture=LLAMA_70B))
    (remark,) = found.remarks
    assert "Neither LoRA nor QLoRA fits" in remark and "L4" in remark and "B would fit" in remark
    assert "method" not in found.values()


def test_very_many_rows_are_told_of_full_fine_tuning():
    assert "full fine-tuning" in recommend(facts(train_rows=10**6, rows=rows_of(*[100] * 100))).remarks[0]


@pytest.mark.parametrize("train_rows", [12, 1000, 20_000, 300_000])
@pytest.mark.parametrize("architecture", [SMALL, LLAMA_8B, None], ids=["135M", "8B", "unknown"])
@pytest.mark.parametrize("device", [CPU, T4, H100], ids=lambda device: device.name)
def test_what_is_recommended_leaves_nothing_to_warn_of(train_rows, architecture, device):
    """Whatever was in the form before."""
    wrong = {
        "rank": 512, "lora_alpha": 7, "lora_dropout": 0.4, "target_modules": ("k_proj",), "learning_rate": 0.05,
        "num_epochs": 50, "max_seq_length": 20, "compute_dtype": "fp32", "use_rslora": True,
        "method": "lora", "init_lora_weights": "pissa",
    }  # fmt: skip
    rows = rows_of(*[300] * min(train_rows, 2000))
    known = facts(device=device, train_rows=train_rows, architecture=architecture, rows=rows, **wrong)
    found = recommend(known)
    assert all(change.reason and len(change.reason.splitlines()) == 1 for change in found.changes)
    if found.method is None:
        return
    after = findings(replace(known, config=settings.replace(known.config, **found.values())))
    assert [finding.title for finding in after if finding.severity != NOTE] == []


@pytest.mark.parametrize(
    ("tokens", "positions", "length"),
    [
        ([100] * 50, None, 128),
        ([100] * 99 + [900], None, 128),
        ([100] * 9 + [150], None, 192),
        ([3000] * 5, 2048, 2048),
    ],
)
def test_row_length_holds_the_rows_within_the_models_positions(tokens, positions, length):
    assert length_for(rows_of(*tokens), positions) == length
