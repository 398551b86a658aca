"""Spelling: text and SQL that act on no terminal, on no psql and on no log of a CI, whatever names in them hold.

A byte that is no character is in a str as Python's surrogateescape has it: of a database whose encoding knows bytes
only. In one of another encoding, the names that all databases share may hold such bytes, too: those no SQL can write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress

_TOKEN = re.compile(
    r"""--[^\n]*|[eE]'(?:[^'\\]|''|\\.)*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|\w[\w$]*"""
    r"""|(?P<tag>\$(?:[^\W\d]\w*)?\$)(?P<body>.*?)(?P=tag)|.""",
    re.S,
)
_BYTES, _ALIEN = re.compile("[\udc80-\udcff]+"), re.compile("[\ud880-\ud8ff]+")
_ALIEN_BELOW = 0x400
_ALONE = re.compile(r"\s*(SELECT|(CREATE|DROP) (UNIQUE )?INDEX CONCURRENTLY)\b")  # what a DO block cannot, or shows not


def text_of(words: bytes, *, in_bytes: bool) -> str:
    """Read what a server says, in UTF-8 or, where it knows bytes only, ASCII; keep what is no character."""
    if in_bytes:
        return words.decode("ascii", "surrogateescape")
    with suppress(UnicodeDecodeError):  # nearly always, and ten times as fast
        return words.decode()
    text = words.decode(errors="surrogateescape")
    return _BYTES.sub(lambda found: "".join(chr(ord(byte) - _ALIEN_BELOW) for byte in found[0]), text)


def to_bytes(text: str) -> bytes:
    """Write text as the server has it: the inverse of text_of()."""
    text = _ALIEN.sub(lambda found: "".join(chr(ord(byte) + _ALIEN_BELOW) for byte in found[0]), text)
    return text.encode(errors="surrogateescape")


def in_bytes(text: str) -> bool:
    """Say whether it has bytes that are no characters."""
    return _BYTES.search(text) is not None


def readable(text: str) -> str:
    r"""Write bytes as the characters that they are in UTF-8, if they are, else as \x and two digits."""
    for bytes_ in (_BYTES, _ALIEN):
        text = bytes_.sub(lambda found: to_bytes(found[0]).decode(errors="backslashreplace"), text)
    return text


def shown(text: str, *, kept: str = "") -> str:
    r"""Write what is not printable, and not kept, as JSON and E'…' do: as \u and four digits, twice beyond U+FFFF.

    ##[ begins a command wherever it stands in a log of GitHub Actions (actions/runner, ActionCommand.cs).
    """
    if not text.isprintable():
        text = "".join(char if char.isprintable() or char in kept else _code(char) for char in readable(text))
    return text.replace("##[", r"#\u0023[")


def lines(texts: Iterable[str]) -> str:
    """Join texts that are one line each: a line break in one belongs to a name."""
    return "\n".join(text.replace("\n", r"\u000a") for text in texts)


def literal(value: str | Iterable[str] | None) -> str:
    """Write a text, an array of texts or NULL as SQL does."""
    if value is None:
        return "NULL"
    if not isinstance(value, str):
        value = "{" + ",".join('"' + re.sub(r'(["\\])', r"\\\1", item) + '"' for item in value) + "}"
    quoted = "'" + value.replace("'", "''") + "'"
    return " E" + quoted.replace("\\", "\\\\") if "\\" in value else quoted


def respelled(sql: str, *, kept: str = "") -> str:
    r"""Write SQL so that its names, as U&"…", and its literals, as E'…', hold nothing that acts; kept: in literals.

    They are ASCII then: psql may take what comes through a pipe for another encoding than ours. A literal with a
    backslash becomes E'…', too: then standard_conforming_strings is of no concern. A name with bytes that are no
    characters has no such form: its statement becomes a literal, which PL/pgSQL or psql executes.
    """
    written: list[str] = []
    begun: list[str] = []  # of a statement
    for token in _TOKEN.finditer(sql):
        begun.append(_respelled(token, kept))
        if token[0] == ";":
            written.append(_executed("".join(begun)))
            begun = []
    return "".join([*written, *begun])


def _respelled(token: re.Match[str], kept: str) -> str:
    text = token[0]
    keeps = "" if re.search(r"\n\s*(::|\\)", text) else kept  # a log's reader knows no quotes
    if token["tag"]:
        body = "".join(_respelled(inner, kept) for inner in _TOKEN.finditer(token["body"]))
        return f"{token['tag']}{body}{token['tag']}"
    if text[0] == '"' and text != _ascii(text):
        return "U&" + _ascii(text.replace("\\", r"\\"), mark="\\")
    if text[0] == "'" and (text != _ascii(text, keeps, byte=r"\x") or "\\" in text):
        text = "E" + text.replace("\\", r"\\")
    return _ascii(text, keeps, byte=r"\x") if text[-1] == "'" else text


def _ascii(text: str, kept: str = "", *, mark: str = r"\u", byte: str = "") -> str:
    r"""Escape what is not printable ASCII, and not kept; byte: what a byte's digits follow, else it is left."""

    def code(char: str) -> str:
        if _ALIEN.match(char) or (_BYTES.match(char) and not byte):
            return char
        return f"{byte}{ord(char) & 0xFF:02x}" if _BYTES.match(char) else _code(char, mark)

    if not (text.isascii() and text.isprintable()):
        text = "".join(c if (c.isascii() and c.isprintable()) or c in kept else code(c) for c in text)
    return text.replace("##[", f"#{mark}0023[")


def _code(char: str, mark: str = r"\u") -> str:
    return mark + char.encode("utf-16-be", "surrogatepass").hex("|", -2).replace("|", mark)


def _executed(statement: str) -> str:
    """Write a statement so that bytes in its names are what they are, whatever psql's encoding; else as a comment."""
    begin = statement[: len(statement) - len(statement.lstrip())]
    if _ALIEN.search(statement):
        why = "a name in it is of another encoding than this database's; have it renamed where it was given"
        return f"{begin}-- left out: {why}: {' '.join(shown(statement).split())}\n"
    if not in_bytes(statement):
        return statement
    written = _ascii(statement.strip()[:-1].replace("\\", "\\\\").replace("'", "''"), "\n", byte=r"\x")
    if _ALONE.match(statement):  # in no function; psql sends what it has got
        return f"{begin}SET client_encoding = SQL_ASCII; SELECT E'{written}' \\gexec\nRESET client_encoding;"
    tag = "run"
    while f"${tag}$" in written:
        tag += "_"
    return f"{begin}DO ${tag}$ BEGIN EXECUTE E'{written}'; END ${tag}$;"
