"""To the hub: the files of a pipeline, a model or a scheduler, and a card that tells what they are, in one commit."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from suffuse.errors import HubError, MissingFileError
from suffuse.hub.sources import check_name

CARD = "README.md"
LOCAL_ONLY = {"SHA256SUMS"}
"""Files that stay here: the hub has hashes of its own."""
PATIENCE = 60.0
"""Seconds that the hub may be silent for: to take in a large commit takes it long."""

AGAIN = "try again later: the repository is as it was"


class PushToHubMixin:
    """Can be published on the hub."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> str:
        """Publish: one commit with all files, in a repository that is made if need be.

        Args:
            repo_id: "org/name", or "name" for one of the account's own.
            commit_message: What the commit says; "Upload StableDiffusionPipeline" and the like, if None.
            private: Whether a new repository is private.
            token: Of the account; that of `hf auth login`, if None.
            create_pr: Propose the change instead of making it.
            safe_serialization: False writes pickles.
            variant: "fp16" and the like, which becomes part of the names of weights files.

        Returns:
            The address of the commit, or of the proposal.

        Raises:
            HubError: The hub did not take it; nothing of the repository was changed.
        """
        check_name(repo_id)
        options = {"safe_serialization": safe_serialization, "variant": variant}
        save: Any = getattr(self, "save_pretrained")  # noqa: B009
        taken = inspect.signature(save).parameters
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "checkpoint"
            save(folder, **{name: value for name, value in options.items() if name in taken})
            return publish(type(self).__name__, folder, repo_id, commit_message, private, token, create_pr)


def publish(
    kind: str,
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> str:
    """Publish the files of a folder, hidden ones left out.

    Args:
        kind: The name of the class that was saved there.
        folder: The folder.
        repo_id: The name of the folder, if None.
        commit_message: As `PushToHubMixin.push_to_hub` takes it, like all that follow.
        private: Of a new repository.
        token: Of the account.
        create_pr: Propose only.

    Returns:
        The address of the commit, or of the proposal.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder).resolve()
    name = repo_id or folder.name
    check_name(name)
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    if not files:
        raise MissingFileError(f"{folder} holds nothing to publish")
    api = HfApi(token=token, library_name="suffuse")
    with _published(name):
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        contents: dict[str, Any] = {path: file for path, file in files.items() if path not in LOCAL_ONLY}
        if CARD not in contents and not api.file_exists(name, CARD):
            contents[CARD] = model_card(kind, name).encode()
        commit = api.create_commit(
            name,
            [CommitOperationAdd(path, content) for path, content in contents.items()],
            commit_message=commit_message or f"Upload {kind}",
            create_pr=create_pr,
        )
    return str(commit.pr_url or commit.commit_url)


def model_card(kind: str, name: str) -> str:
    """The text of a README.md for the hub: what it is, and how it is loaded."""
    owner = "DiffusionPipeline" if kind.endswith("Pipeline") else kind
    variable = "pipe" if kind.endswith("Pipeline") else "scheduler" if kind.endswith("Scheduler") else "model"
    return f"""---
library_name: diffusers
tags:
- diffusers
- suffuse
- {kind}
---

# {name.split("/")[-1]}

A `{kind}`, saved by [suffuse](https://pypi.org/project/suffuse/).

```python
from suffuse import {owner}

{variable} = {owner}.from_pretrained("{name}")
```
"""


@contextlib.contextmanager
def _published(name: str) -> Generator[None]:
    """The hub's refusals as our errors, and an end to its silence."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import get_session

    from suffuse.hub.transfer import REMEDIES, http

    session = get_session()
    usual, session.timeout = session.timeout, PATIENCE
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = REMEDIES[403] if status == 401 else REMEDIES.get(status, AGAIN)
        found = error.server_message or str(error).split("\n")[0]
        raise HubError(f"{name} could not be published: the hub answered {status}", found=found, remedy=remedy) from error
    except (RuntimeError, ValueError) as error:  # what huggingface_hub makes of an upload that failed
        cause = error.__cause__ or error
        found = f"{type(cause).__name__}: {cause}"
        raise HubError(f"{name} could not be published: {error}", found=found, remedy=AGAIN) from error
    except LocalTokenNotFoundError as error:
        raise HubError(f"{name} could not be published: there is no token", remedy=REMEDIES[403]) from error
    except (http.HTTPError, ConnectionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise HubError(f"{name} could not be published: the hub cannot be reached", found=found, remedy=AGAIN) from error
    finally:
        session.timeout = usual
