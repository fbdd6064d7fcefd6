"""TFLite files: conversion, editing, quantisation, running, for the target `phone`. Start at `convert.py`."""
