"""AutoRound (SignRound) with its defaults, symmetric: the rounding and the range of each block learned by signed gradients."""

from auto_round import AutoRound
from exchange import Request, hand_back, linears_of, processor_time
from torch.utils.data import DataLoader

request = Request.read()
windows = request.tokens()
begun = processor_time()
model = request.load()
samples = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} for row in windows]
learner = AutoRound(
    model,
    tokenizer=request.tokenizer(),
    bits=request.bits,
    group_size=request.group_size,
    sym=True,
    dataset=DataLoader(samples, batch_size=request.options["batch_size"]),
    iters=request.options["iters"],
    batch_size=request.options["batch_size"],
    nsamples=len(windows),
    seqlen=windows.shape[1],
    seed=request.seed,
    device_map="cpu",
    low_gpu_mem_usage=False,
)
made, _ = learner.quantize()
hand_back(request, {name: linear.weight for name, linear in linears_of(made).items()}, begun)
