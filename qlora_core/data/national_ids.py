"""National ids in a text, by their notation and check digits. Knows no other kind of number.

By their notation alone: US SSN and ITIN (with hyphens), UK NINO, Spanish DNI and NIE, French NIR, Italian codice
fiscale, Brazilian CPF (with dots), Belgian national number, Swiss AHV, Swedish personnummer, Finnish henkilötunnus, South
Korean RRN, Chinese resident id, Indian PAN, Mexican CURP, Chilean RUT. Only close behind a word that names them: US SSN, UK
NHS, Dutch BSN, Polish PESEL, Brazilian CPF, Indian Aadhaar, German Steuer-ID, Canadian SIN, Australian TFN, Turkish TCKN,
Danish CPR, Norwegian fødselsnummer, Romanian CNP, South African id.
"""

import re
from collections.abc import Iterable, Iterator

from stdnum import get_cc_module

from qlora_core.data.claims import AFTER, Check, Found, any_of, check_of


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
NAMED_IDS: dict[str, Check] = {
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
NUMBERED_ID = re.compile(f"(?:{any_of(NUMBERED)}){AFTER}", re.ASCII)
LETTERED_ID = re.compile(rf"[A-Z](?<![\w-][A-Z])(?:{any_of(LETTERED)})(?!\w)", re.ASCII)


def lettered_ids(text: str) -> Iterator[Found]:
    """Those that begin with a letter."""
    return _matching(LETTERED, LETTERED_ID.finditer(text))


def numbered_ids(text: str, starts: list[int]) -> Iterator[Found]:
    """Those that begin with a digit, at one of `starts`."""
    return _matching(NUMBERED, (NUMBERED_ID.match(text, start) for start in starts))


def _matching(checks: dict[str, Check], matches: Iterable[re.Match[str] | None]) -> Iterator[Found]:
    for match in matches:
        if match and check_of(checks, match)(match[0]):
            yield Found("national_id", *match.span())
