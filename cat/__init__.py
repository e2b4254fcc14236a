"""The reference trainer of the Convolutional Audio Transformer (arXiv 2601.21612), on the operators of cat_kernels."""
