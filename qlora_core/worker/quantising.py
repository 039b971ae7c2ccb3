"""Bases of which some layers are held in 4 bits, some in int8, the rest in 16: how transformers loads them, and the way back."""

from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora_core import precision
from qlora_core.config import TrainConfig
from qlora_core.worker.architecture import linear_layers

QUANTISED = (Linear4bit, Linear8bitLt)
MIXED = "bitsandbytes_mixed"
# Of a matrix that are made whole numbers at once.
ROWS = 1024


def quantization(config: TrainConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers quantises by while it loads: its own way where every layer is to be in 4 bits."""
    how = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.quant_type,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
    }
    if config.quantize_modules == "all" and not config.int8_modules:
        return BitsAndBytesConfig(**how)
    AUTO_QUANTIZER_MAPPING[MIXED] = MixedQuantizer
    return MixedConfig(layers={name: list_or_text(getattr(config, name)) for name in precision.FIELDS}, **how)


def list_or_text(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


class MixedConfig(BitsAndBytesConfig):
    """4 bits as bitsandbytes has them, for the layers that `layers` (quantize_modules, int8_modules) chooses."""

    def __init__(self, *, layers: dict[str, Any], **how: Any) -> None:
        super().__init__(**how)
        self.quant_method, self.layers = MIXED, layers


class MixedQuantizer(Bnb4BitHfQuantizer):
    """Puts layers of 4 and 8 bits where the config wants them, before any weight is read."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        bits = precision.bits(linear_layers(model), TrainConfig(**config.layers))
        for name, width in bits.items():
            module = model.get_submodule(name)
            outputs, inputs = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
            with torch.device("meta"):
                if width == 8:
                    made = Int8Linear(inputs, outputs, module.bias is not None, has_fp16_weights=False)
                else:
                    made = Linear4bit(
                        inputs,
                        outputs,
                        module.bias is not None,
                        config.bnb_4bit_compute_dtype,
                        compress_statistics=config.bnb_4bit_use_double_quant,
                        quant_type=config.bnb_4bit_quant_type,
                    )
            made.source_cls = type(module)
            model.set_submodule(name, made.requires_grad_(False))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QUANTISED) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return Quantise(super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        kinds = {type(module) for module in model.modules()}
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = Linear4bit in kinds, Int8Linear in kinds
        return model

    def is_serializable(self) -> bool:
        return False  # nothing else would know how to load it


class Quantise(ConversionOps):
    """One tensor as it has been read -> the parameter that its layer holds; in 4 bits as transformers does it."""

    def __init__(self, to_4_bits: ConversionOps) -> None:
        self.to_4_bits = to_4_bits

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        (name, value), *_ = input_dict.items()
        layer = get_module_from_name(model, name)[0]
        if not isinstance(layer, Int8Linear):
            return self.to_4_bits.convert(input_dict, model=model, **kwargs)
        value = value[0] if isinstance(value, list) else value
        return {name: in_int8(value.T if layer.source_cls is Conv1D else value)}


def in_int8(weight: torch.Tensor) -> Int8Params:
    """[outputs, inputs] -> whole numbers of -127 to 127, and for each row (an output) its largest magnitude in fp32.

    LLM.int8's way for weights (https://arxiv.org/abs/2208.07339): a number n stands for n / 127 of that magnitude. Computed in
    fp32, so that a merge on a CPU finds the numbers that a GPU trained with; bitsandbytes rounds to fp16 first.
    """
    largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1)).float()
    steps_a_unit = 127 / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for begin in range(0, len(weight), ROWS):  # no second matrix in fp32
        part = slice(begin, begin + ROWS)
        numbers[part] = (weight[part].float() * steps_a_unit[part]).round_()
    return Int8Params(numbers, requires_grad=False, has_fp16_weights=False, CB=numbers, SCB=largest)


class Int8Linear(Linear8bitLt):
    """bitsandbytes' layer in 8 bits, whose products are made with its weights dequantised, as those of a 4-bit layer are.

    bitsandbytes itself rounds the inputs to int8 too, on a CPU in evaluation alone, and keeps the columns with large ones
    apart, wherever in a pass they are: a row's loss would then depend on the rows that share its pass, and on whether
    it is trained on or evaluated (measured: 0.9 % of the outputs of a random layer).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return Int8Product.apply(x, self.weight.data, self.weight.SCB, bias)


class Int8Product(torch.autograd.Function):
    """x·W^T + bias; W is made again for the gradient of x, so that no 16-bit weights are kept from pass to pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, numbers: torch.Tensor, largest: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # Not saved for backward: what offloads activations to the host would take the weights along.
        ctx.weight = numbers, largest
        return nn.functional.linear(x, _dequantized(numbers, largest, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradient @ _dequantized(*ctx.weight, gradient.dtype), None, None, None


def _dequantized(numbers: torch.Tensor, largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return numbers.to(dtype).mul_(largest[:, None] / 127)


def plain_layer(module: nn.Module) -> nn.Module:
    """What a quantised layer was before, with its bias, and a weight without memory (on the device "meta")."""
    with torch.device("meta"):
        if _was_conv1d(module):
            plain = Conv1D(module.out_features, module.in_features)
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    plain.bias = module.bias
    return plain


def dequantized_weight(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a quantised layer, as its plain layer holds it."""
    weight = dequantize_module_weight(module).to(dtype)
    return weight.T.contiguous() if _was_conv1d(module) else weight


def _was_conv1d(module: nn.Module) -> bool:
    """GPT-2's layer, which holds its weight transposed."""
    return getattr(module, "source_cls", nn.Linear) is Conv1D


def forget_quantisation(model: PreTrainedModel) -> None:
    """So that nothing takes the model, of which no layer is quantised any more, for a quantised one."""
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
