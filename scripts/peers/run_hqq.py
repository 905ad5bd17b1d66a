"""HQQ with its defaults, which needs no calibration: float scales and zero points a group, fitted by half-quadratic splitting."""

from exchange import SCALE_BITS, Request, hand_back, linears_of, processor_time
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

request = Request.read()
begun = processor_time()
model = request.load()
weights = {}
for name, linear in linears_of(model).items():
    asked = BaseQuantizeConfig(nbits=request.bits, group_size=request.group_size)
    made = HQQLinear(linear, asked, compute_dtype=linear.weight.dtype, device="cpu", del_orig=False)
    weights[name] = made.dequantize()
hand_back(request, weights, begun, group_bits=2 * SCALE_BITS)
