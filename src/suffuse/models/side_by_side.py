"""Several models that are one component: what they are given and give is combined, and their folders lie side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from suffuse.checkpoints.layout import numbered, numbered_folders
from suffuse.errors import MissingFileError
from suffuse.models.model import ModelMixin


def parts_of(component: Any) -> list[Any]:
    """The models of a component: one, several or none."""
    if isinstance(component, SideBySide):
        return component.parts
    return [] if component is None else [component]


class SideBySide(ModelMixin):
    """Models of one class; in a folder of a pipeline they are name, name_1 and so on.

    Class attributes:
        of: The class of each.
    """

    of: ClassVar[type[Any]]

    @property
    def parts(self) -> list[Any]:
        """The models."""
        raise NotImplementedError

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]: they are not published on their own
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> None:
        """Write each model into a folder of its own: `save_directory`, with _1, _2 and so on for those after it.

        Args:
            save_directory: The folder of the first.
            is_main_process: As of each model, like all that follow.
            save_function: Writes each weights file.
            safe_serialization: False writes pickles.
            variant: "fp16" and the like.

        Raises:
            SaveError: One of them could not be written.
        """
        for index, model in enumerate(self.parts):
            folder: Any = numbered(os.fspath(save_directory), index)
            model.save_pretrained(folder, is_main_process, save_function, safe_serialization, variant)  # pyright: ignore[reportCallIssue]

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]: one folder is not all of it
        cls, pretrained_model_path: str | os.PathLike[str], *, output_loading_info: bool = False, **options: Any
    ) -> Any:
        """The models of a folder and of those beside it with _1, _2 and so on.

        Args:
            pretrained_model_path: The folder of the first.
            output_loading_info: Return (model, dictionary of missing, unexpected and mismatched tensors).
            **options: As of each model's `from_pretrained`.

        Raises:
            MissingFileError: There is no such folder.
        """
        folders = numbered_folders(os.fspath(pretrained_model_path), cls.__name__, os.path.isdir)
        pairs = [cls.of.from_pretrained(folder, **options, output_loading_info=True) for folder in folders]
        if not pairs:
            raise MissingFileError(f"no folder {Path(pretrained_model_path)} with a {cls.of.__name__}")
        made = cls([model for model, _ in pairs])
        reports = {f"{index}": report for index, (_, report) in enumerate(pairs)}
        return (made, reports) if output_loading_info else made
