"""What each group of linears costs in each scheme that it may get: the losses that ``ptqcli.allocate`` weighs against bytes.

One file a method. All round the weights on trial to nearest, on grids of least squared error, as the solver fits them:

    gradient  the second-order loss of the logits, from the diagonal of the Fisher information: one forward and backward pass
    kl        KL divergence at the logits, with one group rounded at a time
    hawq      mean trace of the Hessian times squared error
    output    error of the output of the group's block: one block in memory at a time

squared_errors.py is what gradient and hawq share.
"""
