"""How a repository is to be fetched: the keywords that every `from_pretrained` shares, described once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from suffuse.errors import InputError


@dataclass(frozen=True)
class HubOptions:
    """The keywords of `from_pretrained`, `download` and `load_config` that are about the hub. A local folder needs none of them.

    Attributes:
        revision: A branch, a tag or the hash of a commit; "main" if None.
        cache_dir: Where files are kept; the folder that all libraries of the hub share, if None.
        force_download: Fetch again what is in the cache.
        resume_download: Kept for its name: what was cut is always taken up where it stopped.
        local_files_only: Ask nobody; what is not in the cache is an error. The environment variable HF_HUB_OFFLINE does the same.
        token: The token of an account, False for none; that of `hf auth login` if None or True.
        use_auth_token: The older name of `token`.
        proxies: Scheme → address, `{"https": "http://proxy:3128"}`.
        mirror: Another address of the hub, as the environment variable HF_ENDPOINT gives it. It gets no token but one passed.
    """

    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    force_download: bool = False
    resume_download: bool | None = None
    local_files_only: bool | None = None
    token: str | bool | None = None
    use_auth_token: str | bool | None = None
    proxies: Mapping[str, str] | None = None
    mirror: str | None = None

    def __post_init__(self) -> None:
        for name in ("revision", "mirror"):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"{name} has the wrong type", found=getattr(self, name), expected="text or None")
        if self.force_download and self.local_files_only:
            raise InputError("force_download fetches and local_files_only does not", remedy="pass one of them")

    @property
    def credentials(self) -> str | bool | None:
        """The token under either name."""
        return self.token if self.token is not None else self.use_auth_token

    @classmethod
    def split(cls, keywords: Mapping[str, Any]) -> tuple[HubOptions, dict[str, Any]]:
        """The options among the keywords of a call, and the other keywords."""
        given = {name: value for name, value in keywords.items() if name in HUB_KEYWORDS}
        return cls(**given), {name: value for name, value in keywords.items() if name not in HUB_KEYWORDS}


HUB_KEYWORDS = tuple(field.name for field in fields(HubOptions))
"""The names of the options."""
