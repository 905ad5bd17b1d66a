"""How good a checkpoint is: perplexity on a text, and divergence from the model that it came from.

windows.py      how a text is cut into windows, and which of their tokens are scored
perplexity.py   one pass over the windows; the mean loss and its exponential
divergence.py   the same pass with two models: KL divergence and agreement of the most likely token
"""
