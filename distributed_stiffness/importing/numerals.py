"""Numbers as people write them, in names of files and in tables: read right, or refused.

`lr=1.e-3`, `lr0,001`, `step_1,000`. A number that could be another one is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from distributed_stiffness.errors import CheckpointError

_EXPONENT = r"(?:[eE][-+]?[0-9]+)?"
# As a regular expression: a learning rate, and a whole number.
REAL = rf"(?:0,[0-9]+|[0-9]+\.?[0-9]*|\.[0-9]+){_EXPONENT}"
_GROUPED = r"[1-9][0-9]{0,2}(?:[,'_][0-9]{3})+"
WHOLE, WHOLE_OR_GROUPS = rf"(?:{_GROUPED}|[0-9]+)", rf"(?:[0-9]+|{_GROUPED})"
# Before and after a number, where it is whole and not the end of 1e-3 or the beginning of 1.5.
NOT_WITHIN = (r"(?<![0-9][eE])(?<![0-9][eE][-+])", r"(?![.,']?[0-9])(?![eE][-+]?[0-9])")

_NUMBER = re.compile(rf"\.?[0-9]+(?:[.,'][0-9]+)*(?:\.(?=[eE][-+]?[0-9]))?{_EXPONENT}")
_REST = re.compile(r"[A-Za-z0-9.,'+]*(?:[_ -][0-9]+)*")
_GOES_ON = re.compile(r"[A-Za-z]|[.,'][0-9]")
_GROUPS = re.compile(r"(?:[_ ][0-9]{2,3})*[_ ][0-9]{3}(?![A-Za-z0-9])")  # of 1_000_000
_DATE = re.compile(r"(?:19|20)[0-9]{2}([-_.])[0-9]{2}\1[0-9]{2}(?![0-9])")
_HASH = re.compile(r"(?=[0-9a-f]*[a-f])[0-9a-f]{6,}(?![A-Za-z0-9])")
# In front of a word these make it the name of another quantity: warmup_steps=100, min_lr=0.
_OTHER_QUANTITY = re.compile(
    r"(?<![A-Za-z])(?:warm_?up|max|min|num|n|no|total|final|end|decay|scheduler|lr|save|eval|log"
    r"|logging|per|every|accum|accumulation|patience|val|valid|validation|prev|previous|next|micro"
    r"|mini|mini_?batch|batch)[_-]?$",
    re.IGNORECASE,
)
# And these before a learning rate, that of a part or of a schedule by steps; or before a seed.
_OTHER_RATE = re.compile(r"(?<![A-Za-z])(?:step|head|encoder|decoder|backbone)[_-]?$", re.I)
_OTHER_SEED = re.compile(r"(?<![A-Za-z])(?:data|split|shuffle)[_-]?$", re.I)
_DAY = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?![0-9])")
# Another number of the same kind, after a sign that might join or part the two; no day or time, and
# no shard of several.
_SECOND_WHOLE = re.compile(
    r"[_ -](?!(?:19|20)[0-9]{6}(?![0-9])|(?:19|20)[0-9]{2}[-_.][0-9]{2}[-_.][0-9]{2}|[0-9]{10}"
    r"|[0-9]+-of-)[0-9]+(?![A-Za-z0-9]|[.,][0-9])"
)
_SECOND_RATE = re.compile(
    r"[_ -](?!(?:19|20)[0-9]{2}[-_.])[0-9]*(?:[.,][0-9]+|[0-9]\.?[eE][-+]?[0-9]+(?![A-Za-z0-9]))"
)


def real(text: str) -> float | None:
    """Read a learning rate; None: it is none.

    >>> real("1.e-3"), real("0,001"), real("1,000")
    (0.001, 0.001, None)
    """
    return float(text.replace(",", ".")) if re.fullmatch(REAL, text) else None


def whole(text: str) -> int | None:
    """Read a whole number; None: it is none.

    >>> whole("00468"), whole("1,000"), whole("1e5"), whole("5.0"), whole("1.000")
    (468, 1000, 100000, 5, None)
    """
    if re.fullmatch(WHOLE, text):
        return int(re.sub("[,'_]", "", text))
    if match := re.fullmatch(r"([0-9]+)\.00?", text):
        return int(match[1])
    if match := re.fullmatch(r"([0-9]+)[eE]\+?([0-9]{1,2})", text):
        return int(match[1] + int(match[2]) * "0")
    return None


def after(words: str, path: str, *, is_rate: bool, field: str) -> Iterator[str]:
    """Yield the numbers that stand after one of some words in a path.

    Args:
        words: a regular expression, such as "steps?|iter".
        path: of a checkpoint.
        is_rate: whether they are learning rates, not whole numbers.
        field: what they are, for the message.

    Raises:
        CheckpointError: one is not a number, or could be two; names it.
    """
    # What is glued to a word is another one (substep5), but a rate is not lost so (baselr0.1).
    glued = "" if is_rate else "(?<![A-Za-z0-9])"
    word = rf"{glued}(?:global[_-]?)?(?:{words})(?P<between>[^A-Za-z0-9/\\]*?)(?=\.?[0-9])"
    for match in re.finditer(word, path, re.IGNORECASE):
        before, between = path[: match.start()], match["between"]
        number = _NUMBER.match(path, match.end())
        assert number is not None  # the word's lookahead
        text, rest = number[0], path[number.end() :]
        if between == "" and not is_rate:
            text = text.removeprefix(".")  # ckpt.500
        from_here = path[number.end() - len(text) :]
        is_glued = before[-1:].isalnum()
        if _GOES_ON.match(rest) and (is_glued or (not is_rate and _HASH.match(from_here))):
            continue  # a hash, or within a word
        if not is_rate and _DATE.match(from_here):
            continue
        whole_token = text + _rest(rest)
        expected = "a number such as 0.001" if is_rate else "a whole number"
        is_negative = between.endswith("-") and (len(between) > 1 or (is_rate and text.isdigit()))
        if is_negative or set(between) & set("−–"):
            raise CheckpointError(_unclear(path, field, f"'-{text}'", f"expected {expected}"))
        others = [_OTHER_QUANTITY, *([_OTHER_RATE] if is_rate else [])]
        others += [_OTHER_SEED] if words == "seed" else []
        if is_glued or any(other.search(before) for other in others):
            raise CheckpointError(
                f"{path} has {_word_before(before)}{path[match.start() : number.end()]}, which may"
                f" be another quantity than the {field}: say where the {field} is with --pattern,"
                f" or give a --table"
            )
        value = real(text) if is_rate else whole(text)
        groups = _GROUPS.match(rest) if text.isdigit() and len(text) <= 3 else None
        if groups and not is_rate:
            both = f"may be {text} or {text}{re.sub('[_ ]', '', groups[0])}"
            raise CheckpointError(_unclear(path, field, f"'{text}{groups[0]}'", both))
        goes_on = r"[A-Za-z]|[.,'][0-9]|[\^%*]|;[0-9]|[.,'][eE][-+]?[0-9]"
        goes_on += r"|[-_ ][0-9]" if is_rate and text.isdigit() else ""
        second = _SECOND_RATE if is_rate else _SECOND_WHOLE
        odd = (
            (is_rate and re.fullmatch("0[0-9]+", text))
            or (words != "seed" and not is_rate and _DAY.fullmatch(text))
            or (not rest[:1].isascii() and rest[:1].isnumeric())
            or second.match(rest)
        )
        if value is None or odd or re.match(goes_on, rest):
            raise CheckpointError(_unclear(path, field, f"'{whole_token}'", f"expected {expected}"))
        if is_rate and value == 0:
            raise CheckpointError(
                f"{path} says {whole_token} for the {field}, and 0 stands for 'not given': say"
                " which it is with --pattern, or give a --table"
            )
        yield text


def _rest(rest: str) -> str:
    """What is written on without a gap, but for the suffix of a file."""
    found = _REST.match(rest)
    text = found[0] if found else ""
    return re.sub(r"(?:\.[A-Za-z]\w*)+$", "", text).rstrip(".,'_+-")


def _word_before(before: str) -> str:
    found = re.search(r"[A-Za-z0-9]+[_-]?$", before)
    return found[0] if found else ""


def _unclear(path: str, field: str, text: str, why: str) -> str:
    return (
        f"{path} has {text} for the {field}: {why}. Say where the {field} is with --pattern, or"
        " give a --table"
    )
