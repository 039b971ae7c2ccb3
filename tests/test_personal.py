"""Personal data: real-world notations are found and masked, what only looks like them stays, and no text takes long. Only
published test numbers: example.com, 555-01xx and what Ofcom, ARCEP and libphonenumber give as examples."""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

import phonenumbers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.data import personal
from qlora_core.data.claims import Found
from qlora_core.data.personal import KINDS, engine_name, find, mask

EMAILS = (
    "jane@example.com|jane.doe+tag@mail.example.co.uk|o'brien@example.org|JANE_DOE@EXAMPLE.COM|j@xn--bcher-kva.example"
    "|josé@example.com|用户@例子.中国|50%off@example.shop|jane＠example.com"
)
PHONES = (
    "(212) 555-0123|212-555-0123|212.555.0123|1-800-555-0199|+1 212 555 0123|+12125550123|+1 (555) 123-4567|(555) 123-4567"
    "|212-555-0123 ext. 45|212-555-0123x45|+44 20 7946 0018|+44 (0)20 7946 0018|020 7946 0018|(020) 7946 0018|07700 900123"
    "|01632 960123|0044 20 7946 0018|+33 1 99 00 12 34|01 99 00 12 34|01.99.00.12.34|06-39-98-12-34|06 12 34 56 78"
    "|+49 30 23125 123|030 23125 123|030/23125123|044 668 18 00|0470 12 34 56|02 5550 1234|0491 570 156|03-1234-5678"
    "|090-1234-5678|(11) 91234-5678|+55 11 91234-5678|+91 98765 43210|081234 56789|+34 612 345 678|06-12345678"
    "|0812-3456-7890|+86 131 2345 6789|+966 51 234 5678|０２０ ７９４６ ００１８|06\xa012\xa034\xa056\xa078|212‑555‑0123"
    "|+٤٤ ٢٠ ٧٩٤٦ ٠٠١٨"
)
NAMED_PHONES = (
    "Phone: ~98765 43210|tel. ~12 34 56 78|mobile ~9876543210|Please call ~4155550123|call me: ~555-0123|fax=~07700900123"
    "|WhatsApp ~612 345 678|Tél : ~01 23 45 67 89|Teléfono: ~912 34 56 78|Handy: ~01711234567|手机~13800138000"
    '|"phone_number": "~9876543210|тел. ~8 912 345 67 89'
)
CARDS = (
    "4111 1111 1111 1111|4111-1111-1111-1111|4111111111111111|4222222222222|5555555555554444|5555 5555 5555 4444"
    "|2223003122003222|378282246310005|3782 822463 10005|6011 1111 1111 1117|30569309025904|3056 930902 5904"
    "|3530111333300000|6205500000000000004|6205 5000 0000 0000 004|6304 0000 0000 0000|４１１１ １１１１ １１１１ １１１１"
)
IBANS = (
    "GB82 WEST 1234 5698 7654 32|GB82WEST12345698765432|de89 3704 0044 0532 0130 00|FR14 2004 1010 0505 0001 3M02 606"
    "|NO93 8601 1117 947|MT84 MALT 0110 0001 2345 MTLC AST0 01S|NL91-ABNA-0417-1643-00|CH93 0076 2011 6238 5295 7"
    "|BR15 0000 0000 0000 1093 2840 814P 2|ES91 2100 0418 4502 0005 1332|PL61 1090 1014 0000 0712 1981 2874"
)
IPS = (
    "192.0.2.1|198.51.100.77|10.0.0.1|192.168.1.20|2001:db8::1|2001:DB8::8a2e:370:7334|fe80::1|fd12:3456:789a::1"
    "|2001:0db8:85a3:0000:0000:8a2e:0370:7334"
)
NATIONAL_IDS = (
    "536-90-4399|912-78-1234|AB123456C|AB 12 34 56 C|QQ 12 34 56 C|54362315K|54.362.315-K|X2482300W|X-2482300-W"
    "|2 95 10 99 126 111 93|295109912611193|253072B07300470|RCCMNL83S18D969H|390.533.447-05|85.07.30-033.28"
    "|756.9217.0769.85|880320-0016|131052-308T|131052A308T|971013-9019902|11010519491231002X|ACUPA7085R"
    "|BOXW310820HNERXN09|12.531.909-2"
)
NAMED_IDS = (
    "SSN ~536904399|social security number: ~536 90 4399|NHS number ~943 476 5870|BSN: ~111222333|PESEL ~44051401359"
    "|CPF ~39053344705|Aadhaar no. ~2341 2341 2346|Steuer-ID ~36 574 261 809|SIN ~123 456 782|tax file number ~123 456 782"
    "|TCKN: ~17291716060|CPR ~211062-5629|fødselsnummer ~151086 95088|CNP ~1630615123457|ID number ~7503305044089"
)
FOUND = [
    (kind, text)
    for kind, texts in zip(KINDS, (EMAILS, PHONES, CARDS, IBANS, IPS, NATIONAL_IDS), strict=True)
    for text in texts.split("|")
]
NAMED = [("phone", text) for text in NAMED_PHONES.split("|")] + [("national_id", text) for text in NAMED_IDS.split("|")]
INNOCENT = (
    "2024-01-15|2024-01-15 10:30:00|2015-02-02 00:05:05.000005005|15/01/2024 0800|01-02-2024 12:30|01.02.2024|1999-2003"
    "|phone 1999-2003|tel 2024-01-15|years 2001, 2005 and 2010|$1,234,567.89|$ 1234567890|€4111111111111111|order #123456789"
    "|phone order #1234567890|3.14159265358979|0.123456789012|x = 0.4111111111111111|978-3-16-148410-0|ISBN 0-306-40615-2"
    "|0 306 40615 2|9783161484100|4006381333931|12345 + 67890 = 80235|5+12 = 17, 2 + 447911123456|<<900-300-1000=-400>>"
    "|1000000|1 000 000 000|call it 1000 2000 times|version 1.2.3.4|v4.5.103.35|1.7.12.3|Chrome/114.0.5735.90|numpy==1.26.4.50"
    "|1.3.6.1.4.1.311|127.0.0.1|0.0.0.0|255.255.255.0|256.1.1.300|a[10::2]|std::vector<int>|abc::def|12:30:45"
    "|00:1A:2B:3C:4D:5E|550e8400-e29b-41d4-a716-446655440000|12345678-1234-1234-1234-123456789012|01 02 03 04 05"
    "|05 12 23 34 41|7f 45 02 01 04 03 06 05 08|0110 1001 1010 0101|Boston, MA 02110-1301|0x12345678901234"
    "|deadbeef1234567890123|1234567890|0123456789|text.strip('0123456789')|1700000000000|1 2 3 4 5 6 7 8 9 10"
    "|5 10 15 20 25 30 35 40 45|200 300 4000 500|4111 1111 1111 1112|GB82 WEST 1234 5698 7654 33|https://example.com/2020/08/25/904005823"
    "|for i in range(1000000, 2000000):|09.30 10.45 11.00 12.15|10-20-30-40-50|555-0123|000-12-3456|12345678A|sin(1234567890)"
    "|@app.route('/x')|x@W.sum(0)|x@W.T.mean(-1)|icon@2x.png|git@github.com:owner/name.git|me@localhost|react@18.2.0|@jane|a @ b.c"
)


@pytest.mark.parametrize(("kind", "text"), FOUND)
def test_found_whole_in_prose(kind: str, text: str) -> None:
    """Neighbours that a row has: a sentence's full stop, brackets, quotes, commas of a table, a script without spaces."""
    for before, after in (
        ("", ""),
        ("It is ", "."),
        ('"', '"'),
        ("x,", ",y"),
        ("(", ")"),
        ("\n", "\nBye"),
        ("は", "です"),
    ):
        if kind == "email" and after == "です":
            continue  # letters of any script may be part of an address
        line = before + text + after
        assert [(found.kind, line[found.start : found.end]) for found in find(line)] == [(kind, text)], line
        assert mask(line) == (f"{before}[{kind.upper()}]{after}", Counter({kind: 1}))


@pytest.mark.parametrize(("kind", "text"), NAMED)
def test_plain_digits_are_found_behind_the_word_that_names_them(kind: str, text: str) -> None:
    word, number = text.split("~")
    assert mask(word + number + ".") == (f"{word}[{kind.upper()}].", Counter({kind: 1}))


@pytest.mark.parametrize("text", INNOCENT.split("|"))
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert find(text) == []
    assert find(f"So {text}, he said.") == []


def test_phones_of_every_country_with_plus() -> None:
    missed = []
    for region in phonenumbers.SUPPORTED_REGIONS:
        number = phonenumbers.example_number(region)
        for style in (phonenumbers.PhoneNumberFormat.E164, phonenumbers.PhoneNumberFormat.INTERNATIONAL):
            text = phonenumbers.format_number(number, style)
            if mask(f"at {text}.")[0] != "at [PHONE].":
                missed.append(region)
    assert set(missed) <= {"NU", "TA", "TK"}  # islands with numbers of four digits


def test_several_in_one_text_with_offsets_of_the_text_itself() -> None:
    text = "Zoë 🙂 日本: jane@example.com, ０２０ ７９４６ ００１８ / 4111 1111 1111 1111; IP 192.0.2.1"
    values = ["jane@example.com", "０２０ ７９４６ ００１８", "4111 1111 1111 1111", "192.0.2.1"]
    assert [text[found.start : found.end] for found in find(text)] == values
    assert mask(text)[0] == "Zoë 🙂 日本: [EMAIL], [PHONE] / [CARD]; IP [IP]"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Phones: 98765 43210, 98765 43211 or 98765 43212", "Phones: [PHONE], [PHONE] or [PHONE]"),
        ("212-555-0123/212-555-0147", "[PHONE]/[PHONE]"),
        ("+44 20 7946 0018 12 people", "[PHONE] 12 people"),
        ("4111 1111 1111 1111 12/25 123", "[CARD] 12/25 123"),
        ("id,name\n7,536-90-4399,378282246310005,jane@example.com", "id,name\n7,[NATIONAL_ID],[CARD],[EMAIL]"),
        ("http://192.0.2.1:8080/x and [2001:db8::1]:443", "http://[IP]:8080/x and [[IP]]:443"),
        ("mailto:jane@example.com-jim@example.com", "mailto:[EMAIL]-[EMAIL]"),
        ("[EMAIL] and [PHONE] were masked, jane@example.com not", "[EMAIL] and [PHONE] were masked, [EMAIL] not"),
        ("\ud800 212-555-0123", "\ud800 [PHONE]"),
    ],
)
def test_masked_text(text: str, masked: str) -> None:
    assert mask(text)[0] == masked


PIECES = st.sampled_from([text for _, text in FOUND + NAMED] + INNOCENT.split("|"))
GLUED = st.lists(PIECES | st.text(max_size=4) | st.sampled_from(" -.,:/()+@#[]0123456789"), max_size=8).map("".join)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ('{"card": 4111111111111111}', '{"card": "[CARD]"}'),
        ("[4111111111111111,\n 1.5]\n", '["[CARD]",\n 1.5]\n'),
        ('{"phone": "4155550123", "id": 4155550123}', '{"phone": "[PHONE]", "id": 4155550123}'),
        ('{"ssn": [536904399, "536904399"]}', '{"ssn": ["[NATIONAL_ID]", "[NATIONAL_ID]"]}'),
        (r'{"a": "x\njane@example.com", "b": "\u006aane@example.com"}', r'{"a": "x\n[EMAIL]", "b": "[EMAIL]"}'),
        ('{"jane@example.com":"Grüße, jane@example.com"}', '{"[EMAIL]":"Grüße, [EMAIL]"}'),
        (r'{"a": "{\"card\": 4111111111111111}"}', r'{"a": "{\"card\": \"[CARD]\"}"}'),
        (r'["\ud83d jane@example.com é"]', r'["\ud83d [EMAIL] \u00e9"]'),
        ("{card: 4111111111111111}", "{card: [CARD]}"),
        ("4111111111111111", "[CARD]"),
        (r'{"a" :  "\u00e9", "n": 12345678901234567890}', r'{"a" :  "\u00e9", "n": 12345678901234567890}'),
    ],
)
def test_json_stays_json(text: str, masked: str) -> None:
    assert mask(text)[0] == masked and mask(masked)[0] == masked


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.floats(allow_nan=False) | st.integers() | GLUED | st.just(4111111111111111),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(GLUED, inner, max_size=4),
        max_leaves=8,
    ),
    st.booleans(),
)
def test_any_json_stays_json_of_the_same_shape(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    masked, counts = mask(text)
    if isinstance(value, (list, dict)):
        assert len(json.loads(masked)) <= len(value)
        assert (masked == text) == (not counts) and mask(masked) == (masked, Counter())


@pytest.mark.parametrize("unit", ['"1",', '"a": "1", ', "1,", "[", '{"a":', '"\\\\'])
def test_a_megabyte_of_json_takes_seconds(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    for whole in (f'[{text}"x"]', f'{{{text}"x": 1}}'):
        began = time.process_time()
        mask(whole)
        assert time.process_time() - began < 20


@pytest.mark.parametrize("text", ["+4915112345678", "+4917612345678", "+447911123456"])
def test_a_phone_with_a_plus_is_no_card(text: str) -> None:
    assert mask(text)[0] == "[PHONE]"


def test_kinds_that_are_not_asked_for_stay_and_are_not_taken_for_others() -> None:
    text = "jane@example.com 4111 1111 1111 1111 192.0.2.1 1 85 05 78 006 084 91"
    assert mask(text, {"email"}) == (text.replace("jane@example.com", "[EMAIL]"), Counter(email=1))
    assert find(text, {"phone"}) == [] == find(text, ())
    with pytest.raises(ValueError, match=r"unknown kinds of personal data: \['e-mail'\]; choose from email, phone"):
        find(text, {"e-mail"})


@settings(max_examples=500, deadline=None)
@given(st.text() | st.text("0123456789 +-.()/@:aABxX[]", max_size=80) | GLUED, st.sets(st.sampled_from(KINDS)))
def test_any_text_gives_spans_in_range_and_apart_and_masking_twice_changes_nothing(text: str, kinds: set[str]) -> None:
    end = 0
    for found in find(text, kinds):
        assert found.kind in kinds
        assert end <= found.start < found.end <= len(text)
        end = found.end
    masked, counts = mask(text, kinds)
    assert mask(masked, kinds) == (masked, Counter())
    assert counts.total() >= len(find(text, kinds))


WORDS = st.lists(st.sampled_from(["and", "she", "wrote", ",", "so", "it", "was"]), min_size=1, max_size=5).map(" ".join)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(WORDS, st.sampled_from(FOUND)), min_size=1, max_size=6))
def test_none_of_the_values_remains(parts: list[tuple[str, tuple[str, str]]]) -> None:
    text = " ".join(f"{words} {value}" for words, (_, value) in parts)
    masked, counts = mask(text + " end")
    assert masked == " ".join(f"{words} [{kind.upper()}]" for words, (kind, _) in parts) + " end"
    assert counts == Counter(kind for _, (kind, _) in parts)


@pytest.mark.parametrize(
    "unit",
    [
        "a@",
        "a@a.",
        "@",
        "a.",
        "a-",
        "1 ",
        "1",
        "(",
        "+1",
        "00 ",
        "(0",
        "1-",
        "1.",
        "1.1.1.1 ",
        ":",
        "2001:",
        "AB12",
        "4111 ",
    ]
    + ["GB82 ", "tel 1 ", "[PHONE]", "01 02 ", "+99 999 99 ", "é1 ", "212-555-0123 ext. 5-", "x" * 64 + "@"],
)
def test_a_megabyte_made_to_be_slow_is_not(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    began = time.process_time()
    find(text)
    assert time.process_time() - began < 2


def test_ordinary_text_costs_microseconds() -> None:
    """The budget is 30; the bound leaves room for a busy machine, and none for a pattern that scans at every character."""
    text = (
        "The quick brown fox, who was 3 in 1999, jumps over the lazy dog. Nobody in the small town minded at all. " * 5
    )[:500]
    find(text)
    seconds = []
    for _ in range(20):
        began = time.process_time()
        for _ in range(100):
            find(text)
        seconds.append((time.process_time() - began) / 100)
    assert min(seconds) < 150e-6


def test_needs_neither_torch_nor_gradio() -> None:
    code = (
        "import sys, qlora_core.data.personal as p; p.mask('x'); sys.exit(bool({'torch', 'gradio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclass
class Result:
    entity_type: str
    start: int
    end: int
    score: float


class Analyzer:
    """Presidio's AnalyzerEngine as far as it is used: finds "zebra 1234567" and, less sure, "horse 1234567"."""

    asked: list[tuple[str, str, list[str]]] = []

    def get_supported_entities(self, language: str | None = None) -> list[str]:
        return ["PERSON", "PHONE_NUMBER", "EMAIL_ADDRESS", "SG_NRIC_FIN"]

    def analyze(self, text: str, language: str, entities: list[str] | None = None) -> list[Result]:
        self.asked.append((text, language, entities or []))
        scores = {"zebra 1234567": 0.85, "horse 1234567": 0.4}
        at = {words: text.find(words) for words in scores}
        return [Result("SG_NRIC_FIN", at[w] + 6, at[w] + 13, scores[w]) for w in scores if at[w] >= 0]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Presidio is looked for once a process: before and after the test it is looked for anew."""
    personal._presidio.cache_clear()
    Analyzer.asked.clear()
    yield monkeypatch
    monkeypatch.undo()
    personal._presidio.cache_clear()


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


def test_presidio_is_asked_too_where_it_and_its_model_are_installed(install: pytest.MonkeyPatch) -> None:
    module(install, "presidio_analyzer", AnalyzerEngine=Analyzer)
    module(install, "en_core_web_lg")
    assert engine_name().startswith("Presidio")
    assert "with built-in patterns (e-mail, phone" in engine_name()
    text = "zebra 1234567, horse 1234567, jane@example.com"
    assert find(text) == [Found("national_id", 6, 13), Found("email", 30, 46)]
    assert mask(text)[0] == "zebra [NATIONAL_ID], horse 1234567, [EMAIL]"
    assert Analyzer.asked[0] == (text, "en", ["PHONE_NUMBER", "SG_NRIC_FIN"])
    Analyzer.asked.clear()
    find("a text without a number costs no call")
    find("1234567 " * 200_000)  # spaCy refuses more than a million characters
    assert Analyzer.asked == []


def broken() -> None:
    raise OSError("[E053] the model does not fit this spaCy")


@pytest.mark.parametrize("engine", [None, broken])
def test_presidio_without_a_model_or_broken_is_not_used(install: pytest.MonkeyPatch, engine: object) -> None:
    """Without the model its constructor would download one."""
    module(install, "presidio_analyzer", AnalyzerEngine=engine or Analyzer)
    if engine:
        module(install, "en_core_web_lg")
    else:
        install.setitem(sys.modules, "en_core_web_lg", None)
    assert engine_name() == "built-in patterns (e-mail, phone, card, IBAN, IP, national id)"
    assert mask("212-555-0123")[0] == "[PHONE]"
    assert Analyzer.asked == []
