"""Companions: files that systems and tools leave beside others, in shards and in their folders. They are no samples.

They are known by their names alone: what macOS, Windows and network disks keep beside each file or folder, checksum
files, and the indexes and notes of other loaders (Energon, MDS, webdataset, img2dataset).
"""

import re
from fnmatch import fnmatchcase

_FOLDERS = (
    "__MACOSX", "PaxHeaders*", ".AppleDouble", ".Spotlight-V100", ".Trashes", ".Trash-*", ".fseventsd",
    ".TemporaryItems", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".nv-meta", ".git",
    ".cache", ".ipynb_checkpoints", "__pycache__",
)  # fmt: skip
_FILES = (
    "._*", ".DS_Store", ".localized", ".apdisk", "Icon\r", "Thumbs.db", "ehthumbs.db", "desktop.ini", ".directory",
    ".nfs*", ".fuse_hidden*", ".gitattributes", ".gitignore", ".gitkeep", "_SUCCESS", "_committed_*", "_started_*",
    "*.md5", "*.sha1", "*.sha256", "*.sha512", "*.crc", "*.crc32", "*.sfv", "*.md5sum", "*.sha256sum", "MD5SUM*",
    "SHA1SUM*", "SHA256SUM*", "SHA512SUM*", "*.idx", "*.index",
)  # fmt: skip
_PATTERNS = [(pattern, pattern.casefold()) for pattern in _FILES]
_INDEX_STEMS = re.compile(
    r"index|sizes|shards|shardindex|shard_sizes|wids(-.*)?|info|stats|dataset[-_]info|.*[-_.]index|.*_stats"
)


def companion(name: str) -> str:
    """The pattern by which a file, named with its folders, is known as a companion; '' for others."""
    *folders, base = name.strip("/").split("/")
    for folder in [*folders, base]:
        for pattern in _FOLDERS:
            if fnmatchcase(folder, pattern):
                return pattern
    plain = base.casefold()
    return next((pattern for pattern, folded in _PATTERNS if fnmatchcase(plain, folded)), "")


def is_index_name(stem: str) -> bool:
    """Whether a JSON file of this name, without its ending, is another loader's index or note by its name: in a shard
    only where nothing else has that key."""
    return bool(_INDEX_STEMS.fullmatch(stem))
