"""TensorRT: conversion, proof on the processor, compilation for named GPUs, manifests.

May import: `publishing` and below.
Start reading: `build.py`.
"""
