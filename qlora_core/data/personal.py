"""Find and mask personal data in a text: e-mail, phone, card, IBAN, IP, national ids. Knows no file, row, model or page.

National ids by their notation: US SSN and ITIN (with hyphens), UK NINO, Spanish DNI and NIE, French NIR, Italian codice
fiscale, Brazilian CPF (with dots), Belgian national number, Swiss AHV, Swedish personnummer, Finnish henkilötunnus, South
Korean RRN, Chinese resident id, Indian PAN, Mexican CURP, Chilean RUT. Only close behind a word that names them: US SSN, UK
NHS, Dutch BSN, Polish PESEL, Brazilian CPF, Indian Aadhaar, German Steuer-ID, Canadian SIN, Australian TFN, Turkish TCKN,
Danish CPR, Norwegian fødselsnummer, Romanian CNP, South African id. Names and postal addresses are not looked for.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from ipaddress import ip_address
from typing import Any

from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, PhoneMetadata
from stdnum import ean, get_cc_module, iban, luhn, numdb

KINDS: tuple[str, ...] = ("email", "phone", "card", "iban", "ip", "national_id")
# A second pass seldom finds more: a number that only its neighbour made unlikely stands alone now. The bound is for a text
# that was made to show one number a pass.
PASSES = 20


@dataclass(frozen=True)
class Found:
    """Characters start to end (exclusive) of a text."""

    kind: str
    start: int
    end: int


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
    """The text with "[EMAIL]" for an e-mail and so on, and how many of each kind. Masking it again changes nothing more."""
    counts: Counter[str] = Counter()
    for _ in range(PASSES):
        found = find(text, kinds)
        if not found:
            break
        pieces, end = [], 0
        for span in found:
            pieces += [text[end : span.start], f"[{span.kind.upper()}]"]
            end = span.end
        text = "".join(pieces) + text[end:]
        counts.update(span.kind for span in found)
    return text, counts


def engine_name() -> str:
    """What looks for personal data here, for a sentence to a person."""
    built_in = "built-in patterns (e-mail, phone, card, IBAN, IP, national id)"
    if _presidio() is None:
        return built_in
    try:
        return f"Presidio {metadata.version('presidio-analyzer')} with {built_in}"
    except metadata.PackageNotFoundError:
        return f"Presidio with {built_in}"


# --- What all kinds share ----------------------------------------------------------------------------------------------
# Each pattern takes a bounded number of characters or repeats classes that exclude each other, so all of them are linear.
# Those that run on every text begin with a class that is rare in prose and look behind after it: `re` skips to a leading
# class only. ASCII, as a number may touch a script without spaces ("電話03-1234-5678").

Check = Callable[[str], bool]

# Not inside a word, price, path, hash tag, chain of hyphens, time of day or decimal.
START = re.compile(
    r"[0-9+(](?<![A-Za-z_#$€£¥].)(?<![a-z]/.)(?<![0-9][0-9])(?<![0-9]-[0-9])(?<!:[0-9]{2}:.)(?<![^A-Za-z]\.[0-9])"
)
# What START refuses before a number is not refused behind the number before it, or neither of two would be found.
AFTER = r"(?![0-9_%]|(?!x[0-9])[A-Za-z])(?!(?<=[0-9])[.-][0-9]|:[0-9]{2}:)"
DIGIT = re.compile(r"[0-9]")
BEHIND_LETTER = re.compile(r"[0-9][0-9](?:(?<=[A-Za-z][0-9]{2})|(?<=[A-Z][ -][0-9]{2}))")
CLUSTER = re.compile(r"[0-9](?:[ ().\-/]{0,3}[0-9]){6,}")
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
        yield from _matching(LETTERED, LETTERED_ID.finditer(text))
    starts = [start.start() for start in START.finditer(text)] if LONG.search(text) else []
    yield from _cards(text, starts)
    yield from _matching(NUMBERED, (NUMBERED_ID.match(text, start) for start in starts))
    named = list(_behind_words(text))
    yield from (found for found in named if found.kind == "national_id")
    yield from _addresses(text)
    yield from _phones(text, starts)
    yield from (found for found in named if found.kind == "phone")


def _digits(number: str) -> str:
    return re.sub("[^0-9]", "", number)


def _any_of(checks: Collection[str]) -> str:
    """One pattern of many: its group n0 is the first of them."""
    return "|".join(f"(?P<n{i}>{shape})" for i, shape in enumerate(checks))


def _check_of(checks: dict[str, Check], match: re.Match[str]) -> Check:
    return list(checks.values())[int((match.lastgroup or "n0")[1:])]


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
        digits = _digits(match[0])
        # A bar code of 13 digits may begin with 4 as well.
        if ISSUED.fullmatch(digits) and luhn.is_valid(digits) and not (len(digits) == 13 and ean.is_valid(digits)):
            yield Found("card", *match.span())


# --- National ids ------------------------------------------------------------------------------------------------------


def _id(country: str, name: str) -> Check:
    return get_cc_module(country, name).is_valid


def _us(number: str) -> bool:
    return _id("us", "ssn")(re.sub("[ .]", "-", number)) or _id("us", "itin")(number)


def _nino(number: str) -> bool:
    """UK National Insurance number (HMRC NIM39110); QQ stands in the government's own examples."""
    prefix = number[:2]
    wrong = set(prefix) & set("DFIQUV") or prefix[1] == "O" or prefix in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")
    return prefix == "QQ" or not wrong


# Notation that nothing else has -> check.
NUMBERED: dict[str, Check] = {
    r"[0-9]{3}-[0-9]{2}-[0-9]{4}": _us,
    r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}": _id("br", "cpf"),
    r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}": _id("be", "nn"),
    r"756\.[0-9]{4}\.[0-9]{4}\.[0-9]{2}": _id("ch", "ssn"),
    r"[12] ?[0-9]{2} ?[01345][0-9] ?(?:[0-9]{2}|2[AB]) ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}": _id("fr", "nir"),
    r"[0-9]{6}-[0-9]{7}": _id("kr", "rrn"),
    r"[1-9][0-9]{5}(?:19|20)[0-9]{2}[01][0-9]{6}[0-9X]": _id("cn", "ric"),
    r"(?:19|20)?[0-9]{6}[-+][0-9]{4}": _id("se", "personnummer"),
    r"[0-3][0-9][01][0-9]{3}[-+A-FU-Y][0-9]{3}[0-9A-Y]": _id("fi", "hetu"),
    r"[0-9]{2}\.?[0-9]{3}\.?[0-9]{3}-?[A-Z]": lambda number: _id("es", "dni")(number.replace(".", "")),
    r"[0-9]{1,2}\.[0-9]{3}\.[0-9]{3}-[0-9K]": _id("cl", "rut"),
}
# The same; the first of its letters stands before each of these.
LETTERED: dict[str, Check] = {
    r"[A-Z](?:[0-9]{6}| [0-9]{2} [0-9]{2} [0-9]{2} )[A-D]": _nino,
    r"(?<=[XYZ])-?[0-9]{7}-?[A-Z]": _id("es", "nie"),
    r"[A-Z]{5}[0-9LMNPQRSTUV]{2}[A-EHLMPRST][0-9LMNPQRSTUV]{2}[A-Z][0-9LMNPQRSTUV]{3}[A-Z]": _id("it", "codicefiscale"),
    r"[A-Z]{3}[0-9]{6}[HMX][A-Z]{5}[0-9A-Z][0-9]": _id("mx", "curp"),
    r"[A-Z]{2}P[A-Z][0-9]{4}[A-Z]": _id("in_", "pan"),
}
# Word -> check of the plain digits behind it, which many other things look like.
NAMED: dict[str, Check] = {
    r"ssns?|social security|itin": _us,
    r"nhs": _id("gb", "nhs"),
    r"bsn|burgerservicenummer|sofinummer": _id("nl", "bsn"),
    r"pesel": _id("pl", "pesel"),
    r"cpf": _id("br", "cpf"),
    r"aadh?aa?r|uidai|आधार": _id("in_", "aadhaar"),
    r"steuer-?id(?:nr|ent\w*)?|steuerliche\w*|idnr|tax id": _id("de", "idnr"),
    r"sin|social insurance": _id("ca", "sin"),
    r"tfn|tax file": _id("au", "tfn"),
    r"tckn|tc kimlik": _id("tr", "tckimlik"),
    r"cpr": _id("dk", "cpr"),
    r"f(?:ø|o|oe)dselsnummer": _id("no", "fodselsnummer"),
    r"personnummer": lambda number: _id("no", "fodselsnummer")(number) or _id("se", "personnummer")(number),
    r"cnp": _id("ro", "cnp"),
    r"id(?:entity)? (?:number|no)": _id("za", "idnr"),
}
NUMBERED_ID = re.compile(f"(?:{_any_of(NUMBERED)}){AFTER}", re.ASCII)
LETTERED_ID = re.compile(rf"[A-Z](?<![\w-][A-Z])(?:{_any_of(LETTERED)})(?!\w)", re.ASCII)


def _matching(checks: dict[str, Check], matches: Iterable[re.Match[str] | None]) -> Iterator[Found]:
    for match in matches:
        if match and _check_of(checks, match)(match[0]):
            yield Found("national_id", *match.span())


# --- Phones ------------------------------------------------------------------------------------------------------------

# Countries whose national notation is known; behind "+" every country is.
REGIONS = (
    *("US", "GB", "FR", "DE", "ES", "IT", "NL", "BE", "CH", "AT", "PL", "PT", "SE", "DK", "NO", "FI", "IE", "CZ"),
    *("TR", "IN", "BR", "MX", "AR", "AU", "NZ", "ZA", "JP", "KR", "CN", "SG", "HK", "IL", "AE"),
)
USES = ("fixed_line", "mobile", "toll_free", "shared_cost", "personal_number", "voip", "uan")
DATE = (
    r"(?:(?:19|20)[0-9]{2}([-./ ])[01]?[0-9]\1[0-3]?[0-9]|[0-3]?[0-9]([-./ ])[0-3]?[0-9]\2(?:19|20)[0-9]{2}"
    r"|(?:19|20)[0-9]{2} ?[-/ ] ?(?:19|20)[0-9]{2}|[01]?[0-9]/(?:19|20)[0-9]{2})(?![0-9])"
)
DECIMAL = re.compile(r"[0-9]+\.[0-9]+")


@cache
def _plan(regions: tuple[str, ...]) -> re.Pattern[str]:
    """National numbers of these regions, with or without the trunk prefix, by the tables of libphonenumber."""
    shapes = []
    for region in regions:
        if plan := PhoneMetadata.metadata_for_region(region):  # "001", a service of no country, has none
            known = [use.national_number_pattern for use in (getattr(plan, name) for name in USES) if use]
            shapes.append(f"(?:{plan.national_prefix or ''})?(?:{'|'.join(filter(None, known))})")
    return re.compile("|".join(shapes) or "(?!)")


def _national(number: str) -> bool:
    return _plan(REGIONS).fullmatch(_digits(number)) is not None


def _international(number: str) -> bool:
    digits = _digits(number).removeprefix("00")
    regions = ((n, COUNTRY_CODE_TO_REGION_CODE.get(int(digits[:n]), ())) for n in (1, 2, 3) if len(digits) > n)
    return any(_plan(known).fullmatch(digits[n:]) for n, known in regions if known)


def _american(number: str) -> bool:
    """Brackets or hyphens will do, as people invent (555) 123-4567; with blanks it may be any three numbers."""
    return "(" in number or number.count("-") > 1 or _plan(("US",)).fullmatch(_digits(number)) is not None


def _pairs(number: str) -> bool:
    """Numbers drawn in a lottery and tables ascend; bytes of a dump have neighbours, which the pattern refuses."""
    groups = re.findall("[0-9]+", number)
    return (groups != sorted(groups) or "".join(groups[1:]) in "123456789") and _national(number)


def _trunk(number: str) -> bool:
    """A number that begins with 0, as no quantity does; but bits, hours, paths and US zip codes (02110-1301) do."""
    digits, groups = _digits(number), [len(group) for group in re.findall("[0-9]+", number)]
    if set(digits) <= {"0", "1"} or max(groups) < 3 or groups == [5, 4] or DECIMAL.fullmatch(number):
        return False
    if number.count("/") > 1 or ("." in number and set(number) & set("-/")):
        return False
    if not 9 - (number[0] == "(") <= len(digits) <= 15:
        return False
    return _international(number) if digits.startswith("00") else _national(number)


def _after_noun(number: str) -> bool:
    if re.fullmatch("[2-9][0-9]{2}[-. ][0-9]{4}", number):
        return True
    return len(_digits(number)) > 7 and _national(number) and not DECIMAL.fullmatch(number)


def _after_verb(number: str) -> bool:
    """Eight digits are too often a quantity ("call it 1000 2000 times"), and text.strip("0123456789") is code."""
    digits = _digits(number)
    return len(digits) != 8 and digits not in "01234567890" and _after_noun(number)


PHONES: dict[str, Check] = {
    r"\+(?![0-9]{4,}\.[0-9])\(?[1-9](?:(?: ?[(./-]? ?|\)[ -]{0,2})[0-9]){6,16}": _international,
    r"(?:1[ .-]?)?(?:\([1-9][0-9]{2}\)[ -]{0,2}|[1-9][0-9]{2}[ .-])[0-9]{3}[ .-][0-9]{4}(?! ?[=*])": _american,
    r"\([1-9]{2}\) ?9?[0-9]{4}-[0-9]{4}": _national,
    r"(?<![0-9a-f][0-9] )0[1-9](?P<gap>[ .-])[0-9]{2}(?:(?P=gap)[0-9]{2}){3}(?![ .-]{1,2}[0-9][0-9a-f])": _pairs,
    r"(?:\(0[0-9]{1,5}\)[ ./-]{0,3}|0[0-9]{1,5} ?[ ./-] ?)[0-9]{2,9}(?: ?[ ./-] ?[0-9]{2,9}){0,4}": _trunk,
}
# Not a number in use, but written as one.
INVENTED = re.compile(r"\+[0-9]{1,3}(?:[ ().-]{1,2}[0-9]{2,5}){2,4}")
TELEPHONE = (
    r"(?:tele)?phones?(?:_?number|_?no)?|tele?|mob(?:ile?)?(?:_?number|_?no)?|cell(?:phone|ular)?|fax|whats ?app|hotline"
    r"|t[ée]l[ée]phone|telefon\w*|tel[ée]fono|m[óo]vil|celular|cellulare|telefone|telem[óo]vel|telefoon|handy"
    r"|電話(?:番号)?|电话|手机|携帯|тел(?:ефон)?|फ़ोन|फोन|मोबाइल|هاتف|جوال"
)
NAMED_PHONES: dict[str, Check] = {TELEPHONE: _after_noun, r"call|text|sms|dial|ring|reach|contact": _after_verb}

PHONE = re.compile(rf"(?!\(?{DATE})(?:{_any_of(PHONES)}){AFTER}", re.ASCII)
WORD = re.compile(rf"(?<![A-Za-z])(?:{_any_of(NAMED_PHONES | NAMED)})(?![A-Za-z])", re.IGNORECASE)
WORD_DISTANCE = 30
NO_NUMBER = re.compile(r"[^0-9\[\]@]*\Z")
BEHIND_WORD = re.compile(rf"(?!{DATE})[(+]?[0-9](?:[ ().\-/]{{0,2}}[0-9]){{6,14}}{AFTER}", re.ASCII)
ANOTHER = re.compile(r" ?[,;/&|] ?(?=[(0-9])| (?:or|and|oder|und|ou|et|o|y|e) (?=[(0-9])")
EXTENSION = re.compile(r",? ?(?:x|ext\.?|extension) ?[0-9]{1,5}(?![0-9])", re.IGNORECASE)


def _phones(text: str, starts: list[int]) -> Iterator[Found]:
    read = 0
    for start in starts:
        match = PHONE.match(text, start) if start >= read else None
        if match is None:
            continue
        read = match.end()
        end = _cut(text, start, read, _check_of(PHONES, match)) or (read if INVENTED.fullmatch(match[0]) else None)
        if end:
            extension = EXTENSION.match(text, end)
            read = extension.end() if extension else end
            yield Found("phone", start, read)


def _cut(text: str, start: int, end: int, check: Check) -> int | None:
    """Where a number ends that was read too far ("+44 20 7946 0018 12 people"); None where it is none."""
    while end - start > 6:
        number = text[start:end]
        if check(number):
            return end
        end = start + len(re.sub(r"[ /]*[^ /]+\Z", "", number))
    return None


def _behind_words(text: str) -> Iterator[Found]:
    """Numbers that only the word before them makes a phone or an id, and the numbers listed after such a one."""
    checks = NAMED_PHONES | NAMED
    for cluster in CLUSTER.finditer(text):
        start = cluster.start()
        start -= text[start - 1 : start] == "+" or (text[start - 1 : start] == "(" and ")" in cluster[0])
        since = NO_NUMBER.search(text, max(0, start - WORD_DISTANCE), start)
        words = list(WORD.finditer(text, since.start() if since else start, start))
        if not words:
            continue
        check = _check_of(checks, words[-1])
        kind = "phone" if check in NAMED_PHONES.values() else "national_id"
        while START.match(text, start) and (match := BEHIND_WORD.match(text, start)):
            end = _cut(text, *match.span(), check)
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
