"""The mathematics of CHORD. Pure: tensors and numbers in, tensors and numbers out."""
