"""The store behind Xet uploads in tests: a folder a write token, from which whole files are built again. `local://` is a
simulation that hf_xet has for tests of its own, so its version is pinned."""

import secrets
import struct
from pathlib import Path

import hf_xet

HEADER, ENTRY, END = 48, 48, b"\xff" * 32
VERIFIED, DESCRIBED = 31, 30  # bits: a second list of entries follows; the file's SHA-256 follows


class XetStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def new_url(self) -> str:
        """One folder a token: two processes cannot have the same one open."""
        place = self.folder / secrets.token_hex(8)
        place.mkdir(parents=True)
        return f"local://{place}"

    def fetch(self, sha256: str, size: int | None, target: Path) -> bool:
        """Write the file of that hash to `target`; False where no upload has brought it."""
        for shard in self.folder.glob("*/xet/xorbs/shards/*.mdb"):
            if found := _files(shard.read_bytes()).get(sha256):
                endpoint = f"local://{shard.parents[3]}"
                with hf_xet.XetSession().new_file_download_group(endpoint=endpoint) as group:
                    group.start_download_file(hf_xet.XetFileInfo(found, size), str(target))
                return True
        return False


def _files(shard: bytes) -> dict[str, str]:
    """SHA-256 -> Xet hash of the files that a shard describes."""
    found, at = {}, HEADER
    while shard[at : at + 32] != END:
        xet_hash = _hex(shard[at : at + 32])
        flags, entries = struct.unpack_from("<II", shard, at + 32)
        at += HEADER + ENTRY * entries * (2 if flags >> VERIFIED & 1 else 1)
        if flags >> DESCRIBED & 1:
            found[_hex(shard[at : at + 32])] = xet_hash
            at += ENTRY
    return found


def _hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
