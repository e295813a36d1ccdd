"""NVIDIA's CUTLASS CuTe DSL examples, executed in the emulator and compared with references of our own.

    python -m tests.ptx_emulator.examples --cutlass PATH [NAME ...] [--schedule all]

PATH is a checkout of CUTLASS, which is not part of this repository. Each family of examples has a module here with one
adapter an example, which makes the operands and compiles the kernel, and a table `CASES`.
"""
