"""Tests have the environment of a run, which must stand before torch is imported."""

from memory import environment

environment.prepare()
