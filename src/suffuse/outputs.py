"""What models, schedulers and pipelines return: dataclasses that are also read by key, by position and as tuples."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, NoReturn

from torch.utils import _pytree


class BaseOutput(OrderedDict[str, Any]):
    """Base of results: subclass it as a `@dataclass`.

    A field is an attribute (`output.sample`), a key (`output["sample"]`) and a position (`output[0]`). Fields that are
    `None` have no key and no position. Iterating gives keys, as in any mapping; `to_tuple()` gives values.
    """

    def __init_subclass__(cls) -> None:
        # torch walks results (distributed gradients, export) only through types it knows.
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        first = getattr(self, names[0])
        if isinstance(first, dict) and first and set(first) <= set(names):
            # Libraries that move results between devices rebuild them as any mapping: type(output)({name: value}).
            for name in names:
                super().__setattr__(name, first.get(name))
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # pyright: ignore[reportArgumentType]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are not `None`, in order."""
        return tuple(self.values())

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} keeps its fields: none can be removed or merged in")

    __delitem__ = pop = popitem = update = setdefault = _refuse  # pyright: ignore[reportAssignmentType]
