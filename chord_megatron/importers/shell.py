"""The commands of a shell script, read and never run: quotes, comments, continued lines, variables that it sets itself.

Lines are taken one after the other, as if each ran: a script that branches says so in `Script.notes`. Words are cut by
`shlex`; before that, a scan marks what shlex cannot tell apart, such as a `$` within single quotes.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import dropwhile

from chord_megatron.system.errors import UserError

# Of a `$` and a `(`; the output of a command; around an integer expression, $((...)).
_LITERAL, _QUOTED, _ARRAY, _OUTPUT, _SUM, _END = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\ue005"
_LONGEST_VALUE = 100_000  # characters: a variable of twice another one grows fast
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_REFERENCE = re.compile(
    rf"([${_QUOTED}])(?:\{{([A-Za-z_]\w*)(?:\[[@*]\])?(:?-[^{{}}]*)?\}}|([A-Za-z_]\w*)|([@*#?0-9])"
    rf"|\{{[0-9]:?-([^{{}}]*)\}})",
    re.ASCII,
)
_HERE_DOCUMENT = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
_REDIRECTION = re.compile(r"&?[<>]+[&|]?[ \t]*('[^']*'|\"[^\"]*\"|[^\s;|&]*)")
_EXPRESSION, _LONGEST_EXPRESSION = re.compile(f"{_SUM}([^{_END}]*){_END}"), 200  # characters
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}
_BEFORE_ASSIGNMENTS = ("export", "declare", "local", "readonly", "then", "else", "do")
_BEFORE_COMMANDS = (*_BEFORE_ASSIGNMENTS, "if", "elif", "while", "until", "!")
_BRANCHES = ("if", "elif", "for", "while", "until", "case", "function")


@dataclass(frozen=True)
class Command:
    """One command of a script."""

    words: list[str]
    environment: dict[str, str]  # the variables that the script has set by then
    unresolved: list[str]  # variables and commands, here or before, whose value nothing says


@dataclass
class Script:
    """The commands of a script, and what its reader should know of how they were read."""

    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Around:
    """What a script has not set itself: what the shell has, and what nobody says."""

    environment: Mapping[str, str | None]
    unresolved: list[str] = field(default_factory=list)
    withheld: list[str] = field(default_factory=list)  # of the environment, as far as the script reads it

    def value(self, name: str) -> list[str] | None:
        """What the shell has; None where it has nothing of that name, or nothing that may be read."""
        value = self.environment.get(name)
        self.withheld += [name] * (value is None and name in self.environment)
        return None if value is None else [value]


def read_script(text: str, name: str, environment: Mapping[str, str | None] | None = None) -> Script:
    """The commands of a script's text; `name` is the file's.

    environment: of the shell that would run it, None for a value that is withheld. Raises UserError.
    """
    if re.search(f"[{_LITERAL}-{_END}]", text):
        raise UserError(f"{name} holds characters of Unicode's private area (U+E000 to U+E005); remove them")
    script, around = Script(), _Around(environment or {})
    variables: dict[str, list[str]] = {}
    for raw in _raw_commands(text):
        try:
            words = shlex.split(raw)
        except ValueError as error:
            raise UserError(f"{name} is no shell script: {error} in {raw.strip()[:60]!r}; mend it") from None
        _take(words, variables, around, script, name)
    reason = "of this shell is not read: its name or its value speaks of a secret"
    script.notes += [f"${key} {reason}" for key in dict.fromkeys(around.withheld)]
    return script


def _take(words: list[str], variables: dict[str, list[str]], around: _Around, script: Script, name: str) -> None:
    """One command: its assignments change the variables, the rest of it is a command of the script."""
    if words and words[0] in _BRANCHES:
        note = f"{name} branches or loops ({words[0]}); each of its lines was read as if it ran"
        script.notes += [note] * (note not in script.notes)
    for key in _set_as_it_runs(words):
        variables[key] = [f"${key}"]
        around.unresolved.append(f"${key}")
    while words and words[0] in _BEFORE_ASSIGNMENTS:
        words = words[1:]
    own: dict[str, list[str]] = {}
    while words and (match := _ASSIGNMENT.fullmatch(words[0])):
        value = match[2]
        if value.startswith(_ARRAY):
            items = [value[1:], *words[1:]] if value[1:] else words[1:]
            variables[match[1]] = [word for item in items for word in _expand(item, variables, around, name)]
            return
        own[match[1]] = [" ".join(_expand(value, {**variables, **own}, around, name))]
        words = words[1:]
    known = {**variables, **own}
    if not words:
        variables.update(own)
        return
    expanded = [word for item in words for word in _expand(item, known, around, name)]
    environment = {key: " ".join(values) for key, values in known.items()}
    script.commands.append(Command(expanded, environment, [*around.unresolved]))


def _set_as_it_runs(words: list[str]) -> list[str]:
    """The variables of `for` and `read`, whose values no line of the script says."""
    command = list(dropwhile(lambda word: word in _BEFORE_COMMANDS or _ASSIGNMENT.fullmatch(word), words))
    names = {"for": command[1:2], "read": command[1:]}.get(command[0], []) if command else []
    return [name for name in names if name.isidentifier()]


def _expand(word: str, variables: dict[str, list[str]], around: _Around, name: str) -> list[str]:
    """The words that one word becomes. What has no value stays as it was written, and is unresolved."""
    whole = _REFERENCE.fullmatch(word)
    if whole and (whole[5] is not None and whole[5] in "@*"):
        return []  # the script's own arguments, of which there are none
    if whole and whole[1] == "$":  # bash cuts at blanks
        return [_plain(part) for text in _value(whole, variables, around) for part in text.split()]
    if whole and "[" in word:
        return [_plain(text) for text in _value(whole, variables, around)]
    text = _REFERENCE.sub(lambda match: " ".join(_value(match, variables, around)), word)
    text = _EXPRESSION.sub(lambda match: _integer(match[1]), text)
    if len(text) > _LONGEST_VALUE:
        raise UserError(f"{name} has a word of more than {_LONGEST_VALUE} characters; shorten its variables")
    if _OUTPUT in text:
        around.unresolved.append("$(...)")
    return [_plain(text)]


def _value(match: re.Match[str], variables: dict[str, list[str]], around: _Around) -> list[str]:
    key = match[2] or match[4]
    if match[6] is not None:  # an argument of the script that has a default
        return [match[6]]
    if key is None:  # of the script's own arguments, and the like
        if match[5] not in "@*":
            around.unresolved.append(f"${match[5]}")
        return [""] if match[5] in "@*" else [f"{_LITERAL}{match[5]}"]
    colon, has_default, default = (match[3] or "").partition("-")
    value = variables[key] if key in variables else around.value(key)
    if value is not None and (any(value) or not colon):  # `:-` is for what is empty, too
        return value
    if has_default:
        return [_REFERENCE.sub(lambda inner: " ".join(_value(inner, variables, around)), default)]
    around.unresolved.append(f"${key}")
    return [f"{_LITERAL}{key}"]


def _integer(expression: str) -> str:
    """The value of integers with + - * / % and parentheses; the output of a command where it is anything else."""
    words = re.sub(rf"[{_QUOTED}$]\{{?(\w+)\}}?", r"\1", expression)
    try:
        return str(_value_of(ast.parse(words, mode="eval").body)) if len(words) <= _LONGEST_EXPRESSION else _OUTPUT
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return _OUTPUT


def _value_of(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and (operation := _OPERATIONS.get(type(node.op))):
        return operation(_value_of(node.left), _value_of(node.right))
    raise ValueError("no sum of integers")


def _plain(text: str) -> str:
    return text.replace(_LITERAL, "$").replace(_QUOTED, "$").replace(_OUTPUT, "$(...)").replace(_ARRAY, "(")


def _raw_commands(text: str) -> list[str]:
    """The text of each command, without comments, redirections and here-documents."""
    scan = _Scan(text)
    while scan.at < len(text):
        scan.step()
    scan.end_command()
    return scan.commands


class _Scan:
    """One pass over a script, character by character."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.quote = text, 0, ""
        self.commands: list[str] = []
        self._parts: list[str] = []
        self._is_array = False
        self._here_documents: list[str] = []

    def step(self) -> None:
        """Take the next character, or what belongs to it."""
        character = self.text[self.at]
        if self.quote:
            self._within_quotes(character)
        elif character == "\\":
            self._escape()
        elif character in "'\"":
            self.quote = character
            self._keep(character)
        elif character == "#" and (not self._parts or self._parts[-1][-1].isspace()):
            self._skip_to(self.text.find("\n", self.at))
        elif match := _HERE_DOCUMENT.match(self.text, self.at):
            self._here_documents.append(match[2])
            self.at = match.end()
        elif match := _REDIRECTION.match(self.text, self.at):
            while self._parts and self._parts[-1].isdigit():
                self._parts.pop()
            self.at = match.end()
        elif character in "$`":
            self._substitution(character, marked=character)
        else:
            self._unquoted(character)

    def end_command(self) -> None:
        """What was read so far is a command."""
        if text := "".join(self._parts).strip():
            self.commands.append(text)
        self._parts, self._is_array = [], False

    def _keep(self, text: str) -> None:
        self._parts.append(text)
        self.at += 1

    def _skip_to(self, place: int) -> None:
        self.at = len(self.text) if place < 0 else place

    def _within_quotes(self, character: str) -> None:
        if self.quote == '"' and character == "\\":
            self._escape()
        elif self.quote == '"' and character in "$`":
            self._substitution(character, marked=_QUOTED)
        else:
            self.quote = "" if character == self.quote else self.quote
            self._keep(_LITERAL if character == "$" else character)

    def _escape(self) -> None:
        """A backslash: it takes a line's end away, and its meaning from a `$`."""
        following = self.text[self.at + 1 : self.at + 2]
        self.at += 2
        if following == "$":
            self._parts.append(_LITERAL)
        elif following == "\r" and self.text[self.at : self.at + 1] == "\n":
            self.at += 1
        elif following not in ("\n", ""):
            self._parts.append("\\" + following)

    def _substitution(self, character: str, *, marked: str) -> None:
        """`$` or a backquote: a variable is left to later; the output of a command has no value here."""
        if character == "`":
            self._parts.append(_OUTPUT)
            self._skip_to(self.text.find("`", self.at + 1))
            self.at += 1
        elif self.text.startswith("$(", self.at):
            depth, place = 1, self.at + 2
            while place < len(self.text) and depth:
                depth += {"(": 1, ")": -1}.get(self.text[place], 0)
                place += 1
            inner = self.text[self.at + 3 : place - 2]
            is_sum = self.text.startswith("$((", self.at) and self.text[place - 2 : place] == "))"
            self._parts.append(f"{_SUM}{self._names(inner)}{_END}" if is_sum else _OUTPUT)
            self.at = place
        else:
            self._keep(marked)

    def _names(self, expression: str) -> str:
        """An expression without blanks, in which names are variables with and without a `$`."""
        return re.sub(r"\$?\{?\b([A-Za-z_]\w*)\}?", rf"{_QUOTED}{{\1}}", "".join(expression.split()), flags=re.ASCII)

    def _unquoted(self, character: str) -> None:
        if character == "(" and self._parts and self._parts[-1] == "=":
            self._is_array = True
            self._keep(_ARRAY)
        elif character == ")" and self._is_array:
            self.at += 1
            self.end_command()
        elif character == "\n" and not self._is_array:
            self.end_command()
            self.at += 1
            self._skip_here_documents()
        elif character in ";|&" and not self._is_array:
            self.end_command()
            self.at += 1
        else:
            self._keep(" " if character.isspace() else character)

    def _skip_here_documents(self) -> None:
        for word in self._here_documents:
            match = re.compile(rf"^\t*{re.escape(word)}\r?$", re.MULTILINE).search(self.text, self.at)
            self._skip_to(match.end() if match else -1)
        self._here_documents.clear()
