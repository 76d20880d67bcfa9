"""What a model offers about its low-rank adapters: load, choose, weigh by block, fuse, remove."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from suffuse.checkpoints.adapter_files import Choice
from suffuse.errors import AdapterError, nearest, unknown_argument
from suffuse.hub.options import HUB_KEYWORDS, HubOptions
from suffuse.layers.low_rank import LowRankAdapters, Weight, adapters_of, check_known, delete_adapters, drop_adapters, number
from suffuse.models.lora import USUAL_NAME, Given, LoraFile, load_lora
from suffuse.models.lora_writing import write_lora

Wanted = float | Mapping[str, Any] | None
"""How much of an adapter: a number, or numbers by "down", "mid", "up" and the blocks and layers inside; None for 1."""


class AdapterServices(nn.Module):
    """Ways to load low-rank adapters into a model, and to choose among them."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Given,
        prefix: str | None = "unet",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        network_alphas: Mapping[str, float] | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        **keywords: Any,
    ) -> None:
        """Load an adapter, and make it the only active one.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder, a repository, or named tensors.
            prefix: The component of the file that is meant; None for all of its keys.
            hotswap: Let it take the place of the adapter of that name: where ranks are the same, no module changes.
            adapter_name: What it is to be called; "default_0", "default_1", … if None.
            network_alphas: "unet.layer.alpha" → α, where the file does not tell.
            weight_name: The name of the file in a folder or a repository.
            subfolder: Of the folder or the repository.
            use_safetensors: True refuses pickles, False takes nothing else, None prefers safetensors.
            low_cpu_mem_usage: Kept for its name: memory is taken once in any case.
            **keywords: The `suffuse.hub.options.HubOptions`.

        Raises:
            AdapterError: It does not fit, or the name is taken; nothing is changed.
            NonFiniteError: A tensor holds NaN or infinity; nothing is changed.
        """
        options = hub_options(f"{type(self).__name__}.load_lora_adapter", keywords)
        choice = Choice(weight_name, subfolder, use_safetensors, (USUAL_NAME,))
        config: Any = getattr(self, "config", None)
        file = LoraFile.open(pretrained_model_name_or_path_or_dict, choice, options, config, network_alphas)
        load_lora(file if prefix is None else file.only(prefix), {prefix or "unet": self}, adapter_name, hotswap)

    def load_attn_procs(self, pretrained_model_name_or_path_or_dict: Given, **keywords: Any) -> None:
        """The older name of `load_lora_adapter`."""
        self.load_lora_adapter(pretrained_model_name_or_path_or_dict, **keywords)

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write an adapter of this model alone.

        Args:
            save_directory: The folder; other files in it stay.
            adapter_name: Which.
            upcast_before_saving: Write float32.
            safe_serialization: False writes a pickle.
            weight_name: The name of the file; pytorch_lora_weights.safetensors if None.

        Raises:
            AdapterError: No adapter is called so.
            SaveError: It could not be written; what was there is untouched.
        """
        layers = lora_layers(self, adapter_name)
        layers = {name: tensor.float() for name, tensor in layers.items()} if upcast_before_saving else layers
        write_lora({"": layers}, save_directory, True, weight_name, None, safe_serialization)

    def save_attn_procs(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write the one active adapter; the older name of `save_lora_adapter`.

        Raises:
            AdapterError: None is active, or several are.
        """
        active = self.active_adapters()
        if len(active) != 1:
            raise AdapterError("one adapter must be active to be saved", found=", ".join(active) or "none")
        parts = {"": lora_layers(self, active[0])}
        write_lora(parts, save_directory, is_main_process, weight_name, save_function, safe_serialization)

    def lora_layers(self, adapter_name: str) -> dict[str, Tensor]:
        """The factors of an adapter as `save_lora_weights` takes them: "layer.lora_A.weight", "….lora_B.weight", "layer.alpha".

        Raises:
            AdapterError: No adapter is called so.
        """
        return lora_layers(self, adapter_name)

    def set_adapters(self, adapter_names: Sequence[str] | str, weights: Wanted | Sequence[Wanted] = None) -> None:
        """Make these adapters the active ones.

        Args:
            adapter_names: One or more; their updates are added in this order.
            weights: How much of each: a number for all, or one entry for each. An entry may be a dictionary, such as
                `{"down": 0.5, "mid": 1, "up": {"block_0": 0.6, "block_1": [0.4, 0.8, 1.0]}}`; what it leaves out counts once.

        Raises:
            AdapterError: A name is unknown, a list has another length, or a block is not there; nothing is changed.
        """
        names = listed(adapter_names)
        adapters = self._adapters()
        check_known(names, adapters.names)
        wanted = zip(names, each(weights, names), strict=True)
        adapters.activate({name: block_weights(self, weight) for name, weight in wanted})

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make these adapters the active ones, each counting once."""
        self.set_adapters(adapter_name)

    def active_adapters(self) -> list[str]:
        """Names of the active adapters.

        Raises:
            AdapterError: None is loaded.
        """
        return list(self._adapters().weights)

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Remove adapters.

        Raises:
            AdapterError: A name is unknown, or the adapter is fused; nothing is changed.
        """
        names = listed(adapter_names)
        check_known(names, self._adapters().names)
        self._adapters().check_unfused(names)
        delete_adapters(self, names)

    def enable_adapters(self) -> None:
        """Let the active adapters count again."""
        self._adapters().enable(True)

    def disable_adapters(self) -> None:
        """Let no adapter count until `enable_adapters`."""
        switch_off(self._adapters())

    def enable_lora(self) -> None:
        """Let the active adapters count again."""
        self.enable_adapters()

    def disable_lora(self) -> None:
        """Let no adapter count until `enable_lora`."""
        self.disable_adapters()

    def fuse_lora(self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add updates to the weights themselves: as fast as without adapters. Weights as they were are kept for `unfuse_lora`.

        Args:
            lora_scale: How many times the updates count.
            safe_fusing: Look for NaN and infinity in the sums first.
            adapter_names: Which adapters; the active ones if None.

        Raises:
            AdapterError: A name is unknown, or fused already; nothing is changed.
            NonFiniteError: `safe_fusing` found some; nothing is changed.
        """
        names = None if adapter_names is None else listed(adapter_names)
        check_known(names or (), self._adapters().names)
        fuse([self._adapters()], lora_scale, safe_fusing, names)

    def unfuse_lora(self) -> None:
        """Give the weights back the very bits they had before `fuse_lora`."""
        self._adapters().unfuse()

    def unload_lora(self) -> None:
        """Remove all adapters. What is fused stays in the weights, for good."""
        drop_adapters(self)

    def _adapters(self) -> LowRankAdapters:
        adapters = adapters_of(self)
        if adapters is None:
            raise AdapterError(f"{type(self).__name__} has no adapters", remedy="load one first: load_lora_adapter(…)")
        return adapters


# ---------------------------------------------------------------- for models and pipelines alike


def lora_layers(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The factors of an adapter of a model by the keys of PEFT; and α, where it is not the rank."""
    adapters = adapters_of(model)
    check_known([adapter_name], adapters.names if adapters is not None else ())
    made: dict[str, Tensor] = {}
    for layer, factors in (adapters.factors(adapter_name) if adapters is not None else {}).items():
        made |= {f"{layer}.lora_A.weight": factors.down, f"{layer}.lora_B.weight": factors.up}
        if factors.alpha != len(factors.down):
            made[f"{layer}.alpha"] = factors.down.new_tensor(factors.alpha)
    return made


def fuse(parts: Iterable[LowRankAdapters], scale: float, finite: bool, names: Sequence[str] | None) -> None:
    """Fuse adapters of one or more models, of all or of none; see `AdapterServices.fuse_lora`."""
    scale = number("lora_scale", scale)
    jobs = [(part, [name for name in (part.weights if names is None else names) if name in part.names]) for part in parts]
    for part, own in jobs:
        part.check_fusing(own, scale, finite)
    for part, own in jobs:
        part.fuse(own, scale)


def switch_off(adapters: LowRankAdapters) -> None:
    """Let no adapter count."""
    adapters.check_unfused(adapters.fused)
    adapters.enable(False)


def listed(names: Sequence[str] | str) -> list[str]:
    """One name, or several, as a list."""
    return [names] if isinstance(names, str) else list(names)


def each(weights: Any, names: Sequence[str]) -> list[Any]:
    """One entry for each name.

    Raises:
        AdapterError: There are more or less.
    """
    if not isinstance(weights, (list, tuple)):
        return [weights] * len(names)
    if len(weights) != len(names):
        raise AdapterError(
            "there must be one weight for each adapter", found=f"{len(weights)} for {len(names)}: {', '.join(names)}"
        )
    return list(weights)


def block_weights(model: Any, wanted: Wanted, default: float = 1.0) -> Weight:
    """Weights by block, as one for each place of attention: "down_blocks.1.attentions.0" → 0.5; `default` where none is told.

    Raises:
        AdapterError: A block or layer is not there, or is given more or fewer numbers than it has.
    """
    if not isinstance(wanted, Mapping):
        return number("the weight of an adapter", wanted)
    _check_names("", wanted, ("down", "mid", "up"))
    made = {"mid_block.attentions.0": _numbers("mid", wanted.get("mid", default), 1)[0]}
    for way in ("down", "up"):
        blocks: list[Any] = list(getattr(model, f"{way}_blocks"))
        layers = [getattr(block, "attentions", None) for block in blocks]
        counts = {f"block_{n}": len(attentions) for n, attentions in enumerate(layers) if attentions is not None}
        given = wanted.get(way, default)
        given = given if isinstance(given, Mapping) else dict.fromkeys(counts, given)
        _check_names(f"{way}.", given, counts)
        for block, count in counts.items():
            place = f"{way}_blocks.{block.removeprefix('block_')}.attentions"
            values = _numbers(f"{way}.{block}", given.get(block, default), count)
            made |= {f"{place}.{layer}": value for layer, value in enumerate(values)}
    return made


def _check_names(where: str, given: Mapping[str, Any], known: Any) -> None:
    for name in given:
        if name not in known:
            close = nearest(name, known)
            raise AdapterError(
                f"weights of an adapter: there is no attention in {where}{name}",
                expected=", ".join(known),
                remedy=f"did you mean {close}?" if close else "",
            )


def _numbers(where: str, value: Any, count: int) -> list[float]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, count):
        raise AdapterError(f"weights of an adapter: {where} has {count} places of attention", found=f"{len(values)} numbers")
    return [number(f"the weight of {where}", item) for item in (values * count if len(values) == 1 else values)]


def hub_options(function: str, keywords: Mapping[str, Any]) -> HubOptions:
    """The options among keywords, which may be nothing else.

    Raises:
        UnknownArgumentError: One is something else.
    """
    options, others = HubOptions.split(keywords)
    for name in others:
        raise unknown_argument(function, name, [*HUB_KEYWORDS, "adapter_name", "weight_name", "subfolder", "use_safetensors"])
    return options
