"""Phone numbers in a text, by their notation and by the tables of libphonenumber. Knows no other kind of number."""

import re
from collections.abc import Iterator
from functools import cache

from phonenumbers import COUNTRY_CODE_TO_REGION_CODE, PhoneMetadata

from qlora_core.data.claims import AFTER, DATE, Check, Found, any_of, check_of, digits_of, end_of_number

# Countries whose national notation is known; behind "+" every country is.
REGIONS = (
    *("US", "GB", "FR", "DE", "ES", "IT", "NL", "BE", "CH", "AT", "PL", "PT", "SE", "DK", "NO", "FI", "IE", "CZ"),
    *("TR", "IN", "BR", "MX", "AR", "AU", "NZ", "ZA", "JP", "KR", "CN", "SG", "HK", "IL", "AE"),
)
USES = ("fixed_line", "mobile", "toll_free", "shared_cost", "personal_number", "voip", "uan")
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
    return _plan(REGIONS).fullmatch(digits_of(number)) is not None


def _international(number: str) -> bool:
    digits = digits_of(number).removeprefix("00")
    regions = ((n, COUNTRY_CODE_TO_REGION_CODE.get(int(digits[:n]), ())) for n in (1, 2, 3) if len(digits) > n)
    return any(_plan(known).fullmatch(digits[n:]) for n, known in regions if known)


def _american(number: str) -> bool:
    """Brackets or hyphens will do, as people invent (555) 123-4567; with blanks it may be any three numbers."""
    return "(" in number or number.count("-") > 1 or _plan(("US",)).fullmatch(digits_of(number)) is not None


def _pairs(number: str) -> bool:
    """Numbers drawn in a lottery and tables ascend; bytes of a dump have neighbours, which the pattern refuses."""
    groups = re.findall("[0-9]+", number)
    return (groups != sorted(groups) or "".join(groups[1:]) in "123456789") and _national(number)


def _trunk(number: str) -> bool:
    """A number that begins with 0, as no quantity does; but bits, hours, paths and US zip codes (02110-1301) do."""
    digits, groups = digits_of(number), [len(group) for group in re.findall("[0-9]+", number)]
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
    return len(digits_of(number)) > 7 and _national(number) and not DECIMAL.fullmatch(number)


def _after_verb(number: str) -> bool:
    """Eight digits are too often a quantity ("call it 1000 2000 times"), and text.strip("0123456789") is code."""
    digits = digits_of(number)
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

PHONE = re.compile(rf"(?!\(?{DATE})(?:{any_of(PHONES)}){AFTER}", re.ASCII)
EXTENSION = re.compile(r",? ?(?:x|ext\.?|extension) ?[0-9]{1,5}(?![0-9])", re.IGNORECASE)


def phones(text: str, starts: list[int]) -> Iterator[Found]:
    """Those that begin at one of `starts`, each with its extension."""
    read = 0
    for start in starts:
        match = PHONE.match(text, start) if start >= read else None
        if match is None:
            continue
        read = match.end()
        end = end_of_number(text, start, read, check_of(PHONES, match)) or (
            read if INVENTED.fullmatch(match[0]) else None
        )
        if end:
            extension = EXTENSION.match(text, end)
            read = extension.end() if extension else end
            yield Found("phone", start, read)
