"""Pretrained networks and classifiers as small functions over arrays and tensors."""
