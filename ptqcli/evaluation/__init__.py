"""How good a checkpoint is: perplexity on a text, and divergence from the model that it came from.

tasks.py        questions with right answers, by the name of a file or of a task of lm-evaluation-harness; task_files.py, choices.py,
                exact_match.py and harness.py are their kinds, answers.py what comes of them
encoders.py     what takes the place of both for an encoder, and accuracy on labelled texts

windows.py      how a text is cut into windows, and which of their tokens are scored
perplexity.py   one pass over the windows; the mean loss and its exponential
divergence.py   the same pass with two models: KL divergence and agreement of the most likely tokens
uncertainty.py  the standard errors of these numbers
measure.py      both of them on any number of texts
"""
