"""Which journals are this user's own: a plan carries a seal that only the user's key can make.

A journal says which files to move, wherever they are. One that came with a downloaded folder is a stranger's, and
what it says must not reach the user's other files.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from sdlab import show
from sdlab.dataset.disk import NEW, name_new, remove, sync_folder
from sdlab.dataset.files import read_start, reason_of
from sdlab.errors import SdlabError

_SIZE = 32  # bytes of a key, as many as SHA-256 makes


@dataclass(frozen=True)
class Seal:
    """HMAC-SHA256 under the key in the file `path`; without a path nothing is sealed and no seal fits."""

    path: Path | None = None

    def of(self, plan: str) -> str:
        """The seal of a plan's digest; the key is made with the first. "", with a warning, where none can be kept."""
        try:
            key = self._key() or self._new_key()
        except OSError as reason:
            show.warn(f"{self.path}: cannot keep a key ({reason_of(reason)}); --undo will ask for IMAGES too")
            return ""
        return hmac.new(key, plan.encode(), hashlib.sha256).hexdigest() if key else ""

    def fits(self, plan: str, seal: str) -> bool:
        """True if `of` made the seal. Raises SdlabError where the key is damaged."""
        try:
            key = self._key()
        except OSError as reason:
            show.warn(f"{self.path}: cannot be read ({reason_of(reason)})")
            return False
        return bool(key) and hmac.compare_digest(
            hmac.new(key, plan.encode(), hashlib.sha256).hexdigest().encode(),
            seal.encode("utf-8", "surrogatepass"),
        )

    def _key(self) -> bytes:
        if self.path is None or not self.path.exists():
            return b""
        key = read_start(str(self.path), _SIZE + 1)
        if len(key) != _SIZE:
            raise SdlabError("is not a key that sdlab made", where=str(self.path), next_step="Remove it")
        return key

    def _new_key(self) -> bytes:
        """Make the key, whole or not at all; another process may be quicker, and its key counts."""
        if self.path is None:
            return b""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = str(self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}.part"))
        try:
            with os.fdopen(os.open(part, NEW, 0o600), "wb") as file:
                file.write(secrets.token_bytes(_SIZE))
                file.flush()
                os.fsync(file.fileno())
            name_new(part, str(self.path))
            sync_folder(str(self.path.parent))
        except FileExistsError:
            pass
        finally:
            remove(part)
        return self._key()


NO_SEAL = Seal()
