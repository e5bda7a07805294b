# SPDX-License-Identifier: Apache-2.0
"""The statements of a kernel in PTX, as its text has them."""

from __future__ import annotations

import re
from dataclasses import dataclass

Operand = str | tuple[str, ...]  # a tuple: a vector of registers

COMMENT = re.compile(r"//[^\n]*|^\s*\.loc[^\n]*$", re.MULTILINE)
LABEL = re.compile(r"([$\w]+):(?!:)")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,]+")
REGISTERS = re.compile(r"\.reg\s+\.\w+\s+(.*)")


@dataclass(frozen=True)
class Statement:
    """One instruction.

    Attributes:
        op: with all its suffixes.
        operands: what it writes first; an address keeps its brackets.
        guard: a predicate without which a lane does nothing.
        is_negated: whether it is the lanes without the predicate that do something.
    """

    op: str
    operands: tuple[Operand, ...]
    guard: str | None = None
    is_negated: bool = False


@dataclass(frozen=True)
class Program:
    """The only kernel of a text."""

    parameters: tuple[str, ...]
    statements: tuple[Statement, ...]
    labels: dict[str, int]


class _Scopes:
    """Names of blocks in braces: each has its own registers and labels."""

    def __init__(self) -> None:
        self.open: list[tuple[str, set[str]]] = []
        self.count = 0

    def enter(self) -> None:
        self.count += 1
        self.open.append((f"@{self.count}", set()))

    def declare(self, names: str) -> None:
        if self.open:
            self.open[-1][1].update(name.strip() for name in names.split(","))

    def name(self, word: str) -> str:
        """Return a name that no other block has."""
        return next((word + suffix for suffix, names in self.open if word in names), word)

    def operand(self, text: str) -> Operand:
        if text[0] == "{":
            return tuple(self.name(word) for word in text[1:-1].split(","))
        if text[0] == "[":
            return f"[{self.name(text[1:-1])}]"
        return self.name(text)


def parse(text: str) -> Program:
    """Read a text with one kernel; a label stands in front of what branches to it in its block."""
    text = COMMENT.sub("", text)
    head, body = text[text.index(".entry") :].split(")", 1)
    parameters = re.findall(r"\.param [.\w ]*?(\w+)(?:,|\s*$)", head)
    body = body[body.index("{") + 1 :].lstrip()
    scopes, statements, labels = _Scopes(), list[Statement](), dict[str, int]()
    while body and (body[0] != "}" or scopes.open):
        if label := LABEL.match(body):
            scopes.declare(label[1])
            labels[scopes.name(label[1])] = len(statements)
            body = body[label.end() :]
        elif body[0] in "{}":
            if body[0] == "{":
                scopes.enter()
            else:
                scopes.open.pop()
            body = body[1:]
        else:
            line, _, body = body.partition(";")
            if declared := REGISTERS.match(line):
                scopes.declare(declared[1])
            elif not line.startswith(".pragma"):
                statements.append(_statement(" ".join(line.split()), scopes))
        body = body.lstrip()
    return Program(tuple(parameters), tuple(statements), labels)


def _statement(line: str, scopes: _Scopes) -> Statement:
    guard, is_negated = None, False
    if line[0] == "@":
        word, _, line = line[1:].partition(" ")
        guard, is_negated = scopes.name(word.lstrip("!")), word[0] == "!"
    op, _, rest = line.partition(" ")
    operands = (scopes.operand(text) for text in OPERAND.findall(rest.replace(" ", "")))
    return Statement(op, tuple(operands), guard, is_negated)
