"""The cheapest recipe that keeps a goal, found by trials: what `ptq tune` does.

goal.py        what may be lost, and how far a measured checkpoint is from that
space.py       which recipes are tried: a table of choices, of a YAML file or the usual one
mixtures.py    recipes between two: some groups of linears as in the one, the others as in the other
strategies.py  in which order
traces.py      the order of one of them
trial.py       one recipe, quantized and measured
workshop.py    the folder in which the trials lie, and what is known of those that are done
tune.py        all of it
"""
