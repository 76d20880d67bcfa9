"""Low-rank adapters of pipelines: one file for the UNet and the text encoders, one name in all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from suffuse.checkpoints.adapter_files import Choice
from suffuse.errors import AdapterError, InputError
from suffuse.layers.low_rank import LowRankAdapters, adapters_of, check_known, delete_adapters, drop_adapters, number
from suffuse.models.adapter_services import Wanted, block_weights, each, fuse, hub_options, listed, switch_off
from suffuse.models.lora import USUAL_NAME, Given, LoraFile, load_lora
from suffuse.models.lora_writing import Layers, write_lora

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""What adapters are for, in the order in which they are asked."""


class LoraLoaderMixin:
    """Ways of a pipeline to load low-rank adapters, and to choose among them.

    An adapter goes into the UNet and the text encoders it has factors for, and is loaded in all of them or in none.
    """

    unet_name, text_encoder_name = "unet", "text_encoder"

    # ---------------------------------------------------------------- load and save

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Given,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        **keywords: Any,
    ) -> None:
        """Load an adapter, and make it the only active one.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder, a repository, or named tensors; in the dialect of
                diffusers, PEFT or kohya-ss.
            adapter_name: What it is to be called; "default_0", "default_1", … if None.
            hotswap: Let it take the place of the adapter of that name: where ranks are the same, no module changes, and
                nothing that was compiled is compiled again.
            weight_name: The name of the file in a folder or a repository.
            subfolder: Of the folder or the repository.
            use_safetensors: True refuses pickles, False takes nothing else, None prefers safetensors.
            low_cpu_mem_usage: Kept for its name: memory is taken once in any case.
            **keywords: The `suffuse.hub.options.HubOptions`.

        Raises:
            AdapterError: It does not fit the pipeline, with the numbers; or the name is taken. The pipeline is unchanged.
            NonFiniteError: A tensor holds NaN or infinity. The pipeline is unchanged.
            CorruptFileError: The file is damaged. The pipeline is unchanged.
        """
        options = hub_options(f"{type(self).__name__}.load_lora_weights", keywords)
        choice = Choice(weight_name, subfolder, use_safetensors, (USUAL_NAME,))
        unet = getattr(self, self.unet_name, None)
        config = None if unet is None else unet.config
        file = LoraFile.open(pretrained_model_name_or_path_or_dict, choice, options, config)
        load_lora(file, self._adapted(), adapter_name, hotswap)

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: Given,
        *,
        unet_config: Mapping[str, Any] | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        return_lora_metadata: bool = False,
        **keywords: Any,
    ) -> tuple[Any, ...]:
        """The tensors of an adapter under the keys of PEFT, whatever dialect the file is in.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder, a repository, or named tensors.
            unet_config: The configuration of the UNet, for files with the block names of the original SDXL.
            weight_name: The name of the file in a folder or a repository.
            subfolder: Of the folder or the repository.
            use_safetensors: True refuses pickles, False takes nothing else, None prefers safetensors.
            return_lora_metadata: Return None as well, where the peer returns the settings that are in the header: here
                they are among the alphas.
            **keywords: The `suffuse.hub.options.HubOptions`.

        Returns:
            "component.layer.lora_A.weight" and "….lora_B.weight" → tensor; "component.layer.alpha" → α, or None if all are 1.
        """
        options = hub_options(f"{cls.__name__}.lora_state_dict", keywords)
        choice = Choice(weight_name, subfolder, use_safetensors, (USUAL_NAME,))
        file = LoraFile.open(pretrained_model_name_or_path_or_dict, choice, options, unet_config)
        tensors: dict[str, Tensor] = {}
        alphas: dict[str, float] = {}
        for component, layers in file.read_unfitted().items():
            for layer, (down, up, alpha) in layers.items():
                name = f"{component}.{layer}"
                tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
                alphas[f"{name}.alpha"] = alpha
        told = alphas if any(alpha != len(tensors[f"{name[:-6]}.lora_A.weight"]) for name, alpha in alphas.items()) else None
        return (tensors, told, None) if return_lora_metadata else (tensors, told)

    @classmethod
    def load_lora_into_unet(
        cls,
        state_dict: Mapping[str, Tensor],
        network_alphas: Mapping[str, float] | None,
        unet: nn.Module,
        low_cpu_mem_usage: bool | None = None,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        hotswap: bool = False,
    ) -> None:
        """Load what `lora_state_dict` gave for the UNet into one."""
        config: Any = getattr(unet, "config", None)
        file = LoraFile.open(state_dict, unet=config, network_alphas=network_alphas)
        load_lora(file.only(cls.unet_name), {cls.unet_name: unet}, adapter_name, hotswap)

    @classmethod
    def load_lora_into_text_encoder(
        cls,
        state_dict: Mapping[str, Tensor],
        network_alphas: Mapping[str, float] | None,
        text_encoder: nn.Module,
        prefix: str | None = None,
        lora_scale: float = 1.0,
        low_cpu_mem_usage: bool | None = None,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        hotswap: bool = False,
    ) -> None:
        """Load what `lora_state_dict` gave for a text encoder into one; `prefix` is "text_encoder_2" for the second."""
        name, scale = prefix or cls.text_encoder_name, number("lora_scale", lora_scale)
        file = LoraFile.open(state_dict, network_alphas=network_alphas).only(name)
        loaded = load_lora(file, {name: text_encoder}, adapter_name, hotswap)
        adapters = adapters_of(text_encoder)
        if adapters is not None and not hotswap:
            adapters.activate({loaded: scale})

    @classmethod
    def load_lora_into_transformer(
        cls,
        state_dict: Mapping[str, Tensor],
        network_alphas: Mapping[str, float] | None,
        transformer: nn.Module,
        low_cpu_mem_usage: bool | None = None,
        adapter_name: str | None = None,
        _pipeline: Any = None,
        hotswap: bool = False,
    ) -> None:
        """Load what a file holds for a transformer, under "transformer.", into one."""
        file = LoraFile.open(state_dict, network_alphas=network_alphas)
        load_lora(file.only("transformer"), {"transformer": transformer}, adapter_name, hotswap)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        unet_lora_layers: Layers = None,
        text_encoder_lora_layers: Layers = None,
        transformer_lora_layers: Layers = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write an adapter that diffusers reads too.

        Args:
            save_directory: The folder; other files in it stay.
            unet_lora_layers: Named factors, such as `pipe.unet.lora_layers("name")` gives.
            text_encoder_lora_layers: The same of the text encoder: `suffuse.models.adapter_services.lora_layers(model, "name")`.
            transformer_lora_layers: The same of a transformer.
            is_main_process: False does nothing: of many processes with the same weights, one writes.
            weight_name: The name of the file; pytorch_lora_weights.safetensors if None.
            save_function: Writes the file, called with (tensors by name, path).
            safe_serialization: False writes a pickle.

        Raises:
            AdapterError: There is nothing to write.
            SaveError: It could not be written; what was there is untouched.
        """
        parts = {"unet": unet_lora_layers, "text_encoder": text_encoder_lora_layers, "transformer": transformer_lora_layers}
        write_lora(parts, save_directory, is_main_process, weight_name, save_function, safe_serialization)

    @staticmethod
    def write_lora_layers(
        state_dict: Mapping[str, Tensor],
        save_directory: str | os.PathLike[str],
        is_main_process: bool,
        weight_name: str | None,
        save_function: Callable[[dict[str, Tensor], str], Any] | None,
        safe_serialization: bool,
    ) -> None:
        """Write factors that have the names of their components already; see `save_lora_weights`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state_dict.items():
            component, _, layer = key.partition(".")
            known = component in COMPONENTS
            parts.setdefault(component if known else "", {})[layer if known else key] = tensor
        write_lora(parts, save_directory, is_main_process, weight_name, save_function, safe_serialization)

    # ---------------------------------------------------------------- which count

    def set_adapters(self, adapter_names: Sequence[str] | str, adapter_weights: Wanted | Sequence[Wanted] = None) -> None:
        """Make these adapters the active ones.

        Args:
            adapter_names: One or more; their updates are added in this order.
            adapter_weights: How much of each: a number for all, or one entry for each. An entry may be a dictionary by component,
                such as `{"text_encoder": 0.5, "unet": {"down": 0.9, "mid": 1.0, "up": {"block_0": [0.6, 0.9, 0.8]}}}`; what it
                leaves out counts once.

        Raises:
            AdapterError: A name is unknown, a list has another length, or a component or block is not there; nothing is changed.
        """
        names = listed(adapter_names)
        check_known(names, self._adapter_names())
        weights = each(adapter_weights, names)
        for weight in weights:
            unknown = sorted(weight.keys() - set(self._adapted())) if isinstance(weight, Mapping) else []
            if unknown:
                raise AdapterError(
                    f"weights of an adapter: the pipeline has no {', '.join(unknown)}", expected=", ".join(self._adapted())
                )
        wanted: list[tuple[LowRankAdapters, dict[str, Any]]] = []
        for component, model in self._adapted().items():
            adapters = None if model is None else adapters_of(model)
            if adapters is not None:
                parts = [weight.get(component) if isinstance(weight, Mapping) else weight for weight in weights]
                read = block_weights if component == self.unet_name else _one_weight
                own = {name: read(model, part) for name, part in zip(names, parts, strict=True)}
                wanted.append((adapters, {name: weight for name, weight in own.items() if name in adapters.names}))
        for adapters, own in wanted:
            adapters.activate(own)

    def set_adapters_for_text_encoder(
        self,
        adapter_names: Sequence[str] | str,
        text_encoder: nn.Module | None = None,
        text_encoder_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Make these adapters the active ones of a text encoder, the first if None."""
        names, adapters = listed(adapter_names), self._of_text_encoder(text_encoder)
        check_known(names, adapters.names)
        wanted = zip(names, each(text_encoder_weights, names), strict=True)
        adapters.activate({name: _one_weight(None, weight) for name, weight in wanted})

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(dict.fromkeys(name for adapters in self._loaded().values() for name in adapters.weights))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component → names of the adapters it has factors of."""
        return {component: list(adapters.names) for component, adapters in self._loaded().items()}

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Remove adapters.

        Raises:
            AdapterError: A name is unknown, or the adapter is fused; nothing is changed.
        """
        names = listed(adapter_names)
        check_known(names, self._adapter_names())
        for adapters in self._loaded().values():
            adapters.check_unfused(names)
        for model in self._adapted().values():
            if model is not None:
                delete_adapters(model, names)

    def enable_lora(self) -> None:
        """Let the active adapters count again."""
        for adapters in self._loaded().values():
            adapters.enable(True)

    def disable_lora(self) -> None:
        """Let no adapter count until `enable_lora`."""
        for adapters in self._loaded().values():
            switch_off(adapters)

    def enable_lora_for_text_encoder(self, text_encoder: nn.Module | None = None) -> None:
        """Let the active adapters of a text encoder count again, of the first if None."""
        self._of_text_encoder(text_encoder).enable(True)

    def disable_lora_for_text_encoder(self, text_encoder: nn.Module | None = None) -> None:
        """Let no adapter of a text encoder count, of the first if None."""
        switch_off(self._of_text_encoder(text_encoder))

    def unload_lora_weights(self) -> None:
        """Remove all adapters. What is fused stays in the weights, for good; all else is as if they had never been loaded."""
        for model in self._adapted().values():
            if model is not None:
                drop_adapters(model)

    def set_lora_device(self, adapter_names: Sequence[str] | str, device: torch.device | str | int) -> None:
        """Send adapters to a device, to make room. One that is not where its model is can be used, but is copied in every call.

        Raises:
            AdapterError: A name is unknown; nothing is changed.
        """
        names = listed(adapter_names)
        check_known(names, self._adapter_names())
        for adapters in self._loaded().values():
            adapters.move([name for name in names if name in adapters.names], device)

    # ---------------------------------------------------------------- into the weights

    def fuse_lora(
        self,
        fuse_unet: bool = True,
        fuse_text_encoder: bool = True,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        components: Sequence[str] | None = None,
    ) -> None:
        """Add updates to the weights themselves: as fast as without adapters. Weights as they were are kept for `unfuse_lora`.

        Args:
            fuse_unet: Into the UNet.
            fuse_text_encoder: Into the text encoders.
            lora_scale: How many times the updates count.
            safe_fusing: Look for NaN and infinity in the sums first.
            adapter_names: Which adapters; the active ones if None.
            components: Into which components, instead of the first two.

        Raises:
            AdapterError: A name is unknown, or fused already; nothing is changed.
            NonFiniteError: `safe_fusing` found some; nothing is changed.
        """
        names = None if adapter_names is None else listed(adapter_names)
        check_known(names or (), self._adapter_names())
        fuse(self._chosen(fuse_unet, fuse_text_encoder, components), lora_scale, safe_fusing, names)

    def unfuse_lora(
        self, unfuse_unet: bool = True, unfuse_text_encoder: bool = True, components: Sequence[str] | None = None
    ) -> None:
        """Give the weights back the very bits they had before `fuse_lora`."""
        for adapters in self._chosen(unfuse_unet, unfuse_text_encoder, components):
            adapters.unfuse()

    @property
    def lora_scale(self) -> float:
        """How many times adapters count in the last run of this thread: `cross_attention_kwargs={"scale": …}`."""
        return (getattr(self, "cross_attention_kwargs", None) or {}).get("scale", 1.0)

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters that are fused."""
        return {name for adapters in self._loaded().values() for name in adapters.fused}

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are fused."""
        return len(self.fused_loras)

    # ---------------------------------------------------------------- inside

    def _adapted(self) -> dict[str, Any]:
        """The models adapters are for, by component."""
        return {name: getattr(self, name) for name in COMPONENTS if hasattr(self, name)}

    def _loaded(self) -> dict[str, LowRankAdapters]:
        """The adapters of the models that have some."""
        found = {name: adapters_of(model) for name, model in self._adapted().items() if model is not None}
        return {name: adapters for name, adapters in found.items() if adapters is not None}

    def _adapter_names(self) -> list[str]:
        return list(dict.fromkeys(name for adapters in self._loaded().values() for name in adapters.names))

    def _chosen(self, unet: bool, text_encoders: bool, components: Sequence[str] | None) -> list[LowRankAdapters]:
        if not isinstance(unet, bool) or not isinstance(text_encoders, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                "what to fuse is told by True and False",
                found=(unet, text_encoders),
                remedy="pass a list of names as components=…",
            )
        unknown = sorted(set(components or ()) - set(self._adapted()))
        if unknown:
            raise AdapterError(f"the pipeline has no {', '.join(unknown)}", expected=", ".join(self._adapted()))
        told = [name for name in COMPONENTS if (unet if name == self.unet_name else text_encoders)]
        return [adapters for name, adapters in self._loaded().items() if name in (told if components is None else components)]

    def _of_text_encoder(self, model: nn.Module | None) -> LowRankAdapters:
        model = getattr(self, self.text_encoder_name, None) if model is None else model
        adapters = None if model is None else adapters_of(model)
        if adapters is None:
            raise AdapterError("the text encoder has no adapters", remedy="load one first: load_lora_weights(…)")
        return adapters


class StableDiffusionXLLoraLoaderMixin(LoraLoaderMixin):
    """The same of pipelines with two text encoders."""

    @classmethod
    def save_lora_weights(  # pyright: ignore[reportIncompatibleMethodOverride]: the second text encoder stands third
        cls,
        save_directory: str | os.PathLike[str],
        unet_lora_layers: Layers = None,
        text_encoder_lora_layers: Layers = None,
        text_encoder_2_lora_layers: Layers = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write an adapter that diffusers reads too; see `LoraLoaderMixin.save_lora_weights`."""
        parts = {"unet": unet_lora_layers, "text_encoder": text_encoder_lora_layers, "text_encoder_2": text_encoder_2_lora_layers}
        write_lora(parts, save_directory, is_main_process, weight_name, save_function, safe_serialization)


def _one_weight(model: Any, wanted: Any) -> float:
    return number("the weight of an adapter in a text encoder", wanted)
