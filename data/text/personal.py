"""Personal data in texts: e-mail addresses, telephone numbers, IP addresses, card numbers and IBANs.

Patterns are the same for all languages. What has a checksum must satisfy it (card numbers: Luhn, ISO/IEC
7812; IBAN: mod 97, ISO 13616); what has none must have a form that hardly anything else has. So telephone
numbers are found in international form (E.164), and North American ones with their separators; IP addresses
only if they are global, and not after a word for a version. The time is proportional to the length of a text,
whatever it holds: each pattern has a bounded length and one way to match.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

KINDS = {
    "emails": "<EMAIL>",
    "phones": "<PHONE>",
    "ip_addresses": "<IP>",
    "card_numbers": "<CARD>",
    "ibans": "<IBAN>",
}
"""Kinds, and what replaces them."""


@dataclass(frozen=True, order=True)
class PersonalPiece:
    """A piece of personal data."""

    begin: int
    end: int
    kind: str


def find(text: str) -> list[PersonalPiece]:
    """Finds all pieces in a text, in order; of two that overlap the one that begins first."""
    every = sorted(found for finder in _FINDERS for found in finder(text))
    chosen: list[PersonalPiece] = []
    for found in every:
        if not chosen or found.begin >= chosen[-1].end:
            chosen.append(found)
    return chosen


def count(found: list[PersonalPiece]) -> dict[str, float | None]:
    """Returns the number of pieces of each kind."""
    counts = Counter(it.kind for it in found)
    return {kind: float(counts[kind]) for kind in KINDS}


def replaced(text: str, found: list[PersonalPiece]) -> str:
    """Returns a text with a name of its kind in place of each piece."""
    pieces, at = [], 0
    for it in found:
        pieces += [text[at : it.begin], KINDS[it.kind]]
        at = it.end
    return "".join([*pieces, text[at:]])


_LOCAL = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+-")
_LONGEST_LOCAL = 64
_HOST = re.compile(r"[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")
_NO_PERSON = frozenset({"git", "hg", "svn"})
"""Names before @ of programs, as in git@github.com."""
_NO_HOST = frozenset({"example", "test", "invalid", "localhost", "local"})
_SUFFIXES = frozenset(
    {
        "png",
        "jpg",
        "jpeg",
        "gif",
        "svg",
        "webp",
        "ico",
        "bmp",
        "css",
        "js",
        "ts",
        "jsx",
        "tsx",
        "py",
        "rb",
        "go",
    }
    | {"rs", "java", "json", "html", "xml", "md", "so", "dll"}
)
"""Of files such as icon@2x.png."""


def _emails(text: str) -> Iterator[PersonalPiece]:
    at = text.find("@")
    while at >= 0:
        begin = at
        while begin > max(0, at - _LONGEST_LOCAL) and text[begin - 1] in _LOCAL:
            begin -= 1
        while begin < at and text[begin] in ".%+-":
            begin += 1
        host = _HOST.match(text, at + 1)
        if host and begin < at and text[at - 1] != ".":
            labels = host[0].lower().split(".")
            while labels and not re.fullmatch(r"[a-z]{2,24}|xn--[a-z0-9-]{1,59}", labels[-1]):
                labels.pop()
            reserved = labels[-2:-1] == ["example"] or (labels and labels[-1] in _NO_HOST | _SUFFIXES)
            if len(labels) > 1 and not reserved and text[begin:at].lower() not in _NO_PERSON:
                yield PersonalPiece(begin, at + 1 + len(".".join(labels)), "emails")
        at = text.find("@", at + 1)


_FOUR = re.compile(r"(?<![\w.:/-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\w|/\d)", re.ASCII)
_VERSION = re.compile(r"(?:\bv|ver|version|release|rev|build|firmware)[\s:=.\"'(]{0,3}$", re.I)
_LEAST_DIGITS, _LEAST_OF_FIRST_ARCS = 8, 10
"""Of an IPv4 address: most numbers of versions have fewer, and most OIDs, which begin with 0, 1 or 2."""
_SIX = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:]|/\d)", re.ASCII)


def _ip_addresses(text: str) -> Iterator[PersonalPiece]:
    for match in _FOUR.finditer(text):
        is_version = _VERSION.search(text, max(0, match.start() - 16), match.start())
        least = _LEAST_OF_FIRST_ARCS if match[0].startswith(("0.", "1.", "2.")) else _LEAST_DIGITS
        if len(match[0]) - 3 >= least and not is_version:
            try:
                is_global = IPv4Address(match[0]).is_global
            except ValueError:
                continue
            if is_global:
                yield PersonalPiece(match.start(), match.end(), "ip_addresses")
    for match in _SIX.finditer(text):
        try:
            is_global = IPv6Address(match[0]).is_global
        except ValueError:
            continue
        if is_global:
            yield PersonalPiece(match.start(), match.end(), "ip_addresses")


_CARD = re.compile(
    r"(?<![\w.,+/-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5})"
    r"(?![\w/-]|[.,]\d)",
    re.ASCII,
)
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|65\d\d|64[4-9]\d)\d{12}"  # Discover
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
    r"|3(?:0[0-5]|[68]\d)\d{11}"  # Diners Club
    r"|62\d{14,17}"  # UnionPay
)


def _card_numbers(text: str) -> Iterator[PersonalPiece]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"[ -]", "", match[0])
        if _ISSUERS.fullmatch(digits) and len(set(digits)) > 1 and _luhn(digits):
            yield PersonalPiece(match.start(), match.end(), "card_numbers")


def _luhn(digits: str) -> bool:
    values = [int(it) for it in reversed(digits)]
    doubled = (sum(divmod(2 * it, 10)) for it in values[1::2])
    return (sum(values[::2]) + sum(doubled)) % 10 == 0


_IBAN = re.compile(
    r"(?<!\w)[A-Z]{2}\d\d(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)(?!\w)", re.ASCII
)
_IBAN_LENGTHS = {
    15: "NO", 16: "BE", 18: "DK FO FI GL NL SD", 19: "MK SI", 20: "AT BA EE KZ XK LT LU MN",
    21: "HR LV LI CH",
    22: "BH BG CR GE DE IE ME RS GB VA", 23: "GI IQ IL TL AE", 24: "AD CZ MD PK RO SA SK ES SE TN VG",
    25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MR MC SM", 28: "AL AZ BY CY DO SV GT HU LB NI PL",
    29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
}  # fmt: skip
_IBAN_LENGTH = {
    country: length for length, countries in _IBAN_LENGTHS.items() for country in countries.split()
}


def _ibans(text: str) -> Iterator[PersonalPiece]:
    for match in _IBAN.finditer(text):
        length, end = _IBAN_LENGTH.get(match[0][:2], 0), match.start()
        signs = ""
        while end < match.end() and len(signs) < length:  # A word may follow the groups.
            signs += text[end].strip()
            end += 1
        is_whole = end == len(text) or not text[end].isalnum()
        if length and len(signs) == length and is_whole and _mod_97(signs) == 1:
            yield PersonalPiece(match.start(), end, "ibans")


def _mod_97(iban: str) -> int:
    return int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97


_INTERNATIONAL = re.compile(r"(?<![\w+.*/-])\+\d[\d ().\-/\u00a0]{6,24}", re.ASCII)
_AMERICAN = re.compile(
    r"(?<![\w.+/-])(?:\([2-9]\d\d\) ?[2-9]\d\d-|[2-9]\d\d([-.])[2-9]\d\d\1)\d{4}(?![\w/-]|\.\d)", re.ASCII
)
_COUNTRY = re.compile(
    r"1[2-9]\d\d[2-9]\d{6}$|7\d{10}$|(?:2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58])\d{7,13}$"
    r"|(?:2[1-69]|3[578]|42|5[09]|6[789]|8[0578]|9[67])\d\d{6,12}$|99[2-68]\d{6,12}$"
)
"""The ITU's country codes, with the length of numbers (E.164)."""
_ODD = re.compile(r"[ .\-/\u00a0]{3}|[.\-/]{2}|\d\.\d{5}")


def _phones(text: str) -> Iterator[PersonalPiece]:
    for match in _INTERNATIONAL.finditer(text):
        # What follows two blanks is another column.
        whole = match[0].partition("  ")[0]
        written = whole.rstrip(" ().-/\u00a0")
        digits = re.sub(r"\D", "", written)
        end = match.start() + len(written)
        is_whole = end == len(text) or not (text[end].isalnum() or text[end] == "%")
        is_decimal = written.count(".") == 1
        if is_whole and not is_decimal and _COUNTRY.match(digits) and not _ODD.search(written):
            yield PersonalPiece(match.start(), end, "phones")
    for match in _AMERICAN.finditer(text):
        yield PersonalPiece(match.start(), match.end(), "phones")


_FINDERS: tuple[Callable[[str], Iterator[PersonalPiece]], ...] = (
    _emails,
    _ip_addresses,
    _card_numbers,
    _ibans,
    _phones,
)
