"""Keep secrets out of what people pass on: configurations, reports, model cards."""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

WITHHELD = "(withheld)"
"""Stands where a secret was."""

SECRET_WORDS = {
    *("apikey", "authorization", "bearer", "credential", "credentials", "passphrase", "passwd"),
    *("password", "pwd", "secret", "secrets"),
}
SECRET_PAIRS = {(word, "key") for word in ("access", "api", "auth", "encryption", "private")}
SECRET_ENDS = {"auth", "pass", "sig", "signature", "token"}
"""Words that name a secret where a key ends in them: ``tokens_per_chunk`` does not. A signed URL
lets in whoever has it."""
VOCABULARY = {"bos", "cls", "eos", "image", "mask", "pad", "sep", "special", "unk"}
"""Words before ``token`` that make it one of a tokenizer."""

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
USER_OF_URL = re.compile(r"(?<=://)[^/\s]+(?=@)")
QUERY_OF_URL = re.compile(r"([?&;])([\w.~-]+)=([^&;\s#]+)")


def is_secret(key: str) -> bool:
    """Tell whether the value of a key is a secret, by its name.

    >>> [is_secret(key) for key in ("api_key", "hfToken", "DB_PASSWORD", "client-secret")]
    [True, True, True, True]
    >>> [is_secret(key) for key in ("tokens_per_chunk", "pad_token", "monitor", "tokenizer")]
    [False, False, False, False]
    """
    words = [word.lower() for word in WORD.findall(key)]
    pairs = set(pairwise(words))
    ends = words[-1:] and words[-1] in SECRET_ENDS and not VOCABULARY & set(words)
    return bool(SECRET_WORDS & set(words) or SECRET_PAIRS & pairs or ends)


def withhold(value: Any, key: str = "") -> Any:
    """Return a copy of plain values, nested or not, without secrets.

    Args:
        value: Mappings, lists and scalars.
        key: What names it.

    >>> withhold({"logger": {"api_key": "k", "url": "https://me:pw@host/a?token=t"}})
    {'logger': {'api_key': '(withheld)', 'url': 'https://(withheld)@host/a?token=(withheld)'}}
    """
    if isinstance(value, Mapping):
        # All within what is secret is.
        inner = key if is_secret(key) else ""
        return {name: withhold(part, inner or str(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [withhold(part, key) for part in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret(key):
        return WITHHELD
    return _without_credentials(value) if isinstance(value, str) else value


def _without_credentials(text: str) -> str:
    if "://" not in text:
        return text

    def answer(found: re.Match) -> str:
        value = WITHHELD if is_secret(found[2]) else found[3]
        return f"{found[1]}{found[2]}={value}"

    return QUERY_OF_URL.sub(answer, USER_OF_URL.sub(WITHHELD, text))


def withheld_keys(value: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of the values that :func:`withhold` has left nothing of."""
    if isinstance(value, Mapping | list):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in parts:
            yield from withheld_keys(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and WITHHELD in value:
        yield key
