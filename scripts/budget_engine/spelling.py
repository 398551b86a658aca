"""Spelling: text and SQL that act on no terminal, on no psql and on no log of a CI, whatever names in them hold."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TOKEN = re.compile(
    r"""--[^\n]*|[eE]'(?:[^'\\]|''|\\.)*'|'(?:[^']|'')*'|"(?:[^"]|"")*"|\w[\w$]*"""
    r"""|(?P<tag>\$(?:[^\W\d]\w*)?\$)(?P<body>.*?)(?P=tag)|.""",
    re.S,
)


def shown(text: str, *, kept: str = "", mark: str = r"\u") -> str:
    r"""Write what is not printable, and not kept, as JSON and E'…' do: as \u and four digits, twice beyond U+FFFF.

    ##[ begins a command wherever it stands in a log of GitHub Actions (actions/runner, ActionCommand.cs).
    """

    def code(char: str) -> str:
        return mark + char.encode("utf-16-be", "surrogatepass").hex("|", -2).replace("|", mark)

    if not text.isprintable():
        text = "".join(char if char.isprintable() or char in kept else code(char) for char in text)
    return text.replace("##[", f"#{mark}0023[")


def lines(texts: Iterable[str]) -> str:
    """Join texts that are one line each: a line break in one belongs to a name."""
    return "\n".join(text.replace("\n", r"\u000a") for text in texts)


def respelled(sql: str, *, kept: str = "") -> str:
    r"""Write SQL so that its names, as U&"…", and its literals, as E'…', hold nothing that acts; kept: in literals.

    A literal with a backslash becomes E'…', too: then standard_conforming_strings is of no concern.
    """

    def spelled(token: re.Match[str]) -> str:
        text = token[0]
        keeps = "" if re.search(r"\n\s*(::|\\)", text) else kept  # a log's reader knows no quotes
        if token["tag"]:
            return f"{token['tag']}{respelled(token['body'], kept=kept)}{token['tag']}"
        if text[0] == '"' and text != shown(text):
            return "U&" + shown(text.replace("\\", r"\\"), mark="\\")
        if text[0] == "'" and (text != shown(text, kept=keeps) or "\\" in text):
            text = "E" + text.replace("\\", r"\\")
        return shown(text, kept=keeps) if text[-1] == "'" else text

    return _TOKEN.sub(spelled, sql)
