"""Low-rank matrices beside a quantized model.

low_rank.py  what an adapter holds for one linear
eora.py      the best ones for what quantization has changed, in closed form
files.py     an adapter as peft, vLLM and others store it, and the way back
"""
