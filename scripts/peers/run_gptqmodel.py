"""GPTQ of GPTQModel with its defaults, symmetric."""

import os
import tempfile

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it refuses to work with one, which it takes on two cores

from exchange import Request, hand_back, processor_time
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

request = Request.read()
windows = request.tokens()
begun = processor_time()
model = GPTQModel.load(request.model, QuantizeConfig(bits=request.bits, group_size=request.group_size, sym=True), device="cpu")
samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
model.quantize(samples, batch_size=8, backend=BACKEND.TORCH)
with tempfile.TemporaryDirectory() as folder:
    model.save(folder)  # which is when it has weights again
    loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH).model
    packed = {name: module for name, module in loaded.named_modules() if hasattr(module, "dequantize_weight")}
    hand_back(request, {name: module.dequantize_weight().T for name, module in packed.items()}, begun)
