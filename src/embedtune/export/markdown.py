"""Values that are safe in the Markdown of a model card, whatever they hold."""

import re


def one_line(text: str) -> str:
    """Return a text with everything escaped that is not printed, line breaks among it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_code(value: object) -> str:
    """Return a value as code that is safe in a cell of a Markdown table.

    >>> as_code("a <b> c"), as_code("a|b")
    ('`a <b> c`', '<code>a&#124;b</code>')
    """
    text = one_line(str(value))
    if text == text.strip() and not set("`|\\") & set(text):
        return f"`{text}`"
    # A code span knows no escapes, and a table looks for its bars first.
    return f"<code>{re.sub('[!-/:-@[-`{-~]', lambda found: f'&#{ord(found[0])};', text)}</code>"
