"""Find and mask personal data in a text: e-mail, phone, card, IBAN, IP, national ids. Knows no file, row, model or page.

Names and postal addresses are not looked for.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from functools import cache
from importlib import metadata, util
from ipaddress import ip_address
from typing import Any

from stdnum import ean, iban, luhn, numdb

from qlora_core.data.claims import AFTER, CLUSTER, DATE, START, Found, any_of, check_of, digits_of, end_of_number
from qlora_core.data.national_ids import NAMED_IDS, lettered_ids, numbered_ids
from qlora_core.data.phones import NAMED_PHONES, phones

KINDS: tuple[str, ...] = ("email", "phone", "card", "iban", "ip", "national_id")
# A second pass seldom finds more: a number that only its neighbour made unlikely stands alone now. The bound is for a text
# that was made to show one number a pass.
PASSES = 20


def find(text: str, kinds: Collection[str] = KINDS) -> list[Found]:
    """What is found, by its start, never overlapping. A kind that is not asked for still claims what is its own, so that a
    card is never reported as a phone. Raises ValueError for an unknown kind."""
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown kinds of personal data: {sorted(unknown)}; choose from {', '.join(KINDS)}")
    plain = text if text.isascii() else UNUSUAL.sub(lambda match: PLAIN[ord(match[0])], text)
    claims = [*_claims(plain), *_presidio_claims(plain)]
    if not claims:
        return []
    taken, found = bytearray(len(text)), []
    for claim in claims:
        if not any(taken[claim.start : claim.end]):
            taken[claim.start : claim.end] = b"x" * (claim.end - claim.start)
            found.append(claim)
    return sorted((claim for claim in found if claim.kind in kinds), key=lambda claim: claim.start)


def mask(text: str, kinds: Collection[str] = KINDS) -> tuple[str, Counter[str]]:
    """The text with "[EMAIL]" for an e-mail and so on, and how many of each kind. Masking it again changes nothing more.

    A text that is a JSON object or array stays one: a number in it that is masked becomes a string.
    """
    return _mask_json(text, kinds) if _is_json(text) else _mask_plain(text, kinds)


def _mask_plain(text: str, kinds: Collection[str], before: str = "") -> tuple[str, Counter[str]]:
    """`before` stands before the text and may name what is in it; it stays as it is."""
    counts: Counter[str] = Counter()
    for _ in range(PASSES):
        found = [span for span in find(before + text, kinds) if span.start >= len(before)]
        if not found:
            break
        pieces, end = [], len(before)
        whole = before + text
        for span in found:
            pieces += [whole[end : span.start], f"[{span.kind.upper()}]"]
            end = span.end
        text = "".join(pieces) + whole[end:]
        counts.update(span.kind for span in found)
    return text, counts


JSON_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|-?[0-9][0-9.eE+-]*+')
JSON_COLON = re.compile(r"[ \t\r\n]*+:")
MAY_HOLD = re.compile(r"[0-9@\\]|[^\x00-\x7f]")
HALVES = re.compile("[\ud800-\udfff]")


def _is_json(text: str) -> bool:
    """Whether the text is a JSON object or array; a number alone is plain text."""
    ends = text.strip(" \t\r\n")
    if (ends[:1], ends[-1:]) not in (("{", "}"), ("[", "]")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _mask_json(text: str, kinds: Collection[str]) -> tuple[str, Counter[str]]:
    """Masks keys, strings and numbers one by one, each value behind its key, and leaves all between them as it is."""
    counts: Counter[str] = Counter()
    key = ""

    def masked(token: re.Match[str]) -> str:
        nonlocal key
        written = token[0]
        is_key = written[0] == '"' and JSON_COLON.match(text, token.end()) is not None
        if not is_key and not MAY_HOLD.search(written):
            return written
        value = json.loads(written) if written[0] == '"' else written
        if written[0] == '"' and not is_key and _is_json(value):
            changed, found = _mask_json(value, kinds)
        else:
            changed, found = _mask_plain(value, kinds, "" if is_key or not key else f"{key}: ")
        if is_key:
            key = changed[-WORD_DISTANCE:]
        if changed == value:
            return written
        counts.update(found)
        return json.dumps(changed, ensure_ascii=written.isascii() or HALVES.search(changed) is not None)

    return JSON_TOKEN.sub(masked, text), counts


def engine_name() -> str:
    """What looks for personal data here, for a sentence to a person."""
    built_in = "built-in patterns (e-mail, phone, card, IBAN, IP, national id)"
    if _presidio() is None:
        return built_in
    try:
        return f"Presidio {metadata.version('presidio-analyzer')} with {built_in}"
    except metadata.PackageNotFoundError:
        return f"Presidio with {built_in}"


# --- Whose claim comes first -------------------------------------------------------------------------------------------

DIGIT = re.compile(r"[0-9]")
BEHIND_LETTER = re.compile(r"[0-9][0-9](?:(?<=[A-Za-z][0-9]{2})|(?<=[A-Z][ -][0-9]{2}))")
# Eight digits, or the Finnish notation, which has six before its letter.
LONG = re.compile(r"[0-9](?:(?:[ ().\-/]{0,3}[0-9]){7}|[0-9]{5}[A-FU-Y][0-9]{3})")

# One character each, so that offsets stay right: digits of other scripts, full width, hyphens and spaces of typesetters.
PLAIN = {first + value: str(value) for first in (0x660, 0x6F0, 0x966, 0x9E6, 0xFF10) for value in range(10)}
PLAIN |= dict.fromkeys(map(ord, "‐‑‒–−－"), "-") | dict.fromkeys((0xA0, 0x2007, 0x2009, 0x202F, 0x3000), " ")
PLAIN |= {ord("＋"): "+", ord("＠"): "@", ord("（"): "(", ord("）"): ")", ord("．"): ".", ord("／"): "/"}
UNUSUAL = re.compile("[" + "".join(map(chr, PLAIN)) + "]")


def _claims(text: str) -> Iterator[Found]:
    """In order of precedence: where two claim the same characters, the stricter check wins."""
    if "@" in text:
        yield from _emails(text)
    if not DIGIT.search(text):
        return
    if BEHIND_LETTER.search(text):
        yield from _ibans(text)
        yield from lettered_ids(text)
    starts = [start.start() for start in START.finditer(text)] if LONG.search(text) else []
    called = list(phones(text, starts))
    # Nothing but a phone is written with a plus, and a phone may have the digits of a card.
    yield from (found for found in called if text[found.start] == "+")
    yield from _cards(text, starts)
    yield from numbered_ids(text, starts)
    named = list(_behind_words(text))
    yield from (found for found in named if found.kind == "national_id")
    yield from _addresses(text)
    yield from called
    yield from (found for found in named if found.kind == "phone")


# --- E-mail and IP -----------------------------------------------------------------------------------------------------

LOCAL_BACKWARDS = re.compile(r"[\w.+'%-]{1,64}")
LABEL = r"[^\W_]++(?:-++[^\W_]++)*+"
# Not a picture (icon@2x.png), a package (left-pad@1.3.0-beta.rc) or a matrix product (x@W.T.sum(0)).
DOMAIN = re.compile(
    rf"(?![1-4]x\.|[0-9]+\.[0-9]+\.)(?:{LABEL}\.)+(?:xn--[a-z0-9-]++|[^\W\d_]{{2,63}}+)(?![^\W_]|\([-0-9)]|\.[^\W\d_]{{2}})",
    re.IGNORECASE,
)
IPV4 = re.compile(r"[0-9](?<![\w.][0-9])[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9])", re.ASCII)
# Global unicast, unique local and link local only: `x[10::2]` and `abc::def` are code.
IPV6 = re.compile(r"(?<![\w:.])(?:[23][0-9a-f]|f[cd]|fe(?=[89ab]))[0-9a-f]{2}:[0-9a-f:]{2,34}(?!\w)", re.ASCII | re.I)
# This very machine, net masks, and what reads as a version or a heading: all four below 20, but not the private 10.0.0.1.
NOBODY = re.compile(r"(?:0|127|255)\.|(?!10\.)(?:1?[0-9](?:\.|\Z)){4}")
VERSION = re.compile(
    r"(?:\b(?:v[0-9]*|ver|version|release|build|firmware|driver|upgraded?|section|chapter|clause|article|figure|table)|§"
    r"|[a-z][-/]|[=~<>]=)(?: to| from)?[ .:]{0,2}\Z",
    re.IGNORECASE,
)


def _emails(text: str) -> Iterator[Found]:
    end = 0
    at = text.find("@")
    while at >= 0:
        domain = DOMAIN.match(text, at + 1)
        local = LOCAL_BACKWARDS.match(text[max(end, at - 64) : at][::-1])
        if domain and local:
            name = local[0][::-1].lstrip(".'-")
            if name and not (name == "git" and text[domain.end() : domain.end() + 1] in (":", "/")):
                end = domain.end()
                yield Found("email", at - len(name), end)
        at = text.find("@", at + 1)


def _addresses(text: str) -> Iterator[Found]:
    for pattern, needs in ((IPV4, text.count(".") > 2), (IPV6, "::" in text or text.count(":") > 6)):
        for match in pattern.finditer(text) if needs else ():
            written = match[0] if match[0].endswith("::") else match[0].rstrip(":")
            try:
                ip_address(written)
            except ValueError:
                continue
            a_version = pattern is IPV4 and VERSION.search(text, max(0, match.start() - 20), match.start())
            if not a_version and not NOBODY.match(written):
                yield Found("ip", match.start(), match.start() + len(written))


# --- IBAN and card -----------------------------------------------------------------------------------------------------

IBAN = re.compile(r"[0-9][0-9](?<=[A-Za-z]{2}[0-9]{2})(?<!\w[A-Za-z]{2}[0-9]{2})(?=(?:[ -]?[0-9A-Za-z]){11})", re.ASCII)
FOURS = r"[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{3})?"
CARD = re.compile(rf"(?=[2-6])(?:[0-9]{{13,19}}|{FOURS}|[0-9]{{4}}([ -])[0-9]{{6}}\2[0-9]{{4,5}}){AFTER}", re.ASCII)
# ISO/IEC 7812 prefixes and lengths: Visa; Mastercard and Mir; Amex; Diners; JCB; Discover, RuPay and UnionPay; Maestro.
ISSUED = re.compile(
    r"4(?:.{12}|.{15}|.{18})|(?:5[1-5]..|222[1-9]|22[3-9].|2[3-6]..|27[01].|2720|220[0-4]).{12}|3[47].{13}"
    r"|3(?:0[0-5]|[689].).{11}|35(?:2[89]|[3-8].).{12}|(?:6011|64[4-9].|6[025]..).{12,15}"
    r"|(?:50(?:18|20|38)|5893|6304|6759|676[1-3]).{9,15}"
)


@cache
def _account(country: str) -> re.Pattern[str] | None:
    """What follows the check digits of an IBAN, by the registry's structure such as "4!a6!n8!n"."""
    known = numdb.get("iban").info(country)[0][1]
    classes = {"n": "[0-9]", "a": "[A-Za-z]", "c": "[0-9A-Za-z]"}
    parts = re.findall(r"([0-9]+)!?([nac])", known.get("bban", ""))
    shape = "".join(f"(?:[ -]?{classes[kind]}){{{count}}}" for count, kind in parts)
    return re.compile(rf"{shape}(?![0-9A-Za-z])") if parts else None


def _ibans(text: str) -> Iterator[Found]:
    for match in IBAN.finditer(text):
        start = match.start() - 2
        account = _account(text[start : start + 2].upper())
        whole = account and account.match(text, match.end())
        if whole and iban.is_valid(text[start : whole.end()], check_country=False):
            yield Found("iban", start, whole.end())


def _cards(text: str, starts: list[int]) -> Iterator[Found]:
    for match in filter(None, (CARD.match(text, start) for start in starts)):
        digits = digits_of(match[0])
        # A bar code of 13 digits may begin with 4 as well.
        if ISSUED.fullmatch(digits) and luhn.is_valid(digits) and not (len(digits) == 13 and ean.is_valid(digits)):
            yield Found("card", *match.span())


# --- Numbers behind a word ---------------------------------------------------------------------------------------------

WORD = re.compile(rf"(?<![A-Za-z])(?:{any_of(NAMED_PHONES | NAMED_IDS)})(?![A-Za-z])", re.IGNORECASE)
WORD_DISTANCE = 30
NO_NUMBER = re.compile(r"[^0-9\[\]@]*\Z")
BEHIND_WORD = re.compile(rf"(?!{DATE})[(+]?[0-9](?:[ ().\-/]{{0,2}}[0-9]){{6,14}}{AFTER}", re.ASCII)
ANOTHER = re.compile(r" ?[,;/&|] ?(?=[(0-9])| (?:or|and|oder|und|ou|et|o|y|e) (?=[(0-9])")


def _behind_words(text: str) -> Iterator[Found]:
    """Numbers that only the word before them makes a phone or an id, and the numbers listed after such a one."""
    checks = NAMED_PHONES | NAMED_IDS
    for cluster in CLUSTER.finditer(text):
        start = cluster.start()
        start -= text[start - 1 : start] == "+" or (text[start - 1 : start] == "(" and ")" in cluster[0])
        since = NO_NUMBER.search(text, max(0, start - WORD_DISTANCE), start)
        words = list(WORD.finditer(text, since.start() if since else start, start))
        if not words:
            continue
        check = check_of(checks, words[-1])
        kind = "phone" if check in NAMED_PHONES.values() else "national_id"
        while START.match(text, start) and (match := BEHIND_WORD.match(text, start)):
            end = end_of_number(text, *match.span(), check)
            if end is None:
                break
            yield Found(kind, start, end)
            another = ANOTHER.match(text, end)
            if another is None:
                break
            start = another.end()


# --- Presidio, where it is installed -----------------------------------------------------------------------------------

# Not e-mail (its check fetches a list from the network) nor IP (it takes versions for addresses).
PRESIDIO_KINDS = {"PHONE_NUMBER": "phone", "CREDIT_CARD": "card", "IBAN_CODE": "iban"} | dict.fromkeys(
    ("US_SSN", "US_ITIN", "UK_NHS", "UK_NINO", "ES_NIF", "ES_NIE", "IT_FISCAL_CODE", "PL_PESEL", "SG_NRIC_FIN")
    + ("AU_TFN", "AU_MEDICARE", "IN_PAN", "IN_AADHAAR", "FI_PERSONAL_IDENTITY_CODE", "KR_RRN", "TH_TNIN", "CA_SIN"),
    "national_id",
)
# A phone by its digits alone has 0.4 and an id by its digits alone 0.05 to 0.3; a word near them lifts both above.
PRESIDIO_SCORE = 0.5
# spaCy refuses longer texts.
PRESIDIO_LENGTH = 1_000_000


@cache
def _presidio() -> Any:
    """Presidio's analyzer, or None. Without its spaCy model it would download one of 400 MB: then it is not used."""
    if util.find_spec("presidio_analyzer") is None or util.find_spec("en_core_web_lg") is None:
        return None
    try:
        from presidio_analyzer import AnalyzerEngine

        return AnalyzerEngine()
    except (ImportError, OSError, ValueError, SystemExit):  # spaCy and its model of versions that do not fit
        return None


def _presidio_claims(text: str) -> Iterator[Found]:
    engine = _presidio()
    if engine is None or len(text) > PRESIDIO_LENGTH or not CLUSTER.search(text):
        return
    entities = [name for name in engine.get_supported_entities(language="en") if name in PRESIDIO_KINDS]
    for result in engine.analyze(text=text, language="en", entities=entities):
        if result.score >= PRESIDIO_SCORE and result.start < result.end:
            yield Found(PRESIDIO_KINDS[result.entity_type], result.start, result.end)
