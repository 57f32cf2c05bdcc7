"""Tests of `reshard`."""
