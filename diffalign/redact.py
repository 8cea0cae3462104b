"""Hiding what looks like a secret in text that people or files will see."""

from __future__ import annotations

import re

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"(^|_)(token|secret|password|passwd|api_?key|access_?key|authorization|credentials?)$", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}")
_SECRET_PART = re.compile(
    r"(://)[^/\s:@]+:[^/\s@]+(?=@)|(\bBearer\s+)[\w.~+/=-]{8,}"
    r"|(\b(?:[\w.-]*_)?(?:token|secret|password|passwd|api_?key|access_?key)\s*[=:]\s*)[^\s&\"',}]+", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with access tokens, passwords in addresses and ``token=...`` hidden."""
    text = _SECRET_TEXT.sub(HIDDEN, text)
    return _SECRET_PART.sub(lambda m: next(group for group in m.groups() if group) + HIDDEN, text)
