"""Stands in for tuner.measure in the measuring child: known times with noise and drift, and every kind of accident."""

import os
import signal
import time

import numpy as np

from fp4suite import registry

from . import fake_kernel

_configs: dict[int, fake_kernel.Config] = {}
_rng = np.random.default_rng(0)
_broken = False
_clock = 1.0


def open_bench(op, dims, device, seed):
    global _broken
    _configs.clear()
    _broken = False
    if device == "cuda:absent":
        raise RuntimeError("no such device")


def record(number, kernel, knobs):
    global _broken
    config = registry.make_config(registry.load(kernel), knobs)
    if config.fault == "wrong":
        raise AssertionError("3 of 9 elements are out of bound")
    if config.fault == "raise":
        raise ValueError("does not compile\nsecond line")
    if config.fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if config.fault == "hang":
        time.sleep(600)
    if config.fault == "poison":
        _broken = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    _configs[number] = config


def rounds(numbers, count):
    global _clock
    if _broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    times = []
    for _ in range(count):
        _clock *= 1.002  # the device warms up
        times.append([_time(n) * _clock for n in numbers])
    return times


def forget(number):
    _configs.pop(number, None)


def record_baseline(number):
    _configs[number] = None
    return "cublas_bf16"


def _time(number):
    config = _configs[number]
    true = 20.0 if config is None else fake_kernel.true_us(config)
    return true * float(np.exp(0.005 * _rng.standard_normal()))
