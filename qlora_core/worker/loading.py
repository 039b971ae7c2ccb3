"""Base model folder -> model with an adapter, in 16 bits or quantised layer by layer, ready to train."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_core import precision, targets
from qlora_core.config import TrainConfig
from qlora_core.errors import ConfigError, ModelError
from qlora_core.worker.architecture import causal_language_model, linear_layers
from qlora_core.worker.hardware import DTYPES
from qlora_core.worker.quantising import QUANTISED, MixedConfig, quantization
from qlora_core.worker.shards import ShardAtHand, Shards

CPU = torch.device("cpu")
SVD_ITERATIONS = 16
# Our names for what PEFT calls otherwise. Its own LoftQ runs on a GPU only and forgets lora_alpha, so that is ours.
INIT: dict[str, bool | str] = {"default": True, "loftq": True, "pissa": f"pissa_niter_{SVD_ITERATIONS}"}


def load_base(
    folder: Path,
    config: TrainConfig,
    *,
    device: torch.device,
    dtype: str,
    four_bit: bool | None = None,
    shard_at_hand: ShardAtHand = nullcontext,
) -> PreTrainedModel:
    """The frozen base: 16 (or 32) bits for lora; for qlora 4 bits, and int8 or 16 in the layers that the config wants so; unless
    `four_bit` says that it is quantised, or not. Safetensors only, never code of the model's own.

    Tensor by tensor: each goes to the device and is quantised there before the next is read, so that beside the finished
    model there is one tensor in 16 bits on the device, and one on the host. Raises ModelError, and ConfigError for layers that
    the model does not have.
    """
    how = quantization(config, DTYPES[dtype]) if (config.method == "qlora" if four_bit is None else four_bit) else None
    shortages = shortages_of_memory(device)
    try:
        kind, architecture = causal_language_model(folder)
        if isinstance(how, MixedConfig) and getattr(architecture, "quantization_config", None) is not None:
            raise ModelError(
                f"base model {folder}: was saved quantised, so it cannot be held otherwise; leave quantize_modules and "
                "int8_modules out, or choose the model as it was before"
            )
        with Shards(folder, shard_at_hand) as shards:
            model, found = kind.from_pretrained(
                None,
                config=architecture,
                generation_config=generation_config(folder),
                state_dict=shards,
                dtype=DTYPES[dtype],
                quantization_config=how,
                device_map={"": device},
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:  # memory and shapes: RuntimeError
        if shortages_of_memory(device) > shortages:  # while quantising: transformers makes a plain RuntimeError of it
            raise torch.OutOfMemoryError(f"CUDA out of memory while {folder.name} was quantised") from error
        raise ModelError(f"base model {folder}: cannot be loaded: {' '.join(str(error).split())[:500]}") from error
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        raise ModelError(
            f"base model {folder}: cannot be loaded: its weights lack {len(missing)} tensors that {type(model).__name__} "
            f"needs ({', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}); fetch it again, whole"
        )
    model.name_or_path = model.config.name_or_path = str(folder)
    if how and not any(isinstance(module, QUANTISED) for module in model.modules()):
        raise ModelError(
            f"base model {folder}: bitsandbytes puts none of its layers ({type(model).__name__}) into 4 bits, so this would not "
            "be QLoRA; choose method lora"
        )
    if any(name.endswith(".dt_proj") and isinstance(module, QUANTISED) for name, module in model.named_modules()):
        raise ModelError(  # Mamba, Falcon-Mamba and Jamba multiply with its weight themselves, which packed bits do not allow
            f"base model {folder}: {type(model).__name__} cannot compute with dt_proj in 4 bits or int8; choose method lora, or "
            "name other layers in quantize_modules"
        )
    forbid_cpu_repacking(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def generation_config(folder: Path) -> GenerationConfig:
    """How the model generates, as its folder says."""
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # an older model says it in its config.json
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
        )


def shortages_of_memory(device: torch.device) -> int:
    """How often the GPU had too little memory for what this process asked of it."""
    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0


def forbid_cpu_repacking(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU.

    On CPUs with AVX512-BF16 a forward pass in evaluation mode repacks every Linear4bit, and nothing unpacks it for
    training: gradients are then wrong while the loss looks right, and a merge gives garbage.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def add_adapter(model: PreTrainedModel, config: TrainConfig, *, base_name: str) -> Any:
    """A PeftModel around `model` with a fresh adapter in fp32. Raises ConfigError for modules that do not exist.

    With init_lora_weights pissa or olora the base weights of `model` change: what the adapter takes over leaves them.
    """
    layers = linear_layers(model)
    targeted = targets.resolve(layers, config.target_modules)
    # GPT-2's Conv1D holds its weight transposed; PEFT sets this itself, with a warning, when it is left out. What is quantised
    # is not, but the base may be another when the adapter is loaded.
    transposed = any(Conv1D in (type(m), getattr(m, "source_cls", None)) for m in model.modules())
    if transposed and config.init_lora_weights == "olora":
        raise ConfigError(
            f"init_lora_weights is 'olora': PEFT mistakes the transposed layers of {base_name} for plain ones; choose pissa"
        )
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules=[layer.name for layer in targeted],
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=INIT.get(config.init_lora_weights, config.init_lora_weights),
        fan_in_fan_out=transposed,
    )
    # Seeded right before, so that LoRA and QLoRA of one seed start from the same A.
    torch.manual_seed(config.seed)
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:  # such as Mamba's out_proj, whose kernel bypasses the layer
        raise ConfigError(
            f"target_modules is {config.target_modules!r}: {error}; name other layers of {', '.join(targets.last_names(layers))}"
        ) from None
    if config.init_lora_weights == "loftq":
        dtype = next(name for name, kind in DTYPES.items() if kind == model.dtype)
        original = load_base(Path(model.name_or_path), config, device=CPU, dtype=dtype, four_bit=False)
        if not begin_with_what_was_lost(adapted, original):
            raise ConfigError(precision.NOTHING_LOST)
    narrow = {len(p) for name, p in adapted.named_parameters() if "lora_A" in name and len(p) != config.rank}
    if narrow:  # the singular vectors of a layer are no more than its narrower side
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights!r} with rank {config.rank}: some layers of {base_name} can give "
            f"{min(narrow)} directions only; set rank to {min(narrow)} or less, or init_lora_weights to default"
        )
    for parameter in trainable_parameters(adapted):  # orthogonal leaves the base's number type
        parameter.data = parameter.data.float()
    # What loads the adapter looks the base up by this: a name that others know, not a path of this machine.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


@torch.no_grad()
def begin_with_what_was_lost(adapted: Any, original: PreTrainedModel) -> int:
    """LoftQ with one iteration (https://arxiv.org/abs/2310.08659): of each quantised layer, the rank-r matrices B and A
    for which scale * B·A is nearest to original - quantised weight (truncated SVD). Returns the number of such layers."""
    begun = 0
    for name, layer in adapted.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer.get_base_layer(), QUANTISED):
            continue  # a layer that kept its 16 bits has lost nothing: its adapter begins as plain ones do
        weight = original.get_submodule(name).weight
        weight = weight.T if isinstance(original.get_submodule(name), Conv1D) else weight
        quantised = dequantize_module_weight(layer.get_base_layer())
        lost = weight.to(quantised.device, torch.float32) - quantised.float()
        rank = layer.r["default"]
        # Randomised, as PEFT's fast PiSSA: a full SVD of large layers takes many times longer.
        u, s, v = torch.svd_lowrank(
            lost / layer.scaling["default"], q=min(rank + 16, *lost.shape), niter=SVD_ITERATIONS
        )
        layer.lora_A["default"].weight.data = (v * s.sqrt())[:, :rank].T.contiguous()
        layer.lora_B["default"].weight.data = (u * s.sqrt())[:, :rank].contiguous()
        begun += 1
    return begun


def trainable_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names that PEFT saves them by."""
    # PEFT would ask the Hub whether the base's vocabulary grew, to save its embeddings too; ours never does.
    return get_peft_model_state_dict(model, save_embedding_layers=False)
