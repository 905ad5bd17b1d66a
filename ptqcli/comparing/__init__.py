"""Checkpoints side by side: all of them and the model that they came from on the same tokens, in one process.

run.py        one checkpoint after the other in memory, beside the baseline
texts.py      what they are measured on
identity.py   which files and versions the numbers belong to
stored.py     what a checkpoint takes on the disk
results.py    the numbers of all, pairs of checkpoints, and the front of size against quality
flips.py      answers to questions that changed
speed.py      tokens a second
words.py      the numbers as people read them; table.py, as CSV; picture.py, as PNG
page.py       the numbers as a page of HTML, with charts.py on svg.py
"""
