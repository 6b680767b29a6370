"""Finds secrets by the name they stand under and by their shape, in keys and inside of texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple, TypeAlias

from pltrace._slices import Slices

__all__ = ["REDACTED", "Rules", "clean"]

REDACTED = "[redacted]"

_Pattern: TypeAlias = "re.Pattern[str]"
#: One behind the other; each is short, or a run of characters of one kind, behind which nothing follows of that kind.
_Steps: TypeAlias = tuple[_Pattern, ...]

_CACHED_KEYS = _CACHED_TEXTS = 4_096
_LONGEST_NAME = 100
#: Longer texts are looked at in pieces of so many characters, as a pattern lets no other thread run meanwhile.
_PIECE = 65_536
#: So far a look goes beyond its piece: further than it takes to tell whether something begins at a character.
_OVERLAP = 1_500
#: And so far it takes to tell where a key begins.
_NEAR = 100

# --- The names that mean a secret, in snake_case -----------------------------------------------------

_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NOT_WORD = re.compile(r"[^a-z0-9]+")
# Singular and named one by one: `input_tokens`, `next_page_token` and `eos_token` are no secrets.
_TOKENS = (
    "access api app auth authorization bearer bot ci_?job client csrf deploy device gh git github gitlab"
    " hf hub huggingface hugging_?face id jwt npm oauth personal_?access private pypi refresh sas secret"
    " security service session sso slack telegram discord user vault x xsrf langsmith replicate"
).replace(" ", "|")
_KEYS = (
    "access account anthropic api auth azure client_?secret encryption function functions google license"
    " master openai private secret secret_?access service_?role session shared_?access signing ssh"
    " storage subscription"
).replace(" ", "|")
_SECRET_NAME = re.compile(
    rf"""(?:^|_)(?:(?:{_KEYS})_?keys?(?:_?id)?
    | secrets?(?:_?(?:string|value))? | client_?secret
    | pass_?(?:word|wd|phrase|code)s?(?:_?(?:confirm|confirmation|hash))? | pwd
    | (?:proxy_?)?authorization(?:_?header)? | (?:basic|http)_?auth | auth_?headers?
    | (?:set_?|session_?|auth_?)?cookies? | credentials? | creds | jwt | otp | connection_?string
    | (?:{_TOKENS})_?token | (?:access|api|auth|bearer|refresh)_?tokens
    )(?:_?\d+)?$ | ^(?:token|auth|bearer)$ | (?:api_?key|password|passwd|client_?secret)s?(?:_?\d+)?$""",
    re.VERBOSE,
)

# --- Strings that look like a key --------------------------------------------------------------------

_TAIL = r"[\w-]"


def _at_edge(*prefixes: str, then: str) -> str:
    """Match one of these where a word begins; the last letter of an escape is no part of a word.

    The letters come first, so that `re` looks for them and not for the edge, which is everywhere.
    """
    before = (
        r"(?<=\\[nrtbf]{0})",
        r"(?<=\\u[0-9a-fA-F]{{4}}{0})",
        r"(?<=\\x[0-9a-f]{{2}}{0})",
        r"(?<=%[0-9A-F]{{2}}{0})",
    )
    edge = "|".join((r"(?<![A-Za-z0-9]{0})", *before))
    return "|".join(f"{prefix}(?:{edge.format(prefix)}){then}" for prefix in prefixes)


def _anywhere(*prefixes: str, then: str) -> str:
    """Match one of these wherever it is."""
    return "|".join(f"{prefix}{then}" for prefix in prefixes)


# Each alternative starts with a letter outside of any group: `re` only tries where one of these letters is.
_KEY_BEGINS = r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
_KEY_ENDS = r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"


class _Shape(NamedTuple):
    """What a kind of secret looks like.

    Attributes:
        rare: A text that is rare in prose,
        gate: a pattern that starts with a rare letter,
        whole: and the shape, looked for only where both were found.
        instead: What takes its place.
        start: What tells it from another, within the overlap of pieces.
        kept: What stays of it, behind its start; most have nothing such.
        rest: How it goes on for as long as it likes, behind its start,
        marked: and how those alternatives do that a group marks;
        end: or what it ends with, if it does, whatever is before.
    """

    rare: str
    gate: _Pattern
    whole: _Pattern
    instead: str
    start: _Pattern
    kept: _Steps
    rest: _Steps
    marked: _Steps
    end: _Pattern | None


def _steps(*patterns: str, flags: int = 0) -> _Steps:
    return tuple(re.compile(pattern, flags) for pattern in patterns)


def _shape(
    rare: str, gate: str, whole: str, *rest: str,
    instead: str = REDACTED, start: str = "", kept: tuple[str, ...] = (), letters: bool = False, end: str = "",
) -> _Shape:  # fmt: skip
    found, all_of_it, begins, ends = _steps(gate, whole, start or whole, end, flags=re.ASCII)
    steps = _steps(*rest, flags=re.ASCII)
    marked = _steps(r"[A-Za-z0-9]*") if letters else steps
    return _Shape(rare, found, all_of_it, instead, begins, _steps(*kept), steps, marked, ends if end else None)


def _keys_that_begin(where: Callable[..., str]) -> tuple[_Shape, ...]:
    """Return the kinds of keys of one word, with what matches the beginnings that prose may have within a word."""
    # An empty group marks those that go on with letters and digits alone.
    dashed = (
        where("sk-", "glpat-", "nvapi-", "tvly-", "pplx-", "xai-", "GOCSPX-", "xox[a-z]-", then=rf"{_TAIL}{{16,}}")
        + rf"|sk-(?:proj|ant-\w{{1,16}}|svcacct|admin|or-v1)-{_TAIL}{{32,}}|sk-[A-Za-z0-9]{{40,}}()"
    )
    underscored = (
        r"github_pat_\w{20,}|gh[pousr]_[A-Za-z0-9]{20,}()|"
        + where("pl_", then=r"(?:[a-z]{2,8}_)?[A-Za-z0-9]{16,}()")
        + "|"
        + where("hf_", "gsk_", "npm_", "r8_", "fw_", "pcsk_", "whsec_", "ls__", then=r"[A-Za-z0-9]{16,}()")
        + "|"
        + where("sk_live_", "rk_live_", "sk_test_", "rk_test_", "lsv2_pt_", "lsv2_sk_", then=r"\w{10,}")
    )
    jwt = where("eyJ", then=r"(?<![_-]eyJ)[\w-]{6}")
    return (
        _shape(
            "-",
            r"-(?<=[a-zX]-)(?=[\w-]{10})(?:(?<=sk-)|(?<=glpat-)|(?<=nvapi-)|(?<=tvly-)|(?<=pplx-)|(?<=xai-)"
            r"|(?<=GOCSPX-)|(?<=xox[a-z]-))",
            dashed,
            rf"{_TAIL}*",
            letters=True,
        ),
        _shape(
            "_",
            r"_(?<=[bcfhklmoprsu28w]_)(?=\w{12})(?:(?<=pl_)|(?<=gh[pousr]_)|(?<=hf_)|(?<=[sr]k_)|(?<=github_)"
            r"|(?<=lsv2_)|(?<=ls_)|(?<=npm_)|(?<=r8_)|(?<=fw_)|(?<=whsec_))",
            underscored,
            r"\w*",
            letters=True,
        ),
        _shape(
            "J",
            r"J(?<=eyJ)",
            jwt + r"[\w-]*(?:\.[\w-]*){2,4}",
            *(r"[\w-]*", r"\.", r"[\w-]*", r"\.", r"[\w-]*", r"\.?", r"[\w-]*", r"\.?", r"[\w-]*"),
            start=jwt,
        ),
        _shape("K", r"K(?<=AK)IA[A-Z0-9]{16}", r"AKIA[A-Z0-9]{16,}", r"[A-Z0-9]*"),
        _shape("S", r"S(?<=AS)IA[A-Z0-9]{16}", r"ASIA[A-Z0-9]{16,}", r"[A-Z0-9]*"),
        _shape("z", r"z(?<=AIz)a", where("AIza", then=r"[\w-]{30,}"), r"[\w-]*"),
    )


_TOKEN = r"[\w.~+/=-]"
# Ordinary text must stay cheap, so each has a text that is rare in prose, and a gate. In this order: the body of a
# private key, and what is behind `Bearer`, mustn't lose their beginnings to what stands directly before.
_SHAPES = (
    _shape("-----BEGIN ", _KEY_BEGINS, rf"{_KEY_BEGINS}[\s\S]*?(?:{_KEY_ENDS}|\Z)", start=_KEY_BEGINS, end=_KEY_ENDS),
    _shape(
        "earer ",
        r"[Bb]earer ",
        # Of many spaces all or none: without the reference `re` would try again from each of them.
        rf"[Bb]earer(?=( +))\1(?:{_TOKEN}{{20,}}|(?=[A-Za-z_.-]{{0,19}}\d){_TOKEN}{{6,}})",
        *(rf"{_TOKEN}{{20}}|(?=[A-Za-z_.-]{{0,19}}\d){_TOKEN}{{6}}", rf"{_TOKEN}*"),
        start=r"[Bb]earer(?= )",
        kept=(" *",),
    ),
    *_keys_that_begin(_at_edge),
    _shape("@", "@", r"://[^\s/?#@:\"'<>\\]{0,256}:[^\s/\"'<>\\]{1,1024}@", instead=f"://{REDACTED}@"),
)
#: What it takes to look at a whole text at once.
_AT_ONCE = tuple((*shape[:3], shape) for shape in _SHAPES)
#: What may begin inside of a secret or directly behind it, where no word begins.
_GLUED = _keys_that_begin(_anywhere)
_GOES_ON = re.compile(r"[\w.-]")
_SHORTEST_SECRET = 12

# `"api_key": "…"`, `password='…'`, `?token=…`, `Authorization: Basic …` inside any text.
# Names of secrets end so; a look at three letters spares prose and JSON the dearer look at the name.
_ENDINGS = frozenset((
    "key", "eys", "ret", "ets", "ord", "rds", "pwd", "swd", "ase", "ode", "irm", "ash", "ion", "uth", "der",
    "ers", "kie", "ies", "ial", "als", "eds", "jwt", "otp", "ken", "ens",
    "ing", "lue",
))  # fmt: skip
_SEPARATORS = ((":", re.compile(r":\s{0,8}")), ("=", re.compile(r"=\s{0,8}")))
_NAME_BACKWARDS = re.compile(r"""\s{0,4}(["']?\\{0,16})([\w.-]{2,100})""")
_QUOTE = re.compile(r"""[bruf]{0,2}(\\{0,16}["'])(?!\1)""")
# What may stand without quotes, after a quoted name (JSON), after `name:` (headers, YAML) and `name=` (URLs,
# environments): neither "Password: required" nor code such as `token = read()` and `f(token=token)`.
_BARE_JSON = (
    _steps(r"\[(?=[^\[\]])", r"[^\[\]]*", r"\]"),
    _steps(r"\{(?=[^{}])", r"[^{}]*", r"\}"),
    _steps(r"-?\d", r"[\w.]*"),
)
_BARE = {
    ":": (
        _steps(r"(?i:basic|bearer|digest|token|apikey)(?= )", r" *", r"""(?=[^\s"',\\])""", r"""[^\s"',\\]*"""),
        _steps(r"(?=[\w.-])", r"[\w.-]*", r"""=(?=[^\n"'\\])""", r"""[^\n"'\\]*"""),
        _steps(r"(?=[^\s\d]{0,64}\d)[\w.~+/=!@#$%^&*-]{8}", r"[\w.~+/=!@#$%^&*-]*"),
    ),
    "=": (_steps(r"""(?!=)(?=[^\s&"'<>,;)\]}\\])""", r"""[^\s&"'<>,;)\]}\\]*"""),),
}


def clean(text: str) -> str:
    """Replace what JSON in UTF-8 or a database refuses: NUL and lone surrogates (pairs become one)."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    if text.isascii():
        return text
    try:
        if len(text) <= _PIECE:
            text.encode()
        else:
            slices = Slices(long=True)
            for begin in range(0, len(text), _PIECE):
                text[begin : begin + _PIECE].encode()
                slices.between()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Rules:
    """The default redaction: what names a secret, and what looks like one.

    Args:
        extra: More names of secrets and patterns.
        by_name: Whether names count; in a schema they name what a value will be, not a value.
        piece: Longer texts are looked at in pieces of so many characters.
    """

    def __init__(self, extra: Iterable[str | _Pattern], *, by_name: bool = True, piece: int = _PIECE) -> None:
        self._by_name = by_name
        self._piece = piece
        # A lone string would otherwise be taken for a row of one-letter names.
        extra = (extra,) if isinstance(extra, str) else tuple(extra)
        self._names = frozenset(item.casefold() for item in extra if isinstance(item, str))
        self._endings = _ENDINGS | {name.rstrip("_0123456789")[-3:] for name in self._names}
        self._any_ending = any(len(name.rstrip("_0123456789")) < 3 for name in self._names)
        self._patterns = tuple(item for item in extra if not isinstance(item, str))
        self.shortest = 0 if self._patterns else _SHORTEST_SECRET
        self.verdicts: dict[str, tuple[str, bool]] = {}
        #: Short texts that were looked at and have nothing in them to hide: the same ones come again and again.
        self.harmless: set[str] = set()

    def remember(self, text: str) -> None:
        """Take note of a short text that needs no further look; which ones are kept is bounded."""
        if len(self.harmless) >= _CACHED_TEXTS:
            self.harmless.clear()
        self.harmless.add(text)

    def verdict(self, name: str) -> tuple[str, bool]:
        """Return a mapping key as it may be shown, and whether what stands under it is a secret."""
        known = self.verdicts.get(name)
        if known is not None:
            return known
        snake = _NOT_WORD.sub("_", _HUMP.sub("_", name[-_LONGEST_NAME:]).lower()).strip("_")
        named = name.casefold() in self._names or _SECRET_NAME.search(snake) is not None
        secret = self._by_name and named
        shown = clean(name)
        verdict = (self.mask(shown) if len(shown) >= self.shortest else shown, secret)
        if len(name) <= _LONGEST_NAME:
            if len(self.verdicts) >= _CACHED_KEYS:
                self.verdicts.clear()
            self.verdicts[name] = verdict
        return verdict

    def mask(self, text: str) -> str:
        """Replace every part of a text that is a secret."""
        if len(text) > self._piece:
            pieces = _Pieces(self._piece)
            for shape in _SHAPES:
                text = pieces.replaced(text, shape)
            for char, separator in _SEPARATORS:
                text = self._mask_assigned(text, char, chain.from_iterable(pieces.found(text, char, separator)))
        else:
            for rare, gate, whole, shape in _AT_ONCE:
                if rare in text and gate.search(text) and whole.search(text):
                    text = _Pieces(self._piece).replaced(text, shape)
            for char, separator in _SEPARATORS:
                if char in text:
                    text = self._mask_assigned(text, char, separator.finditer(text))
        for pattern in self._patterns:
            text = pattern.sub(lambda _: REDACTED, text)
        return text

    def _mask_assigned(self, text: str, char: str, separators: Iterator[re.Match[str]]) -> str:
        parts: list[str] = []
        done = 0
        for found in separators:
            start = found.start()
            if start < done:
                continue
            ending = text[max(0, start - 16) : start].rstrip("\"'\\ _0123456789")[-3:].lower()
            if ending not in self._endings and not self._any_ending:
                continue
            before = text[max(done, start - 2 * _LONGEST_NAME) : start][::-1]
            name = _NAME_BACKWARDS.match(before)
            if name is None or not self.verdict(name[2][::-1])[1]:
                continue
            pieces = _Pieces(self._piece)
            quoted = _QUOTE.match(text, found.end())
            quote = name[1][::-1]
            if quoted:
                parts += text[done : quoted.end()], REDACTED
                done = pieces.end_of_quote(text, quoted.end(), quoted[1])
                continue
            if char == "=" and (found[0] != "=" or name.start(2) or before[name.end() :][:1] == "("):
                continue
            if text.startswith(REDACTED, found.end()):
                continue
            ends = (pieces.end(text, found.end(), steps) for steps in (_BARE_JSON if quote else _BARE[char]))
            end = next((end for end in ends if end is not None), None)
            if end is not None:
                parts += text[done : found.end()], quote + REDACTED + quote
                done = end
        return "".join(parts) + text[done:] if parts else text


class _Pieces:
    """Looks at a long text piece by piece, and lets other threads run in between.

    Args:
        size: Of a piece, in characters.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._slices = Slices(long=True)

    def replaced(self, text: str, shape: _Shape) -> str:
        """Return a text as `whole.sub` would; with a secret goes another one that begins in it or directly behind."""
        parts: list[str] = []
        done = at = 0
        while begin := self._first(text, at, shape.rare, shape.gate, shape.start):
            start, behind = begin.span()
            if shape.kept:
                start = behind = self.end(text, behind, shape.kept) or behind
            if shape.end:
                last = self._first(text, behind, "-----END ", shape.end, shape.end)
                end: int | None = last.end() if last else len(text)
            else:
                end = self.end(text, behind, shape.marked if begin.lastindex else shape.rest)
                end = end and self._end_of_glued(text, start, end)
            if end is None:
                at = begin.start() + 1
            else:
                parts += text[done:start], shape.instead
                # A token may end with the word that another one follows.
                done, at = end, end - len("Bearer") if shape.kept else end
        return "".join(parts) + text[done:] if parts else text

    def _end_of_glued(self, text: str, start: int, end: int) -> int:
        """Return where a secret ends, or the last of those that each begin in the one before or directly behind it."""
        # Mostly nothing follows that a key could go on with, and there is no need to look closer.
        while _GOES_ON.match(text, end) and (further := next(self._further(text, start, end), None)):
            start, end = further
        return end

    def _further(self, text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Give the secrets that begin in one that is here, and end behind it."""
        for shape in _GLUED:
            for begin in shape.start.finditer(text, max(start + 1, end - _OVERLAP), end + _NEAR):
                if begin.start() > end:
                    break
                last = self.end(text, begin.end(), shape.marked if begin.lastindex else shape.rest)
                if last is not None and last > end:
                    yield begin.start(), last

    def end(self, text: str, at: int, steps: _Steps) -> int | None:
        """Return where the last of some steps ends, the first of which begins here; None if one isn't there."""
        window = self._size + _OVERLAP
        for step in steps:
            found = step.match(text, at, at + window)
            while found and found.end() == at + window:  # It may go on.
                at = found.end()
                self._slices.between()
                found = step.match(text, at, at + window)
            if found is None:
                return None
            at = found.end()
        return at

    def end_of_quote(self, text: str, at: int, quote: str) -> int:
        """Return where a text in quotes ends: at a quote without a backslash before it, or with the line."""
        mark = re.escape(quote)
        end = re.compile(rf"{mark}(?<!\\{mark})|\n")
        for begin in range(at, len(text), self._size):
            self._slices.between()
            if found := end.search(text, begin, begin + self._size + len(quote)):
                return found.start()
        return len(text)

    def _first(self, text: str, at: int, rare: str, gate: _Pattern, start: _Pattern) -> re.Match[str] | None:
        """Return the first match of `start`, as far as what it looks at ahead is within the overlap."""
        for begin in range(at, len(text), self._size):
            end = begin + self._size
            edge = end + _OVERLAP
            self._slices.between()
            if text.find(rare, begin, edge) >= 0 and gate.search(text, begin, edge):
                found = start.search(text, begin, edge)
                if found and found.start() < end:
                    return found
        return None

    def found(self, text: str, char: str, separator: _Pattern) -> Iterator[Iterator[re.Match[str]]]:
        """Give what `finditer` would, of a pattern that begins with a character which it has but once."""
        at = 0
        while at < len(text):
            self._slices.between()
            end = at + self._size + _OVERLAP
            # Where the next one begins, or far behind the last.
            border = text.find(char, at + self._size, end)
            yield separator.finditer(text, at, border if border >= 0 else end)
            at = border if border >= 0 else end
