"""Reference implementations written from the papers alone, independent of the package they test.

Plain loops over tokens and experts on float64 tensors, pure functions with the weights as arguments. Shapes use
T tokens, E experts, d model width, h expert width, L tokens of a sequence. Masks and weights are zero off the
assignment. Losses are returned unweighted; the caller multiplies by the coefficients.
"""
