"""Experiments with a table and a verdict (`cat-audio experiment`).

``overfit``  one batch, fixed masks, fixed targets: the regression loss must fall by 90 %
``kernels``  the same run with the operators' kernels and with the dense formula
``visible``  the stem over all positions and over visible patches alone: tokens and gradients must agree
``overhead``  memory and time of a guide: without, cached, live in the data workers or in the training process
``failures``  what goes wrong with a guide, and collapse: each provoked, and the trainer's warning must name it

and the studies of `cat.experiments.claims`, which put the paper's claims to the test: several runs each from several
seeds, probed as they train (`study`, `trial`), read (`readings`), drawn and kept (`paper`, `records`).

All use the tiny model. On a small data set they show that the parts work and which way they pull; they do not measure
what the paper measures on AudioSet.
"""
