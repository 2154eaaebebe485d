"""Support: names of files and categories: spelling, length, what is hidden; not needed to understand the paper."""

import hashlib
import os
import re
import unicodedata

# What systems put into folders of pictures, besides names that start with a dot; in lower case
SYSTEM_NAMES = {
    "__macosx", "network trash folder", "temporary items", "icon\r",  # macOS
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "recycled", "system volume information",
    "found.000",  # Windows
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@__thumb", "@recently-snapshot", "@sharebin",  # NAS boxes
    "lost+found", "__pycache__",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's and not the user's."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def nfc(name: str) -> str:
    """A name as Unicode composes it: file names from a Mac may hold 'é' as 'e' and an accent, which looks the same."""
    return unicodedata.normalize("NFC", name)


def is_unicode(name: str) -> bool:
    """False if a file's name is not UTF-8: Python keeps the odd bytes as surrogates, which no text may hold."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def one_line(text: str) -> str:
    """Text with escapes in place of line breaks and other control characters, which a file's name may hold."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda c: c[0].encode("unicode_escape").decode(), text)


def result_name(stem: str, suffix: str, limit: int = 255) -> str:
    """A file's name, stem + suffix, cut to what file systems take: `limit` bytes, or 85 Chinese characters.

    A longer stem keeps its beginning and its end, where the seed is; a hash of the whole stem between them keeps
    different names different.
    """
    if len(os.fsencode(stem + suffix)) <= limit:
        return stem + suffix
    middle = f"~{hashlib.blake2b(os.fsencode(stem), digest_size=4).hexdigest()}~"
    room = limit - len(os.fsencode(middle + suffix))
    end = _whole_characters(stem[::-1], room // 4)[::-1]
    return _whole_characters(stem, room - len(os.fsencode(end))) + middle + end + suffix


def _whole_characters(text: str, limit: int) -> str:
    """The longest beginning of a text that takes at most `limit` bytes in a file's name."""
    size = 0
    for i, c in enumerate(text):
        size += len(os.fsencode(c))
        if size > limit:
            return text[:i]
    return text
