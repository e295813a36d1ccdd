"""The ops that the model is built from, under one name: the one place that says where they come from."""

from fp4suite import reference as ops

__all__ = ["ops"]
