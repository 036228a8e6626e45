"""Passwords and tokens in addresses, kept out of every file, log and message."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "***"
_SECRET_KEYS = "token|key|secret|password|passwd|pwd|pass|sig|signature|credential|auth|user"
_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.\-]*://)[^\s/?#@'\"]*(?:@[^\s/?#@'\"]*)*@", re.I)
_QUERY = re.compile(
    rf"(?P<key>[?&;#][\w.\-]*(?:{_SECRET_KEYS})[\w.\-]*=)[^&;#\s'\"]*", re.IGNORECASE
)


def redact(text: str, *addresses: str) -> str:
    """The text with names, passwords and tokens in addresses replaced by `***`.

    Args:
        addresses: whose secrets are replaced wherever they stand in the text, also outside an
            address: libraries repeat parts of an address in their messages.
    """
    for secret in sorted({s for a in addresses for s in _secrets(a)}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    return _QUERY.sub(rf"\g<key>{HIDDEN}", text)


def _secrets(address: str) -> set[str]:
    """Passwords and tokens of an address, as they are written and as they are meant."""
    try:
        parts = urlsplit(address)
        password, user = parts.password or "", parts.username or ""
    except ValueError:
        return set()
    written = {password, *([user] if user and not password else [])}
    for match in _QUERY.finditer(address):
        written.add(match[0].removeprefix(match["key"]))
    meant = {unquote(text) for text in written} | {
        value for key, value in parse_qsl(parts.query) if re.search(_SECRET_KEYS, key, re.I)
    }
    return {secret for secret in written | meant if secret and secret != HIDDEN}
