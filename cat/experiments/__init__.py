"""The first experiments to run, each with a table and a verdict (`cat-audio experiment`).

``overfit``         one batch, fixed masks, fixed targets: the regression loss must fall by 90 %
``regularisation``  the same run with and without representation regularisation
``resolutions``     a stem with patches only, {16}, against the multi-resolution one, {4, 8, 16}
``kernels``         the same run with the operators' kernels and with the dense formula: losses must agree
``failures``        what goes wrong with a guide, and collapse: each provoked, and the trainer's warning must name it

All use the tiny model and the sounds of ``cat-audio synth``. On two CPU cores ``overfit`` takes half a minute and the
others, which train two models and more each, several minutes. A single seed on a small synthetic data set shows that
the parts work and which way they pull; it does not measure what the paper measures on AudioSet.
"""
