"""What is done to a checkpoint that has its codes already: its scales are tuned, on the whole model at once.

tune_scales.py  the method: what is trained, the loss, when it stops
student.py      the checkpoint as a model whose scales ask for gradients
teacher.py      the original's logits, in the memory of one of its blocks
estimate.py     the memory that it takes
"""
