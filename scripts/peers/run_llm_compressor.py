"""GPTQ of llm-compressor with its defaults: act-order with groups fixed beforehand, damping 0.01, ranges of largest weights."""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from exchange import Request, hand_back, linears_of, processor_time
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

request = Request.read()
windows = request.tokens()
begun = processor_time()
model = request.load()
weights = QuantizationArgs(num_bits=request.bits, symmetric=True, strategy="group", group_size=request.group_size)
oneshot(
    model=model,
    processor=request.tokenizer(),
    dataset=Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": windows.new_ones(windows.shape).tolist()}),
    recipe=GPTQModifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]),
    batch_size=8,
    num_calibration_samples=len(windows),
    max_seq_length=windows.shape[1],
    shuffle_calibration_samples=False,
)
hand_back(request, {name: linear.weight for name, linear in linears_of(model).items()}, begun)
